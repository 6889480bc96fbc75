// Activations and their derivatives on vectors.
//
// An activation whose slope can be told from its output alone says so (`kFromOutput`): its input
// then need not be kept. float has vector code, good to a few units in the last place; double
// calls the C library lane by lane.
#pragma once

#include "simd.hpp"

namespace fused_dni::FUSED_DNI_ISA {

// NaN goes through both: a comparison with it is false.
template <class V>
FUSED_DNI_INLINE V at_most(V v, V limit) {
  return v > limit ? limit : v;
}
template <class V>
FUSED_DNI_INLINE V at_least(V v, V limit) {
  return v < limit ? limit : v;
}

template <class T>
struct Math;

template <>
struct Math<float> {
  using V = Vec<float>;
  using M = Mask<float>;

  FUSED_DNI_INLINE static V scale_by_power(V v, M n) {  // v * 2^n in two steps: n may be -150
    const M half = n >> 1;
    return v * (V)((half + 127) << 23) * (V)((n - half + 127) << 23);
  }

  // exp(x) = 2^n exp(r), |r| <= ln(2)/2, with Cephes' polynomial for exp(r).
  FUSED_DNI_INLINE static V exp(V x) {
    x = at_least(at_most(x, V{} + 89.0f), V{} - 104.0f);
    const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer
    const V shifted = x * 1.44269504088896341f + round;
    const V n = shifted - round;
    V r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return scale_by_power(p, (M)shifted - (M)(V{} + round));
  }

  // log(1 + z) for z in [0, 1], as 2 artanh(z / (2 + z)): exact in the limit of small z.
  FUSED_DNI_INLINE static V log1p_unit(V z) {
    const V s = z / (z + 2.0f);
    const V t = s * s;
    V p = t * (1.0f / 17) + 1.0f / 15;
    p = p * t + 1.0f / 13;
    p = p * t + 1.0f / 11;
    p = p * t + 1.0f / 9;
    p = p * t + 1.0f / 7;
    p = p * t + 1.0f / 5;
    p = p * t + 1.0f / 3;
    return 2.0f * (s + s * t * p);
  }

  // Cephes: an odd polynomial near zero, the exponential beyond.
  FUSED_DNI_INLINE static V tanh(V x) {
    const V size = absolute<float>(x);
    const V t = x * x;
    V p = t * -5.70498872745e-3f + 2.06390887954e-2f;
    p = p * t - 5.37397155531e-2f;
    p = p * t + 1.33314422036e-1f;
    p = p * t - 3.33332819422e-1f;
    const V near = x + x * t * p;
    const V far = 1.0f - 2.0f / (exp(2.0f * size) + 1.0f);
    const V result = size < 0.625f ? near : (x < 0.0f ? -far : far);
    return x == x ? result : x;
  }

  // Minimax polynomials: one for erf near zero, one for log(erfc) beyond, below 1 ulp each.
  FUSED_DNI_INLINE static V erf(V x) {
    const V t = at_most(absolute<float>(x), V{} + 4.0f);  // erf(4) rounds to 1
    const V s = t * t;
    V q = t * -1.72853470e-5f + 3.83197126e-4f;
    q = q * s + (t * -3.88396438e-3f + 2.42546219e-2f);
    q = q * t - 1.06777877e-1f;
    q = q * t - 6.34846687e-1f;
    q = q * t - 1.28717512e-1f;
    q = q * t - t;
    const V far = 1.0f - exp(q);
    V p = s * -5.96761703e-4f + 4.99119423e-3f;
    p = p * s - 2.67681349e-2f;
    p = p * s + 1.12819925e-1f;
    p = p * s - 3.76125336e-1f;
    p = p * s + 1.28379166e-1f;
    const V near = p * x + x;
    return t > 0.927734375f ? (x < 0.0f ? -far : far) : near;
  }
};

template <>
struct Math<double> {
  using V = Vec<double>;

  FUSED_DNI_INLINE static V exp(V x) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
    return x;
  }
  FUSED_DNI_INLINE static V log1p_unit(V z) {
    for (int i = 0; i < kLanes<double>; ++i) z[i] = __builtin_log1p(z[i]);
    return z;
  }
  FUSED_DNI_INLINE static V tanh(V x) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_tanh(x[i]);
    return x;
  }
  FUSED_DNI_INLINE static V erf(V x) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_erf(x[i]);
    return x;
  }
};

template <class T>
FUSED_DNI_INLINE Vec<T> sigmoid(Vec<T> u) {
  const Vec<T> e = Math<T>::exp(-absolute<T>(u));
  return (u < T(0) ? e : broadcast(T(1))) / (e + T(1));
}

template <class T>
struct Identity {
  using V = Vec<T>;
  static constexpr bool kFromOutput = true;
  FUSED_DNI_INLINE static V value(V u) { return u; }
  FUSED_DNI_INLINE static V slope(V) { return broadcast(T(1)); }
};

