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
using InFp32 = Precision<Fp32, Fp32, float, float>;
using InTf32 = Precision<Tf32, Tf32, float, float>;
using InBf16 = Precision<Bf16, Bf16, bf16, bf16>;
// A gradient of size 1 / N has no room in float16; TF32 has its digits and more range.
using InFp16 = Precision<Fp16, Tf32, fp16, float>;

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

FUSED_DNI_DEVICE float rstd_of(float variance, float eps) { return 1.0f / sqrtf(variance + eps); }

// Running statistics of feature o towards the batch's.
FUSED_DNI_DEVICE void move_running(const LinearArguments& a, int o, float mean, float variance) {
  const float unbiased =
      variance * (static_cast<float>(a.rows) / (static_cast<float>(a.rows) - 1.0f));
  a.running_mean[o] += a.momentum * (mean - a.running_mean[o]);
  a.running_var[o] += a.momentum * (unbiased - a.running_var[o]);
}

// What follows z in a tile: n, h. `mean` and `rstd` are of each element's column (batch) or row
// (layer), and not read without a normalisation; `variance` is the column's.
template <class C>
FUSED_DNI_DEVICE void finish(const LinearArguments& a, const Place<typename C::T>& at,
                             const typename C::T& z, const typename C::T& mean,
                             const typename C::T& rstd, float variance) {
  using T = typename C::T;
  using X = typename C::X;
  const int o = at.c();
  const bool column = at.has_column();
  const bool normalizes = a.normalization != kNoNormalization;
  const bool batch = a.normalization == kBatchNormalization;
  const float scale = or_else(a.norm_weight.parameter, o, column, 1.0f);
  const float shift = or_else(a.norm_bias.parameter, o, column, 0.0f);
  if (batch && at.r(0) == 0 && column) {  // of the tiles that have these columns, the first
    if (a.rstd != nullptr) a.rstd[o] = rstd.value[0];
    if (a.batch != nullptr) {  // a step moves the running statistics with its update
      a.batch[o] = mean.value[0];
      a.batch[a.outputs + o] = variance;
    } else if (a.statistics && a.running_mean != nullptr) {
      move_running(a, o, mean.value[0], variance);
    }
  }
  T n;
#pragma unroll
  for (int i = 0; i < T::kEach; ++i)
    n.value[i] = normalizes ? (z.value[i] - mean.value[i]) * rstd.value[i] : z.value[i];
  in_turn(
      [&](int i, float normal) {
        if (!at.inside(i)) return;
        if (a.normalized != nullptr) a.normalized[at.at(i)] = normal;
        const float y = normalizes ? normal * scale + shift : normal;
        static_cast<X*>(a.h)[at.at(i)] = from_float<X>(activate(y, a.activation));
      },
      n.value);
  if (normalizes && !batch && o == 0 && a.rstd != nullptr) {
#pragma unroll
    for (int i = 0; i < T::kEach; ++i)
      if (at.inside(i)) a.rstd[at.r(i)] = rstd.value[i];
  }
}

// A tile of z and its statistics: what `finish` takes, if the tile is whole; left for normalize to
// read otherwise.
template <class C>
FUSED_DNI_DEVICE void product(const LinearArguments& a, SharedArena arena,
                              const Place<typename C::T>& at, typename C::T& z, typename C::T& mean,
                              typename C::T& spread, float& v) {
  using T = typename C::T;
  using X = typename C::X;
  const Operand<X, Lies::kAlong> x{static_cast<const X*>(a.x.data), a.x.stride, a.rows};
  const Operand<float, Lies::kAlong> weight{a.weight.parameter, a.inputs, a.outputs};
  const bool whole = is_whole<T>(a), layer = a.normalization == kLayerNormalization;
  const bool batch = a.normalization == kBatchNormalization, running = batch && !a.statistics;
  multiply<typename C::Forward>(z, arena, x, at.row, weight, at.column, a.inputs);
  const bool column = at.has_column();
  const float bias = or_else(a.bias.parameter, at.c(), column, 0.0f);
#pragma unroll
  for (int i = 0; i < T::kEach; ++i) z.value[i] = at.inside(i) ? z.value[i] + bias : 0.0f;
  // Mean and squared deviations of the tile, over rows or over features; of one that is whole, 1
  // over the standard deviation.
  const int left = layer ? a.outputs - at.column : a.rows - at.row;
  const int size = layer ? T::N : T::M;
  const float count = static_cast<float>(left < size ? left : size);
  float m = 0.0f;  // like v of the column
  if (running) {
    m = or_else(a.running_mean, at.c(), column, 0.0f);
    v = or_else(a.running_var, at.c(), column, 1.0f);
  } else if (a.normalization != kNoNormalization) {
#pragma unroll 1
    for (int moment = 0; moment < 2; ++moment) {
      const float divisor = moment == 0 || whole ? count : 1.0f;
      T of;
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < T::kEach; ++i) {
        const float off = at.inside(i) ? z.value[i] - (layer ? mean.value[i] : m) : 0.0f;
        of.value[i] = moment == 0 ? off : off * off;
        sum += of.value[i];
      }
      if (layer) {
        row_sums(of, arena, [&](float all) {
          all /= divisor;
          return moment == 0 || !whole ? all : rstd_of(all, a.eps);
        });
        (moment == 0 ? mean : spread) = of;
      } else {
        sum = column_sum<T>(sum, arena) / divisor;
        (moment == 0 ? m : v) = sum;
      }
    }
  }
  if (batch) {
    const float of = whole ? rstd_of(v, a.eps) : v;
#pragma unroll
    for (int i = 0; i < T::kEach; ++i) mean.value[i] = m, spread.value[i] = of;
  }
  if (whole) return;
