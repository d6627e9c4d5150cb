#pragma once
#include <cmath>
#include <limits>

#include "cpu/vector_math.h"

namespace phi_fast::cpu::PHI_ISA {

/// What the gradient of a row needs: dlogits[c] = e^(logits[c] + bias[c] - max)
/// · factor - offset, but for the label's.
struct SoftmaxRow {
  float max, factor, label_logit;
};

/// The row's loss. Where fp32 logits will be overwritten anyway, they are by
/// e^(logits + bias - max): no second exponential.
template <class T>
float softmax_row(const CrossEntropy& a, int64_t r, int64_t label, SoftmaxRow* row) {
  T* logits = a.logits.row<T>(r);
  const float* bias = a.bias;
  const auto biased = [=](int64_t i, auto lanes) {
    const Vec x = load(logits + i, lanes);
    return bias ? x + load(bias + i, lanes) : x;
  };
  row->label_logit = widen(logits[label]) + (bias ? bias[label] : 0.0f);

  Accumulators top(-std::numeric_limits<float>::infinity());
  const int64_t whole = a.columns / Vec::kLanes * Vec::kLanes;
  for_lanes_by_four(whole, [&](int64_t i, auto lanes, auto k) { top.a[k] = max(top.a[k], biased(i, lanes)); });
  row->max = top.max();
  for (int64_t i = whole; i < a.columns; ++i) {
    const float x = widen(logits[i]) + (bias ? bias[i] : 0.0f);
    if (x > row->max) row->max = x;
  }

  const Vec highest(row->max);
  Accumulators exponentials(0.0f), below(0.0f);
  for_lanes_by_four(a.columns, [&](int64_t i, auto lanes, auto k) {
    const Vec x = keep(lanes, biased(i, lanes) - highest);
    const Vec e = exp(x);
    exponentials.a[k] = exponentials.a[k] + keep(lanes, e);
    below.a[k] = below.a[k] + x;
    if constexpr (std::is_same_v<T, float>) store(logits + i, e, lanes);
  });
  const float total = exponentials.sum(), log_total = std::log(total);
  const float lse = row->max + log_total;
  row->factor = a.scale * (1 + 2 * a.z_loss * lse) / total;
  // Differences from the largest logit: with logits of hundreds lse - logit
  // would lose the loss's last digits.
  float loss = log_total + (1 - a.label_smoothing) * (row->max - row->label_logit) + a.z_loss * lse * lse;
  if (a.label_smoothing != 0) loss -= a.label_smoothing * (below.sum() / float(a.columns));
  return loss;
}

/// Losses and gradients of `group` rows from row `first` on; the sum of the
/// gradients is added to dbias.
template <class T>
void cross_entropy_group(const CrossEntropy& a, int64_t first, int group, float* dbias) {
  SoftmaxRow softmax[kGroup];
  int64_t rows[kGroup];
  int count = 0;
  for (int64_t r = first; r < first + group; ++r) {
    const int64_t label = a.labels[r];
    const bool valid = label >= 0 && label < a.columns;
    if (label == a.ignore_index || !valid) {
      const float value = label == a.ignore_index ? 0.0f : std::numeric_limits<float>::quiet_NaN();
      a.losses[r] = value;
      if (a.need_grad) fill(a.logits.row<T>(r), a.columns, value);
      if (dbias && label != a.ignore_index) fill(dbias, a.columns, value);
      continue;
    }
    a.losses[r] = softmax_row<T>(a, r, label, &softmax[count]);
    rows[count++] = r;
  }
  if (!a.need_grad) return;

  const float offset = a.label_smoothing / float(a.columns) * a.scale;
  const float* bias = a.bias;
  for_lanes(a.columns, [&](int64_t i, auto lanes) {
    Vec sum(0.0f);
    for (int g = 0; g < count; ++g) {
      T* logits = a.logits.row<T>(rows[g]) + i;
      Vec e = load(logits, lanes);
      if constexpr (!std::is_same_v<T, float>) {
        if (bias) e = e + load(bias + i, lanes);
        e = exp(e - Vec(softmax[g].max));
      }
      const Vec gradient = fma(e, Vec(softmax[g].factor), Vec(-offset));
      store(logits, gradient, lanes);
      sum = sum + gradient;
    }
    if (dbias) store(dbias + i, load(dbias + i, lanes) + sum, lanes);
  });
  const float hit = (1 - a.label_smoothing) * a.scale;
  for (int g = 0; g < count; ++g) {
    const int64_t label = a.labels[rows[g]];
    const float p = std::exp(softmax[g].label_logit - softmax[g].max) * softmax[g].factor;
    narrow(p - offset - hit, a.logits.row<T>(rows[g]) + label);
    if (dbias) dbias[label] -= hit;
  }
}

inline void cross_entropy(const CrossEntropy& a) {
  const RowBlocks blocks(a.rows, 8);
  const Scratch partial(a.dbias ? blocks.count * a.columns : 0);
  with_type(a.dtype, [&](auto type) {
    parallel_for(blocks.count, threads_for(a.rows * a.columns, a.threads), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        float* dbias = a.dbias ? partial.data() + b * a.columns : nullptr;
        if (dbias) fill(dbias, a.columns, 0.0f);
        blocks.by_group(b, [&](int64_t r, int count) { cross_entropy_group<decltype(type)>(a, r, count, dbias); });
      }
    });
  });
  if (a.dbias) reduce_blocks(partial.data(), blocks.count, a.columns, true, a.dbias, a.threads);
}

}  // namespace phi_fast::cpu::PHI_ISA
