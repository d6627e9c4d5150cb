// O = P V with P = softmax(S), S = tau Q K^T, over blocks of keys (FlashAttention-2, arXiv 2307.08691). For each row, m
// is the maximum so far and l the sum so far; a block with the new maximum m' updates
//   O = O exp(m - m') + exp(S - m') V,  l = l exp(m - m') + sum(exp(S - m'))
// and at the end O = O / l, LSE = m + log(l).
#pragma once
#include <cmath>
#include <limits>

#include "cpu/attention.h"

namespace phi_fast::cpu::PHI_ISA {

/// One thread's forward. It packs the keys and values of a head once, then multiplies one block of queries at a time
/// with every block of keys that it sees.
template <class T>
class ForwardWorker {
  using W = typename WordsOf<T>::Type;
  using Word = typename W::Word;
  static constexpr int64_t kPer = W::kPerWord;

 public:
  using Session = typename W::Session;

  static int64_t scratch(const Attention& a, Segment longest) {
    const Padded<W> all(a, longest.keys), block(a, kBlock);
    return Arena::need(all.numbers(), all.numbers(), all.numbers(), block.numbers(), kBlock * kBlock, kBlock * kBlock,
                       block.numbers(), kBlock, kBlock, kBlock, kBlock);
  }

  ForwardWorker(const Attention& a, float* memory, Segment longest) : a_(a) {
    Arena arena(memory);
    const Padded<W> all(a, longest.keys), block(a, kBlock);
    keys_along_ = arena.take<Word>(all.numbers());
    keys_ = arena.take<Word>(all.numbers());
    values_ = arena.take<Word>(all.numbers());
    queries_ = arena.take<Word>(block.numbers());
    scores_ = arena.take(kBlock * kBlock);
    weights_ = arena.take<Word>(kBlock * kBlock);
    out_ = arena.take(block.numbers());
    for (float** const place : {&max_, &larger_, &shrink_, &sum_}) *place = arena.take(kBlock);
  }

  /// Computes the query blocks first, first + step, … of every head that shares this key head.
  void run(Segment segment, int64_t key_head, int64_t first, int64_t step) {
    if (segment.length == 0) return;
    // Keys before the first row's window are not packed at all.
    packed_from_ = round_down(visible_keys(a_, segment, 0).first, kBlock);
    const Part keys{segment, key_head, packed_from_, segment.keys - packed_from_};
    const Padded<W> padded(a_, keys.count);
    pack<T, W>(a_, a_.k, keys, a_.cos != nullptr, keys_along_, nullptr);
    transpose_blocks(keys_along_, padded.rows, 1, padded.dims / kPer, keys_);
    pack<T, W>(a_, a_.v, keys, false, nullptr, values_);
    const int64_t group = a_.heads / a_.key_heads;
    for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
      for (int64_t start = first * kBlock; start < segment.length; start += step * kBlock) {
        const int64_t count = smaller(kBlock, segment.length - start);
        query_block({segment, head, start, count, segment.keys - segment.length}, padded);
      }
    }
  }

 private:
  void query_block(Part part, Padded<W> padded) {
    const Segment segment = part.segment;
    const int64_t rows = Padded<W>(a_, part.count).rows, words = padded.dims / kPer;
    pack<T, W>(a_, a_.q, part, a_.cos != nullptr, queries_, nullptr);
    fill(out_, rows * padded.dims, 0.0f);
    // The lowest finite number: a row whose scores are all -inf keeps it, and its sum is then 0.
    fill(max_, kBlock, std::numeric_limits<float>::lowest());
    fill(sum_, kBlock, 0.0f);
    const int64_t first = round_down(visible_keys(a_, segment, part.first).first, kBlock);
    const int64_t end = visible_keys(a_, segment, part.first + part.count - 1).end;
    for (int64_t key = first; key < end; key += kBlock) {
      const int64_t at = key - packed_from_, columns = smaller(kBlock, padded.rows - at);
      multiply<W, false>(rows, columns, words, queries_, words, keys_ + at * words, kBlock, scores_, kBlock);
      for (int64_t r = 0; r < rows; ++r) {
        const Span seen = visible_keys(a_, segment, part.first + r);
        find_maximum(r, {seen.first - key, seen.end - key}, columns);
      }
      shrink_to_maximum(rows, padded.dims);
      for (int64_t r = 0; r < rows; ++r) weigh(r, columns);
      multiply<W, true>(rows, padded.dims, columns / kPer, weights_, kBlock / kPer, values_ + at / kPer * padded.dims,
                        padded.dims, out_, padded.dims);
    }
    float* const lse = a_.lse + (segment.batch * a_.heads + part.head) * a_.sequence + segment.start + part.first;
    for (int64_t r = 0; r < part.count; ++r) {
      lse[r] = max_[r] * a_.scale + std::log(sum_[r]);  // -inf if the row sees no key
      const Part row{segment, part.head, part.first + r, 1};
      const Span seen = visible_keys(a_, segment, row.first);
      const float factor = seen.first == seen.end ? 0.0f : 1 / sum_[r];
      unpack<T>(a_, out_ + r * padded.dims, padded.dims, a_.out, row, factor, false);
    }
  }

