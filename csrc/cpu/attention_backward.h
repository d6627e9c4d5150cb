// With P = exp(S - LSE), S = tau Q K^T and D = rowsum(dO * O) (FlashAttention-2, arXiv 2307.08691):
//   dV = P^T dO,  dP = dO V^T,  dS = P * (dP - D)
//   dQ = tau dS K,  dK = tau dS^T Q
#pragma once
#include "cpu/attention.h"

namespace phi_fast::cpu::PHI_ISA {

/// One thread's backward for a key head and the heads that share it. It computes the probabilities again from the saved
/// log-sum-exp. One thread takes all sums over rows, so that two runs give the same bits.
template <class T>
class BackwardWorker {
  using W = typename WordsOf<T>::Type;
  using Word = typename W::Word;
  static constexpr int kPer = W::kPerWord;

 public:
  using Session = typename W::Session;

  static int64_t scratch(const Attention& a, Segment longest) {
    const Padded<W> q(a, longest.length), k(a, longest.keys);
    const int64_t n = k.numbers(), m = q.numbers(), square = kBlock * kBlock;
    return Arena::need(n, n, n, n, n, n, m, m, m, m, m, m, kBlock * k.dims, q.rows, q.rows, square, square, square,
                       square, square);
  }

  BackwardWorker(const Attention& a, float* memory, Segment longest) : a_(a) {
    Arena arena(memory);
    const Padded<W> q(a, longest.length), k(a, longest.keys);
    for (Word** const place : {&along_, &keys_, &keys_across_, &values_}) *place = arena.take<Word>(k.numbers());
    for (float** const place : {&dk_, &dv_}) *place = arena.take(k.numbers());
    for (Word** const place : {&across_, &queries_, &queries_turned_, &douts_, &douts_turned_}) {
      *place = arena.take<Word>(q.numbers());
    }
    dq_ = arena.take(q.numbers());
    turned_ = arena.take(kBlock * k.dims);
    for (float** const place : {&lse_, &delta_}) *place = arena.take(q.rows);
    for (float** const place : {&scores_, &dweights_}) *place = arena.take(kBlock * kBlock);
    for (Word** const place : {&weights_across_, &dscores_, &dscores_across_}) {
      *place = arena.take<Word>(kBlock * kBlock);
    }
  }

  void run(Segment segment, int64_t key_head) {
    const Padded<W> padded(a_, segment.length), padded_keys(a_, segment.keys);
    const int64_t words = padded.dims / kPer, group = a_.heads / a_.key_heads;
    const bool rotate = a_.cos != nullptr;
    const Part keys{segment, key_head, 0, segment.keys};
    pack<T, W>(a_, a_.k, keys, rotate, along_, keys_across_);
    transpose_blocks(along_, padded_keys.rows, 1, words, keys_);
    pack<T, W>(a_, a_.v, keys, false, along_, nullptr);
    transpose_blocks(along_, padded_keys.rows, 1, words, values_);
    fill(dk_, padded_keys.numbers(), 0.0f);
    fill(dv_, padded_keys.numbers(), 0.0f);
    for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
      const Part queries{segment, head, 0, segment.length, segment.keys - segment.length};
      pack<T, W>(a_, a_.q, queries, rotate, queries_, across_);
      transpose_blocks(across_, padded.rows, kPer, padded.dims, queries_turned_);
      pack<T, W>(a_, a_.dout, queries, false, douts_, across_);
      transpose_blocks(across_, padded.rows, kPer, padded.dims, douts_turned_);
      row_statistics(segment, head, padded.rows);
      fill(dq_, padded.numbers(), 0.0f);
      for (int64_t key = 0; key < segment.keys; key += kBlock) {
        const Span rows = seeing_rows(a_, segment, {key, smaller(key + kBlock, segment.keys)});
        for (int64_t row = round_down(rows.first, kBlock); row < rows.end; row += kBlock) {
          block(segment, smaller(kBlock, padded.rows - row), smaller(kBlock, padded_keys.rows - key), row, key);
        }
      }
      unpack<T>(a_, dq_, padded.dims, a_.dq, queries, a_.scale, rotate);
    }
    for (int64_t key = 0; key < segment.keys; key += kBlock) {
      const Part part{segment, key_head, key, smaller(kBlock, segment.keys - key)};
      unpack_turned(dk_, part, padded.dims, a_.dk, a_.scale, rotate);
      unpack_turned(dv_, part, padded.dims, a_.dv, 1.0f, false);
    }
  }

 private:
  /// Writes a block of a gradient that is stored transposed, (dims, kBlock).
  void unpack_turned(const float* gradient, Part part, int64_t dims, const Heads& to, float factor, bool rotate) {
    transpose(gradient + part.first * dims, dims, kBlock, turned_);
    unpack<T>(a_, turned_, dims, to, part, factor, rotate);
  }

