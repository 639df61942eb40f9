"""``kvstore info``: what a store holds; tables for people, lines for tools, JSON for programs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import typer

from kvstore import store as stores
from kvstore.cli.limits import plain_gap
from kvstore.cli.terminal import quiet_if_closed, size_text
from kvstore.gaps import KINDS, Gap
from kvstore.schema import Array
from kvstore.settings import Pin
from kvstore.survey import rate_unit, rough_rates
from kvstore.timestamps import MAX_NS, MIN_NS, format_time

_SPARK_BINS: Final = 40  # fits 80 columns
_RATES_S: Final = 0.1  # for all streams together; then their summaries have to do
_SPARKS: Final = " ▁▂▃▄▅▆▇█"
_ASCII_SPARKS: Final = " .:-=+*#"  # for terminals without Unicode
_GAPS_SHOWN: Final = 5
_TO_THE_MS: Final = len("2026-02-17 15:32:37.250")
_PER_STREAM: Final = ("rows", "first", "last", "batches", "raw_bytes", "stored_bytes", "ratio")


def info(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The store.")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Show what a store holds.

    Streams with their fields, rows, time spans, bytes and ratios; segments, the last commit,
    marks, pins, gaps. Takes milliseconds at any size. A terminal gets tables, and about the
    rate of each stream from its first row to its last, which may take 0.1 s; a pipe gets lines
    of words separated by tabs.
    """
    to_terminal = sys.stdout.isatty() and not as_json
    with stores.open_store(path) as store:
        found = _plain(store)
        rates = _rates(store) if to_terminal else {}
    with quiet_if_closed():
        if as_json:
            print(json.dumps(found, indent=2, default=str))
        elif to_terminal:
            _show_tables(found, rates)
        else:
            for words in _lines(found):
                print("\t".join("" if word is None else str(word) for word in words))


def _rates(store: stores.Store) -> dict[str, Array]:
    until = time.perf_counter() + _RATES_S
    return {
        name: rough_rates(store[name], _SPARK_BINS, is_late=lambda: time.perf_counter() > until)
        for name in store
    }


def _lines(found: dict[str, Any]) -> Iterator[list[Any]]:
    for key, value in found.items():
        if key not in ("streams", "marks", "pins", "gaps"):
            yield ["store", key, value]
    for name, value in found["marks"].items():
        yield ["mark", name, value]
    for pin in found["pins"]:
        yield ["pin", *pin.values()]
    for kind, count in found["gaps"]["count"].items():
        yield ["gaps", kind, *count.values()]
    for stream in found["streams"]:
        for key in _PER_STREAM:
            yield ["stream", stream["name"], key, stream[key]]
        for field in stream["fields"]:
            yield ["field", stream["name"], *_described(field)]


def _described(field: dict[str, Any]) -> list[str]:
    shape = "x".join(map(str, field["shape"])) or "1"
    return [field["name"], field["dtype"], shape, field["unit"], field["description"]]


def _show_tables(found: dict[str, Any], rates: dict[str, Array]) -> None:
    from rich import box, console, table, text  # noqa: PLC0415  # loaded only where it is shown

    terminal = console.Console()
    sparks = _ASCII_SPARKS if terminal.options.ascii_only else _SPARKS

    def show(rows: list[list[str]], title: str = "", header: Sequence[str] = ()) -> None:
        shown = table.Table(
            *header,
            title=text.Text(title) if title else None,
            title_justify="left",
            title_style="bold",
            show_header=bool(header),
            box=box.SIMPLE_HEAD if header else None,
            padding=(0, 2),
        )
        for row in rows:
            shown.add_row(*map(text.Text, row))  # Text: names are not markup
        terminal.print(shown)

    show(_about_store(found), f"Store {found['path']}")
    if found["pins"]:
        terminal.print()
        show(
            [[f"pin {p['id']}", _and_words(_stretch(p), p["label"])] for p in found["pins"]], "Pins"
        )
    if newest := found["gaps"]["newest"]:
        terminal.print()
        show(
            [[_gap_text(gap), _and_words(_stretch(gap), gap["detail"])] for gap in newest],
            "Newest gaps",
        )
    for stream in found["streams"]:
        terminal.print()
        rate = ["rate", _sparkline(rates[stream["name"]], sparks)]
        show([*_about_stream(stream), rate], f"Stream {stream['name']}")
        fields = [_described(field) for field in stream["fields"]]
        header = ("field", "dtype", "shape", "unit", "description")
        said = [n for n, name in enumerate(header) if name == "field" or any(f[n] for f in fields)]
        show([[field[n] for n in said] for field in fields], header=[header[n] for n in said])


def _sparkline(rates: Array, sparks: str) -> str:
    """The rate over time as one line of bars; a bin with a row in it is never blank."""
    if not len(rates):
        return "-"
    every_s, unit = rate_unit(float(rates.max()))
    heights = np.ceil(rates / rates.max() * (len(sparks) - 1)).astype(int)
    bars = "".join(sparks[height] for height in heights)
    highest = float(rates.max()) * every_s
    shown = f"{highest:,.0f}" if highest >= 10 else f"{highest:.2g}"  # noqa: PLR2004
    return f"{bars}  up to about {shown}/{unit}"


