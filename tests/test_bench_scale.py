"""The scale benches run tiny, and a wrong read fails them. Never: that anything is fast."""

from __future__ import annotations

import copy
import json
import math
import re

import numpy as np
import pytest

import kvstore
from bench import __main__ as cli
from bench.capture import STREAM
from bench.figure import BenchError, Figure, Setting
from bench.scale import (
    acts,
    cores,
    late,
    picture,
    readers,
    rows,
    run,
    scalars,
    small,
    streams,
    terabyte,
)
from bench.scale.worker import workers
from kvstore.stream import Stream

TINY_BYTES = 20_000_000
# The same code with other data or segments, or run by another test below.
AGAIN = {"terabyte-one", "terabyte-many", "readers-uniform", "cores-counts", "cores-uniform"}
MEASUREMENTS = [
    pytest.param(each, marks=[pytest.mark.slow] if each.name in AGAIN else [], id=each.name)
    for each in run.MEASUREMENTS
]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """What costs time at no size: places, streams, processes."""
    monkeypatch.setattr(terabyte, "PLACES", 3)
    monkeypatch.setattr(terabyte, "SHARES", (0.5, 1.0))
    monkeypatch.setattr(streams, "PLACES", 3)
    monkeypatch.setattr(streams, "STREAMS", 50)
    monkeypatch.setattr(late, "PLACES", 3)
    monkeypatch.setattr(late, "RANGES", 3)
    monkeypatch.setattr(late, "READING_SHARE_BYTES", 2000)
    monkeypatch.setattr(cores, "WORKERS_MAX", 2)
    monkeypatch.setattr(small, "CHUNK_ROWS", 5000)
    monkeypatch.setattr(rows, "_PART_BYTES_MIN", 4_000_000)
    for module in (small, readers):
        monkeypatch.setattr(module, "settle", lambda _: None)


@pytest.mark.slow
@pytest.mark.parametrize("measurement", MEASUREMENTS)
def test_every_measurement_gives_finite_figures(measurement, tmp_path):
    figures = measurement.run(Setting(tmp_path, TINY_BYTES, 1, 1))
    assert figures
    for figure in figures:
        numbers = [figure.value, figure.limit, figure.ratio, *figure.details.values()]
        assert all(math.isfinite(number) for number in numbers), figure
        assert figure.value > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_command_writes_json_and_draws_curves(tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    monkeypatch.setattr(run, "TINY_BYTES", TINY_BYTES)
    report = tmp_path / "scale.json"
    arguments = ["scale", "cores-counts", "--tiny", "--dir", str(disk), "--json", str(report)]
    assert cli.main(arguments) == 0
    record = json.loads(report.read_text())
    names = [figure["name"] for figure in record["figures"]]
    assert names == [f"cores-counts-{kind}-{n}" for kind in cores.KINDS for n in (1, 2)]
    assert {"cpu", "libraries", "commit"} <= set(record["host"])
    drawn = report.with_suffix(".svg").read_text()
    assert "<svg" in drawn
    assert list(disk.iterdir()) == []


def test_without_curves_nothing_is_drawn(tmp_path):
    figure = Figure(name="f", unit="s", limit_name="l", values=[1.0], limits=[1.0])
    assert not picture.draw([figure], tmp_path / "none.svg")
    assert list(tmp_path.iterdir()) == []


def written(path, count=2000):
    with kvstore.open(path, mode="w") as store:
        for batch in rows.Numbered().batches(0, count):
            store.stream(STREAM).append(batch)
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda batch: batch["timestamps"].__setitem__(1, 0.0), "rows from"),
        (lambda batch: batch["scattering"].__setitem__((1, 0, 0), -1), "rows from"),
        (lambda batch: batch["spectral"].__setitem__((1, 0, 0), -1), "rows from"),
        (lambda batch: batch["scattering"].__setitem__((2, 63, 15), -1), "scattering: wrong"),
        (lambda batch: batch["spectral"].__setitem__((2, 31, 15), -1), "spectral: wrong"),
    ],
)
def test_a_single_wrong_value_is_found(tmp_path, broken, said):
    with kvstore.open(written(tmp_path / "run.kv")) as store:
        batch = next(store[STREAM].read(ordered=True))  # else it comes in two pieces
    assert rows.check_all(batch, 0) == rows.BATCH_ROWS
    short = written(tmp_path / "short.kv", rows.BATCH_ROWS)
    rows.check_store(short, [batch])
    broken(batch)
    with pytest.raises(BenchError, match=said):
        rows.check_all(batch, 0)
    with pytest.raises(BenchError, match="rows from 0 on"):
        rows.check_store(short, [batch])