  /// Loads lse, and computes dout · out, which the gradient of the softmax subtracts.
  void row_statistics(Segment segment, int64_t head, int64_t padded_rows) {
    const float* lse = a_.lse + (segment.batch * a_.heads + head) * a_.sequence + segment.start;
    for (int64_t r = 0; r < padded_rows; ++r) {
      lse_[r] = delta_[r] = 0.0f;
      if (r >= segment.length) continue;
      const T* out = a_.out.row<T>(segment.batch, segment.start + r, head);
      const T* dout = a_.dout.row<T>(segment.batch, segment.start + r, head);
      Vec sum(0.0f);
      for_lanes(a_.head_dim,
                [&](int64_t i, auto lanes) { sum = fma(load(out + i, lanes), load(dout + i, lanes), sum); });
      lse_[r] = lse[r];
      delta_[r] = PHI_ISA::sum(sum);
    }
  }

  /// Adds the contribution of `rows` rows from `row` on and `columns` keys from `key` on to dq, dk and dv. dk and dv
  /// are summed transposed, so that the products read both operands in the layout they already have.
  void block(Segment segment, int64_t rows, int64_t columns, int64_t row, int64_t key) {
    const int64_t dims = Padded<W>(a_, 0).dims, words = dims / kPer, turned = row * dims / kPer;
    constexpr int64_t kWords = kBlock / kPer;
    multiply<W, false>(rows, columns, words, queries_ + row * words, words, keys_ + key * words, kBlock, scores_,
                       kBlock);
    multiply<W, false>(rows, columns, words, douts_ + row * words, words, values_ + key * words, kBlock, dweights_,
                       kBlock);
    for (int64_t r = 0; r < rows; r += kPer) softmax_gradient(segment, row, key, r, columns);
    multiply<W, true>(dims, columns, rows / kPer, douts_turned_ + turned, kWords, weights_across_, kBlock,
                      dv_ + key * dims, kBlock);
    multiply<W, true>(dims, columns, rows / kPer, queries_turned_ + turned, kWords, dscores_across_, kBlock,
                      dk_ + key * dims, kBlock);
    multiply<W, true>(rows, dims, columns / kPer, dscores_, kWords, keys_across_ + key / kPer * dims, dims,
                      dq_ + row * dims, dims);
  }

  /// Computes weights and score gradients (before the scale) of kPer rows from row + r on. Those of hidden keys are 0.
  void softmax_gradient(Segment segment, int64_t row, int64_t key, int64_t r, int64_t columns) {
    Span visible[kPer];
    for (int i = 0; i < kPer; ++i) visible[i] = visible_keys(a_, segment, row + r + i);
    const Vec scale(a_.scale);
    for (int64_t j = 0; j < columns; j += Vec::kLanes) {
      Vec weights[kPer], dscores[kPer];
      for (int i = 0; i < kPer; ++i) {
        const int64_t at = (r + i) * kBlock + j;
        const Vec weight = exp(fma(load(scores_ + at), scale, Vec(-lse_[row + r + i])));
        const Vec dscore = weight * (load(dweights_ + at) - Vec(delta_[row + r + i]));
        const int64_t seen = visible[i].end - key - j, hidden = visible[i].first - key - j;
        if (seen >= Vec::kLanes) {
          weights[i] = weight, dscores[i] = dscore;
        } else if (seen > 0) {
          weights[i] = keep(tail(int(seen)), weight), dscores[i] = keep(tail(int(seen)), dscore);
        } else {
          weights[i] = dscores[i] = Vec(0.0f);
        }
        if (hidden > 0) weights[i] = without(hidden, weights[i]), dscores[i] = without(hidden, dscores[i]);
        W::along(dscores_ + (r + i) * (kBlock / kPer), j, dscores[i]);
      }
      W::across(weights_across_ + r / kPer * kBlock + j, weights);
      W::across(dscores_across_ + r / kPer * kBlock + j, dscores);
    }
  }

  /// x with 0 in the first `count` lanes, or in all lanes if there are fewer.
  static Vec without(int64_t count, Vec x) {
    float lanes[Vec::kLanes];
    store(lanes, x);
    for (int64_t i = 0; i < smaller(count, Vec::kLanes); ++i) lanes[i] = 0.0f;
    return load(lanes);
  }

  const Attention& a_;
  Word *along_, *across_, *keys_, *keys_across_, *values_, *queries_, *queries_turned_, *douts_, *douts_turned_;
  Word *weights_across_, *dscores_, *dscores_across_;
  float *dq_, *dk_, *dv_, *turned_, *lse_, *delta_, *scores_, *dweights_;
};

inline void attention_backward(const Attention& a) {
  with_type(a.dtype, [&](auto type) {
    using Worker = BackwardWorker<decltype(type)>;
    const int64_t heads = segment_count(a) * a.key_heads,
                  work = a.batch * larger(a.sequence, a.keys) * a.heads * a.head_dim;
    const Segment longest = longest_segment(a);
    if (heads == 0) return;
    const int threads = threads_for(work, a.threads);
    const int64_t each = Worker::scratch(a, longest);
    const Scratch memory(each * threads);
    parallel_items(heads, threads, [&](int64_t item, int thread) {
      [[maybe_unused]] const typename Worker::Session session;
      Worker worker(a, memory.data() + thread * each, longest);
      worker.run(segment_of(a, item / a.key_heads), item % a.key_heads);
    });
  });
}

}  // namespace phi_fast::cpu::PHI_ISA
