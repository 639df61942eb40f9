"""The command line as its users meet it: in pipes, on terminals, interrupted, misused."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pickle
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest

import kvstore
from kvstore import libc
from kvstore.cli import app
from kvstore.packets import encode

START = "2026-02-17T15:32:37"
T0 = 1771342357.0
PARTICLES = 50  # in each packet of the generated store
PACKETS = 12  # 10 ms apart
# As the console script does, wherever kvstore was imported from, with its own cache of bytecode.
CODE = "import sys; sys.argv[0] = 'kvstore'; from kvstore.cli import main; main()"
COMMAND = [sys.executable, "-W", "error", "-c", CODE]


@pytest.fixture(scope="module", autouse=True)
def environment():
    """Children find the kvstore under test, and compile it only once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        patch.setenv("PYTHONPATH", str(Path(kvstore.__file__).parent.parent))
        patch.setenv("TERM", "xterm")
        yield


class Ran:
    """What became of a command. No command may ever show a traceback."""

    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err
        assert "Traceback" not in err
        assert "Exception ignored" not in err

    @property
    def text(self):
        return self.out.decode()


def run(*args, data=b"", cwd=None, **options):
    done = subprocess.run(
        [*COMMAND, *map(str, args)],
        check=False,
        input=data,
        cwd=cwd,
        capture_output=True,
        timeout=180,
        **options,
    )
    return Ran(done.returncode, done.stdout, done.stderr.decode())


@pytest.fixture
def here(capfdbinary, monkeypatch):
    """Run in this very process: dozens of children would take a while."""
    monkeypatch.setattr(libc, "keep_freed_memory", lambda: None)

    def run_here(*args):
        with pytest.raises(SystemExit) as caught:
            app([str(arg) for arg in args])
        out, err = capfdbinary.readouterr()
        return Ran(caught.value.code, out, err.decode())

    return run_here


def shell(line, cwd, **variables):
    """A line of bash; ``kvstore`` in it is the command under test."""
    words = " ".join(f"'{word}'" for word in [sys.executable, "-W", "error", "-c"])
    script = f'set -o pipefail; kvstore() {{ {words} "{CODE}" "$@"; }}; {line}'
    done = subprocess.run(
        ["bash", "-c", script],
        check=False,
        cwd=cwd,
        capture_output=True,
        timeout=180,
        env={**os.environ, **variables},
    )
    return Ran(done.returncode, done.stdout, done.stderr.decode())


def start(*args, **options):
    return subprocess.Popen(
        [*COMMAND, *map(str, args)], stderr=subprocess.PIPE, **{"stdin": subprocess.PIPE, **options}
    )


def ended(process):
    out, err = process.communicate(timeout=180)
    return Ran(process.returncode, out, err.decode())


def particles(rows=2, at=T0, **changed):
    batch = {
        "timestamps": np.full(rows, at),
        "scattering": np.arange(rows * 1024, dtype="i4").reshape(rows, 64, 16),
        "spectral": np.arange(rows * 512, dtype="i4").reshape(rows, 32, 16),
    }
    return {**batch, **changed}


def framed(*batches):
    return b"".join(part for batch in batches for part in encode(batch))


def unpickled(stream):
    """Packets as the brief's own reader reads them."""
    found = []
    while stream:
        (length,) = struct.unpack(">I", stream[:4])
        found.append(pickle.loads(stream[4 : 4 + length]))
        stream = stream[4 + length :]
    return found


def joined(packets):
    return {name: np.concatenate([p[name] for p in packets]) for name in packets[0]}


def rows_in(path, stream="particles"):
    with kvstore.open(path) as store:
        return len(store[stream])


def wait_for(condition, what, process):
    """Until it is so; fails at once where the process that should see to it has ended."""
    deadline = time.monotonic() + 120
    while not condition():
        ended_early = process.poll() is not None and not condition()
        assert not ended_early, f"ended before {what}: {process.communicate()}"
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def made(tmp_path_factory, environment):
    """A store made as users make one, the packets it was made of, and what was said."""
    folder = tmp_path_factory.mktemp("made")
    packet_bytes = len(framed(particles(PARTICLES)))
    max_mb = (packet_bytes * PACKETS - 1000) / 2**20
    line = (
        f"kvstore generate --pps 0 --max-mb {max_mb} --seed 1 --start {START} "
        f"--particles {PARTICLES} 2> generate.err | tee packets | kvstore write run.kv 2> write.err"
    )
    assert shell(line, folder).code == 0
    return folder


@pytest.fixture(scope="module")
def store(made):
    return made / "run.kv"


