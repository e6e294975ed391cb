"""The control groups that limit this process: a container's, a service's, a batch system's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[tuple[int, Path]]:
    """(version, folder) of every group whose `controller` ("cpu", "memory") may limit this process: its own group and
    all that enclose it. `root` is where /proc and /sys are looked up; a folder may be missing."""
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for membership in memberships:
        _, controllers, path = membership.split(":", 2)
        if controllers == "":  # version 2, one tree for all controllers
            version, base = 2, root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            version, base = 1, root / "sys/fs/cgroup" / controller
            if not base.exists():  # "cpu" is a link to "cpu,cpuacct", in most places
                base = base.with_name(controllers)
        else:
            continue
        group = base / path.lstrip("/")
        # A container sees its own group at the mount point but its path as on the host: missing levels are skipped.
        for level in [group, *group.parents]:
            if level.is_relative_to(base):
                yield version, level
