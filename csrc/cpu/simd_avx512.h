// Sixteen fp32 lanes: AVX-512 F, BW, DQ and VL. With PHI_AVX512_BF16 it also uses the bf16 conversions of Cooper Lake
// and Zen 4.
#pragma once
#include <immintrin.h>

#include "cpu/dtypes.h"

#define PHI_INLINE __attribute__((always_inline)) inline

namespace phi_fast::cpu::PHI_ISA {

struct Vec {
  static constexpr int kLanes = 16;
  __m512 v;

  Vec() = default;
  PHI_INLINE Vec(__m512 value) : v(value) {}
  PHI_INLINE Vec(float value) : v(_mm512_set1_ps(value)) {}
};

/// Vectors per row of the matrix products' tile: as many as the registers hold in addition to the operands.
inline constexpr int kTileVecs = 4;

struct Mask {
  __mmask16 m;
};

PHI_INLINE Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
PHI_INLINE Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
PHI_INLINE Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
PHI_INLINE Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
PHI_INLINE Mask operator>(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }

/// a where the mask holds, else 0.
PHI_INLINE Vec keep(Mask mask, Vec a) { return _mm512_maskz_mov_ps(mask.m, a.v); }
/// a where the mask holds, else b.
PHI_INLINE Vec select(Mask mask, Vec a, Vec b) { return _mm512_mask_mov_ps(b.v, mask.m, a.v); }
/// The larger lane; b where either is NaN.
PHI_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a.v, b.v); }
/// The smaller lane; b where either is NaN.
PHI_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a.v, b.v); }
PHI_INLINE Vec abs(Vec a) { return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), a.v); }
/// The magnitude of a (not negative) with the sign of b.
PHI_INLINE Vec with_sign(Vec a, Vec b) { return _mm512_or_ps(a.v, _mm512_and_ps(_mm512_set1_ps(-0.0f), b.v)); }
PHI_INLINE Vec sqrt(Vec a) { return _mm512_sqrt_ps(a.v); }

/// a·b + c and c - a·b.
PHI_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
PHI_INLINE Vec fnma(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a.v, b.v, c.v); }

/// 1 / a for 1 <= a, to about 1 unit in the last place.
PHI_INLINE Vec reciprocal(Vec a) {
  const Vec r = _mm512_rcp14_ps(a.v);  // 14 bits; a Newton step doubles them, and is faster than a division
  return r * fnma(a, r, Vec(2.0f));
}

/// a · 2^n, where n is the integer in the low bits of `magic` (see exp_in_range).
PHI_INLINE Vec scale_by_power(Vec a, Vec magic) {
  const __m512i power = _mm512_slli_epi32(_mm512_castps_si512(magic.v), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.v), power));
}

PHI_INLINE float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
PHI_INLINE float max(Vec a) { return _mm512_reduce_max_ps(a.v); }

/// Every lane, or the first few (1 … kLanes - 1): in the others, loads give 0 and stores change nothing.
struct Full {};
struct Tail {
  __mmask16 mask;
};

PHI_INLINE Tail tail(int count) { return {static_cast<__mmask16>((1u << count) - 1)}; }

PHI_INLINE __m512 widen_lanes(__m256i from, BFloat16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(from), 16));
}
PHI_INLINE __m512 widen_lanes(__m256i from, Float16) { return _mm512_cvtph_ps(from); }

PHI_INLINE __m256i narrow_lanes(Vec a, BFloat16) {
#if defined(PHI_AVX512_BF16)
  return (__m256i)_mm512_cvtneps_pbh(a.v);
#else
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i quieted = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(quieted, 16));
#endif
}
PHI_INLINE __m256i narrow_lanes(Vec a, Float16) {
  return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

PHI_INLINE Vec load(const float* from, Full = {}) { return _mm512_loadu_ps(from); }
PHI_INLINE Vec load(const float* from, Tail lanes) { return _mm512_maskz_loadu_ps(lanes.mask, from); }
PHI_INLINE void store(float* to, Vec a, Full = {}) { _mm512_storeu_ps(to, a.v); }
PHI_INLINE void store(float* to, Vec a, Tail lanes) { _mm512_mask_storeu_ps(to, lanes.mask, a.v); }

template <class T>
PHI_INLINE Vec load(const T* from, Full = {}) {
  return widen_lanes(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)), T{});
}
template <class T>
PHI_INLINE Vec load(const T* from, Tail lanes) {
  return widen_lanes(_mm256_maskz_loadu_epi16(lanes.mask, from), T{});
}
template <class T>
PHI_INLINE void store(T* to, Vec a, Full = {}) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow_lanes(a, T{}));
}
template <class T>
PHI_INLINE void store(T* to, Vec a, Tail lanes) {
  _mm256_mask_storeu_epi16(to, lanes.mask, narrow_lanes(a, T{}));
}
PHI_INLINE Vec keep(Full, Vec a) { return a; }
PHI_INLINE Vec keep(Tail lanes, Vec a) { return _mm512_maskz_mov_ps(lanes.mask, a.v); }

