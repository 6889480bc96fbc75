// What the LSTM's kernels share: the chain of small products through a window, and the large
// products around it.
//
// A block owns eight hidden units, all four gates of them, for a group of rows of the batch, so
// that gates and cell state never leave it. Its slice of W_hh (forwards [32, H], backwards
// [4H, 8]) stays on chip for all steps. Such a product is thin and deep: its depth is divided among
// the warps, whose sums meet in shared memory in fixed order. Depths are gone through in trips of
// 64 bytes a row, each lane reading sixteen bytes of a row at once: a fragment may have its depths
// in any order that both operands share.
//
// On chip, for operands of two bytes, is in registers: H <= 1024, a multiple of 8. For float32 it is shared memory,
// 128 H bytes beside the sums' 20 KB: H <= 1656 with 227 KB a block, 1144 with 163 KB, 632 with
// 99 KB. And each block must own one slice: H <= 8 times the blocks that are resident (1056 on an
// H100, 864 on an A100). Otherwise the same kernel reads weights from global memory in each step.
//
// Steps wait for the grid, or, where there are clusters and sixteen blocks have all units (H <=
// 128), for their cluster alone: rows of the batch do not wait for each other.
#pragma once

#include <algorithm>

#include "common.cuh"
#include "lstm.hpp"
#include "product.cuh"

namespace fused_dni::cuda {

inline constexpr int kWarps = kThreads / 32;
inline constexpr int kUnits = 8;      // of a slice
inline constexpr int kMostTiles = 2;  // of sixteen rows, at a time
// So a thread has one pair of a row and a unit.
static_assert(kMostTiles * 16 * kUnits == kThreads);
inline constexpr int kMostShared = 227 * 1024;
inline constexpr int kMostCluster = 16;  // blocks

template <class Op>
inline constexpr int kLoad = 16 / static_cast<int>(sizeof(typename Op::Element));
template <class Op>
inline constexpr int kTrip = 4 * kLoad<Op>;
template <class Op>
inline constexpr bool kInRegisters = sizeof(typename Op::Element) == 2;

// ---- Sizes ----------------------------------------------------------------------------------------

// Of a slice of kColumns fragments (of eight columns) and so many depths.
template <class Op, int kColumns>
struct SliceSizes {
  static constexpr int kLine = kColumns * 8 + (kColumns > 1 ? 8 : 0);  // between rows of sums
  static constexpr int kHeld = 16 / kColumns;                          // trips a warp, in registers

  static int trips(int depth) { return (depth + kTrip<Op> - 1) / kTrip<Op>; }
  static int sums(int tiles) { return kWarps * tiles * 16 * kLine * 4; }
  // On chip; on their way into registers weights lie where the sums do later.
  static std::int64_t bytes(int tiles, int depth) {
    const std::int64_t weights = std::int64_t{trips(depth)} * kColumns * 32 * 16;
    return kInRegisters<Op> ? std::max<std::int64_t>(sums(tiles), weights) : sums(tiles) + weights;
  }
  // Whether they may be in registers, if that is where this type's belong; `state` is what they
  // meet.
  static bool fits(int depth, const void* state) {
    return !kInRegisters<Op> || (trips(depth) <= kHeld * kWarps && depth % kLoad<Op> == 0 &&
                                 reinterpret_cast<std::uintptr_t>(state) % 16 == 0);
  }
};

// ---- Products with a slice ------------------------------------------------------------------------

// A slice of W_hh: element (k, fragment n, column) of the product's right side.
struct Slice {
  const float* data;
  std::int64_t fragment, column, along;
  int columns;  // of eight
  int depth;
};

FUSED_DNI_DEVICE Slice forward_slice(const float* weight, int slice, int size) {
  const std::int64_t wide = size;
  return {weight + slice * kUnits * wide, wide * size, wide, 1, size - slice * kUnits, size};
}
FUSED_DNI_DEVICE Slice backward_slice(const float* weight, int slice, int size) {
  return {weight + slice * kUnits, 0, 1, size, size - slice * kUnits, 4 * size};
}

// Sixteen bytes of a column, of depths k, k + 1, ...
template <class Op>
FUSED_DNI_DEVICE Words slice_words(const Slice& from, int fragment, int column, int k) {
  Chunk<typename Op::Element, kLoad<Op>> made;
  const float* at = from.data + fragment * from.fragment + column * from.column + k * from.along;
#pragma unroll
  for (int e = 0; e < kLoad<Op>; ++e) {
    const bool there = column < from.columns && k + e < from.depth;
    made.value[e] = operand_of<Op>(there ? at[e * from.along] : 0.0f);
  }
  Words words;
  std::memcpy(&words, &made, sizeof(words));
  return words;
}

// Sixteen bytes of a row that other blocks have written in this launch; of a row that is `there`.
// kWhole: no row ends inside of them, and all are aligned.
template <class Op, bool kWhole>
FUSED_DNI_DEVICE Words state_words(const typename Op::Element* row, bool there, bool aligned, int k,
                                   int depth) {
  using E = typename Op::Element;
  Words words{};
  if constexpr (kWhole) {
    if (there && k < depth) words = load_words(row + k);
  } else if (there && aligned && k + kLoad<Op> <= depth) {
    words = load_words(row + k);
  } else {
    Chunk<E, kLoad<Op>> made;
#pragma unroll
    for (int e = 0; e < kLoad<Op>; ++e)
      made.value[e] = there && k + e < depth ? row[k + e] : from_float<E>(0.0f);
    std::memcpy(&words, &made, sizeof(words));
  }
  if constexpr (kSame<Op, Tf32>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) words.word[i] = bits_of(round_tf32(float_of(words.word[i])));
  }
  return words;
}

