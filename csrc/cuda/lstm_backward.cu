// A window's backward: what arrives at its end, with the synthetic gradient; from the top layer
// down the steps and the products for the layer below; then all weights' gradients.
#include "lstm.cuh"

namespace fused_dni::cuda {
namespace {

enum EndsKind { kDense, kLowRank, kDiagonal };  // SYNTHESIZERS

// ---- What arrives at a window's end -------------------------------------------------------------

// A row's final state as one of 2 L pieces, h_0, c_0, h_1, c_1, ...: of features [piece * H, ...).
template <class X>
FUSED_DNI_DEVICE const X* end_piece(const LSTMBackward& a, int piece) {
  const std::int64_t state = static_cast<std::int64_t>(a.sizes.batch) * a.sizes.size;
  return static_cast<const X*>(piece % 2 == 0 ? a.ends.h : a.ends.c) + piece / 2 * state;
}

// M of the final states, but for its bias, to `predicted` [B, F], where it is made of products.
template <class Op, class X>
FUSED_DNI_DEVICE void predict_ends(const LSTMBackward& a) {
  using D = typename Op::Element;
  const LSTMSizes& s = a.sizes;
  const LSTMEnds& ends = a.ends;
  const SharedArena arena;
  const int features = 2 * s.layers * s.size;
  // The final states times the rows of a matrix, summed over their pieces.
  const bool low = ends.kind == kLowRank;
  const float* part = low ? ends.down : ends.weight;
  D* reduced = static_cast<D*>(ends.reduced);
  const int columns = low ? ends.rank : features;
  const int down = (s.batch + 63) / 64, count = down * ((columns + 63) / 64);
  for (int i = block(); i < count; i += blocks()) {
    const int row = i % down * 64, column = i / down * 64;
    typename Square<Op>::Sum sum;
    for (int piece = 0; piece < 2 * s.layers; ++piece)
      Square<Op>::run(sum, arena, Along<X>{end_piece<X>(a, piece), s.size, s.batch}, row,
                      Along<float>{part + piece * s.size, features, columns}, column, s.size);
    Square<Op>::each(sum, [&](int r, int c, float value) {
      if (row + r >= s.batch || column + c >= columns) return;
      const std::int64_t at = static_cast<std::int64_t>(row + r) * columns + column + c;
      if (low)
        reduced[at] = from_float<D>(value);
      else
        ends.predicted[at] = value;
    });
  }
  grid_barrier(a.barrier, Phase::kEnds);
  if (!low) return;
  Turn turn;
  multiply<Op>(arena, turn, Along<D>{reduced, ends.rank, s.batch},
               Along<float>{ends.weight, ends.rank, features}, ends.rank,
               [&](int row, int feature, float value) {
                 ends.predicted[static_cast<std::int64_t>(row) * features + feature] = value;
               });
  grid_barrier(a.barrier, Phase::kSteps);
}

// What arrives at a pair's final h (piece 2k of layer k) or c (2k + 1), the synthetic gradient
// added.
template <class X>
FUSED_DNI_DEVICE float arriving(const LSTMBackward& a, const Pair& pair, int piece) {
  const LSTMSizes& s = a.sizes;
  const LSTMEnds& ends = a.ends;
  const std::int64_t state = static_cast<std::int64_t>(s.batch) * s.size;
  const X* given = static_cast<const X*>(piece % 2 == 0 ? a.grad_h : a.grad_c);
  const float arrives = given != nullptr ? to_float(given[piece / 2 * state + pair.state]) : 0.0f;
  if (ends.kind < 0 || (ends.ended != nullptr && ends.ended[pair.row])) return arrives;
  const int features = 2 * s.layers * s.size, feature = piece * s.size + pair.unit;
  float predicted = ends.kind == kDiagonal
                        ? ends.weight[feature] * to_float(end_piece<X>(a, piece)[pair.state])
                        : ends.predicted[static_cast<std::int64_t>(pair.row) * features + feature];
  if (ends.bias != nullptr) predicted += ends.bias[feature];
  return arrives + predicted * ends.factor;
}

// ---- What the layers have read --------------------------------------------------------------------

template <class X>
FUSED_DNI_DEVICE const X* hidden_of(const LSTMBackward& a, int k) {
  return static_cast<const X*>(a.hidden) +
         k * a.apart * static_cast<std::int64_t>(a.sizes.batch) * a.sizes.size;
}

// The input of layer k [T, B, I or H]; staged where rows have ended, behind which x may hold
// anything, and where there was dropout.
template <class X>
FUSED_DNI_DEVICE const X* input_of(const LSTMBackward& a, int k) {
  if (a.staged[k] != nullptr) return static_cast<const X*>(a.staged[k]);
  if (k == 0) return static_cast<const X*>(a.x);
  return hidden_of<X>(a, k - 1) + static_cast<std::int64_t>(a.sizes.batch) * a.sizes.size;
}

template <class X>
FUSED_DNI_DEVICE void stage_inputs(const LSTMBackward& a) {
  const LSTMSizes& s = a.sizes;
  const std::int64_t state = static_cast<std::int64_t>(s.batch) * s.size;
  for (int k = 0; k < s.layers; ++k) {
    X* to = static_cast<X*>(a.staged[k]);
    if (to == nullptr) continue;
    const int columns = k == 0 ? s.in : s.size;
    const X* from = k == 0 ? static_cast<const X*>(a.x) : hidden_of<X>(a, k - 1) + state;
    const X* mask = k == 0 ? nullptr : static_cast<const X*>(a.dropout[k - 1]);
    for (int row = block() * kWarps + warp(); row < s.steps * s.batch; row += blocks() * kWarps) {
      const bool alive = k > 0 || row / s.batch < a.lengths[row % s.batch];
      for (int column = lane(); column < columns; column += 32) {
        const std::int64_t i = static_cast<std::int64_t>(row) * columns + column;
        const float value = alive ? to_float(from[i]) : 0.0f;
        to[i] = from_float<X>(mask != nullptr ? value * to_float(mask[i]) : value);
      }
    }
  }
}

// ---- Steps ----------------------------------------------------------------------------------------

template <class X, class D>
struct BackwardLayer {
  int index;
  const X *before, *after, *gates;  // c before each step and behind it
  const X* given;                   // the gradient at the hidden states of the last layer, or null
  const D* above;                   // of the others
  D* delta;
  X *d_h, *d_c;
};

template <class X, class D>
FUSED_DNI_DEVICE BackwardLayer<X, D> backward_layer(const LSTMBackward& a, int k) {
  const LSTMSizes& s = a.sizes;
  const std::int64_t state = static_cast<std::int64_t>(s.batch) * s.size;
  const bool top = k == s.layers - 1;
  BackwardLayer<X, D> layer;
  layer.before = static_cast<const X*>(a.before) + k * a.apart * state;
  layer.after = static_cast<const X*>(a.after) + k * a.apart * state;
  layer.gates = static_cast<const X*>(a.gates) + 4 * k * s.steps * state;
  layer.given = top ? static_cast<const X*>(a.grad_output) : nullptr;
  layer.above = top ? nullptr : static_cast<const D*>(a.above);
  layer.index = k;
  layer.delta = static_cast<D*>(a.delta) + 4 * k * s.steps * state;
  layer.d_h = static_cast<X*>(a.d_h) + k * state;
  layer.d_c = static_cast<X*>(a.d_c) + k * state;
  return layer;
}

// What a step needs of a pair besides its product and its cell's gradient; asked for before that.
// Zeros where the row has ended, in which case nothing else may be read.
template <class X, class D>
struct BackwardAhead {
  X gate[4], before, after;
  X given;  // the gradient at h for the last layer, where its type is not that of others
  D above;  // the gradient at h
};

FUSED_DNI_DEVICE bool is_alive(const Pair& pair, int t) { return t >= 0 && t < pair.length; }

template <class X, class D>
FUSED_DNI_DEVICE BackwardAhead<X, D> look_ahead(const LSTMBackward& a,
                                                const BackwardLayer<X, D>& layer, const Pair& pair,
                                                int t) {
  BackwardAhead<X, D> ahead{};
  if (!pair.there || !is_alive(pair, t)) return ahead;
  const LSTMSizes& s = a.sizes;
  const std::int64_t state = static_cast<std::int64_t>(s.batch) * s.size;
  const std::int64_t at = t * state + pair.state;
#pragma unroll
  for (int q = 0; q < 4; ++q) ahead.gate[q] = layer.gates[4 * t * state + pair.gate + q * s.size];
  ahead.before = layer.before[at];
  ahead.after = layer.after[at];
  if constexpr (kSame<X, D>) {
    const D* from = layer.given != nullptr ? layer.given : layer.above;
    if (from != nullptr) ahead.above = from[at];
  } else {
    if (layer.given != nullptr) ahead.given = layer.given[at];
    if (layer.above != nullptr) ahead.above = layer.above[at];
  }
  return ahead;
}

// The gradient at a pair's cell behind a step, where it is not in a register.
template <class X, class D>
FUSED_DNI_DEVICE float dc_behind(const LSTMBackward& a, const BackwardLayer<X, D>& layer,
                                 const Pair& pair, int t) {
  if (!pair.there) return 0.0f;
  return t == a.sizes.steps - 1 ? arriving<X>(a, pair, 2 * layer.index + 1) : a.carry[pair.state];
}

// The step of a pair, `dh` being the product's and `dc` what is behind it; returns dc in front.
template <class X, class D>
FUSED_DNI_DEVICE float step(const LSTMBackward& a, const BackwardLayer<X, D>& layer,
                            const Pair& pair, const BackwardAhead<X, D>& ahead, int t, float dh,
                            float dc) {
  if (t < 0) {
    layer.d_h[pair.state] = from_float<X>(dh);
    layer.d_c[pair.state] = from_float<X>(dc);
    return dc;
  }
  const int size = a.sizes.size;
  const bool alive = is_alive(pair, t);
  float given = to_float(ahead.above);
  if constexpr (!kSame<X, D>) given += to_float(ahead.given);  // one of them is zero
  if (t == pair.length - 1) given += arriving<X>(a, pair, 2 * layer.index);
  dh += given;
  const float i = to_float(ahead.gate[0]), f = to_float(ahead.gate[1]);
  const float g = to_float(ahead.gate[2]), o = to_float(ahead.gate[3]);
  const float shown = tanhf(to_float(ahead.after)), e = dc + dh * o * (1.0f - shown * shown);
  const float delta[4] = {e * g * i * (1.0f - i), e * to_float(ahead.before) * f * (1.0f - f),
                          e * i * (1.0f - g * g), dh * shown * o * (1.0f - o)};
  D* to = layer.delta + static_cast<std::int64_t>(t) * a.sizes.batch * 4 * size + pair.gate;
#pragma unroll
  for (int q = 0; q < 4; ++q) to[q * size] = from_float<D>(alive ? delta[q] : 0.0f);
  if (alive) dc = e * f;
  if (!a.plan.sole) a.carry[pair.state] = dc;
  return dc;
}

template <class Op, class X>
FUSED_DNI_DEVICE void steps(const LSTMBackward& a, int k) {
  using D = typename Op::Element;
  const LSTMSizes& s = a.sizes;
  const BackwardLayer<X, D> layer = backward_layer<X, D>(a, k);
  SliceProduct<Op, 1> product(SharedArena(), a.plan.tiles, 4 * s.size);
  if (a.plan.on_chip)
    product.set(backward_slice(a.layer[k].hh, block() % a.plan.slices, s.size), true);
  const bool sole = a.plan.sole;
  const Pair own = sole ? sole_pair(a) : Pair{};
  BackwardAhead<X, D> next{};
  float own_dc = 0.0f;
  for (int t = s.steps - 1; t >= -1; --t) {
    each_batch(
        a.plan, s.batch,
        [&](int slice) {
          if (!a.plan.on_chip) product.set(backward_slice(a.layer[k].hh, slice, s.size), false);
        },
        [&](int first, int end, int slice) {
          const Pair pair = sole ? own : own_pair(a, first, end, slice);
          const bool behind = t + 1 < s.steps, known = sole && behind;
          const BackwardAhead<X, D> ahead = known ? next : look_ahead(a, layer, pair, t);
          const float dc = known ? own_dc : dc_behind(a, layer, pair, t);
          if (behind) {
            const std::int64_t row = static_cast<std::int64_t>(t + 1) * s.batch + first;
            product.run(layer.delta + row * 4 * s.size, end - first);
            block_barrier();
          }
          if (pair.there)
            own_dc = step(a, layer, pair, ahead, t,
                          behind ? product.sum(pair.local, pair.unit % kUnits) : 0.0f, dc);
          block_barrier();
        });
    if (t < 0) break;
    if (sole) next = look_ahead(a, layer, own, t - 1);
    step_barrier(a.plan, a.barrier);
  }
}

template <class Op, class X>
FUSED_DNI_KERNEL(kThreads)
backward_kernel(FUSED_DNI_ARGUMENT LSTMBackward a) {
  using D = typename Op::Element;
  const LSTMSizes& s = a.sizes;
  const SharedArena arena;
  const int rows = s.steps * s.batch, gates = 4 * s.size;
  if (a.ends.kind == kDense || a.ends.kind == kLowRank) predict_ends<Op, X>(a);
  if (a.need_weights) stage_inputs<X>(a);  // read behind the steps' barriers
  Turn turn;
  for (int k = s.layers - 1; k >= 0; --k) {
    steps<Op, X>(a, k);
    if (a.plan.clustered) grid_barrier(a.barrier, Phase::kLayer);
    const D* delta = backward_layer<X, D>(a, k).delta;
    if (k == 0 && !a.need_dx) break;
    const int in = k == 0 ? s.in : s.size;
    const X* mask = k == 0 ? nullptr : static_cast<const X*>(a.dropout[k - 1]);
    multiply<Op>(arena, turn, Along<D>{delta, gates, rows}, Across<float>{a.layer[k].ih, in, in},
                 gates, [&](int row, int column, float value) {
                   const std::int64_t at = static_cast<std::int64_t>(row) * in + column;
                   if (k == 0)
                     static_cast<X*>(a.dx)[at] = from_float<X>(value);
                   else
                     static_cast<D*>(a.above)[at] =
                         from_float<D>(mask != nullptr ? value * to_float(mask[at]) : value);
                 });
    if (k > 0) grid_barrier(a.barrier, Phase::kLayer);
  }
  for (int i = 0; a.need_weights && i < 2 * s.layers; ++i) {
    const int k = i / 2, columns = i == 0 ? s.in : s.size;
    const bool of_hidden = i % 2 != 0;
    const D* delta = backward_layer<X, D>(a, k).delta;
    const LSTMGradient& to = a.gradient[k];
    weight_gradient<Op>(
        arena, turn, delta, of_hidden ? hidden_of<X>(a, k) : input_of<X>(a, k), gates, columns,
        rows, [&](int row, int column, float value) {
          (of_hidden ? to.hh : to.ih)[static_cast<std::int64_t>(row) * columns + column] = value;
        });
    if (of_hidden && to.bias != nullptr)
      bias_gradient(arena, turn, delta, gates, rows,
                    [&](int column, float value) { to.bias[column] = value; });
  }
}

template <class Op, class X>
Status launch_backward(const LSTMBackward& a) {
  const auto tiles = [](std::int64_t rows, std::int64_t columns) {
    return (rows + 63) / 64 * ((columns + 63) / 64);
  };
  const std::int64_t rows = std::int64_t{a.sizes.steps} * a.sizes.batch, gates = 4 * a.sizes.size;
  const std::int64_t below = a.sizes.layers > 1 || a.need_dx ? tiles(rows, a.sizes.size) : 0;
  const std::int64_t weights = a.need_weights ? 2 * a.sizes.layers * tiles(gates, a.sizes.size) : 0;
  return launch_window<Op, 1>(backward_kernel<Op, X>, a, 4 * a.sizes.size, a.delta,
                              std::max(below, weights));
}

}  // namespace

Status lstm_backward(const LSTMBackward& a) {
  switch (a.type) {
    case kBfloat16: return launch_backward<Bf16, bf16>(a);
    case kFloat16: return launch_backward<Tf32, fp16>(a);
    default: return a.exact ? launch_backward<Fp32, float>(a) : launch_backward<Tf32, float>(a);
  }
}

}  // namespace fused_dni::cuda
