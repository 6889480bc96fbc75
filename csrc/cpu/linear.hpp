// The linear layer: forward, backward, update, and the three in one decoupled step, for elements
// and products that a template parameter chooses (Plain below; Bf16 in linear_bf16.cpp).
//
// Every op has the same phases. Threads own features of the output until
// the gradient at z is known, and features of the input when the weight is updated:
//
//   x -> xT                                              barrier
//   zT = W xT, statistics, hT                            barrier (where a prediction mixes features)
//   prediction, gradient at z (deltaT), vector gradients barrier
//   panel by panel of W's columns: dx = delta W, then W <- rule(W, deltaT x)
//
// Within a panel dx comes before the update, so it sees the old weights without another barrier.
//
// A step whose gradient is predicted at z has it without going back: behind the prediction there
// is a scaling alone, and no barrier for what a normalisation mixes.
#pragma once

#include "activation.hpp"
#include "gemm.hpp"
#include "parallel.hpp"
#include "rules.hpp"
#include "synthesizer.hpp"
#include "weight.hpp"

namespace fused_dni::FUSED_DNI_ISA {
namespace {

enum Normalization { kNone, kBatch, kLayer };

// Features that a thread takes through phases with a row-wise inner loop before it moves on, so
// that what one phase wrote is still in a near cache when the next one reads it.
constexpr Index kFeatureGroup = 48;

// Calls body(first, last) for groups of a thread's features.
template <class T, class Body>
FUSED_DNI_INLINE void for_groups(Range own, Body&& body) {
  for (Index first = own.begin; first < own.end; first += kFeatureGroup)
    body(first, smaller(own.end, first + kFeatureGroup));
}

template <class T>
struct Layer {
  Index rows, in, out, stride;
  Normalization normalization;
  int activation;
  bool batch_statistics;  // normalise by the batch's own statistics
  T eps, momentum;
  T *weight, *bias, *scale, *shift, *running_mean, *running_var;

  explicit Layer(const LayerArguments& from)
      : rows(from.rows),
        in(from.in),
        out(from.out),
        stride(transposed_stride<T>(from.rows)),
        normalization(static_cast<Normalization>(from.normalization)),
        activation(from.activation),
        batch_statistics(normalization == kBatch &&
                         (from.training || from.running_mean == nullptr)),
        eps(T(from.eps)),
        momentum(T(from.momentum)),
        weight(static_cast<T*>(from.weight)),
        bias(static_cast<T*>(from.bias)),
        scale(static_cast<T*>(from.norm_weight)),
        shift(static_cast<T*>(from.norm_bias)),
        running_mean(static_cast<T*>(from.running_mean)),
        running_var(static_cast<T*>(from.running_var)) {}

  // What lies between the input and z.
  Layer up_to_z() const {
    Layer product = *this;
    product.normalization = kNone;
    product.activation = 0;  // the identity
    product.scale = product.shift = nullptr;
    return product;
  }

  T bias_of(Index o) const { return bias ? bias[o] : T(0); }
  T scale_of(Index o) const { return scale ? scale[o] : T(1); }
  T shift_of(Index o) const { return shift ? shift[o] : T(0); }
};

// ---- Products and elements ---------------------------------------------------------------------

// x W^T, with x as it comes, or already transposed.
template <class T>
struct InputProduct {
  Index rows, in, stride;
  const T* x;  // [N, I]

  const T* given = nullptr;  // [I][stride], if x came so
  T* transposed = nullptr;   // [I][stride], made here

  InputProduct(const Layer<T>& layer, const void* input)
      : rows(layer.rows), in(layer.in), stride(layer.stride), x(static_cast<const T*>(input)) {}

  void plan(Scratch& scratch) { transposed = scratch.take<T>(given ? 0 : in * stride); }

  // This thread's features of xT; returns the largest magnitude among them. A barrier follows.
  T transpose(const Team& team) const {
    const Range own = part(in, kLanes<T>, team.rank, team.size);
    if (given) return transposed_magnitude(given, stride, rows, own.begin, own.end);
    return to_transposed(x + own.begin, in, rows, own.size(), transposed + own.begin * stride,
                         stride);
  }

