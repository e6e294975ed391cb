"""A model with the weights that were quantised while it was loaded, as a GGUF file.

What becomes of each tensor:

    quantised while loading      its integers and scales, taken out of the packed weights: Q4_1 or Q8_0
    quantised in a GGUF file     the file's blocks
    floats                       what the model has: matrices in its dtype, vectors and routers in float32

So the file says what the model computes with, bit for bit. Names, the order of rows and the metadata are llama.cpp's.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import partial
from math import log, prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGUFReader, GGUFWriter
from gguf.constants import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFValueType, LlamaFileType
from gguf.quants import quant_shape_to_byte_shape

from fastdeploy.config import DTYPE_KEY, GGUF_ARCHITECTURES, YARN_BETAS, ModelConfig
from fastdeploy.kernels.formats import QuantisedWeight
from fastdeploy.kernels.rope import rope_divisors, yarn_length
from fastdeploy.models.decoder import Decoder
from fastdeploy.models.gguf import EXPERTS, GGUFFile, gguf_name, half_split_rows
from fastdeploy.models.loading import as_float32
from fastdeploy.models.weights import Checkpoint

FLOAT_TYPES = {
    "float32": GGMLQuantizationType.F32,
    "float16": GGMLQuantizationType.F16,
    "bfloat16": GGMLQuantizationType.BF16,
}
FILE_TYPES = {  # what a file calls itself by the type of most of its bytes; others have no name of their own
    GGMLQuantizationType.F32: LlamaFileType.ALL_F32,
    GGMLQuantizationType.F16: LlamaFileType.MOSTLY_F16,
    GGMLQuantizationType.BF16: LlamaFileType.MOSTLY_BF16,
    GGMLQuantizationType.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    GGMLQuantizationType.Q4_1: LlamaFileType.MOSTLY_Q4_1,
    GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
}
VALUE_TYPES = {
    bool: GGUFValueType.BOOL,
    int: GGUFValueType.INT32,
    float: GGUFValueType.FLOAT32,
    str: GGUFValueType.STRING,
}
OF_THE_OTHER_FILE = ("GGUF.", "split.", "general.architecture", "general.file_type", "general.quantization_version")
KeyValue = tuple[str, Any, GGUFValueType, GGUFValueType | None]  # the last: of an array's items


class _Tensor(NamedTuple):
    """A tensor of the file. shape: in bytes along the last dimension.  read: gives it, uint8."""

    type: GGMLQuantizationType
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def save(path: Path, model: Decoder, checkpoint: Checkpoint, vocabulary: Mapping[str, Any] | None) -> None:
    """Write `model`, as it was loaded from `checkpoint`, to the GGUF file `path`. What is there is replaced at the end.

    vocabulary: GGUF's metadata of the tokenizer, for a checkpoint that is no GGUF file. None: the file has none.

    Raises ValueError for what GGUF has no form for, OSError if the file can't be written.
    """
    config, of_file = checkpoint.config, None if checkpoint.metadata is None else GGUFFile(checkpoint.path)
    if of_file is None:
        _refuse_unsayable(checkpoint)
    architecture = _architecture(checkpoint)
    tensors = dict(_stacked(checkpoint, dict(_tensors(model, checkpoint, architecture))))
    tensors |= _divisors(config, of_file)
    metadata = [*_described(config, architecture, vocabulary)] if of_file is None else [*_copied(of_file.path)]
    unfinished = path.with_name(f"{path.name}.part")
    try:
        with closing(GGUFWriter(unfinished, architecture)) as writer:
            for key_value in [*metadata, *_general(model, tensors)]:
                writer.add_key_value(*key_value)
            for name, tensor in tensors.items():
                writer.add_tensor_info(name, tensor.shape, np.dtype(np.uint8), prod(tensor.shape), tensor.type)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in tensors.values():
                writer.write_tensor_data(tensor.read())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _refuse_unsayable(checkpoint: Checkpoint) -> None:
    """Raises ValueError for a configuration of which llama.cpp's keys would make another model."""
    config = checkpoint.config
    mixture, scaling = config.mixture, config.rope_scaling or {}
    unsayable = {
        "that the weights of experts are not divided by their sum": mixture and mixture.weight_floor is None,
        "that YaRN's ramp begins between two pairs (truncate)": scaling.get("truncate") is False,
    }
    for what, is_so in unsayable.items():
        if is_so:
            raise ValueError(f"{checkpoint.path}: GGUF can't say {what}; it can't be saved as such a file")


# Tensors


