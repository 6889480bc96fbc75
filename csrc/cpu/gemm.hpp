// Matrix products: one register tile serves them all.
//
//   C[m][n] (+)= sum_k A[m * a_row + k * a_col] * B[k * b_row + n]
//
// A is read one element at a time and broadcast, so any strides will do and it is never packed;
// B is read in vectors along n and must be contiguous there. The three products of a layer are
// arranged so that the large row-major weight is either A, or a B that is copied panel by panel
// while it is in use anyway:
//
//   forward  zT[o][n] = W[o][i]      xT[i][n]      A = W, as it is
//   dx       dx[n][i] = deltaT[o][n] W[o][i]       B = a panel of W's columns, copied
//   dW       dW[o][i] = deltaT[o][n] x[n][i]       B = a panel of x's columns, copied
#pragma once

#include "simd.hpp"

namespace fused_dni::FUSED_DNI_ISA {

// kTileRows x kTileVectors accumulators leave room for one row of B and a broadcast element:
// 24 of 32 registers with AVX-512, 12 of 16 otherwise.
constexpr int kTileRows = 6;
constexpr int kTileVectors = kVectorBytes == 64 ? 4 : 2;

template <class T>
constexpr Index kPanel = kTileVectors * kLanes<T>;

// Panels that are copied together where the tile is narrow. Every row of a strided B is a page of
// its own; four cache lines of it at a time cost a quarter of the visits that one at a time does.
constexpr int kStripPanels = larger(1, 4 * kLineBytes / (kTileVectors * kVectorBytes));
constexpr int kStripVectors = kStripPanels * kTileVectors;
template <class T>
constexpr Index kStrip = kStripPanels * kPanel<T>;

// Rows of B in use at a time: what stays in the first-level cache (48 KiB on most machines with
// AVX-512, 32 KiB before) beside the tile's own rows of A and C.
template <class T>
constexpr Index kBlockK =
    (kVectorBytes == 64 ? 32 : 24) * 1024 / (kPanel<T> * static_cast<Index>(sizeof(T)));

// Depth of the blocks that a product of the given depth is done in: as few as possible, all alike.
template <class T>
FUSED_DNI_INLINE Index block_depth(Index depth) {
  return depth <= kBlockK<T> ? larger(depth, 1) : ceil_div(depth, ceil_div(depth, kBlockK<T>));
}

// C = keep * C + gain * A B for one tile; C is not read if keep is 0.
template <class T, int kRows, int kVectors>
FUSED_DNI_INLINE void tile(Index depth, const T* a, Index a_row, Index a_col, const T* b,
                           Index b_row, T* c, Index c_row, T keep, T gain) {
  constexpr int L = kLanes<T>;
  Vec<T> sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[m][v] = Vec<T>{};
  for (Index k = 0; k < depth; ++k) {
    Vec<T> row[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) row[v] = load(b + v * L);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const Vec<T> element = broadcast(a[m * a_row]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[m][v] += element * row[v];
    }
    a += a_col;
    b += b_row;
  }
  if (keep == T(0)) {
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) store(c + m * c_row + v * L, gain * sum[m][v]);
  } else {
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        T* at = c + m * c_row + v * L;
        store(at, keep * load(at) + gain * sum[m][v]);
      }
  }
}

// How many of `left` rows come next: `whole` of them, and a remainder shared by the last two, because
// two tiles of four rows keep the multipliers busier than one of six and one of two.
FUSED_DNI_INLINE Index next_rows(Index left, Index whole = kTileRows, Index unit = 1) {
  if (left >= 2 * whole || left == whole) return whole;
  return left > whole ? round_up(ceil_div(left, 2), unit) : left;
}

template <class T, int kVectors>
[[gnu::noinline]] void tile_of(Index rows, Index depth, const T* a, Index a_row, Index a_col,
                               const T* b, Index b_row, T* c, Index c_row, T keep, T gain) {
  static_assert(kTileRows == 6);
  switch (rows) {
    case 1: return tile<T, 1, kVectors>(depth, a, a_row, a_col, b, b_row, c, c_row, keep, gain);
    case 2: return tile<T, 2, kVectors>(depth, a, a_row, a_col, b, b_row, c, c_row, keep, gain);
    case 3: return tile<T, 3, kVectors>(depth, a, a_row, a_col, b, b_row, c, c_row, keep, gain);
    case 4: return tile<T, 4, kVectors>(depth, a, a_row, a_col, b, b_row, c, c_row, keep, gain);
    case 5: return tile<T, 5, kVectors>(depth, a, a_row, a_col, b, b_row, c, c_row, keep, gain);
    default: return tile<T, 6, kVectors>(depth, a, a_row, a_col, b, b_row, c, c_row, keep, gain);
  }
}

