// The parts that attention's two passes share: the division of the work, and packing heads into words. The algorithm is
// FlashAttention (Dao et al., arXiv 2205.14135) with the keys and values of a head in the cache instead of a GPU's
// shared memory.
#pragma once
#include "cpu/rotary.h"
#include "cpu/words.h"

namespace phi_fast::cpu::PHI_ISA {

/// Number of rows and of keys in a block: their scores and both operands fit the first-level cache.
inline constexpr int64_t kBlock = 64;

/// Rows of one batch entry, and the keys that they can see, both from `start` on.
struct Segment {
  int64_t batch, start, length, keys;
};

inline int64_t segment_count(const Attention& a) { return a.documents ? a.document_count : a.batch; }

inline Segment segment_of(const Attention& a, int64_t index) {
  if (!a.documents) return {index, 0, a.sequence, a.keys};
  const int64_t length = int64_t{a.documents[index + 1]} - a.documents[index];
  return {0, a.documents[index], length, length};
}

inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/// The largest number of rows and of keys of any segment.
inline Segment longest_segment(const Attention& a) {
  Segment longest{0, 0, 0, 0};
  for (int64_t i = 0; i < segment_count(a); ++i) {
    const Segment segment = segment_of(a, i);
    longest.length = larger(longest.length, segment.length);
    longest.keys = larger(longest.keys, segment.keys);
  }
  return longest;
}

/// Positions first … end - 1 in a segment; first <= end.
struct Span {
  int64_t first, end;
};

/// Keys that row `row` of a segment sees. Neither end decreases from one row to the next.
inline Span visible_keys(const Attention& a, Segment segment, int64_t row) {
  if (row >= segment.length) return {0, 0};
  return {larger(0, row + a.least), larger(0, smaller(segment.keys, row + a.most + 1))};
}

/// Rows of a segment that see at least one of the keys first … end - 1.
inline Span seeing_rows(const Attention& a, Segment segment, Span keys) {
  const int64_t first = larger(0, keys.first - a.most);
  return {first, larger(first, smaller(segment.length, keys.end - a.least))};
}

inline int64_t round_down(int64_t count, int64_t multiple) { return count / multiple * multiple; }

/// Numbers of rows and dims, padded with zeros to the multiple that the products need.
template <class W>
struct Padded {
  int64_t rows, dims;

  Padded(const Attention& a, int64_t length)
      : rows(round_up(length, W::kGrain)), dims(round_up(a.head_dim, W::kGrain)) {}
  /// Count of numbers, with rows rounded up to whole blocks.
  int64_t numbers() const { return round_up(rows, kBlock) * dims; }
};

/// Divides a thread's scratch memory into pieces.
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
  /// Size of the memory for pieces of these numbers of words.
  template <class... Counts>
  static int64_t need(Counts... words) {
    return (round_up(words, 16) + ...);
  }

 private:
  float* next_;
};

/// Rows first … first + count - 1 of one head in a segment.
struct Part {
  Segment segment;
  int64_t head, first, count;
  int64_t shift = 0;  // a row's position for the rotation, minus its position in the segment
};

inline void rotate_row(const Attention& a, float* row, int64_t position, float direction) {
  const int64_t at = position * a.half;
  rotate_pairs(row, row + a.half, a.cos + at, a.sin + at, direction, a.half);
}

/// Packs a part, padded with zeros to a multiple of W::kGrain rows, as (rows, dims): into `along` with words along the
/// dims, and into `across` with words across rows. Either may be null. With `rotate`, each row is rotated by the table
/// at its position in the segment plus the part's shift.
template <class T, class W>
void pack(const Attention& a, const Heads& x, Part part, bool rotate, typename W::Word* along,
          typename W::Word* across) {
  const Padded<W> padded(a, part.count);
  constexpr int kRows = W::kPerWord;
  const Scratch memory(kRows * padded.dims);
  for (int64_t r = 0; r < padded.rows; r += kRows) {
    for (int i = 0; i < kRows; ++i) {
      float* const row = memory.data() + i * padded.dims;
      const int64_t there = r + i < part.count ? a.head_dim : 0, place = part.first + r + i;
      fill(row + there, padded.dims - there, 0.0f);
      if (there == 0) continue;
      const T* from = x.row<T>(part.segment.batch, part.segment.start + place, part.head);
      for_lanes(there, [=](int64_t d, auto lanes) { store(row + d, load(from + d, lanes), lanes); });
      if (rotate) rotate_row(a, row, place + part.shift, 1.0f);
    }
    for (int64_t d = 0; d < padded.dims; d += Vec::kLanes) {
      Vec lanes[kRows];
      for (int i = 0; i < kRows; ++i) lanes[i] = load(memory.data() + i * padded.dims + d);
      for (int i = 0; i < kRows && along; ++i) W::along(along + (r + i) * (padded.dims / kRows), d, lanes[i]);
      if (across) W::across(across + r / kRows * padded.dims + d, lanes);
    }
  }
}

/// Rearranges packed words into blocks of kBlock rows, each stored transposed in one piece. The words of a block are
/// (rows, columns), or (rows / per, columns) if a word holds `per` rows. No row of a product's operand is then longer
/// than a page; rows a power of two apart would compete for few lines of the first-level cache.
template <class Word>
void transpose_blocks(const Word* from, int64_t rows, int64_t per, int64_t columns, Word* to) {
  for (int64_t row = 0; row < rows; row += kBlock) {
    const int64_t at = row / per * columns;
    transpose(from + at, kBlock / per, columns, to + at);
  }
}

/// Writes a part from fp32 rows of `width`, multiplied by `factor`. With `rotate`, it undoes the rotation of `pack`.
template <class T>
void unpack(const Attention& a, float* rows, int64_t width, const Heads& x, Part part, float factor, bool rotate) {
  for (int64_t r = 0; r < part.count; ++r) {
    float* const row = rows + r * width;
    const int64_t place = part.first + r;
    if (rotate) rotate_row(a, row, place + part.shift, -1.0f);
    T* const to = x.row<T>(part.segment.batch, part.segment.start + place, part.head);
    for_lanes(a.head_dim, [=](int64_t i, auto lanes) { store(to + i, load(row + i, lanes) * Vec(factor), lanes); });
  }
}

}  // namespace phi_fast::cpu::PHI_ISA
