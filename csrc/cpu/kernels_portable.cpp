#include <cmath>
#include <initializer_list>
#include <limits>
#include <type_traits>

#include "cpu/kernels.h"

#define PHI_ISA portable
#include "cpu/simd_portable.h"
// table.h uses the Vec that the header above defines.
#include "cpu/table.h"
