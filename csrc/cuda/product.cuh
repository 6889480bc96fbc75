// A tile of a matrix product, made by one block: operands are staged in shared memory, in the type
// that the multiplication takes, while the tile before is multiplied.
#pragma once

#include <cstring>

#include "device.cuh"

namespace fused_dni::cuda {

// ---- How operands are multiplied ------------------------------------------------------------------

// On tensor cores, with sums in float32.
struct Bf16 {
  using Element = bf16;
  static constexpr int kDepth = 16;  // of one instruction
  FUSED_DNI_DEVICE static void multiply(float (&d)[4], const std::uint32_t (&a)[4],
                                        const std::uint32_t (&b)[2]) {
    mma_bf16(d, a, b);
  }
};
struct Fp16 {
  using Element = fp16;
  static constexpr int kDepth = 16;
  FUSED_DNI_DEVICE static void multiply(float (&d)[4], const std::uint32_t (&a)[4],
                                        const std::uint32_t (&b)[2]) {
    mma_fp16(d, a, b);
  }
};
struct Tf32 {
  using Element = float;
  static constexpr int kDepth = 8;
  FUSED_DNI_DEVICE static void multiply(float (&d)[4], const std::uint32_t (&a)[4],
                                        const std::uint32_t (&b)[2]) {
    mma_tf32(d, a, b);
  }
};
// By multiply-adds of single precision; sums lie as those of the tensor cores.
struct Fp32 {
  using Element = float;
  static constexpr int kDepth = 4;
};

template <class A, class B>
inline constexpr bool kSame = false;
template <class A>
inline constexpr bool kSame<A, A> = true;

// What is stored in shared memory of a float; Op::Element but for the digits.
template <class Op>
FUSED_DNI_DEVICE typename Op::Element operand_of(float value) {
  if constexpr (kSame<Op, Tf32>)
    return round_tf32(value);
  else
    return from_float<typename Op::Element>(value);
}

// Moves each element by so many places to the front; the first ones go to the end.
template <int kBy, class T, int kCount>
FUSED_DNI_DEVICE void turn(T (&values)[kCount]) {
  T head[kBy];
#pragma unroll
  for (int i = 0; i < kBy; ++i) head[i] = values[i];
#pragma unroll
  for (int i = 0; i < kCount - kBy; ++i) values[i] = values[i + kBy];
#pragma unroll
  for (int i = 0; i < kBy; ++i) values[kCount - kBy + i] = head[i];
}

// ---- Operands -------------------------------------------------------------------------------------

// How an operand [rows, depth] lies in memory: with its depth or with its rows contiguous.
enum class Lies { kAlong, kAcross };

// `stride` is the distance of rows (kAlong) or of depths (kAcross). Elements of any type T are cast
// to the product's as they are staged. Beyond `rows` they count as zero.
template <class T, Lies kLies>
struct Operand {
  const T* data;
  std::int64_t stride;
  int rows;
};

// Elements that are read and staged together: sixteen bytes of the product's type.
template <class T, int kCount>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Chunk {
  T value[kCount];
};

// ROWS x K of an operand, on its way from global memory through registers to shared memory.
template <class Op, class T, Lies kLies, int kRows, int kDepth, int kThreads>
class Stage {
  using E = typename Op::Element;
  static constexpr bool kAlong = kLies == Lies::kAlong;
  static constexpr int kCount = 16 / static_cast<int>(sizeof(E));
  static constexpr int kLines = kAlong ? kRows : kDepth;
  static constexpr int kColumns = kAlong ? kDepth : kRows;
  static constexpr int kAcross = kColumns / kCount;  // chunks a line
  static constexpr int kChunks = kLines * kAcross;
  static constexpr int kEach = (kChunks + kThreads - 1) / kThreads;
  static_assert(kColumns % kCount == 0);

 public:
  // Between lines there is room so that a warp's reads of a fragment hit all banks.
  static constexpr int kStride = kColumns + (sizeof(E) == 2 ? 8 : kAlong ? 4 : 8);
  static constexpr int kElements = kLines * kStride;

