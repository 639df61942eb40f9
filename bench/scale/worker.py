"""Processes that wait for work: asked in one line of JSON, they answer in one line.

So that n of them start at the same time, and only what was asked for is timed. They end with
their input; who leaves the block kills them.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
from collections.abc import Iterator, Sequence
from typing import IO, Any, Final, NamedTuple

from bench.figure import BenchError
from bench.process import Child, Watch

ANSWER_S_MAX: Final = 1800.0  # longest: a look at 1 TB, some minutes on a slow disk
_COMMAND: Final = (sys.executable, "-m", "bench.scale.child")

Answer = dict[str, float]


class Worker:
    """One process; ask it, then take its answer."""

    def __init__(self, child: Child, asked: IO[str], told: IO[str]) -> None:
        self.pid = child.process.pid
        self._child = child
        self._asked = asked
        self._told = told

    def ask(self, act: str, **arguments: Any) -> None:
        """Have one of acts.py begun."""
        self._asked.write(json.dumps([act, arguments], default=str) + "\n")
        self._asked.flush()

    def answer(self) -> Answer:
        """Wait for what was asked; BenchError where it failed."""
        if not select.select([self._told], [], [], ANSWER_S_MAX)[0]:
            raise BenchError(f"a worker did not answer within {ANSWER_S_MAX:.0f} s")
        line = self._told.readline()
        if not line:
            self._child.check(self._child.wait())
            raise BenchError("a worker ended without an answer")
        answer: Answer = json.loads(line)
        if "error" in answer:
            raise BenchError(str(answer["error"]))
        return answer

    def did(self, act: str, **arguments: Any) -> Answer:
        """Ask and wait."""
        self.ask(act, **arguments)
        return self.answer()


class Together(NamedTuple):
    """What several workers did at once: seconds from the first start to the last end."""

    wall_s: float
    answers: list[Answer]


@contextlib.contextmanager
def workers(count: int) -> Iterator[list[Worker]]:
    """Start so many, warmed up: each has imported everything."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(_worker()) for _ in range(count)]


@contextlib.contextmanager
def _worker() -> Iterator[Worker]:
    asked, ask = os.pipe()
    told, tell = os.pipe()
    with os.fdopen(ask, "w") as to, os.fdopen(told) as back, contextlib.ExitStack() as stack:
        try:
            child = stack.enter_context(Child.started(_COMMAND, asked, tell))
        finally:
            os.close(asked)
            os.close(tell)
        worker = Worker(child, to, back)
        worker.did("ready")
        yield worker


def together(asked: Sequence[Worker], act: str, arguments: Sequence[dict[str, Any]]) -> Together:
    """Have each worker do the same act, with its own arguments, at the same time."""
    for worker, its in zip(asked, arguments, strict=True):
        worker.ask(act, **its)
    answers = [worker.answer() for worker in asked]
    started = min(answer["started_s"] for answer in answers)
    return Together(max(answer["ended_s"] for answer in answers) - started, answers)


def alone(act: str, **arguments: Any) -> Answer:
    """Have one act done by a process of its own; anon_mb: its peak of anonymous memory."""
    with workers(1) as (worker,):
        watch = Watch(worker.pid)
        answer = worker.did(act, **arguments)
    return {**answer, "anon_mb": watch.stop() / 1e6}
