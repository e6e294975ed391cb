"""GGUF files: header, tensors, dequantisation by rows, and the names and row order that our models expect.

    magic "GGUF" | version u32 | tensor count u64 | metadata count u64
    metadata:  key string | value type u32 | value                        string: length u64, then UTF-8
    tensors:   name string | dimensions u32 | sizes u64... (innermost first) | type u32 | offset u64
    padding to the alignment (32 unless general.alignment says otherwise), then the data, each tensor aligned

The `gguf` package dequantises. Its GGUFReader isn't used: it builds NumPy arrays for every string and takes 2.5 s for
SmolLM2's 98,000 tokens and merges; reading them as below takes 0.06 s. All numbers are little-endian.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import re
import reprlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from fastdeploy.models.formats import GGUF_FORMATS
from fastdeploy.models.storage import Encoded, MappedFile, StoredTensor, gguf_parts, refuse_overlaps, tensor_shape

SCALAR_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
VERSIONS = (2, 3)
PLAIN_TYPES: dict[GGMLQuantizationType, tuple[np.dtype, str]] = {  # not quantised: NumPy dtype, dtype name
    GGMLQuantizationType.F32: (np.dtype(np.float32), "float32"),
    GGMLQuantizationType.F16: (np.dtype(np.float16), "float16"),
    GGMLQuantizationType.BF16: (np.dtype(np.uint16), "bfloat16"),
}
HUGGINGFACE_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
HEADER_BYTES = 64 << 20  # that are read of a file; 262,144 tokens and their merges take 20 MB
NAME_LENGTH = 512  # llama.cpp's names of tensors end at 64
TENSORS = 1 << 20  # of a model, those of each expert counted
OTHER_SPLIT = "the parts beside each other are of different splits, download them again"
OTHER_TYPE = "download the model again or get it in another quantisation"
EXPERTS = "mlp.experts."  # in the names of tensors that hold a matrix for every expert, [experts, out, in]


class GGUFFile:
    """An open GGUF model: its `metadata` (key -> int, float, bool, str or list) and `tensors` by Hugging Face name.

    `path` is that of the file or, if the model comes in parts, of any part; the metadata are the first one's.

    Raises FileNotFoundError or ValueError, naming the file, if it is missing, empty, truncated, corrupt or a part of
    another model than those beside it.
    """

    def __init__(self, path: Path):
        paths = gguf_parts(path)
        missing = [part.name for part in paths if not part.is_file()]
        if missing and len(paths) > 1:
            names = ", ".join(missing[:10]) + ", ..." * (len(missing) > 10)
            raise FileNotFoundError(
                f"{path}: {len(missing)} of its {len(paths)} parts are missing: {names}; put them beside it"
            )
        parts = [_Part(part) for part in paths]
        self.path = paths[0]
        self.metadata: dict[str, Any] = parts[0].metadata
        tensors: dict[str, GGUFTensor] = {}
        for index, part in enumerate(parts):
            part.check_place(index, len(parts))
            twice = next((name for name in part.tensors if name in tensors), None)
            if twice is not None:
                raise ValueError(f"{part.path}: tensor {twice!r} is in a part before it, too; {OTHER_SPLIT}")
            tensors |= part.tensors
        if len(parts) > 1:
            for part in parts:
                part.check_count(len(tensors))
        self.tensors = dict(_one_matrix_each(self.path, tensors))

    def stored_tensors(self, row_order: dict[str, tuple[int, int]]) -> dict[str, StoredTensor]:
        """The tensors, the rows of some put in half-split order: `row_order` maps "q_proj" and the like to (heads,
        head_dim)."""
        stored = {}
        for name, tensor in self.tensors.items():
            storage = PLAIN_TYPES[tensor.type][1] if tensor.type in PLAIN_TYPES else tensor.type.name
            dtype = storage if tensor.type in PLAIN_TYPES else "float32"
            of_heads = row_order.get(name.split(".")[-2:][0])
            # Other rows than those of the heads stay as they are, for `Checkpoint.check` to report.
            order = half_split_rows(*of_heads) if of_heads and math.prod(of_heads) == tensor.shape[0] else None
            rows = partial(_rows, tensor, order)
            encoded = gguf_encoded(storage, partial(_stored_rows, tensor, order))
            stored[name] = StoredTensor(tensor.shape, dtype, storage, tensor.nbytes, rows, encoded)
        return stored


class _Part:
    """One file: its metadata, and its tensors with their places in it."""

    def __init__(self, path: Path):
        self.path = path
        self.file = MappedFile(path)
        header = _Header(self.file)
        tensor_count, metadata_count = header.counts()
        self.metadata: dict[str, Any] = header.metadata(metadata_count)
        self.tensors: dict[str, GGUFTensor] = header.tensors(tensor_count)
        self._place_tensors(header.position)

    def check_place(self, index: int, count: int) -> None:
        """Raises ValueError unless the metadata say, too, that this is part `index`, from 0, of `count`."""
        said_count, said_index = self.metadata.get("split.count", 1), self.metadata.get("split.no", 0)
        said = f"{self.path}: it is one of {reprlib.repr(said_count)} parts, number {reprlib.repr(said_index)} from 0"
        if count == 1 and said_count not in (0, 1):
            raise ValueError(f"{said}; give all parts their names back, like model-00001-of-00003.gguf")
        if count > 1 and (said_count, said_index) != (count, index):
            raise ValueError(f"{said}, but by its name number {index} of {count}; {OTHER_SPLIT}")

    def check_count(self, count: int) -> None:
        """Raises ValueError unless all parts together have, as the metadata say, `count` tensors."""
        said = self.metadata.get("split.tensors.count", count)
        if said != count:
            raise ValueError(
                f"{self.path}: one of several parts with {reprlib.repr(said)} tensors together, but those beside it"
                f" have {count}; {OTHER_SPLIT}"
            )

    def _place_tensors(self, header_end: int) -> None:
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            found = reprlib.repr(alignment)
            raise ValueError(f"{self.path}: general.alignment must be a power of two from 8 on, found {found}")
        data_start = (header_end + alignment - 1) // alignment * alignment
        for name, tensor in self.tensors.items():
            tensor.offset += data_start
            end = tensor.offset + tensor.nbytes
            if tensor.offset % alignment or end > self.file.size:
                raise ValueError(
                    f"{self.path}: tensor {name!r} needs bytes {tensor.offset} to {end}, aligned to {alignment}, but"
                    f" the file has {self.file.size} bytes; it is truncated or corrupt, download it again"
                )
        places = ((tensor.offset, tensor.offset + tensor.nbytes, name) for name, tensor in self.tensors.items())
        refuse_overlaps(self.path, places)


@dataclass
class GGUFTensor:
    """Where a tensor lies: shape outermost first, GGML type, byte offset (first within the data, then in the file)."""

    file: MappedFile
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    nbytes: int


def gguf_encoded(storage: str, rows: Callable[[int, int], np.ndarray]) -> Encoded | None:
    """How kernels take a tensor of this quantisation, if they do; `rows` gives bytes."""
    found = GGUF_FORMATS.get(storage)
    return found and Encoded(found.format, found.layout, lambda start, stop: found.codes(rows(start, stop)))


def _stored_rows(tensor: "GGUFTensor", order: np.ndarray | None, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) as the file has them, [rows, bytes of a row] uint8."""
    wanted = None if order is None else order[start:stop]
    if wanted is not None and stop > start:  # whole heads are moved about, so the wanted rows lie close together
        start, stop = int(wanted.min()), int(wanted.max()) + 1
    row_bytes = tensor.nbytes // tensor.shape[0]
    stored = tensor.file.window(tensor.offset + start * row_bytes, (stop - start) * row_bytes)
    stored = stored.reshape(stop - start, row_bytes)
    return stored if wanted is None else stored[wanted - start]