def wrong(monkeypatch, change):
    """Have every read give something else."""
    whole = Stream.read

    def read(*asked, **options):
        for number, batch in enumerate(whole(*asked, **options)):
            yield from change(number, batch)

    monkeypatch.setattr(Stream, "read", read)


def all_but_one(_, batch):
    return [{name: column[:-1] for name, column in batch.items()}]


def only_the_first(number, batch):
    return [batch] if number == 0 else []


def doubled(_, batch):
    return [batch, batch]


@pytest.mark.slow
@pytest.mark.parametrize("change", [all_but_one, only_the_first, doubled])
def test_right_reads_pass_and_wrong_ones_fail_every_bench(tmp_path, monkeypatch, change):
    store = written(tmp_path / "run.kv")
    many, single = str(tmp_path / "many.kv"), str(tmp_path / "single.kv")
    scalars.write_streams(many, 2, 200_000)
    scalars.write_streams(single, 1, 100_000)
    ended = tmp_path / "end"
    work = list(map(copy.deepcopy, rows.Numbered().batches(0, 2000)))
    feed = late.Feed([], rows.times(np.arange(2000)), lambda batch: batch["scattering"][:, 0, 0])
    of_one_batch = [
        lambda: acts.look(store, 2000, 1, 1, 1),
        lambda: late._row_ns(tmp_path / "run.kv", feed, 1, ordered=False),
    ]
    of_several = [
        lambda: acts.read_shares(store, 0, 2000, 2),
        lambda: acts.read_until(store, str(ended), 2000),
        lambda: acts.look_at_streams(many, 2, 200_000, 1, 1),
        lambda: small._check(single, 100_000),
        lambda: rows.check_store(tmp_path / "run.kv", work, ordered=True),
    ]
    monkeypatch.setattr(small, "STREAM", scalars.stream_name(0))
    ended.touch()  # else a reader would go on for ever
    for each in of_one_batch + of_several:
        each()
    ended.unlink()
    wrong(monkeypatch, change)
    for each in of_several if change is only_the_first else of_one_batch + of_several:
        with pytest.raises(BenchError):
            each()


def test_stores_that_lack_rows_or_have_more_fail(tmp_path):
    store = written(tmp_path / "run.kv")
    for each in (
        lambda: acts.look(store, 2001, 1, 1, 1),
        lambda: acts.read_shares(store, 0, 2001, 1),
        lambda: acts.read_until(store, str(tmp_path / "end"), 2001),
        lambda: rows.check_store(tmp_path / "run.kv", list(rows.Numbered().batches(0, 100))),
        lambda: rows.check_store(tmp_path / "run.kv", []),
    ):
        with pytest.raises(BenchError):
            each()


@pytest.mark.slow
def test_packets_that_were_stored_wrong_are_found(tmp_path):
    size = 50 * small.PARTICLE_BYTES
    with kvstore.open(tmp_path / "run.kv", mode="w") as store:
        for batch in small.batches_of("uniform", size, 1, particles=1):
            store.stream(STREAM).append(batch)
    small._check_packets(tmp_path / "run.kv", size, 1)
    with pytest.raises(BenchError, match="is not what was sent"):
        small._check_packets(tmp_path / "run.kv", size, 2)


def test_a_worker_that_fails_says_why(tmp_path):
    with workers(1) as (worker,):
        with pytest.raises(BenchError, match=re.escape("look: StoreNotFound")):
            worker.did("look", store=tmp_path / "no", rows=1, ranges=1, places=1, seed=1)
        assert worker.did("ready")["ended_s"] > 0
        worker.ask("no such act")
        with pytest.raises(BenchError, match="ended with 1: KeyError"):
            worker.answer()


def test_a_tenth_arrives_late_and_none_is_lost():
    batches = list(scalars.pieces(scalars.columns(20_000)))
    feed = late.Feed(batches, scalars.columns(20_000)["timestamps"], lambda batch: batch["number"])
    order = late._arrival(feed, late.random.Random(1))
    assert sorted(order) == list(range(2000))
    behind = [at for at, number in enumerate(order) if number < max(order[: at + 1])]
    assert 0.05 < len(behind) / len(order) < 0.15
