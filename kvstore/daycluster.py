"""Day files on a Dask cluster: the same per-day function, mapped over its workers.

A task is a day; it writes its files itself and returns only its report, so that what travels is
small. Tasks are idempotent: where a worker dies, Dask runs its days again on another, to the
same bytes. Workers must see the input and the output under the same absolute paths, and have
this version of kvstore. The only importer of distributed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import Any, Final

from distributed import Client, KilledWorker, as_completed

from kvstore.dayfiles.day import DayReport, Task, convert_day
from kvstore.dayfiles.etl import Runner
from kvstore.errors import DayfilesError

CONNECT_S: Final = 30  # a scheduler that does not answer in that time is not there
RETRIES: Final = 2  # of a day that fails: a passing fault of a worker's disk or network


def on_cluster(address: str) -> Runner:
    """Days on the workers of the scheduler at tcp://host:port, as many at a time as they take."""

    def run(tasks: Sequence[Task]) -> Iterator[DayReport]:
        with _quiet_client(), connected(address) as client:
            for done in as_completed(_submitted(client, address, tasks), loop=client.loop):
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
    """The futures of all days. Errors of days come from these; any other is the scheduler's."""
    try:
        if not client.scheduler_info(n_workers=-1)["workers"]:
            raise DayfilesError(f"{address}: the scheduler has no workers; start some")
        return [client.submit(convert_day, t, pure=False, retries=RETRIES) for t in tasks]
    except OSError as error:
        raise _lost(address, error) from error


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
