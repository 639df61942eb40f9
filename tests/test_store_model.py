"""The store against a simple model: a list of rows, filtered and sorted.

Rules append, flush, reopen, extend and read in any order; every row's values follow from its
number, so that a wrong, lost or doubled row shows wherever it is read.
"""

from __future__ import annotations

import gc
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from stores import check_store, scratch

import kvstore
from kvstore import Field, NoFillError, environment

TIME_DTYPES = {"float": np.dtype("f8"), "int": np.dtype("i8"), "date": np.dtype("M8[us]")}
TINY_SEGMENT = 64 << 10
ADDED = ("float", "filled", "text", "date", "bare")  # kinds of fields that are added later

# ---- times ----

CLOSE = [0.0, -1.5, 1.0, 1.0 + 1e-9, 1771342357.25, 1771342357.3, -3e9, 9.2e9]
floats = st.one_of(
    st.sampled_from(CLOSE),
    st.floats(-9e9, 9e9),
    st.floats(-3e-9, 3e-9),  # several to one ns
    st.integers(0, 50).map(lambda n: 1771342357.0 + n / 8),
)
integers = st.one_of(
    st.sampled_from([0, -1, 1, 10**18, 10**18 + 1, 2**63 - 1, -(2**63) + 1]),
    st.integers(-(2**63) + 1, 2**63 - 1),
    st.integers(10**18, 10**18 + 50),
)
micros = st.one_of(
    st.sampled_from([0, -1, 1, 1771342357250000]),
    st.integers(-9223372036854775, 9223372036854775),
    st.integers(1771342357250000, 1771342357250050),
)
PLAIN = {"float": floats, "int": integers, "date": micros}


def neighbours(kind, time):
    """The times just before, at and after."""
    if kind == "float":
        return [math.nextafter(time, -math.inf), time, math.nextafter(time, math.inf)]
    return [time - 1, time, time + 1]


def as_end(kind, plain):
    if plain is None or kind != "date":
        return plain
    return np.datetime64(max(plain, -(2**63) + 1), "us")


def as_plain(kind, times):
    return times.view(np.int64).tolist() if kind == "date" else times.tolist()


# ---- the model ----


def value_of(kind, number):
    """What row ``number`` holds in an added field of this kind."""
    return {
        "float": float(number),
        "filled": number,
        "text": f"row {number} \u00e9",
        "date": number,
        "bare": number,
    }[kind]


FILLS = {"float": None, "filled": -7, "text": None, "date": None}


def field_of(kind, name):
    dtype = {"float": "f8", "filled": "i8", "text": "text", "date": "M8[s]", "bare": "u4"}[kind]
    return Field(name, dtype, fill=-7) if kind == "filled" else Field(name, dtype)


class Modelled:
    """One stream: what was appended, as (time, number, count of added fields)."""

    def __init__(self, kind, width):
        self.kind = kind
        self.width = width
        self.added = []
        self.rows = []
        self.durable = 0

    def batch(self, times, numbers):
        numbers = np.array(numbers, np.int64)
        batch = {
            "timestamps": np.array(times, "i8").view(TIME_DTYPES["date"])
            if self.kind == "date"
            else np.array(times, TIME_DTYPES[self.kind]),
            "number": numbers,
            "wide": numbers[:, None].astype("i4") + np.arange(self.width, dtype="i4"),
        }
        for name, kind in self.added:
            values = [value_of(kind, number) for number in numbers.tolist()]
            dtype = field_of(kind, name).np_dtype
            batch[name] = np.array(values, object if kind == "text" else dtype)
        return batch

    def visible(self):
        return self.rows[: self.durable]

    def select(self, start, stop, *, open_end):
        return [
            row
            for row in self.visible()
            if (start is None or row[0] >= start)
            and (stop is None or (row[0] < stop if open_end else row[0] <= stop))
        ]


class StoreMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.scratch = scratch()
        self.path = self.scratch.__enter__() / "run.kv"
        self.marks = {}
        self.pending_marks = {}
        self.streams = {}
        self.next_number = 0
        self.store = None
        self.reader = None

    @initialize(segment_bytes=st.sampled_from([TINY_SEGMENT, 2 << 30]))
    def create(self, segment_bytes):
        self.open_writer(segment_bytes, None)
        for kind in TIME_DTYPES:
            self.streams[kind] = Modelled(kind, 3)
        self.streams["blob"] = Modelled("float", 1024)

    def open_writer(self, segment_bytes, interval_s):
        self.interval_s = interval_s
        self.store = kvstore.open(
            self.path, "w", segment_bytes=segment_bytes, flush_interval_s=interval_s
        )

    def durable(self):
        for stream in self.streams.values():
            stream.durable = len(stream.rows)
        self.marks |= self.pending_marks
        self.pending_marks = {}

    # ---- writing ----

    @rule(
        name=st.sampled_from([*TIME_DTYPES, "blob"]),
        data=st.data(),
        rows=st.one_of(st.integers(0, 5), st.sampled_from([0, 200, 1200])),
        copy=st.booleans(),
        marks=st.booleans(),
    )
    def append(self, name, data, rows, copy, marks):
        model = self.streams[name]
        some = data.draw(st.lists(PLAIN[model.kind], min_size=1, max_size=6))
        times = (some * rows)[:rows]
        self.put(name, times, copy=copy, marks={"at": self.next_number} if marks else None)

    @rule(name=st.sampled_from([*TIME_DTYPES]), data=st.data(), count=st.integers(1, 5))
    def append_single_rows(self, name, data, count):
        model = self.streams[name]
        for _ in range(count):
            batch = model.batch([data.draw(PLAIN[model.kind])], [self.next_number])
            row = {key: values[0] for key, values in batch.items()}
            if row["timestamps"].dtype.kind != "M":
                row["timestamps"] = row["timestamps"].item()
            self.store.stream(name).append(row)
            self.note(model, as_plain(model.kind, batch["timestamps"]))

    def put(self, name, times, *, copy, marks):
        model = self.streams[name]
        numbers = range(self.next_number, self.next_number + len(times))
        batch = model.batch(times, numbers)
        self.store.stream(name).append(batch, copy=copy, marks=marks)
        if copy:
            for array in batch.values():  # the caller may reuse its arrays at once
                array[...] = None if array.dtype == object else np.zeros((), array.dtype)
        self.pending_marks |= marks or {}
        self.note(model, times)

    def note(self, model, times):
        for time in times:
            model.rows.append((time, self.next_number, len(model.added)))
            self.next_number += 1

    @rule(kind=st.sampled_from(ADDED), name=st.sampled_from([*TIME_DTYPES, "blob"]))
    def add_field(self, kind, name):
        model = self.streams[name]
        if len(model.added) < 4 and model.rows:
            field = f"{kind}{len(model.added)}"
            self.store[name].add_fields(field_of(kind, field))
            model.added.append((field, kind))

    @rule(marks=st.dictionaries(st.sampled_from("abc"), st.integers(), max_size=2))
    def flush(self, marks):
        marks = {name: value % 2**63 for name, value in marks.items()}
        self.store.flush(marks)
        self.pending_marks |= marks
        self.durable()
        assert self.store.marks == self.marks

    @rule(
        segment_bytes=st.sampled_from([TINY_SEGMENT, 256 << 10, 2 << 30]),
        interval_s=st.sampled_from([None, None, 0.0, 0.1]),
    )
    def reopen(self, segment_bytes, interval_s):
        self.store.close()
        self.durable()
        self.open_writer(segment_bytes, interval_s)
        assert self.store.marks == self.marks

    @rule()
    def roll(self):
        """Rows enough for a few tiny segments."""
        for _ in range(3):
            self.put("blob", [float(self.next_number)] * 30, copy=True, marks=None)
            self.flush({})

    @rule()
    def open_reader(self):
        if self.reader is not None:
            self.reader.close()
        self.reader = kvstore.open(self.path)

    # ---- reading ----

    def readable(self, name, data):
        """The stream through one of the handles, once all that may be visible is durable."""
        if self.interval_s is not None:
            self.flush({})
        if not self.streams[name].durable:
            return None
        if self.reader is None or data.draw(st.booleans(), "through the writer"):
            return self.store[name]
        return self.reader[name]

    def draw_end(self, model, data):
        near = [
            end
            for time, _, _ in model.visible()[:3] + model.visible()[-3:]
            for end in neighbours(model.kind, time)
        ]
        rows = st.sampled_from(near)
        return data.draw(st.one_of(st.none(), rows, rows, PLAIN[model.kind]))

    @rule(
        name=st.sampled_from([*TIME_DTYPES, "blob"]),
        data=st.data(),
        inclusive=st.sampled_from(["both", "left"]),
        ordered=st.booleans(),
        verify=st.booleans(),
    )
    def read_range(self, name, data, inclusive, ordered, verify):
        stream, model = self.readable(name, data), self.streams[name]
        if stream is None:
            return
        start, stop = self.draw_end(model, data), self.draw_end(model, data)
        names = ["number", "timestamps", "wide", *(name for name, _ in model.added)]
        fields = data.draw(st.permutations(names).map(lambda every: every[: len(every) // 2 + 1]))
        unit = "ns" if model.kind == "int" else None
        ends = {"unit": unit, "inclusive": inclusive}
        expected = model.select(start, stop, open_end=inclusive == "left")
        start, stop = as_end(model.kind, start), as_end(model.kind, stop)
        assert stream.count(start, stop, **ends) == len(expected)
        ways = {"ordered": ordered, "verify": verify}
        wanted = [*fields, "number", "timestamps"]
        known = [field for field in wanted if field in stream.schema.names]
        reading = stream.read(start, stop, fields=known, **ways, **ends)
        if self.lacks_fill(model, known, expected):
            with pytest.raises(NoFillError):
                list(reading)
        else:
            check_rows(model, list(reading), expected, known, ordered=ordered)

    def lacks_fill(self, model, fields, expected):
        kinds = [kind for _, kind in model.added]
        first = kinds.index("bare") if "bare" in kinds else len(kinds)
        bare = {name for name, kind in model.added if kind == "bare"}
        numbered = {name: place for place, (name, _) in enumerate(model.added)}
        assert first <= len(kinds)
        return any(numbered[field] >= row[2] for field in bare & set(fields) for row in expected)

    @rule(name=st.sampled_from([*TIME_DTYPES, "blob"]), data=st.data())
    def look(self, name, data):
        stream, model = self.readable(name, data), self.streams[name]
        if stream is None:
            return
        rows = sorted(model.visible(), key=lambda row: row[:2])
        assert len(stream) == len(rows)
        assert as_plain(model.kind, np.array(stream.span())) == [rows[0][0], rows[-1][0]]
        if not any(kind == "bare" for _, kind in model.added):
            for row, found in ((rows[0], stream.first()), (rows[-1], stream.last())):
                check_rows(model, [found], [row], list(found), ordered=True)

    def teardown(self):
        try:
            if self.store is not None:
                self.check_all()
        finally:
            self.scratch.__exit__(None, None, None)

    def check_all(self):
        self.store.close()
        self.durable()
        for store in (self.reader, kvstore.open(self.path)):
            if store is None:
                continue
            for name, model in self.streams.items():
                if model.rows:
                    fields = ["timestamps", "number", "wide"]
                    found = list(store[name].read(fields=fields, ordered=True))
                    check_rows(model, found, model.rows, fields, ordered=True)
            assert store.marks == self.marks
            store.close()
        check_store(self.path)
        gc.collect()
        assert not [each for each in environment._opened.values() if self.path in each.path.parents]


def check_rows(model, batches, expected, fields, *, ordered):
    """The batches hold exactly the expected rows, in the order promised."""
    numbers = [number for batch in batches for number in batch["number"].tolist()]
    by_number = {row[1]: row for row in expected}
    assert sorted(numbers) == sorted(by_number)
    for batch in batches:
        assert list(batch) == list(dict.fromkeys(fields))
        within = [by_number[number][:2] for number in batch["number"].tolist()]
        assert within == sorted(within)
        assert len(within) > 0
        check_values(model, batch, [by_number[number] for number in batch["number"].tolist()])
    if ordered:
        assert numbers == [row[1] for row in sorted(expected, key=lambda row: row[:2])]


def check_values(model, batch, rows):
    numbers = batch["number"]
    if "timestamps" in batch:
        assert batch["timestamps"].dtype == TIME_DTYPES[model.kind]
        assert as_plain(model.kind, batch["timestamps"]) == [row[0] for row in rows]
    if "wide" in batch:
        steps = np.arange(model.width, dtype="i4")
        assert np.array_equal(batch["wide"], numbers[:, None].astype("i4") + steps)
    for place, (name, kind) in enumerate(model.added):
        if name in batch:
            values = [value_of(kind, row[1]) if row[2] > place else FILLS[kind] for row in rows]
            assert plain_values(kind, batch[name]) == values


def plain_values(kind, array):
    if kind == "date":
        missing = np.isnat(array)
        array = array.view("i8")
    elif kind == "float":
        missing = np.isnan(array)
    else:
        missing = np.zeros(len(array), bool)
    pairs = zip(missing, array.tolist(), strict=True)
    return [None if gone else value for gone, value in pairs]


COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck)}


def test_store_behaves_like_the_model():
    quick = settings(max_examples=25, stateful_step_count=25, **COMMON)
    run_state_machine_as_test(StoreMachine, settings=quick)


@pytest.mark.slow
def test_store_behaves_like_the_model_for_long():
    long = settings(max_examples=60, stateful_step_count=50, **COMMON)
    run_state_machine_as_test(StoreMachine, settings=long)
