"""What the readings table knows of its commits, in its properties: places, epochs, the head.

    kvstore.place.<source>/<partition>   where it is read up to, its epoch, the snapshot that set it
    kvstore.head                         the last snapshot of ours, and the side tables' snapshots

They change in the commit that appends, and each commit of ours makes a snapshot, a claim as well:
a catalog checks that the table's snapshot is still the one that a commit was made from, and
nothing else (pyiceberg applies properties to whatever it finds).

The head must be an ancestor of the current snapshot. Where it is none, somebody has rolled the
table back: the positions then speak of rows that are gone. That is an error, and each snapshot's
summary holds the positions that it set, so that they can be offered (see ``offered``).

Pure but for the metadata that it is given: no I/O.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from kvstore.errors import Fenced, SinkError
from kvstore.telemetry.records import Claim, Outcome, Place, Position

PLACE: Final = "kvstore.place."
HEAD: Final = "kvstore.head"
COMMIT_ID: Final = "kvstore.commit-id"
OUTCOME: Final = "kvstore.outcome"
POSITIONS: Final = "kvstore.positions"


@dataclass(frozen=True, slots=True)
class Mark:
    """What is known of a place. snapshot, commit_id: that set the position; outcome: its counts."""

    position: Position
    epoch: int
    snapshot: int | None = None
    commit_id: str = ""
    outcome: Outcome | None = None


@dataclass(frozen=True, slots=True)
class Head:
    """Our last snapshot, its sequence number, and the snapshots of the side tables with it."""

    snapshot: int | None = None
    sequence: int = 0
    letters: int | None = None
    counts: int | None = None


@dataclass(frozen=True, slots=True)
class State:
    """All of it."""

    marks: Mapping[Place, Mark]
    head: Head

    def check_claims(self, claims: Sequence[Claim]) -> None:
        """Each place still stands where the claim says, under its epoch."""
        for position, epoch in claims:
            mark = self.marks.get(position.place)
            if mark is None or mark.epoch != epoch:
                found = "no claim" if mark is None else f"epoch {mark.epoch}"
                raise Fenced(
                    f"{position.place}: another worker has claimed it ({found}, ours is {epoch}); "
                    "nothing was kept: claim it again to go on"
                )
            if mark.position != position:
                raise Fenced(
                    f"{position.place}: read from {position.next}, but the lake is at "
                    f"{mark.position.next}; nothing was kept: claim it again to go on"
                )

    def claimed(self, places: Iterable[Place]) -> tuple[State, list[Claim]]:
        """The state with each place's epoch one higher, and the claims to that."""
        marks, claims = dict(self.marks), []
        for place in places:
            mark = marks.get(place, Mark(Position(place, -1), 0))
            marks[place] = replace(mark, epoch=mark.epoch + 1)
            claims.append(Claim(mark.position, mark.epoch + 1))
        return replace(self, marks=marks), claims

    def rewound(
        self, offered: Mapping[Place, Position | None], head: Head
    ) -> tuple[State, list[Position]]:
        """The state with positions of a snapshot's past, new epochs; and what has changed."""
        marks, changed = dict(self.marks), []
        for place, position in offered.items():
            assert position is not None
            mark = marks[place]
            if position != mark.position:
                changed.append(position)
            known = "rollback" if position.next >= 0 else ""
            marks[place] = Mark(position, mark.epoch + 1, head.snapshot, known)
        return State(marks, head), changed

    def moved(
        self, after: Sequence[Position], *, snapshot: int, commit_id: str, outcome: Outcome
    ) -> State:
        """The state once a commit is there."""
        marks = dict(self.marks)
        for position in after:
            epoch = marks[position.place].epoch
            marks[position.place] = Mark(position, epoch, snapshot, commit_id, outcome)
        return replace(self, marks=marks)

    def properties(self) -> dict[str, str]:
        """As properties of the table."""
        found = {HEAD: json.dumps(asdict(self.head))}
        for place, mark in self.marks.items():
            found[f"{PLACE}{place.source}/{place.partition}"] = json.dumps(
                {
                    "source": place.source,
                    "partition": place.partition,
                    "next": mark.position.next,
                    "token": mark.position.token,
                    "epoch": mark.epoch,
                    "snapshot": mark.snapshot,
                    "commit": mark.commit_id,
                    "outcome": mark.outcome,
                }
            )
        return found


