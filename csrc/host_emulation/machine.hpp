// The machine that runs kernels on a CPU: blocks, threads, what they wait for, and faults.
//
// fibers.cpp runs all threads of all blocks as fibers of the calling thread; threads.cpp
// (-DFUSED_DNI_EMULATED_THREADS) gives each of them a thread of the system, for ThreadSanitizer.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <set>
#include <string>
#include <vector>

#if defined(FUSED_DNI_EMULATED_THREADS)
#include <condition_variable>
#include <mutex>
#define FUSED_DNI_PER_THREAD thread_local
#else
#define FUSED_DNI_PER_THREAD
#endif

#include "../cuda/status.hpp"

namespace fused_dni::emulation {

using cuda::Status;

struct Settings {
  std::uint64_t seed = 0;         // of the order of fibers; 0: a fixed order
  int resident = 3;               // blocks that the device holds at once, in clusters or not
  bool clusters = true;           // whether it has them
  bool cluster_launches = true;   // whether it then takes a launch in clusters
  bool deferred = false;          // launches wait for synchronize, to run beside other streams'
  bool lost_arrival = false;      // a grid's last block adds nothing to memory
  int shared_limit = 227 * 1024;  // bytes of shared memory a block
};
Settings& settings();

enum class Collective {
  kBlockBarrier,
  kBlockAny,
  kClusterBarrier,
  kWarpBarrier,
  kShuffle,
  kShuffleXor,
  kMmaBf16,
  kMmaFp16,
  kMmaTf32,
  kLoadMatrices,
  kLoadMatricesTransposed
};

struct Thread;

// Where the threads of a block or a warp wait for one another.
struct Meeting {
  int expected = 0;
  int arrived = 0;
  Collective what{};
  bool vote = false;          // of any of them
  Thread* waiting = nullptr;  // a list through Thread::next
  void* lanes[32] = {};       // what each lane of a warp brought
#if defined(FUSED_DNI_EMULATED_THREADS)
  std::mutex mutex;
  std::condition_variable released;
#endif
};

// Meetings alternate between two. A thread that wakes late from one then does not touch what an
// early one has done in the next, which under ThreadSanitizer would order the two.
struct Meetings {
  Meeting parity[2];
};

struct Launch;

struct Block {
  int index = 0;
  const Launch* launch = nullptr;
  unsigned char* shared = nullptr;
  Meetings meetings;
};

struct Thread {
  int index = 0;
  Block* block = nullptr;
  Meetings *warp = nullptr, *cluster = nullptr;
  unsigned block_meetings = 0, warp_meetings = 0, cluster_meetings = 0;  // how many it came to
  Meeting* waits = nullptr;
  Thread* next = nullptr;
  bool vote = false, pausing = false, returned = false;
  std::uint64_t clock = 0, seen = 0;  // of nanoseconds: the time, and the progress by then
  void* stack_pointer = nullptr;      // of a fiber that does not run
};

struct Launch {
  std::function<void()> kernel;  // with its arguments
  int blocks = 0, threads = 0, shared = 0, cluster = 1;
  const void* stream = nullptr;
};

struct Machine {
  std::vector<Block> block;
  std::vector<Meetings> warp, cluster;
  std::vector<Thread> thread;
  std::atomic<std::uint64_t> progress{0};  // grows with whatever may end another thread's wait
  std::atomic<int> additions{0};           // atomic ones to memory, of the last launch
  std::atomic<int> attempts{0};            // launches that were asked for since the settings
  std::atomic<bool> stalled{false};        // no thread can go on
  std::string fault;                       // what the first thread at fault did
  std::set<const void*> refused;           // kernels that are launched in clusters no more
};
extern Machine machine;
extern FUSED_DNI_PER_THREAD Thread* current;

constexpr int kMostCluster = 16;  // blocks of a cluster

// A block's shared memory is followed, at this distance, by a byte for each of its bytes: whether
// it was written.
constexpr int kShadow = 256 * 1024;

// Ends the launch. The text goes on from the thread's position.
[[noreturn, gnu::format(printf, 1, 2)]] void fault(const char* format, ...);

using Finish = void (*)(void* const* lanes);
// Waits for the other lanes; the last to come calls `finish` with what they brought.
void meet_warp(Collective what, void* brought, Finish finish);
// Whether any thread of the block voted so.
bool meet_block(Collective what, bool vote);
void meet_cluster();
void pause();

// A clock for waits that should have an end.
std::uint64_t nanoseconds();

Status check_configuration(int blocks, int threads, int shared, int cluster);
void run(const Launch& launch, Status& status);
// Runs what was deferred: of each stream the first launch, all of them at once, then the second.
void synchronize(Status& status);

// Of the scheduler.
void run_threads();
[[noreturn]] void stop();  // after a fault
void wait(Meeting& meeting);
void release(Meeting& meeting);

}  // namespace fused_dni::emulation
