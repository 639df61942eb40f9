"""Rows as one .npz file, an array a field: for numpy, MATLAB and friends.

An array's length stands before its data, so each field is spooled to a temporary file in one
pass over the rows and then copied into the archive: memory stays bounded, and the disk of
TMPDIR holds the uncompressed selection once. Text becomes a fixed-width unicode array. The
schema (metadata.py) is the archive's comment, where it is no array and fits 64 KB.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import IO, BinaryIO, Final

import numpy as np

from kvstore.errors import SchemaError
from kvstore.export.metadata import describe
from kvstore.schema import Array, Batch, Field

_COPY_BYTES: Final = 1 << 20
_TEXT_ROWS: Final = 4096


def write(
    batches: Iterable[Batch], fields: Sequence[Field], file: BinaryIO, *, time: str = ""
) -> int:
    """Write all rows; returns how many."""
    rows = 0
    with ExitStack() as stack:
        spools = [stack.enter_context(tempfile.TemporaryFile()) for _ in fields]
        widths = [1] * len(fields)
        for batch in batches:
            for number, (field, spool) in enumerate(zip(fields, spools, strict=True)):
                widths[number] = max(widths[number], spool_rows(batch[field.name], field, spool))
            rows += len(batch[fields[0].name])
        with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
            note = describe(fields, time)
            archive.comment = note if len(note) <= zipfile.ZIP_MAX_COMMENT else b""
            for field, spool, width in zip(fields, spools, widths, strict=True):
                with archive.open(f"{field.name}.npy", "w", force_zip64=True) as member:
                    copy_array(field, spool, width, rows, member)
    return rows


def spool_rows(array: Array, field: Field, spool: IO[bytes]) -> int:
    """Append rows to a spool; returns the longest text."""
    if not field.is_text:
        spool.write(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"")
        return 0
    texts = array.reshape(-1).tolist()
    if None in texts:
        raise SchemaError(
            f"field {field.name!r} holds None, which an .npz text array cannot; leave the field "
            "out (--fields) or use jsonl"
        )
    spool.writelines(json.dumps(text).encode() + b"\n" for text in texts)
    return max(map(len, texts), default=0)


def copy_array(field: Field, spool: IO[bytes], width: int, rows: int, member: IO[bytes]) -> None:
    """Write the array that was spooled, its header first."""
    dtype = np.dtype(f"<U{width}") if field.is_text else field.np_dtype
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
    np.lib.format.write_array_header_2_0(member, {**header, "shape": (rows, *field.shape)})
    spool.seek(0)
    if not field.is_text:
        shutil.copyfileobj(spool, member, _COPY_BYTES)
        return
    for texts in _lines(spool):
        member.write(np.array(texts, dtype).tobytes())


def _lines(spool: IO[bytes]) -> Iterator[list[str]]:
    while lines := list(islice(spool, _TEXT_ROWS)):
        yield [json.loads(line) for line in lines]
