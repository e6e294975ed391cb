"""Quantised checkpoints of Hugging Face: several tensors of a file, each in its own layout, become one matrix.

    W[n, k] = scale[n, g] * (integer[n, k] - zero[n, g])       g = k // width, or where act order says so, g_idx[k]

    gptq                qweight [K b/32, N] int32, b bits a weight along k, the lowest first; scales [G, N];
                        qzeros [G, N b/32] int32, along n, the zero - 1 modulo 2^b (but in "gptq_v2"); g_idx [K] int32
    awq                 qweight [K, N/8] int32, 4 bits along n, eight features in the order 0 2 4 6 1 3 5 7;
                        scales [G, N]; qzeros [G, N/8], packed alike
    compressed-tensors  weight_packed [N, K b/32] int32, b bits along k, 2^(b-1) added; weight_scale [N, G];
                        weight_zero_point [N b/32, G] int32, along n; weight_g_idx; weight_shape. Or as in fp8
    fp8, modelopt       weight [N, K] float8 (or int8); weight_scale, or weight_scale_inv, which multiplies, too:
                        of the matrix, of each row or of each block of rows and columns
    mxfp4               ..._blocks [(experts,) N, K/32, 16] uint8, two values a byte, the lower half first;
                        ..._scales [(experts,) N, K/32] uint8, exponents

Kernels take all of these as they are (kernels/formats.py), but for 3 and 2 bits, which become 4. The tensors say what
they are; what the configuration says of them has to agree.

Sources: AutoGPTQ, GPTQModel, AutoAWQ, compressed-tensors and transformers, as of 2025.
"""

from __future__ import annotations

import logging
import reprlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastdeploy.config import DTYPES
from fastdeploy.fields import Fields
from fastdeploy.kernels.formats import FORMATS, GROUP, Format
from fastdeploy.kernels.launch import cdiv
from fastdeploy.kernels.packing import BYTES, NIBBLES, PAIRS, Bits, Layout
from fastdeploy.models.formats import power_of_two
from fastdeploy.models.quantisation import Quantisation
from fastdeploy.models.quantised_matrix import DISAGREES, Matrix, Parts, Rows, unpacked_words
from fastdeploy.models.storage import StoredTensor

logger = logging.getLogger("fastdeploy")

LAYOUTS = {2: Layout(4, 1, Bits(0, 1, 4, 2)), 3: NIBBLES, 4: PAIRS, 8: replace(BYTES, flipped=True)}
AWQ_PLACES = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # of eight features in a word
EXPONENTS = "float8_e8m0fnu"
SCALES = (*DTYPES, EXPONENTS)
OF_ACTIVATIONS = "input_scale input_scale_ub input_zero_point output_scale q_scale k_scale v_scale".split()

Reader = Callable[[Parts], Matrix]


# What readers share


def _regular(in_features: int, width: int) -> np.ndarray:
    """The group of each k where `width` weights that follow each other share a scale."""
    return np.arange(in_features) // width


def _shifted(zeros: np.ndarray, bits: int, added: int = 0) -> np.ndarray:
    """Zeros of unsigned integers for the integers that kernels have: those of 8 bits have 128 less.

    added: modulo 2^bits, as AutoGPTQ has it: one less than a zero of 0 is the largest integer.
    """
    zeros = zeros + np.uint8(added) & np.uint8((1 << bits) - 1)
    return zeros.astype(np.int16) - np.int16(128) if bits == 8 else zeros


def _of_integers(bits: int, scale: str, zeros: bool) -> Format:
    """Integers of up to 8 bits, as unsigned in the file; without zeros of their own, half their range is zero."""
    if bits == 8:
        return Format("int8" + " with zeros" * zeros, 8, scale=scale, minimum="int16" if zeros else None)
    if zeros:
        return Format("int4 with zeros", 4, scale=scale, minimum="uint8")
    return Format("int4", 4, offset=1 << (bits - 1), scale=scale)


def _group_size(fields: Fields, *keys: str) -> int | None:
    """Weights that share a scale; None for whole rows, which -1 stands for."""
    key = next((key for key in keys if fields.values.get(key) is not None), keys[0])
    size = fields.integer(key, default=-1, least=-1)
    if size == 0:
        raise fields.error(key, "must be a positive integer, or -1 for whole rows")
    return None if size == -1 else size


