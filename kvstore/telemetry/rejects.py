"""Dead letters after the fact: which there are, once more through the contract, or put aside.

Over any sink. A replay sends the raw bytes through today's contract, under the event's own place:
what passes becomes a reading, and its letter `replayed`, in one commit with it; what fails again
stays open. Nothing is deleted, so that each step can be looked at, and repeated.
"""

from __future__ import annotations

import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from kvstore.errors import CommitUnknown, SettingsError
from kvstore.telemetry import counts
from kvstore.telemetry.gathered import joined
from kvstore.telemetry.pipeline import new_run
from kvstore.telemetry.records import (
    Chunk,
    Count,
    DeadLetter,
    LetterChange,
    Outcome,
    Place,
    Position,
    Readings,
    State,
    Work,
)
from kvstore.telemetry.sink import Sink
from kvstore.telemetry.validate import Validated, Validator

if TYPE_CHECKING:
    from kvstore.telemetry.contract import Contract

LETTERS_AT_ONCE: Final = 1000  # of a commit
LETTERS_OF_A_ROUND: Final = 20_000  # in memory, with their raw bytes
_NAME: Final = re.compile(r"(.+)#(\d+)@(\d+)")


class Wanted(NamedTuple):
    """Which dead letters are meant."""

    state: State | None = None
    reason: str | None = None
    source: str | None = None
    place: Place | None = None
    offset: int | None = None


@dataclass(slots=True)
class Replayed:
    """What a replay did. before, again: codes of the letters, and of those still refused."""

    letters: int = 0
    passing: int = 0  # that the contract takes today
    stored: int = 0
    duplicates: int = 0
    conflicts: int = 0
    before: Counter[str] = field(default_factory=Counter)
    again: Counter[str] = field(default_factory=Counter)


def name_of(place: Place, offset: int) -> str:
    """A letter's name, as `show` takes it: source#partition@offset."""
    return f"{place.source}#{place.partition}@{offset}"


