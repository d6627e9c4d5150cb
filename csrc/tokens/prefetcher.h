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
  // Batches follow each other `stride` rows apart; the system is told of the rows that come `lookahead` batches later.
  // threads = 0: take() fills the batch itself.
  Prefetcher(std::shared_ptr<Reader> reader, int threads, uint64_t stride, uint64_t lookahead);
  ~Prefetcher();

  uint64_t sequence_length() const { return length_; }

  // May be called from any thread. All but close() throw std::runtime_error once close() was called.
  //
  // Queues a batch, whose memory must live until it was taken or close() has returned.
  void submit(const Batch& batch);
  // The oldest batch not yet taken, if it is full in time. Throws what went wrong in filling it, and
  // std::runtime_error while another thread is in take(): both would wait for the same batch.
  std::optional<Batch> take(std::chrono::milliseconds patience);
  // Drops what is queued, wakes who waits in take() and joins the threads. No batch's memory is written after it,
  // whichever of several callers returns first.
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

  // A forked child has no threads, and locks in whatever state they were: there the state is let go of, not destroyed.
  State* const state_;
  pid_t process_;
  const uint64_t length_;
};

}  // namespace phi_fast::tokens
