"""Blocks: every array comes back bit for bit, damaged bytes never pass for data."""

from __future__ import annotations

import ctypes
import mmap
import struct
import tracemalloc
from itertools import accumulate, pairwise

import numpy as np
import pytest
from golden import independent_reader
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import DamageError, Field, codec, libc

NUMBERS = ["?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "c8", "c16"]
NUMBERS += ["M8[s]", "M8[ns]", "m8[us]"]
text = st.one_of(st.none(), st.text(st.characters(exclude_categories=())))  # lone surrogates too


def decoded(block, field, rows, **options):
    data = memoryview(bytes(block.data))
    expected = options.pop("expected", block.checksum)
    return codec.decode(data, block.codec, block.raw_bytes, expected, field, rows=rows, **options)


def bits(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


@given(
    dtype=st.sampled_from(NUMBERS),
    shape=st.sampled_from([(), (1,), (0,), (3,), (2, 5)]),
    rows=st.integers(0, 300),
    content=st.sampled_from(["random", "zeros", "steps"]),
    copy=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None)
def test_numbers_come_back_bit_for_bit(*, dtype, shape, rows, content, copy, seed):
    field = Field("v", dtype, shape)
    count = rows * int(np.prod(shape))
    size = count * field.np_dtype.itemsize
    raw = {
        "random": np.random.default_rng(seed).integers(0, 256, size, np.uint8),
        "zeros": np.zeros(size, np.uint8),
        "steps": np.resize(np.arange(size, dtype=np.uint8), size),
    }[content]
    if dtype == "?":
        raw &= 1
    array = raw.view(field.np_dtype).reshape(rows, *shape)
    block = codec.encode(array, field, copy=copy)
    for verify in (True, False):
        out = decoded(block, field, rows, verify=verify)
        assert out.dtype == field.np_dtype
        assert out.shape == array.shape
        assert np.array_equal(bits(out), bits(array))
        assert out.flags.writeable
        assert out.flags.owndata or not np.shares_memory(out, array)


@pytest.mark.parametrize("name", ["transposed", "strided", "reversed"])
def test_memory_layout_does_not_matter(name):
    base = np.arange(24000, dtype="i4").reshape(100, 240)
    array = {"transposed": base.T, "strided": base[::2, ::3], "reversed": base[::-1, ::-1]}[name]
    field = Field("v", "i4", array.shape[1:])
    assert np.array_equal(decoded(codec.encode(array, field), field, len(array)), array)


@given(st.lists(text, max_size=30), st.sampled_from([(), (2,)]))
@settings(deadline=None)
def test_text_comes_back(values, shape):
    if shape:
        values = [values, values[::-1]] if values else []
        values = [list(pair) for pair in zip(*values, strict=True)]
    array = np.empty((len(values), *shape), object)
    array[...] = np.array(values, object).reshape(array.shape) if values else None
    field = Field("v", "text", shape)
    assert decoded(codec.encode(array, field), field, len(values)).tolist() == array.tolist()


@given(
    dtype=st.sampled_from([*NUMBERS, "text"]),
    shape=st.sampled_from([(), (0,), (3,), (2, 5)]),
    rows=st.integers(0, 60),
    content=st.sampled_from(["random", "few", "zeros"]),
    frame_bytes=st.sampled_from([1, 24, 100, 1000, codec.FRAME_BYTES]),
    ends=st.tuples(*[st.none() | st.integers(-70, 70)] * 2),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=400)
def test_part_of_the_rows_is_what_slicing_all_of_them_gives(
    *, dtype, shape, rows, content, frame_bytes, ends, seed
):
    field = Field("v", dtype, shape)
    count = rows * int(np.prod(shape))
    high = {"random": 2**62, "few": 3, "zeros": 1}[content]
    numbers = np.random.default_rng(seed).integers(0, high, 2 * count) - high // 2
    if field.is_text:
        array = np.array([str(n) for n in numbers[:count]], object).reshape(rows, *shape)
    else:
        plain = "i8" if field.np_dtype.kind in "mM" else field.np_dtype
        with np.errstate(over="ignore"):
            array = numbers[:count].astype(plain).view(field.np_dtype).reshape(rows, *shape)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(codec, "FRAME_BYTES", frame_bytes)
        patched.setattr(codec, "FIRST_FRAME_BYTES", frame_bytes // 2)
        patched.setattr(codec, "FRAME_BYTES_MIN", 1)
        patched.setattr(codec, "_FIELD_FRAME_BYTES_MIN", 1)
        block = codec.encode(array, field)
        part = slice(*ends)
        out = decoded(block, field, rows, part=part)
        for verify in (True, False):
            again = decoded(block, field, rows, part=part, frames=block.frames, verify=verify)
            assert again.shape == out.shape
            assert again.tolist() == out.tolist() or np.array_equal(bits(again), bits(out))
    assert out.dtype == array.dtype
    assert out.shape == array[part].shape
    assert out.tolist() == array[part].tolist() or np.array_equal(bits(out), bits(array[part]))
    assert out.flags.writeable


# ---- frames ----


def framed(*frames):
    """A block of these frames, under its right checksum."""
    data = b"".join(frames)
    return codec.Block(codec.FRAMES, 0, codec.checksum(data), data)


def frame(values, shuffle=1):
    return codec._compress(np.ascontiguousarray(values), shuffle)


def headers(data):
    """(flags, width, raw bytes) of each frame."""
    found = []
    while data:
        flags, width, raw_bytes, size = struct.unpack_from("<2xBBI4xI", data)
        found.append((flags, width, raw_bytes))
        data = data[size:]
    return found


def round_trip(array, field=None):
    """Headers of the frames that an array's block has, after reading it back in two ways."""
    field = field or Field("v", array.dtype, array.shape[1:])
    block = codec.encode(array, field)
    assert block.codec == codec.FRAMES
    assert np.array_equal(bits(decoded(block, field, len(array))), bits(array))
    values = int(np.prod(field.shape))
    raw = independent_reader.frames(bytes(block.data), 3, field.np_dtype.str, values)
    assert raw == array.tobytes()
    return headers(bytes(block.data))


@pytest.mark.parametrize("dtype", ["i2", "i4", "i8", "u2", "u4", "u8", "m8[s]", "M8[ns]"])
def test_integers_are_narrowed_to_the_bytes_that_all_of_them_fit_in(dtype):
    own = np.dtype(dtype).itemsize
    kind = "u" if dtype[0] == "u" else "i"
    for width in (each for each in (1, 2, 4, 8) if each <= own):
        info = np.iinfo(f"{kind}{width}")
        for inside in ([info.min, info.max], [info.max], [info.min], [info.min, info.min + 1]):
            array = np.resize(np.array(inside, f"{kind}{own}"), 200)
            needed = min(w for w in (1, 2, 4, 8) if fits(inside, f"{kind}{w}"))
            assert round_trip(array.view(dtype))[0][1] == needed
        for beyond in (int(info.max) + 1, int(info.min) - 1):
            if width < own and fits([beyond], f"{kind}{own}"):
                array = np.full(200, beyond, f"{kind}{own}")
                array[7] = 0
                assert round_trip(array.view(dtype))[0][1] == 2 * width


def fits(values, dtype):
    info = np.iinfo(dtype)
    return all(info.min <= value <= info.max for value in values)


def test_negative_values_and_nat_come_back_through_narrow_frames():
    assert round_trip(np.arange(-100, -1).repeat(9))[0][1] == 1
    assert round_trip(-np.arange(70_000) - 5)[0][1] == 4
    times = np.array(["NaT", "1969-12-31", "NaT"] * 90, "M8[s]")
    assert round_trip(times)[0][1] == 8  # the least there is
    assert round_trip(np.full(100, 5, "m8[s]"))[0][1] == 1


def test_floats_and_bools_are_never_narrowed():
    for dtype in ("f2", "f4", "f8", "c8", "c16", "?"):
        width = min(np.dtype(dtype).itemsize, 8)
        found = round_trip(np.zeros(300_000, dtype))
        assert {each[1] for each in found} == {width}
        assert not any(each[0] & 4 for each in found)


def test_frames_of_one_block_have_their_own_widths():
    first, following = codec.FIRST_FRAME_BYTES // 8, codec.FRAME_BYTES // 8
    steps = {5: first, -300: following, 70_000: following, -(2**40): following, 0: 9}
    array = np.concatenate([np.resize(np.array([0, top]), n) for top, n in steps.items()])
    assert [each[1] for each in round_trip(array)] == [1, 2, 4, 8, 1]
    narrow = round_trip(array[:-1].reshape(-1, 8)[:, :3].copy())
    assert len(narrow) == 2


def test_a_row_is_never_cut_and_one_larger_than_a_frame_has_its_own():
    width = codec.FRAME_BYTES // 4 + 1
    rows = np.arange(3 * width, dtype="i4").reshape(3, width) % 100
    assert [each[2] for each in round_trip(rows)] == [width] * 3
    rows = np.arange(300_000 * 3, dtype="i4").reshape(-1, 3) % 100
    found = [each[2] for each in round_trip(rows)]
    assert len(found) == 3
    assert not any(raw_bytes % 3 for raw_bytes in found)
    assert not any(raw_bytes % 8 for raw_bytes in found[:-1])  # else Blosc shuffles no bits


@given(rows=st.integers(0, 5000), row_bytes=st.integers(0, 3 << 20))
def test_frames_are_cut_at_rows_the_first_one_short(rows, row_bytes):
    begins = codec.cuts(rows, row_bytes)
    assert begins[0] == 0
    assert begins == sorted(set(begins))
    sizes = [(stop - start) * row_bytes for start, stop in pairwise(begins)]
    assert all(0 < size <= max(codec.FRAME_BYTES, row_bytes) for size in sizes)
    assert max(sizes[:1], default=0) <= max(codec.FIRST_FRAME_BYTES, row_bytes)
    assert bool(sizes) == (rows > 1 and rows * row_bytes > 2 * codec.FIRST_FRAME_BYTES)


PARTED = {
    "frames": np.arange(400_000) // 7,
    "raw": np.random.default_rng(2).integers(0, 2**63, 400_000),
}


def parted(name):
    """A block of four frames, its field, the rows at which they begin, where its bytes do."""
    block = codec.encode(PARTED[name], Field("v", "i8"))
    rows = [0, *accumulate(each.rows for each in block.frames)]
    places = [0, *accumulate(each.stored_bytes for each in block.frames)]
    assert len(block.frames) == 3
    assert (rows[-1], places[-1]) == (400_000, len(block.data))
    return block, Field("v", "i8"), rows, places


@pytest.mark.parametrize("name", PARTED)
def test_part_of_the_rows_needs_only_the_frames_that_hold_it(name):
    block, field, rows, places = parted(name)
    cases = [
        (0, 1),
        (rows[1] - 1, rows[1]),
        (rows[1], rows[2]),
        (5, rows[2] + 1),
        (399_999, 400_000),
    ]
    for start, stop in cases:
        part, frames = slice(start, stop), block.frames
        out = decoded(block, field, 400_000, part=part, frames=frames)
        assert np.array_equal(out, PARTED[name][part])
        for number, place in enumerate(places[:-1]):
            flipped = bytearray(block.data)
            flipped[place + 20] ^= 4
            holds = rows[number] < stop and start < rows[number + 1]
            rotten = block._replace(data=flipped)
            if holds:
                with pytest.raises(DamageError, match="checksum"):
                    decoded(rotten, field, 400_000, part=part, frames=frames)
            else:
                same = decoded(rotten, field, 400_000, part=part, frames=frames)
                assert np.array_equal(same, out)
            with pytest.raises(DamageError, match="checksum"):
                decoded(rotten, field, 400_000, frames=frames)
            with pytest.raises(DamageError, match="checksum"):
                codec.check_frames(flipped, frames)


@pytest.mark.parametrize("name", PARTED)
def test_frames_that_are_not_the_block_s_are_refused(name):
    block, field, *_ = parted(name)
    one, two, three = block.frames
    codec.check_frames(block.data, block.frames)
    shifted = [one._replace(rows=one.rows - 1), two._replace(rows=two.rows + 1), three]
    inside = slice(one.rows + 5, one.rows + 9)
    with pytest.raises(DamageError):
        decoded(block, field, 400_000, part=inside, frames=shifted)
    for frames in (
        [one, two],
        [one, three, two],
        [one._replace(rows=one.rows - 1), two, three],
        [one._replace(stored_bytes=one.stored_bytes + 8), two, three],
        [one, two, three._replace(stored_bytes=three.stored_bytes + 8)],
    ):
        with pytest.raises(DamageError):
            decoded(block, field, 400_000, part=slice(1, 399_999), frames=frames)
        if len(frames) < 3:
            with pytest.raises(DamageError):
                decoded(block, field, 400_000, part=slice(1, 9), frames=frames, verify=False)


def test_fields_of_a_batch_have_their_frames_at_the_same_rows_or_fewer():
    begins = codec.cuts(900, 4096)
    wide, half, narrow, least = (
        codec.encode(np.zeros((900, n), "i4"), Field("v", "i4", (n,)), begins=begins)
        for n in (1024, 512, 64, 1)
    )
    assert [each.rows for each in wide.frames] == [128, 384, 384, 4]
    assert [each.rows for each in half.frames] == [128, 384, 384, 4]
    assert [each.rows for each in narrow.frames] == [512, 384, 4]
    assert least.frames == ()


def test_bits_are_shuffled_where_that_saves_room_and_bytes_elsewhere():
    rng = np.random.default_rng(1)
    few = rng.integers(0, 6, (100_000, 2)).astype("i4")
    assert all(each[0] & 4 for each in round_trip(few))
    steps = np.arange(200_000) // 3000
    assert not any(each[0] & 4 for each in round_trip(steps))
    odd = round_trip(
        few.reshape(-1)[:-3].copy()
    )  # all frames but the last, which is no multiple of 8
    assert [bool(each[0] & 4) for each in odd] == [True] * (len(odd) - 1) + [False]
    wide = np.where(np.arange(200_000) < 190_000, rng.integers(0, 6, 200_000), 2**40)
    assert {(each[1], bool(each[0] & 4)) for each in round_trip(wide)} >= {(8, False)}


def test_a_frame_that_does_not_shrink_among_others_is_kept_as_it_is():
    noise = np.random.default_rng(1).integers(0, 2**63, 400_000)
    array = np.where(np.arange(400_000) < 140_000, noise, 7)
    flags = [each[0] for each in round_trip(array)]
    assert flags[0] & 2
    assert not flags[-1] & 2


def test_what_a_block_claims_takes_no_memory_before_it_is_there(monkeypatch):
    asked = []
    monkeypatch.setattr(codec.libc, "populate", lambda _, size: asked.append(size))
    field = Field("v", "u1")
    block = codec.encode(np.zeros(300_000, "u1"), field)
    assert len(decoded(block, field, 300_000)) == 300_000
    assert asked == [300_000]
    rows = codec.POPULATE_BYTES_MAX + 1
    for kind in (codec.RAW, codec.FRAMES):
        with pytest.raises(DamageError):
            decoded(block._replace(codec=kind, raw_bytes=rows), field, rows)
    assert asked == [300_000]


def test_populate_backs_fresh_memory_and_changes_none():
    with mmap.mmap(-1, 8 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as fresh:
        memory = np.frombuffer(fresh, np.uint8)
        libc.populate(memory.ctypes.data, memory.nbytes)
        pages = (ctypes.c_ubyte * (memory.nbytes // mmap.PAGESIZE))()
        address = ctypes.c_void_p(memory.ctypes.data)
        assert ctypes.CDLL(None).mincore(address, ctypes.c_size_t(memory.nbytes), pages) == 0
        del memory
    assert all(page & 1 for page in pages)
    there = np.resize(np.arange(251, dtype="u1"), 1 << 20)
    libc.populate(there.ctypes.data, there.nbytes)
    assert np.array_equal(there, np.resize(np.arange(251, dtype="u1"), 1 << 20))


# Of 100 rows 0, 1, 2, …, 99 as int32, and 40 of a complex128, by the writer of version 1.
OLD = {
    "i4": (
        np.arange(100, dtype="i4"),
        "0201310490010000900100008d0000001400000075000000ff5a000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f6061626300000000000500ff10500000000000",
    ),
    "c16": (
        np.arange(40) * (1 + 2j),
        "02013108800200008002000084000000140000006c0000001f000100ffbf2a80800400ff47f000001008181020142418281c2c203022322434263628382a3a2c3c2e3e30403141324233433444354536463747384839493a4a3b4b3c4c3d4d3e4e3f4f4050405041514151425242524353435300003f4040404040050030504040404040",
    ),
}


@pytest.mark.parametrize("dtype", OLD)
def test_blocks_of_version_1_are_read(dtype):
    array, text = OLD[dtype]
    data = bytes.fromhex(text)
    block = codec.Block(codec.BLOSC, array.nbytes, codec.checksum(data), data)
    field = Field("v", dtype)
    assert np.array_equal(decoded(block, field, len(array)), array)
    assert np.array_equal(decoded(block, field, len(array), part=slice(7, 9)), array[7:9])
    with pytest.raises(DamageError):
        decoded(block._replace(raw_bytes=array.nbytes - array.itemsize), field, len(array) - 1)


ROWS = 1024
GOOD = frame(np.arange(ROWS, dtype="i4"))


def with_header(data=GOOD, **changes):
    """That frame, its header changed: width, raw, block, size."""
    packed = bytearray(data)
    for name, value in changes.items():
        place, form = {
            "width": (3, "<B"),
            "raw": (4, "<I"),
            "block": (8, "<I"),
            "size": (12, "<I"),
        }[name]
        struct.pack_into(form, packed, place, value)
    return bytes(packed)


HOSTILE = {
    "nothing": [],
    "no header": [GOOD[:15]],
    "width 0": [with_header(width=0)],
    "width 3": [with_header(width=3)],
    "width 16": [with_header(width=16)],
    "wider than the field": [frame(np.arange(ROWS))],
    "no rows": [with_header(raw=0)],
    "no rows in front": [with_header(raw=0), GOOD],
    "part of a row": [with_header(raw=4 * ROWS - 1)],
    "more than a row": [with_header(raw=4 * ROWS + 1)],
    "size 0": [with_header(size=0)],
    "size in the header": [with_header(size=15)],
    "size beyond the end": [with_header(size=len(GOOD) + 1)],
    "size far beyond": [with_header(size=2**32 - 1)],
    "size short": [with_header(size=len(GOOD) - 1)],
    "block size 0": [with_header(block=0)],
    "block size huge": [with_header(block=2**31 - 1)],
    "too few rows": [frame(np.arange(ROWS - 1, dtype="i4"))],
    "small ones": [frame(np.arange(ROWS // 2, dtype="i4"))] * 2,
    "too many rows": [frame(np.arange(ROWS + 1, dtype="i4"))],
    "more frames than rows": [GOOD, GOOD],
    "bytes behind": [GOOD, b"x"],
    "a header behind": [GOOD, bytes(16)],
    "4 GB of rows": [with_header(raw=2**32 - 4)],
    "noise": [bytes(range(256))],
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("verify", [True, False])
def test_frames_that_do_not_make_up_the_rows_are_refused(name, verify):
    block = framed(*HOSTILE[name])._replace(raw_bytes=4 * ROWS)
    for part in (slice(None), slice(1, ROWS - 1)):
        with pytest.raises(DamageError):
            decoded(block, Field("v", "i4"), ROWS, part=part, verify=verify)


WRONG = ("size", "width", "part of", "more than", "too many", "4 GB")  # by a header alone


@pytest.mark.parametrize("name", [name for name in HOSTILE if name.startswith(WRONG)])
def test_blosc_is_not_given_a_header_that_would_have_it_read_elsewhere(name, monkeypatch):
    reached = []
    monkeypatch.setattr(codec, "_decompress", lambda *_: reached.append(1))
    block = framed(*HOSTILE[name])._replace(raw_bytes=4 * ROWS)
    with pytest.raises(DamageError):
        decoded(block, Field("v", "i4"), ROWS)
    assert not reached or name == "size short"


def test_of_frames_that_are_not_wanted_only_the_headers_are_read():
    rotten = with_header(GOOD[:30], size=30)
    block = framed(rotten, GOOD, rotten)._replace(raw_bytes=12 * ROWS)
    out = decoded(block, Field("v", "i4"), 3 * ROWS, part=slice(ROWS, 2 * ROWS))
    assert out.tolist() == list(range(ROWS))
    with pytest.raises(DamageError):
        decoded(block, Field("v", "i4"), 3 * ROWS, part=slice(ROWS - 1, ROWS))


def test_hostile_frames_cost_neither_time_nor_memory(monkeypatch):
    """Zeros shrink to a 255th, narrowed ones to a 2000th; one frame each row took minutes."""
    count = 8 << 20
    field, data = Field("v", "i8"), frame(np.zeros(count, "i1"))
    tracemalloc.start()
    try:
        for frames in (1, 4):
            block = framed(*[data] * frames)._replace(raw_bytes=8 * count * frames)
            assert not decoded(block, field, count * frames).any()
            assert tracemalloc.get_traced_memory()[1] < 1.6 * block.raw_bytes
    finally:
        tracemalloc.stop()
    count = 1_000_000
    block = framed(*[frame(np.zeros(1, "i1"))] * count)._replace(raw_bytes=8 * count)
    monkeypatch.setattr(codec, "_decompress", lambda *_: pytest.fail("decompressed one of them"))
    with pytest.raises(DamageError, match="no frames"):
        decoded(block, field, count)


def test_frames_of_a_field_without_values_are_refused():
    with pytest.raises(DamageError):
        decoded(framed(GOOD), Field("v", "i4", (0,)), ROWS)
    with pytest.raises(DamageError):
        decoded(framed(), Field("v", "i4", (0,)), ROWS)
    assert decoded(framed(), Field("v", "i4"), 0).tolist() == []


def test_copied_blocks_do_not_follow_the_array():
    array = np.random.default_rng(1).integers(0, 2**63, 50_000)
    field = Field("v", "i8")
    block, before = codec.encode(array, field), array.copy()
    assert block.codec == codec.RAW
    array[:] = 0
    assert np.array_equal(decoded(block, field, 50_000), before)


def test_incompressible_data_is_stored_raw_and_the_rest_is_not():
    noise = np.random.default_rng(1).integers(0, 2**63, 50_000)
    assert codec.encode(noise, Field("v", "i8")).codec == codec.RAW
    counts = np.random.default_rng(1).poisson(4, 50_000)
    block = codec.encode(counts, Field("v", "i8"))
    assert block.codec == codec.FRAMES
    assert len(block.data) < counts.nbytes / 3
    half = np.where(np.arange(50_000) < 25_000, noise, 0)
    assert codec.encode(half, Field("v", "i8")).codec == codec.FRAMES


FRAMES_UP = np.arange(140_000) // 65_536 * 16  # frames of two, four and eight bytes
SAMPLES = {
    "raw": (Field("v", "i8"), np.random.default_rng(1).integers(0, 2**63, 20_000)),
    "one frame": (Field("v", "i8"), np.arange(20_000)),
    "frames": (Field("v", "i8"), np.where(np.arange(140_000) % 7, 300, -5) << FRAMES_UP),
    "bits": (Field("v", "i4"), np.random.default_rng(1).integers(0, 6, 50_000).astype("i4")),
    "small": (Field("v", "i8"), np.arange(3)),
    "text": (Field("v", "text"), np.array([f"row {n}" for n in range(500)], object)),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_every_flipped_bit_is_found(name):
    field, array = SAMPLES[name]
    block = codec.encode(array, field)
    data = bytes(block.data)
    for place in {0, 1, 7, 16, len(data) // 2, len(data) - 1}:
        if place < len(data):
            flipped = bytearray(data)
            flipped[place] ^= 1 << (place % 8)
            with pytest.raises(DamageError, match="checksum"):
                decoded(block._replace(data=flipped), field, len(array))


@pytest.mark.parametrize("name", SAMPLES)
def test_cut_and_empty_blocks_are_refused(name):
    field, array = SAMPLES[name]
    block = codec.encode(array, field)
    for length in (0, 1, 15, len(block.data) - 1):
        with pytest.raises(DamageError):
            decoded(block._replace(data=bytes(block.data)[:length]), field, len(array))


@pytest.mark.parametrize("name", SAMPLES)
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_unverified_damage_raises_or_yields_as_many_rows(name, data):
    """verify=False gives up the promise of right values, not that of memory safety."""
    field, array = SAMPLES[name]
    block = codec.encode(array, field)
    flipped = bytearray(block.data)
    for _ in range(data.draw(st.integers(1, 4))):
        flipped[data.draw(st.integers(0, len(flipped) - 1))] = data.draw(st.integers(0, 255))
    try:
        out = decoded(block._replace(data=flipped), field, len(array), verify=False)
    except DamageError:
        return
    assert out.shape == array.shape


@pytest.mark.parametrize("change", [{"codec": 9}, {"raw_bytes": 7}, {"raw_bytes": 1 << 60}])
def test_an_index_entry_that_does_not_fit_is_refused(change):
    field, array = SAMPLES["one frame"]
    block = codec.encode(array, field)
    with pytest.raises(DamageError):
        decoded(block._replace(**change), field, len(array))


def test_records_carry_their_own_checksum():
    record = [1, "a", {2: b"x"}, None, 1.5]
    packed = codec.packed(record)
    assert codec.unpacked(packed, "it") == record
    for place in range(len(packed)):
        flipped = bytearray(packed)
        flipped[place] ^= 0x10
        with pytest.raises(DamageError, match="it: the record fails"):
            codec.unpacked(bytes(flipped), "it")
        with pytest.raises(DamageError):
            codec.unpacked(packed[:place], "it")
