"""Three pages of docs/ say what is so: files, tests, flags, metrics and commands.

What runs without a server is run: the runbook's drills, and how the lake is read.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import typer
from test_readme import ROOT, bash, blocks_of, shims

from kvstore.cli import app
from kvstore.telemetry.metrics import families_of
from kvstore.telemetry.progress import Progress

TELEMETRY, RUNBOOK = ROOT / "docs" / "telemetry.md", ROOT / "docs" / "runbook.md"
PAGES = [TELEMETRY, RUNBOOK, ROOT / "docs" / "dayfiles.md"]
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
# Of kafka-topics.sh, kafka-configs.sh and kafka-consumer-groups.sh.
KAFKAS = {
    "--add-config", "--alter", "--bootstrap-server", "--describe", "--list", "--partitions",
    "--reset-offsets", "--topic",
}  # fmt: skip
DOCKERS = {"--build-arg", "--user"}
BRIEFS = {"--input", "--output"}  # of solution.py, as the users' brief calls it


def code_of(page: Path) -> str:
    """What the page shows as code, in spans and blocks."""
    text = page.read_text()
    return "\n".join([*re.findall(r"`([^`\n]+)`", text), *(each.text for each in blocks_of(text))])


def flags(command) -> set[str]:
    """Every flag of a command and of those below it."""
    found = {flag for each in command.params for flag in (*each.opts, *each.secondary_opts)}
    for below in getattr(command, "commands", {}).values():
        found |= flags(below)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_tests_that_are_named_are_there(page):
    pattern = r"`((?:tests|kvstore|bench|docs|deploy)/[\w./-]+|[A-Z]+\.md)(?:::(\w+))?`"
    named = re.findall(pattern, page.read_text())
    assert named
    for file, test in named:
        assert (ROOT / file).exists(), file
        assert not test or f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_that_are_named_are_there(page):
    named = set(FLAG.findall(code_of(page)))
    assert named
    assert named - flags(typer.main.get_command(app)) <= KAFKAS | DOCKERS | BRIEFS


def test_metrics_that_are_named_are_there():
    named = set(re.findall(r"kvstore_(telemetry_\w+)", RUNBOOK.read_text()))
    assert named
    progress = Progress()
    progress.watermark_us = progress.committed_us = 0
    assert named <= {family.name for family in families_of(progress)}


def test_every_alert_has_its_place_in_the_runbook():
    rules = (ROOT / "deploy" / "prometheus" / "telemetry.rules.yml").read_text()
    text = RUNBOOK.read_text()
    alerts = re.findall(r"alert: KvstoreTelemetry(\w+)", rules)
    assert alerts
    assert [each for each in alerts if not re.search(rf"(KvstoreTelemetry|…){each}\b", text)] == []


def test_readme_shows_the_same_diagram():
    (shown,) = [b for b in blocks_of((ROOT / "README.md").read_text()) if b.language == "mermaid"]
    (drawn,) = [b for b in blocks_of(TELEMETRY.read_text()) if b.language == "mermaid"]
    assert shown.text == drawn.text


@pytest.mark.slow
def test_the_drills_end_as_the_runbook_says(tmp_path):
    python = f"'{sys.executable}'"
    path = shims(tmp_path / "bin", kvstore=f"{python} -m kvstore", python3=python)
    folder = tmp_path / "work"
    folder.mkdir()
    drills = [each for each in blocks_of(RUNBOOK.read_text()) if each.marker == "drill"]
    contracts = str(ROOT / "kvstore" / "telemetry" / "contracts")
    variables = {"PATH": path, "PYTHONPATH": str(ROOT), "CONTRACTS": contracts}
    said = "".join(bash(each, folder, **variables) for each in drills)
    for expected in (
        "refused, as it should be: 1",
        "stopped, all committed: 1",
        "an error, nothing skipped: 1",
        "gone on behind the loss: 3",
        "nothing is written: 1",
    ):
        assert expected in said


@pytest.mark.slow
def test_the_lake_is_read_as_shown(tmp_path, monkeypatch):
    python = f"'{sys.executable}'"
    path = shims(tmp_path / "bin", kvstore=f"{python} -m kvstore", python3=python)
    (first,) = [b for b in blocks_of(RUNBOOK.read_text()) if "simulate" in b.text]
    bash(first, tmp_path, PATH=path, PYTHONPATH=str(ROOT))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POLARS_ICEBERG_PLANNER", "pyiceberg")  # else it warns of a faster one
    (block,) = [b for b in blocks_of(TELEMETRY.read_text()) if b.marker == "lake"]
    names: dict[str, object] = {}
    exec(compile("\n" * block.line + block.text, str(TELEMETRY), "exec"), names)
    assert names["means"].height == 12
    assert names["count"] == (names["training"].num_rows,)
