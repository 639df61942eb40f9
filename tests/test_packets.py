"""Packets: whole or in pieces the same, bad ones named and passed over, nothing copied in vain."""

from __future__ import annotations

import importlib.util
import os
import pickle
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore import packets
from kvstore.errors import PacketError
from kvstore.packets import PacketDecoder, encode

GOLDEN = Path(__file__).parent / "golden"
FILES = sorted((GOLDEN / "packets").glob("*.packets"))


def golden_module():
    spec = importlib.util.spec_from_file_location("make_packets", GOLDEN / "make_packets.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EXPECTED = golden_module().expected()


def particles(rows=2, time=1.5):
    return {
        "timestamps": np.full(rows, time),
        "scattering": np.arange(rows * 1024, dtype="i4").reshape(rows, 64, 16),
        "spectral": -np.arange(rows * 512, dtype="i4").reshape(rows, 32, 16),
    }


def frame(payload):
    return struct.pack(">I", len(payload)) + payload


def frame_of(batch):
    return b"".join(encode(batch))


def feed(decoder, data):
    """All of the bytes, in as few pieces as the decoder takes; yields its packets."""
    data = memoryview(data)
    while data:
        room = decoder.buffer()
        count = min(len(room), len(data))
        room[:count] = data[:count]
        data = data[count:]
        decoder.received(count)
        yield from decoder.packets()


def decoded(pieces, **limits):
    decoder = PacketDecoder(**limits)
    found = [packet for piece in pieces for packet in feed(decoder, piece)]
    decoder.close()
    return found


def assert_same(found, wanted):
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes(), name


def comparable(found):
    return [
        (p.number, p.offset, p.frame_bytes, [(k, v.tobytes()) for k, v in p.arrays.items()])
        for p in found
    ]


# ---- framing ----


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden_streams_decode_whole_and_byte_by_byte(path):
    stream = path.read_bytes()
    whole = decoded([stream])
    for packet, wanted in zip(whole, EXPECTED, strict=True):
        assert_same(packet.arrays, wanted)
    assert comparable(decoded(bytes([byte]) for byte in stream)) == comparable(whole)


def test_packets_know_their_number_offset_and_size():
    frames = [frame_of(particles(rows)) for rows in (1, 30, 2)]
    found = decoded([b"".join(frames)])
    assert [packet.number for packet in found] == [0, 1, 2]
    assert [packet.offset for packet in found] == [0, len(frames[0]), len(frames[0] + frames[1])]
    assert [packet.frame_bytes for packet in found] == [len(frame) for frame in frames]


# Small ones, one that leaves less than a chunk's worth, ones that never fit into a chunk.
SIZES = [1, 1, 9, 12, 200, 1, 1, 180, 1, 10, 11, 170, 2, 1]
MIXED = b"".join(frame_of(particles(rows, float(rows))) for rows in SIZES)
MIXED_FOUND = comparable(decoded([MIXED]))


@given(st.lists(st.integers(1, len(MIXED) - 1), max_size=30))
def test_any_chunking_gives_the_same_packets(cuts):
    assert len(MIXED_FOUND) == len(SIZES)
    edges = [0, *sorted(cuts), len(MIXED)]
    pieces = [MIXED[a:b] for a, b in pairwise(edges)]
    assert comparable(decoded(pieces)) == MIXED_FOUND


@pytest.mark.parametrize("piece", [1 << 12, 65_537, 1 << 20])
def test_reads_of_any_size_give_the_same_packets(piece):
    pieces = [MIXED[at : at + piece] for at in range(0, len(MIXED), piece)]
    assert comparable(decoded(pieces)) == MIXED_FOUND


def test_packets_of_earlier_chunks_stay_as_they_were():
    rows = [particles(1, float(n)) for n in range(1000)]
    found = decoded([b"".join(map(frame_of, rows))])
    for packet, wanted in zip(found, rows, strict=True):
        assert_same(packet.arrays, wanted)


def test_every_prefix_gives_the_packets_before_its_end_and_an_error_unless_it_ends_between_two():
    stream = frame_of({"t": np.arange(2.0)}) + frame_of({"t": np.zeros((0, 3))})
    ends = [len(frame_of({"t": np.arange(2.0)})), len(stream)]
    for length in range(len(stream) + 1):
        decoder = PacketDecoder()
        found = list(feed(decoder, stream[:length]))
        assert len(found) == sum(length >= end for end in ends)
        if length in (0, *ends):
            decoder.close()
            continue
        with pytest.raises(PacketError, match="the input ends") as caught:
            decoder.close()
        assert (caught.value.packet, caught.value.whole) == (len(found), False)
        assert caught.value.offset == ([0, *ends])[len(found)]


def test_a_large_packet_cut_short_says_how_much_came():
    data = frame_of(particles(100))
    decoder = PacketDecoder()
    assert list(feed(decoder, data[:100_004])) == []
    with pytest.raises(PacketError, match=rf"100000 of {len(data) - 4} bytes came"):
        decoder.close()


@given(st.binary(max_size=300), st.booleans())
def test_random_bytes_raise_only_our_errors(data, framed):
    decoder = PacketDecoder()
    try:
        list(feed(decoder, frame(data) if framed else data))
        decoder.close()
    except PacketError:
        pass


def test_large_packets_in_a_row_are_read_straight_into_their_own_memory():
    stream = memoryview(frame_of(particles(300)) * 3)
    decoder = PacketDecoder()
    for number in range(3):
        header = decoder.buffer()
        if number:
            assert len(header) == 4  # so that nothing of the packet needs a copy
        rooms = []
        found = []
        while not found:
            room = decoder.buffer()
            rooms.append(np.asarray(room))
            count = min(len(room), 200_000, len(stream))
            room[:count], stream = stream[:count], stream[count:]
            decoder.received(count)
            found = list(decoder.packets())
        assert np.shares_memory(found[0].arrays["spectral"], rooms[-1])


# ---- bad packets ----


GOOD = frame_of({"t": np.arange(2.0)})
EVIL = frame(pickle.dumps({"t": os.getcwd}))


def collect(decoder, seen, errors):
    """What a caller with --on-error skip does."""
    while True:
        try:
            for packet in decoder.packets():
                seen.append(packet.number)
        except PacketError as error:
            errors.append((error.packet, error.offset, error.whole))
        else:
            return


def test_packets_before_and_behind_bad_ones_are_delivered():
    decoder = PacketDecoder()
    stream = GOOD + EVIL + GOOD + frame(b"") + EVIL + GOOD
    decoder.buffer()[: len(stream)] = stream
    decoder.received(len(stream))
    seen, errors = [], []
    collect(decoder, seen, errors)
    decoder.close()
    assert seen == [0, 2, 5]
    behind = 2 * len(GOOD) + len(EVIL)
    assert errors == [(1, len(GOOD), True), (3, behind, True), (4, behind + 4, True)]


def test_an_error_says_what_and_where():
    with pytest.raises(PacketError, match=rf"packet 3 at byte {3 * len(GOOD)}: .*posix.getcwd"):
        list(feed(PacketDecoder(), GOOD * 3 + EVIL))


def test_a_bad_large_packet_is_passed_over_too():
    decoder = PacketDecoder()
    bad = frame(b"\x80\x05" + bytes(500_000))
    stream = GOOD + bad + GOOD
    errors, seen = [], []
    remaining = memoryview(stream)
    while remaining:
        room = decoder.buffer()
        count = min(len(room), len(remaining))
        room[:count], remaining = remaining[:count], remaining[count:]
        decoder.received(count)
        collect(decoder, seen, errors)
    decoder.close()
    assert (seen, errors) == ([0, 2], [(1, len(GOOD), True)])


@pytest.mark.parametrize("length", [1001, 2**31, 2**32 - 1])
def test_a_packet_over_the_limit_ends_the_stream_and_names_the_remedy(length):
    decoder = PacketDecoder(frame_bytes_max=1000)
    arriving = feed(decoder, GOOD + struct.pack(">I", length) + bytes(2000))
    assert next(arriving).number == 0
    with pytest.raises(PacketError, match=rf"{length} bytes.*1000.*--max-packet-bytes") as caught:
        next(arriving)
    assert (caught.value.packet, caught.value.offset, caught.value.whole) == (1, len(GOOD), False)
    for again in (lambda: list(decoder.packets()), decoder.close):
        with pytest.raises(PacketError, match="--max-packet-bytes"):
            again()


def test_the_limit_itself_is_allowed():
    assert len(decoded([GOOD], frame_bytes_max=len(GOOD) - 4)) == 1
    with pytest.raises(PacketError):
        decoded([GOOD], frame_bytes_max=len(GOOD) - 5)


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_memory_is_used_as_bytes_arrive_not_as_they_are_announced():
    before = resident_bytes()
    decoders = []
    for _ in range(8):
        decoder = PacketDecoder()
        list(feed(decoder, struct.pack(">I", 256 << 20) + bytes(100)))
        decoders.append(decoder)
    assert resident_bytes() - before < 64 << 20


def test_text_instead_of_packets_is_refused_at_once():
    with pytest.raises(PacketError, match="if the input is a packet stream"):
        decoded([b'{"timestamps": [1, 2]}'])


# ---- what a packet may hold: what it must hold is test_ingest's business ----


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.array([0x61, 0x110000], "u4").view("U1"), r"x\[1\] is no valid text"),
        (np.array([[1, 1], [1, 0xDFFF]], ">u4").view(">U2")[:, 0], r"x\[1\] is no valid text"),
        (np.array([[0, 1], [1, 2]], "u1").view(bool), r"x\[1\] is no valid boolean"),
        (np.array(3.5), r"field 'x' is a scalar"),
    ],
)
def test_arrays_that_numpy_would_take_on_trust_are_refused_and_passed_over(array, reason):
    decoder = PacketDecoder()
    stream = GOOD + frame_of({"t": np.arange(2.0), "x": array}) + GOOD
    decoder.buffer()[: len(stream)] = stream
    decoder.received(len(stream))
    with pytest.raises(PacketError, match=f"^packet 1 at byte {len(GOOD)}: {reason}") as caught:
        list(decoder.packets())
    assert caught.value.whole
    assert [packet.number for packet in decoder.packets()] == [2]