@pytest.fixture(scope="module")
def sent(made):
    return joined(unpickled((made / "packets").read_bytes()))


# ---- the main job ----


def test_generate_and_write_say_what_the_brief_says(made):
    count, size = PACKETS * PARTICLES, (made / "packets").stat().st_size
    rate = r"Write bandwidth: \d+\.\d\d kParticles/s\n"
    assert re.fullmatch(
        r"First Data timestamps 2026-02-17T15:32:37\.000000\+00:00\n"
        rf"Reached {size} bytes after {PACKETS} packets \({count} particles\)\. Stopping\.\n"
        rf"{rate}Last Data timestamp 2026-02-17T15:32:37\.110000\+00:00\n",
        (made / "generate.err").read_text(),
    )
    assert re.fullmatch(
        r"First Data timestamps 2026-02-17T15:32:37\+00:00\n"
        rf"Wrote to storage {PACKETS} packets \({count} particles, {size} bytes\)\.\n"
        rf"{rate}Last Data timestamp 2026-02-17T15:32:37\.110000\+00:00\n",
        (made / "write.err").read_text(),
    )


def test_a_pipe_gets_packets_that_any_reader_of_the_format_understands(store, sent):
    done = run("read", store)
    assert (done.code, done.err) == (0, "")
    found = joined(unpickled(done.out))
    assert list(found) == list(sent)
    for name, column in sent.items():
        assert found[name].dtype == column.dtype
        assert np.array_equal(found[name], column)


def test_what_is_read_can_be_written_again(store, sent, tmp_path):
    done = shell(f"kvstore read {store} --last 50ms | kvstore write other.kv", tmp_path)
    assert done.code == 0
    with kvstore.open(tmp_path / "other.kv") as other:
        found = joined(list(other["particles"].read()))
    late = sent["timestamps"] >= T0 + 0.06
    for name, column in sent.items():
        assert np.array_equal(found[name], column[late])


def test_the_summary_is_the_brief_s(store):
    options = ["--start", START, "--stop", f"{START}.05", "--format", "summary"]
    done = run("read", store, *options)
    assert done.code == 0
    day = "2026-02-17 15:32:"
    assert re.fullmatch(
        rf"Reading data between {day}37\+00:00 and {day}37\.050000\+00:00\n"
        rf"Found storage data from {day}37\+00:00 to {day}37\.110000\+00:00\n"
        rf"Found {6 * PARTICLES} particles\.\n"
        r"Read bandwidth \d+\.\d\d kParticles/s\.\n",
        done.text,
    )


@pytest.mark.parametrize(
    ("options", "packets"),
    [
        ([], 12),
        (["--start", f"{START}.02", "--stop", f"{START}.04"], 3),  # both ends are in
        (["--start", "1771342357.02", "--stop", "1771342357.04"], 3),
        (["--start", "2026-02-17 16:32:37.02+01:00", "--stop", f"{START}.04Z"], 3),
        (["--start", f"{START}.021", "--stop", f"{START}.039"], 1),
        (["--start", "2026-02-18"], 0),
        (["--stop", f"{START}"], 1),
        (["--last", "20ms"], 3),
        (["--last", "1d"], 12),
        (["--last", "0s"], 1),
    ],
)
def test_ranges_in_any_notation_are_counted_with_both_ends(here, store, options, packets):
    done = here("read", store, "--count", *options)
    assert (done.code, done.err) == (0, "")
    assert done.text == f"{packets * PARTICLES}\n"


def test_fields_and_limit_choose_what_is_read(store, sent):
    done = run("read", store, "--fields", "spectral, timestamps", "--limit", 70)
    found = joined(unpickled(done.out))
    assert list(found) == ["spectral", "timestamps"]
    assert np.array_equal(found["spectral"], sent["spectral"][:70])


def test_late_rows_are_merged_where_order_is_asked_for(tmp_path):
    rows = framed(particles(1, T0), particles(1, T0 + 9))
    run("write", "s.kv", data=rows, cwd=tmp_path)
    run("write", "s.kv", data=framed(particles(1, T0 + 5)), cwd=tmp_path)
    done = run("read", "s.kv", "--ordered", cwd=tmp_path)
    assert joined(unpickled(done.out))["timestamps"].tolist() == [T0, T0 + 5, T0 + 9]


# ---- formats and files ----


