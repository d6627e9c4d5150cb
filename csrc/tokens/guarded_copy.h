// memcpy from a mapped file that may be truncated during the copy.
#pragma once
#include <cstddef>

namespace phi_fast::tokens {

// Must be called before the first guarded_copy.
void install_guard();

// Returns false if the bytes are no longer in the file, instead of the SIGBUS that the kernel raises.
bool guarded_copy(void* out, const void* in, size_t bytes);

}  // namespace phi_fast::tokens
