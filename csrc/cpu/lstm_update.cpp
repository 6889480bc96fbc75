// Weight gradients of an LSTM, applied where they are made: the gradient of a tile of a weight is
// formed in registers and scratch, goes through the rule, and is never in memory as a whole.
#include "lstm_weight.hpp"
#include "rules.hpp"
#include "weight.hpp"

namespace fused_dni::FUSED_DNI_ISA {

namespace {

// One layer's slots.
enum LayerSlot { kInputWeight, kHiddenWeight, kInputBias, kHiddenBias };
constexpr LayerSlot kWeights[] = {kInputWeight, kHiddenWeight};
constexpr LayerSlot kBiases[] = {kInputBias, kHiddenBias};

void* parameter_of(const LSTMLayerArguments& layer, LayerSlot slot) {
  void* const slots[] = {layer.weight_ih, layer.weight_hh, layer.bias_ih, layer.bias_hh};
  return slots[slot];
}

template <class T>
struct Updater {
  const LSTMUpdate& a;
  Index outputs;          // 4H
  T* features = nullptr;  // [4H][stride]: delta of one layer at a time
  T* bias = nullptr;      // [4H]: its sums
  T* packed = nullptr;    // for whichever phase is at it, a piece a thread
  Index piece = 0;
  Report<T>* reports = nullptr;  // [L][2][threads]

  explicit Updater(const LSTMUpdate& from) : a(from), outputs(kGates * from.hidden) {}

  void plan(Scratch& scratch, int threads) {
    Index rows = 0;
    for (Index k = 0; k < a.depth; ++k) rows = larger(rows, a.rows[k].rows);
    features = scratch.take<T>(outputs * transposed_stride<T>(rows));
    bias = scratch.take<T>(outputs);
    for (Index k = 0; k < a.depth; ++k)
      for (const LayerSlot slot : kWeights) piece = larger(piece, phase(k, slot).needed());
    packed = scratch.take<T>(threads * piece);
    reports = scratch.take<Report<T>>(2 * a.depth * threads);
  }

  bool trainable(Index k, LayerSlot slot) const {
    return parameter_of(a.layers[k], slot) != nullptr && a.rules[k].trainable[slot];
  }
  bool biases_trainable(Index k) const {
    return trainable(k, kInputBias) || trainable(k, kHiddenBias);
  }
  bool anything_trainable(Index k) const {
    return trainable(k, kInputWeight) || trainable(k, kHiddenWeight) || biases_trainable(k);
  }

  WeightPhase<T> phase(Index k, LayerSlot slot) const {
    const LSTMRowsArguments& rows = a.rows[k];
    const bool input = slot == kInputWeight;
    WeightPhase<T> made(rows.rows, input ? rows.in : a.hidden, outputs,
                        static_cast<const T*>(parameter_of(a.layers[k], slot)),
                        input ? rows.input : rows.hidden);
    made.delta = features;
    made.packed = packed;
    made.piece = piece;
    return made;
  }

  // Makes the thread's part of `features` and `bias`; a barrier follows. The largest magnitude of
  // delta there.
  T prepare(Index k, Range groups) const {
    const LSTMRowsArguments& rows = a.rows[k];
    const Index stride = transposed_stride<T>(rows.rows);
    const T largest = delta_features(static_cast<const T*>(rows.delta), rows.rows, a.hidden, groups,
                                     features, stride);
    if (biases_trainable(k))
      for_rows<T>(a.hidden, groups,
                  [&](Index row) { bias[row] = sum_row(features + row * stride, rows.rows); });
    return largest;
  }

  // Whether all gradients of a layer are finite, agreed on by all threads.
  bool finite(const Team& team, Index k, Range groups) const {
    const LSTMRowsArguments& rows = a.rows[k];
    Report<T> report;
    report.delta = prepare(k, groups);
    if (biases_trainable(k))
      for_rows<T>(a.hidden, groups,
                  [&](Index row) { report.include(absolute<T>(broadcast(bias[row]))[0]); });
    Report<T>* shared[] = {reports + 2 * k * team.size, reports + (2 * k + 1) * team.size};
    const auto share = [&](LayerSlot slot, const void* input, Index width) {
      const Range own = part(rows.rows * width, kLanes<T>, team.rank, team.size);
      report.x = trainable(k, slot)
                     ? magnitude_of(static_cast<const T*>(input) + own.begin, own.size())
                     : T(0);
      shared[slot][team.rank] = report;
    };
    share(kInputWeight, rows.input, rows.in);
    share(kHiddenWeight, rows.hidden, a.hidden);
    team.sync();
    for (const LayerSlot slot : kWeights)
      if (!agree_finite(team, shared[slot], phase(k, slot), trainable(k, slot))) return false;
    return true;
  }

  void apply(const Team& team, Index k, Range groups, const Rule<T>& rule) const {
    const auto slot_at = [&](LayerSlot slot) {
      return slot_of<T>(a.rules[k], slot, parameter_of(a.layers[k], slot));
    };
    for (const LayerSlot slot : kWeights) phase(k, slot).update(team, nullptr, rule, slot_at(slot));
    for (const LayerSlot slot : kBiases)
      for (int g = 0; g < kGates; ++g) {
        const Index first = g * a.hidden;
        apply_slot(rule, slot_at(slot), first + groups.begin * kLanes<T>,
                   first + smaller(groups.end * kLanes<T>, a.hidden), bias);
      }
  }
};

template <class T>
void lstm_update(const LSTMUpdate& a) {
  Updater<T> updater(a);
  Index multiply_adds = 0;
  for (Index k = 0; k < a.depth; ++k)
    multiply_adds += a.rows[k].rows * updater.outputs * (a.rows[k].in + a.hidden);
  const int threads = team_size(a.threads, multiply_adds);
  allocate([&](Scratch& scratch) { updater.plan(scratch, threads); });
  bool applied = false;
  parallel(threads, [&](const Team& team) {
    const Range groups = part(group_count<T>(a.hidden), 1, team.rank, team.size);
    // Nothing is changed before all layers are known to be finite. The delta of the last to be
    // looked at is the first to be used.
    Index ready = a.depth;
    for (Index k = a.depth - 1; k >= 0; --k) {
      if (!updater.anything_trainable(k)) continue;
      if (ready < a.depth) team.sync();
      if (!updater.finite(team, k, groups)) return;
      ready = k;
    }
    for (Index k = 0; k < a.depth; ++k) {
      if (!updater.anything_trainable(k)) continue;
      if (k != ready) {
        team.sync();
        updater.prepare(k, groups);
        team.sync();
      }
      updater.apply(team, k, groups, Rule<T>(a.rules[k]));
    }
    if (team.rank == 0) applied = true;
  });
  count_step(a.rules[0], applied);
}

}  // namespace

void add_lstm_update(Kernels& kernels) {
  kernels.lstm_update[0] = lstm_update<float>;
  kernels.lstm_update[1] = lstm_update<double>;
}

}  // namespace fused_dni::FUSED_DNI_ISA
