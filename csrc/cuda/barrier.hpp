// The grid's barrier as a kernel's arguments have it, and what blocks leave behind that wait for
// too long: no launch may hold a device for ever.
#pragma once

#include <cstdint>
#include <string>

namespace fused_dni::cuda {

// Which barrier of its kernel: the phase that begins behind it. stall.cpp has the names.
enum class Phase : int {
  kNormalize,
  kReduce,
  kGradient,
  kDelta,
  kDx,
  kWeight,
  kPredict,
  kBack,
  kApply,
  kInputs,
  kSteps,
  kStep,
  kLayer,
  kEnds,
  kUpdate,
  kRound
};

struct Barrier {
  int* word = nullptr;               // zero before its first use; of one launch at a time
  std::uint64_t* stalled = nullptr;  // in the host's memory, for stalled_text; or null
  std::uint64_t bound = 0;           // nanoseconds that a block waits at the most; 0: no bound
  int launch = 0;                    // what it is called: an index of stall.cpp's
};

// For a launch that is called `what`: "linear_step (x [2, 3], weight [4, 3])".
Barrier barrier_of(int* word, const std::string& what);
// What a stalled launch left, as a sentence; empty if there was none.
std::string stalled_text();
// Of launches from here on (graphs keep what they were captured with).
void set_spin_bound(std::uint64_t nanoseconds);

// Memory of the host for one record, zero at first, that every device can write to and that
// outlives their contexts; null where there is no device. In launch.cu.
std::uint64_t* stall_memory();

}  // namespace fused_dni::cuda
