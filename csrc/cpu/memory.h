#pragma once

namespace phi_fast::cpu {

/// Makes malloc keep freed memory of any size for later allocations instead of returning it to the system. It applies
/// to the whole process from now on. Returns false if the C library has no such setting.
bool keep_freed_memory();

}  // namespace phi_fast::cpu
