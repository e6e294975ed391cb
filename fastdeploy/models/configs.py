"""What the JSON files in a checkpoint's directory say of the model: read before any tensor is."""

from pathlib import Path
from typing import Any

from fastdeploy.config import ModelConfig, config_from_json
from fastdeploy.models.quantisation import Quantisation, find_quantisation
from fastdeploy.models.storage import read_json


def read_configs(directory: Path, dtype: str = "") -> tuple[ModelConfig, dict[str, Any], Quantisation | None]:
    """What config.json says, `dtype` where it doesn't; generation_config.json or {}; how the weights are quantised.

    Raises FileNotFoundError or ValueError, naming the file, if they can't be read or are of a model, or quantised in a
    way, that we don't have.
    """
    path, generation_path = directory / "config.json", directory / "generation_config.json"
    generation_config = read_json(generation_path) if generation_path.exists() else {}
    content = read_json(path)
    config = config_from_json(content, generation_config, dtype, str(path))
    return config, generation_config, find_quantisation(directory, content, str(path))
