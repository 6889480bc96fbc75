// An LSTM over a window: all steps of all layers in one parallel region.
//
// Threads own groups of hidden units (and, if there are more threads than groups, rows of the
// batch). A group's four gates come out of one register tile, so that the cell's elements are done
// where the product ends; between two steps there is one meeting of all threads. A layer's weights
// are packed once a window, each panel by the thread that reads it:
//
//   forward   a step's gates = bias + x W_ih^T + h W_hh^T   panels of a group's rows, transposed
//             then sigmoid, tanh, c and h in registers
//   backward  a step's dh = delta W_hh                      panels of its columns
//             then delta in that tile's wake
//   behind the steps, over the whole window:
//             dx = delta W_ih                               panels of its columns
//             dW_ih = delta^T x, dW_hh = delta^T h          blocks of x and h, as they come
#include "lstm.hpp"

namespace fused_dni::FUSED_DNI_ISA {
namespace {

// ---- Threads -----------------------------------------------------------------------------------

// Where the threads of a team are in a chain of steps. Cheaper than Team::sync for two threads:
// each writes to a line of its own, and a step costs one line's way from core to core.
class Steps {
 public:
  void plan(Scratch& scratch, int threads) { done_ = scratch.take<Done>(threads); }

  // By one thread, before the others are there.
  void clear(int threads) const {
    for (int i = 0; i < threads; ++i) done_[i].count = 0;
  }

  // This thread has done `count` steps.
  void publish(const Team& team, int count) const {
    __atomic_store_n(&done_[team.rank].count, count, __ATOMIC_RELEASE);
  }

  // Returns when all threads have done `count` steps.
  void wait(const Team& team, int count) const {
    for (int i = 0; i < team.size; ++i) team.wait(done_[i].count, count);
  }

 private:
  struct alignas(kLineBytes) Done {
    int count;
  };
  Done* done_ = nullptr;
};

// Steps of so little work are done sooner by one thread than two can meet.
constexpr Index kSharedStep = 32 * 1024;

int window_threads(const LSTMSizes& sizes) {
  const Index step = sizes.batch * kGates * sizes.hidden * sizes.hidden;
  return step < kSharedStep ? 1 : sizes.threads;
}

// What a thread owns: groups of units, and rows of the batch where groups are few.
template <class T>
struct Own {
  Grid grid;
  Range groups, units, rows;

  Own(const Team& team, const LSTMSizes& sizes)
      : grid(team, group_count<T>(sizes.hidden)),
        groups(grid.major_part(group_count<T>(sizes.hidden), 1)),
        units{smaller(groups.begin * kLanes<T>, sizes.hidden),
              smaller(groups.end * kLanes<T>, sizes.hidden)},
        rows(part(sizes.batch, 1, grid.minor, grid.minors)) {}
};

// Whether a row of the batch is past its length at step t; whether t is its last one.
struct Lengths {
  const std::int64_t* lengths;
  Index steps;

  FUSED_DNI_INLINE Index of(Index row) const { return lengths ? lengths[row] : steps; }
  FUSED_DNI_INLINE bool over(Index row, Index t) const { return t >= of(row); }
  FUSED_DNI_INLINE bool ends(Index row, Index t) const { return t == of(row) - 1; }
  bool all_over(Index row, Index count, Index t) const {
    for (Index m = row; m < row + count; ++m)
      if (!over(m, t)) return false;
    return true;
  }
};

template <class T>
FUSED_DNI_INLINE void clear(T* to, Index count) {
  __builtin_memset(to, 0, sizeof(T) * static_cast<std::size_t>(count));
}

// to = a * b, for this thread's part of `count` elements.
template <class T>
void multiply_elements(const Team& team, const T* a, const T* b, Index count, T* to) {
  const Range own = part(count, kLanes<T>, team.rank, team.size);
  for (Index i = own.begin; i < own.end; i += kLanes<T>)
    store_upto(to + i, load_upto(a + i, own.end - i) * load_upto(b + i, own.end - i), own.end - i);
}

// ---- Forward -----------------------------------------------------------------------------------

// From this many sequences on, a step multiplies its own rows of x; with fewer, the rows of
// several steps are multiplied together, in front of them.
constexpr Index kOwnInputRows = 24;
// About as many rows in front of the steps that they are for: what is written there should still be
// in a near cache when it is read.
constexpr Index kAheadRows = 96;

// One layer's pass over the window.
template <class T>
struct ForwardLayer {
  LSTMSizes sizes;
  Index in;  // of this layer
  Lengths lengths;
  const T* x;                      // [T, B, in]
  const T *h, *c;                  // [B, H]
  T* hidden;                       // [T + 1, B, H]
  T* cells;                        // [T + 1, B, H] if gates are kept, else [B, H]
  T* gates;                        // [T, B, 4H] if they are kept, else null
  T *last_h, *last_c;              // [B, H]
  const T *input_panels, *panels;  // [groups][in or H][kGroup]
  const T* bias;                   // [groups][kGroup]
  T* ahead;                        // [steps ahead * B, 4H]: x W_ih^T + bias, or null

