// Work without Python's lock, safe in a thread that is still running when the interpreter ends.
#pragma once
#include <Python.h>

#if defined(__GLIBCXX__)
#include <cxxabi.h>
#include <unistd.h>
#endif

namespace phi_fast {

/// Releases the GIL during its lifetime.
///
/// When the interpreter has begun to end, Python before 3.14 ends a daemon thread that asks for the GIL, by unwinding
/// its stack from within the destructor below. With pybind11's own class this ends the process with SIGABRT. Here the
/// thread waits until the process has ended, as Python does from 3.14 on.
class GilReleased {
 public:
  GilReleased() : state_(PyEval_SaveThread()) {}
  ~GilReleased() {
#if defined(__GLIBCXX__)
    try {
      PyEval_RestoreThread(state_);
    } catch (const abi::__forced_unwind&) {
      for (;;) pause();
    }
#else
    PyEval_RestoreThread(state_);
#endif
  }
  GilReleased(const GilReleased&) = delete;
  GilReleased& operator=(const GilReleased&) = delete;

 private:
  PyThreadState* state_;
};

}  // namespace phi_fast