def _groups(parts: Parts, part: str, in_features: int, width: int, act_order: bool) -> np.ndarray:
    """The group of each k by the tensor `part`, without which there is no act order, or by their width."""
    count = cdiv(in_features, width)
    if part not in parts.tensors and not (act_order and count > 1):
        return _regular(in_features, width)
    tensor = parts.need(part, "int32", "int64", shape=(in_features,))
    groups = tensor.rows(0, in_features).astype(np.int64)
    if groups.min() < 0 or groups.max() >= count:
        raise parts.error(part, f"names the groups {groups.min()} to {groups.max()}; there are {count}, from 0 on")
    return groups


def _by_columns(tensor: StoredTensor) -> Rows:
    """The columns of [G, N], as rows."""
    return lambda start, stop: np.ascontiguousarray(tensor.rows(0, tensor.shape[0])[:, start:stop].T)


# GPTQ and AWQ


class Gptq(NamedTuple):
    """What a configuration says of GPTQ. added: to the zeros. differ: modules may have bits and groups of their own."""

    bits: int
    group_size: int | None
    added: int
    act_order: bool
    differ: bool


def _gptq(fields: Fields) -> Reader:
    bits = fields.integer("bits")
    if bits not in LAYOUTS:
        raise fields.error("bits", f"{', '.join(map(str, LAYOUTS))} can be read")
    added = 0 if fields.text("checkpoint_format") == "gptq_v2" else 1
    differ = bool(fields.values.get("dynamic") or fields.values.get("extra_config"))
    act_order = fields.flag("desc_act", default=False)
    return partial(_gptq_matrix, Gptq(bits, _group_size(fields, "group_size"), added, act_order, differ))


