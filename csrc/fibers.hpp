// Stacks of our own and the switch from one to another, for x86-64 and aarch64 under Linux.
// (swapcontext makes a system call.) FUSED_DNI_FRAME is defined where there is a switch.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstring>
#include <new>
#include <vector>

// fused_dni_switch(from, to): keeps the stack pointer at `*from` and goes on from `to`, with the
// registers that a called function preserves on the stacks. Not the floating-point environment.
#if defined(__linux__) && defined(__x86_64__) && !defined(FUSED_DNI_NO_SWITCH)
asm(R"(
.text
.globl fused_dni_switch
.hidden fused_dni_switch
.type fused_dni_switch, @function
fused_dni_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fused_dni_switch, .-fused_dni_switch
)");
#define FUSED_DNI_FRAME 8   // words: six registers, where to return, and who called there: nobody
#define FUSED_DNI_RETURN 6  // the word where to return
#elif defined(__linux__) && defined(__aarch64__) && !defined(FUSED_DNI_NO_SWITCH)
asm(R"(
.text
.globl fused_dni_switch
.hidden fused_dni_switch
.type fused_dni_switch, %function
fused_dni_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size fused_dni_switch, .-fused_dni_switch
)");
#define FUSED_DNI_FRAME 20
#define FUSED_DNI_RETURN 11  // x30
#endif

namespace fused_dni {

#if defined(FUSED_DNI_FRAME)
extern "C" void fused_dni_switch(void** from, void* to);

// What to switch to for a call of `start`, which never returns, on the stack below `top`.
inline void* first_frame(unsigned char* top, void (*start)()) {
  auto* frame = reinterpret_cast<void**>(top) - FUSED_DNI_FRAME;
  std::memset(frame, 0, FUSED_DNI_FRAME * sizeof(void*));
  frame[FUSED_DNI_RETURN] = reinterpret_cast<void*>(start);
  return frame;
}
#endif

// Stacks of kStack bytes, kept for later. Under each lies a page that nothing may touch.
template <std::size_t kStack>
class Stacks {
 public:
  Stacks() = default;
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks() {
    for (unsigned char* bottom : bottoms_) munmap(bottom - page(), page() + kStack);
  }

  // The lowest address of one. Throws std::bad_alloc where the system gives no memory.
  unsigned char* operator[](std::size_t index) {
    bottoms_.reserve(index + 1);
    while (bottoms_.size() <= index) {
      void* at = mmap(nullptr, page() + kStack, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (at == MAP_FAILED) throw std::bad_alloc();
      if (mprotect(at, page(), PROT_NONE) != 0) {
        munmap(at, page() + kStack);
        throw std::bad_alloc();
      }
      bottoms_.push_back(static_cast<unsigned char*>(at) + page());
    }
    return bottoms_[index];
  }
  // Tops at different places in the page: at the same place they share few lines of the cache.
  unsigned char* top(std::size_t index) { return (*this)[index] + kStack - index * 320 % 4096; }

 private:
  static std::size_t page() {
    static const auto size = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    return size;
  }
  std::vector<unsigned char*> bottoms_;
};

}  // namespace fused_dni
