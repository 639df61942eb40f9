"""The loop: claim, poll, validate, gather, commit, and what to do where that goes wrong.

    source ── poll ──> validate ──> gather by rows, bytes, time ──> sink.commit ──> source.committed

What is gathered lives in memory alone: whatever happens before its commit, the source gives it
again from the position that the sink has. So an error never asks for repair:

    the sink cannot be reached    the same work is tried again, for retry_s at most
    the reply was lost            settle first: the commit is there, or it is tried again
    fenced                        all that is gathered is dropped; the source begins anew
    a place is taken away         its part is committed before, or dropped where it is too late
    SIGINT, SIGTERM, the end      what is gathered is committed

The clock stands still within a commit: an event's hour of ingest is the same wherever it counts.
"""

from __future__ import annotations

import gc
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from kvstore.errors import (
    CommitUnknown,
    Fenced,
    SinkError,
    SourceError,
    StoreError,
    TooManyRejected,
)
from kvstore.events import Event, Report
from kvstore.telemetry import counts
from kvstore.telemetry.gathered import Gathered, bytes_of, joined
from kvstore.telemetry.progress import Progress
from kvstore.telemetry.records import (
    Chunk,
    Claim,
    Outcome,
    Place,
    Position,
    Rejection,
    Work,
)
from kvstore.telemetry.sink import Sink
from kvstore.telemetry.source import Source
from kvstore.telemetry.validate import Validator

if TYPE_CHECKING:
    from kvstore.telemetry.contract import Contract

ROWS_MAX: Final = 50_000  # beyond, a commit costs its rows alone: kvstore and COPY alike
BYTES_MAX: Final = 32 << 20  # of raw events, which are kept for conflicts until the commit
WAIT_S: Final = 1.0  # that an event waits for others: dashboards look every few seconds
POLL_S: Final = 0.25  # how soon a signal is seen by a source that has nothing
RETRY_S: Final = 300.0  # a restart of the sink's server; a gateway asks for inf
PAUSE_S: Final = 0.1  # before the first retry, doubled each time
PAUSE_MAX_S: Final = 10.0
FENCES_MAX: Final = 5  # in a row, without a commit: somebody else is at work here
SHARE_EVENTS_MIN: Final = 1000  # before that, a share of rejected events says nothing


@dataclass(frozen=True, slots=True)
class Limits:
    """When to commit, how long to try, when to stop. Shares are of 1.

    retry_s: inf is for ever: what is not read waits in the source.
    """

    rows_max: int = ROWS_MAX
    bytes_max: int = BYTES_MAX
    wait_s: float = WAIT_S
    retry_s: float = RETRY_S
    rejected_max: int | None = None
    rejected_share_max: float | None = None


# What a sink does best with. A lake's commit costs 0.1 s and some files, whatever is in it.
BEST: Final = {
    "store": Limits(),
    "postgres": Limits(rows_max=100_000),  # figures by device and hour are added up half as often
    "lake": Limits(rows_max=300_000, bytes_max=128 << 20, wait_s=10.0),
}


class _Flying(NamedTuple):
    """A commit that is under way on its thread."""

    flight: Future[Outcome]
    work: Work
    events: int
    source: Source | None