// d += rows g, g + 8 times eight columns, over a trip: two instructions.
template <class Op>
FUSED_DNI_DEVICE void multiply_trip(float (&d)[4], const Words& low, const Words& high,
                                    const Words& column) {
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const std::uint32_t a[4] = {low.word[i], high.word[i], low.word[i + 1], high.word[i + 1]};
    const std::uint32_t b[2] = {column.word[i], column.word[i + 1]};
    Op::multiply(d, a, b);
  }
}

FUSED_DNI_DEVICE float dot_words(const Words& a, const Words& b, float sum) {
#pragma unroll
  for (int i = 0; i < 4; ++i) sum += float_of(a.word[i]) * float_of(b.word[i]);
  return sum;
}

// The product of rows [*, depth] with a slice, kColumns fragments wide.
template <class Op, int kColumns>
class SliceProduct {
  using E = typename Op::Element;
  using Sizes = SliceSizes<Op, kColumns>;
  static constexpr int kHeld = kInRegisters<Op> ? Sizes::kHeld : 1;
  static constexpr int kAhead = kHeld < 4 ? kHeld : 4;  // trips whose rows are asked for together

 public:
  FUSED_DNI_DEVICE SliceProduct(SharedArena arena, int tiles, int depth)
      : tiles_(tiles),
        trips_((depth + kTrip<Op> - 1) / kTrip<Op>),
        parts_(trips_ < kWarps ? trips_ : kWarps),
        sums_(arena.take<float>(kWarps * tiles * 16 * Sizes::kLine)),
        arena_(arena) {}

