"""A stream's rows to and from files and other libraries: methods of ``Stream``.

Each library is imported by the method that needs it; KvstoreError says what to install.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from kvstore.export.extras import needed_for
from kvstore.reading import Inclusive, Scan
from kvstore.schema import Batch, BatchLike, Field, Schema
from kvstore.segment import OnDamage
from kvstore.timestamps import TimeLike, Unit


class _Rows(Protocol):
    """The side of ``Stream`` that is needed here."""

    name: str
    _store: Any
    _time: str

    @property
    def schema(self) -> Schema: ...

    def append(
        self, batch: BatchLike, *, copy: bool = True, marks: Mapping[str, Any] | None = None
    ) -> None: ...

    def read(
        self,
        start: TimeLike | None = None,
        stop: TimeLike | None = None,
        *,
        fields: Sequence[str] | None = None,
        unit: Unit | None = None,
        inclusive: Inclusive = "both",
        ordered: bool = False,
        verify: bool = True,
        on_damage: OnDamage | None = None,
    ) -> Iterator[Batch]: ...

    def _scan(
        self,
        start: TimeLike | None,
        stop: TimeLike | None,
        *,
        unit: Unit | None,
        inclusive: Inclusive,
        on_damage: OnDamage | None,
    ) -> Scan: ...


class _Selection(NamedTuple):
    """What every target takes: the rows, their fields, the name of the time field."""

    batches: Iterator[Batch]
    fields: list[Field]
    time: str


class Exchange:
    """Start, stop, fields, unit, inclusive, ordered and on_damage are those of ``Stream.read``.

    to_arrow, to_pandas and to_xarray hold the whole selection in memory, the others a few
    batches. A field that some batches lack and that has no fill raises NoFillError, one that
    does not exist SchemaError, a missing library KvstoreError.
    """

    def export(
        self: _Rows,
        path: str | os.PathLike[str],
        start: TimeLike | None = None,
        stop: TimeLike | None = None,
        *,
        fields: Sequence[str] | None = None,
        unit: Unit | None = None,
        inclusive: Inclusive = "both",
        ordered: bool = False,
        on_damage: OnDamage | None = None,
    ) -> int:
        """Write a range to a file whose suffix says the format; returns the rows.

        .npz .npy .csv .jsonl .parquet .arrow .h5 .zarr: docs/export.md has each one's types.
        The file appears complete and durable or not at all, and replaces one of that name.
        """
        from kvstore.export.files import write_file  # noqa: PLC0415  # `import kvstore` stays quick

        batches = self.read(
            start, stop, fields=fields, unit=unit, inclusive=inclusive, ordered=ordered,
            on_damage=on_damage,
        )  # fmt: skip
        chosen = _selection(batches, self.schema, fields)
        return write_file(chosen.batches, chosen.fields, Path(path), time=chosen.time)

    def import_file(
        self: _Rows,
        path: str | os.PathLike[str],
        *,
        time_unit: Unit | None = None,
        progress: Any = lambda _: None,
    ) -> int:
        """Append the rows of a .parquet, .arrow, .npz or .csv file; returns how many.

        A new stream gets the file's schema: exactly its own where kvstore exported it (CSV
        says no types), else inferred, with the time field named as in ``store.stream(name,
        time=…)`` and integers as times only if time_unit says what they count. Nothing is
        stored of a file whose first rows do not fit; of rows that fail later, those before them
        are, as with ``append``. progress is called with the part of the file that was read.
        """
        from kvstore.export.files import load_file  # noqa: PLC0415  # as above

        known = self.schema if self.name in self._store else None
        file = load_file(
            Path(path), time=self._time, unit=time_unit, known=known, progress=progress
        )
        first = next(file.batches, None)
        if known is None:
            if first is not None:
                file.schema.columns(first)  # what is refused must not leave a stream behind
            self._store.stream(self.name, file.schema)
        rows = 0
        for batch in chain([] if first is None else [first], file.batches):
            self.append(batch)
            rows += len(next(iter(batch.values())))
        return rows

    def to_arrow(
        self: _Rows,
        start: TimeLike | None = None,
        stop: TimeLike | None = None,
        *,
        fields: Sequence[str] | None = None,
        unit: Unit | None = None,
        inclusive: Inclusive = "both",
        ordered: bool = False,
        on_damage: OnDamage | None = None,
    ) -> Any:
        """A ``pyarrow.Table``, a chunk per batch; columns share the memory of the batches read.

        Float seconds stay float64; an int64 time becomes timestamp[ns, UTC], datetime64
        timestamp[unit, UTC]; a per-row shape a fixed-shape tensor
        (``column.combine_chunks().to_numpy_ndarray()`` has the rows first). Units and
        descriptions are in the fields' metadata. SchemaError where text is no UTF-8.
        """
        with needed_for("to_arrow()"):
            from kvstore.export.arrow import table  # noqa: PLC0415  # loads pyarrow
        batches = self.read(
            start, stop, fields=fields, unit=unit, inclusive=inclusive, ordered=ordered,
            on_damage=on_damage,
        )  # fmt: skip
        return table(*_selection(batches, self.schema, fields))

    def to_pandas(
        self: _Rows,
        start: TimeLike | None = None,
        stop: TimeLike | None = None,
        *,
        fields: Sequence[str] | None = None,
        unit: Unit | None = None,
        inclusive: Inclusive = "both",
        ordered: bool = False,
        on_damage: OnDamage | None = None,
    ) -> Any:
        """A ``pandas.DataFrame`` indexed by time, or by row number if that is not among fields.

        Float seconds stay a float64 index (``pd.to_datetime(frame.index, unit="s", utc=True)``
        makes rounded times of them); int64 ns and datetime64 become a UTC DatetimeIndex. A
        field with a per-row shape is a column of arrays: ``np.stack(frame["grid"])`` is one
        array again. ``frame.attrs[field]`` has unit and description.
        """
        with needed_for("to_pandas()"):
            from kvstore.export.pandas import frame  # noqa: PLC0415  # loads pandas
        batches = self.read(
            start, stop, fields=fields, unit=unit, inclusive=inclusive, ordered=ordered,
            on_damage=on_damage,
        )  # fmt: skip
        return frame(*_selection(batches, self.schema, fields))

    def to_xarray(
        self: _Rows,
        start: TimeLike | None = None,
        stop: TimeLike | None = None,
        *,
        fields: Sequence[str] | None = None,
        unit: Unit | None = None,
        inclusive: Inclusive = "both",
        ordered: bool = False,
        on_damage: OnDamage | None = None,
    ) -> Any:
        """An ``xarray.Dataset``: the time is the coordinate, each field a variable.

        A field's dimensions are the time (``row``, if that is not among fields), then
        ``grid_0``, ``grid_1``, … Float seconds stay float64, an int64 time becomes
        datetime64[ns]; all are UTC. Units and descriptions are attributes.
        """
        with needed_for("to_xarray()"):
            from kvstore.export.xarray import dataset  # noqa: PLC0415  # loads xarray
        batches = self.read(
            start, stop, fields=fields, unit=unit, inclusive=inclusive, ordered=ordered,
            on_damage=on_damage,
        )  # fmt: skip
        return dataset(*_selection(batches, self.schema, fields))

    def to_torch(
        self: _Rows,
        start: TimeLike | None = None,
        stop: TimeLike | None = None,
        *,
        fields: Sequence[str] | None = None,
        unit: Unit | None = None,
        inclusive: Inclusive = "both",
        on_damage: OnDamage | None = None,
        batch_rows: int | None = None,
    ) -> Any:
        """A ``torch.utils.data.IterableDataset`` of batches, dicts of tensors, rows first.

        Use it as ``DataLoader(dataset, batch_size=None, num_workers=4)``: the range is split
        over the workers, each of which opens the store itself, so that every row comes once
        an epoch. batch_rows: rows in each batch, the last of a worker may have fewer; by default
        as they are stored. Text comes as lists of str, datetime64 as int64 counts of its unit.
        Rows later than the last one there was at this call are left out. With on_damage, which
        must pickle where workers are spawned, damaged batches are left out.
        """
        with needed_for("to_torch()", extra="torch"):
            from kvstore.export.torch import Rows  # noqa: PLC0415  # loads torch
        for name in fields or ():
            self.schema.number(name)
        scan = self._scan(start, stop, unit=unit, inclusive=inclusive, on_damage=on_damage)
        return Rows(
            self._store, self.name, scan, fields, batch_rows=batch_rows, on_damage=on_damage
        )


def _selection(
    batches: Iterator[Batch], schema: Schema, fields: Sequence[str] | None
) -> _Selection:
    names = schema.names if fields is None else fields
    return _Selection(batches, [schema.fields[schema.number(name)] for name in names], schema.time)
