// What one thread of linear_cross_entropy.h does with one block of the vocabulary.
#pragma once
#include "cpu/cross_entropy.h"
#include "cpu/products.h"

namespace phi_fast::cpu::PHI_ISA {

#if defined(PHI_AVX512_BF16)
/// How a call is cut up, and the sizes of what it needs, in panels.
struct HeadPlan {
  int64_t row_panels, width_panels, block_panels, blocks, groups;

  explicit HeadPlan(const LinearCrossEntropy& a)
      : row_panels(panels_of(a.loss.rows)), width_panels(panels_of(a.width)) {
    const int64_t vocabulary_panels = panels_of(a.loss.columns);
    // A block's weight, in both layouts, and its dlogits share the second-level cache.
    block_panels = smaller(smaller(vocabulary_panels, 16), 256 / width_panels + 1);
    if (block_panels < 4 && vocabulary_panels >= 4) block_panels = 4;
    blocks = (vocabulary_panels + block_panels - 1) / block_panels;
    groups = smaller(blocks, 16);
  }
};

/// What the gradients of 32 rows of hidden need, a lane per row; two vectors of each.
struct HeadRows {
  float max[kPanel], factor[kPanel], offset[kPanel], hit[kPanel];
  __mmask16 counts[2];
};

/// The sums of 32 rows over one block of the vocabulary.
struct HeadSums {
  float max[kPanel], total[kPanel], below[kPanel];
};

/// The memory that threads share.
struct HeadShared {
  const LinearCrossEntropy& a;
  const HeadPlan plan;
  uint32_t* hidden_by_columns;  // (row_panels, width_panels) right panels: for logits
  uint32_t* hidden_by_rows;     // (width_panels, row_panels) right panels: for dweight
  HeadSums* sums;               // (blocks, row_panels)
  HeadRows* rows;               // (row_panels,)
  int32_t* labels;              // (row_panels, 32): -1 where no logit is the label's
  float* label_scores;          // (row_panels, 32)
  float* dhidden;  // (groups, row_panels, width_panels, 32, 32): transposed, rows in the order of `lane_of`

  float* dhidden_of(int64_t group, int64_t row_panel) const {
    return dhidden + (group * plan.row_panels + row_panel) * plan.width_panels * kSquare;
  }
};

/// The lane of dhiddenᵀ in which row r of 32 is: unpacking interleaves two vectors of bf16 within their quarters.
PHI_INLINE int64_t lane_of(int64_t r) { return r / 8 * 4 + r % 4 + (r % 8 >= 4 ? kTile : 0); }

/// One thread's work on blocks of the vocabulary, in its own memory.
template <bool kCapped>
class HeadWorker {
 public:
  static int64_t scratch(const HeadPlan& p) {
    const int64_t weight = p.block_panels * p.width_panels * kStepWords;
    const int64_t dlogits = p.block_panels * (p.row_panels + 1) * kStepWords;
    const int64_t squares = p.block_panels > p.width_panels ? p.block_panels : p.width_panels;
    return 2 * weight + dlogits + (squares + 1) * kSquare + p.block_panels * kPanel * kTile;
  }

  HeadWorker(const HeadShared& shared, float* memory) : s_(shared), a_(shared.a), p_(shared.plan) {
    const auto take = [&](int64_t size) { return (memory += size) - size; };
    const auto words = [&](int64_t size) { return reinterpret_cast<uint32_t*>(take(size)); };
    weight_ = words(p_.block_panels * p_.width_panels * kStepWords);
    weight_turned_ = words(p_.block_panels * p_.width_panels * kStepWords);
    dlogits_ = words(p_.block_panels * p_.row_panels * kStepWords);
    dlogits_of_rows_ = words(p_.block_panels * kStepWords);
    dbias_ = take(p_.block_panels * kPanel * kTile);
    squares_ = take(0);
  }

