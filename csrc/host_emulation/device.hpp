// The twin of csrc/cuda/device.cuh on a CPU: what kernels take from the machine, with checks.
//
// Reports (as the launch's Status): a barrier or a warp's collective that not all threads reach,
// or that they enter by different functions; shared memory out of bounds, misaligned, or read
// before it was written; more shared memory taken than launched.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "machine.hpp"

#define FUSED_DNI_DEVICE inline
#define FUSED_DNI_BOTH inline
#define FUSED_DNI_KERNEL(threads) static void
#define FUSED_DNI_ARGUMENT const

namespace fused_dni::cuda {

struct bf16 {
  std::uint16_t bits;
};
struct fp16 {
  std::uint16_t bits;
};

// ---- Where a thread stands ------------------------------------------------------------------------

inline int thread() { return emulation::current->index; }
inline int threads() { return emulation::current->block->launch->threads; }
inline int block() { return emulation::current->block->index; }
inline int blocks() { return emulation::current->block->launch->blocks; }
inline int lane() { return thread() % 32; }
inline int warp() { return thread() / 32; }

// ---- Waiting and exchanging -----------------------------------------------------------------------

inline void block_barrier() { emulation::meet_block(emulation::Collective::kBlockBarrier, false); }
inline bool block_any(bool value) {
  return emulation::meet_block(emulation::Collective::kBlockAny, value);
}
inline void cluster_barrier() { emulation::meet_cluster(); }
inline void warp_barrier() {
  emulation::meet_warp(emulation::Collective::kWarpBarrier, nullptr, nullptr);
}

namespace emulated {

template <class T>
struct Exchange {
  T value, received;
  int from;
};
template <class T>
T exchange(emulation::Collective what, T value, int from) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  Exchange<T> mine{value, value, from % 32};
  emulation::meet_warp(what, &mine, [](void* const* lanes) {
    for (int i = 0; i < 32; ++i) {
      auto& to = *static_cast<Exchange<T>*>(lanes[i]);
      to.received = static_cast<Exchange<T>*>(lanes[to.from])->value;
    }
  });
  return mine.received;
}

}  // namespace emulated

template <class T>
T shuffle_xor(T value, int mask) {
  return emulated::exchange(emulation::Collective::kShuffleXor, value, lane() ^ mask);
}
template <class T>
T shuffle(T value, int from) {
  return emulated::exchange(emulation::Collective::kShuffle, value, from);
}

// ---- Memory that several blocks see ---------------------------------------------------------------

inline int atomic_add_acquire_release(int* at, int value) {
  if (emulation::settings().lost_arrival && block() == blocks() - 1) value = 0;
  const int before = std::atomic_ref<int>(*at).fetch_add(value, std::memory_order_acq_rel);
  emulation::machine.progress.fetch_add(1, std::memory_order_relaxed);
  emulation::machine.additions.fetch_add(1, std::memory_order_relaxed);
  return before;
}
inline int load_acquire(const int* at) {
  return std::atomic_ref<int>(*const_cast<int*>(at)).load(std::memory_order_acquire);
}
inline void assume_global(const void*) {}
inline void pause() { emulation::pause(); }
inline std::uint64_t nanoseconds() { return emulation::nanoseconds(); }
inline void give_up(std::uint64_t* to, std::uint64_t record) {
  if (to != nullptr) std::atomic_ref<std::uint64_t>(*to).store(record);
  emulation::fault("trapped");
}

// ---- Numbers --------------------------------------------------------------------------------------

inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) { return float_of(std::uint32_t{value.bits} << 16); }
inline float to_float(fp16 value) {
  const std::uint32_t size = value.bits & 0x7fffu;
  const float scaled = float_of(size << 13) * 0x1p112f;  // subnormals become normal
  return float_of(bits_of(scaled) | (size >= 0x7c00u ? 0x7f800000u : 0u) |
                  (value.bits & 0x8000u) << 16);
}
template <class T>
T from_float(float value);
template <>
inline float from_float<float>(float value) {
  return value;
}
template <>
inline bf16 from_float<bf16>(float value) {
  if (value != value) return {0x7fff};
  const std::uint32_t bits = bits_of(value);
  return {static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <>
inline fp16 from_float<fp16>(float value) {
  if (value != value) return {0x7fff};
  const std::uint32_t size = bits_of(value) & 0x7fffffffu, sign = bits_of(value) >> 16 & 0x8000u;
  std::uint32_t half;
  if (size >= bits_of(65520.0f)) {
    half = 0x7c00u;
  } else if (size < bits_of(0x1p-14f)) {  // in units of 2^-24, those of 0.5's last digit
    half = bits_of(float_of(size) + 0.5f) - bits_of(0.5f);
  } else {
    half = (size - (112u << 23) + 0xfffu + (size >> 13 & 1u)) >> 13;
  }
  return {static_cast<std::uint16_t>(half | sign)};
}
inline float round_tf32(float value) {
  if (value != value) return float_of(0x7fffffffu);
  return float_of((bits_of(value) + 0x1000u) & 0xffffe000u);
}

struct alignas(16) Words {
  std::uint32_t word[4];
};
inline void check_words(const void* at) {
  if (reinterpret_cast<std::uintptr_t>(at) % 16 != 0)
    emulation::fault("sixteen bytes at a misaligned address, %p", at);
}
inline Words load_words(const void* at) {
  check_words(at);
  Words value;
  std::memcpy(&value, at, sizeof value);
  return value;
}
inline void store_words(void* at, Words value) {
  check_words(at);
  std::memcpy(at, &value, sizeof value);
}

// ---- Shared memory --------------------------------------------------------------------------------

template <class T>
class Shared {
  static_assert(std::is_trivially_copyable_v<T> && 16 % sizeof(T) == 0);

 public:
  Shared() = default;
  Shared(T* data, int count) : data_(reinterpret_cast<unsigned char*>(data)), count_(count) {}

  T load(int index) const { return read<T>(index); }
  void store(int index, T value) const { write(index, value); }
  Words load_words(int index) const { return read<Words>(index); }
  void store_words(int index, Words value) const { write(index, value); }

 private:
  template <class V>
  unsigned char* check(int index, const char* what) const {
    constexpr int size = sizeof(V) / sizeof(T);
    if (index < 0 || index > count_ - size)
      emulation::fault("%s of shared memory out of bounds: %d at element %d of %d", what, size,
                       index, count_);
    if (sizeof(V) == sizeof(Words)) check_words(data_ + index * sizeof(T));
    return data_ + index * sizeof(T);
  }
  template <class V>
  V read(int index) const {
    const unsigned char* at = check<V>(index, "load");
    V value;
    std::memcpy(&value, at, sizeof value);
    unsigned char written[sizeof(V)], all[sizeof(V)];
    std::memcpy(written, at + emulation::kShadow, sizeof written);
    std::memset(all, 1, sizeof all);
    if (std::memcmp(written, all, sizeof all) != 0)
      emulation::fault("load of shared memory never written: element %d of %d", index, count_);
    return value;
  }
  template <class V>
  void write(int index, V value) const {
    unsigned char* at = check<V>(index, "store");
    std::memcpy(at, &value, sizeof value);
    std::memset(at + emulation::kShadow, 1, sizeof value);
  }

  unsigned char* data_ = nullptr;
  int count_ = 0;
};

class SharedArena {
 public:
  template <class T>
  Shared<T> take(int count) {
    const std::int64_t end = used_ + (std::int64_t{count} * int{sizeof(T)} + 15) / 16 * 16;
    const int all = emulation::current->block->launch->shared;
    if (count < 0 || end > all)
      emulation::fault("takes shared memory up to byte %lld of %d", static_cast<long long>(end),
                       all);
    T* data = reinterpret_cast<T*>(emulation::current->block->shared + used_);
    used_ = static_cast<int>(end);
    return {data, count};
  }

 private:
  int used_ = 0;
};

// ---- Tensor cores ---------------------------------------------------------------------------------
//
// Sums are in float, in the order of k; the hardware's own order and digits are not published.
// Of a tf32 operand, as there, the low 13 bits do not count.

namespace emulated {

struct Fragments {
  float* d;
  const std::uint32_t* a;
  const std::uint32_t* b;
};

template <class Unpack, int kDepth>
void multiply(void* const* lanes) {
  constexpr int kPack = kDepth / 8;                     // elements a word
  using Four = float __attribute__((vector_size(16)));  // what any x86-64 and AArch64 has
  float a[16][kDepth];
  alignas(16) float b[kDepth][8];
  for (int i = 0; i < 32; ++i) {
    const auto& mine = *static_cast<const Fragments*>(lanes[i]);
    const int g = i / 4, t = i % 4;
    for (int half = 0; half < 2; ++half)
      for (int e = 0; e < kPack; ++e) {
        const int k = half * (kDepth / 2) + t * kPack + e;
        a[g][k] = Unpack::element(mine.a[2 * half], e);
        a[g + 8][k] = Unpack::element(mine.a[2 * half + 1], e);
        b[k][g] = Unpack::element(mine.b[half], e);
      }
  }
  for (int row = 0; row < 16; ++row) {
    alignas(16) float sum[8];
    const auto d = [&](int t) {
      return static_cast<const Fragments*>(lanes[row % 8 * 4 + t])->d + row / 8 * 2;
    };
    for (int t = 0; t < 4; ++t) std::memcpy(sum + 2 * t, d(t), 2 * sizeof(float));
    for (int column = 0; column < 8; column += 4) {
      Four total, factors;
      std::memcpy(&total, sum + column, sizeof total);
      for (int k = 0; k < kDepth; ++k) {
        std::memcpy(&factors, b[k] + column, sizeof factors);
        total += a[row][k] * factors;
      }
      std::memcpy(sum + column, &total, sizeof total);
    }
    for (int t = 0; t < 4; ++t) std::memcpy(d(t), sum + 2 * t, 2 * sizeof(float));
  }
}

template <class T>
struct Unpack {
  static float element(std::uint32_t word, int e) {
    return to_float(T{static_cast<std::uint16_t>(word >> 16 * e)});
  }
};
struct UnpackTf32 {
  static float element(std::uint32_t word, int) { return float_of(word & 0xffffe000u); }
};

}  // namespace emulated

inline void mma_bf16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  emulated::Fragments mine{d, a, b};
  emulation::meet_warp(emulation::Collective::kMmaBf16, &mine,
                       emulated::multiply<emulated::Unpack<bf16>, 16>);
}
inline void mma_fp16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  emulated::Fragments mine{d, a, b};
  emulation::meet_warp(emulation::Collective::kMmaFp16, &mine,
                       emulated::multiply<emulated::Unpack<fp16>, 16>);
}
inline void mma_tf32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  emulated::Fragments mine{d, a, b};
  emulation::meet_warp(emulation::Collective::kMmaTf32, &mine,
                       emulated::multiply<emulated::UnpackTf32, 8>);
}

