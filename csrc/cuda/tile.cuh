// Tiles of matrices as a block's threads hold them outside of products, and sums over them.
#pragma once

#include "common.cuh"
#include "product.cuh"

namespace fused_dni::cuda {

// Blocks that a launch has at most: each has its place in lists of what blocks saw.
inline constexpr int kMostBlocks = 1024;
inline constexpr float kLargest = 1.0e38f;  // well inside float32

FUSED_DNI_BOTH int ceil_div(int a, int b) { return (a + b - 1) / b; }

// M x N elements: a thread has some rows of one column, so that a warp's accesses to row-major
// memory lie side by side. They stay in registers: loops over them are unrolled, or `in_turn`.
template <int kM, int kN>
struct Tile {
  static constexpr int M = kM, N = kN;
  static constexpr int kApart = kThreads / N;  // rows from one element to the next
  static constexpr int kEach = M / kApart;
  static_assert(kThreads % N == 0 && M % kApart == 0);

  float value[kEach] = {};

  FUSED_DNI_DEVICE static int row(int i) { return thread() / N + i * kApart; }
  FUSED_DNI_DEVICE static int column() { return thread() % N; }
};

// Calls f(i, first[i], others[i]...) for each i, where that is much code: it is there for two of
// them. The arrays are turned instead of indexed, since registers cannot be.
template <class F, class T, int kCount, class... Others>
FUSED_DNI_DEVICE void in_turn(F&& f, T (&first)[kCount], Others&... others) {
  constexpr int kAtOnce = kCount > 2 && kCount % 2 == 0 ? 2 : 1;
#pragma unroll 1
  for (int i = 0; i < kCount; i += kAtOnce) {
#pragma unroll
    for (int e = 0; e < kAtOnce; ++e) f(i + e, first[e], others[e]...);
    turn<kAtOnce>(first);
    (turn<kAtOnce>(others), ...);
  }
}

// Where a tile lies in a matrix [rows, columns].
template <class T>
struct Place {
  int row, column, rows, columns;  // of the tile's first element; of the matrix

  // Of a thread's element i.
  FUSED_DNI_DEVICE int r(int i) const { return row + T::row(i); }
  FUSED_DNI_DEVICE int c() const { return column + T::column(); }
  FUSED_DNI_DEVICE bool has_column() const { return c() < columns; }
  FUSED_DNI_DEVICE bool inside(int i) const {
    return i * T::kApart < (has_column() ? rows - r(0) : 0);
  }
  // In a contiguous matrix.
  FUSED_DNI_DEVICE std::int64_t at(int i) const {
    return std::int64_t{r(0)} * columns + c() + std::int64_t{i * T::kApart} * columns;
  }
};

// How many tiles a matrix has.
template <class T>
FUSED_DNI_BOTH int tiles_of(int rows, int columns) {
  return ceil_div(rows, T::M) * ceil_div(columns, T::N);
}
// Tile number `index`; a group of rows of tiles is gone through column by column, so that blocks
// that run side by side share operands in the cache.
template <class T>
FUSED_DNI_DEVICE Place<T> place(int index, int rows, int columns) {
  constexpr int kGroup = 8;
  const int down = ceil_div(rows, T::M), across = ceil_div(columns, T::N);
  const int group = index / (kGroup * across), left = down - group * kGroup;
  const int height = left < kGroup ? left : kGroup, rest = index % (kGroup * across);
  return {(group * kGroup + rest % height) * T::M, rest / height * T::N, rows, columns};
}

// The tile of a product.
template <class P>
struct OfProduct;
template <class Op, int M, int N, int K, int kWarpsM, int kWarpsN, int kWarpsK>
struct OfProduct<Product<Op, M, N, K, kWarpsM, kWarpsN, kWarpsK>> {
  using Type = Tile<M, N>;
};
template <class P>
using TileOf = typename OfProduct<P>::Type;

// A[row : row + M, 0 : depth] B[col : col + N, 0 : depth]^T; begins with a barrier.
template <class P, class A, class B>
FUSED_DNI_DEVICE void multiply(TileOf<P>& tile, SharedArena arena, A a, int row, B b, int col,
                               int depth) {
  using T = TileOf<P>;
  constexpr int kStride = T::N + 8;
  static_assert(P::kThreads == kThreads);
  typename P::Sum sum;
  P::run(sum, arena, a, row, b, col, depth);
  const Shared<float> held = arena.take<float>(T::M * kStride);
  P::each(sum, [&](int r, int c, float value) { held.store(r * kStride + c, value); });
  block_barrier();
#pragma unroll
  for (int i = 0; i < T::kEach; ++i) tile.value[i] = held.load(T::row(i) * kStride + T::column());
}
template <class P>
constexpr int shared_bytes() {
  return P::larger(P::kSharedBytes, TileOf<P>::M * (TileOf<P>::N + 8) * 4);
}

// An element of a gradient as it arrived: of float32, or of type X.
template <class X>
FUSED_DNI_DEVICE float arrived(const void* from, bool wide, std::int64_t at) {
  return wide ? static_cast<const float*>(from)[at] : to_float(static_cast<const X*>(from)[at]);
}

// ---- Sums; all threads come here, shared memory may be in use until then --------------------------

// Down a column, of what its threads have of it; to all of these.
template <class T>
FUSED_DNI_DEVICE float column_sum(float mine, SharedArena arena) {
  const Shared<float> parts = arena.take<float>(kThreads);
  block_barrier();
  parts.store(thread(), mine);
  block_barrier();
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < T::kApart; ++i) sum += parts.load(i * T::N + T::column());
  return sum;
}
// What f makes of the sums along each row of a tile; to all threads that have an element of it.
template <class T, class F>
FUSED_DNI_DEVICE void row_sums(T& tile, SharedArena arena, F&& f) {
  const Shared<float> held = arena.take<float>(T::M * (T::N + 1));
  const Shared<float> totals = arena.take<float>(T::M);
  block_barrier();
#pragma unroll
  for (int i = 0; i < T::kEach; ++i)
    held.store(T::row(i) * (T::N + 1) + T::column(), tile.value[i]);
  block_barrier();
  static_assert(T::M <= kThreads);
  if (const int r = thread(); r < T::M) {
    float sum = 0.0f;
#pragma unroll 8
    for (int c = 0; c < T::N; ++c) sum += held.load(r * (T::N + 1) + c);
    totals.store(r, f(sum));
  }
  block_barrier();
#pragma unroll
  for (int i = 0; i < T::kEach; ++i) tile.value[i] = totals.load(T::row(i));
}
template <class T>
constexpr int sums_bytes() {
  return (T::M * (T::N + 2) + 64) * 4;
}

