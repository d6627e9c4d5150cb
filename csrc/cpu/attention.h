// What attention's two passes share: the pieces of work, and heads packed into
// words (FlashAttention, Dao et al., arXiv 2205.14135, with a head's keys and
// values in the cache in the place of a GPU's shared memory).
#pragma once
#include "cpu/rotary.h"
#include "cpu/words.h"

namespace phi_fast::cpu::PHI_ISA {

/// Rows and keys that are taken together: their scores and both operands fit
/// the first-level cache.
inline constexpr int64_t kBlock = 64;

/// Rows of one batch entry that see each other and nothing else.
struct Segment {
  int64_t batch, start, length;
};

inline int64_t segment_count(const Attention& a) { return a.documents ? a.document_count : a.batch; }

inline Segment segment_of(const Attention& a, int64_t index) {
  if (!a.documents) return {index, 0, a.sequence};
  return {0, a.documents[index], int64_t{a.documents[index + 1]} - a.documents[index]};
}

inline int64_t longest_segment(const Attention& a) {
  int64_t longest = 0;
  for (int64_t i = 0; i < segment_count(a); ++i) {
    const int64_t length = segment_of(a, i).length;
    if (length > longest) longest = length;
  }
  return longest;
}

/// Keys that row `row` of a segment of `length` rows sees: the first so many.
inline int64_t visible_keys(const Attention& a, int64_t row, int64_t length) {
  if (row >= length) return 0;
  return a.causal ? row + 1 : length;
}

/// Rows padded with zeros to whole vectors, so that products have no ragged
/// ends.
struct Padded {
  int64_t rows, dims;

  Padded(const Attention& a, int64_t length)
      : rows(round_up(length, Vec::kLanes)), dims(round_up(a.head_dim, Vec::kLanes)) {}
  int64_t numbers() const { return rows * dims; }
};

/// Hands out pieces of a thread's scratch memory.
class Arena {
 public:
  explicit Arena(float* memory) : next_(memory) {}

  template <class Word = float>
  Word* take(int64_t words) {
    static_assert(sizeof(Word) == sizeof(float));
    Word* const piece = reinterpret_cast<Word*>(next_);
    next_ += round_up(words, 16);
    return piece;
  }
  /// What pieces of these many words take.
  template <class... Counts>
  static int64_t need(Counts... words) {
    return (round_up(words, 16) + ...);
  }

 private:
  float* next_;
};

/// Packs one head of a segment, padded with zeros. along: (rows, dims) with
/// words along the dims; across: (rows, dims) with words across rows; either
/// may be null. `rotate`: by the table, at the row's place in the segment.
template <class T, class W>
void pack(const Attention& a, const Heads& x, Segment segment, int64_t head, bool rotate, typename W::Word* along,
          typename W::Word* across) {
  const Padded padded(a, segment.length);
  constexpr int kRows = W::kPerWord;
  const Scratch memory(kRows * padded.dims);
  for (int64_t r = 0; r < padded.rows; r += kRows) {
    for (int i = 0; i < kRows; ++i) {
      float* const row = memory.data() + i * padded.dims;
      fill(row, padded.dims, 0.0f);
      if (r + i >= segment.length) continue;
      const T* from = x.row<T>(segment.batch, segment.start + r + i, head);
      for_lanes(a.head_dim, [=](int64_t d, auto lanes) { store(row + d, load(from + d, lanes), lanes); });
      if (rotate) {
        const int64_t angles = (r + i) * a.half;
        rotate_pairs(row, row + a.half, a.cos + angles, a.sin + angles, 1.0f, a.half);
      }
    }
    for (int64_t d = 0; d < padded.dims; d += Vec::kLanes) {
      Vec lanes[kRows];
      for (int i = 0; i < kRows; ++i) lanes[i] = load(memory.data() + i * padded.dims + d);
      for (int i = 0; i < kRows && along; ++i) W::along(along + (r + i) * (padded.dims / kRows), d, lanes[i]);
      if (across) W::across(across + r / kRows * padded.dims + d, lanes);
    }
  }
}

/// As pack, with words along the dims, transposed: (dims / kPerWord, rows).
/// `along` is filled on the way.
template <class T, class W>
void pack_transposed(const Attention& a, const Heads& x, Segment segment, int64_t head, bool rotate,
                     typename W::Word* along, typename W::Word* across, typename W::Word* transposed) {
  const Padded padded(a, segment.length);
  pack<T, W>(a, x, segment, head, rotate, along, across);
  transpose(along, padded.rows, padded.dims / W::kPerWord, transposed, padded.rows);
}

/// Writes a head of a segment from fp32 rows of `width`, times `factor`;
/// `rotate`: by the inverse of what pack did.
template <class T>
void unpack(const Attention& a, float* rows, int64_t width, const Heads& x, Segment segment, int64_t head, float factor,
            bool rotate) {
  for (int64_t r = 0; r < segment.length; ++r) {
    float* const row = rows + r * width;
    if (rotate) rotate_pairs(row, row + a.half, a.cos + r * a.half, a.sin + r * a.half, -1.0f, a.half);
    T* const to = x.row<T>(segment.batch, segment.start + r, head);
    for_lanes(a.head_dim, [=](int64_t i, auto lanes) { store(to + i, load(row + i, lanes) * Vec(factor), lanes); });
  }
}

}  // namespace phi_fast::cpu::PHI_ISA
