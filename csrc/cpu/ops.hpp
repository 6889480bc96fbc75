// The ops' arguments: plain pointers and sizes, the same for every instruction set.
//
// Shapes are those of fused_dni/ops/types.py: N rows, I and O features in and out, rank R, K
// context features. Matrices are row-major and contiguous; elements are float or double, as the
// function that is called says. A null pointer is a tensor that is not there (or not wanted).
//
// Between the layers of a stack a matrix of the batch may stay as the kernels keep it, transposed:
// [features][stride] with transposed_stride() elements from row to row.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fused_dni {

constexpr std::int64_t kCacheLine = 64;

// Few enough rows of the batch that the product is one pass over W, whatever is done: vectors then
// run along W's rows, as they would be mostly padding in the transposed layout, and nothing may stay
// in that.
constexpr std::int64_t kDotRows = 3;

// Whole cache lines, an odd number of them: rows then spread over all sets of a cache.
[[gnu::always_inline]] constexpr std::int64_t transposed_stride(std::int64_t rows,
                                                                std::int64_t element_size) {
  const std::int64_t line = kCacheLine / element_size;
  return (((rows + line - 1) / line) | 1) * line;
}

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
  int kind;                    // 0 dense, 1 low rank, 2 diagonal, 3 cross entropy
  std::int64_t rank, classes;  // R, K: the same of a cross entropy
  void* weight;                // [O, O], [O, R] or [O]
  void* down;                  // [R, O]
  void* context_weight;        // [O, K]; of a cross entropy [K]; with a table []
  void* bias;                  // [O]
  const void* table;           // [K, O]
  bool narrow;                 // the table is of bfloat16
  std::int64_t ignored;        // with a table: the label of rows that are not in the loss
  std::int64_t counted;        // how many are
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
  std::int64_t ahead = 0;  // of its steps in the same region, which are not counted yet
};

struct LinearForward {
  LayerArguments layer;
  const void* x;      // [N, I]
  void* h;            // [N, O]; null with `transposed` where nothing else reads it
  void* normalized;   // [N, O], what Saved holds; with `transposed` in that layout too
  void* rstd;         // [O] or [N]
  bool x_transposed;  // more than kDotRows rows
  void* transposed;   // h [O][stride]
};

struct LinearBackward {
  LayerArguments layer;
  const void* grad_h;      // [N, O]
  double factor = 1.0;     // on grad_h
  const void* x;           // [N, I]
  const void* h;           // [N, O]
  const void* normalized;  // [N, O]
  const void* rstd;        // [O] or [N]
  void* delta;             // [N, O]
  void* grad_x;            // [N, I]
  void* grad_weight;       // [O, I]; null with anything transposed
  void* grad_bias;         // [O], as the two that follow
  void* grad_norm_weight;
  void* grad_norm_bias;
  bool transposed;  // h, normalized and delta
  bool grad_h_transposed, grad_x_transposed;
  bool grad_h_narrow;  // of bfloat16, as x
};

// The loss of a layer without normalisation and activation, whose outputs are classes.
struct LinearCrossEntropy {
  LayerArguments layer;
  const void* x;               // [N, I]
  const std::int64_t* target;  // [N] in [0, O), or `ignored`
  std::int64_t ignored;        // the target of rows that are not in the loss
  std::int64_t counted;        // how many are
  double smoothing;            // share of the uniform distribution in the targets'
  void* loss;                  // []
  void* delta;                 // [N, O], its gradient at the logits; null if it is not wanted
  bool x_transposed, delta_transposed;
};

struct LinearUpdate {
  LayerArguments layer;
  RuleArguments rule;
  const void* x;          // [N, I]
  const void* delta;      // [N, O]
  const void* grad_bias;  // [O], as the two that follow
  const void* grad_norm_weight;
  const void* grad_norm_bias;
  bool x_transposed, delta_transposed;
};

struct LinearStep {
  LayerArguments layer;
  SynthesizerArguments synthesizer;
  RuleArguments rule;
  double target_scale, max_norm;
  bool preactivation;  // the gradient is predicted at z = x W^T + b, else at h
  const void* x;       // [N, I]
  void* h;             // [N, O]; null with `transposed`
  void* scaled;        // [N, O]
  void* reduced;       // [N, R]
  void* grad_x;        // [N, I]
  void* normalized;    // [N, O], what Saved holds
  void* rstd;          // [O] or [N]
  bool x_transposed, grad_x_transposed;
  void* transposed;  // h [O][stride]; scaled and reduced are then in that layout too
};

struct SynthesizerPredict {
  SynthesizerArguments synthesizer;
  std::int64_t rows, features;  // N, O
  int threads;
  const void* h;    // [N, O]
  void* scaled;     // [N, O]
  void* reduced;    // [N, R]
  bool transposed;  // all three
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
  double* statistics;   // [5]; null for none
  bool update;
  RuleArguments rule;
  void* gradients[kSlots];
  bool transposed;  // h, scaled, reduced, and grad_h unless it is narrow or given
  bool narrow;      // grad_h is of bfloat16; with floats
  bool given;       // grad_h is row-major in any case
  bool again;       // another prediction and lesson of the same synthesizer follow in the region
};

// ---- LSTM: T steps, B sequences side by side, L layers of H units --------------------------------
//
// Gates and their gradients (delta) are in the private order of lstm_order.hpp.

struct LSTMSizes {
  std::int64_t steps, batch, in, hidden;  // T, B, I (of the first layer), H
  int threads;
};

// One layer's parameters or their gradients; rows in the gate order i, f, g, o.
struct LSTMLayerArguments {
  void* weight_ih;  // [4H, I]
  void* weight_hh;  // [4H, H]
  void* bias_ih;    // [4H], both biases or none
  void* bias_hh;    // [4H]
};

