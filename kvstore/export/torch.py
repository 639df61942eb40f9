"""Rows for training: an IterableDataset that splits a range over a DataLoader's workers.

The range is cut once, in the process that makes the dataset, into windows of about as many rows
each, at the first times of stored batches; worker k of n reads windows k, k + n, …, so each row
comes from exactly one worker, in about the order of time. Workers open the store themselves.
Give the DataLoader ``batch_size=None``: batches come ready.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Final, NamedTuple

import torch
from torch.utils.data import IterableDataset, get_worker_info

from kvstore.errors import SchemaError
from kvstore.export.chunks import of_rows
from kvstore.reading import Inclusive, Scan
from kvstore.schema import Array, Batch
from kvstore.segment import OnDamage
from kvstore.timestamps import Unit, typed_time

_WINDOWS_MAX: Final = 256  # a seek each, and more than there are workers


class _Window(NamedTuple):
    start: Any
    stop: Any
    inclusive: Inclusive


class Rows(IterableDataset):  # type: ignore[misc]  # torch is Any to mypy, installed or not
    """Batches as dicts of tensors: text as lists of str, datetime64 as int64 counts.

    batch_rows: rows in each; None takes the batches as they are stored. A worker's last batch
    may have fewer. Rows past the last time that there was when the dataset was made are left
    out, so that epochs end while a writer goes on; late rows within are not.
    """

    def __init__(
        self,
        store: Any,
        name: str,
        scan: Scan,
        fields: Sequence[str] | None,
        *,
        batch_rows: int | None,
        on_damage: OnDamage | None,
    ):
        if batch_rows is not None and batch_rows < 1:
            raise SchemaError(f"batch_rows={batch_rows}: use 1 or more, or None for stored batches")
        self._store = pickle.dumps(store)  # its path
        self._name = name
        self._fields = None if fields is None else list(fields)
        self._batch_rows = batch_rows
        self._on_damage = on_damage
        self._windows = _windows(scan)
        self._unit: Unit | None = "ns" if scan.info.schema.time_dtype.kind == "i" else None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batches = self._batches()
        for batch in of_rows(batches, self._batch_rows) if self._batch_rows else batches:
            yield {name: _tensor(column) for name, column in batch.items()}

    def _batches(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        with pickle.loads(self._store) as store:  # noqa: S301  # our own, from __init__
            for start, stop, inclusive in self._windows[number::count]:
                yield from store[self._name].read(
                    start,
                    stop,
                    fields=self._fields,
                    unit=self._unit,
                    inclusive=inclusive,
                    on_damage=self._on_damage,
                )


def _windows(scan: Scan) -> list[_Window]:
    ends = sorted((entry.first, entry.last, entry.rows) for _, entry in scan.entries())
    if not ends:
        return []
    dtype, range_ = scan.info.schema.time_dtype, scan.range
    share = sum(rows for _, _, rows in ends) / _WINDOWS_MAX
    cuts, seen = [range_.start], 0
    for first, _, rows in ends:
        if seen >= share * len(cuts) and first > cuts[-1]:
            cuts.append(first)
        seen += rows
    last = max(last for _, last, _ in ends)
    final = _Window(cuts[-1], last, "both")
    if not range_.below(last):
        final = _Window(cuts[-1], range_.stop, "left" if range_.open_end else "both")
    plain = [*(_Window(a, b, "left") for a, b in pairwise(cuts)), final]
    return [
        _Window(typed_time(start, dtype), typed_time(stop, dtype), inclusive)
        for start, stop, inclusive in plain
    ]


def _tensor(column: Array) -> Any:
    if column.dtype == object:
        return column.tolist()
    counts = column.view("<i8") if column.dtype.kind in "mM" else column
    return torch.from_numpy(counts)
