#include <cstddef>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "ops.hpp"

namespace fused_dni {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
// What a thread keeps from call to call; a call that needs more returns it at the next smaller one.
constexpr std::size_t kKept = std::size_t{256} << 20;

class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(memory_); }

  void* at_least(std::size_t bytes) {
    if (bytes > size_ || (size_ > kKept && bytes <= kKept)) {
      std::free(memory_);
      memory_ = nullptr;
      size_ = 0;
      // Whole huge pages: the kernels walk through the buffer with large strides, and a miss in
      // the translation cache costs as much as the arithmetic on a row.
      const std::size_t rounded = (bytes + kHugePage - 1) / kHugePage * kHugePage;
      memory_ = std::aligned_alloc(kHugePage, rounded);
      if (memory_ == nullptr) throw std::bad_alloc();
      size_ = rounded;
#if defined(__linux__)
      madvise(memory_, rounded, MADV_HUGEPAGE);
#endif
    }
    return memory_;
  }

 private:
  void* memory_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace

void* scratch(std::size_t bytes) {
  static thread_local Buffer buffer;
  return buffer.at_least(bytes);
}

}  // namespace fused_dni
