// A window's forward: layer by layer, the inputs' products of all steps (but the first layer's, if
// they were made before), then the steps.
#include "lstm.cuh"

namespace fused_dni::cuda {
namespace {

// A layer's tensors.
template <class X>
struct ForwardLayer {
  LSTMWeights weight;
  const X *h, *c;             // [B, H]
  X *hidden, *cells, *gates;  // [T + 1, B, H], [T + 1, B, H] or null, [T, B, 4H]
  X *last_h, *last_c;         // [B, H]
};

template <class X>
FUSED_DNI_DEVICE ForwardLayer<X> forward_layer(const LSTMForward& a, int k) {
  const std::int64_t state = static_cast<std::int64_t>(a.sizes.batch) * a.sizes.size;
  const std::int64_t apart = (a.sizes.steps + 1) * state, place = a.save ? k : 0;
  ForwardLayer<X> layer;
  layer.weight = a.layer[k];
  layer.h = static_cast<const X*>(a.h) + k * state;
  layer.c = static_cast<const X*>(a.c) + k * state;
  layer.hidden = static_cast<X*>(a.hidden) + place * apart;
  layer.cells = a.cells != nullptr ? static_cast<X*>(a.cells) + k * apart : nullptr;
  layer.gates = static_cast<X*>(a.gates) + place * a.sizes.steps * 4 * state;
  layer.last_h = static_cast<X*>(a.last_h) + k * state;
  layer.last_c = static_cast<X*>(a.last_c) + k * state;
  return layer;
}

// What a step needs of a pair besides its product and its cell; asked for before that.
template <class X>
struct Ahead {
  X z[4];
};

template <class X>
FUSED_DNI_DEVICE Ahead<X> look_ahead(const LSTMForward& a, const ForwardLayer<X>& layer,
                                     const Pair& pair, int t) {
  Ahead<X> ahead{};
  if (!pair.there) return ahead;
  const int size = a.sizes.size;
  const X* gates = layer.gates + static_cast<std::int64_t>(t) * a.sizes.batch * 4 * size;
#pragma unroll
  for (int q = 0; q < 4; ++q) ahead.z[q] = gates[pair.gate + q * size];
  return ahead;
}

// A pair's cell in front of a step, where it is not in a register.
template <class X>
FUSED_DNI_DEVICE float cell_before(const LSTMForward& a, const ForwardLayer<X>& layer,
                                   const Pair& pair, int t) {
  if (!pair.there) return 0.0f;
  return t == 0 ? to_float(layer.c[pair.state]) : a.carry[pair.state];
}

// What a step makes of a pair.
template <class X>
struct Made {
  float gate[4], cell;
  X shown;
};

// The step of a pair behind its product, `sum(q)` for gate q.
template <class X, class F>
FUSED_DNI_DEVICE Made<X> step(const Ahead<X>& ahead, float cell, bool alive, F&& sum) {
  float z[4];
#pragma unroll
  for (int q = 0; q < 4; ++q) z[q] = to_float(ahead.z[q]) + sum(q);
  Made<X> made{
      {sigmoid(z[0]), sigmoid(z[1]), tanhf(z[2]), sigmoid(z[3])}, cell, from_float<X>(0.0f)};
  if (!alive) return made;
  made.cell = made.gate[1] * cell + made.gate[0] * made.gate[2];
  made.shown = from_float<X>(made.gate[3] * tanhf(made.cell));
  return made;
}

// Stores what no other block waits for.
template <class X>
FUSED_DNI_DEVICE void store(const LSTMForward& a, const ForwardLayer<X>& layer, const Pair& pair,
                            const Made<X>& made, int t) {
  const int size = a.sizes.size;
  const std::int64_t state = static_cast<std::int64_t>(a.sizes.batch) * size;
  if (!a.plan.sole) a.carry[pair.state] = made.cell;
  if (t == pair.length - 1) layer.last_h[pair.state] = made.shown;
  if (t == a.sizes.steps - 1) layer.last_c[pair.state] = from_float<X>(made.cell);
  if (layer.cells != nullptr) layer.cells[(t + 1) * state + pair.state] = from_float<X>(made.cell);
  if (a.save && t < pair.length) {
#pragma unroll
    for (int q = 0; q < 4; ++q)
      layer.gates[t * 4 * state + pair.gate + q * size] = from_float<X>(made.gate[q]);
  }
}

template <class Op, class X>
FUSED_DNI_KERNEL(kThreads)
forward_kernel(FUSED_DNI_ARGUMENT LSTMForward a) {
  const LSTMSizes& s = a.sizes;
  const SharedArena arena;
  const int rows = s.steps * s.batch, gates = 4 * s.size;
  const std::int64_t state = static_cast<std::int64_t>(s.batch) * s.size;
  for (int k = 0; k < s.layers; ++k) {
    const ForwardLayer<X> layer = forward_layer<X>(a, k);
    const X* below = static_cast<const X*>(a.x);
    if (k > 0) {
      below = forward_layer<X>(a, k - 1).hidden + state;
      if (a.dropout[k - 1] != nullptr) {
        const X* mask = static_cast<const X*>(a.dropout[k - 1]);
        X* dropped = static_cast<X*>(a.below);
        each_element(s.steps * state, [&](std::int64_t i) {
          dropped[i] = from_float<X>(to_float(below[i]) * to_float(mask[i]));
        });
        below = dropped;
        grid_barrier(a.barrier, Phase::kInputs);
      }
    }
    const int in = k == 0 ? s.in : s.size;
    if (k > 0 || !a.projected) {
      Turn turn;
      multiply<Op>(arena, turn, Along<X>{below, in, rows}, Along<float>{layer.weight.ih, in, gates},
                   in, [&](int row, int column, float value) {
                     if (layer.weight.bias_ih != nullptr) value += layer.weight.bias_ih[column];
                     if (layer.weight.bias_hh != nullptr) value += layer.weight.bias_hh[column];
                     layer.gates[static_cast<std::int64_t>(row) * gates + column] =
                         from_float<X>(value);
                   });
    }
    each_element(state, [&](std::int64_t i) {
      layer.hidden[i] = layer.h[i];
      if (layer.cells != nullptr) layer.cells[i] = layer.c[i];
    });
    SliceProduct<Op, 4> product(arena, a.plan.tiles, s.size);
    if (a.plan.on_chip)
      product.set(forward_slice(layer.weight.hh, block() % a.plan.slices, s.size), true);
    grid_barrier(a.barrier, Phase::kSteps);
    const bool sole = a.plan.sole;
    const Pair own = sole ? sole_pair(a) : Pair{};
    Ahead<X> next{};
    float own_cell = 0.0f;
    for (int t = 0; t < s.steps; ++t) {
      Made<X> made{};
      each_batch(
          a.plan, s.batch,
          [&](int slice) {
            if (!a.plan.on_chip) product.set(forward_slice(layer.weight.hh, slice, s.size), false);
          },
          [&](int first, int end, int slice) {
            const Pair pair = sole ? own : own_pair(a, first, end, slice);
            const bool known = sole && t > 0;
            const Ahead<X> ahead = known ? next : look_ahead(a, layer, pair, t);
            const float cell = known ? own_cell : cell_before(a, layer, pair, t);
            product.run(layer.hidden + t * state + first * static_cast<std::int64_t>(s.size),
                        end - first);
            block_barrier();
            if (pair.there) {
              made = step<X>(ahead, cell, t < pair.length, [&](int q) {
                return product.sum(pair.local, q * kUnits + pair.unit % kUnits);
              });
              layer.hidden[(t + 1) * state + pair.state] = made.shown;
              own_cell = made.cell;
            }
            if (sole) return;
            if (pair.there) store(a, layer, pair, made, t);
            block_barrier();
          });
      if (sole && t + 1 < s.steps) next = look_ahead(a, layer, own, t + 1);
      step_barrier(a.plan, a.barrier);
      if (sole && own.there) store(a, layer, own, made, t);
    }
    if (a.plan.clustered && k + 1 < s.layers) grid_barrier(a.barrier, Phase::kLayer);
  }
}

template <class Op, class X>
Status launch_forward(const LSTMForward& a) {
  const std::int64_t tiles = ((std::int64_t{a.sizes.steps} * a.sizes.batch + 63) / 64) *
                             ((std::int64_t{4} * a.sizes.size + 63) / 64);
  const bool products = !a.projected || a.sizes.layers > 1;
  return launch_window<Op, 4>(forward_kernel<Op, X>, a, a.sizes.size, a.hidden,
                              products ? tiles : 0);
}

FUSED_DNI_KERNEL(kThreads) barriers_kernel(FUSED_DNI_ARGUMENT GridBarriers a) {
  for (int i = 0; i < a.count; ++i) {
    if (a.cluster > 1)
      cluster_barrier();
    else
      grid_barrier(a.barrier, Phase::kRound);
  }
}

}  // namespace

Status lstm_forward(const LSTMForward& a) {
  switch (a.type) {
    case kBfloat16: return launch_forward<Bf16, bf16>(a);
    case kFloat16: return launch_forward<Fp16, fp16>(a);
    default: return a.exact ? launch_forward<Fp32, float>(a) : launch_forward<Tf32, float>(a);
  }
}

Status grid_barriers(const GridBarriers& a) {
  Status status;
  const int resident = a.cluster > 1
                           ? a.cluster * resident_clusters(barriers_kernel, kThreads, 0, a.cluster)
                           : resident_blocks(barriers_kernel, kThreads, 0, status);
  if (status.ok())
    launch(barriers_kernel, a, a.blocks > 0 ? a.blocks : resident, kThreads, 0, a.stream, status,
           a.cluster);
  return status;
}

}  // namespace fused_dni::cuda
