"""Quantised matrices in the layouts of Hugging Face's checkpoints, packed number by number from their descriptions.

A layout is a function of a random generator and a shape [N, K]; it gives the tensors by what their names end in, as
(safetensors' dtype, array), and the matrix that they stand for, in float64.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.models.reference import stored

Tensors = dict[str, tuple[str, np.ndarray]]
Layout = Callable[[np.random.Generator, int, int], tuple[Tensors, np.ndarray]]
NUMPY = {"F32": np.float32, "F16": np.float16, "I32": np.uint32, "I64": np.int64, "U8": np.uint8, "I8": np.int8}


def save(path: Path, tensors: Tensors) -> None:
    """A safetensors file. BF16 are given as float32, F8_E4M3 as their bytes, I32 as uint32."""
    header, data = {}, b""
    for name, (dtype, array) in tensors.items():
        if dtype == "BF16":
            content = (np.asarray(array, np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
        else:
            content = np.asarray(array).astype(NUMPY.get(dtype, np.uint8)).tobytes()
        places = [len(data), len(data) + len(content)]
        header[name] = {"dtype": dtype, "shape": list(np.shape(array)), "data_offsets": places}
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def floats(generator: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Scales of 4-bit weights that `dtype` can say, as float64."""
    name = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}[dtype]
    return stored(generator.uniform(0.005, 0.02, size=shape), name)