#pragma unroll
  for (int i = 0; i < T::kEach; ++i) {
    if (!at.inside(i)) continue;
    a.z[at.at(i)] = z.value[i];
    const bool first = layer ? T::column() == 0 : T::row(i) == 0;
    if (!first) continue;
    const int length = layer ? a.rows : a.outputs;
    float* left_at = a.moments + (layer ? at.column / T::N : at.row / T::M) * 2LL * length +
                     (layer ? at.r(i) : at.c());
    left_at[0] = mean.value[i];
    left_at[length] = spread.value[i];
  }
}

// The tile as product left it, with the statistics of all of them.
template <class C>
FUSED_DNI_DEVICE void normalize(const LinearArguments& a, SharedArena arena,
                                const Place<typename C::T>& at, typename C::T& z,
                                typename C::T& mean, typename C::T& rstd, float& variance) {
  using T = typename C::T;
  const bool layer = a.normalization == kLayerNormalization;
  const int lines = layer ? T::M : T::N;
  const Shared<float> means = arena.take<float>(lines), variances = arena.take<float>(lines);
  const Shared<float> rstds = arena.take<float>(lines);
  const int first = layer ? at.row : at.column, length = layer ? a.rows : a.outputs;
  block_barrier();
  for (int i = thread(); i < lines && first + i < length; i += kThreads) {
    const Moments m = combine_moments(a.moments + first + i, layer ? a.outputs : a.rows,
                                      layer ? T::N : T::M, length);
    means.store(i, m.mean);
    variances.store(i, m.variance);
    rstds.store(i, rstd_of(m.variance, a.eps));
  }
  block_barrier();
#pragma unroll
  for (int i = 0; i < T::kEach; ++i) {
    if (!at.inside(i)) continue;
    const int line = layer ? T::row(i) : T::column();
    z.value[i] = a.z[at.at(i)];
    mean.value[i] = means.load(line);
    rstd.value[i] = rstds.load(line);
  }
  if (!layer && at.has_column()) variance = variances.load(T::column());
}

// product and, where tiles are not whole, normalize, with h behind the one or the other.
template <class C>
FUSED_DNI_DEVICE void forward(const LinearArguments& a, SharedArena arena) {
  using T = typename C::T;
  const bool whole = is_whole<T>(a);
#pragma unroll 1
  for (int pass = 0; pass < (whole ? 1 : 2); ++pass) {
    if (pass == 1) grid_barrier(a.barrier, Phase::kNormalize);
    for (int index = block(); index < tiles_of<T>(a.rows, a.outputs); index += blocks()) {
      const auto at = place<T>(index, a.rows, a.outputs);
      T z, mean, rstd;
      float variance = 1.0f;
      if (pass == 1)
        normalize<C>(a, arena, at, z, mean, rstd, variance);
      else
        product<C>(a, arena, at, z, mean, rstd, variance);
      if (whole || pass == 1) finish<C>(a, at, z, mean, rstd, variance);
    }
  }
}

// ---- Gradient -------------------------------------------------------------------------------------

