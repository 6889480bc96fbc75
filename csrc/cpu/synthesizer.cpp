// Synthesizers: prediction, and training on the gradient that arrived.
//
// Training regresses s = M(h) on t = kappa g. With e = (2/N) (s - t), kept transposed:
//
//   dense     dA = e^T h
//   low rank  dV = e^T p,  dU = (e V)^T h       p = h U^T, from the prediction
//   diagonal  da = sum_n e * h
//   these     dC = e^T context
//   cross     dV = e^T p,  dU = d^T h,  du = sum_n d       p = s - y, from the prediction
//   entropy   d = s * (q - sum_k s q),  q = e V,  s = p + y
//   all       dc = sum_n e
//   table     dg = -sum_on e * W[label],  e of the mean over rows in the loss
//
// Threads own features. All gradients but the dense dA are small: they are made in full, found
// finite, and then applied; dA is applied tile by tile where it is made, as a layer's weight is.
#include "synthesizer.hpp"

#include "weight.hpp"

namespace fused_dni::FUSED_DNI_ISA {
namespace {

template <class T>
class PredictOp : public Op {
 public:
  explicit PredictOp(const SynthesizerPredict& from)
      : a(from), predictor(a.synthesizer, a.rows, a.features) {
    threads =
        team_size(a.threads, a.rows * a.features *
                                 (predictor.kind == kDense ? a.features : predictor.rank + 1));
    open = true;
  }

  void plan(Scratch& scratch) override {
    h = scratch.take<T>(a.transposed ? 0 : a.features * predictor.stride);
    scaled = scratch.take<T>(a.transposed ? 0 : a.features * predictor.stride);
    predictor.plan(scratch, threads);
    if (a.transposed) scaled = static_cast<T*>(a.scaled);
  }

  void run(const Team& team) override {
    const Index stride = predictor.stride;
    const Range own = own_features<T>(a.features, team.rank, team.size);
    const T* input = static_cast<const T*>(a.h);
    if (!a.transposed) {
      to_transposed(input + own.begin, a.features, a.rows, own.size(), h + own.begin * stride,
                    stride);
      input = h;
    }
    predictor.transpose_context(team);
    predictor.reduce(team, own, input);
    team.sync();
    predictor.combine(team);
    T* const to = scaled + own.begin * stride;
    predictor.predict(team, own.begin, own.end, input, to);
    if (!a.transposed)
      from_transposed(to, stride, a.rows, own.size(), static_cast<T*>(a.scaled) + own.begin,
                      a.features);
    if (a.reduced && team.rank == 0) give_reduced();
  }

 private:
  void give_reduced() const {
    if (a.transposed)
      __builtin_memcpy(a.reduced, predictor.reduced, sizeof(T) * predictor.rank * predictor.stride);
    else
      from_transposed(predictor.reduced, predictor.stride, a.rows, predictor.rank,
                      static_cast<T*>(a.reduced), predictor.rank);
  }

  const SynthesizerPredict& a;
  Predictor<T> predictor;
  T *h = nullptr, *scaled = nullptr;  // [O][stride]
};

template <class T>
struct Trainer {
  const SynthesizerTrain& a;
  const SynthesizerKind kind;
  const Index rows, features, rank, classes;  // N, O, R, K
  const Index stride;                         // of the transposed layout
  const Index rank_row, class_row;            // R and K rounded up to whole vectors
  const T factor, kappa;                      // 2 / N, and the target's scale
  const bool train_dense;                     // the weight's gradient is a large product
  const LabelRows<T> head;
  WeightPhase<T> product;

  T* error = nullptr;      // [O][stride]: s, then e
  T* other = nullptr;      // [O][stride]: g, then h where a diagonal weight needs it
  T* reduced = nullptr;    // [N][rank_row]: p
  T* context = nullptr;    // [N][class_row]: one-hot labels or conditioning vectors
  T* weight = nullptr;     // [O][rank_row]: V
  T* back = nullptr;       // [threads][N][rank_row]: parts of e V; their sum in every thread's copy
  T* back_sum = nullptr;   // [threads][N][rank_row]
  T* panels = nullptr;     // [threads][..]
  T* mean = nullptr;       // [threads][stride]: 2 / rows in the loss in these, 0 in the others
  double* sums = nullptr;  // [threads][8], a line each: the statistics', the gain's gradient
  Report<T>* reports = nullptr;  // [threads]