  // zT = W xT for the thread's own features, without the bias.
  void run(Range own, const T* weight, T* z) const {
    const T* w = weight + own.begin * in;
    T* to = z + own.begin * stride;
    if (rows > kDotRows)
      multiply(own.size(), rows, in, w, in, 1, given ? given : transposed, stride, to, stride,
               false);
    else if (rows == 1)
      multiply_dots<T, 1>(own.size(), in, w, x, to, stride);
    else if (rows == 2)
      multiply_dots<T, 2>(own.size(), in, w, x, to, stride);
    else
      multiply_dots<T, 3>(own.size(), in, w, x, to, stride);
  }
};

// Activations and parameters of one type.
template <class Real>
struct Plain {
  using T = Real;
  using Input = InputProduct<T>;
  using Weight = WeightPhase<T>;
  static constexpr bool kTransposed = true;  // whether x and dx may be in the transposed layout

  static T magnitude(const void* x, Index begin, Index count) {
    return magnitude_of(static_cast<const T*>(x) + begin, count);
  }

  // Features [own) of h [N, O] from the transposed layout, if they are wanted, and back.
  static void give(T* from, Index stride, Index rows, Range own, void* to, Index features) {
    if (to == nullptr) return;
    from_transposed(from + own.begin * stride, stride, rows, own.size(),
                    static_cast<T*>(to) + own.begin, features);
  }
  static void take(const void* from, Index features, Index rows, Range own, T* to, Index stride) {
    to_transposed(static_cast<const T*>(from) + own.begin, features, rows, own.size(),
                  to + own.begin * stride, stride);
  }
};

// ---- Forward -------------------------------------------------------------------------------

template <class T>
struct Forward {
  const Layer<T>& layer;
  T *given_z = nullptr, *given_h = nullptr;  // [O][stride], where there is memory for them already

  T* z = nullptr;     // [O][stride]: x W^T, then the input of scale-and-shift or of the activation
  T* h = nullptr;     // [O][stride]
  T* rstd = nullptr;  // [O] batch, [threads][stride] layer: a copy a thread
  T* batch_mean = nullptr;  // [O]
  T* batch_var = nullptr;   // [O], unbiased
  T* parts = nullptr;  // [threads][2][stride]: mean and squared deviations over a thread's features
  T* column_mean = nullptr;  // [threads][stride]: over all features, a copy a thread

  void plan(Scratch& scratch, int threads) {
    const bool batch = layer.normalization == kBatch, columns = layer.normalization == kLayer;
    z = given_z ? given_z : scratch.take<T>(layer.out * layer.stride);
    h = given_h ? given_h : scratch.take<T>(layer.out * layer.stride);
    rstd = scratch.take<T>(batch ? layer.out : columns ? threads * layer.stride : 0);
    batch_mean = scratch.take<T>(batch ? layer.out : 0);
    batch_var = scratch.take<T>(batch ? layer.out : 0);
    parts = scratch.take<T>(columns ? 2 * threads * layer.stride : 0);
    column_mean = scratch.take<T>(columns ? threads * layer.stride : 0);
  }

  const T* rstd_of(const Team& team) const {
    return layer.normalization == kLayer ? rstd + team.rank * layer.stride : rstd;
  }

  // h for the thread's own features, behind the product.
  void run(const Team& team, Range own) const {
    if (layer.normalization == kLayer) column_statistics(team, own);
    const T* mean_of = column_mean + team.rank * layer.stride;
    const T* rstd_of_column = rstd_of(team);
    with_activation<T>(layer.activation, [&](auto act) {
      for (Index o = own.begin; o < own.end; ++o) {
        T* row = z + o * layer.stride;
        T* out = h + o * layer.stride;
        const T scale = layer.scale_of(o), shift = layer.shift_of(o);
        if (layer.normalization == kNone) {
          const T bias = layer.bias_of(o);
          for (Index n = 0; n < layer.rows; n += kLanes<T>) {
            const Vec<T> u = load(row + n) + bias;
            store(row + n, u);
            store(out + n, act.value(u));
          }
        } else if (layer.normalization == kBatch) {
          const T mean = row_statistics(o, row);
          for (Index n = 0; n < layer.rows; n += kLanes<T>) {
            const Vec<T> u = (load(row + n) - mean) * rstd[o];
            store(row + n, u);
            store(out + n, act.value(u * scale + shift));
          }
        } else {
          for (Index n = 0; n < layer.rows; n += kLanes<T>) {
            const Vec<T> u = (load(row + n) - load(mean_of + n)) * load(rstd_of_column + n);
            store(row + n, u);
            store(out + n, act.value(u * scale + shift));
          }
        }
      }
    });
  }

