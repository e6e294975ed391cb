"""Rotary position embedding, fused with the write of keys and values into the paged cache.

Each head's vector is cut into D/2 pairs; pair i of a token at position p is turned by the angle p * theta^(-2i/D)
(Su et al., "RoFormer", 2021):

    a' = a cos - b sin      half-split:   (a, b) = (x[i], x[i + D/2])      as Hugging Face stores q and k
    b' = b cos + a sin      interleaved:  (a, b) = (x[2i], x[2i + 1])      as the paper and GGUF's llama layout

Some families (Qwen3) first divide every head of q and k by its root mean square: x[i] * weight[i] / rms(x).

    qkv [T, (H + 2 KVH) * D]    | q: H heads | k: KVH heads | v: KVH heads |     q is turned in place, k on its way
                                                                                 into the cache, v is only copied
    k_cache [blocks, KVH, D, block_size]    transposed: q.k reads along the tokens of a block
    v_cache [blocks, KVH, block_size, D]                p.v reads along a token's vector
    slots [T]: block * block_size + offset, or -1 for a token that is not kept

One program takes one token and one KV head, with the H / KVH query heads that share it. fp32 arithmetic, one rounding
to the cache's type. Cost: one pass over qkv and over the new tokens' part of the cache, bandwidth bound.

An int8 cache keeps, for the key and for the value of every token and KV head, a float32 scale beside the blocks:

    x[i] = scale xq[i],   scale = max |x| / 127,   xq rounded to nearest    k_scales, v_scales [blocks, KVH, block_size]

so a token takes D + 4 bytes for each of the two: a head of 64 53 % of what bfloat16 takes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import triton
import triton.language as tl

from fastdeploy.kernels.launch import FLOATS, TensorView, expect, launch, next_power_of_2, target, view

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

    k_cache [blocks, KVH, D, block_size], v_cache [blocks, KVH, block_size, D], of one of `CACHE_DTYPES`.
    k_scales, v_scales [blocks, KVH, block_size] float32: the scale of a token's elements in int8; None in floats.
    """

    k_cache: TensorView
    v_cache: TensorView
    k_scales: TensorView | None = None
    v_scales: TensorView | None = None

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self.k_cache.shape[-1]

    def tensors(self) -> tuple[TensorView | None, ...]:
        """In the order in which kernels take them."""
        return self.k_cache, self.v_cache, self.k_scales, self.v_scales

    def expect(self, heads: HeadLayout) -> None:
        """Check that shapes and types fit each other and the layer's heads."""
        expect("k_cache", self.k_cache, self.k_cache.shape, *CACHE_DTYPES)
        fields = cache_fields(heads, self.k_cache.shape[0], self.block_size, self.k_cache.dtype)
        for name in ("k_scales", "v_scales"):
            if (getattr(self, name) is None) == (name in fields):
                wanted = "needs" if name in fields else "has no use for"
                raise ValueError(f"a cache of {self.k_cache.dtype} {wanted} {name}")
        for name, (shape, dtype) in fields.items():
            expect(name, getattr(self, name), shape, dtype)


