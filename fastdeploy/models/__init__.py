"""Checkpoints and the models that run them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastdeploy.device import Device
    from fastdeploy.models.decoder import Decoder
    from fastdeploy.models.weights import Checkpoint


def load_model(
    checkpoint: Checkpoint,
    device: Device,
    dtype: str,
    max_positions: int,
    quantization: str | None = None,
    progress: bool = True,
) -> Decoder:
    """Build the model that a checkpoint holds and read its weights onto `device`.

    Args:
        checkpoint: as `weights.open_checkpoint` gives it.
        device: where the weights go.
        dtype: what weights and KV cache are stored in: "float32", "bfloat16", "float16", or "auto", which is the
            checkpoint's own.
        max_positions: the longest sequence in tokens.
        quantization: None, "auto", "exact", "wint8", "wint4", "w8a8" or "w4a8", see `EngineConfig`.
        progress: whether to show a progress bar.

    Raises ValueError if we don't have the architecture or the tensors don't fit it, MemoryError if there is no room.
    """
    # Here, because the kernels need Triton and Paddle: reading a checkpoint's configuration should not wait for them.
    from fastdeploy.models.llama import Llama
    from fastdeploy.models.loading import WeightLoader
    from fastdeploy.models.qwen import Qwen2, Qwen3

    families: dict[str, type[Decoder]] = {
        "LlamaForCausalLM": Llama,
        "Qwen2ForCausalLM": Qwen2,
        "Qwen3ForCausalLM": Qwen3,
        "Ernie4_5ForCausalLM": Llama,
    }
    config = checkpoint.config
    if config.architecture not in families:
        raise ValueError(
            f"{checkpoint.path}: architecture {config.architecture!r}; those we have are {', '.join(families)}"
        )
    loader = WeightLoader(checkpoint, device, config.dtype if dtype == "auto" else dtype, quantization)
    model = families[config.architecture](config, loader, max_positions)
    loader.load(progress)
    return model
