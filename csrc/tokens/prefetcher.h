// Threads that fill batches ahead of the training loop.
#pragma once
#include <sys/types.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "tokens/reader.h"

namespace phi_fast::tokens {

class Prefetcher {
 public:
  // Batches follow each other `stride` rows apart. Rows are announced to the system `lookahead` batches ahead. With
  // threads = 0, take() fills the batch itself.
  Prefetcher(std::shared_ptr<Reader> reader, int threads, uint64_t stride, uint64_t lookahead);
  ~Prefetcher();

  uint64_t sequence_length() const { return length_; }

  // These may be called from any thread. All except close() throw std::runtime_error after close() was called.
  //
  // Queues a batch, whose memory must live until the batch is taken or close() has returned.
  void submit(const Batch& batch);
  // The oldest batch not yet taken, or nothing if it is not filled in time. Throws the error that occurred while
  // filling it, and std::runtime_error while another thread is in take(), because both would wait for the same batch.
  std::optional<Batch> take(std::chrono::milliseconds patience);
  // Drops the queued batches, wakes a thread that waits in take(), and joins the threads. After any call has returned,
  // no batch's memory is written, even if several threads call it.
  void close();

 private:
  struct Job {
    Batch batch;
    bool started = false, done = false;
    std::exception_ptr error;
  };

  struct State {
    std::shared_ptr<Reader> reader;
    uint64_t stride, lookahead;
    std::mutex mutex;
    std::condition_variable queued, filled;
    std::deque<std::shared_ptr<Job>> jobs;  // in the order of submit
    bool closing = false, taking = false;
    std::mutex joining;         // held while threads are joined
    std::atomic<int> hints{1};  // batches still to be announced to the system
    std::atomic<bool> first{true};
    std::vector<std::thread> threads;
    bool threaded = false;

    void check_open() const;
    void work();
    void run(Job& job);
    void announce(const Batch& batch);
  };

  State& state() const;

  // A forked child has none of the threads, and its locks are in an arbitrary state: there the state is not destroyed.
  State* const state_;
  pid_t process_;
  const uint64_t length_;
};

}  // namespace phi_fast::tokens