  /// Finds the row's maximum including this block's keys. The row sees the keys of the span; the scores of the others
  /// become -inf.
  void find_maximum(int64_t r, Span seen, int64_t columns) {
    float* const scores = scores_ + r * kBlock;
    constexpr float kHidden = -std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < smaller(seen.first, columns); ++i) scores[i] = kHidden;
    for (int64_t i = larger(0, seen.end); i < columns; ++i) scores[i] = kHidden;
    Vec top(max_[r]);
    for (int64_t i = 0; i < columns; i += Vec::kLanes) top = max(load(scores + i), top);
    larger_[r] = max(top);
  }

  /// Rescales the sums and outputs so far to the new maxima of all rows.
  void shrink_to_maximum(int64_t rows, int64_t dims) {
    for (int64_t r = 0; r < rows; r += Vec::kLanes) {
      const Vec larger = load(larger_ + r), shrink = exp((load(max_ + r) - larger) * Vec(a_.scale));
      store(sum_ + r, load(sum_ + r) * shrink);
      store(shrink_ + r, shrink);
    }
    for (int64_t r = 0; r < rows; ++r) {
      if (larger_[r] == max_[r]) continue;
      float* const out = out_ + r * dims;
      for (int64_t i = 0; i < dims; i += Vec::kLanes) store(out + i, load(out + i) * Vec(shrink_[r]));
      max_[r] = larger_[r];
    }
  }

  /// Computes the weights of this block's keys, and adds them to the row's sum.
  void weigh(int64_t r, int64_t columns) {
    const float* const scores = scores_ + r * kBlock;
    const Vec largest(max_[r]), scale(a_.scale);
    Vec sum(0.0f);
    Word* const weights = weights_ + r * (kBlock / kPer);
    for (int64_t i = 0; i < columns; i += Vec::kLanes) {
      const Vec e = exp((load(scores + i) - largest) * scale);
      sum = sum + e;
      W::along(weights, i, e);
    }
    sum_[r] += PHI_ISA::sum(sum);
  }

  const Attention& a_;
  int64_t packed_from_ = 0;
  Word *keys_along_, *keys_, *values_, *queries_, *weights_;
  float *scores_, *out_, *max_, *larger_, *shrink_, *sum_;
};

inline void attention_forward(const Attention& a) {
  with_type(a.dtype, [&](auto type) {
    using Worker = ForwardWorker<decltype(type)>;
    const int64_t heads = segment_count(a) * a.key_heads,
                  work = a.batch * larger(a.sequence, a.keys) * a.heads * a.head_dim;
    const Segment longest = longest_segment(a);
    if (heads == 0 || longest.length == 0) return;
    const int threads = threads_for(work, a.threads);
    // If there are too few heads for the threads, heads are divided; each part packs the keys again.
    const int64_t blocks = round_up(longest.length, kBlock) / kBlock;
    const int64_t cuts = threads == 1 ? 1 : smaller(blocks, (4 * threads + heads - 1) / heads);
    const int64_t each = Worker::scratch(a, longest);
    const Scratch memory(each * threads);
    parallel_items(heads * cuts, threads, [&](int64_t item, int thread) {
      [[maybe_unused]] const typename Worker::Session session;
      Worker worker(a, memory.data() + thread * each, longest);
      worker.run(segment_of(a, item / cuts / a.key_heads), item / cuts % a.key_heads, item % cuts, cuts);
    });
  });
}

}  // namespace phi_fast::cpu::PHI_ISA
