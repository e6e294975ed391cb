"""Other libraries on a case's tensors: NumPy, Paddle, PyTorch (eager and compiled), Liger-Kernel, FlagGems, FlashInfer.

Each is optional. A provider has a method for each operation that its library has; it returns a call, which returns the
output (or a tuple that begins with it). Weights are converted to what the library multiplies before the call: float32
for NumPy and Paddle on a CPU, the activations' type for PyTorch. PyTorch's attention is scaled_dot_product_attention
over contiguous keys and values, without a block table. What computes in place gets a copy of what it overwrites.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from bench.kernels.cases import Case, Tensors
from bench.kernels.machine import Machine, NumpyMachine, Unavailable
from bench.kernels.operations import BLOCK_SIZE, EPS, Attention, Linear, Logprobs, Rope, Sampling
from bench.kernels.ours import Call, Ours


class Adopted(Mapping[str, Any]):
    """A case's tensors, each converted to a provider's own when it is asked for."""

    def __init__(self, tensors: Tensors, adopt: Callable[[Any], Any]) -> None:
        self.tensors, self.adopt = tensors, adopt

    def __getitem__(self, name: str) -> Any:
        return self.adopt(self.tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


class Library:
    """A library that is not ours. adopt: a machine's tensor -> the library's, in the same memory if it can be."""

    name: str
    replayable = False

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def adopt(self, tensor: Any) -> Any:
        return tensor

    def prepare(self, case: Case, tensors: Tensors) -> Call:
        """The call that is measured. Raises Unavailable if the library has no such operation."""
        method = getattr(self, case.operation, None)
        if method is None:
            raise Unavailable("no such operation")
        return method(case, Adopted(tensors, self.adopt))

    def float64(self, output: Any) -> np.ndarray:
        return self.machine.float64(output)


class OnHost(Library):
    """Libraries that compute on NumPy's memory, in float32."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        if not isinstance(machine, NumpyMachine):
            raise Unavailable("measured on a CPU only")

    def adopt(self, tensor: np.ndarray) -> Any:
        return self.machine.cast(tensor, "float32") if tensor.dtype == np.uint16 else tensor


