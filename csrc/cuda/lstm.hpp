// The LSTM's ops: one cooperative launch each. Formulas stand in fused_dni/backends/reference/lstm.py.
//
// T steps, B rows, I inputs, H hidden units, L layers. Tensors are contiguous, as in
// fused_dni/ops/types.py, of x's type but for parameters (float32) and where a comment says so.
// `type` is x's, `exact` asks for IEEE products of float32.
#pragma once

#include <cstdint>

#include "barrier.hpp"
#include "matrix.hpp"
#include "status.hpp"

namespace fused_dni::cuda {

inline constexpr int kMostLayers = 16;    // of a launch
inline constexpr int kMostBlocks = 1024;  // of an update: what its workspace has room for

struct LSTMSizes {
  int steps, batch, in, size, layers;
};

struct LSTMWeights {
  const float *ih, *hh, *bias_ih, *bias_hh;  // biases may be null
};

struct LSTMGradient {
  float *ih, *hh, *bias;  // of either bias, or null
};

// How a window's steps are divided among blocks; made by the launchers. See lstm.cuh.
struct LSTMPlan {
  bool on_chip, sole;
  bool clustered;  // the blocks of a group are a cluster
  int slices;      // of hidden units
  int groups;      // of rows
  int rows;        // of a group
  int tiles;       // of sixteen rows, multiplied together
};

struct LSTMForward {
  Type type;
  bool exact;
  LSTMSizes sizes;
  bool save;          // otherwise all layers use the same hidden [T + 1, B, H], gates [T, B, 4H]
  bool projected;     // gates have layer 0's product with x already, and its biases
  const void* x;      // [T, B, I]
  const void *h, *c;  // [L, B, H]
  LSTMWeights layer[kMostLayers];
  const void* dropout[kMostLayers];  // [T, B, H] behind each layer but the last, or null
  const std::int64_t* lengths;       // [B] or null
  void *hidden, *cells, *gates;      // [L, T + 1, B, H] or null for cells, [L, T, B, 4H]
  void *last_h, *last_c;             // [L, B, H]
  void* below;                       // room [T, B, H] with dropout
  float* carry;                      // room [B, H]
  Barrier barrier;
  void* stream;
  LSTMPlan plan;
};

// The synthesizer at a window's end: fused_dni.ops.types.LSTMBoundary.
struct LSTMEnds {
  int kind;           // in the order of SYNTHESIZERS; -1 for none
  const void *h, *c;  // [L, B, H]: the final state
  const float *weight, *down, *bias;
  const bool* ended;  // [B] or null
  float factor;       // strength / target_scale
  int rank;
  void* reduced;     // room [B, R], of delta's type
  float* predicted;  // room [B, 2 L H], dense and low rank
};

// Of delta's type (float32 where x is float16, in which a gradient has no room): delta.
struct LSTMBackward {
  Type type;
  bool exact;
  LSTMSizes sizes;
  bool need_dx, need_weights;
  const void* x;
  LSTMWeights layer[kMostLayers];
  const void* dropout[kMostLayers];
  LSTMGradient gradient[kMostLayers];  // with need_weights
  const std::int64_t* lengths;
  const void *grad_output, *grad_h, *grad_c;  // [T, B, H], [L, B, H], or null
  // Before each step [T, B, H] and behind it; how far apart layers are, in rows [B, H].
  const void *hidden, *before, *after;
  std::int64_t apart;
  const void* gates;  // [L, T, B, 4H]
  LSTMEnds ends;
  void* delta;      // [L, T, B, 4H]
  void *d_h, *d_c;  // [L, B, H]
  void* dx;         // [T, B, I]
  void* above;      // room [T, B, H] of delta's type, with more than one layer
  // Room for what a layer reads, with need_weights: [T, B, I] of layer 0 with lengths, [T, B, H] of
  // others with dropout; otherwise null.
  void* staged[kMostLayers];
  float* carry;  // room [B, H]
  Barrier barrier;
  void* stream;
  LSTMPlan plan;
};

// What one layer's weight gradients are products of, N rows, and the parameters that they change.
struct LSTMUpdateLayer {
  int count, in;
  const void *input, *hidden, *delta;  // [N, I], [N, H], [N, 4H]
  Slot slot[4];  // weight_ih, weight_hh, bias_ih, bias_hh; no parameter: absent or frozen
};

struct LSTMUpdate {
  Type type;  // of the rows
  bool exact;
  int layers, size;
  LSTMUpdateLayer layer[kMostLayers];
  int kind;  // RuleKind
  bool nesterov;
  double* hyper;
  float* workspace;  // [3 L + 1, kMostBlocks]
  Barrier barrier;
  void* stream;
};

struct GridBarriers {
  int blocks, count;
  int cluster;  // blocks of a cluster, whose barrier it is then; 1 for the grid's
  Barrier barrier;
  void* stream;
};

Status lstm_forward(const LSTMForward& a);
Status lstm_backward(const LSTMBackward& a);
Status lstm_update(const LSTMUpdate& a);
// `count` grid barriers and nothing else: the floor under a window's time.
Status grid_barriers(const GridBarriers& a);

}  // namespace fused_dni::cuda
