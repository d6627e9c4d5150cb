"""The C library's heap, which serves training on a CPU as the caching allocator does on a GPU."""

from __future__ import annotations


def keep_freed_memory() -> bool:
    """Make malloc keep freed memory for the next allocation, for the whole process from now on.

    glibc returns large blocks to the system as they are freed, so that every page of the next step's tensors must be
    mapped and zeroed again: 6,000 to 10,000 page faults in a step of phi-tiny, a tenth of its time. The
    trainer calls this on a CPU; in a loop of your own call it before the first step. The process then holds its peak.

    Returns False where the C library has no such setting (musl, macOS): nothing changes there.
    """
    from phi_fast._C import cpu

    return cpu.keep_freed_memory()