  // Hands out what a backward needs of the thread's own features, where it is wanted.
  void save(const Team& team, Range own, void* normalized, void* to) const {
    T* out = static_cast<T*>(to);
    if (normalized)
      from_transposed(z + own.begin * layer.stride, layer.stride, layer.rows, own.size(),
                      static_cast<T*>(normalized) + own.begin, layer.out);
    if (out && layer.normalization == kBatch)
      for (Index o = own.begin; o < own.end; ++o) out[o] = rstd[o];
    if (out && layer.normalization == kLayer && team.rank == 0)
      for (Index n = 0; n < layer.rows; ++n) out[n] = rstd[n];
  }

  // Moves the running statistics of the thread's own features.
  void move_running(Range own) const {
    if (!layer.batch_statistics || layer.running_mean == nullptr) return;
    for (Index o = own.begin; o < own.end; ++o) {
      layer.running_mean[o] += layer.momentum * (batch_mean[o] - layer.running_mean[o]);
      layer.running_var[o] += layer.momentum * (batch_var[o] - layer.running_var[o]);
    }
  }

 private:
  // Batch norm: returns what is to be subtracted from row o of z, and sets rstd[o]. The bias is
  // not in z: the batch's own mean would take it away again, the running one does not.
  T row_statistics(Index o, const T* row) const {
    if (!layer.batch_statistics) {
      rstd[o] = T(1) / square_root(broadcast(layer.running_var[o] + layer.eps))[0];
      return layer.running_mean[o] - layer.bias_of(o);
    }
    const Index rows = layer.rows;
    Vec<T> sum{}, squares{};
    for (Index n = 0; n < rows; n += kLanes<T>) sum += valid<T>(load(row + n), n, rows);
    const T mean = sum_lanes<T>(sum) / T(rows);
    for (Index n = 0; n < rows; n += kLanes<T>) {
      const Vec<T> d = valid<T>(load(row + n) - mean, n, rows);
      squares += d * d;
    }
    const T square = sum_lanes<T>(squares);
    rstd[o] = T(1) / square_root(broadcast(square / T(rows) + layer.eps))[0];
    batch_mean[o] = mean + layer.bias_of(o);
    batch_var[o] = square / T(rows - 1);
    return mean;
  }

  // Layer norm: adds the bias to z and makes every row of the batch's mean and rstd, from mean
  // and squared deviations over each thread's features (Chan, Golub & LeVeque's formula).
  void column_statistics(const Team& team, Range own) const {
    const Index stride = layer.stride;
    T* part_mean = parts + 2 * team.rank * stride;
    T* part_squares = part_mean + stride;
    const T count = T(larger(own.size(), 1));
    for (Index n = 0; n < layer.rows; n += kLanes<T>) {
      Vec<T> sum{}, squares{};
      for (Index o = own.begin; o < own.end; ++o) {
        const Vec<T> u = load(z + o * stride + n) + layer.bias_of(o);
        store(z + o * stride + n, u);
        sum += u;
      }
      const Vec<T> mean = sum / count;
      for (Index o = own.begin; o < own.end; ++o) {
        const Vec<T> d = load(z + o * stride + n) - mean;
        squares += d * d;
      }
      store(part_mean + n, mean);
      store(part_squares + n, squares);
    }
    team.sync();
    for (Index n = 0; n < layer.rows; n += kLanes<T>) {
      Vec<T> mean{}, squares{};
      for (int t = 0; t < team.size; ++t)
        mean +=
            load(parts + 2 * t * stride + n) * T(own_features<T>(layer.out, t, team.size).size());
      mean /= T(layer.out);
      for (int t = 0; t < team.size; ++t) {
        const Vec<T> d = load(parts + 2 * t * stride + n) - mean;
        squares += load(parts + (2 * t + 1) * stride + n) +
                   d * d * T(own_features<T>(layer.out, t, team.size).size());
      }
      store(column_mean + team.rank * stride + n, mean);
      store(rstd + team.rank * stride + n, T(1) / square_root(squares / T(layer.out) + layer.eps));
    }
  }
};

// ---- Gradient at z ---------------------------------------------------------------------------

template <class T>
struct Backward {
  const Layer<T>& layer;
  const T* h = nullptr;     // [O][stride]; not read where the slope is taken from u
  const T* u = nullptr;     // [O][stride]: input of scale-and-shift, or of the activation
  const T* rstd = nullptr;  // [O] batch