def test_the_name_of_the_output_file_says_the_format(here, store, sent, tmp_path):
    options = ["read", store, "--fields", "timestamps", "--limit", 3, "-o"]
    for name in ("a.csv", "a.jsonl", "a.npz", "a.packets", "a"):
        assert here(*options, tmp_path / name).code == 0
    assert sorted(os.listdir(tmp_path)) == ["a", "a.csv", "a.jsonl", "a.npz", "a.packets"]
    times = sent["timestamps"][:3].tolist()
    assert (tmp_path / "a.csv").read_text() == "timestamps\n" + "".join(f"{t}\n" for t in times)
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"timestamps": t} for t in times]
    with np.load(tmp_path / "a.npz") as file:
        assert file["timestamps"].tolist() == times
    assert (tmp_path / "a").read_bytes() == (tmp_path / "a.packets").read_bytes()
    assert joined(unpickled((tmp_path / "a").read_bytes()))["timestamps"].tolist() == times


def test_a_dash_is_stdout_and_a_device_stays_a_device(store, tmp_path):
    options = ["read", store, "--fields", "timestamps", "--limit", 1, "--format", "csv", "-o"]
    assert run(*options, "-").text == f"timestamps\n{T0}\n"
    assert run(*options, "/dev/stdout").text == f"timestamps\n{T0}\n"
    (tmp_path / "link.csv").symlink_to("real.csv")
    assert run(*options, "link.csv", cwd=tmp_path).code == 0
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "real.csv").read_text() == f"timestamps\n{T0}\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_unfinished_output_file_is_not_seen_and_not_left(tmp_path, number, code):
    run("write", "big.kv", data=framed(particles(3000)), cwd=tmp_path)
    process = start("read", "big.kv", "-o", "out.jsonl", cwd=tmp_path)
    wait_for(
        lambda: any(file.stat().st_size for file in tmp_path.glob(".out.jsonl.*.tmp")),
        "the unfinished file, which has no bytes until it is open",
        process,
    )
    assert not (tmp_path / "out.jsonl").exists()
    process.send_signal(number)
    assert ended(process).code == code
    assert sorted(os.listdir(tmp_path)) == ["big.kv"]


def test_a_failed_export_leaves_the_old_file_alone(tmp_path):
    with kvstore.open(tmp_path / "s.kv", mode="w") as store:
        stream = store.stream("notes")
        stream.append({"time": np.arange(2.0), "note": np.array(["a", None], object)})
    (tmp_path / "out.npz").write_text("old")
    done = run("read", "s.kv", "-o", "out.npz", cwd=tmp_path)
    assert (done.code, done.err[:9]) == (1, "kvstore: ")
    assert "'note' holds None" in done.err
    assert (tmp_path / "out.npz").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["out.npz", "s.kv"]
    done = run("read", "s.kv", cwd=tmp_path)
    assert done.code == 1
    assert done.err.startswith("kvstore: field 'note' holds NoneType")


def test_the_only_stream_need_not_be_named(tmp_path):
    data = framed({"time": np.arange(3.0), "celsius": np.array([20.5, 20.6, 20.4], "f4")})
    done = run("write", "s.kv", "--stream", "room", data=data, cwd=tmp_path)
    assert "Wrote to storage 1 packets (3 rows, " in done.err
    assert "kRows/s" in done.err
    done = run("read", "s.kv", "--format", "csv", cwd=tmp_path)
    assert done.text == "time,celsius\n0.0,20.5\n1.0,20.6\n2.0,20.4\n"
    assert "Found 3 rows.\n" in run("read", "s.kv", "--format", "summary", cwd=tmp_path).text


# ---- info ----


def test_info_gives_lines_to_tools_and_json_to_programs_and_changes_no_byte(store):
    before = {path: path.read_bytes() for path in store.rglob("*.m*")}
    lines = [line.split("\t") for line in run("info", store).text.splitlines()]
    assert ["stream", "particles", "rows", str(PACKETS * PARTICLES)] in lines
    assert ["stream", "particles", "first", "2026-02-17T15:32:37+00:00"] in lines
    assert ["field", "particles", "scattering", "int32", "64x16", "", ""] in lines
    found = json.loads(run("info", store, "--json").text)
    assert found["streams"][0]["rows"] == PACKETS * PARTICLES
    assert found["streams"][0]["fields"][2]["shape"] == [32, 16]
    assert {path: path.read_bytes() for path in store.rglob("*.m*")} == before


# ---- what goes wrong with the input ----

ONE = framed(particles(2))
BAD = framed(particles(2, timestamps=np.array([T0, np.nan])))
EVIL = pickle.dumps({"timestamps": os.getcwd})
HOSTILE = struct.pack(">I", len(EVIL)) + EVIL
SKIP = ["--on-error", "skip"]


