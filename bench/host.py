"""The header of a report: what was measured on, and with which versions.

Reads /proc, git and the installed packages' metadata; writes nothing.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import NamedTuple

from bench.process import ROOT

_PACKAGES = ("numpy", "lmdb", "numcodecs", "xxhash", "lz4", "msgpack", "typer")


class Host(NamedTuple):
    """One machine, one disk, one set of versions, one commit."""

    cpu: str
    cores: int
    memory_gb: float
    load_average: float
    kernel: str
    filesystem: str
    python: str
    libraries: dict[str, str]
    commit: str

    def slug(self) -> str:
        """Name the machine in a file name."""
        words = "".join(c if c.isalnum() else "-" for c in self.cpu.lower()).split("-")
        return "-".join([*filter(None, words), f"{self.cores}c"][-6:])


def describe(folder: Path) -> Host:
    """Look at this machine and at the disk that holds the folder."""
    return Host(
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)),
        memory_gb=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        load_average=round(os.getloadavg()[0], 2),
        kernel=f"{platform.system()} {platform.release()}",
        filesystem=filesystem(folder),
        python=platform.python_version(),
        libraries={name: importlib.metadata.version(name) for name in _PACKAGES},
        commit=_commit(),
    )


def filesystem(folder: Path) -> str:
    """Name type, device and options of the file system that holds the folder."""
    found = ("", "unknown")
    with Path("/proc/mounts").open(encoding="utf-8") as lines:
        for line in lines:
            device, mount, kind, options = line.split()[:4]
            inside = folder.resolve().is_relative_to(mount)
            if inside and len(mount) >= len(found[0]):
                found = (mount, f"{kind} on {device} ({options})")
    return found[1]


def _cpu() -> str:
    with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    """Name HEAD, with -dirty where the checkout differs from it."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or "none"