// The sum of `count` numbers that lie `stride` apart.
FUSED_DNI_DEVICE float sum_list(const float* from, int count, std::int64_t stride) {
  float sum = 0.0f;
  for (int i = 0; i < count; ++i) sum += from[i * stride];
  return sum;
}

// Mean and biased variance over `count` elements, of which `from` has, for each `part` of them,
// the mean and, `apart` behind it, the squared deviations from that; the parts lie 2 * apart apart.
// Chan, Golub & LeVeque 1983 (The American Statistician 37).
struct Moments {
  float mean, variance;
};
FUSED_DNI_DEVICE Moments combine_moments(const float* from, int count, int part,
                                         std::int64_t apart) {
  Moments all{0.0f, 0.0f};
  const int parts = ceil_div(count, part);
  const auto size = [&](int k) {
    const int left = count - k * part;
    return static_cast<float>(left < part ? left : part);
  };
#pragma unroll 1
  for (int k = 0; k < parts; ++k) all.mean += from[2 * k * apart] * (size(k) / count);
#pragma unroll 1
  for (int k = 0; k < parts; ++k) {
    const float off = from[2 * k * apart] - all.mean;
    all.variance += (from[(2 * k + 1) * apart] + off * off * size(k)) / count;
  }
  return all;
}

// For gradients that are stored.
FUSED_DNI_DEVICE RuleFactors no_rule() {
  RuleFactors f{};
  f.kind = kNoRule;
  return f;
}

// The gradient a^T b, times `factor`, of a parameter [rows, columns]: applied or stored; or (`look`)
// only looked at: returns the largest magnitude.
template <class P, class A, class B>
FUSED_DNI_DEVICE float settle_product(const Slot& slot, int rows, int columns, SharedArena arena,
                                      const A& a, const B& b, int depth, const RuleFactors& f,
                                      float factor, bool look) {
  using T = TileOf<P>;
  float largest = 0.0f;
  for (int index = block(); index < tiles_of<T>(rows, columns); index += blocks()) {
    const auto at = place<T>(index, rows, columns);
    T g, p, m, v;
    // What the rule reads is on its way while the product is made.
#pragma unroll
    for (int i = 0; i < T::kEach; ++i)
      if (at.inside(i) && !look)
        read_element(slot, at.at(i), f, p.value[i], m.value[i], v.value[i]);
    multiply<P>(g, arena, a, at.row, b, at.column, depth);
    in_turn(
        [&](int i, float gradient, float parameter, float first, float second) {
          if (!at.inside(i)) return;
          if (look)
            largest = fmaxf(largest, magnitude(gradient));
          else
            settle(slot, at.at(i), gradient * factor, parameter, first, second, f);
        },
        g.value, p.value, m.value, v.value);
  }
  return largest;
}

// ---- What blocks leave to each other --------------------------------------------------------------

// The largest of what so many blocks left.
FUSED_DNI_DEVICE float largest_left(const float* list, int count, SharedArena arena) {
  float largest = 0.0f;
#pragma unroll 1
  for (int i = thread(); i < count; i += kThreads) largest = fmaxf(largest, list[i]);
  return block_max(largest, arena);
}
FUSED_DNI_DEVICE double sum_left(const double* list, int count, SharedArena arena) {
  double sum = 0.0;
#pragma unroll 1
  for (int i = thread(); i < count; i += kThreads) sum += list[i];
  return block_sum(sum, arena);
}
// Leaves the block's largest; `mine` are magnitudes.
FUSED_DNI_DEVICE void leave_largest(float* list, float mine, SharedArena arena) {
  const float largest = block_max(mine, arena);
  if (thread() == 0) list[block()] = largest;
}

// The largest magnitude in a matrix [rows, columns], of what this block has to look at; from the
// other end, because the first blocks have a tile of the product beside this.
template <class T>
FUSED_DNI_DEVICE float look_at(const T* data, std::int64_t stride, int rows, int columns) {
  constexpr int kPiece = 256;
  const int across = ceil_div(columns, kPiece), warps = kThreads / 32;
  float largest = 0.0f;
  for (int index = (blocks() - 1 - block()) * warps + warp(); index < rows * across;
       index += blocks() * warps) {
    const T* line = data + index / across * stride;
    const int first = index % across * kPiece + lane();
#pragma unroll
    for (int i = 0; i < kPiece; i += 32)
      if (first + i < columns) largest = fmaxf(largest, magnitude(to_float(line[first + i])));
  }
  return largest;
}

}  // namespace fused_dni::cuda
