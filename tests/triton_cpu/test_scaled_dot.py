"""tl.dot_scaled: microscaling formats against NumPy in float64."""

import numpy as np
import pytest
import triton
import triton.language as tl

from .arrays import Tensor, empty, values_of_codes

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
TYPES = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2", "bf16": "bfloat16", "fp16": "float16"}


class Operand:
    """Random codes of a format, `rows` x `columns` elements of it, and what they mean."""

    def __init__(self, rng, form: str, rows: int, columns: int, packed: int = 1):
        if form == "e2m1":
            nibbles = rng.integers(0, 16, (rows, columns))
            self.values = E2M1[nibbles]
            low, high = (nibbles[:, ::2], nibbles[:, 1::2]) if packed else (nibbles[::2], nibbles[1::2])
            self.codes = Tensor((low | high << 4).astype(np.uint8))
        elif form in ("e4m3", "e5m2"):
            table = values_of_codes(TYPES[form])
            codes = rng.choice(np.flatnonzero(np.abs(table) <= 16), (rows, columns)).astype(np.uint8)
            self.values, self.codes = table[codes], Tensor(codes)
        else:
            self.codes = Tensor(rng.standard_normal((rows, columns)), TYPES[form])
            self.values = self.codes.values


def scales(rng, rows: int, groups: int) -> Tensor:
    return Tensor(rng.integers(121, 133, (rows, groups)).astype(np.uint8))


def factor(scale: Tensor | None, group: int) -> np.ndarray:
    """2^(code - 127) for each element along k."""
    return np.ones((1, 1)) if scale is None else np.repeat(2.0 ** (scale.stored.astype(float) - 127), group, axis=1)


