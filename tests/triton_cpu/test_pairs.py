"""Products of bf16 in pairs, `bf16_products`: the sums of VDPBF16PS, in one order whatever the tile, on demand only."""

import numpy as np
import pytest
import triton
import triton.language as tl

from fastdeploy.kernels.launch import view
from fastdeploy.kernels.linear import LinearWeight, linear, pack_reference
from fastdeploy.triton_cpu.toolchain import toolchain

from .arrays import Tensor, empty, encode, rounded, run_python
from .test_dot import SHAPES, dot_kernel

needs_bf16 = pytest.mark.skipif(not toolchain().multiplies_bf16, reason="the CPU or its compiler has no AVX512-BF16")


def in_pairs(compiled):
    return "add_dot2" in compiled.asm["c"].split(f"kernel_{compiled.name}(", 1)[1]


def chain(a, b):
    """a @ b as the instruction adds it: for each pair of k two roundings, the second term's first."""
    total = np.zeros((len(a), b.shape[1]), np.float32)
    for k in range(0, len(b), 2):
        for term in (k + 1, k):
            total = (a[:, term : term + 1] * b[term] + total).astype(np.float32)
    return total


def small(rng, *shape):
    """Random numbers of bf16, as float64. (A product and a sum in float64, rounded to float32, are an FMA: nearly.)"""
    return rounded(rng.standard_normal(shape), "bfloat16")


@needs_bf16
@pytest.mark.parametrize("computed", [False, True])
@pytest.mark.parametrize("m, n, k", [shape for shape in SHAPES if shape[2] % 2 == 0])
def test_every_shape_has_the_sums_of_the_instruction(m, n, k, computed, rng):
    a, b = small(rng, m, k), small(rng, k, n)
    out = empty((m, n))
    compiled = dot_kernel[(1,)](
        Tensor(a, "bfloat16"), Tensor(b, "bfloat16"), out, m, n, k, tl.float32, computed, bf16_products=True
    )
    assert in_pairs(compiled)
    scale = 4 if computed else 1
    bound = k * 2.0**-24 * (np.abs(a) @ np.abs(b)) * 1.01
    assert (np.abs(out.stored - scale * (a @ b)) <= scale * bound).all()
    assert (out.stored == scale * chain(a, b)).mean() > 0.999  # the emulation rounds twice in rare cases


@triton.jit(do_not_specialize=["rows"])
def sum_kernel(
    a_ptr, b_ptr, out_ptr, rows, K, sb_k, sb_n,
    M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """a @ b in a loop over k. a is rounded in the kernel, or may be masked; b is read by rows or along k."""
    m, k = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, BLOCK_K)
    n = tl.program_id(1) * N + tl.arange(0, N)
    width = tl.num_programs(1) * N
    sums = tl.zeros((M, N), tl.float32)
    for start in range(0, K, BLOCK_K):
        a_tile = a_ptr + m[:, None] * K + (start + k)[None, :]
        b_tile = b_ptr + (start + k)[:, None] * sb_k + n[None, :] * sb_n
        if FORM == "masked":
            a = tl.load(a_tile, mask=(m < rows)[:, None] & (start + k < K)[None, :], other=0.0)
            b = tl.load(b_tile, mask=(start + k < K)[:, None], other=0.0)
        else:
            a = tl.load(a_tile)
            b = tl.load(b_tile)
        if FORM == "scaled":
            sums += tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16)) * 0.5
        else:
            sums = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), sums)
    tl.store(out_ptr + m[:, None] * width + n[None, :], sums, mask=(m < rows)[:, None])


