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

__attribute__((always_inline)) inline void mask_row(const uint8_t* __restrict marks, uint64_t length,
                                                    int64_t* __restrict labels) {
  for (uint64_t i = 0; i < length; ++i) labels[i] = marks[i + 1] & kTrained ? labels[i] : kIgnored;
}

#if defined(__x86_64__)
// The same loops, with one instruction to widen; the plain build needs two, which write half as much.
template <typename Token>
__attribute__((target("avx2"))) Token widen_row_avx2(const Token* tokens, uint64_t length, int64_t* input_ids,
                                                     int64_t* labels) {
  return widen_row(tokens, length, input_ids, labels);
}

__attribute__((target("avx2"))) void mask_row_avx2(const uint8_t* marks, uint64_t length, int64_t* labels) {
  mask_row(marks, length, labels);
}
#endif

void mask(const uint8_t* marks, uint64_t length, int64_t* labels) {
#if defined(__x86_64__)
  static const bool avx2 = __builtin_cpu_supports("avx2");
  if (avx2) return mask_row_avx2(marks, length, labels);
#endif
  mask_row(marks, length, labels);
}

}  // namespace

Reader::Reader(std::vector<std::shared_ptr<TokenFile>> files, std::shared_ptr<Order> order, uint64_t id_limit,
               std::vector<int64_t> delimiters, std::vector<std::shared_ptr<TokenFile>> marks)
    : files_(std::move(files)),
      marks_(std::move(marks)),
      order_(std::move(order)),
      id_limit_(id_limit),
      delimiters_(std::move(delimiters)) {
  if (files_.size() != order_->corpora() || delimiters_.size() != files_.size()) {
    throw std::invalid_argument("one file and one delimiter are needed for each corpus");
  }
  if (marks_.empty()) marks_.resize(files_.size());
  if (marks_.size() != files_.size()) throw std::invalid_argument("marks are needed for each corpus, or for none");
  for (size_t i = 0; i < files_.size(); ++i) {
    if (!files_[i] || files_[i]->width() == 1) throw std::invalid_argument("one of the files holds no tokens");
    if (marks_[i] && (marks_[i]->width() != 1 || marks_[i]->tokens() != files_[i]->tokens())) {
      throw std::invalid_argument(marks_[i]->path() + " does not have one byte for each token of " + files_[i]->path());
    }
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
  std::vector<uint8_t> marks(length + 1);
  for (const auto& file : files_) file->check_unchanged();
  for (const auto& file : marks_) {
    if (file) file->check_unchanged();
  }
  batch.segments = 0;
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
    const bool marked = marks_[place.corpus] != nullptr;
    if (marked) {
      marks_[place.corpus]->read(place.token, length + 1, marks.data());
      mask(marks.data(), length, labels);
    }
    if (batch.positions) isolate(batch, i, marked ? marks.data() : nullptr);
  }
  if (batch.positions) batch.cu_seqlens[batch.segments] = static_cast<int32_t>(batch.rows * length);
}

// Without marks a document starts where its delimiter is an input: the token before learns to end the last document,
// and the delimiter learns to begin the next one. So no label crosses documents, whichever side the delimiters were
// written on.
void Reader::isolate(Batch& batch, uint64_t row, const uint8_t* marks) const {
  const uint64_t length = order_->sequence_length();
  const int64_t delimiter = delimiters_[batch.corpora[row]];
  int64_t position = 0;
  for (uint64_t j = 0; j < length; ++j, ++position) {
    const uint64_t at = row * length + j;
    if (j == 0 || (marks ? (marks[j] & kBegins) != 0 : batch.input_ids[at] == delimiter)) {
      batch.cu_seqlens[batch.segments++] = static_cast<int32_t>(at);
      position = 0;
    }
    batch.positions[at] = position;
  }
}

void Reader::will_need(uint64_t first_row, uint64_t rows) const {
  for (uint64_t row = first_row; row < first_row + rows; ++row) {
    const Place place = order_->at(row);
    files_[place.corpus]->will_need(place.token, order_->sequence_length() + 1);
    if (marks_[place.corpus]) marks_[place.corpus]->will_need(place.token, order_->sequence_length() + 1);
  }
}

}  // namespace phi_fast::tokens
