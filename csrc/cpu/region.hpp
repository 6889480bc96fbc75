// Parallel regions: teams of logical threads with barriers, scratch memory, and ops one behind the
// other in one region. The same for every instruction set: what is not always inlined is in region.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ops.hpp"

namespace fused_dni {

struct Share;

// Ends what `share` does in this phase; returns when it has its turn in the next one.
void meet(Share& share);

// Returns when the word is at least so much, by another share of this phase; see Team::wait.
void wait(Share& share, const int& word, int least);

// A logical thread of a region. What one does from one sync() to the next is its share of a phase,
// done by whichever thread of the system is free: results depend on rank and size alone.
struct Team {
  int rank, size;
  Share* share;

  [[gnu::always_inline]] void sync() const {
    if (size > 1) meet(*share);
  }
  // For a word that another logical thread stores to (release) in this phase.
  [[gnu::always_inline]] void wait(const int& word, int least) const {
    if (__atomic_load_n(&word, __ATOMIC_ACQUIRE) < least) fused_dni::wait(*share, word, least);
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

// Calls body(of, team) by a team of `threads`, and returns when all of it is done.
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

// Of this process so far: regions; barriers in them; shares that another thread of the system than
// usual had time for; regions of several logical threads that their caller ran alone.
struct Met {
  std::int64_t regions, barriers, taken, alone;
};
Met met();

}  // namespace fused_dni
