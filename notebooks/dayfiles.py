# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Day files: from raw exports to a 5-second grid, and what they show
#
# The whole way of `python solution.py --input data/ --output output/`: raw exports in the long
# layout go in; one Parquet file per hour, phase and module comes out, on a regular grid of 5 s.
#
# The notebook makes its own data, two days of a plant with three modules of one phase. To use
# yours, set `DAYFILES_INPUT` to a folder of exports before you start it:
#
# ```bash
# pip install 'kvstore[dayfiles]' notebook
# DAYFILES_INPUT=/path/to/data jupyter notebook notebooks/dayfiles.ipynb
# ```
#
# All times are UTC.

# %%
import os
import tempfile
from pathlib import Path

import matplotlib_inline.backend_inline
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from kvstore import dayplots
from kvstore.dayfiles import etl, summary
from kvstore.dayfiles.grid import Settings

matplotlib_inline.backend_inline.set_matplotlib_formats("png", dpi=60)

WORK = Path(tempfile.mkdtemp(prefix="dayfiles-"))
INPUT = Path(os.environ.get("DAYFILES_INPUT", WORK / "data"))
OUTPUT = WORK / "output"

# %% [markdown]
# ## 1. Raw data
#
# An export is a table of readings: epoch seconds, the name of the measure, the value *as text*,
# and tags that say whose it is. Rows come in bursts of a few seconds with silence between them,
# unsorted, and most of them more than once, within a file and across files. What is made here
# does all of that.

# %%
SCHEMA = pa.schema(
    [
        ("timestamp", pa.int64()),
        ("payload_type", pa.string()),
        ("value", pa.string()),
        ("tags", pa.list_(pa.list_(pa.string()))),
    ]
)
DAYS, CELLS, MODULES = 2, 14, 3
BEGIN = 1722124800  # 2024-07-28
rng = np.random.default_rng(1)


def bursts():
    """Seconds in which there are readings: 2 to 4, then silence; now and then a long gap."""
    time, found = BEGIN, []
    while time < BEGIN + DAYS * 86400 - 60:
        length = int(rng.integers(2, 5))
        found += range(time, time + length)
        pause = rng.integers(600, 2400) if rng.random() < 0.003 else rng.integers(9, 31)
        time += length + int(pause)
    return np.array(found)


def made_up(module):
    """(second, measure, value, tags) of one module: two cycles a day, cells that drift apart."""
    seconds = bursts()
    phase = 2 * np.pi * (seconds - BEGIN) / 43200 + 0.2 * module
    current = np.where(np.abs(np.sin(phase)) > 0.25, -28 * np.sin(phase), 0.0)
    charge = 0.5 + 0.35 * np.cos(phase) + 0.02 * module
    cell = 3.45 + 0.6 * charge + 0.0012 * current
    warm = 22 + 0.006 * current**2 + 2 * np.sin(phase / 2) + module
    tags = [["phase", "1"], ["module", str(module)], ["message_source", "master"]]
    battery = [*tags, ["battery", "1"]]
    for k in np.flatnonzero(rng.random(len(seconds)) < 0.5):
        yield seconds[k], "module_voltage", CELLS * cell[k] + rng.normal(0, 0.05), tags
        yield seconds[k], "module_current", current[k] * rng.normal(1, 0.04), tags
        yield seconds[k], "module_state_of_charge", charge[k] + rng.normal(0, 0.004), tags
        yield seconds[k], "module_temperature", warm[k], tags
        yield seconds[k], "battery_voltage", CELLS * cell[k] - 0.4, battery
        yield seconds[k], "battery_sensor_temperature", warm[k] + 1.5, [*battery, ["sensor", "1"]]
    for k in np.flatnonzero(rng.random(len(seconds)) < 0.04):
        for number in range(1, CELLS + 1):
            drift = 0.004 * ((number * 5 + module) % 7 - 3) * (1 + abs(current[k]) / 15)
            value = cell[k] + drift + rng.normal(0, 0.002)
            yield seconds[k], "cell_voltage", value, [*battery, ["cell", str(number)]]


