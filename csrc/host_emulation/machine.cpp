// What both schedulers share: meetings, faults and the launch.
#include "machine.hpp"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>

#include "../cuda/barrier.hpp"

namespace fused_dni::cuda {

std::uint64_t* stall_memory() {
  static std::uint64_t memory = 0;
  return &memory;
}

}  // namespace fused_dni::cuda

namespace fused_dni::emulation {

Machine machine;
FUSED_DNI_PER_THREAD Thread* current = nullptr;

Settings& settings() {
  static Settings settings;
  return settings;
}

namespace {

const char* name(Collective what) {
  static const char* const names[] = {"block_barrier",
                                      "block_any",
                                      "cluster_barrier",
                                      "warp_barrier",
                                      "shuffle",
                                      "shuffle_xor",
                                      "mma_bf16",
                                      "mma_fp16",
                                      "mma_tf32",
                                      "load_matrices",
                                      "load_matrices_transposed"};
  return names[static_cast<int>(what)];
}

std::string text(const char* format, std::va_list values) {
  char line[400];
  std::vsnprintf(line, sizeof line, format, values);
  return line;
}

[[gnu::format(printf, 1, 2)]] std::string text(const char* format, ...) {
  std::va_list values;
  va_start(values, format);
  std::string line = text(format, values);
  va_end(values);
  return line;
}

std::string doing(const Thread& thread) {
  if (thread.returned) return "has returned";
  if (thread.waits) return text("waits in %s", name(thread.waits->what));
  return "spins in pause";
}

// Nobody can go on: who misses in the first meeting that some threads wait in?
std::string describe_stall() {
  for (const Thread& thread : machine.thread) {
    if (!thread.waits) continue;
    const Meeting& meeting = *thread.waits;
    const bool of_warp = meeting.what >= Collective::kWarpBarrier;
    const bool of_cluster = meeting.what == Collective::kClusterBarrier;
    for (const Thread& other : machine.thread) {
      const bool of_it = of_warp      ? other.warp == thread.warp
                         : of_cluster ? other.cluster == thread.cluster
                                      : other.block == thread.block;
      if (!of_it || other.waits == &meeting) continue;
      return text("%s of block %d%s was reached by %d of %d threads: %sthread %d %s",
                  name(meeting.what), thread.block->index,
                  of_warp ? text(", warp %d,", thread.index / 32).c_str() : "", meeting.arrived,
                  meeting.expected,
                  of_cluster ? text("block %d, ", other.block->index).c_str() : "", other.index,
                  doing(other).c_str());
    }
  }
  for (const Thread& thread : machine.thread)
    if (thread.pausing)
      return text("block %d, thread %d: spins in pause and no thread can end its wait",
                  thread.block->index, thread.index);
  return "no thread can go on";
}

bool meet(Meeting& meeting, Collective what, bool vote, void* brought, Finish finish) {
  Thread& self = *current;
#if defined(FUSED_DNI_EMULATED_THREADS)
  const std::lock_guard lock(meeting.mutex);
#endif
  if (meeting.arrived > 0 && meeting.what != what)
    fault("came to %s while others wait in %s", name(what), name(meeting.what));
  meeting.what = what;
  meeting.vote |= vote;
  if (brought) meeting.lanes[self.index % 32] = brought;
  self.waits = &meeting;
  self.next = meeting.waiting;
  meeting.waiting = &self;
  if (++meeting.arrived < meeting.expected) {
    wait(meeting);
    return self.vote;
  }
  if (finish) finish(meeting.lanes);
  const bool any = meeting.vote;
  for (Thread* thread = meeting.waiting; thread; thread = thread->next) {
    thread->vote = any;
    thread->waits = nullptr;
  }
  machine.progress.fetch_add(1, std::memory_order_relaxed);
  meeting.arrived = 0;
  meeting.vote = false;
  release(meeting);
  return any;
}

// Launches that wait for synchronize.
std::vector<Launch> deferred;

// Shared memory of all blocks and its shadow.
unsigned char* shared_memory(int blocks) {
  static std::unique_ptr<unsigned char[]> memory;
  static int held = 0;
  if (held < blocks) {
    memory.reset(new unsigned char[std::size_t{2} * kShadow * blocks + 128]);
    held = blocks;
  }
  const auto at = reinterpret_cast<std::uintptr_t>(memory.get());
  return memory.get() + (128 - at % 128) % 128;
}

}  // namespace

void fault(const char* format, ...) {
  static std::mutex mutex;
  {  // nothing may be left to destroy: a fiber does not come back from stop()
    const std::lock_guard lock(mutex);
    std::va_list values;
    va_start(values, format);
    if (machine.fault.empty())
      machine.fault = text("block %d, thread %d: ", current->block->index, current->index) +
                      text(format, values);
    va_end(values);
  }
  stop();
}

void meet_warp(Collective what, void* brought, Finish finish) {
  meet(current->warp->parity[current->warp_meetings++ % 2], what, false, brought, finish);
}

bool meet_block(Collective what, bool vote) {
  Meetings& meetings = current->block->meetings;
  return meet(meetings.parity[current->block_meetings++ % 2], what, vote, nullptr, nullptr);
}

void meet_cluster() {
  Meetings& meetings = *current->cluster;
  meet(meetings.parity[current->cluster_meetings++ % 2], Collective::kClusterBarrier, false,
       nullptr, nullptr);
}

Status check_configuration(int blocks, int threads, int shared, int cluster) {
  if (blocks < 1 || threads < 1 || threads > 1024 || threads % 32 != 0)
    return {9, "cudaErrorInvalidConfiguration",
            text("cannot run as %d blocks of %d threads", blocks, threads)};
  if (cluster < 1 || cluster > kMostCluster || blocks % cluster != 0)
    return {912, "cudaErrorInvalidClusterSize",
            text("cannot run %d blocks in clusters of %d", blocks, cluster)};
  if (shared < 0 || shared > settings().shared_limit)
    return {
        1, "cudaErrorInvalidValue",
        text("asks for %d bytes of shared memory a block, of %d", shared, settings().shared_limit)};
  if (blocks > settings().resident)
    return {720, "cudaErrorCooperativeLaunchTooLarge",
            text("asks for %d blocks at once, of %d", blocks, settings().resident)};
  return {};
}

namespace {

// Where a launch's parts lie in the machine's lists.
struct Parts {
  int blocks = 0, warps = 0, clusters = 0, threads = 0;

