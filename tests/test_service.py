"""`kvstore write` as a service: real processes, sockets and FIFOs, with this test as systemd."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

import kvstore
from kvstore import libc, metrics
from kvstore.cli.options import size_bytes
from kvstore.ingest import Progress
from kvstore.packets import encode
from kvstore.serve import PACKET_BYTES_MAX
from kvstore.sockets import SOCKET_MODE

ROOT = Path(__file__).resolve().parent.parent
UNITS = ROOT / "deploy" / "systemd"
CODE = "import sys; sys.argv[0] = 'kvstore'; from kvstore.cli import main; main()"
COMMAND = [sys.executable, "-W", "error", "-c", CODE]


def packet(numbers):
    return b"".join(encode({"time": np.asarray(numbers, "f8")}))


TORN = packet(range(50))[:-9]


class Process:
    """A `kvstore write` of stream ``s`` with JSON talk, in a folder of its own."""

    def __init__(self, folder, *args, env=None, prefix=(), **options):
        self.folder = folder
        self.process = subprocess.Popen(
            [*prefix, *COMMAND, "write", "run.kv", "--stream", "s", "--log-format", "json", *args],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            **options,
        )

    def wait_for(self, condition):
        deadline = time.monotonic() + 120
        while not condition():
            assert self.process.poll() is None or condition(), self.process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def connect(self, data=b""):
        """Connect as soon as there is somebody; a producer would try again in the same way."""
        client = socket.socket(socket.AF_UNIX)
        path = str(self.folder / "in.sock")
        self.wait_for(lambda: client.connect_ex(path) == 0)
        client.sendall(data)
        return client

    def send(self, data):
        self.connect(data).close()

    def wait_for_rows(self, count):
        self.wait_for(lambda: len(rows_in(self.folder)) >= count)

    def end(self, number=signal.SIGTERM):
        """The exit code and the talk."""
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=180)
        lines = [json.loads(line) for line in err.decode().splitlines()]
        return self.process.returncode, {line["event"]: line for line in lines}


def rows_in(folder):
    try:
        with kvstore.open(folder / "run.kv") as store:
            return [int(t) for b in store["s"].read() for t in b["time"]] if "s" in store else []
    except kvstore.StoreNotFound:
        return []


@contextmanager
def service(folder, *args, **options):
    started = Process(folder, *args, **options)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.communicate()


LISTEN = ("--listen", "unix:in.sock")


def test_systemd_is_told_everything_and_the_metrics_and_the_log_are_true(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(120)
        env = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "1000000"}
        with service(tmp_path, *LISTEN, "--metrics-file", "kv.prom", env=env) as process:
            heard = []
            while "READY=1" not in heard:
                heard += systemd.recv(1000).decode().split("\n")
            with socket.socket(socket.AF_UNIX) as client:  # ready is ready: no second try
                client.connect(str(tmp_path / "in.sock"))
                client.sendall(packet([1, 2]) + packet([3]) + TORN)
                process.wait_for_rows(3)
                while heard.count("WATCHDOG=1") < 3:
                    heard += systemd.recv(1000).decode().split("\n")
                code, log = process.end()
        systemd.setblocking(False)
        while True:
            try:
                heard += systemd.recv(1000).decode().split("\n")
            except BlockingIOError:
                break
    assert "STOPPING=1" in heard[heard.index("READY=1") :]
    assert any(re.fullmatch(r"STATUS=3 rows taken in, \d+ B queued, 1 producers", x) for x in heard)
    assert code == 3  # something was cut off
    assert rows_in(tmp_path) == [1, 2, 3]
    assert log["listening"]["rights"].startswith("mode 0660, group ")
    assert log["interrupted"]["level"] == "warning"
    assert (log["summary"]["rows"], log["summary"]["packets"]) == (3, 2)
    text = (tmp_path / "kv.prom").read_text()
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    found = {sample.name: sample.value for sample in samples}
    assert found["kvstore_received_rows_total"] == found["kvstore_stream_rows"] == 3
    assert found["kvstore_interrupted_packets_total"] == 1
    assert found["kvstore_queue_bytes"] == 0
    assert samples[0].labels == {"store": str(tmp_path / "run.kv")}
    assert sorted(os.listdir(tmp_path)) == ["kv.prom", "notify", "run.kv"]


def test_after_kill_9_the_next_one_takes_over_socket_and_store(tmp_path):
    with service(tmp_path, *LISTEN) as first:
        with first.connect(packet([1]) + TORN):
            first.wait_for_rows(1)
            code, _ = first.end(signal.SIGKILL)
            assert code == -signal.SIGKILL
        assert (tmp_path / "in.sock").is_socket()
    with service(tmp_path, *LISTEN) as second:
        second.send(packet([2]))
        second.wait_for_rows(2)
        code, log = second.end()
        assert (code, log["summary"]["rows"]) == (0, 1)
    assert rows_in(tmp_path) == [1, 2]
    assert not (tmp_path / "in.sock").exists()


@pytest.mark.slow
def test_kill_9_under_load_keeps_a_prefix_of_each_producer(tmp_path):
    def send(client, begin):
        with suppress(OSError):
            for n in range(100_000):
                client.sendall(packet([begin + n]))

    for round_ in range(3):
        with service(tmp_path, *LISTEN, "--flush-interval", "5ms") as process:
            begins = [round_ * 10**6 + k * 10**5 for k in range(3)]
            clients = [process.connect() for _ in begins]
            threads = [
                threading.Thread(target=send, args=pair)
                for pair in zip(clients, begins, strict=True)
            ]
            for thread in threads:
                thread.start()
            process.wait_for_rows((round_ + 1) * 500)
            process.end(signal.SIGKILL)
            for thread, client in zip(threads, clients, strict=True):
                thread.join(180)
                client.close()
    found = sorted(rows_in(tmp_path))
    for begin in {n // 10**5 * 10**5 for n in found}:
        mine = [n for n in found if begin <= n < begin + 10**5]
        assert mine == list(range(begin, begin + len(mine)))
    with kvstore.open(tmp_path / "run.kv") as store:
        assert sum(gap.kind == "unclean_stop" for gap in store.gaps()) == 2  # told by the next


PRODUCER = """
import socket, sys, time
client = socket.socket(socket.AF_UNIX)
client.connect(sys.argv[1])
client.sendall(bytes.fromhex(sys.argv[2]))
time.sleep(60)
"""


def test_a_producer_killed_in_a_packet_costs_that_packet_only(tmp_path):
    with service(tmp_path, *LISTEN) as process:
        staying = process.connect(packet([1]))
        data = (packet([2]) + TORN).hex()
        with subprocess.Popen(
            [sys.executable, "-c", PRODUCER, tmp_path / "in.sock", data]
        ) as dying:
            process.wait_for_rows(2)
            dying.kill()
        staying.sendall(packet([3]))
        process.wait_for_rows(3)
        staying.close()
        code, log = process.end()
    assert code == 3
    assert (
        f"(pid {dying.pid}, uid {os.getuid()}): packet 1 at byte" in log["interrupted"]["message"]
    )
    assert rows_in(tmp_path) == [1, 2, 3]


@pytest.mark.slow
def test_a_second_service_gets_neither_the_store_nor_the_socket(tmp_path):
    with service(tmp_path, *LISTEN) as first:
        first.send(packet([1]))
        first.wait_for_rows(1)
        with service(tmp_path, *LISTEN) as second:
            code, log = second.process.wait(180), second.end()[1]
        assert code == 1
        assert log["failed"]["kind"] == "StoreLocked"
        other = tmp_path / "other"
        other.mkdir()
        with service(other, "--listen", f"unix:{tmp_path}/in.sock") as third:
            code, log = third.process.wait(180), third.end()[1]
        assert (code, log["failed"]["kind"]) == (1, "ListenError")
        first.send(packet([2]))
        first.wait_for_rows(2)
        assert first.end()[0] == 0


def test_systemd_s_socket_is_served_and_outlives_the_service(tmp_path):
    with socket.socket(socket.AF_UNIX) as passed:
        passed.bind(str(tmp_path / "in.sock"))
        passed.listen()
        shell = f'exec 3<&{passed.fileno()}; export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@"'
        options = {"prefix": ["bash", "-c", shell, "-"], "pass_fds": [passed.fileno()]}
        for n in range(2):
            with socket.socket(socket.AF_UNIX) as early:  # before the service is there
                early.connect(str(tmp_path / "in.sock"))
                early.sendall(packet([n]))
                listen = ["--listen", f"unix:{tmp_path}/in.sock"]
                with service(tmp_path, *listen, **options) as process:
                    process.wait_for_rows(n + 1)
                    code, log = process.end()
                    assert code == 0
                    assert log["listening"]["rights"] == "rights as systemd set them"
    assert (tmp_path / "in.sock").exists()
    assert rows_in(tmp_path) == [0, 1]


@pytest.mark.slow
def test_a_fifo_is_read_again_when_its_producer_was_killed_and_comes_back(tmp_path):
    fifo = tmp_path / "in.fifo"
    os.mkfifo(fifo)
    with service(tmp_path, "in.fifo", "--reopen") as process:
        for n in range(3):
            data = packet([n]) + TORN * (n == 1)
            code = f"import sys; sys.stdout.buffer.write({data!r})"
            script = '"$0" -c "$1" > in.fifo; kill -9 $$'
            subprocess.run(["bash", "-c", script, sys.executable, code], cwd=tmp_path, check=False)
            process.wait_for_rows(n + 1)
        code, log = process.end()
    assert code == 3
    assert "in.fifo: packet 1 at byte" in log["interrupted"]["message"]
    assert rows_in(tmp_path) == [0, 1, 2]


def test_a_fifo_nobody_writes_to_can_be_waited_for_and_left(tmp_path):
    """Opening a FIFO waits for its writer: no signal would end that."""
    os.mkfifo(tmp_path / "in.fifo")
    with service(tmp_path, "in.fifo") as process:
        process.wait_for((tmp_path / "run.kv" / "store.msgpack").exists)
        time.sleep(0.2)
        assert "stopped" in process.end()[1]
    with service(tmp_path, "in.fifo") as process:
        (tmp_path / "in.fifo").write_bytes(packet([7]))
        assert process.process.wait(180) == 0  # without --reopen it ends with its writer
    assert rows_in(tmp_path) == [7]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--listen", "tcp:0.0.0.0:99"], "expected unix: and the path of a socket"),
        (["--listen", "unix:@abstract"], "expected unix: and the path of a socket"),
        (["--listen", "unix:in.sock", "--socket-mode", "rw"], "expected three octal digits"),
        (["--listen", "unix:in.sock", "file"], "file: no FIFO, and only those are served"),
        (["--reopen"], "--reopen is for FIFOs"),
        (["--reopen", "file"], "file: no FIFO"),
    ],
)
def test_wrong_usage_ends_with_2_before_anything_is_touched(
    tmp_path, monkeypatch, capsys, args, said
):
    from kvstore.cli import app  # noqa: PLC0415

    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    with pytest.raises(SystemExit) as caught:
        app(["write", "run.kv", *args])
    assert caught.value.code == 2
    assert said in re.sub(r"\s+", " ", capsys.readouterr().err)
    assert os.listdir(tmp_path) == ["file"]


# ---- limits ----


def test_limits_are_kept_in_the_store_and_others_left_alone(tmp_path, monkeypatch):
    from kvstore.cli import app  # noqa: PLC0415

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(libc, "keep_freed_memory", lambda: None)
    Path("some").write_bytes(packet([1]))

    def write(*args):
        with pytest.raises(SystemExit) as caught:
            app(["write", "run.kv", "some", "--stream", "s", *args])
        return caught.value.code

    assert write("--max-bytes", "800GB", "--max-age", "7d", "--gap-after", "10s") == 0
    assert write("--min-free-space", "1MB", "--when-full", "stop", "--max-age", "none") == 0
    assert write("--clock-step", "2s") == 0
    with kvstore.open("run.kv") as store:
        assert store.settings == kvstore.Settings(
            max_bytes=800 * 10**9, max_age_s=None, min_free_bytes=10**6, when_full="stop",
            gap_after_s=10.0, clock_step_s=2.0,
        )  # fmt: skip


def test_a_limit_that_makes_no_sense_makes_no_store(tmp_path, monkeypatch):
    from kvstore.cli import app  # noqa: PLC0415

    monkeypatch.chdir(tmp_path)
    with pytest.raises(kvstore.StoreError, match="max_bytes=5: use at least"):
        app(["write", "run.kv", "/dev/null", "--max-bytes", "5"], standalone_mode=False)
    assert os.listdir(tmp_path) == []


def test_the_size_limit_holds_and_what_was_dropped_is_told(tmp_path):
    rows = 2000
    values = np.random.default_rng(1).integers(0, 2**62, (rows, 100))
    limit = ["--max-bytes", "8MiB", "--metrics-file", "kv.prom"]
    with service(tmp_path, *LISTEN, *limit) as process:
        with process.connect() as client:
            for n in range(20):
                batch = {"time": np.arange(rows) + float(n * rows), "v": values}
                client.sendall(b"".join(encode(batch)))
        process.wait_for_rows(1)
        code, _ = process.end()
    assert code == 0
    size = sum(each.stat().st_size for each in (tmp_path / "run.kv").rglob("*") if each.is_file())
    assert size <= 8 << 20
    metrics = (tmp_path / "kv.prom").read_text()
    (dropped,) = re.findall(r"kvstore_dropped_rows_total\{.*\} (\d+)", metrics)
    assert int(dropped) + len(rows_in(tmp_path)) == 20 * rows
    assert int(dropped) > 0


def test_a_store_that_is_full_and_must_not_drop_ends_the_service_in_order(tmp_path):
    rows = 2000
    values = np.random.default_rng(1).integers(0, 2**62, (rows, 50))
    data = b"".join(
        b"".join(encode({"time": np.arange(rows) * 1.0, "v": values})) for _ in range(9)
    )
    limit = ["--max-bytes", "4MiB", "--when-full", "stop"]
    with service(tmp_path, *LISTEN, *limit) as process:
        with process.connect() as client, suppress(BrokenPipeError):
            while True:
                client.sendall(data)
        code, log = process.process.wait(180), process.end()[1]
    assert code == 1
    assert log["failed"]["kind"] == "DiskFull"
    assert 0 < log["kept"]["stored"] == len(rows_in(tmp_path)) < log["kept"]["received"]
    assert log["kept"]["stored"] % rows == 0
    assert not (tmp_path / "in.sock").exists()


# ---- the units ----


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here")
def test_systemd_takes_the_units(tmp_path):
    for unit in UNITS.iterdir():
        text = unit.read_text().replace("/usr/local/bin/kvstore", sys.executable)
        (tmp_path / unit.name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", *sorted(tmp_path.iterdir())],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_unit_and_help_speak_of_what_there_is():
    text = (UNITS / "kvstore.service").read_text()
    command = re.search(r"^ExecStart=(.*?[^\\])\n", text, re.DOTALL | re.MULTILINE)[1]
    done = subprocess.run([*COMMAND, "write", "--help"], capture_output=True, text=True, check=True)
    options = re.findall(r"--[a-z-]+", command)
    assert "--listen" in options
    assert [option for option in options if option not in done.stdout] == []
    said = re.sub(r"\s+", " ", done.stdout)
    assert size_bytes(re.search(r"in a service (\w+)", said)[1]) == PACKET_BYTES_MAX
    assert f"else {SOCKET_MODE:04o}" in said
    (path,) = re.findall(r"unix:(\S+)", command)
    assert f"ListenStream={path}\n" in (UNITS / "kvstore.socket").read_text()


@pytest.mark.parametrize("name", ["docs/service.md", "deploy/prometheus/kvstore.rules.yml"])
def test_every_metric_that_is_spoken_of_exists(path, name):
    with kvstore.open(path, "w") as store:
        text = metrics.render(metrics.families_of(store, Progress()), {})
    there = set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE))
    named = set(re.findall(r"kvstore_\w+", (ROOT / name).read_text()))
    assert named
    assert {name.removesuffix("_bucket") for name in named} - there == set()
    assert name.startswith("deploy") or named == there