  const T* given_grad_h = nullptr;  // [O][stride], where there is memory for them already
  T* given_delta = nullptr;

  const T* grad_h = nullptr;  // [O][stride]: gradient at h, in delta's memory if not given
  T* delta = nullptr;         // [O][stride]: gradient at z
  T* grad_bias = nullptr;     // [O]
  T* grad_scale = nullptr;    // [O]
  T* grad_shift = nullptr;    // [O]
  T* parts = nullptr;         // [threads][2][stride]: layer norm's sums over a thread's features
  T* columns = nullptr;       // [threads][2][stride]: the same over all features, a copy a thread

  void plan(Scratch& scratch, int threads) {
    const Index sums = layer.normalization == kLayer ? 2 * threads * layer.stride : 0;
    delta = given_delta ? given_delta : scratch.take<T>(layer.out * layer.stride);
    grad_h = given_grad_h ? given_grad_h : delta;
    grad_bias = scratch.take<T>(layer.out);
    grad_scale = scratch.take<T>(layer.out);
    grad_shift = scratch.take<T>(layer.out);
    parts = scratch.take<T>(sums);
    columns = scratch.take<T>(sums);
  }

  // Before run(): clears what run() adds to.
  void begin(const Team& team) const {
    if (layer.normalization == kLayer)
      __builtin_memset(parts + 2 * team.rank * layer.stride, 0, sizeof(T) * 2 * layer.stride);
  }

  // Features [first, last): of the gradient at h, which is `factor` times what grad_h holds, makes
  // that at z. With layer norm, that at the scale's input: finish() does the rest.
  void run(const Team& team, Index first, Index last, T factor, Magnitude<T>& magnitude) const {
    with_activation<T>(layer.activation, [&](auto act) {
      for (Index o = first; o < last; ++o) {
        if (layer.normalization == kNone)
          run_plain(act, o, factor, magnitude);
        else if (layer.normalization == kBatch)
          run_batch(act, o, factor, magnitude);
        else
          run_layer(act, o, factor, parts + 2 * team.rank * layer.stride);
      }
    });
  }

  // Behind run() for all of the thread's features: what mixes features, if anything does.
  void finish(const Team& team, Range own, const T* rstd_of_column, Magnitude<T>& magnitude) const {
    if (layer.normalization != kLayer) return;
    const Index rows = layer.rows, stride = layer.stride;
    T* sum = columns + 2 * team.rank * stride;
    team.sync();
    for (Index i = 0; i < 2 * stride; i += kLanes<T>) {
      Vec<T> v = load(parts + i);
      for (int t = 1; t < team.size; ++t) v += load(parts + 2 * t * stride + i);
      store(sum + i, v / T(layer.out));
    }
    for (Index o = own.begin; o < own.end; ++o) {
      T* row = delta + o * stride;
      Vec<T> total{};
      for (Index n = 0; n < rows; n += kLanes<T>) {
        const Vec<T> mixed = load(sum + n) + load(u + o * stride + n) * load(sum + stride + n);
        const Vec<T> d = valid<T>((load(row + n) - mixed) * load(rstd_of_column + n), n, rows);
        store(row + n, d);
        total += d;
        magnitude.add(d);
      }
      grad_bias[o] = sum_lanes<T>(total);
    }
  }

 private:
  // The batch's mean takes the bias away again: its gradient is zero, not rounding noise.
  T bias_gradient(T sum) const { return layer.batch_statistics ? T(0) : sum; }

  // Gradient at the activation's input, for the vector at n of feature o.
  template <class Act>
  FUSED_DNI_INLINE Vec<T> through(Act act, Index o, Index n, T factor) const {
    const Index at = o * layer.stride + n;
    Vec<T> slope;
    if constexpr (Act::kFromOutput)
      slope = act.slope(load(h + at));
    else if (layer.normalization == kNone)
      slope = act.slope(load(u + at));
    else
      slope = act.slope(load(u + at) * layer.scale_of(o) + layer.shift_of(o));
    return valid<T>(load(grad_h + at) * factor * slope, n, layer.rows);
  }

  template <class Act>
  FUSED_DNI_INLINE void run_plain(Act act, Index o, T factor, Magnitude<T>& magnitude) const {
    T* row = delta + o * layer.stride;
    Vec<T> total{};
    for (Index n = 0; n < layer.rows; n += kLanes<T>) {
      const Vec<T> d = through(act, o, n, factor);
      store(row + n, d);
      total += d;
      magnitude.add(d);
    }
    grad_bias[o] = bias_gradient(sum_lanes<T>(total));
  }

