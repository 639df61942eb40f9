"""``kvstore telemetry demo``: all of it in a minute, in a folder of its own, without a server.

Runs the very commands that a user would type, and shows them.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Final

import typer

from kvstore.cli.terminal import FAILED, complain, say
from kvstore.errors import TelemetryError

_BAD: Final = "--evolve-after 50% --bad 2% --duplicates 1%"


def demo(
    *,
    folder: Annotated[
        Path | None,
        typer.Option("--dir", metavar="PATH", help="Keep what is made there; else it is deleted."),
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="How many devices.")] = 50,
    events: Annotated[int, typer.Option(min=100, help="How many events.")] = 20_000,
) -> None:
    """Simulate a fleet, ingest it twice, look at rejects and quality, migrate lake to store."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise typer.BadParameter(f"--dir {folder}: is not empty")
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(folder) as place:
        Demo(Path(place)).run(devices, events)


class Demo:
    """The commands, one after the other, in that folder."""

    def __init__(self, folder: Path):
        self._folder = folder

    def run(self, devices: int, events: int) -> None:
        """Show each step; an unexpected exit code or count ends it."""
        self._title("A fleet whose firmware begins to send pressure half way, with bad events")
        simulate = f"simulate --devices {devices} --events {events} {_BAD}"
        (self._folder / "events.jsonl").write_bytes(self._shell(f"{simulate} > events.jsonl"))
        self._title("Ingest it, and once more: nothing is stored twice")
        self._shell("check events.jsonl --store ops.kv")
        once = json.loads(self._shell("ingest events.jsonl --store ops.kv --json"))
        self._shell("ingest events.jsonl --store ops.kv")
        (self._folder / "copy.jsonl").write_bytes((self._folder / "events.jsonl").read_bytes())
        twice = json.loads(self._shell("ingest copy.jsonl --store ops.kv --json"))
        self._check("received", events, once["received"])
        self._check("stored by the copy", 0, twice["stored"])
        self._check("rejected by the copy", once["rejected"], twice["rejected"])
        self._title("What was refused, and why; one of them from its reason to its raw bytes")
        self._shell("rejects list ops.kv --count")
        name = self._shell("rejects list ops.kv --reason range --limit 1").decode().split("\t")[0]
        self._shell(f"rejects show ops.kv {shlex.quote(name)}")
        self._shell("rejects replay ops.kv --reason range --dry-run")
        self._title("Every line has exactly one fate; the last readings of a device")
        self._shell("audit events.jsonl ops.kv")
        self._shell("query ops.kv --device sensor-007 --last 15s")
        self._title("The quality of what came")
        self._shell("quality ops.kv --html report.html", fine=(0, 3))
        self._title("The same events into a lake, and the lake's history into a store")
        self._shell("ingest events.jsonl --lake lake")
        self._shell("migrate lake --to history.kv")

    def _title(self, text: str) -> None:
        say(f"\n# {text}")

    def _check(self, what: str, expected: int, found: int) -> None:
        if found != expected:
            raise TelemetryError(f"demo: {found} {what}, expected {expected}")

    def _shell(self, command: str, *, fine: tuple[int, ...] = (0,)) -> bytes:
        """What the command prints; shown as it is run, stderr as it comes."""
        say(f"$ kvstore telemetry {command}")
        words = shlex.split(command.partition(" > ")[0])
        done = subprocess.run(
            [sys.executable, "-m", "kvstore", "telemetry", *words],
            cwd=self._folder,
            stdout=subprocess.PIPE,
            check=False,
        )
        if " > " not in command:
            sys.stderr.write(done.stdout.decode())
        if done.returncode not in fine:
            complain(f"demo: exit code {done.returncode}")
            raise typer.Exit(FAILED)
        return done.stdout