class Pipeline:
    """One source into one sink. open_source: called again after a fence.

    clock: µs since 1970. stopped: asked between polls; sleep: waits, at most that many seconds.
    """

    def __init__(
        self,
        open_source: Callable[[], Source],
        sink: Sink,
        contract: Contract,
        *,
        limits: Limits = Limits(),  # frozen
        run: str = "",
        report: Report = lambda _: None,
        stopped: Callable[[], bool] = lambda: False,
        clock: Callable[[], int] = lambda: time.time_ns() // 1000,
        sleep: Callable[[float], object] = time.sleep,
        validator: dict[str, Any] | None = None,
    ):
        self.run_id = run or new_run(clock())
        self.progress = Progress()
        self._open_source = open_source
        self._sink = sink
        self._contract = contract
        self._limits = limits
        self._report = report
        self._stopped = stopped
        self._clock = clock
        self._sleep = sleep
        self._claims: dict[Place, Claim] = {}
        self._held = Gathered()
        self._validator = Validator(contract, now_us=lambda: self._held.now_us, **(validator or {}))
        self._fences = 0
        self._committer = ThreadPoolExecutor(1, "kvstore-commit")
        self._flying: _Flying | None = None

    def run(self) -> Progress:
        """Until the source ends, or ``stopped()``. Raises what is not to be mended here."""
        while True:
            try:
                with self._open_source() as source:
                    try:
                        source.start(self._assigned, self._revoked)
                        self._drain(source)
                    finally:
                        self._give_up()
            except Fenced as error:
                self._drop(error)
            else:
                return self.progress

    # ---- the loop ----

    def _drain(self, source: Source) -> None:
        while not self._stopped():
            try:
                chunks = self._poll(source)
            except SourceError:
                self._commit(source)  # a source that fails late takes nothing with it
                self._land()
                raise
            if not chunks or (self._flying is not None and self._flying.flight.done()):
                self._land()  # its failure is known, and its figures, though nothing more comes
            if chunks is None:
                break
            for chunk in chunks:
                self._take(chunk)
            if self._is_due():
                self._commit(source)
                self._check_rejected(SHARE_EVENTS_MIN)
        self._commit(source)
        self._land()
        self._check_rejected(1)

    def _poll(self, source: Source) -> list[Chunk] | None:
        patience = self._held.since_s + self._limits.wait_s - time.monotonic()
        return source.poll(
            events_max=max(self._limits.rows_max - self._held.events, 1),
            bytes_max=max(self._limits.bytes_max - self._held.bytes, 1),
            wait_s=min(max(patience, 0.0), POLL_S) if self._held.chunks else POLL_S,
        )

    def _take(self, chunk: Chunk) -> None:
        held = self._held
        if not held.chunks:
            held.since_s, held.now_us = time.monotonic(), self._clock()
            taken = chunk.appended_us
            is_told = taken is not None and len(taken) > 0
            held.oldest_us = int(taken[0]) if taken is not None and is_told else held.now_us
            if self.progress.oldest_unsent_us is None:  # else the commit under way has it
                self.progress.oldest_unsent_us = held.oldest_us
        held.validated.append(self._validator.validate(chunk, run=self.run_id))
        held.chunks.append(chunk)
        held.events += len(chunk.payloads)
        held.bytes += bytes_of(chunk)

    def _is_due(self) -> bool:
        held = self._held
        if not held.chunks:
            return False
        return self._is_full(held) or time.monotonic() >= held.since_s + self._limits.wait_s

    def _is_full(self, held: Gathered) -> bool:
        return held.events >= self._limits.rows_max or held.bytes >= self._limits.bytes_max

    # ---- places come and go ----

    def _assigned(self, places: Sequence[Place]) -> list[Position]:
        self._land()
        claims = self._tried(lambda _: self._sink.claim(places), f"claiming {len(places)} places")
        self._claims |= {claim.position.place: claim for claim in claims}
        self._say("assigned", f"{len(places)} places to read", places=_names(places))
        return [claim.position for claim in claims]

    def _revoked(self, places: Sequence[Place], lost: bool) -> None:  # noqa: FBT001  # OnRevoked
        self._land()
        if lost:
            self._held = self._held.without(places)
        elif set(places) & set(self._held.places()):
            self._commit(None)
            self._land()
        for place in places:
            self._claims.pop(place, None)
        self._say("revoked", f"{len(places)} places given up", places=_names(places), lost=lost)

    def _drop(self, error: Fenced) -> None:
        """Begin anew behind what is committed by now, by whomever."""
        self._fences += 1
        self.progress.fenced += 1
        self._report(Event("warning", "fenced", f"{error}; beginning anew", {}))
        self._held, self._claims = Gathered(), {}
        self.progress.oldest_unsent_us = None
        if self._fences > FENCES_MAX:
            raise error
        self._sleep(min(PAUSE_S * 2**self._fences, PAUSE_MAX_S))

    # ---- the commit ----

    def _commit(self, source: Source | None) -> None:
        """Have what is gathered committed, behind the commit before, while the next is gathered.

        On a thread of its own: what waits for a disk or a server there leaves the processor to
        reading and validating here. One commit at a time: the sink never sees two threads.
        """
        held = self._held
        if not held.chunks:
            return
        work = self._work(held)
        self._land()
        for claim, position in zip(work.claims, work.after, strict=True):
            self._claims[position.place] = claim._replace(position=position)
        self._held = Gathered()
        flight = self._committer.submit(self._commit_now, work)
        self._flying = _Flying(flight, work, held.events, source)
        limits = self._limits
        limited = limits.rejected_max is not None or limits.rejected_share_max is not None
        if limited or not self._is_full(held):
            self._land()  # no backlog to read meanwhile; or not one batch more than allowed

    def _commit_now(self, work: Work) -> Outcome:
        with self.progress.commits.timed(1):
            outcome: Outcome = self._tried(lambda doubtful: self._once(work, doubtful), "commit")
        return outcome

    def _land(self) -> None:
        """Wait for the commit that is under way; raises what came of it."""
        if self._flying is None:
            return
        (flight, work, events, source), self._flying = self._flying, None
        outcome = flight.result()
        self._fences = 0
        self._count(work, outcome, events)
        if source is not None:
            source.committed(work.after)
            self._measure_lag(source)

    def _give_up(self) -> None:
        """After an error: wait for a commit under way all the same, as its sink may be closed."""
        if self._flying is not None:
            wait([self._flying.flight])
            self._flying = None

    def _once(self, work: Work, is_doubtful: bool) -> Outcome:  # noqa: FBT001
        """One try. Where an earlier one may be there, that is found out first, and last."""
        if is_doubtful and (outcome := self._sink.settle(work)):
            return outcome
        try:
            return self._sink.commit(work)
        except Fenced:
            # An earlier try may have arrived after we looked.
            if is_doubtful and (outcome := self._sink.settle(work)):
                return outcome
            raise

    def _tried(self, act: Callable[[bool], Any], what: str) -> Any:
        """The act's result, tried until the deadline; told whether an earlier try may count."""
        until_s = time.monotonic() + self._limits.retry_s
        is_doubtful = False
        for pause_s in _pauses():
            try:
                return act(is_doubtful)
            except Fenced:
                raise
            except (SinkError, StoreError) as error:
                is_doubtful |= isinstance(error, CommitUnknown)
                self.progress.unknown_commits += isinstance(error, CommitUnknown)
                if time.monotonic() + pause_s > until_s or self._stopped():
                    raise
                self._report_retry(what, error, pause_s)
            self._sleep(pause_s)
        raise AssertionError("pauses never end")

    def _report_retry(self, what: str, error: Exception, pause_s: float) -> None:
        oldest_us = self.progress.oldest_unsent_us
        age_s = None if oldest_us is None else (self._clock() - oldest_us) / 1e6
        unsent = "" if age_s is None else f"; the oldest unsent event is {age_s:.0f} s old"
        self._report(
            Event(
                "warning",
                "retry",
                f"{what} failed: {error}{unsent}; trying again",
                {"what": what, "pause_s": pause_s, "oldest_unsent_s": age_s},
            )
        )

    def _work(self, held: Gathered) -> Work:
        after = {chunk.place: chunk.after for chunk in held.chunks}
        rejections: list[Rejection] = []
        for found in held.validated:
            rejections += found.rejections
        return Work(
            commit_id=uuid.uuid4().hex,
            run=self.run_id,
            committed_us=held.now_us,
            claims=tuple(self._claims[place] for place in after),
            after=tuple(after.values()),
            readings=joined([found.readings for found in held.validated]),
            raw=list(chain.from_iterable(found.raw for found in held.validated)),
            rejections=rejections,
            seen=counts.summed(chain.from_iterable(found.seen for found in held.validated)),
            contract_version=self._contract.version,
        )

    def _count(self, work: Work, outcome: Outcome, events: int) -> None:
        progress = self.progress
        progress.received += events
        progress.stored += outcome.stored
        progress.duplicates += outcome.duplicates
        progress.rejected += outcome.rejected
        progress.conflicts += outcome.conflicts
        for each in work.rejections:  # a code counts once for each event, as in counts.py
            progress.reasons.update({reason.code for reason in each.reasons})
        if outcome.conflicts:
            progress.reasons[counts.CONFLICT] += outcome.conflicts
        progress.late += sum(count.value for count in work.seen if count.name == counts.LATE)
        progress.drift += sum(count.value for count in work.seen if count.name == counts.DRIFT)
        if len(work.readings):
            newest = int(work.readings.ts_us.max())
            progress.watermark_us = max(progress.watermark_us or newest, newest)
        progress.committed_us = work.committed_us
        progress.oldest_unsent_us = self._held.oldest_us
        self._say(
            "committed",
            f"committed {events} events: {outcome.stored} stored, {outcome.duplicates} "
            f"duplicates, {outcome.rejected} rejected",
            commit_id=work.commit_id,
            received=events,
            **outcome._asdict(),
        )

    def _measure_lag(self, source: Source) -> None:
        ends = source.ends()
        self.progress.lag = {
            place: max(end - self._claims[place].position.next, 0)
            for place, end in ends.items()
            if place in self._claims
        }

    def _check_rejected(self, events_min: int) -> None:
        progress, limits = self.progress, self._limits
        rejected, received = progress.rejected, progress.received
        too_many = limits.rejected_max is not None and rejected > limits.rejected_max
        share_max = limits.rejected_share_max
        if share_max is not None and received >= events_min:
            too_many |= rejected > share_max * received
        if too_many:
            raise TooManyRejected(
                f"{rejected} of {received} events were rejected, more than --max-rejected allows; "
                "all of them are committed: look at them with `rejects list`, and go on by "
                "starting again"
            )

    def _say(self, name: str, message: str, **fields: object) -> None:
        self._report(Event("info", name, message, fields))


def collect_rarely() -> None:
    """Have Python look for cycles less often; for a program whose work is a pipeline.

    A commit's events are hundreds of thousands of objects, without cycles, that come and go:
    looking through them each 700 took an eighth of the time.
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def new_run(now_us: int) -> str:
    """A name for a run: its time, for people, and enough chance to be the only one."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now_us / 1e6))
    return f"{stamp}-{uuid.uuid4().hex[:8]}"


def _names(places: Sequence[Place]) -> str:
    return ", ".join(f"{place.source}#{place.partition}" for place in places)


def _pauses() -> Iterator[float]:
    pause_s = PAUSE_S
    while True:
        yield pause_s
        pause_s = min(pause_s * 2, PAUSE_MAX_S)
