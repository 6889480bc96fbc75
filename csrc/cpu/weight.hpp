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

// Threads arranged to share a matrix: its rows (or columns) first, `units` of them at most, the
// other side if threads are left over.
struct Grid {
  Index majors, minors, major, minor;

  Grid(const Team& team, Index units)
      : majors(smaller(team.size, units)),
        minors(team.size / majors),
        major(team.rank % majors),
        minor(team.rank / majors) {}

  // This thread's part of the side that is shared first; nothing for a thread too many.
  Range major_part(Index count, Index unit) const {
    return minor < minors ? part(count, unit, major, majors) : Range{0, 0};
  }
};

// Where a product reads nothing of C that could be fetched ahead.
constexpr auto kNoTouch = [](Index, Index, Index, Index) {};

template <class T>
struct WeightPhase {
  Index rows, in, out, stride;
  const T* weight;            // [O, I]
  const T* x;                 // [N, I], or [I][stride]
  bool x_transposed = false;  // which
  const T* delta = nullptr;   // [O][stride]
  T* packed = nullptr;        // a piece a thread
  Index piece = 0;            // its elements

  WeightPhase(Index n, Index i, Index o, const T* w, const void* input)
      : rows(n),
        in(i),
        out(o),
        stride(transposed_stride<T>(n)),
        weight(w),
        x(static_cast<const T*>(input)) {}

  // Elements of scratch that a thread needs.
  Index needed() const {
    return larger(packed_scratch<T>(larger(rows, out)), wide_scratch<T>(rows, in));
  }
  void plan(Scratch& scratch, int threads) {
    piece = needed();
    packed = scratch.take<T>(threads * piece);
  }

  // Makes of the thread's features of delta what the products need of it; a barrier follows.
  void prepare(Range, bool) const {}

  // dx = delta W if wanted, then strip(i, width, features, scratch) for every strip of W's columns
  // and the rows of W that this thread owns of it. The caller has had a barrier behind delta.
  template <class Strip>
  void run(const Team& team, void* to, bool wanted, Strip&& strip,
           Index widest = kStripVectors) const {
    T* grad_x = static_cast<T*>(to);
    T* scratch = packed + team.rank * piece;
    if (grad_x != nullptr) {  // threads share the columns of dx; if those are few, its rows too
      const Grid grid(team, ceil_div(in, kPanel<T>));
      const Range batch = part(rows, kTileRows, grid.minor, grid.minors);
      const Range columns = grid.major_part(in, kLanes<T>);
      for_strips<T>(columns.begin, columns.end, kStripVectors, [&](Index i, Index width, Index) {
        write(batch.size(), width, out, delta + batch.begin, 1, stride, Columns<T>{weight + i, in},
              scratch, grad_x + batch.begin * in + i);
      });
      if (wanted) team.sync();
    }
    if (!wanted) return;
    // Threads share W's rows, as they do in the forward: what a thread writes here, it reads
    // there, out of its own cache. Only if the rows are few they share its columns too.
    const Grid grid(team, ceil_div(out, kLanes<T>));
    const Range features = grid.major_part(out, kLanes<T>);
    const Range columns = part(in, kLanes<T>, grid.minor, grid.minors);
    for_strips<T>(columns.begin, columns.end, widest,
                  [&](Index i, Index width, Index) { strip(i, width, features, scratch); });
  }

  // dx and the weight's gradient, each if wanted.
  void gradients(const Team& team, void* grad_x, T* grad_weight) const {
    run(team, grad_x, grad_weight != nullptr,
        [&](Index i, Index width, Range features, T* scratch) {
          write(features.size(), width, rows, delta + features.begin * stride, stride, 1, of_x(i),
                scratch, grad_weight + features.begin * in + i);
        });
  }

  // dxT = W^T deltaT to [I][stride]. Here W is A, and its columns are copied to be near each other.
  void gradient_transposed(const Team& team, T* grad_x) const {
    T* scratch = packed + team.rank * piece;
    const Grid grid(team, ceil_div(in, kPanel<T>));
    const Range batch = part(rows, kLanes<T>, grid.minor, grid.minors);
    const Range columns = grid.major_part(in, kLanes<T>);
    for_strips<T>(columns.begin, columns.end, kStripVectors, [&](Index i, Index width, Index) {
      pack<T, kStrip<T>>(weight + i, in, out, width, scratch);
      multiply(width, batch.size(), out, scratch, 1, kStrip<T>, delta + batch.begin, stride,
               grad_x + i * stride + batch.begin, stride, false);
    });
  }

