"""The users' brief's reference: every packet pickled, one behind the other, nothing more.

Synced at the end only: the reference never does, and a promise each 32 MB is not in its design.
A range reads the file from its start.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.compare.packets import within

if TYPE_CHECKING:
    from kvstore.schema import Batch

NAME = "pickle file (the brief's)"
PACKAGES: tuple[str, ...] = ()
COMPRESSES = False
DURABILITY = "only at the end"
LIVE = True


def write(path: Path, batches: Iterable[Batch]) -> None:
    """Dump each packet."""
    with path.open("xb") as file:
        for batch in batches:
            pickle.dump(batch, file, protocol=pickle.HIGHEST_PROTOCOL)
        file.flush()
        os.fdatasync(file.fileno())


def read(path: Path, start: float, stop: float, fields: Sequence[str]) -> Iterator[Batch]:
    """Load each packet; one that is not whole yet ends the file."""
    with path.open("rb") as file:
        while True:
            try:
                batch: Batch = pickle.load(file)  # noqa: S301  # our own file
            except (EOFError, pickle.UnpicklingError):
                return
            found = within(batch, batch["timestamps"], start, stop)
            if len(found["timestamps"]):
                yield {name: found[name] for name in fields}
