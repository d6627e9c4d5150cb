// The kernels, compiled for avx2,fma,f16c whatever the rest of the build targets.
#if defined(__x86_64__) && !defined(PHI_WITHOUT_AVX2)
#include <immintrin.h>

#include <cmath>
#include <initializer_list>
#include <limits>
#include <type_traits>

#include "cpu/kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define PHI_ISA avx2
#include "cpu/simd_avx2.h"
// table.h uses the Vec that the header above defines.
#include "cpu/table.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
