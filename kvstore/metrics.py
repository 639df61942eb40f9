"""A writer's figures as a file in Prometheus' text format, for node exporter's textfile collector.

Every sample carries the store's path as a label, so that files of several writers can lie in one
folder. Counters named ``received`` begin at 0 with each process, as Prometheus expects of
counters; what is kept in the store goes on. No time stamps: the collector refuses them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final, NamedTuple

from kvstore.gaps import KINDS
from kvstore.ingest import Progress
from kvstore.stats import BOUNDS_S, CommitStats
from kvstore.store import Store

INTERVAL_S: Final = 5.0  # a third of Prometheus' usual scrape interval
_MODE: Final = 0o644  # node exporter is another user

Labels = Mapping[str, str]
_NONE: Final[Labels] = MappingProxyType({})


class Sample(NamedTuple):
    """One line: its name's ending, labels beside the family's own, and the value."""

    value: float
    suffix: str = ""
    labels: Labels = _NONE


class Family(NamedTuple):
    """One metric: kind is counter, gauge or histogram. The name is without ``kvstore_``."""

    name: str
    kind: str
    help: str
    samples: Sequence[Sample]


def render(families: Iterable[Family], labels: Labels) -> str:
    """The file's text."""
    lines = []
    for family in families:
        name = f"kvstore_{family.name}"
        lines += [f"# HELP {name} {_escaped(family.help)}", f"# TYPE {name} {family.kind}"]
        lines += [
            f"{name}{each.suffix}{{{_label_text({**labels, **each.labels})}}} {each.value!r}"
            for each in family.samples
        ]
    return "\n".join(lines) + "\n"


def replace_file(path: Path, text: str) -> None:
    """Put the text in the file's place at once: readers see the old or the new one, whole."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # not *.prom, which is collected
    try:
        fresh.write_text(text)
        fresh.chmod(_MODE)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def families_of(store: Store, progress: Progress) -> Iterator[Family]:
    """All that is known of a running writer."""
    yield from _received(progress)
    yield from _commits(store)
    yield from _stored(store)


def _received(progress: Progress) -> Iterator[Family]:
    yield counter("received_rows_total", "Rows taken in by this process.", progress.rows)
    yield counter("received_bytes_total", "Bytes read from producers.", progress.bytes)
    yield counter("received_packets_total", "Packets taken in.", progress.packets)
    yield counter("rejected_packets_total", "Malformed packets.", progress.rejected)
    yield counter(
        "interrupted_packets_total",
        "Packets whose producer went away before their end.",
        progress.interrupted,
    )
    yield gauge("connected_producers", "Producers that are connected.", progress.connected)
    yield counter("connections_total", "Producers that connected.", progress.connections)
    yield counter(
        "refused_connections_total", "Producers for which there was no place.", progress.refused
    )


def _commits(store: Store) -> Iterator[Family]:
    committer = store.writer().committer
    stats = committer.stats
    yield Family(
        "commit_seconds",
        "histogram",
        "Time from the begin of a commit until it was durable.",
        list(histogram(stats)),
    )
    yield gauge("commit_seconds_max", "Longest commit since the process began.", stats.seconds_max)
    yield counter(
        "commit_failures_total", "Commits that failed and are tried again.", stats.failures
    )
    yield gauge(
        "commit_overdue_seconds",
        "For how long a commit has been running, or due and not begun.",
        committer.overdue_s(),
    )
    yield gauge("queue_bytes", "Bytes of rows that wait for their commit.", committer.held_bytes())


def histogram(stats: CommitStats) -> Iterator[Sample]:
    """The samples of a family of kind histogram."""
    buckets, count = list(stats.buckets), 0
    for bound, number in zip((*map(str, BOUNDS_S), "+Inf"), buckets, strict=True):
        count += number
        yield Sample(count, "_bucket", {"le": bound})
    yield Sample(stats.seconds, "_sum")
    yield Sample(count, "_count")


def _stored(store: Store) -> Iterator[Family]:
    info = store.info()
    yield Family(
        "stream_rows",
        "gauge",
        "Rows in the store, by stream.",
        [Sample(each.rows, labels={"stream": each.name}) for each in info.streams],
    )
    yield gauge("store_bytes", "Size of the store's segments.", info.file_bytes)
    yield gauge("store_segments", "Segments of the store.", info.segments)
    yield gauge(
        "last_durable_timestamp_seconds",
        "When the last commit was made.",
        info.last_commit_ns / 1e9,
    )
    yield from _lost(store)
    disk = shutil.disk_usage(info.path)
    yield gauge("disk_free_bytes", "Left on the store's disk for this user.", disk.free)
    yield gauge("disk_size_bytes", "Size of the store's disk.", disk.total)


def _lost(store: Store) -> Iterator[Family]:
    """Kept in the store, as all that is said of gaps: they go on where the last writer ended."""
    state = store.state()
    dropped = {
        info.name: state.dropped[info.stream_id]
        for info in state.streams.values()
        if info.stream_id in state.dropped
    }
    yield Family(
        "dropped_rows_total",
        "counter",
        "Rows removed by retention.",
        [Sample(each.totals.rows, labels={"stream": name}) for name, each in dropped.items()],
    )
    yield Family(
        "dropped_segments_total",
        "counter",
        "Segments with rows of the stream removed by retention.",
        [Sample(each.segments, labels={"stream": name}) for name, each in dropped.items()],
    )
    events = dict.fromkeys(KINDS, 0)
    for gap in store.gaps():
        events[gap.kind] += gap.occurrences
    yield Family(
        "gap_events_total",
        "counter",
        "Events that left a gap, as kvstore gaps lists them; of dropped ones, batches.",
        [Sample(count, labels={"kind": kind}) for kind, count in events.items()],
    )


def counter(name: str, text: str, value: float) -> Family:
    """A counter of one sample."""
    return Family(name, "counter", text, [Sample(value)])


def gauge(name: str, text: str, value: float) -> Family:
    """A gauge of one sample."""
    return Family(name, "gauge", text, [Sample(value)])


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _label_text(labels: Labels) -> str:
    return ",".join(
        '{}="{}"'.format(name, _escaped(value).replace('"', '\\"'))
        for name, value in labels.items()
    )
