// The threads of the system are OpenMP's, so that they are those that PyTorch already has (the same
// libgomp). The barrier is our own: it is met a few microseconds after the last one, and libgomp's
// took longer to get through than some phases.
//
// A logical thread is a fiber: it has a stack of its own, and goes on in whichever thread of the
// system has claimed its share of the phase. Each first claims the share that is its own, for its
// cache's sake, and then, when it would wait, one that nobody has begun: so a thread that others
// keep from its core delays nothing, unless it is in the middle of a share. If waiting for threads
// costs more than they do, the caller runs regions alone for a while. Bits are the same all along.
//
// Order of memory: all that the phases before wrote is there for whoever has read Crew::phase. A
// share ends with an addition to Crew::through that releases; the last of these acquires them all,
// and then releases the next phase, which is acquired before anything of it is claimed. That goes
// for a fiber's stack and its Share too, which belong to one thread at a time: from the claim, the
// one exchange of `begun` in that phase that succeeds, to the addition to `through`, which is made
// when the fiber's stack has been left. A thread that is late fails to claim, as `begun` is ahead of
// the phase that it saw, and looks again. A share that waits for another of its own phase is left in
// its middle by a thread that goes on with others that it can claim or has left, and comes back.
#include "region.hpp"

#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <chrono>
#include <memory>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "../fibers.hpp"

namespace fused_dni {

struct Crew;

struct alignas(kCacheLine) Share {
  unsigned begun = 0;    // the first phase of which nobody has claimed it
  void* here = nullptr;  // where it goes on
  void* back = nullptr;  // where the thread goes on that runs it
  Crew* crew = nullptr;
  int rank = 0;
  bool stalled = false;   // whether it has been left in the middle of a phase
  Share* next = nullptr;  // of those that the thread has left there
  std::chrono::steady_clock::time_point went_on{};  // when it had what it was left for
};

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;
using std::chrono::milliseconds;

// Looks at a word before a thread takes a share that is another's, as long as a phase's shares
// differ; and before it sleeps, about as long as it takes to be woken.
constexpr int kPatience = 64, kSpins = 2000;

constexpr std::size_t kStack = 256 * 1024;  // of a fiber; the kernels' memory is Scratch

// A region is at a loss with several threads if the caller alone would have been faster by so much.
// Then it is alone for so many times as long, twice that if it is no better afterwards, and so on.
constexpr double kLoss = 1.25;
constexpr auto kLeastLoss = microseconds(20);
constexpr int kAlone = 8;
constexpr auto kLongestAlone = milliseconds(200);

// Scratch memory of two ops that overlap is at most so much a thread: more would take the
// second-level cache from what the ops themselves read again.
constexpr std::size_t kOverlapping = std::size_t{1} << 20;

std::atomic<std::int64_t> regions{0}, barriers{0}, taken{0}, alone{0};

}  // namespace

// What threads of a region share; kept by its caller, for phases are counted on from region to
// region: then nothing has to be set back that is in other threads' caches.
struct Crew {
  alignas(kCacheLine) unsigned phase = 0;
  int sleepers = 0;
  alignas(kCacheLine) unsigned through = 0;  // shares of this phase that have ended
  alignas(kCacheLine) unsigned left = 0;   // threads that have left the region, without the caller
  alignas(kCacheLine) unsigned first = 0;  // phase of the region
  unsigned end = 0;                        // the one behind its last
  int size = 0;
  bool together = false;  // with other threads than the caller
  void (*body)(const void*, const Team&) = nullptr;
  const void* of = nullptr;
  std::fenv_t environment;  // the caller's, in which all shares are computed
  std::unique_ptr<Share[]> shares;
  Stacks<kStack> stacks;

  // The caller's alone.
  Clock::time_point until{};  // when it tries again with other threads
  Clock::duration hold{0};    // for how long it did not, last
  bool warm = false;          // whether they have been at work in the region before

  // Throws std::bad_alloc before anything is changed.
  void begin(int threads, void (*what)(const void*, const Team&), const void* arguments) {
#if defined(FUSED_DNI_FRAME)
    stacks[static_cast<std::size_t>(threads) - 1];  // and those below
#endif
    if (size < threads) shares = std::make_unique<Share[]>(static_cast<std::size_t>(threads));
    if (size != threads)
      for (int rank = 0; rank < threads; ++rank) {
        shares[rank].begun = phase;
        shares[rank].crew = this;
        shares[rank].rank = rank;
      }
    size = threads, body = what, of = arguments;
    first = phase, end = phase - 1, left = 0;
    std::fegetenv(&environment);
  }
};

