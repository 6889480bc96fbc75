// The linear layer on a GPU: forward, synthetic gradient and update in one cooperative launch.
//
// One kernel is all ops. With x [N, I], W [O, I], h [N, O] its phases are (formulas stand in
// fused_dni/backends/reference/linear.py):
//
//   prepare    x               its largest magnitude
//   product    tiles of [N, O] z = x W^T + b and its statistics over the tile
//   normalize  tiles of [N, O] n, h
//   reduce     [N, R]          h U^T of a low-rank synthesizer
//   gradient   tiles of [N, O] the synthetic gradient (or a given one), through the activation
//   delta      tiles of [N, O] the gradient at z, through the normalisation
//   measure    [N, O]          the largest magnitude of a given gradient at z
//   dx         tiles of [N, I] delta W
//   trial      tiles of [O, I] delta^T x, only looked at, where bounds do not show it to be finite
//   weight     tiles of [O, I] delta^T x, and the rule (or the gradient alone)
//
// An op is some of them: a step all but measure, a forward product and normalize, a backward
// gradient to weight without a rule, an update prepare, measure, trial and weight. A barrier of the
// grid stands where a phase reads what other blocks wrote. Where a tile holds all rows (batch
// normalisation) or all features (layer normalisation), product does the work of normalize and
// gradient that of delta, and the barriers between them are gone. With the interface at the
// preactivation the synthetic gradient is the one at z: gradient leaves it as it is, and there is no
// delta.
//
// Sums over tiles are sums of partial sums in a fixed order: the same input gives the same bits on
// a grid of the same size. An update is all or nothing: the largest magnitudes of delta and x are known
// before it. If N times their product is a float32, so is every element of delta^T x; otherwise
// trial looks at all of them.
#pragma once

#include "linear.hpp"
#include "predict.cuh"

namespace fused_dni::cuda {

// ---- What a kernel is compiled for ----------------------------------------------------------------

// Tiles of the products with x and of everything along [N, O] and [N, I]; tiles of [O, I].
// All rows of a small batch, and as few features as a product takes: tiles for many processors.
struct Tall {
  template <class Op>
  using Product = cuda::Product<Op, 128, 16, 64, 8, 1>;
  template <class Op>
  using Weight = cuda::Product<Op, 32, 64, 32, 2, 4>;
};
// A few rows: warps share a tile and divide its depth.
struct Flat {
  template <class Op>
  using Product = cuda::Product<Op, 32, 16, 64, 2, 1, 4>;
  template <class Op>
  using Weight = cuda::Product<Op, 32, 32, 32, 2, 2, 2>;
};
struct Square {
  template <class Op>
  using Product = cuda::Product<Op, 64, 64, 32, 4, 2>;
  template <class Op>
  using Weight = cuda::Product<Op, 64, 64, 32, 4, 2>;
};

// How products are made, forward and backward, x's type, and the type in which products read delta.
template <class Op, class BackOp, class XType, class DeltaType>
struct Precision {
  using X = XType;
  using Delta = DeltaType;
  template <class Shape>
  using Product = typename Shape::template Product<Op>;
  template <class Shape>
  using BackProduct = typename Shape::template Product<BackOp>;
  template <class Shape>
  using Weight = typename Shape::template Weight<BackOp>;
};
using Single = Precision<Fp32, Fp32, float, float>;
using Rounded = Precision<Tf32, Tf32, float, float>;
using Brain = Precision<Bf16, Bf16, bf16, bf16>;
// A gradient of size 1 / N has no room in float16; TF32 has its digits and more range.
using Half = Precision<Fp16, Tf32, fp16, float>;

// The kernel of one precision and shape: C has both.
template <class P, class Shape>
struct Compiled : P {
  using Forward = typename P::template Product<Shape>;
  using Back = typename P::template BackProduct<Shape>;
  using Weight = typename P::template Weight<Shape>;
  using T = TileOf<Forward>;  // also of Back
  using W = TileOf<Weight>;

