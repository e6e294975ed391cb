"""Every kernel compiled ahead of time for GPUs, on a machine without any.

The launchers themselves run, with Triton's active driver replaced by one that names a GPU as its target and throws the
launch away: what is compiled is what the launcher would compile there, argument types, tile rules and all.
"""

import re
import subprocess
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastdeploy.kernels import launch as launch_module
from fastdeploy.kernels import logprobs
from fastdeploy.kernels.activation import silu_mul
from fastdeploy.kernels.attention import AttentionBatch, paged_attention
from fastdeploy.kernels.embedding import embedding, gather_rows, resolve_ids
from fastdeploy.kernels.formats import FORMATS, QuantisedWeight
from fastdeploy.kernels.launch import TensorView, target
from fastdeploy.kernels.linear import LinearWeight, default_panel, gated_linear, linear, pack, packed_shape
from fastdeploy.kernels.logprobs import LogprobOutputs, LogprobWorkspace, token_logprobs
from fastdeploy.kernels.moe import (
    ExpertWeights,
    Routing,
    combine,
    gated_grouped_linear,
    grouped_linear,
    padded,
    route,
    routing_fields,
)
from fastdeploy.kernels.norm import add_rms_norm, rms_norm
from fastdeploy.kernels.packing import Codes, pack_codes, pack_floats
from fastdeploy.kernels.quantised import QuantisedRows, quantise, rows_fields
from fastdeploy.kernels.rope import HeadLayout, HeadNorms, KVBlocks, cache_fields, rope_and_cache
from fastdeploy.kernels.sampling import SamplingState, allocate_workspace, sample
from fastdeploy.kernels.search import search_q4
from fastdeploy.models.formats import GGUF_FORMATS

# target, bytes of shared memory that one program may use
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
TOKENS = 100
PARKED = {"prefill_kernel": 256}  # bytes of a thread that may wait in memory: 64 registers, its second softmax state


class CompileOnly:
    """A driver whose device compiles for `target`, keeps what was compiled and runs nothing."""

    def __init__(self, gpu: GPUTarget, number: int) -> None:
        self.gpu, self.number = gpu, number  # Triton keeps its kernels per device number
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"multiprocessor_count": 132, "max_shared_mem": 1 << 30},
            load_binary=lambda name, binary, shared, device: (None, None, 0, 0, 1 << 10),
            unload_module=lambda module: None,
        )

    def launcher_cls(self, source, metadata):
        return lambda *arguments: None

    def get_current_target(self):
        return self.gpu

    def get_current_device(self):
        return self.number

    def get_current_stream(self, device):
        return 0


@pytest.fixture(params=TARGETS)
def gpu(request, monkeypatch):
    """A GPU without a GPU; `gpu.kernels` lists what the test's launches compiled."""
    found, shared_limit = TARGETS[request.param]
    kernels = []
    monkeypatch.setattr(driver, "_active", CompileOnly(found, 1000 + list(TARGETS).index(request.param)))
    monkeypatch.setattr(launch_module, "_compiled", {})  # else a launch of an earlier test is not compiled again
    monkeypatch.setattr(launch_module, "_scratch", tensor(1 << 20, dtype="uint8"))
    monkeypatch.setattr(triton.knobs.amd, "use_buffer_ops", False)  # in Triton 3.6 it wants to ask PyTorch for sizes
    load = triton.compiler.CompiledKernel._init_handles

    def remember(kernel):
        load(kernel)
        kernels.append(kernel)

    monkeypatch.setattr(triton.compiler.CompiledKernel, "_init_handles", remember)
    yield SimpleNamespace(kernels=kernels, shared_limit=shared_limit, is_cuda=found.backend == "cuda")


def tensor(*shape, dtype="bfloat16"):
    """An address and a type; nobody will look there."""
    strides = np.cumprod([1, *shape[:0:-1]])[::-1] if shape else ()
    return TensorView(1 << 20, dtype, shape, tuple(int(stride) for stride in strides), None)


def weight(rows, width, dtype="bfloat16", bias=False):
    panel = default_panel(target())
    data = tensor(*packed_shape(rows, width, panel), dtype=dtype)
    return LinearWeight(data, rows, width, panel, tensor(rows, dtype="float32") if bias else None)


