"""MCAP with LZ4: a channel for each field, a message for each packet, chunks of 4 MB.

fdatasync each 32 MB; what is not in a finished chunk then, up to 4 MB, is not in the file yet. The
index stands at the end: after a power cut the file is read from its start, or `mcap recover`ed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.compare.columns import cut, with_times
from bench.compare.packets import FIELDS, array_of, groups

if TYPE_CHECKING:
    from kvstore.schema import Batch

NAME = "MCAP, LZ4"
PACKAGES: tuple[str, ...] = ("mcap", "lz4")
COMPRESSES = True
DURABILITY = "each 32 MB but the last chunk; index at the end"
LIVE = False
_CHUNK_BYTES = 4 << 20
# A double of this epoch is 0.2 us coarse: look wider, then decide on the stored values.
_WIDER_NS = 1_000


def write(path: Path, batches: Iterable[Batch]) -> None:
    """Write messages, sync each group."""
    from mcap.writer import CompressionType, Writer  # noqa: PLC0415  # a peer

    with path.open("xb") as file:
        writer = Writer(file, chunk_size=_CHUNK_BYTES, compression=CompressionType.LZ4)
        writer.start()
        schema = writer.register_schema(name="array", encoding="", data=b"")
        channels = {name: writer.register_channel(name, "raw", schema) for name in FIELDS}
        number = 0
        for group in groups(batches):
            for batch in group:
                at_ns = int(batch["timestamps"][0] * 1e9)
                for name, channel in channels.items():
                    content = batch[name].tobytes()
                    writer.add_message(channel, at_ns, content, at_ns, number)
                number += 1
            file.flush()
            os.fdatasync(file.fileno())
        writer.finish()
        file.flush()
        os.fdatasync(file.fileno())


def read(path: Path, start: float, stop: float, fields: Sequence[str]) -> Iterator[Batch]:
    """Read messages by topic and time; a packet's come one behind the other.

    All particles of a packet have one time, so that a message's time is its rows'.
    """
    from mcap.reader import make_reader  # noqa: PLC0415  # a peer

    wanted = with_times(fields)
    first_ns = max(0, int(max(start, 0.0) * 1e9) - _WIDER_NS)
    last_ns = None if stop == float("inf") else int(stop * 1e9) + _WIDER_NS
    batch: Batch = {}
    with path.open("rb") as file:
        messages = make_reader(file).iter_messages(wanted, starting_at=first_ns, ending_at=last_ns)
        for _, channel, message in messages:
            batch[channel.topic] = array_of(channel.topic, message.data)
            if len(batch) == len(wanted):
                found = cut(batch, fields, start, stop)
                if len(next(iter(found.values()))):
                    yield found
                batch = {}
