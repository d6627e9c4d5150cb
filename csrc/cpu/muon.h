// The parts of Muon (kernels/muon.py) before and after the orthogonalisation, with g = gradient · grad_scale:
//   m = m + (1 - beta) (g - m),  direction = g + beta (m - g) with Nesterov's momentum, or m
//   w = w keep - rate update,    keep = 1 - lr · weight decay
#pragma once
#include <atomic>

#include "cpu/adam.h"

namespace phi_fast::cpu::PHI_ISA {

template <class G, class D>
void momentum_range(const MuonMomentum& a, int64_t begin, int64_t end) {
  const G* grad = static_cast<const G*>(a.grad) + begin;
  D* direction = static_cast<D*>(a.direction) + begin;
  float* momentum = a.momentum + begin;
  const Vec grad_scale(a.grad_scale), one_minus_beta(a.one_minus_beta);
  for_lanes(end - begin, [=, nesterov = a.nesterov](int64_t i, auto lanes) {
    const Vec g = load(grad + i, lanes) * grad_scale;
    Vec m = load(momentum + i, lanes);
    m = fma(one_minus_beta, g - m, m);
    store(momentum + i, m, lanes);
    store(direction + i, nesterov ? fma(one_minus_beta, g - m, m) : m, lanes);
  });
}

inline void muon_momentum(const MuonMomentum& a) {
  with_type(a.grad_dtype, [&](auto grad) {
    with_type(a.direction_dtype, [&](auto direction) {
      over_elements(
          1, a.threads, [&a](int64_t) { return a.size; },
          [&a](int64_t, int64_t begin, int64_t end) {
            momentum_range<decltype(grad), decltype(direction)>(a, begin, end);
          });
    });
  });
}

/// Updates elements [begin, end). Returns whether the weights, as they are stored, and the momentum are finite.
template <class P, class U>
bool update_range(const MuonUpdate& a, int64_t begin, int64_t end) {
  P* param = static_cast<P*>(a.param) + begin;
  const U* update = static_cast<const U*>(a.update) + begin;
  const float* momentum = a.momentum + begin;
  float* master = a.master ? a.master + begin : nullptr;
  const Vec keep(a.keep), minus_rate(-a.rate);
  Vec products_with_zero(0.0f);  // becomes NaN when a factor is not finite
  for_lanes(end - begin, [=, &products_with_zero](int64_t i, auto lanes) {
    const Vec old = master ? load(master + i, lanes) : load(param + i, lanes);
    const Vec p = fma(minus_rate, load(update + i, lanes), old * keep);
    if (master) store(master + i, p, lanes);
    store(param + i, p, lanes);
    const Vec zero(0.0f);
    products_with_zero = fma(load(momentum + i, lanes), zero, fma(load(param + i, lanes), zero, products_with_zero));
  });
  return sum(products_with_zero) == 0.0f;
}

inline bool muon_update(const MuonUpdate& a) {
  std::atomic<bool> finite{true};
  with_type(a.param_dtype, [&](auto param) {
    with_type(a.update_dtype, [&](auto update) {
      over_elements(
          1, a.threads, [&a](int64_t) { return a.size; },
          [&a, &finite](int64_t, int64_t begin, int64_t end) {
            if (!update_range<decltype(param), decltype(update)>(a, begin, end)) finite = false;
          });
    });
  });
  return finite;
}

}  // namespace phi_fast::cpu::PHI_ISA
