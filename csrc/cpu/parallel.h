// Work split over the threads torch already has.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace phi_fast::cpu {

using Task = void (*)(void* context, int thread, int threads);

/// Calls task(context, i, n) for i = 0 … n - 1 in n <= `threads` threads and
/// returns when all are done.
///
/// Where an OpenMP runtime with GCC's entry points is in the process, as
/// torch's is on Linux, its threads do the work: a pool of our own would wake
/// while torch's still spins, on the same cores. Otherwise threads are started
/// for the call.
void run_parallel(int threads, Task task, void* context);

/// "openmp" or "std::thread": what run_parallel uses.
const char* parallel_backend();

/// `available`, or 1 where there is too little work to wake another thread for.
/// Never between: libgomp ends the threads that a smaller team leaves out, and
/// the next larger one starts them again.
inline int threads_for(int64_t elements, int available) { return elements < 16384 ? 1 : available; }

/// body(begin, end) over [0, count), one contiguous range a thread.
template <class Body>
void parallel_for(int64_t count, int threads, Body body) {
  if (threads <= 1 || count <= 1) {
    body(int64_t{0}, count);
    return;
  }
  struct Context {
    Body* body;
    int64_t count;
  } context{&body, count};
  run_parallel(
      threads,
      [](void* opaque, int thread, int team) {
        const Context& c = *static_cast<Context*>(opaque);
        const int64_t begin = c.count * thread / team, end = c.count * (thread + 1) / team;
        if (begin < end) (*c.body)(begin, end);
      },
      &context);
}

/// body(item, thread) for every item in [0, count), each taken by the next thread that is free.
template <class Body>
void parallel_items(int64_t count, int threads, Body body) {
  std::atomic<int64_t> next{0};
  const auto take = [&](int thread) {
    for (int64_t item; (item = next.fetch_add(1)) < count;) body(item, thread);
  };
  if (threads <= 1 || count <= 1) return take(0);
  using Take = decltype(take);
  run_parallel(
      threads, [](void* opaque, int thread, int) { (*static_cast<const Take*>(opaque))(thread); },
      const_cast<void*>(static_cast<const void*>(&take)));
}

/// fp32 scratch, 64-byte aligned, not initialised.
class Scratch {
 public:
  explicit Scratch(int64_t size);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* data() const { return data_; }

 private:
  float* data_;
};

}  // namespace phi_fast::cpu
