#include "tokens/order.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

#include "tokens/permutation.h"

namespace phi_fast::tokens {
namespace {

constexpr uint64_t kLongestPeriod = uint64_t{1} << 20;  // a table of 8 MB, built in milliseconds
constexpr uint64_t kPhase = 0x7068617365ULL;            // "phase": makes the offset's key differ from the shuffle's

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

}  // namespace

std::vector<uint32_t> chairman(const std::vector<uint64_t>& weights) {
  std::vector<uint32_t> taking_part;
  uint64_t period = 0;
  for (uint32_t i = 0; i < weights.size(); ++i) {
    if (weights[i]) taking_part.push_back(i);
    period += std::min(weights[i], kLongestPeriod + 1);  // so that no sum wraps
  }
  const uint64_t n = taking_part.size();
  if (n == 0) refuse("all weights of a stage are 0");
  if (period > kLongestPeriod) {
    refuse("the weights, divided by their greatest common divisor, add up to more than 2^20: round them");
  }
  if (n == 1) return std::vector<uint32_t>(period, taking_part[0]);

  const uint64_t m = 2 * n - 2;
  std::vector<uint64_t> given(weights.size(), 0);
  std::vector<uint32_t> slots(period);
  for (uint64_t slot = 0; slot < period; ++slot) {
    // Among the corpora whose deficit (slot+1) * w/period - given is at least 1/m, take the one whose deficit would
    // reach 1 - 1/m first, at time ((m-1) + m * given) / (m * w) of a period. All in integers: a sum here stays below
    // 2^63.
    int64_t best = -1;
    uint64_t best_due = 0, best_weight = 1;
    for (const uint32_t i : taking_part) {
      const uint64_t owed = (slot + 1) * weights[i] * m, had = (given[i] * m + 1) * period;
      if (owed < had) continue;
      const uint64_t due = m * given[i] + m - 1;
      if (best < 0 || due * best_weight < best_due * weights[i]) {
        best = i;
        best_due = due;
        best_weight = weights[i];
      }
    }
    slots[slot] = static_cast<uint32_t>(best);
    ++given[best];
  }
  return slots;
}

Order::Order(std::vector<Corpus> corpora, std::vector<Stage> stages, uint64_t sequence_length, uint64_t seed)
    : corpora_(std::move(corpora)), sequence_length_(sequence_length), seed_(seed) {
  if (corpora_.empty() || corpora_.size() > 65536) refuse("a mixture has 1 to 65536 corpora");
  if (sequence_length < 1 || sequence_length > uint64_t{1} << 40) refuse("sequence_length must be in 1 ... 2^40");
  for (const Corpus& corpus : corpora_) {
    if (corpus.tokens >= uint64_t{1} << 60) refuse("a corpus has more than 2^60 tokens");
    if (corpus.tokens < sequence_length + 1) {
      refuse("a corpus of " + std::to_string(corpus.tokens) + " tokens is shorter than one row of " +
             std::to_string(sequence_length) + " + 1");
    }
    if (corpus.packed) {
      rows_.push_back((corpus.tokens - 1) / sequence_length);
      phases_.push_back(1);
      continue;
    }
    // One row less than fits, if there are several, so that every epoch can start at any offset within a row's length.
    const uint64_t rows = corpus.tokens / sequence_length > 1 ? corpus.tokens / sequence_length - 1 : 1;
    const uint64_t spare = corpus.tokens - 1 - rows * sequence_length;
    rows_.push_back(rows);
    phases_.push_back(spare < sequence_length ? spare + 1 : sequence_length);
  }
  if (stages.empty() || stages[0].start_row != 0) refuse("the first stage must start at row 0");
  for (const Stage& stage : stages) add_stage(stage);
}

void Order::add_stage(const Stage& stage) {
  if (stage.weights.size() != corpora_.size()) refuse("a stage needs one weight for each corpus");
  if (!periods_.empty() && stage.start_row <= periods_.back().start_row) refuse("stages must start at ascending rows");
  if (stage.start_row >= uint64_t{1} << 62) refuse("a stage starts beyond row 2^62");
  uint64_t divisor = 0;
  for (const uint64_t weight : stage.weights) divisor = std::gcd(divisor, weight);

  Period next{stage.start_row, stage.weights, std::vector<uint64_t>(corpora_.size(), 0), {}};
  for (uint64_t& weight : next.weights) weight /= divisor ? divisor : 1;
  std::vector<uint32_t> seen(corpora_.size(), 0);
  for (const uint32_t corpus : chairman(next.weights)) next.slots.push_back({corpus, seen[corpus]++});
  if (!periods_.empty()) {
    const Period& last = periods_.back();
    const uint64_t rows = stage.start_row - last.start_row, whole = rows / last.slots.size();
    for (size_t i = 0; i < corpora_.size(); ++i) next.base[i] = last.base[i] + whole * last.weights[i];
    for (uint64_t slot = 0; slot < rows % last.slots.size(); ++slot) ++next.base[last.slots[slot].corpus];
  }
  periods_.push_back(std::move(next));
}

Place Order::at(uint64_t row) const {
  if (row >= uint64_t{1} << 62) refuse("row " + std::to_string(row) + " is beyond 2^62");
  size_t stage = periods_.size() - 1;
  while (periods_[stage].start_row > row) --stage;
  const Period& period = periods_[stage];
  const uint64_t since = row - period.start_row;
  const Slot slot = period.slots[since % period.slots.size()];

  Place place;
  place.corpus = slot.corpus;
  place.rank = period.base[slot.corpus] + since / period.slots.size() * period.weights[slot.corpus] + slot.rank;
  const uint64_t n = rows_[slot.corpus];
  place.epoch = place.rank / n;
  const uint64_t key = combine(combine(mix(seed_), corpora_[slot.corpus].key), place.epoch);
  place.row = Permutation(n, key)(place.rank % n);
  const uint64_t phase = combine(key, kPhase) % phases_[slot.corpus];  // few phases: the modulo has a bias below 2^-24
  place.token = phase + place.row * sequence_length_;
  return place;
}

}  // namespace phi_fast::tokens
