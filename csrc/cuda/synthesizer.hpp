// The synthesizer's ops on a GPU: arguments and launchers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "barrier.hpp"
#include "matrix.hpp"
#include "status.hpp"

namespace fused_dni::cuda {

// In the order of fused_dni.ops.types.SYNTHESIZERS, and what else a gradient may come from.
enum Source : int { kDense, kLowRank, kDiagonal, kGiven, kNowhere };

struct Synthesizer {
  Source source = kNowhere;
  int rank = 0, classes = 0;              // R, K; 0 without
  const float* weight = nullptr;          // [O, O], [O, R] or [O]
  const float* down = nullptr;            // [R, O]
  const float* context_weight = nullptr;  // [O, K]; with a table []
  const float* bias = nullptr;            // [O]
  const void* table = nullptr;            // [K, O] of float32 or
  bool narrow = false;                    // bfloat16
  std::int64_t ignored = 0;               // with a table: the label of rows not in the loss
  const std::int64_t* labels = nullptr;   // [N]
  const float* vectors = nullptr;         // [N, K]
  float* reduced = nullptr;               // [N, R]: h U^T
};

struct SynthesizerArguments {
  int rows = 0, outputs = 0;  // N, O
  Type type = kFloat32;       // h's
  bool ieee = false;
  const void* h = nullptr;  // [N, O]
  Synthesizer synthesizer;
  float* scaled = nullptr;  // [N, O]: M(h), made by a prediction and read by training

  bool training = false;
  const void* grad_h = nullptr;  // [N, O], of h's type or
  bool grad_wide = false;        // float32
  float target_scale = 1.0f;
  double* statistics = nullptr;  // [5]
  int rule = -1;
  bool nesterov = false;
  double* hyper = nullptr;
  bool trainable[4] = {};
  Slot weight, down, context, bias;

  Barrier barrier;

  // Workspace.
  double* step = nullptr;
  double* sums = nullptr;
  float* largest = nullptr;
  float* error = nullptr;
  float* back = nullptr;
  float* columns = nullptr;
};

// What `room` must have, in bytes.
std::size_t synthesizer_workspace(const SynthesizerArguments& arguments);

struct SynthesizerLaunch {
  SynthesizerArguments arguments;
  void* room;
  void* stream;
};
Status synthesizer(const SynthesizerLaunch& launch);

}  // namespace fused_dni::cuda