template <class T>
using TileFunction = void (*)(Index rows, Index depth, const T* a, Index a_row, Index a_col,
                              const T* b, Index b_row, T* c, Index c_row, T keep, T gain);

// The tile function for a panel of `vectors` <= kTileVectors vectors.
template <class T>
FUSED_DNI_INLINE TileFunction<T> tile_for(Index vectors) {
  if constexpr (kTileVectors == 4) {
    constexpr TileFunction<T> table[] = {tile_of<T, 1>, tile_of<T, 2>, tile_of<T, 3>,
                                         tile_of<T, 4>};
    return table[vectors - 1];
  } else {
    constexpr TileFunction<T> table[] = {tile_of<T, 1>, tile_of<T, 2>};
    return table[vectors - 1];
  }
}

// Calls body(first column, width in elements, vectors) for strips of at most `widest` vectors that
// cover [begin, end), evenly wide so that no narrow one is left over. `begin` is a multiple of the
// vector width.
template <class T, class Body>
FUSED_DNI_INLINE void for_strips(Index begin, Index end, Index widest, Body&& body) {
  constexpr Index L = kLanes<T>;
  Index vectors = ceil_div(end - begin, L);
  Index panels = ceil_div(vectors, widest);
  for (Index first = begin; panels > 0; --panels) {
    const Index take = ceil_div(vectors, panels);
    body(first, smaller(take * L, end - first), take);
    first += take * L;
    vectors -= take;
  }
}

// The same for panels.
template <class T, class Body>
FUSED_DNI_INLINE void for_panels(Index begin, Index end, Body&& body) {
  for_strips<T>(begin, end, kTileVectors, body);
}

// Asks for a row, to be in the cache of that level.
template <class T, int kLevel = 1>
FUSED_DNI_INLINE void prefetch_row(const T* row, Index width) {
  for (Index i = 0; i < width; i += kLineBytes / static_cast<Index>(sizeof(T)))
    __builtin_prefetch(row + i, 0, 4 - kLevel);
}

// Rows of A that meet one panel of B after another: as many as stay in the second-level cache.
template <class T>
FUSED_DNI_INLINE Index near_rows(Index rows, Index depth) {
  constexpr Index kNear = 256 * 1024 / static_cast<Index>(sizeof(T));
  return round_up(ceil_div(larger(rows, 1), larger(ceil_div(rows * depth, kNear), 1)), kTileRows);
}

// C[rows][cols] (+)= A B with B in the transposed layout (or any layout whose rows are padded to
// whole vectors); C's rows are padded likewise.
template <class T>
void multiply(Index rows, Index cols, Index depth, const T* a, Index a_row, Index a_col, const T* b,
              Index b_row, T* c, Index c_row, bool accumulate) {
  const Index block = block_depth<T>(depth), near = near_rows<T>(rows, depth);
  for (Index first = 0; first < rows; first += near) {
    const Index end = smaller(rows, first + near);
    for_panels<T>(0, cols, [&](Index col, Index, Index vectors) {
      const TileFunction<T> run = tile_for<T>(vectors);
      for (Index k = 0; k == 0 || k < depth; k += block) {  // once even if A has no columns: C is 0
        const Index count = smaller(block, depth - k);
        for (Index m = first; m < end;) {
          const Index take = next_rows(end - m);
          if (a_col == 1 && col == 0)  // the first panel's rows come from farther away
            for (Index r = m + take; r < smaller(m + 2 * take, rows); ++r)
              prefetch_row<T, 2>(a + r * a_row + k, count);
          run(take, count, a + m * a_row + k * a_col, a_row, a_col, b + k * b_row + col, b_row,
              c + m * c_row + col, c_row, T(accumulate || k > 0 ? 1 : 0), T(1));
          m += take;
        }
      }
    });
  }
}

