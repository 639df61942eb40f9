"""Producers that come, go, break off, lie and flood: each gets its due, none harms the others."""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest

import kvstore
from kvstore import serve
from kvstore.errors import DiskFull
from kvstore.ingest import Intake, Progress, Target
from kvstore.packets import PacketDecoder, encode
from kvstore.serve import Server
from kvstore.sockets import listening


def packet(numbers, **more):
    """Rows whose time is their number."""
    times = np.asarray(numbers, "f8")
    return b"".join(encode({"time": times, **more}))


BAD = packet([np.nan])
TORN = packet(range(50))[:-9]


class Service:
    """A server on a thread, its store, and all that it said."""

    def __init__(self, store, folder, **options):
        self.store = store
        self.socket = folder / "in.sock"
        self.progress = Progress()
        self.events = []
        self._clients = []
        self.failed = None
        skip = options.pop("skip", False)
        frame_bytes_max = options.pop("frame_bytes_max", 1 << 20)
        self.stop_out, self.stop_in = os.pipe()
        self._options = options

        def make_intake(passed_over):
            decoder = PacketDecoder(frame_bytes_max=frame_bytes_max)
            target = Target(store, self.progress, stream="s")
            return Intake(target, decoder, passed_over if skip else None)

        self.make_intake = make_intake
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.listens = threading.Event()

    def _run(self):
        with listening(self.socket) as listener:
            self.server = server = Server(
                self.make_intake,
                self.progress,
                listener=listener,
                report=self.events.append,
                **self._options,
            )
            self.listens.set()
            try:
                server.run(self.stop_out)
            except kvstore.errors.KvstoreError as error:
                self.failed = error
            finally:
                server.close()

    def start(self):
        self._thread.start()
        assert self.listens.wait(20)

    def stop(self):
        os.write(self.stop_in, b"!")
        self._thread.join(30)
        for client in self._clients:
            client.close()
        assert not self._thread.is_alive()
        for fd in (self.stop_out, self.stop_in):
            os.close(fd)

    def connect(self, data=b""):
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(self.socket))
        self._clients.append(client)
        if data:  # even nothing can't be sent to who has hung up
            client.sendall(data)
        return client

    def said(self, name):
        return [event.message for event in self.events if event.name == name]

    def wait(self, condition):
        deadline = time.monotonic() + 120
        while not condition():
            assert self._thread.is_alive(), self.failed
            assert time.monotonic() < deadline, self.events
            time.sleep(0.005)

    def wait_for(self, name, count=1):
        self.wait(lambda: len(self.said(name)) >= count)

    def rows(self):
        self.store.flush()
        if "s" not in self.store:
            return []
        return [int(t) for batch in self.store["s"].read() for t in batch["time"]]


@pytest.fixture
def make(path):
    """Start services on one store; they end with the test."""
    with kvstore.open(path, "w") as store:
        made = []

        @contextmanager
        def make_one(**options):
            service = Service(store, path.parent, **options)
            service.start()
            made.append(service)
            try:
                yield service
            finally:
                service.stop()

        yield make_one


@pytest.fixture
def held_back(monkeypatch):
    """The server begins to serve once this event is set: all is there by then."""
    began = threading.Event()
    inner = Server.run

    def late(self, stop_fd):
        began.wait(20)
        inner(self, stop_fd)

    monkeypatch.setattr(Server, "run", late)
    return began


# ---- coming and going ----


def test_who_breaks_off_in_a_packet_is_reported_counted_and_may_come_again(make):
    with make() as service:
        with service.connect(packet([1, 2]) + TORN):
            pass
        service.wait_for("interrupted")
        with service.connect(packet([3])):
            pass
        service.wait_for("disconnected")
        (said,) = service.said("interrupted")
        assert f"packet 1 at byte {len(packet([1, 2]))}: the input ends inside the packet" in said
        assert f"(pid {os.getpid()}, uid {os.getuid()})" in said
        progress = service.progress
        assert (progress.interrupted, progress.rejected, progress.connections) == (1, 0, 2)
        assert progress.connected == 0
        assert service.rows() == [1, 2, 3]


def test_several_at_once_are_served_and_their_bytes_never_mixed(make):
    count, each = 5, 40
    data = [b"".join(packet([n * each + k]) for k in range(each)) for n in range(count)]
    with make() as service:
        clients = [service.connect() for _ in range(count)]
        for begin in range(0, len(data[0]), 77):  # never at a packet's end
            for client, bytes_ in zip(clients, data, strict=True):
                client.sendall(bytes_[begin : begin + 77])
        for client in clients:
            client.close()
        service.wait_for("disconnected", count)
        assert service.progress.interrupted == 0
        assert service.rows() == list(range(count * each))


