// Work split over the threads that torch already has.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace phi_fast::cpu {

using Task = void (*)(void* context, int thread, int threads);

/// Calls task(context, i, n) for i = 0 … n - 1 in n <= `threads` threads, and returns when all are done.
///
/// If the process has an OpenMP runtime with GCC's entry points, as torch's on Linux, its threads do the work: a
/// separate pool would wake on the same cores while torch's threads still spin. Otherwise threads are started for the
/// call.
void run_parallel(int threads, Task task, void* context);

/// "openmp" or "std::thread": what run_parallel uses.
const char* parallel_backend();

/// `available`, or 1 if there is too little work to wake another thread. It is never a number between, because libgomp
/// ends the threads that a smaller team leaves out, and the next larger team starts them again.
inline int threads_for(int64_t elements, int available) { return elements < 16384 ? 1 : available; }

/// Calls body(begin, end) for ranges that cover [0, count), one contiguous range per thread.
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

/// Calls body(item, thread) for every item in [0, count). The next free thread takes the next item.
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

/// Scratch memory for fp32 numbers, 64-byte aligned, not initialised.
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
