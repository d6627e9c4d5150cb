// Storage types. Arithmetic is in fp32: bf16 and fp16 values are widened on load and rounded to nearest even on store.
#pragma once
#include <cstdint>
#include <cstring>

namespace phi_fast::cpu {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

enum class DType : int { kFloat32, kBFloat16, kFloat16 };

inline float bit_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float widen(float value) { return value; }

inline float widen(BFloat16 value) { return bit_float(uint32_t{value.bits} << 16); }

inline float widen(Float16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bit_float(sign | 0x7f800000u | (rest << 13));  // inf, NaN
  // Multiplying by 2^112 changes the exponent bias from 15 to 127, and normalises subnormals.
  return bit_float(sign | float_bits(bit_float(rest << 13) * 0x1p112f));
}

inline void narrow(float value, float* to) { *to = value; }

inline void narrow(float value, BFloat16* to) {
  const uint32_t bits = float_bits(value);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to->bits = uint16_t(nan ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline void narrow(float value, Float16* to) {
  const uint32_t sign = float_bits(value) >> 16 & 0x8000u;
  const uint32_t rest = float_bits(value) & 0x7fffffffu;
  uint32_t bits;
  if (rest > 0x7f800000u) {
    bits = 0x7e00u;  // NaN
  } else if (rest >= 0x477ff000u) {
    bits = 0x7c00u;  // 65520 and above round to inf
  } else if (rest < 0x38800000u) {
    // Below 2^-14 the result is subnormal: adding 0.5 leaves the multiple of
    // 2^-24 in the low bits, rounded by the addition.
    bits = float_bits(bit_float(rest) + 0.5f) - 0x3f000000u;
  } else {
    bits = (rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  }
  to->bits = uint16_t(sign | bits);
}

}  // namespace phi_fast::cpu
