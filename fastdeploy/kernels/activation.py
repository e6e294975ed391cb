"""The gate of a Llama-family MLP: out = silu(gate) * up, silu(g) = g / (1 + exp(-g))  (Shazeer, "GLU Variants", 2020).

    gate_up [T, 2I]    | gate: I columns | up: I columns |      as one fused linear layer writes them
    out     [T, I]                                               floats, or `QuantisedRows` in groups of 32

One program takes BLOCK columns of one row: a 2-D grid, so that no element needs a division to find its row. fp32
arithmetic. Cost: 3*T*I elements moved, bandwidth bound; one exp per element.
"""

from typing import Any

import numpy as np
import triton
import triton.language as tl

from fastdeploy.kernels.launch import FLOATS, Target, cdiv, expect, launch, next_power_of_2, row_block, target, view
from fastdeploy.kernels.quantised import QuantisedRows, store_quantised, swiglu


@triton.jit
def _silu_mul_kernel(
    out, out_scales, out_sums, gate_up, I: tl.constexpr, BLOCK: tl.constexpr  # noqa: E741 (I as in the formula)
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = columns < I if I % BLOCK != 0 else tl.full([BLOCK], True, tl.int1)
    gate = tl.load(gate_up + row * 2 * I + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * I + I + columns, mask=inside, other=0.0).to(tl.float32)
    activated = swiglu(gate, up)
    if out_scales is None:
        tl.store(out + row * I + columns, activated.to(out.dtype.element_ty), mask=inside)
    else:
        store_quantised(
            (out, out_scales, out_sums, None, None), activated, 0.0, row, tl.program_id(1) * BLOCK, I, BLOCK
        )


def tiles(target: Target, width: int) -> dict[str, int]:
    """Tile rule: 512 columns on a CPU are 0.3 us of work, ten times a program's overhead; 1024 on a GPU."""
    if target.is_cpu:
        return {"BLOCK": row_block(target, width, limit=512)}
    return {"BLOCK": min(1024, next_power_of_2(width)), "num_warps": 4}


def silu_mul(out: Any, gate_up: Any) -> None:
    """out = silu(gate_up[:, :I]) * gate_up[:, I:].

    Args:
        out: [T, I], any float type, or `QuantisedRows` in 8 bits.
        gate_up: [T, 2I], any float type.
    """
    gate_up = view(gate_up)
    count, width = out.shape
    if not isinstance(out, QuantisedRows):
        expect("out", view(out), (count, width), *FLOATS)
    elif out.low is not None:
        raise TypeError("out has 16 bits, expected 8")
    written = out.tensors[:3] if isinstance(out, QuantisedRows) else (view(out), None, None)
    expect("gate_up", gate_up, (count, 2 * width), *FLOATS)
    rule = tiles(target(), width)
    launch(_silu_mul_kernel, (count, cdiv(width, rule["BLOCK"])), *written, gate_up, I=width, **rule)


def silu_mul_reference(gate_up: np.ndarray) -> np.ndarray:
    """The specification, in float64."""
    gate, up = np.split(gate_up.astype(np.float64), 2, axis=-1)
    with np.errstate(over="ignore"):  # exp(-gate) = inf gives the right limit, 0
        return gate / (1 + np.exp(-gate)) * up
