"""Writing through pipes, as the instrument's engineer does, beside cat, dd and the generator.

Wall time runs from the first process's start to the last one's end, interpreter start and
final commit included. That start is no small part of a short run, so the details name it.
"""

from __future__ import annotations

import fcntl
import os
import re
import struct
import termios
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bench.capture import check_rows
from bench.figure import BenchError, Figure, Measurement, Rule, Setting
from bench.measure import GB, interleaved, removed, scratch, settle, warm, write_all
from bench.process import Child, feeding, kvstore, run
from bench.workload import PARTICLE_BYTES, batches_of, packet

PACED_PARTICLES_PER_S = 70_000
STALL_MS_MAX = 50.0

# A command that has not taken its first packet by then will not take any.
READY_DEADLINE_S = 30.0


class PacketFile(NamedTuple):
    """Framed packets on the disk, in the page cache as long as memory lasts."""

    path: Path
    rows: int

    @property
    def size_gb(self) -> float:
        """Bytes on the pipe, frames included."""
        return self.path.stat().st_size / GB


def cat_write(setting: Setting) -> list[Figure]:
    """`cat packets | kvstore write` against `cat packets | dd … conv=fdatasync`."""
    with scratch(setting.folder, bytes_needed=2 * setting.size_bytes) as folder:
        one = packet_file(folder / "one", PARTICLE_BYTES, setting.seed)
        packets = packet_file(folder / "packets", setting.size_bytes, setting.seed)
        start_s = min(_write_seconds(one, folder / "one.kv") for _ in range(2))
        ours, bare = interleaved(
            setting.pairs,
            lambda: packets.size_gb / _write_seconds(packets, folder / "run.kv"),
            lambda: packets.size_gb / _dd_seconds(packets, folder / "dd"),
        )
        sustained = packets.size_gb / (packets.size_gb / median(ours) - start_s)
    return [
        Figure(
            name="cat-write",
            unit="GB/s",
            limit_name="cat | dd fdatasync",
            values=ours,
            limits=bare,
            rules=(Rule("ratio", ">=", 1.0),),
            details={"one_particle_run_s": start_s, "without_that_gb_s": sustained},
        )
    ]


def one_particle_packets(setting: Setting) -> list[Figure]:
    """`cat packets | kvstore write` where every packet holds a single particle."""
    with scratch(setting.folder, bytes_needed=2 * setting.size_bytes) as folder:
        packets = packet_file(folder / "packets", setting.size_bytes, setting.seed, particles=1)
        ours, bare = interleaved(
            setting.pairs,
            lambda: packets.rows / _write_seconds(packets, folder / "run.kv"),
            lambda: packets.rows / _dd_seconds(packets, folder / "dd"),
        )
    return [
        Figure(
            name="one-particle-packets",
            unit="packets/s",
            limit_name="cat | dd fdatasync",
            values=ours,
            limits=bare,
            rules=(Rule("value", ">=", 50_000),),
        )
    ]


def generate_write(setting: Setting) -> list[Figure]:
    """`generate --pps 0 | write` against `generate --pps 0 | cat > /dev/null`."""
    with scratch(setting.folder, bytes_needed=setting.size_bytes) as folder:
        ours, bare = interleaved(
            setting.pairs,
            lambda: _generate_write_particles_s(setting, folder / "run.kv"),
            lambda: _generate_cat_particles_s(setting),
        )
    return [
        Figure(
            name="generate-write",
            unit="particles/s",
            limit_name="generate | cat > /dev/null",
            values=ours,
            limits=bare,
            rules=(Rule("ratio", ">=", 0.95), Rule("value", ">=", 100_000)),
        )
    ]


def paced(setting: Setting) -> list[Figure]:
    """Send 70,000 particles/s: what it costs, and how long the producer is held up."""
    frames: list[tuple[int, bytes]] = [
        (len(batch["timestamps"]), packet(batch))
        for batch in batches_of("uniform", setting.size_bytes, setting.seed)
    ]
    if len(frames) == 1:
        raise BenchError(f"--size {setting.size_bytes} makes a single packet; ask for 8MB or more")
    with scratch(setting.folder, bytes_needed=setting.size_bytes) as folder:
        store, copy = folder / "run.kv", folder / "dd"
        ours: list[Paced] = []
        bare: list[Paced] = []
        interleaved(
            setting.pairs,
            lambda: _remember(ours, _paced(frames, kvstore("write", store), store)),
            lambda: _remember(bare, _paced(frames, _dd(copy), copy)),
        )
    return [
        Figure(
            name="paced-cpu",
            unit="CPU s/GB",
            limit_name="dd fdatasync",
            values=[run.cpu_s_per_gb for run in ours],
            limits=[run.cpu_s_per_gb for run in bare],
        ),
        Figure(
            name="paced-stall",
            unit="ms",
            limit_name="dd fdatasync",
            values=[max(run.stall_ms_max for run in ours)],
            limits=[max(run.stall_ms_max for run in bare)],
            rules=(Rule("value", "<", STALL_MS_MAX),),
            details={
                "median_run_ms": median(run.stall_ms_max for run in ours),
                "behind_schedule_ms_max": max(run.late_ms_max for run in ours),
                "dd_behind_schedule_ms_max": max(run.late_ms_max for run in bare),
            },
        ),
    ]


