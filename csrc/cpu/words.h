// Small matrix products of operands packed into words. A word is what one lane multiplies in one instruction: one fp32
// number, or two bf16 numbers that are neighbours along the summed dimension.
#pragma once
#include "cpu/vector_math.h"

namespace phi_fast::cpu::PHI_ISA {

struct FloatWords {
  using Word = float;
  using Lanes = Vec;
  static constexpr int kPerWord = 1;
  /// Operands are padded to a multiple of this size along every dimension.
  static constexpr int kGrain = Vec::kLanes;
  /// State that a thread keeps while it multiplies.
  struct Session {};

  PHI_INLINE static Lanes words(const Word* from) { return load(from); }
  PHI_INLINE static Lanes everywhere(Word word) { return Vec(word); }
  PHI_INLINE static Vec dot(Lanes a, Lanes b, Vec sum) { return fma(a, b, sum); }

  /// Stores numbers i … i + kLanes - 1 of a row whose words run along it.
  PHI_INLINE static void along(Word* row, int64_t i, Vec x) { store(row + i, x); }
  /// Stores kLanes words that run across kPerWord rows.
  PHI_INLINE static void across(Word* to, const Vec* rows) { store(to, rows[0]); }
};

#if defined(PHI_AVX512_BF16)
struct BFloat16Words {
  using Word = uint32_t;
  using Lanes = __m512bh;
  static constexpr int kPerWord = 2;
  static constexpr int kGrain = Vec::kLanes;
  struct Session {};

  PHI_INLINE static Lanes words(const Word* from) { return (__m512bh)_mm512_loadu_si512(from); }
  PHI_INLINE static Lanes everywhere(Word word) { return (__m512bh)_mm512_set1_epi32(int(word)); }
  PHI_INLINE static Vec dot(Lanes a, Lanes b, Vec sum) { return _mm512_dpbf16_ps(sum.v, a, b); }

  PHI_INLINE static void along(Word* row, int64_t i, Vec x) { store(reinterpret_cast<BFloat16*>(row) + i, x); }
  PHI_INLINE static void across(Word* to, const Vec* rows) {
    const __m512i low = _mm512_cvtepu16_epi32(narrow_lanes(rows[0], BFloat16{}));
    const __m512i high = _mm512_cvtepu16_epi32(narrow_lanes(rows[1], BFloat16{}));
    _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
};
#endif

#if defined(PHI_AMX)
/// The same words, multiplied 16 × 16 × 16 per instruction.
struct TileWords : BFloat16Words {
  static constexpr int kGrain = 2 * Vec::kLanes;
  using Session = Tiles;
};
#endif

/// The words for products of T: bf16 words if there are instructions for them.
template <class T>
struct WordsOf {
  using Type = FloatWords;
};
#if defined(PHI_AMX)
template <>
struct WordsOf<BFloat16> {
  using Type = TileWords;
};
#elif defined(PHI_AVX512_BF16)
template <>
struct WordsOf<BFloat16> {
  using Type = BFloat16Words;
};
#endif

/// Rows per tile: with kTileVecs vectors each, enough sums are in flight to hide the latency of an fma.
inline constexpr int kTileRows = 4;

PHI_INLINE int64_t round_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

/// Computes kTileRows × kVecs vectors of C = A · B, or C += A · B with kAdd.
template <class W, int kVecs, bool kAdd>
PHI_INLINE void multiply_tile(int64_t k, const typename W::Word* a, int64_t a_row, const typename W::Word* b,
                              int64_t b_row, float* c, int64_t c_row) {
  Vec sums[kTileRows][kVecs];
  for (int r = 0; r < kTileRows; ++r) {
    for (int v = 0; v < kVecs; ++v) sums[r][v] = Vec(0.0f);
  }
  for (int64_t i = 0; i < k; ++i) {
    typename W::Lanes right[kVecs];
    for (int v = 0; v < kVecs; ++v) right[v] = W::words(b + i * b_row + v * Vec::kLanes);
    for (int r = 0; r < kTileRows; ++r) {
      const typename W::Lanes left = W::everywhere(a[r * a_row + i]);
      for (int v = 0; v < kVecs; ++v) sums[r][v] = W::dot(left, right[v], sums[r][v]);
    }
  }
  for (int r = 0; r < kTileRows; ++r) {
    for (int v = 0; v < kVecs; ++v) {
      // C is added last, so that fewer additions round at the sum's full size.
      float* const to = c + r * c_row + v * Vec::kLanes;
      store(to, kAdd ? load(to) + sums[r][v] : sums[r][v]);
    }
  }
}

/// C (m, n) = A (m, k) · B (k, n), or C += A · B with kAdd. k counts words; m and n are multiples of W::kGrain, and k
/// is a multiple of W::kGrain / W::kPerWord.
template <class W, bool kAdd>
void multiply(int64_t m, int64_t n, int64_t k, const typename W::Word* a, int64_t a_row, const typename W::Word* b,
              int64_t b_row, float* c, int64_t c_row) {
#if defined(PHI_AMX)
  if constexpr (std::is_same_v<W, TileWords>) return multiply_by_tiles<kAdd>(m, n, k, a, a_row, b, b_row, c, c_row);
#endif
  constexpr int64_t kWide = kTileVecs * Vec::kLanes;
  int64_t j = 0;
  for (; j + kWide <= n; j += kWide) {
    for (int64_t i = 0; i < m; i += kTileRows) {
      multiply_tile<W, kTileVecs, kAdd>(k, a + i * a_row, a_row, b + j, b_row, c + i * c_row + j, c_row);
    }
  }
  for (; j < n; j += Vec::kLanes) {
    for (int64_t i = 0; i < m; i += kTileRows) {
      multiply_tile<W, 1, kAdd>(k, a + i * a_row, a_row, b + j, b_row, c + i * c_row + j, c_row);
    }
  }
}

/// to[j][i] = from[i][j].
template <class Word>
void transpose(const Word* from, int64_t rows, int64_t columns, Word* to) {
  constexpr int64_t kSquare = 16;
  int64_t i = 0;
#if defined(PHI_TRANSPOSE_SQUARE)
  for (; columns % kSquare == 0 && i + kSquare <= rows; i += kSquare) {
    for (int64_t j = 0; j < columns; j += kSquare) {
      transpose_square(from + i * columns + j, columns, to + j * rows + i, rows);
    }
  }
#endif
  for (; i < rows; i += kSquare) {
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t end = smaller(i + kSquare, rows);
      for (int64_t r = i; r < end; ++r) to[j * rows + r] = from[r * columns + j];
    }
  }
}

}  // namespace phi_fast::cpu::PHI_ISA
