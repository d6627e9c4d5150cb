#pragma once

namespace phi_fast::cpu {

/// Makes malloc keep freed memory for the next allocation, however large,
/// instead of handing it back to the system. For the whole process, from now
/// on. False where the C library has no such setting.
bool keep_freed_memory();

}  // namespace phi_fast::cpu
