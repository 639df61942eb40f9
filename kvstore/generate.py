"""The packet generator: particles of the brief's format, made up, at a chosen pace.

Two kinds of data. ``uniform``: every int32 equally likely, as the brief's own generator sends
them; nothing compresses it. ``counts``: what detectors count, smooth peaks with shot noise over
a faint background; compresses about as well as real data. Every packet is fresh random
data: repeated packets would flatter whatever stores them.

Clocks, randomness and the output are arguments. With a seed and a start the bytes are the same
on every run. Nothing is printed: lines for the user go to ``report``, in the brief's wording.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias

import numpy as np

from kvstore.packets import PARTICLE_FIELDS, encode

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvstore.schema import Batch

Profile: TypeAlias = Literal["uniform", "counts"]
Write: TypeAlias = Callable[[list[memoryview]], None]
"""Sends all parts of a frame; the list is its own to consume."""

PARTICLES_MAX: Final = 1000  # of one packet: 6.2 MB
NOMINAL_PPS: Final = 100  # the pace of the timestamps of an unpaced run that starts at a given time

_SHAPES: Final = (PARTICLE_FIELDS["scattering"][1], PARTICLE_FIELDS["spectral"][1])
_VALUES: Final = sum(rows * columns for rows, columns in _SHAPES)  # int32 of one particle
_SCATTERING_VALUES: Final = _SHAPES[0][0] * _SHAPES[0][1]

# The counts profile: Blosc-LZ4 with byte shuffle at level 5 gives a ratio of 2.9 with these.
_TEMPLATES: Final = 64
_PEAKS: Final = 3
_PEAK_ROOT: Final = 110.0  # root of the highest mean count of a peak
_FAINTEST: Final = 0.2  # of the brightest particle, by root
_BACKGROUND: Final = 8.0  # mean count; the least for which eight coins give no negative one
_BLOCK: Final = 32  # particles; their floats stay in the second-level cache


class Summary(NamedTuple):
    """What was sent. first and last are epoch seconds, None if there was no packet."""

    packets: int
    particles: int
    bytes: int  # length fields included
    first: float | None
    last: float | None
    elapsed_s: float


def generate(
    write: Write,
    *,
    report: Callable[[str], None],
    pps: float = 0.0,
    bytes_max: int = 0,
    profile: Profile = "uniform",
    seed: int | None = None,
    start: float | None = None,
    particles: int | None = None,
    clock: Callable[[], float] = time.time,
    monotonic: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], object] = time.sleep,
    stopped: Callable[[], bool] = lambda: False,
) -> Summary:
    """Send packets until ``bytes_max`` bytes are reached (0: without end).

    pps: packets per second, 0 for as many as go. Each has its own deadline counted from the
    first, so that waits that overrun do not add up. particles: in every packet; None draws
    1 to 1000 each time. start: timestamp of the first packet in epoch seconds; later ones
    follow at the pace of ``pps``, or of 100 a second where that is 0. None takes ``clock``.
    stopped: asked before each packet and after each sleep, so that no packet is cut short.
    What ``write`` raises, BrokenPipeError included, ends the run and is not caught.
    """
    source = Source(profile, seed, particles)
    begin = monotonic()
    packets = rows = sent = 0
    first = last = None
    while not bytes_max or sent < bytes_max:
        if pps > 0:
            _wait_until(begin + packets / pps, monotonic, sleep, stopped)
        if stopped():
            break
        last = clock() if start is None else start + packets / (pps or NOMINAL_PPS)
        if first is None:
            first = last
            report(f"First Data timestamps {_iso(first)}")
        batch = source.batch(last)
        parts = encode(batch)
        frame_bytes = sum(len(part) for part in parts)
        write(parts)
        packets, rows, sent = packets + 1, rows + len(batch["timestamps"]), sent + frame_bytes
    summary = Summary(packets, rows, sent, first, last, monotonic() - begin)
    _report_end(summary, report)
    return summary


def _wait_until(
    deadline: float,
    monotonic: Callable[[], float],
    sleep: Callable[[float], object],
    stopped: Callable[[], bool],
) -> None:
    while (left := deadline - monotonic()) > 0 and not stopped():
        sleep(left)


def _report_end(summary: Summary, report: Callable[[str], None]) -> None:
    report(
        f"Reached {summary.bytes} bytes after {summary.packets} packets"
        f" ({summary.particles} particles). Stopping."
    )
    rate = summary.particles / 1000 / summary.elapsed_s if summary.elapsed_s > 0 else 0.0
    report(f"Write bandwidth: {rate:.2f} kParticles/s")
    if summary.last is not None:
        report(f"Last Data timestamp {_iso(summary.last)}")


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds")


class Source:
    """Batches of made-up particles. Arrays share one buffer per batch, new for each."""

    def __init__(self, profile: Profile, seed: int | None, particles: int | None) -> None:
        # SFC64 is numpy's fastest: 4.8 GB/s raw, against 2.0 by Generator.integers and 0.6 by
        # Generator.bytes, both of which pass the same bits through narrower draws.
        self._bits = np.random.SFC64(seed)
        self._rng = np.random.Generator(self._bits)
        self._particles = particles
        self._counts = _Counts(self._rng) if profile == "counts" else None

    def batch(self, timestamp: float) -> Batch:
        """One packet's arrays; all its particles have the same time."""
        rows = self._particles or int(self._rng.integers(1, PARTICLES_MAX, endpoint=True))
        if self._counts is None:
            values = self._uniform(rows)
        else:
            values = self._counts.draw(rows, self._bits)
        split = rows * _SCATTERING_VALUES
        return {
            "timestamps": np.full(rows, round(timestamp, 6)),  # what the printed text says exactly
            "scattering": values[:split].reshape(rows, *_SHAPES[0]),
            "spectral": values[split:].reshape(rows, *_SHAPES[1]),
        }

    def _uniform(self, rows: int) -> NDArray[np.int32]:
        return _raw_bits(self._bits, rows * _VALUES * 4).view(np.int32)


