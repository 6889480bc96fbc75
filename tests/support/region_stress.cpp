// Regions of many phases whose shares take what time they like; see tests/kernels/test_cpu_region.py.
//
//   region_stress THREADS PHASES REGIONS SEED       some shares sleep in their middle
//   region_stress THREADS PHASES REGIONS absent     all shares but the caller's do, and for long
//   region_stress THREADS PHASES 1 memory           no memory for stacks, then there is; prints "said 1"
//
// The others print "taken T, alone A". Exit status 1 if a share is left out, done twice or in
// another phase, does not see what the phases before wrote, or finds its stack or the floating-point
// environment changed.
#include <pthread.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cfenv>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "../../csrc/cpu/region.hpp"

namespace {

struct Given {
  int phases;
  unsigned long long seed;
  bool absent;
  pthread_t caller;
  std::vector<int> cells;  // phases of each share so far: nothing but the region orders these
  std::vector<int> steps;  // of each share
  std::vector<long long> done;
};

[[noreturn]] void fail(const char* what, int rank, int phase) {
  std::printf("%s: share %d of phase %d\n", what, rank, phase);
  std::_Exit(1);
}

void body(const void* of, const fused_dni::Team& team) {
  Given& given = *static_cast<Given*>(const_cast<void*>(of));
  volatile int local[64];
  for (int i = 0; i < 64; ++i) local[i] = team.rank * 64 + i;
  unsigned long long random = given.seed * 0x9E3779B97F4A7C15ull + team.rank + 1;
  for (int phase = 0; phase < given.phases; ++phase) {
    for (int other = 0; phase % 2 == 1 && other < team.size; ++other)
      if (given.cells[other] != phase) fail("cells of another phase", other, phase);
    random ^= random << 13, random ^= random >> 7, random ^= random << 17;
    if (given.absent) {
      if (!pthread_equal(pthread_self(), given.caller)) usleep(20000);
    } else if (random % 64 == 0) {
      usleep(random % 300);
    }
    if (phase % 5 == 3)  // steps within a phase, one behind the other of all
      for (int step = 4 * phase + 1; step < 4 * phase + 4; ++step) {
        __atomic_store_n(&given.steps[team.rank], step, __ATOMIC_RELEASE);
        for (int other = 0; other < team.size; ++other) team.wait(given.steps[other], step);
      }
    if (std::fegetround() != FE_UPWARD) fail("another environment", team.rank, phase);
    for (int i = 0; i < 64; ++i)
      if (local[i] != team.rank * 64 + i) fail("another stack", team.rank, phase);
    // In even phases each writes its own cell, in odd ones all are read first.
    if (phase % 2 == 0) given.cells[team.rank] += 1;
    ++given.done[team.rank];
    team.sync();
    if (phase % 2 == 1) given.cells[team.rank] += 1, team.sync();
  }
}

// Whether a region for whose stacks there is no memory says so, and leaves the next ones as they were.
int without_memory(int threads, Given& given) {
  rlimit before, none;
  getrlimit(RLIMIT_AS, &before);
  none = {0, before.rlim_max};
  given.cells.assign(threads, 0);
  given.steps.assign(threads, 0);
  given.done.assign(threads, 0);
  setrlimit(RLIMIT_AS, &none);
  bool said = false;
  try {
    fused_dni::region(threads, body, &given);
  } catch (const std::bad_alloc&) {
    said = true;
  }
  setrlimit(RLIMIT_AS, &before);
  fused_dni::region(threads, body, &given);
  for (int rank = 0; rank < threads; ++rank)
    if (given.done[rank] != given.phases) fail("left out or done twice", rank, 0);
  std::printf("said %d\n", said);
  return 0;
}

}  // namespace

void* fused_dni::scratch(std::size_t) { return nullptr; }

int main(int count, char** words) {
  if (count != 5) return 2;
  const int threads = std::atoi(words[1]), regions = std::atoi(words[3]);
  Given given;
  given.phases = std::atoi(words[2]);
  given.seed = std::strtoull(words[4], nullptr, 10);
  given.absent = std::strcmp(words[4], "absent") == 0;
  given.caller = pthread_self();
  std::fesetround(FE_UPWARD);
  if (std::strcmp(words[4], "memory") == 0) return without_memory(threads, given);
  for (int region = 0; region < regions; ++region) {
    // Teams of several sizes, one behind the other.
    const int size = region % 7 == 6 ? (threads + 1) / 2 : threads;
    given.cells.assign(size, 0);
    given.steps.assign(size, 0);
    given.done.assign(threads, 0);
    given.seed += 1;
    fused_dni::region(size, body, &given);
    for (int rank = 0; rank < size; ++rank)
      if (given.done[rank] != given.phases) fail("left out or done twice", rank, region);
  }
  const fused_dni::Met met = fused_dni::met();
  std::printf("taken %lld, alone %lld\n", static_cast<long long>(met.taken),
              static_cast<long long>(met.alone));
  return 0;
}