  Index size() const { return sizes.batch * sizes.hidden; }

  // x W_ih^T + bias, for rows [first, first + kRows) of the window and group p.
  template <int kRows>
  FUSED_DNI_INLINE void project(Index first, Index p, T* to) const {
    Vec<T> sum[kRows][kGates];
    start(sum, p);
    accumulate<T, kRows, kGates, step_ways(kRows)>(sum, in, x + first * in, in,
                                                   input_panels + p * in * kGroup<T>, kGroup<T>);
    for (int m = 0; m < kRows; ++m)
      store_group(to + m * kGates * sizes.hidden + p * kGroup<T>, group_width<T>(sizes.hidden, p),
                  sum[m]);
  }

  // Step t of rows [first, first + kRows) of the batch and group p; `ready` are their rows of
  // `ahead`.
  template <int kRows>
  FUSED_DNI_INLINE void step(Index t, Index first, Index p, const T* ready) const {
    const Index hidden_size = sizes.hidden, width = group_width<T>(hidden_size, p);
    Vec<T> sum[kRows][kGates];
    if (ready) {
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m)
        load_group(ready + m * kGates * hidden_size + p * kGroup<T>, width, sum[m]);
    } else {
      start(sum, p);
      accumulate<T, kRows, kGates, step_ways(kRows)>(sum, in, x + (t * sizes.batch + first) * in,
                                                     in, input_panels + p * in * kGroup<T>,
                                                     kGroup<T>);
    }
    accumulate<T, kRows, kGates, step_ways(kRows)>(
        sum, hidden_size, hidden + t * size() + first * hidden_size, hidden_size,
        panels + p * hidden_size * kGroup<T>, kGroup<T>);
    const T* before = gates ? cells + t * size() : cells;
    T* after = gates ? cells + (t + 1) * size() : cells;
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const Index at = (first + m) * hidden_size + p * kLanes<T>;
      if (lengths.over(first + m, t)) {
        put_zeros(t, first + m, p);
        continue;
      }
      Vec<T> cell = load_upto(before + at, width), h_now;
      cell_forward<T>(sum[m], cell, h_now);
      store_upto(after + at, cell, width);
      store_upto(hidden + (t + 1) * size() + at, h_now, width);
      if (gates)
        store_group(gates + (t * sizes.batch + first + m) * kGates * hidden_size + p * kGroup<T>,
                    width, sum[m]);
      if (lengths.ends(first + m, t)) {
        store_upto(last_h + at, h_now, width);
        store_upto(last_c + at, cell, width);
      }
    }
  }

  // What a row past its length leaves behind.
  void put_zeros(Index t, Index row, Index p) const {
    const Index width = group_width<T>(sizes.hidden, p);
    const Index at = (t + 1) * size() + row * sizes.hidden + p * kLanes<T>;
    clear(hidden + at, width);
    if (gates == nullptr) return;
    clear(cells + at, width);
    clear(gates + (t * sizes.batch + row) * kGates * sizes.hidden + p * kGroup<T>, kGates * width);
  }