def packet_file(
    path: Path, size_bytes: int, seed: int, *, particles: int | None = None
) -> PacketFile:
    """Write uniform packets into a file."""
    rows = 0
    with path.open("wb") as file:
        for batch in batches_of("uniform", size_bytes, seed, particles=particles):
            file.write(packet(batch))
            rows += len(batch["timestamps"])
    return PacketFile(path, rows)


def generate(setting: Setting, size_bytes: int) -> list[str]:
    """Spell the generator's command for about size_bytes, unlimited in rate."""
    mebibytes = max(1, round(size_bytes / 2**20))
    return kvstore(
        "generate", "--pps", "0", "--max-mb", str(mebibytes), "--seed", str(setting.seed)
    )


def particles_generated(stderr: str) -> int:
    """Find how many particles the generator says it sent."""
    found = re.search(r"\((\d+) particles\)", stderr)
    if found is None:
        raise BenchError(f"the generator did not say how much it sent: {stderr[-300:]!r}")
    return int(found[1])


def _write_seconds(packets: PacketFile, store: Path) -> float:
    warm(packets.path)
    settle(packets.path.stat().st_size)
    with removed(store):
        wall_s = run(["cat", str(packets.path)], kvstore("write", store)).wall_s
        check_rows(store, packets.rows)
    return wall_s


def _dd_seconds(packets: PacketFile, copy: Path) -> float:
    warm(packets.path)
    settle(packets.path.stat().st_size)
    with removed(copy):
        return run(["cat", str(packets.path)], _dd(copy)).wall_s


def _dd(copy: Path) -> list[str]:
    return ["dd", f"of={copy}", "bs=1M", "conv=fdatasync"]


def _generate_write_particles_s(setting: Setting, store: Path) -> float:
    settle(setting.size_bytes)
    with removed(store):
        done = run(generate(setting, setting.size_bytes), kvstore("write", store))
        particles = particles_generated(done.ended[0].stderr)
        check_rows(store, particles)
    return particles / done.wall_s


def _generate_cat_particles_s(setting: Setting) -> float:
    settle(setting.size_bytes)
    done = run(generate(setting, setting.size_bytes), ["cat"])
    return particles_generated(done.ended[0].stderr) / done.wall_s


class Paced(NamedTuple):
    """One paced run. stall: within one packet's write. late: behind the schedule."""

    cpu_s_per_gb: float
    stall_ms_max: float
    late_ms_max: float


def _paced(frames: Sequence[tuple[int, bytes]], command: Sequence[str], written: Path) -> Paced:
    """Feed a command at the paced rate; the clock starts once it took the first packet.

    Before that the pipe waits for an interpreter to start, which is no stall of a running
    system.
    """
    sent_gb = sum(len(frame) for _, frame in frames) / GB
    settle(int(sent_gb * GB))
    with removed(written), feeding(command) as (pipe, child):
        try:
            with os.fdopen(pipe, "wb", buffering=0):
                write_all(pipe, memoryview(frames[0][1]))
                _wait_until_taken(pipe, child)
                stall_ns, late_ns = _send(pipe, frames[1:])
        except BrokenPipeError:
            child.check(child.wait())  # in its own words
            raise
        ended = child.wait()
        child.check(ended)
        if written.is_dir():
            check_rows(written, sum(particles for particles, _ in frames))
    return Paced(ended.cpu_s / sent_gb, stall_ns / 1e6, late_ns / 1e6)


def _send(pipe: int, frames: Iterable[tuple[int, bytes]]) -> tuple[int, int]:
    """Write each frame when it is due; return the longest write and the longest delay, ns."""
    stall_ns = late_ns = due_ns = 0
    started_ns = time.perf_counter_ns()
    for particles, frame in frames:
        due_ns += round(particles / PACED_PARTICLES_PER_S * 1e9)
        time.sleep(max(0, started_ns + due_ns - time.perf_counter_ns()) / 1e9)
        before_ns = time.perf_counter_ns()
        write_all(pipe, memoryview(frame))
        after_ns = time.perf_counter_ns()
        stall_ns = max(stall_ns, after_ns - before_ns)
        late_ns = max(late_ns, after_ns - started_ns - due_ns)
    return stall_ns, late_ns


def _wait_until_taken(pipe: int, child: Child) -> None:
    """Wait until the pipe is empty."""
    deadline_s = time.monotonic() + READY_DEADLINE_S
    while _waiting_bytes(pipe):
        if time.monotonic() > deadline_s:
            raise BenchError(f"{' '.join(child.command)} did not read its first packet")
        time.sleep(0.001)


def _waiting_bytes(pipe: int) -> int:
    answer = fcntl.ioctl(pipe, termios.FIONREAD, struct.pack("i", 0))
    return int(struct.unpack("i", answer)[0])


def _remember(runs: list[Paced], run: Paced) -> float:
    runs.append(run)
    return run.stall_ms_max


MEASUREMENTS = (
    Measurement("cat-write", "cat packets | kvstore write", cat_write),
    Measurement("generate-write", "kvstore generate --pps 0 | kvstore write", generate_write),
    Measurement("paced", "70,000 particles/s into kvstore write: CPU and stalls", paced),
    Measurement(
        "one-particle-packets", "cat | kvstore write, 1 particle each", one_particle_packets
    ),
)
