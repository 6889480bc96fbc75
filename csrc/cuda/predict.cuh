// What a synthesizer predicts, tile by tile: for the linear layer's step and for the synthesizer's
// own ops. Formulas: fused_dni.backends.reference.synthesizer.
#pragma once

#include "synthesizer.hpp"
#include "tile.cuh"

namespace fused_dni::cuda {

// out[n, r] = sum over o of a[n, o] b[o * along + r * across], for all n < rows, r < rank: a warp
// has a row and a few r at a time, and goes through the whole depth. Returns the largest magnitude.
template <class T>
FUSED_DNI_DEVICE float reduce_rows(float* out, const T* a, const float* b, std::int64_t along,
                                   std::int64_t across, int rows, int rank, int depth) {
  constexpr int kFew = 4;
  const int groups = ceil_div(rank, kFew), warps = kThreads / 32;
  float largest = 0.0f;
  for (int index = block() * warps + warp(); index < rows * groups; index += blocks() * warps) {
    const int n = index / groups, first = index % groups * kFew;
    const T* line = a + std::int64_t{n} * depth;
    float sums[kFew] = {};
    for (int o = lane(); o < depth; o += 32) {
      const float value = to_float(line[o]);
#pragma unroll
      for (int i = 0; i < kFew; ++i)
        if (first + i < rank) sums[i] += value * b[o * along + (first + i) * across];
    }
#pragma unroll
    for (int i = 0; i < kFew; ++i) {
      const float sum = warp_sum(sums[i]);
      largest = fmaxf(largest, magnitude(sum));
      if (lane() == 0 && first + i < rank) out[std::int64_t{n} * rank + first + i] = sum;
    }
  }
  return largest;
}

// h U^T, all of it.
template <class X>
FUSED_DNI_DEVICE void reduce(const Synthesizer& s, const X* h, int rows, int outputs) {
  reduce_rows(s.reduced, h, s.down, 1, outputs, rows, s.rank, outputs);
}

// How many rows are in the loss, at least 1; all without a table. All threads come here.
FUSED_DNI_DEVICE int counted_rows(const Synthesizer& s, int rows, SharedArena arena) {
  if (s.table == nullptr) return rows;
  double mine = 0.0;
#pragma unroll 1
  for (int n = thread(); n < rows; n += kThreads) mine += s.labels[n] != s.ignored;
  const int counted = static_cast<int>(block_sum(mine, arena));
  return counted > 1 ? counted : 1;
}
FUSED_DNI_DEVICE bool in_the_loss(const Synthesizer& s, int n) {
  return s.table == nullptr || s.labels[n] != s.ignored;
}

// What a class has for feature o, of the label of row n: an element of the table or of the context's
// weight; NaN if the label is none.
FUSED_DNI_DEVICE float label_element(const Synthesizer& s, int n, int o, int outputs) {
  const std::int64_t label = s.labels[n];
  const bool tabled = s.table != nullptr;
  const std::int64_t at = tabled ? label * outputs + o : std::int64_t{o} * s.classes + label;
  if (label < 0 || label >= s.classes) return NAN;
  if (tabled && s.narrow) return to_float(static_cast<const bf16*>(s.table)[at]);
  return (tabled ? static_cast<const float*>(s.table) : s.context_weight)[at];
}

// M(h); `counted` of counted_rows. A class index that there is not makes its row NaN, so that
// whatever is made of it is skipped and counted. Begins with a barrier.
template <class P, class X>
FUSED_DNI_DEVICE void predict_tile(TileOf<P>& m, SharedArena arena, const Synthesizer& s,
                                   const X* h, const Place<TileOf<P>>& at, int counted) {
  using T = TileOf<P>;
  using Wide = Operand<float, Lies::kAlong>;
  const int rows = at.rows, outputs = at.columns;
  const bool column = at.has_column();
  bool first = s.source == kLowRank;  // whether there is a product before the context's
  const float* left = s.reduced;
  int depth = s.rank;
  if (s.source == kDense) {
    if constexpr (kSame<X, float>) {
      first = true, left = h, depth = outputs;
    } else {
      multiply<P>(m, arena, Operand<X, Lies::kAlong>{h, outputs, rows}, at.row,
                  Wide{s.weight, outputs, outputs}, at.column, outputs);
    }
  } else if (s.source == kDiagonal) {
    const float a = column ? s.weight[at.c()] : 0.0f;
#pragma unroll
    for (int i = 0; i < T::kEach; ++i) m.value[i] = at.inside(i) ? to_float(h[at.at(i)]) * a : 0.0f;
  }
  // Products of float32 are one piece of code.
#pragma unroll 1
  for (int part = first ? 0 : 1; part < (s.vectors != nullptr ? 2 : 1); ++part) {
    if (part == 1) left = s.vectors, depth = s.classes;
    const float* right = part == 0 ? s.weight : s.context_weight;
    T made;
    multiply<P>(made, arena, Wide{left, depth, rows}, at.row, Wide{right, depth, outputs},
                at.column, depth);
#pragma unroll
    for (int i = 0; i < T::kEach; ++i)
      m.value[i] = part == 0 ? made.value[i] : m.value[i] + made.value[i];
  }
  const float bias = s.bias != nullptr && column ? s.bias[at.c()] : 0.0f;
  T w;  // what the context has for each element
  if (s.labels != nullptr) {
#pragma unroll
    for (int i = 0; i < T::kEach; ++i)
      if (at.inside(i)) w.value[i] = label_element(s, at.r(i), at.c(), outputs);
  }
  if (s.table != nullptr) {
    const float gain = *s.context_weight, mean = static_cast<float>(rows) / counted;
#pragma unroll
    for (int i = 0; i < T::kEach; ++i) {
      if (!at.inside(i)) continue;
      m.value[i] = in_the_loss(s, at.r(i)) ? (m.value[i] + bias - gain * w.value[i]) * mean : 0.0f;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < T::kEach; ++i) {
    if (s.labels != nullptr) m.value[i] += w.value[i];
    m.value[i] += bias;
  }
}

}  // namespace fused_dni::cuda
