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
from bench import measure, process, workload
from bench.figure import BenchError, Figure, Measurement, Rule, Setting

NAMES = [measurement.name for measurement in cli.MEASUREMENTS]
TINY_BYTES = cli.TINY_BYTES


def _figure(**changes):
    given = {"name": "f", "unit": "s", "limit_name": "l", "values": [4.0], "limits": [2.0]}
    return Figure(**{**given, **changes})


@pytest.mark.parametrize("measurement", cli.MEASUREMENTS, ids=NAMES)
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


def test_unknown_names_and_sizes_are_wrong_usage(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["no-such-measurement"])
    assert "no-such-measurement" in capsys.readouterr().err
    assert cli.size_bytes("2GB") == 2 * 10**9
    assert cli.size_bytes("1.5 MiB") == 3 << 19
    with pytest.raises(argparse.ArgumentTypeError, match="write 2GB or 512MiB"):
        cli.size_bytes("2")
