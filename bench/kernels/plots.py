"""A run in two pictures. matplotlib is imported here only: neither the engine nor its tests need it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.kernels.machine import Peaks
from bench.kernels.report import Measurement


def draw(stem: Path, title: str, found: Sequence[Measurement], providers: Sequence[str], peaks: Peaks) -> list[Path]:
    """Write STEM_roofline.png and STEM_bars.png; returns their paths. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")  # needs no display
    timed = [m for m in found if m.seconds]
    paths = [stem.with_name(f"{stem.name}_{kind}.png") for kind in ("roofline", "bars")]
    if not timed:
        return []
    _roofline(paths[0], title, [m for m in timed if m.provider == providers[0]], peaks)
    _bars(paths[1], title, timed, providers, peaks)
    return paths


def _roofline(path: Path, title: str, found: Sequence[Measurement], peaks: Peaks) -> None:
    """FLOP/s over FLOPs per byte, both logarithmic; what has no FLOPs, such as a gather, has no place there."""
    import numpy as np
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 6.5))
    found = [m for m in found if m.flops]
    intensities = [m.flops / m.bytes for m in found]
    ends = np.array([min([*intensities, 0.1]) / 2, max([*intensities, peaks.arithmetic / peaks.bandwidth]) * 2])
    grid = np.geomspace(*ends, 200)
    axes.loglog(grid, np.minimum(grid * peaks.bandwidth, peaks.arithmetic) / 1e12, "k-", linewidth=1)
    for number, operation in enumerate(dict.fromkeys(m.operation for m in found)):
        mine = [m for m in found if m.operation == operation]
        rates = [m.flops / (m.seconds or 1) / 1e12 for m in mine]
        marker = "osD^vP*X<>"[number % 10]
        axes.loglog([m.flops / m.bytes for m in mine], rates, marker, label=operation, alpha=0.8)
    said = f"{peaks.bandwidth / 1e9:.0f} GB/s, {peaks.arithmetic / 1e12:.3g} TFLOP/s"
    axes.set(xlabel="FLOPs per byte", ylabel="TFLOP/s", title=f"{title}: {said}")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _bars(path: Path, title: str, found: Sequence[Measurement], providers: Sequence[str], peaks: Peaks) -> None:
    """Every case's share of the peak that bounds it, a bar for each provider."""
    from matplotlib import pyplot

    cases = list(dict.fromkeys((m.operation, m.shape) for m in found))
    height = 0.8 / len(providers)
    figure, axes = pyplot.subplots(figsize=(12, 1.5 + 0.16 * len(cases) * (1 + len(providers))))
    for number, provider in enumerate(providers):
        mine = [m for m in found if m.provider == provider]
        places = [cases.index((m.operation, m.shape)) + (number - (len(providers) - 1) / 2) * height for m in mine]
        axes.barh(places, [100 * (m.share(peaks) or 0) for m in mine], height, label=provider)
    axes.set_yticks(range(len(cases)), [f"{operation}, {shape}" for operation, shape in cases], fontsize=7)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.axvline(100, color="k", linewidth=1)
    axes.set(xlabel="percent of the peak that bounds it (copy or matrix product of this run)", title=title)
    axes.grid(True, axis="x", alpha=0.2)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=80, bbox_inches="tight")
    pyplot.close(figure)