def _raw_bits(bits: np.random.SFC64, count: int) -> NDArray[np.uint8]:
    """Random bytes: every bit of the generator's output, once."""
    words: NDArray[np.uint64] = bits.random_raw(-(-count // 8))
    return words.view(np.uint8)[:count]


class _Counts:
    """Detector-like counts: mean m, variance m, in four passes over floats.

    With t the root of a peak's mean and b that of the background, the count is
    (b + t) * (b + t + z), where z is a sum of eight fair coins, centred and scaled to variance
    one: shot noise like Poisson's for a fraction of its cost (on one core
    numpy's own draws 20,000 particles/s, this 480,000). z is never under -sqrt(8) = -b, so no
    count is negative.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        peaks = [_peaks(rng, rows, columns) for rows, columns in _SHAPES]
        self._roots = np.sqrt(np.concatenate(peaks, axis=1)).astype(np.float32)
        self._rng = rng

    def draw(self, rows: int, bits: np.random.SFC64) -> NDArray[np.int32]:
        """All scattering values, then all spectral ones."""
        values = np.empty(rows * _VALUES, np.int32)
        scattering = values[: rows * _SCATTERING_VALUES].reshape(rows, -1)
        spectral = values[rows * _SCATTERING_VALUES :].reshape(rows, -1)
        kinds = self._rng.integers(0, _TEMPLATES, rows)
        gains = self._rng.uniform(_FAINTEST * _PEAK_ROOT, _PEAK_ROOT, (rows, 1)).astype(np.float32)
        for at in range(0, rows, _BLOCK):
            here = slice(at, at + _BLOCK)
            roots = self._roots[kinds[here]] * gains[here]
            counts = _noisy(roots, bits)
            scattering[here] = counts[:, :_SCATTERING_VALUES]
            spectral[here] = counts[:, _SCATTERING_VALUES:]
        return values


def _noisy(roots: NDArray[np.float32], bits: np.random.SFC64) -> NDArray[np.float32]:
    heads = np.bitwise_count(_raw_bits(bits, roots.size)).reshape(roots.shape)
    counts = heads * np.float32(1 / np.sqrt(2))  # variance 1, mean sqrt(8): b + z at once
    counts += roots
    roots += np.float32(np.sqrt(_BACKGROUND))
    counts *= roots
    return counts


def _peaks(rng: np.random.Generator, rows: int, columns: int) -> NDArray[Any]:
    """Mean counts of each template, (templates, rows * columns), highest peaks around one."""
    row, column = np.arange(rows)[:, None], np.arange(columns)
    draw = (_TEMPLATES, _PEAKS, 1, 1)
    at_row, at_column = rng.uniform(0, rows, draw), rng.uniform(0, columns, draw)
    high, wide = (
        rng.uniform(rows / 24, rows / 8, draw),
        rng.uniform(columns / 10, columns / 4, draw),
    )
    height = rng.uniform(0.2, 1, draw)
    distance = ((row - at_row) / high) ** 2 + ((column - at_column) / wide) ** 2
    means: NDArray[Any] = (height * np.exp(-distance / 2)).sum(axis=1).reshape(_TEMPLATES, -1)
    return means
