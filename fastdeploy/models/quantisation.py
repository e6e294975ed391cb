"""What config.json, or a file beside it, says of how the weights are quantised; quantised_checkpoints.py reads them."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastdeploy.fields import Fields
from fastdeploy.models.storage import read_json

# Keys of config.json: MLX's, which has the next as well, Hugging Face's, that of older compressed-tensors.
KEYS = ("quantization", "quantization_config", "compression_config")
# Where these name the method: Hugging Face's key, then Paddle's and ModelOpt's.
NAMES = "quant_method quant_type dense_quant_type moe_quant_type weight_quantize_algo quantization quant_algo".split()
# Files in which older tools note a quantisation -> its name, if they don't say it themselves.
FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
# A method's name in a file -> ours, where that is not the same.
SAME = {"compressed_tensors": "compressed-tensors", "intel/auto-round": "auto-round", "modelopt_fp8": "modelopt"}
READABLE = ("gptq", "awq", "compressed-tensors", "fp8", "fbgemm_fp8", "mxfp4", "modelopt")
# Methods that have several layouts: the fields that name them, and those that can be read -> the method they are.
LAYOUTS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "gptq": (("checkpoint_format",), {"gptq": "gptq", "gptq_v2": "gptq"}),
    "awq": (("version",), {"gemm": "awq"}),
    "modelopt": (("quant_algo",), {"FP8": "modelopt", "FP8_PER_CHANNEL_PER_TOKEN": "modelopt"}),
    "fp8": (("fmt",), {"e4m3": "fp8", "float8_e4m3fn": "fp8"}),
    "auto-round": (
        ("packing_format", "backend"),
        {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq", "auto_gptq": "gptq", "auto_awq": "awq"},
    ),
    "compressed-tensors": (
        ("format",),
        dict.fromkeys(
            "pack-quantized int-quantized float-quantized naive-quantized mxfp4-pack-quantized mixed-precision".split(),
            "compressed-tensors",
        ),
    ),
}
NEEDS_A_LAYOUT = ("modelopt", "auto-round")  # the others have one that goes without saying


class Quantisation(NamedTuple):
    """method: one of READABLE.  fields: all that the file says of it."""

    method: str
    fields: Fields


def find_quantisation(directory: Path, config: Mapping[str, Any], source: str) -> Quantisation | None:
    """How the weights are quantised, by config.json, whose contents and path are given, or by a file beside it.

    Raises ValueError, with the method's name and the remedy, for a method that we can't read.
    """
    for key in KEYS:
        said = config.get(key)
        methods = [said[name] for name in NAMES if name in said] if isinstance(said, dict) else []
        if said and (not methods or any(methods)):  # else "quant_method": null
            return _readable(key, said, f"{source}: {key}")
    for name, method in FILES.items():
        if (directory / name).exists():
            path = directory / name
            return _readable("it", {"quant_method": method, **read_json(path)}, str(path))
    return None


def _readable(key: str, said: Any, source: str) -> Quantisation:
    name = _method(key, said)
    method = SAME.get(name, name)
    if isinstance(said, dict) and method == "modelopt" and isinstance(said.get("quantization"), dict):
        said = said["quantization"]  # as in hf_quant_config.json
    if method in LAYOUTS:
        keys, layouts = LAYOUTS[method]
        layout = next((said[key] for key in keys if said.get(key) is not None), None)
        known = {form.lower(): readable for form, readable in layouts.items()}
        if layout is None and method not in NEEDS_A_LAYOUT:
            found: str | None = method
        else:
            found = known.get(layout.lower()) if isinstance(layout, str) else None
        if found is None:
            raise _refusal(source, f"{method}, {keys[0]} {reprlib.repr(layout)}")
        method = found
    if method not in READABLE:
        raise _refusal(source, name)
    return Quantisation(method, Fields(said, source))


def _method(key: str, said: Any) -> str:
    """The method's name; of those that name none, by what only they say."""
    if isinstance(said, dict):
        names = [said[name] for name in NAMES if isinstance(said.get(name), str) and said[name]]
        if names:
            return names[0][:40].lower() if names[0].isprintable() else reprlib.repr(names[0])
        if "load_in_4bit" in said or "load_in_8bit" in said:
            return "bitsandbytes"
        if key == "quantization" and "group_size" in said:
            return "mlx"
        if "quantization" in said and "producer" in said:
            return "modelopt"
    return f"a method without a name ({reprlib.repr(said)})"


def _refusal(source: str, method: str) -> ValueError:
    return ValueError(
        f"{source} says that the weights are quantised, by {method}, which is not available; use the unquantised"
        ' checkpoint of this model, with quantization="wint4" if it shall take less memory, a GGUF, or one that is'
        f" quantised by {', '.join(READABLE[:4])}"
    )
