// Step t of AdamW (arXiv 1412.6980 and 1711.05101), where g is the gradient ÷ loss scale, clipped:
//   m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
//   w = w - lr (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + lambda w)
#pragma once
#include <atomic>

#include "cpu/vector_math.h"

namespace phi_fast::cpu::PHI_ISA {

/// Updates elements [begin, end) of a tensor. Returns whether the moments and the weights, as they are stored, are
/// finite.
template <class P, class G>
bool adam_range(const Adam& a, const AdamTensor& tensor, int64_t begin, int64_t end) {
  P* param = static_cast<P*>(tensor.param) + begin;
  const G* grad = static_cast<const G*>(tensor.grad) + begin;
  float *exp_avg = tensor.exp_avg + begin, *exp_avg_sq = tensor.exp_avg_sq + begin;
  float* master = tensor.master ? tensor.master + begin : nullptr;
  const Vec grad_scale(a.grad_scale), one_minus_beta1(a.one_minus_beta1), beta2(a.beta2),
      one_minus_beta2(a.one_minus_beta2);
  const Vec step_size(a.step_size), inverse_root2(a.inverse_root2), eps(a.eps), l2(a.l2), keep(a.keep);
  Vec products_with_zero(0.0f);  // becomes NaN when a factor is not finite
  for_lanes(end - begin, [=, &products_with_zero](int64_t i, auto lanes) {
    Vec p = master ? load(master + i, lanes) : load(param + i, lanes);
    const Vec g = fma(l2, p, load(grad + i, lanes) * grad_scale);
    Vec m = load(exp_avg + i, lanes), v = load(exp_avg_sq + i, lanes);
    m = fma(one_minus_beta1, g - m, m);
    v = fma(one_minus_beta2 * g, g, beta2 * v);
    p = p * keep - (step_size * m) / fma(sqrt(v), inverse_root2, eps);
    store(exp_avg + i, m, lanes);
    store(exp_avg_sq + i, v, lanes);
    if (master) store(master + i, p, lanes);
    store(param + i, p, lanes);
    // The stored weight is checked, because one that is finite in fp32 may overflow in 16 bits. It also shows whether m
    // is finite.
    products_with_zero = fma(v, Vec(0.0f), fma(load(param + i, lanes), Vec(0.0f), products_with_zero));
  });
  return sum(products_with_zero) == 0.0f;
}

/// Calls fn(tensor, begin, end) for ranges that cover every element of tensors of the given sizes, split evenly over
/// the threads.
template <class Size, class Fn>
void over_elements(int64_t count, int threads, Size size, Fn fn) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += size(i);
  constexpr int64_t kLine = 64;  // so that cuts are at whole cache lines for every dtype, if the tensors start at one
  parallel_for((total + kLine - 1) / kLine, threads_for(total, threads), [=](int64_t begin, int64_t end) {
    begin *= kLine;
    end *= kLine;
    int64_t start = 0;
    for (int64_t i = 0; i < count && start < end; start += size(i), ++i) {
      const int64_t from = begin > start ? begin - start : 0;
      const int64_t to = smaller(end - start, size(i));
      if (from < to) fn(i, from, to);
    }
  });
}

inline bool adam(const Adam& a) {
  std::atomic<bool> finite{true};
  with_type(a.param_dtype, [&](auto param) {
    with_type(a.grad_dtype, [&](auto grad) {
      over_elements(
          a.count, a.threads, [&a](int64_t i) { return a.tensors[i].size; },
          [&a, &finite](int64_t i, int64_t begin, int64_t end) {
            if (!adam_range<decltype(param), decltype(grad)>(a, a.tensors[i], begin, end)) finite = false;
          });
    });
  });
  return finite;
}

/// The squares of this many elements are summed in fp32, with four sums per lane, and then added to a double.
inline constexpr int64_t kNormBlock = 4096;

template <class T>
double block_norm_squared(const T* grad, int64_t size) {
  Accumulators squares(0.0f);
  for_lanes_by_four(size, [&](int64_t i, auto lanes, auto k) {
    const Vec g = load(grad + i, lanes);
    squares.a[k] = fma(g, g, squares.a[k]);
  });
  return squares.sum();
}

/// The sum over blocks of kNormBlock elements, in an order that depends only on the sizes.
inline double grad_norm_squared(const GradNorm& a) {
  double total = 0;
  for (int64_t t = 0; t < a.count; ++t) {
    const int64_t size = a.sizes[t], blocks = (size + kNormBlock - 1) / kNormBlock;
    const Scratch sums(blocks);
    with_type(a.dtype, [&](auto type) {
      parallel_for(blocks, threads_for(size, a.threads), [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
          const auto* grad = static_cast<const decltype(type)*>(a.grads[t]) + b * kNormBlock;
          sums.data()[b] = float(block_norm_squared(grad, smaller(kNormBlock, size - b * kNormBlock)));
        }
      });
    });
    for (int64_t b = 0; b < blocks; ++b) total += sums.data()[b];
  }
  return total;
}

}  // namespace phi_fast::cpu::PHI_ISA