  FUSED_DNI_DEVICE Stage(const Operand<T, kLies>& from, int row, int depth)
      : from_(from), row_(row), depth_(depth) {
    assume_global(from_.data);
    constexpr std::uintptr_t kAlignment = alignof(Chunk<T, kCount>);
    aligned_ = reinterpret_cast<std::uintptr_t>(from.data) % kAlignment == 0 &&
               from.stride * static_cast<std::int64_t>(sizeof(T)) %
                       static_cast<std::int64_t>(kAlignment) ==
                   0;
  }

  // Reads depths k, k + 1, ... into registers.
  FUSED_DNI_DEVICE void fetch(int k) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int chunk = thread() + i * kThreads;
      const int line = chunk / kAcross, column = chunk % kAcross * kCount;
      const int at_line = (kAlong ? row_ : k) + line, at_column = (kAlong ? k : row_) + column;
      int left = (kAlong ? depth_ : from_.rows) - at_column;
      if (chunk >= kChunks || at_line >= (kAlong ? from_.rows : depth_)) left = 0;
      const T* at = from_.data + (left > 0 ? at_line * from_.stride + at_column : 0);
      if (aligned_ && left >= kCount)
        held_[i] = whole(at);
      else
        held_[i] = edge(at, left);
    }
  }

  // From registers to shared memory, cast.
  FUSED_DNI_DEVICE void commit(Shared<E> to, int first) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int chunk = thread() + i * kThreads;
      if (kChunks % kThreads != 0 && chunk >= kChunks) continue;
      Chunk<E, kCount> cast;
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        if constexpr (kSame<T, E> && !kSame<Op, Tf32>)
          cast.value[e] = held_[i].value[e];
        else
          cast.value[e] = operand_of<Op>(to_float(held_[i].value[e]));
      }
      Words words;
      std::memcpy(&words, &cast, sizeof(words));
      to.store_words(first + chunk / kAcross * kStride + chunk % kAcross * kCount, words);
    }
  }

  // Where element (row, k) of the tile lies, from its first one.
  FUSED_DNI_DEVICE static int at(int row, int k) {
    return kAlong ? row * kStride + k : k * kStride + row;
  }

 private:
  // By sixteen bytes at a time: compilers for newer architectures do not find that by themselves.
  FUSED_DNI_DEVICE static Chunk<T, kCount> whole(const T* at) {
    using C = Chunk<T, kCount>;
    if constexpr (sizeof(C) % 16 == 0) {
      C made;
      Words words[sizeof(C) / 16];
#pragma unroll
      for (unsigned w = 0; w < sizeof(C) / 16; ++w)
        words[w] = load_words(at + w * (16 / sizeof(T)));
      std::memcpy(&made, words, sizeof(C));
      return made;
    } else {
      return *reinterpret_cast<const C*>(at);
    }
  }
  // Element by element, where a line ends or is not aligned: four at a time, to be little code.
  FUSED_DNI_DEVICE static Chunk<T, kCount> edge(const T* at, int left) {
    Chunk<T, kCount> made;
#pragma unroll 1
    for (int e = 0; e < kCount; e += 4) {
      turn<4>(made.value);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        made.value[kCount - 4 + i] = e + i < left ? at[e + i] : from_float<T>(0.0f);
    }
    return made;
  }

  Operand<T, kLies> from_;
  int row_, depth_;
  bool aligned_;
  Chunk<T, kCount> held_[kEach] = {};
};

// ---- Fragments of tensor cores, from a staged tile ------------------------------------------------

// Rows row to row + 15, depths k to k + kDepth - 1.
template <class Op, class S, Lies kLies>
FUSED_DNI_DEVICE void load_rows(std::uint32_t (&a)[4], Shared<typename Op::Element> from, int first,
                                int row, int k) {
  if constexpr (sizeof(typename Op::Element) == 2) {
    const int matrix = lane() / 8, line = lane() % 8;
    if constexpr (kLies == Lies::kAlong)
      load_matrices(a, from, first + S::at(row + matrix % 2 * 8 + line, k + matrix / 2 * 8));
    else
      load_matrices_transposed(a, from,
                               first + S::at(row + matrix % 2 * 8, k + matrix / 2 * 8 + line));
  } else {
    const int g = lane() / 4, t = lane() % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      a[i] = bits_of(from.load(first + S::at(row + g + i % 2 * 8, k + t + i / 2 * 4)));
  }
}

