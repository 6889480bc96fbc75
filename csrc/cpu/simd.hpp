// Vectors of the instruction set that this translation unit is compiled for.
//
// Everything here and in the other ISA headers lives in the namespace `fused_dni::FUSED_DNI_ISA`,
// because the same source is compiled once per instruction set with different flags: a function
// shared by name between two such units could be emitted with AVX-512 and called on a machine
// without it. For the same reason these headers use no inline function of the standard library.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "ops.hpp"

#define FUSED_DNI_INLINE [[gnu::always_inline]] inline

namespace fused_dni::FUSED_DNI_ISA {

using Index = std::int64_t;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

constexpr Index kLineBytes = kCacheLine;

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef std::int32_t M __attribute__((vector_size(kVectorBytes)));  // masks, bits, indices
  using Int = std::int32_t;
  static constexpr float kLargest = __FLT_MAX__;
  static constexpr Int kInfinityBits = 0x7f800000;
  static constexpr Int kAbsoluteBits = 0x7fffffff;
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef std::int64_t M __attribute__((vector_size(kVectorBytes)));
  using Int = std::int64_t;
  static constexpr double kLargest = __DBL_MAX__;
  static constexpr Int kInfinityBits = 0x7ff0000000000000;
  static constexpr Int kAbsoluteBits = 0x7fffffffffffffff;
};

template <class T>
using Vec = typename Simd<T>::V;
template <class T>
using Mask = typename Simd<T>::M;
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

FUSED_DNI_INLINE constexpr Index smaller(Index a, Index b) { return a < b ? a : b; }
FUSED_DNI_INLINE constexpr Index larger(Index a, Index b) { return a > b ? a : b; }
FUSED_DNI_INLINE Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }
FUSED_DNI_INLINE Index round_up(Index a, Index b) { return ceil_div(a, b) * b; }

template <class T>
FUSED_DNI_INLINE Vec<T> broadcast(T value) {
  return value - Vec<T>{};  // v - 0 is v, even for -0: a plain broadcast is left of it
}

template <class T>
FUSED_DNI_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
FUSED_DNI_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// The first `count` < kLanes elements, zeros behind them: nothing past the end is read.
template <class T>
FUSED_DNI_INLINE Vec<T> load_partial(const T* p, Index count) {
  alignas(kVectorBytes) T lane[kLanes<T>] = {};
  for (Index i = 0; i < count; ++i) lane[i] = p[i];
  return load(lane);
}

template <class T>
FUSED_DNI_INLINE void store_partial(T* p, Vec<T> v, Index count) {
  alignas(kVectorBytes) T lane[kLanes<T>];
  store(lane, v);
  for (Index i = 0; i < count; ++i) p[i] = lane[i];
}

// load/store of whichever of a vector lies before `count` elements from p.
template <class T>
FUSED_DNI_INLINE Vec<T> load_upto(const T* p, Index count) {
  return count >= kLanes<T> ? load(p) : load_partial(p, count);
}

template <class T>
FUSED_DNI_INLINE void store_upto(T* p, Vec<T> v, Index count) {
  if (count >= kLanes<T>)
    store(p, v);
  else
    store_partial(p, v, count);
}

// Zeros the lanes at and beyond `count`.
template <class T>
FUSED_DNI_INLINE Vec<T> keep_first(Vec<T> v, Index count) {
  Mask<T> lane;
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
  return lane < static_cast<typename Simd<T>::Int>(count) ? v : Vec<T>{};
}

// Lane i of the result is the one numbered lanes[i], of a's and behind them b's. (Clang shuffles by
// constants alone, and finds the instruction by itself.)
template <class T>
FUSED_DNI_INLINE Vec<T> shuffle(Vec<T> a, Vec<T> b, Mask<T> lanes) {
#if defined(__clang__)
  Vec<T> picked;
  for (int i = 0; i < kLanes<T>; ++i)
    picked[i] = lanes[i] < kLanes<T> ? a[lanes[i]] : b[lanes[i] - kLanes<T>];
  return picked;
#else
  return __builtin_shuffle(a, b, lanes);
#endif
}