  T* grad_weight = nullptr;   // [O][rank_row], or [O] for a diagonal one
  T* grad_down = nullptr;     // [R][O]
  T* grad_context = nullptr;  // [O][class_row]; of a cross entropy [K], by the first thread
  T* grad_bias = nullptr;     // [O]

  explicit Trainer(const SynthesizerTrain& args)
      : a(args),
        kind(static_cast<SynthesizerKind>(a.synthesizer.kind)),
        rows(a.rows),
        features(a.features),
        rank(reduces(kind) ? a.synthesizer.rank : 0),
        classes(a.synthesizer.context_weight && !a.synthesizer.table && kind != kCrossEntropy
                    ? a.synthesizer.classes
                    : 0),
        stride(transposed_stride<T>(a.rows)),
        rank_row(round_up(rank, kLanes<T>)),
        class_row(round_up(classes, kLanes<T>)),
        factor(T(2.0 / static_cast<double>(a.rows))),
        kappa(T(a.target_scale)),
        train_dense(kind == kDense),
        head(a.synthesizer, a.rows, a.features),
        product(a.rows, a.features, a.features, static_cast<const T*>(a.synthesizer.weight), a.h) {
    product.x_transposed = a.transposed;
  }

  bool scatters() const { return a.synthesizer.labels && classes > kOneHotClasses; }

  void plan(Scratch& scratch, int threads) {
    error = scratch.take<T>(features * stride);
    other = scratch.take<T>(features * stride);
    reduced = scratch.take<T>(rows * rank_row);
    context = scratch.take<T>(scatters() ? 0 : rows * class_row);
    weight = scratch.take<T>(features * rank_row);
    back = scratch.take<T>(threads * rows * rank_row);
    back_sum = scratch.take<T>(threads * rows * rank_row);
    panels = scratch.take<T>(threads * packed_scratch<T>(rank));
    mean = scratch.take<T>(head.table ? threads * stride : 0);
    sums = scratch.take<double>(8 * threads);
    reports = scratch.take<Report<T>>(threads);
    grad_weight = scratch.take<T>(kind == kDiagonal ? features : features * rank_row);
    grad_down = scratch.take<T>(rank * features);
    grad_context = scratch.take<T>(kind == kCrossEntropy ? rank_row : features * class_row);
    grad_bias = scratch.take<T>(features);
    if (train_dense) product.plan(scratch, threads);
    product.delta = error;
  }

  // e, its sums, and everything that the other threads will need. A barrier follows.
  void prepare(const Team& team, Range own, Report<T>& report) const {
    const T* scaled = take(a.scaled, own, error, a.transposed);
    const T* grad_h = take_gradient(own);
    T* weights = mean + team.rank * stride;
    if (head.table) head.weigh(T(2.0 / static_cast<double>(head.counted)), stride, weights);
    Magnitude<T> magnitude;
    DoubleSum<T> dot, predicted, target, squared, gain;
    for (Index o = own.begin; o < own.end; ++o) {
      Vec<T> total{};
      for (Index n = 0; n < rows; n += kLanes<T>) {
        const Vec<T> s = valid<T>(load(scaled + o * stride + n), n, rows),
                     t = valid<T>(load(grad_h + o * stride + n), n, rows) * kappa;
        const Vec<T> d = s - t;
        const Vec<T> e = head.table ? in_the_mean<T>(d, load(weights + n)) : d * factor;
        dot.add_product(s, t);
        predicted.add_product(s, s);
        target.add_product(t, t);
        squared.add_product(d, d);
        store(error + o * stride + n, e);
        magnitude.add(e);
        total += e;
      }
      grad_bias[o] = sum_lanes<T>(total);
    }
    report.delta = magnitude.value();
    double* mine = sums + 8 * team.rank;
    mine[0] = dot.value();
    mine[1] = predicted.value();
    mine[2] = target.value();
    mine[3] = squared.value();
    if (head.table) {
      head.each(own.begin, own.end, [&](Index o, Index n, Index width, const Vec<T>* rows_of) {
        for (Index i = 0; i < width; ++i)
          gain.add_product(rows_of[i], load(error + (o + i) * stride + n));
      });
      mine[4] = -gain.value();
    }

    const Range batch = part(rows, 1, team.rank, team.size);
    if (train_dense)
      report.x = a.transposed
                     ? transposed_magnitude(product.x, stride, rows, own.begin, own.end)
                     : magnitude_of(product.x + batch.begin * features, batch.size() * features);
    if (a.transposed)
      to_transposed(static_cast<const T*>(a.reduced) + batch.begin, stride, rank, batch.size(),
                    reduced + batch.begin * rank_row, rank_row);
    else
      pad_rows(a.reduced, batch, rank, rank_row, reduced);
    if (classes > 0 && !scatters()) make_context(batch);
    if (reduces(kind)) {
      pad_rows(a.synthesizer.weight, own, rank, rank_row, weight);
      multiply(rows, rank_row, own.size(), error + own.begin * stride, 1, stride,
               weight + own.begin * rank_row, rank_row, back + team.rank * rows * rank_row,
               rank_row, false);
    }
  }

