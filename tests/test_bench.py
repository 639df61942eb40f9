"""The bench still runs, counts what it wrote, and reports every figure. Never: that it is fast."""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import sys

import numpy as np
import pytest

from bench import __main__ as cli
from bench import measure, process, soak, soak_roles, workload
from bench.figure import BenchError, Figure, Measurement, Rule, Setting

NAMES = [measurement.name for measurement in cli.MEASUREMENTS]
TINY_BYTES = cli.TINY_BYTES


def _figure(**changes):
    given = {"name": "f", "unit": "s", "limit_name": "l", "values": [4.0], "limits": [2.0]}
    return Figure(**{**given, **changes})


def quick_or_slow(measurement):
    """Processes started for nothing else are a matter of CI."""
    return pytest.mark.slow if measurement.name in ("startup", "memory") else ()


@pytest.mark.slow
@pytest.mark.parametrize(
    "measurement",
    [pytest.param(each, id=each.name, marks=quick_or_slow(each)) for each in cli.MEASUREMENTS],
)
def test_every_measurement_gives_finite_figures(measurement, tmp_path):
    figures = measurement.run(Setting(tmp_path, TINY_BYTES, 1, 1))
    assert figures
    for figure in figures:
        numbers = [figure.value, figure.limit, figure.ratio, *figure.details.values()]
        assert all(math.isfinite(number) for number in numbers), figure
        assert figure.value > 0
    assert list(tmp_path.iterdir()) == []


def test_every_row_of_the_issues_table_is_measured():
    assert NAMES == [
        "append-uniform",
        "append-counts",
        "one-row-appends",
        "cat-write",
        "generate-write",
        "paced",
        "one-particle-packets",
        "read-counts",
        "read-uniform",
        "read-pipe",
        "lookup",
        "startup",
        "memory",
    ]


def test_the_ratio_is_the_median_of_the_paired_ratios():
    figure = _figure(values=[10.0, 10.0, 90.0], limits=[10.0, 20.0, 10.0])
    assert figure.ratio == 1.0
    assert figure.value / figure.limit == 1.0
    skewed = _figure(values=[1.0, 10.0, 100.0], limits=[2.0, 5.0, 1000.0])
    assert skewed.ratio == 0.5
    assert skewed.value / skewed.limit == 2.0


def test_a_rule_holds_on_its_own_side_of_the_bound():
    at_least, below = Rule("ratio", ">=", 2.0), Rule("value", "<", 4.0)
    assert at_least.met(_figure())
    assert not at_least.met(_figure(values=[3.9]))
    assert not below.met(_figure())
    assert below.met(_figure(values=[3.9]))
    assert _figure(rules=(at_least, below)).met is False
    assert _figure().met is None