namespace emulated {

struct MatrixRow {
  Words row;
  std::uint32_t* r;
};
template <bool kTransposed>
void spread_matrices(void* const* lanes) {
  const auto element = [&](int matrix, int row, int column) {
    if (kTransposed) std::swap(row, column);
    const Words& words = static_cast<const MatrixRow*>(lanes[matrix * 8 + row])->row;
    return words.word[column / 2] >> column % 2 * 16 & 0xffffu;
  };
  for (int i = 0; i < 32; ++i)
    for (int m = 0; m < 4; ++m)
      static_cast<MatrixRow*>(lanes[i])->r[m] =
          element(m, i / 4, i % 4 * 2) | element(m, i / 4, i % 4 * 2 + 1) << 16;
}

}  // namespace emulated

template <class T>
void load_matrices(std::uint32_t (&r)[4], Shared<T> from, int index) {
  static_assert(sizeof(T) == 2);
  emulated::MatrixRow mine{from.load_words(index), r};
  emulation::meet_warp(emulation::Collective::kLoadMatrices, &mine,
                       emulated::spread_matrices<false>);
}
template <class T>
void load_matrices_transposed(std::uint32_t (&r)[4], Shared<T> from, int index) {
  static_assert(sizeof(T) == 2);
  emulated::MatrixRow mine{from.load_words(index), r};
  emulation::meet_warp(emulation::Collective::kLoadMatricesTransposed, &mine,
                       emulated::spread_matrices<true>);
}

// ---- Launching ------------------------------------------------------------------------------------

template <class A>
int resident_blocks(void (*)(A), int threads, int shared, Status& status) {
  status = emulation::check_configuration(1, threads, shared, 1);
  return status.ok() ? emulation::settings().resident : 0;
}
template <class A>
int resident_clusters(void (*kernel)(A), int threads, int shared, int cluster) {
  const bool fits = emulation::check_configuration(cluster, threads, shared, cluster).ok() &&
                    emulation::machine.refused.count(reinterpret_cast<const void*>(kernel)) == 0;
  return emulation::settings().clusters && fits ? emulation::settings().resident / cluster : 0;
}
template <class A>
void refuse_clusters(void (*kernel)(A), int, int, int) {
  emulation::machine.refused.insert(reinterpret_cast<const void*>(kernel));
}
template <class A>
void launch(void (*kernel)(A), const A& arguments, int blocks, int threads, int shared,
            void* stream, Status& status, int cluster = 1) {
  emulation::run({[=] { kernel(arguments); }, blocks, threads, shared, cluster, stream}, status);
}

}  // namespace fused_dni::cuda
