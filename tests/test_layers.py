"""The layout of DESIGN.md, section 3, held against the imports that the modules really make.

All imports count: at the top, inside functions, under TYPE_CHECKING, by importlib. A new module
is first given its floor here; a dependency is allowed to the one module that owns it.
"""

from __future__ import annotations

import ast
import graphlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from stores import run

ROOT = Path(__file__).resolve().parent.parent

# From low to high; a package counts as one part. "__init__" is kvstore/__init__.py: nothing
# below the command line imports the public names, everything goes to the module that owns them.
FLOORS = (
    ("errors", "timestamps", "events", "every", "stats"),
    ("schema", "settings", "lossless", "libc", "metapage"),
    ("codec",),
    ("gaps",),
    ("environment",),
    ("pages",),
    ("pickled", "pickle_machine", "unpickle", "packets", "generate"),
    ("state",),
    ("entries",),
    ("segment",),
    ("layout", "gather", "changes"),
    ("requests", "retention"),
    ("active", "reading"),
    ("operations",),
    ("commit",),
    ("writer", "follow", "replay", "export"),
    ("stream",),
    ("store",),
    ("control", "untrusted", "copies"),
    ("check", "damaged", "verify", "salvage", "recover", "backup", "ingest", "survey"),
    ("plots",),
    ("sockets", "notify", "serve", "metrics"),
    ("dayfiles",),
    ("hourly", "daystreams", "dayplots", "daycluster"),
    ("telemetry",),
    ("__init__",),
    ("cli",),
    ("__main__",),
)
FLOOR_OF = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}

ANYWHERE = {"numpy"}
THIRD_PARTY = {
    "environment": {"lmdb"},
    "codec": {"numcodecs", "lz4", "xxhash", "msgpack"},
    "cli": {"typer", "rich"},
    "plots": {"matplotlib"},
    "dayfiles": {"pyarrow"},
    "dayplots": {"pyarrow", "matplotlib"},
    "daycluster": {"distributed"},
    "export": {"pyarrow", "pandas", "h5py", "zarr", "xarray", "torch"},
    "telemetry": {
        "msgspec",
        "yaml",
        "pyarrow",
        "psycopg",
        "pyiceberg",
        "confluent_kafka",
        "sqlalchemy",
        "fastavro",
    },
}

# What `import kvstore` may load, with whatever these load themselves.
LIGHT = ("numpy", "lmdb", "msgpack", "xxhash", "lz4.block", "numcodecs.blosc")
HEAVY = {
    "typer", "rich", "pydantic",
    "pandas", "pyarrow", "matplotlib", "polars", "h5py", "zarr", "torch",
    "msgspec", "yaml", "psycopg", "pyiceberg", "sqlalchemy", "confluent_kafka", "fastavro",
}  # fmt: skip

UNKNOWN = "not in the table of floors"
FOREIGN = "not among its third-party modules"

Sources = Mapping[str, str]  # path below the repository, with / -> text


# ---- what a module imports ----


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def part_of(module: str) -> str:
    """kvstore.cli.read -> cli."""
    return [*module.split("."), "__init__"][1]