  /// The sums of all rows over a block.
  void statistics(int64_t block) {
    start(block);
    for (int64_t r = 0; r < p_.row_panels; ++r) {
      Online online;
      multiply_logits(r, [&](int64_t i, float* square, int64_t part) {
        fetch_ahead();
        const int64_t group = part % (kParts / 2) * kOnlineRows;
        part < kParts / 2 ? find_largest(r, i, square, group, &online) : add_exponentials(i, square, group, &online);
      });
      HeadSums& to = s_.sums[block * p_.row_panels + r];
      for (int half = 0; half < 2; ++half) {
        store(to.max + half * kTile, online.max[half]);
        store(to.total + half * kTile, online.total[half]);
        store(to.below + half * kTile, online.below[half]);
      }
    }
  }

  /// The gradients that are asked for, from a block; `first` is whether the block is its group's first.
  void gradients(int64_t block, int64_t group, bool first) {
    start(block);
    if (a_.dhidden) {
      for (int64_t i = 0; i < p_.width_panels; ++i) {
        const Rows part{a_.weight.row<BFloat16>(first_), a_.weight.stride};
        uint32_t* const to = weight_turned_ + i * panels_ * kStepWords;
        pack_panel<Summed::kRows, Side::kLeft>(part, height_, a_.width, i * kPanel, to);
      }
    }
    fill(dbias_, panels_ * kPanel * kTile, 0.0f);
    for (int64_t r = 0; r < p_.row_panels; ++r) {
      if (a_.dhidden) {
        ahead_dhidden_ = Ahead(s_.dhidden_of(group, r), p_.width_panels * kSquare * 4, panels_ * kParts);
      }
      multiply_logits(r, [&](int64_t i, float* square, int64_t part) {
        fetch_ahead();
        for (int64_t v = 0; v < kPanel / kParts; v += 2) gradient_rows(r, i, square, kPanel / kParts * part + v);
      });
      if (a_.dhidden) {
        const Sums sums{s_.dhidden_of(group, r), false};
        multiply_panels<Side::kRight>(p_.width_panels, panels_, dlogits_of_rows_, weight_turned_, sums, !first,
                                      Nothing{});
      }
    }
    if (a_.dweight) {
      for (int64_t i = 0; i < panels_; ++i) dweight_rows(i);
      _mm_sfence();
    }
    if (a_.loss.dbias) {
      for (int64_t v = 0; v < height_; ++v) a_.loss.dbias[first_ + v] += sum(load(dbias_ + v * kTile));
    }
  }

 private:
  struct Online {
    Vec max[2], total[2], below[2], largest[2];  // largest: with the square that is being worked on
    float weights = 0;                           // the sum of the class weights so far

    Online() {
      for (int half = 0; half < 2; ++half)
        max[half] = largest[half] = Vec(kLowest), total[half] = below[half] = Vec(0.0f);
    }
  };
  /// Below any finite logit, so that a row of logits of -inf gives no NaN before a finite one is found.
  static constexpr float kLowest = std::numeric_limits<float>::lowest();

  void start(int64_t block) {
    first_ = block * p_.block_panels * kPanel;
    height_ = smaller(p_.block_panels * kPanel, a_.loss.columns - first_);
    panels_ = panels_of(height_);
    const Rows part{a_.weight.row<BFloat16>(first_), a_.weight.stride};
    for (int64_t i = 0; i < panels_; ++i) {
      uint32_t* const to = weight_ + i * p_.width_panels * kStepWords;
      pack_panel<Summed::kColumns, Side::kLeft>(part, height_, a_.width, i * kPanel, to);
    }
    const int64_t after = first_ + height_, next = smaller(height_, a_.loss.columns - after);
    ahead_weight_ =
        Ahead(a_.weight.row<BFloat16>(after), next * a_.weight.stride * 2, p_.row_panels * panels_ * kParts);
  }

  PHI_INLINE void fetch_ahead() { ahead_weight_.fetch(), ahead_hidden_.fetch(), ahead_dhidden_.fetch(); }