/// rows[j][i] = rows[i][j] for 16 × 16 words of 32 bits.
PHI_INLINE void transpose_square(__m512i rows[16]) {
  __m512i pairs[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  __m512i fours[16];  // 128-bit lane l of fours[4 g + c]: column 4 l + c of rows 4 g … 4 g + 3
  for (int i = 0; i < 16; i += 4) {
    fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
    fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
    fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
    fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
  }
  constexpr int kEven = 0x88, kOdd = 0xdd;  // lanes 0 and 2, 1 and 3 of both operands
  for (int c = 0; c < 4; ++c) {
    const __m512i even_low = _mm512_shuffle_i32x4(fours[c], fours[4 + c], kEven);
    const __m512i even_high = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], kEven);
    const __m512i odd_low = _mm512_shuffle_i32x4(fours[c], fours[4 + c], kOdd);
    const __m512i odd_high = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], kOdd);
    rows[c] = _mm512_shuffle_i32x4(even_low, even_high, kEven);
    rows[4 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, kEven);
    rows[8 + c] = _mm512_shuffle_i32x4(even_low, even_high, kOdd);
    rows[12 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, kOdd);
  }
}

#define PHI_TRANSPOSE_SQUARE
/// to[j][i] = from[i][j] for 16 × 16 words of 32 bits.
template <class Word>
PHI_INLINE void transpose_square(const Word* from, int64_t from_row, Word* to, int64_t to_row) {
  static_assert(sizeof(Word) == 4);
  __m512i rows[16];
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_loadu_si512(from + i * from_row);
  transpose_square(rows);
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * to_row, rows[i]);
}

#if defined(PHI_AVX512_BF16)
/// Two tiles of one operand of bf16, 16 × 16 words each, `second` words apart. A left operand's tiles are rows of
/// words, a right one's are pairs of rows. The tiles of the next product follow after `step` words.
struct TilePair {
  const uint32_t* first;
  int64_t second, step;
  long row_bytes;
};

#if !defined(PHI_AMX)
/// Nothing needs to be configured for dot products.
class Tiles {
 public:
  Tiles() {}
  ~Tiles() {}
};

/// sums (32, 32) = (or +=, with `add`) the sum of `count` products of two tiles of a with two tiles of b. Eight rows of
/// sums are in registers at a time; between(i) is called for each product at the end.
template <class Between>
PHI_INLINE void multiply_square(int64_t count, TilePair a, TilePair b, float* sums, int64_t sums_row, bool add,
                                Between between) {
  constexpr int kRows = 8;
  const int64_t a_row = a.row_bytes / 4, b_row = b.row_bytes / 4;
  for (int first = 0; first < 32; first += kRows) {
    const uint32_t* left = a.first + (first >= 16 ? a.second : 0) + first % 16 * a_row;
    const uint32_t* right = b.first;
    float* const to = sums + first * sums_row;
    __m512 total[kRows][2];
    for (int r = 0; r < kRows; ++r) total[r][0] = total[r][1] = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; ++i, left += a.step, right += b.step) {
      for (int k = 0; k < 16; ++k) {
        const __m512bh low = (__m512bh)_mm512_loadu_si512(right + k * b_row);
        const __m512bh high = (__m512bh)_mm512_loadu_si512(right + b.second + k * b_row);
        for (int r = 0; r < kRows; ++r) {
          const __m512bh word = (__m512bh)_mm512_set1_epi32(int(left[r * a_row + k]));
          total[r][0] = _mm512_dpbf16_ps(total[r][0], word, low);
          total[r][1] = _mm512_dpbf16_ps(total[r][1], word, high);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int half = 0; half < 2; ++half) {
        float* const place = to + r * sums_row + 16 * half;
        store(place, add ? load(place) + Vec(total[r][half]) : Vec(total[r][half]));
      }
    }
  }
  for (int64_t i = 0; i < count; ++i) between(i);
}
#endif
#endif

}  // namespace phi_fast::cpu::PHI_ISA
