"""Paddle, imported without what it tells the console and does to the root logger."""

from __future__ import annotations

import os
import warnings

from fastdeploy.device.root_logger import unchanged_root_logger

with warnings.catch_warnings(), unchanged_root_logger():
    os.environ.setdefault("GLOG_minloglevel", "1")  # Paddle tells of every socket that it opens
    warnings.simplefilter("ignore")  # Paddle warns of a missing ccache, which only its own custom operators use
    import paddle as paddle


def compute_on_this_thread() -> None:
    """Paddle 3.3 is in dynamic mode only on the thread that imported it first; from now on it is on this one, too."""
    if not paddle.in_dynamic_mode():
        paddle.disable_static()
