// Cross entropy of a row z of logits with label t:
//   lse = m + log(sum(exp(z - m))), m = max(z);  loss = lse - z[t]
//   dz[c] = (exp(z[c] - lse) - [c = t]) times the loss's gradient
#pragma once
#include <cmath>
#include <limits>

#include "cpu/vector_math.h"

namespace phi_fast::cpu::PHI_ISA {

/// Quantities of a row that its gradient needs. With the scores s (logits + bias, capped) and e = e^(s[c] - max), the
/// gradient of s[c] is e · factor - offset · weight[c], minus `hit` for the label.
struct SoftmaxRow {
  float max, factor, offset, hit, label_score, label_slope;
};

/// cap · tanh(x / cap), the cap on Gemma 2's logits (arXiv 2408.00118), and its derivative.
template <bool kCapped>
PHI_INLINE Vec score(Vec x, float cap, Vec* slope = nullptr) {
  if constexpr (!kCapped) return x;
  const Vec t = tanh(x / Vec(cap));
  if (slope) *slope = fnma(t, t, Vec(1.0f));
  return Vec(cap) * t;
}

template <bool kCapped>
float score(float x, float cap, float* slope = nullptr) {
  if constexpr (!kCapped) return x;
  const float t = std::tanh(x / cap);
  if (slope) *slope = 1 - t * t;
  return cap * t;
}

/// The loss of row r, and the factors of its gradient. The row's max and label_score are given, with the sums of its
/// e^(s - max) and of its class weight · (s - max).
inline float loss_of_row(const CrossEntropy& a, int64_t r, int64_t label, float total, float below, SoftmaxRow* row) {
  const float* const weight = a.weight;
  const float log_total = std::log(total), lse = row->max + log_total, smoothing = a.label_smoothing;
  const float scale = a.scale[a.scale_by_row ? r : 0], of_label = weight ? weight[label] : 1.0f;
  const float of_target = (1 - smoothing) * of_label, of_others = smoothing * a.mean_weight;
  row->factor = scale * ((weight ? of_target + of_others : 1.0f) + 2 * a.z_loss * of_label * lse) / total;
  row->offset = smoothing / float(a.columns) * scale;
  row->hit = of_target * scale;
  // Uses differences from the largest logit: with logits in the hundreds, lse - logit would lose the loss's last
  // digits.
  const float above = row->max - row->label_score, of_z = a.z_loss * of_label;
  float loss = weight ? of_target * (log_total + above) + of_others * log_total : log_total + of_target * above;
  loss += of_z * lse * lse;
  if (smoothing != 0) loss -= smoothing * (below / float(a.columns));
  return loss;
}

/// The row's loss. fp32 logits are overwritten with e^(s - max), since the gradient replaces them anyway; this saves
/// the second exponential. Capped logits are not, because their gradient needs s.
template <class T, bool kCapped>
float softmax_row(const CrossEntropy& a, int64_t r, int64_t label, SoftmaxRow* row) {
  T* logits = a.logits.row<T>(r);
  const float *bias = a.bias, *weight = a.weight;
  const float cap = a.softcap;
  const auto biased = [=](int64_t i, auto lanes) {
    const Vec x = load(logits + i, lanes);
    return bias ? x + load(bias + i, lanes) : x;
  };
  row->label_slope = 1.0f;
  row->label_score = score<kCapped>(widen(logits[label]) + (bias ? bias[label] : 0.0f), cap, &row->label_slope);

  Accumulators top(-std::numeric_limits<float>::infinity());
  const int64_t whole = a.columns / Vec::kLanes * Vec::kLanes;
  for_lanes_by_four(whole, [&](int64_t i, auto lanes, auto k) { top.a[k] = max(top.a[k], biased(i, lanes)); });
  row->max = top.max();
  for (int64_t i = whole; i < a.columns; ++i) {
    const float x = widen(logits[i]) + (bias ? bias[i] : 0.0f);
    if (x > row->max) row->max = x;
  }
  row->max = score<kCapped>(row->max, cap);  // the cap is monotonic

  const Vec highest(row->max);
  Accumulators exponentials(0.0f), below(0.0f);
  for_lanes_by_four(a.columns, [&](int64_t i, auto lanes, auto k) {
    const Vec x = keep(lanes, score<kCapped>(biased(i, lanes), cap) - highest);
    const Vec e = exp(x);
    exponentials.a[k] = exponentials.a[k] + keep(lanes, e);
    below.a[k] = below.a[k] + (weight ? x * load(weight + i, lanes) : x);
    if constexpr (std::is_same_v<T, float> && !kCapped) store(logits + i, e, lanes);
  });
  return loss_of_row(a, r, label, exponentials.sum(), below.sum(), row);
}

/// Computes losses and gradients of `group` rows from row `first` on, and adds the sum of the gradients to dbias.
template <class T, bool kCapped>
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
    a.losses[r] = softmax_row<T, kCapped>(a, r, label, &softmax[count]);
    rows[count++] = r;
  }
  if (!a.need_grad) return;

  const float *bias = a.bias, *weight = a.weight, cap = a.softcap;
  for_lanes(a.columns, [&](int64_t i, auto lanes) {
    Vec sum(0.0f);
    for (int g = 0; g < count; ++g) {
      T* logits = a.logits.row<T>(rows[g]) + i;
      Vec e = load(logits, lanes), slope(1.0f);
      if constexpr (!std::is_same_v<T, float> || kCapped) {
        if (bias) e = e + load(bias + i, lanes);
        e = exp(score<kCapped>(e, cap, &slope) - Vec(softmax[g].max));
      }
      Vec offset(softmax[g].offset);
      if (weight) offset = offset * load(weight + i, lanes);
      Vec gradient = fma(e, Vec(softmax[g].factor), Vec(0.0f) - offset);
      if constexpr (kCapped) gradient = gradient * slope;
      store(logits, gradient, lanes);
      sum = sum + gradient;
    }
    if (dbias) store(dbias + i, load(dbias + i, lanes) + sum, lanes);
  });
  for (int g = 0; g < count; ++g) {
    const SoftmaxRow& row = softmax[g];
    const int64_t label = a.labels[rows[g]];
    const float others =
        std::exp(row.label_score - row.max) * row.factor - row.offset * (weight ? weight[label] : 1.0f);
    narrow((others - row.hit) * row.label_slope, a.logits.row<T>(rows[g]) + label);
    if (dbias) dbias[label] -= row.hit * row.label_slope;
  }
}

template <bool kCapped>
void cross_entropy_rows(const CrossEntropy& a) {
  const RowBlocks blocks(a.rows, 8);
  const Scratch partial(a.dbias ? blocks.count * a.columns : 0);
  with_type(a.dtype, [&](auto type) {
    parallel_for(blocks.count, threads_for(a.rows * a.columns, a.threads), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        float* dbias = a.dbias ? partial.data() + b * a.columns : nullptr;
        if (dbias) fill(dbias, a.columns, 0.0f);
        blocks.by_group(
            b, [&](int64_t r, int count) { cross_entropy_group<decltype(type), kCapped>(a, r, count, dbias); });
      }
    });
  });
  if (a.dbias) reduce_blocks(partial.data(), blocks.count, a.columns, true, a.dbias, a.threads);
}

inline void cross_entropy(const CrossEntropy& a) {
  a.softcap != 0 ? cross_entropy_rows<true>(a) : cross_entropy_rows<false>(a);
}

}  // namespace phi_fast::cpu::PHI_ISA