def export(rows, folder, files=24):
    """Rows to files, as the plant's exporter does it: three copies of each, in disorder."""
    columns = [*zip(*rows, strict=True)]
    values = [f"{value:.4f}" for value in columns[2]]
    table = pa.Table.from_arrays(
        [
            pa.array(column, kind)
            for column, kind in zip([*columns[:2], values, columns[3]], SCHEMA.types, strict=True)
        ],
        schema=SCHEMA,
    )
    order = rng.permutation(np.repeat(np.arange(len(table)), 3))
    hour = np.array(columns[0])[order] // 3600
    order = order[np.argsort(hour, kind="stable")]  # in disorder within an hour
    for number, part in enumerate(np.array_split(order, files)):
        day = pd.Timestamp(columns[0][part[0]], unit="s")
        place = folder / f"{day:%Y/%m/%d}"
        place.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.take(part), place / f"telemetry-export-{number:03d}.parquet")


if "DAYFILES_INPUT" not in os.environ:
    export([row for module in range(1, MODULES + 1) for row in made_up(module)], INPUT)

exports = sorted(INPUT.rglob("*.parquet"))
print(f"{len(exports)} exports, {sum(pq.read_metadata(p).num_rows for p in exports):,} rows")
pd.read_parquet(exports[0]).head()

# %% [markdown]
# ## 2. Extract, transform, load
#
# One call, the same as the command line's. Exact duplicates go, each measure becomes a column of
# its module's file, a bin of 5 s is the mean of its readings (texts and states: the last), and a
# value stands for at most 30 s where none follows; after that the bin is null. With flags, each
# column says of each bin whether it was observed (0), held (1), or is missing (9).

# %%
with tqdm(desc="rows", unit=" rows", unit_scale=True) as bar:

    def show(progress):
        bar.total = progress.rows_total
        bar.update(progress.rows - bar.n)

    outcome = etl.convert(INPUT, OUTPUT, Settings(with_flags=True), progress=show)
told = summary.summary(outcome)
print(
    f"{told['rows']:,} rows, {told['duplicates']:,} of them duplicates, "
    f"{told['conflicts']:,} conflicts; {told['hours']} hour files of {told['days']} days"
)
pd.DataFrame(told["measures"]).T[
    ["readings", "observed_share", "held_share", "missing_share", "longest_gap_s", "out_of_range"]
]

# %% [markdown]
# Running it again makes nothing: a manifest beside the files remembers what went into each day.

# %%
again = summary.summary(etl.convert(INPUT, OUTPUT, Settings(with_flags=True)))
print("made again:", again["run"]["days_made"], "written:", again["run"]["hours_written"])

# %% [markdown]
# ## 3. What a file holds
#
# `{phase}_{module}/{year}/{month}/{day}/{hour}.parquet`; 720 rows always, all of them on the grid.

# %%
module = next(tree for tree in dayplots.trees(OUTPUT) if "_" in tree)
day = dayplots.days_of(OUTPUT, module)[0]
hours = sorted((OUTPUT / module / f"{day:%Y/%m/%d}").glob("*.parquet"))
frame = pd.read_parquet(hours[0], partitioning=None)
assert len(frame) == 720
assert (frame["timestamp"].diff().dropna() == pd.Timedelta("5s")).all()
print(hours[0].relative_to(OUTPUT))
frame.iloc[:8, :7]

# %% [markdown]
# ## 4. Pictures
#
# Bins with readings are dark, held ones pale; gaps stay open. The same figures as files:
# `kvstore dayfiles plot output/ --phase 1 --module 1 --date 2024-07-28 -o plots/`.
#
# ### Each measure of a module over a day


# %%
def show_figure(name):
    """One figure of the module's day."""
    ((_, figure),) = dayplots.figures(OUTPUT, module, day, [name])
    return figure


show_figure("measures")

# %% [markdown]
# ### The modules of a phase beside each other

# %%
show_figure("phase")

# %% [markdown]
# ### Cells: least, median and greatest, and each one's deviation from its module's median
#
# Cells that stand out over the whole day are out of balance; those that do so under current only
# have a higher resistance.

# %%
show_figure("cells")

# %% [markdown]
# ### Spread of the cells against current

# %%
show_figure("spread-current")

# %% [markdown]
# ### State of charge against current

# %%
show_figure("charge-current")

# %% [markdown]
# ### Temperatures

# %%
show_figure("temperatures")

# %% [markdown]
# ### Coverage: which hours of which module have readings

# %%
show_figure("coverage")

# %% [markdown]
# ### Energy and charge of each day
#
# Sums over the bins of which voltage and current are both known; what lies in a gap is left out,
# so the lowest panel belongs to the upper ones.

# %%
show_figure("energy")
