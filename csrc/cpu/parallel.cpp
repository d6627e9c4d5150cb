#include "cpu/parallel.h"

#include <dlfcn.h>

#include <new>
#include <thread>
#include <vector>

namespace phi_fast::cpu {
namespace {

struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
};

// torch loads its OpenMP runtime with global symbols, so it is found here under any file name. Linking a runtime
// instead would load a second copy if torch's wheel renames its own.
const OpenMP& openmp() {
  static const OpenMP found = [] {
    OpenMP omp;
    omp.parallel = reinterpret_cast<decltype(omp.parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    omp.thread_num = reinterpret_cast<decltype(omp.thread_num)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    omp.num_threads = reinterpret_cast<decltype(omp.num_threads)>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
    return omp.parallel && omp.thread_num && omp.num_threads ? omp : OpenMP{};
  }();
  return found;
}

struct Call {
  Task task;
  void* context;
};

void run_member(void* opaque) {
  const Call& call = *static_cast<Call*>(opaque);
  call.task(call.context, openmp().thread_num(), openmp().num_threads());
}

}  // namespace

void run_parallel(int threads, Task task, void* context) {
  if (openmp().parallel) {
    Call call{task, context};
    openmp().parallel(run_member, &call, unsigned(threads), 0);
    return;
  }
  std::vector<std::thread> others;
  others.reserve(threads - 1);
  for (int i = 1; i < threads; ++i) others.emplace_back(task, context, i, threads);
  task(context, 0, threads);
  for (std::thread& other : others) other.join();
}

const char* parallel_backend() { return openmp().parallel ? "openmp" : "std::thread"; }

Scratch::Scratch(int64_t size)
    : data_(static_cast<float*>(::operator new(size_t(size) * sizeof(float), std::align_val_t{64}))) {}

Scratch::~Scratch() { ::operator delete(data_, std::align_val_t{64}); }

}  // namespace phi_fast::cpu