def test_sides_run_in_turns_and_the_order_flips():
    calls = []
    sides = [lambda n=n: calls.append(n) or float(n) for n in range(2)]
    assert measure.interleaved(3, *sides) == [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    assert calls == [0, 1, 1, 0, 0, 1]


def test_scratch_refuses_a_full_disk_and_leaves_nothing(tmp_path):
    with (
        pytest.raises(BenchError, match="choose another --dir"),
        measure.scratch(tmp_path, bytes_needed=1 << 60),
    ):
        pass
    with measure.scratch(tmp_path) as folder:
        (folder / "file").write_bytes(b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_bare_write_writes_everything(tmp_path, monkeypatch):
    written = bytearray()
    monkeypatch.setattr(measure, "WRITE_PIECE_BYTES", 1000)
    monkeypatch.setattr(
        measure.os, "write", lambda _, piece: written.extend(piece[:300]) or len(piece[:300])
    )
    content = os.urandom(2500)
    assert measure.bare_write_seconds(tmp_path / "bare", memoryview(content)) > 0
    assert bytes(written) == content


@pytest.mark.parametrize("profile", ["uniform", "counts"])
def test_a_workload_is_seeded_distinct_and_exactly_its_raw_bytes(profile):
    work = workload.Workload.of(profile, TINY_BYTES, 7)
    again = workload.Workload.of(profile, TINY_BYTES, 7)
    other = workload.Workload.of(profile, TINY_BYTES, 8)
    assert work.raw == again.raw
    assert work.raw != other.raw
    assert b"".join(a.tobytes() for batch in work.batches for a in batch.values()) == work.raw
    assert sum(len(batch["timestamps"]) for batch in work.batches) == work.rows
    assert TINY_BYTES - workload.PARTICLE_BYTES < len(work.raw) <= TINY_BYTES
    spectra = np.concatenate([batch["spectral"] for batch in work.batches])
    assert len(np.unique(spectra.reshape(work.rows, -1), axis=0)) == work.rows
    times = np.concatenate([batch["timestamps"] for batch in work.batches])
    assert (np.diff(times) >= 0).all()


def test_packets_have_the_briefs_framing():
    (batch,) = workload.batches_of("uniform", 3 * workload.PARTICLE_BYTES, 1, particles=3)
    framed = workload.packet(batch)
    assert int.from_bytes(framed[:4], "big") == len(framed) - 4
    unpickled = pickle.loads(framed[4:])
    assert {name: (a.dtype.str, a.shape) for name, a in unpickled.items()} == {
        "timestamps": ("<f8", (3,)),
        "scattering": ("<i4", (3, 64, 16)),
        "spectral": ("<i4", (3, 32, 16)),
    }


def test_a_pipeline_reports_cpu_memory_and_what_was_said():
    spin = (
        "import sys, time; b = bytearray(50_000_000); sys.stderr.write('said')\n"
        "time.sleep(0.5); sys.stdout.write('x')"  # long enough to be sampled on a busy machine
    )
    done = process.run([sys.executable, "-c", spin], ["cat"], watched=0)
    assert done.wall_s > 0
    assert done.ended[0].cpu_s > 0
    assert done.ended[0].stderr == "said"
    assert 50e6 < done.ended[0].anon_bytes_max < 200e6
    assert done.ended[1].anon_bytes_max == 0


def test_a_failing_command_fails_the_measurement_with_its_words():
    with pytest.raises(BenchError, match="ended with 3: alas"):
        process.run([sys.executable, "-c", "import sys; sys.stderr.write('alas'); sys.exit(3)"])


def test_what_cannot_be_measured_is_reported_and_the_exit_code_says_so(
    tmp_path, monkeypatch, capsys
):
    def _broken(_):
        raise BenchError("no such disk")

    measurements = (
        Measurement("broken", "", _broken),
        Measurement("fine", "", lambda _: [_figure()]),
    )
    monkeypatch.setattr(cli, "MEASUREMENTS", measurements)
    report = tmp_path / "report.json"
    assert cli.main(["--tiny", "--dir", str(tmp_path), "--json", str(report)]) == 1
    assert "NOT MEASURED broken: BenchError: no such disk" in capsys.readouterr().err
    record = json.loads(report.read_text())
    assert record["not_measured"] == [{"name": "broken", "reason": "BenchError: no such disk"}]
    assert [(figure["name"], figure["ratio"]) for figure in record["figures"]] == [("f", 2.0)]
    assert {"cpu", "cores", "kernel", "filesystem", "python", "libraries", "commit"} <= set(
        record["host"]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.slow
def test_a_soak_checks_its_books(tmp_path):
    report = tmp_path / "soak.json"
    arguments = ["soak", "--tiny", "--dir", str(tmp_path), "--json", str(report)]
    assert cli.main(arguments) == 0
    record = json.loads(report.read_text())
    figures = record["figures"]
    assert record["broken"] == []
    assert figures["rows"] == figures["fast"]["rows"] + figures["fast"]["rows_in_gaps"]
    assert figures["rows"] == figures["paced"]["rows"] + figures["paced"]["rows_in_gaps"]
    assert figures["paced"]["gaps"] > 0, "retention overtook nobody"
    assert figures["commit"]["unlinks"] > 0
    assert figures["verify"]["runs"] * figures["pins"]["pins"] > 0
    assert all(memory["second_half_max"] > 0 for memory in figures["anon_mb"].values())
    assert [path.name for path in tmp_path.iterdir()] == ["soak.json"]


def rows_of_a_follower(*numbers):
    seen = soak_roles._Seen()
    for sequence, number in enumerate(numbers):
        if number is None:
            seen.gap(None)
        else:
            seen.batch(sequence, {"number": np.array(number), "sent_ns": np.zeros(2, int)})
    return seen.rows, seen.rows_in_gaps, seen.lost, seen.doubled


def test_a_soak_tells_what_is_lost_from_what_is_accounted_for():
    assert rows_of_a_follower([5, 6], [7, 8]) == (4, 0, 0, 0)
    assert rows_of_a_follower([0, 1], None, [9, 10]) == (4, 7, 0, 0)
    assert rows_of_a_follower([0, 1], [9, 10]) == (4, 0, 7, 0)
    assert rows_of_a_follower([0, 1], None, [9, 10], [12, 13]) == (6, 7, 1, 0)
    assert rows_of_a_follower([0, 3]) == (2, 0, 2, 0)
    assert rows_of_a_follower([0, 1], [1, 2]) == (4, 0, 0, 1)


def sound(**changes):
    follower = {"lost_rows": 0, "doubled_rows": 0, "damages": 0}
    return {
        "fast": follower,
        "paced": follower,
        "verify": {"damages": []},
        "pins": {"lost_rows": 0},
        "disk": {"used_bytes_max": 10},
        "anon_mb": {"writer": {"first_half_max": 10, "second_half_max": 20}},
        **changes,
    }


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({}, None),
        ({"fast": {"lost_rows": 2, "doubled_rows": 0, "damages": 0}}, "fast: 2 lost_rows"),
        ({"paced": {"lost_rows": 0, "doubled_rows": 3, "damages": 0}}, "paced: 3 doubled_rows"),
        ({"verify": {"damages": ["it is torn"]}}, "it is torn"),
        ({"pins": {"lost_rows": 4}}, "4 rows of pinned"),
        ({"disk": {"used_bytes_max": soak.TINY.max_bytes + 1}}, "bytes used, limit"),
        ({"anon_mb": {"fast": {"first_half_max": 1, "second_half_max": 99}}}, "grew by 98 MB"),
    ],
)
def test_a_soak_says_what_does_not_hold(broken, said):
    found = soak._broken(soak.TINY, sound(**broken))
    assert found == [] if said is None else said in found[0]


def test_unknown_names_and_sizes_are_wrong_usage(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["no-such-measurement"])
    assert "no-such-measurement" in capsys.readouterr().err
    assert cli.size_bytes("2GB") == 2 * 10**9
    assert cli.size_bytes("1.5 MiB") == 3 << 19
    with pytest.raises(argparse.ArgumentTypeError, match="write 2GB or 512MiB"):
        cli.size_bytes("2")
