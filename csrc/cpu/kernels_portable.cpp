#include <cmath>
#include <initializer_list>
#include <limits>
#include <type_traits>

#include "cpu/kernels.h"

#define PHI_ISA portable
#include "cpu/simd_portable.h"
// The table needs the Vec above.
#include "cpu/table.h"
