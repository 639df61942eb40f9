"""The limit: write and fdatasync each 32 MB, readinto; no index, so a range reads everything."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bench.compare.packets import FIELDS, array_of, groups, row_bytes, within
from bench.measure import write_all

if TYPE_CHECKING:
    from kvstore.schema import Batch

NAME = "limit: write + fdatasync, readinto"
PACKAGES: tuple[str, ...] = ()
COMPRESSES = False
DURABILITY = "each 32 MB"
LIVE = False


def write(path: Path, batches: Iterable[Batch]) -> None:
    """Write the arrays' bytes one behind the other."""
    rows: list[int] = []
    with path.open("xb", buffering=0) as file:
        for group in groups(batches):
            for batch in group:
                rows.append(len(batch["timestamps"]))
                for name in FIELDS:
                    write_all(file.fileno(), batch[name].reshape(-1).view(np.uint8).data)
            os.fdatasync(file.fileno())
    path.with_name(path.name + ".rows").write_text(json.dumps(rows))


def read(path: Path, start: float, stop: float, fields: Sequence[str]) -> Iterator[Batch]:
    """Read each batch into memory of its own, fields that are not asked for skipped."""
    with path.open("rb", buffering=0) as file:
        for rows in json.loads(path.with_name(path.name + ".rows").read_text()):
            batch: Batch = {}
            for name in FIELDS:
                if name not in (*fields, "timestamps"):
                    file.seek(rows * row_bytes(name), os.SEEK_CUR)
                    continue
                memory = np.empty(rows * row_bytes(name), np.uint8)
                file.readinto(memory.data)
                batch[name] = array_of(name, memory)
            found = within(batch, batch["timestamps"], start, stop)
            if len(found["timestamps"]):
                yield {name: found[name] for name in fields}
