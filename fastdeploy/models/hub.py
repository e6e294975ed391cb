"""Models by their name on the Hugging Face Hub, "owner/name": from its cache on this machine, else downloaded to there.

The cache is shared with every other program that uses huggingface_hub; HF_HOME says where it is, HF_TOKEN who asks.

    <cache>/models--owner--name/refs/main            the commit
    <cache>/models--owner--name/snapshots/<commit>/  its files
"""

import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger("fastdeploy")

NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
WEIGHTS = (".safetensors", ".pdparams", ".gguf")  # the first of which a model has any is what is downloaded


def is_hub_name(name: str) -> bool:
    """Whether this may be the name of a model on the Hub."""
    return NAME.fullmatch(name) is not None and len(name) <= 200


def from_hub(name: str, with_weights: bool = True) -> Path:
    """The directory of a model's files; without weights, of the others at least.

    Raises FileNotFoundError, saying where it looked and what to do, if the model is neither in the cache nor to be had
    from the Hub, and ValueError if it isn't clear which of its files are meant.
    """
    cached = _cached(name)
    if cached is not None and _is_complete(cached, with_weights):
        return cached
    from huggingface_hub import HfApi, snapshot_download  # 0.2 s that local files need not wait for

    files = _ask(name, HfApi().list_repo_files)
    logger.info("downloading %s to the Hugging Face cache, %s", name, _cache())
    return Path(_ask(name, snapshot_download, allow_patterns=_wanted(name, files, with_weights)))


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _cached(name: str) -> Path | None:
    model = _cache() / f"models--{name.replace('/', '--')}"
    commit = model / "refs" / "main"
    snapshot = model / "snapshots" / (commit.read_text().strip() if commit.is_file() else "none")
    return snapshot if snapshot.is_dir() else None


def _is_complete(snapshot: Path, with_weights: bool) -> bool:
    """Whether a download has come to its end: every file appears in the snapshot only once it is whole."""
    names = {path.name for path in snapshot.iterdir()}
    if not with_weights:
        return any(name.startswith("tokenizer.") for name in names)
    for index in (path for ending in WEIGHTS for path in snapshot.glob(f"*{ending}.index.json")):
        return {"config.json", *json.loads(index.read_bytes()).get("weight_map", {}).values()} <= names
    endings = {ending for ending in WEIGHTS if any(name.endswith(ending) for name in names)}
    return ".gguf" in endings or (bool(endings) and "config.json" in names)


def _wanted(name: str, files: Sequence[str], with_weights: bool) -> list[str]:
    """Which of a model's files are needed; many carry the same weights in several formats."""
    files = [file for file in files if "/" not in file and not file.startswith("consolidated")]  # Mistral's own format
    described = [file for file in files if file.endswith((".json", ".jinja")) or file == "tokenizer.model"]
    wanted = [file for file in described if not file.endswith(".bin.index.json")]  # of weights that nobody asks for
    if not with_weights:
        return wanted
    for ending in WEIGHTS:
        weights = [file for file in files if file.endswith(ending)]
        if ending == ".gguf" and len(weights) > 1:
            raise ValueError(
                f"model {name!r} has {len(weights)} .gguf files, {', '.join(weights[:10])}: download the one you want,"
                f" `hf download {name} {weights[0]}`, and give its path"
            )
        if weights:
            return wanted + weights
    raise FileNotFoundError(f"model {name!r} has no {', '.join(WEIGHTS)} files on the Hugging Face Hub")


def _ask(name: str, request: Callable[..., Any], **keywords: Any) -> Any:
    """What the Hub answers; its errors, which are those of several HTTP libraries, in our words."""
    from huggingface_hub.utils import GatedRepoError, RepositoryNotFoundError

    try:
        return request(name, **keywords)
    except Exception as error:
        if isinstance(error, GatedRepoError):
            why = f"its owner asks for your consent first: see https://huggingface.co/{name}, then `hf auth login`"
        elif isinstance(error, RepositoryNotFoundError):
            why = "the Hub has no model of this name, or a private one: check the spelling, or `hf auth login`"
        else:
            reason = str(error).strip().partition("\n")[0]
            why = (
                f"the Hub can't be reached ({type(error).__name__}: {reason}): `hf download {name}` where there is a"
                " network, then copy that cache to here, or the files to a directory, and give its path"
            )
        raise FileNotFoundError(
            f"model {name!r} was not found: it is no file or directory here ({os.getcwd()}), nor whole in the Hugging"
            f" Face cache ({_cache()}), and {why}"
        ) from None
