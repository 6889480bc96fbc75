// The synthesizer on a GPU: its prediction, and its regression in one cooperative launch.
//
// Formulas stand in fused_dni/backends/common/synthesizer.py. With h [N, O], e = 2 / N (M(h) - kappa g)
// [N, O], a low-rank M's U [R, O] and V [O, R]:
//
//   predict  [N, R], tiles of [N, O]  h U^T and, behind a barrier, M(h)
//   errors   tiles of [N, O]          e, its column sums, the statistics, largest magnitudes; with
//                                     a table -e W[label]
//   back     [N, R]                   e V
//   trial    each parameter           gradients, only looked at, where bounds do not tell
//   apply    each parameter           gradients, and the rule (or the gradients alone)
//
// Sums are made of partial sums in a fixed order; an update is all or nothing: see linear.cuh.
#include "predict.cuh"

namespace fused_dni::cuda {
namespace {

template <class Op, class BackOp, class XType>
struct Precision {
  using X = XType;
  using Forward = Product<Op, 32, 32, 64, 2, 2, 2>;
  using Weight = Product<BackOp, 64, 64, 32, 4, 2>;
  using T = TileOf<Forward>;
  using W = TileOf<Weight>;
};
using InFp32 = Precision<Fp32, Fp32, float>;
using InTf32 = Precision<Tf32, Tf32, float>;
using InBf16 = Precision<Bf16, Bf16, bf16>;
using InFp16 = Precision<Fp16, Tf32, fp16>;

// A tile of the context's gradient by classes: a warp adds up some of the rows, for 32 outputs and
// as many classes.
constexpr int kLabels = 32;
constexpr int kLine = kLabels + 1;

template <class C>
constexpr int kShared =
    Product<Fp32, 16, 16, 4, 1, 1>::larger(
        Product<Fp32, 16, 16, 4, 1, 1>::larger(shared_bytes<typename C::Forward>(),
                                               shared_bytes<typename C::Weight>()),
        kThreads / 32 * kLabels * kLine * 4) +
    1024;

std::size_t divide(SynthesizerArguments& a, void* room) {
  std::size_t used = 0;
  const auto take = [&](auto*& part, std::size_t count) {
    part =
        reinterpret_cast<std::remove_reference_t<decltype(part)>>(static_cast<char*>(room) + used);
    used += (count * sizeof(*part) + 127) / 128 * 128;
  };
  const std::size_t n = a.rows, o = a.outputs, down = ceil_div(a.rows, InFp32::T::M);
  if (!a.training) return used;
  take(a.step, 1);
  take(a.sums, 5 * kMostBlocks);
  take(a.largest, 4 * kMostBlocks);
  take(a.error, n * o);
  if (a.synthesizer.source == kLowRank) take(a.back, n * a.synthesizer.rank);
  if (a.synthesizer.bias != nullptr || a.synthesizer.source == kDiagonal)
    take(a.columns, down * 2 * o);
  return used;
}

// ---- Prediction -----------------------------------------------------------------------------------

template <class C>
FUSED_DNI_DEVICE void predict(const SynthesizerArguments& a, SharedArena arena) {
  using T = typename C::T;
  const auto* h = static_cast<const typename C::X*>(a.h);
  if (a.synthesizer.source == kLowRank) {
    reduce(a.synthesizer, h, a.rows, a.outputs);
    grid_barrier(a.barrier, Phase::kPredict);
  }
  const int counted = counted_rows(a.synthesizer, a.rows, arena);
  for (int index = block(); index < tiles_of<T>(a.rows, a.outputs); index += blocks()) {
    const auto at = place<T>(index, a.rows, a.outputs);
    T m;
    predict_tile<typename C::Forward>(m, arena, a.synthesizer, h, at, counted);
#pragma unroll
    for (int i = 0; i < T::kEach; ++i)
      if (at.inside(i)) a.scaled[at.at(i)] = m.value[i];
  }
}

// ---- Training -------------------------------------------------------------------------------------

// The largest magnitude of what products with e take beside h, of what this block has to look at;
// infinity if a class index is none.
FUSED_DNI_DEVICE float look_at_operands(const SynthesizerArguments& a) {
  const Synthesizer& s = a.synthesizer;
  float largest = 1.0f;
  if (s.labels != nullptr) {
    for (int n = block() * kThreads + thread(); n < a.rows; n += blocks() * kThreads)
      if (in_the_loss(s, n) && (s.labels[n] < 0 || s.labels[n] >= s.classes)) largest = INFINITY;
  } else if (s.vectors != nullptr) {
    largest = fmaxf(largest, look_at(s.vectors, s.classes, a.rows, s.classes));
  }
  if (s.source == kLowRank) largest = fmaxf(largest, look_at(s.reduced, s.rank, a.rows, s.rank));
  return largest;
}

template <class C>
FUSED_DNI_DEVICE void errors(const SynthesizerArguments& a, SharedArena arena) {
  using T = typename C::T;
  using X = typename C::X;
  const auto* all_h = static_cast<const X*>(a.h);
  const Synthesizer& of = a.synthesizer;
  const float gain = 2.0f / counted_rows(of, a.rows, arena);
  float largest = 0.0f, operands = look_at_operands(a);
  double sums[5] = {};
  for (int index = block(); index < tiles_of<T>(a.rows, a.outputs); index += blocks()) {
    const auto at = place<T>(index, a.rows, a.outputs);
    float sum = 0.0f, dot = 0.0f;
#pragma unroll
    for (int i = 0; i < T::kEach; ++i) {
      if (!at.inside(i)) continue;
      const float m = a.scaled[at.at(i)];
      const float target = arrived<X>(a.grad_h, a.grad_wide, at.at(i)) * a.target_scale;
      const float h = to_float(all_h[at.at(i)]);
      const float e = in_the_loss(of, at.r(i)) ? (m - target) * gain : 0.0f;
      a.error[at.at(i)] = e;
      sum += e;
      dot += e * h;
      operands = fmaxf(operands, magnitude(h));
      largest = fmaxf(largest, magnitude(e));
      const double s = m, g = target;
      sums[0] += s * g;
      sums[1] += s * s;
      sums[2] += g * g;
      sums[3] += (s - g) * (s - g);
      if (of.table != nullptr && in_the_loss(of, at.r(i)))
        sums[4] -= e * label_element(of, at.r(i), at.c(), a.outputs);
    }
    if (a.columns == nullptr) continue;
    sum = column_sum<T>(sum, arena);
    dot = column_sum<T>(dot, arena);
    if (T::row(0) == 0 && at.has_column()) {
      float* left_at = a.columns + at.row / T::M * 2LL * a.outputs + at.c();
      left_at[0] = sum;
      left_at[a.outputs] = dot;
    }
    largest = fmaxf(largest, magnitude(sum));
    if (a.synthesizer.source == kDiagonal) largest = fmaxf(largest, magnitude(dot));
  }
  float magnitudes[2] = {operands, largest};
  in_turn([&](int list, float mine) { leave_largest(a.largest + list * kMostBlocks, mine, arena); },
          magnitudes);
  in_turn(
      [&](int i, double sum) {
        sum = block_sum(sum, arena);
        if (thread() == 0) a.sums[i * kMostBlocks + block()] = sum;
      },
      sums);
  if (a.rule != kNoRule && block() == 0 && thread() == 0) *a.step = a.hyper[kStep];
}

// Where gradients go, or `look`: they are only looked at.
struct Settling {
  const RuleFactors& factors;
  bool look;
  float largest = 0.0f;

