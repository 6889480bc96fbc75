// One parallel region an op, with barriers between its phases, and scratch memory.
//
// The region is OpenMP's, so that it runs on the threads that PyTorch already has (the same
// libgomp). The barrier is our own: it is met a few microseconds after the last one, and
// libgomp's took longer to get through than some phases.
#pragma once

#include <omp.h>
#include <sched.h>

#include "ops.hpp"
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

struct Barrier {
  alignas(kLineBytes) int arrived = 0;
  alignas(kLineBytes) int generation = 0;
};

FUSED_DNI_INLINE void relax() {
#if defined(__SSE2__)
  _mm_pause();
#endif
}

struct Team {
  int rank, size;
  Barrier* barrier;

  // Returns when all have called it. Spins briefly, then yields: with more threads than cores
  // the one that everybody waits for must get to run.
  void sync() const {
    if (size == 1) return;
    const int seen = __atomic_load_n(&barrier->generation, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&barrier->arrived, 1, __ATOMIC_ACQ_REL) == size) {
      __atomic_store_n(&barrier->arrived, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&barrier->generation, seen + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int spins = 0; __atomic_load_n(&barrier->generation, __ATOMIC_ACQUIRE) == seen; ++spins)
      spins < 2000 ? relax() : static_cast<void>(sched_yield());
  }
};

// Threads worth starting for this many multiply-adds: below a microsecond of work, one.
FUSED_DNI_INLINE int team_size(int threads, Index multiply_adds) {
  return multiply_adds < 64 * 1024 ? 1 : threads;
}

template <class Body>
void parallel(int threads, Body&& body) {
  Barrier barrier;
#pragma omp parallel num_threads(threads)
  body(Team{omp_get_thread_num(), omp_get_num_threads(), &barrier});
}

// Hands out pieces of scratch memory. Planned twice: without memory, to learn the size; then
// with it.
class Scratch {
 public:
  template <class T>
  T* take(Index count) {
    const std::uintptr_t piece = base_ + used_;
    used_ +=
        static_cast<std::uintptr_t>(round_up(count * static_cast<Index>(sizeof(T)), kLineBytes));
    return reinterpret_cast<T*>(piece);
  }

  template <class Plan>
  static void allocate(Plan&& plan) {
    Scratch measure;
    plan(measure);
    Scratch real;
    real.base_ = reinterpret_cast<std::uintptr_t>(scratch(measure.used_));
    plan(real);
  }

 private:
  std::uintptr_t base_ = 0, used_ = 0;
};

}  // namespace fused_dni::FUSED_DNI_ISA
