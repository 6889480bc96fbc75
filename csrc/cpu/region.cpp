// The region is OpenMP's, so that it runs on the threads that PyTorch already has (the same
// libgomp). The barrier is our own: it is met a few microseconds after the last one, and libgomp's
// took longer to get through than some phases.
#include "region.hpp"

#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fused_dni {
namespace {

// Looks at a barrier before a thread sleeps: about as long as it takes to be woken.
constexpr int kSpins = 2000;

// Scratch memory of two ops that overlap is at most so much a thread: more would take the
// second-level cache from what the ops themselves read again.
constexpr std::size_t kOverlapping = std::size_t{1} << 20;

std::atomic<std::int64_t> regions{0}, barriers{0};

void sleep(Barrier& barrier, int seen) {
#if defined(__linux__)
  __atomic_add_fetch(&barrier.sleepers, 1, __ATOMIC_SEQ_CST);
  while (__atomic_load_n(&barrier.generation, __ATOMIC_SEQ_CST) == seen)
    syscall(SYS_futex, &barrier.generation, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
  __atomic_sub_fetch(&barrier.sleepers, 1, __ATOMIC_SEQ_CST);
#else
  while (__atomic_load_n(&barrier.generation, __ATOMIC_ACQUIRE) == seen) sched_yield();
#endif
}

void wake([[maybe_unused]] Barrier& barrier) {
#if defined(__linux__)
  if (__atomic_load_n(&barrier.sleepers, __ATOMIC_SEQ_CST) > 0)
    syscall(SYS_futex, &barrier.generation, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
#endif
}

}  // namespace

void meet(Barrier& barrier, int size) {
  const int seen = __atomic_load_n(&barrier.generation, __ATOMIC_ACQUIRE);
  if (__atomic_add_fetch(&barrier.arrived, 1, __ATOMIC_ACQ_REL) == size) {
    barriers.fetch_add(1, std::memory_order_relaxed);
    __atomic_store_n(&barrier.arrived, 0, __ATOMIC_RELAXED);
    // Against sleep(): either it sees the new generation or this its sleeper.
    __atomic_store_n(&barrier.generation, seen + 1, __ATOMIC_SEQ_CST);
    wake(barrier);
    return;
  }
  for (int spins = 0; spins < kSpins; ++spins) {
    if (__atomic_load_n(&barrier.generation, __ATOMIC_ACQUIRE) != seen) return;
    relax();
  }
  sleep(barrier, seen);
}

Op::~Op() = default;
void Op::finish() {}

void region(int threads, void (*body)(const void*, const Team&), const void* of) {
  Barrier barrier;
  regions.fetch_add(1, std::memory_order_relaxed);
  if (threads == 1) return body(of, Team{0, 1, &barrier});
#pragma omp parallel num_threads(threads)
  {
    const Team team{omp_get_thread_num(), omp_get_num_threads(), &barrier};
    body(of, team);
    team.sync();  // which does not spin for milliseconds, as OpenMP's end of a region does
  }
}

Ops::~Ops() {
  while (first_) {
    Op* gone = first_;
    first_ = gone->next;
    delete gone;
  }
}

void Ops::add(Op* made) {
  (last_ ? last_->next : first_) = made;
  last_ = made;
}

void Ops::run() {
  int threads = 1;
  // Ops that overlap take turns in two parts of the memory, others have all of it.
  std::size_t parts[2] = {0, 0}, turn = 0;
  for (Op* op = first_; op; op = op->next, turn ^= 1) {
    Scratch counting;
    op->plan(counting);
    parts[turn] = std::max(parts[turn], counting.used());
    threads = std::max(threads, op->threads);
  }
  const bool overlap = parts[0] + parts[1] <= kOverlapping * static_cast<std::size_t>(threads);
  char* memory =
      static_cast<char*>(scratch(overlap ? parts[0] + parts[1] : std::max(parts[0], parts[1])));
  turn = 0;
  for (Op* op = first_; op; op = op->next, turn ^= 1) {
    Scratch real(memory + (overlap && turn ? parts[0] : 0));
    op->plan(real);
  }

  const auto body = [&](const Team& team) {
    const Op* before = nullptr;
    for (Op* op = first_; op; before = op, op = op->next) {
      if (before && (!overlap || before->open || before->threads != op->threads)) team.sync();
      if (op->threads > 1)
        op->run(team);
      else if (team.rank == 0)
        op->run(Team{0, 1, team.barrier});
    }
  };
  region(
      threads,
      [](const void* of, const Team& team) { (*static_cast<const decltype(body)*>(of))(team); },
      &body);
  for (Op* op = first_; op; op = op->next) op->finish();
}

Met met() { return {regions.load(), barriers.load()}; }

}  // namespace fused_dni