  template <class Done>
  void multiply_logits(int64_t r, Done done) {
    const uint32_t* const hidden = s_.hidden_by_columns + r * p_.width_panels * kStepWords;
    const Sums sums{squares_, p_.width_panels <= kDepthSteps};
    if (r + 1 < p_.row_panels) {
      ahead_hidden_ = Ahead(hidden + p_.width_panels * kStepWords, p_.width_panels * kStepWords * 4, panels_ * kParts);
    }
    multiply_panels<Side::kRight>(panels_, p_.width_panels, hidden, weight_, sums, false, done);
  }

  /// The scores of 16 rows for entry v of the vocabulary: logits, biased and capped.
  PHI_INLINE Vec scores(const float* logits, int64_t v, Vec* slope = nullptr) const {
    Vec x = load(logits);
    if (a_.loss.bias) x = x + Vec(a_.loss.bias[v]);
    return score<kCapped>(x, a_.loss.softcap, slope);
  }

  PHI_INLINE static __mmask16 are(__m512i labels, int64_t v) {
    return _mm512_cmpeq_epi32_mask(labels, _mm512_set1_epi32(int(v)));
  }

  static constexpr int64_t kOnlineRows = 2 * kPanel / kParts;

  /// The entries of panel i from `row` on, up to `most` of them, that the vocabulary has.
  int64_t entries(int64_t i, int64_t row, int64_t most) const { return smaller(most, height_ - i * kPanel - row); }

  /// Overwrites kOnlineRows rows of logits with their scores, and finds the largest.
  PHI_INLINE void find_largest(int64_t r, int64_t i, float* square, int64_t row, Online* online) const {
    const int64_t first = first_ + i * kPanel + row, count = entries(i, row, kOnlineRows);
    for (int64_t half = 0; half < 2; ++half) {
      float* const logits = square + row * kPanel + half * kTile;
      const int64_t lanes = r * kPanel + half * kTile;
      const __m512i labels = _mm512_loadu_si512(s_.labels + lanes);
      Vec largest = online->largest[half];
      for (int64_t v = 0; v < count; ++v) {
        const Vec x = scores(logits + v * kPanel, first + v);
        store(logits + v * kPanel, x);
        largest = max(x, largest);
        const __mmask16 found = are(labels, first + v);
        if (found) _mm512_mask_storeu_ps(s_.label_scores + lanes, found, x.v);
      }
      online->largest[half] = largest;
    }
  }

  /// Adds kOnlineRows rows of scores to the sums, relative to the largest of all rows so far.
  PHI_INLINE void add_exponentials(int64_t i, const float* square, int64_t row, Online* online) const {
    const int64_t first = first_ + i * kPanel + row, count = entries(i, row, kOnlineRows);
    const float* const class_weight = a_.loss.weight;
    const bool smoothed = a_.loss.label_smoothing != 0;
    for (int64_t half = 0; half < 2; ++half) {
      const float* const from = square + row * kPanel + half * kTile;
      const Vec largest = online->largest[half];
      Vec total = online->total[half], below = online->below[half];
      if (row == 0) {
        const Vec risen = online->max[half] - largest;
        total = total * exp(risen);
        if (smoothed && i > 0) below = fma(Vec(online->weights), risen, below);
        online->max[half] = largest;
      }
      for (int64_t v = 0; v < count; ++v) {
        const Vec x = load(from + v * kPanel) - largest;
        total = total + exp(x);
        if (smoothed) below = below + (class_weight ? x * Vec(class_weight[first + v]) : x);
      }
      online->total[half] = total, online->below[half] = below;
    }
    for (int64_t v = 0; smoothed && v < count; ++v) online->weights += class_weight ? class_weight[first + v] : 1.0f;
  }

  /// Stores the gradients of logits for entries v and v + 1 of panel i in left tiles, for dweight, and in right tiles,
  /// for dhidden.
  PHI_INLINE void gradient_rows(int64_t r, int64_t i, const float* square, int64_t v) {
    uint32_t* const left = dlogits_ + (i * p_.row_panels + r) * kStepWords + v * kTile;
    uint32_t* const right = dlogits_of_rows_ + i * kStepWords + v / 2 * kTile;
    const int64_t first = first_ + i * kPanel + v, count = entries(i, v, 2);
    __m512i both[2];
    for (int64_t odd = 0; odd < 2; ++odd) {
      both[odd] = odd < count ? gradient_row(r, first + odd, square + (v + odd) * kPanel) : _mm512_setzero_si512();
      _mm512_storeu_si512(left + odd * kTile, both[odd]);
    }
    _mm512_storeu_si512(right, _mm512_unpacklo_epi16(both[0], both[1]));
    _mm512_storeu_si512(right + kTile * kTile, _mm512_unpackhi_epi16(both[0], both[1]));
  }

