// What kernels share: the grid's barrier, sums over a block, activation functions, update rules.
// Formulas as in kernels/common.py and fused_dni/backends/reference.
#pragma once

#include <cmath>

#include "barrier.hpp"
#include "device.cuh"
#include "matrix.hpp"

namespace fused_dni::cuda {

inline constexpr int kThreads = 256;  // of a block, in every kernel

// ---- Waiting for all blocks -----------------------------------------------------------------------

// Waits until all blocks of a cooperative launch are here; what a block wrote before is visible to
// every block behind. `state` is one int that is zero before its first use and needs no attention
// afterwards: every round adds exactly 2^31 to it, so that its low bits count arrivals and return
// to zero, and its top bit is the generation, which changes when all have come. A block that still
// waits for a generation has not arrived at the next one (tests/test_triton_barrier.py has the
// proof, of the same barrier).
//
// A wait has a bound, by the clock, at which a block first looks behind so many looks at the word:
// a wait as it should be knows nothing of it.
inline constexpr unsigned kLooks = 256;

// What a block leaves that gives up, read by stalled_text: in one number, never zero.
FUSED_DNI_DEVICE std::uint64_t stall_record(int launch, Phase phase) {
  return std::uint64_t{1} << 63 | static_cast<std::uint64_t>(phase) << 48 |
         static_cast<std::uint64_t>(block() & 0xffff) << 32 | static_cast<std::uint32_t>(launch);
}

FUSED_DNI_DEVICE void grid_barrier(const Barrier& barrier, Phase phase) {
  block_barrier();
  if (thread() == 0) {
    int* const state = barrier.word;
    const unsigned top = 0x80000000u;
    const int arrival =
        block() == 0 ? static_cast<int>(top - static_cast<unsigned>(blocks() - 1)) : 1;
    const int before = atomic_add_acquire_release(state, arrival);
    std::uint64_t since = 0;
    unsigned looks = 0;
    while ((static_cast<unsigned>(load_acquire(state) ^ before) & top) == 0) {
      pause();
      if (++looks % kLooks != 0 || barrier.bound == 0) continue;
      const std::uint64_t now = nanoseconds();
      if (looks == kLooks) since = now;
      if (now - since > barrier.bound)
        give_up(barrier.stalled, stall_record(barrier.launch, phase));
    }
  }
  block_barrier();
}

// ---- Sums and maxima, in an order that depends on the number of threads alone ---------------------

template <class T>
FUSED_DNI_DEVICE T warp_sum(T value) {
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) value += shuffle_xor(value, apart);
  return value;
}
// Of magnitudes.
FUSED_DNI_DEVICE float warp_max(float value) {
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) value = fmaxf(value, shuffle_xor(value, apart));
  return value;
}

// Of all threads of the block, to all of them; the barrier before lets shared memory be in use.
template <class T>
FUSED_DNI_DEVICE T block_sum(T value, SharedArena arena) {
  const Shared<T> parts = arena.take<T>(32);
  value = warp_sum(value);
  block_barrier();
  if (lane() == 0) parts.store(warp(), value);
  block_barrier();
  T sum = parts.load(0);
#pragma unroll
  for (int i = 1; i < kThreads / 32; ++i) sum += parts.load(i);
  block_barrier();
  return sum;
}
FUSED_DNI_DEVICE float block_max(float value, SharedArena arena) {
  const Shared<float> parts = arena.take<float>(32);
  value = warp_max(value);
  block_barrier();
  if (lane() == 0) parts.store(warp(), value);
  block_barrier();
  float largest = parts.load(0);
#pragma unroll
  for (int i = 1; i < kThreads / 32; ++i) largest = fmaxf(largest, parts.load(i));
  block_barrier();
  return largest;
}

// The magnitude of a number, infinity for NaN: what is not finite compares as such.
FUSED_DNI_DEVICE float magnitude(float value) {
  return std::isnan(value) ? INFINITY : std::fabs(value);
}

// ---- Activation functions: fused_dni.backends.reference.activation ----------------------------------------

// In the order of fused_dni.ops.types.ACTIVATIONS.
enum Activation { kIdentity, kRelu, kGelu, kGeluTanh, kSilu, kTanh, kSigmoid, kSoftplus, kMish };

// Whether the derivative is a function of the output (FROM_OUTPUT).
FUSED_DNI_BOTH bool from_output(int activation) {
  return activation == kIdentity || activation == kRelu || activation == kTanh ||
         activation == kSigmoid;
}

FUSED_DNI_DEVICE float sigmoid(float x) {
  const float decay = expf(-fabsf(x));
  return (x < 0.0f ? decay : 1.0f) / (1.0f + decay);
}
FUSED_DNI_DEVICE float softplus(float x) {
  return (x > 0.0f || std::isnan(x) ? x : 0.0f) + log1pf(expf(-fabsf(x)));
}

inline constexpr float kInvSqrt2 = 0.70710678118654752f;
inline constexpr float kInvSqrt2Pi = 0.39894228040143268f;
inline constexpr float kSqrt2OverPi = 0.79788456080286536f;
inline constexpr float kGeluCubic = 0.044715f;