class NumPy(OnHost):
    name = "numpy"

    def rms_norm(self, case: Case, tensors: Adopted) -> Call:
        return partial(_numpy_norm, tensors["x"], tensors["weight"])

    def add_rms_norm(self, case: Case, tensors: Adopted) -> Call:
        residual, delta, weight = (tensors[name] for name in ("residual", "delta", "weight"))

        def call() -> np.ndarray:
            np.add(residual, delta, out=residual)
            return _numpy_norm(residual, weight)

        return call

    def silu_mul(self, case: Case, tensors: Adopted) -> Call:
        gate, up = np.split(tensors["gate_up"], 2, axis=1)
        return lambda: gate / (1 + np.exp(-gate)) * up

    def rope_and_cache(self, case: Rope, tensors: Adopted) -> Call:
        """Keys and values to [slots, KVH, D]."""
        heads, weights = case.model.heads, [tensors.get(name) for name in ("q_norm", "k_norm")]
        q, k, v = _heads_of(case, tensors["qkv"])
        caches = [np.empty(k.shape, np.float32) for _ in range(2)]
        cos, sin, positions, slots = (tensors[name] for name in ("cos", "sin", "positions", "slots"))

        def call() -> np.ndarray:
            angles = (cos[positions][:, None], sin[positions][:, None])
            turned = [_numpy_turned(x, weight, *angles, heads.interleaved) for x, weight in zip((q, k), weights)]
            caches[0][slots], caches[1][slots] = turned[1], v
            return turned[0].reshape(case.tokens, -1)

        return call

    def embedding(self, case: Case, tensors: Adopted) -> Call:
        return partial(np.take, tensors["table"], tensors["ids"], axis=0)

    def gather_rows(self, case: Case, tensors: Adopted) -> Call:
        return partial(np.take, tensors["x"], tensors["rows"], axis=0)

    def linear(self, case: Linear, tensors: Adopted) -> Call:
        return partial(np.matmul, tensors["x"], tensors["weight"].T)

    def attention(self, case: Attention, tensors: Adopted) -> Call:
        """A sequence after the other."""
        heads, starts, sequences = case.model.heads, _starts(case), []
        queries = tensors["qkv"][:, : heads.num_heads * heads.head_dim]
        keys, values = tensors["keys"], tensors["values"]
        for (first, first_key), (tokens, context) in zip(starts, case.sequences, strict=True):
            q = queries[first : first + tokens].reshape(tokens, heads.num_kv_heads, heads.group, -1)
            k = keys[first_key : first_key + context].transpose(1, 2, 0).copy()  # [KVH, D, context]
            v = values[first_key : first_key + context].transpose(1, 0, 2).copy()
            sequences.append((q.transpose(1, 0, 2, 3).reshape(heads.num_kv_heads, tokens * heads.group, -1), k, v))
        return lambda: np.concatenate([_numpy_attention(*each, case.scale, heads.group) for each in sequences])

    def sample(self, case: Sampling, tensors: Adopted) -> Call:
        logits, steering = tensors["logits"], case.steering
        if steering.temperature == 0:
            return partial(np.argmax, logits, axis=1)
        return partial(_numpy_draw, logits, steering.top_k, steering.top_p, np.random.default_rng(0))

    def token_logprobs(self, case: Logprobs, tensors: Adopted) -> Call:
        logits, tokens = tensors["logits"], tensors["tokens"][:, None]

        def call() -> tuple[np.ndarray, ...]:
            value = np.take_along_axis(logits, tokens, axis=1)
            peak = logits.max(axis=1, keepdims=True)
            normaliser = peak + np.log(np.exp(logits - peak).sum(axis=1, keepdims=True))
            tops = np.argpartition(logits, -case.num_top, axis=1)[:, -case.num_top :]
            return (value - normaliser)[:, 0], (logits > value).sum(axis=1) + 1, tops

        return call


def _numpy_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + np.float32(EPS)) * weight


def _heads_of(case: Rope, qkv: np.ndarray) -> list[np.ndarray]:
    """q, k and v, [tokens, heads, D] each."""
    heads = case.model.heads
    ends = (heads.num_heads, heads.num_heads + heads.num_kv_heads)
    return np.split(qkv.reshape(case.tokens, -1, heads.head_dim), ends, axis=1)


def _numpy_turned(
    x: np.ndarray, weight: np.ndarray | None, cos: np.ndarray, sin: np.ndarray, interleaved: bool
) -> np.ndarray:
    if weight is not None:
        x = _numpy_norm(x, weight)
    half = x.shape[-1] // 2
    first, second = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(0, half), slice(half, None))
    a, b, turned = x[..., first], x[..., second], np.empty(x.shape, np.float32)
    turned[..., first], turned[..., second] = a * cos - b * sin, b * cos + a * sin
    return turned


def _numpy_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, group: int) -> np.ndarray:
    """[tokens, H * D] of one sequence: q [KVH, tokens * group, D], k [KVH, D, context], v [KVH, context, D]."""
    scores = np.matmul(q, k) * np.float32(scale)
    tokens, context = q.shape[1] // group, k.shape[2]
    if tokens > 1:
        position = context - tokens + np.arange(tokens * group) // group
        scores = np.where(np.arange(context) <= position[:, None], scores, np.float32(-np.inf))
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    out = np.matmul(weights / weights.sum(axis=2, keepdims=True), v)
    return out.reshape(len(q), tokens, group, -1).transpose(1, 0, 2, 3).reshape(tokens, -1)