 private:
  template <int kRows>
  FUSED_DNI_INLINE void start(Vec<T> (&sum)[kRows][kGates], Index p) const {
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
      for (int g = 0; g < kGates; ++g) sum[m][g] = load(bias + p * kGroup<T> + g * kLanes<T>);
  }
};

template <class T>
[[gnu::noinline]] void project_tile(const ForwardLayer<T>& layer, Index first, Index rows, Index p,
                                    T* to) {
  with_step_rows(rows,
                 [&](auto count) { layer.template project<decltype(count)::value>(first, p, to); });
}

template <class T>
[[gnu::noinline]] void step_tile(const ForwardLayer<T>& layer, Index t, Index first, Index rows,
                                 Index p, const T* ready) {
  with_step_rows(
      rows, [&](auto count) { layer.template step<decltype(count)::value>(t, first, p, ready); });
}

template <class T>
void forward_window(const Team& team, const Own<T>& own, const ForwardLayer<T>& layer,
                    const Steps& meet, int done) {
  const Index batch = layer.sizes.batch, steps = layer.sizes.steps;
  const Index row_size = kGates * layer.sizes.hidden;
  const Index ahead = layer.ahead ? larger(kAheadRows / batch, 1) : steps;
  for (Index begin = 0; begin < steps; begin += ahead) {
    const Index end = smaller(steps, begin + ahead);
    if (layer.ahead)
      for (Index p = own.groups.begin; p < own.groups.end; ++p)
        for_rows({0, (end - begin) * batch}, kStepRows, [&](Index row, Index take) {
          project_tile(layer, begin * batch + row, take, p, layer.ahead + row * row_size);
        });
    for (Index t = begin; t < end; ++t) {
      meet.wait(team, done + static_cast<int>(t));
      for (Index p = own.groups.begin; p < own.groups.end; ++p)
        for_rows(own.rows, kStepRows, [&](Index row, Index take) {
          if (layer.lengths.all_over(row, take, t)) {
            for (Index m = row; m < row + take; ++m) layer.put_zeros(t, m, p);
            return;
          }
          const T* ready =
              layer.ahead ? layer.ahead + ((t - begin) * batch + row) * row_size : nullptr;
          step_tile(layer, t, row, take, p, ready);
        });
      meet.publish(team, done + static_cast<int>(t) + 1);
    }
  }
}

