"""One run of several measurements: header, figures as they come, failures beside them."""

from __future__ import annotations

import datetime as dt
import sys
from collections.abc import Iterable

from bench import capture, report
from bench.figure import BenchError, Figure, Measurement, Setting
from bench.host import describe
from bench.measure import scratch
from bench.workload import Workload
from kvstore.errors import KvstoreError


def measure_all(
    measurements: Iterable[Measurement], setting: Setting, *, disk_bytes: int
) -> report.Report:
    """Make each measurement; one that cannot be made is a failure, and the others go on.

    disk_bytes: to write bare, once, for the header.
    """
    started = dt.datetime.now(dt.UTC)
    host, disk_gb_s = describe(setting.folder), _disk_gb_s(setting, disk_bytes)
    print(report.header(host, disk_gb_s, setting) + "\n", file=sys.stderr)
    figures: list[Figure] = []
    failures: list[report.Failure] = []
    for measurement in measurements:
        try:
            made = measurement.run(setting)
        except (BenchError, KvstoreError, OSError, MemoryError) as error:
            failures.append(report.Failure(measurement.name, f"{type(error).__name__}: {error}"))
            print(f"NOT MEASURED {measurement.name}: {error}", file=sys.stderr)
            continue
        figures += made
        print(*map(report.line, made), sep="\n", file=sys.stderr)
    return report.Report(started, host, disk_gb_s, setting, figures, failures)


def _disk_gb_s(setting: Setting, size_bytes: int) -> float:
    with scratch(setting.folder, bytes_needed=size_bytes) as folder:
        work = Workload.of("uniform", size_bytes, setting.seed)
        return capture.bare_gb_s(folder / "bare", work.raw)
