"""The comparison is fair in what can be checked: every store gives back, bit for bit, what it got."""

from __future__ import annotations

import numpy as np
import pytest

from bench.compare import packets, peer
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
