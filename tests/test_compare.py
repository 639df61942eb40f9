"""The comparison is fair in what can be checked: each store gives back exactly what it got."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bench import __main__ as cli
from bench.compare import child, packets, peer, run, table
from bench.workload import Workload

FIELDS = tuple(packets.FIELDS)
SIZE_BYTES = 40_000_000  # more than one commit


@pytest.fixture(scope="module")
def work():
    return Workload.of("counts", SIZE_BYTES, 1)


@pytest.fixture(scope="module")
def rows(work):
    return _joined(work.batches, FIELDS)


def _joined(batches, fields):
    batches = list(batches)
    assert all(list(batch) == list(fields) for batch in batches)
    assert all(array.flags.c_contiguous for batch in batches for array in batch.values())
    return {name: np.concatenate([batch[name] for batch in batches]) for name in fields}


def _same(found, expected):
    for name, array in found.items():
        assert array.dtype == expected[name].dtype
        np.testing.assert_array_equal(array, expected[name])


# ArcticDB builds its frames by a constructor that pandas is about to take away.
@pytest.mark.filterwarnings("ignore:Passing a BlockManager:DeprecationWarning")
@pytest.mark.parametrize("name", peer.ALL)
def test_every_store_gives_back_exactly_what_it_got(name, work, rows, tmp_path):
    store = peer.peer(name)
    if missing := peer.missing(store):
        pytest.skip(f"not installed: {', '.join(missing)}")
    path = tmp_path / "store"
    store.write(path, work.batches)
    assert peer.size_bytes(path) > 0
    _same(_joined(store.read(path, -peer.EVER, peer.EVER, FIELDS), FIELDS), rows)
    _same(_joined(store.read(path, -peer.EVER, peer.EVER, ["spectral"]), ["spectral"]), rows)
    times = np.unique(rows["timestamps"])
    start, stop = float(times[len(times) // 3]), float(times[len(times) // 2])
    inside = (rows["timestamps"] >= start) & (rows["timestamps"] <= stop)
    expected = {name: array[inside] for name, array in rows.items()}
    _same(_joined(store.read(path, start, stop, FIELDS), FIELDS), expected)
    _same(_joined(store.read(path, start, stop, ["spectral"]), ["spectral"]), expected)


# ArcticDB, as above.
@pytest.mark.filterwarnings("ignore:Passing a BlockManager:DeprecationWarning")
@pytest.mark.parametrize("name", peer.ALL)
def test_a_range_without_rows_is_empty(name, work, tmp_path):
    store = peer.peer(name)
    if missing := peer.missing(store):
        pytest.skip(f"not installed: {', '.join(missing)}")
    store.write(tmp_path / name, work.batches[:2])
    end = float(work.batches[1]["timestamps"][-1])
    for start, stop in ((end + 1, end + 2), (end - 1e-6, end - 5e-7), (0.0, 1.0)):
        found = store.read(tmp_path / name, start, stop, FIELDS)
        assert sum(len(batch["timestamps"]) for batch in found) == 0


def test_the_packets_come_back_from_their_file(work, tmp_path):
    packets.save(tmp_path / "packets", work)
    for found, batch in zip(packets.load(tmp_path / "packets"), work.batches, strict=True):
        _same(found, batch)


def test_blocks_have_as_many_rows_as_asked_for(work, rows):
    found = list(packets.blocks(work.batches, 700))
    assert {len(block["timestamps"]) for block in found[:-1]} == {700}
    _same(_joined(found, FIELDS), rows)


def _in_process(act, name, store, source):
    return child.ACTS[act](peer.peer(name), store, source), 1.0


@pytest.fixture
def in_process(monkeypatch, tmp_path):
    """Small acts without processes and without settling the machine; the folder to work in."""
    monkeypatch.setattr(run, "_child", _in_process)
    monkeypatch.setattr(run, "_live", lambda *_: {"live_rows_s": 1.0, "live_write_s": 1.0})
    monkeypatch.setattr(run, "settle", lambda _: None)
    monkeypatch.setattr(run, "TINY_BYTES", 2_000_000)
    monkeypatch.setattr(child, "RANGES", 1)
    monkeypatch.setattr(child, "FIRST_ROWS", 1)
    folder = tmp_path / "disk"
    folder.mkdir()
    return folder


# ArcticDB, as above.
@pytest.mark.filterwarnings("ignore:Passing a BlockManager:DeprecationWarning")
@pytest.mark.slow
def test_the_whole_comparison_runs(in_process, tmp_path, capsys):
    path = tmp_path / "found.json"
    assert cli.main(["compare", "--tiny", "--dir", str(in_process), "--json", str(path)]) == 0
    assert list(in_process.iterdir()) == []
    assert "<svg" in path.with_suffix(".svg").read_text()
    found = json.loads(path.read_text())
    assert list(found["profiles"]) == ["uniform", "counts"]
    shown = capsys.readouterr().out
    absent = sum(bool(peer.missing(peer.peer(name))) for name in peer.PEERS)
    for rows in found["profiles"].values():
        assert len(rows) == 2 + len(peer.PEERS)
        assert not any(row["failed"] for row in rows), rows
        assert sum(row["reason"].startswith("not installed") for row in rows) == absent
        assert all(row["name"] in shown for row in rows)


@pytest.mark.slow
def test_one_store_measured_in_real_processes(work, tmp_path):
    packets.save(tmp_path / "packets", work)
    found = run.measured("naive", tmp_path / "packets")
    columns = (*table.COLUMNS, *table.BY_CPU.values())
    assert set(found) == {column.key for column in columns}
    assert all(value > 0 for key, value in found.items() if key != "live")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packets", "packets.json"]


def test_a_peer_that_is_missing_or_fails_has_a_row_that_says_so(in_process, tmp_path, monkeypatch):
    monkeypatch.setattr(peer.peer("naive"), "PACKAGES", ("no_such_package",))
    sqlite = peer.peer("sqlite")
    whole = sqlite.read

    def short(*asked):
        for batch in whole(*asked):
            yield {field: array[:-1] for field, array in batch.items()}

    monkeypatch.setattr(sqlite, "read", short)
    path = tmp_path / "found.json"
    options = ["--tiny", "--peers", "naive", "sqlite", "--profiles", "counts", "--json", str(path)]
    assert run.main([*options, "--dir", str(in_process)]) == 1
    reasons = [row["reason"] for row in json.loads(path.read_text())["profiles"]["counts"]]
    assert reasons[:2] == ["", ""]
    assert reasons[2] == "not installed: no_such_package"
    assert reasons[3].startswith("BenchError: read ")


def test_lost_rows_stay_and_stand_out():
    ours = table.Row("kvstore", compresses=True, durability="each")
    ours.values = {"write": [1.0], "first": [2.0]}
    other = table.Row("other", compresses=True, durability="none")
    other.values = {"write": [2.0, 8.0, 1.0], "first": [4.0]}
    other.ours = {"write": [1.0, 2.0, 1.0], "first": [2.0]}
    limit = table.Row("limit", compresses=False, durability="each")
    shown = table.markdown("counts", [limit, ours, other])
    assert "**2 (0.5x)**" in shown
    assert " 4 (2x) " in shown
    assert "write GB/s, against each that compresses: 0.50 (other), target 1.5: **missed**" in shown
    assert "first row ms, against each that compresses: 2.00 (other), target 1.5: met" in shown
