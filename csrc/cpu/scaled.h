#pragma once
#include "cpu/vector_math.h"

namespace phi_fast::cpu::PHI_ISA {

/// out = x · factor, or out += x · factor, from one storage type to another.
inline void scaled(const Scaled& a) {
  with_type(a.from, [&](auto from) {
    with_type(a.to, [&](auto to) {
      using From = decltype(from);
      using To = decltype(to);
      parallel_for(a.size, threads_for(a.size, a.threads), [&](int64_t begin, int64_t end) {
        const From* x = static_cast<const From*>(a.x) + begin;
        To* out = static_cast<To*>(a.out) + begin;
        const Vec factor(a.factor);
        if (a.add) {
          for_lanes(end - begin, [=](int64_t i, auto lanes) {
            store(out + i, fma(load(x + i, lanes), factor, load(out + i, lanes)), lanes);
          });
        } else {
          for_lanes(end - begin, [=](int64_t i, auto lanes) { store(out + i, load(x + i, lanes) * factor, lanes); });
        }
      });
    });
  });
}

}  // namespace phi_fast::cpu::PHI_ISA