def state_of(metadata: Any) -> State:
    """What the table's properties say."""
    marks = {}
    for key, value in metadata.properties.items():
        if key.startswith(PLACE):
            mark = _mark(json.loads(value))
            marks[mark.position.place] = mark
    return State(marks, Head(**json.loads(metadata.properties.get(HEAD, "{}"))))


def _mark(found: Mapping[str, Any]) -> Mark:
    outcome = found["outcome"]
    return Mark(
        Position(Place(found["source"], found["partition"]), found["next"], found["token"]),
        found["epoch"],
        found["snapshot"],
        found["commit"],
        None if outcome is None else Outcome(*outcome),
    )


def changed(before: State, after: State) -> dict[str, str]:
    """The properties that a commit has to set."""
    old = before.properties()
    return {key: value for key, value in after.properties().items() if old.get(key) != value}


# ---- snapshots ----


def summary(commit_id: str, after: Sequence[Position], outcome: Outcome, head: Head) -> Any:
    """What a snapshot of ours says of itself."""
    positions = [[*position.place, position.next, position.token] for position in after]
    return {
        COMMIT_ID: commit_id,
        OUTCOME: json.dumps(outcome),
        POSITIONS: json.dumps(positions),
        HEAD: json.dumps(asdict(head)),
    }


def lineage(metadata: Any) -> Iterator[Any]:
    """The current snapshot and its ancestors, as far back as they are kept."""
    kept = {snapshot.snapshot_id: snapshot for snapshot in metadata.snapshots}
    snapshot = kept.get(metadata.current_snapshot_id)
    while snapshot is not None:
        yield snapshot
        snapshot = kept.get(snapshot.parent_snapshot_id)


def check_lineage(metadata: Any, state: State, location: str) -> None:
    """Stop where the table was rolled back behind our last commit."""
    head = state.head
    if head.snapshot in (None, metadata.current_snapshot_id):
        return
    line = list(lineage(metadata))
    if any(snapshot.snapshot_id == head.snapshot for snapshot in line):
        return
    known = any(snapshot.snapshot_id == head.snapshot for snapshot in metadata.snapshots)
    newest = line[0].sequence_number if line else 0
    if not known and newest > head.sequence:
        return  # other tools wrote on, and have expired ours
    places = "; ".join(
        f"{place.source} {place.partition}: "
        + ("not known" if position is None else f"{position.next}")
        + f" instead of {state.marks[place].position.next}"
        for place, position in offered(metadata, state).items()
    )
    raise SinkError(
        f"{location} was rolled back: its last commit of ours, snapshot {head.snapshot}, is no "
        f"ancestor of the current one, {metadata.current_snapshot_id}. The positions in the "
        f"current one's past are: {places or 'none'}. To go on from there: "
        "`kvstore telemetry maintain LAKE --accept-rollback`"
    )


def offered(metadata: Any, state: State) -> dict[Place, Position | None]:
    """Each place's position as the current snapshot's past has it; None where that is not known.

    A place that the whole past does not name was never read in it: position -1.
    """
    found: dict[Place, Position] = {}
    last = None
    for last in lineage(metadata):
        for source, partition, next_, token in json.loads(_summary(last).get(POSITIONS, "[]")):
            place = Place(source, partition)
            found.setdefault(place, Position(place, next_, token))
    whole = last is None or last.parent_snapshot_id is None
    beginning = {place: Position(place, -1) if whole else None for place in state.marks}
    return {place: found.get(place, beginning[place]) for place in state.marks}


def past_head(metadata: Any) -> Head:
    """The head that the nearest snapshot of ours in the current one's past wrote."""
    for snapshot in lineage(metadata):
        head = head_of(snapshot)
        if head is not None:
            return replace(head, snapshot=snapshot.snapshot_id, sequence=snapshot.sequence_number)
    return Head()


def head_of(snapshot: Any) -> Head | None:
    """The head that a snapshot of ours wrote; None for another tool's."""
    found = _summary(snapshot).get(HEAD)
    return None if found is None else Head(**json.loads(found))


def outcome_of(metadata: Any, state: State, commit_id: str) -> Outcome | None:
    """What the commit of that id did; None where it is not in the current snapshot's past."""
    for mark in state.marks.values():
        if mark.commit_id == commit_id:
            return mark.outcome
    for snapshot in lineage(metadata):
        if _summary(snapshot).get(COMMIT_ID) == commit_id:
            return Outcome(*json.loads(_summary(snapshot)[OUTCOME]))
    return None


def _summary(snapshot: Any) -> Mapping[str, str]:
    found = snapshot.summary
    return {} if found is None else found.additional_properties
