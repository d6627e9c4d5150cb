// Loops over a row, and the functions that the kernels need, for the Vec that the including file has defined.
#pragma once
#include <type_traits>

#include "cpu/kernels.h"

namespace phi_fast::cpu::PHI_ISA {

template <int kIndex>
using Index = std::integral_constant<int, kIndex>;

/// Calls body(i, lanes) for i = 0, kLanes, 2 kLanes …, where `lanes` is Full, or Tail for the rest at the end.
template <class Body>
PHI_INLINE void for_lanes(int64_t count, Body body) {
  int64_t i = 0;
  for (; i + Vec::kLanes <= count; i += Vec::kLanes) body(i, Full{});
  if (i < count) body(i, tail(int(count - i)));
}

/// Like for_lanes, four vectors at a time: calls body(i, lanes, Index<k>), where k = 0 … 3 selects the accumulator, so
/// that four additions are in flight.
template <class Body>
PHI_INLINE void for_lanes_by_four(int64_t count, Body body) {
  constexpr int64_t n = Vec::kLanes;
  int64_t i = 0;
  for (; i + 4 * n <= count; i += 4 * n) {
    body(i, Full{}, Index<0>{});
    body(i + n, Full{}, Index<1>{});
    body(i + 2 * n, Full{}, Index<2>{});
    body(i + 3 * n, Full{}, Index<3>{});
  }
  for (; i + n <= count; i += n) body(i, Full{}, Index<0>{});
  if (i < count) body(i, tail(int(count - i)), Index<1>{});
}

struct Accumulators {
  Vec a[4];

  PHI_INLINE explicit Accumulators(float start) : a{start, start, start, start} {}
  PHI_INLINE float sum() const { return PHI_ISA::sum((a[0] + a[1]) + (a[2] + a[3])); }
  PHI_INLINE float max() const {
    return PHI_ISA::max(PHI_ISA::max(PHI_ISA::max(a[0], a[1]), PHI_ISA::max(a[2], a[3])));
  }
};

template <class T>
void fill(T* to, int64_t count, float value) {
  for_lanes(count, [=](int64_t i, auto lanes) { store(to + i, Vec(value), lanes); });
}

PHI_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/// e^x for |x| <= 87.3, to about 1 unit in the last place; NaN stays NaN.
PHI_INLINE Vec exp_in_range(Vec x) {
  // x = n ln2 + r, |r| <= ln2 / 2. Adding 1.5 · 2^23 rounds to an integer, which is then in the low bits.
  const Vec magic = fma(x, Vec(1.44269504f), Vec(12582912.0f));
  const Vec n = magic - Vec(12582912.0f);
  const Vec r = fnma(n, Vec(-2.12194440e-4f), fnma(n, Vec(0.693359375f), x));
  // e^r = 1 + r + r² q(r); q is the minimax polynomial of relative error 3e-9. Pairing terms shortens the dependency
  // chain.
  const Vec r2 = r * r;
  const Vec low = fma(Vec(0.1666652113199234f), r, Vec(0.4999999403953552f));
  const Vec high = fma(Vec(8.368716575205326e-3f), r, Vec(4.166838899254799e-2f));
  const Vec q = fma(fma(Vec(1.381459878757596e-3f), r2, high), r2, low);
  return scale_by_power(fma(q, r2, r) + Vec(1.0f), magic);
}

/// e^x for x <= 88; 0 below -87.3; NaN stays NaN.
PHI_INLINE Vec exp(Vec x) { return select(Vec(-87.3f) > x, Vec(0.0f), exp_in_range(x)); }

/// tanh with a relative error of about 2 units in the last place (Cephes' tanhf); NaN stays NaN.
PHI_INLINE Vec tanh(Vec x) {
  const Vec t = min(Vec(9.1f), abs(x)), s = t * t;  // 1 - tanh(9.1) is below half a unit in the last place
  Vec small(-5.70498872745e-3f);                    // polynomial of (tanh(t) / t - 1) / t² in t², for t <= 0.625
  small = fma(small, s, Vec(2.06390887954e-2f));
  small = fma(small, s, Vec(-5.37397155531e-2f));
  small = fma(small, s, Vec(1.33314422036e-1f));
  small = fma(small, s, Vec(-3.33332819422e-1f));
  small = fma(small * s, t, t);
  const Vec large = Vec(1.0f) - Vec(2.0f) / (exp_in_range(t + t) + Vec(1.0f));
  return with_sign(select(t > Vec(0.625f), large, small), x);
}

/// The error function with an absolute error of about 1e-7.
PHI_INLINE Vec erf(Vec x) {
  const Vec t = min(Vec(4.0f), abs(x)),
            s = t * t;               // 1 - erf(4) is below half a unit in the last place
  Vec small(-5.99940656684339e-4f);  // polynomial of erf(t) / t in t², for |t| <= 0.92
  small = fma(small, s, Vec(4.994830582290888e-3f));
  small = fma(small, s, Vec(-2.676771953701973e-2f));
  small = fma(small, s, Vec(0.11281845718622208f));
  small = fma(small, s, Vec(-0.3761249780654907f));
  small = fma(small, s, Vec(1.1283791065216064f)) * t;
  Vec large(-1.07631485661841e-5f);  // polynomial of log(erfc(t)) / t in t, for 0.9 <= t <= 4
  large = fma(large, t, Vec(3.180594649165869e-4f));
  large = fma(large, t, Vec(-3.6229179240763187e-3f));
  large = fma(large, t, Vec(2.3720184341073036e-2f));
  large = fma(large, t, Vec(-0.1061876118183136f));
  large = fma(large, t, Vec(-0.6351814866065979f));
  large = Vec(1.0f) - exp(fma(large, t, Vec(-1.1286410093307495f)) * t);
  return with_sign(select(t > Vec(0.91f), large, small), x);
}

/// out[c] = (or +=, with `add`) the sum over b of partial[b][c]. It is added in the order of b, so that any thread
/// count gives the same bits.
inline void reduce_blocks(const float* partial, int64_t blocks, int64_t columns, bool add, float* out, int threads) {
  parallel_for(columns, threads_for(blocks * columns, threads), [=](int64_t begin, int64_t end) {
    for_lanes(end - begin, [=](int64_t i, auto lanes) {
      Vec total = add ? load(out + begin + i, lanes) : Vec(0.0f);
      for (int64_t b = 0; b < blocks; ++b) total = total + load(partial + b * columns + begin + i, lanes);
      store(out + begin + i, total, lanes);
    });
  });
}

}  // namespace phi_fast::cpu::PHI_ISA
