"""Files and stdin as a source: each line once, whatever happens to the file in between."""

from __future__ import annotations

import json
import os
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import scratch

from kvstore.errors import SourceError
from kvstore.telemetry.records import Position
from kvstore.telemetry.sources import lines as lines_module
from kvstore.telemetry.sources.files import FilesSource
from kvstore.telemetry.sources.lines import LineReader


class Notebook:
    """What a sink would know: positions by place. Takes what is polled as committed."""

    def __init__(self):
        self.positions = {}
        self.events = []  # (source, partition, offset, payload)

    def assigned(self, places):
        return [self.positions.get(place, Position(place, -1)) for place in places]

    def take(self, chunk):
        self.positions[chunk.place] = chunk.after
        assert len(chunk.offsets) == len(chunk.payloads)
        for offset, payload in zip(chunk.offsets.tolist(), chunk.payloads, strict=True):
            self.events.append((chunk.place.source, chunk.place.partition, offset, payload))
        return len(chunk.payloads)

    @property
    def payloads(self):
        return [payload for *_, payload in self.events]


def read(paths, notebook, *, polls=None, run="run", report=lambda _: None, **limits):
    """Poll to the end, or so many times."""
    limits = {"events_max": 1000, "bytes_max": 1 << 20, "wait_s": 0.0} | limits
    with FilesSource(paths, run=run, report=report) as source:
        source.start(notebook.assigned, lambda *_: None)
        while polls is None or polls > 0:
            chunks = source.poll(**limits)
            if chunks is None:
                return
            for chunk in chunks:
                notebook.take(chunk)
            polls = None if polls is None else polls - 1


@pytest.fixture
def file(tmp_path):
    return tmp_path / "events.jsonl"


# ---- lines ----


@given(
    st.lists(st.binary(max_size=12).map(lambda b: b.replace(b"\n", b"")), max_size=30),
    st.booleans(),
    st.integers(1, 5),
    st.integers(1, 60),
)
@settings(deadline=None)
def test_every_line_comes_once_with_its_number_and_the_offsets_meet(
    texts, ends, events_max, bytes_max
):
    data = b"\n".join(texts) + (b"\n" if ends and texts else b"")
    expected = [(n, t) for n, t in enumerate(data.split(b"\n"), 1) if t not in (b"", b"\r")]
    with scratch() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines_module, "BLOCK_BYTES", 7)
        patch.setattr(lines_module, "_BOM", b"no file begins with this")
        path = folder / "f"
        path.write_bytes(data)
        fd = os.open(path, os.O_RDONLY)
        reader, found = LineReader(fd), []
        while (got := reader.read(events_max, bytes_max)) is not None:
            assert len(got.payloads) <= events_max
            found += zip(got.numbers.tolist(), got.payloads, strict=True)
            assert data[: reader.offset].count(b"\n") == reader.number - 1
        if reader.unfinished:
            last = reader.take_unfinished()
            found += zip(last.numbers.tolist(), last.payloads, strict=True)
        os.close(fd)
        assert found == expected
        assert reader.offset == len(data)


def test_a_line_without_end_is_cut_and_not_held(file, monkeypatch):
    monkeypatch.setattr(lines_module, "LINE_BYTES_MAX", 1000)
    monkeypatch.setattr(lines_module, "BLOCK_BYTES", 500)
    file.write_bytes(b'{"a":1}\n' + b"x" * 50_000 + b'\n{"a":2}\n')
    fd = os.open(file, os.O_RDONLY)
    reader, found = LineReader(fd), []
    while (got := reader.read(1000, 1 << 20)) is not None:
        found += zip(got.numbers.tolist(), got.payloads, strict=True)
        assert len(reader.unfinished) <= 1500
    os.close(fd)
    assert found == [(1, b'{"a":1}'), (2, b"x" * 1001), (3, b'{"a":2}')]
    assert reader.offset == file.stat().st_size


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_events(file):
    file.write_bytes(b'\xef\xbb\xbf{"a":1}\r\n\r\n{"a":2}\r\n')
    notebook = Notebook()
    read([file], notebook)
    assert [json.loads(each) for each in notebook.payloads] == [{"a": 1}, {"a": 2}]
    assert [offset for _, _, offset, _ in notebook.events] == [1, 3]


