"""What titles and notes say: how much there is, from when to when, what is left out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kvstore.ingest import PARTICLES
from kvstore.plots import panels
from kvstore.plots.axes import RELATIVE_BELOW_S, text_of
from kvstore.plots.digest import Digest, Elements, Line
from kvstore.reading import Scan
from kvstore.schema import Array, Field
from kvstore.store import Store
from kvstore.stream import Stream
from kvstore.survey import Survey
from kvstore.timestamps import time_to_ns


def name(store: Store, target: Stream) -> str:
    """What is drawn: run.kv: particles."""
    return f"{panels.short(Path(store.path).absolute().name)}: {panels.short(target.name)}"


def noun(target: Stream) -> str:
    """What rows of the stream are called."""
    return "particles" if target.name == PARTICLES else "rows"


def extent(target: Stream, found: Survey) -> str:
    """How many rows, from when to when; a day is named once."""
    digits = 3 if found.span.length_s > RELATIVE_BELOW_S else 9
    ends = [text_of(ns, digits) for ns in (found.span.start_ns, found.span.stop_ns)]
    rows = f"{found.total_rows:,} {noun(target)}"
    if found.total_rows == 1:
        return f"1 {noun(target).removesuffix('s')} at {ends[0]}"
    if ends[0] == ends[1]:
        return f"{rows}, all at {ends[0]}"
    if ends[0][:10] == ends[1][:10]:
        ends[1] = ends[1][11:]
    return f"{rows} from {ends[0].removesuffix(' UTC')} to {ends[1]}"


def share(found: Survey, summary: Digest) -> str:
    """Whether all rows are in the picture, and which values are missing."""
    sampled = [each.sampled_rows for each in summary.fields if isinstance(each, Elements)]
    read = f"{summary.rows:,} of {found.total_rows:,} rows"
    words = []
    if summary.step > 1:
        words.append(f"Fields show a random sample, evenly over time: {read}.")
    if sampled and min(sampled) < summary.rows:
        words.append(
            f"Means are of {summary.rows:,} rows, percentiles of {min(sampled):,} drawn from them."
        )
    missing = {each.field.name: each.missing for each in summary.fields if each.missing}
    if missing:
        listed = ", ".join(f"{panels.short(name)} {count:,}" for name, count in missing.items())
        words.append(f"Values missing or not finite: {listed}.")
    return " ".join(words)


def left_out(target: Stream, chosen: Sequence[Field]) -> str:
    """The fields that have no panel."""
    there = {field.name for field in chosen} | {target.schema.time}
    out = [panels.short(name) for name in target.schema.names if name not in there]
    more = f" and {len(out) - 4} more" if len(out) > 4 else ""  # noqa: PLR2004
    return f"Not shown: {', '.join(out[:4])}{more}." if out else ""


def rank_name(rank: float) -> str:
    """A percentile as a title."""
    return "median" if rank == 50 else f"percentile {rank:g}"  # noqa: PLR2004


def line_words(found: Line) -> str:
    """A scalar field where all rows have one time."""
    if not len(found.mean):
        return f"{panels.quantity(found.field)}:  no values"
    mean, low, high = (float(each[0]) for each in (found.mean, found.low, found.high))
    if found.field.np_dtype.kind == "M":
        return f"{panels.quantity(found.field)}:  {text_of(round(mean * 1e6) * 1000)}"
    said = f"{panels.quantity(found.field)}:  {mean:.6g}"
    return said if low == high else f"{said}, from {low:.6g} to {high:.6g}"


def value_text(value: Array, field: Field) -> str:
    """A scalar of one row, without loss."""
    plain = np.asarray(value).reshape(-1)[0]
    kind = field.np_dtype.kind
    if kind == "M" and not np.isnat(plain):
        return f"{str(plain).replace('T', ' ')} UTC"
    if kind == "m":
        return str(plain.view(np.int64)) if not np.isnat(plain) else "NaT"
    return str(plain)


def whereabouts(target: Stream, scan: Scan) -> str:
    """Where rows are, if not in the range."""
    span = target.span()
    if span is None:
        return "The stream has no rows yet."
    first, last = (text_of(time_to_ns(end, scan.info.schema.time_dtype)) for end in span)
    return f"The stream has rows from {first.removesuffix(' UTC')} to {last}."