  // The gradients of the thread's features, dense weight excepted.
  void small_gradients(const Team& team, Range own, Report<T>& report) const {
    if (reduces(kind)) {
      const Index count = rows * rank_row;
      T* q = back_sum + team.rank * count;
      for (Index i = 0; i < count; i += kLanes<T>) {
        Vec<T> v = load(back + i);
        for (int t = 1; t < team.size; ++t) v += load(back + t * count + i);
        store(q + i, v);
      }
      if (kind == kCrossEntropy) through_softmax(team, q, report);
      multiply(own.size(), rank_row, rows, error + own.begin * stride, stride, 1, reduced, rank_row,
               grad_weight + own.begin * rank_row, rank_row, false);
      for_strips<T>(own.begin, own.end, kStripVectors, [&](Index o, Index width, Index) {
        multiply_packed(rank, width, rows, q, 1, rank_row, product.of_x(o),
                        panels + team.rank * packed_scratch<T>(rank), kNoTouch,
                        [&](Index r, Index take, const T* sums) {
                          for (Index i = 0; i < take; ++i)
                            for (Index v = 0; v < width; v += kLanes<T>)
                              store_upto(grad_down + (r + i) * features + o + v,
                                         load(sums + i * kStrip<T> + v), width - v);
                        });
      });
      report.include(magnitude_of(grad_weight + own.begin * rank_row, own.size() * rank_row));
      for (Index r = 0; r < rank; ++r)
        report.include(magnitude_of(grad_down + r * features + own.begin, own.size()));
    }
    if (kind == kDiagonal) {
      const T* h = take(a.h, own, other, a.transposed);
      for (Index o = own.begin; o < own.end; ++o) {
        Vec<T> total{};
        for (Index n = 0; n < rows; n += kLanes<T>)
          total += load(error + o * stride + n) * valid<T>(load(h + o * stride + n), n, rows);
        grad_weight[o] = sum_lanes<T>(total);
      }
      report.include(magnitude_of(grad_weight + own.begin, own.size()));
    }
    if (classes > 0) {
      if (scatters()) {
        __builtin_memset(grad_context + own.begin * class_row, 0,
                         sizeof(T) * own.size() * class_row);
        for (Index o = own.begin; o < own.end; ++o)
          for (Index n = 0; n < rows; ++n)
            grad_context[o * class_row + a.synthesizer.labels[n]] += error[o * stride + n];
      } else {
        multiply(own.size(), class_row, rows, error + own.begin * stride, stride, 1, context,
                 class_row, grad_context + own.begin * class_row, class_row, false);
      }
      report.include(magnitude_of(grad_context + own.begin * class_row, own.size() * class_row));
    }
    report.include(magnitude_of(grad_bias + own.begin, own.size()));
    if (head.table) report.include(T(__builtin_fabs(grad_gain(team))));
  }