# ---- a file that grows, is cut, is replaced ----


def test_a_grown_file_goes_on_where_it_stopped(file):
    notebook = Notebook()
    for number in range(5):
        with file.open("ab") as out:
            out.write(b'{"n":%d}\n' % number * 3)
        read([file], notebook)
        assert len(notebook.events) == 3 * (number + 1)
    assert [offset for _, _, offset, _ in notebook.events] == list(range(1, 16))
    assert {partition for _, partition, _, _ in notebook.events} == {0}


@pytest.mark.parametrize("polls", [1, 2, 3])
def test_reading_goes_on_from_any_commit(file, polls):
    file.write_bytes(b"".join(b'{"n":%d}\n' % n for n in range(10)))
    notebook = Notebook()
    for _ in range(10):
        read([file], notebook, polls=polls, events_max=2)
    assert [json.loads(each)["n"] for each in notebook.payloads] == list(range(10))


def test_a_last_line_without_newline_is_an_event_where_it_is_whole(file):
    file.write_bytes(b'{"n":1}\n{"n":2}')
    notebook = Notebook()
    read([file], notebook)
    assert notebook.payloads == [b'{"n":1}', b'{"n":2}']
    with file.open("ab") as out:  # its newline comes after all
        out.write(b'\n{"n":3}\n')
    read([file], notebook)
    assert notebook.payloads[2:] == [b'{"n":3}']
    assert [offset for _, _, offset, _ in notebook.events] == [1, 2, 3]


def test_a_line_that_is_being_written_is_left_for_later_and_said_so(file):
    file.write_bytes(b'{"n":1}\n{"n":')
    notebook, events = Notebook(), []
    read([file], notebook, report=events.append)
    assert notebook.payloads == [b'{"n":1}']
    assert [(event.name, event.fields["line"]) for event in events] == [("unfinished_line", 2)]
    with file.open("ab") as out:
        out.write(b"2}\n")
    read([file], notebook)
    assert notebook.payloads == [b'{"n":1}', b'{"n":2}']


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.write_bytes(b'{"other":1}\n{"other":2}\n{"other":3}\n'),
        lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
        lambda file: file.write_bytes(file.read_bytes().replace(b'"n":3', b'"n":4')),
        lambda file: (file.rename(file.with_suffix(".1")), file.write_bytes(b'{"new":1}\n' * 99)),
    ],
    ids=["written anew", "cut", "edited", "rotated"],
)
def test_another_file_of_that_name_is_another_partition(file, change):
    file.write_bytes(b'{"n":1}\n{"n":2}\n{"n":3}\n')
    notebook = Notebook()
    read([file], notebook)
    change(file)
    first = len(notebook.events)
    read([file], notebook)
    fresh = notebook.events[first:]
    assert [payload for *_, payload in fresh] == file.read_bytes().splitlines()[: len(fresh)]
    assert {partition for _, partition, _, _ in fresh} == {1}
    assert len(set(notebook.events)) == len(notebook.events)
    read([file], notebook)
    assert len(notebook.events) == first + len(fresh)


def test_the_first_file_is_known_again_where_it_comes_back(file):
    first, second = b'{"n":1}\n{"n":2}\n', b'{"m":1}\n'
    notebook = Notebook()
    for content in (first, second, first + b'{"n":3}\n', second + b'{"m":2}\n'):
        file.write_bytes(content)
        read([file], notebook)
    assert [(p, o) for _, p, o, _ in notebook.events] == [
        (0, 1), (0, 2), (1, 1), (0, 3), (1, 2),
    ]  # fmt: skip