namespace {

void relax() {
#if defined(__SSE2__)
  _mm_pause();
#endif
}

// Returns whether the word is another by then.
bool spin(const unsigned& word, unsigned seen, int times) {
  for (int i = 0; i < times; ++i) {
    if (__atomic_load_n(&word, __ATOMIC_ACQUIRE) != seen) return true;
    relax();
  }
  return false;
}

// Returns when the word is another. A thread that others keep from its core gets there sooner if the
// core of one that waits for it is free.
void await(Crew& crew, unsigned& word, unsigned seen) {
  if (spin(word, seen, kSpins)) return;
#if defined(__linux__)
  __atomic_add_fetch(&crew.sleepers, 1, __ATOMIC_SEQ_CST);
  while (__atomic_load_n(&word, __ATOMIC_SEQ_CST) == seen)
    syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
  __atomic_sub_fetch(&crew.sleepers, 1, __ATOMIC_SEQ_CST);
#else
  while (__atomic_load_n(&word, __ATOMIC_ACQUIRE) == seen) sched_yield();
#endif
}

// Behind a change of the word, in the one order of both: a sleeper sees it, or is seen here.
void wake([[maybe_unused]] Crew& crew, [[maybe_unused]] unsigned& word) {
#if defined(__linux__)
  if (__atomic_load_n(&crew.sleepers, __ATOMIC_SEQ_CST) > 0)
    syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
#endif
}

void arrive(Crew& crew, unsigned phase) {
  if (__atomic_add_fetch(&crew.through, 1, __ATOMIC_ACQ_REL) < static_cast<unsigned>(crew.size))
    return;
  __atomic_store_n(&crew.through, 0, __ATOMIC_RELAXED);
  __atomic_store_n(&crew.phase, phase + 1, __ATOMIC_SEQ_CST);
  wake(crew, crew.phase);
}

thread_local Crew crew_of_caller;

}  // namespace

#if defined(FUSED_DNI_FRAME)

namespace {

// What a thread did in a region.
struct Tally {
  std::int64_t ran = 0, taken = 0;  // shares; of those, such as were others'
  Clock::duration waited{0};
};

thread_local Share* starting;

void start() {
  Share& share = *starting;
  Crew& crew = *share.crew;
  crew.body(crew.of, Team{share.rank, crew.size, &share});
  // All have their last share in the same phase, so one says which it is.
  if (share.rank == 0) __atomic_store_n(&crew.end, crew.phase + 1, __ATOMIC_RELAXED);
  meet(share);
  __builtin_trap();  // nobody goes on with a fiber that has ended
}

// A thread of the system in a region, whose own share is that of `rank`.
class Worker {
 public:
  Worker(Crew& crew, int rank) : crew_(crew), rank_(rank) {}

  Tally work() {
    int patience = crew_.together ? kPatience : 0;
    while ((phase_ = __atomic_load_n(&crew_.phase, __ATOMIC_ACQUIRE)) !=
           __atomic_load_n(&crew_.end, __ATOMIC_RELAXED)) {
      claim(rank_);
      if (!held_ && spin(crew_.phase, phase_, patience)) continue;
      const std::int64_t before = tally_.ran;
      for (int i = 1; i < crew_.size; ++i) claim((rank_ + i) % crew_.size);
      tally_.taken += tally_.ran - before;
      if (crew_.together) patience = tally_.ran > before ? 0 : kPatience;
      if (held_) idle_ = Clock::now();
      while (held_) go_round();
      if (__atomic_load_n(&crew_.phase, __ATOMIC_ACQUIRE) != phase_) continue;
      const Clock::time_point begin = Clock::now();
      await(crew_, crew_.phase, phase_);
      tally_.waited += Clock::now() - begin;
    }
    return tally_;
  }

 private:
  // Does a share of the phase, unless somebody has claimed it.
  void claim(int rank) {
    Share& share = crew_.shares[rank];
    unsigned expected = phase_;
    if (__atomic_load_n(&share.begun, __ATOMIC_RELAXED) != phase_ ||
        !__atomic_compare_exchange_n(&share.begun, &expected, phase_ + 1, false, __ATOMIC_RELAXED,
                                     __ATOMIC_RELAXED))
      return;
    ++tally_.ran;
    if (phase_ == crew_.first) {
      share.here = first_frame(crew_.stacks.top(static_cast<std::size_t>(rank)), start);
      starting = &share;
    }
    go_on(share);
  }

  void go_on(Share& share) {
    share.stalled = false;
    fused_dni_switch(&share.back, share.here);
    const auto went_on = std::exchange(share.went_on, Clock::time_point{});
    if (went_on != Clock::time_point{}) {  // it was one of those that go_round() tries
      tally_.waited += went_on - idle_;
      idle_ = Clock::now();
    }
    if (share.stalled)
      share.next = held_, held_ = &share;
    else
      arrive(crew_, phase_);
  }

  // Each of the shares that wait for others once more.
  void go_round() {
    if (crew_.together) sched_yield();
    for (Share* share = std::exchange(held_, nullptr); share;) {
      Share* next = share->next;
      go_on(*share);
      share = next;
    }
  }