def test_no_input_makes_an_empty_store_of_particles(tmp_path):
    done = run("write", "s.kv", cwd=tmp_path)
    assert done.code == 0
    assert "Wrote to storage 0 packets (0 particles, 0 bytes).\n" in done.err
    assert rows_in(tmp_path / "s.kv") == 0
    done = run("read", "s.kv", cwd=tmp_path)
    assert (done.code, done.out, done.err) == (0, b"", "")
    done = run("read", "s.kv", "--format", "summary", cwd=tmp_path)
    assert done.text == "The storage holds no data in stream 'particles'.\n"


@pytest.mark.parametrize(
    ("case", "code", "packets", "said"),
    [
        ([ONE + ONE[:-1]], 3, 1, f"packet 1 at byte {len(ONE)}: the input ends inside"),
        ([ONE + b"\0"], 3, 1, "the input ends 1 bytes into a packet's length"),
        ([ONE + BAD + ONE], 1, 1, f"packet 1 at byte {len(ONE)}: row 1: time nan"),
        ([ONE + HOSTILE + ONE], 1, 1, f"packet 1 at byte {len(ONE)}: "),
        ([ONE + BAD + HOSTILE + ONE, *SKIP], 3, 2, "2 malformed packets were skipped"),
        ([ONE + BAD + ONE[:-1], *SKIP], 3, 1, "packet 2 at byte"),
        ([b"timestamp,scattering\n"], 1, 0, "if the input is a packet stream, raise the limit"),
        ([ONE, "--max-packet-bytes", "4kB"], 1, 0, "over the limit of 4000"),
        ([ONE, *SKIP], 0, 1, "Wrote to storage 1 packets"),
    ],
)
def test_a_fault_in_the_input_is_named_and_the_rest_kept(tmp_path, case, code, packets, said):
    data, *options = case
    done = run("write", "s.kv", *options, data=data, cwd=tmp_path)
    assert done.code == code
    assert said in done.err
    assert f"Wrote to storage {packets} packets ({2 * packets} particles" in done.err
    assert rows_in(tmp_path / "s.kv") == 2 * packets


def test_many_skipped_packets_do_not_fill_the_screen(tmp_path):
    done = run("write", "s.kv", "--on-error", "skip", data=BAD * 50 + ONE, cwd=tmp_path)
    assert done.code == 3
    assert "kvstore: 50 malformed packets were skipped\n" in done.err
    assert len(done.err.splitlines()) < 20


def test_files_are_taken_in_one_after_the_other_and_a_dash_is_stdin(tmp_path):
    for name, data in (("a", ONE), ("b", ONE * 2), ("bad", ONE + BAD)):
        (tmp_path / name).write_bytes(data)
    done = run("write", "s.kv", "a", "-", "b", data=ONE, cwd=tmp_path)
    assert done.code == 0
    assert "Wrote to storage 4 packets (8 particles" in done.err
    done = run("write", "s.kv", "bad", "a", cwd=tmp_path)
    assert done.code == 1
    assert f"kvstore: bad: packet 1 at byte {len(ONE)}" in done.err
    assert rows_in(tmp_path / "s.kv") == 10


# ---- wrong usage, and what fails ----


