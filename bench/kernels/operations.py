"""The operations that are measured, each at the sizes of a model: see cases.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from bench.kernels.cases import ByToken, Case, Reference, Tensors, TokenReference, Work, rows_of, some_rows
from bench.kernels.machine import Machine
from fastdeploy.kernels.activation import silu_mul_reference
from fastdeploy.kernels.embedding import embedding_reference
from fastdeploy.kernels.formats import FORMATS, Format, dequantise_reference, pack_reference, per_group_reference
from fastdeploy.kernels.launch import cdiv
from fastdeploy.kernels.linear import linear_reference
from fastdeploy.kernels.logprobs import logprobs_reference
from fastdeploy.kernels.moe import mixture_reference, padded, route_reference
from fastdeploy.kernels.norm import rms_norm_reference
from fastdeploy.kernels.quantised import activations_reference, quantise_reference, quantised_linear_reference
from fastdeploy.kernels.rope import HeadLayout, KVBlocks, cache_fields, rope_and_cache, rope_reference, rope_tables
from fastdeploy.kernels.sampling import Steering, kept_reference

EPS = 1e-6  # of every norm
BLOCK_SIZE = 64  # tokens of a KV block: the engine's default
WEIGHT_BYTES = CACHE_BYTES = 2  # bfloat16
FILL_TOKENS = 16384  # keys and values that are written to a cache at a time


# Elementwise and gathering


@dataclass(frozen=True)
class Norm(ByToken):
    operation = "rms_norm"

    def work(self) -> Work:
        elements = self.tokens * self.model.hidden
        return Work(2 * elements * self.item + 4 * self.model.hidden, 4 * elements)

    def tensors(self, machine: Machine) -> Tensors:
        shape = (self.tokens, self.model.hidden)
        return {"x": machine.normal(shape, self.dtype), "weight": machine.normal(shape[1:], "float32")}

    def reference(self, machine: Machine, tensors: Tensors) -> Reference:
        rows = some_rows(self.tokens)
        x, weight = rows_of(tensors["x"], rows, machine), machine.float64(tensors["weight"])
        return Reference(rows, slice(None), rms_norm_reference(x, weight, EPS))


@dataclass(frozen=True)
class AddNorm(ByToken):
    operation = "add_rms_norm"
    mutates = ("residual",)

    def work(self) -> Work:
        elements = self.tokens * self.model.hidden
        return Work(4 * elements * self.item + 4 * self.model.hidden, 5 * elements)

    def tensors(self, machine: Machine) -> Tensors:
        shape = (self.tokens, self.model.hidden)
        both = {name: machine.normal(shape, self.dtype) for name in ("residual", "delta")}
        return {**both, "weight": machine.normal(shape[1:], "float32")}

    def reference(self, machine: Machine, tensors: Tensors) -> Reference:
        rows = some_rows(self.tokens)
        total = sum(rows_of(tensors[name], rows, machine) for name in ("residual", "delta"))
        return Reference(rows, slice(None), rms_norm_reference(total, machine.float64(tensors["weight"]), EPS))


@dataclass(frozen=True)
class Activation(ByToken):
    operation = "silu_mul"

    def work(self) -> Work:
        elements = self.tokens * self.model.intermediate
        return Work(3 * elements * self.item, 5 * elements)

    def tensors(self, machine: Machine) -> Tensors:
        return {"gate_up": machine.normal((self.tokens, 2 * self.model.intermediate), self.dtype)}

    def reference(self, machine: Machine, tensors: Tensors) -> Reference:
        rows = some_rows(self.tokens)
        return Reference(rows, slice(None), silu_mul_reference(rows_of(tensors["gate_up"], rows, machine)))


@dataclass(frozen=True)
class Rope(ByToken):
    """Token t is at position t, in a slot of its own. The turned q is checked; what is in the cache, by attention."""

    operation = "rope_and_cache"
    mutates = ("qkv",)

    def work(self) -> Work:
        heads, half = self.model.heads, self.model.heads.head_dim // 2
        queries, pairs = heads.num_heads * heads.head_dim, (heads.num_heads + heads.num_kv_heads) * half
        moved = (heads.qkv_width + queries) * self.item + 2 * heads.num_kv_heads * heads.head_dim * CACHE_BYTES
        tables, indices = 2 * half * 4, 4 + 8
        return Work(self.tokens * (moved + tables + indices), self.tokens * pairs * 6)

    def tensors(self, machine: Machine) -> Tensors:
        heads = self.model.heads
        cos, sin = rope_tables(heads.head_dim, self.tokens, self.model.theta)
        found = {
            "qkv": machine.normal((self.tokens, heads.qkv_width), self.dtype),
            "positions": machine.from_numpy(np.arange(self.tokens, dtype=np.int32)),
            "slots": machine.from_numpy(np.random.default_rng(0).permutation(self.tokens).astype(np.int64)),
            "cos": machine.from_numpy(cos),
            "sin": machine.from_numpy(sin),
            **blank_cache(machine, heads, cdiv(self.tokens, BLOCK_SIZE)),
        }
        if self.model.normalises_heads:
            found |= {name: machine.normal((heads.head_dim,), "float32") for name in ("q_norm", "k_norm")}
        return found

    def reference(self, machine: Machine, tensors: Tensors) -> Reference:
        heads, rows = self.model.heads, some_rows(self.tokens)
        width = heads.num_heads * heads.head_dim
        q = rows_of(tensors["qkv"], rows, machine)[:, :width].reshape(len(rows), heads.num_heads, heads.head_dim)
        if self.model.normalises_heads:
            q = rms_norm_reference(q, machine.float64(tensors["q_norm"]), EPS)
        turned = rope_reference(q, np.array(rows), self.model.theta, heads.interleaved)
        return Reference(rows, slice(0, width), turned.reshape(len(rows), width))


def blank_cache(machine: Machine, heads: HeadLayout, blocks: int) -> Tensors:
    """A KV cache of bfloat16, by the names of `KVBlocks`, whatever layout that has on this machine."""
    fields = cache_fields(heads, blocks, BLOCK_SIZE, "bfloat16")
    return {name: machine.blank(shape, dtype) for name, (shape, dtype) in fields.items()}


def cache_of(machine: Machine, tensors: Tensors) -> KVBlocks:
    """The `KVBlocks` among a case's tensors."""
    names = [name for name in KVBlocks.__dataclass_fields__ if name in tensors]
    return KVBlocks(**{name: machine.view(tensors[name]) for name in names})