template <class T>
void lstm_forward(const LSTMForward& a) {
  const LSTMSizes& sizes = a.sizes;
  const Index batch = sizes.batch, steps = sizes.steps, hidden = sizes.hidden, depth = a.depth;
  const Index state = batch * hidden, window = (steps + 1) * state;
  const Index widest = depth > 1 ? larger(sizes.in, hidden) : sizes.in;
  const Index groups = group_count<T>(hidden);
  const int threads = window_threads(sizes);
  // Without gates to be kept, the layers below the last have their hidden states in scratch.
  const bool keep = a.gates != nullptr;
  T *input_panels = nullptr, *panels = nullptr, *bias = nullptr, *ahead = nullptr;
  T *cells = nullptr, *masked = nullptr, *below[2] = {};
  Steps meet;
  allocate([&](Scratch& scratch) {
    input_panels = scratch.take<T>(groups * widest * kGroup<T>);
    panels = scratch.take<T>(groups * hidden * kGroup<T>);
    bias = scratch.take<T>(groups * kGroup<T>);
    ahead = scratch.take<T>(batch < kOwnInputRows ? smaller(larger(kAheadRows / batch, 1), steps) *
                                                        batch * kGates * hidden
                                                  : 0);
    cells = scratch.take<T>(keep ? 0 : state);
    masked = scratch.take<T>(a.dropout ? steps * state : 0);
    for (int i = 0; i < 2; ++i) below[i] = scratch.take<T>(!keep && depth > i + 1 ? window : 0);
    meet.plan(scratch, threads);
  });
  meet.clear(threads);
  const auto hidden_of = [&](Index l) {
    if (keep) return static_cast<T*>(a.hidden) + l * window;
    return l == depth - 1 ? static_cast<T*>(a.hidden) : below[l % 2];
  };
  parallel(threads, [&](const Team& team) {
    const Own<T> own(team, sizes);
    for (Index l = 0; l < depth; ++l) {
      const LSTMLayerArguments& from = a.layers[l];
      ForwardLayer<T> layer{sizes,
                            l == 0 ? sizes.in : hidden,
                            {a.lengths, steps},
                            l == 0 ? static_cast<const T*>(a.x) : hidden_of(l - 1) + state,
                            static_cast<const T*>(a.h) + l * state,
                            static_cast<const T*>(a.c) + l * state,
                            hidden_of(l),
                            keep ? static_cast<T*>(a.cells) + l * window : cells,
                            keep ? static_cast<T*>(a.gates) + l * steps * kGates * state : nullptr,
                            static_cast<T*>(a.last_h) + l * state,
                            static_cast<T*>(a.last_c) + l * state,
                            input_panels,
                            panels,
                            bias,
                            batch < kOwnInputRows && own.grid.minors == 1 ? ahead : nullptr};
      if (l > 0 && a.dropout) {
        multiply_elements(team, layer.x, static_cast<const T*>(a.dropout[l - 1]), steps * state,
                          masked);
        layer.x = masked;
      }
      const Range packs = own.grid.minor < own.grid.minors
                              ? part(own.groups.size(), 1, own.grid.minor, own.grid.minors)
                              : Range{0, 0};
      for (Index p = own.groups.begin + packs.begin; p < own.groups.begin + packs.end; ++p) {
        pack_gates(static_cast<const T*>(from.weight_ih), hidden, layer.in, p,
                   input_panels + p * layer.in * kGroup<T>);
        pack_gates(static_cast<const T*>(from.weight_hh), hidden, hidden, p,
                   panels + p * hidden * kGroup<T>);
        pack_bias(static_cast<const T*>(from.bias_ih), static_cast<const T*>(from.bias_hh), hidden,
                  p, bias + p * kGroup<T>);
      }
      for (Index row = own.rows.begin; row < own.rows.end; ++row) {
        const Index at = row * hidden + own.units.begin;
        const std::size_t bytes = sizeof(T) * static_cast<std::size_t>(own.units.size());
        __builtin_memcpy(layer.hidden + at, layer.h + at, bytes);
        __builtin_memcpy(layer.cells + at, layer.c + at, bytes);
      }
      team.sync();
      forward_window(team, own, layer, meet, static_cast<int>(l * steps));
      if (l + 1 < depth) team.sync();
    }
  });
}

// ---- Backward ----------------------------------------------------------------------------------

// Depth of a block of the products behind the steps, and rows of the window that they keep in a
// near cache meanwhile.
constexpr Index kWindowDepth = 256;
constexpr Index kWindowRows = 192;

// The product's tile for one or two rows, whose four accumulators a row would wait for each other.
template <class T, int kRows, int kVectors>
[[gnu::noinline]] void narrow_tile(Index depth, const T* a, Index a_row, const T* b, T* c) {
  Vec<T> sum[kRows][kVectors] = {};
  accumulate<T, kRows, kVectors, kRows == 1 ? 4 : 2>(sum, depth, a, a_row, b, kPanel<T>);
  for (int m = 0; m < kRows; ++m)
    for (int v = 0; v < kVectors; ++v) store(c + m * kPanel<T> + v * kLanes<T>, sum[m][v]);
}

template <class T, int kRows>
FUSED_DNI_INLINE void narrow_tile_of(Index vectors, Index depth, const T* a, Index a_row,
                                     const T* b, T* c) {
  if constexpr (kTileVectors == 4) {
    if (vectors == 4) return narrow_tile<T, kRows, 4>(depth, a, a_row, b, c);
    if (vectors == 3) return narrow_tile<T, kRows, 3>(depth, a, a_row, b, c);
  }
  if (vectors == 2) return narrow_tile<T, kRows, 2>(depth, a, a_row, b, c);
  narrow_tile<T, kRows, 1>(depth, a, a_row, b, c);
}

