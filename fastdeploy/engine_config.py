"""EngineConfig: the keywords of `LLM(...)`, checked when built."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from fastdeploy.checks import check_int, check_number, complaint, path_text, suggesting_keywords
from fastdeploy.config import METHODS, MODES
from fastdeploy.device import Device
from fastdeploy.sampling_params import MAX_SEED
from fastdeploy.text.reasoning import REASONING_PARSERS

DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_CACHE_DTYPES = (*DTYPES, "int8")
LOAD_FORMATS = ("auto", "dummy")
BLOCK_SIZES = (16, 32, 64, 128, 256)  # attention splits the context every 256 tokens and reads whole blocks


@suggesting_keywords("LLM")
@dataclass(frozen=True)
class EngineConfig:
    """What `LLM(...)` takes. Wrong types are a TypeError, wrong values a ValueError, when built.

    Paths may be `pathlib.Path`s and begin with ~, the home directory.

    model: a .gguf file (of several parts any, or their folder), a checkpoint directory (Hugging Face's or Paddle's), an
        installed Python package with a .gguf file, or a model's name on the Hugging Face Hub, "owner/name", which is
        downloaded unless the cache has it; the owner of a family that we have may be left out.
    tokenizer: where the tokenizer is, if not with the model: the same, of which no weights are needed.
    load_format: "auto": the model's own weights. "dummy": random ones, drawn from `seed`, for which config.json is
        enough: what such a model says is nonsense, but takes the same time.
    max_model_len: most tokens of a request, prompt and output together. None: the positions the model was made for,
        as far as its rotary embeddings stretch them and within its sliding window, or as many as the KV cache has
        memory for.
    max_num_seqs: most requests computed in one step; the others wait.
    max_num_batched_tokens: most tokens computed in one step; longer prompts are cut into chunks. None: 2048 on a GPU,
        512 on a CPU.
    block_size: tokens in a KV block, a power of two from 16 to 256. Below 64 attention's tiles are smaller, too, and
        last bits differ.
    num_gpu_blocks_override: number of KV blocks, on a CPU too. None: as many as are useful and fit.
    gpu_memory_utilization: share of a GPU's memory that may be used, weights included. Without effect on a CPU.
    dtype: what float weights are stored in; "auto" is the checkpoint's own. On a CPU all sums are float32.
    kv_cache_dtype: what keys and values are stored in. "auto": as `dtype` says, bfloat16 for a quantised file; "int8"
        where a CPU computes linear layers in integers, see `quantization`, and keys have no bias.
        "int8": with a float32 scale for each token and KV head, in about half the memory of bfloat16. CPUs then compute
        attention in integers, too, which takes long prompts less than half the time.
    quantization: in what precision linear layers compute. None: in floats, whatever the checkpoint holds.
        "auto": weights that the checkpoint has quantised stay so, at their own size, and meet activations in integers
        on a CPU, in floats on a GPU; float weights stay floats. Beside dtype="float32" it is None: what was asked for
        is that type. Integers have 8 bits, 16 where their rounding shows most: before q, k, v and the LM head.
        The name of the checkpoint's own method, such as "awq", is "auto", too; of another one, an error.
        "exact": as "auto", for any `dtype`, but activations are floats on a CPU, too: float32.
        "wint8", "wint4": as "exact", and float weights, embeddings and LM head aside, become 8 or 4 bits in loading.
        Those of 4 are chosen by what a short text of ours puts through the model in floats, which takes a few seconds
        for 10^8 weights; v_proj has 8. Made-up weights (load_format="dummy") are rounded to nearest.
        "w8a8", "w4a8": the same with activations in integers.
    seed: the origin of the seeds of requests that name none.
    enable_prefix_caching: keep the KV blocks of earlier tokens, and spare prompts that begin alike their computation.
    enforce_eager: launch each kernel of a decode step anew, instead of replaying the recorded step: the same tokens,
        slower; for finding faults and for comparisons.
    overlap_steps: launch a decode step before the tokens of the step before it have been read, where they need not be
        known for it: the same tokens, and the host's work is done while the device computes. None: on a GPU; a CPU
        computes a step in the call that launches it.
    reasoning_parser: splits what the model thinks (reasoning_content) from what it answers (text): "qwen3", "ernie-x1"
        or "deepseek_r1", for the markers that such models write. None: all is text. Where neither prompt nor output
        has a marker, "qwen3" streams its text at the end, see text/reasoning.py.
    chat_template: Jinja source or the path of a file, for `LLM.chat` to use instead of the tokenizer's own template.
    tensor_parallel_size: number of processes (ranks) that share the model, each with its part of every weight. This one
        starts, and ends, the others. On a CPU they divide its cores; FASTDEPLOY_NUM_THREADS is each one's number.
    """

    model: str
    tokenizer: str | None = None
    load_format: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 8
    max_num_batched_tokens: int | None = None
    block_size: int = 64
    num_gpu_blocks_override: int | None = None
    gpu_memory_utilization: float = 0.9
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    quantization: str | None = "auto"
    seed: int = 0
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    overlap_steps: bool | None = None
    reasoning_parser: str | None = None
    chat_template: str | os.PathLike | None = None
    tensor_parallel_size: int = 1

    def __post_init__(self) -> None:
        self._check_path("model", self.model)
        if self.tokenizer is not None:
            self._check_path("tokenizer", self.tokenizer)
        lows = {"max_model_len": 2, "max_num_batched_tokens": 1, "num_gpu_blocks_override": 1}  # 2: prompt and output
        for field, low in lows.items():
            if getattr(self, field) is not None:
                self._check_int(field, low)
        self._check_int("max_num_seqs", low=1)
        self._check_int("tensor_parallel_size", low=1)
        self._check_int("seed", low=0, high=MAX_SEED)
        self._check_choice("block_size", BLOCK_SIZES)
        self._check_choice("dtype", DTYPES)
        self._check_choice("kv_cache_dtype", KV_CACHE_DTYPES)
        self._check_choice("load_format", LOAD_FORMATS)
        if self.quantization is not None:
            self._check_choice("quantization", (*filter(None, MODES), *METHODS))
        for field in ("enable_prefix_caching", "enforce_eager"):
            self._check_choice(field, (True, False))
        if self.overlap_steps is not None:
            self._check_choice("overlap_steps", (True, False))
        if self.overlap_steps and self.tensor_parallel_size > 1:
            must = "must be False or None where tensor_parallel_size is above 1: ranks make every step together"
            raise ValueError(complaint("LLM", "overlap_steps", True, must))
        if self.reasoning_parser is not None:
            self._check_choice("reasoning_parser", tuple(REASONING_PARSERS))
        if self.chat_template is not None:
            self._check_chat_template()
        share = check_number("LLM", "gpu_memory_utilization", self.gpu_memory_utilization, low=0, high=1)
        if share == 0:
            raise ValueError(complaint("LLM", "gpu_memory_utilization", 0, "must be above 0 and at most 1"))
        object.__setattr__(self, "gpu_memory_utilization", share)

    def _check_path(self, field: str, value: object) -> None:
        if not isinstance(value, (str, os.PathLike)):
            must = f"must be a path or a package name, not {type(value).__name__}"
            raise TypeError(complaint("LLM", field, value, must))
        path = os.fspath(value)
        if not isinstance(path, str) or not path.strip():
            raise ValueError(complaint("LLM", field, value, "must be a path or a package name, not empty"))
        object.__setattr__(self, field, path_text(path))

    def _check_int(self, field: str, low: int, high: int | None = None) -> None:
        object.__setattr__(self, field, check_int("LLM", field, getattr(self, field), low, high))

    def _check_choice(self, field: str, choices: tuple[object, ...]) -> None:
        value = getattr(self, field)
        listed = ", ".join(map(repr, choices))
        if type(value) is not type(choices[0]):
            must = f"must be one of {listed}, not {type(value).__name__}"
            raise TypeError(complaint("LLM", field, value, must))
        if value not in choices:
            raise ValueError(complaint("LLM", field, value, f"must be one of {listed}"))

    def _check_chat_template(self) -> None:
        from fastdeploy.text.chat_template import check, given_source  # starts a process, and few give a template here

        if not isinstance(self.chat_template, (str, os.PathLike)):
            must = f"must be Jinja source or the path of a file, not {type(self.chat_template).__name__}"
            raise TypeError(complaint("LLM", "chat_template", self.chat_template, must))
        try:
            check(given_source(self.chat_template))
        except (OSError, ValueError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(complaint("LLM", "chat_template", self.chat_template, f"must be a template: {error}")) from error
        if os.path.isfile(path := path_text(self.chat_template)):
            object.__setattr__(self, "chat_template", os.path.abspath(path))  # the program may go to another folder

    def resolved(self, model_limit: int, why: str = "the positions this model was made for") -> ResolvedConfig:
        """A copy in which max_model_len and max_num_batched_tokens are numbers, and quantization regards dtype. Where a
        device has another default of max_num_batched_tokens, `llm.load` puts it in its place.

        model_limit, why: as `ModelConfig.length_limit` says. Raises ValueError where max_model_len is above it.
        """
        length = self.max_model_len if self.max_model_len is not None else model_limit
        if length > model_limit:
            must = f"must be at most {model_limit}, {why}"
            raise ValueError(complaint("LLM", "max_model_len", length, must))
        tokens = self.max_num_batched_tokens or Device.step_tokens
        known: dict[str, Any] = {"max_model_len": length, "max_num_batched_tokens": tokens}
        if self.quantization in METHODS:
            known["quantization"] = "auto"
        elif self.quantization == "auto" and self.dtype == "float32":
            known["quantization"] = None
        return ResolvedConfig(**{**vars(self), **known})


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(EngineConfig):
    """An EngineConfig for a certain model: see `EngineConfig.resolved`."""

    max_model_len: int
    max_num_batched_tokens: int
