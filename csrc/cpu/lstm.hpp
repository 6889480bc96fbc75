// What a step of an LSTM is made of: the cell's elements, the recurrent product's register tile,
// and the packing of the weights that both read.
#pragma once

#include "activation.hpp"
#include "gemm.hpp"
#include "lstm_order.hpp"
#include "parallel.hpp"
#include "weight.hpp"

namespace fused_dni::FUSED_DNI_ISA {

// ---- Elements ----------------------------------------------------------------------------------

// The cell's two non-linearities. Five of them a unit and step are a fifth of a step's time at
// H = 128, so float has its own: one exponential and one division each, and no second branch.
template <class T>
struct Squash {
  using V = Vec<T>;
  FUSED_DNI_INLINE static V sigmoid(V x) { return FUSED_DNI_ISA::sigmoid<T>(x); }
  FUSED_DNI_INLINE static V tanh(V x) { return Math<T>::tanh(x); }
};

template <>
struct Squash<float> {
  using V = Vec<float>;
  using M = Mask<float>;

  // exp(x) = scale * (1 + rest), scale a power of two, rest = exp(r) - 1 for |r| <= log(2) / 2 by
  // Cephes' polynomial; NaN in rest if x is one. |x| is small enough for a normal scale.
  FUSED_DNI_INLINE static V split_exp(V x, V& scale) {
    const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer
    const V shifted = x * 1.44269504088896341f + round;
    const V n = shifted - round;
    scale = (V)((M)(V{} + 1.0f) + ((M)shifted << 23));  // n is in the lower bits of `shifted`
    V r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return p * (r * r) + r;
  }

  // The smallest value is 4e-38, as a gate, not 0: nothing here is ever subnormal.
  FUSED_DNI_INLINE static V sigmoid(V x) {
    V scale;
    const V rest = split_exp(at_least(at_most(-x, V{} + 86.0f), V{} - 86.0f), scale);
    return 1.0f / (scale * rest + (scale + 1.0f));
  }

  // With e = exp(2 x) - 1, which loses nothing near zero: e / (e + 2).
  FUSED_DNI_INLINE static V tanh(V x) {
    V scale;
    const V rest = split_exp(2.0f * at_least(at_most(x, V{} + 10.0f), V{} - 10.0f), scale);
    const V e = scale * rest + (scale - 1.0f);
    return e / (e + 2.0f);
  }
};

// Of the gates in front of their non-linearities and the cell state: gates behind them, the next
// cell state and hidden state.
template <class T>
FUSED_DNI_INLINE void cell_forward(Vec<T> (&gates)[kGates], Vec<T>& c, Vec<T>& h) {
  gates[0] = Squash<T>::sigmoid(gates[0]);
  gates[1] = Squash<T>::sigmoid(gates[1]);
  gates[2] = Squash<T>::tanh(gates[2]);
  gates[3] = Squash<T>::sigmoid(gates[3]);
  c = gates[1] * c + gates[0] * gates[2];
  h = gates[3] * Squash<T>::tanh(c);
}

// Of the gradients at the step's h and c (beyond what goes through h): those at the gates in front
// of their non-linearities, which replace the gates behind them, and that at the c before.
template <class T>
FUSED_DNI_INLINE void cell_backward(Vec<T> (&gates)[kGates], Vec<T> c_before, Vec<T> c,
                                    Vec<T> grad_h, Vec<T>& grad_c) {
  const Vec<T> i = gates[0], f = gates[1], g = gates[2], o = gates[3];
  const Vec<T> t = Squash<T>::tanh(c);
  const Vec<T> at_c = grad_c + grad_h * o * (T(1) - t * t);
  gates[0] = at_c * g * (i * (T(1) - i));
  gates[1] = at_c * c_before * (f * (T(1) - f));
  gates[2] = at_c * i * (T(1) - g * g);
  gates[3] = grad_h * t * (o * (T(1) - o));
  grad_c = at_c * f;
}

// ---- Products ----------------------------------------------------------------------------------

// sum[m][v] += sum_k a[m * a_row + k] * b[k * b_row + vector v]. With few rows the latency of an
// addition would show: kWays > 1 sums every kWays-th k on its own.
template <class T, int kRows, int kVectors, int kWays>
FUSED_DNI_INLINE void accumulate(Vec<T> (&sum)[kRows][kVectors], Index depth, const T* a,
                                 Index a_row, const T* b, Index b_row) {
  constexpr int L = kLanes<T>;
  Vec<T> way[kWays][kRows][kVectors];
#pragma GCC unroll 4
  for (int w = 0; w < kWays; ++w)
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) way[w][m][v] = w == 0 ? sum[m][v] : Vec<T>{};
  Index k = 0;
  for (; k + kWays <= depth; k += kWays)
#pragma GCC unroll 4
    for (int w = 0; w < kWays; ++w, b += b_row) {
      Vec<T> row[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) row[v] = load(b + v * L);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        const Vec<T> element = broadcast(a[m * a_row + k + w]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) way[w][m][v] += element * row[v];
      }
    }
  for (; k < depth; ++k, b += b_row)
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const Vec<T> element = broadcast(a[m * a_row + k]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) way[0][m][v] += element * load(b + v * L);
    }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sum[m][v] = way[0][m][v];
