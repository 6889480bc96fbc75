// What kernels take from the machine, under one name for nvcc and for the emulation on a CPU
// (csrc/host_emulation/device.hpp has the twin of everything here, and says what it checks).
//
// Kernels use nothing else of CUDA: no threadIdx, no __shared__, no intrinsics, no PTX.
#pragma once

#include <cstdint>

#include "status.hpp"

#if defined(FUSED_DNI_EMULATED)
#include "../host_emulation/device.hpp"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// A function that kernels call; one that the host calls too; a kernel of so many threads a block.
#define FUSED_DNI_DEVICE __device__ __forceinline__
#define FUSED_DNI_BOTH __host__ __device__ __forceinline__
#define FUSED_DNI_KERNEL(threads) static __global__ void __launch_bounds__(threads, 1)
#define FUSED_DNI_ARGUMENT const __grid_constant__

namespace fused_dni::cuda {

using bf16 = __nv_bfloat16;
using fp16 = __half;

// ---- Where a thread stands (grids and blocks have one dimension) ----------------------------------

FUSED_DNI_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
FUSED_DNI_DEVICE int threads() { return static_cast<int>(blockDim.x); }
FUSED_DNI_DEVICE int block() { return static_cast<int>(blockIdx.x); }
FUSED_DNI_DEVICE int blocks() { return static_cast<int>(gridDim.x); }
FUSED_DNI_DEVICE int lane() { return thread() % 32; }
FUSED_DNI_DEVICE int warp() { return thread() / 32; }

// ---- Waiting and exchanging; all threads of the block or warp must come here ----------------------

FUSED_DNI_DEVICE void block_barrier() { __syncthreads(); }
FUSED_DNI_DEVICE void warp_barrier() { __syncwarp(); }
template <class T>
FUSED_DNI_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <class T>
FUSED_DNI_DEVICE T shuffle(T value, int from) {
  return __shfl_sync(0xffffffffu, value, from);
}
// Whether any thread of the block says so.
FUSED_DNI_DEVICE bool block_any(bool value) { return __syncthreads_or(value) != 0; }

// ---- Memory that several blocks see ---------------------------------------------------------------

FUSED_DNI_DEVICE int atomic_add_acquire_release(int* at, int value) {
  int before;
  asm volatile("atom.add.acq_rel.gpu.s32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(at), "r"(value)
               : "memory");
  return before;
}
FUSED_DNI_DEVICE int load_acquire(const int* at) {
  int value;
  asm volatile("ld.acquire.gpu.s32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}
// Says of an address that it is the device's memory, where the compiler cannot know.
FUSED_DNI_DEVICE void assume_global(const void* at) { __builtin_assume(__isGlobal(at)); }
// In a loop that waits for another block.
FUSED_DNI_DEVICE void pause() {}

// A clock that all processors share.
FUSED_DNI_DEVICE std::uint64_t nanoseconds() {
  std::uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}
// Ends the launch, and with it the context; `record` goes to the host's memory, if there is some.
FUSED_DNI_DEVICE void give_up(std::uint64_t* to, std::uint64_t record) {
  if (to != nullptr) {
    *static_cast<volatile std::uint64_t*>(to) = record;
    __threadfence_system();
  }
  __trap();
}

// Waits for all threads of the cluster that the block belongs to (see `launch`); what they wrote
// before is visible behind, in global memory too.
FUSED_DNI_DEVICE void cluster_barrier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __trap();  // never launched: resident_clusters says that there are none
#endif
}

// ---- Numbers --------------------------------------------------------------------------------------

FUSED_DNI_DEVICE float to_float(float value) { return value; }
FUSED_DNI_DEVICE float to_float(bf16 value) { return __bfloat162float(value); }
FUSED_DNI_DEVICE float to_float(fp16 value) { return __half2float(value); }
// To the nearest, ties to even.
template <class T>
FUSED_DNI_DEVICE T from_float(float value);
template <>
FUSED_DNI_DEVICE float from_float<float>(float value) {
  return value;
}
template <>
FUSED_DNI_DEVICE bf16 from_float<bf16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
FUSED_DNI_DEVICE fp16 from_float<fp16>(float value) {
  return __float2half_rn(value);
}
// A float with the digits of TF32, ties away from zero.
FUSED_DNI_DEVICE float round_tf32(float value) {
  std::uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits);
}
FUSED_DNI_DEVICE std::uint32_t bits_of(float value) { return __float_as_uint(value); }
FUSED_DNI_DEVICE float float_of(std::uint32_t bits) { return __uint_as_float(bits); }

// Sixteen bytes at once; the address must be a multiple of sixteen.
struct alignas(16) Words {
  std::uint32_t word[4];
};
// (Said in PTX: for sm_100 and newer the compiler makes four loads of it otherwise.)
FUSED_DNI_DEVICE Words load_words(const void* at) {
  Words words;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.word[0]), "=r"(words.word[1]), "=r"(words.word[2]), "=r"(words.word[3])
               : "l"(__cvta_generic_to_global(at))
               : "memory");
  return words;
}
FUSED_DNI_DEVICE void store_words(void* at, Words value) { *static_cast<Words*>(at) = value; }

