// The tile instructions as plain loops, used with PHI_EMULATE_TILES. A sanitizer can then see what they read and write,
// and a processor with AVX-512 BF16 but without tiles can run the code that uses them.
#pragma once
#include <cstring>

#include "cpu/dtypes.h"

namespace phi_fast::cpu::PHI_ISA {

struct EmulatedTile {
  static constexpr int kRows = 16, kWords = 16;
  uint32_t words[kRows][kWords];

  void load(const void* from, long row_bytes) {
    const char* row = static_cast<const char*>(from);
    for (int r = 0; r < kRows; ++r, row += row_bytes) std::memcpy(words[r], row, sizeof words[r]);
  }
  void store(void* to, long row_bytes) const {
    char* row = static_cast<char*>(to);
    for (int r = 0; r < kRows; ++r, row += row_bytes) std::memcpy(row, words[r], sizeof words[r]);
  }
  /// This tile of fp32 += a · b, whose words hold two bf16 along the summed dimension.
  void add_product(const EmulatedTile& a, const EmulatedTile& b) {
    const auto low = [](uint32_t word) { return bit_float(word << 16); };
    const auto high = [](uint32_t word) { return bit_float(word & 0xffff0000u); };
    for (int m = 0; m < kRows; ++m) {
      for (int n = 0; n < kWords; ++n) {
        float sum = bit_float(words[m][n]);
        for (int k = 0; k < kWords; ++k) {
          const uint32_t left = a.words[m][k], right = b.words[k][n];
          sum += low(left) * low(right) + high(left) * high(right);
        }
        words[m][n] = float_bits(sum);
      }
    }
  }
};

inline thread_local EmulatedTile emulated_tiles[8];

/// Emulated tiles need no configuration.
class Tiles {
 public:
  Tiles() {}
  ~Tiles() {}
};

}  // namespace phi_fast::cpu::PHI_ISA

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadd(tile, from, row_bytes) emulated_tiles[tile].load(from, row_bytes)
#define _tile_stored(tile, to, row_bytes) emulated_tiles[tile].store(to, row_bytes)
#define _tile_zero(tile) emulated_tiles[tile] = {}
#define _tile_dpbf16ps(sums, a, b) emulated_tiles[sums].add_product(emulated_tiles[a], emulated_tiles[b])
