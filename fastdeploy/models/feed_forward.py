"""What follows the attention of a layer: an MLP or, in some families, a mixture of experts.

    mlp(h)     = (silu(h Wgate) * h Wup) Wdown
    mixture(h) = sum of w_e mlp_e(h) over the experts e that the router chooses for a token  (+ mlp_shared(h))

A mixture is nine launches, see kernels/moe.py, with activations in int8 too; a shared MLP is two or three more.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastdeploy.config import MixtureConfig
from fastdeploy.device import Device
from fastdeploy.kernels.activation import silu_mul
from fastdeploy.kernels.embedding import gather_columns
from fastdeploy.kernels.formats import QuantisedWeight
from fastdeploy.kernels.launch import TensorView, view
from fastdeploy.kernels.linear import FusedWeight, LinearWeight, Weight, gated_linear, linear
from fastdeploy.kernels.moe import (
    Experts,
    Routing,
    combine,
    gated_grouped_linear,
    grouped_linear,
    route,
    routing_fields,
)
from fastdeploy.kernels.quantised import GROUP, QuantisedRows, quantise, rows_fields
from fastdeploy.models.loading import WeightLoader
from fastdeploy.models.sharding import Shard

LinearOperand = TensorView | QuantisedRows  # what a linear layer reads


@dataclass(frozen=True)
class LinearInput:
    """What linear layers read: floats or, for quantised weights where the model's mode says so, integers.

    What a norm has written has low bytes where there are outliers (`QuantisedRows`); what attention and the gate write
    has 8 bits. With 8 bits in one kind of layer alone SmolLM2's output has a KL divergence of 0.0013 (q, k, v), 0.0010
    (LM head), 0.0009 (gate and up), 0.0007 (down), 0.0001 (attention output).
    """

    floats: TensorView
    int8: QuantisedRows | None
    with_low: QuantisedRows | None  # the same memory as `int8`, and the low bytes
    ordered: TensorView | None = None  # the floats in the order of a weight, where the model has such weights

    def of(self, weight: Weight | Experts) -> LinearOperand:
        """The memory that is written for a layer with this weight: floats, if they have to be ordered yet."""
        return self.floats if weight.ordered else self._read_by(weight)

    def _read_by(self, weight: Weight | Experts) -> LinearOperand:
        """The memory that it reads: the floats, ordered or not, or the integers."""
        if self.int8 is None or isinstance(weight, LinearWeight) or not weight.takes_integers:
            return self.ordered if weight.ordered and self.ordered is not None else self.floats
        return self.with_low if weight.wide_inputs and self.with_low is not None else self.int8

    def quantised_of(self, weight: Weight | Experts) -> LinearOperand:
        """The same, after the floats have been quantised if that is what the layer reads."""
        found = self.of(weight)
        if isinstance(found, QuantisedRows):
            quantise(found, self.floats)
        return found

    def in_order(self, weight: Weight) -> LinearOperand:
        """What a layer with this weight reads, after its order was made from what `of` gave memory for."""
        if not isinstance(weight, QuantisedWeight) or weight.order is None:
            return self.of(weight)
        gather_columns(self.ordered, self.floats, weight.order)
        found = self._read_by(weight)
        if isinstance(found, QuantisedRows):
            quantise(found, self.ordered)
        return found

    def linear(self, out: TensorView, weight: Weight) -> None:
        """out = x @ W.T (+ bias), x being what was written to the memory that `of` gave."""
        if not (weight.ordered and isinstance(weight, FusedWeight)):
            linear(out, self.in_order(weight), weight)
            return
        start = 0
        for part in weight.parts:
            operand = self.in_order(part) if part.ordered else self.quantised_of(part)
            linear(out.columns(start, start + part.out_features), operand, part)
            start += part.out_features

    def rows(self, count: int) -> LinearInput:
        """The same memory, cut to `count` rows."""
        int8, with_low = (None if rows is None else rows.rows(count) for rows in (self.int8, self.with_low))
        return LinearInput(self.floats.rows(count), int8, with_low, self.ordered and self.ordered.rows(count))


@dataclass(frozen=True)
class Allocator:
    """Gives out memory for activations of type `dtype`; linear layers read `input_dtype`, or integers (`int8`).

    ordered: some weights have an order.
    """

    device: Device
    dtype: str
    input_dtype: str
    int8: bool
    ordered: bool

    def matrix(self, rows: int, width: int) -> TensorView:
        return view(self.device.empty((rows, width), self.dtype))

    def input_floats(self, rows: int, width: int) -> TensorView:
        return view(self.device.empty((rows, width), self.input_dtype))

    def linear_input(self, rows: int, width: int, wide: bool = False) -> LinearInput:
        floats = self.input_floats(rows, width)
        ordered = self.input_floats(rows, width) if self.ordered else None
        if not self.int8 or width % GROUP:
            return LinearInput(floats, None, None, ordered)
        integers = QuantisedRows(**self.fields(rows_fields(rows, width, wide)))
        return LinearInput(floats, integers.in_8_bits(), integers if wide else None, ordered)

    def fields(self, shapes: dict[str, tuple[tuple[int, ...], str]]) -> dict[str, TensorView]:
        """Memory by name, for shapes and types by name."""
        return {name: view(self.device.empty(shape, dtype)) for name, (shape, dtype) in shapes.items()}


@dataclass(frozen=True)
class MLPMemory:
    """What an MLP computes in, for T tokens."""

    gate_up: TensorView  # [T, 2 * intermediate]
    activated: LinearInput  # [T, intermediate]

    @classmethod
    def allocate(cls, allocator: Allocator, tokens: int, intermediate: int) -> MLPMemory:
        """For steps of up to `tokens` tokens."""
        return cls(allocator.matrix(tokens, 2 * intermediate), allocator.linear_input(tokens, intermediate))

    def rows(self, count: int) -> MLPMemory:
        """The same memory, cut to `count` tokens."""
        return MLPMemory(self.gate_up.rows(count), self.activated.rows(count))


@dataclass(frozen=True)
class MLP:
    """The weights of one MLP."""

    gate_up: Weight  # [2 * intermediate, hidden]: the rows of gate, then up
    down: Weight  # [hidden, intermediate]

    @classmethod
    def read(cls, weights: WeightLoader, module: str, hidden: int, intermediate: int, bias: bool) -> MLP:
        """The weights of the MLP `module`, all with a bias or none; of several ranks' intermediate, this one's."""
        gate_up, rows = [f"{module}.gate_proj", f"{module}.up_proj"], weights.shard.of(intermediate)
        return cls(
            gate_up=weights.linear(gate_up, hidden, [intermediate] * 2, bias, [rows] * 2, wide_inputs=True),
            down=weights.linear([f"{module}.down_proj"], intermediate, [hidden], bias, columns=rows),
        )

    @property
    def first(self) -> Weight:
        """The weight that reads the hidden state."""
        return self.gate_up

    def launch(self, out: TensorView, hidden: LinearInput, memory: MLPMemory) -> None:
        """out = mlp(hidden), [T, hidden]."""
        activated = memory.activated.of(self.down)
        if not gated_linear(activated, hidden.in_order(self.gate_up), self.gate_up):
            hidden.linear(memory.gate_up, self.gate_up)
            silu_mul(activated, memory.gate_up)
        memory.activated.linear(out, self.down)


@dataclass(frozen=True)
class MixtureMemory:
    """What a mixture computes in, for T tokens of k experts each; sorted by expert what has T k rows."""

    logits: TensorView  # [T, experts] float32
    routing: Routing
    gate_up: TensorView  # [T k, 2 * intermediate]
    activated: LinearInput  # [T k, intermediate]
    outputs: TensorView  # [T k, hidden]
    shared: MLPMemory | None
    shared_output: TensorView | None  # [T, hidden]

    @classmethod
    def allocate(
        cls, allocator: Allocator, tokens: int, hidden: int, config: MixtureConfig, shard: Shard
    ) -> MixtureMemory:
        """For steps of up to `tokens` tokens, and this rank's share of the experts."""
        pairs, shared = tokens * config.experts_per_token, len(shard.of(config.shared_size))
        intermediate = len(shard.of(config.intermediate_size))
        routing = routing_fields(tokens, config.experts_per_token, config.num_experts)
        return cls(
            logits=view(allocator.device.empty((tokens, config.num_experts), "float32")),
            routing=Routing(**allocator.fields(routing)),
            gate_up=allocator.matrix(pairs, 2 * intermediate),
            activated=allocator.linear_input(pairs, intermediate),
            outputs=allocator.matrix(pairs, hidden),
            shared=MLPMemory.allocate(allocator, tokens, shared) if shared else None,
            shared_output=allocator.matrix(tokens, hidden) if shared else None,
        )

    def rows(self, count: int) -> MixtureMemory:
        """The same memory, cut to `count` tokens."""
        pairs = count * self.routing.experts.shape[1]
        return MixtureMemory(
            logits=self.logits.rows(count),
            routing=self.routing.of(count),
            gate_up=self.gate_up.rows(pairs),
            activated=self.activated.rows(pairs),
            outputs=self.outputs.rows(pairs),
            shared=self.shared and self.shared.rows(count),
            shared_output=self.shared_output and self.shared_output.rows(count),
        )


