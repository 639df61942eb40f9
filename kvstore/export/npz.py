"""Rows as one .npz file, an array a field, or one field as .npy; and .npz back.

An array's length stands before its data, so each field is spooled to a temporary file in one
pass over the rows and then copied: memory stays bounded, and the disk holds the uncompressed
selection once more meanwhile. Text becomes a fixed-width unicode array, four bytes a character
of the longest. The schema (metadata.py) is the archive's comment, where it fits its 64 KB.

Nothing in a file that is read back is run: arrays of Python objects, which are pickles, are
refused.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, BinaryIO, Final, NamedTuple

import numpy as np

from kvstore.errors import KvstoreError, SchemaError
from kvstore.export.metadata import Loaded, Progress, batch_rows, describe, described
from kvstore.schema import Array, Batch, Field

_COPY_BYTES: Final = 1 << 20
_TEXTS_BYTES: Final = 4 << 20  # of fixed-width text in hand
_OURS: Final = b'{"version"'  # how metadata.py's text begins


# ---- out ----


def write(
    batches: Iterable[Batch],
    fields: Sequence[Field],
    file: BinaryIO,
    *,
    time: str = "",
    spool: Path | None = None,
) -> int:
    """Write all rows; returns how many. spool: a folder for temporary files, else TMPDIR's."""
    with _spooled(batches, fields, spool) as spools, zipfile.ZipFile(file, "w") as archive:
        note = describe(fields, time)
        archive.comment = note if len(note) <= zipfile.ZIP_MAX_COMMENT else b""
        for each in spools:
            with archive.open(f"{each.field.name}.npy", "w", force_zip64=True) as member:
                each.copy_to(member)
        return spools[0].rows


def write_npy(
    batches: Iterable[Batch], fields: Sequence[Field], file: BinaryIO, *, spool: Path | None = None
) -> int:
    """Write all rows of the one field as .npy; returns how many."""
    if len(fields) != 1:
        names = ", ".join(field.name for field in fields)
        raise SchemaError(
            f".npy holds one array, and {len(fields)} fields were asked for ({names}): name one "
            "with --fields, or use .npz"
        )
    with _spooled(batches, fields, spool) as (only,):
        only.copy_to(file)
        return only.rows


@contextmanager
def _spooled(
    batches: Iterable[Batch], fields: Sequence[Field], folder: Path | None
) -> Iterator[list[_Spool]]:
    with ExitStack() as stack:
        spools = [
            _Spool(field, stack.enter_context(tempfile.TemporaryFile(dir=folder)))
            for field in fields
        ]
        for batch in batches:
            for each in spools:
                each.add(batch[each.field.name])
        yield spools


class _Spool:
    """One field's rows in a temporary file: numbers as they are, text as lines of JSON."""

    def __init__(self, field: Field, file: IO[bytes]):
        self.field = field
        self.rows = 0
        self._file = file
        self._width = 1  # of the longest text

    def add(self, array: Array) -> None:
        self.rows += len(array)
        if not self.field.is_text:
            self._file.write(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"")
            return
        texts = array.reshape(-1).tolist()
        self._check(texts)
        self._file.writelines(json.dumps(text).encode() + b"\n" for text in texts)
        self._width = max(self._width, max(map(len, texts), default=0))

    def _check(self, texts: Sequence[str | None]) -> None:
        """What numpy's text would lose: it pads with NUL."""
        if any(text is None or text.endswith("\0") for text in texts):
            what = "None" if None in texts else "text that ends in NUL"
            raise SchemaError(
                f"field {self.field.name!r} holds {what}, which an .npz text array cannot; leave "
                "the field out (--fields) or use parquet or jsonl"
            )

    def copy_to(self, member: IO[bytes]) -> None:
        """Write the array, its header first."""
        dtype = np.dtype(f"<U{self._width}") if self.field.is_text else self.field.np_dtype
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
        shape = (self.rows, *self.field.shape)
        np.lib.format.write_array_header_2_0(member, {**header, "shape": shape})
        self._file.seek(0)
        if not self.field.is_text:
            shutil.copyfileobj(self._file, member, _COPY_BYTES)
            return
        lines_each = max(1, _TEXTS_BYTES // dtype.itemsize)
        while lines := list(islice(self._file, lines_each)):
            member.write(np.array([json.loads(line) for line in lines], dtype).tobytes())


# ---- in ----


class _Header(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape[1:])


def load(path: Path, progress: Progress) -> Loaded:
    """The arrays of an archive; all have a first axis of the same length."""
    with _named(path), zipfile.ZipFile(path) as archive, ExitStack() as stack:
        headers = {
            name: _header(stack.enter_context(archive.open(member)), name)
            for name, member in _members(archive).items()
        }
        comment = archive.comment
        if damaged := archive.testzip():  # else wrong rows would be stored until a sum shows it
            raise KvstoreError(
                f"{path}: {damaged} fails its checksum; take another copy of the file"
            )
    _check_lengths(path, headers)
    known = described(comment if comment.startswith(_OURS) else None)
    fields = tuple(_field(name, header, known.fields.get(name)) for name, header in headers.items())
    time = known.time if known.fields.get(known.time) in fields else ""
    return Loaded(fields, time, _batches(path, headers, progress))


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name the file in what zipfile and numpy say of it."""
    try:
        yield
    except KvstoreError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError) as error:
        raise KvstoreError(f"{path} cannot be read as .npz: {error}") from error


def _members(archive: zipfile.ZipFile) -> dict[str, str]:
    names = archive.namelist()
    return {name.removesuffix(".npy"): name for name in names if name.endswith(".npy")}


def _header(member: IO[bytes], name: str) -> _Header:
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(member)
    else:
        raise SchemaError(f"array {name!r}: .npy version {version}, expected (1, 0) or (2, 0)")
    if dtype.hasobject or dtype.fields or not shape or (fortran and len(shape) > 1):
        raise SchemaError(
            f"array {name!r} ({dtype}, shape {shape}) cannot be imported; expected numbers, times "
            "or text in C order with a first axis of rows"
        )
    return _Header(shape, dtype)


def _check_lengths(path: Path, headers: Mapping[str, _Header]) -> None:
    lengths = {name: header.shape[0] for name, header in headers.items()}
    if len(set(lengths.values())) != 1:
        raise SchemaError(f"{path}: expected arrays of one length, found {lengths or 'none'}")


def _field(name: str, header: _Header, known: Field | None) -> Field:
    found = Field(name, header.dtype, header.shape[1:])
    same = known and (known.np_dtype, known.shape) == (found.np_dtype, found.shape)
    return known if known and same else found


def _batches(path: Path, headers: Mapping[str, _Header], progress: Progress) -> Iterator[Batch]:
    # Text of fixed width takes its bytes here, and not a field's.
    step = batch_rows([Field(n, "u1", (h.row_bytes,)) for n, h in headers.items()])
    rows = next(iter(headers.values())).shape[0]
    with _named(path), zipfile.ZipFile(path) as archive, ExitStack() as stack:
        members = {}
        for name, member in _members(archive).items():
            members[name] = stack.enter_context(archive.open(member))
            _header(members[name], name)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            yield {
                name: _rows(member, headers[name], count, name) for name, member in members.items()
            }
            progress((start + count) / rows)


def _rows(member: IO[bytes], header: _Header, count: int, name: str) -> Array:
    size = header.row_bytes * count
    data = member.read(size)
    if len(data) != size:
        raise KvstoreError(f"array {name!r} ends before its {header.shape[0]} rows do")
    return np.frombuffer(data, header.dtype).reshape(count, *header.shape[1:])
