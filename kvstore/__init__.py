"""kvstore: an embedded, time-keyed store for sensor data.

with kvstore.open("run.kv", mode="w") as store:
    store.stream("particles").append({"timestamps": t, "scattering": s, "spectral": p})

with kvstore.open("run.kv") as store:
    for batch in store["particles"].read("2026-02-17T15:32:37", "2026-02-17T15:32:38"):
        ...
"""

from kvstore.backup import BackupReport, backup
from kvstore.control import configure, drop, pin, unpin
from kvstore.damaged import record_damages
from kvstore.errors import (
    CursorError,
    DamageError,
    DiskFull,
    GapError,
    KvstoreError,
    NoFillError,
    PacketError,
    SchemaError,
    StoreClosed,
    StoreError,
    StoreFormatError,
    StoreLocked,
    StoreNotFound,
    StreamNotFound,
    TimeError,
)
from kvstore.follow import Cursor, CursorFile, Followed
from kvstore.gaps import Gap
from kvstore.libc import keep_freed_memory
from kvstore.recover import RecoverReport, recover
from kvstore.schema import Field, Schema
from kvstore.settings import Pin, Settings
from kvstore.store import Store, StoreInfo, StreamStats
from kvstore.store import open_store as open  # noqa: A004  # as in gzip.open: read kvstore.open
from kvstore.stream import Stream
from kvstore.untrusted import Damage
from kvstore.verify import VerifyReport, verify

__all__ = [
    "BackupReport",
    "Cursor",
    "CursorError",
    "CursorFile",
    "Damage",
    "DamageError",
    "DiskFull",
    "Field",
    "Followed",
    "Gap",
    "GapError",
    "KvstoreError",
    "NoFillError",
    "PacketError",
    "Pin",
    "RecoverReport",
    "Schema",
    "SchemaError",
    "Settings",
    "Store",
    "StoreClosed",
    "StoreError",
    "StoreFormatError",
    "StoreInfo",
    "StoreLocked",
    "StoreNotFound",
    "Stream",
    "StreamNotFound",
    "StreamStats",
    "TimeError",
    "VerifyReport",
    "backup",
    "configure",
    "drop",
    "keep_freed_memory",
    "open",
    "pin",
    "record_damages",
    "recover",
    "unpin",
    "verify",
]