@dataclass(frozen=True)
class Mixture:
    """The weights of a mixture of experts. `floor`: see `kernels.moe.route`."""

    router: Weight  # [experts, hidden] float32
    correction: TensorView | None  # [experts] float32
    gate_up: Experts  # [2 * intermediate, hidden] each
    down: Experts  # [hidden, intermediate] each
    shared: MLP | None
    floor: float | None

    @classmethod
    def read(cls, weights: WeightLoader, module: str, hidden: int, config: MixtureConfig) -> Mixture:
        """The weights of the mixture `module`, none with a bias; each expert is shared among ranks as an MLP is."""
        intermediate, shared = config.intermediate_size, config.shared_size
        rows = weights.shard.of(intermediate)
        experts = [f"{module}.experts.{index}" for index in range(config.num_experts)]
        gate_up = [[f"{expert}.gate_proj", f"{expert}.up_proj"] for expert in experts]
        down = [[f"{expert}.down_proj"] for expert in experts]
        return cls(
            router=weights.router(f"{module}.gate", hidden, config.num_experts),
            correction=weights.correction(f"{module}.moe_statics", config.num_experts) if config.corrected else None,
            gate_up=weights.experts(gate_up, hidden, intermediate, rows, range(hidden)),
            down=weights.experts(down, intermediate, hidden, range(hidden), rows),
            shared=MLP.read(weights, f"{module}.shared_experts", hidden, shared, bias=False) if shared else None,
            floor=config.weight_floor,
        )

    @property
    def first(self) -> Weight:
        """The weight that reads the hidden state."""
        return self.router

    def launch(self, out: TensorView, hidden: LinearInput, memory: MixtureMemory) -> None:
        """out = mixture(hidden), [T, hidden]."""
        routing = memory.routing
        linear(memory.logits, hidden.floats, self.router)
        route(routing, memory.logits, self.correction, self.floor)
        read, activated = hidden.quantised_of(self.gate_up), memory.activated.of(self.down)
        if not gated_grouped_linear(activated, read, self.gate_up, routing):
            grouped_linear(memory.gate_up, read, self.gate_up, routing, by_token=True)
            silu_mul(activated, memory.gate_up)
        grouped_linear(memory.outputs, activated, self.down, routing, by_token=False)
        if self.shared is not None and memory.shared is not None and memory.shared_output is not None:
            hidden.quantised_of(self.shared.gate_up)  # the experts have read no low bytes
            self.shared.launch(memory.shared_output, hidden, memory.shared)
        combine(out, memory.outputs, routing, memory.shared_output)
