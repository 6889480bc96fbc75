// One step of an LSTM.
//
// The weights are used once a call, so that packing them would cost as much as multiplying by them.
// They are read as they lie: forward, as rows of dot products with rows of x and h, which leaves
// the gates of neighbouring units side by side, as they are wanted; backward, by the linear layer's
// products with a weight.
#include "lstm.hpp"
#include "lstm_weight.hpp"
#include "weight.hpp"

namespace fused_dni::FUSED_DNI_ISA {

namespace {

// v[0] becomes the sums over lanes: its lane i is the sum of what was v[i].
template <class T, int kStep = 1>
FUSED_DNI_INLINE void sum_registers(Vec<T> (&v)[kLanes<T>]) {
  constexpr int L = kLanes<T>;
  if constexpr (kStep < L) {
    Mask<T> low, high;
    for (int i = 0; i < L; ++i) {
      low[i] = (i & kStep) ? L + i - kStep : i;
      high[i] = (i & kStep) ? L + i : i + kStep;
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; i += 2 * kStep)
      v[i] = shuffle<T>(v[i], v[i + kStep], low) + shuffle<T>(v[i], v[i + kStep], high);
    sum_registers<T, 2 * kStep>(v);
  }
}

// A tile of dot products: rows of a weight times rows of the batch, one accumulator each. Eight by
// two need ten loads for sixteen multiply-adds, so that the multipliers and not the loads are busy.
template <class T>
constexpr int kTileOutputs = static_cast<int>(
    kLanes<T> < (kVectorBytes == 64 ? 8 : 4) ? kLanes<T> : (kVectorBytes == 64 ? 8 : 4));
constexpr int kTileBatch = 2;

// One of the two products that make the gates: weight [4H][depth], input [B][depth].
template <class T>
struct Operand {
  const T* weight;
  const T* input;
  Index depth;
};

// What a tile multiplies: a part of the depth of both operands. They are cut into as many blocks
// as it takes for the tile's rows of the weights to stay in the first-level cache.
template <class T>
constexpr Index kDotDepth =
    (kVectorBytes == 64 ? 32 : 24) * 1024 / (kTileOutputs<T> * static_cast<Index>(sizeof(T)));

template <class T>
FUSED_DNI_INLINE Index dot_blocks(Index depth) {
  return larger(1, ceil_div(depth, kDotDepth<T>));
}

// to[n * to_row + j] (+)= the dot products of weight rows first + j with batch rows n, for block
// `block` of `blocks` of the depth; rows at and beyond `valid` are not there.
template <class T, int kBatch>
[[gnu::noinline]] void dot_tile(const Operand<T> (&operands)[2], Index first, Index valid, Index n,
                                Index block, Index blocks, T* to, Index to_row) {
  constexpr int L = kLanes<T>;
  constexpr int kOutputs = kTileOutputs<T>;
  Vec<T> sum[kBatch][kOutputs] = {};
  for (const Operand<T>& operand : operands) {
    const Range range = part(operand.depth, L, block, blocks);
    const T* row[kOutputs];
    const T* in[kBatch];
    for (int j = 0; j < kOutputs; ++j)
      row[j] = operand.weight + (first + smaller(j, valid - 1)) * operand.depth;
    for (int b = 0; b < kBatch; ++b) in[b] = operand.input + (n + b) * operand.depth;
    const auto multiply = [&](auto&& loaded) {
      Vec<T> x[kBatch];
#pragma GCC unroll 2
      for (int b = 0; b < kBatch; ++b) x[b] = loaded(in[b]);
#pragma GCC unroll 8
      for (int j = 0; j < kOutputs; ++j) {
        const Vec<T> w = loaded(row[j]);
#pragma GCC unroll 2
        for (int b = 0; b < kBatch; ++b) sum[b][j] += w * x[b];
      }
    };
    Index i = range.begin;
    for (; i + L <= range.end; i += L) multiply([&](const T* p) { return load(p + i); });
    if (i < range.end) multiply([&](const T* p) { return load_partial(p + i, range.end - i); });
  }
  constexpr int kSums = kBatch * kOutputs;
  alignas(kVectorBytes) T sums[(kSums + L - 1) / L * L];
#pragma GCC unroll 8
  for (int s = 0; s < kSums; s += L) {
    Vec<T> v[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i)
      v[i] = s + i < kSums ? sum[(s + i) / kOutputs][(s + i) % kOutputs] : Vec<T>{};
    sum_registers<T>(v);
    store(sums + s, v[0]);
  }
  for (int b = 0; b < kBatch; ++b, to += to_row)
    for (int j = 0; j < kOutputs; ++j) to[j] = (block > 0 ? to[j] : T(0)) + sums[b * kOutputs + j];
}

// Batch rows that a group of units is taken through at a time: what their gates need of scratch
// stays in the first-level cache.
constexpr Index kBatchBlock = 64;

template <class T>
void lstm_cell_forward(const LSTMCellForward& a) {
  constexpr Index L = kLanes<T>;
  const Index batch = a.sizes.batch, in = a.sizes.in, hidden = a.sizes.hidden;
  const Operand<T> operands[2] = {
      {static_cast<const T*>(a.layer.weight_ih), static_cast<const T*>(a.x), in},
      {static_cast<const T*>(a.layer.weight_hh), static_cast<const T*>(a.h), hidden}};
  const T* c = static_cast<const T*>(a.c);
  T* next_h = static_cast<T*>(a.next_h);
  T* next_c = static_cast<T*>(a.next_c);
  T* gates = static_cast<T*>(a.gates);
  const Index piece = smaller(batch, kBatchBlock) * kGroup<T>;
  const Index blocks = dot_blocks<T>(in + hidden);
  const int threads = team_size(a.sizes.threads, batch * kGates * hidden * (in + hidden));
  T* scratch_of_all = nullptr;
  allocate([&](Scratch& scratch) { scratch_of_all = scratch.take<T>(threads * piece); });

  parallel(threads, [&](const Team& team) {
    T* z = scratch_of_all + team.rank * piece;
    const Range groups = part(group_count<T>(hidden), 1, team.rank, team.size);
    for (Index p = groups.begin; p < groups.end; ++p) {
      const Index unit = p * L, width = group_width<T>(hidden, p);
      Vec<T> bias[kGates];
      for (int g = 0; g < kGates; ++g) {
        bias[g] = Vec<T>{};
        if (a.layer.bias_ih == nullptr) continue;
        const Index row = g * hidden + unit;
        bias[g] = load_upto(static_cast<const T*>(a.layer.bias_ih) + row, width) +
                  load_upto(static_cast<const T*>(a.layer.bias_hh) + row, width);
      }
      for (Index begin = 0; begin < batch; begin += kBatchBlock) {
        const Index end = smaller(batch, begin + kBatchBlock);
        for (int g = 0; g < kGates; ++g)
          for (Index j = 0; j < width; j += kTileOutputs<T>)
            for (Index block = 0; block < blocks; ++block) {
              const Index first = g * hidden + unit + j;
              T* to = z + g * L + j;
              Index n = begin;
              for (; n + kTileBatch <= end; n += kTileBatch, to += kTileBatch * kGroup<T>)
                dot_tile<T, kTileBatch>(operands, first, width - j, n, block, blocks, to,
                                        kGroup<T>);
              for (; n < end; ++n, to += kGroup<T>)
                dot_tile<T, 1>(operands, first, width - j, n, block, blocks, to, kGroup<T>);
            }
        const T* from = z;
        for (Index n = begin; n < end; ++n, from += kGroup<T>) {
          const Index at = n * hidden + unit;
          Vec<T> gate[kGates], cell = load_upto(c + at, width), h;
          for (int g = 0; g < kGates; ++g) gate[g] = load(from + g * L) + bias[g];
          cell_forward<T>(gate, cell, h);
          store_upto(next_c + at, cell, width);
          store_upto(next_h + at, h, width);
          if (gates) store_group(gates + kGates * (n * hidden + unit), width, gate);
        }
      }
    }
  });
}

template <class T>
void lstm_cell_backward(const LSTMCellBackward& a) {
  constexpr Index L = kLanes<T>;
  const Index batch = a.sizes.batch, in = a.sizes.in, hidden = a.sizes.hidden;
  const bool weights = a.gradients.weight_ih != nullptr;
  const Index products = (a.grad_x || weights ? in : 0) + hidden;
  const int threads = team_size(a.sizes.threads, batch * kGates * hidden * products);
  WeightPhase<T> ih(batch, in, kGates * hidden, static_cast<const T*>(a.layer.weight_ih), a.x);
  WeightPhase<T> hh(batch, hidden, kGates * hidden, static_cast<const T*>(a.layer.weight_hh), a.h);
  T* features = nullptr;  // delta in the transposed layout and the order of the weights' rows
  allocate([&](Scratch& scratch) {
    features = scratch.take<T>(kGates * hidden * ih.stride);
    ih.plan(scratch, threads);
    hh.plan(scratch, threads);
  });
  ih.delta = hh.delta = features;

  parallel(threads, [&](const Team& team) {
    const Range groups = part(group_count<T>(hidden), 1, team.rank, team.size);
    const T* grad_next_h = static_cast<const T*>(a.grad_next_h);
    const T* grad_next_c = static_cast<const T*>(a.grad_next_c);
    T* delta = static_cast<T*>(a.delta);
    for (Index p = groups.begin; p < groups.end; ++p) {
      const Index unit = p * L, width = group_width<T>(hidden, p);
      for (Index n = 0; n < batch; ++n) {
        const Index at = n * hidden + unit;
        Vec<T> gate[kGates];
        load_group(static_cast<const T*>(a.gates) + kGates * n * hidden + p * kGroup<T>, width,
                   gate);
        const Vec<T> grad_h = grad_next_h ? load_upto(grad_next_h + at, width) : Vec<T>{};
        Vec<T> grad_c = grad_next_c ? load_upto(grad_next_c + at, width) : Vec<T>{};
        cell_backward<T>(gate, load_upto(static_cast<const T*>(a.c) + at, width),
                         load_upto(static_cast<const T*>(a.next_c) + at, width), grad_h, grad_c);
        store_group(delta + kGates * n * hidden + p * kGroup<T>, width, gate);
        store_upto(static_cast<T*>(a.grad_c) + at, grad_c, width);
      }
    }
    delta_features(delta, batch, hidden, groups, features, ih.stride);
    if (weights && a.gradients.bias_ih)
      for_rows<T>(hidden, groups, [&](Index row) {
        const T sum = sum_row(features + row * ih.stride, batch);
        static_cast<T*>(a.gradients.bias_ih)[row] = sum;
        static_cast<T*>(a.gradients.bias_hh)[row] = sum;
      });
    team.sync();
    ih.gradients(team, a.grad_x, static_cast<T*>(a.gradients.weight_ih));
    hh.gradients(team, a.grad_h, static_cast<T*>(a.gradients.weight_hh));
  });
}

}  // namespace

void add_lstm_cell(Kernels& kernels) {
  kernels.lstm_cell_forward[0] = lstm_cell_forward<float>;
  kernels.lstm_cell_forward[1] = lstm_cell_forward<double>;
  kernels.lstm_cell_backward[0] = lstm_cell_backward<float>;
  kernels.lstm_cell_backward[1] = lstm_cell_backward<double>;
}

}  // namespace fused_dni::FUSED_DNI_ISA
