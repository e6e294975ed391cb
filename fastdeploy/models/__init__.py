"""Checkpoints and the models that run them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from fastdeploy.device import Device
    from fastdeploy.device.group import Group
    from fastdeploy.models.decoder import Decoder
    from fastdeploy.models.weights import Checkpoint


def open_model(name_or_path: str, load_format: str, seed: int) -> Checkpoint:
    """The checkpoint that an `EngineConfig` means by `model`, `load_format` and `seed`."""
    from fastdeploy.models.dummy import open_dummy
    from fastdeploy.models.weights import open_checkpoint

    return open_dummy(name_or_path, seed) if load_format == "dummy" else open_checkpoint(name_or_path)


def load_model(
    checkpoint: Checkpoint,
    device: Device,
    dtype: str,
    max_positions: int,
    quantization: str | None = None,
    progress: bool = True,
    group: Group | None = None,
    calibration: Sequence[np.ndarray] | None = None,
) -> Decoder:
    """Build the model that a checkpoint holds and read its weights, or this rank's part of them, onto `device`.

    Args:
        checkpoint: as `weights.open_checkpoint` gives it.
        device: where the weights go.
        dtype: what weights and KV cache are stored in: "float32", "bfloat16", "float16", or "auto", which is the
            checkpoint's own.
        max_positions: the longest sequence in tokens.
        quantization: None, "auto", "exact", "wint8", "wint4", "w8a8" or "w4a8", see `EngineConfig`.
        progress: whether to show a progress bar.
        group: the ranks that share the model, if there are several.
        calibration: token ids of a text, in sequences as `calibration.calibration_sequences` makes them. Floats that
            become four bits are chosen to lose little of it; without, they are rounded to nearest.

    Raises ValueError if we don't have the architecture or the tensors don't fit it, MemoryError if there is no room.
    """
    # Here, because the kernels need Triton and Paddle: reading a checkpoint's configuration should not wait for them.
    from fastdeploy.models.calibration import importance
    from fastdeploy.models.llama import Llama
    from fastdeploy.models.loading import WeightLoader
    from fastdeploy.models.qwen import Qwen2, Qwen3
    from fastdeploy.models.sharding import WHOLE, Shard

    families: dict[str, type[Decoder]] = {
        "LlamaForCausalLM": Llama,
        "Qwen2ForCausalLM": Qwen2,
        "Qwen3ForCausalLM": Qwen3,
        "Qwen3MoeForCausalLM": Qwen3,
        "Ernie4_5ForCausalLM": Llama,
        "Ernie4_5_MoeForCausalLM": Llama,
    }
    config = checkpoint.config
    if config.architecture not in families:
        raise ValueError(
            f"{checkpoint.path}: architecture {config.architecture!r}; those we have are {', '.join(families)}"
        )
    shard = WHOLE if group is None else Shard(group.rank, group.size)
    loader = WeightLoader(checkpoint, device, config.dtype if dtype == "auto" else dtype, quantization, shard)
    model = families[config.architecture](config, loader, max_positions, group)
    weights = None
    if calibration and loader.makes_four_bits:
        loader.check()
        weights = importance(model, checkpoint, calibration, progress)
    loader.load(progress, weights)
    device.settle()
    return model
