"""Identities decide as a dict of all readings would, with few of them in memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.telemetry.counts import HOUR_US
from kvstore.telemetry.records import Fate
from kvstore.telemetry.sinks.identities import Identities, Stored, Window, digests_of

PINNED = 0x9B367068097DBBB3
READINGS = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.sampled_from([-HOUR_US, -1, 0, 1, HOUR_US - 1, HOUR_US, HOUR_US + 1, 90 * HOUR_US]),
        st.integers(1, 3),
    ),
    max_size=8,
)


class Sink:
    """All that was stored, as a sink would give it back."""

    def __init__(self):
        self.rows = {}
        self.loads = []

    def load(self, start_us, stop_us):
        self.loads.append((start_us, stop_us))
        for part in (0, 1):  # in two batches, neither of them in order
            mine = [
                (device, ts_us, digest)
                for (device, ts_us), digest in reversed(self.rows.items())
                if start_us <= ts_us < stop_us and device % 2 == part
            ]
            if mine:
                yield Stored(*(np.array(c, t) for c, t in zip(zip(*mine, strict=True),
                             (np.int32, np.int64, np.uint64), strict=True)))  # fmt: skip


def columns(readings):
    device, ts_us, digest = zip(*readings, strict=True) if readings else ((), (), ())
    return np.array(device, np.int64), np.array(ts_us, np.int64), np.array(digest, np.uint64)


@given(st.lists(READINGS, max_size=10), st.sampled_from([0, 3, 1000]), st.data())
@settings(deadline=None)
def test_they_decide_as_a_dict_does(commits, rows_max, data):
    sink = Sink()
    identities = Identities(sink.load, rows_max)
    for readings in commits:
        fates, new = identities.decide(*columns(readings))
        wanted, after = [], dict(sink.rows)
        for device, ts_us, digest in readings:
            if (device, ts_us) not in after:
                after[device, ts_us] = digest
                wanted.append(Fate.STORED)
            else:
                same = after[device, ts_us] == digest
                wanted.append(Fate.DUPLICATE if same else Fate.CONFLICT)
        assert fates.tolist() == wanted
        if data.draw(st.booleans()):
            sink.rows = after
            identities.add(new)
        else:
            identities = Identities(sink.load, rows_max)  # the commit failed: all is loaded anew


def test_windows_in_memory_are_bounded_and_loaded_again():
    sink = Sink()
    identities = Identities(sink.load, rows_max=10)
    for hour in range(20):
        readings = [(0, hour * HOUR_US + n, 1) for n in range(5)]
        _, new = identities.decide(*columns(readings))
        sink.rows |= {(d, t): v for d, t, v in readings}
        identities.add(new)
        assert sum(map(len, identities._windows.values())) <= 10
    sink.loads.clear()
    fates, _ = identities.decide(*columns([(0, 3 * HOUR_US, 1), (0, 3 * HOUR_US + 9, 1)]))
    assert fates.tolist() == [Fate.DUPLICATE, Fate.STORED]
    assert sink.loads == [(3 * HOUR_US, 4 * HOUR_US)]


def test_neighbouring_hours_are_one_read():
    sink = Sink()
    identities = Identities(sink.load)
    identities.decide(*columns([(0, hour * HOUR_US, 1) for hour in (7, 5, 6, 9)]))
    assert sink.loads == [(5 * HOUR_US, 8 * HOUR_US), (9 * HOUR_US, 10 * HOUR_US)]


def test_runs_of_a_window_are_few():
    window = Window()
    for number in range(1000):
        window.add(np.array([number], np.uint64), np.array([number], np.uint64))
    assert len(window) == 1000
    assert len(window.runs) <= 10
    found, digests = window.find(np.array([0, 500, 999, 1000], np.uint64))
    assert found.tolist() == [True, True, True, False]
    assert digests.tolist() == [0, 500, 999, 0]


# ---- digests ----


def digest(extras=None, **values):
    made = {
        name: np.array([value], np.float64) if isinstance(value, float) else [value]
        for name, value in values.items()
    }
    return int(digests_of(made, [extras])[0])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1.0}, {"a": 1.0000000000000002}),
        ({"a": 1.0}, {"b": 1.0}),
        ({"a": 1.0, "b": 2.0}, {"a": 2.0, "b": 1.0}),
        ({"a": "x"}, {"b": "x"}),
        ({"a": "x"}, {"a": "X"}),
        ({"a": ""}, {}),
        ({"a": 0.0}, {}),
        ({"a": "x"}, {"extras": "x"}),
        ({"a": "1"}, {"a": 1.0}),
    ],
)
def test_what_differs_has_another_digest(one, other):
    assert digest(**one) != digest(**other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 0.0}, {"a": -0.0}),
        ({"a": 1.0}, {"a": 1.0, "b": float("nan"), "c": None}),
        ({"a": 1.0, "b": "x"}, {"b": "x", "a": 1.0}),
    ],
)
def test_what_is_equal_has_the_same_digest(one, other):
    assert digest(**one) == digest(**other)


def test_digests_never_change():
    """They are stored: another version of kvstore has to find the same."""
    assert digest(extras='{"a":1}', temperature=21.4, firmware_version="v1.2.0") == PINNED
    assert digest() == 0
