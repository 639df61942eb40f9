"""The metrics file: what Prometheus can read, whole at every moment, with figures that are true."""

from __future__ import annotations

import shutil
import subprocess
import threading

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

import kvstore
from kvstore import metrics
from kvstore.active import Active
from kvstore.errors import DiskFull
from kvstore.ingest import Progress
from kvstore.stats import BOUNDS_S, CommitStats


def parsed(text):
    """Every sample by name and labels, the store's own left out; nothing may come twice."""
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        assert family.type in ("counter", "gauge", "histogram")
        for sample in family.samples:
            labels = dict(sample.labels)
            labels.pop("store")
            key = (sample.name.removeprefix("kvstore_"), *labels.values())
            assert key not in found
            found[key] = sample.value
    return found


def rendered(store, progress=None, name="run.kv"):
    families = metrics.families_of(store, progress or Progress())
    return metrics.render(families, {"store": name})


def batch(rows=10):
    return {"time": np.arange(float(rows)), "v": np.arange(rows)}


def test_the_figures_are_the_writer_s(path):
    progress = Progress(packets=3, rows=30, bytes=999, rejected=2, interrupted=1, connected=4)
    with kvstore.open(path, "w") as store:
        for _ in range(3):
            store.stream("s").append(batch())
            store.flush()
        found = parsed(rendered(store, progress))
        info = store.info()
    assert found["received_rows_total",] == 30
    assert found["received_bytes_total",] == 999
    assert found["received_packets_total",] == 3
    assert found["rejected_packets_total",] == 2
    assert found["interrupted_packets_total",] == 1
    assert found["connected_producers",] == 4
    assert found["commit_seconds_count",] == found["commit_seconds_bucket", "+Inf"] == 3
    assert 0 < found["commit_seconds_max",] <= found["commit_seconds_sum",]
    assert found["stream_rows", "s"] == 30
    assert found["queue_bytes",] == found["commit_failures_total",] == 0
    assert found["store_bytes",] == info.file_bytes
    assert found["store_segments",] == 1
    assert found["last_durable_timestamp_seconds",] == info.last_commit_ns / 1e9
    assert 0 < found["disk_free_bytes",] < found["disk_size_bytes",]


def test_what_was_dropped_or_went_wrong_is_counted_for_good(path):
    values = np.random.default_rng(1).integers(0, 2**62, (2000, 50))
    with kvstore.open(path, "w", segment_bytes=1 << 20) as store:
        for n in range(5):
            store.stream("s").append({"time": np.arange(2000.0) + n * 2000, "v": values})
            store.flush()
        store.note_gap("rejected", "s", start_ns=1, stop_ns=2, occurrences=7)
        dropped = store.drop(4000.0)
        assert dropped["rows"]
    with kvstore.open(path, "w") as store:
        found = parsed(rendered(store))
    assert found["dropped_rows_total", "s"] == dropped["rows"]
    assert found["dropped_segments_total", "s"] == dropped["segments"]
    assert found["gap_events_total", "rejected"] == 7
    assert found["gap_events_total", "silence"] == 0


def test_a_histogram_counts_each_commit_in_its_bucket_and_those_above():
    stats = CommitStats()
    for seconds in (0.0005, 0.001, 0.0011, 20.0):
        stats._add(seconds)
    samples = {s.labels.get("le", s.suffix): s.value for s in metrics.histogram(stats)}
    assert samples[str(BOUNDS_S[0])] == 2
    assert samples[str(BOUNDS_S[1])] == samples[str(BOUNDS_S[-1])] == 3
    assert samples["+Inf"] == samples["_count"] == 4
    assert samples["_sum"] == pytest.approx(20.0026)
    assert stats.seconds_max == 20.0


def test_failed_commits_are_counted_and_empty_ones_are_not(path, monkeypatch):
    with kvstore.open(path, "w") as store:
        committer = store.writer().committer
        store.flush()
        store.flush()
        assert committer.stats.commits == 0
        inner = Active.commit

        def full(*_):
            raise DiskFull("no room")

        monkeypatch.setattr(Active, "commit", full)
        store.stream("s").append(batch())
        with pytest.raises(DiskFull):
            store.flush()
        monkeypatch.setattr(Active, "commit", inner)
        store.flush()
        assert committer.stats.failures >= 1  # it tries by itself, too, where this thread is slow
        assert committer.stats.commits == 1


def test_a_commit_that_hangs_shows_in_queue_and_delay(path, monkeypatch):
    gate = threading.Event()
    inner = Active.commit

    def held(self, group):
        gate.wait(180)
        inner(self, group)

    monkeypatch.setattr(Active, "commit", held)
    with kvstore.open(path, "w", flush_interval_s=0.01) as store:
        committer = store.writer().committer
        assert committer.overdue_s() == 0
        store.stream("s").append(batch())
        while not committer.overdue_s():
            pass
        store.stream("s").append(batch(50_000))
        found = parsed(rendered(store))
        assert found["commit_overdue_seconds",] > 0
        assert found["queue_bytes",] >= 50_000 * 16
        gate.set()
        store.flush()
        assert committer.overdue_s() == 0


def test_names_with_quotes_and_newlines_stay_inside_their_label(path):
    with kvstore.open(path, "w") as store:
        store.stream('a"b\\c').append(batch())
        store.flush()
        text = rendered(store, name='odd "name"\n\\')
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    assert {sample.labels["store"] for sample in samples} == {'odd "name"\n\\'}
    assert 'a"b\\c' in [sample.labels.get("stream") for sample in samples]


def test_a_file_is_replaced_at_once_and_others_may_read_it(tmp_path):
    path = tmp_path / "kvstore.prom"
    path.write_text("old")
    with path.open() as reading:
        metrics.replace_file(path, "new\n")
        assert reading.read() == "old"  # who began with the old one finishes it
    assert path.read_text() == "new\n"
    assert path.stat().st_mode & 0o777 == 0o644
    assert [each.name for each in tmp_path.iterdir()] == ["kvstore.prom"]


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    (tmp_path / "kvstore.prom").mkdir()
    with pytest.raises(OSError, match="directory"):
        metrics.replace_file(tmp_path / "kvstore.prom", "x")
    assert [each.name for each in tmp_path.iterdir()] == ["kvstore.prom"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Prometheus' own tool is not here")
def test_promtool_has_nothing_to_say(path):
    with kvstore.open(path, "w") as store:
        text = rendered(store)
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")