@pytest.fixture
def at_home(tmp_path, monkeypatch):
    """An empty folder to be in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["read"], "Missing argument"),
        (["read", "run.kv", "--start", "yesterday"], "time 'yesterday' cannot be read"),
        (["read", "run.kv", "--last", "1y"], "duration '1y' cannot be read"),
        (["read", "run.kv", "--last", "1s", "--stop", START], "--last goes without"),
        (["read", "run.kv", "--start", "2026", "--stop", "2025"], "--start 2026 is after"),
        (["read", "run.kv", "--limit", "0"], "--limit"),
        (["read", "run.kv", "--count", "--limit", "2"], "--count goes without"),
        (["read", "run.kv", "--format", "xml"], "'xml' is not one of"),
        (["read", "run.kv", "-o", "out.xlsx"], "in which format"),
        (["write", "new.kv", "nowhere"], "nowhere"),
        (["write", "new.kv", "."], "director"),
        (["write", "new.kv", "--flush-interval", "soon"], "duration 'soon' cannot be read"),
        (["write", "new.kv", "--segment-bytes", "-5GB"], "size '-5GB' cannot be read"),
        (["write", "new.kv", "--on-error", "ignore"], "'ignore' is not one of"),
        (["generate", "--pps", "-1"], "--pps"),
        (["generate", "--max-mb", "inf"], "finite"),
        (["generate", "--particles", "0"], "--particles"),
        (["generate", "--seed", "-1"], "--seed"),
        (["generate", "--start", "soon"], "time 'soon' cannot be read"),
    ],
)
def test_wrong_usage_ends_with_2_before_anything_is_touched(here, at_home, args, said):
    done = here(*args)
    assert done.code == 2
    assert said in re.sub(r"\s+", " ", done.err)
    assert done.out == b""
    assert os.listdir(at_home) == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("kvstore read nowhere.kv", "nowhere.kv: no store here"),
        ("kvstore info nowhere.kv", "nowhere.kv: no store here"),
        ("kvstore info file", "file: no store here"),
        ("kvstore info folder", "folder: no store here"),
        ("kvstore write folder < /dev/null", "folder: a folder with other files"),
        ("kvstore write file < /dev/null", "file: Not a directory"),
        ("kvstore write none/s.kv < /dev/null", "none/s.kv: "),
        ("kvstore read $STORE --stream nope", "no stream 'nope'; there are: particles"),
        ("kvstore read $STORE --fields time", "no field 'time'; there are timestamps, scattering"),
        ("kvstore read $STORE --fields ''", "no field ''"),
        ("kvstore read $STORE -o none/out.npz", "none/out.npz: No such file"),
        ("kvstore read $STORE -o folder --format csv", "folder: "),
        ("kvstore read $STORE > /dev/full", "No space left"),
        ("kvstore info $STORE > /dev/full", "No space left"),
        ("kvstore generate --max-mb 1 > /dev/full", "No space left"),
    ],
)
def test_what_fails_ends_with_1_and_one_line_that_says_why(tmp_path, store, line, said):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").write_text("x")
    done = shell(line, tmp_path, STORE=str(store))
    assert done.code == 1
    *before, last = done.err.splitlines()
    assert last.startswith("kvstore: ")
    assert said in last
    assert all(each.startswith("First Data timestamps") for each in before)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.parametrize(
    "line",
    [
        "kvstore read $STORE | head -c 100",
        "kvstore read $STORE --format csv | head -n 1",
        "kvstore read $STORE --format jsonl | head -c 100",
        "kvstore read $STORE --format npz | head -c 100",
        "kvstore info $STORE | true",
        "kvstore generate --pps 0 2> /dev/null | head -c 100",
    ],
)
def test_a_closed_pipe_ends_without_a_word(store, line, tmp_path):
    done = shell(f"{line} > /dev/null; echo ${{PIPESTATUS[0]}}", tmp_path, STORE=str(store))
    assert (done.text, done.err) == ("0\n", "")


def test_closed_standard_files_are_as_good_as_empty_ones(store, tmp_path):
    """Otherwise a file of the store would get the number 0, and be read as packets."""
    assert shell("kvstore write s.kv <&-", tmp_path).code == 0
    assert rows_in(tmp_path / "s.kv") == 0
    assert shell("kvstore read $STORE --limit 1 >&-", tmp_path, STORE=str(store)).code == 0
    assert shell("kvstore read nowhere.kv 2>&-", tmp_path).code == 1


# ---- signals, and two at a time ----


def waiting_in(pipe):
    """Bytes in it that nobody has read yet."""
    found = fcntl.ioctl(pipe, termios.FIONREAD, bytes(4))
    return int.from_bytes(found, sys.byteorder)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_commits_everything_received_and_says_so(tmp_path, number, cut):
    process = start("write", "s.kv", "--flush-interval", "1h", cwd=tmp_path)
    process.stdin.write(ONE * 20 + (ONE[:100] if cut else b""))
    process.stdin.flush()
    wait_for((tmp_path / "s.kv" / "store.msgpack").exists, "the store", process)
    wait_for(lambda: not waiting_in(process.stdin), "all to be taken in", process)
    process.send_signal(number)
    done = ended(process)
    assert done.code == (3 if cut else 0)
    assert "Stopped by a signal; all whole packets received are stored.\n" in done.err
    assert ("kvstore: 100 bytes of an unfinished packet were lost" in done.err) == cut
    assert "Wrote to storage 20 packets (40 particles" in done.err
    assert rows_in(tmp_path / "s.kv") == 40


def test_ctrl_c_in_a_pipeline_stores_every_packet_that_was_sent(tmp_path):
    line = "kvstore generate --pps 200 --particles 20 | kvstore write s.kv; echo ${PIPESTATUS[@]}"
    words = f'kvstore() {{ \'{sys.executable}\' -c "{CODE}" "$@"; }}; trap : INT; {line}'
    process = subprocess.Popen(
        ["bash", "-c", words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    wait_for((tmp_path / "s.kv" / "store.msgpack").exists, "the store", process)
    wait_for(lambda: "particles" in kvstore.open(tmp_path / "s.kv"), "the stream", process)
    wait_for(lambda: rows_in(tmp_path / "s.kv") > 200, "some rows", process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    done = ended(process)
    assert done.out == b"0 0\n"
    (reached,) = re.findall(r"after (\d+) packets", done.err)
    (wrote,) = re.findall(r"Wrote to storage (\d+) packets", done.err)
    assert reached == wrote
    assert rows_in(tmp_path / "s.kv") == int(wrote) * 20


def test_one_reads_while_one_writes_and_a_second_writer_is_told_the_pid(tmp_path):
    process = start("write", "s.kv", "--flush-interval", "20ms", cwd=tmp_path)
    process.stdin.write(ONE)
    process.stdin.flush()
    wait_for((tmp_path / "s.kv" / "store.msgpack").exists, "the store", process)
    wait_for(
        lambda: run("read", "s.kv", "--count", cwd=tmp_path).text == "2\n", "the rows", process
    )
    second = run("write", "s.kv", data=ONE, cwd=tmp_path)
    assert second.code == 1
    assert re.match(rf"kvstore: s\.kv: .*{process.pid}", second.err)
    process.stdin.write(ONE)
    process.stdin.close()
    process.stdin = None
    assert ended(process).code == 0
    assert rows_in(tmp_path / "s.kv") == 4


def test_after_kill_9_the_store_reads_a_prefix_of_whole_packets_and_goes_on(tmp_path):
    process = start("write", "s.kv", "--flush-interval", "5ms", cwd=tmp_path)
    for n in range(200):
        process.stdin.write(framed(particles(2, T0 + n)))
    process.stdin.flush()
    wait_for((tmp_path / "s.kv" / "store.msgpack").exists, "the store", process)
    wait_for(lambda: "particles" in kvstore.open(tmp_path / "s.kv"), "the stream", process)
    wait_for(lambda: rows_in(tmp_path / "s.kv"), "some rows", process)
    process.kill()
    assert ended(process).code == -signal.SIGKILL
    times = joined(unpickled(run("read", "s.kv", cwd=tmp_path).out))["timestamps"]
    assert times.tolist() == [T0 + n // 2 for n in range(len(times))]
    assert run("write", "s.kv", data=ONE, cwd=tmp_path).code == 0
    assert rows_in(tmp_path / "s.kv") == len(times) + 2


# ---- damage ----


def test_damage_is_reported_and_left_out_and_the_exit_code_says_so(tmp_path):
    for n in range(3):
        rng = np.random.default_rng(n)
        values = rng.integers(0, 2**31, (100, 64, 16), dtype="i4")
        run("write", "s.kv", data=framed(particles(100, T0 + n, scattering=values)), cwd=tmp_path)
        if n == 1:
            middle = values.tobytes()[200_000:200_032]
    file = tmp_path / "s.kv" / "segments" / "00000001.mdb"
    data = bytearray(file.read_bytes())
    at = data.index(middle)
    data[at] ^= 1
    file.write_bytes(data)
    done = run("read", "s.kv", cwd=tmp_path)
    assert done.code == 3
    assert joined(unpickled(done.out))["timestamps"].tolist() == [T0] * 100 + [T0 + 2] * 100
    assert "scattering" in done.err
    assert "2026-02-17T15:32:38" in done.err


# ---- terminals ----


def on_terminal(*args, feed=None, width=100):
    """Run with all standard files on a pseudo-terminal; feed: bytes for stdin, by a slow pipe."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    stdin = subprocess.PIPE if feed else follower
    process = subprocess.Popen(
        [*COMMAND, *map(str, args)], stdin=stdin, stdout=follower, stderr=follower
    )
    os.close(follower)
    pieces = list(feed or [])
    shown = b""
    while process.poll() is None or select.select([leader], [], [], 0)[0]:
        if select.select([leader], [], [], 0.05)[0]:
            try:
                shown += os.read(leader, 1 << 16)
            except OSError:  # the last one has closed it
                break
        if pieces:
            process.stdin.write(pieces.pop(0))
            process.stdin.flush()
        elif feed and not process.stdin.closed:
            process.stdin.close()
    os.close(leader)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode()).replace("\r\n", "\n")
    return Ran(process.wait(180), b"", text)


