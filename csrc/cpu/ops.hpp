// The ops' arguments: plain pointers and sizes, the same for every instruction set.
//
// Shapes are those of fused_dni/backends/base.py: N rows, I and O features in and out, rank R, K
// context features. Matrices are row-major and contiguous; elements are float or double, as the
// function that is called says. A null pointer is a tensor that is not there (or not wanted).
#pragma once

#include <cstddef>
#include <cstdint>

namespace fused_dni {

struct LayerArguments {
  std::int64_t rows, in, out;  // N, I, O
  int threads;
  int normalization;  // 0 none, 1 batch, 2 layer
  int activation;     // index into ACTIVATIONS
  double eps, momentum;
  bool training;
  void* weight;  // [O, I]
  void* bias;    // [O], as all that follow
  void* norm_weight;
  void* norm_bias;
  void* running_mean;
  void* running_var;
};

struct SynthesizerArguments {
  int kind;                    // 0 dense, 1 low rank, 2 diagonal
  std::int64_t rank, classes;  // R, K
  void* weight;                // [O, O], [O, R] or [O]
  void* down;                  // [R, O]
  void* context_weight;        // [O, K]
  void* bias;                  // [O]
  const std::int64_t* labels;  // [N] in [0, K), or
  const void* vectors;         // [N, K]
};

constexpr int kSlots = 4;

struct RuleArguments {
  int kind;  // 0 sgd, 1 adam, 2 adamw
  bool nesterov;
  double* hyper;  // lr, beta1 or momentum, beta2, eps, weight decay, steps, skipped
  void* first[kSlots];
  void* second[kSlots];
  bool trainable[kSlots];
};

struct LinearForward {
  LayerArguments layer;
  const void* x;     // [N, I]
  void* h;           // [N, O]
  void* normalized;  // [N, O], what Saved holds
  void* rstd;        // [O] or [N]
};

struct LinearBackward {
  LayerArguments layer;
  const void* grad_h;      // [N, O]
  const void* x;           // [N, I]
  const void* h;           // [N, O]
  const void* normalized;  // [N, O]
  const void* rstd;        // [O] or [N]
  void* delta;             // [N, O]
  void* grad_x;            // [N, I]
  void* grad_weight;       // [O, I]
  void* grad_bias;         // [O], as the two that follow
  void* grad_norm_weight;
  void* grad_norm_bias;
};

struct LinearUpdate {
  LayerArguments layer;
  RuleArguments rule;
  const void* x;          // [N, I]
  const void* delta;      // [N, O]
  const void* grad_bias;  // [O], as the two that follow
  const void* grad_norm_weight;
  const void* grad_norm_bias;
};

struct LinearStep {
  LayerArguments layer;
  SynthesizerArguments synthesizer;
  RuleArguments rule;
  double target_scale, max_norm;
  const void* x;  // [N, I]
  void* h;        // [N, O]
  void* scaled;   // [N, O]
  void* reduced;  // [N, R]
  void* grad_x;   // [N, I]
};

struct SynthesizerPredict {
  SynthesizerArguments synthesizer;
  std::int64_t rows, features;  // N, O
  int threads;
  const void* h;  // [N, O]
  void* scaled;   // [N, O]
  void* reduced;  // [N, R]
};

// Gradients are written where `gradients` points; with a rule they are applied instead.
struct SynthesizerTrain {
  SynthesizerArguments synthesizer;
  std::int64_t rows, features;  // N, O
  int threads;
  double target_scale;
  const void* h;        // [N, O]
  const void* scaled;   // [N, O]
  const void* reduced;  // [N, R]
  const void* grad_h;   // [N, O]
  double* statistics;   // [5]
  bool update;
  RuleArguments rule;
  void* gradients[kSlots];
};

// One set an instruction set; [0] for float, [1] for double, [2] for x, h and dx in bfloat16 and
// everything else in float (null where the machine has no instructions for that).
struct Kernels {
  void (*linear_forward[3])(const LinearForward&);
  void (*linear_backward[3])(const LinearBackward&);
  void (*linear_update[3])(const LinearUpdate&);
  void (*linear_step[3])(const LinearStep&);
  void (*synthesizer_predict[2])(const SynthesizerPredict&);
  void (*synthesizer_train[2])(const SynthesizerTrain&);
};

// The calling thread's scratch memory: at least `bytes`, aligned to a cache line, contents left
// from whatever used it last. Valid until the thread's next call. Throws std::bad_alloc.
void* scratch(std::size_t bytes);

}  // namespace fused_dni
