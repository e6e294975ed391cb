"""Paddle gives a root logger without handlers one of its own and the level INFO, and so has every library speak on the
console: undone, whether Paddle is imported by us or has been before."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

PADDLES_FORMAT = "[%(asctime)-15s] [%(levelname)8s] %(filename)s:%(lineno)s - %(message)s"


@contextmanager
def unchanged_root_logger() -> Iterator[None]:
    """The root logger is after the block as it was before."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    for handler in set(root.handlers).difference(handlers):
        root.removeHandler(handler)


def undo_paddles_logging() -> None:
    """Make the root logger what it was before Paddle, imported by somebody else, changed it.

    Only where it is just as Paddle left it: whoever has changed a handler or the level since wants it so.
    """
    root = logging.getLogger()
    formats = [handler.formatter and handler.formatter._fmt for handler in root.handlers]
    if "paddle" in sys.modules and root.level == logging.INFO and formats == [PADDLES_FORMAT]:
        root.removeHandler(root.handlers[0])
        root.setLevel(logging.WARNING)
