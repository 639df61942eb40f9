"""The streams of the embedded sink: their schemas, and records <-> columns. stream.py uses them.

Names with an underscore are ours: a contract's fields never begin with one. What would be the same
text in every row, the origin (source, partition, run, contract version), is a number; a device
has its name for people and its number for exact identities.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import ContractError
from kvstore.schema import Batch, Field, Schema
from kvstore.store import Store
from kvstore.telemetry.contract import DEVICE, TIMESTAMP, Contract, ContractField
from kvstore.telemetry.records import Column, Count, Lineage, Readings
from kvstore.telemetry.sinks.identities import EXTRAS, Stored
from kvstore.timestamps import MAX_NS, MIN_NS

READINGS: Final = "readings"
DEVICES: Final = "devices"
ORIGINS: Final = "origins"
COUNTS: Final = "counts"
TIME: Final = TIMESTAMP
_US: Final = "datetime64[us]"
_MIN_US: Final = -(-MIN_NS // 1000)
_MAX_US: Final = MAX_NS // 1000

Origin: TypeAlias = tuple[str, int, str, int]
"""source, partition, run, contract version."""
Rows: TypeAlias = NDArray[np.intp] | slice

_OURS: Final = (
    Field(TIME, _US, description="of the event, UTC"),
    Field(DEVICE, "text"),
    Field("_device", "int32", description="number of the device in stream devices"),
    Field("_digest", "uint64", description="of all values that are not null"),
    Field("_origin", "int32", description="number of source and run in stream origins"),
    Field("_offset", "int64", description="of the event in its source; the line of a file"),
    Field("_ingested", _US),
    Field(EXTRAS, "text", description="unknown fields, as canonical JSON"),
)
_OUR_NAMES: Final = frozenset(field.name for field in _OURS)
_DEVICE_SCHEMA: Final = Schema(
    (Field("number", "int64", description="also the time: numbers are given in order"),
     Field(DEVICE, "text")), "number",
)  # fmt: skip
_ORIGIN_SCHEMA: Final = Schema(
    (Field("number", "int64"), Field("source", "text"), Field("partition", "int32"),
     Field("run", "text"), Field("contract_version", "int16")), "number",
)  # fmt: skip
_COUNT_SCHEMA: Final = Schema(
    (Field("hour", _US), Field(DEVICE, "text"), Field("name", "text"), Field("value", "int64")),
    "hour",
)


# ---- readings ----


def evolve(store: Store, contract: Contract) -> None:
    """Make the stream of readings, or give it the fields that the contract has and it lacks."""
    new = missing_fields(store, contract)
    if READINGS not in store:
        store.stream(READINGS, Schema((*_OURS, *new), TIME))
    elif new:
        store.stream(READINGS).add_fields(*new)


def missing_fields(store: Store, contract: Contract) -> list[Field]:
    """Fields that the contract has and the store lacks; ContractError where the two clash."""
    for field in contract.values:
        if field.name.startswith("_"):
            raise ContractError(
                f"field {field.name!r}: names that begin with _ are the sink's own; rename it"
            )
    wanted = [_column_of(field) for field in contract.values]
    if READINGS not in store:
        return wanted
    there = {field.name: field for field in store[READINGS].schema.fields}
    for each in wanted:
        if each.name in there and there[each.name].np_dtype != each.np_dtype:
            raise ContractError(
                f"{store.path}: field {each.name!r} is {_type(there[each.name])} in the store "
                f"and {_type(each)} in the contract: a field never changes its type; name the "
                "new one differently"
            )
    return [each for each in wanted if each.name not in there]


def _column_of(field: ContractField) -> Field:
    dtype = "float64" if field.is_number else "text"
    return Field(field.name, dtype, unit=field.unit or "", description=field.description)


def _type(field: Field) -> str:
    return "text" if field.is_text else "a number"


def reading_columns(
    schema: Schema,
    readings: Readings,
    rows: Rows,
    *,
    device: NDArray[np.int64],
    digest: NDArray[np.uint64],
    origin: NDArray[np.int32],
) -> dict[str, Any]:
    """The columns of some of the readings; a field that the readings lack is null."""
    lineage = readings.lineage
    found = {
        TIME: readings.ts_us.view(_US)[rows],
        DEVICE: objects(readings.device_id)[rows],
        "_device": device.astype(np.int32)[rows],
        "_digest": digest[rows],
        "_origin": origin[rows],
        "_offset": lineage.offset[rows],
        "_ingested": lineage.ingested_us.view(_US)[rows],
        EXTRAS: objects(readings.extras)[rows],
    }
    for name, column in readings.values.items():
        found[name] = column[rows] if isinstance(column, np.ndarray) else objects(column)[rows]
    count = len(found[TIME])
    for field in schema.fields:
        if field.name not in found:
            found[field.name] = field.filled(count)
    return found


def readings_of(batch: Batch, origins: Mapping[int, Origin]) -> Readings:
    """A batch of the stream as readings."""
    values: dict[str, Column] = {}
    for name, column in batch.items():
        if name not in _OUR_NAMES:
            values[name] = column.tolist() if column.dtype == object else column
    keys = [origins[number] for number in batch["_origin"].tolist()]
    return Readings(
        batch[DEVICE].tolist(),
        batch[TIME].view(np.int64),
        values,
        batch[EXTRAS].tolist(),
        Lineage(
            [key[0] for key in keys],
            np.array([key[1] for key in keys], np.int32),
            batch["_offset"],
            batch["_ingested"].view(np.int64),
            np.array([key[3] for key in keys], np.int16),
            [key[2] for key in keys],
        ),
    )


def of_device(batch: Batch, device: int) -> Batch:
    """The rows of one device."""
    mine = batch["_device"] == device
    return {name: column[mine] for name, column in batch.items()}


def read_identities(store: Store, start_us: int, stop_us: int) -> Iterator[Stored]:
    """What decides on new readings, of a range; of an empty one without a look at the disk."""
    stream = store[READINGS]
    span = stream.span()
    if span is None or span[1] < np.int64(start_us).view(_US) or span[0] >= time_of(stop_us):
        return
    fields = ["_device", TIME, "_digest"]
    for batch in stream.read(time_of(start_us), time_of(stop_us), inclusive="left", fields=fields):
        yield Stored(batch["_device"], batch[TIME].view(np.int64), batch["_digest"])


def time_of(us: int | None) -> np.datetime64 | None:
    """The end of a range."""
    return None if us is None else np.datetime64(us, "us")


def objects(values: Sequence[str | None]) -> NDArray[Any]:
    """A column of text; numpy would make arrays of fixed width."""
    column = np.empty(len(values), object)
    column[:] = values
    return column


# ---- devices and origins ----


def append_devices(store: Store, numbers: Mapping[str, int]) -> None:
    """Devices and their numbers; which of them the store has already makes no difference."""
    if numbers:
        columns = {"number": np.array(list(numbers.values())), DEVICE: objects(list(numbers))}
        store.stream(DEVICES, _DEVICE_SCHEMA).append(columns)


def load_devices(store: Store) -> dict[str, int]:
    """Number of each device."""
    found: dict[str, int] = {}
    if DEVICES in store:
        for batch in store[DEVICES].read():
            found.update(zip(batch[DEVICE].tolist(), batch["number"].tolist(), strict=True))
    return found


def append_origins(store: Store, numbers: Mapping[Origin, int]) -> None:
    """Origins and their numbers; which of them the store has already makes no difference."""
    if not numbers:
        return
    sources, partitions, runs, versions = zip(*numbers, strict=True)
    store.stream(ORIGINS, _ORIGIN_SCHEMA).append(
        {
            "number": np.array(list(numbers.values())),
            "source": objects(sources),
            "partition": np.array(partitions, np.int32),
            "run": objects(runs),
            "contract_version": np.array(versions, np.int16),
        }
    )


def load_origins(store: Store) -> dict[Origin, int]:
    """Number of each origin."""
    found: dict[Origin, int] = {}
    if ORIGINS in store:
        for batch in store[ORIGINS].read():
            columns = (batch[name].tolist() for name in _ORIGIN_SCHEMA.names)
            for number, source, partition, run, version in zip(*columns, strict=True):
                found[source, partition, run, version] = number
    return found


# ---- counts ----


def append_counts(store: Store, counts: Sequence[Count]) -> None:
    """Counts as they came; ``read_counts`` gives them back, to be added up."""
    if not counts:
        return
    hours = np.array([count.hour_us for count in counts], np.int64)
    store.stream(COUNTS, _COUNT_SCHEMA).append(
        {
            # An event's own time may lie where no store can hold it.
            "hour": hours.clip(_MIN_US, _MAX_US).view(_US),
            DEVICE: objects([count.device_id for count in counts]),
            "name": objects([count.name for count in counts]),
            "value": np.array([count.value for count in counts], np.int64),
        }
    )


def read_counts(store: Store, start_us: int | None, stop_us: int | None) -> Iterable[Count]:
    """The counts of a range of hours, as they were appended."""
    if COUNTS not in store:
        return
    ends = time_of(start_us), time_of(stop_us)
    for batch in store[COUNTS].read(*ends, inclusive="left"):
        hours = batch["hour"].view(np.int64).tolist()
        columns = batch[DEVICE].tolist(), hours, batch["name"].tolist(), batch["value"].tolist()
        yield from map(Count, *columns)