template <class T, int kStep = kLanes<T> / 2>
FUSED_DNI_INLINE T sum_lanes(Vec<T> v) {
  if constexpr (kStep == 0) {
    return v[0];
  } else {
    Mask<T> other;
    for (int i = 0; i < kLanes<T>; ++i) other[i] = i ^ kStep;
    return sum_lanes<T, kStep / 2>(v + shuffle<T>(v, v, other));
  }
}

// (The masked form, because GCC 12 warns of the undefined vector in the plain one.)
FUSED_DNI_INLINE Vec<float> square_root(Vec<float> v) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_maskz_sqrt_ps(0xffff, (__m512)v);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_sqrt_ps((__m256)v);
#elif defined(__SSE2__)
  return (Vec<float>)_mm_sqrt_ps((__m128)v);
#else
  for (int i = 0; i < kLanes<float>; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

FUSED_DNI_INLINE Vec<double> square_root(Vec<double> v) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_maskz_sqrt_pd(0xff, (__m512d)v);
#elif defined(__AVX2__)
  return (Vec<double>)_mm256_sqrt_pd((__m256d)v);
#elif defined(__SSE2__)
  return (Vec<double>)_mm_sqrt_pd((__m128d)v);
#else
  for (int i = 0; i < kLanes<double>; ++i) v[i] = __builtin_sqrt(v[i]);
  return v;
#endif
}

template <class T>
FUSED_DNI_INLINE Vec<T> absolute(Vec<T> v) {
  return (Vec<T>)((Mask<T>)v & Simd<T>::kAbsoluteBits);
}

// Running maximum of |v| that does not lose a NaN: the bits of |v| are ordered as integers, with
// infinity above every finite number and NaN above infinity.
template <class T>
struct Magnitude {
  Mask<T> bits{};

  FUSED_DNI_INLINE void add(Vec<T> v) {
    const Mask<T> b = (Mask<T>)v & Simd<T>::kAbsoluteBits;
    bits = b > bits ? b : bits;
  }

  FUSED_DNI_INLINE T value() const {
    typename Simd<T>::Int most = 0;
    for (int i = 0; i < kLanes<T>; ++i) most = bits[i] > most ? bits[i] : most;
    T result;
    __builtin_memcpy(&result, &most, sizeof result);
    return result;
  }
};

template <class T>
FUSED_DNI_INLINE bool is_finite(T value) {
  typename Simd<T>::Int bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return (bits & Simd<T>::kAbsoluteBits) < Simd<T>::kInfinityBits;
}

// A sum in double precision whatever the elements' type, in a fixed order.
template <class T>
struct DoubleSum {
  static constexpr int kParts = static_cast<int>(sizeof(double) / sizeof(T));
  typedef T Part __attribute__((vector_size(kVectorBytes / kParts)));
  Vec<double> sums[kParts] = {};

  // Adds a * b, multiplied in double precision too.
  FUSED_DNI_INLINE void add_product(Vec<T> a, Vec<T> b) {
    for (int i = 0; i < kParts; ++i) sums[i] += widen(a, i) * widen(b, i);
  }

  FUSED_DNI_INLINE double value() const {
    Vec<double> total = sums[0];
    for (int i = 1; i < kParts; ++i) total += sums[i];
    return sum_lanes<double>(total);
  }

 private:
  FUSED_DNI_INLINE static Vec<double> widen(Vec<T> v, int i) {
    Part part;
    __builtin_memcpy(&part, reinterpret_cast<const char*>(&v) + i * sizeof part, sizeof part);
    return __builtin_convertvector(part, Vec<double>);
  }
};

