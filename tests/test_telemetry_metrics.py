"""The pipeline's metrics, and that each alert and panel under deploy/ asks for ones that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from kvstore.metrics import render
from kvstore.telemetry.metrics import families_of
from kvstore.telemetry.progress import Progress
from kvstore.telemetry.records import Place

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
RULES = DEPLOY / "prometheus" / "telemetry.rules.yml"
DASHBOARD = DEPLOY / "grafana" / "telemetry.json"
FOREIGN = {"node_textfile_mtime_seconds"}  # node exporter's own
NAME = re.compile(r"\b(?:kvstore|node)_[a-z_]+")
LABELS = re.compile(r"\b((?:kvstore|node)_[a-z_]+)\{([^}]*)\}")
NOW_US = 1_700_000_000_000_000


def busy():
    """A pipeline of which everything is known."""
    progress = Progress(received=10, stored=6, duplicates=1, rejected=3, late=2, drift=4, fenced=1)
    progress.reasons.update({"range": 2, "json": 1, "conflict": 1})
    progress.unknown_commits = 5
    progress.commits._add(0.002)
    progress.watermark_us = NOW_US - 2_500_000
    progress.committed_us = NOW_US - 1_000_000
    progress.oldest_unsent_us = NOW_US - 500_000
    progress.lag = {Place("kafka:x/y", 3): 17}
    return progress


def rendered(progress):
    return render(families_of(progress, now_us=lambda: NOW_US), {"sink": "ops.kv"})


def samples(progress):
    """Every sample: (name, labels without the sink) -> value."""
    found = {}
    for family in text_string_to_metric_families(rendered(progress)):
        assert family.documentation
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name != "sink"}
            found[sample.name.removeprefix("kvstore_telemetry_"), tuple(labels.values())] = sample
    return found


def test_the_figures_are_the_pipeline_s():
    found = {key: sample.value for key, sample in samples(busy()).items()}
    assert found["received_total", ()] == 10
    assert found["stored_total", ()] == 6
    assert found["duplicate_total", ()] == 1
    assert found["rejected_events_total", ()] == 3
    assert found["rejected_total", ("range",)] == 2
    assert found["rejected_total", ("conflict",)] == 1
    assert found["rejected_total", ("utf8",)] == 0
    assert (found["late_total", ()], found["drift_total", ()]) == (2, 4)
    assert (found["fenced_total", ()], found["unknown_commits_total", ()]) == (1, 5)
    assert found["commit_seconds_count", ()] == found["commit_seconds_bucket", ("+Inf",)] == 1
    assert found["commit_failures_total", ()] == 0
    assert found["lag_events", ("kafka:x/y", "3")] == 17
    assert found["oldest_unsent_seconds", ()] == 0.5
    assert found["watermark_delay_seconds", ()] == 2.5
    assert found["last_commit_timestamp_seconds", ()] == NOW_US / 1e6 - 1


def test_before_the_first_event_nothing_is_made_up():
    found = {key: sample.value for key, sample in samples(Progress()).items()}
    assert found["oldest_unsent_seconds", ()] == 0
    assert not {name for name, _ in found} & {"watermark_delay_seconds", "lag_events"}


def expressions():
    """Every expression under deploy/ that is about telemetry, with where it stands."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    for rule in (rule for group in groups for rule in group["rules"]):
        yield rule["alert"], rule["expr"]
    dashboard = json.loads(DASHBOARD.read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["query"]


def unknown_in(expression):
    """What an expression asks for that no pipeline has: names, labels, values of labels."""
    there = {}
    for sample in samples(busy()).values():
        there.setdefault(sample.name, []).append(sample.labels)
    missing = set(NAME.findall(expression)) - there.keys() - FOREIGN
    for name, matchers in LABELS.findall(expression):
        for label, sign, value in re.findall(r'(\w+)(=~?)"([^"]*)"', matchers):
            if name in there and not any(label in labels for labels in there[name]):
                missing.add(f"{name}{{{label}}}")
            elif (
                name in there
                and sign == "="
                and not any(labels[label] == value for labels in there[name])
            ):
                missing.add(f"{name}{{{label}={value}}}")
    return missing


def test_each_expression_asks_for_what_is_there():
    found = list(expressions())
    assert len(found) > 20
    for place, expression in found:
        assert NAME.search(expression), place
        assert unknown_in(expression) == set(), place


def test_every_metric_is_looked_at_by_some_panel_or_alert():
    asked = {name for _, expression in expressions() for name in NAME.findall(expression)}
    bases = {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked}
    families = {f"kvstore_{family.name}" for family in families_of(busy())}
    assert families - bases == set()


@pytest.mark.parametrize(
    ("expression", "missing"),
    [
        ("rate(kvstore_telemetry_recieved_total[5m])", {"kvstore_telemetry_recieved_total"}),
        (
            'kvstore_telemetry_rejected_total{reason="nan"}',
            {"kvstore_telemetry_rejected_total{reason=nan}"},
        ),
        (
            'kvstore_telemetry_stored_total{reason="json"}',
            {"kvstore_telemetry_stored_total{reason}"},
        ),
    ],
)
def test_a_wrong_expression_is_found(expression, missing):
    assert unknown_in(expression) == missing


needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="Prometheus' own tool is not here"
)


@needs_promtool
def test_promtool_accepts_metrics_and_rules():
    subprocess.run(["promtool", "check", "metrics"], input=rendered(busy()), text=True, check=True)
    done = subprocess.run(
        ["promtool", "check", "rules", RULES], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_promtool_accepts_the_dashboard_s_expressions(tmp_path):
    """As recording rules, with Grafana's variables filled in."""
    filled = {"$__rate_interval": "1m", "$__range": "1h", "$sink": ".*"}
    rules = []
    for number, (_, expression) in enumerate(expressions()):
        for variable, value in filled.items():
            expression = expression.replace(variable, value)  # noqa: PLW2901
        if not expression.startswith("label_values"):
            rules.append({"record": f"x:{number}", "expr": expression})
    path = tmp_path / "dashboard.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    subprocess.run(["promtool", "check", "rules", path], check=True)
