"""A folder with a file for each commit, as Arrow and Parquet datasets grow.

Named by number and time span. Written under another name, fsynced, renamed, folder fsynced:
durable and whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bench.compare.packets import blocks
from bench.compare.peer import sync

if TYPE_CHECKING:
    from kvstore.schema import Batch


def publish(path: Path, batches: Iterable[Batch], write: Callable[[Path, Batch], None]) -> None:
    """Write one file for each 5,120 rows."""
    path.mkdir()
    for number, block in enumerate(blocks(batches)):
        times = block["timestamps"]
        draft = path / "draft"
        write(draft, block)
        sync(draft)
        draft.rename(path / f"{number:06}_{times[0]!s}_{times[-1]!s}")
        sync(path)


def within(path: Path, start: float, stop: float) -> Iterator[Path]:
    """Find the files that overlap a range, by their names."""
    for file in sorted(path.glob("*_*")):
        _, first, last = file.name.split("_")
        if float(first) <= stop and float(last) >= start:
            yield file