// C[outputs][batch rows] = W[outputs][depth] x[batch rows][depth]^T, C in the transposed layout.
template <class T, int kBatch>
void multiply_dots(Index outputs, Index depth, const T* w, const T* x, T* c, Index c_row) {
  constexpr Index L = kLanes<T>;
  constexpr int kOutputs = 4;
  for (Index o = 0; o < outputs; o += kOutputs) {
    Vec<T> sum[kOutputs][kBatch] = {};
    const T* rows[kOutputs];  // the last group may be short: its last row stands in for the others
    for (int j = 0; j < kOutputs; ++j) rows[j] = w + smaller(o + j, outputs - 1) * depth;
    for (Index i = 0; i < depth; i += L) {
      Vec<T> part[kBatch];
      for (int n = 0; n < kBatch; ++n) part[n] = load_upto(x + n * depth + i, depth - i);
#pragma GCC unroll 4
      for (int j = 0; j < kOutputs; ++j) {
        const Vec<T> row = load_upto(rows[j] + i, depth - i);
#pragma GCC unroll 4
        for (int n = 0; n < kBatch; ++n) sum[j][n] += row * part[n];
      }
    }
    for (int j = 0; j < smaller(kOutputs, outputs - o); ++j) {
      T* to = c + (o + j) * c_row;
      for (Index n = 0; n < kBatch; n += L) store(to + n, Vec<T>{});
      for (int n = 0; n < kBatch; ++n) to[n] = sum_lanes<T>(sum[j][n]);
    }
  }
}

// Rows that a copy asks for ahead of the one it is at: no prefetcher follows from page to page.
constexpr Index kRowsAhead = 16;

// Copies rows [0, rows) of a strip `width` wide to packed rows of kRow elements, zero-padded.
template <class T, Index kRow = kPanel<T>>
void pack(const T* src, Index src_stride, Index rows, Index width, T* dst) {
  constexpr Index L = kLanes<T>;
  for (Index r = 0; r < rows; ++r, src += src_stride, dst += kRow) {
    prefetch_row(src + kRowsAhead * src_stride, width);
    for (Index v = 0; v < width; v += L) store(dst + v, load_upto(src + v, width - v));
  }
}

// Copies rows [0, rows) of a strip to its panels, zero-padded: all of them but the last are kPanel
// wide, and each has room for `deep` rows.
template <class T>
void pack_strip(const T* src, Index src_stride, Index rows, Index width, T* dst,
                Index deep = kBlockK<T>) {
  constexpr Index L = kLanes<T>;
  for (Index r = 0; r < rows; ++r, src += src_stride, dst += kPanel<T>) {
    prefetch_row(src + kRowsAhead * src_stride, width);
    for (Index p = 0; p < width; p += kPanel<T>)
      for (Index v = p; v < smaller(width, p + kPanel<T>); v += L)
        store(dst + p * deep + v - p, load_upto(src + v, width - v));
  }
}

// A strip of B's columns: of a row-major matrix [depth][..], or of one in the transposed layout
// [..][depth], whose rows it is.
template <class T>
struct Columns {
  const T* at;
  Index row;
  bool transposed = false;

  // Copies rows [k, k + count) of B, as pack_strip does.
  void pack(Index k, Index count, Index width, T* to, Index deep = kBlockK<T>) const {
    if (!transposed) return pack_strip(at + k * row, row, count, width, to, deep);
    for (Index p = 0; p < width; p += kPanel<T>)
      to_transposed(at + p * row + k, row, smaller(kPanel<T>, width - p), count, to + p * deep,
                    kPanel<T>);
  }
};

// C[rows][width] = keep * C + gain * A B for one strip of B, copied block
// by block to `packed` (kBlockK * kStrip elements). `width` must be whole vectors,
// as C is written where it lies. touch(row, count, column, width) is called before a tile is begun
// that will read C, so that C can be fetched meanwhile.
template <class T, class Touch>
FUSED_DNI_INLINE void multiply_into(Index rows, Index width, Index depth, const T* a, Index a_row,
                                    Index a_col, const Columns<T>& b, T* packed, T* c, Index c_row,
                                    T keep, T gain, Touch&& touch) {
  const Index block = block_depth<T>(depth);
  // What is read once is read where it lies.
  const bool copy = rows > kTileRows || b.transposed;
  const Index panel_row = copy ? kPanel<T> : b.row;
  for (Index k = 0; k < depth; k += block) {
    const Index count = smaller(block, depth - k);
    if (copy) b.pack(k, count, width, packed);
    for (Index p = 0; p < width; p += kPanel<T>) {
      const Index wide = smaller(kPanel<T>, width - p);
      const TileFunction<T> run = tile_for<T>(wide / kLanes<T>);
      const T* panel = copy ? packed + p * kBlockK<T> : b.at + k * b.row + p;
      for (Index m = 0; m < rows;) {
        const Index take = next_rows(rows - m);
        touch(m, take, p, wide);
        run(take, count, a + m * a_row + k * a_col, a_row, a_col, panel, panel_row,
            c + m * c_row + p, c_row, k > 0 ? T(1) : keep, gain);
        m += take;
      }
    }
  }
}