  // dx if wanted, and a rule applied to the weight.
  void update(const Team& team, void* grad_x, const Rule<T>& rule, const Slot<T>& slot) const {
    with_rule(rule, [&](auto kind) {
      const bool wide = kind.value != Rule<T>::kPlain && rows <= kBlockK<T>;
      run(
          team, grad_x, slot.parameter != nullptr,
          [&](Index i, Index width, Range features, T* scratch) {
            update_strip<decltype(kind)::value>(rule, slot, i, width, features, scratch);
          },
          wide ? wide_panels<T>(rows) * kTileVectors : kStripVectors);
    });
  }

  // The strip of x's columns from i on.
  Columns<T> of_x(Index i) const {
    return x_transposed ? Columns<T>{x + i * stride, stride, true} : Columns<T>{x + i, in};
  }

  // Whether all of delta^T x is finite, for the thread's part of it.
  bool finite(const Team& team) const {
    Magnitude<T> magnitude;
    run(team, nullptr, true, [&](Index i, Index width, Range features, T* scratch) {
      multiply_packed(features.size(), width, rows, delta + features.begin * stride, stride, 1,
                      of_x(i), scratch, kNoTouch, [&](Index, Index count, const T* sums) {
                        for (Index r = 0; r < count; ++r)
                          for (Index v = 0; v < width; v += kLanes<T>)
                            magnitude.add(load(sums + r * kStrip<T> + v));
                      });
    });
    return is_finite(magnitude.value());
  }

 private:
  // A strip of a product, stored at c, whose rows are `in` apart.
  void write(Index count, Index width, Index depth, const T* a, Index a_row, Index a_col,
             const Columns<T>& b, T* scratch, T* c) const {
    if (width % kLanes<T> == 0) {
      multiply_into(count, width, depth, a, a_row, a_col, b, scratch, c, in, T(0), T(1), kNoTouch);
      return;
    }
    multiply_packed(count, width, depth, a, a_row, a_col, b, scratch, kNoTouch,
                    [&](Index m, Index take, const T* sums) {
                      for (Index r = m; r < m + take; ++r, sums += kStrip<T>)
                        for (Index v = 0; v < width; v += kLanes<T>)
                          store_upto(c + r * in + v, load(sums + v), width - v);
                    });
  }

  template <typename Rule<T>::Kind kKind>
  void update_strip(const Rule<T>& rule, const Slot<T>& slot, Index i, Index width, Range features,
                    T* scratch) const {
    const T* a = delta + features.begin * stride;
    const Index first = features.begin * in + i;
    const auto fetch = [&](Index o, Index count, Index column, Index wide) {
      for (Index r = o; r < o + count; ++r)
        for (Index c = column; c < column + wide; c += kLineBytes / static_cast<Index>(sizeof(T))) {
          const Index at = first + r * in + c;
          __builtin_prefetch(slot.parameter + at, 1);
          if (slot.first) __builtin_prefetch(slot.first + at, 1);
          if (slot.second) __builtin_prefetch(slot.second + at, 1);
        }
    };
    if (kKind != Rule<T>::kPlain && rows <= kBlockK<T>) {
      multiply_wide(features.size(), width, rows, a, stride, 1, of_x(i), scratch,
                    [&](Index o, Index count, const T* sums, Index row) {
                      for (Index r = 0; r < count; ++r)
                        apply_span<T, kKind>(rule, slot, first + (o + r) * in, width,
                                             sums + r * row);
                    });
      return;
    }
    // w - lr (g + decay w) is keep w - lr g: the product's own tile can do that in registers. Not
    // block by block of a deep product, as every pass over w would round it once more.
    if (kKind == Rule<T>::kPlain && width % kLanes<T> == 0 && rows <= kBlockK<T>) {
      multiply_into(features.size(), width, rows, a, stride, 1, of_x(i), scratch,
                    slot.parameter + first, in, rule.keep, -rule.lr, fetch);
      return;
    }
    multiply_packed(features.size(), width, rows, a, stride, 1, of_x(i), scratch, fetch,
                    [&](Index o, Index count, const T* sums) {
                      for (Index r = 0; r < count; ++r)
                        apply_span<T, kKind>(rule, slot, first + (o + r) * in, width,
                                             sums + r * kStrip<T>);
                    });
  }
};

template <class T>
T magnitude_of(const T* values, Index count) {
  Magnitude<T> magnitude;
  for (Index i = 0; i < count; i += kLanes<T>) magnitude.add(load_upto(values + i, count - i));
  return magnitude.value();
}

// Whether the gradient is finite, agreed on by all threads: nothing has been changed yet. The
// caller has had a barrier behind the reports.
template <class T, class Product>
bool agree_finite(const Team& team, Report<T>* reports, const Product& product, bool weight) {
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
