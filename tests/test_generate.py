"""The generator: the brief's packets, lines and pace; random to the last bit, or like counts."""

from __future__ import annotations

import re

import numpy as np
import pytest
from numcodecs.blosc import Blosc

from kvstore.generate import _noisy, generate
from kvstore.ingest import PARTICLE_SCHEMA
from kvstore.packets import PacketDecoder

MB = 1 << 20


class Pipe:
    """Takes what is written, and decodes it as a reader would."""

    def __init__(self):
        self.data = bytearray()
        self.lines = []

    def write(self, parts):
        self.data += b"".join(parts)
        parts.clear()  # as one who writes pieces may do

    def packets(self):
        decoder, data = PacketDecoder(), memoryview(bytes(self.data))
        while data:
            room = decoder.buffer()
            count = min(len(room), len(data))
            room[:count], data = data[:count], data[count:]
            decoder.received(count)
            yield from decoder.packets()
        decoder.close()


class Clock:
    """Time that only passes when it is slept through or added."""

    def __init__(self, now=1000.0):
        self.now = now
        self.slept = []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


def run(**options):
    pipe = Pipe()
    options = {"bytes_max": 8 * MB, "seed": 1, **options}
    summary = generate(pipe.write, report=pipe.lines.append, **options)
    return pipe, summary


def rows_of(packet):
    """How many particles; fails where they are not of the brief's very dtypes and shapes."""
    columns = PARTICLE_SCHEMA.columns(packet.arrays)
    assert [column.dtype for column in columns] == [x.np_dtype for x in PARTICLE_SCHEMA.fields]
    return len(columns[0])


def test_packets_are_particles_with_one_timestamp_each():
    pipe, summary = run(start=1771342356.080619)
    packets = list(pipe.packets())
    rows = [rows_of(packet) for packet in packets]
    assert (len(packets), sum(rows)) == (summary.packets, summary.particles)
    assert len(pipe.data) == summary.bytes
    assert all(len(set(packet.arrays["timestamps"].tolist())) == 1 for packet in packets)
    assert packets[0].arrays["timestamps"][0] == summary.first == 1771342356.080619


def test_it_stops_after_the_packet_that_reaches_the_limit():
    pipe, summary = run(particles=100, bytes_max=2 * MB)
    *_, last = pipe.packets()
    assert summary.bytes >= 2 * MB
    assert last.offset < 2 * MB


def test_packets_have_1_to_1000_particles():
    rows = [rows_of(packet) for seed in range(6) for packet in run(seed=seed)[0].packets()]
    assert 1 <= min(rows) < 150
    assert 850 < max(rows) <= 1000


def test_every_packet_has_the_number_of_particles_asked_for():
    pipe, summary = run(particles=1, bytes_max=MB)
    assert summary.particles == summary.packets == len(list(pipe.packets()))


def test_the_lines_are_the_briefs():
    clock = Clock()
    pipe = Pipe()
    times = iter([1771342356.080619, 1771342357.442515])

    def write(parts):
        pipe.write(parts)
        clock.now += 0.5

    summary = generate(
        write,
        report=pipe.lines.append,
        bytes_max=1_000_000,
        particles=100,
        clock=lambda: next(times),
        monotonic=clock,
        sleep=clock.sleep,
    )
    assert pipe.lines == [
        "First Data timestamps 2026-02-17T15:32:36.080619+00:00",
        f"Reached {summary.bytes} bytes after 2 packets (200 particles). Stopping.",
        "Write bandwidth: 0.20 kParticles/s",
        "Last Data timestamp 2026-02-17T15:32:37.442515+00:00",
    ]


def test_the_printed_times_are_the_stored_ones():
    """To the microsecond, so that a range that ends at the printed text has the last row."""
    pipe, _ = run(clock=lambda: 1771342356.1234567)
    stored = next(pipe.packets()).arrays["timestamps"][0]
    assert pipe.lines[0].endswith("36.123457+00:00")
    assert stored == 1771342356.123457


@pytest.mark.parametrize("profile", ["uniform", "counts"])
def test_a_seed_and_a_start_give_the_same_bytes_every_time(profile):
    options = {"profile": profile, "start": 5.0, "pps": 0}
    assert run(**options)[0].data == run(**options)[0].data
    assert run(**options)[0].data != run(**options, seed=2)[0].data


def test_without_a_seed_the_bytes_are_new():
    assert run(seed=None, start=5.0)[0].data != run(seed=None, start=5.0)[0].data


