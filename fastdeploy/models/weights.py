"""Checkpoints: a GGUF file or a directory as a ModelConfig and tensors that are read row by row.

Whatever the format, tensors go by Hugging Face's names, in Hugging Face's shapes and order of rows, so that a model is
written once.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import reprlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdeploy.config import DTYPE_KEY, DTYPES, ModelConfig, config_from_gguf
from fastdeploy.models.configs import read_configs
from fastdeploy.models.hub import from_hub
from fastdeploy.models.paddle_layout import huggingface_layout, is_paddle_layout
from fastdeploy.models.pdparams import read_pdparams
from fastdeploy.models.safetensors import read_safetensors
from fastdeploy.models.storage import Encoded, RawTensor, StoredTensor, file_beside, gguf_parts, read_json

if TYPE_CHECKING:
    from fastdeploy.kernels.packing import Codes
    from fastdeploy.models.gguf import GGUFFile

FIRST = 10  # how many names of a kind an error lists
FORMATS = (("model", ".safetensors", read_safetensors), ("model_state", ".pdparams", read_pdparams))
MULTI_TOKEN = re.compile(r"model\.mtp_(block|emb_norm|hidden_norm|linear_proj)\.")  # ERNIE's


class Checkpoint:
    """Tensors by name, and what the checkpoint says of itself.

    path: the .gguf file, the first if there are several parts, or the directory; config: ModelConfig;
    generation_config: generation_config.json or {}; metadata: all GGUF metadata, None for a directory of safetensors;
    needless: tensors that may be left unread; method: by which the weights are quantised, "gguf" for such a file, or
    None; nbytes: size of all tensors as stored.
    Nothing is read before `read` or `read_rows` asks for it.
    """

    def __init__(
        self,
        path: Path,
        config: ModelConfig,
        tensors: dict[str, StoredTensor],
        generation_config: dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
        needless: frozenset[str] = frozenset(),
        method: str | None = None,
    ):
        self.path = path
        self.config = config
        self.generation_config = generation_config or {}
        self.metadata = metadata
        self.nbytes = sum(tensor.nbytes for tensor in tensors.values())
        self._tensors = tensors
        self._needless = needless
        self.method = "gguf" if metadata is not None else method
        self._read: set[str] = set()

    def forget_vocabulary(self) -> None:
        """Drop the metadata's lists, once a tokenizer has been made of them: 12 MB for 49,152 tokens. At the end Python
        would give little of that back to the system; now, what is imported and made next takes its place."""
        for key in [key for key, value in (self.metadata or {}).items() if isinstance(value, list)]:
            del self.metadata[key]  # type: ignore[union-attr]

    def names(self) -> list[str]:
        return list(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def expect(self, name: str, shape: tuple[int, ...]) -> None:
        """Told of every tensor that a model is going to read. A checkpoint that makes them up overrides this."""

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def dtype(self, name: str) -> str:
        """The dtype that `read` gives: "float32" for quantised tensors, else as stored."""
        return self._tensor(name).dtype

    def storage(self, name: str) -> str:
        """What the tensor is stored in: a dtype, or a quantisation such as "Q4_1"."""
        return self._tensor(name).storage

    def read(self, name: str) -> RawTensor:
        """The whole tensor, dequantised if need be; a zero-copy view of the file where it isn't."""
        return self.read_rows(name, 0, self._tensor(name).num_rows)

    def read_rows(self, name: str, start: int, stop: int) -> RawTensor:
        """Rows [start, stop) of the first dimension; slices keep the memory for dequantised values small."""
        tensor = self._tensor(name)
        if not 0 <= start <= stop <= tensor.num_rows:
            raise ValueError(f"{name} has {tensor.num_rows} rows; rows {start} to {stop} can't be read")
        self._read.add(name)
        array = tensor.rows(start, stop)
        if tensor.storage != tensor.dtype and not np.isfinite(array).all():
            raise self._not_finite(name, start, stop)
        # Formats don't promise alignment, compiled kernels expect it.
        return RawTensor(tensor.dtype, array if array.flags.aligned else array.copy("K"))

    def encoded(self, name: str) -> Encoded | None:
        """The quantisation of a tensor, if kernels know it."""
        return self._tensor(name).encoded

    def read_codes(self, name: str, start: int, stop: int) -> Codes:
        """Rows [start, stop) of a tensor that is `encoded`, as the file has them.

        Raises ValueError if a scale is no finite number.
        """
        encoded = self.encoded(name)
        if encoded is None:
            raise ValueError(f"{name} is stored as {self.storage(name)}, which kernels don't know")
        self._read.add(name)
        codes = encoded.rows(start, stop)
        if not codes.finite():
            raise self._not_finite(name, start, stop)
        return codes

    def _not_finite(self, name: str, start: int, stop: int) -> ValueError:
        return ValueError(
            f"{self.path}: tensor {name!r} ({self.storage(name)}) has scales that are NaN, infinite or too large in its"
            f" rows {start} to {stop}; the file is corrupt or was badly converted, download or convert it again"
        )

    def unread(self) -> list[str]:
        """Names of which no row has been read yet."""
        return [name for name in self._tensors if name not in self._read]

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Raises ValueError unless the tensors `expected` (name -> shape) are all there; others may be, if needless."""
        missing = [name for name in expected if name not in self._tensors]
        unexpected = [name for name in self._tensors if name not in expected and name not in self._needless]
        misshapen = [
            f"{name} (expected {list(expected[name])}, found {list(tensor.shape)})"
            for name, tensor in self._tensors.items()
            if name in expected and tuple(expected[name]) != tensor.shape
        ]
        kinds = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
        found = [f"{len(names)} {kind}: {_listed(names)}" for kind, names in kinds.items() if names]
        if found:
            raise ValueError(
                f"{self.path}: the tensors don't fit a {self.config.architecture} of this configuration; "
                + "; ".join(found)
                + "; is the checkpoint complete, and does its configuration belong to it?"
            )

    def _tensor(self, name: str) -> StoredTensor:
        if name not in self._tensors:
            raise KeyError(f"{self.path} has no tensor {name!r}")
        return self._tensors[name]


def _listed(names: list[str]) -> str:
    """The first of the names, as they are if they are what names should be."""
    more = [f"... ({len(names) - FIRST} more)"] if len(names) > FIRST else []
    shown = [name if name.isprintable() and len(name) <= 200 else reprlib.repr(name) for name in names[:FIRST]]
    return ", ".join(shown + more)


def open_checkpoint(name_or_path: str | os.PathLike) -> Checkpoint:
    """Opens a .gguf file or, by any of them, its parts (name-00001-of-00003.gguf); a directory (config.json + weights,
    or the .gguf of one model); an installed package with a .gguf; or a model of the Hugging Face Hub by its name,
    "owner/name".

    Only headers are read. Raises TypeError for another type, FileNotFoundError if something isn't there, ValueError if
    it can't be read or is a model that we don't have; each names the file, what was found and the remedy.
    """
    path = locate(name_or_path)
    return _open_directory(path) if path.is_dir() else _open_gguf(path)


def locate(name_or_path: str | os.PathLike, with_weights: bool = True) -> Path:
    """The .gguf file or the checkpoint's directory that a model name means. Raises as `open_checkpoint` does.

    Without weights, a model of the Hub is downloaded without them.
    """
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise TypeError(f"a model is a path or a name, found {name_or_path!r} of type {type(name_or_path).__name__}")
    path, name = Path(name_or_path), os.fspath(name_or_path)
    if not name or not any(map(os.path.exists, gguf_parts(path))):
        ggufs = _installed_ggufs(name)
        if ggufs is not None:
            return _only_gguf(ggufs, f"Python package {name!r}")
        path = from_hub(name, with_weights)
        if not with_weights:
            return path
    if path.is_dir():
        return _directory_or_gguf(path)
    if path.suffix in (".safetensors", ".pdparams"):
        raise ValueError(f"{path}: give the directory that holds it and its config.json: {str(path.parent)!r}")
    return path


def _directory_or_gguf(path: Path) -> Path:
    """The directory if it is a checkpoint, else the one .gguf file in it."""
    ggufs = sorted(path.glob("*.gguf"))
    has_config = (path / "config.json").exists()
    has_weights = any(any(path.glob(f"*{ending}*")) for _, ending, _ in FORMATS)  # the index file counts
    if has_config and (has_weights or not ggufs):
        return path
    if has_weights and not ggufs:
        raise FileNotFoundError(f"{path}: expected config.json beside its weights, found none; download it too")
    return _only_gguf(ggufs, path)


def _installed_ggufs(name: str) -> list[Path] | None:
    """The .gguf files of the installed Python package of this name, None if there is no such package."""
    # Found by its file list: importing a package only to find a file in it may fail or run anything.
    try:
        if not name:  # for which Python 3.10 gives any package
            return None
        files = importlib.metadata.files(name) or []
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None
    return [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]


def _only_gguf(candidates: list[Path], where: Path | str) -> Path:
    """The one model that these files are, or are the parts of."""
    models = list(dict.fromkeys(gguf_parts(path)[0] for path in candidates))
    if not models:
        raise FileNotFoundError(f"{where}: expected a .gguf file, or config.json and .safetensors; found neither")
    if len(models) > 1:
        names = _listed([path.name for path in models])
        raise ValueError(f"{where}: expected one .gguf file, found {len(models)}: {names}; give one file's path")
    return models[0]


def _open_gguf(path: Path) -> Checkpoint:
    from fastdeploy.models.gguf import GGUFFile  # the gguf package costs 70 ms: only where it is used

    file = GGUFFile(path)
    tensors = file.stored_tensors(row_order={})
    divisors = _rope_divisors(file.path, tensors.get("rope_freqs.weight"))
    config = config_from_gguf(
        metadata=file.metadata,
        tensor_names=tensors.keys(),
        rope_divisors=divisors,
        dtype=_own_dtype(file) or _weights_dtype(tensors),
        source=str(file.path),
    )
    if not file.tensors:
        raise ValueError(f"{file.path}: holds no tensors: it is a vocabulary alone, for tokenizer=, or was cut short")
    if divisors is not None and len(divisors) != config.head_dim // 2:
        raise ValueError(f"{file.path}: rope_freqs.weight has {len(divisors)} numbers; expected {config.head_dim // 2}")
    if file.metadata["general.architecture"] == "llama":  # the others' rows are as Hugging Face has them
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
        tensors = file.stored_tensors(row_order={name: (count, config.head_dim) for name, count in heads.items()})
    tensors.pop("rope_freqs.weight", None)
    return Checkpoint(file.path, config, tensors, metadata=file.metadata)


def _own_dtype(file: GGUFFile) -> str | None:
    """What a file that this engine has saved says of its dtype."""
    dtype = file.metadata.get(DTYPE_KEY)
    return dtype if dtype in DTYPES else None


def _rope_divisors(path: Path, tensor: StoredTensor | None) -> tuple[float, ...] | None:
    """The values of rope_freqs.weight, a part of the configuration, though stored as a tensor."""
    if tensor is None:
        return None
    if tensor.dtype != "float32" or len(tensor.shape) != 1 or tensor.nbytes > 1 << 16:
        raise ValueError(f"{path}: rope_freqs.weight must be a float32 for every pair of a head's elements")
    values = tensor.rows(0, tensor.num_rows)
    if not ((values > 0) & np.isfinite(values)).all():
        raise ValueError(f"{path}: rope_freqs.weight must hold positive numbers")
    return tuple(values.tolist())


def _open_directory(path: Path) -> Checkpoint:
    config, generation_config, quantisation = read_configs(path)  # before any tensor: what can't be run is known then
    tensors = _read_shards(path)
    needless: frozenset[str] = frozenset()
    if quantisation is not None:
        # Here, as its formats are those of kernels: importing them takes Triton
        from fastdeploy.models.quantised_checkpoints import empty_biases, read_quantised

        tensors = read_quantised(path, tensors, quantisation)
        needless = empty_biases(tensors)
    _refuse_integers(path, tensors)
    config = replace(config, dtype=config.dtype or _weights_dtype(tensors))
    if is_paddle_layout(tensors):
        tensors = huggingface_layout(tensors, config)
    # Buffers that old checkpoints carry along, and a second copy of a tied embedding, are no weights of the model,
    # nor are layers that predict further tokens.
    redundant = {name for name in tensors if name.endswith(".rotary_emb.inv_freq") or MULTI_TOKEN.match(name)}
    if config.tie_word_embeddings:
        redundant.add("lm_head.weight")
    tensors = {name: tensor for name, tensor in tensors.items() if name not in redundant}
    method = quantisation and quantisation.method
    return Checkpoint(path, config, tensors, generation_config, needless=needless, method=method)


def _refuse_integers(path: Path, tensors: dict[str, StoredTensor]) -> None:
    """Raises ValueError if tensors aren't floats by now."""
    others = {name: tensor for name, tensor in tensors.items() if tensor.dtype not in DTYPES}
    if others:
        first = next(iter(others.values()))
        listed = _listed([f"{name} ({tensor.dtype})" for name, tensor in others.items()])
        raise ValueError(
            f"{first.path or path}: {len(others)} tensors are no floats: {listed}; weights can be {', '.join(DTYPES)},"
            " or what a quantisation that config.json names has; is config.json complete, and of this checkpoint?"
        )


