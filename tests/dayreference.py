"""The day-file ETL once more: slow, in plain Python, from the issue's words and nothing else.

Of kvstore it imports nothing, and no library that kvstore computes with.
"""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime

TABLE = {
    "module": [
        "module_voltage", "module_current", "module_state_of_charge", "module_temperature",
        "battery_voltage", "battery_sensor_temperature",
        *[f"cell_voltage_{cell}" for cell in range(1, 15)],
    ],
    "phase": ["phase_current", "phase_module_count"],
    "system": [
        "phase_count", "system_state", "system_frequency_freq_hz", "system_derating_charging_amp",
        "system_derating_discharging_amp", "system_timing_worst_us",
    ],
}  # fmt: skip
STEPS = {"phase_module_count", "phase_count", "system_state"}
OBSERVED, HELD, INTERPOLATED, MISSING = 0, 1, 2, 9
NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")


def place(payload, pairs):
    """The tree and the column of a reading."""
    named = dict(pairs)
    phase, number = named.pop("phase", None), named.pop("module", None)
    named.pop("message_source")
    tree = "system" if phase is None else phase if number is None else f"{phase}_{number}"
    name = payload
    if "cell" in named:
        name += f"_{named['cell']}"
    if "debug_value_key" in named:
        name += f"_{named['debug_value_key']}"
    for key in ("battery", "sensor"):
        if named.get(key, "1") != "1":
            name += f"_{key}_{named[key]}"
    return tree, name


def kind(tree):
    return "system" if tree == "system" else "module" if "_" in tree else "phase"


def value_of(name, text):
    """A text, a number, or None for what is neither."""
    if text is None or name == "system_state":
        return text
    if not NUMBER.fullmatch(text) or not math.isfinite(float(text)):
        return None
    return float(text)


def readings(rows):
    """{(tree, column): {time: value}}, each identity once."""
    found = {}
    for time, payload, text, pairs in rows:
        tree, name = place(payload, pairs)
        value = value_of(name, text)
        if payload == "unheard_of" and value is None and text is not None:
            name, value = name + "_text", text
        values = found.setdefault((tree, name), {}).setdefault(time, set())
        values.add(value)
    return {
        series: {
            time: min((v for v in values if v is not None), default=None)
            for time, values in times.items()
        }
        for series, times in found.items()
    }


def bins_of(name, times, every):
    """{bin: value}; a bin with readings that have no value is there with None."""
    groups = {}
    for time in sorted(times):
        groups.setdefault(time // every * every, []).append(times[time])
    return {bin_: bin_value(name, values) for bin_, values in groups.items()}


def bin_value(name, values):
    values = [value for value in values if value is not None]
    if not values:
        return None
    if name in STEPS or name.endswith("_text"):
        return values[-1]
    total = 0.0
    for value in values:
        total += value
    return total / len(values)


def cell(name, bins, time, *, every, fill, hold):
    """(value, flag) of a bin."""
    if time in bins:
        return (None, MISSING) if bins[time] is None else (bins[time], OBSERVED)
    reach = hold // every * every
    if fill == "none":
        return None, MISSING
    before = [t for t in range(time - every, time - reach - 1, -every) if t in bins]
    if not before or bins[before[0]] is None:
        return None, MISSING
    if fill == "hold" or name in STEPS or name.endswith("_text"):
        return bins[before[0]], HELD
    after = [t for t in range(time + every, before[0] + reach + 1, every) if t in bins]
    if not after or bins[after[0]] is None:
        return None, MISSING
    a, b = bins[before[0]], bins[after[0]]
    return a + (b - a) * ((time - before[0]) / (after[0] - before[0])), INTERPOLATED


def columns(found, level):
    used = {name for tree, name in found if kind(tree) == level}
    extra = sorted(used - set(TABLE[level]), key=natural)
    return TABLE[level] + extra


def natural(name):
    """As people count: cell_voltage_15 before cell_voltage_100."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], name


def convert(rows, *, every=5, fill="hold", hold=30, trim=False):
    """{path: [(time, {column: (value, flag)})]}: all files and what is in them."""
    found = readings(rows)
    binned = {series: bins_of(series[1], times, every) for series, times in found.items()}
    files = {}
    for tree in {tree for tree, _ in found}:
        own = {name: bins for (t, name), bins in binned.items() if t == tree}
        names = columns(found, kind(tree))
        touched = {time for bins in own.values() for time in bins}
        around = {t + step for t in touched for step in range(0, hold + every, every)}
        for hour in sorted({time // 3600 for time in around}):
            lines = []
            for time in range(hour * 3600, hour * 3600 + 3600, every):
                line = {
                    name: cell(name, own.get(name, {}), time, every=every, fill=fill, hold=hold)
                    for name in names
                }
                lines.append((time, line))
            filled = [any(flag != MISSING for _, flag in line.values()) for _, line in lines]
            if not any(filled) and not any(time // 3600 == hour for time in touched):
                continue
            if trim:
                lines = [line for line, is_filled in zip(lines, filled, strict=True) if is_filled]
            path = datetime.fromtimestamp(hour * 3600, UTC).strftime("%Y/%m/%d/%H.parquet")
            files[f"{tree}/{path}"] = lines
    return files
