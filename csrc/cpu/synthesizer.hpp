// A synthesizer's prediction in the transposed layout; linear.cpp makes it behind the forward of
// its layer, synthesizer.cpp on its own.
#pragma once

#include "gemm.hpp"
#include "parallel.hpp"

namespace fused_dni::FUSED_DNI_ISA {

enum SynthesizerKind { kDense, kLowRank, kDiagonal };
enum SynthesizerSlot { kWeight, kDown, kContext, kBias };

// As many classes are cheaper as a product with one-hot columns than as a gather.
constexpr Index kOneHotClasses = 32;

template <class T>
struct Predictor {
  SynthesizerKind kind;
  Index rows, features, rank, classes;  // N, O, R, K
  Index stride;                         // of the transposed layout
  const T *weight, *down, *context_weight, *bias, *vectors;
  const std::int64_t* labels;
  bool one_hot, gather;

  T* context = nullptr;  // [K][stride]: one-hot labels or conditioning vectors, transposed
  T* partial = nullptr;  // [threads][R][stride]: each thread's part of U hT
  T* reduced = nullptr;  // [threads][R][stride]: their sum, a copy a thread

  Predictor(const SynthesizerArguments& from, Index n, Index o)
      : kind(static_cast<SynthesizerKind>(from.kind)),
        rows(n),
        features(o),
        rank(kind == kLowRank ? from.rank : 0),
        classes(from.context_weight && (from.labels || from.vectors) ? from.classes : 0),
        stride(transposed_stride<T>(n)),
        weight(static_cast<const T*>(from.weight)),
        down(static_cast<const T*>(from.down)),
        context_weight(static_cast<const T*>(from.context_weight)),
        bias(static_cast<const T*>(from.bias)),
        vectors(static_cast<const T*>(from.vectors)),
        labels(from.labels),
        one_hot(classes > 0 && labels && classes <= kOneHotClasses),
        gather(classes > 0 && labels && !one_hot) {}

  void plan(Scratch& scratch, int threads) {
    context = scratch.take<T>(gather ? 0 : classes * stride);
    partial = scratch.take<T>(threads * rank * stride);
    reduced = scratch.take<T>(threads * rank * stride);
  }

  // Phase 1, any time before the barrier in front of phase 3: this thread's rows of the context.
  void transpose_context(const Team& team) const {
    if (classes == 0 || gather) return;
    const Range own = part(classes, kLanes<T>, team.rank, team.size);
    if (!one_hot) {
      to_transposed(vectors + own.begin, classes, rows, own.size(), context + own.begin * stride,
                    stride);
      return;
    }
    for (Index k = own.begin; k < own.end; ++k)
      __builtin_memset(context + k * stride, 0, sizeof(T) * stride);
    for (Index n = 0; n < rows; ++n)
      if (labels[n] >= own.begin && labels[n] < own.end) context[labels[n] * stride + n] = T(1);
  }

  // Phase 2, when this thread has its features of hT; a barrier follows unless `local`.
  void reduce(const Team& team, Range own, const T* h) const {
    if (kind == kLowRank)
      multiply(rank, rows, own.size(), down + own.begin, features, 1, h + own.begin * stride,
               stride, partial + team.rank * rank * stride, stride, false);
  }

  // Phase 3, behind the barrier: all threads' parts are added, by every thread for itself.
  void combine(const Team& team) const {
    if (kind != kLowRank) return;
    const Index count = rank * stride;
    T* sum = reduced + team.rank * count;
    for (Index i = 0; i < count; i += kLanes<T>) {
      Vec<T> v = load(partial + i);
      for (int t = 1; t < team.size; ++t) v += load(partial + t * count + i);
      store(sum + i, v);
    }
  }

  // Phase 4: kappa s for features [first, last) to out [..][stride].
  void predict(const Team& team, Index first, Index last, const T* h, T* out) const {
    const Index count = last - first;
    if (kind == kDense)
      multiply(count, rows, features, weight + first * features, features, 1, h, stride, out,
               stride, false);
    else if (kind == kLowRank)
      multiply(count, rows, rank, weight + first * rank, rank, 1,
               reduced + team.rank * rank * stride, stride, out, stride, false);
    else
      for (Index o = first; o < last; ++o)
        for (Index n = 0; n < rows; n += kLanes<T>)
          store(out + (o - first) * stride + n, weight[o] * load(h + o * stride + n));
    if (classes > 0 && !gather)
      multiply(count, rows, classes, context_weight + first * classes, classes, 1, context, stride,
               out, stride, true);
    if (bias == nullptr && !gather) return;
    for (Index o = first; o < last; ++o) {
      T* row = out + (o - first) * stride;
      const T shift = bias ? bias[o] : T(0);
      for (Index n = 0; n < rows; n += kLanes<T>) store(row + n, load(row + n) + shift);
      if (gather)
        for (Index n = 0; n < rows; ++n) row[n] += context_weight[o * classes + labels[n]];
    }
  }
};

}  // namespace fused_dni::FUSED_DNI_ISA
