"""What the JSON files in a checkpoint's directory say of the model: read before any tensor is."""

from pathlib import Path
from typing import Any

from fastdeploy.config import ModelConfig, config_from_json, refuse_quantised
from fastdeploy.models.storage import read_json

# Files beside config.json in which older tools note a quantisation -> its name, if they don't say it themselves.
QUANTISATION_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}


def read_configs(directory: Path, dtype: str = "") -> tuple[ModelConfig, dict[str, Any]]:
    """What config.json says, `dtype` where it doesn't, and generation_config.json or {}.

    Raises FileNotFoundError or ValueError, naming the file, if they can't be read or are of a model, or quantised in a
    way, that we don't have.
    """
    path, generation_path = directory / "config.json", directory / "generation_config.json"
    generation_config = read_json(generation_path) if generation_path.exists() else {}
    config = config_from_json(read_json(path), generation_config, dtype, str(path))
    for name, method in QUANTISATION_FILES.items():
        if (directory / name).exists():
            said = {"quant_method": method, **read_json(directory / name)}
            refuse_quantised({"quantization_config": said}, str(directory / name))
    return config, generation_config
