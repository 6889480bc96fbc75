// Parallel regions: teams of threads with barriers, scratch memory, and ops one behind the other in
// one region. The same for every instruction set: what is not always inlined is in region.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "ops.hpp"

namespace fused_dni {

[[gnu::always_inline]] inline void relax() {
#if defined(__SSE2__)
  _mm_pause();
#endif
}

struct Barrier {
  alignas(kCacheLine) int arrived = 0;
  alignas(kCacheLine) int generation = 0;
  int sleepers = 0;
};

// Returns when `size` threads have called it. Spins for some microseconds, then sleeps: a thread that
// others keep from its core gets there sooner if the core of one that waits for it is free.
void meet(Barrier& barrier, int size);

struct Team {
  int rank, size;
  Barrier* barrier;

  [[gnu::always_inline]] void sync() const {
    if (size > 1) meet(*barrier, size);
  }
};

// Hands out pieces of scratch memory, each from a cache line's multiple on. Without memory it only
// counts: a plan is made twice.
class Scratch {
 public:
  explicit Scratch(void* memory = nullptr) : base_(reinterpret_cast<std::uintptr_t>(memory)) {}

  template <class T>
  [[gnu::always_inline]] T* take(std::int64_t count) {
    const std::uintptr_t piece = base_ + used_;
    const auto line = static_cast<std::uintptr_t>(kCacheLine);
    used_ += (static_cast<std::uintptr_t>(count) * sizeof(T) + line - 1) / line * line;
    return reinterpret_cast<T*>(piece);
  }
  std::size_t used() const { return used_; }

 private:
  std::uintptr_t base_;
  std::size_t used_ = 0;
};

// An op as a region runs it. Made from arguments that outlive it.
//
// Ops that follow each other in a region overlap: a thread that is through with one begins the next
// while others are still behind the last barrier of that one. So what an op writes in front of its
// first barrier must be its own, and what is read after it must be there before its last barrier,
// unless `open`. An op that is not has a barrier on every path: the scratch of the one before it is
// the next one's.
class Op {
 public:
  virtual ~Op();

  // Takes scratch memory for a team of `threads`, counting first, then for good.
  virtual void plan(Scratch& scratch) = 0;
  // By every thread of a team of at most `threads`.
  virtual void run(const Team& team) = 0;
  // By the caller, behind the region.
  virtual void finish();

  int threads = 1;     // worth starting
  bool open = false;   // whether results are read that are written behind the last barrier
  Op* next = nullptr;  // in a region
};

// Calls body(of, team) by `threads` threads.
void region(int threads, void (*body)(const void* of, const Team& team), const void* of);

// Ops of one region.
class Ops {
 public:
  Ops() = default;
  Ops(const Ops&) = delete;
  Ops& operator=(const Ops&) = delete;
  ~Ops();

  void add(Op* made);  // whose this is from here on
  // Runs them one behind the other in one region.
  void run();

 private:
  Op *first_ = nullptr, *last_ = nullptr;
};

// Regions and barriers of this process so far.
struct Met {
  std::int64_t regions, barriers;
};
Met met();

}  // namespace fused_dni