// Columns col to col + 15 of a product, that is two fragments.
template <class Op, class S, Lies kLies>
FUSED_DNI_DEVICE void load_columns(std::uint32_t (&b)[2][2], Shared<typename Op::Element> from,
                                   int first, int col, int k) {
  if constexpr (sizeof(typename Op::Element) == 2) {
    const int matrix = lane() / 8, line = lane() % 8;
    std::uint32_t r[4];
    if constexpr (kLies == Lies::kAlong)
      load_matrices(r, from, first + S::at(col + matrix / 2 * 8 + line, k + matrix % 2 * 8));
    else
      load_matrices_transposed(r, from,
                               first + S::at(col + matrix / 2 * 8, k + matrix % 2 * 8 + line));
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i / 2][i % 2] = r[i];
  } else {
    const int g = lane() / 4, t = lane() % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      b[i / 2][i % 2] = bits_of(from.load(first + S::at(col + i / 2 * 8 + g, k + t + i % 2 * 4)));
  }
}

// ---- The product ----------------------------------------------------------------------------------

// Tiles of M x N, in trips of K through the depth; kWarpsM x kWarpsN warps have parts of the tile,
// kWarpsK of them share each part and divide its depth.
template <class Op, int M, int N, int K, int kWarpsM, int kWarpsN, int kWarpsK = 1>
struct Product {
  using Element = typename Op::Element;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN * kWarpsK;
  static constexpr int kRows = M / kWarpsM / 16;     // fragments a warp
  static constexpr int kColumns = N / kWarpsN / 16;  // pairs of fragments a warp
  static constexpr int kPart = K / kWarpsK;
  static_assert(M == kWarpsM * kRows * 16 && N == kWarpsN * kColumns * 16);
  static_assert(kPart % Op::kDepth == 0 && K == kPart * kWarpsK);

  template <class A, class B>
  struct Stages;
  template <class TA, Lies kA, class TB, Lies kB>
  struct Stages<Operand<TA, kA>, Operand<TB, kB>> {
    using A = Stage<Op, TA, kA, M, K, kThreads>;
    using B = Stage<Op, TB, kB, N, K, kThreads>;
  };

  static constexpr int larger(int a, int b) { return a > b ? a : b; }
  // Two buffers of both operands, however they lie, or the sums that meet at the end.
  static constexpr int kSharedBytes =
      larger(2 * static_cast<int>(sizeof(Element)) *
                 (larger(M * (K + 8), K*(M + 8)) + larger(N * (K + 8), K*(N + 8))),
             (kWarpsK - 1) * M * N * 4);

  struct Sum {
    float value[kRows][2 * kColumns][4] = {};
  };

  // sum += A[row : row + M, 0 : depth] B[col : col + N, 0 : depth]^T. All threads of the block come
  // here. Shared memory may be used by others until then and from then on.
  template <class TA, Lies kA, class TB, Lies kB>
  FUSED_DNI_DEVICE static void run(Sum& sum, SharedArena arena, const Operand<TA, kA>& a, int row,
                                   const Operand<TB, kB>& b, int col, int depth) {
    using SA = typename Stages<Operand<TA, kA>, Operand<TB, kB>>::A;
    using SB = typename Stages<Operand<TA, kA>, Operand<TB, kB>>::B;
    SharedArena stages = arena;
    const Shared<Element> staged =
        stages.template take<Element>(2 * (SA::kElements + SB::kElements));
    constexpr int kBuffer = SA::kElements + SB::kElements;
    SA stage_a(a, row, depth);
    SB stage_b(b, col, depth);
    block_barrier();
    // One trip more than there are: while a trip is multiplied, the next one is on its way.
    int buffer = 0;
    for (int k = -K; k < depth; k += K) {
      const bool more = k + K < depth;
      if (more) {
        stage_a.fetch(k + K);
        stage_b.fetch(k + K);
      }
      if (k >= 0)
        multiply<SA, SB, kA, kB>(sum, staged, buffer * kBuffer, buffer * kBuffer + SA::kElements);
      buffer ^= 1;
      if (more) {
        stage_a.commit(staged, buffer * kBuffer);
        stage_b.commit(staged, buffer * kBuffer + SA::kElements);
      }
      block_barrier();
    }
    if constexpr (kWarpsK > 1) gather(sum, arena);
  }