// sums[rows][kPanel] = A[rows][depth] times a packed panel, body(row, count) behind each tile.
template <class T, class Body>
FUSED_DNI_INLINE void multiply_panel(Range rows, Index vectors, Index depth, const T* a,
                                     Index a_row, const T* panel, T* sums, Body&& body) {
  if (rows.size() <= 2) {
    if (rows.size() == 1)
      narrow_tile_of<T, 1>(vectors, depth, a + rows.begin * a_row, a_row, panel, sums);
    if (rows.size() == 2)
      narrow_tile_of<T, 2>(vectors, depth, a + rows.begin * a_row, a_row, panel, sums);
    body(rows.begin, rows.size());
    return;
  }
  const TileFunction<T> run = tile_for<T>(vectors);
  const Index block = rows.size() > kTileRows ? block_depth<T>(depth) : depth;
  for (Index k = 0; k < depth; k += block) {
    const Index count = smaller(block, depth - k);
    for_rows(rows, kTileRows, [&](Index row, Index take) {
      run(take, count, a + row * a_row + k, a_row, 1, panel + k * kPanel<T>, kPanel<T>,
          sums + (row - rows.begin) * kPanel<T>, kPanel<T>, T(k > 0 ? 1 : 0), T(1));
      if (k + count == depth) body(row, take);
    });
  }
}

template <class T>
struct BackwardLayer {
  LSTMSizes sizes;
  Lengths lengths;
  const T* grad_output;       // [T, B, H]
  const T *grad_h, *grad_c;   // [B, H], at the final state
  const T *hidden, *cells;    // [T + 1, B, H]
  const T* gates;             // [T, B, 4H]
  T* delta;                   // [T, B, 4H]
  T *grad_first_h, *carried;  // [B, H], at the entrance; the latter is on its way there before

  Index row_size() const { return kGates * sizes.hidden; }

  // delta of step t for rows [first, first + count) and units [unit, unit + width), from what
  // arrives there through the step behind: sums [count][kPanel], null for nothing.
  void step(Index t, Index first, Index count, Index unit, Index width, const T* sums) const {
    const Index size = sizes.batch * sizes.hidden;
    for (Index row = first; row < first + count; ++row)
      for (Index v = 0; v < width; v += kLanes<T>) {
        const Index w = smaller(kLanes<T>, width - v);
        const Index at = row * sizes.hidden + unit + v;
        const Index at_gates = (t * sizes.batch + row) * row_size() + kGates * (unit + v);
        if (lengths.over(row, t)) {
          clear(delta + at_gates, kGates * w);
          continue;
        }
        Vec<T> dh = sums ? load(sums + (row - first) * kPanel<T> + v) : Vec<T>{};
        if (grad_output) dh += load_upto(grad_output + t * size + at, w);
        Vec<T> dc{};
        if (lengths.ends(row, t)) {
          if (grad_h) dh += load_upto(grad_h + at, w);
          if (grad_c) dc = load_upto(grad_c + at, w);
        } else {
          dc = load_upto(carried + at, w);
        }
        Vec<T> group[kGates];
        load_group(gates + at_gates, w, group);
        cell_backward<T>(group, load_upto(cells + t * size + at, w),
                         load_upto(cells + (t + 1) * size + at, w), dh, dc);
        store_group(delta + at_gates, w, group);
        store_upto(carried + at, dc, w);
      }
  }
};