// Leaves delta's tile and its column sums; returns the largest magnitude.
template <class C>
FUSED_DNI_DEVICE float leave(const LinearArguments& a, SharedArena arena,
                             const Place<typename C::T>& at, const typename C::T& delta) {
  using T = typename C::T;
  using D = typename C::Delta;
  float largest = 0.0f, sum = 0.0f;
#pragma unroll
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

// Returns the largest magnitude of the gradient at z and its sums, if it comes to that here.
template <class C>
FUSED_DNI_DEVICE float gradient(const LinearArguments& a, SharedArena arena) {
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
    T g;
    if (a.synthesizer.source == kGiven && a.grad_wide) {
#pragma unroll
      for (int i = 0; i < T::kEach; ++i)
        if (at.inside(i)) g.value[i] = static_cast<const float*>(a.grad_h)[at.at(i)];
    } else if (a.synthesizer.source == kGiven) {
#pragma unroll
      for (int i = 0; i < T::kEach; ++i)
        if (at.inside(i)) g.value[i] = to_float(static_cast<const X*>(a.grad_h)[at.at(i)]);
    } else {
      predict_tile<typename C::Forward>(g, arena, a.synthesizer, all_h, at, counted);
#pragma unroll
      for (int i = 0; i < T::kEach; ++i) {
        if (a.scaled != nullptr && at.inside(i)) a.scaled[at.at(i)] = g.value[i];
        g.value[i] *= a.inverse_scale;
      }
    }
    if (a.squares != nullptr) {
#pragma unroll
      for (int i = 0; i < T::kEach; ++i)
        if (at.inside(i)) squares += static_cast<double>(g.value[i]) * g.value[i];
    }
    if (goes_back(a)) {
      // Through the activation and scale.
      const float scale = or_else(a.norm_weight.parameter, o, column, 1.0f);
      const float shift = or_else(a.norm_bias.parameter, o, column, 0.0f);
      T n, y, h, along, across;
#pragma unroll
      for (int i = 0; i < T::kEach; ++i) {
        if (!at.inside(i)) continue;
        h.value[i] = to_float(all_h[at.at(i)]);
        n.value[i] = y.value[i] = h.value[i];
        if (a.normalized == nullptr) continue;
        n.value[i] = a.normalized[at.at(i)];
        y.value[i] = a.normalization == kNoNormalization ? n.value[i] : n.value[i] * scale + shift;
      }
      in_turn([&](int, float of, float& output) { output = slope(of, output, a.activation); },
              y.value, h.value);
      float sum = 0.0f, dot = 0.0f;
#pragma unroll
      for (int i = 0; i < T::kEach; ++i) {
        const float gy = at.inside(i) ? g.value[i] * h.value[i] : 0.0f;
        sum += gy;
        dot += gy * n.value[i];
        g.value[i] = a.normalization == kNoNormalization ? gy : gy * scale;
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
      if (layer) {
        const float divisor = whole ? static_cast<float>(a.outputs) : 1.0f;
#pragma unroll 1
        for (int part = 0; part < 2; ++part) {
          T of;
#pragma unroll
          for (int i = 0; i < T::kEach; ++i)
            of.value[i] = part == 0 ? g.value[i] : g.value[i] * n.value[i];
          row_sums(of, arena, [&](float all) { return all / divisor; });
          (part == 0 ? along : across) = of;
        }
      }
      if (!whole) {
#pragma unroll
        for (int i = 0; i < T::kEach; ++i) {
          if (!at.inside(i)) continue;
          a.gradient[at.at(i)] = g.value[i];
          if (!layer || T::column() != 0) continue;
          float* left_at = a.across + at.column / T::N * 2LL * a.rows + at.r(i);
          left_at[0] = along.value[i];
          left_at[a.rows] = across.value[i];
        }
        continue;
      }
      if (layer) {
#pragma unroll
        for (int i = 0; i < T::kEach; ++i)
          if (at.inside(i))
            g.value[i] =
                (g.value[i] - along.value[i] - n.value[i] * across.value[i]) * a.rstd[at.r(i)];
      } else if (batch && column) {
        const float mean = sum * scale / a.rows, slant = dot * scale / a.rows;
        const float rstd = a.rstd[o];
#pragma unroll
        for (int i = 0; i < T::kEach; ++i) {
          if (a.statistics) g.value[i] -= mean + n.value[i] * slant;
          g.value[i] *= rstd;
        }
      }
    }
    largest = fmaxf(largest, leave<C>(a, arena, at, g));
  }
  if (a.squares != nullptr) {
    squares = block_sum(squares, arena);
    if (thread() == 0) a.squares[block()] = squares;
  }
  return largest;
}

template <class C>
FUSED_DNI_DEVICE float delta(const LinearArguments& a, SharedArena arena) {
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
#pragma unroll 1
      for (int part = 0; part < 2; ++part) {
        const float sum = sum_list(from + part * length + first + i, parts, 2LL * length);
        (part == 0 ? along : across).store(i, sum * scale / count);
      }
    }
    block_barrier();
    T made;
#pragma unroll
    for (int i = 0; i < T::kEach; ++i) {
      if (!at.inside(i)) continue;
      const int line = layer ? T::row(i) : T::column();
      made.value[i] =
          (a.gradient[at.at(i)] - along.load(line) - a.normalized[at.at(i)] * across.load(line)) *
          a.rstd[first + line];
    }
    largest = fmaxf(largest, leave<C>(a, inner, at, made));
  }
  return largest;
}