  // Which slice is multiplied; it stays on chip from here on, or else is read again each time.
  FUSED_DNI_DEVICE void set(const Slice& slice, bool on_chip) {
    slice_ = slice;
    on_chip_ = on_chip;
    if (!on_chip) return;
    SharedArena arena = kInRegisters<Op> ? SharedArena() : arena_;
    kept_ = arena.template take<E>(trips_ * kColumns * 32 * kLoad<Op>);
    block_barrier();
    for (int i = thread(); i < trips_ * kColumns * 32; i += kThreads) {
      const int k = i / (32 * kColumns) * kTrip<Op> + i % 4 * kLoad<Op>;
      kept_.store_words(i * kLoad<Op>, slice_words<Op>(slice, i / 32 % kColumns, i % 32 / 4, k));
    }
    block_barrier();
    if constexpr (kInRegisters<Op>) {
#pragma unroll
      for (int j = 0; j < kHeld; ++j) {
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          const int trip = warp() + j * kWarps;
          if (trip < trips_)
            held_[j][n] = kept_.load_words(((trip * kColumns + n) * 32 + lane()) * kLoad<Op>);
        }
      }
      block_barrier();
    }
  }

  // Multiplies `count` rows, of which the first is given, and as many as there are tiles at the
  // most. A block's barrier stands between this and `sum`, and another before the next product.
  FUSED_DNI_DEVICE void run(const E* state, int count) {
    const bool aligned =
        slice_.depth % kLoad<Op> == 0 && reinterpret_cast<std::uintptr_t>(state) % 16 == 0;
    const int tiles = (count + 15) / 16 < tiles_ ? (count + 15) / 16 : tiles_;
    float d[kMostTiles][kColumns][4] = {};
    if constexpr (kInRegisters<Op>) {
      if (on_chip_) {
#pragma unroll
        for (int first = 0; first < kHeld; first += kAhead) {
#pragma unroll
          for (int m = 0; m < kMostTiles; ++m) {
            if (m >= tiles || warp() + first * kWarps >= trips_) continue;
            Words low[kAhead], high[kAhead];
#pragma unroll
            for (int j = 0; j < kAhead; ++j)
              read<true>(low[j], high[j], state, m, count, true, warp() + (first + j) * kWarps);
#pragma unroll
            for (int j = 0; j < kAhead; ++j) {
              if (warp() + (first + j) * kWarps >= trips_) continue;
#pragma unroll
              for (int n = 0; n < kColumns; ++n)
                multiply_trip<Op>(d[m][n], low[j], high[j], held_[first + j][n]);
            }
          }
        }
        write(d, tiles);
        return;
      }
    }
    for (int trip = warp(); trip < trips_; trip += kWarps) {
      if constexpr (kSame<Op, Fp32>) {
#pragma unroll
        for (int quad = 0; quad < 4; ++quad) {
          const int k = trip * kTrip<Op> + quad * kLoad<Op>;
          Words columns[kColumns][2];
#pragma unroll
          for (int n = 0; n < 2 * kColumns; ++n)
            columns[n / 2][n % 2] = column(trip, n / 2, lane() % 4 * 2 + n % 2, quad);
#pragma unroll
          for (int m = 0; m < kMostTiles; ++m) {
            if (m >= tiles) continue;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int row = m * 16 + half * 8 + lane() / 4;
              const Words words = row_words<false>(state, row, count, aligned, k);
#pragma unroll
              for (int e = 0; e < 2 * kColumns; ++e) {
                float& sum = d[m][e / 2][half * 2 + e % 2];
                sum = dot_words(words, columns[e / 2][e % 2], sum);
              }
            }
          }
        }
      } else {
        Words low[kMostTiles], high[kMostTiles];
#pragma unroll
        for (int m = 0; m < kMostTiles; ++m)
          if (m < tiles) read<false>(low[m], high[m], state, m, count, aligned, trip);
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          const Words words = column(trip, n, lane() / 4, lane() % 4);
#pragma unroll
          for (int m = 0; m < kMostTiles; ++m)
            if (m < tiles) multiply_trip<Op>(d[m][n], low[m], high[m], words);
        }
      }
    }
    write(d, tiles);
  }

  FUSED_DNI_DEVICE float sum(int row, int column) const {
    float sum = 0.0f;
    for (int part = 0; part < parts_; ++part)
      sum += sums_.load((part * tiles_ * 16 + row) * Sizes::kLine + column);
    return sum;
  }

 private:
  // The first of a trip's depths that this lane reads.
  FUSED_DNI_DEVICE static int own() { return lane() % 4 * kLoad<Op>; }

  template <bool kWhole>
  FUSED_DNI_DEVICE Words row_words(const E* state, int row, int count, bool aligned, int k) const {
    return state_words<Op, kWhole>(state + row * static_cast<std::int64_t>(slice_.depth),
                                   row < count, aligned, k, slice_.depth);
  }
  template <bool kWhole>
  FUSED_DNI_DEVICE void read(Words& low, Words& high, const E* state, int m, int count,
                             bool aligned, int trip) const {
    const int row = m * 16 + lane() / 4, k = trip * kTrip<Op> + own();
    low = row_words<kWhole>(state, row, count, aligned, k);
    high = row_words<kWhole>(state, row + 8, count, aligned, k);
  }
  FUSED_DNI_DEVICE Words column(int trip, int fragment, int column, int quad) const {
    if (!kInRegisters<Op> && on_chip_)
      return kept_.load_words(((trip * kColumns + fragment) * 32 + column * 4 + quad) * kLoad<Op>);
    return slice_words<Op>(slice_, fragment, column, trip * kTrip<Op> + quad * kLoad<Op>);
  }
  FUSED_DNI_DEVICE void write(const float (&d)[kMostTiles][kColumns][4], int tiles) const {
    if (warp() >= parts_) return;
#pragma unroll
    for (int m = 0; m < kMostTiles; ++m) {
      if (m >= tiles) continue;
#pragma unroll
      for (int e = 0; e < 4 * kColumns; ++e) {
        const int row = (warp() * tiles_ + m) * 16 + lane() / 4 + e % 4 / 2 * 8;
        sums_.store(row * Sizes::kLine + e / 4 * 8 + lane() % 4 * 2 + e % 2, d[m][e / 4][e % 4]);
      }
    }
  }

  int tiles_, trips_, parts_;
  Shared<float> sums_;
  SharedArena arena_;
  Slice slice_;
  bool on_chip_ = false;
  Shared<E> kept_;
  Words held_[kHeld][kColumns];
};