  // Writes the thread's gradients to where the caller wants them.
  void give(const Team& team, Range own) const {
    T* const* out = reinterpret_cast<T* const*>(a.gradients);
    const auto copy_rows = [&](const T* from, Index row, Index count, T* to) {
      if (to)
        for (Index o = own.begin; o < own.end; ++o)
          __builtin_memcpy(to + o * count, from + o * row, sizeof(T) * count);
    };
    if (reduces(kind)) {
      copy_rows(grad_weight, rank_row, rank, out[kWeight]);
      if (out[kDown])
        for (Index r = 0; r < rank; ++r)
          __builtin_memcpy(out[kDown] + r * features + own.begin,
                           grad_down + r * features + own.begin, sizeof(T) * own.size());
    } else if (kind == kDiagonal) {
      copy_rows(grad_weight, 1, 1, out[kWeight]);
    } else if (out[kWeight]) {
      product.gradients(team, nullptr, out[kWeight]);
    }
    if (head.table) {
      if (out[kContext] && team.rank == 0) *out[kContext] = grad_gain(team);
    } else if (kind == kCrossEntropy) {
      if (out[kContext] && team.rank == 0)
        __builtin_memcpy(out[kContext], grad_context, sizeof(T) * rank);
    } else {
      copy_rows(grad_context, class_row, classes, out[kContext]);
    }
    copy_rows(grad_bias, 1, 1, out[kBias]);
  }

  // Applies the thread's gradients.
  void apply(const Team& team, Range own, const Rule<T>& rule) const {
    const SynthesizerArguments& s = a.synthesizer;
    // Rows of `count` elements, padded to `row`: pushed together first, as the parameter's are.
    const auto apply_rows = [&](SynthesizerSlot index, void* parameter, T* g, Index row,
                                Index count) {
      const Slot<T> slot = slot_of<T>(a.rule, index, parameter);
      T* from = g + own.begin * row;
      if (slot.parameter && row > count)
        for (Index i = 1; i < own.size(); ++i)
          __builtin_memmove(from + i * count, from + i * row, sizeof(T) * count);
      apply_slot(rule, slot, own.begin * count, own.end * count, from - own.begin * count);
    };
    if (reduces(kind)) {
      apply_rows(kWeight, s.weight, grad_weight, rank_row, rank);
      const Slot<T> down = slot_of<T>(a.rule, kDown, s.down);
      for (Index r = 0; r < rank; ++r)
        apply_slot(rule, down, r * features + own.begin, r * features + own.end, grad_down);
    } else if (kind == kDiagonal) {
      apply_slot(rule, slot_of<T>(a.rule, kWeight, s.weight), own.begin, own.end, grad_weight);
    } else {
      product.update(team, nullptr, rule, slot_of<T>(a.rule, kWeight, s.weight));
    }
    const Slot<T> context = slot_of<T>(a.rule, kContext, s.context_weight);
    if (head.table) {
      const T gradient = grad_gain(team);
      if (team.rank == 0) apply_slot(rule, context, 0, 1, &gradient);
    } else if (kind == kCrossEntropy) {
      if (team.rank == 0) apply_slot(rule, context, 0, rank, grad_context);
    } else {
      apply_rows(kContext, s.context_weight, grad_context, class_row, classes);
    }
    apply_slot(rule, slot_of<T>(a.rule, kBias, s.bias), own.begin, own.end, grad_bias);
  }

  // The gradient of the gain, over all threads.
  T grad_gain(const Team& team) const {
    double total = 0.0;
    for (int t = 0; t < team.size; ++t) total += sums[8 * t + 4];
    return T(total);
  }

  // The sums over all threads; false if one is not finite.
  bool total(const Team& team, double (&totals)[4]) const {
    bool finite = true;
    for (int s = 0; s < 4; ++s) {
      totals[s] = 0.0;
      for (int t = 0; t < team.size; ++t) totals[s] += sums[8 * t + s];
      finite = finite && is_finite(totals[s]);
    }
    return finite;
  }

 private:
  // Takes q [N][rank_row], the gradient at p, back to the logits. Every thread has it whole; the
  // first sums it over the rows.
  void through_softmax(const Team& team, T* q, Report<T>& report) const {
    const SynthesizerArguments& of = a.synthesizer;
    const auto known = [&](Index n, Index k) {  // y
      if (of.vectors) return load_upto(static_cast<const T*>(of.vectors) + n * rank + k, rank - k);
      Vec<T> y{};
      if (of.labels[n] >= k && of.labels[n] < k + kLanes<T>) y[of.labels[n] - k] = T(1);
      return y;
    };
    if (team.rank == 0) __builtin_memset(grad_context, 0, sizeof(T) * rank_row);
    for (Index n = 0; n < rows; ++n) {
      T* const at = q + n * rank_row;
      const T* const p = reduced + n * rank_row;
      Vec<T> sum{};
      for (Index k = 0; k < rank; k += kLanes<T>) sum += (load(p + k) + known(n, k)) * load(at + k);
      const T mean = sum_lanes<T>(sum);
      for (Index k = 0; k < rank; k += kLanes<T>) {
        const Vec<T> d = (load(p + k) + known(n, k)) * (load(at + k) - mean);
        store(at + k, d);
        if (team.rank == 0) store(grad_context + k, load(grad_context + k) + d);
      }
    }
    if (team.rank == 0) report.include(magnitude_of(grad_context, rank));
  }

