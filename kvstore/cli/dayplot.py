"""``kvstore dayfiles plot``: figures of a module, a phase, and of what there is."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer

from kvstore.cli.query import opened
from kvstore.cli.terminal import progress_bar, say
from kvstore.errors import KvstoreError
from kvstore.export.extras import needed_for

EPILOG: Final = (
    "\b\nExamples:\n"
    "  kvstore dayfiles plot output/ --phase 1 --module 3 --date 2024-07-29 -o plots/\n"
    "  kvstore dayfiles plot output/ --phase 1 --module 3 --only cells,energy --format svg"
)


def day_of(text: str) -> date:
    """A day, of 2024-07-29."""
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: expected a day, such as 2024-07-29") from error


def plot(
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder of day files.")],
    *,
    phase: Annotated[int, typer.Option(min=0, metavar="N", help="The phase.")],
    module: Annotated[int, typer.Option(min=0, metavar="N", help="The module in it.")],
    day: Annotated[
        Any,
        typer.Option(
            "--date",
            metavar="YYYY-MM-DD",
            parser=day_of,
            show_default=False,
            help="The day, UTC; if not given the last of which the module has files.",
        ),
    ] = None,
    folder: Annotated[
        Path, typer.Option("-o", "--output", metavar="FOLDER", help="Where the figures go.")
    ] = Path("plots"),
    only: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="Some of the figures; if not given all of them."),
    ] = None,
    file_format: Annotated[
        Literal["png", "svg", "pdf"], typer.Option("--format", help="Of the files.")
    ] = "png",
    dpi: Annotated[
        int, typer.Option(min=30, max=600, metavar="N", help="Dots per inch of a .png.")
    ] = 120,
) -> None:
    """Draw a module's day, its phase, and what there is, to a folder.

    measures, phase, cells, spread-current, charge-current, temperatures: of the day. coverage and
    energy: of all days. Gaps stay open; held values are paler where the files have flags
    (convert --with-flags).
    """
    with needed_for("plotting day files", extra="dayfiles"):
        from kvstore import dayplots  # noqa: PLC0415  # loads matplotlib and pyarrow
    names = [each.strip() for each in only.split(",")] if only else [*dayplots.FIGURES]
    if unknown := [name for name in names if name not in dayplots.FIGURES]:
        raise typer.BadParameter(f"{unknown[0]!r}: there are {', '.join(dayplots.FIGURES)}")
    tree = f"{phase}_{module}"
    days = dayplots.days_of(output, tree)
    if not days:
        there = ", ".join(dayplots.trees(output)) if output.is_dir() else "no such folder"
        raise KvstoreError(f"{output}: no day files of {tree}; there are: {there or 'none'}")
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{tree}-{day or days[-1]}"
    with progress_bar(lambda _: f"{stem} is being drawn"):
        for name, figure in dayplots.figures(output, tree, day or days[-1], names):
            with opened(folder / f"{stem}-{name}.{file_format}") as file:
                figure.savefig(file, format=file_format, dpi=dpi)
    say(f"{len(names)} figures of {tree} on {day or days[-1]} drawn to {folder}")
