"""Exports as the real ones are, with every quirk of them; made here, of no real data."""

from __future__ import annotations

import csv
import json
import random
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

# A row as it is in an export: (epoch seconds, payload_type, value, tags). Plain data throughout.
SCHEMA = pa.schema([
    ("timestamp", pa.int64()),
    ("payload_type", pa.string()),
    ("value", pa.string()),
    ("tags", pa.list_(pa.list_(pa.string()))),
    ("__index_level_0__", pa.int64()),
])  # fmt: skip


def seconds(text):
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


def tags(**pairs):
    return [[key, str(value)] for key, value in pairs.items()] + [["message_source", "master"]]


def module(phase, number, **more):
    return tags(phase=phase, module=number, **more)


def save(path: Path, rows, *, index=True):
    """A file in the long layout: as the exports have it, or as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(SCHEMA.names[:4])
            writer.writerows([t, p, v, json.dumps(g)] for t, p, v, g in rows)
        return path
    columns = list(zip(*rows, strict=True)) if rows else [(), (), (), ()]
    arrays = [pa.array(column, kind) for column, kind in zip(columns, SCHEMA.types, strict=False)]
    arrays.append(pa.array(range(len(rows)), pa.int64()))
    table = pa.Table.from_arrays(arrays, schema=SCHEMA)
    pq.write_table(table if index else table.drop_columns("__index_level_0__"), path)
    return path


def save_wide(path: Path, rows):
    """A file in the wide layout, of rows of modules and phases."""
    cells = {}
    for time, name, value, pairs in rows:
        named = dict(pairs)
        key = (time, named.get("phase"), named.get("module"))
        cell = f"_{named['cell']}" if "cell" in named else ""
        cells.setdefault(key, {})[name + cell] = value
    names = sorted({name for found in cells.values() for name in found})
    path.parent.mkdir(parents=True, exist_ok=True)
    wide = [
        {"timestamp": t, "phase": p, "module": m, **{n: found.get(n) for n in names}}
        for (t, p, m), found in cells.items()
    ]
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["timestamp", "phase", "module", *names])
            writer.writeheader()
            writer.writerows(wide)
    else:
        kinds = {"timestamp": pa.int64()}
        every = ["timestamp", "phase", "module", *names]
        schema = pa.schema([(name, kinds.get(name, pa.string())) for name in every])
        pq.write_table(pa.Table.from_pylist(wide, schema), path)
    return path


# ---- a made-up plant ----


def burst(rng, time, phases, modules):
    """What the plant tells in a second: not every module tells everything."""
    rows = [
        (time, "system_state", rng.choice(["IDLE", "RUN"]), tags()),
        (time, "system_frequency_freq_hz", f"{rng.gauss(50, 0.02)}", tags()),
        (time, "debug_value", f"{rng.gauss(45, 1):.12f}", tags(debug_value_key="cb_temp_core")),
    ]
    for phase in range(1, phases + 1):
        rows.append((time, "phase_current", f"{rng.gauss(0, 20)}", tags(phase=phase)))
        for number in range(1, modules + 1):
            rows += module_burst(rng, time, phase, number)
    return rows


def module_burst(rng, time, phase, number):
    at = {"phase": phase, "module": number}
    rows = [
        (time, "module_voltage", f"{rng.gauss(55, 0.3):.15g}", tags(**at)),
        (time, "module_current", "0.0", tags(**at)),
        (time, "module_state_of_charge", f"{rng.uniform(0.2, 0.9):.4f}", tags(**at)),
        (time, "battery_voltage", f"{rng.gauss(55, 0.3):.6f}", tags(**at, battery=1)),
        (time, "module_temperature", f"{rng.gauss(21, 1)}", tags(**at)),
        (
            time,
            "battery_sensor_temperature",
            f"{rng.gauss(23, 1)}",
            tags(**at, battery=1, sensor=1),
        ),
    ]
    cells = rng.sample(range(1, 15), rng.randint(0, 3))
    rows += [
        (time, "cell_voltage", f"{rng.gauss(3.9, 0.01):.4f}", tags(**at, battery=1, cell=cell))
        for cell in cells
    ]
    return [row for row in rows if rng.random() < 0.7]


def plant(start, stop, *, seed=1, phases=1, modules=2):
    """Rows of a stretch of time: bursts of 2-4 s, then 9-30 s of silence, or minutes."""
    rng = random.Random(seed)
    rows = []
    time = start
    while time < stop:
        for _ in range(rng.randint(2, 4)):
            rows += burst(rng, time, phases, modules)
            time += 1
        time += rng.randint(120, 900) if rng.random() < 0.05 else rng.randint(9, 30)
    return [row for row in rows if row[0] < stop]


def scatter(folder: Path, rows, *, seed=1, files=6):
    """Rows to files as the real exports have them; returns the paths.

    Each row up to four times, within and across files; unsorted; files that overlap, cross hours
    and days, and are named for another time than that of their rows; a stray .DS_Store.
    """
    rng = random.Random(seed)
    ordered = sorted(rows, key=lambda row: row[0])
    size = max(1, len(ordered) // files)
    paths = []
    for first in range(0, len(ordered), size):
        own = ordered[max(0, first - size // 3) : first + size]
        own += rng.choices(own, k=2 * len(own))
        rng.shuffle(own)
        lie = datetime.fromtimestamp(own[0][0] + rng.randint(-90000, 90000), UTC)
        name = f"telemetry-export-metrics-{seed}-{lie:%Y-%m-%d-%H-%M-%S}-{len(paths)}.parquet"
        paths.append(save(folder / f"{lie:%Y/%m/%d}" / name, own))
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    return paths