  // Calls f(r, c, value) for the elements of the tile that this thread holds: each of the block's
  // tile once, and behind each even c the next one.
  template <class F>
  FUSED_DNI_DEVICE static void each(Sum& sum, F&& f) {
    if (kWarpsK > 1 && warp() >= kWarpsM * kWarpsN) return;
    const int row = warp_row() + lane() / 4, col = warp_col() + lane() % 4 * 2;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < 2 * kColumns; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          f(row + i * 16 + e / 2 * 8, col + j * 8 + e % 2, sum.value[i][j][e]);
      }
    }
  }

 private:
  FUSED_DNI_DEVICE static int warp_row() { return warp() % kWarpsM * kRows * 16; }
  FUSED_DNI_DEVICE static int warp_col() { return warp() / kWarpsM % kWarpsN * kColumns * 16; }

  template <class SA, class SB, Lies kA, Lies kB>
  FUSED_DNI_DEVICE static void multiply(Sum& sum, Shared<Element> staged, int a, int b) {
    const int part = kWarpsK > 1 ? warp() / (kWarpsM * kWarpsN) * kPart : 0;
    if constexpr (kSame<Op, Fp32>) {
      const int row = warp_row() + lane() / 4, col = warp_col() + lane() % 4 * 2;
#pragma unroll 8
      for (int k = part; k < part + kPart; ++k) {
        float rows[kRows][2], cols[2 * kColumns][2];
#pragma unroll
        for (int i = 0; i < 2 * kRows; ++i)
          rows[i / 2][i % 2] = staged.load(a + SA::at(row + i * 8, k));
#pragma unroll
        for (int j = 0; j < 4 * kColumns; ++j)
          cols[j / 2][j % 2] = staged.load(b + SB::at(col + j / 2 * 8 + j % 2, k));
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
          for (int j = 0; j < 2 * kColumns; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) sum.value[i][j][e] += rows[i][e / 2] * cols[j][e % 2];
          }
        }
      }
    } else {
#pragma unroll
      for (int k = part; k < part + kPart; k += Op::kDepth) {
        std::uint32_t cols[kColumns][2][2];
#pragma unroll
        for (int j = 0; j < kColumns; ++j)
          load_columns<Op, SB, kB>(cols[j], staged, b, warp_col() + j * 16, k);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          std::uint32_t rows[4];
          load_rows<Op, SA, kA>(rows, staged, a, warp_row() + i * 16, k);
#pragma unroll
          for (int j = 0; j < 2 * kColumns; ++j)
            Op::multiply(sum.value[i][j], rows, cols[j / 2][j % 2]);
        }
      }
    }
  }

  // The sums of the warps that share a part of the tile, in order, to the first of them.
  FUSED_DNI_DEVICE static void gather(Sum& sum, SharedArena arena) {
    constexpr int kParts = 32 * kWarpsM * kWarpsN, kHeld = kRows * 2 * kColumns * 4;
    const Shared<float> sums = arena.take<float>((kWarpsK - 1) * kParts * kHeld);
    const int part = thread() / kParts, place = thread() % kParts;
    float* held = &sum.value[0][0][0];
    if (part > 0) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i)
        sums.store(((part - 1) * kHeld + i) * kParts + place, held[i]);
    }
    block_barrier();
    for (int other = 0; part == 0 && other < kWarpsK - 1; ++other) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) held[i] += sums.load((other * kHeld + i) * kParts + place);
    }
    block_barrier();
  }
};

}  // namespace fused_dni::cuda
