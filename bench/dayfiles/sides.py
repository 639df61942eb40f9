"""What kvstore is held against: ``python -m bench.dayfiles.sides NAME INPUT OUTPUT``.

bare: Polars reads the four columns, a day's files at a time, and that is all. pandas: the same work
as convert, as one would write it down first. Both print how many rows they had.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

COLUMNS: Final = ["timestamp", "payload_type", "value", "tags"]


def bare(source: Path, _: Path) -> int:
    """Read, and drop."""
    import polars as pl  # noqa: PLC0415  # a side loads what it measures, and no more

    rows = 0
    for files in _days(source):
        rows += pl.read_parquet(files, columns=COLUMNS).height
    return rows


def pandas(source: Path, output: Path) -> int:
    """Read, drop duplicates, pivot, resample, hold, write; row by row where that is natural."""
    import pandas as pd  # noqa: PLC0415

    rows = 0
    for files in _days(source):
        frame = pd.concat([pd.read_parquet(file, columns=COLUMNS) for file in files])
        rows += len(frame)
        frame["tags"] = [tuple(map(tuple, tags)) for tags in frame["tags"]]
        frame = frame.drop_duplicates()
        places = [_place(*row) for row in zip(frame["payload_type"], frame["tags"], strict=True)]
        frame["tree"], frame["column"] = zip(*places, strict=True)
        frame["time"] = pd.to_datetime(frame["timestamp"], unit="s", utc=True)
        for tree, part in frame.groupby("tree"):
            _write(pd, str(tree), part, output)
    return rows


def _place(name: str, tags: Any) -> tuple[str, str]:
    named = dict(tags)
    tree = "_".join(named[key] for key in ("phase", "module") if key in named) or "system"
    return tree, f"{name}_{named['cell']}" if "cell" in named else name


def _write(pd: Any, tree: str, part: Any, output: Path) -> None:
    if tree == "system":
        part = part[part["column"] != "system_state"]
    part = part.assign(value=pd.to_numeric(part["value"]))
    wide = part.pivot_table(index="time", columns="column", values="value")
    for hour, grid in wide.resample("5s").mean().ffill(limit=6).groupby(pd.Grouper(freq="h")):
        if len(grid):
            path = output / tree / f"{hour:%Y/%m/%d/%H}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            grid.to_parquet(path)


def _days(source: Path) -> list[list[Path]]:
    groups: dict[Path, list[Path]] = {}
    for path in sorted(source.rglob("*.parquet")):
        groups.setdefault(path.parent, []).append(path)
    return list(groups.values())


SIDES: Final[dict[str, Callable[[Path, Path], int]]] = {"bare": bare, "pandas": pandas}

if __name__ == "__main__":
    print(SIDES[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3])))