def _rows(tensor: "GGUFTensor", order: np.ndarray | None, start: int, stop: int) -> np.ndarray:
    stored = _stored_rows(tensor, order, start, stop)
    shape = (stored.shape[0], *tensor.shape[1:])
    if tensor.type in PLAIN_TYPES:
        return stored.view(PLAIN_TYPES[tensor.type][0]).reshape(shape)
    if stored.shape[0] == 0:
        return np.empty(shape, np.float32)
    return dequantize(stored, tensor.type).reshape(shape)


def _one_matrix_each(path: Path, tensors: dict[str, "GGUFTensor"]) -> Iterator[tuple[str, "GGUFTensor"]]:
    """The tensors, those that stack all experts' matrices taken apart: Hugging Face has each expert's by itself."""
    stacks = {name: tensor for name, tensor in tensors.items() if EXPERTS in name}
    for name, tensor in stacks.items():
        if len(tensor.shape) < (2 if tensor.type in PLAIN_TYPES else 3):
            raise ValueError(
                f"{path}: tensor {name!r} has the shape {list(tensor.shape)}; it needs one for every expert"
            )
    count = len(tensors) + sum(tensor.shape[0] for tensor in stacks.values())
    if count > TENSORS:
        raise ValueError(f"{path}: has {count} tensors, those of all experts counted; at most {TENSORS} can be read")
    for name, tensor in tensors.items():
        if name not in stacks:
            yield name, tensor
            continue
        nbytes = tensor.nbytes // tensor.shape[0]
        for expert in range(tensor.shape[0]):
            part = GGUFTensor(tensor.file, tensor.shape[1:], tensor.type, tensor.offset + expert * nbytes, nbytes)
            yield name.replace(EXPERTS, f"{EXPERTS}{expert}."), part


