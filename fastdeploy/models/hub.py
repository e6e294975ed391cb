"""Models by their name on the Hugging Face Hub, "owner/name": from its cache on this machine, else downloaded to there.

The cache is shared with every other program that uses huggingface_hub; HF_HOME says where it is, HF_TOKEN who asks.

    <cache>/models--owner--name/refs/main            the commit
    <cache>/models--owner--name/snapshots/<commit>/  its files

What describes a model is downloaded first: one that can't be run costs no download of its weights.
"""

import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastdeploy.models.configs import read_configs
from fastdeploy.models.storage import gguf_parts, read_json

logger = logging.getLogger("fastdeploy")

NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# Files that describe a model. The index of .bin files is none: nobody asks for those.
DESCRIPTION = re.compile(
    r"(additional_chat_templates/)?[^/]+\.jinja|[^/]+(?<!\.bin\.index)\.json|tokenizer\.model|merges\.txt"
)
WEIGHTS = (".safetensors", ".pdparams", ".gguf")  # the first of which a model has any is what is downloaded
# Names without an owner, of the families we have -> the owner, and what the owner's name for it ends in. ERNIE comes
# in Hugging Face's layout and in Paddle's.
PUBLISHERS = (
    (re.compile(r"ERNIE-4\.5-.+-(PT|Paddle|Thinking)"), "baidu", ""),
    (re.compile(r"ERNIE-4\.5-.+"), "baidu", "-PT"),
    (re.compile(r"(Qwen1\.5|Qwen2|Qwen2\.5|Qwen3)-.+|QwQ-.+"), "Qwen", ""),
    (re.compile(r"SmolLM2?-.+"), "HuggingFaceTB", ""),
    (re.compile(r"(Meta-)?Llama-[23].+"), "meta-llama", ""),
    (re.compile(r"Mistral-.+"), "mistralai", ""),
    (re.compile(r"TinyLlama-.+"), "TinyLlama", ""),
    (re.compile(r"DeepSeek-R1-(Distill|0528-Qwen3)-.+"), "deepseek-ai", ""),
)
PATIENCE = 10.0  # seconds that the Hub may take to answer at all


def is_hub_name(name: str) -> bool:
    """Whether this may be the name of a model on the Hub, "owner/name"."""
    return NAME.fullmatch(name) is not None and len(name) <= 200


def published_name(name: str) -> str | None:
    """The name on the Hub, "owner/name", of a model that goes by the second half alone; None if no family we have is.

    >>> published_name("ERNIE-4.5-0.3B")
    'baidu/ERNIE-4.5-0.3B-PT'
    """
    for pattern, owner, ending in PUBLISHERS:
        if pattern.fullmatch(name) and is_hub_name(f"{owner}/{name}{ending}"):
            return f"{owner}/{name}{ending}"
    return None


def from_hub(name: str, with_weights: bool = True) -> Path:
    """The directory of a model's files; without weights, of the others at least.

    name: "owner/name", or the name alone of a model in one of PUBLISHERS' families; no path or installed package.

    Raises FileNotFoundError, saying where it looked and what to do, if it is no such name or the model is neither in
    the cache nor to be had from the Hub. Raises ValueError if it isn't clear which of its files are meant, or it is a
    model that we don't have.
    """
    if not is_hub_name(name):
        published = published_name(name)
        if published is None:
            raise FileNotFoundError(
                f"model {name!r} was not found: it is no file or directory here ({os.getcwd()}), nor an installed"
                " Python package; give a .gguf file, a checkpoint directory, the name of a model on the Hugging Face"
                ' Hub ("owner/name"), or of a package that carries a .gguf'
            )
        logger.info("%s is no path and no package here; taken for %s on the Hugging Face Hub", name, published)
        name = published
    cached = _cached(name)
    if cached is not None and _is_complete(cached, with_weights):
        return cached
    from huggingface_hub import HfApi, snapshot_download  # 0.2 s that local files need not wait for

    _ask(name, _reach)
    described, weights = _wanted(name, _ask(name, HfApi().list_repo_files), with_weights)
    logger.info("downloading %s to the Hugging Face cache, %s", name, _cache())
    directory = Path(_ask(name, snapshot_download, allow_patterns=described))
    if not weights:
        return directory
    if not weights[0].endswith(".gguf"):  # which describes itself
        read_configs(directory)
    return Path(_ask(name, snapshot_download, allow_patterns=described + weights))


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
    indices = [path for ending in WEIGHTS for path in snapshot.glob(f"*{ending}.index.json")]
    if indices:
        weight_map = read_json(indices[0]).get("weight_map")
        shards = weight_map.values() if isinstance(weight_map, dict) else ()
        return all(isinstance(file, str) and file in names for file in ("config.json", *shards))
    endings = {ending for ending in WEIGHTS if any(name.endswith(ending) for name in names)}
    if ".gguf" in endings:
        parts = [part for name in names if name.endswith(".gguf") for part in gguf_parts(snapshot / name)]
        return all(part.name in names for part in parts)
    return bool(endings) and "config.json" in names


def _wanted(name: str, files: Sequence[str], with_weights: bool) -> tuple[list[str], list[str]]:
    """Which of a model's files are needed, those that describe it and its weights; many carry the same weights in
    several formats."""
    files = [file for file in files if not file.startswith("consolidated")]  # Mistral's own format
    described = [file for file in files if DESCRIPTION.fullmatch(file)]
    if not with_weights:
        return described, []
    for ending in WEIGHTS:
        weights = [file for file in files if file.endswith(ending) and "/" not in file]
        models = list(dict.fromkeys(gguf_parts(Path(file))[0].name for file in weights))
        if ending == ".gguf" and len(models) > 1:
            raise ValueError(
                f"model {name!r} has {len(models)} .gguf files, {', '.join(models[:10])}: download the one you want,"
                f" `hf download {name} {models[0]}`, and give its path"
            )
        if weights:
            return described, weights
    raise FileNotFoundError(f"model {name!r} has no {', '.join(WEIGHTS)} files on the Hugging Face Hub")


def _reach(name: str) -> None:
    """One request, of which any answer will do: huggingface_hub itself tries five times more, and logs each failure."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if not constants.HF_HUB_OFFLINE:  # in which case it asks nobody
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)


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