@dataclass(frozen=True)
class Embedding(ByToken):
    operation = "embedding"

    def work(self) -> Work:
        return Work(self.tokens * (self.model.hidden * (WEIGHT_BYTES + self.item) + 4), 0)

    def tensors(self, machine: Machine) -> Tensors:
        ids = np.random.default_rng(0).integers(0, self.model.vocabulary, self.tokens, dtype=np.int32)
        table = machine.normal((self.model.vocabulary, self.model.hidden), "bfloat16")
        return {"table": table, "ids": machine.from_numpy(ids)}

    def reference(self, machine: Machine, tensors: Tensors) -> Reference:
        rows = some_rows(self.tokens)
        ids = machine.float64(tensors["ids"]).astype(int)[list(rows)]
        table = rows_of(tensors["table"], tuple(ids.tolist()), machine)
        return Reference(rows, slice(None), embedding_reference(np.arange(len(rows)), table))


@dataclass(frozen=True)
class Gather(ByToken):
    """The hidden states of the tokens that need logits, of eight times as many."""

    operation = "gather_rows"

    def work(self) -> Work:
        return Work(self.tokens * (2 * self.model.hidden * self.item + 4), 0)

    def tensors(self, machine: Machine) -> Tensors:
        rows = np.random.default_rng(0).permutation(8 * self.tokens)[: self.tokens].astype(np.int32)
        return {
            "x": machine.normal((8 * self.tokens, self.model.hidden), self.dtype),
            "rows": machine.from_numpy(np.sort(rows)),
        }

    def reference(self, machine: Machine, tensors: Tensors) -> Reference:
        rows = some_rows(self.tokens)
        taken = machine.float64(tensors["rows"]).astype(int)[list(rows)]
        return Reference(rows, slice(None), rows_of(tensors["x"], tuple(taken.tolist()), machine))


# Linear layers


@dataclass(frozen=True)
class Linear(ByToken):
    operation = "linear"
    layer: str

    @property
    def features(self) -> tuple[int, int]:
        """Output and input features."""
        return self.model.layers()[self.layer]

    @property
    def columns(self) -> slice:
        """Output features that are checked: the last ones, where tiles may be cut off."""
        return slice(max(0, self.features[0] - 64), self.features[0])

    def size(self) -> str:
        n, k = self.features
        return f"{self.layer} {n}x{k} tokens={self.tokens}"

    def work(self) -> Work:
        n, k = self.features
        return Work(n * k * WEIGHT_BYTES + self.tokens * (n + k) * self.item, 2 * self.tokens * n * k)

    def tensors(self, machine: Machine) -> Tensors:
        n, k = self.features
        return {
            "x": machine.normal((self.tokens, k), self.dtype),
            "weight": machine.normal((n, k), "bfloat16", k**-0.5),
        }

    def reference(self, machine: Machine, tensors: Tensors) -> Reference:
        rows = some_rows(self.tokens)
        weight = machine.float64(tensors["weight"][self.columns])
        return Reference(rows, self.columns, linear_reference(rows_of(tensors["x"], rows, machine), weight))


