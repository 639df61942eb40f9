"""A .npz file back into batches: its arrays side by side, some rows of each at a time.

Nothing in the file is run: arrays of Python objects, which are pickles, are refused.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from kvstore.errors import KvstoreError, SchemaError
from kvstore.export.loaded import Loaded, batch_rows, schema_with_time
from kvstore.export.metadata import described
from kvstore.schema import Array, Batch, Field, Schema

_OURS = b'{"version"'  # how metadata.py's text begins


class _Header(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def load(path: Path, time: str) -> Loaded:
    """The arrays of an archive; all have a first axis of the same length."""
    try:
        with zipfile.ZipFile(path) as archive, ExitStack() as stack:
            headers = {
                name: _header(stack.enter_context(archive.open(member)), name)
                for name, member in _members(archive).items()
            }
            comment = archive.comment
    except (zipfile.BadZipFile, ValueError) as error:
        if isinstance(error, KvstoreError):
            raise
        raise KvstoreError(f"{path} cannot be read as .npz: {error}") from error
    _check_lengths(path, headers)
    known = described(comment if comment.startswith(_OURS) else None)
    fields = [_field(name, header, known.fields.get(name)) for name, header in headers.items()]
    schema = schema_with_time(fields, time or known.time, path)
    return Loaded(schema, _batches(path, schema, headers))


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


def _batches(path: Path, schema: Schema, headers: Mapping[str, _Header]) -> Iterator[Batch]:
    # Text of fixed width takes 4 bytes a character.
    row_bytes = sum(h.dtype.itemsize * int(np.prod(h.shape[1:])) for h in headers.values())
    step = max(1, batch_rows(schema) * schema.row_bytes // max(row_bytes, schema.row_bytes, 1))
    rows = next(iter(headers.values())).shape[0]
    with zipfile.ZipFile(path) as archive, ExitStack() as stack:
        members = {}
        for name, member in _members(archive).items():
            members[name] = stack.enter_context(archive.open(member))
            _header(members[name], name)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            yield {
                name: _rows(member, headers[name], count, name) for name, member in members.items()
            }


def _rows(member: IO[bytes], header: _Header, count: int, name: str) -> Array:
    shape = (count, *header.shape[1:])
    size = header.dtype.itemsize * int(np.prod(shape))
    data = member.read(size)
    if len(data) != size:
        raise KvstoreError(f"array {name!r} ends before its {header.shape[0]} rows do")
    return np.frombuffer(data, header.dtype).reshape(shape)
