// A synthesizer's prediction in the transposed layout; linear.cpp makes it behind the forward of
// its layer, synthesizer.cpp on its own.
#pragma once

#include "activation.hpp"
#include "gemm.hpp"
#include "parallel.hpp"

namespace fused_dni::FUSED_DNI_ISA {

enum SynthesizerKind { kDense, kLowRank, kDiagonal, kCrossEntropy };
// Whether h is multiplied by `down` first, and what comes of that by the weight.
constexpr bool reduces(SynthesizerKind kind) { return kind == kLowRank || kind == kCrossEntropy; }
enum SynthesizerSlot { kWeight, kDown, kContext, kBias };

// As many classes are cheaper as a product with one-hot columns than as a gather.
constexpr Index kOneHotClasses = 32;

// What is zero, whatever x is, in rows of weight zero.
template <class T>
FUSED_DNI_INLINE Vec<T> in_the_mean(Vec<T> x, Vec<T> weight) {
  return weight > Vec<T>{} ? x * weight : Vec<T>{};
}

// As many elements as a vector of T has.
template <class T, class Element>
struct Many {
  typedef Element V __attribute__((vector_size(sizeof(Element) * kLanes<T>)));
};

// Whichever of a vector's elements lie before `width`, zeros behind them; of bfloat16 too.
template <class T>
FUSED_DNI_INLINE Vec<T> widened_upto(const T* from, Index width) {
  return load_upto(from, width);
}
template <class T>
FUSED_DNI_INLINE Vec<T> widened_upto(const std::uint16_t* from, Index width) {
  typename Many<T, std::uint16_t>::V bits{};
  __builtin_memcpy(&bits, from, sizeof(std::uint16_t) * smaller(width, kLanes<T>));
  const auto words = __builtin_convertvector(bits, typename Many<T, std::uint32_t>::V) << 16;
  return __builtin_convertvector((typename Many<T, float>::V)words, Vec<T>);
}

// The rows of a softmax's head that a batch's labels name.
template <class T>
struct LabelRows {
  const void* table;  // [K, O], null for none
  bool narrow;        // of bfloat16, else of T
  const std::int64_t* labels;
  std::int64_t ignored;
  Index rows, features, counted;  // N, O, rows in the loss, at least 1

  LabelRows(const SynthesizerArguments& from, Index n, Index o)
      : table(from.table),
        narrow(from.narrow),
        labels(from.labels),
        ignored(from.ignored),
        rows(n),
        features(o),
        counted(larger(from.counted, 1)) {}

  // The weights [stride] of rows in a mean over those in the loss: `factor`, or zero.
  void weigh(T factor, Index stride, T* to) const {
    for (Index n = 0; n < stride; ++n) to[n] = n < rows && labels[n] != ignored ? factor : T(0);
  }

  // f(o, n, width, v) for blocks of all rows and features [first, last): v[i] has feature o + i of
  // the rows from n on, i < width; zeros where a row is not in the loss.
  template <class F>
  void each(Index first, Index last, F&& f) const {
    if (narrow)
      blocks<std::uint16_t>(first, last, f);
    else
      blocks<T>(first, last, f);
  }

 private:
  template <class Element, class F>
  void blocks(Index first, Index last, F& f) const {
    constexpr int L = kLanes<T>;
    const Element* all = static_cast<const Element*>(table);
    for (Index n = 0; n < rows; n += L)
      for (Index o = first; o < last; o += L) {
        const Index width = smaller(L, last - o);
        Vec<T> v[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i)
          v[i] = n + i < rows && labels[n + i] != ignored
                     ? widened_upto<T>(all + labels[n + i] * features + o, width)
                     : Vec<T>{};
        transpose_registers<T>(v);
        f(o, n, width, v);
      }
  }
};

template <class T>
struct Predictor {
  SynthesizerKind kind;
  Index rows, features, rank, classes;  // N, O, R, K
  Index stride;                         // of the transposed layout
  const T *weight, *down, *context_weight, *bias, *vectors;
  const std::int64_t* labels;
  bool one_hot, gather;
  LabelRows<T> head;

  T* context = nullptr;  // [K][stride]: one-hot labels or conditioning vectors, transposed
  T* partial = nullptr;  // [threads][R][stride]: each thread's part of U hT
  T* reduced = nullptr;  // [threads][R][stride]: their sum, a copy a thread
  T* mean = nullptr;     // [stride]: N / rows in the loss in these, 0 in the others