  template <class Act>
  FUSED_DNI_INLINE void run_batch(Act act, Index o, T factor, Magnitude<T>& magnitude) const {
    const Index rows = layer.rows;
    T* row = delta + o * layer.stride;
    const T* normalized = u + o * layer.stride;
    Vec<T> total{}, correlation{}, bias{};
    for (Index n = 0; n < rows; n += kLanes<T>) {
      const Vec<T> d = through(act, o, n, factor);
      store(row + n, d);
      total += d;
      correlation += valid<T>(d * load(normalized + n), n, rows);
    }
    const T shift = sum_lanes<T>(total), scale = sum_lanes<T>(correlation);
    grad_shift[o] = shift;
    grad_scale[o] = scale;
    // Running statistics are constants; the batch's own depend on z.
    const T along = layer.batch_statistics ? scale / T(rows) : T(0);
    const T mean = layer.batch_statistics ? shift / T(rows) : T(0);
    const T gain = layer.scale_of(o) * rstd[o];
    for (Index n = 0; n < rows; n += kLanes<T>) {
      const Vec<T> d =
          valid<T>((load(row + n) - mean - load(normalized + n) * along) * gain, n, rows);
      store(row + n, d);
      bias += d;
      magnitude.add(d);
    }
    grad_bias[o] = bias_gradient(sum_lanes<T>(bias));
  }

  template <class Act>
  FUSED_DNI_INLINE void run_layer(Act act, Index o, T factor, T* sums) const {
    const Index rows = layer.rows;
    T* row = delta + o * layer.stride;
    const T* normalized = u + o * layer.stride;
    Vec<T> total{}, correlation{};
    for (Index n = 0; n < rows; n += kLanes<T>) {
      const Vec<T> d = through(act, o, n, factor);
      const Vec<T> along = valid<T>(d * load(normalized + n), n, rows);
      total += d;
      correlation += along;
      const T scale = layer.scale_of(o);
      store(row + n, d * scale);
      store(sums + n, load(sums + n) + d * scale);
      store(sums + layer.stride + n, load(sums + layer.stride + n) + along * scale);
    }
    grad_shift[o] = sum_lanes<T>(total);
    grad_scale[o] = sum_lanes<T>(correlation);
  }
};

// ---- Ops -------------------------------------------------------------------------------------

// Bias, scale and shift of the thread's own features.
template <class T>
void update_vectors(const Layer<T>& layer, const RuleArguments& slots, const Rule<T>& rule,
                    Range own, const T* bias, const T* scale, const T* shift) {
  if (layer.bias) apply_slot(rule, slot_of<T>(slots, 1, layer.bias), own.begin, own.end, bias);
  if (layer.scale) apply_slot(rule, slot_of<T>(slots, 2, layer.scale), own.begin, own.end, scale);
  if (layer.shift) apply_slot(rule, slot_of<T>(slots, 3, layer.shift), own.begin, own.end, shift);
}

template <class Kind>
class ForwardOp : public Op {
  using T = typename Kind::T;

 public:
  explicit ForwardOp(const LinearForward& from)
      : a(from), layer(a.layer), input(layer, a.x), forward{layer} {
    threads = team_size(a.layer.threads, layer.rows * layer.in * layer.out);
    open = true;
    if constexpr (Kind::kTransposed) {
      if (a.x_transposed) input.given = static_cast<const T*>(a.x);
    }
    forward.given_h = static_cast<T*>(a.transposed);
    if (a.transposed) forward.given_z = static_cast<T*>(a.normalized);
  }

  void plan(Scratch& scratch) override {
    input.plan(scratch);
    forward.plan(scratch, threads);
  }

  void run(const Team& team) override {
    if (!a.x_transposed) {
      input.transpose(team);
      team.sync();
    }
    const Range own = own_features<T>(layer.out, team.rank, team.size);
    input.run(own, layer.weight, forward.z);
    forward.run(team, own);
    Kind::give(forward.h, layer.stride, layer.rows, own, a.h, layer.out);
    forward.save(team, own, a.transposed ? nullptr : a.normalized, a.rstd);
    forward.move_running(own);
  }

 private:
  const LinearForward& a;
  const Layer<T> layer;
  typename Kind::Input input;
  Forward<T> forward;
};

template <class Kind>
class BackwardOp : public Op {
  using T = typename Kind::T;

