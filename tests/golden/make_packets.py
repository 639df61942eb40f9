"""Writes the golden packet streams: the same two packets by each numpy and pickle protocol.

    python tests/golden/make_packets.py      # once with numpy 1.26, once with numpy 2

Run it only to add a numpy version; files that exist are what the tests hold the decoder to, and
are not written again. ``expected()`` is what they hold.
"""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "packets"


def printable(dtype, shape):
    """Values of printable bytes: protocol 0 escapes others, which would make large files."""
    size = np.dtype(dtype).itemsize * int(np.prod(shape))
    return (33 + np.arange(size) * 7 % 59).astype("u1").view(dtype).reshape(shape)


def expected():
    """The packets of each file, in order."""
    particles = {
        "timestamps": np.array([1771342356.080619]),
        "scattering": printable("<i4", (1, 64, 16)),
        "spectral": printable("<i4", (1, 32, 16)),
    }
    time = np.array(["2026-02-17T15:32:36.080619", "1969-12-31", "NaT"], "M8[us]")
    shared = np.array([1.5, 2.5, -0.0])
    other = {
        "time": time,
        "span": time.astype("M8[25s]") - time[0].astype("M8[25s]"),
        "flag": np.array([True, False, True]),
        "big_endian": np.array([[1, 2], [3, 4], [5, 6]], ">u2"),
        "fortran": np.asfortranarray(np.arange(6, dtype="f4").reshape(3, 2)),
        "transposed": np.arange(12, dtype="i8").reshape(2, 3, 2).transpose(1, 2, 0),
        "strided": np.arange(24, dtype="i2")[::8],
        "wave": np.array([1j, 2 - 1j, 0], "c16"),
        "half": np.array([1, np.nan, np.inf], "f2"),
        "text": np.array(["", "é€😀", "plain"]),
        "no_columns": np.zeros((3, 0), "i4"),
        "shared": shared,
        "shared_too": shared,
        "blank_name é": np.zeros(3, "i1"),
    }
    return [particles, other]


def stream(protocol):
    """Both packets, framed."""
    pickles = [pickle.dumps(packet, protocol) for packet in expected()]
    return b"".join(struct.pack(">I", len(data)) + data for data in pickles)


def main():
    """One file for each protocol."""
    FOLDER.mkdir(exist_ok=True)
    for protocol in range(6):
        path = FOLDER / f"numpy{np.__version__}-protocol{protocol}.packets"
        if not path.exists():
            path.write_bytes(stream(protocol))


if __name__ == "__main__":
    main()
