"""The command line: parse, call, print. No logic of its own.

Data goes to stdout, everything else to stderr. Exit codes: 0 fine, 1 failed, 2 wrong usage,
3 done, but with loss or damage found.
"""

from __future__ import annotations

import typer

from kvstore.cli import capture, query
from kvstore.cli.terminal import FAILED, complain
from kvstore.errors import KvstoreError

app = typer.Typer(
    name="kvstore",
    help=(
        "Capture sensor data at disk speed, read it back by time.\n\n"
        "Example: kvstore generate --pps 100 --max-mb 200 | kvstore write run.kv"
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(capture.generate)
app.command()(capture.write)
app.command()(query.read)
app.command()(query.info)


def main() -> None:
    """Run the command line; every error of ours becomes one line and an exit code."""
    try:
        app()
    except KvstoreError as error:
        complain(str(error))
        raise SystemExit(FAILED) from error