def _numpy_draw(logits: np.ndarray, top_k: int, top_p: float, random: np.random.Generator) -> np.ndarray:
    if top_k:
        ids = np.argpartition(logits, -top_k, axis=1)[:, -top_k:]
        ids = np.take_along_axis(ids, np.argsort(-np.take_along_axis(logits, ids, axis=1), axis=1), axis=1)
    else:
        ids = np.argsort(-logits, axis=1)
    kept = np.take_along_axis(logits, ids, axis=1)
    masses = np.exp(kept - kept[:, :1])
    before = np.cumsum(masses, axis=1) - masses
    masses = np.where(before < top_p * masses.sum(axis=1, keepdims=True), masses, 0)
    winners = np.argmax(masses / random.exponential(size=masses.shape), axis=1)
    return np.take_along_axis(ids, winners[:, None], axis=1)[:, 0]


def _starts(case: Attention) -> list[tuple[int, int]]:
    """First token in the step, and first key, of every sequence."""
    tokens, contexts = np.array(case.sequences).T
    return list(zip((np.cumsum(tokens) - tokens).tolist(), (np.cumsum(contexts) - contexts).tolist(), strict=True))


class Paddle(OnHost):
    name = "paddle"

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        from fastdeploy.triton_cpu.runtime import num_threads

        os.environ.setdefault("OMP_NUM_THREADS", str(num_threads()))  # Paddle takes one thread where it isn't told
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a missing ccache
            import paddle

        self.paddle, self.functional = paddle, paddle.nn.functional

    def adopt(self, tensor: np.ndarray) -> Any:
        return self.paddle.from_dlpack(super().adopt(tensor))

    def float64(self, output: Any) -> np.ndarray:
        return output.numpy().astype(np.float64)

    def rms_norm(self, case: Case, tensors: Adopted) -> Call:
        return partial(self._norm, tensors["x"], tensors["weight"])

    def add_rms_norm(self, case: Case, tensors: Adopted) -> Call:
        residual, delta, weight = (tensors[name] for name in ("residual", "delta", "weight"))
        return lambda: self._norm(residual.add_(delta), weight)

    def _norm(self, x: Any, weight: Any) -> Any:
        return x * self.paddle.rsqrt(x.square().mean(axis=1, keepdim=True) + EPS) * weight

    def silu_mul(self, case: Case, tensors: Adopted) -> Call:
        return partial(self.functional.swiglu, tensors["gate_up"])

    def embedding(self, case: Case, tensors: Adopted) -> Call:
        return partial(self.functional.embedding, tensors["ids"], tensors["table"])

    def gather_rows(self, case: Case, tensors: Adopted) -> Call:
        return partial(self.paddle.index_select, tensors["x"], tensors["rows"])

    def linear(self, case: Linear, tensors: Adopted) -> Call:
        return partial(self.paddle.matmul, tensors["x"], tensors["weight"], transpose_y=True)

    def attention(self, case: Attention, tensors: Adopted) -> Call:
        """Decodes as one product of a batch; a prompt by Paddle's scaled_dot_product_attention, on repeated heads."""
        heads, (tokens, context) = case.model.heads, case.sequences[0]
        shape = (len(case.sequences), context, heads.num_kv_heads, heads.head_dim)
        queries = tensors["qkv"][:, : heads.num_heads * heads.head_dim]
        k, v = (tensors[name].reshape(shape) for name in ("keys", "values"))
        if case.kind == "decode":
            q = queries.reshape((len(case.sequences), heads.num_kv_heads, heads.group, heads.head_dim))
            k, v = k.transpose((0, 2, 3, 1)).contiguous(), v.transpose((0, 2, 1, 3)).contiguous()

            def call() -> Any:
                weights = self.functional.softmax(self.paddle.matmul(q, k) * case.scale)
                return self.paddle.matmul(weights, v).reshape((len(case.sequences), -1))

            return call
        if case.kind == "mixed":
            raise Unavailable("no attention over sequences of several lengths")
        k, v = (x.repeat_interleave(heads.group, axis=2) for x in (k, v))
        q = queries.reshape((1, tokens, heads.num_heads, heads.head_dim))
        attend = self.functional.scaled_dot_product_attention
        return lambda: attend(q, k, v, is_causal=True).reshape((tokens, -1))

    def sample(self, case: Sampling, tensors: Adopted) -> Call:
        if case.steering.temperature > 0:
            raise Unavailable("no top_p_sampling on a CPU")
        return partial(self.paddle.argmax, tensors["logits"], axis=1)

    def token_logprobs(self, case: Logprobs, tensors: Adopted) -> Call:
        logits, tokens = tensors["logits"], tensors["tokens"].unsqueeze(1)

        def call() -> tuple[Any, ...]:
            value = self.paddle.take_along_axis(logits, tokens, axis=1)
            logprob = value - self.paddle.logsumexp(logits, axis=1, keepdim=True)
            return logprob.squeeze(1), (logits > value).sum(axis=1) + 1, self.paddle.topk(logits, case.num_top)

        return call


