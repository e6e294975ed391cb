"""Rotary position embedding, fused with the write of keys and values into the paged cache.

Each head's vector is cut into D/2 pairs; pair i of a token at position p is turned by the angle p * theta^(-2i/D)
(Su et al., "RoFormer", 2021):

    a' = a cos - b sin      half-split:   (a, b) = (x[i], x[i + D/2])      as Hugging Face stores q and k
    b' = b cos + a sin      interleaved:  (a, b) = (x[2i], x[2i + 1])      as the paper and GGUF's llama layout

Some families (Qwen3) first divide every head of q and k by its root mean square: x[i] * weight[i] / rms(x).

    qkv [T, (H + 2 KVH) * D]    | q: H heads | k: KVH heads | v: KVH heads |     q is turned in place, k on its way
                                                                                 into the cache, v is only copied
    k_cache [blocks, KVH, D, block_size]    transposed for CPUs: q.k reads along the tokens of a block
            [blocks, KVH, block_size, D]    by token for GPUs: written 16 bytes at a time; tensor cores read either
    v_cache [blocks, KVH, block_size, D]                p.v reads along a token's vector

    int8 for CPUs, which multiply four bytes at a time: fours of what is summed over lie next to each other
    k_cache [blocks, KVH, D / 4, block_size, 4]         elements 4 i to 4 i + 3 of a key
    v_cache [blocks, KVH, block_size / 4, D, 4]         tokens 4 i to 4 i + 3 of an element (heads of a multiple of 16)

    slots [T]: block * block_size + offset, or -1 for a token that is not kept

One program takes ROWS pairs of token and KV head, with the H / KVH query heads that share it: one on a CPU, on a GPU as
many as keep enough loads in flight. fp32 arithmetic, one rounding to the cache's type. Cost: one pass over qkv and over
the new tokens' part of the cache, bandwidth bound.

    rows   token 0, KV head 0 | token 0, KV head 1 | ... | token 1, KV head 0 | ...        each [D / 2] pairs wide

An int8 cache keeps, for the key and for the value of every token and KV head, a float32 scale beside the blocks:

    x[i] = scale xq[i],   scale = max |x| / 127,   xq rounded to nearest    k_scales, v_scales [blocks, KVH, block_size]

so a token takes D + 4 bytes for each of the two: a head of 64 53 % of what bfloat16 takes.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import triton
import triton.language as tl

from fastdeploy.kernels.launch import (
    FLOATS,
    Target,
    TensorView,
    cdiv,
    early,
    expect,
    launch,
    next_power_of_2,
    target,
    view,
    wait_for_inputs,
)

CACHE_DTYPES = (*FLOATS, "int8")


@dataclass(frozen=True)
class HeadLayout:
    """The heads of an attention layer; `interleaved` says how rotary pairs lie in a head."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    interleaved: bool = False

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.num_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} query heads cannot share {self.num_kv_heads} KV heads evenly")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary pairs need a positive even number")

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def qkv_width(self) -> int:
        """Columns of the fused qkv rows."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


@dataclass(frozen=True)
class KVBlocks:
    """The KV cache of one layer, in blocks of `block_size` tokens; the module's docstring says what lies where.

    k_cache [blocks, KVH, D, block_size], v_cache [blocks, KVH, block_size, D], of one of `CACHE_DTYPES`; or
        [blocks, KVH, D / 4, block_size, 4] and [blocks, KVH, block_size / 4, D, 4] int8, if `in_quads`.
    k_scales, v_scales [blocks, KVH, block_size] float32: the scale of a token's elements in int8; None in floats.
    keys_by_token: k_cache is laid out as v_cache is; as `by_token` says for the active target, if not given.
    """

    k_cache: TensorView
    v_cache: TensorView
    k_scales: TensorView | None = None
    v_scales: TensorView | None = None
    keys_by_token: bool = field(default_factory=lambda: by_token(target()))

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return 4 * self.v_cache.shape[-3] if self.in_quads else self.v_cache.shape[-2]

    @property
    def in_quads(self) -> bool:
        """Whether bytes lie in fours, as CPUs multiply them."""
        return len(self.v_cache.shape) == 5

    def tensors(self) -> tuple[TensorView | None, ...]:
        """In the order in which kernels take them."""
        return self.k_cache, self.v_cache, self.k_scales, self.v_scales

    def expect(self, heads: HeadLayout) -> None:
        """Check that shapes and types fit each other and the layer's heads."""
        expect("k_cache", self.k_cache, self.k_cache.shape, *CACHE_DTYPES)
        sizes = (self.k_cache.shape[0], self.block_size, self.k_cache.dtype)
        fields = cache_fields(heads, *sizes, keys_by_token=self.keys_by_token)
        for name in ("k_scales", "v_scales"):
            if (getattr(self, name) is None) == (name in fields):
                wanted = "needs" if name in fields else "has no use for"
                raise ValueError(f"a cache of {self.k_cache.dtype} {wanted} {name}")
        for name, (shape, dtype) in fields.items():
            expect(name, getattr(self, name), shape, dtype)


