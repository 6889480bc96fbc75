// Matrix products of bfloat16 operands, added up in float32: the loops of gemm.hpp with two
// neighbours along the depth in place of one number.
//
// Such a pair takes the room of a float, the earlier one in the lower half; AVX512_BF16 multiplies
// and adds both at once. A's pairs lie side by side in memory, B's are made where it is copied.
#pragma once

#include "gemm.hpp"

namespace fused_dni::FUSED_DNI_ISA {

using Half = std::uint16_t;  // the bits of a bfloat16
using Pair = std::uint32_t;

typedef Half Halves __attribute__((vector_size(32)));
typedef Pair Pairs __attribute__((vector_size(64)));

static_assert(kLanes<float> == 16);
constexpr Index kBlockPairs = kBlockK<float>;

FUSED_DNI_INLINE Index pairs_of(Index depth) { return ceil_div(depth, 2); }

FUSED_DNI_INLINE unsigned mask_of(Index count) {  // of the first `count` of 32
  return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1;
}

// Whichever of 16 elements lie before `count` from p, zeros for the others.
FUSED_DNI_INLINE Halves load_halves(const Half* p, Index count) {
  return (Halves)_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask_of(count)), p);
}
FUSED_DNI_INLINE Vec<float> load_floats(const float* p, Index count) {
  return (Vec<float>)_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask_of(count)), p);
}
FUSED_DNI_INLINE Pairs load_pairs(const Half* p, Index count) {  // `count` in halves
  return (Pairs)_mm512_maskz_loadu_epi16(mask_of(count), p);
}
FUSED_DNI_INLINE void store_halves(Half* p, Halves v, Index count) {
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(mask_of(count)), (__m256i)v);
}

// To the nearest, ties to even.
FUSED_DNI_INLINE Halves rounded(Vec<float> v) { return (Halves)_mm512_cvtneps_pbh((__m512)v); }

// 32 consecutive numbers, as they lie in memory.
FUSED_DNI_INLINE Pairs rounded(Vec<float> first, Vec<float> second) {
  return (Pairs)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}

FUSED_DNI_INLINE Vec<float> widened(Halves v) {
  return (Vec<float>)(__builtin_convertvector(v, Pairs) << 16);
}

// Pairs of two rows of B.
FUSED_DNI_INLINE Pairs interleaved(Halves earlier, Halves later) {
  return __builtin_convertvector(earlier, Pairs) | (__builtin_convertvector(later, Pairs) << 16);
}

FUSED_DNI_INLINE void store_pairs(Pair* p, Pairs v) { __builtin_memcpy(p, &v, sizeof v); }

// C = keep * C + gain * A B for one tile; C is not read if keep is 0. Depth in pairs.
template <int kRows, int kVectors>
FUSED_DNI_INLINE void pair_tile(Index depth, const Pair* a, Index a_row, const Pair* b, Index b_row,
                                float* c, Index c_row, float keep, float gain) {
  __m512 sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[m][v] = __m512{};
  for (Index k = 0; k < depth; ++k) {
    __m512bh row[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) row[v] = (__m512bh)_mm512_loadu_si512(b + v * 16);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      __m512i same = _mm512_set1_epi32(static_cast<int>(a[m * a_row]));
#if defined(__clang__)
      asm("" : "+v"(same));  // what it knows to be the same in all lanes crashes Clang 16
#endif
      const __m512bh pair = (__m512bh)same;
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[m][v] = _mm512_dpbf16_ps(sum[m][v], pair, row[v]);
    }
    ++a;
    b += b_row;
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      float* at = c + m * c_row + v * 16;
      const Vec<float> made = gain * (Vec<float>)sum[m][v];
      store(at, keep == 0.0f ? made : keep * load(at) + made);
    }
}

using PairTile = void (*)(Index rows, Index depth, const Pair* a, Index a_row, const Pair* b,
                          Index b_row, float* c, Index c_row, float keep, float gain);

template <int kVectors>
[[gnu::noinline]] void pair_tile_of(Index rows, Index depth, const Pair* a, Index a_row,
                                    const Pair* b, Index b_row, float* c, Index c_row, float keep,
                                    float gain) {
  static_assert(kTileRows == 6);
  switch (rows) {
    case 1: return pair_tile<1, kVectors>(depth, a, a_row, b, b_row, c, c_row, keep, gain);
    case 2: return pair_tile<2, kVectors>(depth, a, a_row, b, b_row, c, c_row, keep, gain);
    case 3: return pair_tile<3, kVectors>(depth, a, a_row, b, b_row, c, c_row, keep, gain);
    case 4: return pair_tile<4, kVectors>(depth, a, a_row, b, b_row, c, c_row, keep, gain);
    case 5: return pair_tile<5, kVectors>(depth, a, a_row, b, b_row, c, c_row, keep, gain);
    default: return pair_tile<6, kVectors>(depth, a, a_row, b, b_row, c, c_row, keep, gain);
  }
}