 public:
  explicit BackwardOp(const LinearBackward& from)
      : a(from),
        layer(a.layer),
        backward{layer},
        product(layer.rows, layer.in, layer.out, layer.weight, a.x) {
    threads = team_size(a.layer.threads, layer.rows * layer.in * layer.out);
    open = true;
    if (a.transposed) backward.given_delta = static_cast<T*>(a.delta);
    if (a.grad_h_transposed) backward.given_grad_h = static_cast<const T*>(a.grad_h);
  }

  void plan(Scratch& scratch) override {
    h = scratch.take<T>(a.transposed ? 0 : layer.out * layer.stride);
    u = scratch.take<T>(a.normalized && !a.transposed ? layer.out * layer.stride : 0);
    rstd = scratch.take<T>(layer.normalization == kLayer ? threads * layer.stride : 0);
    backward.plan(scratch, threads);
    product.plan(scratch, threads);
    backward.h = a.transposed ? static_cast<const T*>(a.h) : h;
    backward.u = a.transposed ? static_cast<const T*>(a.normalized) : u;
    backward.rstd = static_cast<const T*>(a.rstd);
    product.delta = backward.delta;
  }

  void run(const Team& team) override {
    const Range own = own_features<T>(layer.out, team.rank, team.size);
    Magnitude<T> magnitude;
    T* rstd_of_column = rstd + team.rank * layer.stride;
    if (layer.normalization == kLayer)  // padded, as vectors are read from it
      __builtin_memcpy(rstd_of_column, a.rstd, sizeof(T) * layer.rows);
    backward.begin(team);
    const auto take = [&](const void* from, Index first, Index count, T* to) {
      to_transposed(static_cast<const T*>(from) + first, layer.out, layer.rows, count,
                    to + first * layer.stride, layer.stride);
    };
    for_groups<T>(own, [&](Index first, Index last) {
      if (a.grad_h_narrow)
        Kind::take(a.grad_h, layer.out, layer.rows, Range{first, last}, backward.delta,
                   layer.stride);
      else if (!a.grad_h_transposed)
        take(a.grad_h, first, last - first, backward.delta);
      if (!a.transposed) {
        Kind::take(a.h, layer.out, layer.rows, Range{first, last}, h, layer.stride);
        if (a.normalized) take(a.normalized, first, last - first, u);
      }
      backward.run(team, first, last, T(a.factor), magnitude);
    });
    backward.finish(team, own, rstd_of_column, magnitude);
    if (!a.transposed)
      from_transposed(backward.delta + own.begin * layer.stride, layer.stride, layer.rows,
                      own.size(), static_cast<T*>(a.delta) + own.begin, layer.out);
    const auto give = [&](const T* from, void* to) {
      if (to)
        for (Index o = own.begin; o < own.end; ++o) static_cast<T*>(to)[o] = from[o];
    };
    give(backward.grad_bias, a.grad_bias);
    give(backward.grad_scale, a.grad_norm_weight);
    give(backward.grad_shift, a.grad_norm_bias);
    if (a.grad_x == nullptr && a.grad_weight == nullptr) return;
    product.prepare(own, a.grad_x != nullptr);
    team.sync();
    if constexpr (Kind::kTransposed) {
      if (a.grad_x_transposed) {
        product.gradient_transposed(team, static_cast<T*>(a.grad_x));
        return;
      }
    }
    product.gradients(team, a.grad_x, static_cast<T*>(a.grad_weight));
  }

 private:
  const LinearBackward& a;
  const Layer<T> layer;
  Backward<T> backward;
  typename Kind::Weight product;
  T *h = nullptr, *u = nullptr, *rstd = nullptr;  // [O][stride] twice, [threads][stride]
};

template <class Kind>
class UpdateOp : public Op {
  using T = typename Kind::T;

 public:
  explicit UpdateOp(const LinearUpdate& from)
      : a(from),
        layer(a.layer),
        rule(a.rule),
        weight(slot_of<T>(a.rule, 0, layer.weight)),
        product(layer.rows, layer.in, layer.out, layer.weight, a.x) {
    threads = team_size(a.layer.threads, layer.rows * layer.in * layer.out);
    if constexpr (Kind::kTransposed) product.x_transposed = a.x_transposed;
  }