def test_any_text_and_booleans_without_rows_or_values_are_fine():
    batch = {
        "t": np.zeros(2, ">U3"),
        "empty": np.zeros((2, 0), "U3"),
        "none": np.zeros((0, 3), bool),
        "text": np.array(["a", "é€😀"]),
    }
    assert_same(decoded([frame_of(batch)])[0].arrays, batch)


# ---- writing ----


def plain_reader(data):
    """The brief's own way to read a packet."""
    (length,) = struct.unpack(">I", data[:4])
    assert len(data) == 4 + length
    return pickle.loads(data[4:])


@pytest.mark.parametrize("rows", [0, 1, 10, 1000])
def test_a_plain_reader_understands_what_is_written(rows):
    wanted = particles(rows)
    assert_same(plain_reader(frame_of(wanted)), wanted)
    assert_same(decoded([frame_of(wanted)])[0].arrays, wanted)


@pytest.mark.parametrize("wanted", EXPECTED, ids=["particles", "other"])
def test_all_dtypes_come_back_from_a_packet_that_was_written(wanted):
    assert_same(plain_reader(frame_of(wanted)), wanted)
    assert_same(decoded([frame_of(wanted)])[0].arrays, wanted)


def test_large_arrays_are_not_copied_into_the_parts():
    batch = particles(100)
    parts = [np.asarray(part) for part in encode(batch)]
    for name in ("scattering", "spectral"):
        assert any(np.shares_memory(part, batch[name]) for part in parts)
    turned = {"t": np.zeros((300, 400), order="F")}
    assert any(np.shares_memory(np.asarray(part), turned["t"]) for part in encode(turned))


