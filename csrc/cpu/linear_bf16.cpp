// The linear layer's ops for bfloat16 x, h and dx with float32 parameters, on machines with
// AVX512_BF16. Operands of the products with the weight are rounded where they are read or packed,
// the weight too: no low-precision copy of it is kept, so none can be stale. Everything else is
// float32, as in linear.cpp.
#include "linear.hpp"

#include "gemm_bf16.hpp"

namespace fused_dni::FUSED_DNI_ISA {
namespace {

// x W^T of bfloat16 operands.
struct RoundedInput {
  Index rows, in, stride;
  const Half* x;  // [N, I]

  Pair* transposed = nullptr;  // [I / 2][stride]

  RoundedInput(const Layer<float>& layer, const void* input)
      : rows(layer.rows), in(layer.in), stride(layer.stride), x(static_cast<const Half*>(input)) {}

  void plan(Scratch& scratch) { transposed = scratch.take<Pair>(pairs_of(in) * stride); }

  float transpose(const Team& team) const {
    const Range own = part(pairs_of(in), 16, team.rank, team.size);
    Magnitude<float> magnitude;
    for (Index n = 0; n < rows; n += 16)
      for (Index k = own.begin; k < own.end; k += 16) {
        Vec<float> v[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          const Pairs pairs =
              n + i < rows ? load_pairs(x + (n + i) * in + 2 * k, in - 2 * k) : Pairs{};
          magnitude.add((Vec<float>)(pairs << 16));
          magnitude.add((Vec<float>)(pairs & 0xffff0000u));
          v[i] = (Vec<float>)pairs;
        }
        transpose_registers<float>(v);
        float* to = reinterpret_cast<float*>(transposed) + k * stride + n;
        for (int i = 0; i < smaller(16, own.end - k); ++i) store(to + i * stride, v[i]);
      }
    return magnitude.value();
  }

  void run(Range own, const float* weight, float* z) const {
    multiply_rounding(own.size(), rows, in, weight + own.begin * in, in, transposed, stride,
                      z + own.begin * stride, stride);
  }
};

// WeightPhase of bfloat16 operands.
struct RoundedWeight {
  Index rows, in, out, stride;
  Index row_pairs, feature_pairs;
  const float* weight;           // [O, I]
  const Half* x;                 // [N, I]
  const float* delta = nullptr;  // [O][stride]

  Pair* by_feature = nullptr;  // [O][row_pairs]: delta, pairs along the batch
  Pair* by_row = nullptr;      // [N][feature_pairs]: delta, pairs along the features
  float* packed = nullptr;     // a piece a thread

  RoundedWeight(Index n, Index i, Index o, const float* w, const void* input)
      : rows(n),
        in(i),
        out(o),
        stride(transposed_stride<float>(n)),
        row_pairs(transposed_stride<float>(pairs_of(n))),
        feature_pairs(transposed_stride<float>(pairs_of(o))),
        weight(w),
        x(static_cast<const Half*>(input)) {}

  void plan(Scratch& scratch, int threads) {
    by_feature = scratch.take<Pair>(out * row_pairs);
    by_row = scratch.take<Pair>(rows * feature_pairs);
    packed = scratch.take<float>(threads * piece());
  }

  void prepare(Range own, bool grad_x) const {
    for (Index o = own.begin; o < own.end; ++o) {
      const float* row = delta + o * stride;
      for (Index n = 0; n < rows; n += 32)
        store_pairs(by_feature + o * row_pairs + n / 2,
                    rounded(load(row + n), n + 16 < rows ? load(row + n + 16) : Vec<float>{}));
    }
    if (!grad_x) return;
    Half* to = reinterpret_cast<Half*>(by_row);
    for (Index n = 0; n < rows; n += 16)
      for (Index o = own.begin; o < own.end; o += 16) {
        Vec<float> v[16];
        for (int i = 0; i < 16; ++i)
          v[i] = o + i < own.end ? load(delta + (o + i) * stride + n) : Vec<float>{};
        transpose_registers<float>(v);
        for (int i = 0; i < smaller(16, rows - n); ++i)
          store_halves(to + (n + i) * 2 * feature_pairs + o, rounded(v[i]), 16);
      }
  }

