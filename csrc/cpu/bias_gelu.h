// GELU (arXiv 1606.08415) of u = x + b, with the normal distribution Phi and density phi:
//   exact: y = u Phi(u),        dx = dy (Phi(u) + u phi(u))
//   tanh:  y = u sigmoid(2 w),  w = sqrt(2 / pi) (u + 0.044715 u^3)
//   db = sum over rows of dx
#pragma once
#include "cpu/vector_math.h"

namespace phi_fast::cpu::PHI_ISA {

/// gelu(x) = x (1 + tanh(u)) / 2 = x s with s = 1 / (1 + e^-2u), u = sqrt(2/π) (x + 0.044715 x³), and its derivative
/// s + x s (1 - s) 2u'. Neither is computed as a difference of nearly equal numbers. Beyond ±10, s is 0 or 1 in fp32.
/// Adding x · 0 gives NaN where torch gives NaN: for the value at -inf, for the derivative at both infinities.
struct TanhGelu {
  static constexpr float kTwoRoot = 1.5957691216057308f;  // 2 sqrt(2/π)
  static constexpr float kCubic = 0.044715f;

  Vec x, t, power, s;  // t is x clamped to ±10, power is e^-2u

  PHI_INLINE explicit TanhGelu(Vec input) : x(input), t(max(Vec(-10.0f), min(Vec(10.0f), input))) {
    power = exp_in_range(t * fma(Vec(-kTwoRoot * kCubic), t * t, Vec(-kTwoRoot)));
    s = reciprocal(Vec(1.0f) + power);
  }
  PHI_INLINE Vec value() const { return x * keep(x > Vec(-10.0f), s); }
  PHI_INLINE Vec slope() const {
    const Vec two_du = fma(Vec(3 * kTwoRoot * kCubic), t * t, Vec(kTwoRoot));
    return fma((t * s) * (power * s), two_du, fma(x, Vec(0.0f), s));
  }
};

/// gelu(x) = x Φ(x), and its derivative Φ(x) + x φ(x).
struct ErfGelu {
  Vec x, cdf;

  PHI_INLINE explicit ErfGelu(Vec input) : x(input) {
    cdf = fma(erf(x * Vec(0.7071067811865476f)), Vec(0.5f), Vec(0.5f));
  }
  PHI_INLINE Vec value() const { return x * cdf; }
  PHI_INLINE Vec slope() const {
    const Vec t = max(Vec(-20.0f), min(Vec(20.0f), x));  // φ is 0 beyond, and x² may be infinite
    return fma(t, exp(t * t * Vec(-0.5f)) * Vec(0.3989422804014327f), fma(x, Vec(0.0f), cdf));
  }
};

template <int kForm>
using GeluForm = std::conditional_t<kForm == 0, TanhGelu, ErfGelu>;

template <class Fn>
void with_gelu(Gelu gelu, Fn fn) {
  if (gelu == Gelu::kTanh) fn(Index<0>{});
  if (gelu == Gelu::kErf) fn(Index<1>{});
}

template <class T, class G>
void bias_gelu_forward_row(const BiasGeluForward& a, int64_t r) {
  const T* x = a.x.row<T>(r);
  T* out = a.out.row<T>(r);
  const float* bias = a.bias;
  for_lanes(a.columns, [=](int64_t i, auto lanes) {
    Vec u = load(x + i, lanes);
    if (bias) u = u + load(bias + i, lanes);
    store(out + i, G(u).value(), lanes);
  });
}

inline void bias_gelu_forward(const BiasGeluForward& a) {
  with_type(a.dtype, [&](auto type) {
    with_gelu(a.gelu, [&](auto form) {
      parallel_for(a.rows, threads_for(a.rows * a.columns, a.threads), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) bias_gelu_forward_row<decltype(type), GeluForm<form>>(a, r);
      });
    });
  });
}

/// Computes the gradient of a row and adds it to dbias. Rows are processed one at a time, because several rows a power
/// of two apart would compete for few lines of the first-level cache.
template <class T, class G>
void bias_gelu_backward_row(const BiasGeluBackward& a, int64_t r, float* dbias) {
  const T *x = a.x.row<T>(r), *dout = a.dout.row<T>(r);
  T* dx = a.dx.row<T>(r);
  T* activation = a.activation ? a.activation.row<T>(r) : nullptr;
  const float* bias = a.bias;
  for_lanes(a.columns, [=](int64_t i, auto lanes) {
    Vec u = load(x + i, lanes);
    if (bias) u = u + load(bias + i, lanes);
    const G gelu(u);
    const Vec gradient = load(dout + i, lanes) * gelu.slope();
    store(dx + i, gradient, lanes);
    if (activation) store(activation + i, gelu.value(), lanes);
    store(dbias + i, load(dbias + i, lanes) + gradient, lanes);
  });
}

inline void bias_gelu_backward(const BiasGeluBackward& a) {
  const RowBlocks blocks(a.rows, 16);
  const Scratch partial(blocks.count * a.columns);
  with_type(a.dtype, [&](auto type) {
    with_gelu(a.gelu, [&](auto form) {
      parallel_for(blocks.count, threads_for(a.rows * a.columns, a.threads), [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
          float* dbias = partial.data() + b * a.columns;
          fill(dbias, a.columns, 0.0f);
          blocks.by_row(b, [&](int64_t r) { bias_gelu_backward_row<decltype(type), GeluForm<form>>(a, r, dbias); });
        }
      });
    });
  });
  reduce_blocks(partial.data(), blocks.count, a.columns, false, a.dbias, a.threads);
}

}  // namespace phi_fast::cpu::PHI_ISA
