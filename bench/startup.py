"""What a command and an import cost before they do anything, warm."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from bench.figure import Figure, Measurement, Rule, Setting
from bench.measure import interleaved
from bench.process import kvstore, run

# An interpreter's start is short and scatters: this many for each pair asked for.
STARTS = 3


def startup(setting: Setting) -> list[Figure]:
    """Time `kvstore --help` and `import kvstore` beside a bare Python and `import numpy`."""
    commands = [
        kvstore("--help"),
        _python("import kvstore"),
        _python("pass"),
        _python("import numpy"),
    ]
    for command in commands:
        run(command)
    shown, imported, bare, numpy = interleaved(
        STARTS * setting.pairs, *(partial(_wall_s, command) for command in commands)
    )
    return [
        _figure("help", shown, "python -c pass", bare, below_s=0.3),
        _figure("import", imported, "import numpy", numpy, below_s=0.15),
    ]


def _figure(
    name: str, values: list[float], limit_name: str, limits: list[float], *, below_s: float
) -> Figure:
    rules = (Rule("value", "<", below_s),)
    return Figure(
        name=f"startup-{name}",
        unit="s",
        limit_name=limit_name,
        values=values,
        limits=limits,
        rules=rules,
    )


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def _wall_s(command: Sequence[str]) -> float:
    return run(command).wall_s


MEASUREMENTS = (Measurement("startup", "kvstore --help and import kvstore, warm", startup),)
