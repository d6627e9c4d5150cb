// Four fp32 lanes with the compilers' vector extension: SSE2 on x86-64, NEON on
// arm64, plain code elsewhere.
#pragma once
#include <cmath>

#include "cpu/dtypes.h"

#define PHI_INLINE __attribute__((always_inline)) inline

namespace phi_fast::cpu::PHI_ISA {

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));
typedef uint32_t UInt4 __attribute__((vector_size(16)));  // for arithmetic that wraps

struct Vec {
  static constexpr int kLanes = 4;
  Float4 v;

  Vec() = default;
  PHI_INLINE Vec(Float4 value) : v(value) {}
  PHI_INLINE Vec(float value) : v(Float4{value, value, value, value}) {}
};

/// Vectors per row of the matrix products' tile: as many as the registers hold in addition to the operands.
inline constexpr int kTileVecs = 2;

struct Mask {
  Int4 m;
};

PHI_INLINE Vec operator+(Vec a, Vec b) { return a.v + b.v; }
PHI_INLINE Vec operator-(Vec a, Vec b) { return a.v - b.v; }
PHI_INLINE Vec operator*(Vec a, Vec b) { return a.v * b.v; }
PHI_INLINE Vec operator/(Vec a, Vec b) { return a.v / b.v; }
PHI_INLINE Mask operator>(Vec a, Vec b) { return {Int4(a.v > b.v)}; }

/// a where the mask holds, else 0.
PHI_INLINE Vec keep(Mask mask, Vec a) { return Float4(mask.m & Int4(a.v)); }
/// a where the mask holds, else b.
PHI_INLINE Vec select(Mask mask, Vec a, Vec b) { return Float4((mask.m & Int4(a.v)) | (~mask.m & Int4(b.v))); }
/// The larger lane; b where either is NaN.
PHI_INLINE Vec max(Vec a, Vec b) { return select(a > b, a, b); }
/// The smaller lane; b where either is NaN.
PHI_INLINE Vec min(Vec a, Vec b) { return select(b > a, a, b); }
PHI_INLINE Vec abs(Vec a) { return Float4(Int4(a.v) & 0x7fffffff); }
/// The magnitude of a (not negative) with the sign of b.
PHI_INLINE Vec with_sign(Vec a, Vec b) { return Float4(Int4(a.v) | (Int4(b.v) & int32_t(0x80000000))); }
PHI_INLINE Vec sqrt(Vec a) {
  return Float4{std::sqrt(a.v[0]), std::sqrt(a.v[1]), std::sqrt(a.v[2]), std::sqrt(a.v[3])};
}

/// a·b + c and c - a·b, with one rounding if the machine has such an instruction.
PHI_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__aarch64__)
  return Float4{std::fma(a.v[0], b.v[0], c.v[0]), std::fma(a.v[1], b.v[1], c.v[1]), std::fma(a.v[2], b.v[2], c.v[2]),
                std::fma(a.v[3], b.v[3], c.v[3])};
#else
  return a.v * b.v + c.v;
#endif
}
PHI_INLINE Vec fnma(Vec a, Vec b, Vec c) { return fma(Vec(-a.v), b, c); }

/// 1 / a for 1 <= a, to about 1 unit in the last place.
PHI_INLINE Vec reciprocal(Vec a) { return Vec(1.0f) / a; }

/// a · 2^n, where n is the integer in the low bits of `magic` (see exp_in_range).
PHI_INLINE Vec scale_by_power(Vec a, Vec magic) { return Float4(UInt4(a.v) + (UInt4(magic.v) << 23)); }

PHI_INLINE float sum(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
PHI_INLINE float max(Vec a) { return std::fmax(std::fmax(a.v[0], a.v[2]), std::fmax(a.v[1], a.v[3])); }

/// Every lane, or the first `count` (1 … kLanes - 1) lanes: in the others, loads give 0 and stores change nothing.
struct Full {};
struct Tail {
  int count;
};

PHI_INLINE Tail tail(int count) { return {count}; }

template <class T>
PHI_INLINE Vec load(const T* from, Full = {}) {
  return Float4{widen(from[0]), widen(from[1]), widen(from[2]), widen(from[3])};
}
template <class T>
PHI_INLINE Vec load(const T* from, Tail lanes) {
  Vec a(0.0f);
  for (int i = 0; i < lanes.count; ++i) a.v[i] = widen(from[i]);
  return a;
}
template <class T>
PHI_INLINE void store(T* to, Vec a, Full = {}) {
  for (int i = 0; i < Vec::kLanes; ++i) narrow(a.v[i], to + i);
}
template <class T>
PHI_INLINE void store(T* to, Vec a, Tail lanes) {
  for (int i = 0; i < lanes.count; ++i) narrow(a.v[i], to + i);
}
PHI_INLINE Vec keep(Full, Vec a) { return a; }
PHI_INLINE Vec keep(Tail lanes, Vec a) {
  for (int i = lanes.count; i < Vec::kLanes; ++i) a.v[i] = 0.0f;
  return a;
}

}  // namespace phi_fast::cpu::PHI_ISA