class OnTorch(Library):
    """Libraries that take PyTorch's tensors."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        import torch

        self.torch = torch
        torch.set_grad_enabled(False)

    def adopt(self, tensor: Any) -> Any:
        if not isinstance(tensor, np.ndarray):
            return tensor
        found = self.torch.from_numpy(tensor)
        return found.view(self.torch.bfloat16) if tensor.dtype == np.uint16 else found

    def float64(self, output: Any) -> np.ndarray:
        return output.to(self.torch.float64).cpu().numpy()


class Torch(OnTorch):
    """PyTorch, operation by operation."""

    name = "torch"

    def prepare(self, case: Case, tensors: Tensors) -> Call:
        from bench.kernels import torch_functions

        if not hasattr(torch_functions, case.operation):
            raise Unavailable("no such operation")
        return getattr(torch_functions, case.operation)(case, Adopted(tensors, self.adopt))


class Compiled(Torch):
    """PyTorch's functions through torch.compile."""

    name = "compiled"
    case: Case | None = None

    def prepare(self, case: Case, tensors: Tensors) -> Call:
        call = super().prepare(case, tensors)
        if case is not self.case:  # else shapes of several cases would become dynamic
            self.torch.compiler.reset()
            self.case, self.function = case, self.torch.compile(call.func, dynamic=False)
        return partial(self.function, *call.args)


class Liger(OnTorch):
    name = "liger"

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        from liger_kernel.transformers import functional

        self.functional = functional

    def rms_norm(self, case: Case, tensors: Adopted) -> Call:
        return partial(self.functional.liger_rms_norm, tensors["x"], _like(tensors, "weight", "x"), EPS)

    def add_rms_norm(self, case: Case, tensors: Adopted) -> Call:
        weight = _like(tensors, "weight", "delta")
        return partial(self.functional.liger_fused_add_rms_norm, tensors["delta"], tensors["residual"], weight, EPS)

    def silu_mul(self, case: Case, tensors: Adopted) -> Call:
        gate, up = (part.contiguous() for part in tensors["gate_up"].chunk(2, dim=1))  # which Liger would do each time
        return partial(self.functional.liger_swiglu, gate, up)


class FlagGems(OnTorch):
    name = "flaggems"

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        import flag_gems

        self.library = flag_gems

    def rms_norm(self, case: Case, tensors: Adopted) -> Call:
        x, weight = tensors["x"], _like(tensors, "weight", "x")
        return partial(self.library.rms_norm, x, list(weight.shape), weight, EPS)

    def add_rms_norm(self, case: Case, tensors: Adopted) -> Call:
        x, weight = tensors["delta"].clone(), _like(tensors, "weight", "delta")

        def call() -> Any:
            self.library.fused_add_rms_norm(x, tensors["residual"], list(weight.shape), weight, EPS)
            return x

        return call

    def silu_mul(self, case: Case, tensors: Adopted) -> Call:
        return partial(self.library.silu_and_mul, *tensors["gate_up"].chunk(2, dim=1))

    def embedding(self, case: Case, tensors: Adopted) -> Call:
        return partial(self.library.embedding, tensors["table"], tensors["ids"])

    def linear(self, case: Linear, tensors: Adopted) -> Call:
        return partial(self.library.mm, tensors["x"], tensors["weight"].t())