  // The thread's features of a matrix in the transposed layout: `to`, or where they lie.
  const T* take(const void* from, Range own, T* to, bool transposed) const {
    const T* at = static_cast<const T*>(from);
    if (transposed) return at;
    to_transposed(at + own.begin, features, rows, own.size(), to + own.begin * stride, stride);
    return to;
  }

  const T* take_gradient(Range own) const {
    if constexpr (sizeof(T) == sizeof(float)) {
      if (a.narrow) {
        const auto* from = static_cast<const std::uint16_t*>(a.grad_h);
        for (Index n = 0; n < rows; n += kLanes<T>)
          for (Index o = own.begin; o < own.end; o += kLanes<T>) {
            const Index width = smaller(kLanes<T>, own.end - o);
            Vec<T> v[kLanes<T>];
            for (int i = 0; i < kLanes<T>; ++i)
              v[i] =
                  n + i < rows ? widened_upto<T>(from + (n + i) * features + o, width) : Vec<T>{};
            transpose_registers<T>(v);
            for (int i = 0; i < width; ++i) store(other + (o + i) * stride + n, v[i]);
          }
        return other;
      }
    }
    return take(a.grad_h, own, other, a.transposed && !a.given);
  }

  static void pad_rows(const void* from, Range range, Index width, Index row, T* to) {
    for (Index r = range.begin; r < range.end; ++r)
      for (Index v = 0; v < width; v += kLanes<T>)
        store(to + r * row + v, load_upto(static_cast<const T*>(from) + r * width + v, width - v));
  }

  void make_context(Range batch) const {
    if (a.synthesizer.vectors) {
      pad_rows(a.synthesizer.vectors, batch, classes, class_row, context);
      return;
    }
    __builtin_memset(context + batch.begin * class_row, 0, sizeof(T) * batch.size() * class_row);
    if (a.synthesizer.labels)
      for (Index n = batch.begin; n < batch.end; ++n)
        context[n * class_row + a.synthesizer.labels[n]] = T(1);
  }
};

template <class T>
class TrainOp : public Op {
 public:
  explicit TrainOp(const SynthesizerTrain& from) : a(from), trainer(a) {
    open = a.again;
    threads = team_size(
        a.threads, a.rows * a.features * (trainer.train_dense ? a.features : 4 * trainer.rank + 4));
  }

  void plan(Scratch& scratch) override { trainer.plan(scratch, threads); }

  void run(const Team& team) override {
    const Range own = own_features<T>(a.features, team.rank, team.size);
    Report<T> report;
    trainer.prepare(team, own, report);
    team.sync();
    double totals[4];
    bool finite = trainer.total(team, totals);
    trainer.small_gradients(team, own, report);
    if (!a.update) {
      trainer.give(team, own);
    } else {
      trainer.reports[team.rank] = report;
      team.sync();
      const bool product = trainer.train_dense && a.rule.trainable[kWeight];
      finite = finite && agree_finite(team, trainer.reports, trainer.product, product);
      if (finite) trainer.apply(team, own, Rule<T>(a.rule));
    }
    if (team.rank > 0) return;
    applied = finite;
    if (!finite || a.statistics == nullptr) return;
    for (int s = 0; s < 4; ++s) a.statistics[s] += totals[s];
    a.statistics[4] += static_cast<double>(a.rows);
  }

  void finish() override {
    if (a.update) count_step(a.rule, applied);
  }

 private:
  const SynthesizerTrain& a;
  Trainer<T> trainer;
  bool applied = false;
};

}  // namespace

void add_synthesizer(Kernels& kernels) {
  kernels.synthesizer_predict[0] = make<PredictOp<float>>;
  kernels.synthesizer_predict[1] = make<PredictOp<double>>;
  kernels.synthesizer_train[0] = make<TrainOp<float>>;
  kernels.synthesizer_train[1] = make<TrainOp<double>>;
}

}  // namespace fused_dni::FUSED_DNI_ISA