  Predictor(const SynthesizerArguments& from, Index n, Index o)
      : kind(static_cast<SynthesizerKind>(from.kind)),
        rows(n),
        features(o),
        rank(reduces(kind) ? from.rank : 0),
        classes(from.context_weight && !from.table &&
                        (from.vectors || (from.labels && kind != kCrossEntropy))
                    ? from.classes
                    : 0),
        stride(transposed_stride<T>(n)),
        weight(static_cast<const T*>(from.weight)),
        down(static_cast<const T*>(from.down)),
        context_weight(static_cast<const T*>(from.context_weight)),
        bias(static_cast<const T*>(from.bias)),
        vectors(static_cast<const T*>(from.vectors)),
        labels(from.labels),
        one_hot(classes > 0 && labels && classes <= kOneHotClasses),
        gather(classes > 0 && labels && !one_hot),
        head(from, n, o) {}

  void plan(Scratch& scratch, int threads) {
    context = scratch.take<T>(gather ? 0 : classes * stride);
    partial = scratch.take<T>(threads * rank * stride);
    reduced = scratch.take<T>(threads * rank * stride);
    mean = scratch.take<T>(head.table ? stride : 0);
  }

  // Phase 1, any time before the barrier in front of phase 3: this thread's rows of the context.
  void transpose_context(const Team& team) const {
    if (head.table && team.rank == 0)
      head.weigh(T(static_cast<double>(rows) / static_cast<double>(head.counted)), stride, mean);
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
    if (reduces(kind))
      multiply(rank, rows, own.size(), down + own.begin, features, 1, h + own.begin * stride,
               stride, partial + team.rank * rank * stride, stride, false);
  }

  // Phase 3, behind the barrier: all threads' parts are added, by every thread for itself.
  void combine(const Team& team) const {
    if (!reduces(kind)) return;
    const Index count = rank * stride;
    T* sum = reduced + team.rank * count;
    for (Index i = 0; i < count; i += kLanes<T>) {
      Vec<T> v = load(partial + i);
      for (int t = 1; t < team.size; ++t) v += load(partial + t * count + i);
      store(sum + i, v);
    }
    if (kind == kCrossEntropy) subtract_from_softmax(sum);
  }

  // Phase 4: kappa s for features [first, last) to out [..][stride].
  void predict(const Team& team, Index first, Index last, const T* h, T* out) const {
    const Index count = last - first;
    if (kind == kDense)
      multiply(count, rows, features, weight + first * features, features, 1, h, stride, out,
               stride, false);
    else if (reduces(kind))
      multiply(count, rows, rank, weight + first * rank, rank, 1,
               reduced + team.rank * rank * stride, stride, out, stride, false);
    else
      for (Index o = first; o < last; ++o)
        for (Index n = 0; n < rows; n += kLanes<T>)
          store(out + (o - first) * stride + n, weight[o] * load(h + o * stride + n));
    if (classes > 0 && !gather && kind != kCrossEntropy)
      multiply(count, rows, classes, context_weight + first * classes, classes, 1, context, stride,
               out, stride, true);
    if (head.table) {
      head.each(first, last, [&](Index o, Index n, Index width, const Vec<T>* rows_of) {
        for (Index i = 0; i < width; ++i) {
          T* at = out + (o - first + i) * stride + n;
          const Vec<T> sum = load(at) + (bias ? bias[o + i] : T(0)) - *context_weight * rows_of[i];
          store(at, in_the_mean<T>(sum, load(mean + n)));
        }
      });
      return;
    }
    if (bias == nullptr && !gather) return;
    for (Index o = first; o < last; ++o) {
      T* row = out + (o - first) * stride;
      const T shift = bias ? bias[o] : T(0);
      for (Index n = 0; n < rows; n += kLanes<T>) store(row + n, load(row + n) + shift);
      if (gather)
        for (Index n = 0; n < rows; ++n) row[n] += context_weight[o * classes + labels[n]];
    }
  }

 private:
  // Of U hT [K][stride] softmax(h U^T + u), less what is known of the classes.
  void subtract_from_softmax(T* logits) const {
    for (Index n = 0; n < rows; n += kLanes<T>) {
      T* const column = logits + n;
      Vec<T> most = load(column) + context_weight[0], sum{};
      for (Index k = 0; k < rank; ++k) {
        const Vec<T> v = load(column + k * stride) + context_weight[k];
        store(column + k * stride, v);
        most = v > most ? v : most;
      }
      for (Index k = 0; k < rank; ++k) {
        const Vec<T> e = Math<T>::exp(load(column + k * stride) - most);
        store(column + k * stride, e);
        sum += e;
      }
      const Vec<T> scale = T(1) / sum;
      for (Index k = 0; k < rank; ++k) {
        const Vec<T> p = load(column + k * stride) * scale;
        store(column + k * stride, vectors ? p - load(context + k * stride + n) : p);
      }
    }
    for (Index n = 0; labels && n < rows; ++n) logits[labels[n] * stride + n] -= T(1);
  }
};

}  // namespace fused_dni::FUSED_DNI_ISA