def test_a_packet_larger_than_any_socket_buffer_arrives(make):
    with make(frame_bytes_max=1 << 24) as service:
        with service.connect(packet(range(3), wide=np.zeros((3, 500_000)))):
            pass
        service.wait_for("disconnected")
        assert service.rows() == [0, 1, 2]


def test_all_that_was_sent_before_the_stop_is_kept_even_of_who_was_not_yet_let_in(make, held_back):
    with make() as service:
        data = b"".join(packet([n]) for n in range(100))
        clients = [service.connect(data), service.connect(packet([100]) + TORN)]
        os.write(service.stop_in, b"!")
        held_back.set()
        service._thread.join(180)
        assert service.rows() == list(range(101))
        assert service.progress.interrupted == 1
        for client in clients:
            client.close()


# ---- malformed and hostile ----


def test_a_malformed_packet_cuts_its_producer_off_and_nobody_else(make):
    with make() as service:
        good = service.connect(packet([1]))
        bad = service.connect(packet([2]) + BAD + packet([666]))
        service.wait_for("cut_off")
        assert b"packet 1 at byte" in bad.recv(1000)
        assert bad.recv(1) == b""
        good.sendall(packet([3]))
        good.close()
        service.wait_for("disconnected")
        assert service.progress.rejected == 1
        assert service.rows() == [1, 2, 3]


def test_where_skipping_is_asked_for_it_is_passed_over(make):
    with make(skip=True) as service:
        with service.connect(packet([1]) + BAD + packet([2])):
            pass
        service.wait_for("disconnected")
        assert service.said("skipped")[0].endswith("Skipped.")
        assert (service.progress.rejected, service.progress.skipped) == (1, 1)
        assert service.rows() == [1, 2]


def test_a_packet_over_the_limit_is_refused_at_its_announcement_whoever_skips(make):
    with make(skip=True, frame_bytes_max=1000) as service:
        client = service.connect(packet([1]) + (1001).to_bytes(4))
        service.wait_for("cut_off")
        assert "over the limit of 1000" in service.said("cut_off")[0]
        assert service.rows() == [1]
        client.close()


def test_a_flood_of_small_packets_does_not_stop_the_others(make, monkeypatch):
    monkeypatch.setattr(serve, "TURN_S", 0.002)
    with make(skip=True) as service:
        flood = BAD * 3000
        done = threading.Event()

        def send(client):
            while not done.is_set():
                client.sendall(flood)

        floods = [service.connect() for _ in range(2)]
        threads = [threading.Thread(target=send, args=(each,), daemon=True) for each in floods]
        for thread in threads:
            thread.start()
        service.wait(lambda: service.progress.rejected > 1000)
        client = service.connect()
        for n in range(20):
            client.sendall(packet([n]))
            service.wait(lambda n=n: service.progress.rows == n + 1)
        done.set()
        for thread in threads:
            thread.join(180)
        assert not any(thread.is_alive() for thread in threads)


def test_a_turn_ends_in_time_and_the_others_have_theirs(make, monkeypatch, held_back):
    monkeypatch.setattr(serve, "TURN_S", 0.0)  # one packet a turn
    order = []
    inner = Target.append

    def append(self, packet):
        order.extend(packet.arrays["time"].tolist())
        inner(self, packet)

    monkeypatch.setattr(Target, "append", append)
    with make() as service:
        service.connect(b"".join(packet([n]) for n in range(300))).close()
        service.connect(packet([1000])).close()
        held_back.set()
        service.wait_for("disconnected", 2)
        assert order.index(1000) < 150  # it is seen a few turns late, not after all 300
        assert service.rows() == [*range(300), 1000]


@pytest.fixture
def costs(monkeypatch):
    """One packet a turn; those below 1000 cost ten times the others. The order of all packets.

    The packet 999 waits for ``order.go``.
    """

    class Order(list):
        go = threading.Event()

    spent, order = [0.0], Order()
    inner = Target.append

    def append(self, packet):
        number = int(packet.arrays["time"][0])
        spent[0] += 10.0 if number < 1000 else 1.0
        order.append(number)
        if number == 999:
            assert order.go.wait(20)
        inner(self, packet)

    monkeypatch.setattr(serve, "TURN_S", 0.0)
    monkeypatch.setattr(Target, "append", append)
    monkeypatch.setattr(serve.time, "thread_time", lambda: spent[0])
    return order


def packets(begin, count):
    return b"".join(packet([begin + n]) for n in range(count))


def test_who_costs_much_gets_few_turns(make, costs, held_back):
    """A flood of what is dear to take in does not take the time of what is cheap."""
    with make() as service:
        for begin in (0, 100, 1000):
            service.connect(packets(begin, 50)).close()
        held_back.set()
        service.wait_for("disconnected", 3)
        assert sum(number < 1000 for number in costs[: costs.index(1049)]) <= 12


