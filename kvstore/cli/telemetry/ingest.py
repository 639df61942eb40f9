"""``kvstore telemetry ingest``: events of a source into a sink, exactly once."""

from __future__ import annotations

import json
import select
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, cast

import numpy as np
import typer

from kvstore import libc
from kvstore.cli.capture import stop_signal
from kvstore.cli.log import Log, LogFormat
from kvstore.cli.options import Json
from kvstore.cli.terminal import LOSS, progress_bar
from kvstore.errors import SettingsError
from kvstore.events import Event
from kvstore.every import every
from kvstore.metrics import INTERVAL_S, render, replace_file

if TYPE_CHECKING:
    from kvstore.telemetry.contract import Contract
    from kvstore.telemetry.pipeline import Pipeline
    from kvstore.telemetry.progress import Progress
    from kvstore.telemetry.settings import Settings
    from kvstore.telemetry.sink import Sink

_QUIET: Final = frozenset(
    {"committed", "assigned", "revoked"}
)  # for programs: people get a summary

Contracts = Annotated[
    str | None,
    typer.Option(
        "--contract", metavar="FILE", help="What an event has to be; the built-in one if not given."
    ),
]


def ingest(
    source: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE...",
            help="Files of JSON lines, - for stdin, kafka://HOST:PORT/TOPIC, or a store whose "
            "readings are sent on.",
        ),
    ] = None,
    *,
    store: Annotated[
        str | None, typer.Option(metavar="PATH", help="Sink: a store, made if not there.")
    ] = None,
    postgres: Annotated[
        str | None, typer.Option(metavar="URL", help="Sink: PostgreSQL or TimescaleDB.")
    ] = None,
    lake: Annotated[
        str | None, typer.Option(metavar="PATH", help="Sink: Apache Iceberg, in that folder.")
    ] = None,
    contract: Contracts = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on as files or the store grow, until a signal.")
    ] = False,
    settings: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="TOML with the same names as these options; flags go before it."
        ),
    ] = None,
    max_rejected: Annotated[
        str | None,
        typer.Option(metavar="N|P%", help="Stop, after committing, beyond so many rejects."),
    ] = None,
    batch_rows: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Events of one commit, at most.")
    ] = None,
    batch_wait: Annotated[
        str | None, typer.Option(metavar="DURATION", help="How long an event waits for others.")
    ] = None,
    retry_for: Annotated[
        str | None,
        typer.Option(
            metavar="DURATION", help="How long a sink that fails is tried again; or forever."
        ),
    ] = None,
    future_limit: Annotated[
        str | None,
        typer.Option(metavar="DURATION", help="How far an event may be ahead of the clock."),
    ] = None,
    age_limit: Annotated[
        str | None,
        typer.Option(metavar="DURATION", help="How old an event may be; no limit if not given."),
    ] = None,
    kafka_options: Annotated[
        list[str] | None,
        typer.Option(
            "--kafka-option",
            metavar="NAME=VALUE",
            help="An option for librdkafka; may be repeated.",
        ),
    ] = None,
    dead_letter_topic: Annotated[
        str | None,
        typer.Option(
            metavar="kafka://HOST:PORT/TOPIC",
            help="Send rejects there as well, after their commit, each at least once.",
        ),
    ] = None,
    accept_loss: Annotated[
        bool,
        typer.Option("--accept-loss", help="Go on behind what the source dropped before its turn."),
    ] = False,
    metrics_file: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Figures for Prometheus, written every few seconds."),
    ] = None,
    log_format: Annotated[LogFormat, typer.Option(help="Lines on stderr.")] = "text",
    as_json: Json = False,
) -> None:
    """Take events in, each exactly once, however often this is started again.

    The sink keeps how far the source was read, in the same commit as the rows. What the contract
    refuses becomes a dead letter: see `kvstore telemetry rejects`. Exit code 3 where the source had
    dropped events before their turn, and --accept-loss went on.
    """
    from kvstore.telemetry.pipeline import collect_rarely  # noqa: PLC0415

    given = options(
        settings,
        source=source,
        store=store,
        postgres=postgres,
        lake=lake,
        contract=contract,
        follow=follow,
        accept_loss=accept_loss,
        batch_rows=batch_rows,
        batch_wait=batch_wait,
        retry_for=retry_for,
        max_rejected=max_rejected,
        future_limit=future_limit,
        age_limit=age_limit,
        metrics_file=metrics_file,
        dead_letter_topic=dead_letter_topic,
        kafka_options=kafka_options,
    )
    libc.keep_freed_memory()
    collect_rarely()
    with stop_signal() as stop:
        run = Run(given, Log(log_format), stop)
        progress = run.run()
    if as_json:
        print(json.dumps(figures(progress)))
    if run.losses:
        raise typer.Exit(LOSS)


