"""Columns of the lake's three tables, and records <-> Arrow.

Readings: the identity (device_id, ts), the contract's values, extras, then the lineage, whose
names begin with ``_`` so that no field of a contract meets them. Times are timestamps in µs, UTC;
measurements are doubles from the start (Iceberg refuses long -> double later). NaN is null.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
from pyiceberg.schema import Schema
from pyiceberg.types import (
    BinaryType,
    DoubleType,
    IntegerType,
    ListType,
    LongType,
    NestedField,
    StringType,
    StructType,
    TimestamptzType,
)

from kvstore.errors import SinkError
from kvstore.telemetry.records import (
    Column,
    Count,
    DeadLetter,
    Lineage,
    Place,
    Readings,
    Reason,
    Rejection,
    State,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvstore.telemetry.contract import Contract

TS: Final = "ts"
DEVICE: Final = "device_id"
EXTRAS: Final = "extras"
_FRONT: Final = ((DEVICE, StringType(), True), (TS, TimestamptzType(), True))
_BACK: Final = (
    (EXTRAS, StringType(), False),
    ("_source", StringType(), False),
    ("_partition", IntegerType(), False),
    ("_offset", LongType(), False),
    ("_ingested_at", TimestamptzType(), False),
    ("_contract_version", IntegerType(), False),
    ("_run", StringType(), False),
)
_OWN: Final = {name for name, *_ in _FRONT + _BACK}
_TIME: Final = pa.timestamp("us", "UTC")
_TEXT: Final = pa.large_string()  # as pyiceberg has it


# ---- schemas ----


def readings_schema(contract: Contract | None) -> Schema:
    """Identity, the contract's fields, extras, lineage; its ids are given anew at creation."""
    values = [] if contract is None else value_columns(contract)
    columns = [*_FRONT, *((name, kind, False) for name, kind in values), *_BACK]
    fields = [
        NestedField(number, name, kind, required=required)
        for number, (name, kind, required) in enumerate(columns, 1)
    ]
    return Schema(*fields, identifier_field_ids=[1, 2])


def value_columns(contract: Contract) -> list[tuple[str, Any]]:
    """Name and type of each of the contract's fields."""
    taken = sorted(_OWN & {field.name for field in contract.values})
    if taken:
        raise SinkError(
            f"the contract has a field {taken[0]!r}, which the lake's table has for itself: "
            f"rename the field; taken are {', '.join(sorted(_OWN))}"
        )
    return [(f.name, DoubleType() if f.is_number else StringType()) for f in contract.values]


def value_names(schema: Schema) -> list[str]:
    """The columns that are values of the contract."""
    return [field.name for field in schema.fields if field.name not in _OWN]


def _struct(first_id: int, **kinds: Any) -> StructType:
    fields = [NestedField(first_id + n, *each) for n, each in enumerate(kinds.items())]
    return StructType(*fields)


LETTERS: Final = Schema(
    NestedField(1, "source", StringType(), required=True),
    NestedField(2, "partition", IntegerType(), required=True),
    NestedField(3, "offset", LongType(), required=True),
    NestedField(4, "state", StringType(), required=True),
    NestedField(5, "replays", IntegerType(), required=True),
    NestedField(
        6,
        "reasons",
        ListType(20, _struct(21, code=StringType(), field=StringType(), found=StringType())),
    ),
    NestedField(7, "payload", BinaryType()),
    NestedField(8, "key", BinaryType()),
    NestedField(9, "headers", ListType(30, _struct(31, name=StringType(), value=BinaryType()))),
    NestedField(10, "device_id", StringType()),
    NestedField(11, TS, TimestamptzType()),
    NestedField(12, "first_seen", TimestamptzType()),
    NestedField(13, "contract_version", IntegerType()),
    NestedField(14, "run", StringType()),
)
COUNTS: Final = Schema(
    NestedField(1, "device_id", StringType(), required=True),
    NestedField(2, "hour", TimestamptzType(), required=True),
    NestedField(3, "name", StringType(), required=True),
    NestedField(4, "value", LongType(), required=True),
)


# ---- readings ----


def texts(values: Sequence[str | None]) -> pa.DictionaryArray:
    """Text as a dictionary, fast where it is always the same."""
    if len(values) and values.count(values[0]) == len(values):
        known = pa.array([] if values[0] is None else values[:1], pa.string())
        codes = pa.array(np.zeros(len(values), np.int32))
        if values[0] is None:
            codes = pa.nulls(len(values), pa.int32())
        return pa.DictionaryArray.from_arrays(codes, known)
    return pa.array(values, pa.string()).dictionary_encode()


def times(micros: NDArray[np.int64]) -> pa.Array:
    """Timestamps of microseconds, without a copy."""
    return pa.array(micros, pa.int64()).view(_TIME)