def test_who_was_silent_has_no_right_to_a_flood(make, costs):
    with make() as service:
        busy, silent = service.connect(packets(0, 30)), service.connect()
        service.wait(lambda: len(costs) == 30)
        busy.sendall(packet([999]))
        service.wait(lambda: len(costs) == 31)
        busy.sendall(packets(100, 20))
        silent.sendall(packets(200, 20))
        costs.go.set()
        service.wait(lambda: len(costs) == 71)
        assert sum(100 <= number < 200 for number in costs[31:51]) >= 8


def test_who_finds_no_place_is_told_why_and_finds_one_later(make):
    with make(connections_max=2) as service:
        first = service.connect(packet([1]))
        service.connect(packet([2]))
        service.wait(lambda: service.progress.connected == 2)
        third = service.connect()
        assert b"refused: 2 producers are connected, which is the limit" in third.recv(1000)
        assert third.recv(1) == b""
        service.wait_for("refused")
        assert service.progress.refused == 1
        assert "(--max-connections)" in service.said("refused")[0]
        first.close()
        service.wait_for("disconnected")
        service.connect(packet([3]))
        service.wait(lambda: service.progress.rows == 3)


def test_one_user_cannot_take_all_places(make, monkeypatch):
    uids = iter([7, 7, 7, 8, 8, 7])
    monkeypatch.setattr(serve, "peer", lambda _: (1, next(uids)))
    with make(connections_max=3) as service:
        greedy = [service.connect(packet([n])) for n in range(3)]
        service.wait(lambda: service.progress.rows == 3)
        modest = [service.connect(packet([3]))]
        service.wait(lambda: service.progress.rows == 4)
        assert b"uid 7 has 3 of 3 places, uid 8 needs one" in greedy[2].recv(1000)
        modest.append(service.connect())  # 2 and 1: fair enough
        assert b"refused" in modest[1].recv(1000)
        greedy.append(service.connect())
        assert b"refused" in greedy[3].recv(1000)
        assert service.progress.connected == 3


def test_a_store_that_fails_ends_the_service_and_lets_the_producers_know(make, monkeypatch):
    with make() as service:

        def full(*_, **__):
            raise DiskFull("no room")

        monkeypatch.setattr(Target, "append", full)
        client = service.connect(packet([1]))
        service._thread.join(180)
        assert isinstance(service.failed, DiskFull)
        assert client.recv(1) == b""
        client.close()


# ---- FIFOs ----


@pytest.fixture
def fifo(tmp_path):
    os.mkfifo(tmp_path / "in.fifo")
    return tmp_path / "in.fifo"


def test_a_fifo_survives_its_writers(make, fifo):
    with make(fifos=[fifo]) as service:
        for n in range(3):
            fifo.write_bytes(packet([n]) + (TORN if n == 1 else b""))
            service.wait(lambda n=n: service.progress.rows == n + 1)
            service.wait(lambda: service.progress.connected == 0)
        with fifo.open("wb"):  # comes and goes without a word
            pass
        assert len(service.said("interrupted")) == 1
        assert len(service.said("disconnected")) == 2
        assert service.progress.connections == 3
        assert service.rows() == [0, 1, 2]


def test_a_fifo_with_a_malformed_packet_is_closed_to_its_writer_and_opened_to_the_next(
    make, fifo, monkeypatch
):
    monkeypatch.setattr(serve, "_REOPEN_S", 3600.0)
    monkeypatch.setattr(serve, "_TICK_S", 0.05)
    with make(fifos=[fifo]) as service:
        with fifo.open("wb", buffering=0) as writer:
            writer.write(packet([1]) + BAD)
            service.wait_for("cut_off")
            with pytest.raises(BrokenPipeError):
                writer.write(packet([666]))
        service.server._closed_fifos[fifo] = 0.0  # the time has come
        fifo.write_bytes(packet([2]))
        service.wait(lambda: service.progress.rows == 2)
        assert service.progress.connected <= 1
        assert service.rows() == [1, 2]


def test_what_waits_in_a_fifo_at_the_stop_is_kept_and_a_torn_end_said(make, fifo):
    with make(fifos=[fifo]) as service:
        service.wait(lambda: True)
        with fifo.open("wb", buffering=0) as writer:
            writer.write(b"".join(packet([n]) for n in range(20)) + TORN)
            os.write(service.stop_in, b"!")
            service._thread.join(180)
        assert service.rows() == list(range(20))
        assert len(service.said("interrupted")) == service.progress.interrupted == 1
