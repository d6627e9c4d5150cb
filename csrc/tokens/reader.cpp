#include "tokens/reader.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace phi_fast::tokens {
namespace {

// Returns the largest token. There are separate loops because compilers vectorise each to full store width; a single
// loop for all three reaches a fifth of the speed.
template <typename Token>
__attribute__((always_inline)) inline Token widen_row(const Token* __restrict tokens, uint64_t length,
                                                      int64_t* __restrict input_ids, int64_t* __restrict labels) {
  Token largest = tokens[length];
  for (uint64_t i = 0; i < length; ++i) largest = std::max(largest, tokens[i]);
  for (uint64_t i = 0; i < length; ++i) input_ids[i] = tokens[i];
  for (uint64_t i = 0; i < length; ++i) labels[i] = tokens[i + 1];
  return largest;
}

#if defined(__x86_64__)
// The same loops, with one instruction to widen; the plain build needs two, which write half as much.
template <typename Token>
__attribute__((target("avx2"))) Token widen_row_avx2(const Token* tokens, uint64_t length, int64_t* input_ids,
                                                     int64_t* labels) {
  return widen_row(tokens, length, input_ids, labels);
}
#endif

}  // namespace

Reader::Reader(std::vector<std::shared_ptr<TokenFile>> files, std::shared_ptr<Order> order, uint64_t id_limit,
               std::vector<int64_t> delimiters)
    : files_(std::move(files)), order_(std::move(order)), id_limit_(id_limit), delimiters_(std::move(delimiters)) {
  if (files_.size() != order_->corpora() || delimiters_.size() != files_.size()) {
    throw std::invalid_argument("one file and one delimiter are needed for each corpus");
  }
  for (const auto& file : files_) {
    if (!file) throw std::invalid_argument("one of the files is None");
  }
}

template <typename Token>
void Reader::widen(const Token* tokens, const Place& place, int64_t* input_ids, int64_t* labels) const {
  const uint64_t length = order_->sequence_length();
#if defined(__x86_64__)
  static const bool avx2 = __builtin_cpu_supports("avx2");
  const Token largest =
      avx2 ? widen_row_avx2(tokens, length, input_ids, labels) : widen_row(tokens, length, input_ids, labels);
#else
  const Token largest = widen_row(tokens, length, input_ids, labels);
#endif
  if (largest < id_limit_) return;
  const uint64_t at = std::max_element(tokens, tokens + length + 1) - tokens;
  throw std::invalid_argument(files_[place.corpus]->path() + ": token " + std::to_string(place.token + at) + " is id " +
                              std::to_string(largest) + ", and the model's vocabulary has " +
                              std::to_string(id_limit_) +
                              " ids: the corpus was made with another tokenizer or dtype, or its file is "
                              "damaged. Give the run the corpus's tokenizer, or copy or prepare it again");
}

void Reader::fill(Batch& batch) const {
  const uint64_t length = order_->sequence_length();
  std::vector<uint32_t> row(length + 1);  // small enough to stay in the first-level cache between the two passes
  for (const auto& file : files_) file->check_unchanged();
  for (uint64_t i = 0; i < batch.rows; ++i) {
    const Place place = order_->at(batch.first_row + i);
    const TokenFile& file = *files_[place.corpus];
    file.read(place.token, length + 1, row.data());
    int64_t *input_ids = batch.input_ids + i * length, *labels = batch.labels + i * length;
    if (file.width() == 2) {
      widen(reinterpret_cast<const uint16_t*>(row.data()), place, input_ids, labels);
    } else {
      widen(row.data(), place, input_ids, labels);
    }
    batch.corpora[i] = static_cast<int32_t>(place.corpus);
  }
  if (batch.positions) isolate(batch);
}

// A document starts where its delimiter is an input: the token before learns to end the last document, and the
// delimiter learns to begin the next one. So no label crosses documents, whichever side the delimiters were written on.
void Reader::isolate(Batch& batch) const {
  const uint64_t length = order_->sequence_length();
  batch.segments = 0;
  for (uint64_t i = 0; i < batch.rows; ++i) {
    const int64_t delimiter = delimiters_[batch.corpora[i]];
    int64_t position = 0;
    for (uint64_t j = 0; j < length; ++j, ++position) {
      const uint64_t at = i * length + j;
      if (j == 0 || batch.input_ids[at] == delimiter) {
        batch.cu_seqlens[batch.segments++] = static_cast<int32_t>(at);
        position = 0;
      }
      batch.positions[at] = position;
    }
  }
  batch.cu_seqlens[batch.segments] = static_cast<int32_t>(batch.rows * length);
}

void Reader::will_need(uint64_t first_row, uint64_t rows) const {
  for (uint64_t row = first_row; row < first_row + rows; ++row) {
    const Place place = order_->at(row);
    files_[place.corpus]->will_need(place.token, order_->sequence_length() + 1);
  }
}

}  // namespace phi_fast::tokens
