// The order of the training stream: which tokens row g holds, as a pure function of (seed, mixture, g).
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace phi_fast::tokens {

struct Corpus {
  uint64_t key;     // hash of its name, so that two corpora of the same size are shuffled differently
  uint64_t tokens;  // in its file
  // Its documents were packed into rows of sequence_length tokens, so that each row is one of these and no other
  // window.
  bool packed = false;
};

// From `start_row` on, corpus i contributes weights[i] of every sum(weights) rows.
struct Stage {
  uint64_t start_row;
  std::vector<uint64_t> weights;
};

struct Place {
  uint32_t corpus;
  uint64_t rank;   // number of this corpus's rows that came before
  uint64_t epoch;  // rank / rows of the corpus
  uint64_t row;    // which of the corpus's rows, in file order
  uint64_t token;  // its first token; it holds sequence_length + 1, the last being the next row's first
};

// Tijdeman's chairman assignment for one period (sum of weights) of slots: in every prefix of m slots, corpus i has
// m * weights[i] / sum slots to within 1 - 1/(2n-2). Tijdeman, "The chairman assignment problem", 1980.
std::vector<uint32_t> chairman(const std::vector<uint64_t>& weights);

class Order {
 public:
  // Throws std::invalid_argument for corpora, stages or lengths that cannot be ordered.
  Order(std::vector<Corpus> corpora, std::vector<Stage> stages, uint64_t sequence_length, uint64_t seed);

  Place at(uint64_t row) const;
  uint64_t rows(uint32_t corpus) const { return rows_.at(corpus); }  // in one epoch
  uint64_t sequence_length() const { return sequence_length_; }
  size_t corpora() const { return corpora_.size(); }

 private:
  struct Slot {
    uint32_t corpus;
    uint32_t rank;  // of this slot among the period's slots of this corpus
  };
  struct Period {
    uint64_t start_row;
    std::vector<uint64_t> weights;  // divided by their greatest common divisor
    std::vector<uint64_t> base;     // rows of each corpus before start_row
    std::vector<Slot> slots;
  };

  void add_stage(const Stage& stage);

  std::vector<Corpus> corpora_;
  std::vector<Period> periods_;
  std::vector<uint64_t> rows_, phases_;
  uint64_t sequence_length_, seed_;
};

}  // namespace phi_fast::tokens