def parse_name(name: str) -> tuple[Place, int]:
    """The inverse of ``name_of``."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise SettingsError(
            f"{name!r}: expected source#partition@offset, as `rejects list` prints it"
        )
    return Place(match[1], int(match[2])), int(match[3])


def select(sink: Sink, wanted: Wanted) -> Iterator[DeadLetter]:
    """The letters that are meant, in order of place and offset."""
    found = sink.dead_letters(
        state=wanted.state, reason=wanted.reason, place=wanted.place, offset=wanted.offset
    )
    return (each for each in found if wanted.source in (None, each.rejection.place.source))


def discard(
    sink: Sink, wanted: Wanted, *, state: State = State.DISCARDED, dry_run: bool = False
) -> int:
    """Put letters aside, or open them again: how many."""
    changed = 0
    for letters in _rounds(sink, wanted):
        changes = [
            LetterChange(each.rejection.place, each.rejection.offset, state, each.replays)
            for each in letters
            if each.state not in (state, State.REPLAYED)
        ]
        if changes and not dry_run:
            sink.change_letters(changes)
        changed += len(changes)
    return changed


def replay(
    sink: Sink,
    contract: Contract,
    wanted: Wanted,
    *,
    clock: Callable[[], int],
    dry_run: bool = False,
    limits: Mapping[str, Any] | None = None,
) -> Replayed:
    """Send letters through the contract again; those that were replayed before are left out.

    dry_run: says which would pass; what the sink would make of them is not known then.
    limits: for the Validator. A replay can be stopped at any time and begun anew.
    """
    done = Replayed()
    run = new_run(clock())
    for letters in _rounds(sink, wanted):
        open_ones = [each for each in letters if each.state != State.REPLAYED]
        for part in _parts(open_ones):
            attempt = _Attempt(contract, run, clock(), limits or {})
            passing = attempt.passing(part, done)
            done.letters += len(part)
            done.passing += len(passing)
            if not dry_run:
                outcome = _commit(sink, attempt.work(part, passing))
                done.stored += outcome.stored
                done.duplicates += outcome.duplicates
                done.conflicts += outcome.conflicts
    return done


class _Attempt:
    """Some letters, sent through the contract at one moment."""

    def __init__(self, contract: Contract, run: str, now_us: int, limits: Mapping[str, Any]):
        self._contract = contract
        self._run = run
        self._now_us = now_us
        self._limits = limits

    def passing(self, letters: Sequence[DeadLetter], done: Replayed) -> list[DeadLetter]:
        """Those that the contract takes today; the codes of all are counted."""
        refused: set[tuple[Place, int]] = set()
        for each in letters:
            done.before.update({reason.code for reason in each.rejection.reasons})
        for found in self._validated(letters):
            for rejection in found.rejections:
                refused.add((rejection.place, rejection.offset))
                done.again.update({reason.code for reason in rejection.reasons})
        return [each for each in letters if _key(each) not in refused]

    def work(self, letters: Sequence[DeadLetter], passing: Sequence[DeadLetter]) -> Work:
        """Readings of those that pass; the others stay open, tried once more."""
        passed = {_key(each) for each in passing}
        found = self._validated(passing)  # once more: ``seen`` is to count them alone
        seen = [count for each in found for count in each.seen]
        seen += [count for each in passing for count in _taken_back(each)]
        return Work(
            commit_id=uuid.uuid4().hex,
            run=self._run,
            committed_us=self._now_us,
            claims=(),
            after=(),
            readings=joined([each.readings for each in found] or [self._nothing()]),
            raw=[payload for each in found for payload in each.raw],
            seen=counts.summed(seen),
            changes=[
                LetterChange(
                    *_key(each),
                    State.REPLAYED if _key(each) in passed else each.state,
                    each.replays + 1,
                )
                for each in letters
            ],
            contract_version=self._contract.version,
        )

    def _validated(self, letters: Sequence[DeadLetter]) -> list[Validated]:
        validator = Validator(self._contract, now_us=lambda: self._now_us, **self._limits)
        places = groupby(letters, key=lambda each: each.rejection.place)
        return [
            validator.validate(_chunk(place, list(group)), run=self._run) for place, group in places
        ]

    def _nothing(self) -> Readings:
        validator = Validator(self._contract, now_us=lambda: self._now_us)
        return validator.validate(_chunk(Place("", 0), []), run=self._run).readings


def _chunk(place: Place, letters: Sequence[DeadLetter]) -> Chunk:
    rejections = [each.rejection for each in letters]
    return Chunk(
        place,
        np.array([each.offset for each in rejections], np.int64),
        [each.payload for each in rejections],
        Position(place, -1),
        keys=[each.key for each in rejections],
        headers=[each.headers for each in rejections],
    )


def _taken_back(letter: DeadLetter) -> Iterator[Count]:
    """What was counted of the event when it was refused: it is counted anew as a reading."""
    rejection = letter.rejection
    ts_us = letter.first_seen_us if rejection.ts_us is None else rejection.ts_us
    hour_us = ts_us // counts.HOUR_US * counts.HOUR_US
    codes = {reason.code for reason in rejection.reasons}
    for name in [counts.RECEIVED, counts.REJECTED, *map(counts.reason, sorted(codes))]:
        yield Count(rejection.device_id, hour_us, name, -1)


def _commit(sink: Sink, work: Work) -> Outcome:
    try:
        return sink.commit(work)
    except CommitUnknown:
        if (outcome := sink.settle(work)) is None:
            raise
        return outcome


def _key(letter: DeadLetter) -> tuple[Place, int]:
    return letter.rejection.place, letter.rejection.offset


def _rounds(sink: Sink, wanted: Wanted) -> Iterator[list[DeadLetter]]:
    """The letters, many at a time; no reading of the sink is open while a round is worked on."""
    behind: tuple[Place, int] | None = None
    while True:
        rest = (each for each in select(sink, wanted) if behind is None or _key(each) > behind)
        letters = list(islice(rest, LETTERS_OF_A_ROUND))
        if not letters:
            return
        yield letters
        behind = _key(letters[-1])


def _parts(letters: Sequence[DeadLetter]) -> Iterator[Sequence[DeadLetter]]:
    for first in range(0, len(letters), LETTERS_AT_ONCE):
        yield letters[first : first + LETTERS_AT_ONCE]