FUSED_DNI_INLINE PairTile pair_tile_for(Index vectors) {
  static_assert(kTileVectors == 4);
  constexpr PairTile table[] = {pair_tile_of<1>, pair_tile_of<2>, pair_tile_of<3>, pair_tile_of<4>};
  return table[vectors - 1];
}

// Rounds `count` numbers of each of `rows` rows to pairs, whole vectors of them.
FUSED_DNI_INLINE void round_rows(const float* from, Index stride, Index rows, Index count, Pair* to,
                                 Index to_row) {
  for (Index r = 0; r < rows; ++r, from += stride, to += to_row)
    for (Index i = 0; i < count; i += 32)
      store_pairs(to + i / 2, rounded(load_floats(from + i, count - i),
                                      load_floats(from + i + 16, count - i - 16)));
}

// C[rows][cols] = A B with A [rows][depth] in float32, rounded as it is read, and B in pairs
// [depth / 2][b_row], rows padded to whole vectors as C's are. A tile's rows of A are rounded once
// for as many panels as the second-level cache holds a block of.
inline void multiply_rounding(Index rows, Index cols, Index depth, const float* a, Index a_row,
                              const Pair* b, Index b_row, float* c, Index c_row) {
  constexpr Index kGroup = 4 * kPanel<float>;
  alignas(64) Pair tile_rows[kTileRows * kBlockPairs];
  const Index pairs = pairs_of(depth), block = round_up(block_depth<float>(pairs), 16);
  for (Index first = 0; first < cols; first += kGroup)
    for (Index k = 0; k < pairs; k += block) {
      const Index count = smaller(block, pairs - k), numbers = smaller(2 * count, depth - 2 * k);
      for (Index m = 0; m < rows;) {
        const Index take = next_rows(rows - m);
        const float* from = a + m * a_row + 2 * k;
        for (Index r = take; r < smaller(2 * take, rows - m); ++r)
          for (Index i = 0; i < numbers; i += 16) __builtin_prefetch(from + r * a_row + i);
        round_rows(from, a_row, take, numbers, tile_rows, kBlockPairs);
        for_panels<float>(
            first, smaller(cols, first + kGroup), [&](Index col, Index, Index vectors) {
              pair_tile_for(vectors)(take, count, tile_rows, kBlockPairs, b + k * b_row + col,
                                     b_row, c + m * c_row + col, c_row, k > 0 ? 1.0f : 0.0f, 1.0f);
            });
        m += take;
      }
    }
}

// C[rows][width] = keep * C + gain * A B for one panel of B, made block by block by
// pack(first pair, count, Pair* packed [count][kPanel]); otherwise as multiply_into.
template <class Pack, class Touch>
FUSED_DNI_INLINE void multiply_pairs_into(Index rows, Index width, Index pairs, const Pair* a,
                                          Index a_row, float* scratch, float* c, Index c_row,
                                          float keep, float gain, Pack&& pack, Touch&& touch) {
  Pair* packed = reinterpret_cast<Pair*>(scratch);
  const PairTile run = pair_tile_for(width / 16);
  const Index block = block_depth<float>(pairs);
  for (Index k = 0; k < pairs; k += block) {
    const Index count = smaller(block, pairs - k);
    pack(k, count, packed);
    for (Index m = 0; m < rows;) {
      const Index take = next_rows(rows - m);
      touch(m, take);
      run(take, count, a + m * a_row + k, a_row, packed, kPanel<float>, c + m * c_row, c_row,
          k > 0 ? 1.0f : keep, gain);
      m += take;
    }
  }
}

// The same as multiply_packed does it: body(row, count, const float* sums [count][kPanel]).
template <class Pack, class Touch, class Body>
FUSED_DNI_INLINE void multiply_pairs(Index rows, Index width, Index pairs, const Pair* a,
                                     Index a_row, float* scratch, Pack&& pack, Touch&& touch,
                                     Body&& body) {
  Pair* packed = reinterpret_cast<Pair*>(scratch);
  float* sums = scratch + kBlockPairs * kPanel<float>;
  const PairTile run = pair_tile_for(ceil_div(width, 16));
  const Index block = block_depth<float>(pairs);
  for (Index k = 0; k < pairs; k += block) {
    const Index count = smaller(block, pairs - k);
    const bool last = k + count == pairs;
    const Index sums_row = pairs <= block ? 0 : kPanel<float>;
    pack(k, count, packed);
    for (Index m = 0; m < rows;) {
      const Index take = next_rows(rows - m);
      float* tile_sums = sums + m * sums_row;
      if (last) touch(m, take);
      run(take, count, a + m * a_row + k, a_row, packed, kPanel<float>, tile_sums, kPanel<float>,
          k > 0 ? 1.0f : 0.0f, 1.0f);
      if (last) body(m, take, static_cast<const float*>(tile_sums));
      m += take;
    }
  }
}

}  // namespace fused_dni::FUSED_DNI_ISA
