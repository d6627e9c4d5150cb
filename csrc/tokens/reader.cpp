#include "tokens/reader.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace phi_fast::tokens {
namespace {

// What one row holds besides its tokens: the largest of them, and how many of its labels train.
struct Row {
  uint64_t largest, trained;
};

// There are separate loops because compilers vectorise each to full store width; a single loop for all reaches a fifth
// of the speed.
template <typename Token>
__attribute__((always_inline)) inline Row widen_row(const Token* __restrict tokens, const uint8_t* __restrict marks,
                                                    uint64_t length, int64_t* __restrict input_ids,
                                                    int64_t* __restrict labels) {
  Token largest = tokens[length];
  for (uint64_t i = 0; i < length; ++i) largest = std::max(largest, tokens[i]);
  for (uint64_t i = 0; i < length; ++i) input_ids[i] = tokens[i];
  if (marks == nullptr) {
    for (uint64_t i = 0; i < length; ++i) labels[i] = tokens[i + 1];
    return {largest, length};
  }
  uint32_t trained = 0;
  for (uint64_t i = 0; i < length; ++i) trained += marks[i + 1] & kTrained;
  for (uint64_t i = 0; i < length; ++i) labels[i] = marks[i + 1] & kTrained ? int64_t{tokens[i + 1]} : kIgnored;
  return {largest, trained};
}

#if defined(__x86_64__)
// The same loops, with one instruction to widen; the plain build needs two, which write half as much.
template <typename Token>
__attribute__((target("avx2"))) Row widen_row_avx2(const Token* tokens, const uint8_t* marks, uint64_t length,
                                                   int64_t* input_ids, int64_t* labels) {
  return widen_row(tokens, marks, length, input_ids, labels);
}
#endif

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
uint64_t Reader::widen(const Token* tokens, const uint8_t* marks, const Place& place, int64_t* input_ids,
                       int64_t* labels) const {
  const uint64_t length = order_->sequence_length();
#if defined(__x86_64__)
  static const bool avx2 = __builtin_cpu_supports("avx2");
  const auto [largest, trained] = avx2 ? widen_row_avx2(tokens, marks, length, input_ids, labels)
                                       : widen_row(tokens, marks, length, input_ids, labels);
#else
  const auto [largest, trained] = widen_row(tokens, marks, length, input_ids, labels);
#endif
  if (largest < id_limit_) return trained;
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
  batch.segments = batch.trained = 0;
  for (uint64_t i = 0; i < batch.rows; ++i) {
    const Place place = order_->at(batch.first_row + i);
    const TokenFile& file = *files_[place.corpus];
    file.read(place.token, length + 1, row.data());
    const uint8_t* of_row = nullptr;
    if (marks_[place.corpus]) {
      marks_[place.corpus]->read(place.token, length + 1, marks.data());
      of_row = marks.data();
    }
    int64_t *input_ids = batch.input_ids + i * length, *labels = batch.labels + i * length;
    batch.trained += file.width() == 2
                         ? widen(reinterpret_cast<const uint16_t*>(row.data()), of_row, place, input_ids, labels)
                         : widen(row.data(), of_row, place, input_ids, labels);
    batch.corpora[i] = static_cast<int32_t>(place.corpus);
    if (batch.positions) isolate(batch, i, of_row);
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