// What gradient and delta find out on their way, of a gradient at z that is given.
template <class C>
FUSED_DNI_DEVICE float measure(const LinearArguments& a) {
  using D = typename C::Delta;
  const std::int64_t count = std::int64_t{a.rows} * a.outputs;
  const int all = blocks() * kThreads, me = block() * kThreads + thread();
  float largest = 0.0f;
  for (std::int64_t i = me; i < count; i += all) {
    largest = fmaxf(largest, magnitude(a.delta[i]));
    if constexpr (!kSame<D, float>) static_cast<D*>(a.operand)[i] = from_float<D>(a.delta[i]);
  }
  const float* given[] = {a.given_bias, a.given_norm_weight, a.given_norm_bias};
#pragma unroll
  for (int v = 0; v < 3; ++v)
    if (given[v] != nullptr && a.trainable[v + 1])
      for (int o = me; o < a.outputs; o += all) largest = fmaxf(largest, magnitude(given[v][o]));
  return largest;
}

// ---- Products with the gradient -------------------------------------------------------------------

// The factor that brings the synthetic gradient to its largest norm.
FUSED_DNI_DEVICE float clipping(const LinearArguments& a, SharedArena arena) {
  if (a.squares == nullptr) return 1.0f;
  const double norm = sqrt(sum_left(a.squares, blocks(), arena));
  return norm > a.max_norm ? static_cast<float>(a.max_norm / norm) : 1.0f;
}

template <class C>
FUSED_DNI_DEVICE void dx(const LinearArguments& a, SharedArena arena, float factor) {
  using T = typename C::T;
  using X = typename C::X;
  const Operand<typename C::Delta, Lies::kAlong> delta{
      static_cast<const typename C::Delta*>(a.operand), a.outputs, a.rows};
  const Operand<float, Lies::kAcross> weight{a.weight.parameter, a.inputs, a.inputs};
  for (int index = block(); index < tiles_of<T>(a.rows, a.inputs); index += blocks()) {
    const auto at = place<T>(index, a.rows, a.inputs);
    T made;
    multiply<typename C::Back>(made, arena, delta, at.row, weight, at.column, a.outputs);
#pragma unroll
    for (int i = 0; i < T::kEach; ++i)
      if (at.inside(i)) static_cast<X*>(a.dx)[at.at(i)] = from_float<X>(made.value[i] * factor);
  }
}

// The gradient of bias (v = 0), scale or shift: from partial sums, or as it was given. The bias's is
// exactly zero in front of a batch's own statistics.
template <class C>
FUSED_DNI_DEVICE float vector_gradient(const LinearArguments& a, int v, int o) {
  const float* sums = v == 0                 ? a.shifts
                      : a.columns == nullptr ? nullptr
                                             : a.columns + (v == 1 ? a.outputs : 0);
  if (sums != nullptr)
    return sum_list(sums + o, ceil_div(a.rows, C::T::M), (v == 0 ? 1LL : 2LL) * a.outputs);
  return or_else(v == 0   ? a.given_bias
                 : v == 1 ? a.given_norm_weight
                          : a.given_norm_bias,
                 o, true, 0.0f);
}

// Every slot's gradient, times `factor`: applied or stored, and the running statistics move along;
// or (`look`) only looked at: returns the largest magnitude.
template <class C>
FUSED_DNI_DEVICE float slots(const LinearArguments& a, SharedArena arena, const RuleFactors& f,
                             float factor, bool look) {
  using D = typename C::Delta;
  using X = typename C::X;
  float largest = 0.0f;
  if (a.trainable[0]) {
    const Operand<D, Lies::kAcross> delta{static_cast<const D*>(a.operand), a.outputs, a.outputs};
    const Operand<X, Lies::kAcross> x{static_cast<const X*>(a.x.data), a.x.stride, a.inputs};
    largest = settle_product<typename C::Weight>(a.weight, a.outputs, a.inputs, arena, delta, x,
                                                 a.rows, f, factor, look);
  }
  // From the other end: the first blocks may have a tile of W more than the last.
  for (int o = (blocks() - 1 - block()) * kThreads + thread(); o < a.outputs;
       o += blocks() * kThreads) {
#pragma unroll 1
    for (int v = 0; v < 3; ++v) {
      if (!a.trainable[v + 1]) continue;
      const float g = vector_gradient<C>(a, v, o);
      if (look)
        largest = fmaxf(largest, magnitude(g));
      else
        settle(v == 0 ? a.bias : v == 1 ? a.norm_weight : a.norm_bias, o, g * factor, f);
    }
    if (!look && a.batch != nullptr) move_running(a, o, a.batch[o], a.batch[a.outputs + o]);
  }
  return largest;
}

