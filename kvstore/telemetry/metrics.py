"""A pipeline's figures for Prometheus, rendered by kvstore/metrics.py, one file a process.

Counters begin at 0 with each process. An event with several reasons is counted under each of
them in ``rejected_total``; what adds up is received = stored + duplicate + rejected_events.
Every reason is there from the start, at 0: what appears with its first count has no increase.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Final

from kvstore.metrics import Family, Sample, counter, gauge, histogram
from kvstore.telemetry.counts import CONFLICT
from kvstore.telemetry.examine import CODES
from kvstore.telemetry.progress import Progress

_US: Final = 1_000_000


def _clock_us() -> int:
    return time.time_ns() // 1000


def families_of(progress: Progress, *, now_us: Callable[[], int] = _clock_us) -> Iterator[Family]:
    """All that is known of a running pipeline; ages are as of now."""
    yield from _events(progress)
    yield from _commits(progress)
    yield from _times(progress, now_us())


def _events(progress: Progress) -> Iterator[Family]:
    yield counter("telemetry_received_total", "Events read and committed.", progress.received)
    yield counter("telemetry_stored_total", "Readings stored.", progress.stored)
    yield counter(
        "telemetry_duplicate_total", "Readings that were there already.", progress.duplicates
    )
    yield counter(
        "telemetry_rejected_events_total", "Events that became dead letters.", progress.rejected
    )
    yield Family(
        "telemetry_rejected_total",
        "counter",
        "Events rejected for a reason; one may have several.",
        [
            Sample(progress.reasons.get(code, 0), labels={"reason": code})
            for code in (*CODES, CONFLICT)
        ],
    )
    yield counter(
        "telemetry_late_total", "Readings well behind newer ones of their device.", progress.late
    )
    yield counter(
        "telemetry_drift_total",
        "Readings with fields that the contract does not know.",
        progress.drift,
    )


def _commits(progress: Progress) -> Iterator[Family]:
    stats = progress.commits
    yield Family(
        "telemetry_commit_seconds",
        "histogram",
        "Time of a commit to the sink, its retries included.",
        list(histogram(stats)),
    )
    yield counter("telemetry_commit_failures_total", "Commits that were given up.", stats.failures)
    yield counter(
        "telemetry_unknown_commits_total",
        "Commits whose reply was lost; settled before going on.",
        progress.unknown_commits,
    )
    yield counter(
        "telemetry_fenced_total",
        "Times that another worker had claimed a place since.",
        progress.fenced,
    )


def _times(progress: Progress, now_us: int) -> Iterator[Family]:
    yield Family(
        "telemetry_lag_events",
        "gauge",
        "Events at the source that are not committed yet.",
        [
            Sample(lag, labels={"source": place.source, "partition": str(place.partition)})
            for place, lag in list(progress.lag.items())
        ],
    )
    oldest_us, watermark_us = progress.oldest_unsent_us, progress.watermark_us
    yield gauge(
        "telemetry_oldest_unsent_seconds",
        "Age of the oldest event that was read and is not committed; 0 where there is none.",
        0.0 if oldest_us is None else (now_us - oldest_us) / _US,
    )
    if watermark_us is not None:
        yield gauge(
            "telemetry_watermark_delay_seconds",
            "How far the newest committed event time is behind the clock.",
            (now_us - watermark_us) / _US,
        )
    if progress.committed_us is not None:
        yield gauge(
            "telemetry_last_commit_timestamp_seconds",
            "When the last commit was made.",
            progress.committed_us / _US,
        )