def micros(times_: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
    """Microseconds of timestamps without nulls."""
    if isinstance(times_, pa.ChunkedArray):
        times_ = times_.combine_chunks()
    found: NDArray[np.int64] = times_.cast(_TIME).view(pa.int64()).to_numpy(zero_copy_only=False)
    return found


def to_arrow(readings: Readings, schema: Schema) -> pa.Table:
    """The readings in the table's columns, texts as dictionaries; what they lack is null."""
    lineage = readings.lineage
    unknown = sorted(set(readings.values) - set(value_names(schema)))
    if unknown:
        raise SinkError(f"the lake has no column {unknown[0]!r}: evolve it to the contract first")
    made: dict[str, pa.Array] = {
        DEVICE: texts(readings.device_id),
        TS: times(readings.ts_us),
        EXTRAS: texts(readings.extras),
        "_source": texts(lineage.source),
        "_partition": pa.array(lineage.partition, pa.int32()),
        "_offset": pa.array(lineage.offset, pa.int64()),
        "_ingested_at": times(lineage.ingested_us),
        "_contract_version": pa.array(lineage.contract_version.astype(np.int32), pa.int32()),
        "_run": texts(lineage.run),
    }
    for name, column in readings.values.items():
        if isinstance(column, np.ndarray):
            made[name] = pa.array(column, from_pandas=True)
        else:
            made[name] = texts(column)
    names = schema.column_names
    columns = [
        made[name] if name in made else pa.nulls(len(readings), kind)
        for name, kind in zip(names, schema.as_arrow().types, strict=True)
    ]
    return pa.table(columns, names=names)


def from_arrow(table: pa.Table, schema: Schema) -> Readings:
    """Readings of rows of the table."""
    values: dict[str, Column] = {}
    for name in value_names(schema):
        if isinstance(schema.find_type(name), StringType):
            values[name] = table[name].to_pylist()
        else:
            values[name] = doubles(table[name])
    lineage = Lineage(
        table["_source"].to_pylist(),
        table["_partition"].to_numpy().astype(np.int32),
        table["_offset"].to_numpy().astype(np.int64),
        micros(table["_ingested_at"]),
        table["_contract_version"].to_numpy().astype(np.int16),
        table["_run"].to_pylist(),
    )
    devices = table[DEVICE].to_pylist()
    return Readings(devices, micros(table[TS]), values, table[EXTRAS].to_pylist(), lineage)


def doubles(column: pa.ChunkedArray) -> NDArray[np.float64]:
    """A column of doubles with NaN for null."""
    found: NDArray[np.float64] = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    return found if found.flags.writeable else found.copy()


# ---- dead letters ----


def letters_to_arrow(letters: Iterable[DeadLetter]) -> pa.Table:
    """Dead letters in their table's columns."""
    return pa.Table.from_pylist([_letter(each) for each in letters], schema=LETTERS.as_arrow())


def _letter(letter: DeadLetter) -> dict[str, Any]:
    rejection = letter.rejection
    return {
        "source": rejection.place.source,
        "partition": rejection.place.partition,
        "offset": rejection.offset,
        "state": letter.state.value,
        "replays": letter.replays,
        "reasons": [_printable(reason._asdict()) for reason in rejection.reasons],
        "payload": rejection.payload,
        "key": rejection.key,
        "headers": [_printable({"name": name, "value": v}) for name, v in rejection.headers],
        "device_id": rejection.device_id,
        TS: rejection.ts_us,
        "first_seen": letter.first_seen_us,
        "contract_version": letter.contract_version,
        "run": letter.run,
    }


def _printable(record: dict[str, Any]) -> dict[str, Any]:
    """Lone surrogates, which a bad event may hold, have no UTF-8: written as escapes."""
    return {
        key: value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
        for key, value in record.items()
    }


def letters_from_arrow(table: pa.Table) -> list[DeadLetter]:
    """Dead letters of rows of their table."""
    numbers = {name: pa.int64() for name in (TS, "first_seen")}
    for name, kind in numbers.items():
        at = table.column_names.index(name)
        table = table.set_column(at, name, table[name].cast(_TIME).cast(kind))
    return [_letter_of(row) for row in table.to_pylist()]


def _letter_of(row: dict[str, Any]) -> DeadLetter:
    rejection = Rejection(
        Place(row["source"], row["partition"]),
        row["offset"],
        row["payload"],
        tuple(Reason(each["code"], each["field"], each["found"]) for each in row["reasons"] or ()),
        row["key"],
        tuple((each["name"], each["value"]) for each in row["headers"] or ()),
        row["device_id"] or "",
        row[TS],
    )
    return DeadLetter(
        rejection,
        row["first_seen"],
        row["contract_version"],
        row["run"],
        State(row["state"]),
        row["replays"],
    )


# ---- counts ----


def counts_to_arrow(counts: Sequence[Count]) -> pa.Table:
    """Counts in their table's columns."""
    columns = [
        pa.array([each.device_id for each in counts], _TEXT),
        times(np.array([each.hour_us for each in counts], np.int64)),
        pa.array([each.name for each in counts], _TEXT),
        pa.array([each.value for each in counts], pa.int64()),
    ]
    return pa.table(columns, schema=COUNTS.as_arrow())


def counts_added(table: pa.Table) -> pa.Table:
    """One row for each device, hour and name."""
    keys = ["device_id", "hour", "name"]
    added = table.group_by(keys).aggregate([("value", "sum")])
    return added.select([*keys, "value_sum"]).rename_columns([*keys, "value"])


def counts_from_arrow(table: pa.Table) -> list[Count]:
    """Counts of rows of their table."""
    columns = (table["device_id"].to_pylist(), micros(table["hour"]).tolist())
    rest = (table["name"].to_pylist(), table["value"].to_pylist())
    return list(map(Count, *columns, *rest))
