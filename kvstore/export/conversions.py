"""A stream's rows as other libraries hold them: the methods ``to_…`` of ``Stream``.

Each library is imported by the method that needs it; KvstoreError says what to install.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from kvstore.export.extras import needed_for
from kvstore.reading import Inclusive, Scan
from kvstore.schema import Batch, Field, Schema
from kvstore.segment import OnDamage
from kvstore.timestamps import TimeLike, Unit


class _Readable(Protocol):
    """The side of ``Stream`` that conversions need."""

    @property
    def schema(self) -> Schema: ...

    def read(
        self,
        start: TimeLike | None = None,
        stop: TimeLike | None = None,
        *,
        fields: Sequence[str] | None = None,
        unit: Unit | None = None,
        inclusive: Inclusive = "both",
        ordered: bool = False,
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


class Conversions:
    """Start, stop, fields, unit, inclusive and ordered are those of ``Stream.read``.

    All but to_torch hold the whole selection in memory.
    """

    def to_arrow(
        self: _Readable,
        start: TimeLike | None = None,
        stop: TimeLike | None = None,
        *,
        fields: Sequence[str] | None = None,
        unit: Unit | None = None,
        inclusive: Inclusive = "both",
        ordered: bool = False,
    ) -> Any:
        """A ``pyarrow.Table``; its columns share the memory of the batches read.

        Float seconds stay float64, int64 ns and datetime64 are UTC timestamps, per-row shapes
        fixed-shape tensors.
        """
        with needed_for("to_arrow()"):
            from kvstore.export.arrow import table  # noqa: PLC0415  # loads pyarrow
        batches = self.read(
            start, stop, fields=fields, unit=unit, inclusive=inclusive, ordered=ordered
        )
        return table(*_selection(batches, self.schema, fields))

    def to_pandas(
        self: _Readable,
        start: TimeLike | None = None,
        stop: TimeLike | None = None,
        *,
        fields: Sequence[str] | None = None,
        unit: Unit | None = None,
        inclusive: Inclusive = "both",
        ordered: bool = False,
    ) -> Any:
        """A ``pandas.DataFrame`` indexed by time; a shaped field is a column of arrays.

        Float seconds stay float64 (``pd.to_datetime(frame.index, unit="s", utc=True)`` makes
        rounded times of them); int64 ns and datetime64 are UTC.
        """
        with needed_for("to_pandas()"):
            from kvstore.export.pandas import frame  # noqa: PLC0415  # loads pandas
        batches = self.read(
            start, stop, fields=fields, unit=unit, inclusive=inclusive, ordered=ordered
        )
        return frame(*_selection(batches, self.schema, fields))

    def to_xarray(
        self: _Readable,
        start: TimeLike | None = None,
        stop: TimeLike | None = None,
        *,
        fields: Sequence[str] | None = None,
        unit: Unit | None = None,
        inclusive: Inclusive = "both",
        ordered: bool = False,
    ) -> Any:
        """An ``xarray.Dataset`` with the time as coordinate, a variable a field."""
        with needed_for("to_xarray()"):
            from kvstore.export.xarray import dataset  # noqa: PLC0415  # loads xarray
        batches = self.read(
            start, stop, fields=fields, unit=unit, inclusive=inclusive, ordered=ordered
        )
        return dataset(*_selection(batches, self.schema, fields))

    def to_torch(
        self: _Readable,
        start: TimeLike | None = None,
        stop: TimeLike | None = None,
        *,
        fields: Sequence[str] | None = None,
        unit: Unit | None = None,
        inclusive: Inclusive = "both",
        batch_rows: int | None = None,
    ) -> Any:
        """A ``torch.utils.data.IterableDataset`` of batches, dicts of tensors.

        Use it as ``DataLoader(dataset, batch_size=None, num_workers=4)``: the range is split
        over the workers, each of which opens the store itself. batch_rows: rows in each batch;
        by default as they are stored.
        """
        with needed_for("to_torch()"):
            from kvstore.export.torch import Rows  # noqa: PLC0415  # loads torch
        for name in fields or ():
            self.schema.number(name)
        scan = self._scan(start, stop, unit=unit, inclusive=inclusive, on_damage=None)
        return Rows(self, scan, fields, batch_rows)


def _selection(
    batches: Iterator[Batch], schema: Schema, fields: Sequence[str] | None
) -> _Selection:
    names = schema.names if fields is None else fields
    return _Selection(batches, [schema.fields[schema.number(name)] for name in names], schema.time)