def _weights_dtype(tensors: dict[str, StoredTensor]) -> str:
    """What most bytes are stored in; "bfloat16" for a quantisation."""
    nbytes: Counter[str] = Counter()
    for tensor in tensors.values():
        nbytes[tensor.storage] += tensor.nbytes
    storage = nbytes.most_common(1)[0][0] if nbytes else "float32"
    return storage if storage in DTYPES else "bfloat16"


def _read_shards(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of the first format of which the directory has a file."""
    for stem, ending, read in FORMATS:
        single, index_path = directory / f"{stem}{ending}", directory / f"{stem}{ending}.index.json"
        if not single.exists() and index_path.exists():
            return _read_indexed(index_path, read)
        files = [single] if single.exists() else sorted(directory.glob(f"*{ending}"))
        if len(files) == 1:
            return read(files[0])
        if files:
            raise FileNotFoundError(
                f"{directory}: expected {single.name}, or {index_path.name} and its shards; found {len(files)} {ending}"
                f" files without {index_path.name}; download the rest"
            )
    raise FileNotFoundError(
        f"{directory}: expected {' or '.join(stem + ending for stem, ending, _ in FORMATS)}, or an index file and its"
        " shards; found none of them; download the rest, or save the model as safetensors"
    )


def _read_indexed(index_path: Path, read: Callable[[Path], dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{index_path}: expected 'weight_map', an object of tensor name -> file name")
    shards = sorted(set(weight_map.values()))
    files = {shard: file_beside(index_path, shard) for shard in shards}
    missing = [shard for shard in shards if not files[shard].is_file()]
    if missing:
        raise FileNotFoundError(f"{index_path}: {len(missing)} of {len(shards)} shards are missing: {_listed(missing)}")
    stored = {shard: read(file) for shard, file in files.items()}
    absent = [name for name, shard in weight_map.items() if name not in stored[shard]]
    if absent:
        raise ValueError(f"{index_path}: {len(absent)} tensors are not in the shards it names: {_listed(absent)}")
    return {name: stored[shard][name] for name, shard in weight_map.items()}