  void add(const Launch& launch) {
    blocks += launch.blocks;
    warps += launch.blocks * (launch.threads / 32);
    clusters += launch.blocks / launch.cluster;
    threads += launch.blocks * launch.threads;
  }
};

void place(const Launch& launch, const Parts& first, unsigned char* shared) {
  const int warps = launch.threads / 32;
  for (int b = 0; b < launch.blocks; ++b) {
    Block& block = machine.block[first.blocks + b];
    block.index = b;
    block.launch = &launch;
    block.shared = shared + std::size_t{2} * kShadow * (first.blocks + b);
    std::memset(block.shared, 0xFF, launch.shared);
    std::memset(block.shared + kShadow, 0, launch.shared);
    for (Meeting& meeting : block.meetings.parity) meeting.expected = launch.threads;
    Meetings& cluster = machine.cluster[first.clusters + b / launch.cluster];
    for (Meeting& meeting : cluster.parity) meeting.expected = launch.threads * launch.cluster;
    for (int i = 0; i < launch.threads; ++i) {
      Thread& thread = machine.thread[first.threads + b * launch.threads + i];
      thread.index = i;
      thread.block = &block;
      thread.warp = &machine.warp[first.warps + b * warps + i / 32];
      thread.cluster = &cluster;
    }
  }
}

void run_together(const std::vector<Launch>& launches, Status& status) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  Parts all;
  for (const Launch& launch : launches) all.add(launch);
  machine.block = std::vector<Block>(all.blocks);
  machine.warp = std::vector<Meetings>(all.warps);
  machine.cluster = std::vector<Meetings>(all.clusters);
  machine.thread.assign(all.threads, {});
  machine.progress = 0;
  machine.additions = 0;
  machine.stalled = false;
  machine.fault.clear();
  *cuda::stall_memory() = 0;
  for (Meetings& meetings : machine.warp)
    for (Meeting& meeting : meetings.parity) meeting.expected = 32;
  unsigned char* shared = shared_memory(all.blocks);
  Parts placed;
  for (const Launch& launch : launches) {
    place(launch, placed, shared);
    placed.add(launch);
  }
  run_threads();
  if (machine.fault.empty() && machine.stalled) machine.fault = describe_stall();
  if (!machine.fault.empty()) status = {719, "cudaErrorLaunchFailure", machine.fault, true};
}

}  // namespace

void run(const Launch& launch, Status& status) {
  ++machine.attempts;
  status = check_configuration(launch.blocks, launch.threads, launch.shared, launch.cluster);
  if (status.ok() && launch.cluster > 1 && !settings().cluster_launches)
    status = {701, "cudaErrorLaunchOutOfResources", "takes no launch in clusters"};
  if (!status.ok()) return;
  if (settings().deferred)
    deferred.push_back(launch);
  else
    run_together({launch}, status);
}

void synchronize(Status& status) {
  while (!deferred.empty() && status.ok()) {
    std::vector<Launch> first, later;
    for (const Launch& launch : deferred) {
      const bool behind = std::any_of(first.begin(), first.end(), [&](const Launch& other) {
        return other.stream == launch.stream;
      });
      (behind ? later : first).push_back(launch);
    }
    run_together(first, status);
    deferred = later;
  }
  deferred.clear();
}

}  // namespace fused_dni::emulation