  static constexpr int largest(int a, int b) { return a > b ? a : b; }
  static constexpr int kShared = largest(largest(shared_bytes<Forward>(), shared_bytes<Back>()),
                                         largest(shared_bytes<Weight>(), sums_bytes<T>())) +
                                 1024;
};

// Whether a tile of M x N holds all that its normalisation's statistics are taken over.
template <class T>
FUSED_DNI_BOTH bool is_whole(const LinearArguments& a) {
  if (a.normalization == kBatchNormalization && a.statistics) return a.rows <= T::M;
  if (a.normalization == kLayerNormalization) return a.outputs <= T::N;
  return true;
}
FUSED_DNI_BOTH bool has_gradient(const LinearArguments& a) {
  return a.synthesizer.source != kNowhere;
}
// Whether that is one at h, to be taken back through activation and normalisation.
FUSED_DNI_BOTH bool goes_back(const LinearArguments& a) {
  return has_gradient(a) && a.interface == kOutput;
}
// Whether something is trained or wanted behind delta.
FUSED_DNI_BOTH bool has_slots(const LinearArguments& a) {
  return a.trainable[0] || a.trainable[1] || a.trainable[2] || a.trainable[3];
}

// Points an op's arguments at their parts of `room`; returns the bytes they take.
template <class C>
std::size_t divide(LinearArguments& a, void* room) {
  using T = typename C::T;
  std::size_t used = 0;
  const auto take = [&](auto*& part, std::size_t count) {
    part =
        reinterpret_cast<std::remove_reference_t<decltype(part)>>(static_cast<char*>(room) + used);
    used += (count * sizeof(*part) + 127) / 128 * 128;
  };
  const std::size_t n = a.rows, o = a.outputs;
  const std::size_t down = ceil_div(a.rows, T::M), across = ceil_div(a.outputs, T::N);
  const bool whole = is_whole<T>(a), batch = a.normalization == kBatchNormalization;
  const bool layer = a.normalization == kLayerNormalization;
  take(a.step, 1);
  if (a.rule != kNoRule) {
    take(a.largest, 3 * kMostBlocks);
    if (a.max_norm > 0.0f) take(a.squares, kMostBlocks);
  }
  if (a.forward && has_gradient(a)) {  // a step
    if (goes_back(a)) {
      if (keeps_input(a)) take(a.normalized, n * o);
      if (a.normalization != kNoNormalization) take(a.rstd, layer ? n : o);
    }
    if (a.synthesizer.source == kLowRank && a.synthesizer.reduced == nullptr)
      take(a.synthesizer.reduced, n * a.synthesizer.rank);
  }
  if (a.forward && !whole) {
    a.z = a.normalized;
    if (a.z == nullptr) take(a.z, n * o);
    take(a.moments, layer ? across * 2 * n : down * 2 * o);
  }
  if (a.forward && batch && a.statistics && a.running_mean != nullptr && has_gradient(a))
    take(a.batch, 2 * o);
  if (has_gradient(a)) {
    const bool affine = a.norm_weight.parameter != nullptr || a.norm_bias.parameter != nullptr;
    if (goes_back(a) && (affine || (batch && !whole))) take(a.columns, down * 2 * o);
    if (a.bias.parameter != nullptr && !(batch && a.statistics)) take(a.shifts, down * o);
    if (goes_back(a) && !whole) {
      take(a.gradient, n * o);
      if (layer) take(a.across, across * 2 * n);
    }
  }
  if (has_gradient(a) || a.rule != kNoRule) {
    typename C::Delta* operand = nullptr;
    if (!kSame<typename C::Delta, float> || a.delta == nullptr) take(operand, n * o);
    if constexpr (kSame<typename C::Delta, float>) {
      if (a.delta == nullptr) a.delta = operand;
      a.operand = a.delta;
    } else {
      a.operand = operand;
    }
  }
  return used;
}

// ---- Forward --------------------------------------------------------------------------------------

FUSED_DNI_DEVICE float or_else(const float* from, int at, bool inside, float absent) {
  return from != nullptr && inside ? from[at] : absent;
}

// Called, not inlined: all activation functions for each of a tile's elements would be much code.
FUSED_DNI_CALLED inline float activated(float y, int activation) { return activate(y, activation); }
FUSED_DNI_CALLED inline float sloped(float y, float h, int activation) {
  return slope(y, h, activation);
}

FUSED_DNI_CALLED inline float rstd_of(float variance, float eps) {
  return 1.0f / sqrtf(variance + eps);
}

// Running statistics of feature o towards the batch's.
FUSED_DNI_CALLED inline void move_running(const LinearArguments& a, int o, float mean,
                                          float variance) {
  const float unbiased =
      variance * (static_cast<float>(a.rows) / (static_cast<float>(a.rows) - 1.0f));
  a.running_mean[o] += a.momentum * (mean - a.running_mean[o]);
  a.running_var[o] += a.momentum * (unbiased - a.running_var[o]);
}

// What follows z in a tile: n, h. `mean` and `variance` are of each element's column (batch) or row
// (layer), and not read without a normalisation.
template <class C>
FUSED_DNI_CALLED void finish(const LinearArguments& a, const Place<typename C::T>& at,
                             const typename C::T& z, const typename C::T& mean,
                             const typename C::T& variance) {
  using T = typename C::T;
  using X = typename C::X;
  const int o = at.c();
  const bool column = at.has_column();
  const bool normalizes = a.normalization != kNoNormalization;
  const bool batch = a.normalization == kBatchNormalization;
  const float scale = or_else(a.norm_weight.parameter, o, column, 1.0f);
  const float shift = or_else(a.norm_bias.parameter, o, column, 0.0f);
  if (batch && at.r(0) == 0 && column) {  // of the tiles that have these columns, the first
    if (a.rstd != nullptr) a.rstd[o] = rstd_of(variance.value[0], a.eps);
    if (a.batch != nullptr) {  // a step moves the running statistics with its update
      a.batch[o] = mean.value[0];
      a.batch[a.outputs + o] = variance.value[0];
    } else if (a.statistics && a.running_mean != nullptr) {
      move_running(a, o, mean.value[0], variance.value[0]);
    }
  }
  FUSED_DNI_BY_FOUR
  for (int i = 0; i < T::kEach; ++i) {
    if (!at.inside(i)) continue;
    float n = z.value[i], y = n;
    if (normalizes) {
      const float rstd = rstd_of(variance.value[i], a.eps);
      n = (n - mean.value[i]) * rstd;
      y = n * scale + shift;
      if (o == 0 && !batch && a.rstd != nullptr) a.rstd[at.r(i)] = rstd;
    }
    if (a.normalized != nullptr) a.normalized[at.at(i)] = n;
    static_cast<X*>(a.h)[at.at(i)] = from_float<X>(activated(y, a.activation));
  }
}

template <class C>
FUSED_DNI_DEVICE void product(const LinearArguments& a, SharedArena arena) {
  using T = typename C::T;
  using X = typename C::X;
  const Operand<X, Lies::kAlong> x{static_cast<const X*>(a.x.data), a.x.stride, a.rows};
  const Operand<float, Lies::kAlong> weight{a.weight.parameter, a.inputs, a.outputs};
  const bool whole = is_whole<T>(a), layer = a.normalization == kLayerNormalization;
  for (int index = block(); index < tiles_of<T>(a.rows, a.outputs); index += blocks()) {
    const auto at = place<T>(index, a.rows, a.outputs);
    T z, mean, variance;
    multiply<typename C::Forward>(z, arena, x, at.row, weight, at.column, a.inputs);
    const bool column = at.has_column();
    const float bias = or_else(a.bias.parameter, at.c(), column, 0.0f);
    float sum = 0.0f;
    FUSED_DNI_BY_FOUR
    for (int i = 0; i < T::kEach; ++i) {
      z.value[i] = at.inside(i) ? z.value[i] + bias : 0.0f;
      sum += z.value[i];
    }
    if (a.normalization == kNoNormalization) {
      finish<C>(a, at, z, z, z);
      continue;
    }
    const bool running = a.normalization == kBatchNormalization && !a.statistics;
    if (running) {
      const float m = or_else(a.running_mean, at.c(), column, 0.0f);
      const float v = or_else(a.running_var, at.c(), column, 1.0f);
      FUSED_DNI_BY_FOUR
      for (int i = 0; i < T::kEach; ++i) mean.value[i] = m, variance.value[i] = v;
      finish<C>(a, at, z, mean, variance);
      continue;
    }
    // Mean and squared deviations of the tile, over rows or over features.
    const int left = layer ? a.outputs - at.column : a.rows - at.row;
    const int size = layer ? T::N : T::M;
    const float count = static_cast<float>(left < size ? left : size);
    T squares;
    if (layer) {
      row_sums(mean, z, arena);
      FUSED_DNI_BY_FOUR
      for (int i = 0; i < T::kEach; ++i) {
        mean.value[i] /= count;
        const float off = at.inside(i) ? z.value[i] - mean.value[i] : 0.0f;
        squares.value[i] = off * off;
      }
      row_sums(variance, squares, arena);
    } else {
      const float m = column_sum<T>(sum, arena) / count;
      float apart = 0.0f;
      FUSED_DNI_BY_FOUR
      for (int i = 0; i < T::kEach; ++i) {
        const float off = at.inside(i) ? z.value[i] - m : 0.0f;
        apart += off * off;
      }
      const float v = column_sum<T>(apart, arena);
      FUSED_DNI_BY_FOUR
      for (int i = 0; i < T::kEach; ++i) mean.value[i] = m, variance.value[i] = v;
    }
    if (whole) {
      FUSED_DNI_BY_FOUR
      for (int i = 0; i < T::kEach; ++i) variance.value[i] /= count;
      finish<C>(a, at, z, mean, variance);
      continue;
    }
    FUSED_DNI_BY_FOUR
    for (int i = 0; i < T::kEach; ++i) {
      if (!at.inside(i)) continue;
      a.z[at.at(i)] = z.value[i];
      const bool first = layer ? T::column() == 0 : T::row(i) == 0;
      if (!first) continue;
      const int length = layer ? a.rows : a.outputs;
      float* left_at = a.moments + (layer ? at.column / T::N : at.row / T::M) * 2LL * length +
                       (layer ? at.r(i) : at.c());
      left_at[0] = mean.value[i];
      left_at[length] = variance.value[i];
    }
  }
}

template <class C>
FUSED_DNI_DEVICE void normalize(const LinearArguments& a, SharedArena arena) {
  using T = typename C::T;
  const bool layer = a.normalization == kLayerNormalization;
  const int lines = layer ? T::M : T::N;
  const Shared<float> means = arena.take<float>(lines), variances = arena.take<float>(lines);
  for (int index = block(); index < tiles_of<T>(a.rows, a.outputs); index += blocks()) {
    const auto at = place<T>(index, a.rows, a.outputs);
    const int first = layer ? at.row : at.column, length = layer ? a.rows : a.outputs;
    block_barrier();
    for (int i = thread(); i < lines && first + i < length; i += kThreads) {
      const Moments m = combine_moments(a.moments + first + i, layer ? a.outputs : a.rows,
                                        layer ? T::N : T::M, length);
      means.store(i, m.mean);
      variances.store(i, m.variance);
    }
    block_barrier();
    T z, mean, variance;
    FUSED_DNI_BY_FOUR
    for (int i = 0; i < T::kEach; ++i) {
      if (!at.inside(i)) continue;
      const int line = layer ? T::row(i) : T::column();
      z.value[i] = a.z[at.at(i)];
      mean.value[i] = means.load(line);
      variance.value[i] = variances.load(line);
    }
    finish<C>(a, at, z, mean, variance);
  }
}

// ---- Gradient -------------------------------------------------------------------------------------

// Leaves delta's tile and its column sums; returns the largest magnitude.
template <class C>
FUSED_DNI_CALLED float leave(const LinearArguments& a, SharedArena arena,
                             const Place<typename C::T>& at, const typename C::T& delta) {
  using T = typename C::T;
  using D = typename C::Delta;
  float largest = 0.0f, sum = 0.0f;
  FUSED_DNI_BY_FOUR
  for (int i = 0; i < T::kEach; ++i) {
    if (!at.inside(i)) continue;
    const float d = delta.value[i];
    if (a.delta != nullptr) a.delta[at.at(i)] = d;
    if constexpr (!kSame<D, float>) static_cast<D*>(a.operand)[at.at(i)] = from_float<D>(d);
    largest = fmaxf(largest, magnitude(d));
    sum += d;
  }
  if (a.shifts == nullptr) return largest;
  sum = column_sum<T>(sum, arena);
  if (T::row(0) == 0 && at.has_column())
    a.shifts[std::int64_t{at.row / T::M} * a.outputs + at.c()] = sum;
  return fmaxf(largest, magnitude(sum));
}

template <class C>
FUSED_DNI_DEVICE void gradient(const LinearArguments& a, SharedArena arena) {
  using T = typename C::T;
  using X = typename C::X;
  const X* all_h = static_cast<const X*>(a.h);
  const bool whole = is_whole<T>(a), layer = a.normalization == kLayerNormalization;
  const bool batch = a.normalization == kBatchNormalization;
  float largest = 0.0f;
  double squares = 0.0;
  const int counted = counted_rows(a.synthesizer, a.rows, arena);
  for (int index = block(); index < tiles_of<T>(a.rows, a.outputs); index += blocks()) {
    const auto at = place<T>(index, a.rows, a.outputs);
    const int o = at.c();
    const bool column = at.has_column();
    T g, gn, gn_n;
    if (a.synthesizer.source == kGiven) {
      FUSED_DNI_BY_FOUR
      for (int i = 0; i < T::kEach; ++i)
        g.value[i] = at.inside(i) ? arrived<X>(a.grad_h, a.grad_wide, at.at(i)) : 0.0f;
    } else {
      predict_tile<typename C::Forward>(g, arena, a.synthesizer, all_h, at, counted);
      FUSED_DNI_BY_FOUR
      for (int i = 0; i < T::kEach; ++i) {
        if (a.scaled != nullptr && at.inside(i)) a.scaled[at.at(i)] = g.value[i];
        g.value[i] *= a.inverse_scale;
      }
    }
    if (a.squares != nullptr) {
      FUSED_DNI_BY_FOUR
      for (int i = 0; i < T::kEach; ++i)
        if (at.inside(i)) squares += static_cast<double>(g.value[i]) * g.value[i];
    }
    if (!goes_back(a)) {
      largest = fmaxf(largest, leave<C>(a, arena, at, g));
      continue;
    }
    // Through the activation and scale.
    const float scale = or_else(a.norm_weight.parameter, o, column, 1.0f);
    const float shift = or_else(a.norm_bias.parameter, o, column, 0.0f);
    float sum = 0.0f, dot = 0.0f;
    T n;
    FUSED_DNI_BY_FOUR
    for (int i = 0; i < T::kEach; ++i) {
      n.value[i] = gn.value[i] = gn_n.value[i] = 0.0f;
      if (!at.inside(i)) continue;
      const float h = to_float(all_h[at.at(i)]);
      float y = h;
      n.value[i] = h;
      if (a.normalized != nullptr) {
        n.value[i] = a.normalized[at.at(i)];
        y = a.normalization == kNoNormalization ? n.value[i] : n.value[i] * scale + shift;
      }
      const float gy = g.value[i] * sloped(y, h, a.activation);
      sum += gy;
      dot += gy * n.value[i];
      gn.value[i] = a.normalization == kNoNormalization ? gy : gy * scale;
      gn_n.value[i] = gn.value[i] * n.value[i];
    }
    const bool sums = a.columns != nullptr || (batch && a.statistics);
    if (sums) {
      sum = column_sum<T>(sum, arena);
      dot = column_sum<T>(dot, arena);
    }
    if (a.columns != nullptr) {
      if (T::row(0) == 0 && column) {
        float* left_at = a.columns + at.row / T::M * 2LL * a.outputs + o;
        left_at[0] = sum;
        left_at[a.outputs] = dot;
      }
      largest = fmaxf(largest, fmaxf(magnitude(sum), magnitude(dot)));
    }
    // Through the normalisation, or as far as this tile knows.
    T along, across;
    if (layer) {
      row_sums(along, gn, arena);
      row_sums(across, gn_n, arena);
    }
    if (!whole) {
      FUSED_DNI_BY_FOUR
      for (int i = 0; i < T::kEach; ++i) {
        if (!at.inside(i)) continue;
        a.gradient[at.at(i)] = gn.value[i];
        if (!layer || T::column() != 0) continue;
        float* left_at = a.across + at.column / T::N * 2LL * a.rows + at.r(i);
        left_at[0] = along.value[i];
        left_at[a.rows] = across.value[i];
      }
      continue;
    }
    FUSED_DNI_BY_FOUR
    for (int i = 0; i < T::kEach; ++i) {
      if (!at.inside(i)) continue;
      if (layer) {
        gn.value[i] = (gn.value[i] - along.value[i] / a.outputs -
                       n.value[i] * (across.value[i] / a.outputs)) *
                      a.rstd[at.r(i)];
      } else if (batch) {
        if (a.statistics) gn.value[i] -= sum * scale / a.rows + n.value[i] * (dot * scale / a.rows);
        gn.value[i] *= a.rstd[o];
      }
    }
    largest = fmaxf(largest, leave<C>(a, arena, at, gn));
  }
  if (a.largest != nullptr) leave_largest(a.largest + kMostBlocks, largest, arena);
  if (a.squares != nullptr) {
    squares = block_sum(squares, arena);
    if (thread() == 0) a.squares[block()] = squares;
  }
}

template <class C>
FUSED_DNI_DEVICE void delta(const LinearArguments& a, SharedArena arena) {
  using T = typename C::T;
  const bool layer = a.normalization == kLayerNormalization;
  const int lines = layer ? T::M : T::N, count = layer ? a.outputs : a.rows;
  const int length = layer ? a.rows : a.outputs, parts = ceil_div(count, layer ? T::N : T::M);
  const float* from = layer ? a.across : a.columns;
  const SharedArena inner = arena;
  const Shared<float> along = arena.take<float>(lines), across = arena.take<float>(lines);
  float largest = 0.0f;
  for (int index = block(); index < tiles_of<T>(a.rows, a.outputs); index += blocks()) {
    const auto at = place<T>(index, a.rows, a.outputs);
    const int first = layer ? at.row : at.column;
    block_barrier();
    for (int i = thread(); i < lines && first + i < length; i += kThreads) {
      const float scale = layer ? 1.0f : or_else(a.norm_weight.parameter, first + i, true, 1.0f);
      along.store(i, sum_list(from + first + i, parts, 2LL * length) * scale / count);
      across.store(i, sum_list(from + length + first + i, parts, 2LL * length) * scale / count);
    }
    block_barrier();
    T made;
    FUSED_DNI_BY_FOUR
    for (int i = 0; i < T::kEach; ++i) {
      if (!at.inside(i)) continue;
      const int line = layer ? T::row(i) : T::column();
      made.value[i] =
          (a.gradient[at.at(i)] - along.load(line) - a.normalized[at.at(i)] * across.load(line)) *
          a.rstd[first + line];
    }
    largest = fmaxf(largest, leave<C>(a, inner, at, made));
  }
  if (a.largest == nullptr) return;
  // What gradient left there was of this block too.
  float* mine = a.largest + kMostBlocks + block();
  leave_largest(a.largest + kMostBlocks, fmaxf(largest, *mine), arena);
}

// What gradient and delta find out on their way, of a gradient at z that is given.
template <class C>
FUSED_DNI_DEVICE void measure(const LinearArguments& a, SharedArena arena) {
  using D = typename C::Delta;
  const std::int64_t count = std::int64_t{a.rows} * a.outputs;
  const int all = blocks() * kThreads, me = block() * kThreads + thread();
  float largest = 0.0f;
  for (std::int64_t i = me; i < count; i += all) {
    largest = fmaxf(largest, magnitude(a.delta[i]));
    if constexpr (!kSame<D, float>) static_cast<D*>(a.operand)[i] = from_float<D>(a.delta[i]);
  }
  const float* given[] = {a.given_bias, a.given_norm_weight, a.given_norm_bias};
  FUSED_DNI_UNROLL
  for (int v = 0; v < 3; ++v)
    if (given[v] != nullptr && a.trainable[v + 1])
      for (int o = me; o < a.outputs; o += all) largest = fmaxf(largest, magnitude(given[v][o]));
  leave_largest(a.largest + kMostBlocks, largest, arena);
}

// ---- Products with the gradient -------------------------------------------------------------------

// The factor that brings the synthetic gradient to its largest norm.
FUSED_DNI_DEVICE float clipping(const LinearArguments& a, SharedArena arena) {
  if (a.squares == nullptr) return 1.0f;
  const double norm = sqrt(sum_left(a.squares, blocks(), arena));
  return norm > a.max_norm ? static_cast<float>(a.max_norm / norm) : 1.0f;
}

template <class C>
FUSED_DNI_DEVICE void dx(const LinearArguments& a, SharedArena arena) {
  using T = typename C::T;
  using X = typename C::X;
  const Operand<typename C::Delta, Lies::kAlong> delta{
      static_cast<const typename C::Delta*>(a.operand), a.outputs, a.rows};
  const Operand<float, Lies::kAcross> weight{a.weight.parameter, a.inputs, a.inputs};
  const float factor = clipping(a, arena);
  for (int index = block(); index < tiles_of<T>(a.rows, a.inputs); index += blocks()) {
    const auto at = place<T>(index, a.rows, a.inputs);
    T made;
    multiply<typename C::Back>(made, arena, delta, at.row, weight, at.column, a.outputs);
    FUSED_DNI_BY_FOUR
    for (int i = 0; i < T::kEach; ++i)
      if (at.inside(i)) static_cast<X*>(a.dx)[at.at(i)] = from_float<X>(made.value[i] * factor);
  }
}

// Gradients of bias, scale and shift: from partial sums, or as they were given. The bias's is
// exactly zero in front of a batch's own statistics.
template <class C>
FUSED_DNI_CALLED void vector_gradients(const LinearArguments& a, int o, float (&g)[3]) {
  const int parts = ceil_div(a.rows, C::T::M);
  g[0] = a.shifts != nullptr ? sum_list(a.shifts + o, parts, a.outputs)
                             : or_else(a.given_bias, o, true, 0.0f);
  if (a.columns != nullptr) {
    g[1] = sum_list(a.columns + a.outputs + o, parts, 2LL * a.outputs);
    g[2] = sum_list(a.columns + o, parts, 2LL * a.outputs);
  } else {
    g[1] = or_else(a.given_norm_weight, o, true, 0.0f);
    g[2] = or_else(a.given_norm_bias, o, true, 0.0f);
  }
}

// Every slot's gradient, times `factor`: applied or stored, and the running statistics move along;
// or (`look`) only looked at: returns the largest magnitude.
template <class C>
FUSED_DNI_CALLED float slots(const LinearArguments& a, SharedArena arena, const RuleFactors& f,
                             float factor, bool look) {
  using W = typename C::W;
  using D = typename C::Delta;
  using X = typename C::X;
  float largest = 0.0f;
  if (a.trainable[0]) {
    const Operand<D, Lies::kAcross> delta{static_cast<const D*>(a.operand), a.outputs, a.outputs};
    const Operand<X, Lies::kAcross> x{static_cast<const X*>(a.x.data), a.x.stride, a.inputs};
    for (int index = block(); index < tiles_of<W>(a.outputs, a.inputs); index += blocks()) {
      const auto at = place<W>(index, a.outputs, a.inputs);
      W g;
      multiply<typename C::Weight>(g, arena, delta, at.row, x, at.column, a.rows);
      FUSED_DNI_BY_FOUR
      for (int i = 0; i < W::kEach; ++i) {
        if (!at.inside(i)) continue;
        if (look)
          largest = fmaxf(largest, magnitude(g.value[i]));
        else
          settle(a.weight, at.at(i), g.value[i] * factor, f);
      }
    }
  }
  // From the other end: the first blocks may have a tile of W more than the last.
  for (int o = (blocks() - 1 - block()) * kThreads + thread(); o < a.outputs;
       o += blocks() * kThreads) {
    float g[3];
    vector_gradients<C>(a, o, g);
    if (look) {
      for (int v = 0; v < 3; ++v)
        if (a.trainable[v + 1]) largest = fmaxf(largest, magnitude(g[v]));
      continue;
    }
    const Slot* vectors[] = {&a.bias, &a.norm_weight, &a.norm_bias};
    FUSED_DNI_ONE_BY_ONE
    for (int v = 0; v < 3; ++v)
      if (a.trainable[v + 1]) settle(*vectors[v], o, g[v] * factor, f);
    if (a.batch != nullptr) move_running(a, o, a.batch[o], a.batch[a.outputs + o]);
  }
  return largest;
}

// What is known of an update's finiteness before it is made.
struct Outlook {
  bool finite;   // all that goes into it is
  bool bounded;  // so are, by their bounds, the sums that come out
};
FUSED_DNI_DEVICE Outlook outlook(const LinearArguments& a, SharedArena arena) {
  const float delta = largest_left(a.largest + kMostBlocks, blocks(), arena);
  Outlook seen{delta < INFINITY, false};
  float largest = delta;
  if (a.trainable[0]) {
    const float x = largest_left(a.largest, blocks(), arena);
    seen.finite = seen.finite && x < INFINITY;
    largest = fmaxf(delta, delta * x);
  }
  seen.bounded = largest * a.rows < kLargest;
  return seen;
}

template <class C>
FUSED_DNI_DEVICE void update(const LinearArguments& a, SharedArena arena) {
  const Outlook seen = outlook(a, arena);
  bool finite = seen.finite;
  if (finite && !seen.bounded) {  // the same for all blocks
    leave_largest(a.largest + 2 * kMostBlocks, slots<C>(a, arena, no_rule(), 1.0f, true), arena);
    grid_barrier(a.barrier, Phase::kUpdate);
    finite = largest_left(a.largest + 2 * kMostBlocks, blocks(), arena) < INFINITY;
  }
  const double step = *a.step + 1.0;
  if (finite) {
    const RuleFactors f = rule_factors(a.hyper, step, a.rule, a.nesterov);
    slots<C>(a, arena, f, clipping(a, arena), false);
  }
  if (block() == 0 && thread() == 0) {
    if (finite)
      a.hyper[kStep] = step;
    else
      a.hyper[kSkipped] += 1.0;
  }
}

// ---- The kernel -----------------------------------------------------------------------------------

template <class C>
FUSED_DNI_KERNEL(kThreads)
linear_kernel(FUSED_DNI_ARGUMENT LinearArguments a) {
  using X = typename C::X;
  const SharedArena arena;
  const bool ruled = a.rule != kNoRule, whole = is_whole<typename C::T>(a);
  const bool graded = has_gradient(a);
  if (ruled) {
    float largest = 0.0f;
    if (a.trainable[0])
      largest = look_at(static_cast<const X*>(a.x.data), a.x.stride, a.rows, a.inputs);
    leave_largest(a.largest, largest, arena);
    if (block() == 0 && thread() == 0) *a.step = a.hyper[kStep];
  }
  if (a.forward) {
    product<C>(a, arena);
    if (!whole) {
      grid_barrier(a.barrier, Phase::kNormalize);
      normalize<C>(a, arena);
    }
  }
  if (a.synthesizer.source == kLowRank) {
    grid_barrier(a.barrier, Phase::kReduce);
    reduce(a.synthesizer, static_cast<const X*>(a.h), a.rows, a.outputs);
  }
  if (graded) {
    // With a diagonal synthesizer each thread reads what it wrote itself, and rstd, which others of
    // its block wrote, behind the barriers of a sum.
    if (a.forward && a.synthesizer.source != kDiagonal) grid_barrier(a.barrier, Phase::kGradient);
    gradient<C>(a, arena);
    if (goes_back(a) && !whole) {
      grid_barrier(a.barrier, Phase::kDelta);
      delta<C>(a, arena);
    }
  } else if (ruled) {
    measure<C>(a, arena);
  }
  if (!ruled && a.dx == nullptr && !has_slots(a)) return;
  grid_barrier(a.barrier, a.dx != nullptr ? Phase::kDx : Phase::kWeight);
  if (a.dx != nullptr) {
    dx<C>(a, arena);
    if (ruled) grid_barrier(a.barrier, Phase::kWeight);  // dx is of the weights before the update
  }
  if (ruled)
    update<C>(a, arena);
  else if (has_slots(a))
    slots<C>(a, arena, no_rule(), 1.0f, false);
}

// ---- Launching ------------------------------------------------------------------------------------

template <class C>
Status launch_linear(const LinearLaunch& given) {
  using T = typename C::T;
  LinearArguments a = given.arguments;
  divide<C>(a, given.room);
  int tiles = 1;
  const auto want = [&](int count) { tiles = count > tiles ? count : tiles; };
  want(tiles_of<T>(a.rows, a.outputs));
  if (a.dx != nullptr) want(tiles_of<T>(a.rows, a.inputs));
  if (a.trainable[0]) want(tiles_of<typename C::W>(a.outputs, a.inputs));
  Status status;
  int grid = resident_blocks(linear_kernel<C>, kThreads, C::kShared, status);
  if (!status.ok()) return status;
  grid = grid < kMostBlocks ? grid : kMostBlocks;
  launch(linear_kernel<C>, a, tiles < grid ? tiles : grid, kThreads, C::kShared, given.stream,
         status);
  return status;
}

// One precision's kernels, instantiated in a file of its own: linear_*.cu.
struct LinearKernels {
  std::size_t (*workspace)(LinearArguments& arguments, void* room);
  Status (*launch)(const LinearLaunch& launch);
};
template <class P, class Shape>
constexpr LinearKernels kernels_of() {
  return {divide<Compiled<P, Shape>>, launch_linear<Compiled<P, Shape>>};
}
// By shape: Tall, Flat, Square.
template <class P>
LinearKernels linear_kernels(int shape) {
  constexpr LinearKernels table[] = {kernels_of<P, Tall>(), kernels_of<P, Flat>(),
                                     kernels_of<P, Square>()};
  return table[shape];
}

LinearKernels linear_single(int shape);
LinearKernels linear_rounded(int shape);
LinearKernels linear_brain(int shape);
LinearKernels linear_half(int shape);

}  // namespace fused_dni::cuda
