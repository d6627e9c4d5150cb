// Matrix tiles: AMX with bf16 of Sapphire Rapids, beside the lanes of AVX-512.
// A tile is 16 rows of 64 bytes; a product is 16 × 16 sums of 32 terms.
#pragma once
#include "cpu/simd_avx512.h"

namespace phi_fast::cpu::PHI_ISA {

/// This thread's tiles, all of the full size, as long as it lives. oneDNN sets
/// them up anew for every product of its own.
class Tiles {
 public:
  Tiles() {
    alignas(64) struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    // The compiler does not see that the instructions read and write memory.
    __asm__ volatile("ldtilecfg %0" : : "m"(shape) : "memory");
  }
  ~Tiles() { __asm__ volatile("tilerelease" : : : "memory"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

/// As multiply, of words of two bf16: m and n multiples of 32, k of 16.
template <bool kAdd>
PHI_INLINE void multiply_by_tiles(int64_t m, int64_t n, int64_t k, const uint32_t* a, int64_t a_row, const uint32_t* b,
                                  int64_t b_row, float* c, int64_t c_row) {
  constexpr int64_t kRows = 16, kWords = 16, kSquare = 2 * kRows;
  const long a_bytes = a_row * 4, b_bytes = b_row * 4, c_bytes = c_row * 4;
  __asm__ volatile("" : : : "memory");
  for (int64_t j = 0; j < n; j += kSquare) {
    for (int64_t i = 0; i < m; i += kSquare) {
      float *const upper = c + i * c_row + j, *const lower = upper + kRows * c_row;
      if (kAdd) {
        _tile_loadd(0, upper, c_bytes);
        _tile_loadd(1, upper + kWords, c_bytes);
        _tile_loadd(2, lower, c_bytes);
        _tile_loadd(3, lower + kWords, c_bytes);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int64_t word = 0; word < k; word += kWords) {
        _tile_loadd(4, a + i * a_row + word, a_bytes);
        _tile_loadd(6, b + word * b_row + j, b_bytes);
        _tile_loadd(7, b + word * b_row + j + kWords, b_bytes);
        _tile_loadd(5, a + (i + kRows) * a_row + word, a_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, upper, c_bytes);
      _tile_stored(1, upper + kWords, c_bytes);
      _tile_stored(2, lower, c_bytes);
      _tile_stored(3, lower + kWords, c_bytes);
    }
  }
  __asm__ volatile("" : : : "memory");
}

/// sums (32, 32) = or += the products of `count` pairs of tiles of either
/// operand, which stand one after the other.
PHI_INLINE void multiply_packed(int64_t count, const uint32_t* a, const uint32_t* b, float* sums, bool add) {
  constexpr int64_t kWords = 16 * 16, kRowBytes = 32 * sizeof(float);
  constexpr long kTileBytes = 64;
  __asm__ volatile("" : : : "memory");
  if (add) {
    _tile_loadd(0, sums, kRowBytes);
    _tile_loadd(1, sums + 16, kRowBytes);
    _tile_loadd(2, sums + 2 * kWords, kRowBytes);
    _tile_loadd(3, sums + 2 * kWords + 16, kRowBytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t i = 0; i < count; ++i, a += 2 * kWords, b += 2 * kWords) {
    _tile_loadd(4, a, kTileBytes);
    _tile_loadd(6, b, kTileBytes);
    _tile_loadd(7, b + kWords, kTileBytes);
    _tile_loadd(5, a + kWords, kTileBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, kRowBytes);
  _tile_stored(1, sums + 16, kRowBytes);
  _tile_stored(2, sums + 2 * kWords, kRowBytes);
  _tile_stored(3, sums + 2 * kWords + 16, kRowBytes);
  __asm__ volatile("" : : : "memory");
}

}  // namespace phi_fast::cpu::PHI_ISA
