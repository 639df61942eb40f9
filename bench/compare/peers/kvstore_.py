"""This store, as a program that captures would use it: append, and flush at the end.

The store commits each 32 MB or 100 ms by itself, whichever comes first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import kvstore

if TYPE_CHECKING:
    from kvstore.schema import Batch

NAME = "kvstore"
PACKAGES: tuple[str, ...] = ()
COMPRESSES = True
DURABILITY = "each commit (32 MB or 100 ms)"
LIVE = True
_STREAM = "particles"


def write(path: Path, batches: Iterable[Batch]) -> None:
    """Append every batch, then flush."""
    kvstore.keep_freed_memory()
    with kvstore.open(path, mode="w") as store:
        stream = store.stream(_STREAM)
        for batch in batches:
            stream.append(batch, copy=False)  # the packets are never changed: what it is for
        store.flush()


def read(path: Path, start: float, stop: float, fields: Sequence[str]) -> Iterator[Batch]:
    """Read by the API, checksums on, as a program that reads much: see keep_freed_memory."""
    kvstore.keep_freed_memory()
    with kvstore.open(path) as store:
        yield from store[_STREAM].read(start, stop, fields=list(fields))