def imported_names(path: str, source: str, known: set[str]) -> Iterator[str]:
    """Absolute names of the modules that a source imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = from_base(path, node)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in known else base
        elif isinstance(node, ast.Call) and called(node) in {"import_module", "__import__"}:
            name = node.args[0] if node.args else None
            yield str(name.value) if isinstance(name, ast.Constant) else "<a computed name>"


def from_base(path: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    folder = path.split("/")[: -node.level]
    return ".".join([*folder, *filter(None, [node.module])])


def called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


# ---- the rules ----


def offences(sources: Sources) -> list[str]:
    """Every breach of the tables above, in words."""
    known = {module_name(path) for path in sources}
    graph = {
        module_name(path): set(imported_names(path, source, known))
        for path, source in sources.items()
    }
    found = [f"{module}: {UNKNOWN}" for module in sorted(graph) if part_of(module) not in FLOOR_OF]
    for module, names in sorted(graph.items()):
        found += [
            f"{module} imports {n}: {why}" for n in sorted(names) if (why := breach(module, n))
        ]
    return found + cycles(graph)


def breach(module: str, name: str) -> str:
    """Why a module may not import that name, or nothing."""
    part, top = part_of(module), name.partition(".")[0]
    if top == "kvstore":
        target = part_of(name)
        if target not in FLOOR_OF:
            return UNKNOWN
        return "upwards" if FLOOR_OF[target] > FLOOR_OF.get(part, len(FLOORS)) else ""
    if top in sys.stdlib_module_names or top in ANYWHERE | THIRD_PARTY.get(part, set()):
        return ""
    return FOREIGN


def cycles(graph: Mapping[str, set[str]]) -> list[str]:
    inner = {module: names & graph.keys() for module, names in graph.items()}
    try:
        graphlib.TopologicalSorter(inner).prepare()
    except graphlib.CycleError as error:
        return ["a cycle: " + " <- ".join(error.args[1])]
    return []


def real_sources() -> Sources:
    paths = sorted((ROOT / "kvstore").rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}


def test_imports_point_downwards_and_dependencies_have_one_owner():
    assert offences(real_sources()) == []


def test_the_real_modules_are_seen():
    """A wrong folder would leave nothing to check, and nothing to find."""
    sources = real_sources()
    known = {module_name(path) for path in sources}
    names = set(imported_names("kvstore/timestamps.py", sources["kvstore/timestamps.py"], known))
    assert {"kvstore.errors", "numpy", "numpy.typing", "re"} <= names


# ---- each guard, broken once ----

FINE = {
    "kvstore/__init__.py": "from kvstore.store import open",
    "kvstore/errors.py": "import re",
    "kvstore/codec.py": "import lz4.block, numpy as np\nfrom kvstore.errors import DamageError",
    "kvstore/store.py": "from kvstore import codec\nfrom . import errors\nimport numpy",
    "kvstore/cli/__init__.py": "import typer\nfrom kvstore.cli import read\nimport kvstore",
    "kvstore/cli/read.py": "def f():\n    from ..store import Store\n    import rich.table",
    "kvstore/__main__.py": "from kvstore.cli import main",
}


def test_a_sound_package_has_no_offences():
    assert offences(FINE) == []


@pytest.mark.parametrize(
    ("path", "source", "offence"),
    [
        ("errors", "from kvstore.codec import x", "kvstore.errors imports kvstore.codec: upwards"),
        ("errors", "from kvstore import codec", "kvstore.errors imports kvstore.codec: upwards"),
        ("errors", "from . import codec", "kvstore.errors imports kvstore.codec: upwards"),
        ("errors", "from .cli.read import x", "kvstore.errors imports kvstore.cli.read: upwards"),
        (
            "errors",
            "def f():\n    import kvstore.cli",
            "kvstore.errors imports kvstore.cli: upwards",
        ),
        ("store", "from kvstore import open", "kvstore.store imports kvstore: upwards"),
        (
            "schema",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from kvstore.store import S",
            "kvstore.schema imports kvstore.store: upwards",
        ),
        (
            "schema",
            "import importlib\nimportlib.import_module('kvstore.store')",
            "kvstore.schema imports kvstore.store: upwards",
        ),
        (
            "schema",
            "def f(name):\n    __import__(name)",
            f"kvstore.schema imports <a computed name>: {FOREIGN}",
        ),
        ("utils", "", "kvstore.utils: not in the table of floors"),
        ("store", "from . import utils", "kvstore.store imports kvstore: upwards"),
        ("store", "import kvstore.utils", f"kvstore.store imports kvstore.utils: {UNKNOWN}"),
        ("store", "import lmdb", f"kvstore.store imports lmdb: {FOREIGN}"),
        ("segment", "import lmdb", f"kvstore.segment imports lmdb: {FOREIGN}"),
        ("store", "import xxhash", f"kvstore.store imports xxhash: {FOREIGN}"),
        ("follow", "import msgpack", f"kvstore.follow imports msgpack: {FOREIGN}"),
        ("ingest", "from rich import print", f"kvstore.ingest imports rich: {FOREIGN}"),
        ("export/csv", "import polars", f"kvstore.export.csv imports polars: {FOREIGN}"),
    ],
)
def test_each_breach_is_found(path, source, offence):
    assert offence in offences({**FINE, f"kvstore/{path}.py": source})


@pytest.mark.parametrize(
    "broken",
    [
        {"check": "import kvstore.ingest", "ingest": "def f():\n    from kvstore import check"},
        {"cli/read": "from kvstore.cli import main"},
        {
            "schema": "from .metapage import a",
            "metapage": "from . import libc",
            "libc": "from . import schema",
        },
    ],
)
def test_a_cycle_is_found_even_on_one_floor(broken):
    found = offences({**FINE, **{f"kvstore/{part}.py": text for part, text in broken.items()}})
    assert [offence.split(":")[0] for offence in found] == ["a cycle"]


# ---- what `import kvstore` loads ----

LOADED = """
import importlib, json, sys
for name in {light!r}:
    importlib.import_module(name)
before = set(sys.modules)
import kvstore
tops = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(json.dumps([sorted(tops - sys.stdlib_module_names - {{"kvstore"}}), sorted(sys.modules)]))
"""


def loaded_by_import(root: Path) -> tuple[list[str], list[str]]:
    """Third-party modules that `import kvstore` adds to the light ones, and all modules then."""
    command = [sys.executable, "-c", LOADED.format(light=LIGHT)]
    answer = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    added, modules = json.loads(answer.stdout)
    return added, modules


def test_importing_kvstore_loads_nothing_heavy():
    added, modules = loaded_by_import(ROOT)
    assert added == []
    assert HEAVY.isdisjoint(modules)


def test_a_command_loads_nothing_heavy(tmp_path):
    """typer 0.29 loads pydantic for each: that doubled the start."""
    code = """
        import sys, kvstore
        from kvstore.cli import app
        kvstore.open(sys.argv[1], "w").close()
        app(["info", sys.argv[1]], standalone_mode=False)
        print(*sys.modules)
    """
    assert set(run(code, tmp_path / "run.kv").split()) & HEAVY == {"typer"}


def test_a_heavy_import_is_found(tmp_path):
    package = tmp_path / "kvstore"
    package.mkdir()
    (tmp_path / "polars.py").write_text("")
    (package / "__init__.py").write_text("from kvstore import errors")
    (package / "errors.py").write_text("import polars")
    added, modules = loaded_by_import(tmp_path)
    assert added == ["polars"]
    assert not HEAVY.isdisjoint(modules)


# ---- the public names ----


def public_names(source: str) -> list[str]:
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def in_order(names: list[str]) -> bool:
    """In ruff's order (RUF022), each name once: CONSTANTS, Classes, others."""
    kinds = [(not name.isupper(), not name[0].isupper(), name) for name in names]
    return kinds == sorted(set(kinds))


def test_the_public_names_are_sorted():
    path = ROOT / "kvstore" / "__init__.py"
    names = public_names(path.read_text())
    assert names
    assert in_order(names)


def test_unsorted_names_are_found():
    assert in_order(public_names('__all__ = ["MAX_NS", "Batch", "Store", "__version__", "open"]'))
    assert not in_order(public_names('__all__ = ["Store", "Batch"]'))
    assert not in_order(public_names('__all__ = ["Batch", "MAX_NS"]'))
    assert not in_order(public_names('__all__ = ["Store", "Store"]'))