@dataclass(frozen=True)
class QuantisedLinear(Linear):
    """Weights of a few bits, and activations in int8, which the layer before has quantised. On a CPU only."""

    operation = "quantised_linear"
    weights: str = "Q4_1"  # their format, one with scales in float16

    @property
    def format(self) -> Format:
        """With spans that the layer's width has room for."""
        return FORMATS[self.weights].narrowed(0, self.features[1])

    def size(self) -> str:
        return f"{super().size()} {self.weights}"

    def work(self) -> Work:
        n, k = self.features
        packed, activations = round(n * k * self.format.bits_per_weight / 8), self.tokens * (k + k // 32 * 8)
        return Work(packed + activations + self.tokens * n * self.item, 2 * self.tokens * n * k)

    def tensors(self, machine: Machine) -> Tensors:
        (n, k), format = self.features, self.format
        random = np.random.default_rng(0)
        rows = {
            "integers": random.integers(0, 1 << format.bits, (n, k), dtype=np.uint8),
            "scales": random.uniform(0.5, 1.5, (n, k // format.span)).astype(np.float16),
        }
        if format.minimum is not None:
            rows["minimums"] = np.float16(-8) * rows["scales"]
        if format.factor is not None:
            rows["factors"] = random.integers(1, 32, (n, k // 32, format.factors)).astype(format.factor)
        x = random.standard_normal((self.tokens, k), dtype=np.float32)
        values, row_scales = quantise_reference(x)
        sums = values.reshape(self.tokens, -1, 32).sum(axis=2)
        arrays = {
            **pack_reference(format, rows["integers"]),
            **{name: per_group_reference(array) for name, array in rows.items() if name != "integers"},
            **{f"{name} by row": array for name, array in rows.items()},
            "values": values.astype(np.int8), "row_scales": row_scales.astype(np.float32),
            "row_sums": sums.astype(np.int32), "x": x,
        }  # fmt: skip
        if format.table:
            arrays["table"] = np.array(format.table, np.int8)
        return {name: machine.from_numpy(array) for name, array in arrays.items()}

    def reference(self, machine: Machine, tensors: Tensors) -> Reference:
        rows = some_rows(self.tokens)
        integers, row_scales = quantise_reference(rows_of(tensors["x"], rows, machine))
        parts = {name: tensors.get(f"{name} by row") for name in ("integers", "scales", "minimums", "factors")}
        chosen = {name: None if part is None else np.asarray(part)[self.columns] for name, part in parts.items()}
        if self.format.bits == 8:
            chosen["integers"] = chosen["integers"].view(np.int8)
        weight = dequantise_reference(self.format, **chosen)
        values = quantised_linear_reference(activations_reference(integers, row_scales), weight)
        return Reference(rows, self.columns, values)


@dataclass(frozen=True)
class Mixture(ByToken):
    """A mixture's routing, its experts' two layers and the weighted sum, from router logits on."""

    operation = "moe"
    floor: ClassVar[float] = 1e-12

    def work(self) -> Work:
        model = self.model
        pairs, weights = self.tokens * model.top_k, 3 * model.expert_width * model.hidden
        hit = model.experts * (1 - (1 - model.top_k / model.experts) ** self.tokens)  # expected, of random logits
        activations = self.tokens * (2 * model.hidden * self.item + model.experts * 4)
        return Work(round(hit * weights * WEIGHT_BYTES) + activations, 2 * pairs * weights)

    def tensors(self, machine: Machine) -> Tensors:
        model = self.model
        up, down = padded(2 * model.expert_width), padded(model.hidden)
        return {
            "x": machine.normal((self.tokens, model.hidden), self.dtype),
            "logits": machine.normal((self.tokens, model.experts), "float32"),
            "gate_up": machine.normal((model.experts * up, model.hidden), "bfloat16", model.hidden**-0.5),
            "down": machine.normal((model.experts * down, model.expert_width), "bfloat16", model.expert_width**-0.5),
        }

    def reference(self, machine: Machine, tensors: Tensors) -> Reference:
        """One token's, whose experts alone have a hundred million weights."""
        last = self.tokens - 1
        logits = machine.float64(tensors["logits"][last])[None]
        experts, weights = route_reference(logits, self.model.top_k, floor=self.floor)
        gate_up = self._of_experts(machine, tensors["gate_up"], experts[0], 2 * self.model.expert_width)
        down = self._of_experts(machine, tensors["down"], experts[0], self.model.hidden)
        x = machine.float64(tensors["x"][last])[None]
        values = mixture_reference(x, gate_up, down, np.arange(self.model.top_k)[None], weights)
        return Reference((last,), slice(None), values)

    @staticmethod
    def _of_experts(machine: Machine, weights: Any, experts: np.ndarray, features: int) -> np.ndarray:
        """[experts, features, in_features]"""
        first = [int(expert) * padded(features) for expert in experts]
        return np.stack([machine.float64(weights[start : start + features]) for start in first])


# Attention


@dataclass(frozen=True)
class Attention(Case):
    """A batch of sequences, decodes first; keys and values are in the cache already.

    sequences: (tokens of this step, keys that the last of them sees) of each.
    """

    operation = "attention"
    sequences: tuple[tuple[int, int], ...]

    @property
    def decodes(self) -> int:
        """Sequences of one token."""
        return sum(tokens == 1 for tokens, _ in self.sequences)

    @property
    def scale(self) -> float:
        """The factor of the scores."""
        return self.model.heads.head_dim**-0.5

    @property
    def tokens(self) -> int:
        """Of this step."""
        return sum(tokens for tokens, _ in self.sequences)

    @property
    def kind(self) -> str:
        """decode, prefill or mixed."""
        return {len(self.sequences): "decode", 0: "prefill"}.get(self.decodes, "mixed")

    def size(self) -> str:
        heads, (tokens, context) = self.model.heads, self.sequences[-1]
        layout = f"{self.kind} {heads.num_heads}/{heads.num_kv_heads}x{heads.head_dim}"
        if self.kind == "decode":
            return f"{layout} batch={self.decodes} context={context}"
        if self.kind == "prefill":
            return f"{layout} tokens={tokens}"
        chunks = len(self.sequences) - self.decodes
        return f"{layout} batch={self.decodes} context={context} + {chunks} chunks of {tokens}"

    def work(self) -> Work:
        """4 D FLOPs for each query head and key that it sees; of a whole prompt of S tokens these are S (S + 1) / 2."""
        heads = self.model.heads
        seen = sum(tokens * (context - tokens) + tokens * (tokens + 1) // 2 for tokens, context in self.sequences)
        keys = sum(context for _, context in self.sequences)
        queries = 2 * self.tokens * heads.num_heads * heads.head_dim * self.item
        cache = 2 * keys * heads.num_kv_heads * heads.head_dim * CACHE_BYTES
        return Work(queries + cache, 4 * heads.head_dim * heads.num_heads * seen)

    def tensors(self, machine: Machine) -> Tensors:
        heads, contexts = self.model.heads, [context for _, context in self.sequences]
        blocks, most = [cdiv(context, BLOCK_SIZE) for context in contexts], cdiv(max(contexts), BLOCK_SIZE)
        shuffled = np.random.default_rng(0).permutation(sum(blocks)).astype(np.int32)
        tables, firsts = np.zeros((len(blocks), most), np.int32), np.cumsum([0, *blocks])
        for row, count, first in zip(tables, blocks, firsts, strict=False):
            row[:count] = shuffled[first : first + count]
        starts = np.cumsum([0, *(tokens for tokens, _ in self.sequences)]).astype(np.int32)
        shape = (sum(contexts), heads.num_kv_heads, heads.head_dim)
        found = {
            "qkv": machine.normal((self.tokens, heads.qkv_width), self.dtype),
            "keys": machine.normal(shape, "bfloat16"),
            "values": machine.normal(shape, "bfloat16"),
            "cu_seqlens": machine.from_numpy(starts),
            "context_lens": machine.from_numpy(np.array(contexts, np.int32)),
            "block_tables": machine.from_numpy(tables),
            **blank_cache(machine, heads, sum(blocks)),
        }
        self._fill(machine, found, tables)
        return found

    def _fill(self, machine: Machine, tensors: Tensors, tables: np.ndarray) -> None:
        """Write keys and values, as `rope_and_cache` does it: turned by no angle they come out as they are."""
        heads, cache = self.model.heads, cache_of(machine, tensors)
        first_key, width = heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim
        key = [np.arange(context) for _, context in self.sequences]
        places = [
            row[number // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + number % BLOCK_SIZE
            for row, number in zip(tables, key, strict=True)
        ]
        slots = np.concatenate(places)
        angles = [machine.from_numpy(np.full((1, heads.head_dim // 2), value, np.float32)) for value in (1.0, 0.0)]
        for start in range(0, len(slots), FILL_TOKENS):
            here = slice(start, min(start + FILL_TOKENS, len(slots)))
            count = here.stop - start
            qkv = machine.blank((count, heads.qkv_width), self.dtype)
            for column, name in ((first_key, "keys"), (first_key + width, "values")):
                part = machine.cast(tensors[name][here], self.dtype)
                qkv[:, column : column + width] = part.reshape(count, width)
            indices = (np.zeros(count, np.int32), slots[here])
            rope_and_cache(machine.view(qkv), *map(machine.from_numpy, indices), *angles, cache, heads)
            machine.wait()  # its indices are freed

    def reference(self, machine: Machine, tensors: Tensors) -> Reference:
        """The first and the last sequence's last tokens, the query heads of the last KV head."""
        heads = self.model.heads
        starts = np.cumsum([0, *(tokens for tokens, _ in self.sequences)])
        keys_before = np.cumsum([0, *(context for _, context in self.sequences)])
        places = sorted({(0, self.sequences[0][0] // 2), (len(self.sequences) - 1, self.sequences[-1][0] - 1)})
        group, kv_head, width = heads.group, heads.num_kv_heads - 1, heads.head_dim
        columns = slice(kv_head * group * width, (kv_head + 1) * group * width)
        rows, values = [], []
        for sequence, token in places:
            tokens, context = self.sequences[sequence]
            first, seen = int(keys_before[sequence]), context - tokens + token + 1
            k, v = (machine.float64(tensors[name][first : first + seen, kv_head]) for name in ("keys", "values"))
            rows.append(int(starts[sequence]) + token)
            q = machine.float64(tensors["qkv"][rows[-1]])[columns].reshape(group, width)
            scores = np.exp(self.scale * (q @ k.T))
            values.append((scores / scores.sum(axis=1, keepdims=True) @ v).ravel())
        return Reference(tuple(rows), columns, np.stack(values))


# Sampling


SETTINGS: Mapping[str, Steering] = {
    "greedy": Steering(temperature=0.0),
    "top-k 50 top-p 0.9": Steering(top_k=50, top_p=0.9),
    "top-p 0.95": Steering(top_p=0.95),
}
SPREAD = 4.0  # standard deviation of the logits: a nucleus of a few hundred tokens


@dataclass(frozen=True)
class Sampling(Case):
    operation = "sample"
    batch: int
    setting: str

    @property
    def steering(self) -> Steering:
        """Of every row."""
        return SETTINGS[self.setting]

    def size(self) -> str:
        return f"{self.setting} batch={self.batch} vocabulary={self.model.vocabulary}"

    def work(self) -> Work:
        logits = self.batch * self.model.vocabulary
        return Work(4 * logits, logits)

    def tensors(self, machine: Machine) -> Tensors:
        return {"logits": machine.normal((self.batch, self.model.vocabulary), "float32", SPREAD)}

    def reference(self, machine: Machine, tensors: Tensors) -> TokenReference:
        rows = some_rows(self.batch)
        logits = rows_of(tensors["logits"], rows, machine)
        if self.steering.temperature == 0:
            return TokenReference(rows, logits == logits.max(axis=1, keepdims=True))
        return TokenReference(rows, np.stack([kept_reference(row, self.steering) for row in logits]))


@dataclass(frozen=True)
class Logprobs(Case):
    """Log probability and rank of a token of each row, and the five most probable ones; checked is the first."""

    operation = "token_logprobs"
    batch: int
    num_top: ClassVar[int] = 5

    def size(self) -> str:
        return f"batch={self.batch} vocabulary={self.model.vocabulary} top={self.num_top}"

    def work(self) -> Work:
        logits = self.batch * self.model.vocabulary
        return Work(4 * logits, 4 * logits)

    def tensors(self, machine: Machine) -> Tensors:
        tokens = np.random.default_rng(0).integers(0, self.model.vocabulary, self.batch, dtype=np.int32)
        logits = machine.normal((self.batch, self.model.vocabulary), "float32", SPREAD)
        return {"logits": logits, "tokens": machine.from_numpy(tokens)}

    def reference(self, machine: Machine, tensors: Tensors) -> Reference:
        rows = some_rows(self.batch)
        logits = rows_of(tensors["logits"], rows, machine)
        tokens = machine.float64(tensors["tokens"]).astype(int)[list(rows)]
        values = [logprobs_reference(row, token, 0)[0][token] for row, token in zip(logits, tokens, strict=True)]
        return Reference(rows, None, np.array(values))