def test_a_terminal_gets_a_summary_and_tables_and_never_binary(store):
    done = on_terminal("read", store)
    assert done.code == 0
    assert f"Found {PACKETS * PARTICLES} particles." in done.err
    for args in (["read", store, "--format", "packets"], ["read", store, "--format", "npz"]):
        done = on_terminal(*args)
        assert done.code == 2
        assert "is binary: pipe it" in done.err
    done = on_terminal("read", store, "--format", "csv", "--fields", "timestamps", "--limit", 1)
    assert done.err == f"timestamps\n{T0}\n"
    for args in (["generate"], ["write", "new.kv"]):
        done = on_terminal(*args)
        assert done.code == 2
        assert "as in: kvstore generate --max-mb 200 | kvstore write run.kv" in done.err


@pytest.mark.parametrize("width", [80, 50])
def test_info_fits_a_narrow_terminal(store, width):
    done = on_terminal("info", store, width=width)
    assert done.code == 0
    assert re.search(rf"rows +{PACKETS * PARTICLES} in \d+ batches", done.err)
    assert re.search(r"first +2026-02-17T15:32:37\+00:00", done.err)
    assert re.search(r"scattering +int32 +64x16", done.err)
    assert "description" not in done.err  # of no field: no room is lost to it


def test_progress_is_shown_on_a_terminal_with_rate_rows_bytes_and_disk_left(tmp_path):
    done = on_terminal("write", tmp_path / "s.kv", feed=[ONE] * 45)
    assert done.code == 0
    assert re.search(
        r"\d+ particles  [\d.]+ k/s  [\d.]+ kB  [\d.]+ kB/s  disk left [\d.]+ ", done.err
    )
    assert "Wrote to storage 45 packets (90 particles" in done.err