def test_timestamps_advance_from_the_start_at_the_pace_asked_for():
    clock = Clock()
    options = {"start": 5.0, "particles": 300, "monotonic": clock, "sleep": clock.sleep}
    pipe, _ = run(pps=50, **options)
    times = [packet.arrays["timestamps"][0] for packet in pipe.packets()]
    assert times == [round(5 + n / 50, 6) for n in range(len(times))]
    pipe, summary = run(pps=0, **options)
    times = [packet.arrays["timestamps"][0] for packet in pipe.packets()]
    assert times[:3] == [5.0, 5.01, 5.02]
    assert summary.last == times[-1]


def test_pacing_does_not_drift_and_makes_up_for_stalls():
    clock = Clock()
    sent = []

    def write(_):
        sent.append(clock.now - 1000)
        clock.now += 0.35 if len(sent) == 3 else 0.01

    generate(
        write,
        report=lambda _: None,
        pps=10,
        particles=10,
        bytes_max=10 * 61_000,
        monotonic=clock,
        sleep=clock.sleep,
    )
    wanted = [0, 0.1, 0.2, 0.55, 0.56, 0.57, 0.6, 0.7, 0.8, 0.9]
    assert sent == pytest.approx(wanted, abs=1e-9)


def test_a_sleep_that_returns_early_is_slept_on():
    clock = Clock()

    def nap(seconds):
        clock.sleep(seconds / 2 if seconds > 1e-3 else seconds)

    run(pps=10, particles=1000, monotonic=clock, sleep=nap)
    assert clock.now == pytest.approx(1000.1, abs=1e-9)


def test_a_closed_pipe_ends_the_run():
    def write(_):
        raise BrokenPipeError

    lines = []
    with pytest.raises(BrokenPipeError):
        generate(write, report=lines.append, bytes_max=MB)
    assert len(lines) == 1


def values(profile):
    pipe, _ = run(profile=profile)
    found = [packet.arrays for packet in pipe.packets()]
    return (
        np.concatenate([arrays["scattering"] for arrays in found]),
        np.concatenate([arrays["spectral"] for arrays in found]),
    )


def ratio(array):
    """Of Blosc-LZ4 with byte shuffle at level 5, as the store compresses."""
    return array.nbytes / len(Blosc("lz4", 5, Blosc.SHUFFLE).encode(array))


@pytest.mark.slow
def test_uniform_values_cover_int32_and_do_not_repeat():
    for array in values("uniform"):
        assert array.min() < -0.999 * 2**31
        assert array.max() > 0.999 * 2**31
        bits = np.unpackbits(array.view(np.uint8)).mean()
        assert bits == pytest.approx(0.5, abs=0.001)
        assert len(np.unique(array)) > 0.999 * array.size
        assert ratio(array) < 1.01


def test_counts_are_like_a_detectors():
    for array in values("counts"):
        assert array.min() >= 0
        assert 10_000 < array.max() < 50_000
        assert 2.6 < ratio(array) < 3.2
        assert len({particle.tobytes() for particle in array}) == len(array)
        smooth = array.mean(axis=0)
        assert np.abs(np.diff(smooth, axis=0)).max() < smooth.max() / 2


@pytest.mark.parametrize("root", [0, 3, 50])
def test_the_noise_of_counts_is_that_of_counting(root):
    """Variance equals the mean, which is the square of peak root plus background root."""
    drawn = _noisy(np.full((100, 1536), root, np.float32), np.random.SFC64(1))
    mean = (root + 8**0.5) ** 2
    assert drawn.mean() == pytest.approx(mean, rel=0.01)
    assert drawn.var() == pytest.approx(mean, rel=0.02)
    assert drawn.min() >= 0


def test_the_wording_matches_the_brief():
    pipe, _ = run(bytes_max=MB)
    patterns = [
        r"First Data timestamps \S+\+00:00",
        r"Reached \d+ bytes after \d+ packets \(\d+ particles\)\. Stopping\.",
        r"Write bandwidth: \d+\.\d\d kParticles/s",
        r"Last Data timestamp \S+\+00:00",
    ]
    assert len(pipe.lines) == len(patterns)
    for line, pattern in zip(pipe.lines, patterns, strict=True):
        assert re.fullmatch(pattern, line)


def test_it_stops_within_a_wait_and_never_within_a_packet():
    slept = []
    clock = Clock()
    pipe, summary = run(
        pps=0.001,
        clock=clock,
        monotonic=clock,
        sleep=slept.append,  # as one that a signal has cut short
        stopped=lambda: bool(slept),
    )
    assert summary.packets == len(list(pipe.packets())) == len(slept) == 1
