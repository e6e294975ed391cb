"""Which cases are measured on which machine, and what they should reach.

The default selection ends within about two minutes on two cores and on a GPU; `everything` crosses models and sizes. A
case's `shape` is what `--shape` looks in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.kernels.cases import Case, Model
from bench.kernels.operations import (
    SETTINGS,
    Activation,
    AddNorm,
    Attention,
    Embedding,
    Gather,
    Linear,
    Logprobs,
    Mixture,
    Norm,
    QuantisedLinear,
    Rope,
    Sampling,
)
from fastdeploy.kernels.formats import FORMATS
from fastdeploy.kernels.rope import HeadLayout

SMOLLM2 = Model("SmolLM2-135M", 576, 1536, HeadLayout(9, 3, 64), 49152, 1e5)
ERNIE_SMALL = Model("ERNIE-4.5-0.3B", 1024, 3072, HeadLayout(16, 2, 128, interleaved=True), 103424, 5e5)
ERNIE_MOE = Model(
    "ERNIE-4.5-21B-A3B", 2560, 12288, HeadLayout(20, 4, 128, interleaved=True), 103424, 5e5,
    experts=64, expert_width=1536, top_k=6,
)  # fmt: skip
QWEN_SMALL = Model("Qwen3-0.6B", 1024, 3072, HeadLayout(16, 8, 128), 151936, 1e6, normalises_heads=True)
QWEN = Model("Qwen3-8B", 4096, 12288, HeadLayout(32, 8, 128), 151936, 1e6, normalises_heads=True)
LLAMA = Model("Llama-3-8B", 4096, 14336, HeadLayout(32, 8, 128), 128256, 5e5)
MODELS = (SMOLLM2, ERNIE_SMALL, ERNIE_MOE, QWEN_SMALL, QWEN, LLAMA)
BY_TOKEN = (Norm, AddNorm, Activation, Rope, Embedding, Gather)


def decode(model: Model, dtype: str, batch: int, context: int) -> Attention:
    """One new token for each of `batch` sequences."""
    return Attention(model, dtype, ((1, context),) * batch)


def prefill(model: Model, dtype: str, tokens: int) -> Attention:
    """One whole prompt."""
    return Attention(model, dtype, ((tokens, tokens),))


def mixed(model: Model, dtype: str, batch: int, context: int, chunk: int) -> Attention:
    """Decodes, and the last chunks of two prompts."""
    return Attention(model, dtype, ((1, context),) * batch + ((chunk, context),) * 2)


def default(kind: str) -> list[Case]:
    """What is measured on a "cpu" or "cuda" where nothing else is asked for."""
    return _on_cpu() if kind == "cpu" else _on_gpu()


FLOAT16_SCALES = [format.name for format in FORMATS.values() if format.scale == "float16"]


def _on_cpu(dtype: str = "float32") -> list[Case]:
    return [
        *(operation(SMOLLM2, dtype, tokens) for operation in (Norm, AddNorm, Activation, Rope) for tokens in (8, 512)),
        *(operation(QWEN_SMALL, dtype, 512) for operation in (Norm, Activation, Rope)),
        Embedding(SMOLLM2, dtype, 512),
        Gather(SMOLLM2, dtype, 64),
        *(Linear(SMOLLM2, dtype, tokens, "gate_up") for tokens in (1, 8, 128)),
        *(Linear(SMOLLM2, dtype, 1, layer) for layer in ("down", "lm_head")),
        Linear(QWEN_SMALL, dtype, 1, "gate_up"),
        *(QuantisedLinear(SMOLLM2, dtype, tokens, "gate_up") for tokens in (1, 8, 128)),
        *(QuantisedLinear(QWEN_SMALL, dtype, 1, "gate_up", weights) for weights in FLOAT16_SCALES),
        *(decode(SMOLLM2, dtype, *size) for size in ((1, 512), (1, 4096), (8, 512))),
        decode(QWEN_SMALL, dtype, 8, 512),
        prefill(SMOLLM2, dtype, 512),
        mixed(SMOLLM2, dtype, 8, 512, 64),
        Mixture(ERNIE_MOE, dtype, 8),  # which read 0.8 GB: one token's experts would stay in a large cache
        *(Sampling(SMOLLM2, dtype, batch, setting) for setting in SETTINGS for batch in (1, 8)),
        Logprobs(SMOLLM2, dtype, 8),
    ]


def _on_gpu(dtype: str = "bfloat16") -> list[Case]:
    layers = ("qkv", "o", "gate_up", "down")
    contexts_of_llama = ((1, 128), (1, 4096), (1, 32768), (8, 4096), (64, 1024), (64, 4096), (256, 1024))
    return [
        *(operation(LLAMA, dtype, tokens) for operation in (Norm, AddNorm, Activation, Rope) for tokens in (64, 8192)),
        *(operation(QWEN_SMALL, dtype, 32768) for operation in (Norm, AddNorm, Activation)),
        *(Rope(model, dtype, 8192) for model in (QWEN, ERNIE_SMALL)),
        *(Embedding(LLAMA, dtype, tokens) for tokens in (64, 8192)),
        Gather(LLAMA, dtype, 128),
        *(Linear(LLAMA, dtype, tokens, layer) for tokens in (1, 16, 64, 256, 2048, 8192) for layer in layers),
        *(Linear(LLAMA, dtype, tokens, "lm_head") for tokens in (1, 64)),
        *(Linear(QWEN_SMALL, dtype, tokens, "gate_up") for tokens in (64, 2048)),
        Linear(SMOLLM2, dtype, 64, "gate_up"),
        *(decode(LLAMA, dtype, *size) for size in contexts_of_llama),
        *(decode(QWEN_SMALL, dtype, *size) for size in ((1, 32768), (64, 4096))),
        *(decode(model, dtype, 64, 4096) for model in (ERNIE_SMALL, ERNIE_MOE, SMOLLM2)),
        *(prefill(LLAMA, dtype, tokens) for tokens in (512, 2048, 8192, 32768)),
        prefill(QWEN_SMALL, dtype, 8192),
        prefill(SMOLLM2, dtype, 2048),
        mixed(LLAMA, dtype, 32, 4096, 512),
        *(Mixture(ERNIE_MOE, dtype, tokens) for tokens in (1, 8, 64, 2048)),
        *(Sampling(LLAMA, dtype, batch, setting) for batch in (1, 128) for setting in SETTINGS),
        *(Logprobs(LLAMA, dtype, batch) for batch in (1, 128)),
    ]


def everything(kind: str) -> list[Case]:
    """All models at many sizes, without what does not fit the machine's patience. Takes an hour or so."""
    cpu, dtype = kind == "cpu", "float32" if kind == "cpu" else "bfloat16"
    models = (SMOLLM2, ERNIE_SMALL, QWEN_SMALL) if cpu else MODELS
    tokens = (1, 8, 64, 512) if cpu else (1, 8, 64, 256, 2048, 8192)
    batches, contexts = ((1, 8), (128, 1024, 4096)) if cpu else ((1, 8, 64, 256), (128, 1024, 4096, 32768))
    most_keys = 1 << (15 if cpu else 20)  # of a batch
    found = default(kind)
    for model in models:
        found += [operation(model, dtype, count) for operation in BY_TOKEN for count in tokens]
        found += [Linear(model, dtype, count, layer) for layer in model.layers() for count in tokens]
        found += [decode(model, dtype, b, c) for b in batches for c in contexts if b * c <= most_keys]
        found += [prefill(model, dtype, c) for c in contexts]
        found += [mixed(model, dtype, b, c, 128) for b in batches for c in contexts if b > 1 and b * c <= most_keys]
        found += [Sampling(model, dtype, b, setting) for setting in SETTINGS for b in (*batches, 128) if b <= 128]
        found += [Logprobs(model, dtype, b) for b in batches]
        if model.experts:
            found += [Mixture(model, dtype, count) for count in tokens]
        if cpu:
            layers = [name for name, (_n, k) in model.layers().items() if k % 32 == 0]
            found += [QuantisedLinear(model, dtype, count, layer) for layer in layers for count in tokens]
    return list(dict.fromkeys(found))