def options(
    file: Path | None,
    *,
    source: Sequence[str] | None,
    kafka_options: Sequence[str] | None,
    **flags: Any,
) -> Settings:
    """What flags and file say together; passwords on the command line are refused."""
    from kvstore.telemetry import settings as settled  # noqa: PLC0415

    for kind in settled.SINKS:
        if flags[kind] is not None:
            flags[kind] = settled.expanded(settled.without_password(flags[kind]))
    for name in settled.DURATIONS & flags.keys():
        flags[name] = None if flags[name] is None else settled.duration_s(flags[name])
    flags["source"] = tuple(map(settled.without_password, source or ()))
    flags["kafka"] = dict(map(kafka_option, kafka_options or ()))
    return (settled.load(file) if file else settled.Settings()).changed(flags)


def kafka_option(text: str) -> tuple[str, str]:
    """NAME=VALUE as one option."""
    name, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"{text!r}: expected NAME=VALUE, such as group.id=ops")
    return name, value


@dataclass(slots=True)
class Run:
    """One run of the command. stop: readable once it is to end."""

    settings: Settings
    log: Log
    stop: int
    losses: int = 0  # that the source had, and that were accepted

    def run(self) -> Progress:
        """Until the source ends or a signal comes; says what came of it."""
        from kvstore.telemetry.opening import check_sources, open_sink, redacted  # noqa: PLC0415

        kind, target = self.settings.sink
        if not self.settings.source:
            raise SettingsError("no source given; expected files, -, kafka://… or a store")
        check_sources(self.settings.source)
        if "-" in self.settings.source and sys.stdin.isatty():
            raise typer.BadParameter("stdin is a terminal: pipe events in, or name files")
        contract = contract_of(self.settings.contract)
        with open_sink(target, contract, kind=kind, catalog=self.settings.catalog) as sink:
            sink.evolve(contract)
            pipeline = self._pipeline(self._publishing(sink), contract)
            with self._shown(pipeline.progress), self._metrics(pipeline.progress, target):
                try:
                    pipeline.run()
                finally:
                    self._summarize(pipeline.progress, redacted(target))
        return pipeline.progress

    def _pipeline(self, sink: Sink, contract: Contract) -> Pipeline:
        from kvstore.telemetry import pipeline as loop  # noqa: PLC0415
        from kvstore.telemetry.opening import open_source  # noqa: PLC0415
        from kvstore.telemetry.settings import rejected_max  # noqa: PLC0415

        given, (kind, _) = self.settings, self.settings.sink
        count_max, share_max = rejected_max(given.max_rejected)
        run = loop.new_run(time.time_ns() // 1000)
        limits = loop.Limits(
            rows_max=given.batch_rows or loop.BEST[kind].rows_max,
            bytes_max=loop.BEST[kind].bytes_max,
            wait_s=loop.BEST[kind].wait_s if given.batch_wait is None else given.batch_wait,
            retry_s=loop.RETRY_S if given.retry_for is None else given.retry_for,
            rejected_max=count_max,
            rejected_share_max=share_max,
        )
        ages = {"future_limit_s": given.future_limit, "age_limit_s": given.age_limit}
        return loop.Pipeline(
            lambda: open_source(
                given.source,
                run=run,
                follow=given.follow,
                report=self._report,
                accept_loss=given.accept_loss,
                kafka=self._kafka(),
            ),
            sink,
            contract,
            limits=limits,
            run=run,
            report=self._report,
            stopped=lambda: self._waited(0),
            sleep=self._waited,
            validator={name: value for name, value in ages.items() if value is not None},
        )

    def _publishing(self, sink: Sink) -> Sink:
        """The sink, and a topic for its dead letters if there is to be one."""
        if self.settings.dead_letter_topic is None:
            return sink
        from kvstore.telemetry.dead_topic import DeadTopic, Publishing  # noqa: PLC0415

        topic = DeadTopic.open(self.settings.dead_letter_topic, self.settings.kafka)
        return cast("Sink", Publishing(sink, topic))

    def _kafka(self) -> dict[str, str]:
        """Options for librdkafka; the workers of a sink are one group, unless told otherwise."""
        if not any(name.startswith("kafka://") for name in self.settings.source):
            return {}
        from kvstore.telemetry.kafka import group_of  # noqa: PLC0415

        return {"group.id": group_of(*self.settings.sink), **self.settings.kafka}

    def _report(self, event: Event) -> None:
        self.losses += event.name == "lost"
        if event.name not in _QUIET or self.log.shape == "json":
            self.log(event)

    def _waited(self, seconds: float) -> bool:
        """Wait that long, or until the signal to stop has come: whether it has."""
        return bool(select.select([self.stop], [], [], seconds)[0])

    def _shown(self, progress: Progress) -> AbstractContextManager[None]:
        def describe(elapsed_s: float) -> str:
            rate = progress.received / elapsed_s / 1000
            return f"{progress.received:,} events  {progress.rejected:,} rejected  {rate:.1f} k/s"

        return progress_bar(describe, wanted=self.log.shape == "text")

    def _metrics(self, progress: Progress, target: str) -> AbstractContextManager[None]:
        if self.settings.metrics_file is None:
            return nullcontext()
        path = Path(self.settings.metrics_file)
        self._write_metrics(path, progress, target)  # a path that cannot be written is said now
        return every(INTERVAL_S, lambda: self._try_metrics(path, progress, target))

    def _try_metrics(self, path: Path, progress: Progress, target: str) -> None:
        try:
            self._write_metrics(path, progress, target)
        except OSError as error:  # a report is no reason to stop
            self.log.complain("metrics_failed", f"{path}: metrics not written: {error.strerror}")

    def _write_metrics(self, path: Path, progress: Progress, target: str) -> None:
        from kvstore.telemetry.metrics import families_of  # noqa: PLC0415
        from kvstore.telemetry.opening import redacted  # noqa: PLC0415

        replace_file(path, render(families_of(progress), {"sink": redacted(target)}))

    def _summarize(self, progress: Progress, target: str) -> None:
        found = figures(progress)
        text = (
            f"{progress.received:,} events: {progress.stored:,} stored in {target}, "
            f"{progress.duplicates:,} duplicates, {progress.rejected:,} rejected"
        )
        if progress.reasons:
            common = ", ".join(
                f"{code} {count:,}" for code, count in progress.reasons.most_common()
            )
            text += f" ({common})"
        self.log.say("ingested", text, **found)


def figures(progress: Progress) -> dict[str, Any]:
    """What a run did, for programs."""
    return {
        "received": progress.received,
        "stored": progress.stored,
        "duplicates": progress.duplicates,
        "rejected": progress.rejected,
        "conflicts": progress.conflicts,
        "late": progress.late,
        "reasons": dict(sorted(progress.reasons.items())),
        "commits": progress.commits.commits,
        "commit_failures": progress.commits.failures,
        "unknown_commits": progress.unknown_commits,
        "fenced": progress.fenced,
        "watermark": None if progress.watermark_us is None else stamp(progress.watermark_us),
    }


def stamp(us: int) -> str:
    """A time as it is shown: ISO 8601, UTC."""
    return f"{np.datetime64(us, 'us')}Z"


def contract_of(path: str | None) -> Contract:
    """The contract in a file, or the one that comes with kvstore."""
    from kvstore.telemetry import contract as contracts  # noqa: PLC0415

    return contracts.brief() if path is None else contracts.load(path)