def _tensors(model: Decoder, checkpoint: Checkpoint, architecture: str) -> Iterator[tuple[str, _Tensor]]:
    """By Hugging Face's names, the rows in llama.cpp's order."""
    config = checkpoint.config
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads} if architecture == "llama" else {}
    for name in model.places:
        tensor = _tensor(name, model, checkpoint)
        module = name.split(".")[-2]
        if module in heads:
            tensor = tensor._replace(read=_interleaved(tensor.read, half_split_rows(heads[module], config.head_dim)))
        yield name, tensor


def _tensor(name: str, model: Decoder, checkpoint: Checkpoint) -> _Tensor:
    shape = checkpoint.shape(name)
    place = model.places[name]
    if place is None:
        vector = len(shape) == 1 or name.endswith(("mlp.gate.weight", "e_score_correction_bias"))
        dtype = "float32" if vector else model.dtype
        shape = shape[1:] if name.endswith("e_score_correction_bias") else shape
        width = shape[-1] * (4 if dtype == "float32" else 2)
        return _Tensor(FLOAT_TYPES[dtype], (*shape[:-1], width), lambda: _floats(checkpoint, name, dtype, shape))
    weight, first_row = place
    storage = checkpoint.storage(name)
    encoded = checkpoint.encoded(name)
    if encoded is None or encoded.format.name != weight.format.name:
        type_, read = GGMLQuantizationType[weight.format.name], lambda: _blocks(model, weight, first_row, shape[0])
    elif checkpoint.metadata is not None:
        type_, read = GGMLQuantizationType[storage], lambda: checkpoint.read_codes(name, 0, shape[0]).blocks
    else:
        raise ValueError(
            f"{checkpoint.path}: {name} was stored as {storage}, for which GGUF has no form that loses nothing; save a"
            ' model that was loaded from floats with quantization="wint4" or "wint8"'
        )
    return _Tensor(type_, quant_shape_to_byte_shape(shape, type_), read)


def _floats(checkpoint: Checkpoint, name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor in `dtype`, as bytes."""
    tensor = checkpoint.read(name)
    array = tensor.array
    if tensor.dtype != dtype:
        array = as_float32(tensor)
        array = rounded_to_bfloat16(array) if dtype == "bfloat16" else array.astype(dtype)
    return np.ascontiguousarray(array).reshape(shape).view(np.uint8)


def rounded_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 values as the bits of bfloat16, rounded to nearest, halves to even; NaN stays NaN."""
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), bits >> 16 | 0x40, rounded).astype(np.uint16)


def _blocks(model: Decoder, weight: QuantisedWeight, place: int, count: int) -> np.ndarray:
    """Rows [place, place + count) of a packed weight in Q4_1 or Q8_0 as GGUF's blocks, [count, bytes of a row] uint8.

    A tile has a block's bytes in the block's own order, but those of 16 rows mixed: see kernels/formats.py.
    """
    to_numpy = model.device.to_numpy
    data = to_numpy(weight.data).view(np.uint8)  # [N/16, K/32, 4 or 8, 16, 4]
    tiles, groups = data.shape[:2]
    parts = [data.transpose(0, 3, 1, 2, 4).reshape(tiles * 16, groups, -1)]
    for plane in (weight.minimums, weight.scales):
        if plane is not None:  # [N/16, K/32, 16] float16
            halves = np.ascontiguousarray(to_numpy(plane).transpose(0, 2, 1)).reshape(tiles * 16, groups, 1)
            parts.insert(0, halves.view(np.uint8))
    return np.concatenate([part[place : place + count] for part in parts], axis=2).reshape(count, -1)


def _interleaved(read: Callable[[], np.ndarray], order: np.ndarray) -> Callable[[], np.ndarray]:
    """Rows in half-split order put back to where llama.cpp's rotary embedding wants them."""

    def reordered() -> np.ndarray:
        rows = read()
        out = np.empty_like(rows.reshape(len(order), -1))
        out[order] = rows.reshape(len(order), -1)
        return out.reshape(rows.shape)

    return reordered


def _stacked(checkpoint: Checkpoint, tensors: Mapping[str, _Tensor]) -> Iterator[tuple[str, _Tensor]]:
    """By llama.cpp's names, with the matrices of all experts as one tensor."""
    stacks: dict[str, list[_Tensor]] = {}
    for name, tensor in tensors.items():
        before, is_expert, after = name.partition(EXPERTS)
        if not is_expert:
            yield gguf_name(name), tensor
        else:
            stacks.setdefault(f"{before}{EXPERTS}{after.partition('.')[2]}", []).append(tensor)
    for name, parts in stacks.items():
        types = {part.type for part in parts}
        if len(types) > 1:
            found = ", ".join(sorted(type_.name for type_ in types))
            raise ValueError(f"{checkpoint.path}: experts of {name} are {found}; GGUF has one type for all of them")
        shape = (len(parts), *parts[0].shape)
        yield gguf_name(name), _Tensor(parts[0].type, shape, partial(_stack, parts))