  template <class Panel>
  void run(const Team& team, void* grad_x, bool wanted, Panel&& panel) const {
    float* scratch = packed + team.rank * piece();
    if (grad_x != nullptr) {
      const Grid grid(team, ceil_div(in, kPanel<float>));
      const Range batch = part(rows, kTileRows, grid.minor, grid.minors);
      const Range columns = grid.major_part(in, 16);
      for_panels<float>(columns.begin, columns.end, [&](Index i, Index width, Index) {
        Half* to = static_cast<Half*>(grad_x) + batch.begin * in + i;
        multiply_pairs(
            batch.size(), width, pairs_of(out), by_row + batch.begin * feature_pairs, feature_pairs,
            scratch,
            [&](Index k, Index count, Pair* pairs) { pack_weight(k, count, i, width, pairs); },
            [](Index, Index) {},
            [&](Index m, Index take, const float* sums) {
              for (Index r = m; r < m + take; ++r, sums += kPanel<float>)
                for (Index v = 0; v < width; v += 16)
                  store_halves(to + r * in + v, rounded(load(sums + v)), width - v);
            });
      });
      if (wanted) team.sync();
    }
    if (!wanted) return;
    const Grid grid(team, ceil_div(out, 16));
    const Range features = grid.major_part(out, 16);
    const Range columns = part(in, 16, grid.minor, grid.minors);
    for_panels<float>(columns.begin, columns.end,
                      [&](Index i, Index width, Index) { panel(i, width, features, scratch); });
  }

  void gradients(const Team& team, void* grad_x, float* grad_weight) const {
    run(team, grad_x, grad_weight != nullptr,
        [&](Index i, Index width, Range features, float* scratch) {
          product(
              i, width, features, scratch, [](Index, Index) {},
              [&](Index o, Index count, const float* sums) {
                float* to = grad_weight + (features.begin + o) * in + i;
                for (Index r = 0; r < count; ++r, to += in)
                  for (Index v = 0; v < width; v += 16)
                    store_upto(to + v, load(sums + r * kPanel<float> + v), width - v);
              });
        });
  }

  void update(const Team& team, void* grad_x, const Rule<float>& rule,
              const Slot<float>& slot) const {
    with_rule(rule, [&](auto kind) {
      run(team, grad_x, slot.parameter != nullptr,
          [&](Index i, Index width, Range features, float* scratch) {
            update_panel<decltype(kind)::value>(rule, slot, i, width, features, scratch);
          });
    });
  }

  bool finite(const Team& team) const {
    Magnitude<float> magnitude;
    run(team, nullptr, true, [&](Index i, Index width, Range features, float* scratch) {
      product(
          i, width, features, scratch, [](Index, Index) {},
          [&](Index, Index count, const float* sums) {
            for (Index r = 0; r < count; ++r)
              for (Index v = 0; v < width; v += 16)
                magnitude.add(load(sums + r * kPanel<float> + v));
          });
    });
    return is_finite(magnitude.value());
  }

 private:
  Index piece() const { return packed_scratch<float>(larger(rows, out)); }

  // Rows 2k and 2k + 1 of W, of x.
  void pack_weight(Index k, Index count, Index i, Index width, Pair* to) const {
    const float* row = weight + 2 * k * in + i;
    for (Index p = k; p < k + count; ++p, row += 2 * in, to += kPanel<float>)
      for (Index v = 0; v < width; v += 16) {
        const Index later = 2 * p + 1 < out ? width - v : 0;
        store_pairs(to + v, interleaved(rounded(load_floats(row + v, width - v)),
                                        rounded(load_floats(row + in + v, later))));
      }
  }
  void pack_x(Index k, Index count, Index i, Index width, Pair* to) const {
    const Half* row = x + 2 * k * in + i;
    for (Index p = k; p < k + count; ++p, row += 2 * in, to += kPanel<float>)
      for (Index v = 0; v < width; v += 16)
        store_pairs(to + v,
                    interleaved(load_halves(row + v, width - v),
                                load_halves(row + in + v, 2 * p + 1 < rows ? width - v : 0)));
  }

