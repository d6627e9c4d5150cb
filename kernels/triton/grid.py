"""One axis for every grid: the second and third of CUDA's hold 65,535 programs, which long or many tensors pass; the
first holds 2³¹ - 1 (CUDA C++ programming guide, "Compute Capabilities")."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def split_program(parts):
    """(i, part) of this program, where every i has `parts` programs. Programs that start together share their part."""
    each = tl.num_programs(0) // parts
    part = tl.program_id(0) // each
    return tl.program_id(0) - part * each, part
