// act(gate) up, the middle of a gated MLP (GLU variants, arXiv 2002.05202), and both gradients in one pass:
//   silu:      act(x) = x sigmoid(x)
//   gelu_tanh: bias_gelu.h's TanhGelu
//   dgate = dout up act'(gate),  dup = dout act(gate)
#pragma once
#include "cpu/bias_gelu.h"

namespace phi_fast::cpu::PHI_ISA {

/// silu(x) = x s with s = 1 / (1 + e^-x), and its derivative s + x s (1 - s), where 1 - s = e^-x s does not cancel.
/// Beyond ±80, s is 1 in fp32 or x s below 1e-33. Adding x · 0 gives NaN where torch gives NaN, as in TanhGelu.
struct Silu {
  Vec x, t, power, s;  // t is x clamped to ±80, power is e^-t

  PHI_INLINE explicit Silu(Vec input) : x(input), t(max(Vec(-80.0f), min(Vec(80.0f), input))) {
    power = exp_in_range(Vec(0.0f) - t);
    s = reciprocal(Vec(1.0f) + power);
  }
  // A quotient is rounded once less than x s, as torch's is. Below -80 it is ±0, and NaN at -inf.
  PHI_INLINE Vec value() const { return select(x > Vec(-80.0f), x / (Vec(1.0f) + power), x * Vec(0.0f)); }
  PHI_INLINE Vec slope() const { return fma(t * s, power * s, fma(x, Vec(0.0f), s)); }
};

template <class T, class G>
void gated_activation_forward_row(const GatedActivationForward& a, int64_t r) {
  const T *gate = a.gate.row<T>(r), *up = a.up.row<T>(r);
  T* out = a.out.row<T>(r);
  for_lanes(a.columns, [=](int64_t i, auto lanes) {
    store(out + i, G(load(gate + i, lanes)).value() * load(up + i, lanes), lanes);
  });
}

template <class T, class G>
void gated_activation_backward_row(const GatedActivationBackward& a, int64_t r) {
  const T *dout = a.dout.row<T>(r), *gate = a.gate.row<T>(r), *up = a.up.row<T>(r);
  T *dgate = a.dgate.row<T>(r), *dup = a.dup.row<T>(r);
  for_lanes(a.columns, [=](int64_t i, auto lanes) {
    const G g(load(gate + i, lanes));
    const Vec d = load(dout + i, lanes);
    const Vec of_gate = d * load(up + i, lanes) * g.slope();
    store(dup + i, d * g.value(), lanes);
    store(dgate + i, of_gate, lanes);
  });
}

template <int kForm>
using GateForm = std::conditional_t<kForm == 0, Silu, TanhGelu>;

/// Calls fn(T{}, Index<form>, row) for each row of a call, which the threads share.
template <class Call, class Fn>
void by_gated_row(const Call& a, Fn fn) {
  const auto with_form = [&](auto type, auto form) {
    parallel_for(a.rows, threads_for(a.rows * a.columns, a.threads), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) fn(type, form, r);
    });
  };
  with_type(a.dtype, [&](auto type) {
    if (a.activation == Gate::kSilu) with_form(type, Index<0>{});
    if (a.activation == Gate::kGeluTanh) with_form(type, Index<1>{});
  });
}

inline void gated_activation_forward(const GatedActivationForward& a) {
  by_gated_row(
      a, [&](auto type, auto form, int64_t r) { gated_activation_forward_row<decltype(type), GateForm<form>>(a, r); });
}

inline void gated_activation_backward(const GatedActivationBackward& a) {
  by_gated_row(
      a, [&](auto type, auto form, int64_t r) { gated_activation_backward_row<decltype(type), GateForm<form>>(a, r); });
}

}  // namespace phi_fast::cpu::PHI_ISA