// Gradients of all slots, times `factor`: stored, or applied if they are finite. That shows before
// they are made if their bound is a float32.
template <class C>
FUSED_DNI_DEVICE void update(const LinearArguments& a, SharedArena arena, float factor) {
  const bool ruled = a.rule != kNoRule;
  bool finite = true, tried = false;
  double step = 0.0;
  RuleFactors f = no_rule();
  if (ruled) {
    step = *a.step + 1.0;
    f = rule_factors(a.hyper, step, a.rule, a.nesterov);
  }
#pragma unroll 1
  for (;;) {
    // What blocks saw of x and delta, or of the gradients themselves: the same for all of them.
    float x = 0.0f, delta = 0.0f;
#pragma unroll 1
    for (int list = tried ? 2 : a.trainable[0] ? 0 : 1; ruled && list < (tried ? 3 : 2); ++list) {
      const float left = largest_left(a.largest + list * kMostBlocks, blocks(), arena);
      finite = finite && left < INFINITY;
      (list == 0 ? x : delta) = left;
    }
    if (!finite) break;
    const bool look = ruled && !tried && !(fmaxf(delta, delta * x) * a.rows < kLargest);
    const float largest = slots<C>(a, arena, f, factor, look);
    if (!look) break;
    leave_largest(a.largest + 2 * kMostBlocks, largest, arena);
    grid_barrier(a.barrier, Phase::kUpdate);
    tried = true;
  }
  if (!ruled || block() != 0 || thread() != 0) return;
  if (finite)
    a.hyper[kStep] = step;
  else
    a.hyper[kSkipped] += 1.0;
}

// ---- The kernel -----------------------------------------------------------------------------------

template <class C>
FUSED_DNI_KERNEL(kThreads)
linear_kernel(FUSED_DNI_ARGUMENT LinearArguments a) {
  using X = typename C::X;
  const SharedArena arena;
  const bool ruled = a.rule != kNoRule, whole = is_whole<typename C::T>(a);
  const bool graded = has_gradient(a);
  float largest[2] = {};  // magnitudes, of x and of the gradient at z
  if (ruled) {
    if (a.trainable[0])
      largest[0] = look_at(static_cast<const X*>(a.x.data), a.x.stride, a.rows, a.inputs);
    if (block() == 0 && thread() == 0) *a.step = a.hyper[kStep];
  }
  if (a.forward) forward<C>(a, arena);
  if (a.synthesizer.source == kLowRank) {
    grid_barrier(a.barrier, Phase::kReduce);
    reduce(a.synthesizer, static_cast<const X*>(a.h), a.rows, a.outputs);
  }
  if (graded) {
    // With a diagonal synthesizer each thread reads what it wrote itself, and rstd, which others of
    // its block wrote, behind the barriers of a sum.
    if (a.forward && a.synthesizer.source != kDiagonal) grid_barrier(a.barrier, Phase::kGradient);
    largest[1] = gradient<C>(a, arena);
    if (goes_back(a) && !whole) {
      grid_barrier(a.barrier, Phase::kDelta);
      largest[1] = fmaxf(largest[1], delta<C>(a, arena));
    }
  } else if (ruled) {
    largest[1] = measure<C>(a);
  }
  if (!ruled && a.dx == nullptr && !has_slots(a)) return;
  if (ruled)
    in_turn(
        [&](int list, float mine) { leave_largest(a.largest + list * kMostBlocks, mine, arena); },
        largest);
  grid_barrier(a.barrier, a.dx != nullptr ? Phase::kDx : Phase::kWeight);
  const float factor = clipping(a, arena);
  if (a.dx != nullptr) {
    dx<C>(a, arena, factor);
    if (ruled) grid_barrier(a.barrier, Phase::kWeight);  // dx is of the weights before the update
  }
  if (ruled || has_slots(a)) update<C>(a, arena, factor);
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

LinearKernels linear_fp32(int shape);
LinearKernels linear_tf32(int shape);
LinearKernels linear_bf16(int shape);
LinearKernels linear_fp16(int shape);

}  // namespace fused_dni::cuda
