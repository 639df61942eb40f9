"""Made-up exports of the real data's shape, by the month.

Of the real ones they have: 109 files a day of some 46,000 rows, 15 minutes each, snappy, one row
group, pandas' index left in; 3 phases of 8 modules, some 490 combinations of tags; bursts of 2-4 s
at 1 Hz, then 9-30 s of silence; whole bursts told several times over, so that 77 % of the rows are
duplicates; numbers as texts of a float32's digits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

FILES_A_DAY: Final = 109
_FILE_S: Final = 86400 // FILES_A_DAY
_START_S: Final = 1717545600  # 2024-06-05
_VALUES: Final = 160  # distinct ones of a measure in a file
_REPEATS: Final = 4.4  # of a row, on average

Ints = npt.NDArray[np.int64]


class _Kind(NamedTuple):
    """A series: its measure, its tags, how often a burst's second tells it, and its mean."""

    name: str
    tags: list[list[str]]
    share: float
    mean: float


def _kinds() -> list[_Kind]:
    found = [
        _system("system_state", 1.0, 0.0),
        _system("system_frequency_freq_hz", 1.0, 50.0),
        _system("system_timing_worst_us", 1.0, 44.0),
        _system("system_derating_charging_amp", 1.0, 98.0),
        _system("system_derating_discharging_amp", 1.0, 98.0),
    ]
    for phase in range(1, 4):
        found.append(_Kind("phase_current", _tags(phase=phase), 0.9, 0.05))
        for module in range(1, 9):
            found += _of_module(phase, module)
    return found


def _system(name: str, share: float, mean: float) -> _Kind:
    return _Kind(name, _tags(), share, mean)


def _of_module(phase: int, module: int) -> list[_Kind]:
    at = {"phase": phase, "module": module}
    cells = [
        _Kind("cell_voltage", _tags(**at, battery=1, cell=cell), 0.02, 3.9) for cell in range(1, 15)
    ]
    return [
        _Kind("module_voltage", _tags(**at), 0.95, 55.0),
        _Kind("module_current", _tags(**at), 0.97, 0.0),
        _Kind("module_state_of_charge", _tags(**at), 0.99, 0.8),
        _Kind("battery_voltage", _tags(**at, battery=1), 0.99, 55.0),
        _Kind("module_temperature", _tags(**at), 0.05, 22.0),
        _Kind("battery_sensor_temperature", _tags(**at, battery=1, sensor=1), 0.05, 26.0),
        *cells,
    ]


def _tags(**pairs: int) -> list[list[str]]:
    return [[key, str(value)] for key, value in pairs.items()] + [["message_source", "master"]]


def make(folder: Path, *, days: int, seed: int, files_a_day: int = FILES_A_DAY) -> int:
    """Write exports of that many days; returns how many rows."""
    rng = np.random.default_rng(seed)
    kinds = _kinds()
    rows = 0
    for day in range(days):
        target = folder / f"{day:03}"
        target.mkdir(parents=True)
        for number in range(files_a_day):
            start = _START_S + day * 86400 + number * _FILE_S
            rows += _write(
                target / f"telemetry-export-metrics-{number:03}.parquet", start, kinds, rng
            )
    return rows


def _write(path: Path, start: int, kinds: list[_Kind], rng: np.random.Generator) -> int:
    times, codes = _burst_rows(start, kinds, rng)
    values, texts = _values(codes, kinds, rng)
    table = pa.table({
        "timestamp": times,
        "payload_type": pa.array([kind.name for kind in kinds]).take(pa.array(codes)),
        "value": pa.array(texts).take(pa.array(values)),
        "tags": pa.array([kind.tags for kind in kinds]).take(pa.array(codes)),
        "__index_level_0__": np.arange(len(times)),
    })  # fmt: skip
    pq.write_table(table, path)
    return len(times)


def _burst_rows(start: int, kinds: list[_Kind], rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Times and kinds: a second's readings one after the other, the whole of it several times."""
    shares = np.array([kind.share for kind in kinds])
    times: list[Any] = []
    codes: list[Any] = []
    now = start
    while now < start + _FILE_S:
        for second in range(now, now + int(rng.integers(2, 5))):
            told = np.flatnonzero(rng.random(len(shares)) < shares)
            repeats = int(rng.poisson(_REPEATS - 1)) + 1
            codes.append(np.tile(told, repeats))
            times.append(np.full(len(told) * repeats, second))
        now = second + 1 + int(rng.integers(9, 31))
    return np.concatenate(times), np.concatenate(codes)


def _values(codes: Ints, kinds: list[_Kind], rng: np.random.Generator) -> tuple[Ints, list[str]]:
    """Each kind has a few values in a file, each reading one of them: by its place in the file."""
    spread = np.round(rng.normal(0, 0.2, _VALUES), 2)
    means = np.array([kind.mean for kind in kinds])
    numbers = (means[:, None] + spread).astype(np.float32).astype(np.float64)
    texts = [repr(number) for number in numbers.ravel().tolist()]
    texts[:_VALUES] = ["RUN" if number > 0 else "IDLE" for number in spread.tolist()]
    steps = np.arange(len(codes)) // 4000  # values change slowly
    return codes * _VALUES + (codes * 7 + steps) % _VALUES, texts