def run_linear(rows, out_features, in_features, dtype="bfloat16", bias=False):
    x, out = tensor(rows, in_features, dtype=dtype), tensor(rows, out_features, dtype=dtype)
    linear(out, x, weight(out_features, in_features, dtype, bias))


def run_gated(rows, intermediate=3072, width=1024):
    x, out, both = tensor(rows, width), tensor(rows, intermediate), weight(2 * intermediate, width, bias=True)
    if not gated_linear(out, x, both):
        linear(tensor(rows, 2 * intermediate), x, both)


def run_quantised(name):
    format, rows, width = FORMATS[name], 1536, 768
    fields = format.fields(rows, width).items()
    planes = {plane: tensor(*shape, dtype=dtype) for plane, (shape, dtype) in fields}
    planes["table"] = tensor(16, dtype="int8") if format.table else None
    weight = QuantisedWeight(format, rows, width, **planes)
    linear(tensor(TOKENS, rows), tensor(TOKENS, width), weight)
    embedding(tensor(TOKENS, width), tensor(TOKENS, dtype="int32"), weight)
    if name in ("Q4_1", "Q8_0"):
        pack_floats(weight, tensor(rows, width))
    if name in GGUF_FORMATS:
        layout = GGUF_FORMATS[name].layout
        spans = (rows, width // format.span)
        scales, minimums = (dtype and tensor(*spans, dtype=dtype) for dtype in (format.scale, format.minimum))
        factors = format.factor and tensor(rows, width // 32, format.factors, dtype=format.factor)
        blocks = tensor(rows, layout.row_bytes(width), dtype="uint8")
        pack_codes(weight, Codes(blocks, scales, minimums, factors), layout)


def run_quantise(width, wide):
    fields = rows_fields(TOKENS, width, wide)
    out = QuantisedRows(**{name: tensor(*shape, dtype=dtype) for name, (shape, dtype) in fields.items()})
    x, gain = tensor(TOKENS, width), tensor(width, dtype="float32")
    quantise(out, x)
    rms_norm(out, x, gain, 1e-5)
    silu_mul(out.in_8_bits(), tensor(TOKENS, 2 * width))


def run_pack():
    pack(tensor(*packed_shape(576, 576, default_panel(target()))), tensor(576, 576, dtype="float32"))


def run_norms(width):
    x, gain = tensor(TOKENS, width), tensor(width, dtype="float32")
    rms_norm(x, x, gain, 1e-5)
    add_rms_norm(x, x, x, gain, 1e-5)


def run_gathers():
    embedding(tensor(TOKENS, 576), tensor(TOKENS, dtype="int32"), weight(49152, 576))
    gather_rows(tensor(8, 576), tensor(TOKENS, 576), tensor(8, dtype="int32"))


def run_rope(heads, block_size, dtype="bfloat16", normed=False):
    table = tensor(8192, heads.head_dim // 2, dtype="float32")
    positions, slots = tensor(TOKENS, dtype="int32"), tensor(TOKENS, dtype="int64")
    norm = tensor(heads.head_dim, dtype="float32")
    inputs = (tensor(TOKENS, heads.qkv_width), positions, slots, table, table, blocks(heads, block_size, dtype), heads)
    rope_and_cache(*inputs, HeadNorms(norm, norm, 1e-6) if normed else None)


def blocks(heads, block_size, dtype):
    return KVBlocks(**fields(cache_fields(heads, 500, block_size, dtype)))


def run_attention(heads, block_size, num_splits, dtype="bfloat16"):
    """Four decodes and one prompt."""
    integers = [tensor(*shape, dtype="int32") for shape in [(6,), (5,), (5, 128)]]
    batch = AttentionBatch(4, 5, TOKENS - 4, num_splits, *integers)
    out, qkv = tensor(TOKENS, heads.num_heads * heads.head_dim), tensor(TOKENS, heads.qkv_width)
    workspace = tensor(1 << 24, dtype="float32")
    paged_attention(out, qkv, blocks(heads, block_size, dtype), batch, heads, 0.1, workspace)


def run_sample(vocabulary):
    rows, edits = 8, 300
    floats = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    state = SamplingState(
        **{name: tensor(rows, dtype="float32") for name in floats},
        **{name: tensor(rows, dtype="int32") for name in ("top_k", "hold_until", "num_edits")},
        seed=tensor(rows, dtype="int64"),
        edit_ids=tensor(rows, edits, dtype="int32"),
        edit_bias=tensor(rows, edits, dtype="float32"),
        edit_seen=tensor(rows, edits, dtype="int32"),
    )
    workspace = allocate_workspace(lambda shape, dtype: tensor(*shape, dtype=dtype), rows, vocabulary, edits)
    sample(*integers(1), tensor(rows, vocabulary, dtype="float32"), *integers(3), state, workspace)


def run_logprobs(vocabulary):
    rows, top = 8, 20
    out = LogprobOutputs(**fields(logprobs.output_fields(rows, top)))
    workspace = LogprobWorkspace(**fields(logprobs.workspace_fields(rows, vocabulary)))
    token_logprobs(out, tensor(rows, vocabulary, dtype="float32"), *integers(1), top, workspace)


def run_moe(experts, top_k, hidden, intermediate):
    routing = Routing(**fields(routing_fields(TOKENS, top_k, experts)))
    correction = tensor(experts, dtype="float32")
    route(routing, tensor(TOKENS, experts, dtype="float32"), correction, 1e-12)
    gate_up = ExpertWeights(weight(experts * padded(2 * intermediate), hidden), experts, 2 * intermediate)
    down = ExpertWeights(weight(experts * padded(hidden), intermediate), experts, hidden)
    sorted_rows = tensor(TOKENS * top_k, hidden)
    grouped_linear(tensor(TOKENS * top_k, 2 * intermediate), tensor(TOKENS, hidden), gate_up, routing, by_token=True)
    grouped_linear(sorted_rows, tensor(TOKENS * top_k, intermediate), down, routing, by_token=False)
    combine(tensor(TOKENS, hidden), sorted_rows, routing, tensor(TOKENS, hidden))


def run_search():
    scales, minimums = (tensor(TOKENS, 18, dtype="float16") for _ in range(2))
    importance = tensor(576, dtype="float32")
    search_q4(tensor(TOKENS, 576, dtype="uint8"), scales, minimums, tensor(TOKENS, 576), importance)


def run_quantised_moe(name, int8=False):
    experts, top_k, hidden, intermediate = 8, 2, 512, 256
    routing = Routing(**fields(routing_fields(TOKENS, top_k, experts)))
    format, rows = FORMATS[name], experts * padded(2 * intermediate)
    table = tensor(16, dtype="int8") if format.table else None
    packed = QuantisedWeight(format, rows, hidden, **fields(format.fields(rows, hidden)), table=table)
    x = QuantisedRows(**fields(rows_fields(TOKENS, hidden))) if int8 else tensor(TOKENS, hidden)
    gate_up = ExpertWeights(packed, experts, 2 * intermediate)
    grouped_linear(tensor(TOKENS * top_k, 2 * intermediate), x, gate_up, routing, by_token=True)
    if int8:
        gated_grouped_linear(QuantisedRows(**fields(rows_fields(TOKENS * top_k, intermediate))), x, gate_up, routing)


def fields(shapes):
    return {name: tensor(*shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}


def integers(count):
    return [tensor(8, dtype="int32") for _ in range(count)]


SMOLLM2 = HeadLayout(9, 3, 64)
LLAMA3 = HeadLayout(32, 8, 128)
LAUNCHES = {
    "linear, small": lambda: run_linear(1, 576, 576),
    "linear, large, bias": lambda: run_linear(TOKENS, 14336, 4096, bias=True),
    "linear, 16 rows": lambda: run_linear(16, 4096, 4096),
    "linear, 64 rows, bias": lambda: run_linear(64, 4096, 4096, bias=True),
    "linear, 256 rows": lambda: run_linear(256, 6144, 1024),
    "linear, 4096 rows, bias": lambda: run_linear(4096, 14336, 4096, bias=True),
    "linear, long rows": lambda: run_linear(4096, 4096, 14336),
    "gated linear, 16 rows": lambda: run_gated(16),
    "gated linear, 64 rows": lambda: run_gated(64),
    "gated linear, 4096 rows": lambda: run_gated(4096),
    "linear, odd width": lambda: run_linear(TOKENS, 100, 72),
    "linear, float16": lambda: run_linear(TOKENS, 1536, 576, "float16"),
    "pack": run_pack,
    **{f"quantised linear, {name}": partial(run_quantised, name) for name in FORMATS},
    "quantise, 8 bits": lambda: run_quantise(576, wide=False),
    "quantise, 16 bits": lambda: run_quantise(576, wide=True),
    "norms, 576": lambda: run_norms(576),
    "norms, 8192": lambda: run_norms(8192),
    "gathers": run_gathers,
    "late ids": lambda: resolve_ids(tensor(TOKENS, dtype="int32"), tensor(TOKENS, dtype="int32")),
    "rope": lambda: run_rope(LLAMA3, 64),
    "rope, norms": lambda: run_rope(LLAMA3, 64, normed=True),
    "rope, head of 80, interleaved": lambda: run_rope(HeadLayout(8, 2, 80, True), 16),
    "rope, int8 cache": lambda: run_rope(HeadLayout(8, 2, 80), 64, "int8"),
    "attention": lambda: run_attention(LLAMA3, 64, num_splits=1),
    "attention, splits": lambda: run_attention(SMOLLM2, 64, num_splits=8),
    "attention, large blocks, head of 96": lambda: run_attention(HeadLayout(32, 8, 96), 256, num_splits=1),
    "attention, small blocks": lambda: run_attention(SMOLLM2, 16, num_splits=1),
    "attention, int8 cache": lambda: run_attention(LLAMA3, 64, num_splits=1, dtype="int8"),
    "attention, int8 cache, splits": lambda: run_attention(SMOLLM2, 64, num_splits=8, dtype="int8"),
    "search": run_search,
    "silu_mul": lambda: silu_mul(tensor(TOKENS, 1536), tensor(TOKENS, 3072)),
    "moe": lambda: run_moe(128, 8, 2048, 768),
    "moe, odd sizes": lambda: run_moe(6, 3, 72, 100),
    **{f"moe, {name}": partial(run_quantised_moe, name) for name in FORMATS},
    "moe, int8": lambda: run_quantised_moe("Q8_0", int8=True),
    "sample": lambda: run_sample(49152),
    "sample, odd vocabulary": lambda: run_sample(128_003),
    "logprobs": lambda: run_logprobs(128_003),
}


@pytest.mark.parametrize("launch", LAUNCHES)
def test_kernels_compile_and_fit(launch, gpu, tmp_path):
    LAUNCHES[launch]()
    assert gpu.kernels
    for kernel in gpu.kernels:
        assert kernel.metadata.shared <= gpu.shared_limit, f"{kernel.name}: {kernel.metadata.shared} B of shared memory"
        spilled = cuda_spills(kernel, tmp_path) if gpu.is_cuda else amd_spills(kernel)
        assert spilled <= PARKED.get(kernel.name, 0), f"{kernel.name} spills {spilled}"


def cuda_spills(kernel, folder: Path) -> int:
    """Bytes of stack per thread, which our kernels use for spilled registers only."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    text = subprocess.run([tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True).stdout
    return sum(int(count) for count in re.findall(r"(?:STACK|LOCAL):(\d+)", text))


def amd_spills(kernel) -> int:
    """Vector registers that go to memory. (Scalar ones go to lanes of a vector register.)"""
    counts = re.findall(r"\.vgpr_spill_count:\s+(\d+)", kernel.asm["amdgcn"])
    assert counts
    return sum(map(int, counts))


def test_matrix_products_run_on_tensor_cores(gpu):
    run_linear(TOKENS, 576, 576)
    run_attention(LLAMA3, 64, num_splits=1)
    instruction = {"80": "mma.sync", "90": "wgmma", "gfx942": "v_mfma"}[str(driver.active.get_current_target().arch)]
    for kernel in gpu.kernels:  # the tile of a decode has too few rows for wgmma
        wanted = "mma.sync" if instruction == "wgmma" and kernel.name == "_attention_kernel" else instruction
        assert wanted in kernel.asm["ptx" if gpu.is_cuda else "amdgcn"], kernel.name