struct LSTMForward {
  LSTMSizes sizes;
  std::int64_t depth;                // L
  const LSTMLayerArguments* layers;  // [L]
  const void* const* dropout;        // [L - 1], each [T, B, H]; null for none
  const std::int64_t* lengths;       // [B]
  const void* x;                     // [T, B, I]
  const void* h;                     // [L, B, H]
  const void* c;                     // [L, B, H]
  void* hidden;                      // [L, T + 1, B, H], or [1, T + 1, B, H] without gates
  void* last_h;                      // [L, B, H]
  void* last_c;                      // [L, B, H]
  void* cells;                       // [L, T + 1, B, H], there if gates are
  void* gates;                       // [L, T, B, 4H]
};

struct LSTMBackward {
  LSTMSizes sizes;
  std::int64_t depth;                   // L
  const LSTMLayerArguments* layers;     // [L]
  const LSTMLayerArguments* gradients;  // [L], null if not wanted
  const void* const* dropout;           // as LSTMForward
  const std::int64_t* lengths;          // [B]
  const void* grad_output;              // [T, B, H]
  const void* grad_last_h;              // [L, B, H]
  const void* grad_last_c;              // [L, B, H]
  const void* x;                        // [T, B, I]
  const void* hidden;                   // [L, T + 1, B, H]
  const void* cells;                    // [L, T + 1, B, H]
  const void* gates;                    // [L, T, B, 4H]
  void* delta;                          // [L, T, B, 4H]
  void* grad_h;                         // [L, B, H]
  void* grad_c;                         // [L, B, H]
  void* grad_x;                         // [T, B, I]
};

// The ends of a window. A lesson is a row for each row of the batch at the entrance that continues
// a sequence, if `entrance`, and one for each that ends at the exit. In `rows`, `scaled` and
// `reduced` the batch's rows at the exit stand before it if `strength` is not zero.
struct LSTMBoundary {
  SynthesizerArguments synthesizer;  // over rows of 2 L H features, without context
  double target_scale, strength, max_norm, max_target_norm;
  bool entrance;
  const bool* ended;   // [B]
  const void* last_h;  // [L, B, H]
  const void* last_c;  // [L, B, H]
  void* rows;          // [up to 3 B, 2 L H]; null, with the three that follow, if not wanted
  void* grad;          // [up to 2 B, 2 L H]: of the lesson alone
  void* scaled;        // as rows
  void* reduced;       // [up to 3 B, R]
  double* statistics;  // [5], null where no gradients are wanted
  void* gradients[kSlots];
};

struct LSTMRowsArguments {
  std::int64_t rows, in;  // N, I
  const void* input;      // [N, I]
  const void* hidden;     // [N, H]
  const void* delta;      // [N, 4H]
};

struct LSTMUpdate {
  std::int64_t depth, hidden;  // L, H
  int threads;
  const LSTMLayerArguments* layers;  // [L]
  const LSTMRowsArguments* rows;     // [L]
  const RuleArguments* rules;        // [L]: a layer's four slots, and the same rule for all
};

struct LSTMCellForward {
  LSTMSizes sizes;  // one step
  LSTMLayerArguments layer;
  const void* x;  // [B, I]
  const void* h;  // [B, H]
  const void* c;  // [B, H]
  void* next_h;   // [B, H]
  void* next_c;   // [B, H]
  void* gates;    // [B, 4H]
};

struct LSTMCellBackward {
  LSTMSizes sizes;  // one step
  LSTMLayerArguments layer;
  LSTMLayerArguments gradients;  // null if not wanted
  const void* grad_next_h;       // [B, H]
  const void* grad_next_c;       // [B, H]
  const void* x;                 // [B, I]
  const void* h;                 // [B, H]
  const void* c;                 // [B, H]
  const void* next_c;            // [B, H]
  const void* gates;             // [B, 4H]
  void* delta;                   // [B, 4H]
  void* grad_h;                  // [B, H]
  void* grad_c;                  // [B, H]
  void* grad_x;                  // [B, I]
};

class Op;  // region.hpp

// One set an instruction set; [0] for float, [1] for double, [2] for x, h and dx in bfloat16 and
// everything else in float (null where the machine has no instructions for that). What is an Op is
// made here for whoever runs it, with others or alone.
struct Kernels {
  Op* (*linear_forward[3])(const LinearForward&);
  Op* (*linear_backward[3])(const LinearBackward&);
  Op* (*linear_update[3])(const LinearUpdate&);
  Op* (*linear_step[3])(const LinearStep&);
  Op* (*linear_cross_entropy[2])(const LinearCrossEntropy&);
  Op* (*synthesizer_predict[2])(const SynthesizerPredict&);
  Op* (*synthesizer_train[2])(const SynthesizerTrain&);
  void (*lstm_forward[2])(const LSTMForward&);
  void (*lstm_backward[2])(const LSTMBackward&);
  void (*lstm_update[2])(const LSTMUpdate&);
  void (*lstm_cell_forward[2])(const LSTMCellForward&);
  void (*lstm_cell_backward[2])(const LSTMCellBackward&);
};

// The backward of a window together with its ends; the number of rows of the lesson. `type` as the
// index into Kernels.
std::int64_t lstm_close(std::size_t type, const LSTMBackward& window, const LSTMBoundary& boundary);

// The calling thread's scratch memory: at least `bytes`, aligned to a cache line, contents left
// from whatever used it last. Valid until the thread's next call. Throws std::bad_alloc.
void* scratch(std::size_t bytes);

}  // namespace fused_dni
