// out = aᵀ · b, the gradient of a weight: the sum runs over the rows of both operands, so its terms are not adjacent in
// memory. A library transposes one operand and repacks the other before it multiplies; here both are packed straight
// into tiles.
#pragma once
#include "cpu/words.h"

namespace phi_fast::cpu::PHI_ISA {

#if defined(PHI_AMX)
inline constexpr int64_t kTile = 16;            // rows of a tile, and words per row
inline constexpr int64_t kPanel = 2 * kTile;    // columns of a or b that are multiplied together; rows of them per tile
inline constexpr int64_t kDepth = 512;          // rows of a and b at a time: a panel of them fits the first-level cache
inline constexpr int64_t kHeight = 4 * kPanel;  // columns of a at a time
inline constexpr int64_t kWidth = 16 * kPanel;  // columns of b at a time: the sums fit the second-level cache

/// 32 rows from `row` on of 16 columns from `column` on, two rows per word, with zeros beyond the matrix.
PHI_INLINE void pairs_of_rows(const Rows& x, int64_t rows, int64_t columns, int64_t row, int64_t column,
                              __m512i words[kTile]) {
  const __mmask16 there = columns - column >= kTile ? 0xffff : __mmask16((1u << (columns - column)) - 1);
  for (int64_t i = 0; i < kTile; ++i) {
    const int64_t r = row + 2 * i;
    const BFloat16* from = x.row<BFloat16>(r) + column;
    const __m256i even = r < rows ? _mm256_maskz_loadu_epi16(there, from) : _mm256_setzero_si256();
    const __m256i odd = r + 1 < rows ? _mm256_maskz_loadu_epi16(there, from + x.stride) : _mm256_setzero_si256();
    words[i] = _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
  }
}

/// Packs a panel of x, kPanel columns from `column` on, as tiles: (rows / 32, 2, 16, 16) words. With kTurned, a tile's
/// rows are columns of x, for the left operand of a product; otherwise they are pairs of rows of x.
template <bool kTurned>
void pack_panel(const Rows& x, int64_t rows, int64_t columns, int64_t column, uint32_t* to) {
  for (int64_t row = 0; row < rows || row == 0; row += kPanel) {
    for (int64_t half = 0; half < kPanel; half += kTile, to += kTile * kTile) {
      if (column + half >= columns) {
        for (int64_t i = 0; i < kTile; ++i) _mm512_storeu_si512(to + i * kTile, _mm512_setzero_si512());
        continue;
      }
      __m512i words[kTile];
      pairs_of_rows(x, rows, columns, row, column + half, words);
      if (kTurned) transpose_square(words);
      for (int64_t i = 0; i < kTile; ++i) _mm512_storeu_si512(to + i * kTile, words[i]);
    }
  }
}

/// The number of tile products in each sum. Without rows it is one, of zeros.
inline int64_t depth_steps(const WeightGradient& a) { return a.rows == 0 ? 1 : (a.rows + kPanel - 1) / kPanel; }

/// Computes the output for one thread's columns of a, up to kHeight of them, in its own tiles and sums.
class GradientWorker {
 public:
  static int64_t scratch(int64_t steps) { return kHeight / kTile * steps * kTile * kTile + kHeight * kWidth; }

  GradientWorker(const WeightGradient& a, const uint32_t* b_tiles, float* memory)
      : a_(a), steps_(depth_steps(a)), b_tiles_(b_tiles) {
    a_tiles_ = reinterpret_cast<uint32_t*>(memory);
    sums_ = memory + kHeight / kTile * steps_ * kTile * kTile;
  }

  void run(int64_t first) {
    const int64_t height = smaller(kHeight, a_.a_columns - first);
    for (int64_t i = 0; i < height; i += kPanel) {
      pack_panel<true>(a_.a, a_.rows, a_.a_columns, first + i, a_tiles_ + i / kPanel * panel_words());
    }
    for (int64_t column = 0; column < a_.b_columns; column += kWidth) {
      const int64_t width = smaller(kWidth, a_.b_columns - column);
      for (int64_t step = 0; step < steps_; step += kDepth / kPanel) {
        for (int64_t i = 0; i < height; i += kPanel) products(i, column, width, step);
      }
      with_type(a_.out_dtype, [&](auto type) { write(type, first, height, column, width); });
    }
  }

 private:
  /// Tiles that are stored one after the other.
  static TilePair packed(const uint32_t* tiles) { return {tiles, kTile * kTile, 2 * kTile * kTile, 64}; }

  int64_t panel_words() const { return steps_ * 2 * kTile * kTile; }

  /// Adds the products of kDepth rows from `step` on to the sums for a panel of a and the columns of b.
  void products(int64_t i, int64_t column, int64_t width, int64_t step) {
    const int64_t count = smaller(kDepth / kPanel, steps_ - step), offset = step * 2 * kTile * kTile;
    const uint32_t* left = a_tiles_ + i / kPanel * panel_words() + offset;
    for (int64_t j = 0; j < width; j += kPanel) {
      const uint32_t* right = b_tiles_ + (column + j) / kPanel * panel_words() + offset;
      float* const sums = sums_ + i * kWidth + j * kPanel;
      multiply_square(count, packed(left), packed(right), sums, kPanel, step > 0);
    }
  }

  /// Writes the sums to the output. The sums for kPanel columns of a and of b are stored in one piece, (kPanel,
  /// kPanel).
  template <class T>
  void write(T, int64_t first, int64_t height, int64_t column, int64_t width) {
    for (int64_t i = 0; i < height; ++i) {
      const float* from = sums_ + i / kPanel * kPanel * kWidth + i % kPanel * kPanel;
      T* to = a_.out.row<T>(first + i) + column;
      for (int64_t j = 0; j < width; j += kPanel, from += kPanel * kPanel, to += kPanel) {
        for_lanes(smaller(kPanel, width - j), [=](int64_t c, auto lanes) {
          const Vec sum = load(from + c, lanes);
          store(to + c, a_.add ? load(to + c, lanes) + sum : sum, lanes);
        });
      }
    }
  }

  const WeightGradient& a_;
  int64_t steps_;
  const uint32_t* b_tiles_;
  uint32_t* a_tiles_;
  float* sums_;
};

inline void weight_gradient(const WeightGradient& a) {
  const int64_t steps = depth_steps(a), panel = steps * 2 * kTile * kTile;
  const int64_t panels = (a.b_columns + kPanel - 1) / kPanel, items = (a.a_columns + kHeight - 1) / kHeight;
  const int threads = threads_for(a.rows * (a.a_columns + a.b_columns), a.threads);
  const Scratch b_memory(panels * panel);
  uint32_t* const b_tiles = reinterpret_cast<uint32_t*>(b_memory.data());
  parallel_items(panels, threads, [&](int64_t item, int) {
    pack_panel<false>(a.b, a.rows, a.b_columns, item * kPanel, b_tiles + item * panel);
  });
  const int64_t each = GradientWorker::scratch(steps);
  const Scratch memory(each * threads);
  parallel_items(items, threads, [&](int64_t item, int thread) {
    const Tiles tiles;
    GradientWorker(a, b_tiles, memory.data() + thread * each).run(item * kHeight);
  });
}
#endif

}  // namespace phi_fast::cpu::PHI_ISA
