"""Our launchers on a case's tensors. Everything that the engine does once is done before the call that is measured:
views, packed weights, workspaces, outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bench.kernels.cases import Case, Tensors
from bench.kernels.machine import Machine
from bench.kernels.operations import EPS, Attention, Linear, Logprobs, Mixture, QuantisedLinear, Sampling, cache_of
from fastdeploy.kernels import logprobs, sampling
from fastdeploy.kernels.activation import silu_mul
from fastdeploy.kernels.attention import AttentionBatch, paged_attention, split_keys, workspace_shape
from fastdeploy.kernels.embedding import embedding, gather_rows
from fastdeploy.kernels.formats import QuantisedWeight
from fastdeploy.kernels.launch import TensorView, cdiv, target
from fastdeploy.kernels.linear import LinearWeight, default_panel, linear, pack, packed_shape
from fastdeploy.kernels.moe import ExpertWeights, Routing, combine, grouped_linear, route, routing_fields
from fastdeploy.kernels.norm import add_rms_norm, rms_norm
from fastdeploy.kernels.quantised import QuantisedRows, quantised_linear
from fastdeploy.kernels.rope import HeadNorms, rope_and_cache

Call = Callable[[], Any]


class Ours:
    """A method for each operation: a case and its tensors -> a call that launches, and returns the output."""

    name = "ours"
    replayable = True

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.view = machine.view

    def prepare(self, case: Case, tensors: Tensors) -> Call:
        """The call that is measured."""
        return getattr(self, case.operation)(case, tensors)

    def float64(self, output: Any) -> np.ndarray:
        return self.machine.float64(output)

    def rms_norm(self, case: Case, tensors: Tensors) -> Call:
        out = self.machine.blank(tensors["x"].shape, case.dtype)
        return returning(out, rms_norm, *map(self.view, (out, tensors["x"], tensors["weight"])), EPS)

    def add_rms_norm(self, case: Case, tensors: Tensors) -> Call:
        out = self.machine.blank(tensors["residual"].shape, case.dtype)
        inputs = (tensors["residual"], tensors["delta"], tensors["weight"])
        return returning(out, add_rms_norm, *map(self.view, (out, *inputs)), EPS)

    def silu_mul(self, case: Case, tensors: Tensors) -> Call:
        rows, width = tensors["gate_up"].shape
        out = self.machine.blank((rows, width // 2), case.dtype)
        return returning(out, silu_mul, self.view(out), self.view(tensors["gate_up"]))

    def rope_and_cache(self, case: Case, tensors: Tensors) -> Call:
        norms = None
        if "q_norm" in tensors:
            norms = HeadNorms(self.view(tensors["q_norm"]), self.view(tensors["k_norm"]), EPS)
        inputs = [self.view(tensors[name]) for name in ("qkv", "positions", "slots", "cos", "sin")]
        cache = cache_of(self.machine, tensors)
        return returning(tensors["qkv"], rope_and_cache, *inputs, cache, case.model.heads, norms)

    def embedding(self, case: Case, tensors: Tensors) -> Call:
        table = self.packed(tensors["table"])
        out = self.machine.blank((len(tensors["ids"]), table.in_features), case.dtype)
        return returning(out, embedding, self.view(out), self.view(tensors["ids"]), table)

    def gather_rows(self, case: Case, tensors: Tensors) -> Call:
        out = self.machine.blank((len(tensors["rows"]), case.model.hidden), case.dtype)
        return returning(out, gather_rows, *map(self.view, (out, tensors["x"], tensors["rows"])))

    def linear(self, case: Linear, tensors: Tensors) -> Call:
        out = self.machine.blank((case.tokens, case.features[0]), case.dtype)
        weight = self.packed(tensors["weight"])
        return returning(out, linear, self.view(out), self.view(tensors["x"]), weight)

    def packed(self, weight: Any) -> LinearWeight:
        """[N, K] as this machine's linear layers take it: in panels on a CPU, as it is on a GPU."""
        source, panel = self.view(weight), default_panel(target())
        n, k = source.shape
        if panel == 1:
            return LinearWeight(source.reshape(n, k, 1), n, k, 1)
        data = self.view(self.machine.blank(packed_shape(n, k, panel), "bfloat16"))
        pack(data, source)
        return LinearWeight(data, n, k, panel)

    def quantised_linear(self, case: QuantisedLinear, tensors: Tensors) -> Call:
        n, k = case.features
        out = self.machine.blank((case.tokens, n), case.dtype)
        planes = ("data", "high", "scales", "minimums", "factors", "table")
        weight = QuantisedWeight(case.format, n, k, **{p: self.view(tensors[p]) for p in planes if p in tensors})
        x = QuantisedRows(*(self.view(tensors[name]) for name in ("values", "row_scales", "row_sums")))
        return returning(out, quantised_linear, self.view(out), x, weight)

    def moe(self, case: Mixture, tensors: Tensors) -> Call:
        """Router logits to the weighted sum of the experts' outputs: seven launches."""
        model, view = case.model, self.view
        pairs, width = case.tokens * model.top_k, model.expert_width
        shapes = ((pairs, 2 * width), (pairs, width), (pairs, model.hidden), (case.tokens, model.hidden))
        gate_up, gated, down, out = (self.machine.blank(shape, case.dtype) for shape in shapes)
        fields = routing_fields(case.tokens, model.top_k, model.experts)
        routing = Routing(**{name: self._empty(*field) for name, field in fields.items()})
        x, logits = view(tensors["x"]), view(tensors["logits"])
        first = ExpertWeights(self.packed(tensors["gate_up"]), model.experts, 2 * width)
        second = ExpertWeights(self.packed(tensors["down"]), model.experts, model.hidden)
        up_view, gated_view, down_view, out_view = map(view, (gate_up, gated, down, out))

        def call() -> Any:
            route(routing, logits, floor=case.floor)
            grouped_linear(up_view, x, first, routing, by_token=True)
            silu_mul(gated_view, up_view)
            grouped_linear(down_view, gated_view, second, routing, by_token=False)
            combine(out_view, down_view, routing)
            return out

        return call

    def attention(self, case: Attention, tensors: Tensors) -> Call:
        heads, contexts = case.model.heads, [context for _, context in case.sequences]
        out = self.machine.blank((case.tokens, heads.num_heads * heads.head_dim), case.dtype)
        batch = AttentionBatch(
            num_decodes=case.decodes,
            num_seqs=len(contexts),
            max_query_len=max(tokens for tokens, _ in case.sequences),
            num_splits=cdiv(max(contexts[: case.decodes], default=1), split_keys()),
            **{name: self.view(tensors[name]) for name in ("cu_seqlens", "context_lens", "block_tables")},
        )
        workspace = self._empty(workspace_shape(max(case.decodes, 1), heads, max(contexts)), "float32")
        inputs = (self.view(tensors["qkv"]), cache_of(self.machine, tensors))
        return returning(out, paged_attention, self.view(out), *inputs, batch, heads, case.scale, workspace)

    def sample(self, case: Sampling, tensors: Tensors) -> Call:
        rows, view = case.batch, self.view
        steering = {name: np.full(rows, value, np.float32) for name, value in vars(case.steering).items()}
        steering |= {name: steering[name].astype(np.int32) for name in ("top_k", "hold_until")}
        arrays = {
            **steering, "seed": np.arange(rows), "num_edits": np.zeros(rows, np.int32),
            "edit_ids": np.zeros((rows, 1), np.int32), "edit_bias": np.zeros((rows, 1), np.float32),
            "edit_seen": np.zeros((rows, 1), np.int32),
        }  # fmt: skip
        state = sampling.SamplingState(**{name: view(self.machine.from_numpy(a)) for name, a in arrays.items()})
        workspace = sampling.allocate_workspace(self._empty, rows, case.model.vocabulary, 1)
        slots, positions, forced = (
            view(self.machine.from_numpy(array))
            for array in (np.arange(rows, dtype=np.int32), np.full(rows, 100, np.int32), np.full(rows, -1, np.int32))
        )
        out = self.machine.blank((rows,), "int32")
        logits = view(tensors["logits"])
        return returning(out, sampling.sample, view(out), logits, slots, positions, forced, state, workspace)

    def token_logprobs(self, case: Logprobs, tensors: Tensors) -> Call:
        fields = logprobs.output_fields(case.batch, case.num_top)
        outputs = {name: self.machine.blank(*field) for name, field in fields.items()}
        results = logprobs.LogprobOutputs(**{name: self.view(tensor) for name, tensor in outputs.items()})
        fields = logprobs.workspace_fields(case.batch, case.model.vocabulary)
        workspace = logprobs.LogprobWorkspace(**{name: self._empty(*field) for name, field in fields.items()})
        inputs = (self.view(tensors["logits"]), self.view(tensors["tokens"]), case.num_top)
        return returning(outputs["logprob"], logprobs.token_logprobs, results, *inputs, workspace)

    def _empty(self, shape: tuple[int, ...], dtype: str) -> TensorView:
        return self.view(self.machine.blank(shape, dtype))


def returning(output: Any, launcher: Callable[..., None], *arguments: Any) -> Call:
    """A call of a launcher that returns the tensor which it writes."""

    def call() -> Any:
        launcher(*arguments)
        return output

    return call
