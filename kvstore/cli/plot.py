"""``kvstore plot``: a picture of a time range, or of one row."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from kvstore import libc
from kvstore import store as stores
from kvstore.cli.options import duration_ns, time_text
from kvstore.cli.query import check_range, opened, start_of_last, stream_name
from kvstore.cli.terminal import LOSS, complain, progress_bar, say
from kvstore.errors import DamageError
from kvstore.segment import OnDamage

FORMATS: Final = ("png", "svg", "pdf")
_SIZE: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?[x,] ?([0-9]+(?:\.[0-9]+)?)")
_SIDE_IN_MAX: Final = 100.0


def size_in(text: str) -> tuple[float, float]:
    """Width and height in inches, of 10x6."""
    match = _SIZE.fullmatch(text.strip())
    found = (float(match[1]), float(match[2])) if match else (0.0, 0.0)
    if not 0 < min(found) <= max(found) <= _SIDE_IN_MAX:
        raise typer.BadParameter(
            f"size {text!r} cannot be read: expected width x height in inches, up to "
            f"{_SIDE_IN_MAX:g}, such as 10x6"
        )
    return found


def ranks(text: str) -> list[float]:
    """Percentiles, of 5,50,95."""
    try:
        found = [float(each) for each in text.split(",")]
    except ValueError:
        found = [-1.0]
    if not all(0 <= each <= 100 for each in found):  # noqa: PLR2004
        raise typer.BadParameter(f"{text!r}: expected numbers from 0 to 100, such as 5,50,95")
    return found


def plot(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The store.")],
    *,
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="FILE", help="Picture to write: .png, .svg or .pdf."
        ),
    ],
    start: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            parser=time_text,
            help="First time, included: ISO 8601 (UTC if it names no offset) or epoch seconds.",
        ),
    ] = None,
    stop: Annotated[
        str | None,
        typer.Option(metavar="TIME", parser=time_text, help="Last time, included."),
    ] = None,
    last: Annotated[
        int | None,
        typer.Option(
            metavar="DURATION",
            parser=duration_ns,
            help="The stretch before the last row instead, such as 10s, 250ms, 5m or 2h.",
        ),
    ] = None,
    stream: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Stream to plot; if not given particles, or the only one."
        ),
    ] = None,
    fields: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Fields to plot, separated by commas; if not given the first twelve numeric ones.",
        ),
    ] = None,
    row: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="One row of the range instead, such as one particle: 0 is the first, -1 the last.",
        ),
    ] = None,
    percentiles: Annotated[
        Any,
        typer.Option(
            metavar="P,...", parser=ranks, help="Which percentiles of fields with a shape."
        ),
    ] = "5,50,95",
    size: Annotated[
        Any,
        typer.Option(
            metavar="WxH",
            parser=size_in,
            help="Width and height in inches; if not given as large as the panels need.",
        ),
    ] = None,
    dpi: Annotated[
        int, typer.Option(min=30, max=600, metavar="N", help="Dots per inch of a .png.")
    ] = 120,
) -> None:
    """Draw a time range to a picture.

    Rate with gaps, scalar fields over time, mean and percentile images. Any numeric stream can be
    drawn; text is left out. Memory stays bounded whatever the range; of more than 1 GB a random
    part is read, and the figure says so. Needs matplotlib: pip install 'kvstore[plot]'. Exit code 3
    says that damaged batches had to be left out.
    """
    check_range(start, stop, last)
    if output.suffix[1:] not in FORMATS:
        raise typer.BadParameter(f"{output}: in which format? Name it .{', .'.join(FORMATS)}")
    libc.keep_freed_memory()
    damaged: list[str] = []

    def report(error: DamageError) -> None:
        damaged.append(str(error))
        complain(str(error))

    with stores.open_store(path) as store:
        name = stream_name(store, stream)
        ends = start if last is None else start_of_last(store[name], last), stop
        names = [each.strip() for each in fields.split(",")] if fields is not None else None
        if row is None:
            figure = _overview(
                store,
                name,
                ends,
                fields=names,
                percentiles=percentiles,
                size=size,
                report=report,
            )
        else:
            figure = _plots().row(store, name, row, *ends, fields=names, size_in=size)
    with opened(output) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name in a script that the font lacks
        figure.savefig(file, format=output.suffix[1:], dpi=dpi)
    say(f"Drawn to {output}")
    if damaged:
        raise typer.Exit(LOSS)


def _overview(
    store: stores.Store,
    name: str,
    ends: tuple[Any, Any],
    *,
    fields: list[str] | None,
    percentiles: list[float],
    size: tuple[float, float] | None,
    report: OnDamage,
) -> Any:
    done = 0.0

    def note(fraction: float) -> None:
        nonlocal done
        done = fraction

    with progress_bar(lambda _: f"{name} is being read", lambda: done):
        return _plots().overview(
            store,
            name,
            *ends,
            fields=fields,
            percentiles=percentiles,
            size_in=size,
            on_damage=report,
            on_progress=note,
        )


def _plots() -> Any:
    """Loaded only now: matplotlib takes half a second, and need not be installed."""
    from kvstore import plots  # noqa: PLC0415  # as said

    return plots
