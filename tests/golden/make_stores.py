"""Makes the golden stores and what is expected of them: python tests/golden/make_stores.py FOLDER.

Ids and clocks are fixed, so that making them again gives the same records (and, with the same
releases of LMDB, numcodecs and lz4, the same bytes). Beside each store stands NAME.json with
the rows that went in, sorted here, never read back. Make them again only for a new format
version: the old ones are what today's kvstore must go on reading.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import kvstore
from kvstore import Field, Schema, Store

SEGMENT_BYTES = 64 << 10  # the least that kvstore accepts
DIGEST_VALUES_MIN = 2000  # longer columns are expected by their SHA-256
START_NS = 1_771_342_356_000_000_000  # 2026-02-17T15:32:36
YEAR_NS = 31_556_952 * 10**9

Rows = dict[str, Any]


class Maker:
    """A store being made, and the rows it should hold."""

    def __init__(self, store: Store, tick: Callable[[], None]):
        self.store = store
        self.expected: dict[str, dict[str, Any]] = {}
        self.marks: dict[str, Any] = {}
        self._arrived: dict[str, list[tuple[Any, ...]]] = {}
        self._tick = tick

    def define(self, name: str, *fields: Field, time: str) -> None:
        self.store.stream(name, Schema(fields, time))
        records = [field.to_record() for field in fields]
        self.expected[name] = {"time": time, "fields": records}
        self._arrived[name] = []

    def extend(self, name: str, *fields: Field) -> None:
        self.store[name].add_fields(*fields)
        self.expected[name]["fields"] += [field.to_record() for field in fields]
        filled = tuple(plain(field.filled(1))[0] for field in fields)
        self._arrived[name] = [row + filled for row in self._arrived[name]]

    def append(self, name: str, rows: Rows, **filled: Any) -> None:
        """filled: what rows stored without the newest fields must read as."""
        self.store.stream(name).append(rows)
        count = len(rows[self.expected[name]["time"]])
        fills = [[value] * count for value in filled.values()]
        columns = [plain(rows[key]) for key in rows] + fills
        assert [*rows, *filled] == [field[0] for field in self.expected[name]["fields"]]
        self._arrived[name] += zip(*columns, strict=True)

    def commit(self, **marks: Any) -> None:
        self._tick()
        self.store.flush(marks=marks)
        self.marks |= marks

    def keep(self, name: str, is_kept: Callable[[tuple[Any, ...]], bool]) -> None:
        """Expect only these rows: the others were dropped."""
        self._arrived[name] = [row for row in self._arrived[name] if is_kept(row)]

    def finish(self, segments: int) -> dict[str, Any]:
        for name, about in self.expected.items():
            names = [field[0] for field in about["fields"]]
            time = names.index(about["time"])
            rows = sorted(self._arrived[name], key=lambda row: row[time])  # stable: by arrival
            about["rows"] = {key: digested([row[n] for row in rows]) for n, key in enumerate(names)}
        return {"segments": segments, "marks": self.marks, "streams": self.expected}


def plain(values: Any) -> list[Any]:
    """An array as the independent reader gives it: counts for times, pairs for complex."""
    array = np.asarray(values)
    if array.dtype.kind in "mM":
        array = array.view("i8")
    if array.dtype.kind == "c":
        array = np.stack([array.real, array.imag], -1)
    as_list: list[Any] = array.tolist()
    return as_list


def digested(column: list[Any]) -> Any:
    """The column itself, or the SHA-256 of its JSON where that would fill the repository."""
    text = as_json(column)
    if text.count(",") < DIGEST_VALUES_MIN:
        return column
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def make_empty(maker: Maker) -> None:
    """Created and closed: no stream, no commit."""


def make_rolled(maker: Maker) -> None:
    """Float times, arrays, marks; three segments; late and equal times; a stream that ends."""
    rng = random.Random(1)
    maker.define(
        "particles",
        Field("timestamps", "f8", unit="s"),
        Field("scattering", "i4", (6, 4), unit="counts", description="side x channel"),
        Field("spectral", "i4", (3,)),
        time="timestamps",
    )
    maker.define("setup", Field("time", "i8"), Field("gain", "f4"), time="time")
    maker.append("setup", {"time": np.array([START_NS]), "gain": np.array([1.5], "f4")})
    for commit in range(5):  # two fill a segment
        late_s = 1.55 if commit in (2, 4) else 0.0
        start = 1771342357.080619 + 0.7 * commit - late_s
        early = [start, start, start + 0.1, start + 0.30000001, np.nextafter(start, 2e9)]
        times = np.array([*early, *(start + n / 30 for n in range(30))])
        count = len(times)
        noise = [rng.randrange(-(2**31), 2**31) for _ in range(24 * count)]
        counts = [rng.randrange(90, 110) for _ in range(3 * count)]
        rows = {
            "timestamps": times,
            "scattering": np.array(noise, "i4").reshape(count, 6, 4),
            "spectral": np.array(counts, "i4").reshape(count, 3),
        }
        maker.append("particles", rows)
        maker.commit(input=4096 * (commit + 1))
    maker.commit(source={"device": "counter-7", "parts": [1, 2.5, None, True]}, raw=b"\x00\xff")


def make_typed(maker: Maker) -> None:
    """Every dtype, int64 and datetime64 times, text, span classes 0 to 64, added fields."""
    make_events(maker)
    make_kinds(maker)
    make_wide(maker)
    make_edges(maker)
    make_slow(maker)
    maker.commit()


def make_events(maker: Maker) -> None:
    rng = random.Random(2)
    maker.define(
        "events",
        Field("time", "i8", unit="ns"),
        Field("message", "text"),
        Field("tags", "text", (2,)),
        time="time",
    )

    def rows(*times_ns: int) -> Rows:
        words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randrange(12))) for _ in times_ns]
        tags = [["ä€😀", None], ["", "nul\0 \udc80"]]
        return {
            "time": np.array(times_ns),
            "message": np.array(words, object),
            "tags": np.array([tags[n % 2] for n in range(len(times_ns))], object),
        }

    maker.append("events", rows(START_NS, START_NS + 1, START_NS + 1, START_NS + 9 * 10**8))
    maker.commit(input=1)
    maker.append("events", rows(START_NS - 5 * YEAR_NS, START_NS + 5, START_NS + 3 * YEAR_NS))
    maker.commit()
    maker.append("events", rows(-1, -YEAR_NS, -(2**63) + 1, 2**63 - 1))
    maker.commit()
    maker.append("events", rows(START_NS + 1))
    maker.commit(input=4)
    added = {"temperature": np.nan, "code": -1, "seen": -(2**63), "at": 4102531200, "note": None}
    maker.extend(
        "events",
        Field("temperature", "f4", unit="K"),
        Field("code", "i2", fill=-1),
        Field("seen", "M8[us]"),
        Field("at", "M8[s]", fill=np.datetime64("2100-01-02", "s")),
        Field("note", "text"),
    )
    count = 120
    many = rows(*(START_NS + n * 250_000_000 for n in range(count)))
    new = {
        "temperature": np.linspace(270, 300, count).astype("f4"),
        "code": np.arange(count, dtype="i2"),
        "seen": np.arange(count).astype("M8[us]"),
        "at": np.full(count, "NaT", "M8[s]"),
        "note": np.array([f"n{n}" if n % 3 else None for n in range(count)], object),
    }
    maker.append("events", many | new)
    maker.commit()
    maker.append("events", rows(START_NS + 2), **added)
    maker.commit()


def make_kinds(maker: Maker) -> None:
    """One field of each kind; the same again in so many rows that Blosc compresses them."""
    integers = ["?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"]
    kinds = [*integers, "f2", "f4", "f8", "c8", "c16", "M8[D]", "m8[us]"]
    fields = [Field(f"of_{kind}", kind) for kind in kinds]
    none, grid = Field("none", "i4", (0, 2)), Field("grid", "f4", (2, 2))
    maker.define("kinds", *fields, none, grid, Field("time", "M8[ms]"), time="time")
    for count, offset_ms in ((3, -1), (100, START_NS // 10**6)):
        rows: Rows = {f.name: (np.arange(count) % 120).astype(f.np_dtype) for f in fields}
        rows["none"] = np.zeros((count, 0, 2), "i4")
        rows["grid"] = np.array([[[np.inf, -np.inf], [-0.0, 1.5]]] * count, "f4")
        rows["time"] = (np.arange(count) + offset_ms).astype("M8[ms]")
        maker.append("kinds", rows)
        maker.commit()


def make_wide(maker: Maker) -> None:
    """Blosc chunks of several blocks, the last one shorter."""
    widths = (1, 2, 4, 8)
    fields = [Field(f"ramp{width}", f"u{width}", (70_001,)) for width in widths]
    maker.define("wide", Field("time", "i8"), *fields, time="time")
    ramp = np.arange(2 * 70_001).reshape(2, -1)
    rows = {f"ramp{width}": (ramp % 251).astype(f"u{width}") for width in widths}
    maker.append("wide", {"time": np.array([0, 1]), **rows})
    maker.commit()


def make_edges(maker: Maker) -> None:
    """The largest block that stays in its index record, and the least that does not."""
    rng = random.Random(3)
    sizes = (255, 256)
    fields = [Field(f"noise{size}", "u1", (size,)) for size in sizes]
    maker.define("edges", *fields, Field("time", "f8"), time="time")
    rows = {f"noise{size}": np.frombuffer(rng.randbytes(size), "u1")[None] for size in sizes}
    maker.append("edges", {**rows, "time": np.array([-0.5])})
    maker.commit()


def make_slow(maker: Maker) -> None:
    maker.define("slow", Field("day", "M8[s]"), Field("mean", "f8"), time="day")
    days = np.array(["1969-12-31", "1900-01-01", "2200-02-28"], "M8[s]")
    for n in range(3):
        maker.append("slow", {"day": days[n : n + 1], "mean": np.array([n / 10])})
    maker.commit()


def make_operated(maker: Maker) -> None:
    """Settings, pins, gaps and dropped segments; what was dropped is not expected."""
    rng = random.Random(4)
    store = maker.store
    store.set(max_bytes=1 << 30, clock_step_s=None)
    maker.define("log", Field("time", "f8"), Field("noise", "u8", (20,)), time="time")
    assert store.pin(100.0, 130.0, "door opened") == 1
    store.unpin(store.pin(0.0, 1.0, "by mistake"))
    for number in range(30):
        values = [[rng.getrandbits(63) for _ in range(20)] for _ in range(40)]
        times = [10 * number + row / 4 for row in range(40)]
        maker.append("log", {"time": np.array(times), "noise": np.array(values, "u8")})
        maker.commit(number=number)
    store.note_gap("rejected", "log", start_ns=START_NS, stop_ns=START_NS + 5, rows=2, detail="x")
    store.note_gap("silence", "log", start_ns=300 * 10**9, stop_ns=310 * 10**9)
    store.drop(280.0)
    maker.commit(end=1)
    kept = {batch["time"][0] for batch in store["log"].read()}
    assert 0 < len(kept) < 30
    maker.keep("log", lambda row: 10.0 * (row[0] // 10) in kept)


def make_framed(maker: Maker) -> None:
    """Frames: several to a block, each of its own width; by bits, by bytes, and as they are."""
    with frames_of_bytes(512 << 10):
        make_widths(maker)
        make_long(maker)
        make_large_rows(maker)
    with frames_of_bytes(64 << 10):
        make_noise(maker)
        maker.commit()


@contextmanager
def frames_of_bytes(size: int) -> Iterator[None]:
    """How many rows make a frame is the writer's choice: these stores keep theirs."""

    def cuts(rows: int, row_bytes: int) -> list[int]:
        return list(range(0, rows, max(1, size // row_bytes)))

    with mock.patch("kvstore.codec.cuts", cuts):
        yield


def make_widths(maker: Maker) -> None:
    """Five frames of 1, 2, 4, 8 and 1 bytes for each number, by what stands in them."""
    signed, unsigned = Field("signed", "i8", (32,)), Field("unsigned", "u8", (32,))
    maker.define("widths", Field("time", "i8"), signed, unsigned, time="time")
    per_frame = (512 << 10) // (8 * 32)
    count = 4 * per_frame + 100
    frame = np.arange(count) // per_frame
    even = (np.arange(32) % 2 == 0)[None]
    lows = np.array([-128, -(2**15), -(2**31), -(2**63), 0])[frame, None]
    highs = np.array([127, 2**15 - 1, 2**31 - 1, 2**63 - 1, -1])[frame, None]
    tops = np.array([2**8 - 1, 2**16 - 1, 2**32 - 1, 2**64 - 1, 1], "u8")[frame, None]
    rows = {
        "time": START_NS + frame * 10**9,
        "signed": np.where(even, lows, highs),
        "unsigned": np.where(even, tops, tops // np.uint64(3)),
    }
    maker.append("widths", rows)


def make_long(maker: Maker) -> None:
    """A frame of 65,536 rows and one of three, too few for Blosc to compress."""
    rng = random.Random(5)
    fields = [
        Field("few", "i4"),
        Field("counts", "i8"),
        Field("levels", "u8"),
        Field("at", "M8[us]"),
        Field("took", "m8[s]"),
        Field("mean", "f8"),
    ]
    maker.define("long", Field("time", "f8"), *fields, time="time")
    count = (64 << 10) + 3
    n = np.arange(count)
    few = np.zeros((3, count), "i8")
    few[:, :6000] = [[rng.randrange(5) for _ in range(6000)] for _ in few]
    rows = {
        "time": n // 1000 * 0.5,
        "few": (few[0] - 2).astype("i4"),  # one frame, of no whole number of eights
        "counts": few[1] - 3,
        "levels": (few[2] + 65_000).astype("u8"),
        "at": np.where(n % 5000, n // 5000, -(2**63)).astype("M8[us]"),
        "took": -(n // 700).astype("m8[s]"),
        "mean": n // 64 / 8,
    }
    maker.append("long", rows)
    maker.commit()


def make_large_rows(maker: Maker) -> None:
    """Each row larger than a frame should be, and so a frame of its own."""
    fields = [Field("ramp", "u4", (140_001,)), Field("wave", "f4", (140_001,))]
    maker.define("large", Field("time", "M8[s]"), *fields, time="time")
    n = np.arange(140_001)
    rows = {
        "time": np.array([-1, 0, 7]).astype("M8[s]"),
        "ramp": np.stack([n % 251, n % 9 + 65_530, n % 5]).astype("u4"),
        "wave": np.stack([n % 50 / 4, n * 0.0, n * 0.0]).astype("f4"),
    }
    maker.append("large", rows)


def make_noise(maker: Maker) -> None:
    """Frames of a block that does not compress; a field of one, and one beside them of two."""
    rng = random.Random(6)
    fields = [Field("noise", "i8", (8,)), Field("steps", "i4", (16,)), Field("few", "i2")]
    maker.define("noise", Field("time", "f8"), *fields, time="time")
    rows = 2100
    values = [[rng.getrandbits(63) for _ in range(8)] for _ in range(rows)]
    n = np.arange(rows)
    steps = (n[:, None] // 300 * np.ones(16)).astype("i4")
    noise = {"time": n / 4, "noise": np.array(values), "steps": steps, "few": (n % 3).astype("i2")}
    maker.append("noise", noise)


STORES = {
    "empty": (make_empty, 1),
    "rolled": (make_rolled, 3),
    "typed": (make_typed, 1),
    "operated": (make_operated, 0),
    "typed2": (make_typed, 1),  # from here on of format version 2
    "framed": (make_framed, 2),
}


@contextmanager
def fixed_clock(store_number: int) -> Iterator[Callable[[], None]]:
    """A clock that stands still until ``tick``, and one id."""
    now = START_NS

    def tick() -> None:
        nonlocal now
        now += 1_000_000_007

    with (
        mock.patch("time.time_ns", side_effect=lambda: now),
        mock.patch("time.clock_gettime_ns", side_effect=lambda _: now),
        mock.patch("uuid.uuid4", return_value=uuid.UUID(int=(0xC0FFEE << 96) + store_number)),
    ):
        yield tick


def make_store(name: str, folder: Path) -> Path:
    """Make one store in FOLDER/NAME and what is expected of it in FOLDER/NAME.json."""
    fill, segments = STORES[name]  # 0: many, however many
    path = folder / name
    shutil.rmtree(path, ignore_errors=True)
    limit = 1 << 30 if segments == 1 else SEGMENT_BYTES
    with fixed_clock(list(STORES).index(name)) as tick:  # noqa: SIM117
        with kvstore.open(path, "w", flush_interval_s=None, segment_bytes=limit) as store:
            maker = Maker(store, tick)
            fill(maker)
    for lock in [path / "writer.lock", path / "reserve", *path.glob("segments/*-lock")]:
        lock.unlink()  # a store at rest needs none
    expected = maker.finish(len(list(path.glob("segments/*.mdb"))))
    (folder / f"{name}.json").write_text(as_json(expected) + "\n", encoding="utf-8")
    return path


def as_json(found: Any) -> str:
    """The form in which expected and found values are compared: floats exact, NaN like NaN."""
    return json.dumps(
        found, sort_keys=True, separators=(",", ":"), default=lambda raw: f"bytes:{raw.hex()}"
    )


if __name__ == "__main__":
    for each in STORES:
        print(make_store(each, Path(sys.argv[1])))
