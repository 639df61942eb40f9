"""Blocks: every array comes back bit for bit, damaged bytes never pass for data."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import DamageError, Field, codec

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


SAMPLES = {
    "raw": (Field("v", "i8"), np.random.default_rng(1).integers(0, 2**63, 20_000)),
    "blosc": (Field("v", "i8"), np.arange(20_000)),
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
    field, array = SAMPLES["blosc"]
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
