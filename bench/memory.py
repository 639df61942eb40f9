"""Anonymous memory of `write` and `read`, at one length and at four times that.

Anonymous, because the store itself is mapped: its pages are the page cache's and go when
others need the room. Sampled while the command runs, its peak counts.
"""

from __future__ import annotations

from pathlib import Path

from bench.capture import check_rows
from bench.figure import Figure, Measurement, Rule, Setting
from bench.measure import scratch
from bench.pipes import generate, particles_generated
from bench.process import kvstore, run
from bench.workload import PARTICLE_BYTES
from kvstore.generate import PARTICLES_MAX

LONGER = 4
ALLOWED_MB = 300.0
PACKETS_ALLOWED = 4
LARGEST_PACKET_MB = PARTICLES_MAX * PARTICLE_BYTES / 1e6


def memory(setting: Setting) -> list[Figure]:
    """Write and read a store at both lengths; the longer one's peak is held to the target."""
    longer_bytes = LONGER * setting.size_bytes
    with scratch(setting.folder, bytes_needed=setting.size_bytes + longer_bytes) as folder:
        short = _peaks_mb(folder / "short.kv", setting, setting.size_bytes)
        long = _peaks_mb(folder / "long.kv", setting, longer_bytes)
    return [
        _figure("write", long[0], short[0]),
        _figure("read", long[1], short[1]),
    ]


def _figure(name: str, peak_mb: float, shorter_peak_mb: float) -> Figure:
    allowed_mb = ALLOWED_MB + PACKETS_ALLOWED * LARGEST_PACKET_MB
    return Figure(
        name=f"memory-{name}",
        unit="MB",
        limit_name=f"{ALLOWED_MB:.0f} MB + {PACKETS_ALLOWED} packets",
        values=[peak_mb],
        limits=[allowed_mb],
        rules=(Rule("ratio", "<", 1.0),),
        details={f"at_1_{LONGER}th_of_the_length_mb": shorter_peak_mb},
    )


def _peaks_mb(store: Path, setting: Setting, size_bytes: int) -> tuple[float, float]:
    """Peak of the writer, then of a full read, in MB."""
    written = run(generate(setting, size_bytes), kvstore("write", store), watched=1)
    check_rows(store, particles_generated(written.ended[0].stderr))
    read = run(kvstore("read", store), ["cat"], watched=0)
    return written.ended[1].anon_bytes_max / 1e6, read.ended[0].anon_bytes_max / 1e6


MEASUREMENTS = (Measurement("memory", "peak anonymous memory of write and read", memory),)
