"""A worker that ingests a made-up feed into PostgreSQL, to be killed. Not a test module.

    python postgres_worker.py URL SCHEMA PARTITION EVENTS

Each tenth event is refused, each seventh repeats the one before, each eleventh contradicts it.
Prints a line once it has claimed, and one for each commit.
"""

from __future__ import annotations

import sys
import uuid

import telemetry_data as data

from kvstore.errors import CommitUnknown, Fenced
from kvstore.telemetry.records import Place, Rejection, Work
from kvstore.telemetry.sinks.postgres import PostgresSink

BATCH = 20


def place(partition: int) -> Place:
    return data.OTHER._replace(partition=partition)


def event(partition: int, offset: int) -> data.Row | Rejection:
    at = place(partition)
    if offset % 10 == 9:
        return data.rejection(offset, place=at)
    second, temperature = float(offset), 20.0
    if offset % 7 == 6:
        second -= 1
    if offset % 11 == 10:
        second, temperature = second - 1, 30.0
    return data.row(
        f"p{partition}-{offset % 3 if second == offset else (offset - 1) % 3}",
        second,
        offset=offset,
        place=at,
        temperature=temperature,
    )


def works(partition: int, claim, events: int):
    """The commits that are left to do behind a claim."""
    position, epoch = claim
    while position.next < events:
        start = max(position.next, 0)
        stop = min(start + BATCH, events)
        found = [event(partition, offset) for offset in range(start, stop)]
        rows = [each for each in found if isinstance(each, data.Row)]
        rejections = [each for each in found if isinstance(each, Rejection)]
        made = data.work(
            type(claim)(position, epoch),
            rows,
            rejections,
            next_=stop,
            commit_id=uuid.uuid4().hex,
        )
        yield made
        position = made.after[0]


def settled(sink: PostgresSink, work: Work) -> None:
    try:
        sink.commit(work)
    except CommitUnknown:
        if sink.settle(work) is None:
            sink.commit(work)


def main(url: str, schema: str, partition: int, events: int) -> None:
    with PostgresSink(url, schema=schema) as sink:
        sink.evolve(data.BRIEF)
        claim = sink.claim([place(partition)])[0]
        print("claimed", flush=True)
        try:
            for work in works(partition, claim, events):
                settled(sink, work)
                print("committed", work.after[0].next, flush=True)
        except Fenced:
            print("fenced", flush=True)
            return
    print("done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