def _stack(parts: list[_Tensor]) -> np.ndarray:
    return np.stack([part.read() for part in parts])


def _divisors(config: ModelConfig, of_file: GGUFFile | None) -> dict[str, _Tensor]:
    """What divides the rotary embedding's frequencies, which GGUF has as a tensor: the file's own, or Llama 3's."""
    values = None
    if of_file is not None and "rope_freqs.weight" in of_file.tensors:
        stored = of_file.stored_tensors({})["rope_freqs.weight"]
        values = stored.rows(0, stored.num_rows)
    elif of_file is None and (config.rope_scaling or {}).get("rope_type") == "llama3":
        values = rope_divisors(config.head_dim, config.rope_theta, config.rope_scaling).astype(np.float32)
    if values is None:
        return {}
    content = np.ascontiguousarray(values).view(np.uint8)
    return {"rope_freqs.weight": _Tensor(GGMLQuantizationType.F32, content.shape, lambda: content)}


# Metadata


def _architecture(checkpoint: Checkpoint) -> str:
    if checkpoint.metadata is not None:
        return checkpoint.metadata["general.architecture"]
    names = {architecture: name for name, architecture in GGUF_ARCHITECTURES.items()}
    return names[checkpoint.config.architecture]


def _general(model: Decoder, tensors: Mapping[str, _Tensor]) -> Iterator[KeyValue]:
    nbytes: Counter[GGMLQuantizationType] = Counter()
    for tensor in tensors.values():
        nbytes[tensor.type] += prod(tensor.shape)
    most = next((FILE_TYPES[type_] for type_, _ in nbytes.most_common() if type_ in FILE_TYPES), None)
    if most is not None:
        yield "general.file_type", int(most), GGUFValueType.UINT32, None
    yield "general.quantization_version", GGML_QUANT_VERSION, GGUFValueType.UINT32, None
    yield DTYPE_KEY, model.dtype, GGUFValueType.STRING, None


def _copied(path: Path) -> Iterator[KeyValue]:
    """All that is true of the new file, too."""
    for key, field in GGUFReader(path).fields.items():
        value = field.contents()
        if value != [] and not key.startswith((*OF_THE_OTHER_FILE, DTYPE_KEY)):  # the writer refuses empty lists
            yield key, value, field.types[0], field.types[-1] if len(field.types) > 1 else None


def _described(config: ModelConfig, architecture: str, vocabulary: Mapping[str, Any] | None) -> Iterator[KeyValue]:
    """What the configuration says, in the keys of llama.cpp, and the tokenizer's metadata."""
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.sliding_window": config.sliding_window,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
        **_scaling(config.rope_scaling),
    }
    if config.mixture is not None:
        values |= {
            "expert_count": config.mixture.num_experts,
            "expert_used_count": config.mixture.experts_per_token,
            "expert_feed_forward_length": config.mixture.intermediate_size,
            "expert_shared_count": config.mixture.shared_size // config.mixture.intermediate_size,
            "leading_dense_block_count": min(config.mixture.layers, default=0),
            "interleave_moe_layer_step": 1,
        }
    named = {f"{architecture}.{key}": value for key, value in values.items() if value is not None}
    for key, value in {**named, **(vocabulary or {})}.items():
        if isinstance(value, list):
            yield key, value, GGUFValueType.ARRAY, VALUE_TYPES[type(value[0])]
        else:
            yield key, value, GGUFValueType.UINT32 if type(value) is int else VALUE_TYPES[type(value)], None


def _scaling(scaling: dict[str, Any] | None) -> dict[str, Any]:
    """Rotary scaling as llama.cpp reads it; Llama 3's is a tensor, see `_divisors`."""
    kind = (scaling or {}).get("rope_type")
    if scaling is None or kind not in ("linear", "yarn"):
        return {}
    values = {"type": kind, "factor": float(scaling["factor"])}
    if kind == "yarn":
        values["original_context_length"] = int(scaling["original_max_position_embeddings"])
        values |= {f"yarn_beta_{end}": float(scaling.get(f"beta_{end}") or usual) for end, usual in YARN_BETAS.items()}
        if any(scaling.get(key) is not None for key in ("attention_factor", "mscale", "mscale_all_dim")):
            values["attn_factor"] = float(yarn_length(scaling)) / (1.0 + 0.1 * log(max(scaling["factor"], 1.0)))
    return {f"rope.scaling.{key}": value for key, value in values.items()}
