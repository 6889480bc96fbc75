// What the gradients of an LSTM's weights are made of: delta in the layout and the order in which
// WeightPhase multiplies it.
#pragma once

#include "lstm_order.hpp"
#include "parallel.hpp"

namespace fused_dni::FUSED_DNI_ISA {

// features[g * H + j][n] = the gate g of unit j in row n of delta [N, 4H], for the units of
// `groups`; zeros in the padding. Returns the largest magnitude (NaN if there is one).
template <class T>
T delta_features(const T* delta, Index rows, Index hidden, Range groups, T* features,
                 Index stride) {
  Magnitude<T> magnitude;
  for (Index p = groups.begin; p < groups.end; ++p) {
    const Index width = group_width<T>(hidden, p);
    for (int g = 0; g < kGates; ++g)
      magnitude.add(
          broadcast(to_transposed(delta + p * kGroup<T> + g * width, kGates * hidden, rows, width,
                                  features + (g * hidden + p * kLanes<T>)*stride, stride)));
  }
  return magnitude.value();
}

// Calls body(row) for the rows of the weights that belong to the units of `groups`.
template <class T, class Body>
FUSED_DNI_INLINE void for_rows(Index hidden, Range groups, Body&& body) {
  const Index end = smaller(groups.end * kLanes<T>, hidden);
  for (int g = 0; g < kGates; ++g)
    for (Index j = groups.begin * kLanes<T>; j < end; ++j) body(g * hidden + j);
}

// The sum of a row in the transposed layout.
template <class T>
T sum_row(const T* row, Index count) {
  Vec<T> sum{};
  for (Index n = 0; n < count; n += kLanes<T>) sum += load(row + n);
  return sum_lanes<T>(sum);
}

}  // namespace fused_dni::FUSED_DNI_ISA
