// Eight fp32 lanes: AVX2, FMA, F16C.
#pragma once
#include <immintrin.h>

#include "cpu/dtypes.h"

#define PHI_INLINE __attribute__((always_inline)) inline

namespace phi_fast::cpu::PHI_ISA {

struct Vec {
  static constexpr int kLanes = 8;
  __m256 v;

  Vec() = default;
  PHI_INLINE Vec(__m256 value) : v(value) {}
  PHI_INLINE Vec(float value) : v(_mm256_set1_ps(value)) {}
};

/// Vectors per row of the matrix products' tile: as many as the registers hold in addition to the operands.
inline constexpr int kTileVecs = 2;

struct Mask {
  __m256 m;
};

PHI_INLINE Vec operator+(Vec a, Vec b) { return _mm256_add_ps(a.v, b.v); }
PHI_INLINE Vec operator-(Vec a, Vec b) { return _mm256_sub_ps(a.v, b.v); }
PHI_INLINE Vec operator*(Vec a, Vec b) { return _mm256_mul_ps(a.v, b.v); }
PHI_INLINE Vec operator/(Vec a, Vec b) { return _mm256_div_ps(a.v, b.v); }
PHI_INLINE Mask operator>(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }

/// a where the mask holds, else 0.
PHI_INLINE Vec keep(Mask mask, Vec a) { return _mm256_and_ps(mask.m, a.v); }
/// a where the mask holds, else b.
PHI_INLINE Vec select(Mask mask, Vec a, Vec b) { return _mm256_blendv_ps(b.v, a.v, mask.m); }
/// The larger lane; b where either is NaN.
PHI_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a.v, b.v); }
/// The smaller lane; b where either is NaN.
PHI_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a.v, b.v); }
PHI_INLINE Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v); }
/// The magnitude of a (not negative) with the sign of b.
PHI_INLINE Vec with_sign(Vec a, Vec b) { return _mm256_or_ps(a.v, _mm256_and_ps(_mm256_set1_ps(-0.0f), b.v)); }
PHI_INLINE Vec sqrt(Vec a) { return _mm256_sqrt_ps(a.v); }

/// a·b + c and c - a·b.
PHI_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
PHI_INLINE Vec fnma(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a.v, b.v, c.v); }

/// 1 / a for 1 <= a, to about 1 unit in the last place.
PHI_INLINE Vec reciprocal(Vec a) { return Vec(1.0f) / a; }

/// a · 2^n, where n is the integer in the low bits of `magic` (see exp_in_range).
PHI_INLINE Vec scale_by_power(Vec a, Vec magic) {
  const __m256i power = _mm256_slli_epi32(_mm256_castps_si256(magic.v), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.v), power));
}

PHI_INLINE float sum(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
PHI_INLINE float max(Vec a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

/// Every lane, or the first few (1 … kLanes - 1): in the others, loads give 0 and stores change nothing.
struct Full {};
struct Tail {
  int count;
  __m256i mask;
};

PHI_INLINE Tail tail(int count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return {count, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane)};
}

PHI_INLINE __m256 widen_lanes(__m128i from, BFloat16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(from), 16));
}
PHI_INLINE __m256 widen_lanes(__m128i from, Float16) { return _mm256_cvtph_ps(from); }

PHI_INLINE __m128i narrow_lanes(Vec a, BFloat16) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
PHI_INLINE __m128i narrow_lanes(Vec a, Float16) {
  return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

PHI_INLINE Vec load(const float* from, Full = {}) { return _mm256_loadu_ps(from); }
PHI_INLINE Vec load(const float* from, Tail lanes) { return _mm256_maskload_ps(from, lanes.mask); }
PHI_INLINE void store(float* to, Vec a, Full = {}) { _mm256_storeu_ps(to, a.v); }
PHI_INLINE void store(float* to, Vec a, Tail lanes) { _mm256_maskstore_ps(to, lanes.mask, a.v); }

template <class T>
PHI_INLINE Vec load(const T* from, Full = {}) {
  return widen_lanes(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)), T{});
}
template <class T>
PHI_INLINE Vec load(const T* from, Tail lanes) {
  T padded[Vec::kLanes] = {};
  for (int i = 0; i < lanes.count; ++i) padded[i] = from[i];
  return load(padded);
}
template <class T>
PHI_INLINE void store(T* to, Vec a, Full = {}) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), narrow_lanes(a, T{}));
}
template <class T>
PHI_INLINE void store(T* to, Vec a, Tail lanes) {
  T padded[Vec::kLanes];
  store(padded, a);
  for (int i = 0; i < lanes.count; ++i) to[i] = padded[i];
}
PHI_INLINE Vec keep(Full, Vec a) { return a; }
PHI_INLINE Vec keep(Tail lanes, Vec a) { return _mm256_and_ps(_mm256_castsi256_ps(lanes.mask), a.v); }

}  // namespace phi_fast::cpu::PHI_ISA