def selected(cases: Iterable[Case], operations: Sequence[str] | None, texts: Sequence[str] | None) -> list[Case]:
    """The cases of one of these operations (None: of any) whose shape contains one of these texts (None: any).

    Raises ValueError, saying what there is, if nothing is left.
    """
    cases = list(cases)
    known = sorted({case.operation for case in cases})
    if unknown := sorted(set(operations or ()) - set(known)):
        raise ValueError(f"--op takes {', '.join(known)}; found {', '.join(unknown)}")
    found = [case for case in cases if not operations or case.operation in operations]
    found = [case for case in found if not texts or any(text in case.shape for text in texts)]
    if not found:
        raise ValueError(f"no shape contains {' or '.join(texts or ())}; --all has more than the default selection")
    return found


@dataclass(frozen=True)
class Goal:
    """What our kernel should reach. measure: "copy" (a share of the copy's bandwidth), "torch" (of PyTorch's speed in
    the same run), "TFLOP/s" or "us"; at least `value` of it, of "us" at most."""

    measure: str
    value: float

    def __str__(self) -> str:
        if self.measure in ("copy", "torch"):
            return f"at least {self.value:.0%} of {self.measure}"
        return f"{'at most' if self.measure == 'us' else 'at least'} {self.value:.0f} {self.measure}"

    def met(self, reached: float) -> bool:
        """Whether that is enough."""
        return reached <= self.value if self.measure == "us" else reached >= self.value


def goal(case: Any, kind: str) -> Goal | None:
    """What issue 6 asks of our kernel on an H200; nothing on a CPU, where bench/backend.py has the goals."""
    if kind == "cpu":
        return None
    if isinstance(case, (Norm, AddNorm, Activation, Rope, Embedding)) and case.work().bytes >= 64e6:
        return Goal("copy", 0.88)
    if isinstance(case, Attention):
        return _attention_goal(case)
    if isinstance(case, Linear) and case.tokens <= 64 and case.model is LLAMA and case.layer != "lm_head":
        return Goal("copy", 0.85)
    if isinstance(case, Linear) and case.tokens >= 2048:
        return Goal("torch", 0.90)
    if isinstance(case, Sampling) and case.batch == 128 and case.model is LLAMA and case.steering.top_k:
        return Goal("us", 80)
    return None


def _attention_goal(case: Attention) -> Goal | None:
    tokens, context = case.sequences[0]
    if case.model not in (LLAMA, QWEN, QWEN_SMALL):  # 32 or 16 query heads of 128 on 8 KV heads
        return None
    if case.kind == "decode" and (case.decodes, context) in ((64, 4096), (1, 32768)):
        return Goal("copy", 0.85 if case.decodes == 64 else 0.70)
    if case.kind == "prefill" and tokens == 8192 and case.model.heads.num_heads == 32:
        return Goal("TFLOP/s", 480)
    return None