def test_the_parts_can_be_written_at_once(tmp_path):
    path = tmp_path / "packet"
    with path.open("wb") as file:
        count = os.writev(file.fileno(), encode(particles(100)))
    assert path.stat().st_size == count
    assert_same(plain_reader(path.read_bytes()), particles(100))


def test_slices_text_and_mapped_files_are_written_as_plain_arrays(tmp_path):
    mapped = np.memmap(tmp_path / "mapped", "f8", "w+", shape=(4,))
    found = plain_reader(
        frame_of(
            {
                "t": np.arange(8.0)[::2],
                "text": np.array(["a", "é€😀", "", "long " * 9], object),
                "none": np.array([], object),
                "mapped": mapped,
                "columns": np.arange(24).reshape(4, 6)[:, 1:3],
            }
        )
    )
    assert found["t"].tolist() == [0, 2, 4, 6]
    assert found["text"].dtype.kind == "U"
    assert found["text"].tolist() == ["a", "é€😀", "", "long " * 9]
    assert (found["none"].dtype.kind, found["none"].shape) == ("U", (0,))
    assert type(found["mapped"]) is np.ndarray
    assert found["columns"].tolist() == [[1, 2], [7, 8], [13, 14], [19, 20]]


@pytest.mark.parametrize(
    ("value", "named"), [(None, "NoneType"), (3, "int"), ("a\0", "text that ends in NUL")]
)
def test_text_that_a_numpy_array_cannot_hold_is_refused(value, named):
    with pytest.raises(PacketError, match=f"'text' holds {named}"):
        encode({"text": np.array(["a", value], object)})


def test_a_packet_that_its_length_field_cannot_tell_is_refused(monkeypatch):
    monkeypatch.setattr(packets, "FRAME_BYTES_LIMIT", len(frame_of(particles())) - 5)
    with pytest.raises(PacketError, match="its length field ends at 4 GiB"):
        encode(particles())
