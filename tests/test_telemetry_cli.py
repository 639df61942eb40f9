"""The telemetry commands as their users meet them: files, settings, secrets, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from stores import ROOT, scratch

import kvstore
from kvstore import libc
from kvstore.cli import app, main
from kvstore.errors import SettingsError
from kvstore.telemetry import pipeline, settings
from kvstore.telemetry.opening import has_password, kind_of, redacted
from kvstore.telemetry.sinks.stream import StreamSink

GOOD = {"temperature": 21.4, "humidity": 68, "firmware_version": "v1.2.0"}
BRIEF = [
    {"device_id": "sensor-123", "timestamp": "2025-01-20T10:15:30Z", **GOOD},
    {"device_id": "sensor-123", "timestamp": "2025-01-20T10:16:00Z", **GOOD, "pressure": 1013},
]


class Ran:
    """What became of a command."""

    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err
        assert "Traceback" not in err

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def here(capfd, monkeypatch):
    """A folder to work in, and the command run in this very process."""
    monkeypatch.setattr(libc, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(pipeline, "collect_rarely", lambda: None)
    with scratch() as folder:
        monkeypatch.chdir(folder)
        lines = [*map(json.dumps, BRIEF), json.dumps(BRIEF[0]), "{", json.dumps({"device_id": "x"})]
        (folder / "events.jsonl").write_text("".join(f"{line}\n" for line in lines))

        def run(*args):
            monkeypatch.setattr(sys, "argv", ["kvstore", "telemetry", *map(str, args)])
            with pytest.raises(SystemExit) as caught:
                main()
            return Ran(caught.value.code or 0, *capfd.readouterr())

        run.folder = folder
        yield run


def test_the_briefs_two_events_arrive_and_once_only(here):
    first = here("ingest", "events.jsonl", "--store", "ops.kv", "--json")
    assert first.code == 0
    assert {k: v for k, v in first.json.items() if k in ("received", "stored", "duplicates")} == {
        "received": 5, "stored": 2, "duplicates": 1,
    }  # fmt: skip
    assert "5 events: 2 stored in ops.kv, 1 duplicates, 2 rejected" in first.err
    assert here("ingest", "events.jsonl", "--store", "ops.kv", "--json").json["received"] == 0
    rows = here("query", "ops.kv", "--device", "sensor-123").out.splitlines()
    assert rows == [
        "timestamp,device_id,temperature,humidity,firmware_version,pressure,extras",
        "2025-01-20T10:15:30.000000Z,sensor-123,21.4,68.0,v1.2.0,,",
        "2025-01-20T10:16:00.000000Z,sensor-123,21.4,68.0,v1.2.0,1013.0,",
    ]


def test_query_by_time_with_lineage(here):
    here("ingest", "events.jsonl", "--store", "ops.kv")
    (last,) = here("query", "ops.kv", "--last", "10s", "--format", "jsonl", "--lineage").out.split(
        "\n"
    )[:-1]
    found = json.loads(last)
    assert (found["pressure"], found["offset"], found["partition"]) == (1013.0, 2, 0)
    assert found["source"].endswith("/events.jsonl")
    ends = "--start", "2025-01-20T10:15:30", "--stop", "2025-01-20T10:15:30"
    assert len(here("query", "ops.kv", *ends).out.splitlines()) == 2
    assert here("query", "ops.kv", "--device", "nobody", "--last", "1h").out == ""
    assert len(here("query", "ops.kv", "--limit", "1").out.splitlines()) == 2


def test_rejects_are_listed_shown_replayed_discarded(here):
    here("ingest", "events.jsonl", "--store", "ops.kv")
    listed = here("rejects", "list", "ops.kv").out.splitlines()
    assert [line.split("\t")[3].split(":")[0] for line in listed] == ["json", "missing"]
    name = listed[0].split("\t")[0]
    shown = here("rejects", "show", "ops.kv", name, "--json").json
    assert (shown["payload"], shown["state"]) == ("{", "open")
    assert here("rejects", "list", "ops.kv", "--count", "--json").json["letters"] == 2
    assert here("rejects", "list", "ops.kv", "--reason", "json", "--json").json["name"] == name
    assert "0 would pass" in here("rejects", "replay", "ops.kv", "--dry-run").err
    assert here("rejects", "replay", "ops.kv", "--json").json["again"]["json"] == 1
    assert "1 dead letters are discarded" in here("rejects", "discard", "ops.kv",
                                                  "--reason", "json").err  # fmt: skip
    assert len(here("rejects", "list", "ops.kv").out.splitlines()) == 1
    assert here("rejects", "show", "ops.kv", name[:-1] + "99").code == 1
    assert here("rejects", "list", "ops.kv", "--state", "gone").code == 2


def test_an_audit_is_sound_or_exits_with_3(here):
    here("ingest", "events.jsonl", "--store", "ops.kv")
    assert here("audit", "events.jsonl", "ops.kv").code == 0
    with kvstore.open("ops.kv", "w") as store:
        store.drop("2200-01-01")
    found = here("audit", "events.jsonl", "ops.kv", "--json")
    assert found.code == 3
    assert found.json["missing"]
    assert "have no fate" in found.err


def test_too_many_rejects_fail_after_committing(here):
    ran = here("ingest", "events.jsonl", "--store", "ops.kv", "--max-rejected", "10%")
    assert ran.code == 1
    assert "2 of 5 events were rejected" in ran.err
    with StreamSink.open("ops.kv", settings_contract(), mode="r") as sink:
        assert sum(map(len, sink.read())) == 2
    assert here("ingest", "events.jsonl", "--store", "o2.kv", "--max-rejected", "2").code == 0
    assert here("ingest", "events.jsonl", "--store", "o3.kv", "--max-rejected", "some").code == 1


def settings_contract():
    from kvstore.telemetry.contract import brief  # noqa: PLC0415

    return brief()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "no source given"),
        (["events.jsonl"], "0 sinks given"),
        (["events.jsonl", "--store", "ops.kv", "--lake", "lake"], "2 sinks given"),
        (["missing.jsonl", "--store", "ops.kv"], "missing.jsonl: No such file"),
        (["events.jsonl", "ops.kv", "--store", "x.kv"], "goes alone"),
        (["events.jsonl", "--store", "ops.kv", "--contract", "none.yaml"], "none.yaml"),
        (["events.jsonl", "--store", "ops.kv", "--retry-for", "soon"], "soon"),
        (["events.jsonl", "--postgres", "postgresql://u:secret@h/d"], "PGPASSWORD"),
        (["events.jsonl", "--postgres", "postgresql://h/d?password=secret"], "PGPASSWORD"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_made(here, arguments, says):
    if not arguments:
        arguments = ["--store", "ops.kv"]
    ran = here("ingest", *arguments)
    assert ran.code in {1, 2}
    assert says in ran.err
    assert "secret" not in ran.err
    made = {path.name for path in here.folder.iterdir()}
    assert made == {"events.jsonl"}


# ---- settings ----


def test_a_file_holds_settings_and_flags_go_before_it(here, monkeypatch):
    monkeypatch.setenv("EVENTS", "events")
    (here.folder / "p.toml").write_text(
        'source = "${EVENTS}.jsonl"\nstore = "from-file.kv"\nmax_rejected = "0"\nbatch_rows = 2\n'
    )
    assert here("ingest", "--settings", "p.toml").code == 1
    ran = here(
        "ingest", "--settings", "p.toml", "--store", "flag.kv", "--max-rejected", "9", "--json"
    )
    assert ran.code == 0
    assert ran.json["commits"] == 3
    assert (here.folder / "flag.kv").exists()


def load(tmp_path, text, environ=()):
    path = tmp_path / "p.toml"
    path.write_text(text)
    return settings.load(path, dict(environ))


def test_settings_are_read_with_secrets_from_the_environment(tmp_path):
    text = """
        source = ["kafka://broker:9092/telemetry"]
        postgres = "postgresql://writer:${PASSWORD}@db/telemetry"
        retry_for = "forever"
        batch_wait = "250ms"
        follow = true
        [kafka]
        "group.id" = "ops"
        "sasl.password" = "${PASSWORD}"
        "session.timeout.ms" = 6000
    """
    found = load(tmp_path, text, {"PASSWORD": "hunter2"})
    assert found.sink == ("postgres", "postgresql://writer:hunter2@db/telemetry")
    assert (found.retry_for, found.batch_wait, found.follow) == (float("inf"), 0.25, True)
    assert found.kafka == {
        "group.id": "ops",
        "sasl.password": "hunter2",
        "session.timeout.ms": "6000",
    }
    changed = found.changed({"lake": "lake", "kafka": {"group.id": "bi"}, "follow": False})
    assert changed.sink == ("lake", "lake")
    assert changed.kafka["group.id"] == "bi"
    assert changed.follow


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sauce = 1", "no setting 'sauce'; there are"),
        ("source = 1", "expected a list"),
        ("source = [1.5, true]", "expected text"),
        ("batch_rows = true", "expected a whole number"),
        ('follow = "yes"', "expected true or false"),
        ('store = "${NOT_THERE}"', r"\$\{NOT_THERE\}: the environment has no"),
        ('retry_for = "soon"', "soon"),
        ("kafka = 3", "expected a table"),
        ("store = ", "is no TOML"),
    ],
)
def test_what_is_wrong_in_settings_is_named(tmp_path, text, says):
    with pytest.raises(SettingsError, match=says) as caught:
        load(tmp_path, text)
    assert "p.toml" in str(caught.value)


def test_settings_that_are_not_there_or_no_text_are_errors(tmp_path):
    with pytest.raises(SettingsError, match="No such file"):
        settings.load(tmp_path / "none.toml")
    (tmp_path / "p.toml").write_bytes(b"\xff")
    with pytest.raises(SettingsError, match="is no TOML"):
        settings.load(tmp_path / "p.toml")


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("postgresql://u:pa:ss@h/d", "postgresql://u:***@h/d"),
        ("postgresql://h/d?user=u&password=x&sslmode=require",
         "postgresql://h/d?user=u&password=***&sslmode=require"),
        ("postgresql://u@h/d", "postgresql://u@h/d"),
        ("kafka://h:9092/t", "kafka://h:9092/t"),
        ("events.jsonl", "events.jsonl"),
    ],
)  # fmt: skip
def test_passwords_are_never_shown(given, shown):
    assert redacted(given) == shown
    assert has_password(given) == (given != shown)


def test_names_mean_sinks(tmp_path):
    (tmp_path / "lake").mkdir()
    assert kind_of("postgresql://h/d") == "postgres"
    assert kind_of(str(tmp_path / "new.kv")) == "store"
    assert kind_of(str(tmp_path / "lake")) == "lake"
    kvstore.open(tmp_path / "odd-name", "w").close()
    assert kind_of(str(tmp_path / "odd-name")) == "store"


# ---- check ----


def test_check_finds_nothing_wrong_and_makes_nothing(here):
    ran = here("check", "events.jsonl", "--store", "ops.kv")
    assert ran.code == 0
    assert [line.split()[:2] for line in ran.out.splitlines()] == [
        ["ok", "contract"], ["ok", "source"], ["ok", "sink"],
    ]  # fmt: skip
    assert not (here.folder / "ops.kv").exists()


def test_check_finds_what_is_wrong(here):
    (here.folder / "bad.jsonl").write_text("no json\n" * 3)
    with kvstore.open(here.folder / "empty.kv", "w"):
        sources = "missing.jsonl", "bad.jsonl"
        found = here("check", *sources, "--store", "empty.kv")
    assert found.code == 1
    failed = [line for line in found.out.splitlines() if line.startswith("FAIL")]
    assert len(failed) == 3
    assert "No such file" in failed[0]
    assert "refuses each of its first 3 lines (json)" in failed[1]
    assert "another process is writing" in failed[2]
    assert here("check", "empty.kv", "--store", "x.kv").code == 1


def test_check_finds_a_contract_that_clashes_with_the_store(here):
    here("ingest", "events.jsonl", "--store", "ops.kv")
    text = (ROOT / "kvstore/telemetry/contracts/telemetry-v2.yaml").read_text()
    before, marker, after = text.partition("name: humidity")
    assert marker
    changed = after.replace("logicalType: number", "logicalType: string", 1)
    for option in ("minimum", "maximum"):
        changed = "\n".join(
            line for n, line in enumerate(changed.split("\n")) if n > 15 or option not in line
        )
    (here.folder / "c.yaml").write_text(before + marker + changed)
    ran = here("check", "events.jsonl", "--store", "ops.kv", "--contract", "c.yaml", "--json")
    faults = [json.loads(line) for line in ran.out.splitlines()]
    assert ran.code == 1, ran.err
    assert "never changes its type" in faults[-1]["text"]


# ---- as a process ----

CODE = "import sys; sys.argv[0] = 'kvstore'; from kvstore.cli import main; main()"


def command(*args):
    return [sys.executable, "-W", "error", "-c", CODE, "telemetry", *map(str, args)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_commits_what_came_and_ends_well(here, number):
    arguments = "ingest", "-", "--store", "ops.kv", "--batch-wait", "1h", "--log-format", "json"
    with subprocess.Popen(
        command(*arguments), stdin=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
    ) as child:  # fmt: skip
        assert json.loads(child.stderr.readline())["event"] == "assigned"
        child.stdin.write((here.folder / "events.jsonl").read_text())
        child.stdin.flush()
        wait_until_read(child.stdin)
        child.send_signal(number)
        said = [json.loads(line) for line in child.stderr.read().splitlines()]
    assert child.returncode == 0
    assert [event["event"] for event in said] == ["committed", "ingested"]
    assert said[-1]["received"] == 5
    assert len(here("query", "ops.kv").out.splitlines()) == 3


def wait_until_read(pipe):
    """Until nothing of what was written is in the pipe any more."""
    import fcntl  # noqa: PLC0415
    import struct  # noqa: PLC0415
    import termios  # noqa: PLC0415
    import time  # noqa: PLC0415

    until_s = time.monotonic() + 30
    while struct.unpack("i", fcntl.ioctl(pipe.fileno(), termios.FIONREAD, b"\0" * 4))[0]:
        assert time.monotonic() < until_s
        time.sleep(0.005)


@pytest.mark.slow
def test_the_demo_shows_all_of_it(here):
    done = subprocess.run(
        command("demo", "--dir", "demo", "--events", "2000"), check=False, capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2,000 events" in done.stderr
    assert "$ kvstore telemetry audit" in done.stderr
    assert app
