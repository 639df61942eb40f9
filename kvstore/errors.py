"""The exceptions that kvstore raises, one tree.

    KvstoreError
    ├── TimeError         a time that cannot be read or does not fit (also a ValueError)
    ├── SchemaError       a batch, field or schema that does not fit the stream (also a ValueError)
    │   └── NoFillError   a field that some batches lack and that has no honest fill value
    ├── StreamNotFound    no stream of that name in the store (also a KeyError)
    ├── PacketError       malformed input on a byte stream; names packet number and byte offset
    ├── DamageError       stored bytes that fail their checksum; names stream, field and time span
    ├── CursorError       a place to follow from that is not in this store (also a ValueError)
    ├── GapError          batches that a follower should get next are no longer in the store
    ├── ListenError       a socket that cannot be listened on, or is in use
    ├── DayfilesError     day files that cannot be made, or a value that cannot be explained
    ├── TelemetryError    the telemetry pipeline
    │   ├── ContractError     a contract that is wrong or breaks its past (also a ValueError)
    │   ├── SettingsError     a pipeline's settings that cannot be read (also a ValueError)
    │   ├── TooManyRejected   more rejected events than were allowed; all of them are committed
    │   ├── SourceError       events that cannot be read: gone, recreated, past their retention
    │   └── SinkError         a sink that cannot be opened, changed or written
    │       ├── Fenced            somebody else has claimed the place; nothing was kept
    │       └── CommitUnknown     the reply to a commit was lost: it may or may not be there
    └── StoreError        the store itself
        ├── StoreNotFound     no store at that path (also a FileNotFoundError)
        ├── StoreFormatError  not a store, a truncated segment, or a newer format version
        ├── StoreLocked       another process is writing; names its pid
        ├── StoreClosed       the handle was closed, or is used in a forked child
        └── DiskFull          no room; committed rows are intact, flush again once there is room

Every message says what was found, what was expected and what to do. Errors of other
libraries are translated once, where they are met, and kept as ``__cause__``.
"""

from __future__ import annotations


class KvstoreError(Exception):
    """Anything kvstore raises on purpose."""


class TimeError(KvstoreError, ValueError):
    """A time that cannot be read, or lies outside what the store can hold (1677-2262)."""


class SchemaError(KvstoreError, ValueError):
    """A batch, field or schema that does not fit the stream."""


class NoFillError(SchemaError):
    """Some batches in the range lack a requested field, and no fill value would be honest."""


class StreamNotFound(KvstoreError, KeyError):
    """The store holds no stream of that name."""

    def __str__(self) -> str:
        """The message itself: KeyError would print its repr."""
        return str(self.args[0]) if self.args else ""


class PacketError(KvstoreError, ValueError):
    """Malformed input on a byte stream.

    packet: number of the offending packet, from 0. offset: position in the stream of the
    first byte of that packet's frame. whole: True where the frame itself was complete, so
    that reading can go on behind it.
    """

    def __init__(self, reason: str, *, packet: int = 0, offset: int = 0, whole: bool = False):
        super().__init__(f"packet {packet} at byte {offset}: {reason}")
        self.reason = reason
        self.packet = packet
        self.offset = offset
        self.whole = whole

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by keyword: the constructor takes more than the message."""
        return (_packet_error, (self.reason, self.packet, self.offset, self.whole))


def _packet_error(reason: str, packet: int, offset: int, whole: bool) -> PacketError:  # noqa: FBT001
    return PacketError(reason, packet=packet, offset=offset, whole=whole)


class DamageError(KvstoreError):
    """Stored bytes that fail their checksum, or an index entry whose block is missing."""


class CursorError(KvstoreError, ValueError):
    """A cursor that cannot be read, or is one of another store, another stream or a later state."""


class GapError(KvstoreError):
    """Batches that a follower should get next are no longer in the store.

    first, stop: their sequences, ``first`` included, ``stop`` not.
    """

    def __init__(self, message: str, *, first: int = 0, stop: int = 0):
        super().__init__(message)
        self.first = first
        self.stop = stop

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by keyword: the constructor takes more than the message."""
        return (_gap_error, (str(self), self.first, self.stop))


def _gap_error(message: str, first: int, stop: int) -> GapError:
    return GapError(message, first=first, stop=stop)


class ListenError(KvstoreError):
    """A socket that cannot be listened on: its path is taken, too long, or not the one given."""


class DayfilesError(KvstoreError):
    """Day files that cannot be made, such as without input, or a value that is not there."""


class TelemetryError(KvstoreError):
    """Something is wrong in the telemetry pipeline."""


class ContractError(TelemetryError, ValueError):
    """A contract that cannot be read, or that breaks what came before it."""


class SettingsError(TelemetryError, ValueError):
    """A pipeline's settings that are misspelt, contradict each other or cannot be read."""


class TooManyRejected(TelemetryError):
    """More events were rejected than the user allows; all that was read is committed."""


class SourceError(TelemetryError):
    """Events that cannot be read: the source is gone, was recreated, or has dropped them."""


class SinkError(TelemetryError):
    """A sink that cannot be opened, changed or written; what was committed is intact."""


class Fenced(SinkError):
    """Another worker has claimed a place since, or its position has moved; nothing was kept."""


class CommitUnknown(SinkError):
    """The reply to a commit was lost: it may or may not have happened. Settle before going on."""


class StoreError(KvstoreError):
    """Something is wrong with the store as a whole."""


class StoreNotFound(StoreError, FileNotFoundError):
    """There is no store at that path."""


class StoreFormatError(StoreError):
    """Not a store, a truncated or foreign segment file, or a newer format version."""


class StoreLocked(StoreError):
    """Another process is writing to the store."""


class StoreClosed(StoreError):
    """The handle was closed, or is used in a process forked from the one that opened it."""


class DiskFull(StoreError):
    """No room on the disk. What was committed is intact; flush again once there is room."""
