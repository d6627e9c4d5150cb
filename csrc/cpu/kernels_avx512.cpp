// The kernels, compiled for avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c whatever the rest of the build targets.
#if defined(__x86_64__) && !defined(PHI_WITHOUT_AVX512)
#include <immintrin.h>

#include <cmath>
#include <initializer_list>
#include <limits>
#include <type_traits>

#include "cpu/kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
// GCC 12 wrongly warns of the "undefined" operands inside its own AVX-512 intrinsics.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define PHI_ISA avx512
#include "cpu/simd_avx512.h"
// table.h uses the Vec that the header above defines.
#include "cpu/table.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
