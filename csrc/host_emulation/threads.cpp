// Each thread of a launch as a thread of the system, so that ThreadSanitizer sees what orders
// their accesses: meetings, and the atomics of kernels. The counters here are relaxed: they order
// nothing.
#if defined(FUSED_DNI_EMULATED_THREADS)

#include "machine.hpp"

#include <chrono>
#include <thread>

namespace fused_dni::emulation {

namespace {

using Clock = std::chrono::steady_clock;

struct Abandoned {};  // thrown through the kernel

std::atomic<int> idle{0};  // threads that wait or have returned
std::atomic<bool> stopped{false};

// Counts the thread among the idle. The last one knows that nobody will go on.
void count_idle() {
  if (idle.fetch_add(1, std::memory_order_relaxed) + 1 < static_cast<int>(machine.thread.size()))
    return;
  stopped.store(true, std::memory_order_relaxed);
}

void run_thread(Thread* thread) {
  current = thread;
  try {
    thread->block->launch->kernel();
    thread->returned = true;
    machine.progress.fetch_add(1, std::memory_order_relaxed);
    count_idle();
  } catch (const Abandoned&) {
  }
}

}  // namespace

void run_threads() {
  idle = 0;
  stopped = false;
  std::vector<std::thread> threads;
  for (Thread& thread : machine.thread) threads.emplace_back(run_thread, &thread);
  for (std::thread& thread : threads) thread.join();
  for (const Thread& thread : machine.thread) machine.stalled = machine.stalled || !thread.returned;
}

void stop() {
  stopped.store(true, std::memory_order_relaxed);
  throw Abandoned{};
}

void wait(Meeting& meeting) {
  count_idle();
  std::unique_lock lock(meeting.mutex, std::adopt_lock);
  while (current->waits && !stopped.load(std::memory_order_relaxed))
    meeting.released.wait_for(lock, std::chrono::milliseconds(100));
  lock.release();  // the caller holds it
  if (current->waits) throw Abandoned{};
}

void release(Meeting& meeting) {
  idle.fetch_sub(meeting.expected - 1, std::memory_order_relaxed);
  meeting.waiting = nullptr;
  meeting.released.notify_all();
}

std::uint64_t nanoseconds() {
  const auto since = Clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(since).count();
}

void pause() {
  static thread_local std::uint64_t seen;
  static thread_local Clock::time_point since;
  const std::uint64_t progress = machine.progress.load(std::memory_order_relaxed);
  if (!current->pausing || progress != seen) {
    seen = progress;
    since = Clock::now();
  }
  current->pausing = true;
  if (stopped.load(std::memory_order_relaxed)) throw Abandoned{};
  if (Clock::now() - since > std::chrono::seconds(30)) stop();
  std::this_thread::yield();
}

}  // namespace fused_dni::emulation

#endif