template <class T>
struct Relu {
  using V = Vec<T>;
  static constexpr bool kFromOutput = true;
  FUSED_DNI_INLINE static V value(V u) { return u < T(0) ? V{} : u; }
  FUSED_DNI_INLINE static V slope(V h) { return h > T(0) ? broadcast(T(1)) : V{}; }
};

template <class T>
struct Gelu {
  using V = Vec<T>;
  static constexpr bool kFromOutput = false;
  FUSED_DNI_INLINE static V normal_cdf(V u) {
    return T(0.5) * (Math<T>::erf(u * T(0.70710678118654752440)) + T(1));
  }
  FUSED_DNI_INLINE static V value(V u) { return u * normal_cdf(u); }
  FUSED_DNI_INLINE static V slope(V u) {
    return normal_cdf(u) + u * (T(0.39894228040143267794) * Math<T>::exp(u * u * T(-0.5)));
  }
};

template <class T>
struct GeluTanh {
  using V = Vec<T>;
  static constexpr bool kFromOutput = false;
  static constexpr T kScale = T(0.79788456080286535588), kCubic = T(0.044715);
  FUSED_DNI_INLINE static V tanh_of(V u) {
    return Math<T>::tanh(kScale * (u + kCubic * (u * u * u)));
  }
  FUSED_DNI_INLINE static V value(V u) { return T(0.5) * u * (tanh_of(u) + T(1)); }
  FUSED_DNI_INLINE static V slope(V u) {
    // Beyond 12 the slope is 0 or 1 to the last bit; the square of a larger u might overflow.
    u = at_least(at_most(u, broadcast(T(12))), broadcast(T(-12)));
    const V t = tanh_of(u);
    const V inner = kScale * (T(3) * kCubic * (u * u) + T(1));
    return T(0.5) * (t + T(1)) + T(0.5) * u * ((T(1) - t * t) * inner);
  }
};

template <class T>
struct Silu {
  using V = Vec<T>;
  static constexpr bool kFromOutput = false;
  FUSED_DNI_INLINE static V value(V u) { return u * sigmoid<T>(u); }
  FUSED_DNI_INLINE static V slope(V u) {
    const V s = sigmoid<T>(u);
    return s * (u * (T(1) - s) + T(1));
  }
};

template <class T>
struct Tanh {
  using V = Vec<T>;
  static constexpr bool kFromOutput = true;
  FUSED_DNI_INLINE static V value(V u) { return Math<T>::tanh(u); }
  FUSED_DNI_INLINE static V slope(V h) { return T(1) - h * h; }
};

template <class T>
struct Sigmoid {
  using V = Vec<T>;
  static constexpr bool kFromOutput = true;
  FUSED_DNI_INLINE static V value(V u) { return sigmoid<T>(u); }
  FUSED_DNI_INLINE static V slope(V h) { return h * (T(1) - h); }
};

template <class T>
struct Softplus {
  using V = Vec<T>;
  static constexpr bool kFromOutput = false;
  FUSED_DNI_INLINE static V value(V u) {
    return at_least(u, V{}) + Math<T>::log1p_unit(Math<T>::exp(-absolute<T>(u)));
  }
  FUSED_DNI_INLINE static V slope(V u) { return sigmoid<T>(u); }
};

template <class T>
struct Mish {
  using V = Vec<T>;
  static constexpr bool kFromOutput = false;
  // tanh(log(1 + w)) = n / (n + 2) with w = exp(u), n = w (w + 2): nothing cancels.
  FUSED_DNI_INLINE static V n_of(V u) {
    const V w = Math<T>::exp(at_most(u, broadcast(T(20))));  // n / (n + 2) is 1 beyond
    return w * (w + T(2));
  }
  FUSED_DNI_INLINE static V value(V u) {
    const V n = n_of(u);
    return u * (n / (n + T(2)));
  }
  FUSED_DNI_INLINE static V slope(V u) {
    const V n = n_of(u);
    const V t = n / (n + T(2));
    const V one_less_square = T(4) * (n + T(1)) / ((n + T(2)) * (n + T(2)));
    return t + u * one_less_square * sigmoid<T>(u);
  }
};

// Calls body(activation) for an index into the Python side's ACTIVATIONS.
template <class T, class Body>
FUSED_DNI_INLINE void with_activation(int kind, Body&& body) {
  switch (kind) {
    case 0: return body(Identity<T>{});
    case 1: return body(Relu<T>{});
    case 2: return body(Gelu<T>{});
    case 3: return body(GeluTanh<T>{});
    case 4: return body(Silu<T>{});
    case 5: return body(Tanh<T>{});
    case 6: return body(Sigmoid<T>{});
    case 7: return body(Softplus<T>{});
    default: return body(Mish<T>{});
  }
}

}  // namespace fused_dni::FUSED_DNI_ISA
