"""From a checkpoint's tensors to the weights that kernels read: converted, fused and packed.

In two passes. A model first asks for all of its weights, which gives it their memory; then `load` compares what was
asked for with what the checkpoint has, and only if they agree reads it. Reading goes in slices of rows, each packed to
its place before the next is read, so that loading needs the memory of the model plus one slice, whatever the format.

What a linear layer's weights become, by `quantization` and by what the file holds:

                        quantised, as          other
                        kernels know it        quantisations       floats        embeddings, LM head in floats
    None                floats                 floats              floats        floats
    "auto", "exact"     kept                   Q8_0                floats        floats
    "wint8", "w8a8"     kept                   Q8_0                Q8_0          floats
    "wint4", "w4a8"     kept                   Q8_0                Q4_1, Q8_0    floats

Q4_1 is searched for, see calibration.py. Q8_0 is for v_proj, which matters most for its size.
Activations become integers in "auto", "w8a8" and "w4a8"; on a GPU "auto" is "exact".
Weights that are read by one launch (q, k and v; gate and up) make several where the file has them in several formats.
Of a mixture, gate, up or down of all experts is a matrix in one format: those in several become Q8_0 or, if some are
floats, floats.
Where ranks share a layer's input features in parts that are no whole groups of 32, it becomes floats, with a warning.
Some files have the weights of a row in an order of their own ("act order"). Linear layers keep it; embeddings, experts
and layers whose input features ranks share become floats, with a warning.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from math import prod
from typing import Any

import numpy as np
from tqdm import tqdm

from fastdeploy.config import MODES
from fastdeploy.device import DTYPE_BYTES, GIB, Device
from fastdeploy.device.host import progress_bar
from fastdeploy.kernels.formats import FORMATS, GROUP, Format, QuantisedWeight, table_of
from fastdeploy.kernels.launch import TensorView, target, view
from fastdeploy.kernels.linear import FusedWeight, LinearWeight, Weight, default_panel, pack, packed_shape
from fastdeploy.kernels.moe import Experts, ExpertWeights, FusedExperts, padded
from fastdeploy.kernels.packing import NIBBLES, Codes, pack_codes, pack_floats
from fastdeploy.kernels.search import search_q4
from fastdeploy.models.sharding import WHOLE, Shard
from fastdeploy.models.storage import Encoded
from fastdeploy.models.weights import Checkpoint, RawTensor

logger = logging.getLogger("fastdeploy")

# In 8 bits where floats become four: 3 % of SmolLM2's weights, but 12 % of its KL divergence.
EIGHT_BITS = ("v_proj.weight",)
TABLES = ("model.embed_tokens.weight", "lm_head.weight")  # quantised only where the file has them so
SLICE_ELEMENTS = 4 << 20  # 16 MiB as float32: large enough to hide the cost of a call, small beside any model


class WeightLoader:
    """Gives a model the memory of its weights, then fills it from a checkpoint.

    Args:
        checkpoint: where the tensors come from.
        device: where the weights go.
        shard: which part of the model they are: the models ask for rows and columns accordingly.
        dtype: what the linear layers' float weights are stored in, "float32", "bfloat16" or "float16".
        quantization: which weights are quantised, see above.

    Raises MemoryError if the weights can't fit.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: Device,
        dtype: str,
        quantization: str | None = None,
        shard: Shard = WHOLE,
    ) -> None:
        self.device = device
        self.shard = shard
        self.dtype = dtype
        if quantization == "auto" and not target().is_cpu:
            quantization = "exact"  # half a group of nibbles makes a tl.dot of K = 16; for int8 GPUs begin with 32
        self.mode = MODES[quantization]
        self._checkpoint = checkpoint
        self._panel = default_panel(target())
        self._shapes: dict[str, tuple[int, ...]] = {}  # of the tensors asked for
        self._shares: dict[str, float] = {}  # what part of each tensor this rank takes
        self._room, self._allocated = device.free_memory(), 0  # bytes
        self.ordered = False  # whether any weight has an order of its own
        self.all_floats = True  # whether none is quantised
        self._orders: dict[bytes, TensorView] = {}  # on the device: what reads the same activations has the same
        self._reads: list[Callable[[tqdm], None]] = []  # what `load` has to do, in the order asked for
        self._importance: Mapping[str, np.ndarray] = {}
        # Where each tensor is that was asked for: the quantised weight that has it and its first row; None for floats.
        self.places: dict[str, tuple[QuantisedWeight, int] | None] = {}
        matrices = [name for name in checkpoint.names() if len(checkpoint.shape(name)) == 2]
        self._tables: dict[tuple[int, ...], TensorView] = {}  # of values, on the device
        # What each weight becomes; None for floats
        self._formats = {name: self._format(name) for name in matrices}
        self._refuse_above(sum(map(self._nbytes, checkpoint.names())))  # before any is read or allocated

    def vector(self, names: Sequence[str], sizes: Sequence[int], rows: Sequence[range] | None = None) -> TensorView:
        """The tensors [sizes[i]] one after the other, as float32: norm weights and biases are too small to round.

        rows: the elements to take of each; all, if not given.
        """
        taken = [range(size) for size in sizes] if rows is None else rows
        out = self._empty((sum(map(len, taken)),), "float32")
        for name, size, part in zip(names, sizes, taken, strict=True):
            self._ask(name, (size,), len(part) / size)
        self._reads.append(partial(self._read_vector, out, names, taken))
        return view(out)

    def linear(
        self,
        modules: Sequence[str],
        in_features: int,
        out_features: Sequence[int],
        bias: bool = False,
        rows: Sequence[range] | None = None,
        columns: range | None = None,
        padded_rows: int = 0,
        wide_inputs: bool = False,
    ) -> Weight:
        """The tensors "<module>.weight", [out_features[i], in_features] each, one below the other as one packed weight.

        With `bias`, the tensors "<module>.bias", [out_features[i]] each, come with them.

        rows, columns: the output features to take of each, and the input features; all, if not given. A bias is that of
            the rows; where the columns begin later than with the first, another rank adds it.
        padded_rows: output features of the weight at least; those without values are unspecified.
        wide_inputs: activations that are quantised for this layer have low bytes, see `QuantisedRows`.
        """
        names = [f"{module}.weight" for module in modules]
        taken = [range(size) for size in out_features] if rows is None else rows
        columns = range(in_features) if columns is None else columns
        for name, size, part in zip(names, out_features, taken, strict=True):
            self._ask(name, (size, in_features), len(part) / size * len(columns) / in_features)
        biases = None
        if bias:
            biases = self.vector([f"{module}.bias" for module in modules], out_features, taken)
        whole = len(columns) == in_features
        for name in names:
            format = self._format(name)
            if not whole or name in TABLES:
                format = self._without_order(format, [name])
            self._formats[name] = self._narrowed(format, name, columns)
        parts: list[LinearWeight | QuantisedWeight] = []
        start = 0
        for (format, order), run in groupby(zip(names, taken, strict=True), lambda pair: self._kind(pair[0])):
            names_here, rows_here = zip(*run, strict=True)
            height = max(sum(map(len, rows_here)), padded_rows)
            bias_here = biases.rows(height, start) if biases is not None and columns.start == 0 else None
            weight = self._allocate(format, height, len(columns), bias_here, wide_inputs)
            if isinstance(weight, QuantisedWeight) and order:
                weight = replace(weight, order=self._order_on_device(order))
            parts.append(weight)
            self._place(parts[-1], names_here, rows_here, columns, 0)
            start += height
        return parts[0] if len(parts) == 1 else FusedWeight(tuple(parts))

    def experts(
        self, modules: Sequence[Sequence[str]], in_features: int, out_features: int, rows: range, columns: range
    ) -> Experts:
        """The weights of each expert's modules, as in `linear`."""
        stacks = [[f"{module}.weight" for module in stack] for stack in zip(*modules, strict=True)]  # one of gate, ...
        for name in (name for stack in stacks for name in stack):
            self._ask(name, (out_features, in_features), len(rows) / out_features * len(columns) / in_features)
        formats = [self._format_of_experts(stack, columns) for stack in stacks]
        parts: list[ExpertWeights] = []
        for format, run in groupby(zip(formats, stacks, strict=True), lambda pair: pair[0]):
            stacks_here = [stack for _, stack in run]
            height, count = len(rows) * len(stacks_here), len(modules)
            weight = self._allocate(format, count * padded(height), len(columns))
            parts.append(ExpertWeights(weight, count, height))
            for place, stack in enumerate(stacks_here):  # one after the other, as files have them
                for expert, name in enumerate(stack):
                    self._place(weight, [name], [rows], columns, expert * padded(height) + place * len(rows))
        return parts[0] if len(parts) == 1 else FusedExperts(tuple(parts))

    def router(self, module: str, in_features: int, num_experts: int) -> LinearWeight:
        """The weight that chooses experts, in float32: nearly equal ones must not become equal."""
        name = f"{module}.weight"
        self._ask(name, (num_experts, in_features), 1.0)
        self._formats[name] = None
        weight = self._allocate_floats(num_experts, in_features, None, "float32")
        self._place(weight, [name], [range(num_experts)], range(in_features), 0)
        return weight

    def correction(self, module: str, num_experts: int) -> TensorView:
        """What is added to the probabilities of experts for their choice, [num_experts] float32."""
        out, name = self._empty((num_experts,), "float32"), f"{module}.e_score_correction_bias"
        self._ask(name, (1, num_experts), 1.0)
        self._reads.append(partial(self._read_vector, out, [name], [range(1)]))
        return view(out)

    @property
    def makes_four_bits(self) -> bool:
        """Whether floats become four bits, of which it matters what they are used for."""
        made = (name for name, format in self._formats.items() if format is not None and format.name == "Q4_1")
        return any(self._checkpoint.storage(name) in DTYPE_BYTES for name in made)

    def check(self) -> None:
        """Raises ValueError if the checkpoint lacks a tensor, has another shape of it, or has one that nobody asked
        for."""
        self._checkpoint.check(self._shapes)

    def load(self, progress: bool, importance: Mapping[str, np.ndarray] | None = None) -> None:
        """Read everything that was asked for, with a progress bar if `progress`.

        importance: how much errors in the weights of each input feature matter, [in_features of this rank] float32, by
            tensor; floats that become four bits are rounded to nearest where it is not given.

        Raises ValueError as `check` does.
        """
        self.check()
        self._log_quantised()
        self._importance = importance or {}
        total = sum(map(self._nbytes, self._shapes))
        with progress_bar(total=total, desc="Loading weights", unit="B", unit_scale=True, disable=not progress) as bar:
            self.read(bar)

    def read(self, bar: tqdm) -> None:
        """Read what was asked for since the last call."""
        for read in self._reads:
            read(bar)
        self._reads.clear()

    def _kind(self, name: str) -> tuple[Format | None, bytes]:
        """What the weights that one launch computes have in common: the format, and the order if there is one."""
        format = self._formats[name]
        return format, b"" if format is None else self._order(name)

    def _order(self, name: str) -> bytes:
        """The order in which a file has the columns of a weight; empty if it is their own."""
        encoded = self._checkpoint.encoded(name)
        return b"" if encoded is None or encoded.order is None else encoded.order.tobytes()

    def _order_on_device(self, order: bytes) -> TensorView:
        self.ordered = True
        if order not in self._orders:
            self._orders[order] = view(self.device.from_numpy(np.frombuffer(order, np.int32).copy()))
        return self._orders[order]

    def _format(self, name: str) -> Format | None:
        """What a weight becomes; None for floats."""
        if name not in self._checkpoint or self._checkpoint.shape(name)[-1] % GROUP:
            return None  # `load` reports what is missing
        if self._checkpoint.storage(name) in DTYPE_BYTES:
            made = None if name in TABLES else self.mode.floats_become
            if made == "Q4_1" and name.endswith(EIGHT_BITS):
                made = "Q8_0"
            return FORMATS[made] if made else None
        if not self.mode.keeps_quantised:
            return None
        encoded = self._checkpoint.encoded(name)
        return FORMATS["Q8_0"] if encoded is None else encoded.format

    def _without_order(self, format: Format | None, names: Sequence[str]) -> Format | None:
        """The same of weights that can't have an order of their own: floats where files have one."""
        if format is None:
            return None
        found = [name for name in names if name in self._checkpoint and self._order(name)]
        if not found or self._kept(found[0], format) is None:
            return format
        others = f" (and {len(found) - 1} others)" if len(found) > 1 else ""
        logger.warning("%s%s: has its weights in an order of its own, so it is kept in floats", found[0], others)
        return None

    def _narrowed(self, format: Format | None, name: str, columns: range) -> Format | None:
        """The same for these columns of the weight alone."""
        if format is None:
            return None
        try:
            return format.narrowed(columns.start, columns.stop)
        except ValueError:
            share = f"{len(columns)} input features a rank"
            logger.warning("%s: %s cut groups of %d, so it is kept in floats", name, share, GROUP)
            return None

    def _format_of_experts(self, names: Sequence[str], columns: range) -> Format | None:
        """What the same matrix of all experts becomes: one format, as they lie in one matrix."""
        formats = {self._format(name) for name in names if name in self._checkpoint}
        found = formats.pop() if len(formats) == 1 else None
        if len(formats) > 1:
            found = None if None in formats else FORMATS["Q8_0"]
            had = ", ".join(sorted(format.name if format else "floats" for format in formats))
            became = found.name if found else "floats"
            logger.info("%s and the other experts' come as %s; all become %s", names[0], had, became)
        found = self._narrowed(self._without_order(found, names), names[0], columns)
        self._formats |= dict.fromkeys(names, found)
        return found

    def _place(
        self,
        weight: LinearWeight | QuantisedWeight,
        names: Sequence[str],
        rows: Sequence[range],
        columns: range,
        place: int,
    ) -> None:
        """Have `load` read these parts of tensors into `weight`, one below the other from row `place` on."""
        for name, part in zip(names, rows, strict=True):
            if isinstance(weight, QuantisedWeight):
                self.places[name] = (weight, place)
                self._reads.append(partial(self._read_quantised, weight, name, part, columns, place))
            else:
                self._reads.append(partial(self._read_matrix, weight, name, part, columns, place))
            place += len(part)

    def _allocate_floats(
        self, out_features: int, in_features: int, bias: TensorView | None, dtype: str
    ) -> LinearWeight:
        data = view(self._empty(packed_shape(out_features, in_features, self._panel), dtype))
        return LinearWeight(data, out_features, in_features, self._panel, bias)

    def _allocate(
        self,
        format: Format | None,
        out_features: int,
        in_features: int,
        bias: TensorView | None = None,
        wide_inputs: bool = False,
    ) -> LinearWeight | QuantisedWeight:
        if format is None:
            return self._allocate_floats(out_features, in_features, bias, self.dtype)
        self.all_floats = False
        fields = format.fields(out_features, in_features).items()
        planes = {name: view(self._empty(shape, dtype)) for name, (shape, dtype) in fields}
        values = table_of(format)
        if values is not None:
            if format.table not in self._tables:
                self._tables[format.table] = view(self.device.from_numpy(values))
            planes["table"] = self._tables[format.table]
        return QuantisedWeight(format, out_features, in_features, **planes, bias=bias, wide_inputs=wide_inputs)

    def _empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Memory on the device. A checkpoint that makes its tensors up has none that could be counted before, and what
        this rank takes of each is only known now."""
        self._allocated += prod(shape) * DTYPE_BYTES.get(dtype, 1)
        self._refuse_above(self._allocated)
        return self.device.empty_weights(shape, dtype)

    def _ask(self, name: str, shape: tuple[int, ...], share: float) -> None:
        if name in self._shapes:
            raise ValueError(f"the model asks for the tensor {name!r} twice")
        self._shapes[name] = shape
        self._shares[name] = share
        self.places[name] = None
        self._checkpoint.expect(name, shape)

    def _read_vector(self, out: Any, names: Sequence[str], rows: Sequence[range], bar: tqdm) -> None:
        parts = [as_float32(self._checkpoint.read_rows(name, part.start, part.stop)) for name, part in zip(names, rows)]
        self.device.write(out, np.concatenate(parts).reshape(-1))
        bar.update(sum(map(self._nbytes, names)))

    def _slices(self, name: str, rows: range, bar: tqdm) -> Iterator[tuple[int, int]]:
        """Cuts `rows` of a matrix into (start, stop) of a convenient size; tells the bar when each is read."""
        step = max(1, SLICE_ELEMENTS // self._shapes[name][1])
        for start in range(rows.start, rows.stop, step):
            stop = min(start + step, rows.stop)
            yield start, stop
            bar.update(self._nbytes(name) * (stop - start) // len(rows))

    def _read_matrix(self, out: LinearWeight, name: str, rows: range, columns: range, place: int, bar: tqdm) -> None:
        """Read a part of a matrix to the rows of `out` from `place` on."""
        for start, stop in self._slices(name, rows, bar):
            part = self._checkpoint.read_rows(name, start, stop)
            array = part.array[:, columns.start : columns.stop]
            pack(out.data, view(self.device.from_numpy(array), part.dtype), place + start - rows.start)

    def _read_quantised(
        self, out: QuantisedWeight, name: str, rows: range, columns: range, place: int, bar: tqdm
    ) -> None:
        """The same of a quantised matrix: as the file has it, if kernels know its format."""
        encoded = self._kept(name, out.format)
        for start, stop in self._slices(name, rows, bar):
            first_row = place + start - rows.start
            if encoded is not None:
                codes = self._checkpoint.read_codes(name, start, stop)
                codes = codes.cut(columns, encoded.format.span, out.format.span).moved(self.device.from_numpy)
                pack_codes(out, codes, encoded.layout, first_row, columns.start)
            else:
                part = self._checkpoint.read_rows(name, start, stop)
                array = np.ascontiguousarray(part.array[:, columns.start : columns.stop])
                self._pack_made(out, name, view(self.device.from_numpy(array), part.dtype), first_row)

    def _pack_made(self, out: QuantisedWeight, name: str, rows: TensorView, first_row: int) -> None:
        """Quantise rows: four bits by search where it is known what matters, else to nearest."""
        if name not in self._importance or out.format.name != "Q4_1":
            pack_floats(out, rows, first_row)
            return
        (count, width), empty = rows.shape, self.device.empty
        q = empty((count, width), "uint8")
        scales, minimums = (empty((count, width // GROUP), "float16") for _ in range(2))
        search_q4(q, scales, minimums, rows, self.device.from_numpy(self._importance[name]))
        pack_codes(out, Codes(q, scales, minimums), NIBBLES, first_row)

    def _kept(self, name: str, format: Format) -> Encoded | None:
        """How a tensor is stored, if it need not be converted to become a weight in this format."""
        encoded = self._checkpoint.encoded(name)
        return encoded if encoded is not None and replace(encoded.format, span=format.span) == format else None

    def _nbytes(self, name: str) -> int:
        """Bytes that this rank's part of a tensor takes in memory."""
        format = self._formats.get(name)
        bits = 8 * DTYPE_BYTES[self.dtype] if format is None else format.bits_per_weight
        share = self._shares.get(name, 1 / self.shard.ranks)
        return int(prod(self._checkpoint.shape(name)) * bits / 8 * share)

    def _log_quantised(self) -> None:
        """One line for each way that tensors were quantised: from what to what, how many, which."""
        ways: dict[str, list[str]] = defaultdict(list)
        for name, format in self._formats.items():
            if format is None:
                continue
            stored = self._checkpoint.storage(name)
            if self._kept(name, format) is None:
                way = f"{stored} converted to {format.name}"
            else:
                way = f"{stored} kept" + (f" as {format.name}" if format.name != stored else "")
            ways[way].append(name)
        for way, names in ways.items():
            modules = ", ".join(dict.fromkeys(name.split(".")[-2] for name in names))
            logger.info("%s: %s, %d tensors (%s)", self._checkpoint.path, way, len(names), modules)

    def _refuse_above(self, needed: int) -> None:
        if needed > self._room:
            raise MemoryError(
                f"{self._checkpoint.path}: the weights take {needed / GIB:.1f} GiB as {self.dtype}, "
                f"{self._room / GIB:.1f} GiB are free; use a smaller model or free memory"
                + (', or dtype="bfloat16"' if self.dtype == "float32" else "")
            )


def as_float32(tensor: RawTensor) -> np.ndarray:
    if tensor.dtype == "bfloat16":  # the upper half of a float32's bits
        return (tensor.array.astype(np.uint32) << 16).view(np.float32)
    return tensor.array.astype(np.float32)