#pragma GCC unroll 4
      for (int w = 1; w < kWays; ++w) sum[m][v] += way[w][m][v];
    }
}

// Rows of a tile that has all four gates of a group: as in gemm.hpp, 24 accumulators of 32
// registers with AVX-512, 12 of 16 otherwise.
constexpr int kStepRows = kTileRows * kTileVectors / kGates;

constexpr int step_ways(int rows) {
  return rows == 1 ? (kStepRows > 4 ? 4 : 2) : 2 * rows <= kStepRows ? 2 : 1;
}

// As next_rows, for tiles of up to `most` rows.
FUSED_DNI_INLINE Index next_rows_of(Index left, Index most) {
  if (left >= 2 * most || left == most) return most;
  return left > most ? (left + 1) / 2 : left;
}

// Calls body(rows as a compile-time constant, first row) for tiles that cover [rows).
template <int kRows>
struct RowCount {
  static constexpr int value = kRows;
};

template <class Body>
FUSED_DNI_INLINE void with_step_rows(Index rows, Body&& body) {
  if constexpr (kStepRows == 6) {
    switch (rows) {
      case 4: return body(RowCount<4>{});
      case 5: return body(RowCount<5>{});
      case 6: return body(RowCount<6>{});
      default: break;
    }
  }
  switch (rows) {
    case 1: return body(RowCount<1>{});
    case 2: return body(RowCount<2>{});
    default: return body(RowCount<3>{});
  }
}

// Calls body(first, count) for tiles of at most `most` of the rows.
template <class Body>
FUSED_DNI_INLINE void for_rows(Range rows, Index most, Body&& body) {
  for (Index row = rows.begin; row < rows.end;) {
    const Index take = next_rows_of(rows.end - row, most);
    body(row, take);
    row += take;
  }
}

// ---- Packing -----------------------------------------------------------------------------------

// Group p of weight [4H][depth] as a panel [depth][4][kLanes]: a vector for each gate, zeros in
// the lanes behind a short group.
template <class T>
void pack_gates(const T* weight, Index hidden, Index depth, Index p, T* panel) {
  constexpr Index L = kLanes<T>;
  const Index width = group_width<T>(hidden, p);
  for (int g = 0; g < kGates; ++g)
    to_transposed(weight + (g * hidden + p * L) * depth, depth, width, depth, panel + g * L,
                  kGroup<T>);
}

// The sum of the biases of group p, likewise.
template <class T>
void pack_bias(const T* bias_ih, const T* bias_hh, Index hidden, Index p, T* packed) {
  constexpr Index L = kLanes<T>;
  const Index width = group_width<T>(hidden, p);
  for (int g = 0; g < kGates; ++g) {
    const Index at = g * hidden + p * L;
    store(packed + g * L,
          bias_ih ? load_upto(bias_ih + at, width) + load_upto(bias_hh + at, width) : Vec<T>{});
  }
}

// Panels that hold this many columns where threads own them, `majors` at most: for_panels may leave
// each thread one more than the widest possible would.
template <class T>
FUSED_DNI_INLINE Index panel_count(Index columns, Index majors) {
  return columns / kPanel<T> + majors;
}

// The first of the panels of thread `major`'s columns, as many rows deep.
template <class T>
FUSED_DNI_INLINE T* panels_of(T* panels, Range columns, Index major, Index depth) {
  return panels + panel_count<T>(columns.begin, major) * kPanel<T> * depth;
}

// As for_panels: body(first column, width, vectors, panel).
template <class T, class Body>
FUSED_DNI_INLINE void for_packed(Range columns, Index depth, T* panel, Body&& body) {
  for_panels<T>(columns.begin, columns.end, [&](Index col, Index width, Index vectors) {
    body(col, width, vectors, panel);
    panel += kPanel<T> * depth;
  });
}

// Columns [col, col + width) of weight [4H][in] as a panel [4H][kPanel], rows in the private order.
template <class T>
void pack_columns(const T* weight, Index hidden, Index in, Index col, Index width, T* panel) {
  for (Index p = 0; p < group_count<T>(hidden); ++p)
    for (int g = 0; g < kGates; ++g) {
      const Index units = group_width<T>(hidden, p);
      pack(weight + (g * hidden + p * kLanes<T>)*in + col, in, units, width, panel);
      panel += units * kPanel<T>;
    }
}

}  // namespace fused_dni::FUSED_DNI_ISA
