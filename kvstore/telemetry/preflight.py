"""What would go wrong, before anything moves: source, sink, schema, permissions, room.

Nothing is made or changed by looking, no position is claimed. A finding that is no fault says what
was seen; a fault says what to do.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from kvstore.errors import KvstoreError
from kvstore.layout import Layout
from kvstore.store import open_store
from kvstore.telemetry.opening import Kind, is_store, redacted
from kvstore.telemetry.records import Chunk, Place, Position
from kvstore.telemetry.sinks.stream_tables import missing_fields
from kvstore.telemetry.validate import Validator

if TYPE_CHECKING:
    from kvstore.telemetry.contract import Contract

FREE_BYTES_MIN: Final = 100_000_000  # a minute of a thousand devices, and the next segment's room
SAMPLE_EVENTS: Final = 100
_SAMPLE_BYTES: Final = 1 << 20


class Finding(NamedTuple):
    """One thing looked at. what: source, sink or contract."""

    what: str
    is_fine: bool
    text: str


def check(
    sources: Sequence[str],
    sink: tuple[Kind, str],
    contract: Contract,
    *,
    now_us: int,
    kafka: Mapping[str, str],
    catalog: Mapping[str, str] | None = None,
) -> Iterator[Finding]:
    """Findings, in the order in which a run would meet them."""
    yield Finding("contract", True, f"version {contract.version}, {len(contract.values)} fields")
    for name in sources:
        yield from _source(name, contract, now_us, kafka)
    kind, target = sink
    faults = _sink_faults(kind, target, contract, catalog)
    if not faults:
        yield Finding("sink", True, f"{redacted(target)}: a {kind} that can be written")
    for fault in faults:
        yield Finding("sink", False, fault)


def _source(
    name: str, contract: Contract, now_us: int, kafka: Mapping[str, str]
) -> Iterator[Finding]:
    if name.startswith("kafka://"):
        yield _topic(name, kafka)
    elif name == "-":
        yield Finding("source", True, "stdin")
    elif is_store(name):
        yield _store_source(name)
    else:
        yield from _file(Path(name), contract, now_us)


def _topic(name: str, options: Mapping[str, str]) -> Finding:
    from kvstore.telemetry import kafka as clusters  # noqa: PLC0415  # loads librdkafka

    own = {"group.id", clusters.REGISTRY}  # not librdkafka's, or of a consumer alone
    given = {**options, **clusters.environment_options(os.environ)}
    given = {key: value for key, value in given.items() if key not in own}
    try:
        address = clusters.parse_address(name)
        topic = clusters.Cluster(address, given).topic()
    except KvstoreError as error:
        return Finding("source", False, str(error))
    if topic is None:
        return Finding(
            "source", False, f"{name}: nobody answers there within {clusters.ANSWER_S:.0f} s"
        )
    return Finding("source", True, f"{name}: a topic of {topic.partitions} partitions")


def _store_source(name: str) -> Finding:
    try:
        with open_store(name) as store:
            rows = len(store["readings"])
    except KvstoreError as error:
        return Finding("source", False, str(error))
    return Finding("source", True, f"{name}: a store with {rows:,} readings")


def _file(path: Path, contract: Contract, now_us: int) -> Iterator[Finding]:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            lines = file.read(_SAMPLE_BYTES).splitlines()[:SAMPLE_EVENTS]
    except OSError as error:
        yield Finding("source", False, f"{path}: {error.strerror}; expected a file of JSON lines")
        return
    yield Finding("source", True, f"{path}: {size:,} bytes")
    place = Place("check", 0)
    chunk = Chunk(place, np.arange(len(lines)), lines, Position(place, 0))
    refused = Validator(contract, now_us=lambda: now_us).validate(chunk, run="").rejections
    if lines and len(refused) == len(lines):
        codes = ", ".join(sorted({r.code for each in refused for r in each.reasons}))
        yield Finding(
            "source",
            False,
            f"{path}: the contract refuses each of its first {len(lines)} lines ({codes}): is it "
            "the right file, and the right --contract?",
        )


def _sink_faults(
    kind: Kind, target: str, contract: Contract, catalog: Mapping[str, str] | None
) -> list[str]:
    if kind == "store":
        return list(_store_faults(Path(target), contract))
    if kind == "postgres":
        from kvstore.telemetry.sinks import postgres  # noqa: PLC0415

        return postgres.preflight(target, contract)
    from kvstore.telemetry.sinks import iceberg  # noqa: PLC0415

    return iceberg.preflight(target, contract, catalog)


def _store_faults(path: Path, contract: Contract) -> Iterator[str]:
    folder = path if path.exists() else path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        yield f"{folder}: cannot be written by this user; expected write permission"
        return
    free = shutil.disk_usage(folder).free
    if free < FREE_BYTES_MIN:
        yield f"{folder}: {free:,} bytes free on its disk; expected {FREE_BYTES_MIN:,} or more"
    if not (path / "store.msgpack").exists():
        return
    if Layout(path).has_writer():
        yield f"{path}: another process is writing to it; one process drives one sink"
    try:
        with open_store(path) as store:
            missing_fields(store, contract)
    except KvstoreError as error:
        yield str(error)
