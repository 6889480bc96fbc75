// The products with the weight and the update in place, panel by panel of the weight's columns.
// What one thread does to a panel concerns no other: dx comes before the update there.
#pragma once

#include "gemm.hpp"
#include "parallel.hpp"
#include "rules.hpp"

namespace fused_dni::FUSED_DNI_ISA {

// Features of the output that a thread owns: whole vectors, so that no two threads write to one
// cache line of a row-major result.
template <class T>
Range own_features(Index features, Index rank, Index size) {
  return part(features, kLanes<T>, rank, size);
}

// What a thread found out about the gradient before anything is changed.
template <class T>
struct alignas(kLineBytes) Report {
  T delta = 0, x = 0, vectors = 0;  // largest magnitudes; NaN if there is one
  bool product_finite = true;

  void include(T magnitude) {  // of a vector parameter's gradient
    if (!(magnitude <= vectors)) vectors = magnitude;
  }
};

template <class T>
struct WeightPhase {
  Index rows, in, out, stride;
  const T* weight;           // [O, I]
  const T* x;                // [N, I]
  const T* delta = nullptr;  // [O][stride]
  T* packed = nullptr;       // a piece a thread

  WeightPhase(Index n, Index i, Index o, const T* w, const void* input)
      : rows(n),
        in(i),
        out(o),
        stride(transposed_stride<T>(n)),
        weight(w),
        x(static_cast<const T*>(input)) {}

  void plan(Scratch& scratch, int threads) { packed = scratch.take<T>(threads * piece()); }

  // dx = delta W if wanted, then weight(o, rows, i, width, sums) for every tile of delta^T x, with
  // touch(o, rows, i, width) some time before. The caller has had a barrier behind delta.
  template <class Touch, class Body>
  void run(const Team& team, T* grad_x, bool update, Touch&& touch, Body&& body) const {
    // Threads share the columns of W; where there are fewer panels than threads, its rows too.
    const Index across = smaller(team.size, ceil_div(in, kPanel<T>));
    const Index down = team.size / across;
    const bool idle = team.rank >= across * down;
    const Range columns = idle ? Range{0, 0} : part(in, kLanes<T>, team.rank % across, across);
    const Range batch = part(rows, kTileRows, team.rank / across, down);
    const Range features = part(out, kTileRows, team.rank / across, down);
    T* scratch = packed + team.rank * piece();

    const auto multiply_x = [&](Index i, Index width) {
      multiply_packed(
          batch.size(), width, out, delta + batch.begin, 1, stride, weight + i, in, scratch,
          [](Index, Index) {},
          [&](Index n, Index count, const T* sums) {
            for (Index r = 0; r < count; ++r, sums += kPanel<T>)
              for (Index v = 0; v < width; v += kLanes<T>)
                store_upto(grad_x + (batch.begin + n + r) * in + i + v, load(sums + v), width - v);
          });
    };
    const auto multiply_weight = [&](Index i, Index width) {
      multiply_packed(
          features.size(), width, rows, delta + features.begin * stride, stride, 1, x + i, in,
          scratch, [&](Index o, Index count) { touch(features.begin + o, count, i, width); },
          [&](Index o, Index count, const T* sums) {
            body(features.begin + o, count, i, width, sums);
          });
    };

    if (grad_x != nullptr && down > 1) {  // others update rows that this thread's dx reads
      for_panels<T>(columns.begin, columns.end,
                    [&](Index i, Index width, Index) { multiply_x(i, width); });
      team.sync();
    }
    for_panels<T>(columns.begin, columns.end, [&](Index i, Index width, Index) {
      if (grad_x != nullptr && down == 1) multiply_x(i, width);
      if (update) multiply_weight(i, width);
    });
  }

  // Applies a rule to the weight, tile by tile.
  void update(const Team& team, T* grad_x, const Rule<T>& rule, const Slot<T>& slot) const {
    with_rule(rule, [&](auto kind) {
      run(
          team, grad_x, slot.parameter != nullptr,
          [&](Index o, Index count, Index i, Index width) {
            for (Index r = o; r < o + count; ++r)
              for (Index c = i; c < i + width; c += kLineBytes / Index(sizeof(T))) {
                const Index at = r * in + c;
                __builtin_prefetch(slot.parameter + at, 1);
                if (slot.first) __builtin_prefetch(slot.first + at, 1);
                if (slot.second) __builtin_prefetch(slot.second + at, 1);
              }
          },
          [&](Index o, Index count, Index i, Index width, const T* sums) {
            for (Index r = 0; r < count; ++r)
              apply_span<T, decltype(kind)::value>(rule, slot, (o + r) * in + i, width,
                                                   sums + r * kPanel<T>);
          });
    });
  }

  // Whether all of delta^T x is finite, for the thread's part of it.
  bool finite(const Team& team) const {
    Magnitude<T> magnitude;
    run(
        team, nullptr, true, [](Index, Index, Index, Index) {},
        [&](Index, Index count, Index, Index width, const T* sums) {
          for (Index r = 0; r < count; ++r)
            for (Index v = 0; v < width; v += kLanes<T>)
              magnitude.add(load(sums + r * kPanel<T> + v));
        });
    return is_finite(magnitude.value());
  }

 private:
  Index piece() const { return packed_scratch<T>(larger(rows, out)); }
};

template <class T>
T magnitude_of(const T* values, Index count) {
  Magnitude<T> magnitude;
  for (Index i = 0; i < count; i += kLanes<T>) magnitude.add(load_upto(values + i, count - i));
  return magnitude.value();
}

// Whether the gradient is finite, agreed on by all threads: nothing has been changed yet. The
// caller has had a barrier behind the reports.
template <class T>
bool agree_finite(const Team& team, Report<T>* reports, const WeightPhase<T>& product,
                  bool weight) {
  T delta = 0, x = 0;
  for (int t = 0; t < team.size; ++t) {
    const Report<T>& r = reports[t];
    if (!is_finite(r.delta) || !is_finite(r.vectors) || (weight && !is_finite(r.x))) return false;
    delta = r.delta > delta ? r.delta : delta;
    x = r.x > x ? r.x : x;
  }
  // Finite factors whose product cannot overflow need not be multiplied to know. Halved
  // throughout, so that the bound itself is exact enough and does not overflow.
  const T largest = Simd<T>::kLargest;
  if (!weight || delta <= largest / T(2) / T(product.rows) / (x > T(1) ? x : T(1))) return true;
  reports[team.rank].product_finite = product.finite(team);
  team.sync();
  for (int t = 0; t < team.size; ++t)
    if (!reports[t].product_finite) return false;
  return true;
}

inline void count_step(const RuleArguments& rule, bool applied) {
  rule.hyper[applied ? 5 : 6] += 1.0;
}

}  // namespace fused_dni::FUSED_DNI_ISA