class FlashInfer(OnTorch):
    name = "flashinfer"
    workspace: Any = None

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        import flashinfer

        self.library = flashinfer

    def rms_norm(self, case: Case, tensors: Adopted) -> Call:
        return partial(self.library.rmsnorm, tensors["x"], _like(tensors, "weight", "x"), EPS)

    def add_rms_norm(self, case: Case, tensors: Adopted) -> Call:
        x, weight = tensors["delta"].clone(), _like(tensors, "weight", "delta")

        def call() -> Any:
            self.library.fused_add_rmsnorm(x, tensors["residual"], weight, EPS)
            return x

        return call

    def silu_mul(self, case: Case, tensors: Adopted) -> Call:
        return partial(self.library.silu_and_mul, tensors["gate_up"])

    def attention(self, case: Attention, tensors: Adopted) -> Call:
        """Paged, with the keys' own order as block table: [blocks, BLOCK_SIZE, KVH, D]."""
        heads, torch = case.model.heads, self.torch
        tokens, contexts = np.array(case.sequences).T
        if (contexts % BLOCK_SIZE).any():
            raise Unavailable("contexts are whole blocks here")
        if self.workspace is None:
            self.workspace = torch.zeros(128 << 20, dtype=torch.uint8, device=tensors["keys"].device)
        q = tensors["qkv"][:, : heads.num_heads * heads.head_dim].reshape(-1, heads.num_heads, heads.head_dim)
        shape = (-1, BLOCK_SIZE, heads.num_kv_heads, heads.head_dim)
        cache = tuple(tensors[name].reshape(shape) for name in ("keys", "values"))
        firsts = torch.tensor(np.cumsum([0, *(contexts // BLOCK_SIZE)]), dtype=torch.int32)
        pages = torch.arange(len(cache[0]), dtype=torch.int32, device=q.device)
        table = (firsts, pages, torch.full((len(contexts),), BLOCK_SIZE, dtype=torch.int32))
        sizes = (heads.num_heads, heads.num_kv_heads, heads.head_dim, BLOCK_SIZE)
        types = {"q_data_type": q.dtype, "kv_data_type": cache[0].dtype}
        if case.kind == "decode":
            wrapper = self.library.BatchDecodeWithPagedKVCacheWrapper(self.workspace, use_tensor_cores=True)
            wrapper.plan(*table, *sizes, **types)
        else:
            wrapper = self.library.BatchPrefillWithPagedKVCacheWrapper(self.workspace)
            starts = torch.tensor(np.cumsum([0, *tokens]), dtype=torch.int32)
            wrapper.plan(starts, *table, *sizes, causal=True, **types)
        return lambda: wrapper.run(q, cache).flatten(1)

    def sample(self, case: Sampling, tensors: Adopted) -> Call:
        logits, steering, library = tensors["logits"], case.steering, self.library
        if steering.temperature == 0:
            raise Unavailable("greedy is PyTorch's argmax")
        if steering.top_k:
            return partial(library.top_k_top_p_sampling_from_logits, logits, steering.top_k, steering.top_p)
        return lambda: library.top_p_sampling_from_probs(library.softmax(logits), steering.top_p)


def _like(tensors: Adopted, name: str, other: str) -> Any:
    """A tensor in the type of another one."""
    return tensors[name].to(tensors[other].dtype)


PROVIDERS: dict[str, type] = {
    provider.name: provider for provider in (Ours, NumPy, Paddle, Torch, Compiled, Liger, FlagGems, FlashInfer)
}
DEFAULT = {"cpu": ("ours", "numpy", "paddle"), "cuda": ("ours", "torch")}


def opened(names: Sequence[str], machine: Machine) -> tuple[list[Any], dict[str, str]]:
    """The providers that this machine has, and why it does not have the others, by name."""
    found, missing = [], {}
    for name in names:
        try:
            found.append(PROVIDERS[name](machine))
        except Exception as error:  # whatever a library does while it is imported, the others are still measured
            missing[name] = f"{type(error).__name__}: {error}"
    return found, missing