# ---- help ----


def test_help_explains_every_command_with_examples_that_exist(here):
    whole = run("--help")
    assert (whole.code, whole.err) == (0, "")
    assert run().code == 2  # nothing asked for: the same help, as wrong usage
    assert "Usage: kvstore" in run().err + run().text
    assert commands_in(whole.text)[:4] == [
        "generate",
        "write",
        "read",
        "replay",
    ]  # as they are used
    helps = {"": whole.text}
    todo = commands_in(whole.text)
    for name in todo:  # grows with the commands of groups
        helps[name] = here(*name.split(), "-h").text
        todo += [f"{name} {each}" for each in commands_in(helps[name])]
    assert "telemetry rejects list" in helps
    for text in helps.values():
        assert "Traceback" not in text
        examples = re.findall(r"kvstore ([a-z][^|>\n]*)", text.split("Examples:")[1])
        assert examples
        for example in examples:
            name = max((n for n in helps if f"{example} ".startswith(f"{n} ")), key=len)
            for option in re.findall(r"(?<!\S)--?[a-z][a-z-]*", example):
                assert option in helps[name], (name, option)


def commands_in(text):
    """The commands that a group's help lists."""
    return re.findall(r"^  (\w+)  +[A-Z]", text.partition("Commands:")[2], re.MULTILINE)


def test_help_speaks_of_the_real_defaults():
    from kvstore.cli.options import duration_s, size_bytes  # noqa: PLC0415
    from kvstore.packets import FRAME_BYTES_MAX  # noqa: PLC0415
    from kvstore.retention import SEGMENT_BYTES  # noqa: PLC0415
    from kvstore.writer import FLUSH_INTERVAL_S  # noqa: PLC0415

    text = re.sub(r"\s+", " ", run("write", "--help").text)
    said = re.findall(r"(\w+) if not given", text)
    assert [duration_s(said[0]), *map(size_bytes, said[1:])] == [
        FLUSH_INTERVAL_S, SEGMENT_BYTES, FRAME_BYTES_MAX,
    ]  # fmt: skip


def test_the_version_is_the_package_s():
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415

    try:
        expected = f"kvstore {version('kvstore')}\n"
    except PackageNotFoundError:
        expected = "kvstore, run from its source\n"
    assert run("--version").text == expected


def test_shells_complete_commands_and_options():
    asked = {"_KVSTORE_COMPLETE": "complete_bash", "COMP_CWORD": "1"}
    done = run(env={**os.environ, **asked, "COMP_WORDS": "kvstore rea"})
    assert done.text.split() == ["read"]
    asked["COMP_CWORD"] = "2"
    done = run(env={**os.environ, **asked, "COMP_WORDS": "kvstore read --fie"})
    assert done.text.split() == ["--fields"]


def test_python_m_kvstore_is_the_same_command(store):
    done = subprocess.run(
        [sys.executable, "-m", "kvstore", "read", store, "--count"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{PACKETS * PARTICLES}\n"


def test_the_command_line_loads_nothing_heavy_until_it_is_needed():
    code = "import sys, kvstore.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"rich", "pydantic", "pandas", "asyncio", "matplotlib"}
    assert heavy.isdisjoint(name.partition(".")[0] for name in done.stdout.split())


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("1e9", 10**9), ("800GB", 800 * 10**9), ("64MiB", 64 << 20), ("1.5 k", 1500),
     ("2tib", 2 << 40), ("0", 0)],
)  # fmt: skip
def test_sizes_are_read_as_people_write_them(text, size):
    from kvstore.cli.options import size_bytes  # noqa: PLC0415

    assert size_bytes(text) == size


