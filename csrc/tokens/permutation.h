// A keyed bijection of [0, n) that needs no memory: a Feistel network on exactly ceil(log2 n) bits with cycle walking.
#pragma once
#include <array>
#include <cstdint>

namespace phi_fast::tokens {

// MurmurHash3's 64-bit finalizer (Austin Appleby, public domain): every input bit flips every output bit half the time.
inline uint64_t mix(uint64_t x) {
  x ^= x >> 33;
  x *= 0xff51afd7ed558ccdULL;
  x ^= x >> 33;
  x *= 0xc4ceb9fe1a85ec53ULL;
  return x ^ (x >> 33);
}

constexpr uint64_t kGolden = 0x9e3779b97f4a7c15ULL;  // 2^64 / golden ratio: odd, so its multiples have no short cycle

inline uint64_t combine(uint64_t hash, uint64_t value) { return mix((hash ^ mix(value + kGolden)) + kGolden); }

class Permutation {
 public:
  Permutation(uint64_t n, uint64_t key) : n_(n) {
    int bits = 0;
    while (bits < 64 && (n - 1) >> bits) ++bits;
    low_bits_ = bits - bits / 2;
    low_mask_ = (uint64_t{1} << low_bits_) - 1;
    high_mask_ = (uint64_t{1} << (bits / 2)) - 1;
    for (int round = 0; round < kRounds; ++round) round_keys_[round] = mix(key + (round + 1) * kGolden);
  }

  // The image of i < n. Walking the cycle back into [0, n) takes fewer than 2 steps on average, as n > 2^(bits-1).
  uint64_t operator()(uint64_t i) const {
    do i = scramble(i);
    while (i >= n_);
    return i;
  }

 private:
  static constexpr int kRounds = 8;  // even: each half is changed 4 times, twice as often as Luby and Rackoff need

  // The halves are changed in turn, so they may differ in width, and an odd number of bits wastes none.
  uint64_t scramble(uint64_t i) const {
    uint64_t low = i & low_mask_, high = i >> low_bits_;
    for (int round = 0; round < kRounds; round += 2) {
      high ^= mix(low + round_keys_[round]) & high_mask_;
      low ^= mix(high + round_keys_[round + 1]) & low_mask_;
    }
    return high << low_bits_ | low;
  }

  uint64_t n_, low_mask_, high_mask_;
  int low_bits_;
  std::array<uint64_t, kRounds> round_keys_;
};

}  // namespace phi_fast::tokens
