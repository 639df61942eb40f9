"""The command line: parse, call, print. No logic of its own.

Data goes to stdout, everything else to stderr. Exit codes: 0 fine, 1 failed, 2 wrong usage,
3 done, but with loss or damage found.
"""

from __future__ import annotations

import signal
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Final

import typer

from kvstore.cli import (
    capture,
    check,
    dayfiles,
    dayplot,
    export,
    limits,
    plot,
    query,
    replay,
    stats,
    telemetry,
)
from kvstore.cli import write as writing
from kvstore.cli.terminal import FAILED, complain, open_standard_files
from kvstore.errors import KvstoreError

_CAPTURE: Final = "kvstore generate --pps 100 --max-mb 200 | kvstore write run.kv"


def _examples(*lines: str) -> str:
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


app = typer.Typer(
    name="kvstore",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 fine, 1 failed, 2 wrong usage, 3 done but with loss or damage found.\n\n"
    + _examples(_CAPTURE, "kvstore read run.kv --last 1s --format summary", "kvstore info run.kv"),
)
app.command(epilog=_examples(_CAPTURE, "kvstore generate --pps 0 --max-mb 20 > some.packets"))(
    capture.generate
)
app.command(
    epilog=_examples(
        _CAPTURE,
        "kvstore write run.kv monday.packets tuesday.packets --on-error skip",
        "kvstore read run.kv --last 1h | kvstore write hour.kv --segment-bytes 500MB",
        "kvstore write run.kv --listen unix:/run/kvstore/in.sock --metrics-file run.prom",
    )
)(writing.write)
app.command(
    epilog=_examples(
        "kvstore read run.kv --start 2026-02-17T15:32:37 --stop 2026-02-17T15:32:37.1",
        "kvstore read run.kv --last 1s | kvstore write other.kv",
        "kvstore read run.kv --follow --cursor-file run.cursor | kvstore write copy.kv",
        "kvstore read run.kv --fields timestamps,spectral --limit 1000 -o spectra.npz",
    )
)(query.read)
app.command(
    epilog=_examples(
        "kvstore replay run.kv --speed 10 | kvstore write copy.kv",
        "kvstore replay run.kv --start 2026-02-17T15:32:37 --loop | my-analysis",
    )
)(replay.replay)
app.command(
    epilog=_examples(
        "kvstore export run.kv -o run.parquet",
        "kvstore export run.kv -o minute.h5 --start 2026-02-17T15:32 --stop 2026-02-17T15:33",
        "kvstore export run.kv -o spectra.npy --fields spectral --last 10s",
        "kvstore export lab.kv --stream room --every 5s --layout hourly -o out/",
    )
)(export.export)
app.command(
    "import", epilog=_examples("kvstore import run.kv run.parquet log.csv --time-field when")
)(export.import_)
app.command(
    epilog=_examples(
        "kvstore plot run.kv -o run.png --last 10s",
        "kvstore plot run.kv -o particle.svg --row 17 --start 2026-02-17T15:32:37",
        "kvstore plot lab.kv -o room.pdf --stream room --fields celsius --size 8x4",
    )
)(plot.plot)
app.command(
    epilog=_examples(
        "kvstore verify run.kv",
        "kvstore verify run.kv --since-last --rate 100MB/s",
        "kvstore verify run.kv --record && echo sound",
        "kvstore verify run.kv --json | jq .damages",
    )
)(check.verify)
app.command(
    epilog=_examples(
        "kvstore recover broken.kv -o rescued.kv",
        "kvstore recover broken.kv -o rescued.kv --like /mnt/usb/run.kv",
    )
)(check.recover)
app.command(
    epilog=_examples(
        "kvstore backup run.kv /mnt/usb/run.kv",
        "kvstore read /mnt/usb/run.kv --last 1h --format summary",
        "kvstore verify /mnt/usb/run.kv",
    )
)(check.backup)
app.command(epilog=_examples("kvstore info run.kv", "kvstore info run.kv --json"))(stats.info)
app.command(epilog=_examples("kvstore gaps run.kv", "kvstore gaps run.kv --json"))(limits.gaps)
app.command(
    "set",
    epilog=_examples(
        "kvstore set run.kv --max-bytes 800GB --max-age 7d",
        "kvstore set run.kv --max-age none",
        "kvstore set run.kv",
    ),
)(limits.set_)
app.command(epilog=_examples("kvstore drop run.kv --before 2026-02-17"))(limits.drop)
app.command(
    epilog=_examples(
        'kvstore pin run.kv --start 2026-02-17T15:30 --stop 2026-02-17T15:40 --label "door opened"'
    )
)(limits.pin)
app.command(epilog=_examples("kvstore unpin run.kv 1"))(limits.unpin)
app.add_typer(telemetry.app)
dayfiles.app.command(epilog=dayplot.EPILOG)(dayplot.plot)
app.add_typer(dayfiles.app, name="dayfiles")


def _show_version(wanted: bool) -> None:
    if wanted:
        try:
            print("kvstore", version("kvstore"))
        except PackageNotFoundError:
            print("kvstore, run from its source")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=_show_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Capture sensor data at disk speed, read it back by time."""


def main() -> None:
    """Run the command line; every error of ours becomes one line and an exit code."""
    open_standard_files()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except KvstoreError as error:
        complain(str(error))
        raise SystemExit(FAILED) from error
    except OSError as error:
        complain(f"{error.filename or 'standard input or output'}: {error.strerror}")
        raise SystemExit(FAILED) from error


def _terminate(number: int, _: object) -> None:
    """Unwind, so that unfinished files are removed; shells expect 128 + the signal's number."""
    raise SystemExit(128 + number)
