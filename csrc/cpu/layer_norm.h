// LayerNorm (Ba et al., arXiv 1607.06450) of a row x of n elements, where dy is the gradient of y:
//   mu = sum(x) / n, rstd = 1 / sqrt(sum((x - mu)^2) / n + eps), xhat = (x - mu) rstd, y = gamma xhat + beta
//   dx = rstd (gamma dy - sum(gamma dy) / n - xhat sum(gamma dy xhat) / n), plus the residual's gradient
//   dgamma = sum over rows of dy xhat, dbeta = sum over rows of dy
// RMSNorm (Zhang and Sennrich, arXiv 1910.07467), where bias and dbias are null, is the same with mu = 0, beta = 0 and
// without the term sum(gamma dy) / n of dx; kCentred says which.
#pragma once
#include <cmath>

#include "cpu/vector_math.h"

namespace phi_fast::cpu::PHI_ISA {

template <class T, bool kCentred>
void layer_norm_forward_row(const LayerNormForward& a, int64_t r) {
  const T* x = a.x.row<T>(r);
  if (a.residual) {
    const T* residual = a.residual.row<T>(r);
    T* summed = a.summed.row<T>(r);
    for_lanes(a.columns,
              [=](int64_t i, auto lanes) { store(summed + i, load(x + i, lanes) + load(residual + i, lanes), lanes); });
    x = summed;
  }
  float mean = 0.0f;
  if constexpr (kCentred) {
    Accumulators total(0.0f);
    for_lanes_by_four(a.columns, [&](int64_t i, auto lanes, auto k) { total.a[k] = total.a[k] + load(x + i, lanes); });
    mean = total.sum() / float(a.columns);
    a.mean[r] = mean;
  }

  Accumulators squares(0.0f);
  for_lanes_by_four(a.columns, [&](int64_t i, auto lanes, auto k) {
    const Vec centred = keep(lanes, load(x + i, lanes) - Vec(mean));
    squares.a[k] = fma(centred, centred, squares.a[k]);
  });
  const float rstd = 1.0f / std::sqrt(squares.sum() / float(a.columns) + a.eps);
  a.rstd[r] = rstd;

  T* out = a.out.row<T>(r);
  T* shifted = a.shift ? a.shifted.row<T>(r) : nullptr;
  for_lanes(a.columns, [=, &a](int64_t i, auto lanes) {
    const Vec value = load(x + i, lanes);
    const Vec normalised = (value - Vec(mean)) * Vec(rstd);
    const Vec weight = load(a.weight + i, lanes);
    if constexpr (kCentred) {
      store(out + i, fma(normalised, weight, load(a.bias + i, lanes)), lanes);
    } else {
      store(out + i, normalised * weight, lanes);
    }
    if (shifted) store(shifted + i, value + load(a.shift + i, lanes), lanes);
  });
}

inline void layer_norm_forward(const LayerNormForward& a) {
  with_type(a.dtype, [&](auto type) {
    parallel_for(a.rows, threads_for(a.rows * a.columns, a.threads), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        a.bias ? layer_norm_forward_row<decltype(type), true>(a, r)
               : layer_norm_forward_row<decltype(type), false>(a, r);
      }
    });
  });
}

/// Means over a row that its dx needs: of gamma dy, and of gamma dy xhat.
struct RowGradient {
  float mean, projection;
};

template <class T>
void layer_norm_backward_row(const LayerNormBackward& a, int64_t r, RowGradient row) {
  const T *dy = a.dy.row<T>(r), *x = a.x.row<T>(r);
  T* dx = a.dx.row<T>(r);
  const T* residual_grad = a.residual_grad ? a.residual_grad.row<T>(r) : nullptr;
  const Vec mean(a.mean ? a.mean[r] : 0.0f), rstd(a.rstd[r]), mean_gradient(row.mean), mean_projection(row.projection);
  for_lanes(a.columns, [=, &a](int64_t i, auto lanes) {
    const Vec weighted = load(dy + i, lanes) * load(a.weight + i, lanes);
    const Vec normalised = (load(x + i, lanes) - mean) * rstd;
    Vec result = fnma(normalised, mean_projection, weighted - mean_gradient) * rstd;
    if (residual_grad) result = result + load(residual_grad + i, lanes);
    store(dx + i, result, lanes);
  });
}

/// Computes dx of `count` rows from row r on, and adds the rows' parts of dweight and dbias to the two sums.
template <class T, bool kCentred>
void layer_norm_backward_rows(const LayerNormBackward& a, int64_t r, int count, float* dweight, float* dbias) {
  const T *dy = a.dy.row<T>(r), *x = a.x.row<T>(r);
  Vec gradient[kGroup], projection[kGroup];
  for (int g = 0; g < kGroup; ++g) gradient[g] = projection[g] = Vec(0.0f);
  for_lanes(a.columns, [&](int64_t i, auto lanes) {
    Vec weight_total(0.0f), bias_total(0.0f);
    const Vec weight = load(a.weight + i, lanes);
    const auto add_row = [&](int g) {
      const Vec d = load(dy + g * a.dy.stride + i, lanes);  // 0 beyond the row's end
      Vec value = load(x + g * a.x.stride + i, lanes);
      if constexpr (kCentred) value = value - Vec(a.mean[r + g]);
      const Vec normalised = value * Vec(a.rstd[r + g]);
      weight_total = fma(d, normalised, weight_total);
      if constexpr (kCentred) {
        bias_total = bias_total + d;
        gradient[g] = fma(d, weight, gradient[g]);
      }
      projection[g] = fma(d * weight, normalised, projection[g]);
    };
    if (count == kGroup) {
      add_row(0), add_row(1), add_row(2), add_row(3);
    } else {
      for (int g = 0; g < count; ++g) add_row(g);
    }
    store(dweight + i, load(dweight + i, lanes) + weight_total, lanes);
    if constexpr (kCentred) store(dbias + i, load(dbias + i, lanes) + bias_total, lanes);
  });
  for (int g = 0; g < count; ++g) {
    const float scale = 1.0f / float(a.columns);
    layer_norm_backward_row<T>(a, r + g, {sum(gradient[g]) * scale, sum(projection[g]) * scale});
  }
}

inline void layer_norm_backward(const LayerNormBackward& a) {
  const RowBlocks blocks(a.rows, 16);
  const Scratch partial(blocks.count * 2 * a.columns);  // dweight of all blocks, then dbias of all blocks
  float *dweight = partial.data(), *dbias = dweight + blocks.count * a.columns;
  with_type(a.dtype, [&](auto type) {
    parallel_for(blocks.count, threads_for(a.rows * a.columns, a.threads), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        float *weight_sum = dweight + b * a.columns, *bias_sum = dbias + b * a.columns;
        fill(weight_sum, a.columns, 0.0f);
        fill(bias_sum, a.columns, 0.0f);
        blocks.by_group(b, [&](int64_t r, int count) {
          a.dbias ? layer_norm_backward_rows<decltype(type), true>(a, r, count, weight_sum, bias_sum)
                  : layer_norm_backward_rows<decltype(type), false>(a, r, count, weight_sum, bias_sum);
        });
      }
    });
  });
  reduce_blocks(dweight, blocks.count, a.columns, false, a.dweight, a.threads);
  if (a.dbias) reduce_blocks(dbias, blocks.count, a.columns, false, a.dbias, a.threads);
}

}  // namespace phi_fast::cpu::PHI_ISA