  void plan(Scratch& scratch) override {
    made = scratch.take<T>(a.delta_transposed ? 0 : layer.out * layer.stride);
    reports = scratch.take<Report<T>>(threads);
    product.plan(scratch, threads);
    product.delta = a.delta_transposed ? static_cast<const T*>(a.delta) : made;
  }

  void run(const Team& team) override {
    const Range own = own_features<T>(layer.out, team.rank, team.size);
    const T* vectors[] = {static_cast<const T*>(a.grad_bias),
                          static_cast<const T*>(a.grad_norm_weight),
                          static_cast<const T*>(a.grad_norm_bias)};
    Report<T> report;
    report.delta =
        a.delta_transposed
            ? transposed_magnitude(product.delta, layer.stride, layer.rows, own.begin, own.end)
            : to_transposed(static_cast<const T*>(a.delta) + own.begin, layer.out, layer.rows,
                            own.size(), made + own.begin * layer.stride, layer.stride);
    product.prepare(own, false);
    if (a.x_transposed) {
      const Range inputs = part(layer.in, 1, team.rank, team.size);
      report.x = transposed_magnitude(static_cast<const T*>(a.x), layer.stride, layer.rows,
                                      inputs.begin, inputs.end);
    } else {
      const Range batch = part(layer.rows, 1, team.rank, team.size);
      report.x = Kind::magnitude(a.x, batch.begin * layer.in, batch.size() * layer.in);
    }
    for (int s = 0; s < 3; ++s)
      if (vectors[s] && a.rule.trainable[s + 1])
        report.include(magnitude_of(vectors[s] + own.begin, own.size()));
    reports[team.rank] = report;
    team.sync();
    const bool finite = agree_finite(team, reports, product, weight.parameter != nullptr);
    if (finite) {
      product.update(team, nullptr, rule, weight);
      update_vectors(layer, a.rule, rule, own, vectors[0], vectors[1], vectors[2]);
    }
    if (team.rank == 0) applied = finite;
  }

  void finish() override { count_step(a.rule, applied); }

 private:
  const LinearUpdate& a;
  const Layer<T> layer;
  const Rule<T> rule;
  const Slot<T> weight;
  typename Kind::Weight product;
  T* made = nullptr;             // [O][stride]: delta
  Report<T>* reports = nullptr;  // [threads]
  bool applied = false;
};

template <class Kind>
class StepOp : public Op {
  using T = typename Kind::T;

 public:
  explicit StepOp(const LinearStep& from)
      : a(from),
        layer(a.layer),
        behind(a.preactivation ? layer.up_to_z() : layer),
        rule(a.rule),
        weight(slot_of<T>(a.rule, 0, layer.weight)),
        input(layer, a.x),
        forward{layer},
        predictor(a.synthesizer, layer.rows, layer.out),
        backward{behind},
        product(layer.rows, layer.in, layer.out, layer.weight, a.x) {
    threads = team_size(a.layer.threads, layer.rows * layer.in * layer.out);
    open = a.grad_x && !a.grad_x_transposed;
    if constexpr (Kind::kTransposed) {
      if (a.x_transposed) input.given = static_cast<const T*>(a.x);
      product.x_transposed = a.x_transposed;
    }
    forward.given_h = static_cast<T*>(a.transposed);
    if (a.transposed) backward.given_grad_h = static_cast<const T*>(a.scaled);
  }

  void plan(Scratch& scratch) override {
    input.plan(scratch);
    forward.plan(scratch, threads);
    predictor.plan(scratch, threads);
    backward.plan(scratch, threads);
    product.plan(scratch, threads);
    reports = scratch.take<Report<T>>(threads);
    squares = scratch.take<double>(threads);
    backward.h = forward.h;
    backward.u = forward.z;
    backward.rstd = forward.rstd;
    product.delta = backward.delta;
    predicted = a.transposed && a.scaled ? static_cast<T*>(a.scaled) : backward.delta;
  }

