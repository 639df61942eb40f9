"""Day files on a Dask cluster: the same per-day function, mapped over its workers.

A task is a day; it writes its files itself and returns only its report, so that what travels is
small. Tasks are idempotent: where a worker dies, Dask runs its days again on another, to the
same bytes. Workers must see the input and the output under the same absolute paths, and have
this version of kvstore. The only importer of distributed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from distributed import Client, as_completed

from kvstore.dayfiles.day import DayReport, Task, convert_day
from kvstore.dayfiles.etl import Runner
from kvstore.errors import DayfilesError

CONNECT_S: Final = 30  # a scheduler that does not answer in that time is not there
RETRIES: Final = 2  # of a day that fails: a passing fault of a worker's disk or network


def on_cluster(address: str) -> Runner:
    """Days on the workers of the scheduler at tcp://host:port, as many at a time as they take."""

    def run(tasks: Sequence[Task]) -> Iterator[DayReport]:
        with connected(address) as client:
            if not client.scheduler_info(n_workers=-1)["workers"]:
                raise DayfilesError(f"{address}: the scheduler has no workers; start some")
            futures = [client.submit(convert_day, t, pure=False, retries=RETRIES) for t in tasks]
            for done in as_completed(futures, loop=client.loop):
                yield done.result()
                done.release()

    return run


def connected(address: str) -> Client:
    """A client of that scheduler; DayfilesError where there is none."""
    try:
        return Client(address, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        raise DayfilesError(
            f"{address}: no Dask scheduler answers ({error}); start one with `dask scheduler`, "
            "and workers with `dask worker ADDRESS`"
        ) from error