def huggingface_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; an unknown name comes back unchanged, for `Checkpoint.check` to report.

    >>> huggingface_name("blk.3.attn_q.weight")
    'model.layers.3.self_attn.q_proj.weight'
    """
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is not None and match[2] == "exp_probs_b" and match[3] == "bias":
        return f"model.layers.{match[1]}.mlp.moe_statics.e_score_correction_bias"
    if match is None or match[2] not in HUGGINGFACE_NAMES:
        return name
    in_layer = f"model.layers.{match[1]}." if match[1] else ""
    return f"{in_layer}{HUGGINGFACE_NAMES[match[2]]}.{match[3]}"


def gguf_name(name: str) -> str:
    """The inverse, but for the number of an expert, which GGUF's names don't have.

    >>> gguf_name("model.layers.3.self_attn.q_proj.weight")
    'blk.3.attn_q.weight'
    """
    match = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.(weight|bias|e_score_correction_bias)", name)
    if match is None:
        return name
    in_layer = f"blk.{match[1]}." if match[1] else ""
    if match[3] == "e_score_correction_bias":
        return f"{in_layer}exp_probs_b.bias"
    own = {theirs: ours for ours, theirs in HUGGINGFACE_NAMES.items()}
    return f"{in_layer}{own.get(match[2], match[2])}.{match[3]}"


@cache
def half_split_rows(num_heads: int, head_dim: int) -> np.ndarray:
    """For each row of a q or k projection in half-split rope order, its row in a llama-architecture GGUF.

    llama.cpp rotates neighbouring pairs, so its converter moves element `half * head_dim/2 + i` of a head (`half` 0 or
    1) to `2 * i + half`. Hugging Face (and our kernels) rotate element i with element i + head_dim/2.
    """
    rows = np.arange(num_heads * head_dim).reshape(num_heads, head_dim // 2, 2)  # (head, i, half)
    return rows.swapaxes(1, 2).reshape(-1)


@cache
def _readable(ggml_type: GGMLQuantizationType) -> bool:
    """Whether `_rows` can read this type: tried on one block of zeros, as the gguf package keeps no public list."""
    if ggml_type in PLAIN_TYPES:
        return True
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[ggml_type][1]), np.uint8), ggml_type)
    except NotImplementedError:
        return False
    return True


class _Header:
    """Reads the header front to back; every length is checked against the file's size before it is used."""

    def __init__(self, file: MappedFile):
        self.file = file
        self.size = min(file.size, HEADER_BYTES)
        self.position = 0

    def error(self, message: str) -> ValueError:
        return ValueError(f"{self.file.path}: {message}")

    def counts(self) -> tuple[int, int]:
        """(tensors, metadata) that follow, after the magic and the version."""
        magic = bytes(self.file.buffer[:4])
        if magic != b"GGUF":
            raise self.error(f"not a GGUF file: expected it to begin with b'GGUF', found {magic!r}")
        self.position = 4
        version = self.number("I", "version")
        if version not in VERSIONS:
            raise self.error(
                f"GGUF version {version:#x}; versions 2 and 3 can be read, little-endian only:"
                " convert the model again with a current llama.cpp"
            )
        return self.number("Q", "tensor count"), self.number("Q", "metadata count")

    def require(self, length: int, what: str) -> None:
        if length > self.size - self.position:
            raise self.error(
                f"expected {length} bytes of {what} at byte {self.position}, found {self.size - self.position};"
                " the file is truncated or corrupt, download it again"
            )

    def number(self, form: str, what: str) -> Any:
        size = struct.calcsize("<" + form)
        self.require(size, what)
        (value,) = struct.unpack_from("<" + form, self.file.buffer, self.position)
        self.position += size
        return value

    def strings(self, count: int, what: str) -> list[str]:
        """The next `count` strings. The loop runs once per token and merge: locals and one check keep it at 0.5 us."""
        self.require(8 * count, what)  # a string has at least its length
        buffer, size, position = self.file.buffer, self.size, self.position
        unpack = struct.Struct("<Q").unpack_from
        texts = []
        try:
            for _ in range(count):
                start = position + 8
                position = start + unpack(buffer, position)[0]
                if position > size:
                    raise struct.error
                texts.append(buffer[start:position].decode())
        except struct.error:
            raise self.error(
                f"string {len(texts)} of {count} in {what} runs past the end of the file"
                f" or of what a header may have ({size} bytes); it is truncated or corrupt, download it again"
            ) from None
        except UnicodeDecodeError as error:
            raise self.error(f"string {len(texts)} of {count} in {what}: {error}") from None
        self.position = position
        return texts

    def name(self, what: str) -> str:
        """The next string, a name."""
        (name,) = self.strings(1, what)
        if len(name) > NAME_LENGTH:
            raise self.error(f"expected a name of at most {NAME_LENGTH} characters in {what}, found {name[:40]!r}...")
        return name

    def metadata(self, count: int) -> dict[str, Any]:
        """The next `count` keys with their values."""
        self.require(12 * count, "metadata")
        values: dict[str, Any] = {}
        for _ in range(count):
            key = self.name("metadata keys")
            if key in values:
                raise self.error(f"metadata key {key!r} appears twice")
            values[key] = self.value(self.number("I", f"type of {key!r}"), key)
        return values

    def value(self, value_type: int, key: str) -> Any:
        if value_type == STRING:
            return self.strings(1, repr(key))[0]
        if value_type == ARRAY:
            item_type, count = self.number("I", f"type of {key!r}"), self.number("Q", f"length of {key!r}")
            return self.array(item_type, count, key)
        return self.array(value_type, 1, key)[0]

    def array(self, item_type: int, count: int, key: str) -> list:
        """The next `count` values of one type, those of metadata `key`."""
        if item_type == STRING:
            return self.strings(count, repr(key))
        if item_type == ARRAY:
            raise self.error(f"metadata {key!r} is an array of arrays, which nothing we read needs")
        if item_type not in SCALAR_FORMATS:
            raise self.error(f"metadata {key!r} has unknown type {item_type}; known are 0 to 12")
        form = SCALAR_FORMATS[item_type]
        self.require(struct.calcsize(form) * count, repr(key))  # before the format string, whose size count decides
        items = struct.unpack_from(f"<{count}{form}", self.file.buffer, self.position)
        self.position += struct.calcsize(form) * count
        return list(items)

    def tensors(self, count: int) -> dict[str, GGUFTensor]:
        """The next `count` tensor descriptions; their offsets count from the start of the data."""
        self.require(24 * count, "tensor descriptions")
        tensors: dict[str, GGUFTensor] = {}
        for _ in range(count):
            name = huggingface_name(self.name("tensor names"))
            if name in tensors:
                raise self.error(f"tensor {name!r} appears twice")
            dimensions = self.number("I", f"dimensions of {name!r}")
            if not 1 <= dimensions <= 4:
                raise self.error(f"tensor {name!r} has {dimensions} dimensions; expected 1 to 4")
            sizes = [self.number("Q", f"shape of {name!r}") for _ in range(dimensions)]
            shape = tensor_shape(reversed(sizes), f"{self.file.path}: tensor {name!r}")
            if name.endswith("e_score_correction_bias"):
                shape = (1, *shape)  # as Hugging Face has it
            type_id, offset = self.number("I", f"type of {name!r}"), self.number("Q", f"offset of {name!r}")
            tensors[name] = self.tensor(name, shape, type_id, offset)
        return tensors

    def tensor(self, name: str, shape: tuple[int, ...], type_id: int, offset: int) -> GGUFTensor:
        """A tensor of which we know that its values can be read."""
        try:
            ggml_type = GGMLQuantizationType(type_id)
        except ValueError:
            known = ", ".join(known.name for known in GGMLQuantizationType if _readable(known))
            what = f"has unknown type {type_id}; {known} can be read"
            raise self.error(f"tensor {name!r} {what}; {OTHER_TYPE}, or update the gguf package") from None
        block_size, block_bytes = GGML_QUANT_SIZES[ggml_type]
        if block_size > 1 and len(shape) == 1:
            what = f"has shape {list(shape)}; a {ggml_type.name} tensor has to be a matrix"
        elif 0 in shape or shape[-1] % block_size:
            what = (
                f"has shape {list(shape)}; a {ggml_type.name} tensor needs rows that are a multiple of its block of"
                f" {block_size} values, and no size may be 0"
            )
        elif not _readable(ggml_type):
            what = f"is stored as {ggml_type.name}, which gguf can't dequantise"
        else:
            return GGUFTensor(self.file, shape, ggml_type, offset, math.prod(shape) // block_size * block_bytes)
        raise self.error(f"tensor {name!r} {what}; {OTHER_TYPE}")