def product(a, b, rows, tile, form="plain", a_type="bfloat16", transposed=False, **options):
    """The first `rows` of a @ b, from a tile (M, N, BLOCK_K)."""
    (m, n, block_k), (k, width) = tile, b.shape
    out = empty((rows, width))
    weight = Tensor(np.ascontiguousarray(b.T) if transposed else b, "bfloat16")
    grid = (-(-rows // m), width // n)
    strides = (1, k) if transposed else (width, 1)
    compiled = sum_kernel[grid](Tensor(a, a_type), weight, out, rows, k, *strides, m, n, block_k, form, **options)
    return out.stored, compiled


TILES = [(1, 16, 64), (2, 32, 16), (8, 4, 64), (32, 32, 8), (64, 64, 64)]
OPERANDS = [
    ("plain", {}),
    ("plain", {"transposed": True}),
    ("plain", {"a_type": "float32"}),
    ("masked", {}),
    ("scaled", {}),
]


@needs_bf16
@pytest.mark.parametrize("form, operands", OPERANDS)
def test_a_row_has_the_same_bits_alone_and_among_33_in_every_tile(form, operands, rng):
    a, b = small(rng, 64, 128), small(rng, 128, 64)
    expected = None
    for m, n, block_k in TILES:
        tile = (m, n, 64 if form == "scaled" else block_k)  # scaled sums end with a tile of k
        found, compiled = product(a, b, 33, tile, form, bf16_products=True, **operands)
        alone, _ = product(a, b, 1, tile, form, bf16_products=True, **operands)
        expected = found if expected is None else expected
        assert in_pairs(compiled)
        np.testing.assert_array_equal(found, expected, f"{tile}")
        np.testing.assert_array_equal(alone, expected[:1], f"{tile}")
    assert form == "scaled" or (expected == chain(a[:33], b)).mean() > 0.999


@triton.jit(do_not_specialize=["depth", "width"])
def masked_kernel(
    a_ptr, b_ptr, out_ptr, depth, width, count,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The products of `count` tiles of b, [K, N], of which the last has `depth` rows and `width` columns."""
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    a = tl.load(a_ptr + m * K + k[None, :])
    for i in range(count):
        mask = tl.full([K, N], True, tl.int1)
        if ROWS:
            mask = mask & (i * K + k[:, None] < (count - 1) * K + depth)
        if COLUMNS:
            mask = mask & (i * N + n < (count - 1) * N + width)
        b = tl.load(b_ptr + (i * K + k[:, None]) * N + n, mask=mask, other=0.0)
        tl.store(out_ptr + (i * M + m) * N + n, tl.dot(a, b))


@needs_bf16
@pytest.mark.parametrize("rows, columns", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("m, n, k", [(1, 16, 16), (4, 64, 32), (64, 32, 16)])
def test_what_a_mask_excludes_is_not_multiplied(m, n, k, rows, columns, rng):
    a, b = small(rng, m, k), small(rng, 2, k, n)
    for depth, width in ((k - 3, n - 5), (1, 1), (0, n), (k, 0)):
        kept = np.ones(b.shape, bool)
        kept[1] = (np.arange(k)[:, None] < (depth if rows else k)) & (np.arange(n) < (width if columns else n))
        out = empty((2, m, n))
        hidden = Tensor(np.where(kept, b, np.nan), "bfloat16")
        compiled = masked_kernel[(1,)](
            Tensor(a, "bfloat16"), hidden, out, depth, width, 2, m, n, k, rows, columns, bf16_products=True
        )
        assert in_pairs(compiled)
        for found, tile in zip(out.stored, np.where(kept, b, 0)):
            assert (found == chain(a, tile)).mean() > 0.99


@needs_bf16
def test_a_linear_layer_gives_a_row_the_same_bits_alone_and_in_a_batch_of_33(rng):
    x, w = small(rng, 33, 96), small(rng, 80, 96)
    code = (
        "import numpy as np; from tests.triton_cpu.test_pairs import layer; from fastdeploy import triton_cpu\n"
        "triton_cpu.activate(); rng = np.random.default_rng(3)\n"
        "from tests.triton_cpu.test_pairs import small, chain\n"
        "x, w = small(rng, 33, 96), small(rng, 80, 96)\n"
        "y = layer(x, w)\n"
        "assert (y == chain(x, w.T)).mean() > 0.999\n"
        "assert all((layer(x[r : r + 1], w) == y[r]).all() for r in range(33))\n"
    )
    done = run_python(code, FASTDEPLOY_BF16_PRODUCTS="1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert not (layer(x, w) == chain(x, w.T)).all()  # not asked for here


def layer(x, w):
    """x @ w.T by fastdeploy's linear layer, both in bfloat16."""
    data = view(encode(np.ascontiguousarray(pack_reference(w, 32)), "bfloat16"), "bfloat16")
    out = np.empty((len(x), len(w)), np.float32)
    linear(out, view(encode(x, "bfloat16"), "bfloat16"), LinearWeight(data, len(w), w.shape[1], 32))
    return out


@triton.jit
def batched_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    z, i, j = tl.arange(0, 2)[:, None, None], tl.arange(0, N)[None, :, None], tl.arange(0, N)[None, None, :]
    place = (z * N + i) * N + j
    tl.store(out_ptr + place, tl.dot(tl.load(a_ptr + place), tl.load(b_ptr + place)))


@needs_bf16
def test_other_types_and_kinds_of_products_keep_their_bits(rng):
    a, b = rng.standard_normal((2, 16, 16), np.float32), rng.standard_normal((2, 16, 16), np.float32)
    for kernel, dtype in ((batched_kernel, "bfloat16"), (dot_kernel, "float32"), (dot_kernel, "float16")):
        found = []
        for options in ({"bf16_products": True}, {}):
            out = empty((2, 16, 16))
            rest = (16,) if kernel is batched_kernel else (16, 16, 16, tl.float32, False)
            compiled = kernel[(1,)](Tensor(a, dtype), Tensor(b, dtype), out, *rest, **options)
            assert not in_pairs(compiled)
            found.append(out.stored[:1] if kernel is dot_kernel else out.stored)
        np.testing.assert_array_equal(*found)


def test_it_is_off_unless_asked_for(rng):
    a, b = small(rng, 16, 64), small(rng, 64, 32)
    _, default = product(a, b, 16, (16, 32, 64))
    _, off = product(a, b, 16, (16, 32, 64), bf16_products=False)
    assert default.asm["c"] == off.asm["c"] and not in_pairs(default)


def test_an_instruction_set_without_it_ignores_the_option(rng):
    code = (
        "import numpy as np; from fastdeploy import triton_cpu; from tests.triton_cpu.test_pairs import *\n"
        "triton_cpu.activate(); rng = np.random.default_rng(3)\n"
        "_, compiled = product(small(rng, 16, 64), small(rng, 64, 32), 16, (16, 32, 64), bf16_products=True)\n"
        "assert not in_pairs(compiled)\n"
    )
    done = run_python(code, FASTDEPLOY_INSTRUCTION_SET="baseline", FASTDEPLOY_BF16_PRODUCTS="1")
    assert done.returncode == 0, done.stderr[-2000:]
