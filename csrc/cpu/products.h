// Matrix products of bf16 operands packed into panels, on AMX tiles or by AVX-512's dot products of pairs.
//
// A word holds two bf16 that are neighbours along the summed dimension. A panel holds 32 rows of a left operand, or 32
// columns of a right one, step by step: one step is 32 numbers of the summed dimension, stored as two tiles of 16 × 16
// words. A left tile has a word of the summed dimension per column, a right tile has one per row. Panels are padded
// with zeros along every dimension.
#pragma once
#include "cpu/words.h"

namespace phi_fast::cpu::PHI_ISA {

#if defined(PHI_AVX512_BF16)
inline constexpr int64_t kTile = 16;                      // rows of a tile, and words per row
inline constexpr int64_t kPanel = 2 * kTile;              // rows or columns of a panel, and numbers of a step
inline constexpr int64_t kStepWords = 2 * kTile * kTile;  // words of a panel's step
inline constexpr int64_t kSquare = kPanel * kPanel;       // sums of two panels' product
inline constexpr int64_t kDepth = 512;  // numbers summed at a time: such a panel fits the first-level cache
inline constexpr int64_t kDepthSteps = kDepth / kPanel;

/// The panels that cover `count` rows or columns, or the steps that cover `count` summed numbers: at least one, of
/// zeros.
PHI_INLINE int64_t panels_of(int64_t count) { return count == 0 ? 1 : (count + kPanel - 1) / kPanel; }

/// 16 words of each of 16 rows of x: words of rows `row` on and columns `column` on, with zeros beyond the matrix.
PHI_INLINE void pairs_of_columns(const Rows& x, int64_t rows, int64_t columns, int64_t row, int64_t column,
                                 __m512i words[kTile]) {
  const int64_t width = columns - column;
  const __mmask32 there = width >= kPanel ? ~__mmask32(0) : __mmask32((uint64_t(1) << width) - 1);
  for (int64_t i = 0; i < kTile; ++i) {
    const bool inside = row + i < rows;
    words[i] = inside ? _mm512_maskz_loadu_epi16(there, x.row<BFloat16>(row + i) + column) : _mm512_setzero_si512();
  }
}

/// 32 rows from `row` on of 16 columns from `column` on, two rows per word, with zeros beyond the matrix.
PHI_INLINE void pairs_of_rows(const Rows& x, int64_t rows, int64_t columns, int64_t row, int64_t column,
                              __m512i words[kTile]) {
  const int64_t width = columns - column;
  const __mmask16 there = width >= kTile ? 0xffff : __mmask16(width > 0 ? (1u << width) - 1 : 0);
  for (int64_t i = 0; i < kTile; ++i) {
    const int64_t r = row + 2 * i;
    const BFloat16* from = x.row<BFloat16>(r) + column;
    const __m256i even = r < rows ? _mm256_maskz_loadu_epi16(there, from) : _mm256_setzero_si256();
    const __m256i odd = r + 1 < rows ? _mm256_maskz_loadu_epi16(there, from + x.stride) : _mm256_setzero_si256();
    words[i] = _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
  }
}

enum class Summed { kRows, kColumns };
enum class Side { kLeft, kRight };

/// Packs the panel from `first` on of x (rows, columns), whose `summed` dimension a product sums over: panels_of(summed
/// size) steps.
template <Summed summed, Side side>
void pack_panel(const Rows& x, int64_t rows, int64_t columns, int64_t first, uint32_t* to) {
  constexpr bool kRows = summed == Summed::kRows;
  const int64_t steps = panels_of(kRows ? rows : columns);
  for (int64_t step = 0; step < steps; ++step) {
    for (int64_t half = 0; half < kPanel; half += kTile, to += kTile * kTile) {
      __m512i words[kTile];
      if (kRows) {
        pairs_of_rows(x, rows, columns, step * kPanel, first + half, words);
      } else {
        pairs_of_columns(x, rows, columns, first + half, step * kPanel, words);
      }
      if (kRows == (side == Side::kLeft)) transpose_square(words);
      for (int64_t i = 0; i < kTile; ++i) _mm512_storeu_si512(to + i * kTile, words[i]);
    }
  }
}

/// Where the sums of a panel's products with others lie: one square after the other, or in turn in two places.
struct Sums {
  float* first;
  bool in_turn;  // valid for products of kDepthSteps or fewer

  float* square(int64_t i) const { return first + (in_turn ? i % 2 : i) * kSquare; }
};

/// The parts in which a square of sums is worked on, while the next one is multiplied.
inline constexpr int64_t kParts = 16;
/// What is done with squares that are complete as they are.
struct Nothing {
  void operator()(int64_t, const float*, int64_t) const {}
};

/// Memory that is fetched into the second-level cache in portions, before it is needed. The last may reach past its
/// end.
class Ahead {
 public:
  Ahead() {}
  Ahead(const void* first, int64_t bytes, int64_t portions)
      : at_(static_cast<const char*>(first)), lines_(int((bytes / 64 + portions - 1) / portions)) {}

  PHI_INLINE void fetch() {
    for (int i = 0; i < lines_; ++i, at_ += 64) _mm_prefetch(at_, _MM_HINT_T1);
  }

 private:
  const char* at_ = nullptr;
  int lines_ = 0;
};

/// Multiplies one panel with `count` others, of `steps` steps each. For each of them it calls part(i, square, 0 …
/// kParts - 1) once its sums (32, 32), rows from the left operand, are complete. `held` is the side of the one panel,
/// which stays in the first-level cache while the others stream through it. With `add`, products are added to what the
/// sums hold.
template <Side held, class Part>
void multiply_panels(int64_t count, int64_t steps, const uint32_t* panel, const uint32_t* others, Sums sums, bool add,
                     Part part) {
  const auto tiles = [](const uint32_t* words) { return TilePair{words, kTile * kTile, kStepWords, 64}; };
  for (int64_t step = 0; step < steps; step += kDepthSteps) {
    const int64_t now = smaller(kDepthSteps, steps - step);
    const bool last = step + now == steps;
    const TilePair one = tiles(panel + step * kStepWords);
    for (int64_t i = 0; i < count; ++i) {
      const TilePair other = tiles(others + (i * steps + step) * kStepWords);
      float* const before = sums.square(i - 1);
      int64_t due = last && i > 0 ? 0 : std::numeric_limits<int64_t>::min(), p = 0;
      const auto between = [&](int64_t) {
        if (std::is_same_v<Part, Nothing>) return;
        for (due += kParts; due >= now; due -= now) part(i - 1, before, p++);
      };
      const bool left = held == Side::kLeft;
      multiply_square(now, left ? one : other, left ? other : one, sums.square(i), kPanel, add || step > 0, between);
    }
  }
  for (int64_t p = 0; p < kParts; ++p) part(count - 1, sums.square(count - 1), p);
}
#endif

}  // namespace phi_fast::cpu::PHI_ISA
