"""The curve of reading over threads and processes, as a picture; needs the extra `plot`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.figure import Figure

_NAME = re.compile(r"cores-(\w+)-(threads|processes)-(\d+)")
_STYLES = {"threads": "-o", "processes": "--s"}


def curves(figures: Sequence[Figure]) -> dict[tuple[str, str], list[Figure]]:
    """Find the curves among figures: (profile, kind) and their points in order."""
    found: dict[tuple[str, str], list[Figure]] = {}
    for figure in figures:
        if match := _NAME.fullmatch(figure.name):
            found.setdefault((match[1], match[2]), []).append(figure)
    return found


def draw(figures: Sequence[Figure], path: Path) -> bool:
    """Draw them into a file; False where there are none, or no matplotlib."""
    found = curves(figures)
    try:
        from matplotlib.figure import Figure as Page  # noqa: PLC0415
    except ImportError:
        return False
    if not found:
        return False
    profiles = list(dict.fromkeys(profile for profile, _ in found))
    page = Page(figsize=(5 * len(profiles), 4), layout="constrained")
    for axes, profile in zip(
        page.subplots(1, len(profiles), squeeze=False)[0], profiles, strict=True
    ):
        _panel(axes, profile, found)
    page.savefig(path)
    return True


def _panel(axes: Any, profile: str, found: dict[tuple[str, str], list[Figure]]) -> None:
    for kind, style in _STYLES.items():
        points = found.get((profile, kind), [])
        counts = range(1, len(points) + 1)
        axes.plot(counts, [point.value for point in points], style, label=f"read, {kind}")
        limits = [point.limit for point in points]
        axes.plot(counts, limits, style, color="0.6", label=f"memcpy, {kind}")
    axes.set(title=profile, xlabel="threads or processes", ylabel="GB/s", xticks=range(1, 5))
    axes.set_ylim(bottom=0)
    axes.legend()
