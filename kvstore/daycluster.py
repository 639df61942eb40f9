"""Day files on a Dask cluster: the same per-day function, mapped over its workers.

A task is a day; it writes its files itself and returns only its report, so that what travels is
small. Tasks are idempotent: where a worker dies, Dask runs its days again on another, to the
same bytes. Workers must see the input and the output under the same absolute paths, and have
this version of kvstore. The only importer of distributed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import Any, Final

from distributed import Client, KilledWorker, as_completed

from kvstore.dayfiles.day import DayReport, Task, convert_day
from kvstore.dayfiles.etl import Runner
from kvstore.errors import DayfilesError

CONNECT_S: Final = 30  # a scheduler that does not answer in that time is not there
WORKERS_WAIT_S: Final = 120  # a nanny or an autoscaler has brought others by then
_LOOK_S: Final = 0.1  # a day takes seconds
RETRIES: Final = 2  # of a day that fails: a passing fault of a worker's disk or network


def on_cluster(address: str) -> Runner:
    """Days on the workers of the scheduler at tcp://host:port, as many at a time as they take."""

    def run(tasks: Sequence[Task]) -> Iterator[DayReport]:
        with _quiet_client(), connected(address) as client:
            for done in _completed(client, address, _submitted(client, address, tasks)):
                yield _report(done, address)
                done.release()

    return run


@contextmanager
def _quiet_client() -> Iterator[None]:
    """A client logs with a traceback what it also raises, or that it was closed meanwhile."""
    logger = logging.getLogger("distributed.client")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _submitted(client: Client, address: str, tasks: Sequence[Task]) -> list[Any]:
    if not _has_workers(client, address):
        raise DayfilesError(f"{address}: the scheduler has no workers; start some")
    return [client.submit(convert_day, task, pure=False, retries=RETRIES) for task in tasks]


def _has_workers(client: Client, address: str) -> bool:
    try:
        return bool(client.scheduler_info(n_workers=1)["workers"])
    except OSError as error:
        raise _lost(address, error) from error


def _completed(client: Client, address: str, futures: Sequence[Any]) -> Iterator[Any]:
    """Futures as they end. Dask itself would wait for ever where the last worker has died."""
    waiting = as_completed(futures, loop=client.loop)
    had_workers_s = time.monotonic()
    while not waiting.is_empty():
        if waiting.has_ready():
            yield next(waiting)
            had_workers_s = time.monotonic()
        elif _has_workers(client, address):
            had_workers_s = time.monotonic()
            time.sleep(_LOOK_S)
        elif time.monotonic() - had_workers_s > WORKERS_WAIT_S:
            raise DayfilesError(
                f"{address}: the scheduler has had no workers for {WORKERS_WAIT_S} s: days that "
                "are done are kept; start workers, and run again"
            )
        else:
            time.sleep(_LOOK_S)


def _report(done: Any, address: str) -> DayReport:
    try:
        report: DayReport = done.result()
    except KilledWorker as error:
        raise DayfilesError(
            f"{address}: workers died at one day again and again, perhaps for want of memory: days "
            "that are done are kept; run again, with more memory for each worker"
        ) from error
    except CancelledError as error:
        raise _lost(address, error) from error
    return report


def _lost(address: str, error: Exception) -> DayfilesError:
    told = str(error).partition("\n")[0]
    return DayfilesError(
        f"{address}: the scheduler was lost, or started anew ({told}): days that are done are "
        "kept; see that it runs, and run again"
    )


def connected(address: str) -> Client:
    """A client of that scheduler; DayfilesError where there is none."""
    try:
        return Client(address, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        raise DayfilesError(
            f"{address}: no Dask scheduler answers ({error}); start one with `dask scheduler`, "
            "and workers with `dask worker ADDRESS`"
        ) from error
