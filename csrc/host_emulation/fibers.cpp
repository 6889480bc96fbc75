// All threads of a launch as fibers of one thread of the system.
//
// A fiber runs until it waits, pauses or returns, and then switches to the next by itself. The
// last one made ready goes first, so that a warp whose lanes have met runs ahead of the others as
// far as it can; with a seed, meetings release in a random order and now and then any fiber goes
// first, one that pauses too.
#if !defined(FUSED_DNI_EMULATED_THREADS)

#include "machine.hpp"

#include <cstdlib>
#include <utility>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__  // as GCC says it
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#include "../fibers.hpp"
#if !defined(FUSED_DNI_FRAME)
#include <ucontext.h>
#endif

namespace fused_dni::emulation {

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t kStack = 512 * 1024;  // frames are several times as large
#else
constexpr std::size_t kStack = 64 * 1024;
#endif
constexpr int kIdleRounds = 1000;  // of fibers that only pause, until we say that they spin

Stacks<kStack> stacks;  // kept for later launches
std::vector<Thread*> ready, paused;
Thread outside;  // the caller of run_threads
std::uint64_t random_state;
std::uint64_t seen_progress;
int idle_rounds;
bool abandoned;  // a fault left fibers in the middle of their kernel

std::uint64_t random_below(std::uint64_t limit) {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return ((random_state * 0x2545F4914F6CDD1Dull) >> 32) * limit >> 32;
}

// The fiber to run next; `outside` if there is none.
Thread& take_next() {
  if (random_state && random_below(8) == 0 && !(ready.empty() && paused.empty())) {
    std::uint64_t index = random_below(ready.size() + paused.size());
    std::vector<Thread*>& from = index < ready.size() ? ready : paused;
    if (&from == &paused) index -= ready.size();
    std::swap(from[index], from.back());
    Thread* thread = from.back();
    from.pop_back();
    return *thread;
  }
  if (ready.empty()) {
    const std::uint64_t progress = machine.progress.load(std::memory_order_relaxed);
    idle_rounds = progress == seen_progress ? idle_rounds + 1 : 0;
    seen_progress = progress;
    if (paused.empty() || idle_rounds > kIdleRounds) return outside;
    std::swap(ready, paused);
  }
  Thread* thread = ready.back();
  ready.pop_back();
  return *thread;
}

void start_fiber();

#if defined(FUSED_DNI_FRAME)
void prepare(Thread& thread, unsigned char* top) {
  thread.stack_pointer = first_frame(top, start_fiber);
}
void switch_context(Thread& from, Thread& to) {
  fused_dni_switch(&from.stack_pointer, to.stack_pointer);
}
#else
std::vector<ucontext_t> contexts(1);  // the first is of `outside`
ucontext_t& context(Thread& thread) {
  return contexts[&thread == &outside ? 0 : 1 + (&thread - machine.thread.data())];
}
void prepare(Thread& thread, unsigned char* top) {
  contexts.resize(1 + machine.thread.size());
  getcontext(&context(thread));
  context(thread).uc_stack.ss_sp = top - kStack / 2;
  context(thread).uc_stack.ss_size = kStack / 2;
  makecontext(&context(thread), start_fiber, 0);
}
void switch_context(Thread& from, Thread& to) { swapcontext(&context(from), &context(to)); }
#endif

#if defined(__SANITIZE_ADDRESS__)
const void* outside_bottom;
std::size_t outside_size;
const Thread* left;
void announce(Thread& to, void** kept) {
  left = current;
  const bool out = &to == &outside;
  __sanitizer_start_switch_fiber(kept, out ? outside_bottom : stacks[&to - machine.thread.data()],
                                 out ? outside_size : kStack);
}
void arrived(void* kept) {
  const void* bottom;
  std::size_t size;
  __sanitizer_finish_switch_fiber(kept, &bottom, &size);
  if (left == &outside) outside_bottom = bottom, outside_size = size;
}
#else
void announce(Thread&, void**) {}
void arrived(void*) {}
#endif

void switch_to(Thread& to) {
  Thread& from = *current;
  if (&from == &to) return;
  void* kept = nullptr;
  announce(to, &kept);
  current = &to;
  switch_context(from, to);
  arrived(kept);
}

void start_fiber() {
  arrived(nullptr);
  current->block->launch->kernel();
  current->returned = true;
  machine.progress.fetch_add(1, std::memory_order_relaxed);
  Thread& to = take_next();
  announce(to, nullptr);
  Thread& from = *current;
  current = &to;
  switch_context(from, to);
  std::abort();  // nobody switches to a fiber that has returned
}

}  // namespace

void run_threads() {
  const std::uint64_t seed = settings().seed;
  random_state = seed ? seed * 0x9E3779B97F4A7C15ull | 1 : 0;
  seen_progress = ~std::uint64_t{0};
  idle_rounds = 0;
  ready.clear();
  paused.clear();
  for (std::size_t i = machine.thread.size(); i-- > 0;) {
#if defined(__SANITIZE_ADDRESS__)
    if (abandoned) __asan_unpoison_memory_region(stacks[i], kStack);
#endif
    prepare(machine.thread[i], stacks.top(i));
    ready.push_back(&machine.thread[i]);
  }
  abandoned = false;
  current = &outside;
  switch_to(take_next());
  for (const Thread& thread : machine.thread) machine.stalled = machine.stalled || !thread.returned;
  abandoned = machine.stalled;
}

void stop() {
  switch_to(outside);
  std::abort();  // the launch is over
}

void wait(Meeting&) { switch_to(take_next()); }

void release(Meeting& meeting) {
  const std::size_t first = ready.size();
  for (Thread* thread = meeting.waiting; thread; thread = thread->next)
    if (thread != current) ready.push_back(thread);
  meeting.waiting = nullptr;
  if (!random_state) return;
  for (std::size_t i = ready.size(); i > first + 1; --i)
    std::swap(ready[i - 1], ready[first + random_below(i - first)]);
}

// A thread's time goes on when nothing else has since it last looked, and then by an hour.
std::uint64_t nanoseconds() {
  const std::uint64_t progress = machine.progress.load(std::memory_order_relaxed);
  if (progress == current->seen) current->clock += 3'600'000'000'000;
  current->seen = progress;
  return current->clock;
}

void pause() {
  current->pausing = true;
  paused.push_back(current);
  switch_to(take_next());
  current->pausing = false;
}

}  // namespace fused_dni::emulation

#endif
