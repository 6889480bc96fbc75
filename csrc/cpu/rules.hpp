// Update rules on vectors: the formulas of torch.optim.SGD (dampening 0), Adam and AdamW.
#pragma once

#include "ops.hpp"
#include "simd.hpp"

namespace fused_dni::FUSED_DNI_ISA {

// The constants of one step, from the hyper-parameters as they are before it.
template <class T>
struct Rule {
  enum Kind { kPlain, kMomentum, kNesterov, kAdam, kAdamW };

  Kind kind;
  T lr;            // with Adam already divided by 1 - beta1^t
  T beta1, beta2;  // beta1 is SGD's momentum
  T new1, new2;    // 1 - beta
  T eps;
  T decay;         // L2 penalty
  T keep;          // AdamW: what decoupled decay leaves of a parameter
  T second_scale;  // 1 / sqrt(1 - beta2^t)

  explicit Rule(const RuleArguments& from) {
    const double* hyper = from.hyper;
    const double step = hyper[5] + static_cast<double>(from.ahead) + 1.0;
    bool moments = false;
    for (const void* moment : from.first) moments = moments || moment != nullptr;
    if (from.kind == 0)
      kind = !moments ? kPlain : from.nesterov ? kNesterov : kMomentum;
    else
      kind = from.kind == 1 ? kAdam : kAdamW;
    const bool adam = from.kind != 0;
    lr = T(adam ? hyper[0] / (1.0 - __builtin_pow(hyper[1], step)) : hyper[0]);
    beta1 = T(hyper[1]);
    beta2 = T(hyper[2]);
    new1 = T(1.0 - hyper[1]);
    new2 = T(1.0 - hyper[2]);
    eps = T(hyper[3]);
    decay = T(from.kind == 2 ? 0.0 : hyper[4]);
    keep = T(1.0 - hyper[0] * hyper[4]);
    second_scale = T(adam ? 1.0 / __builtin_sqrt(1.0 - __builtin_pow(hyper[2], step)) : 0.0);
  }

  template <Kind kKind>
  FUSED_DNI_INLINE void apply(Vec<T>& p, Vec<T>& first, Vec<T>& second, Vec<T> g) const {
    if constexpr (kKind == kAdamW)
      p *= keep;
    else
      g += decay * p;
    if constexpr (kKind == kPlain) {
      p -= lr * g;
    } else if constexpr (kKind == kMomentum) {
      first = beta1 * first + g;
      p -= lr * first;
    } else if constexpr (kKind == kNesterov) {
      first = beta1 * first + g;
      p -= lr * (g + beta1 * first);
    } else {
      first = beta1 * first + new1 * g;
      second = beta2 * second + new2 * (g * g);
      p -= lr * (first / (square_root(second) * second_scale + eps));
    }
  }
};

// One slot of a rule: a parameter and its moments, same shape each.
template <class T>
struct Slot {
  T* parameter = nullptr;  // null: nothing to update
  T* first = nullptr;
  T* second = nullptr;
};

template <class T>
FUSED_DNI_INLINE Slot<T> slot_of(const RuleArguments& rule, int index, void* parameter) {
  if (!rule.trainable[index]) return {};
  return {static_cast<T*>(parameter), static_cast<T*>(rule.first[index]),
          static_cast<T*>(rule.second[index])};
}

// Elements [begin, begin + count) of a slot, with their gradient at g.
template <class T, typename Rule<T>::Kind kKind>
FUSED_DNI_INLINE void apply_span(const Rule<T>& rule, const Slot<T>& slot, Index begin, Index count,
                                 const T* g) {
  constexpr bool kFirst = kKind != Rule<T>::kPlain;
  constexpr bool kSecond = kKind == Rule<T>::kAdam || kKind == Rule<T>::kAdamW;
  Index i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) {
    Vec<T> p = load(slot.parameter + begin + i), first{}, second{};
    if constexpr (kFirst) first = load(slot.first + begin + i);
    if constexpr (kSecond) second = load(slot.second + begin + i);
    rule.template apply<kKind>(p, first, second, load(g + i));
    store(slot.parameter + begin + i, p);
    if constexpr (kFirst) store(slot.first + begin + i, first);
    if constexpr (kSecond) store(slot.second + begin + i, second);
  }
  if (const Index left = count - i; left > 0) {
    Vec<T> p = load_partial(slot.parameter + begin + i, left), first{}, second{};
    if constexpr (kFirst) first = load_partial(slot.first + begin + i, left);
    if constexpr (kSecond) second = load_partial(slot.second + begin + i, left);
    rule.template apply<kKind>(p, first, second, load_partial(g + i, left));
    store_partial(slot.parameter + begin + i, p, left);
    if constexpr (kFirst) store_partial(slot.first + begin + i, first, left);
    if constexpr (kSecond) store_partial(slot.second + begin + i, second, left);
  }
}

template <class T, typename Rule<T>::Kind kKind>
struct RuleKind {
  static constexpr auto value = kKind;
};

// Calls body with the rule's kind as a compile-time constant.
template <class T, class Body>
FUSED_DNI_INLINE void with_rule(const Rule<T>& rule, Body&& body) {
  using R = Rule<T>;
  switch (rule.kind) {
    case R::kPlain: return body(RuleKind<T, R::kPlain>{});
    case R::kMomentum: return body(RuleKind<T, R::kMomentum>{});
    case R::kNesterov: return body(RuleKind<T, R::kNesterov>{});
    case R::kAdam: return body(RuleKind<T, R::kAdam>{});
    default: return body(RuleKind<T, R::kAdamW>{});
  }
}

// Applies a gradient that lies in memory; a slot that may not be written is left alone.
template <class T>
void apply_slot(const Rule<T>& rule, const Slot<T>& slot, Index begin, Index end, const T* g) {
  if (slot.parameter == nullptr || begin >= end) return;
  with_rule(rule, [&](auto kind) {
    apply_span<T, decltype(kind)::value>(rule, slot, begin, end - begin, g + begin);
  });
}

}  // namespace fused_dni::FUSED_DNI_ISA
