// Rows of the training stream, read and widened into a batch's memory.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "tokens/file.h"
#include "tokens/order.h"

namespace phi_fast::tokens {

// Bits of a token's mark. Without marks every label trains, and a document begins at each delimiter.
constexpr uint8_t kTrained = 1;  // the token is a label that counts in the loss
constexpr uint8_t kBegins = 2;   // the token is the first of its document

constexpr int64_t kIgnored = -100;  // the label of a token that is not trained

// Memory of one batch of `rows` rows, which the owner keeps alive while it is being filled.
struct Batch {
  uint64_t first_row, rows;
  int64_t* input_ids;     // (rows, sequence_length)
  int64_t* labels;        // (rows, sequence_length): the token after each of input_ids, or kIgnored
  int32_t* corpora;       // (rows,)
  int64_t* positions;     // (rows, sequence_length), or null if documents are not isolated
  int32_t* cu_seqlens;    // (rows * sequence_length + 1,), or null
  uint64_t segments = 0;  // output: entries of cu_seqlens, minus 1
  uint64_t trained = 0;   // output: labels that are not kIgnored
};

class Reader {
 public:
  // `files` are in the order of the order's corpora, as are `marks`, which are null for a corpus without; ids must be
  // below `id_limit`; documents without marks start at `delimiters[corpus]`.
  Reader(std::vector<std::shared_ptr<TokenFile>> files, std::shared_ptr<Order> order, uint64_t id_limit,
         std::vector<int64_t> delimiters, std::vector<std::shared_ptr<TokenFile>> marks);

  // Throws std::runtime_error if a file has changed, std::invalid_argument for an id that is too large.
  void fill(Batch& batch) const;
  // Asks the system to bring rows into memory, without waiting.
  void will_need(uint64_t first_row, uint64_t rows) const;
  uint64_t sequence_length() const { return order_->sequence_length(); }
  // The largest number of bytes that are read for `rows` rows.
  uint64_t bytes(uint64_t rows) const { return rows * (order_->sequence_length() + 1) * (sizeof(uint32_t) + 1); }

 private:
  // Returns how many labels of the row train; all do where `marks` is null.
  template <typename Token>
  uint64_t widen(const Token* tokens, const uint8_t* marks, const Place& place, int64_t* input_ids,
                 int64_t* labels) const;
  void isolate(Batch& batch, uint64_t row, const uint8_t* marks) const;

  std::vector<std::shared_ptr<TokenFile>> files_, marks_;
  std::shared_ptr<Order> order_;
  uint64_t id_limit_;
  std::vector<int64_t> delimiters_;
};

}  // namespace phi_fast::tokens
