// Cross entropy of the logits hidden · weightᵀ, and its gradients, without storing the logits.
//
// The vocabulary is cut into blocks, which threads take independently. For each block the logits are formed transposed,
// (vocabulary, rows), 32 × 32 at a time, while they are in the first-level cache:
//   1. statistics: each row's largest logit and sum of exponentials, by online log-sum-exp (arXiv 1805.02867); the
//      blocks' results are then combined in order;
//   2. gradients: the same logits again, the same bits; dlogits are rounded to bf16 and multiplied on the spot,
//        dhiddenᵀ += weightᵀ · dlogitsᵀ    for 32 rows,
//        dweight   = dlogitsᵀ · hidden     for the block, over all rows.
// Transposed, a lane is a row of hidden: maxima and sums need no shuffles, and bias and class weights are broadcast.
// dhiddenᵀ is summed for each group of blocks, and the groups are added in order. Blocks and groups depend on the shape
// alone, so any thread count gives the same bits.
#pragma once
#include "cpu/vocabulary_block.h"

namespace phi_fast::cpu::PHI_ISA {

#if defined(PHI_AVX512_BF16)
/// Combines the blocks' sums of 32 rows, in order, and writes their losses and what their gradients need.
inline void finish_rows(const HeadShared& s, int64_t row_panel) {
  const CrossEntropy& a = s.a.loss;
  HeadRows& rows = s.rows[row_panel];
  float total[kPanel], below[kPanel];
  for (int64_t lane = 0; lane < kPanel; lane += kTile) {
    const auto sums = [&](int64_t block) -> const HeadSums& { return s.sums[block * s.plan.row_panels + row_panel]; };
    Vec highest(-std::numeric_limits<float>::infinity()), all(0.0f), under(0.0f);
    for (int64_t b = 0; b < s.plan.blocks; ++b) highest = max(load(sums(b).max + lane), highest);
    const int64_t width = s.plan.block_panels * kPanel;
    for (int64_t b = 0; b < s.plan.blocks; ++b) {
      const HeadSums& part = sums(b);
      const Vec rise = load(part.max + lane) - highest;
      all = all + load(part.total + lane) * exp(rise);
      float weights = float(smaller(width, a.columns - b * width));
      if (a.weight && a.label_smoothing != 0) {
        weights = 0;
        for (int64_t v = b * width; v < smaller((b + 1) * width, a.columns); ++v) weights += a.weight[v];
      }
      under = under + fma(Vec(weights), rise, load(part.below + lane));
    }
    store(rows.max + lane, highest), store(total + lane, all), store(below + lane, under);
  }
  for (int64_t i = 0; i < kPanel; ++i) {
    const int64_t r = row_panel * kPanel + i;
    rows.factor[i] = rows.offset[i] = rows.hit[i] = 0.0f;
    if (i % kTile == 0) rows.counts[i / kTile] = 0;
    if (r >= a.rows) continue;
    const int64_t label = a.labels[r];
    if (label == a.ignore_index) {
      a.losses[r] = 0.0f;
      continue;
    }
    rows.counts[i / kTile] |= __mmask16(1u << i % kTile);
    if (label < 0 || label >= a.columns) {
      a.losses[r] = rows.factor[i] = std::numeric_limits<float>::quiet_NaN();
    } else {
      SoftmaxRow row{rows.max[i], 0, 0, 0, s.label_scores[r], 1};
      a.losses[r] = loss_of_row(a, r, label, total[i], below[i], &row);
      rows.factor[i] = row.factor, rows.offset[i] = row.offset, rows.hit[i] = row.hit;
    }
  }
}

/// Adds the groups' sums of 32 rows' gradients in order, and writes them turned to dhidden.
inline void write_dhidden(const HeadShared& s, int64_t row_panel) {
  const int64_t width = s.a.width, count = smaller(kPanel, s.a.loss.rows - row_panel * kPanel);
  alignas(64) float turned[kPanel][kPanel];  // lane, column
  for (int64_t j = 0; j < s.plan.width_panels; ++j) {
    for (int64_t corner = 0; corner < 4; ++corner) {
      const int64_t column = corner / 2 * kTile, lane = corner % 2 * kTile;
      alignas(64) float square[kTile][kTile];
      for (int64_t c = 0; c < kTile; ++c) {
        Vec total(0.0f);
        for (int64_t g = 0; g < s.plan.groups; ++g) {
          total = total + load(s.dhidden_of(g, row_panel) + j * kSquare + (column + c) * kPanel + lane);
        }
        store(square[c], total);
      }
      transpose_square(square[0], kTile, turned[lane] + column, kPanel);
    }
    for (int64_t r = 0; r < count; ++r) {
      float* const to = s.a.dhidden + (row_panel * kPanel + r) * width + j * kPanel;
      const float* const from = turned[lane_of(r)];
      for_lanes(smaller(kPanel, width - j * kPanel),
                [=](int64_t c, auto lanes) { store(to + c, load(from + c, lanes), lanes); });
    }
  }
}

template <bool kCapped>
void linear_cross_entropy_rows(const LinearCrossEntropy& a) {
  const HeadPlan p(a);
  const int threads = threads_for(a.loss.rows * a.loss.columns, a.loss.threads);
  const int64_t hidden = p.row_panels * p.width_panels * kStepWords, lanes = p.row_panels * kPanel;
  const Scratch words(hidden * (a.dweight ? 2 : 1)), labels(lanes), label_scores(lanes);
  const Scratch sums(p.blocks * p.row_panels * int64_t(sizeof(HeadSums) / 4));
  const Scratch rows(p.row_panels * int64_t((sizeof(HeadRows) + 63) / 4));
  const Scratch dhidden(a.dhidden ? p.groups * p.row_panels * p.width_panels * kSquare : 0);
  uint32_t* const packed = reinterpret_cast<uint32_t*>(words.data());
  const HeadShared s{a,
                     p,
                     packed,
                     packed + hidden,
                     reinterpret_cast<HeadSums*>(sums.data()),
                     reinterpret_cast<HeadRows*>(rows.data()),
                     reinterpret_cast<int32_t*>(labels.data()),
                     label_scores.data(),
                     dhidden.data()};
  for (int64_t r = 0; r < lanes; ++r) {
    const bool counts = r < a.loss.rows && a.loss.labels[r] != a.loss.ignore_index && a.loss.labels[r] >= 0 &&
                        a.loss.labels[r] < a.loss.columns;
    s.labels[r] = counts ? int32_t(a.loss.labels[r]) : -1;
  }
  parallel_items(p.row_panels, threads, [&](int64_t r, int) {
    pack_panel<Summed::kColumns, Side::kRight>(a.hidden, a.loss.rows, a.width, r * kPanel,
                                               s.hidden_by_columns + r * p.width_panels * kStepWords);
  });
  if (a.dweight) {
    parallel_items(p.width_panels, threads, [&](int64_t j, int) {
      pack_panel<Summed::kRows, Side::kRight>(a.hidden, a.loss.rows, a.width, j * kPanel,
                                              s.hidden_by_rows + j * p.row_panels * kStepWords);
    });
  }
  const int64_t each = HeadWorker<kCapped>::scratch(p);
  const Scratch memory(each * threads);
  parallel_items(p.blocks, threads, [&](int64_t block, int thread) {
    const Tiles tiles;
    HeadWorker<kCapped>(s, memory.data() + thread * each).statistics(block);
  });
  parallel_items(p.row_panels, threads, [&](int64_t r, int) { finish_rows(s, r); });
  if (!a.loss.need_grad) return;
  parallel_items(p.groups, threads, [&](int64_t group, int thread) {
    const Tiles tiles;
    HeadWorker<kCapped> worker(s, memory.data() + thread * each);
    const int64_t begin = p.blocks * group / p.groups, end = p.blocks * (group + 1) / p.groups;
    for (int64_t block = begin; block < end; ++block) worker.gradients(block, group, block == begin);
  });
  if (a.dhidden) parallel_items(p.row_panels, threads, [&](int64_t r, int) { write_dhidden(s, r); });
}

inline void linear_cross_entropy(const LinearCrossEntropy& a) {
  a.loss.softcap != 0 ? linear_cross_entropy_rows<true>(a) : linear_cross_entropy_rows<false>(a);
}
#endif

}  // namespace phi_fast::cpu::PHI_ISA
