"""Checks of what users pass: unknown names, wrong types, values out of range.

Every error reads `Owner(field=value): what it must be`, so that the reader sees the name, the value and the remedy.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import numbers
import os
import reprlib
from collections.abc import Callable
from typing import Any, TypeVar

Class = TypeVar("Class")

# Our keywords, and what other engines call them.
FOREIGN: dict[str, str] = {
    # of SamplingParams
    "max_tokens": "max_completion_tokens max_new_tokens max_length max_gen_len n_predict num_predict",
    "min_tokens": "min_new_tokens min_length",
    "n": "best_of num_return_sequences num_completions",
    "temperature": "temp",
    "repetition_penalty": "repeat_penalty",
    "seed": "random_seed sampling_seed",
    "stop": "stop_sequences stop_strings stop_words",
    "stop_token_ids": "stop_tokens eos_token_id",
    "bad_words_token_ids": "bad_words_ids suppress_tokens",
    "logprobs": "top_logprobs num_logprobs",
    "reasoning_max_tokens": "thinking_budget max_thinking_tokens",
    # of LLM
    "model": "model_path model_name model_name_or_path pretrained_model_name_or_path checkpoint",
    "tokenizer": "tokenizer_path",
    "max_model_len": "max_len max_length max_seq_len max_seq_length context_length context_len n_ctx ctx_size",
    "max_num_seqs": "max_batch_size max_num_sequences max_running_requests",
    "max_num_batched_tokens": "n_batch max_num_tokens",
    "tensor_parallel_size": "tensor_parallel tensor_model_parallel_size tp tp_size num_gpus",
    "gpu_memory_utilization": "gpu_memory gpu_mem gpu_memory_fraction mem_fraction_static",
    "block_size": "page_size",
    "num_gpu_blocks_override": "num_gpu_blocks num_blocks",
    "dtype": "torch_dtype data_type",
    "kv_cache_dtype": "cache_dtype cache_type kv_cache_quantization",
    "quantization": "quant quantize quantization_config load_in_8bit load_in_4bit",
}
NEAR = 0.82  # of difflib's ratio: 'top_a' is 0.8 from 'top_p', 'expert_parallel_size' from 'tensor_parallel_size'


def complaint(owner: str, field: str, value: object, must: str) -> str:
    """The text of an error about one argument; long values are abbreviated."""
    return f"{owner}({field}={reprlib.repr(value)}): {must}"


def check_int(owner: str, field: str, value: object, low: int, high: int | None = None) -> int:
    """`value` as an int within [low, high]. Booleans are a TypeError: they are integers only by accident of history."""
    bounds = f"from {low} to {high}" if high is not None else f"of at least {low}"
    must = f"must be an integer {bounds}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(complaint(owner, field, value, f"{must}, not {type(value).__name__}"))
    number = int(value)
    if number < low or (high is not None and number > high):
        raise ValueError(complaint(owner, field, value, must))
    return number


def check_number(owner: str, field: str, value: object, low: float, high: float = math.inf) -> float:
    """`value` as a finite float within [low, high]."""
    must = "must be a finite number " + (f"of at least {low}" if high == math.inf else f"from {low} to {high}")
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(complaint(owner, field, value, f"{must}, not {type(value).__name__}"))
    try:
        number = float(value)
    except OverflowError:  # an int of more than 308 digits
        number = math.inf
    if not (math.isfinite(number) and low <= number <= high):
        raise ValueError(complaint(owner, field, value, must))
    return number


def path_text(path: str | os.PathLike[str]) -> str:
    """A path as text, its ~ the home directory."""
    return os.path.expanduser(os.fspath(path))


def unknown_keyword(owner: str, name: str, known: list[str]) -> str:
    """The text of a TypeError about a keyword nobody knows; suggests the one that is meant, or lists all."""
    same = [ours for ours in known if name in FOREIGN.get(ours, "").split() or sorted(name) == sorted(ours)]
    nearest = same or difflib.get_close_matches(name, known, n=1, cutoff=NEAR)
    remedy = f"did you mean {nearest[0]!r}?" if nearest else f"it takes {', '.join(known)}"
    return f"{owner} has no keyword {name!r}: {remedy}"


def suggesting_keywords(owner: str) -> Callable[[type[Class]], type[Class]]:
    """Decorate a dataclass so that an unknown keyword is a TypeError that suggests the nearest field.

    `owner` is what the user called, which need not be the class itself.
    """

    def decorate(cls: type[Class]) -> type[Class]:
        known = [field.name for field in dataclasses.fields(cls) if field.init]  # type: ignore[arg-type]
        build = cls.__init__

        @functools.wraps(build)
        def checked(self: Class, *args: Any, **keywords: Any) -> None:
            for name in keywords:
                if name not in known:
                    raise TypeError(unknown_keyword(owner, name, known))
            build(self, *args, **keywords)

        cls.__init__ = checked  # type: ignore[method-assign, assignment]
        return cls

    return decorate
