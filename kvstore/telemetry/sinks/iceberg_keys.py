"""Which readings are new, which are duplicates, which conflict: the anti-join of a commit.

Two steps. First a filter by hash: for each partition (day, bucket) that a batch touches, the
hashed keys of the files that may overlap it in time, from the two key columns, kept in memory as
sorted runs. Then the suspects, and only they, are compared exactly with each other and with the
stored rows, read from the files in which they can be.

The filter may hold too much (rows that are gone since, two keys of one hash): that costs a look,
never an answer. It never holds too little: a file is looked up by its path, which is written once.
Memory is bounded by KEYS_BYTES_MAX; what does not fit is read again for each batch.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyiceberg.transforms import BucketTransform
from pyiceberg.types import StringType

from kvstore.telemetry.counts import HOUR_US, named
from kvstore.telemetry.records import Count, Fate, Readings
from kvstore.telemetry.sinks import iceberg_rows as rows
from kvstore.telemetry.sinks.iceberg_compare import compared, plain
from kvstore.telemetry.sinks.iceberg_lake import scan
from kvstore.telemetry.sinks.iceberg_scan import (
    DataFile,
    Partition,
    between,
    encoded,
    keys_of,
    tasks,
)
from kvstore.telemetry.sinks.iceberg_write import Piece

DAY_US: Final = 86_400_000_000
KEYS_BYTES_MAX: Final = 512 << 20  # 64 million keys of 8 bytes
FILE_BITS: Final = np.uint64(0xFFFF)  # of a key: the number of its file; the rest is the hash
ANY_FILE: Final = 0xFFFF  # the number of all files beyond so many of a partition
DEVICES_MAX: Final = 1_000_000  # whose hashes and buckets are remembered

Hashes = NDArray[np.uint64]


class Devices:
    """Hash and bucket of each device, computed once."""

    def __init__(self, buckets: int):
        self._bucket = BucketTransform(buckets).transform(StringType())
        self._known: dict[str, tuple[int, int]] = {}

    def of(self, names: Sequence[str]) -> tuple[Hashes, NDArray[np.int64]]:
        """Hashes and buckets of some devices."""
        if len(self._known) > DEVICES_MAX:
            self._known.clear()
        known = self._known
        for name in names:
            if name not in known:
                digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
                # Iceberg's bucket of an empty text is null in pyiceberg; no device is named so.
                known[name] = int.from_bytes(digest, "little"), self._bucket(name) or 0
        found = [known[name] for name in names]
        hashes = np.array([each for each, _ in found], np.uint64)
        return hashes, np.array([bucket for _, bucket in found], np.int64)


class Batch:
    """Readings of one commit, with what the anti-join and the writing of files want of them."""

    def __init__(self, readings: Readings, schema: Any, devices: Devices):
        self.schema_id = schema.schema_id
        self.table = rows.to_arrow(readings, schema)
        self.ts_us = readings.ts_us
        column = encoded(self.table[rows.DEVICE])
        self._names: list[str] = column.dictionary.to_pylist()
        self._codes = column.indices.to_numpy().astype(np.int64)
        hashes, buckets = devices.of(self._names)
        self.hashes = mixed(hashes[self._codes], self.ts_us)
        self._partition = np.empty((len(self), 2), np.int64)
        self._partition[:, 0] = self.ts_us // DAY_US
        self._partition[:, 1] = buckets[self._codes]
        self._order = self._in_order()
        # Each partition that it touches, and the numbers of its rows there, in order of time.
        self.partitions = list(self._split())

    def __len__(self) -> int:
        return len(self.ts_us)

    def _in_order(self) -> NDArray[np.int64]:
        """Numbers of the rows by partition, then time; what comes in order of time is cheap."""
        day, bucket = self._partition.T
        if len(self) and np.all(self.ts_us[1:] >= self.ts_us[:-1]):
            if day[0] == day[-1] and bucket.max() <= np.iinfo(np.uint8).max:
                return np.argsort(bucket.astype(np.uint8), kind="stable")  # by radix
            return np.lexsort((bucket, day))
        return np.lexsort((self.ts_us, bucket, day))

    def _split(self) -> Iterator[tuple[Partition, NDArray[np.int64]]]:
        if not len(self):
            return
        found = self._partition[self._order]
        steps = np.flatnonzero((found[1:] != found[:-1]).any(axis=1)) + 1
        ends = [0, *steps.tolist(), len(self)]
        for start, stop in itertools.pairwise(ends):
            day, bucket = found[start].tolist()
            yield (day, bucket), self._order[start:stop]

    def pieces(self, kept: NDArray[np.bool_]) -> Iterator[Piece]:
        """The kept rows of each partition, in order of time."""
        for partition, numbers in self.partitions:
            yield Piece(partition, self.table.take(pa.array(numbers[kept[numbers]])))

    def counts(self, fates: NDArray[np.uint8]) -> list[Count]:
        """What counts.decided says, from the codes of the devices: ten times as fast."""
        hours, hour = np.unique(self.ts_us // HOUR_US, return_inverse=True)
        groups, values = np.unique(
            (self._codes * len(hours) + hour) * len(Fate) + fates, return_counts=True
        )
        return named(
            ((self._names[code], int(hours[at]) * HOUR_US, fate), value)
            for (code, at), fate, value in zip(
                (divmod(int(group) // len(Fate), len(hours)) for group in groups),
                (int(group) % len(Fate) for group in groups),
                values.tolist(),
                strict=True,
            )
        )


def mixed(devices: Hashes, ts_us: NDArray[np.int64]) -> Hashes:
    """One hash of device and time (the finalizer of splitmix64), of 48 bits: the upper ones."""
    value = devices ^ (ts_us.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    found: Hashes = (value ^ (value >> np.uint64(31))) & ~FILE_BITS
    return found


class Runs:
    """Keys as sorted runs, each at least twice as long as the next: few to search.

    A key is a hash whose low bits say in which file it is.
    """

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}  # of the files whose keys are here, by path
        self._runs: list[Hashes] = []

    def __len__(self) -> int:
        return sum(map(len, self._runs))

    def number_of(self, path: str) -> int:
        """A number for a file whose keys are about to come."""
        return self.numbers.setdefault(path, min(len(self.numbers), ANY_FILE))

    def add(self, keys: Hashes) -> None:
        """Put some more in."""
        self._runs.append(np.sort(keys))
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            merged = np.concatenate((self._runs.pop(), self._runs.pop()))
            merged.sort(kind="stable")  # two sorted pieces: one merge
            self._runs.append(merged)

    def find(self, wanted: Hashes) -> tuple[NDArray[np.bool_], set[int]]:
        """Which of the hashes are there, and in which files; fast where they are sorted."""
        found, files = np.zeros(len(wanted), np.bool_), set[int]()
        for run in self._runs:
            at, asked = np.searchsorted(run, wanted), np.arange(len(wanted))
            while len(asked):  # once more for each further key of one hash
                within = at < len(run)
                at, asked = at[within], asked[within]
                same = (run[at] & ~FILE_BITS) == wanted[asked]
                at, asked = at[same], asked[same]
                found[asked] = True
                files.update(np.unique(run[at] & FILE_BITS).tolist())
                at = at + 1
        return found, files


def _in_sorted(run: Hashes, wanted: Hashes) -> NDArray[np.bool_]:
    at = np.searchsorted(run, wanted)
    at[at == len(run)] = 0
    found: NDArray[np.bool_] = run[at] == wanted
    return found


class Keys:
    """The keys of the lake, as far as batches have asked for them."""

    def __init__(self, buckets: int, *, bytes_max: int = KEYS_BYTES_MAX):
        self.devices = Devices(buckets)
        self._rows_max = bytes_max // 8
        self._runs: OrderedDict[Partition, Runs] = OrderedDict()

    def fates(self, batch: Batch, table: Any, files: Sequence[DataFile]) -> NDArray[np.uint8]:
        """What becomes of each reading, if the table is as it is now."""
        fates = np.full(len(batch), Fate.STORED, np.uint8)
        stored = np.zeros(len(batch), np.bool_)  # suspects to be stored already
        where: list[DataFile] = []
        paths = {file.path for file in files}
        for partition, numbers in batch.partitions:
            if not self._opened(partition).numbers.keys() <= paths:  # compacted: in other files
                del self._runs[partition]
            first_us, last_us = int(batch.ts_us[numbers[0]]), int(batch.ts_us[numbers[-1]])
            near = [
                file
                for file in files
                if file.partition in (partition, None) and file.overlaps(first_us, last_us)
            ]
            stored[numbers], holding = self._stored(partition, near, batch.hashes[numbers], table)
            where += holding
        twice = _repeated(batch.hashes)
        suspects = np.flatnonzero(np.isin(batch.hashes, batch.hashes[stored | twice]))
        if len(suspects):
            wanted = np.flatnonzero(stored)
            columns = (rows.DEVICE, rows.TS, *rows.value_names(table.schema()), rows.EXTRAS)
            found = self._stored_rows(batch, wanted, columns, table, where)
            fates[suspects] = compared(found, batch.table.select(columns).take(suspects))
        return fates

    def _stored_rows(
        self,
        batch: Batch,
        wanted: NDArray[np.int64],
        columns: Sequence[str],
        table: Any,
        files: Sequence[DataFile],
    ) -> pa.Table:
        """The stored rows of some readings' identities, and maybe some of another one's hash."""
        hashes, ts_us = np.unique(batch.hashes[wanted]), np.sort(batch.ts_us[wanted])
        parts = [table.schema().select(*columns).as_arrow().empty_table().select(columns)]
        for file in {file.path: file for file in files}.values():
            low = int(np.searchsorted(ts_us, file.first_us))
            high = int(np.searchsorted(ts_us, file.last_us, "right"))
            if low < high:
                where = between(int(ts_us[low]), int(ts_us[high - 1]))
                found = scan(table, tasks(table, [file]), columns, where)
                here = self.hashes_of(encoded(found[rows.DEVICE]), rows.micros(found[rows.TS]))
                parts.append(plain(found.filter(_in_sorted(hashes, here)), parts[0].schema))
        return pa.concat_tables(parts)

    def _stored(
        self, partition: Partition, near: Sequence[DataFile], wanted: Hashes, table: Any
    ) -> tuple[NDArray[np.bool_], list[DataFile]]:
        """Which hashes are stored, as far as hashes tell, and the files that hold them."""
        order = np.argsort(wanted)
        in_order = wanted[order]
        hits, holding = np.zeros(len(wanted), np.bool_), []
        runs = self._opened(partition)
        fresh: list[Hashes] = []
        for file in near:
            if file.path in runs.numbers:
                continue
            hashes = self.hashes_of(*keys_of(table, file))
            if self._make_room(sum(map(len, fresh)) + len(hashes), partition):
                fresh.append(hashes | np.uint64(runs.number_of(file.path)))
            elif len(hashes) and (here := _in_sorted(np.sort(hashes), in_order)).any():
                hits |= here
                holding.append(file)
        if fresh:
            runs.add(np.concatenate(fresh))
        known, numbers = runs.find(in_order) if near else (hits, set())
        holding += [file for file in near if runs.numbers.get(file.path) in numbers]
        found = np.empty_like(hits)
        found[order] = hits | known
        return found, holding

    def hashes_of(self, devices: pa.DictionaryArray, ts_us: NDArray[np.int64]) -> Hashes:
        """Hashes of stored keys."""
        hashes, _ = self.devices.of(devices.dictionary.to_pylist())
        return mixed(hashes[devices.indices.to_numpy(zero_copy_only=False)], ts_us)

    def add(self, batch: Batch, kept: NDArray[np.bool_], files: Sequence[DataFile]) -> None:
        """Remember what a commit has stored, so that its own files need not be read."""
        for file in files:
            for partition, numbers in batch.partitions:
                if file.partition == partition:
                    self._add(partition, file, batch.hashes[numbers[kept[numbers]]])

    def _add(self, partition: Partition, file: DataFile, hashes: Hashes) -> None:
        if self._make_room(len(hashes), partition):
            runs = self._opened(partition)
            runs.add(hashes | np.uint64(runs.number_of(file.path)))

    def _opened(self, partition: Partition) -> Runs:
        runs = self._runs.setdefault(partition, Runs())
        self._runs.move_to_end(partition)
        return runs

    def _make_room(self, more: int, keep: Partition) -> bool:
        """Forget partitions that were not asked for longest; False where that is not enough."""
        held = sum(map(len, self._runs.values()))
        while held + more > self._rows_max:
            oldest = next(iter(self._runs), keep)
            if oldest == keep:
                return False
            held -= len(self._runs.pop(oldest))
        return True


def _repeated(hashes: Hashes) -> NDArray[np.bool_]:
    order = np.argsort(hashes, kind="stable")
    same = np.diff(hashes[order]) == 0
    found = np.zeros(len(hashes), np.bool_)
    found[order[1:][same]] = True
    return found
