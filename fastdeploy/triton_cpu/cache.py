"""Triton's cache of compiled kernels, with a digest of every file: what was damaged on disk is compiled again.

A kernel is a group of files: metadata (JSON), the IR of every stage, the machine code. A file that was cut short or
changed would end the process (SIGBUS) or every start of it, or compute something else.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from triton import knobs
from triton.runtime.cache import FileCacheManager

logger = logging.getLogger("fastdeploy")


def use_checked_cache() -> None:
    """Have Triton use `CheckedCache` in this process, unless TRITON_CACHE_MANAGER names another one."""
    if knobs.cache.manager_class is None:
        knobs.cache.manager_class = CheckedCache


class CheckedCache(FileCacheManager):
    """A folder of one kernel's files. OSError with the remedy if they can't be stored."""

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        try:
            super().__init__(key, override, dump)
        except OSError as error:
            raise _cannot_store(error, knobs.cache.dir) from error

    def put(self, data: Any, filename: str, binary: bool = True) -> str:
        try:
            return super().put(data, filename, binary)
        except OSError as error:
            raise _cannot_store(error, self._make_path(filename)) from error

    def put_group(self, filename: str, group: dict[str, str]) -> str:
        digests = {name: _digest(path) for name, path in group.items()}
        return self.put(json.dumps({"child_paths": group, "digests": digests}), f"__grp__{filename}", binary=False)

    def get_group(self, filename: str) -> dict[str, str] | None:
        """The paths of a group's files by name; None where there is no such group, or where it is damaged."""
        if not self.has_file(f"__grp__{filename}"):
            return None
        listing = Path(self._make_path(f"__grp__{filename}"))
        try:
            found = json.loads(listing.read_bytes())
            group, digests = found["child_paths"], found.get("digests")
            if digests is None:  # stored by Triton's own manager
                return super().get_group(filename)
            damaged = [path for name, path in group.items() if not _is_intact(path, digests[name])]
        except Exception:  # whatever may come of a list that says anything
            damaged = [str(listing)]
        if not damaged:
            return group
        logger.warning("%s is damaged or missing: the kernel is compiled again", ", ".join(damaged))
        return None


def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _is_intact(path: str, digest: str) -> bool:
    try:
        return _digest(path) == digest
    except OSError:
        return False


def _cannot_store(error: OSError, path: str) -> OSError:
    folder = knobs.cache.dir
    remedy = f"make room in {folder!r} and let it be written to, or set TRITON_CACHE_DIR to another folder"
    return OSError(error.errno, f"a compiled kernel can't be stored ({error.strerror}): {remedy}", path)
