#include "tokens/prefetcher.h"

#include <unistd.h>

#include <algorithm>
#include <stdexcept>

namespace phi_fast::tokens {
namespace {

// A batch that arrives more slowly than this did not come from the page cache, which gives 1 GB/s and more.
constexpr double kCachedBytesPerSecond = 250e6;
// Announcing a cached row wastes 0.7 us, so rows are announced only for this many batches after a slow one.
constexpr int kAnnounced = 1024;
constexpr uint64_t kFarthest = uint64_t{1} << 20;  // batches: each one is a system call

}  // namespace

Prefetcher::Prefetcher(std::shared_ptr<Reader> reader, int threads, uint64_t stride, uint64_t lookahead)
    : state_(new State), process_(getpid()), length_(reader->sequence_length()) {
  state_->reader = std::move(reader);
  state_->stride = stride;
  state_->lookahead = lookahead;
  state_->threaded = threads > 0;
  try {
    if (lookahead > kFarthest) throw std::invalid_argument("lookahead is above 2^20 batches");
    for (int i = 0; i < threads; ++i) state_->threads.emplace_back([state = state_] { state->work(); });
  } catch (...) {
    close();
    delete state_;
    throw;
  }
}

Prefetcher::~Prefetcher() {
  if (process_ != getpid()) return;
  close();
  delete state_;
}

Prefetcher::State& Prefetcher::state() const {
  if (process_ != getpid()) throw std::runtime_error("the loader's threads stayed in the process that was forked");
  return *state_;
}

void Prefetcher::submit(const Batch& batch) {
  State& state = this->state();
  auto job = std::make_shared<Job>();
  job->batch = batch;
  {
    std::lock_guard lock(state.mutex);
    state.check_open();
    state.jobs.push_back(std::move(job));
  }
  state.queued.notify_one();
}

std::optional<Batch> Prefetcher::take(std::chrono::milliseconds patience) {
  State& state = this->state();
  std::unique_lock lock(state.mutex);
  state.check_open();
  if (state.taking) throw std::runtime_error("another thread is taking a batch: let one thread do it at a time");
  if (state.jobs.empty()) throw std::runtime_error("no batch was submitted");
  const std::shared_ptr<Job> job = state.jobs.front();
  if (state.threaded) {
    state.taking = true;
    const bool woken = state.filled.wait_for(lock, patience, [&] { return job->done || state.closing; });
    state.taking = false;
    state.check_open();
    if (!woken) return std::nullopt;
  } else {
    state.run(*job);
  }
  state.jobs.pop_front();
  if (job->error) std::rethrow_exception(job->error);
  return job->batch;
}

void Prefetcher::State::check_open() const {
  if (closing) throw std::runtime_error("the loader is closed");
}

void Prefetcher::State::run(Job& job) {
  const auto start = std::chrono::steady_clock::now();
  try {
    announce(job.batch);
    reader->fill(job.batch);
  } catch (...) {
    job.error = std::current_exception();
  }
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
  if (taken.count() > static_cast<double>(reader->bytes(job.batch.rows)) / kCachedBytesPerSecond) hints = kAnnounced;
}

void Prefetcher::State::announce(const Batch& batch) {
  if (hints <= 0) return;
  --hints;
  const uint64_t from = first.exchange(false) ? 1 : lookahead;
  for (uint64_t ahead = from; ahead <= lookahead; ++ahead) {
    reader->will_need(batch.first_row + ahead * stride, batch.rows);
  }
}

void Prefetcher::State::work() {
  std::unique_lock lock(mutex);
  for (;;) {
    if (closing) return;
    const auto next = std::find_if(jobs.begin(), jobs.end(), [](const auto& job) { return !job->started; });
    if (next == jobs.end()) {
      queued.wait(lock);
      continue;
    }
    const std::shared_ptr<Job> job = *next;
    job->started = true;
    lock.unlock();
    run(*job);
    lock.lock();
    job->done = true;
    filled.notify_all();
  }
}

void Prefetcher::close() {
  if (process_ != getpid()) return;
  {
    std::lock_guard lock(state_->mutex);
    state_->closing = true;
  }
  state_->queued.notify_all();
  state_->filled.notify_all();
  std::lock_guard lock(state_->joining);
  for (std::thread& thread : state_->threads) {
    if (thread.joinable()) thread.join();
  }
}

}  // namespace phi_fast::tokens
