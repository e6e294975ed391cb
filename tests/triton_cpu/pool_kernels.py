"""The kernel that test_pool.py counts programs with."""

import triton
import triton.language as tl


@triton.jit
def count_kernel(counts_ptr):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place = (z * tl.num_programs(1) + y) * tl.num_programs(0) + x
    tl.atomic_add(counts_ptr + place, 1)