// phi(y).
FUSED_DNI_DEVICE float activate(float y, int activation) {
  switch (activation) {
    case kRelu: return y < 0.0f ? 0.0f : y;  // NaN stays NaN
    case kGelu: return y * 0.5f * (1.0f + erff(y * kInvSqrt2));
    case kGeluTanh: return y * 0.5f * (1.0f + tanhf((y + y * y * y * kGeluCubic) * kSqrt2OverPi));
    case kSilu: return y * sigmoid(y);
    case kTanh: return tanhf(y);
    case kSigmoid: return sigmoid(y);
    case kSoftplus: return softplus(y);
    case kMish: return y * tanhf(softplus(y));
    default: return y;
  }
}

// phi'; from h alone where from_output, y is not read then.
FUSED_DNI_DEVICE float slope(float y, float h, int activation) {
  switch (activation) {
    case kRelu: return h > 0.0f ? 1.0f : 0.0f;
    case kTanh: return 1.0f - h * h;
    case kSigmoid: return h * (1.0f - h);
    case kGelu: return 0.5f * (1.0f + erff(y * kInvSqrt2)) + y * kInvSqrt2Pi * expf(-0.5f * y * y);
    case kGeluTanh: {
      const float t = tanhf((y + y * y * y * kGeluCubic) * kSqrt2OverPi);
      const float inner = (1.0f + 3.0f * (y * y * kGeluCubic)) * kSqrt2OverPi;
      return 0.5f * (1.0f + t) + 0.5f * y * (1.0f - t * t) * inner;
    }
    case kSilu: {
      const float s = sigmoid(y);
      return s * (1.0f + y * (1.0f - s));
    }
    case kSoftplus: return sigmoid(y);
    case kMish: {
      const float t = tanhf(softplus(y));
      return t + y * (1.0f - t * t) * sigmoid(y);
    }
    default: return 1.0f;
  }
}

// ---- Update rules: fused_dni.backends.reference.rules ------------------------------------------------------

// In the order of fused_dni.ops.types.RULES.
enum RuleKind { kNoRule = -1, kSgd, kAdam, kAdamW };

// Indices into a rule's hyper-parameters: fused_dni.ops.types.RuleTensors.
enum Hyper { kLr, kBeta1, kBeta2, kEps, kWeightDecay, kStep, kSkipped };

// What a rule multiplies by in one step, from hyper-parameters in double, where 1 - beta and the
// corrections still have their digits.
struct RuleFactors {
  int kind;
  bool nesterov;
  float lr;            // adam: over 1 - beta1^t
  float beta1, beta2;  // beta1 is SGD's momentum
  float rest1, rest2;  // 1 - beta
  float root;          // 1 / sqrt(1 - beta2^t)
  float eps;
  float decay;  // L2 penalty; adamw: what decoupled decay leaves of a parameter
};

// `step` counts this one too.
FUSED_DNI_DEVICE RuleFactors rule_factors(const double* hyper, double step, int kind,
                                          bool nesterov) {
  RuleFactors f{};
  const double lr = hyper[kLr], beta1 = hyper[kBeta1], beta2 = hyper[kBeta2];
  f.kind = kind;
  f.nesterov = nesterov;
  f.lr = static_cast<float>(lr);
  f.beta1 = static_cast<float>(beta1);
  f.decay = static_cast<float>(hyper[kWeightDecay]);
  if (kind == kSgd) return f;
  f.lr = static_cast<float>(lr / (1.0 - pow(beta1, step)));
  f.beta2 = static_cast<float>(beta2);
  f.rest1 = static_cast<float>(1.0 - beta1);
  f.rest2 = static_cast<float>(1.0 - beta2);
  f.root = static_cast<float>(1.0 / sqrt(1.0 - pow(beta2, step)));
  f.eps = static_cast<float>(hyper[kEps]);
  if (kind == kAdamW) f.decay = static_cast<float>(1.0 - lr * hyper[kWeightDecay]);
  return f;
}

// Reads what a rule needs of element `at`: a parameter and its moments, as far as there are any.
FUSED_DNI_DEVICE void read_element(const Slot& slot, std::int64_t at, const RuleFactors& f,
                                   float& p, float& m, float& v) {
  if (f.kind == kNoRule) return;
  p = slot.parameter[at];
  if (slot.first != nullptr) m = slot.first[at];
  if (slot.second != nullptr) v = slot.second[at];
}
// Applies the gradient of element `at`, of which the rest was read, or stores it.
FUSED_DNI_DEVICE void settle(const Slot& slot, std::int64_t at, float g, float p, float m, float v,
                             const RuleFactors& f) {
  if (f.kind == kNoRule) {
    slot.gradient[at] = g;
    return;
  }
  if (f.kind == kAdamW)
    p *= f.decay;
  else
    g += f.decay * p;
  if (f.kind == kSgd) {
    if (slot.first != nullptr) {
      m = f.beta1 * m + g;
      slot.first[at] = m;
      g = f.nesterov ? g + f.beta1 * m : m;
    }
    slot.parameter[at] = p - f.lr * g;
    return;
  }
  m += f.rest1 * (g - m);
  v = f.beta2 * v + f.rest2 * g * g;
  slot.first[at] = m;
  slot.second[at] = v;
  slot.parameter[at] = p - f.lr * (m / (sqrtf(v) * f.root + f.eps));
}
FUSED_DNI_DEVICE void settle(const Slot& slot, std::int64_t at, float g, const RuleFactors& f) {
  float p = 0.0f, m = 0.0f, v = 0.0f;
  read_element(slot, at, f, p, m, v);
  settle(slot, at, g, p, m, v, f);
}

}  // namespace fused_dni::cuda