  // delta^T x for a panel of columns.
  template <class Touch, class Body>
  FUSED_DNI_INLINE void product(Index i, Index width, Range features, float* scratch, Touch&& touch,
                                Body&& body) const {
    multiply_pairs(
        features.size(), width, pairs_of(rows), by_feature + features.begin * row_pairs, row_pairs,
        scratch, [&](Index k, Index count, Pair* pairs) { pack_x(k, count, i, width, pairs); },
        touch, body);
  }

  template <Rule<float>::Kind kKind>
  void update_panel(const Rule<float>& rule, const Slot<float>& slot, Index i, Index width,
                    Range features, float* scratch) const {
    const Index first = features.begin * in + i;
    const auto fetch = [&](Index o, Index count) {
      for (Index r = o; r < o + count; ++r)
        for (Index c = 0; c < width; c += 16) {
          const Index at = first + r * in + c;
          __builtin_prefetch(slot.parameter + at, 1);
          if (slot.first) __builtin_prefetch(slot.first + at, 1);
          if (slot.second) __builtin_prefetch(slot.second + at, 1);
        }
    };
    if (kKind == Rule<float>::kPlain && width % 16 == 0 && pairs_of(rows) <= kBlockPairs) {
      multiply_pairs_into(
          features.size(), width, pairs_of(rows), by_feature + features.begin * row_pairs,
          row_pairs, scratch, slot.parameter + first, in, rule.keep, -rule.lr,
          [&](Index k, Index count, Pair* pairs) { pack_x(k, count, i, width, pairs); }, fetch);
      return;
    }
    product(i, width, features, scratch, fetch, [&](Index o, Index count, const float* sums) {
      for (Index r = 0; r < count; ++r)
        apply_span<float, kKind>(rule, slot, first + (o + r) * in, width, sums + r * kPanel<float>);
    });
  }
};

struct Bf16 {
  using T = float;
  using Input = RoundedInput;
  using Weight = RoundedWeight;
  static constexpr bool kTransposed = false;

  static float magnitude(const void* x, Index begin, Index count) {
    const Half* from = static_cast<const Half*>(x) + begin;
    Magnitude<float> magnitude;
    for (Index i = 0; i < count; i += 16) magnitude.add(widened(load_halves(from + i, count - i)));
    return magnitude.value();
  }

  // What is handed out is what the synthesizer reads: h becomes the rounded one here too, also where
  // nothing is handed out.
  static void give(float* from, Index stride, Index rows, Range own, void* to, Index features) {
    for (Index n = 0; n < rows; n += 16)
      for (Index o = own.begin; o < own.end; o += 16) {
        const Index width = smaller(16, own.end - o);
        Vec<float> v[16];
        for (int i = 0; i < 16; ++i) {
          v[i] = Vec<float>{};
          if (i >= width) continue;
          float* at = from + (o + i) * stride + n;
          v[i] = widened(rounded(load(at)));
          store(at, v[i]);
        }
        if (to == nullptr) continue;
        transpose_registers<float>(v);
        Half* row = static_cast<Half*>(to) + n * features + o;
        for (int i = 0; i < smaller(16, rows - n); ++i)
          store_halves(row + i * features, rounded(v[i]), width);
      }
  }
  static void take(const void* from, Index features, Index rows, Range own, float* to,
                   Index stride) {
    for (Index n = 0; n < rows; n += 16)
      for (Index o = own.begin; o < own.end; o += 16) {
        const Index width = smaller(16, own.end - o);
        const Half* row = static_cast<const Half*>(from) + n * features + o;
        Vec<float> v[16];
        for (int i = 0; i < 16; ++i)
          v[i] = n + i < rows ? widened(load_halves(row + i * features, width)) : Vec<float>{};
        transpose_registers<float>(v);
        for (int i = 0; i < width; ++i) store(to + (o + i) * stride + n, v[i]);
      }
  }
};

}  // namespace

void add_linear_bf16(Kernels& kernels) { add_linear_ops<Bf16>(kernels, 2); }

}  // namespace fused_dni::FUSED_DNI_ISA
