// The LSTM's update: the weights' gradients are formed where the rule applies them, all layers' or
// none. They are finite where the largest magnitudes of their factors say so; the others are formed
// once before, to be looked at.
#include "lstm.cuh"

namespace fused_dni::cuda {
namespace {

inline constexpr float kLargest = 1.0e38f;  // well inside float32

enum Factor { kDelta, kInput, kHidden };

// What blocks have found: the largest magnitudes of layer k's factors, and whether a gradient that
// one of them has formed is not finite.
FUSED_DNI_DEVICE float* found(const LSTMUpdate& a, int k, int factor) {
  return a.workspace + (3 * k + factor) * kMostBlocks;
}
FUSED_DNI_DEVICE float* failures(const LSTMUpdate& a) { return found(a, a.layers, 0); }

FUSED_DNI_DEVICE float largest_found(const float* of) {
  float largest = 0.0f;
  for (int i = thread(); i < blocks(); i += kThreads) largest = fmaxf(largest, of[i]);
  return block_max(largest, SharedArena());
}

template <class X>
FUSED_DNI_DEVICE void measure(const LSTMUpdate& a) {
  for (int k = 0; k < a.layers; ++k) {
    const LSTMUpdateLayer& layer = a.layer[k];
    const void* factors[3] = {layer.delta, layer.input, layer.hidden};
    const int columns[3] = {4 * a.size, layer.in, a.size};
    for (int factor = kDelta; factor <= kHidden; ++factor) {
      const X* values = static_cast<const X*>(factors[factor]);
      float largest = 0.0f;
      each_element(static_cast<std::int64_t>(layer.count) * columns[factor], [&](std::int64_t i) {
        largest = fmaxf(largest, magnitude(to_float(values[i])));
      });
      largest = block_max(largest, SharedArena());
      if (thread() == 0) found(a, k, factor)[block()] = largest;
    }
  }
}

// Of which of a layer's parameters gradients are formed.
struct Wanted {
  bool ih, hh, bias;
  FUSED_DNI_DEVICE bool any() const { return ih || hh || bias; }
};

FUSED_DNI_DEVICE Wanted trained(const LSTMUpdateLayer& layer) {
  const Slot* p = layer.slot;
  return {p[0].parameter != nullptr, p[1].parameter != nullptr,
          p[2].parameter != nullptr || p[3].parameter != nullptr};
}

// Those that are not known to be finite.
FUSED_DNI_DEVICE Wanted doubtful(const LSTMUpdate& a, int k) {
  const LSTMUpdateLayer& layer = a.layer[k];
  const Wanted all = trained(layer);
  const float delta = largest_found(found(a, k, kDelta)) * static_cast<float>(layer.count);
  const float input = largest_found(found(a, k, kInput)) * delta;
  const float hidden = largest_found(found(a, k, kHidden)) * delta;
  return {all.ih && !(input < kLargest), all.hh && !(hidden < kLargest),
          all.bias && !(delta < kLargest)};
}

template <class Op, class X>
FUSED_DNI_KERNEL(kThreads)
update_kernel(FUSED_DNI_ARGUMENT LSTMUpdate a) {
  const SharedArena arena;
  const double done = a.hyper[kStep] + 1.0;  // nobody writes it before the barrier
  measure<X>(a);
  grid_barrier(a.barrier, Phase::kWeight);
  bool trial = false, failed = false;
  for (int k = 0; k < a.layers; ++k) trial = doubtful(a, k).any() || trial;
  const RuleFactors factors = rule_factors(a.hyper, done, a.kind, a.nesterov);
  while (true) {
    Turn turn;
    for (int i = 0; i < 2 * a.layers; ++i) {
      const LSTMUpdateLayer& layer = a.layer[i / 2];
      const Slot* p = layer.slot;
      const X* delta = static_cast<const X*>(layer.delta);
      const int matrix = i % 2, columns = matrix == 0 ? layer.in : a.size;
      const void* of = matrix == 0 ? layer.input : layer.hidden;
      const Wanted wanted = trial ? doubtful(a, i / 2) : trained(layer);
      const auto take = [&](int n, std::int64_t at, float value) {
        if (trial)
          failed = failed || !std::isfinite(value);
        else if (p[n].parameter != nullptr)
          settle(p[n], at, value, factors);
      };
      if (matrix == 0 ? wanted.ih : wanted.hh)
        weight_gradient<Op>(arena, turn, delta, static_cast<const X*>(of), 4 * a.size, columns,
                            layer.count, [&](int row, int column, float value) {
                              take(matrix, static_cast<std::int64_t>(row) * columns + column,
                                   value);
                            });
      if (matrix == 1 && wanted.bias)
        bias_gradient(arena, turn, delta, 4 * a.size, layer.count, [&](int column, float value) {
          take(2, column, value);
          take(3, column, value);
        });
    }
    if (!trial) break;
    trial = false;
    failed = block_any(failed);
    if (thread() == 0) failures(a)[block()] = failed ? 1.0f : 0.0f;
    grid_barrier(a.barrier, Phase::kUpdate);
    failed = largest_found(failures(a)) > 0.0f;
    if (failed) break;
  }
  if (block() == 0 && thread() == 0) a.hyper[failed ? kSkipped : kStep] += 1.0;
}

template <class Op, class X>
Status launch_update(const LSTMUpdate& a) {
  Status status;
  const int shared = Square<Op>::kSharedBytes;
  const int resident = resident_blocks(update_kernel<Op, X>, kThreads, shared, status);
  if (!status.ok()) return status;
  std::int64_t tiles = 0;
  for (int k = 0; k < a.layers; ++k)
    tiles += (4 * a.size + 63) / 64 * ((a.layer[k].in + 63) / 64 + (a.size + 63) / 64);
  launch(update_kernel<Op, X>, a,
         static_cast<int>(std::min<std::int64_t>({resident, tiles, kMostBlocks})), kThreads, shared,
         a.stream, status);
  return status;
}

}  // namespace

Status lstm_update(const LSTMUpdate& a) {
  switch (a.type) {
    case kBfloat16: return launch_update<Bf16, bf16>(a);
    case kFloat16: return launch_update<Tf32, fp16>(a);
    default: return a.exact ? launch_update<Fp32, float>(a) : launch_update<Tf32, float>(a);
  }
}

}  // namespace fused_dni::cuda
