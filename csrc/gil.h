// Work without Python's lock, safe in a thread that Python's end overtakes.
#pragma once
#include <Python.h>

#if defined(__GLIBCXX__)
#include <cxxabi.h>
#include <unistd.h>
#endif

namespace phi_fast {

/// Releases the GIL for as long as it lives.
///
/// Before 3.14 Python ends a daemon thread that asks for the GIL after the interpreter has begun to end, by unwinding
/// its stack from within the destructor below. pybind11's own class lets that end the process with SIGABRT; here the
/// thread stays where it is until the process has ended, as from 3.14 on.
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
