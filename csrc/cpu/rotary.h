// Rotary embedding (RoFormer, arXiv 2104.09864) of a pair (a, b) at position p with frequency f:
//   a' = a cos(p f) - b sin(p f),  b' = b cos(p f) + a sin(p f)
// The gradient is rotated by the opposite angle.
#pragma once
#include "cpu/vector_math.h"

namespace phi_fast::cpu::PHI_ISA {

/// Rotates the pairs (first[i], second[i]) by the angles whose cosines and sines are given.
template <class T>
PHI_INLINE void rotate_pairs(T* first, T* second, const float* cos, const float* sin, float sign, int64_t half) {
  for_lanes(half, [=](int64_t i, auto lanes) {
    const Vec c = load(cos + i, lanes), s = load(sin + i, lanes) * Vec(sign);
    const Vec a = load(first + i, lanes), b = load(second + i, lanes);
    store(first + i, fnma(b, s, a * c), lanes);
    store(second + i, fma(a, s, b * c), lanes);
  });
}

/// Like rotate_pairs, for the pairs (x[2i], x[2i + 1]).
template <class T>
void rotate_interleaved(T* x, const float* cos, const float* sin, float sign, int64_t half) {
  constexpr int64_t kChunk = 64;
  T first[kChunk], second[kChunk];
  for (int64_t start = 0; start < half; start += kChunk) {
    const int64_t count = smaller(kChunk, half - start);
    T* pairs = x + 2 * start;
    for (int64_t i = 0; i < count; ++i) first[i] = pairs[2 * i], second[i] = pairs[2 * i + 1];
    rotate_pairs(first, second, cos + start, sin + start, sign, count);
    for (int64_t i = 0; i < count; ++i) pairs[2 * i] = first[i], pairs[2 * i + 1] = second[i];
  }
}

template <class T>
void rotary_token(const Rotary& a, int64_t token) {
  const int64_t b = token / a.sequence, s = token % a.sequence;
  const int64_t position = a.positions ? a.positions[token] : a.offset + s;
  const float *cos = a.cos + position * a.half, *sin = a.sin + position * a.half;
  const float sign = a.inverse ? -1.0f : 1.0f;
  T* x = static_cast<T*>(a.x) + b * a.batch_stride + s * a.sequence_stride;
  for (int64_t h = 0; h < a.heads; ++h, x += a.head_stride) {
    if (a.interleaved) {
      rotate_interleaved(x, cos, sin, sign, a.half);
    } else {
      rotate_pairs(x, x + a.half, cos, sin, sign, a.half);
    }
  }
}

inline void rotary(const Rotary& a) {
  const int64_t tokens = a.batch * a.sequence;
  with_type(a.dtype, [&](auto type) {
    parallel_for(tokens, threads_for(tokens * a.heads * 2 * a.half, a.threads), [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) rotary_token<decltype(type)>(a, token);
    });
  });
}

}  // namespace phi_fast::cpu::PHI_ISA
