"""README does what it says: every command and snippet is run, every file it names is there.

A bash block carries a comment that says where it runs: ``shell`` ones follow each other in one
folder, ``quickstart`` and ``test-command`` each run in a clean copy of the checkout. Python blocks
follow each other in one namespace. A block that would not be run is an error.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import kvstore

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
MARKERS = {"bash": {"shell", "quickstart", "test-command"}, "python": {""}}
SILENT = {"text", "json", "mermaid"}  # languages of blocks that only show something


class Block(NamedTuple):
    line: int
    language: str
    marker: str
    text: str


def blocks_of(text: str) -> list[Block]:
    found = []
    lines = text.splitlines()
    fences = [number for number, line in enumerate(lines) if line.lstrip().startswith("```")]
    assert len(fences) % 2 == 0, "a block without an end"
    for start, end in zip(fences[::2], fences[1::2], strict=True):
        marker = re.fullmatch(r"<!-- (.*) -->", lines[start - 1]) if start else None
        body = "\n".join(lines[start + 1 : end]) + "\n"
        language = lines[start].strip().removeprefix("```")
        found.append(Block(start + 1, language, marker[1] if marker else "", body))
    return found


def never_run(blocks: list[Block]) -> list[Block]:
    return [
        block
        for block in blocks
        if block.language not in SILENT and block.marker not in MARKERS.get(block.language, set())
    ]


BLOCKS = blocks_of(README.read_text())


def marked(marker: str, language: str = "bash") -> list[Block]:
    found = [block for block in BLOCKS if (block.language, block.marker) == (language, marker)]
    assert found, f"README has no {language} block marked {marker!r}"
    return found


def test_no_block_is_left_unrun():
    assert never_run(BLOCKS) == []
    assert len(marked("quickstart")) == len(marked("test-command")) == 1


@pytest.mark.parametrize(
    "text",
    ["```bash\nls\n```", "<!-- later -->\n```bash\nls\n```", "```sh\nls\n```", "```\nx\n```"],
)
def test_a_block_that_nobody_runs_is_found(text):
    assert len(never_run(blocks_of(text))) == 1


def shims(folder: Path, **commands: str) -> str:
    """A PATH on which these commands are what the test runs with."""
    folder.mkdir()
    for name, command in commands.items():
        (folder / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def bash(block: Block, folder: Path, **variables: str) -> str:
    """What the block prints; the test fails where any of its commands does."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "VIRTUAL_ENV"))}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        check=False,
        cwd=folder,
        env={**kept, **variables},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"README.md:{block.line}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout


def test_the_tests_that_prove_the_promises_are_there():
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", README.read_text())
    assert named
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"


@pytest.mark.slow
def test_the_shell_commands_run_in_order(tmp_path):
    python = f"'{sys.executable}'"
    path = shims(tmp_path / "bin", kvstore=f"{python} -m kvstore", python3=python)
    folder = tmp_path / "work"
    folder.mkdir()
    source = str(Path(kvstore.__file__).parent.parent)
    said = [bash(block, folder, PATH=path, PYTHONPATH=source) for block in marked("shell")]
    assert "Found " in "".join(said)
    with kvstore.open(folder / "run.kv") as store:
        assert len(store["particles"]) > 0


def test_the_python_snippets_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "readme"}
    for block in marked("", "python"):
        code = "\n" * block.line + block.text  # so that a traceback shows README's own lines
        exec(compile(code, str(README), "exec"), names)
    assert capsys.readouterr().out


def test_every_file_that_readme_names_is_there():
    pattern = r"`((?:tests|kvstore|bench|docs|deploy|notebooks)/[\w./-]+|[A-Z]+\.md)`"
    named = set(re.findall(pattern, README.read_text()))
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


# ---- on a fresh machine ----


@pytest.fixture
def checkout(tmp_path):
    """What a clone has, and the files that are not committed yet."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git and a checkout")
    folder = tmp_path / "checkout"
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture
def path(tmp_path):
    """As on a machine of its own: a python3, and no kvstore."""
    return shims(tmp_path / "bin", python3=f"'{getattr(sys, '_base_executable', sys.executable)}'")


@pytest.mark.slow
def test_the_one_command_sets_up_and_runs_the_main_job(checkout, path):
    """The other one, which sets up and passes the tests, is what .ci/run runs, word for word."""
    said = bash(marked("quickstart")[0], checkout, PATH=path)
    assert re.search(r"Found [1-9]\d* particles\.\nRead bandwidth ", said)
    assert (checkout / "run.kv" / "store.msgpack").exists()
