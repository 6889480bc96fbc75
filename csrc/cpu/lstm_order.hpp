// The order of a row of gates, which is this backend's own.
//
// A row of gates (or of delta, the gradient at them) has 4H elements. PyTorch's order, that of the
// weights' rows, is gate by gate: gate g (0..3 for i, f, g, o) of unit j at g * H + j. Here units
// are taken in groups of as many as a vector holds (the last group may be short), and a group's
// four gates lie side by side:
//
//   gate g of unit p * kLanes + u at 4 * kLanes * p + g * width(p) + u
//
// so that one register tile ends with all gates of the same units, and what is written of a group
// is contiguous. The order thus depends on element type and instruction set; a row has no padding.
#pragma once

#include "simd.hpp"

namespace fused_dni::FUSED_DNI_ISA {

constexpr int kGates = 4;

// Elements of a whole group: the group p of a row begins at p * kGroup.
template <class T>
constexpr Index kGroup = kGates * kLanes<T>;

template <class T>
FUSED_DNI_INLINE Index group_count(Index hidden) {
  return ceil_div(hidden, kLanes<T>);
}

// Units in group p.
template <class T>
FUSED_DNI_INLINE Index group_width(Index hidden, Index p) {
  return smaller(kLanes<T>, hidden - p * kLanes<T>);
}

// The four gates of `width` units, from a group's first element on; zeros in lanes beyond.
template <class T>
FUSED_DNI_INLINE void load_group(const T* group, Index width, Vec<T> (&gates)[kGates]) {
#pragma GCC unroll 4
  for (int g = 0; g < kGates; ++g) gates[g] = load_upto(group + g * width, width);
}

template <class T>
FUSED_DNI_INLINE void store_group(T* group, Index width, const Vec<T> (&gates)[kGates]) {
#pragma GCC unroll 4
  for (int g = 0; g < kGates; ++g) store_upto(group + g * width, gates[g], width);
}

}  // namespace fused_dni::FUSED_DNI_ISA