  FUSED_DNI_DEVICE void operator()(const Slot& slot, std::int64_t at, float g) {
    if (look)
      largest = fmaxf(largest, magnitude(g));
    else
      settle(slot, at, g, factors);
  }
};

// A matrix's gradient [rows, columns]: a^T b, of a [N, rows] and b [N, columns].
template <class C, class B>
FUSED_DNI_DEVICE void matrix_gradient(Settling& to, const Slot& slot, SharedArena arena,
                                      const float* a, int rows, const B* b, int columns,
                                      int depth) {
  const Operand<float, Lies::kAcross> left{a, rows, rows};
  const Operand<B, Lies::kAcross> right{b, columns, columns};
  const float largest = settle_product<typename C::Weight>(slot, rows, columns, arena, left, right,
                                                           depth, to.factors, 1.0f, to.look);
  to.largest = fmaxf(to.largest, largest);
}

// The context's gradient by classes: a class's column is the sum of the rows of that class.
FUSED_DNI_DEVICE void label_gradient(Settling& to, const SynthesizerArguments& a,
                                     SharedArena arena) {
  constexpr int kTile = kLabels * kLine;
  const int classes = a.synthesizer.classes, warps = kThreads / 32;
  const int across = ceil_div(classes, kLabels), count = ceil_div(a.outputs, 32) * across;
  const Shared<float> sums = arena.take<float>(warps * kTile);
  for (int index = block(); index < count; index += blocks()) {
    const int out = index / across * 32, first = index % across * kLabels;
    const int mine = warp() * kTile + lane();
    block_barrier();
    for (int k = 0; k < kLabels; ++k) sums.store(mine + k * kLine, 0.0f);
    for (int n = warp(); n < a.rows; n += warps) {
      const std::int64_t k = a.synthesizer.labels[n] - first;
      const float e =
          out + lane() < a.outputs ? a.error[std::int64_t{n} * a.outputs + out + lane()] : 0.0f;
      if (k < 0 || k >= kLabels) continue;
      const int at = mine + static_cast<int>(k) * kLine;
      sums.store(at, sums.load(at) + e);
    }
    block_barrier();
    for (int i = thread(); i < 32 * kLabels; i += kThreads) {
      const int o = i / kLabels, k = i % kLabels;
      if (out + o >= a.outputs || first + k >= classes) continue;
      float g = 0.0f;
      for (int w = 0; w < warps; ++w) g += sums.load(w * kTile + k * kLine + o);
      to(a.context, std::int64_t{out + o} * classes + first + k, g);
    }
  }
}

// Every parameter's gradient, the gain's given; returns the largest magnitude if they were looked
// at.
template <class C>
FUSED_DNI_DEVICE float slots(const SynthesizerArguments& a, SharedArena arena, const RuleFactors& f,
                             bool look, float gain) {
  const Synthesizer& s = a.synthesizer;
  const auto* h = static_cast<const typename C::X*>(a.h);
  Settling to{f, look};
  // Products with h, and with what is float32: a piece of code each.
  const bool dense = s.source == kDense, low = s.source == kLowRank;
  if (a.trainable[dense ? 0 : 1])
    matrix_gradient<C>(to, dense ? a.weight : a.down, arena, dense ? a.error : a.back,
                       dense ? a.outputs : s.rank, h, a.outputs, a.rows);
#pragma unroll 1
  for (int part = 0; part < 2; ++part) {
    const bool wanted = part == 0 ? a.trainable[0] && low : a.trainable[2] && s.vectors != nullptr;
    if (wanted)
      matrix_gradient<C>(to, part == 0 ? a.weight : a.context, arena, a.error, a.outputs,
                         part == 0 ? s.reduced : s.vectors, part == 0 ? s.rank : s.classes, a.rows);
  }
  if (a.trainable[2] && s.table != nullptr) {
    if (block() == blocks() - 1 && thread() == 0) to(a.context, 0, gain);
  } else if (a.trainable[2] && s.labels != nullptr) {
    label_gradient(to, a, arena);
  }
  if (a.columns == nullptr) return to.largest;
  const int parts = ceil_div(a.rows, C::T::M);
  // From the other end: the first blocks may have had a tile more than the last.
  for (int o = (blocks() - 1 - block()) * kThreads + thread(); o < a.outputs;
       o += blocks() * kThreads) {
    if (a.trainable[3]) to(a.bias, o, sum_list(a.columns + o, parts, 2LL * a.outputs));
    if (a.trainable[0] && s.source == kDiagonal)
      to(a.weight, o, sum_list(a.columns + a.outputs + o, parts, 2LL * a.outputs));
  }
  return to.largest;
}

template <class C>
FUSED_DNI_DEVICE void apply(const SynthesizerArguments& a, SharedArena arena) {
  const bool ruled = a.rule != kNoRule;
  double sums[5] = {}, size = 0.0;
  in_turn([&](int i, double& sum) { sum = sum_left(a.sums + i * kMostBlocks, blocks(), arena); },
          sums);
#pragma unroll
  for (int i = 0; i < 4; ++i) size += fabs(sums[i]);
  const float gain = static_cast<float>(sums[4]);
  bool applied = size < static_cast<double>(INFINITY), tried = false;
  double step = 0.0;
  RuleFactors f = no_rule();
  if (ruled) {
    step = *a.step + 1.0;
    f = rule_factors(a.hyper, step, a.rule, a.nesterov);
  }
#pragma unroll 1
  for (;;) {
    // What blocks saw of operands, of e and of e V, or of the gradients: the same for all of them.
    const int first = tried ? 3 : 0, last = tried ? 3 : a.synthesizer.source == kLowRank ? 2 : 1;
    float operands = 0.0f, largest = magnitude(gain);
#pragma unroll 1
    for (int list = first; ruled && list <= last; ++list) {
      const float left = largest_left(a.largest + list * kMostBlocks, blocks(), arena);
      if (list == 0)
        operands = left;
      else
        largest = fmaxf(largest, left);
    }
    if (ruled) applied = applied && operands < INFINITY && largest < INFINITY;
    if (ruled && !applied) break;
    const bool look = ruled && !tried && !(fmaxf(operands, 1.0f) * largest * a.rows < kLargest);
    const float seen = slots<C>(a, arena, f, look, gain);
    if (!look) break;
    leave_largest(a.largest + 3 * kMostBlocks, seen, arena);
    grid_barrier(a.barrier, Phase::kUpdate);
    tried = true;
  }
  if (block() != 0 || thread() != 0) return;
  if (ruled && applied)
    a.hyper[kStep] = step;
  else if (ruled)
    a.hyper[kSkipped] += 1.0;
  if (!applied) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) a.statistics[i] += sums[i];
  a.statistics[4] += a.rows;
}

template <class C>
FUSED_DNI_KERNEL(kThreads)
synthesizer_kernel(FUSED_DNI_ARGUMENT SynthesizerArguments a) {
  const SharedArena arena;
  if (!a.training) {
    predict<C>(a, arena);
    return;
  }
  errors<C>(a, arena);
  const bool low = a.synthesizer.source == kLowRank;
  grid_barrier(a.barrier, low ? Phase::kBack : Phase::kApply);
  if (low) {
    const float largest = reduce_rows(a.back, a.error, a.synthesizer.weight, a.synthesizer.rank, 1,
                                      a.rows, a.synthesizer.rank, a.outputs);
    leave_largest(a.largest + 2 * kMostBlocks, largest, arena);
    grid_barrier(a.barrier, Phase::kApply);
  }
  apply<C>(a, arena);
}

// ---- Launching ------------------------------------------------------------------------------------

template <class C>
Status launch_synthesizer(const SynthesizerLaunch& given) {
  SynthesizerArguments a = given.arguments;
  divide(a, given.room);
  int tiles = tiles_of<typename C::T>(a.rows, a.outputs);
  if (a.training && a.synthesizer.source == kDense) {
    const int weights = tiles_of<typename C::W>(a.outputs, a.outputs);
    tiles = weights > tiles ? weights : tiles;
  }
  Status status;
  int grid = resident_blocks(synthesizer_kernel<C>, kThreads, kShared<C>, status);
  if (!status.ok()) return status;
  grid = grid < kMostBlocks ? grid : kMostBlocks;
  launch(synthesizer_kernel<C>, a, tiles < grid ? tiles : grid, kThreads, kShared<C>, given.stream,
         status);
  return status;
}

}  // namespace

std::size_t synthesizer_workspace(const SynthesizerArguments& arguments) {
  SynthesizerArguments a = arguments;
  return divide(a, nullptr);
}

Status synthesizer(const SynthesizerLaunch& launch) {
  const SynthesizerArguments& a = launch.arguments;
  if (a.type == kBfloat16) return launch_synthesizer<InBf16>(launch);
  if (a.type == kFloat16) return launch_synthesizer<InFp16>(launch);
  return a.ieee ? launch_synthesizer<InFp32>(launch) : launch_synthesizer<InTf32>(launch);
}

}  // namespace fused_dni::cuda
