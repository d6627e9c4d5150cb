// Matrix tiles (AMX with bf16, from Sapphire Rapids on) in addition to AVX-512's lanes. A tile is 16 rows of 64 bytes;
// a product gives 16 × 16 sums of 32 terms.
#pragma once
#include "cpu/simd_avx512.h"
#if defined(PHI_EMULATE_TILES)
#include "cpu/emulated_tiles.h"
#endif

namespace phi_fast::cpu::PHI_ISA {

#if !defined(PHI_EMULATE_TILES)
/// Configures this thread's tiles, all of the full size, during its lifetime. oneDNN configures them anew for each of
/// its own products.
class Tiles {
 public:
  Tiles() {
    alignas(64) struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    __asm__ volatile("ldtilecfg %0" : : "m"(shape) : "memory");
  }
  ~Tiles() { __asm__ volatile("tilerelease" : : : "memory"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};
#endif

/// sums (32, 32) = (or +=, with `add`) the sum of `count` products of two tiles of a with two tiles of b. After each
/// product's instructions, between(i) does something else while the tiles' unit works.
template <class Between>
PHI_INLINE void multiply_square(int64_t count, TilePair a, TilePair b, float* sums, int64_t sums_row, bool add,
                                Between between) {
  float* const lower = sums + 16 * sums_row;
  const long row_bytes = sums_row * 4;
  // The compiler does not know that these instructions read and write memory.
  __asm__ volatile("" : : : "memory");
  if (add) {
    _tile_loadd(0, sums, row_bytes);
    _tile_loadd(1, sums + 16, row_bytes);
    _tile_loadd(2, lower, row_bytes);
    _tile_loadd(3, lower + 16, row_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t i = 0; i < count; ++i, a.first += a.step, b.first += b.step) {
    _tile_loadd(4, a.first, a.row_bytes);
    _tile_loadd(6, b.first, b.row_bytes);
    _tile_loadd(7, b.first + b.second, b.row_bytes);
    _tile_loadd(5, a.first + a.second, a.row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    between(i);
  }
  _tile_stored(0, sums, row_bytes);
  _tile_stored(1, sums + 16, row_bytes);
  _tile_stored(2, lower, row_bytes);
  _tile_stored(3, lower + 16, row_bytes);
  __asm__ volatile("" : : : "memory");
}

PHI_INLINE void multiply_square(int64_t count, TilePair a, TilePair b, float* sums, int64_t sums_row, bool add) {
  multiply_square(count, a, b, sums, sums_row, add, [](int64_t) {});
}

/// Like `multiply`, for words of two bf16: m and n are multiples of 32, k is a multiple of 16.
template <bool kAdd>
PHI_INLINE void multiply_by_tiles(int64_t m, int64_t n, int64_t k, const uint32_t* a, int64_t a_row, const uint32_t* b,
                                  int64_t b_row, float* c, int64_t c_row) {
  for (int64_t j = 0; j < n; j += 32) {
    for (int64_t i = 0; i < m; i += 32) {
      const TilePair left{a + i * a_row, 16 * a_row, 16, long(a_row * 4)};
      const TilePair right{b + j, 16, 16 * b_row, long(b_row * 4)};
      multiply_square(k / 16, left, right, c + i * c_row + j, c_row, kAdd);
    }
  }
}

}  // namespace phi_fast::cpu::PHI_ISA