template <class T>
void backward_window(const Team& team, const Own<T>& own, const BackwardLayer<T>& layer, T* panels,
                     T* sums, const Steps& meet, int done) {
  const Index batch = layer.sizes.batch, steps = layer.sizes.steps, hidden = layer.sizes.hidden;
  const Index depth = kGates * hidden;
  for (Index t = steps - 1; t >= -1; --t) {
    const Index before = steps - 1 - t;  // steps done
    meet.wait(team, done + static_cast<int>(before));
    const T* behind = layer.delta + (t + 1) * batch * depth;
    for_packed<T>(own.units, depth, panels, [&](Index col, Index width, Index vectors, T* panel) {
      if (t == steps - 1) {
        layer.step(t, own.rows.begin, own.rows.size(), col, width, nullptr);
        return;
      }
      multiply_panel(own.rows, vectors, depth, behind, depth, panel, sums,
                     [&](Index row, Index count) {
                       const T* found = sums + (row - own.rows.begin) * kPanel<T>;
                       if (t >= 0) {
                         layer.step(t, row, count, col, width, found);
                         return;
                       }
                       for (Index m = 0; m < count; ++m)
                         for (Index v = 0; v < width; v += kLanes<T>)
                           store_upto(layer.grad_first_h + (row + m) * hidden + col + v,
                                      load(found + m * kPanel<T> + v), width - v);
                     });
    });
    meet.publish(team, done + static_cast<int>(before) + 1);
  }
}

// dx [rows][in] = delta W_ih, for this thread's columns (and its part of the rows, where columns
// are few). `panels` as pack_columns makes them, `sums` room for kWindowRows rows of the columns.
template <class T>
void input_gradient(const Team& team, Index rows, Index in, Index hidden, const T* delta,
                    const T* weight, T* panels, T* sums, T* dx) {
  const Index depth = kGates * hidden;
  const Grid grid(team, group_count<T>(in));
  const Range columns = grid.major_part(in, kLanes<T>);
  const Range own = part(rows, 1, grid.minor, grid.minors);
  T* own_panels = panels_of(panels, columns, grid.major, depth);
  if (grid.minor == 0)
    for_packed<T>(columns, depth, own_panels, [&](Index col, Index width, Index, T* panel) {
      pack_columns(weight, hidden, in, col, width, panel);
    });
  if (grid.minors > 1) team.sync();
  for (Index first = own.begin; first < own.end; first += kWindowRows) {
    const Range block{first, smaller(own.end, first + kWindowRows)};
    for (Index k = 0; k < depth; k += kWindowDepth) {
      const Index count = smaller(kWindowDepth, depth - k);
      T* to = sums;
      for_packed<T>(columns, depth, own_panels,
                    [&](Index col, Index width, Index vectors, T* panel) {
                      const TileFunction<T> run = tile_for<T>(vectors);
                      for_rows(block, kTileRows, [&](Index row, Index take) {
                        T* found = to + (row - first) * kPanel<T>;
                        run(take, count, delta + row * depth + k, depth, 1, panel + k * kPanel<T>,
                            kPanel<T>, found, kPanel<T>, T(k > 0 ? 1 : 0), T(1));
                        if (k + count < depth) return;
                        for (Index m = 0; m < take; ++m)
                          for (Index v = 0; v < width; v += kLanes<T>)
                            store_upto(dx + (row + m) * in + col + v,
                                       load(found + m * kPanel<T> + v), width - v);
                      });
                      to += kWindowRows * kPanel<T>;
                    });
    }
  }
}

// dW [4H][in] = delta^T x for the thread's groups, x [rows][in]; rows past their length count as
// zero, whatever x holds there. With `bias` also the sums over delta's rows, twice.
template <class T>
struct WeightGradient {
  Index rows, batch, hidden, in;
  Lengths lengths;
  const T* delta;  // [rows][4H]
  const T* x;
  T* weight;
  T *bias_ih, *bias_hh;

  // Elements of `packed`: a block of x and of one group of delta; and a tile, bias sums.
  static Index scratch(Index in) {
    return kWindowDepth * (panel_count<T>(in, 1) * kPanel<T> + kGroup<T>)+kTileRows * kPanel<T>;
  }