// Rows of sums that multiply_packed hands over at a time: a tile's where a strip is one panel, else
// so many that the panels are not fetched from the second-level cache too often.
constexpr Index kSumRows = kStripPanels == 1 ? kTileRows : 8 * kTileRows;
constexpr Index kSumUnit = kStripPanels == 1 ? 1 : kTileRows;

// Elements of scratch that multiply_packed needs for `rows` rows of output; multiply_into's fit.
template <class T>
FUSED_DNI_INLINE Index packed_scratch(Index rows) {
  return (kBlockK<T> + larger(rows, kSumRows)) * kStrip<T>;
}

// The same product where it is not simply to be stored or added: partial sums stay in scratch, and
// body(row, count, const T* sums [count][kStrip]) gets finished rows while they are in the
// first-level cache; touch(row, count, column, width) is called before the last block of a tile is
// begun, so that body can have its data fetched meanwhile.
template <class T, class Touch, class Body>
FUSED_DNI_INLINE void multiply_packed(Index rows, Index width, Index depth, const T* a, Index a_row,
                                      Index a_col, const Columns<T>& b, T* scratch, Touch&& touch,
                                      Body&& body) {
  T* packed = scratch;
  T* sums = scratch + kBlockK<T> * kStrip<T>;
  const Index block = block_depth<T>(depth);
  // The sums of one group are enough when nothing has to be carried from block to block.
  const Index sums_row = depth <= block ? 0 : kStrip<T>;
  for (Index k = 0; k < depth; k += block) {
    const Index count = smaller(block, depth - k);
    const bool last = k + count == depth;
    b.pack(k, count, width, packed);
    for (Index first = 0; first < rows;) {
      const Index group = next_rows(rows - first, kSumRows, kSumUnit);
      T* group_sums = sums + first * sums_row;
      for (Index p = 0; p < width; p += kPanel<T>) {
        const Index wide = smaller(kPanel<T>, width - p);
        const TileFunction<T> run = tile_for<T>(ceil_div(wide, kLanes<T>));
        for (Index m = 0; m < group;) {
          const Index take = next_rows(group - m);
          if (last) touch(first + m, take, p, wide);
          run(take, count, a + (first + m) * a_row + k * a_col, a_row, a_col,
              packed + p * kBlockK<T>, kPanel<T>, group_sums + m * kStrip<T> + p, kStrip<T>,
              T(k > 0 ? 1 : 0), T(1));
          m += take;
        }
      }
      if (last) body(first, group, static_cast<const T*>(group_sums));
      first += group;
    }
  }
}

// The same where body reads and writes matrices of its own at the rows of C: as much of a row as
// possible comes at a time, so that they go by in the order in which they lie (which takes a quarter
// off an update by Adam). Of one block's depth alone, and so wide that the strip's panels, read again
// for every group of rows, stay about as near as the second-level cache.
constexpr Index kWideRows = 2 * kTileRows;

template <class T>
FUSED_DNI_INLINE Index wide_panels(Index depth) {
  constexpr Index kBytes = 512 * 1024;
  const Index panels = kBytes / (larger(depth, 1) * kPanel<T> * static_cast<Index>(sizeof(T)));
  return larger(panels, kStripPanels);
}

// Elements of scratch for that.
template <class T>
FUSED_DNI_INLINE Index wide_scratch(Index depth, Index columns) {
  const Index width = smaller(wide_panels<T>(depth) * kPanel<T>, round_up(columns, kPanel<T>));
  return (depth + kWideRows) * width;
}

// body(row, count, const T* sums [count][row length], row length) for width <= wide_panels() panels.
template <class T, class Body>
FUSED_DNI_INLINE void multiply_wide(Index rows, Index width, Index depth, const T* a, Index a_row,
                                    Index a_col, const Columns<T>& b, T* scratch, Body&& body) {
  const Index row = round_up(width, kPanel<T>);
  T* packed = scratch;
  T* sums = scratch + depth * row;
  b.pack(0, depth, width, packed, depth);
  for (Index first = 0; first < rows;) {
    const Index group = next_rows(rows - first, kWideRows, kTileRows);
    for (Index p = 0; p < width; p += kPanel<T>) {
      const TileFunction<T> run = tile_for<T>(ceil_div(smaller(kPanel<T>, width - p), kLanes<T>));
      for (Index m = 0; m < group;) {
        const Index take = next_rows(group - m);
        run(take, depth, a + (first + m) * a_row, a_row, a_col, packed + p * depth, kPanel<T>,
            sums + m * row + p, row, T(0), T(1));
        m += take;
      }
    }
    body(first, group, static_cast<const T*>(sums), row);
    first += group;
  }
}

}  // namespace fused_dni::FUSED_DNI_ISA