def test_several_files_each_have_their_place(tmp_path):
    paths = [tmp_path / name for name in "abc"]
    for number, path in enumerate(paths):
        path.write_bytes(b'{"n":%d}\n' % number * 3)
    notebook = Notebook()
    read(paths, notebook)
    assert len({source for source, *_ in notebook.events}) == 3
    assert notebook.payloads == [b'{"n":%d}' % n for n in (0, 0, 0, 1, 1, 1, 2, 2, 2)]


def test_a_name_that_is_no_utf8_can_be_kept(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff.jsonl")
    path.write_bytes(b"{}\n")
    notebook = Notebook()
    read([path], notebook)
    (place,) = notebook.positions
    assert place.source.endswith("/\\xff.jsonl")
    assert place.source.encode()


@pytest.mark.parametrize("name", [".", "missing.jsonl"])
def test_what_is_no_file_is_a_clear_error(tmp_path, name):
    with pytest.raises(SourceError, match=r"expected|is a folder"):
        read([tmp_path / name], Notebook())


# ---- following ----


def following(file, notebook):
    return FilesSource([file], run="run", follow=True, sleep=lambda _: None)


def drained(source, notebook, count):
    """Poll until so many events came in all."""
    until_s = time.monotonic() + 30
    while time.monotonic() < until_s:
        if len(notebook.events) >= count:
            return
        for chunk in source.poll(events_max=1000, bytes_max=1 << 20, wait_s=0.01):
            notebook.take(chunk)
    raise AssertionError(f"{len(notebook.events)} events, expected {count}")


def test_a_followed_file_is_read_as_it_grows_and_rotates(file):
    file.write_bytes(b'{"n":0}\n')
    notebook = Notebook()
    with following(file, notebook) as source:
        source.start(notebook.assigned, lambda *_: None)
        drained(source, notebook, 1)
        with file.open("ab") as out:
            out.write(b'{"n":1}\n{"n":')
            out.flush()
            drained(source, notebook, 2)
            out.write(b"2}\n")
            out.flush()
            drained(source, notebook, 3)
            file.rename(file.with_suffix(".1"))
            out.write(b'{"n":3}\n{"torn')  # by who had it open still
        file.write_bytes(b'{"n":4}\n')
        drained(source, notebook, 6)
    assert notebook.payloads == [
        b'{"n":0}', b'{"n":1}', b'{"n":2}', b'{"n":3}', b'{"torn', b'{"n":4}',
    ]  # fmt: skip
    assert [partition for _, partition, _, _ in notebook.events] == [0, 0, 0, 0, 0, 1]


# ---- pipes ----


def test_a_pipe_is_read_to_its_end_and_is_a_source_of_its_own_each_time(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    notebook = Notebook()
    for run in ("one", "two"):
        writer = threading.Thread(target=pipe.write_bytes, args=(b'{"n":1}\n{"n":2}',))
        writer.start()
        read([pipe], notebook, run=run, wait_s=0.05)
        writer.join()
    assert notebook.payloads == [b'{"n":1}', b'{"n":2}'] * 2
    assert [source.rpartition(":")[2] for source, *_ in notebook.events] == ["one"] * 2 + [
        "two"
    ] * 2


def test_waiting_for_a_pipe_ends_in_time(tmp_path, monkeypatch):
    ours, theirs = os.pipe()
    monkeypatch.setattr("kvstore.telemetry.sources.files._STDIN_FD", ours)
    notebook = Notebook()
    with FilesSource(["-"], run="run") as source:
        source.start(notebook.assigned, lambda *_: None)
        assert source.poll(events_max=9, bytes_max=99, wait_s=0.01) == []
        os.write(theirs, b'{"n":1}\n')
        drained(source, notebook, 1)
        os.close(theirs)
        assert source.poll(events_max=9, bytes_max=99, wait_s=0.01) in (None, [])
        assert source.poll(events_max=9, bytes_max=99, wait_s=0.01) is None
    os.close(ours)