  void run(const Team& team) override {
    const Range own = own_features<T>(layer.out, team.rank, team.size);
    const Index stride = layer.stride;
    Report<T> report;
    Magnitude<T> magnitude;

    report.x = input.transpose(team);
    predictor.transpose_context(team);
    // What is given transposed is there; and of the context there is a barrier in front, unless the
    // prediction mixes no features.
    if (!a.x_transposed || predictor.kind == kDiagonal) team.sync();

    input.run(own, layer.weight, forward.z);
    forward.run(team, own);
    Kind::give(forward.h, stride, layer.rows, own, a.h, layer.out);
    forward.save(team, own, a.normalized, a.rstd);
    predictor.reduce(team, own, forward.h);
    if (predictor.kind != kDiagonal) team.sync();
    predictor.combine(team);
    if (a.reduced && team.rank == 0) {
      if (a.transposed)
        __builtin_memcpy(a.reduced, predictor.reduced, sizeof(T) * predictor.rank * stride);
      else
        from_transposed(predictor.reduced, stride, layer.rows, predictor.rank,
                        static_cast<T*>(a.reduced), predictor.rank);
    }

    backward.begin(team);
    const auto predict = [&](Index first, Index last) {
      T* rows = predicted + first * stride;
      predictor.predict(team, first, last, forward.h, rows);
      if (a.scaled && !a.transposed)
        from_transposed(rows, stride, layer.rows, last - first, static_cast<T*>(a.scaled) + first,
                        layer.out);
    };
    double factor = 1.0 / a.target_scale;
    if (a.max_norm > 0.0) {  // the norm mixes features: all of them before any goes on
      predict(own.begin, own.end);
      DoubleSum<T> sum;
      for (Index o = own.begin; o < own.end; ++o)
        for (Index n = 0; n < layer.rows; n += kLanes<T>) {
          const Vec<T> s = valid<T>(load(predicted + o * stride + n), n, layer.rows);
          sum.add_product(s, s);
        }
      squares[team.rank] = sum.value();
      team.sync();
      double total = 0.0;
      for (int t = 0; t < team.size; ++t) total += squares[t];
      const double norm = __builtin_sqrt(total) * __builtin_fabs(factor);
      if (!(norm <= a.max_norm)) factor *= a.max_norm / norm;
      backward.run(team, own.begin, own.end, T(factor), magnitude);
    } else {
      for_groups<T>(own, [&](Index first, Index last) {
        predict(first, last);
        backward.run(team, first, last, T(factor), magnitude);
      });
    }
    backward.finish(team, own, forward.rstd_of(team), magnitude);
    product.prepare(own, a.grad_x != nullptr);

    report.delta = magnitude.value();
    const bool has[] = {layer.bias != nullptr, layer.scale != nullptr, layer.shift != nullptr};
    const T* vectors[] = {backward.grad_bias, backward.grad_scale, backward.grad_shift};
    for (int s = 0; s < 3; ++s)
      if (has[s] && a.rule.trainable[s + 1])
        report.include(magnitude_of(vectors[s] + own.begin, own.size()));
    reports[team.rank] = report;
    team.sync();

    const bool finite = agree_finite(team, reports, product, weight.parameter != nullptr);
    void* grad_x = a.grad_x;
    if constexpr (Kind::kTransposed) {
      if (grad_x && a.grad_x_transposed) {
        product.gradient_transposed(team, static_cast<T*>(grad_x));
        team.sync();  // threads share W's columns there, and its rows in the update
        grad_x = nullptr;
      }
    }
    if (finite) {
      product.update(team, grad_x, rule, weight);
      update_vectors(layer, a.rule, rule, own, vectors[0], vectors[1], vectors[2]);
      forward.move_running(own);
    } else if (grad_x) {
      product.update(team, grad_x, rule, Slot<T>{});
    }
    if (team.rank == 0) applied = finite;
  }

  void finish() override { count_step(a.rule, applied); }

 private:
  const LinearStep& a;
  const Layer<T> layer, behind;  // behind: what is between z and where the gradient is predicted
  const Rule<T> rule;
  const Slot<T> weight;
  typename Kind::Input input;
  Forward<T> forward;
  Predictor<T> predictor;
  Backward<T> backward;
  typename Kind::Weight product;
  Report<T>* reports = nullptr;  // [threads]
  double* squares = nullptr;     // [threads], of the prediction
  T* predicted = nullptr;        // [O][stride]: for a regression that reads it transposed it stays
  bool applied = false;
};

// Enters the ops of a kind into the tables of Kernels.
template <class Kind>
void add_linear_ops(Kernels& kernels, int type) {
  kernels.linear_forward[type] = make<ForwardOp<Kind>>;
  kernels.linear_backward[type] = make<BackwardOp<Kind>>;
  kernels.linear_update[type] = make<UpdateOp<Kind>>;
  kernels.linear_step[type] = make<StepOp<Kind>>;
}

}  // namespace
}  // namespace fused_dni::FUSED_DNI_ISA