def by_token(target: Target) -> bool:
    """Whether keys lie as values do, a token's vector in one piece."""
    return not target.is_cpu


def cache_fields(
    heads: HeadLayout, blocks: int, block_size: int, dtype: str, keys_by_token: bool | None = None
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of the tensors of `KVBlocks`, by name; `keys_by_token` as there."""
    keys_by_token = by_token(target()) if keys_by_token is None else keys_by_token
    values: tuple[int, ...] = (blocks, heads.num_kv_heads, block_size, heads.head_dim)
    keys = values if keys_by_token else (*values[:2], *values[:1:-1])
    if dtype == "int8" and not keys_by_token and heads.head_dim % 16 == 0:
        keys, values = ((*shape[:2], shape[2] // 4, shape[3], 4) for shape in (keys, values))
    fields: dict[str, tuple[tuple[int, ...], str]] = {"k_cache": (keys, dtype), "v_cache": (values, dtype)}
    if dtype == "int8":
        per_token = ((blocks, heads.num_kv_heads, block_size), "float32")
        fields |= {"k_scales": per_token, "v_scales": per_token}
    return fields


@triton.jit
def _to_int8(scales, a, b, kept):
    """float32 [ROWS, PAIRS] each, together a head a row, as int8 values; stores their scales to `scales`, [ROWS].

    Halves are rounded away from zero. A head with NaN or infinities has the scale NaN: int8 has no way to say so, and
    tl.max looks past them.
    """
    largest = tl.max(tl.maximum(tl.abs(a), tl.abs(b)), axis=1)
    # Below 1e-30 the reciprocal nears float32's end, and beside any other key or value these are zeros.
    inverse = tl.where(largest > 1e-30, 127.0 / largest, 0.0)[:, None]
    tl.store(scales, largest * (1.0 / 127.0) + tl.sum(a * 0.0 + b * 0.0, axis=1), mask=kept)  # NaN for those, else + 0
    return _rounded(a * inverse), _rounded(b * inverse)


@triton.jit
def _rounded(x):
    """To the nearest int32. A half with the sign of x, by bits: as a choice, where bytes are stored one by one, it is a
    jump that no CPU foresees (512 tokens of 8 heads of 128: 1.9 ms)."""
    half = (x.to(tl.int32, bitcast=True) & -0x80000000) | 0x3F000000
    return (x + half.to(tl.float32, bitcast=True)).to(tl.int32)


@dataclass(frozen=True)
class HeadNorms:
    """RMS norms over the elements of a head, before it is turned.

    query, key: [D] float32, the weights for every head of q and of k. eps: added to the mean square.
    """

    query: TensorView
    key: TensorView
    eps: float


@triton.jit(do_not_specialize=["count"])
def _rope_and_cache_kernel(
    qkv, positions, slots, cos, sin, q_norm, k_norm, eps, k_cache, v_cache, k_scales, v_scales, count,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BY_TOKEN: tl.constexpr,
    IN_QUADS: tl.constexpr, INTERLEAVED: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """WHOLE: heads are loaded and stored in one piece and cut into pairs in registers, as interleaved ones on a GPU,
    where a thread should read 16 bytes that lie together."""
    wait_for_inputs(EARLY)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    if ROWS == 1:  # on a CPU: no division, 0.1 us a program
        token = tl.program_id(1).to(tl.int64) + tl.arange(0, 1)
        kv_head = tl.program_id(0) + tl.arange(0, 1)
        real = tl.full([1], True, tl.int1)
    else:
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        token = row // KV_HEADS  # [ROWS]
        kv_head = row % KV_HEADS
        real = row < count * KV_HEADS
    pair = tl.arange(0, PAIRS)[None, :]  # [1, PAIRS], PAIRS >= D / 2
    inside = real[:, None] & (pair < D // 2 if PAIRS != D // 2 else tl.full([1, PAIRS], True, tl.int1))
    first = pair * 2 if INTERLEAVED else pair
    second = first + 1 if INTERLEAVED else pair + D // 2
    angle = tl.load(positions + token, mask=real, other=0).to(tl.int64)[:, None] * (D // 2) + pair
    cosines = tl.load(cos + angle, mask=inside, other=0.0)
    sines = tl.load(sin + angle, mask=inside, other=0.0)

    start = token * (HEADS + 2 * KV_HEADS) * D
    for head in range(GROUP):
        query = qkv + (start + (kv_head * GROUP + head) * D)[:, None]  # [ROWS, 1]
        a, b = _load_pairs(query, first, second, inside, q_norm, eps, D, WHOLE)
        _store_pairs(query, a * cosines - b * sines, b * cosines + a * sines, first, second, inside, D, WHOLE)

    slot = tl.load(slots + token, mask=real, other=-1)
    kept = slot >= 0
    inside = inside & kept[:, None]
    # A row's place in [blocks, KVH, block_size], int64: caches exceed 2^31 elements.
    block = (slot // BLOCK_SIZE * KV_HEADS + kv_head) * BLOCK_SIZE
    offset = slot % BLOCK_SIZE
    place = block + offset
    key = qkv + (start + (HEADS + kv_head) * D)[:, None]
    a, b = _load_pairs(key, first, second, inside, k_norm, eps, D, WHOLE)
    a, b = a * cosines - b * sines, b * cosines + a * sines
    if k_scales is not None:
        a, b = _to_int8(k_scales + place, a, b, kept)
    if IN_QUADS:
        column = k_cache + (block * D + offset * 4)[:, None]
        a_row = (first >> 2) * (4 * BLOCK_SIZE) + (first & 3)
        b_row = (second >> 2) * (4 * BLOCK_SIZE) + (second & 3)
        _store_pairs(column, a, b, a_row, b_row, inside, D, False)
    elif BY_TOKEN:
        _store_pairs(k_cache + (place * D)[:, None], a, b, first, second, inside, D, WHOLE)
    else:
        column = k_cache + (block * D + offset)[:, None]
        _store_pairs(column, a, b, first * BLOCK_SIZE, second * BLOCK_SIZE, inside, D, False)
    value = qkv + (start + (HEADS + KV_HEADS + kv_head) * D)[:, None]
    a, b = _load_pairs(value, first, second, inside, None, eps, D, WHOLE)
    if v_scales is not None:
        a, b = _to_int8(v_scales + place, a, b, kept)
    if IN_QUADS:
        row = v_cache + (block * D + offset // 4 * (4 * D) + offset % 4)[:, None]
        _store_pairs(row, a, b, first * 4, second * 4, inside, D, False)
    else:
        _store_pairs(v_cache + (place * D)[:, None], a, b, first, second, inside, D, WHOLE)


@triton.jit
def _load_pairs(heads, first, second, inside, norm, eps, D: tl.constexpr, WHOLE: tl.constexpr):
    """The two elements of each rotary pair of a head a row, [ROWS, PAIRS] float32 each, normalised if there is a norm's
    weight."""
    if WHOLE:
        both = tl.arange(0, 2 * first.shape[1])[None, :]
        row = tl.max(inside.to(tl.int32), axis=1)[:, None] > 0
        x = tl.load(heads + both, mask=row & (both < D), other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, [x.shape[0], first.shape[1], 2]))
    else:
        a = tl.load(heads + first, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(heads + second, mask=inside, other=0.0).to(tl.float32)
    if norm is not None:
        scale = tl.rsqrt(tl.sum(a * a + b * b, axis=1) / D + eps)[:, None]
        a = a * scale * tl.load(norm + first, mask=first < D, other=0.0)
        b = b * scale * tl.load(norm + second, mask=second < D, other=0.0)
    return a, b


@triton.jit
def _store_pairs(heads, a, b, first, second, inside, D: tl.constexpr, WHOLE: tl.constexpr):
    """The elements of the pairs back to their heads."""
    if WHOLE:
        both = tl.arange(0, 2 * first.shape[1])[None, :]
        row = tl.max(inside.to(tl.int32), axis=1)[:, None] > 0
        tl.store(heads + both, tl.interleave(a, b).to(heads.dtype.element_ty), mask=row & (both < D))
    else:
        tl.store(heads + first, a.to(heads.dtype.element_ty), mask=inside)
        tl.store(heads + second, b.to(heads.dtype.element_ty), mask=inside)


def tiles(target: Target, head_dim: int) -> dict[str, int]:
    """Tile rule: on a GPU 1024 pairs, 8 for each of 128 threads, which is 16 bytes a load of a half head."""
    pairs = next_power_of_2(head_dim // 2)
    if target.is_cpu:
        return {"ROWS": 1, "PAIRS": pairs}
    return {"ROWS": max(1, 1024 // pairs), "PAIRS": pairs, "num_warps": 4}


def rope_and_cache(
    qkv: Any, positions: Any, slots: Any, cos: Any, sin: Any, cache: KVBlocks, heads: HeadLayout,
    norms: HeadNorms | None = None,
) -> None:  # fmt: skip
    """Turn q in place inside `qkv`; turn k and write it, with v, into the cache.

    Args:
        qkv: [T, heads.qkv_width], any float type.
        positions: [T] int32, each less than the tables' length (not checked: they lie on the device).
        slots: [T] int64, -1 to write nothing.
        cos, sin: [max_positions, D/2] float32, from `rope_tables`.
        cache: of the layer that qkv belongs to.
        norms: of the heads of q and k before they are turned, if the family has them.
    """
    qkv, positions, slots, cos, sin = view(qkv), view(positions), view(slots), view(cos), view(sin)
    count = qkv.shape[0]
    expect("qkv", qkv, (count, heads.qkv_width), *FLOATS)
    expect("positions", positions, (count,), "int32")
    expect("slots", slots, (count,), "int64")
    expect("cos", cos, (cos.shape[0], heads.head_dim // 2), "float32")
    expect("sin", sin, cos.shape, "float32")
    cache.expect(heads)
    weights: tuple = (None, None, 0.0)
    if norms is not None:
        weights = (norms.query, norms.key, norms.eps)
        for weight in weights[:2]:
            expect("the norm of a head", weight, (heads.head_dim,), "float32")
    rule = tiles(target(), heads.head_dim)
    inputs = (qkv, positions, slots, cos, sin, *weights)
    programs = cdiv(count * heads.num_kv_heads, rule["ROWS"])
    grid = (heads.num_kv_heads, count) if rule["ROWS"] == 1 else (programs,)
    launch(
        _rope_and_cache_kernel, grid, *inputs, *cache.tensors(), count,
        HEADS=heads.num_heads, KV_HEADS=heads.num_kv_heads, D=heads.head_dim,
        BLOCK_SIZE=cache.block_size, BY_TOKEN=cache.keys_by_token, IN_QUADS=cache.in_quads,
        INTERLEAVED=heads.interleaved, WHOLE=heads.interleaved and not target().is_cpu, **early(target()), **rule,
    )  # fmt: skip


def rope_tables(
    head_dim: int, max_positions: int, theta: float, scaling: dict[str, Any] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of every position's angles, two float32 arrays [max_positions, head_dim / 2].

    `scaling` is a checkpoint's "rope_scaling": None, or a dictionary whose "rope_type" is "default", "linear", "yarn",
    "llama3" or "divisors" (GGUF's form of llama3: the numbers worked out). Computed in float64: at position 100,000 a
    float32 angle would be off by 0.004.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    angles = np.outer(np.arange(max_positions, dtype=np.float64), _scaled(frequencies, theta, scaling or {}))
    length = yarn_length(scaling) if scaling and scaling.get("rope_type") == "yarn" else 1.0
    return (length * np.cos(angles)).astype(np.float32), (length * np.sin(angles)).astype(np.float32)


def rope_divisors(head_dim: int, theta: float, scaling: dict[str, Any] | None) -> np.ndarray:
    """What a scaling divides the frequencies by, [head_dim / 2] float64."""
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    return frequencies / _scaled(frequencies, theta, scaling or {})


def _scaled(frequencies: np.ndarray, theta: float, scaling: dict[str, Any]) -> np.ndarray:
    """Frequencies stretched to contexts longer than those a model was trained with."""
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / scaling["factor"]
    if kind == "divisors":
        return frequencies / np.asarray(scaling["divisors"], np.float64)
    if kind == "llama3":  # slow frequencies are stretched, fast ones kept, those between blended (Llama 3.1)
        turns = frequencies * scaling["original_max_position_embeddings"] / (2 * np.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return frequencies * (kept + (1 - kept) / scaling["factor"])
    if kind == "yarn":
        kept = 1 - _yarn_ramp(len(frequencies), theta, scaling)
        return frequencies * (kept + (1 - kept) / scaling["factor"])
    raise ValueError(f"rope_scaling of type {kind!r} is not supported; known: default, linear, llama3, yarn, divisors")


def _yarn_ramp(pairs: int, theta: float, scaling: dict[str, Any]) -> np.ndarray:
    """How far each pair's frequency is stretched, 0 to 1: linear in the pair's number, between the pairs that turn
    beta_fast and beta_slow times within the original context (Peng et al., "YaRN", 2023)."""
    context = scaling["original_max_position_embeddings"]
    turns = np.array([scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1])
    low, high = pairs * np.log(context / (turns * 2 * np.pi)) / np.log(theta)
    if scaling.get("truncate", True):
        low, high = np.floor(low), np.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    return np.clip((np.arange(pairs) - low) / (high - low or 0.001), 0, 1)


def yarn_length(scaling: dict[str, Any]) -> float:
    """What YaRN multiplies q and k by, against attention spreading over longer contexts; `mscale` is DeepSeek's."""

    def length(mscale: float) -> float:
        return 0.1 * mscale * np.log(max(scaling["factor"], 1)) + 1

    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return length(scaling["mscale"]) / length(scaling["mscale_all_dim"])
    return length(1.0)


def rope_reference(x: np.ndarray, positions: np.ndarray, theta: float, interleaved: bool) -> np.ndarray:
    """The specification of the rotation, in float64, as a product of complex numbers; x is [T, heads, D]."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * theta ** (-np.arange(half) / half)
    pairs = x.astype(np.float64).reshape(*x.shape[:-1], *((half, 2) if interleaved else (2, half)))
    real, imaginary = np.moveaxis(pairs, -1 if interleaved else -2, 0)
    turned = (real + 1j * imaginary) * np.exp(1j * angles)[:, None, :]
    return np.stack([turned.real, turned.imag], axis=-1 if interleaved else -2).reshape(x.shape)


def cache_write_reference(
    caches: tuple[np.ndarray, np.ndarray], keys: np.ndarray, values: np.ndarray, slots: np.ndarray
) -> None:
    """The specification of the write; keys (turned) and values are [T, KVH, D]."""
    k_cache, v_cache = caches
    block_size = v_cache.shape[2]
    for token, slot in enumerate(slots):
        if slot >= 0:
            block, offset = divmod(int(slot), block_size)
            k_cache[block, :, :, offset] = keys[token]
            v_cache[block, :, offset, :] = values[token]


def to_int8_reference(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The specification of an int8 cache: heads [..., D] as int8 values and float64 scales [...]."""
    x = x.astype(np.float64)
    largest = np.abs(x).max(axis=-1)
    scaled = x * np.divide(127, largest, out=np.zeros_like(largest), where=largest > 1e-30)[..., None]
    return np.trunc(scaled + np.copysign(0.5, scaled)).astype(np.int8), largest / 127
