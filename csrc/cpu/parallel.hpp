// How ops are shared by the threads of a region.
#pragma once

#include "region.hpp"
#include "simd.hpp"

namespace fused_dni::FUSED_DNI_ISA {

struct Range {
  Index begin, end;
  FUSED_DNI_INLINE Index size() const { return end - begin; }
};

// Part `rank` of `size` of [0, count), cut at multiples of `unit`.
FUSED_DNI_INLINE Range part(Index count, Index unit, Index rank, Index size) {
  const Index units = ceil_div(count, unit);
  return {smaller(count, units * rank / size * unit),
          smaller(count, units * (rank + 1) / size * unit)};
}

// Threads worth starting for this many multiply-adds: below a microsecond of work, one.
FUSED_DNI_INLINE int team_size(int threads, Index multiply_adds) {
  return multiply_adds < 64 * 1024 ? 1 : threads;
}

template <class Body>
void parallel(int threads, const Body& body) {
  region(
      threads, [](const void* of, const Team& team) { (*static_cast<const Body*>(of))(team); },
      &body);
}

// Plans what a region of one op needs; see Scratch.
template <class Plan>
void allocate(const Plan& plan) {
  Scratch counting;
  plan(counting);
  Scratch real(scratch(counting.used()));
  plan(real);
}

// Makes the op that `Made` is of its arguments, for a table of Kernels.
template <class Made, class Arguments>
Op* make(const Arguments& arguments) {
  return new Made(arguments);
}

}  // namespace fused_dni::FUSED_DNI_ISA