def _about_store(found: dict[str, Any]) -> list[list[str]]:
    rows = [
        ["segments", f"{found['segments']}, together {size_text(found['file_bytes'])}"],
        ["data", _bytes_text(found)],
        ["created", found["created"]],
        ["last commit", found["last_commit"] or "never"],
        ["id", found["store_id"]],
    ]
    if counts := found["gaps"]["count"]:
        words = [_count_text(kind, count) for kind, count in counts.items()]
        rows.append(["gaps", ", ".join(words)])
    return rows + [[f"mark {name}", str(value)] for name, value in found["marks"].items()]


def _count_text(kind: str, count: dict[str, int]) -> str:
    rows = f" ({count['rows']:,} rows)" if count["rows"] else ""
    return f"{count['gaps']:,} {kind}{rows}"


def _stretch(of: dict[str, Any]) -> str:
    """From when to when, to the ms; a day is named once."""
    start, stop = (
        end.removesuffix("+00:00").replace("T", " ")[:_TO_THE_MS] if end else None
        for end in (of["start"], of["stop"])
    )
    if start and stop:
        if start == stop:
            return f"{start} UTC"
        return f"{start} to {stop[11:] if stop[:10] == start[:10] else stop} UTC"
    return f"from {start} UTC" if start else f"up to {stop} UTC" if stop else "all times"


def _and_words(text: str, words: str) -> str:
    return f"{text}: {words}" if words else text


def _gap_text(gap: dict[str, Any]) -> str:
    text = f"{gap['kind']} {gap['stream']}".strip()
    return f"{text}, {gap['rows']:,} rows" if gap["rows"] else text


def _about_stream(stream: dict[str, Any]) -> list[list[str]]:
    return [
        ["rows", f"{stream['rows']:,} in {stream['batches']:,} batches"],
        ["first", stream["first"] or "-"],
        ["last", stream["last"] or "-"],
        ["data", _bytes_text(stream)],
        ["time field", stream["time_field"]],
    ]


def _bytes_text(of: dict[str, Any]) -> str:
    text = f"{size_text(of['raw_bytes'])}, stored in {size_text(of['stored_bytes'])}"
    return f"{text}, ratio {of['ratio']}" if of["ratio"] else text


def _plain(store: stores.Store) -> dict[str, Any]:
    found = store.info()
    raw = sum(each.raw_bytes for each in found.streams)
    stored = sum(each.stored_bytes for each in found.streams)
    return {
        "path": found.path,
        "store_id": found.store_id,
        "segments": found.segments,
        "file_bytes": found.file_bytes,
        "raw_bytes": raw,
        "stored_bytes": stored,
        "ratio": _ratio(raw, stored),
        "created": _iso(found.created_ns),
        "last_commit": _iso(found.last_commit_ns) if found.last_commit_ns else None,
        "marks": found.marks,
        "pins": [_plain_pin(pin) for pin in store.pins()],
        "gaps": _plain_gaps(store.gaps()),
        "streams": [_plain_stream(each) for each in found.streams],
    }


def _plain_pin(pin: Pin) -> dict[str, Any]:
    ends = pin.start_ns > MIN_NS, pin.stop_ns < MAX_NS
    return {
        "id": pin.pin_id,
        "start": _iso(pin.start_ns) if ends[0] else None,
        "stop": _iso(pin.stop_ns) if ends[1] else None,
        "label": pin.label,
        "created": _iso(pin.created_ns),
    }


def _sums(gaps: Sequence[Gap]) -> dict[str, int]:
    occurrences = sum(gap.occurrences for gap in gaps)
    return {"gaps": len(gaps), "occurrences": occurrences, "rows": sum(gap.rows for gap in gaps)}


def _plain_gaps(gaps: Sequence[Gap]) -> dict[str, Any]:
    """How many there are of each kind, and the newest few; `kvstore gaps` has them all."""
    newest = sorted(gaps, key=lambda gap: gap.recorded_ns, reverse=True)[:_GAPS_SHOWN]
    return {
        "count": {
            kind: _sums(same) for kind in KINDS if (same := [g for g in gaps if g.kind == kind])
        },
        "newest": [plain_gap(gap) for gap in newest],
    }


def _plain_stream(each: stores.StreamStats) -> dict[str, Any]:
    dtype = each.schema.time_dtype
    first, last = (None if t is None else format_time(t, dtype) for t in (each.first, each.last))
    return {
        "name": each.name,
        "rows": each.rows,
        "first": first,
        "last": last,
        "batches": each.batches,
        "raw_bytes": each.raw_bytes,
        "stored_bytes": each.stored_bytes,
        "ratio": _ratio(each.raw_bytes, each.stored_bytes),
        "time_field": each.schema.time,
        "fields": [
            {
                "name": field.name,
                "dtype": "text" if field.is_text else str(field.np_dtype),
                "shape": list(field.shape),
                "unit": field.unit,
                "description": field.description,
            }
            for field in each.schema.fields
        ],
    }


def _ratio(raw: int, stored: int) -> float | None:
    return round(raw / stored, 2) if stored else None


def _iso(ns: int) -> str:
    return format_time(np.int64(ns), np.dtype("<i8"))