def words_along_first(integers: np.ndarray, bits: int) -> np.ndarray:
    """[K, N] -> [K bits / 32, N] words: number k of a column has the bits k bits ... of the column's words."""
    height, width = integers.shape
    words = [[0] * width for _ in range(-(-height * bits // 32))]
    for k in range(height):
        for bit in range(bits):
            word, place = divmod(k * bits + bit, 32)
            for n in range(width):
                words[word][n] |= (int(integers[k, n]) >> bit & 1) << place
    return np.array(words, np.uint32)


def words_along_last(integers: np.ndarray, bits: int) -> np.ndarray:
    return words_along_first(integers.T, bits).T


def awq_words(integers: np.ndarray) -> np.ndarray:
    """[K, N] -> [K, N / 8]: nibble i of a word is the column 8 j + order[i]."""
    words = np.zeros((integers.shape[0], integers.shape[1] // 8), np.uint32)
    for k in range(words.shape[0]):
        for j in range(words.shape[1]):
            words[k, j] = sum(int(integers[k, 8 * j + n]) << 4 * i for i, n in enumerate((0, 2, 4, 6, 1, 3, 5, 7)))
    return words


def dequantised(integers: np.ndarray, scales: np.ndarray, zeros: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """[N, K] from integers [N, K], scales and zeros [N, G], and the group of each k."""
    found = np.empty(integers.shape)
    for k, group in enumerate(groups):
        found[:, k] = scales[:, group] * (integers[:, k].astype(np.float64) - zeros[:, group])
    return found


def gptq(
    bits: int = 4,
    size: int = 32,
    act_order: bool = False,
    symmetric: bool = False,
    version: int = 1,
    scale: str = "F16",
) -> Layout:
    def layout(generator: np.random.Generator, rows: int, width: int) -> tuple[Tensors, np.ndarray]:
        own = width if size == -1 else size
        count = -(-width // own)
        integers = generator.integers(0, 1 << bits, size=(rows, width))
        scales = floats(generator, (rows, count), scale) / 2 ** (bits - 4)
        zeros = generator.integers(0, 1 << bits, size=(rows, count))
        if symmetric:
            zeros[:] = 1 << (bits - 1)
        groups = np.arange(width) // own
        if act_order:
            groups = np.random.default_rng(width).permutation(groups)  # the same for all that reads the same
        tensors: Tensors = {
            "qweight": ("I32", words_along_first(integers.T, bits)),
            "qzeros": ("I32", words_along_last((zeros - (version == 1)).T % (1 << bits), bits)),
            "scales": (scale, scales.T),
            "g_idx": ("I32", groups),
        }
        return tensors, dequantised(integers, scales, zeros, groups)

    return layout


def awq(size: int = 32) -> Layout:
    def layout(generator: np.random.Generator, rows: int, width: int) -> tuple[Tensors, np.ndarray]:
        integers = generator.integers(0, 16, size=(rows, width))
        scales = floats(generator, (rows, width // size), "F16")
        zeros = generator.integers(0, 16, size=scales.shape)
        tensors: Tensors = {
            "qweight": ("I32", awq_words(integers.T)),
            "qzeros": ("I32", awq_words(zeros.T)),
            "scales": ("F16", scales.T),
        }
        return tensors, dequantised(integers, scales, zeros, np.arange(width) // size)

    return layout


def packed(bits: int, size: int | None, symmetric: bool = True, act_order: bool = False) -> Layout:
    """pack-quantized of compressed-tensors; size None: by channel."""

    def layout(generator: np.random.Generator, rows: int, width: int) -> tuple[Tensors, np.ndarray]:
        most = 1 << (bits - 1)
        integers = generator.integers(-most, most, size=(rows, width))
        groups = np.arange(width) // (size or width)
        scales = floats(generator, (rows, groups.max() + 1), "BF16") / 2 ** (bits - 4)
        zeros = np.zeros(scales.shape, int) if symmetric else generator.integers(-most, most, size=scales.shape)
        tensors: Tensors = {
            "weight_packed": ("I32", words_along_last(integers + most, bits)),
            "weight_scale": ("BF16", scales),
            "weight_shape": ("I64", np.array([rows, width])),
        }
        if not symmetric:
            tensors["weight_zero_point"] = ("I32", words_along_first(zeros + most, bits))
        if act_order:
            groups = np.random.default_rng(width).permutation(groups)
            tensors["weight_g_idx"] = ("I32", groups)
        return tensors, dequantised(integers, scales, zeros, groups)

    return layout


def int8(symmetric: bool = True) -> Layout:
    def layout(generator: np.random.Generator, rows: int, width: int) -> tuple[Tensors, np.ndarray]:
        integers = generator.integers(-128, 128, size=(rows, width))
        scales = floats(generator, (rows, 1), "BF16") / 16
        zeros = np.zeros((rows, 1), int) if symmetric else generator.integers(-128, 128, size=(rows, 1))
        tensors: Tensors = {"weight": ("I8", integers), "weight_scale": ("BF16", scales)}
        if not symmetric:
            tensors["weight_zero_point"] = ("I8", zeros)
        return tensors, dequantised(integers, scales, zeros, np.zeros(width, int))

    return layout


def e4m3(byte: int) -> float:
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    magnitude = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -magnitude if sign else magnitude


def fp8(height: int, width: int, scale: str = "F32", name: str = "weight_scale", shape: str = "matrix") -> Layout:
    """float8 whose blocks of height * width share a scale; 0 stands for all. shape: "matrix", "vector" or "number"."""

    def layout(generator: np.random.Generator, rows: int, columns: int) -> tuple[Tensors, np.ndarray]:
        high, wide = height or rows, width or columns
        codes = generator.integers(0, 256, size=(rows, columns)).astype(np.uint8)
        codes[codes & 0x70 == 0x70] &= 0x8F  # neither the largest numbers nor NaN
        scales = floats(generator, (-(-rows // high), -(-columns // wide)), scale) / 8
        values = np.empty(codes.shape)
        for n in range(rows):
            for k in range(columns):
                values[n, k] = e4m3(int(codes[n, k])) * scales[n // high, k // wide]
        reshaped = {"matrix": scales, "vector": scales.reshape(-1), "number": scales.reshape(-1)[0]}[shape]
        return {"weight": ("F8_E4M3", codes), name: (scale, reshaped)}, values

    return layout


E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def mxfp4_tensors(generator: np.random.Generator, *shape: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bytes [..., K / 32, 16], exponents [..., K / 32] and values [..., K]."""
    codes = generator.integers(0, 16, size=(*shape[:-1], shape[-1] // 32, 32))
    exponents = generator.integers(118, 124, size=codes.shape[:-1])
    values = np.vectorize(lambda code: E2M1[code & 7] * (-1.0 if code & 8 else 1.0))(codes)
    values *= 2.0 ** (exponents[..., None] - 127.0)
    return codes[..., 0::2] | codes[..., 1::2] << 4, exponents, values.reshape(shape)


def mxfp4(generator: np.random.Generator, rows: int, width: int) -> tuple[Tensors, np.ndarray]:
    pairs, exponents, values = mxfp4_tensors(generator, rows, width)
    return {"_blocks": ("U8", pairs), "_scales": ("U8", exponents)}, values


def mxfp4_compressed(generator: np.random.Generator, rows: int, width: int) -> tuple[Tensors, np.ndarray]:
    pairs, exponents, values = mxfp4_tensors(generator, rows, width)
    return {"weight_packed": ("U8", pairs.reshape(rows, -1)), "weight_scale": ("U8", exponents)}, values


def compressed(form: str, **weights: object) -> dict[str, object]:
    """What compressed-tensors says of one group of all linear layers."""
    group = {"targets": ["Linear"], "weights": {"type": "int", "symmetric": True, **weights}, "input_activations": None}
    said = {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head", "re:.*gate$"]}
    return {**said, "config_groups": {"group_0": group}}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
BLOCKS = {**FP8, "fmt": "e4m3", "weight_block_size": [128, 128]}
CASES: dict[str, tuple[dict[str, object], Layout]] = {
    "gptq": (GPTQ, gptq()),
    "gptq, symmetric, groups of 64": ({**GPTQ, "group_size": 64, "sym": True}, gptq(size=64, symmetric=True)),
    "gptq, groups of 128, v2": ({**GPTQ, "group_size": 128, "checkpoint_format": "gptq_v2"}, gptq(size=128, version=2)),
    "gptq, whole rows, bfloat16": ({**GPTQ, "group_size": -1}, gptq(size=-1, scale="BF16")),
    "gptq, 2 bits": ({**GPTQ, "bits": 2}, gptq(2)),
    "gptq, 3 bits": ({**GPTQ, "bits": 3, "group_size": 64}, gptq(3, 64)),
    "gptq, 8 bits": ({**GPTQ, "bits": 8}, gptq(8)),
    "gptq, 8 bits, symmetric": ({**GPTQ, "bits": 8, "sym": True}, gptq(8, symmetric=True)),
    "gptq, bits of each module": ({**GPTQ, "dynamic": {"+:.*": {"bits": 8}}}, gptq(8)),
    "gptq, act order": ({**GPTQ, "desc_act": True}, gptq(act_order=True)),
    "auto-round": ({**GPTQ, "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}, gptq()),
    "awq": (AWQ, awq()),
    "awq, groups of 128": ({**AWQ, "group_size": 128}, awq(128)),
    "packed int4": (compressed("pack-quantized", num_bits=4, strategy="group", group_size=128), packed(4, 128)),
    "packed int4, zeros": (
        compressed("pack-quantized", num_bits=4, strategy="group", group_size=32, symmetric=False),
        packed(4, 32, symmetric=False),
    ),
    "packed int4, act order": (
        compressed("pack-quantized", num_bits=4, strategy="group", group_size=32, actorder="group"),
        packed(4, 32, act_order=True),
    ),
    "packed int8, channels": (compressed("pack-quantized", num_bits=8, strategy="channel"), packed(8, None)),
    "packed int8, zeros": (
        compressed("pack-quantized", num_bits=8, strategy="group", group_size=64, symmetric=False),
        packed(8, 64, symmetric=False),
    ),
    "int8": (compressed("int-quantized", num_bits=8, strategy="channel"), int8()),
    "int8, zeros": (compressed("int-quantized", num_bits=8, strategy="channel", symmetric=False), int8(False)),
    "naive int8": (compressed("naive-quantized", num_bits=8, strategy="channel"), int8()),
    "float8 of a matrix": (
        compressed("float-quantized", num_bits=8, type="float", strategy="tensor"),
        fp8(0, 0, "BF16", shape="vector"),
    ),
    "float8 of channels": (
        compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
        fp8(1, 0, "BF16"),
    ),
    "float8 of blocks": (
        compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[128, 128]),
        fp8(128, 128, "BF16"),
    ),
    "packed MXFP4": (
        compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
        mxfp4_compressed,
    ),
    "fp8, blocks": (BLOCKS, fp8(128, 128, name="weight_scale_inv")),
    "fp8, blocks, bfloat16": (BLOCKS, fp8(128, 128, "BF16", name="weight_scale_inv")),
    "fp8, a number": (FP8, fp8(0, 0, shape="number")),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, fp8(1, 0)),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "FP8"}, fp8(0, 0, shape="number")),
    "modelopt, channels": (
        {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        fp8(1, 0, shape="vector"),
    ),
    "mxfp4": ({"quant_method": "mxfp4"}, mxfp4),
}