  void run(Range groups, Range columns, T* packed) const {
    T* group = packed + kWindowDepth * panel_count<T>(in, 1) * kPanel<T>;
    T* spare = group + kWindowDepth * kGroup<T>;
    for (Index k = 0; k < rows; k += kWindowDepth) {
      const Index count = smaller(kWindowDepth, rows - k);
      for_packed<T>(columns, kWindowDepth, packed, [&](Index col, Index width, Index, T* panel) {
        pack_rows(k, count, col, width, panel);
      });
      for (Index p = groups.begin; p < groups.end; ++p) {
        pack_group(k, count, p, group);
        for_packed<T>(columns, kWindowDepth, packed,
                      [&](Index col, Index width, Index vectors, T* panel) {
                        const Index units = group_width<T>(hidden, p);
                        for (int g = 0; g < kGates; ++g)
                          for_rows({0, units}, kTileRows, [&](Index u, Index take) {
                            T* to = weight + (g * hidden + p * kLanes<T> + u) * in + col;
                            multiply_tile(take, width, vectors, count, group + g * units + u, panel,
                                          to, spare, k > 0);
                          });
                      });
      }
    }
  }

 private:
  void pack_rows(Index k, Index count, Index col, Index width, T* panel) const {
    if (lengths.lengths == nullptr) {
      pack(x + k * in + col, in, count, width, panel);
      return;
    }
    for (Index r = k; r < k + count; ++r, panel += kPanel<T>)
      if (lengths.over(r % batch, r / batch))
        clear(panel, round_up(width, kLanes<T>));
      else
        pack(x + r * in + col, in, 1, width, panel);
  }

  // Columns of group p of delta, and their sums.
  void pack_group(Index k, Index count, Index p, T* group) const {
    const Index units = group_width<T>(hidden, p);
    const T* from = delta + k * kGates * hidden + p * kGroup<T>;
    Vec<T> sum[kGates] = {};
    for (Index r = 0; r < count; ++r, from += kGates * hidden, group += kGroup<T>) {
      Vec<T> gates[kGates];
      load_group(from, units, gates);
      store_group(group, units, gates);
      for (int g = 0; g < kGates; ++g) sum[g] += gates[g];
    }
    if (bias_ih == nullptr) return;
    for (int g = 0; g < kGates; ++g) {
      const Index at = g * hidden + p * kLanes<T>;
      if (k > 0) sum[g] += load_upto(bias_ih + at, units);
      store_upto(bias_ih + at, sum[g], units);
      store_upto(bias_hh + at, sum[g], units);
    }
  }

  // to [take][width], `in` apart, = or += a tile of the product.
  FUSED_DNI_INLINE void multiply_tile(Index take, Index width, Index vectors, Index count,
                                      const T* a, const T* panel, T* to, T* spare, bool add) const {
    const TileFunction<T> run = tile_for<T>(vectors);
    if (width % kLanes<T> == 0) {
      run(take, count, a, 1, kGroup<T>, panel, kPanel<T>, to, in, T(add ? 1 : 0), T(1));
      return;
    }
    run(take, count, a, 1, kGroup<T>, panel, kPanel<T>, spare, kPanel<T>, T(0), T(1));
    for (Index m = 0; m < take; ++m)
      for (Index v = 0; v < width; v += kLanes<T>) {
        T* at = to + m * in + v;
        Vec<T> sum = load(spare + m * kPanel<T> + v);
        if (add) sum += load_upto(at, width - v);
        store_upto(at, sum, width - v);
      }
  }
};