def _gptq_matrix(said: Gptq, parts: Parts) -> Matrix:
    words = parts.matrix(".qweight", "int32")
    scales, qzeros = parts.matrix(".scales", *DTYPES), parts.matrix(".qzeros", "int32")
    height, out_features = words.shape
    bits = qzeros.shape[1] * 32 // out_features if said.differ else said.bits
    if bits not in LAYOUTS or out_features * bits % 32 or height * 32 % bits:
        raise parts.error(".qweight", f"has the shape {list(words.shape)}, which {bits} bits a weight don't fill")
    in_features = height * 32 // bits
    width = min(said.group_size or in_features, in_features)
    if said.differ and scales.shape[0] != cdiv(in_features, width):
        width = cdiv(in_features, scales.shape[0])
    count = cdiv(in_features, width)
    parts.need(".scales", *DTYPES, shape=(count, out_features))
    parts.need(".qzeros", "int32", shape=(count, out_features * bits // 32))

    def blocks(start: int, stop: int) -> np.ndarray:
        rows = np.ascontiguousarray(words.rows(0, height)[:, start:stop].T)
        return unpacked_words(rows, bits) if bits == 3 else rows.view(np.uint8)

    def zeros(start: int, stop: int) -> np.ndarray:
        return _shifted(unpacked_words(qzeros.rows(0, count), bits)[:, start:stop].T, bits, said.added)

    return Matrix(
        parts=parts,
        name=f"GPTQ {bits} bits",
        shape=(out_features, in_features),
        format=_of_integers(bits, scales.dtype, zeros=True),
        layout=LAYOUTS[bits],
        groups=_groups(parts, ".g_idx", in_features, width, said.act_order),
        scale_part=".scales",
        blocks=blocks,
        scales=_by_columns(scales),
        zeros=zeros,
    )


def _awq(fields: Fields) -> Reader:
    key = "bits" if fields.values.get("bits") is not None else "w_bit"
    if fields.integer(key) != 4:
        raise fields.error(key, "4 can be read")
    return partial(_awq_matrix, _group_size(fields, "group_size", "q_group_size"))


def _awq_matrix(group_size: int | None, parts: Parts) -> Matrix:
    words = parts.matrix(".qweight", "int32")
    in_features, out_features = words.shape[0], words.shape[1] * 8
    width = min(group_size or in_features, in_features)
    if in_features % width or width % 2:
        raise parts.error(".qweight", f"has {in_features} rows, which are no groups of {width}")
    count = in_features // width
    scales = parts.need(".scales", *DTYPES, shape=(count, out_features))
    qzeros = parts.need(".qzeros", "int32", shape=(count, words.shape[1]))

    def blocks(start: int, stop: int) -> np.ndarray:
        """Pairs along k, from words that have pairs of features."""
        first, last = start // 8, cdiv(stop, 8)
        rows = np.ascontiguousarray(words.rows(0, in_features)[:, first:last].T).view(np.uint8)
        even, odd = rows.reshape(last - first, in_features // 2, 2, 4).transpose(2, 0, 1, 3)  # [words, K/2, 4]
        pairs = np.stack([even & 15 | odd << 4, even >> 4 | odd & 240], axis=-1)
        features = pairs.reshape(*even.shape[:2], 8).transpose(0, 2, 1)[:, AWQ_PLACES]
        return features.reshape(-1, in_features // 2)[start - 8 * first : stop - 8 * first]

    def zeros(start: int, stop: int) -> np.ndarray:
        integers = unpacked_words(qzeros.rows(0, count), 4).reshape(count, -1, 8)[:, :, AWQ_PLACES]
        return integers.reshape(count, -1)[:, start:stop].T

    return Matrix(
        parts=parts,
        name="AWQ 4 bits",
        shape=(out_features, in_features),
        format=_of_integers(4, scales.dtype, zeros=True),
        layout=PAIRS,
        groups=_regular(in_features, width),
        scale_part=".scales",
        blocks=blocks,
        scales=_by_columns(scales),
        zeros=zeros,
    )


# Integers and floats of 8 bits, compressed-tensors


class Blocks(NamedTuple):
    """Rows and columns of a matrix that share a scale; None for all."""

    height: int | None
    width: int | None

    def of(self, shape: tuple[int, int]) -> tuple[int, int]:
        return min(self.height or shape[0], shape[0]), min(self.width or shape[1], shape[1])


TENSOR, CHANNEL = Blocks(None, None), Blocks(1, None)


class Scales(NamedTuple):
    dtype: str
    height: int
    width: int
    rows: Rows


def _scales(parts: Parts, part: str, shape: tuple[int, int], allowed: Iterable[Blocks]) -> Scales:
    """The scales of a matrix of this shape, in one of the `allowed` blocks: by whose shape the tensor has."""
    tensor = parts.need(part, *SCALES)
    expected = []
    for blocks in allowed:
        height, width = blocks.of(shape)
        counts = cdiv(shape[0], height), cdiv(shape[1], width)
        alike = [counts] + [counts[:1]] * (counts[1] == 1) + [()] * (counts == (1, 1))
        if tensor.shape in alike:
            break
        expected.append(str(list(counts)))
    else:
        raise parts.error(
            part, f"has the shape {list(tensor.shape)}; of a matrix {list(shape)} expected {' or '.join(expected)}"
        )

    def rows(start: int, stop: int) -> np.ndarray:
        first, last = start // height, cdiv(stop, height)
        read = tensor.rows(first, last).reshape(last - first, counts[1])
        if tensor.dtype == EXPONENTS:
            read = power_of_two(read, 127)
        return read if height == 1 else read[np.arange(start, stop) // height - first]

    return Scales("bfloat16" if tensor.dtype == EXPONENTS else tensor.dtype, height, width, rows)


def _bytes(parts: Parts, scale_part: str, allowed: Iterable[Blocks], *dtypes: str, act_order: bool = False) -> Matrix:
    """A matrix of float8 or int8."""
    weight = parts.matrix(".weight", *dtypes)
    shape = (weight.shape[0], weight.shape[1])
    scales = _scales(parts, scale_part, shape, allowed)
    zeros: Rows | None = None
    if weight.dtype == "int8":
        format, name = Format("int8", 8, scale=scales.dtype), "int8"
        if ".weight_zero_point" in parts.tensors:
            counts = cdiv(shape[0], scales.height), cdiv(shape[1], scales.width)
            tensor = parts.need(".weight_zero_point", "int8", shape=counts)
            zeros = lambda start, stop: tensor.rows(0, counts[0])[np.arange(start, stop) // scales.height]  # noqa: E731
            format, name = replace(format, name="int8 with zeros", minimum="int8"), "int8 with zeros"
    else:
        format, name = replace(FORMATS["FP8"], scale=scales.dtype), "float8"
    blocks = lambda start, stop: weight.rows(start, stop).view(np.uint8)  # noqa: E731
    groups = _groups(parts, ".weight_g_idx", shape[1], scales.width, act_order)
    return Matrix(parts, name, shape, format, BYTES, groups, scale_part, blocks, scales.rows, zeros)


def _float8(fields: Fields) -> Reader:
    allowed = [TENSOR, CHANNEL]
    if fields.list_of(int, "weight_block_size"):
        allowed = [_block(fields, "weight_block_size")]

    def read(parts: Parts) -> Matrix:
        scale = ".weight_scale" if ".weight_scale" in parts.tensors else ".weight_scale_inv"
        return _bytes(parts, scale, allowed, "float8_e4m3fn")

    return read


def _block(fields: Fields, key: str) -> Blocks:
    sizes = fields.list_of(int, key) or []
    if len(sizes) != 2 or any(isinstance(size, bool) or not 0 < size < 1 << 31 for size in sizes):
        raise fields.error(key, "must be two positive integers")
    return Blocks(*sizes)


# dtype of the weights -> what they are, and of how many bits
STORED = {"int32": ("int", (4, 8)), "uint8": ("float", (4,)), "int8": ("int", (4, 8)), "float8_e4m3fn": ("float", (8,))}


class Scheme(NamedTuple):
    """What one of "config_groups" says of weights."""

    kind: str  # "int" or "float"
    bits: int
    symmetric: bool
    blocks: Blocks
    act_order: bool


def _scheme(group: Any, source: str) -> Scheme | None:
    weights = Fields(group if isinstance(group, dict) else {}, source).object("weights")
    if weights is None:
        return None
    fields = Fields(weights, f"{source}: weights")
    kind, strategy = fields.text("type") or "int", fields.text("strategy") or ""
    group_size = _group_size(fields, "group_size")
    strategy = strategy or ("group" if group_size else "tensor")
    if strategy == "block":
        blocks = _block(fields, "block_structure")
    elif strategy in ("tensor", "channel", "group"):
        blocks = {"tensor": TENSOR, "channel": CHANNEL, "group": Blocks(1, group_size)}[strategy]
    else:
        raise fields.error("strategy", "tensor, channel, group and block can be read")
    bits = fields.integer("num_bits", default=8)
    if (kind, bits) not in [("int", 4), ("int", 8), ("float", 8), ("float", 4)]:
        raise fields.error("num_bits", f"int of 4 or 8 and float of 4 or 8 can be read, not {reprlib.repr(kind)}")
    order = fields.values.get("actorder") in ("group", True)
    return Scheme(kind, bits, fields.flag("symmetric", default=True), blocks, order)


def _compressed(fields: Fields) -> Reader:
    """The schemes apply to modules whose names match; the tensors of a module say which of them it has."""
    groups = fields.object("config_groups") or {}
    found = [_scheme(group, f"{fields.source}: {name[:80]!r}") for name, group in groups.items()]
    schemes = [scheme for scheme in found if scheme is not None]
    if not schemes:
        raise fields.error("config_groups", "expected a group that says how weights are quantised")

    return partial(_compressed_matrix, schemes)


def _compressed_matrix(schemes: list[Scheme], parts: Parts) -> Matrix:
    part = ".weight_packed" if ".weight_packed" in parts.tensors else ".weight"
    dtype = parts.matrix(part, *STORED).dtype
    kind, widths = STORED[dtype]
    needless = _drop_needless_zeros(parts)
    zeros = ".weight_zero_point" in parts.tensors
    alike = [
        scheme
        for scheme in schemes
        if scheme.kind == kind and scheme.bits in widths and (needless or scheme.symmetric != zeros)
    ]
    if not alike:
        said = ", ".join(f"{scheme.kind}{scheme.bits}" + " with zeros" * (not scheme.symmetric) for scheme in schemes)
        raise parts.error(part, f"holds {kind} weights{' with zeros' * zeros}, 'config_groups' say {said}")
    if dtype == "uint8":
        return _fp4(parts, ".weight_packed", ".weight_scale")
    if part == ".weight_packed":
        return _packed(parts, alike)
    act_order = any(scheme.act_order for scheme in alike)
    return _bytes(parts, ".weight_scale", [scheme.blocks for scheme in alike], dtype, act_order=act_order)


def _drop_needless_zeros(parts: Parts) -> bool:
    """Whether there were zero points of nothing but zeros: older files have these of symmetric weights, too."""
    tensor = parts.tensors.get(".weight_zero_point")
    if tensor is None or tensor.dtype != "int8" or tensor.rows(0, max(tensor.num_rows, 1)).any():
        return False
    del parts.tensors[".weight_zero_point"]
    return True


def _packed(parts: Parts, schemes: list[Scheme]) -> Matrix:
    """A matrix of integers in words, of compressed-tensors."""
    words = parts.need(".weight_packed", "int32")
    sizes = parts.need(".weight_shape", "int64", "int32", shape=(2,)).rows(0, 2).tolist()
    out_features, in_features = sizes
    fitting = [s for s in schemes if words.shape == (out_features, cdiv(in_features * s.bits, 32))]
    if not fitting or in_features < 1:
        said = " or ".join(dict.fromkeys(str(scheme.bits) for scheme in schemes))
        raise parts.error(
            ".weight_packed",
            f"has the shape {list(words.shape)}; weight_shape is {sizes}, and 'config_groups' say {said} bits",
        )
    bits, per_word = fitting[0].bits, 32 // fitting[0].bits
    scales = _scales(parts, ".weight_scale", (out_features, in_features), [scheme.blocks for scheme in fitting])
    count = cdiv(in_features, scales.width)
    zeros: Rows | None = None
    if ".weight_zero_point" in parts.tensors:
        packed = parts.need(".weight_zero_point", "int32", shape=(cdiv(out_features, per_word), count))

        def zeros(start: int, stop: int) -> np.ndarray:
            first, last = start // per_word, cdiv(stop, per_word)
            integers = unpacked_words(packed.rows(first, last).T, bits).T
            return _shifted(integers[start - first * per_word : stop - first * per_word], bits)

    act_order = any(scheme.act_order for scheme in fitting)
    return Matrix(
        parts=parts,
        name=f"compressed-tensors int{bits}",
        shape=(out_features, in_features),
        format=_of_integers(bits, scales.dtype, zeros is not None),
        layout=LAYOUTS[bits],
        groups=_groups(parts, ".weight_g_idx", in_features, scales.width, act_order),
        scale_part=".weight_scale",
        blocks=lambda start, stop: words.rows(start, stop).view(np.uint8),
        scales=scales.rows,
        zeros=zeros,
    )


# MXFP4


def _fp4(parts: Parts, block_part: str, scale_part: str) -> Matrix:
    """Pairs of e2m1 and a power of two for 32 of them; of several experts, all rows, one expert after the other."""
    blocks = parts.need(block_part, "uint8")
    scales = parts.need(scale_part, "uint8", EXPONENTS)
    count = scales.shape[-1] if scales.shape else 0
    width = (count, 16) if len(blocks.shape) > len(scales.shape) else (16 * count,)
    if len(scales.shape) < 2 or 0 in scales.shape or blocks.shape != (*scales.shape[:-1], *width):
        raise parts.error(block_part, f"has the shape {list(blocks.shape)}, and its scales {list(scales.shape)}")
    height = prod(scales.shape[1:-1])  # rows in one of the first dimension

    def rows(tensor: StoredTensor, length: int, start: int, stop: int) -> np.ndarray:
        first, last = start // height, cdiv(stop, height)
        read = tensor.rows(first, last).reshape((last - first) * height, length)
        return read[start - first * height : stop - first * height]

    exponents = partial(rows, scales, count)
    return Matrix(
        parts=parts,
        name="MXFP4 in pairs",
        shape=(scales.shape[0] * height, count * 32),
        format=FORMATS["MXFP4"],
        layout=PAIRS,
        groups=_regular(count * 32, 32),
        scale_part=scale_part,
        blocks=partial(rows, blocks, 16 * count),
        scales=lambda start, stop: power_of_two(exponents(start, stop), 128),  # 128: the table holds twice the values
        experts=scales.shape[0] if len(scales.shape) > 2 else 0,
    )


def _mxfp4(fields: Fields) -> Reader:
    return lambda parts: _fp4(parts, "_blocks", "_scales")


# All


class Method(NamedTuple):
    """suffixes: what the tensors of a quantised matrix end in.  reader: of the configuration, which it checks."""

    suffixes: tuple[str, ...]
    reader: Callable[[Fields], Reader]


_FLOAT8 = Method((".weight", ".weight_scale", ".weight_scale_inv"), _float8)
METHODS = {
    "gptq": Method((".qweight", ".qzeros", ".scales", ".g_idx"), _gptq),
    "awq": Method((".qweight", ".qzeros", ".scales"), _awq),
    "compressed-tensors": Method(
        (
            *(".weight_packed", ".weight", ".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx"),
            ".weight_global_scale",
        ),
        _compressed,
    ),
    "fp8": _FLOAT8,
    "fbgemm_fp8": _FLOAT8,
    "modelopt": _FLOAT8,
    "mxfp4": Method(("_blocks", "_scales"), _mxfp4),
}


def read_quantised(path: Path, tensors: dict[str, StoredTensor], quantisation: Quantisation) -> dict[str, StoredTensor]:
    """The tensors of a quantised checkpoint as those of one that isn't: "<module>.weight" for each module.

    path: names the checkpoint in errors. Little is read: the orders of groups, and shapes that are stored as tensors.
    Raises ValueError if the tensors aren't what the method has, or what the configuration says.
    """
    suffixes, reader = METHODS[quantisation.method]
    read = reader(quantisation.fields)
    found, modules = _by_module(tensors, suffixes)
    if not modules:
        raise ValueError(
            f"{quantisation.fields.source} says that the weights are quantised, by {quantisation.method}; no tensor is,"
            f" of those that end in {', '.join(suffixes)}; {DISAGREES}"
        )
    floats = []
    for module, of_module in modules.items():
        parts = Parts(path, module, of_module)
        for name, tensor in read(parts).tensors():
            if name in found:
                where = found[name].path or path
                raise ValueError(f"{where}: tensor {name!r} is there as it is and quantised; {DISAGREES}")
            found[name] = tensor
            if tensor.encoded is None:
                floats.append(name)
        if more := parts.tensors.keys() - parts.used:
            raise parts.error(min(more), f"is not expected beside {', '.join(sorted(parts.used))}")
    if floats:
        why = f"kernels take groups and rows of multiples of {GROUP} weights"
        logger.warning("%s: %d tensors are kept in floats, as %s (%s ...)", path, len(floats), why, floats[0])
    return found


def _by_module(
    tensors: dict[str, StoredTensor], suffixes: tuple[str, ...]
) -> tuple[dict[str, StoredTensor], dict[str, dict[str, StoredTensor]]]:
    """The tensors that are no part of a quantised matrix, and by module and suffix those that are."""
    found: dict[str, StoredTensor] = {}
    modules: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        suffix = next((suffix for suffix in suffixes if name.endswith(suffix)), None)
        if suffix is not None:
            modules[name.removesuffix(suffix)][suffix] = tensor
        elif name.rpartition(".")[2] not in OF_ACTIVATIONS:
            found[name] = tensor
    for module, parts in list(modules.items()):
        if parts.keys() == {".weight"} and parts[".weight"].dtype in DTYPES:
            found[f"{module}.weight"] = modules.pop(module)[".weight"]
    return found, modules


def empty_biases(tensors: dict[str, StoredTensor]) -> frozenset[str]:
    """The biases that are zeros: AutoGPTQ long gave one to every layer, which most models don't have."""
    names = [name for name, tensor in tensors.items() if name.endswith(".bias") and len(tensor.shape) == 1]
    return frozenset(name for name in names if not tensors[name].rows(0, tensors[name].num_rows).any())
