"""The compiler half of the Triton plugin: Triton IR -> TTIR -> C -> a shared object.

Triton finds it through the entry point `cpu = "fastdeploy.triton_cpu"` in the group `triton.backends`.
"""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from triton._C.libtriton import ir, passes
from triton.backends.compiler import BaseBackend, GPUTarget

from . import ttir
from .bounds import Bounds
from .context import Optimisations, Target
from .emitter import argument_format, generate_c
from .rewrites import rewrite
from .toolchain import toolchain

_HERE = Path(__file__).parent


_GPU_OPTIONS = """maxnreg ptx_version ptx_options sched4reg enable_reflect_ftz clc min_shared_mem waves_per_eu
    matrix_instr_nonkdim kpack allow_flush_denorm schedule_hint llvm_fn_attrs wgp_cu_mode""".split()
GPUOptions: Any = make_dataclass("GPUOptions", [(name, Any, None) for name in _GPU_OPTIONS], frozen=True)


@dataclass(frozen=True)
class CPUOptions(Optimisations, GPUOptions):
    """Launch options. The GPU ones are accepted, so that a kernel tuned for GPUs runs here, and mean nothing.

    Those of `Optimisations`: $FASTDEPLOY_REGISTER_TILES=0 makes the first False, $FASTDEPLOY_BF16_PRODUCTS=1 the last
        one True, and so on.
    debug: tl.device_assert is checked.  sanitize_overflow: so are integer sums and products; by default as `debug`.
    check: every access to memory is checked, as bounds.py says, and nothing is optimised; by default where
        $FASTDEPLOY_CPU_CHECK is 1.
    """

    num_warps: int = 1
    num_ctas: int = 1
    num_stages: int = 1
    warp_size: int = 1
    cluster_dims: tuple = (1, 1, 1)
    enable_fp_fusion: bool = True
    check: bool = False
    debug: bool = False
    sanitize_overflow: bool = False
    launch_cooperative_grid: bool = False
    launch_pdl: bool = False
    supported_fp8_dtypes: tuple = ("fp8e4nv", "fp8e5", "fp8e4b15", "fp8e4b8", "fp8e5b16")
    deprecated_fp8_dot_operand_dtypes: tuple = ()
    default_dot_input_precision: str = "ieee"
    allowed_dot_input_precisions: tuple = ("ieee", "tf32", "tf32x3", "bf16x3", "bf16x6")
    max_num_imprecise_acc_default: int = 0
    extern_libs: Any = None
    instrumentation_mode: str = ""
    fpsan_homomorphic_casts: bool = False
    ir_override: str | None = None
    backend_name: str = "cpu"
    arch: str = ""

    def hash(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()


class CPUBackend(BaseBackend):
    binary_ext = "so"
    supports_native_tensor_specialization = False  # ask get_tensor_specialization, below

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return target.backend == "cpu"

    @staticmethod
    def get_tensor_specialization(arg: Any, **kwargs: Any) -> str:
        """Alignment changes no code here: one kernel serves a tensor and its odd rows alike."""
        return ""

    @staticmethod
    def get_int_specialization(arg: int, **kwargs: Any) -> str:
        return ""

    def hash(self) -> str:
        """Part of Triton's cache key: this backend's own source, the C compiler, its flags and the CPU."""
        return hashlib.sha256(_own_source() + toolchain().fingerprint().encode()).hexdigest()

    @staticmethod
    def parse_options(options: dict[str, Any]) -> CPUOptions:
        """The environment's options where a launch gives none; products in pairs only where the CPU has them."""
        known = {field.name for field in fields(CPUOptions)}
        chosen = {key: value for key, value in options.items() if key in known and value is not None}
        if "TRITON_DEFAULT_FP_FUSION" in os.environ:
            chosen.setdefault("enable_fp_fusion", os.environ["TRITON_DEFAULT_FP_FUSION"] == "1")
        chosen.setdefault("sanitize_overflow", chosen.get("debug", False))
        chosen.setdefault("check", os.environ.get("FASTDEPLOY_CPU_CHECK", "0") not in ("", "0"))
        optimisations = [field.name for field in fields(Optimisations)]
        for name in optimisations:
            if (wanted := os.environ.get(f"FASTDEPLOY_{name.upper()}")) is not None:
                chosen.setdefault(name, wanted != "0")
        chosen["extern_libs"] = tuple(sorted(dict(chosen.get("extern_libs") or {}).items()))
        chosen["bf16_products"] = chosen.get("bf16_products", False) and toolchain().multiplies_bf16
        if chosen["check"]:
            chosen.update(dict.fromkeys(optimisations, False))
        return CPUOptions(**chosen)

    def pack_metadata(self, metadata: Any) -> Any:
        return metadata

    def get_codegen_implementation(self, options: CPUOptions) -> dict[str, Any]:
        one_row = (1, 1, 1)  # tl.dot of one row is a GEMV
        return {"min_dot_size": lambda lhs, rhs: one_row, "convert_custom_types": _convert_e4b15}

    def get_module_map(self) -> dict[str, ModuleType]:
        from triton.language.extra.cuda import libdevice  # its names are those of C's libm with a prefix

        return {"triton.language.extra.libdevice": libdevice}

    def load_dialects(self, context: Any) -> None:
        """TTIR's own dialects are all we need."""

    def add_stages(self, stages: dict[str, Any], options: CPUOptions, language: Any = None) -> None:
        stages["ttir"] = make_ttir
        stages["c"] = lambda module, metadata: make_c(module, metadata, options)
        stages["so"] = make_so


def _convert_e4b15(value: Any, type_: Any, rounding: Any, _semantic: Any) -> Any:
    """To or from fp8e4b15, which MLIR has no type for: its codes are bytes in TTIR, and calls convert them."""
    import triton.language as tl  # which is being imported when this module is

    decode = {(tl.float8e4b15,): ("e4b15_to_float", tl.float32)}
    encode = {(tl.float32,): ("float_to_e4b15", tl.float8e4b15)}
    decodes = value.type.scalar.is_fp8e4b15()
    if not decodes:
        cut = "rtz" if value.type.scalar.is_fp64() else None  # no tie comes about that was none
        value = value.to(tl.float32, fp_downcast_rounding=cut, _semantic=_semantic)
    table = decode if decodes else encode
    value = tl.core.extern_elementwise("", "", [value], table, is_pure=True, _semantic=_semantic)
    return value.to(type_.scalar, _semantic=_semantic)


def make_ttir(module: Any, metadata: dict[str, Any]) -> Any:
    """Triton's own target-independent passes, those that its GPU backends have."""
    manager = ir.pass_manager(module.context)
    manager.enable_debug()  # where MLIR_ENABLE_DUMP asks for it
    passes.common.add_inliner(manager)
    passes.ttir.add_rewrite_tensor_descriptor_to_pointer(manager)
    if hasattr(passes.ttir, "add_rewrite_tensor_pointer"):  # block pointers, until Triton 3.7
        passes.ttir.add_rewrite_tensor_pointer(manager)
    passes.common.add_canonicalizer(manager)
    passes.ttir.add_combine(manager)
    passes.ttir.add_reorder_broadcast(manager)
    passes.common.add_cse(manager)
    passes.common.add_symbol_dce(manager)
    passes.ttir.add_loop_unroll(manager)
    manager.run(module, "make_ttir")
    return module


def make_c(module: Any, metadata: dict[str, Any], options: CPUOptions) -> str:
    """TTIR, with what a loop does in every turn alike moved out of it, as C; what a launch must know as metadata."""
    manager = ir.pass_manager(module.context)
    passes.ttir.add_triton_licm(manager)
    passes.common.add_canonicalizer(manager)
    passes.common.add_cse(manager)
    manager.run(module, "make_c")
    functions = ttir.parse(str(module))
    for function in functions:
        rewrite(function)
    metadata["name"] = functions[0].name
    metadata["shared"] = 1  # bytes of shared memory: none, but more than 0 is what tools for GPUs expect
    metadata["argument_format"] = argument_format(functions[0])
    bounds = Bounds(functions) if options.check else None
    tools = toolchain()
    target = Target(functions[0].name, tools.lanes, tools.vnni, options.enable_fp_fusion, options, bounds)
    generated = generate_c(functions, _prelude(), target)
    metadata["can_fail"] = "#define USES_FAILURES" in generated.text
    metadata["apart"] = generated.apart
    return generated.text


@functools.lru_cache(8)  # 100 KB each
def _machine_code(source: str, fingerprint: str) -> bytes:
    """Configurations of an autotuner often differ in what means nothing here, and their C not at all."""
    return toolchain().compile(source)


def num_compiled() -> int:
    """Kernels that the C compiler was started for in this process."""
    return _machine_code.cache_info().misses


def make_so(source: str, metadata: dict[str, Any]) -> bytes:
    try:
        return _machine_code(source, toolchain().fingerprint())
    except RuntimeError as error:
        raise RuntimeError(
            f"the C of kernel {metadata['name']!r} does not compile, please report it: {error}"
        ) from None


@functools.lru_cache(None)
def _own_source() -> bytes:
    return b"".join(path.read_bytes() for path in sorted(_HERE.glob("*.[pch]*")) if path.is_file())


@functools.lru_cache(None)
def _prelude() -> str:
    return "".join((_HERE / name).read_text() for name in ("prelude.h", "libdevice.h"))