# ---- pictures ----


@pytest.mark.parametrize(
    ("name", "begin"), [("a.png", b"\x89PNG\r\n"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF")]
)
def test_plot_writes_what_the_name_says(store, here, tmp_path, name, begin):
    done = here("plot", store, "-o", tmp_path / name, "--fields", "spectral", "--last", "50ms")
    assert (done.code, done.out) == (0, b"")
    assert f"Drawn to {tmp_path / name}" in done.err
    assert (tmp_path / name).read_bytes().startswith(begin)
    assert os.listdir(tmp_path) == [name]


def test_plot_sizes_a_picture_in_inches_and_dots(store, here, tmp_path):
    file = tmp_path / "a.png"
    done = here("plot", store, "-o", file, "--row", "-1", "--size", "5x4", "--dpi", "40")
    assert done.code == 0
    assert struct.unpack(">II", file.read_bytes()[16:24]) == (200, 160)


@pytest.mark.parametrize(
    "case",
    [
        (["-o", "a.gif"], 2, "Name it .png, .svg, .pdf"),
        (["-o", "a.png", "--size", "5"], 2, "width x height in inches"),
        (["-o", "a.png", "--size", "0x3"], 2, "width x height in inches"),
        (["-o", "a.png", "--percentiles", "5,101"], 2, "numbers from 0 to 100"),
        (["-o", "a.png", "--last", "1s", "--start", START], 2, "--last goes without"),
        (["-o", "a.png", "--row", "10000000"], 1, "no such row"),
        (["-o", "a.png", "--fields", "nope"], 1, "no field 'nope'; there are"),
        (["-o", "nowhere/a.png"], 1, "No such file or directory"),
    ],
)
def test_plot_refuses_with_a_reason_and_leaves_nothing(store, here, tmp_path, case):
    args, code, said = case
    with contextlib.chdir(tmp_path):
        try:
            done = here("plot", store, *args)
        except kvstore.KvstoreError as error:
            done = Ran(1, b"", str(error))
    assert (done.code, os.listdir(tmp_path)) == (code, [])
    assert said in done.err


def test_an_empty_range_makes_a_picture_too(store, here, tmp_path):
    done = here("plot", store, "-o", tmp_path / "a.png", "--start", "2030-01-01")
    assert done.code == 0
    assert (tmp_path / "a.png").exists()


# ---- info of gaps and pins ----


def test_info_tells_of_gaps_pins_and_the_rate(tmp_path):
    path = tmp_path / "s.kv"
    with kvstore.open(path, "w") as store:
        for n in range(30):
            store.stream("room").append({"time": T0 + n * 10 + np.arange(10.0)})
        store.note_gap("rejected", start_ns=10**18, stop_ns=10**18 + 10**9, detail="packet 7")
        store.note_gap("dropped", "room", start_ns=10**18, stop_ns=10**18, rows=5)
        store.pin(T0, T0 + 1, "door opened")
        store.pin(None, T0)
    found = json.loads(run("info", path, "--json").text)
    assert found["gaps"]["count"] == {
        "dropped": {"gaps": 1, "occurrences": 1, "rows": 5},
        "rejected": {"gaps": 1, "occurrences": 1, "rows": 0},
    }
    assert {gap["detail"] for gap in found["gaps"]["newest"]} == {"", "packet 7"}
    assert found["pins"][0]["label"] == "door opened"
    assert found["pins"][0]["start"] == "2026-02-17T15:32:37+00:00"
    assert found["pins"][1]["start"] is None
    lines = [line.split("\t") for line in run("info", path).text.splitlines()]
    assert ["gaps", "rejected", "1", "1", "0"] in lines
    assert [line[:2] for line in lines if line[0] == "pin"] == [["pin", "1"], ["pin", "2"]]
    shown = on_terminal("info", path, width=80)
    assert shown.code == 0
    assert re.search(r"gaps +1 dropped \(5 rows\), 1 rejected", shown.err)
    assert "2026-02-17 15:32:37 to 15:32:38 UTC: door opened" in shown.err
    assert "up to 2026-02-17 15:32:37 UTC" in shown.err
    assert re.search(r"dropped room, 5 rows +2001-09-09 01:46:40 UTC", shown.err)
    assert re.search(r"rate +█{40}  up to about 1/s", shown.err)
    assert all(len(line) <= 80 for line in shown.err.splitlines())