@triton.jit
def tile(base, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.load(base + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def scaled_kernel(
    a, a_scale, b, b_scale, out, A: tl.constexpr, B: tl.constexpr, A_PACKED: tl.constexpr, B_PACKED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    A_HALF: tl.constexpr = 2 if A == "e2m1" else 1
    B_HALF: tl.constexpr = 2 if B == "e2m1" else 1
    if A_PACKED:
        x = tile(a, M, K // A_HALF)
    else:
        x = tile(a, M // A_HALF, K)
    if B_PACKED:
        y = tile(b, K // B_HALF, N)
    else:
        y = tile(b, K, N // B_HALF)
    if a_scale is not None:
        a_scale = tile(a_scale, M, K // 32)
    if b_scale is not None:
        b_scale = tile(b_scale, N, K // 32)
    total = tl.full((M, N), 1.0, tl.float32)
    total = tl.dot_scaled(x, a_scale, A, y, b_scale, B, total, fast_math=FAST, lhs_k_pack=A_PACKED, rhs_k_pack=B_PACKED)
    tl.store(out + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], total)


@pytest.mark.parametrize(
    "a, b, scaled, packed",
    [
        ("e2m1", "e2m1", "both", (True, True)),
        ("e2m1", "e2m1", "both", (False, False)),
        ("e2m1", "e2m1", "both", (False, True)),
        ("e4m3", "e4m3", "both", (True, True)),
        ("e5m2", "e2m1", "both", (True, False)),
        ("e4m3", "e5m2", "left", (True, True)),
        ("e2m1", "bf16", "left", (True, True)),
        ("bf16", "e4m3", "right", (True, True)),
        ("fp16", "e2m1", "right", (True, True)),
        ("bf16", "bf16", "both", (True, True)),
    ],
)
@pytest.mark.parametrize("m, n, k", [(4, 8, 32), (32, 16, 128)])
def test_formats_scales_and_packing(a, b, scaled, packed, m, n, k, rng):
    x = Operand(rng, a, m, k, packed[0])
    y = Operand(rng, b, k, n, not packed[1])
    a_scale = scales(rng, m, k // 32) if scaled != "right" else None
    b_scale = scales(rng, n, k // 32) if scaled != "left" else None
    out = empty((m, n))
    scaled_kernel[(1,)](x.codes, a_scale, y.codes, b_scale, out, a, b, *packed, m, n, k, False)
    expected = (x.values * factor(a_scale, 32)) @ (y.values * factor(b_scale, 32).T) + 1
    np.testing.assert_allclose(out.stored, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("fast", [False, True])
def test_the_ends_of_the_scales(fast):
    """Code 0 is 2^-127, 254 is 2^127, and 255 is no number."""
    ones, codes = np.full((4, 32), 0x38, np.uint8), np.array([0, 127, 254, 255], np.uint8)[:, None]
    out = empty((4, 4))
    b = Tensor(np.full((32, 4), 1 / 32), "float16")
    scaled_kernel[(1,)](Tensor(ones), Tensor(codes), b, None, out, "e4m3", "fp16", True, True, 4, 4, 32, fast)
    expected = np.float32(2.0) ** np.array([-127, 0, 127, np.nan]) + 1
    np.testing.assert_array_equal(out.stored, np.repeat(expected[:, None], 4, axis=1).astype(np.float32))


@triton.jit
def e4m3_scales_kernel(a, a_scale, b, b_scale, out, N: tl.constexpr, K: tl.constexpr):
    x, y = tile(a, N, K // 2), tl.trans(tile(b, N, K // 2))
    s = tile(a_scale, N, K // 16).to(tl.float8e4nv, bitcast=True)
    t = tile(b_scale, N, K // 16).to(tl.float8e4nv, bitcast=True)
    total = tl.zeros((N, N), tl.float32)
    for _ in range(2):
        total = tl.dot_scaled(x, s, "e2m1", y, t, "e2m1", total)
    tl.store(out + tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :], total)


def test_sixteen_elements_share_an_e4m3_scale_in_a_loop(rng):
    n, k = 16, 64
    x, y = (Operand(rng, "e2m1", n, k) for _ in range(2))
    scale = [rng.integers(0x20, 0x50, (n, k // 16)).astype(np.uint8) for _ in range(2)]
    out = empty((n, n))
    e4m3_scales_kernel[(1,)](x.codes, Tensor(scale[0]), y.codes, Tensor(scale[1]), out, n, k)
    left, right = (v.values * np.repeat(values_of_codes("float8_e4m3fn")[s], 16, axis=1) for v, s in zip((x, y), scale))
    np.testing.assert_allclose(out.stored, 2 * left @ right.T, rtol=1e-5, atol=1e-3)


@triton.jit
def batched_kernel(a, a_scale, b, b_scale, out, B: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    batch = tl.arange(0, B)[:, None, None]
    row, column = tl.arange(0, N)[None, :, None], tl.arange(0, K)[None, None, :]
    x = tl.load(a + batch * N * K + row * K + column)
    y = tl.trans(tl.load(b + batch * N * K + row * K + column), 0, 2, 1)
    place = batch * N * (K // 32) + row * (K // 32) + tl.arange(0, K // 32)[None, None, :]
    total = tl.dot_scaled(x, tl.load(a_scale + place), "e5m2", y, tl.load(b_scale + place), "e5m2")
    tl.store(out + batch * N * N + row * N + tl.arange(0, N)[None, None, :], total)


def test_batches(rng):
    count, n, k = 2, 8, 64
    x, y = (Operand(rng, "e5m2", count * n, k) for _ in range(2))
    scale = [scales(rng, count * n, k // 32) for _ in range(2)]
    out = empty((count, n, n))
    batched_kernel[(1,)](x.codes, scale[0], y.codes, scale[1], out, count, n, k)
    left, right = ((v.values * factor(s, 32)).reshape(count, n, k) for v, s in zip((x, y), scale))
    np.testing.assert_allclose(out.stored, left @ right.swapaxes(1, 2), rtol=1e-5, atol=1e-2)