template <class T>
void lstm_backward(const LSTMBackward& a) {
  const LSTMSizes& sizes = a.sizes;
  const Index batch = sizes.batch, steps = sizes.steps, hidden = sizes.hidden, depth = a.depth;
  const Index state = batch * hidden, window = (steps + 1) * state, rows = steps * batch;
  const Index widest = depth > 1 ? larger(sizes.in, hidden) : sizes.in;
  const int threads = window_threads(sizes);
  T *panels = nullptr, *sums = nullptr, *blocks = nullptr, *masked = nullptr, *between = nullptr;
  Steps meet;
  const Index sums_size = larger(batch, kWindowRows * panel_count<T>(widest, 1)) * kPanel<T>;
  const Index blocks_size = a.gradients ? WeightGradient<T>::scratch(larger(widest, hidden)) : 0;
  allocate([&](Scratch& scratch) {
    panels = scratch.take<T>(panel_count<T>(larger(widest, hidden), threads) * kPanel<T> * kGates *
                             hidden);
    sums = scratch.take<T>(threads * sums_size);
    blocks = scratch.take<T>(threads * blocks_size);
    masked = scratch.take<T>(a.dropout && a.gradients ? steps * state : 0);
    between = scratch.take<T>(depth > 1 ? steps * state : 0);
    meet.plan(scratch, threads);
  });
  meet.clear(threads);
  const auto at = [](const void* from, Index offset) {
    return from ? static_cast<const T*>(from) + offset : nullptr;
  };
  parallel(threads, [&](const Team& team) {
    const Own<T> own(team, sizes);
    T* own_sums = sums + team.rank * sums_size;
    int done = 0;
    for (Index l = depth - 1; l >= 0; --l, done += static_cast<int>(steps + 1)) {
      const LSTMLayerArguments& from = a.layers[l];
      const Index in = l == 0 ? sizes.in : hidden;
      const BackwardLayer<T> layer{sizes,
                                   {a.lengths, steps},
                                   l == depth - 1 ? static_cast<const T*>(a.grad_output) : between,
                                   at(a.grad_last_h, l * state),
                                   at(a.grad_last_c, l * state),
                                   at(a.hidden, l * window),
                                   at(a.cells, l * window),
                                   at(a.gates, l * steps * kGates * state),
                                   static_cast<T*>(a.delta) + l * steps * kGates * state,
                                   static_cast<T*>(a.grad_h) + l * state,
                                   static_cast<T*>(a.grad_c) + l * state};
      const Grid& grid = own.grid;
      T* own_panels = panels_of(panels, own.units, grid.major, kGates * hidden);
      if (grid.minor == 0)  // threads that differ by their rows alone share panels
        for_packed<T>(own.units, kGates * hidden, own_panels,
                      [&](Index col, Index width, Index, T* panel) {
                        pack_columns(static_cast<const T*>(from.weight_hh), hidden, hidden, col,
                                     width, panel);
                      });
      team.sync();
      backward_window(team, own, layer, own_panels, own_sums, meet, done);
      team.sync();
      if (l > 0 || a.grad_x) {
        input_gradient(team, rows, in, hidden, layer.delta, static_cast<const T*>(from.weight_ih),
                       panels, own_sums, l > 0 ? between : static_cast<T*>(a.grad_x));
      }
      if (a.gradients) {
        const LSTMLayerArguments& to = a.gradients[l];
        const T* x = l == 0 ? static_cast<const T*>(a.x) : at(a.hidden, (l - 1) * window + state);
        if (l > 0 && a.dropout) {
          multiply_elements(team, x, static_cast<const T*>(a.dropout[l - 1]), steps * state,
                            masked);
          x = masked;
          team.sync();
        }
        T* packed = blocks + team.rank * blocks_size;
        const auto gradient = [&](Index features, const T* with, void* weight, bool biases) {
          const Range columns = part(features, kLanes<T>, grid.minor, grid.minors);
          const bool first = biases && grid.minor == 0;
          WeightGradient<T>{rows,
                            batch,
                            hidden,
                            features,
                            {a.lengths, steps},
                            layer.delta,
                            with,
                            static_cast<T*>(weight),
                            first ? static_cast<T*>(to.bias_ih) : nullptr,
                            first ? static_cast<T*>(to.bias_hh) : nullptr}
              .run(own.groups, columns, packed);
        };
        gradient(in, x, to.weight_ih, true);
        gradient(hidden, layer.hidden, to.weight_hh, false);
      }
      if (l > 0) {
        team.sync();
        if (a.dropout) {
          multiply_elements(team, between, static_cast<const T*>(a.dropout[l - 1]), steps * state,
                            between);
          team.sync();
        }
      }
    }
  });
}

}  // namespace

void add_lstm(Kernels& kernels) {
  kernels.lstm_forward[0] = lstm_forward<float>;
  kernels.lstm_forward[1] = lstm_forward<double>;
  kernels.lstm_backward[0] = lstm_backward<float>;
  kernels.lstm_backward[1] = lstm_backward<double>;
}

}  // namespace fused_dni::FUSED_DNI_ISA