  Crew& crew_;
  const int rank_;
  unsigned phase_ = 0;
  Share* held_ = nullptr;     // what this thread has claimed and left in the middle
  Clock::time_point idle_{};  // since when none of those could go on
  Tally tally_;
};

// Decides, behind a region of several threads, whether the next ones are to be the caller's alone.
void judge(Crew& crew, Clock::time_point begin, const Tally& tally) {
  const Clock::time_point now = Clock::now();
  const Clock::duration lasted = now - begin;
  const auto shares = static_cast<double>(crew.end - crew.first) * crew.size;
  const Clock::duration loss =
      lasted - std::chrono::duration_cast<Clock::duration>(
                   kLoss * (lasted - tally.waited) * shares /
                   static_cast<double>(std::max<std::int64_t>(tally.ran, 1)));
  if (loss < kLeastLoss) {
    crew.hold /= 2;
  } else if (crew.warm) {  // else they had to be woken first, or made
    crew.hold = std::min<Clock::duration>(2 * crew.hold + kAlone * lasted, kLongestAlone);
    crew.until = now + crew.hold;
    crew.warm = false;
    return;
  }
  crew.warm = true;
}

}  // namespace

void meet(Share& share) { fused_dni_switch(&share.here, share.back); }

void wait(Share& share, const int& word, int least) {
  const auto there = [&] { return __atomic_load_n(&word, __ATOMIC_ACQUIRE) >= least; };
  for (int spins = share.crew->together ? kSpins : 0; spins > 0; --spins, relax())
    if (there()) return;
  if (there()) return;
  do {
    share.stalled = true;
    fused_dni_switch(&share.here, share.back);
  } while (!there());
  share.went_on = Clock::now();
}

void region(int threads, void (*body)(const void*, const Team&), const void* of) {
  regions.fetch_add(1, std::memory_order_relaxed);
  if (threads == 1) return body(of, Team{0, 1, nullptr});
  Crew& crew = crew_of_caller;
  crew.begin(threads, body, of);
  const Clock::time_point begin = Clock::now();
  crew.together = begin >= crew.until;
  if (!crew.together) {
    Worker(crew, 0).work();
    alone.fetch_add(1, std::memory_order_relaxed);
  } else {
#pragma omp parallel num_threads(threads)
    {
      const int rank = omp_get_thread_num();
      std::fenv_t own;
      if (rank > 0) std::fegetenv(&own), std::fesetenv(&crew.environment);
      Tally tally = Worker(crew, rank).work();
      if (tally.taken) taken.fetch_add(tally.taken, std::memory_order_relaxed);
      if (rank > 0) {
        std::fesetenv(&own);
        __atomic_add_fetch(&crew.left, 1, __ATOMIC_SEQ_CST);
        wake(crew, crew.left);
      } else {  // OpenMP's end of a region would spin for milliseconds
        const auto others = static_cast<unsigned>(omp_get_num_threads() - 1);
        const Clock::time_point done = Clock::now();
        for (unsigned seen; (seen = __atomic_load_n(&crew.left, __ATOMIC_ACQUIRE)) != others;)
          await(crew, crew.left, seen);
        tally.waited += Clock::now() - done;
        judge(crew, begin, tally);
      }
    }
  }
  barriers.fetch_add(crew.end - crew.first, std::memory_order_relaxed);
}

#else  // each logical thread is a thread of the system

void meet(Share& share) {
  Crew& crew = *share.crew;
  const unsigned phase = __atomic_load_n(&crew.phase, __ATOMIC_ACQUIRE);
  arrive(crew, phase);
  await(crew, crew.phase, phase);
}

void wait(Share&, const int& word, int least) {
  for (int spins = 0; __atomic_load_n(&word, __ATOMIC_ACQUIRE) < least; ++spins)
    spins < kSpins ? relax() : static_cast<void>(sched_yield());
}

void region(int threads, void (*body)(const void*, const Team&), const void* of) {
  regions.fetch_add(1, std::memory_order_relaxed);
  if (threads == 1) return body(of, Team{0, 1, nullptr});
  Crew& crew = crew_of_caller;
  crew.begin(threads, body, of);
#pragma omp parallel num_threads(threads)
  {
#pragma omp single
    crew.size = omp_get_num_threads();
    Share& share = crew.shares[omp_get_thread_num()];
    body(of, Team{share.rank, crew.size, &share});
    meet(share);  // which does not spin for milliseconds, as OpenMP's end of a region does
  }
  barriers.fetch_add(crew.phase - crew.first, std::memory_order_relaxed);
}

#endif

Op::~Op() = default;
void Op::finish() {}

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
        op->run(Team{0, 1, nullptr});
    }
  };
  region(
      threads,
      [](const void* of, const Team& team) { (*static_cast<const decltype(body)*>(of))(team); },
      &body);
  for (Op* op = first_; op; op = op->next) op->finish();
}

Met met() { return {regions.load(), barriers.load(), taken.load(), alone.load()}; }

}  // namespace fused_dni