// ---- Products of all steps together ---------------------------------------------------------------

template <class Op>
using Square = Product<Op, 64, 64, 32, 4, 2>;

template <class T>
using Along = Operand<T, Lies::kAlong>;
template <class T>
using Across = Operand<T, Lies::kAcross>;

// Counts the pieces of work of a phase, so that blocks share what several loops consist of.
class Turn {
 public:
  // The block's first piece among the next `count` ones; further ones are blocks() apart.
  FUSED_DNI_DEVICE int first(std::int64_t count) {
    const int at = (block() - before_ + blocks()) % blocks();
    before_ = static_cast<int>((before_ + count) % blocks());
    return at;
  }

 private:
  int before_ = 0;
};

// Tiles of a b^T: f(row, column, value) for each element [rows, columns] once.
template <class Op, class A, class B, class F>
FUSED_DNI_DEVICE void multiply(SharedArena arena, Turn& turn, const A& a, const B& b, int depth,
                               F&& f) {
  const int down = (a.rows + 63) / 64, across = (b.rows + 63) / 64;
  const std::int64_t count = static_cast<std::int64_t>(down) * across;
  for (std::int64_t i = turn.first(count); i < count; i += blocks()) {
    const int row = static_cast<int>(i % down) * 64, column = static_cast<int>(i / down) * 64;
    typename Square<Op>::Sum sum;
    Square<Op>::run(sum, arena, a, row, b, column, depth);
    Square<Op>::each(sum, [&](int r, int c, float value) {
      if (row + r < a.rows && column + c < b.rows) f(row + r, column + c, value);
    });
  }
}

// The gradient of a weight [4H, columns]: delta^T of, over `count` rows.
template <class Op, class D, class T, class F>
FUSED_DNI_DEVICE void weight_gradient(SharedArena arena, Turn& turn, const D* delta, const T* of,
                                      int rows, int columns, int count, F&& f) {
  multiply<Op>(arena, turn, Across<D>{delta, rows, rows}, Across<T>{of, columns, columns}, count,
               f);
}

// The gradient of a bias: f(column, value) of delta's column sums.
template <class D, class F>
FUSED_DNI_DEVICE void bias_gradient(SharedArena arena, Turn& turn, const D* delta, int columns,
                                    int count, F&& f) {
  const Shared<float> parts = arena.take<float>(kThreads);
  const int strips = (columns + 31) / 32;
  for (int strip = turn.first(strips); strip < strips; strip += blocks()) {
    const int column = strip * 32 + lane();
    float sum = 0.0f;
    for (int n = warp(); column < columns && n < count; n += kWarps)
      sum += to_float(delta[n * static_cast<std::int64_t>(columns) + column]);
    parts.store(thread(), sum);
    block_barrier();
    if (warp() == 0 && column < columns) {
      for (int part = 1; part < kWarps; ++part) sum += parts.load(part * 32 + lane());
      f(column, sum);
    }
    block_barrier();
  }
}

// f(i) for each i below count, one thread each.
template <class F>
FUSED_DNI_DEVICE void each_element(std::int64_t count, F&& f) {
  const std::int64_t apart = static_cast<std::int64_t>(blocks()) * kThreads;
  for (std::int64_t i = static_cast<std::int64_t>(block()) * kThreads + thread(); i < count;
       i += apart)
    f(i);
}

// ---- Rows and units of a block --------------------------------------------------------------------

// Calls f(slice) for each slice that the block owns, and g(first row, end of rows, slice) for each
// batch of its rows.
template <class F, class G>
FUSED_DNI_DEVICE void each_batch(const LSTMPlan& plan, int batch, F&& f, G&& g) {
  for (int item = block(); item < plan.slices * plan.groups; item += blocks()) {
    const int slice = item % plan.slices, group = item / plan.slices;
    const int end = (group + 1) * plan.rows < batch ? (group + 1) * plan.rows : batch;
    f(slice);
    for (int row = group * plan.rows; row < end; row += plan.tiles * 16) g(row, end, slice);
  }
}

// A thread's pair of a row and a unit in a batch of rows.
struct Pair {
  int local;  // row, from the batch's first
  int row, unit;
  bool there;
  int length;                // steps of its row
  std::int64_t state, gate;  // where it lies in [B, H], and its first gate in [B, 4H]
};