// ---- Shared memory --------------------------------------------------------------------------------

// An array in the block's shared memory, read and written by element or by sixteen bytes.
template <class T>
class Shared {
 public:
  Shared() = default;
  FUSED_DNI_DEVICE Shared(T* data, int) : data_(data) {}

  FUSED_DNI_DEVICE T load(int index) const { return data_[index]; }
  FUSED_DNI_DEVICE void store(int index, T value) const { data_[index] = value; }
  // Elements index, index + 1, ...: sixteen bytes, at a multiple of sixteen.
  FUSED_DNI_DEVICE Words load_words(int index) const {
    return *reinterpret_cast<const Words*>(data_ + index);
  }
  FUSED_DNI_DEVICE void store_words(int index, Words value) const {
    *reinterpret_cast<Words*>(data_ + index) = value;
  }
  FUSED_DNI_DEVICE std::uint32_t address(int index) const {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(data_ + index));
  }

 private:
  T* data_ = nullptr;
};

// Divides the launch's dynamic shared memory. A copy goes on from where its original stands, so a
// phase that gets an arena by value gives back what it takes.
class SharedArena {
 public:
  template <class T>
  FUSED_DNI_DEVICE Shared<T> take(int count) {
    extern __shared__ __align__(128) unsigned char fused_dni_shared[];
    T* data = reinterpret_cast<T*>(fused_dni_shared + used_);
    used_ += (count * static_cast<int>(sizeof(T)) + 15) / 16 * 16;
    return {data, count};
  }

 private:
  int used_ = 0;
};

// ---- Tensor cores; all lanes of a warp must come here ---------------------------------------------
//
// d[16, 8] += a[16, k] b[8, k]^T with k of 16 (two elements a word) or 8 (tf32). Fragments as in
// the PTX ISA: with g = lane / 4 and t = lane % 4, d holds rows g (0, 1) and g + 8 (2, 3) of
// columns 2t, 2t + 1.

FUSED_DNI_DEVICE void mma_bf16(float (&d)[4], const std::uint32_t (&a)[4],
                               const std::uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
FUSED_DNI_DEVICE void mma_fp16(float (&d)[4], const std::uint32_t (&a)[4],
                               const std::uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
FUSED_DNI_DEVICE void mma_tf32(float (&d)[4], const std::uint32_t (&a)[4],
                               const std::uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four matrices of 8 rows of sixteen bytes (eight elements of two bytes), from shared memory:
// lane l names row l % 8 of matrix l / 8 by its first element's index; r[m] are the elements
// (lane / 4, lane % 4 * 2) and the next one of matrix m, or of its transpose.
template <class T>
FUSED_DNI_DEVICE void load_matrices(std::uint32_t (&r)[4], Shared<T> from, int index) {
  static_assert(sizeof(T) == 2);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from.address(index))
               : "memory");
}
template <class T>
FUSED_DNI_DEVICE void load_matrices_transposed(std::uint32_t (&r)[4], Shared<T> from, int index) {
  static_assert(sizeof(T) == 2);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from.address(index))
               : "memory");
}

// ---- Launching (host) -----------------------------------------------------------------------------

// How many blocks of a kernel the current device holds at once; 0 with `status` set if the device
// has no cooperative launch or cannot run the kernel.
template <class A>
int resident_blocks(void (*kernel)(A), int threads, int shared, Status& status) {
  return resident_blocks_of(reinterpret_cast<const void*>(kernel), threads, shared, status);
}
// How many clusters of so many blocks the current device holds at once; 0 where it has none.
template <class A>
int resident_clusters(void (*kernel)(A), int threads, int shared, int cluster) {
  return resident_clusters_of(reinterpret_cast<const void*>(kernel), threads, shared, cluster);
}
// From here on there are none, whatever the device says of itself: a launch of them has failed.
template <class A>
void refuse_clusters(void (*kernel)(A), int threads, int shared, int cluster) {
  refuse_clusters_of(reinterpret_cast<const void*>(kernel), threads, shared, cluster);
}
// A cooperative launch on the current device. `shared` in bytes; `cluster` blocks side by side are
// on processors that lie near each other and have a barrier of their own.
template <class A>
void launch(void (*kernel)(A), const A& arguments, int blocks, int threads, int shared,
            void* stream, Status& status, int cluster = 1) {
  void* pointers[] = {const_cast<A*>(&arguments)};
  launch_cooperative(reinterpret_cast<const void*>(kernel), pointers, blocks, threads, shared,
                     stream, status, cluster);
}

}  // namespace fused_dni::cuda

#endif