  /// The gradients of 32 rows' logits for entry v, in bf16; before they are rounded they are added to dbias.
  PHI_INLINE __m512i gradient_row(int64_t r, int64_t v, const float* logits) {
    const HeadRows& rows = s_.rows[r];
    Vec gradient[2];
    for (int half = 0; half < 2; ++half) {
      const int64_t lane = half * kTile;
      Vec slope(1.0f), offset = load(rows.offset + lane);
      const Vec e = exp(scores(logits + lane, v, &slope) - load(rows.max + lane));
      if (a_.loss.weight) offset = offset * Vec(a_.loss.weight[v]);
      const __m512i labels = _mm512_loadu_si512(s_.labels + r * kPanel + lane);
      offset = _mm512_mask_add_ps(offset.v, are(labels, v), offset.v, load(rows.hit + lane).v);
      // A row that does not count adds nothing, even where its logits are not finite.
      gradient[half] = _mm512_maskz_fmsub_ps(rows.counts[half], e.v, load(rows.factor + lane).v, offset.v);
      if constexpr (kCapped) gradient[half] = gradient[half] * slope;
    }
    float* const dbias = dbias_ + (v - first_) * kTile;
    store(dbias, load(dbias) + (gradient[0] + gradient[1]));
    return (__m512i)_mm512_cvtne2ps_pbh(gradient[1].v, gradient[0].v);
  }

  /// A gradient of more numbers is written past the caches, since it would not be in them when it is read.
  static constexpr int64_t kLargestCached = int64_t(1) << 22;

  /// Writes the gradient of 32 rows of weight, from panel i of the block on.
  void dweight_rows(int64_t i) {
    const uint32_t* const left = dlogits_ + i * p_.row_panels * kStepWords;
    float* const to = a_.dweight + (first_ + i * kPanel) * a_.width;
    const bool aligned = a_.width % kTile == 0 && reinterpret_cast<uintptr_t>(to) % 64 == 0;
    const bool past_caches = aligned && !a_.add && a_.loss.columns * a_.width > kLargestCached;
    const auto write = [&](int64_t j, const float* square, int64_t part) {
      const int64_t first = kPanel / kParts * part, columns = smaller(kPanel, a_.width - j * kPanel);
      for (int64_t v = first; v < first + entries(i, first, kPanel / kParts); ++v) {
        float* const place = to + v * a_.width + j * kPanel;
        if (past_caches && columns == kPanel) {
          _mm512_stream_ps(place, load(square + v * kPanel).v);
          _mm512_stream_ps(place + kTile, load(square + v * kPanel + kTile).v);
          continue;
        }
        for_lanes(columns, [&](int64_t c, auto lanes) {
          const Vec sum = load(square + v * kPanel + c, lanes);
          store(place + c, a_.add ? load(place + c, lanes) + sum : sum, lanes);
        });
      }
    };
    multiply_panels<Side::kLeft>(p_.width_panels, p_.row_panels, left, s_.hidden_by_rows, {squares_, false}, false,
                                 write);
  }

  const HeadShared& s_;
  const LinearCrossEntropy& a_;
  const HeadPlan& p_;
  uint32_t *weight_, *weight_turned_;  // the block's, for logits and for dhidden
  uint32_t *dlogits_, *dlogits_of_rows_;
  float *dbias_, *squares_;
  Ahead ahead_weight_, ahead_hidden_, ahead_dhidden_;
  int64_t first_ = 0, height_ = 0, panels_ = 0;  // the block's entries of the vocabulary
};
#endif

}  // namespace phi_fast::cpu::PHI_ISA