// A is LSTMForward or LSTMBackward.
template <class A>
FUSED_DNI_DEVICE Pair own_pair(const A& a, int first, int end, int slice) {
  const LSTMPlan& plan = a.plan;
  const int size = a.sizes.size;
  Pair pair;
  pair.local = thread() / kUnits;
  pair.row = first + pair.local;
  pair.unit = slice * kUnits + thread() % kUnits;
  pair.there = pair.local < plan.tiles * 16 && pair.row < end && pair.unit < size;
  pair.length = a.sizes.steps;
  if (pair.there && a.lengths != nullptr) pair.length = static_cast<int>(a.lengths[pair.row]);
  pair.state = static_cast<std::int64_t>(pair.row) * size + pair.unit;
  pair.gate = static_cast<std::int64_t>(pair.row) * 4 * size + pair.unit;
  return pair;
}

// Where a block has one batch of rows at the most, its pairs are the threads' for all steps: cell
// states stay in registers, and what a step reads besides its product is asked for during the step
// before. It is kept as it lies in memory: to convert it would be to wait for it, in front of the
// barrier.
template <class A>
FUSED_DNI_DEVICE Pair sole_pair(const A& a) {
  const LSTMPlan& plan = a.plan;
  const int batch = a.sizes.batch;
  const int slice = block() % plan.slices, first = block() / plan.slices * plan.rows;
  const int end = first + plan.rows < batch ? first + plan.rows : batch;
  return own_pair(a, first, end, slice);
}

// Waits for the blocks whose results this one's next step reads.
FUSED_DNI_DEVICE void step_barrier(const LSTMPlan& plan, const Barrier& barrier) {
  if (plan.clustered)
    cluster_barrier();
  else
    grid_barrier(barrier, Phase::kStep);
}

// ---- Plans (host) ---------------------------------------------------------------------------------

// Divides the work of a window's steps and launches its kernel. `depth` is of a step's product
// with `state`,
// `other` the number of tiles of the largest product around the steps.
template <class Op, int kColumns, class A>
Status launch_window(void (*kernel)(A), const A& given, int depth, const void* state,
                     std::int64_t other) {
  using Sizes = SliceSizes<Op, kColumns>;
  A a = given;
  Status status;
  const int size = a.sizes.size, row_tiles = (a.sizes.batch + 15) / 16;
  LSTMPlan& plan = a.plan;
  plan.slices = (size + kUnits - 1) / kUnits;
  plan.on_chip = false;
  int blocks = 0, shared = 0;
  const auto try_plan = [&](int tiles, std::int64_t bytes, Status& tried) {
    plan.tiles = tiles;
    shared = static_cast<int>(std::max<std::int64_t>(Square<Op>::kSharedBytes, bytes));
    blocks = resident_blocks(kernel, kThreads, shared, tried);
    return tried.ok();
  };
  const int most = std::min(row_tiles, kMostTiles);
  for (int tiles = most; !plan.on_chip && tiles > 0 && Sizes::fits(depth, state); --tiles) {
    Status tried;
    if (Sizes::bytes(tiles, depth) <= kMostShared)
      plan.on_chip = try_plan(tiles, Sizes::bytes(tiles, depth), tried) && blocks >= plan.slices;
  }
  if (!plan.on_chip && !try_plan(most, Sizes::sums(most), status)) return status;
  const LSTMPlan alone = plan;
  // On so many blocks, which are clusters or not.
  const auto launch_on = [&](int most_blocks, bool clustered) {
    plan = alone;
    plan.clustered = clustered;
    plan.groups = std::max(1, std::min(most_blocks / plan.slices, row_tiles));
    plan.rows = (row_tiles + plan.groups - 1) / plan.groups * 16;
    plan.groups = (a.sizes.batch + plan.rows - 1) / plan.rows;
    plan.tiles = std::min(plan.tiles, plan.rows / 16);
    const int items = plan.slices * plan.groups;
    plan.sole = items <= most_blocks && plan.rows <= plan.tiles * 16;
    const std::int64_t wanted = std::max<std::int64_t>(items, other);
    const int cluster = clustered ? plan.slices : 1;
    const int taken = static_cast<int>(std::min<std::int64_t>(most_blocks, wanted));
    launch(kernel, a, (taken + cluster - 1) / cluster * cluster, kThreads, shared, a.stream, status,
           cluster);
  };
  const bool few = plan.on_chip && plan.slices > 1 && plan.slices <= kMostCluster;
  const int clusters = few ? resident_clusters(kernel, kThreads, shared, plan.slices) : 0;
  if (clusters > 0) {
    launch_on(clusters * plan.slices, true);
    // What the device says that it holds is no promise.
    if (status.ok() || status.lost) return status;
    refuse_clusters(kernel, kThreads, shared, plan.slices);
    status = {};
  }
  launch_on(blocks, false);
  return status;
}

}  // namespace fused_dni::cuda