def cache_fields(heads: HeadLayout, blocks: int, block_size: int, dtype: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of the tensors of `KVBlocks`, by name."""
    fields: dict[str, tuple[tuple[int, ...], str]] = {
        "k_cache": ((blocks, heads.num_kv_heads, heads.head_dim, block_size), dtype),
        "v_cache": ((blocks, heads.num_kv_heads, block_size, heads.head_dim), dtype),
    }
    if dtype == "int8":
        per_token = ((blocks, heads.num_kv_heads, block_size), "float32")
        fields |= {"k_scales": per_token, "v_scales": per_token}
    return fields


@triton.jit
def _to_int8(a, b):
    """float32 [PAIRS] each, together one head, as int8 values, and their scale.

    Halves are rounded away from zero. A head with NaN or infinities has the scale NaN: int8 has no way to say so, and
    tl.max looks past them.
    """
    largest = tl.max(tl.maximum(tl.abs(a), tl.abs(b)), axis=0)
    # Below 1e-30 the reciprocal nears float32's end, and beside any other key or value these are zeros.
    inverse = tl.where(largest > 1e-30, 127.0 / largest, 0.0)
    scale = largest * (1.0 / 127.0) + tl.sum(a * 0.0 + b * 0.0, axis=0)  # NaN for those, else 0
    a, b = a * inverse, b * inverse
    a = (a + tl.where(a < 0, -0.5, 0.5)).to(tl.int32)
    b = (b + tl.where(b < 0, -0.5, 0.5)).to(tl.int32)
    return a, b, scale


@triton.jit
def _store_head(cache, scale_place, a, b, first, second, inside):
    """Store float32 a at cache + first and b at cache + second; of int8, their scale to `scale_place`."""
    if scale_place is not None:
        a, b, scale = _to_int8(a, b)
        tl.store(scale_place, scale)
    tl.store(cache + first, a.to(cache.dtype.element_ty), mask=inside)
    tl.store(cache + second, b.to(cache.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class HeadNorms:
    """RMS norms over the elements of a head, before it is turned.

    query, key: [D] float32, the weights for every head of q and of k. eps: added to the mean square.
    """

    query: TensorView
    key: TensorView
    eps: float


@triton.jit
def _rope_and_cache_kernel(
    qkv, positions, slots, cos, sin, q_norm, k_norm, eps, k_cache, v_cache, k_scales, v_scales,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    INTERLEAVED: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = HEADS // KV_HEADS
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    position = tl.load(positions + token).to(tl.int64)
    pair = tl.arange(0, PAIRS)  # [PAIRS], PAIRS >= D / 2
    inside = pair < D // 2 if PAIRS != D // 2 else tl.full([PAIRS], True, tl.int1)
    first = pair * 2 if INTERLEAVED else pair
    second = first + 1 if INTERLEAVED else pair + D // 2
    cosines = tl.load(cos + position * (D // 2) + pair, mask=inside, other=0.0)
    sines = tl.load(sin + position * (D // 2) + pair, mask=inside, other=0.0)

    row = qkv + token * (HEADS + 2 * KV_HEADS) * D
    for head in range(GROUP):
        query = row + (kv_head * GROUP + head) * D
        a, b = _load_pairs(query, first, second, inside, q_norm, eps, D)
        tl.store(query + first, (a * cosines - b * sines).to(qkv.dtype.element_ty), mask=inside)
        tl.store(query + second, (b * cosines + a * sines).to(qkv.dtype.element_ty), mask=inside)

    slot = tl.load(slots + token)
    if slot >= 0:
        # The token's place in [blocks, KVH, block_size], int64: caches exceed 2^31 elements.
        block = (slot // BLOCK_SIZE * KV_HEADS + kv_head) * BLOCK_SIZE
        offset = slot % BLOCK_SIZE
        key = row + (HEADS + kv_head) * D
        a, b = _load_pairs(key, first, second, inside, k_norm, eps, D)
        _store_head(
            k_cache + block * D + offset, k_scales + block + offset if k_scales is not None else None,
            a * cosines - b * sines, b * cosines + a * sines, first * BLOCK_SIZE, second * BLOCK_SIZE, inside,
        )  # fmt: skip
        value = row + (HEADS + KV_HEADS + kv_head) * D
        a, b = _load_pairs(value, first, second, inside, None, eps, D)
        _store_head(
            v_cache + (block + offset) * D, v_scales + block + offset if v_scales is not None else None,
            a, b, first, second, inside,
        )  # fmt: skip


@triton.jit
def _load_pairs(head, first, second, inside, norm, eps, D: tl.constexpr):
    """The two elements of each rotary pair of a head, [PAIRS] float32 each, normalised if there is a norm's weight."""
    a = tl.load(head + first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(head + second, mask=inside, other=0.0).to(tl.float32)
    if norm is not None:
        scale = tl.rsqrt(tl.sum(a * a + b * b, axis=0) / D + eps)
        a = a * scale * tl.load(norm + first, mask=inside, other=0.0)
        b = b * scale * tl.load(norm + second, mask=inside, other=0.0)
    return a, b


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
    rule = {"PAIRS": next_power_of_2(heads.head_dim // 2)}
    if not target().is_cpu:
        rule["num_warps"] = 1  # one warp holds a head
    inputs = (qkv, positions, slots, cos, sin, *weights)
    launch(
        _rope_and_cache_kernel, (count, heads.num_kv_heads), *inputs, *cache.tensors(),
        HEADS=heads.num_heads, KV_HEADS=heads.num_kv_heads, D=heads.head_dim,
        BLOCK_SIZE=cache.block_size, INTERLEAVED=heads.interleaved, **rule,
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
    length = _yarn_length(scaling) if scaling and scaling.get("rope_type") == "yarn" else 1.0
    return (length * np.cos(angles)).astype(np.float32), (length * np.sin(angles)).astype(np.float32)


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


def _yarn_length(scaling: dict[str, Any]) -> float:
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