// Transposes the kLanes x kLanes matrix whose rows are v, by exchanging off-diagonal blocks of
// 1, 2, 4, ... elements.
template <class T, int kBlock = 1>
FUSED_DNI_INLINE void transpose_registers(Vec<T> (&v)[kLanes<T>]) {
  constexpr int L = kLanes<T>;
  if constexpr (kBlock < L) {
    Mask<T> low, high;
    for (int i = 0; i < L; ++i) {
      low[i] = (i & kBlock) ? L + i - kBlock : i;
      high[i] = (i & kBlock) ? L + i : i + kBlock;
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
      if (i & kBlock) continue;
      const Vec<T> a = v[i], b = v[i + kBlock];
      v[i] = shuffle<T>(a, b, low);
      v[i + kBlock] = shuffle<T>(a, b, high);
    }
    transpose_registers<T, 2 * kBlock>(v);
  }
}

// ---- The transposed layout -----------------------------------------------------------------
//
// Inside the kernels a matrix [rows][N] of the batch is kept feature by feature: row f holds the
// N values of feature f, padded to whole cache lines. A feature's batch statistics, its weights'
// row and its vector parameters then belong to one row, and the products need no packing of W.

template <class T>
FUSED_DNI_INLINE Index transposed_stride(Index n) {
  return fused_dni::transposed_stride(n, static_cast<Index>(sizeof(T)));
}

// A vector of a row at n, without what lies in the padding behind the last of `rows`.
template <class T>
FUSED_DNI_INLINE Vec<T> valid(Vec<T> v, Index n, Index rows) {
  return rows - n >= kLanes<T> ? v : keep_first<T>(v, rows - n);
}

// dst[c][r] = src[r][c] for c in [0, cols), r in [0, rows), zeros in r up to whole vectors.
// Returns the largest magnitude (NaN if there is one).
template <class T>
T to_transposed(const T* src, Index src_stride, Index rows, Index cols, T* dst, Index dst_stride) {
  constexpr int L = kLanes<T>;
  Magnitude<T> magnitude;
  for (Index r = 0; r < rows; r += L) {  // whole rows of src, one page after another
    for (Index c = 0; c < cols; c += L) {
      const Index width = smaller(L, cols - c);
      Vec<T> v[L];
      if (width == L && rows - r >= L) {
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) {
          v[i] = load(src + (r + i) * src_stride + c);
          magnitude.add(v[i]);
        }
        transpose_registers<T>(v);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) store(dst + (c + i) * dst_stride + r, v[i]);
      } else {
        for (int i = 0; i < L; ++i) {
          v[i] = r + i < rows ? load_upto(src + (r + i) * src_stride + c, width) : Vec<T>{};
          magnitude.add(v[i]);
        }
        transpose_registers<T>(v);
        for (int i = 0; i < width; ++i) store(dst + (c + i) * dst_stride + r, v[i]);
      }
    }
  }
  return magnitude.value();
}

// dst[r][c] = src[c][r] for c in [0, cols), r in [0, rows): the way back to row-major.
template <class T>
void from_transposed(const T* src, Index src_stride, Index rows, Index cols, T* dst,
                     Index dst_stride) {
  constexpr int L = kLanes<T>;
  for (Index r = 0; r < rows; r += L) {  // whole rows of dst, one page after another
    for (Index c = 0; c < cols; c += L) {
      const Index width = smaller(L, cols - c);
      Vec<T> v[L];
      if (width == L && rows - r >= L) {
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) v[i] = load(src + (c + i) * src_stride + r);
        transpose_registers<T>(v);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) store(dst + (r + i) * dst_stride + c, v[i]);
      } else {
        for (int i = 0; i < L; ++i)
          v[i] = i < width ? load(src + (c + i) * src_stride + r) : Vec<T>{};
        transpose_registers<T>(v);
        for (int i = 0; i < smaller(L, rows - r); ++i)
          store_upto(dst + (r + i) * dst_stride + c, v[i], width);
      }
    }
  }
}

// The largest magnitude of rows [features) of a matrix [..][stride] in that layout.
template <class T>
T transposed_magnitude(const T* at, Index stride, Index rows, Index begin, Index end) {
  Magnitude<T> magnitude;
  for (Index f = begin; f < end; ++f)
    for (Index n = 0; n < rows; n += kLanes<T>)
      magnitude.add(valid<T>(load(at + f * stride + n), n, rows));
  return magnitude.value();
}

}  // namespace fused_dni::FUSED_DNI_ISA
