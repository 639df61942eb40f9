"""Several producers at once -> one stream: Unix sockets, and FIFOs that outlive their writers.

One thread serves them in turns. A turn is one read and at most TURN_S of appending; it goes to
whoever, of those that have something to say, has had least of the thread's time: a flood of small
or malformed packets uses up its own share, not the others'. What a producer can do is bounded,
and ends with it:

- memory: a buffer of the packet limit each, and as many producers as there are places;
- a malformed packet cuts that producer off (or is passed over, where skipping is asked for); what
  came before it is kept, the others do not notice;
- the places are shared among users: when all are taken, a newcomer gets that of the newest
  connection of the user who has most, unless that would only turn the injustice round.

Back-pressure is the store's: ``append`` waits while its queue is full, and all producers with it.

A FIFO has no boundaries between its writers: bytes of one that died inside a packet and of the
next are told apart only where the end was seen in between. Sockets have no such hole.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from kvstore import libc
from kvstore.errors import PacketError
from kvstore.events import Event, Level, Report
from kvstore.ingest import Intake, OnError, Progress
from kvstore.sockets import Listener, peer

CONNECTIONS_MAX: Final = 16
PACKET_BYTES_MAX: Final = 16 << 20  # of one packet: 2,700 particles; times 16 is one pipe's 256 MiB
TURN_S: Final = 0.02  # of appending at a time: a fifth of the flush interval
_TICK_S: Final = 1.0
_REOPEN_S: Final = 1.0  # without a reader a FIFO's writers fail; who sends steadily notices
_EVENTS: Final = select.EPOLLIN | select.EPOLLET

MakeIntake = Callable[[OnError], Intake]


class _Producer:
    """A source of packets: where its bytes come from, and what was made of them."""

    def __init__(self, fd: int, name: str, uid: int, intake: Intake):
        self.fd = fd
        self.name = name
        self.uid = uid
        self.intake = intake
        self.pending = False  # packets of the last read are still to be appended


class _Connection(_Producer):
    def __init__(self, connection: socket.socket, name: str, uid: int, intake: Intake):
        super().__init__(connection.fileno(), name, uid, intake)
        self.socket = connection


class _Fifo(_Producer):
    def __init__(self, path: Path, intake: Intake):
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        libc.enlarge_pipe(fd)
        super().__init__(fd, f"FIFO {path}", -1, intake)
        self.path = path
        self.heard = False  # anything since the last writer went


class Server:
    """Serves producers until told to stop. ``run`` it once; close it in any case.

    make_intake: called for each producer, with what to do with the errors that it passes over.
    """

    def __init__(
        self,
        make_intake: MakeIntake,
        progress: Progress,
        *,
        listener: Listener | None,
        fifos: Sequence[Path] = (),
        connections_max: int = CONNECTIONS_MAX,
        report: Report,
        tick: Callable[[], None] = lambda: None,
    ):
        self._make_intake = make_intake
        self._progress = progress
        self._listener = listener
        self._connections_max = connections_max
        self._report = report
        self._tick = tick
        self._epoll = select.epoll()
        self._producers: dict[int, _Producer] = {}
        self._closed_fifos = dict.fromkeys(fifos, 0.0)  # and when to open them
        self._ready: set[int] = set()
        self._spent_s: dict[int, float] = {}  # of this thread's time, by file descriptor
        self._least_s = 0.0  # at the last turn

    def run(self, stop_fd: int) -> None:
        """Serve until ``stop_fd`` is readable; then take in what was sent by then."""
        self._epoll.register(stop_fd, select.EPOLLIN)
        if self._listener is not None:
            self._epoll.register(self._listener.socket, _EVENTS)
        while True:
            self._open_fifos()
            ready = {fd for fd, _ in self._epoll.poll(0 if self._ready else _TICK_S)}
            if stop_fd in ready:
                break
            for fd in ready - self._ready:  # silence earns no right to a flood
                self._spent_s[fd] = max(self._spent_s.get(fd, 0.0), self._least_s)
            self._ready |= ready
            if self._ready:
                self._take_turn(min(self._ready, key=self._spent_s.__getitem__))
            self._tick()
        self._finish()

    def close(self) -> None:
        """Close what is still open; nothing is read any more."""
        for producer in list(self._producers.values()):
            self._forget(producer)
        self._epoll.close()

    # ---- turns ----

    def _take_turn(self, fd: int) -> None:
        self._least_s = self._spent_s[fd]
        began_s = time.thread_time()  # waiting for the disk is nobody's fault
        self._turn(fd)
        if fd in self._spent_s:
            self._spent_s[fd] += time.thread_time() - began_s

    def _turn(self, fd: int) -> None:
        if self._listener is not None and fd == self._listener.socket.fileno():
            self._accept(self._listener.socket)
        elif (producer := self._producers.get(fd)) is not None:
            self._serve(producer)
        else:
            self._ready.discard(fd)

    def _serve(self, producer: _Producer) -> None:
        intake = producer.intake
        try:
            if not producer.pending:
                count = os.readv(producer.fd, [intake.buffer()])
                if not count:
                    self._ended(producer)
                    return
                intake.received(count)
                self._heard(producer)
            producer.pending = not intake.append(time.monotonic() + TURN_S)
        except BlockingIOError:
            self._ready.discard(producer.fd)
        except ConnectionError:
            self._ended(producer)
        except PacketError as error:
            self._cut_off(producer, error)

    def _heard(self, producer: _Producer) -> None:
        if isinstance(producer, _Fifo) and not producer.heard:
            producer.heard = True
            self._count_connected(1)
            self._say("info", "connected", producer, f"{producer.name}: a producer writes")

    def _ended(self, producer: _Producer) -> None:
        """Nothing more will come of it; a FIFO waits for its next writer."""
        self._say_ended(producer)
        if isinstance(producer, _Fifo):
            self._ready.discard(producer.fd)
            self._count_connected(-producer.heard)
            producer.heard, producer.intake = False, self._intake(producer.name)
        else:
            self._forget(producer)

    def _say_ended(self, producer: _Producer) -> None:
        try:
            producer.intake.close()
        except PacketError as error:
            text = f"{producer.name}: {error}. What came before it is kept."
            self._say("warning", "interrupted", producer, text)
        else:
            if not isinstance(producer, _Fifo) or producer.heard:
                text = f"{producer.name} has gone after {producer.intake.packets} packets."
                self._say("info", "disconnected", producer, text)

    def _cut_off(self, producer: _Producer, error: PacketError) -> None:
        text = f"{error}. Cut off; what came before it is kept."
        self._say("warning", "cut_off", producer, f"{producer.name}: {text}")
        if isinstance(producer, _Connection):
            _tell(producer.socket, text)
        self._forget(producer)
        if isinstance(producer, _Fifo):
            self._closed_fifos[producer.path] = time.monotonic() + _REOPEN_S

    # ---- coming and going ----

    def _open_fifos(self) -> None:
        now = time.monotonic()
        for path in [path for path, due_s in self._closed_fifos.items() if due_s <= now]:
            del self._closed_fifos[path]
            self._add(_Fifo(path, self._intake(f"FIFO {path}")))

    def _accept(self, listening: socket.socket) -> bool:
        """Whether there was one to accept."""
        try:
            connection, _ = listening.accept()
        except BlockingIOError:
            self._ready.discard(listening.fileno())
            return False
        pid, uid = peer(connection)
        if not self._has_place(uid):
            self._refuse(connection, pid, uid)
            return True
        connection.setblocking(False)
        self._progress.connections += 1
        self._progress.connected += 1
        name = f"producer {self._progress.connections} (pid {pid}, uid {uid})"
        producer = _Connection(connection, name, uid, self._intake(name))
        self._add(producer)
        self._say("info", "connected", producer, f"{name} has connected.")
        return True

    def _has_place(self, uid: int) -> bool:
        taken = [each for each in self._producers.values() if isinstance(each, _Connection)]
        if len(taken) < self._connections_max:
            return True
        held = Counter(each.uid for each in taken)
        greedy, most = held.most_common(1)[0]
        if most < held[uid] + 2:
            return False
        newest = [each for each in taken if each.uid == greedy][-1]
        text = f"cut off: uid {greedy} has {most} of {len(taken)} places, uid {uid} needs one"
        self._say("warning", "evicted", newest, f"{newest.name}: {text}.")
        _tell(newest.socket, text)
        with suppress(PacketError):
            newest.intake.close()
        self._forget(newest)
        return True

    def _refuse(self, connection: socket.socket, pid: int, uid: int) -> None:
        self._progress.refused += 1
        with connection:
            text = (
                f"refused: {self._connections_max} producers are connected, which is the limit "
                "(--max-connections)"
            )
            _tell(connection, text)
        message = f"A producer (pid {pid}, uid {uid}) was {text}."
        self._report(Event("warning", "refused", message, {"pid": pid, "uid": uid}))

    def _intake(self, name: str) -> Intake:
        def passed_over(error: PacketError) -> None:
            text = f"{name}: {error}. Skipped."
            self._report(Event("warning", "skipped", text, {"producer": name}))

        return self._make_intake(passed_over)

    def _add(self, producer: _Producer) -> None:
        self._producers[producer.fd] = producer
        self._epoll.register(producer.fd, _EVENTS)

    def _forget(self, producer: _Producer) -> None:
        del self._producers[producer.fd]
        self._spent_s.pop(producer.fd, None)
        self._ready.discard(producer.fd)
        if isinstance(producer, _Connection):
            self._progress.connected -= 1
            producer.socket.close()
        elif isinstance(producer, _Fifo):
            self._count_connected(-producer.heard)
            os.close(producer.fd)

    def _count_connected(self, change: int) -> None:
        self._progress.connected += change
        self._progress.connections += max(change, 0)

    def _say(self, level: Level, name: str, producer: _Producer, message: str) -> None:
        fields = {"producer": producer.name, "packets": producer.intake.packets}
        self._report(Event(level, name, message, fields))

    # ---- the end ----

    def _finish(self) -> None:
        """Take in what waits: its senders believe it delivered."""
        if self._listener is not None and not self._listener.inherited:
            for _ in range(self._connections_max):
                if not self._accept(self._listener.socket):
                    break
        for producer in list(self._producers.values()):
            if isinstance(producer, _Connection):
                with suppress(OSError):  # it has gone by itself
                    producer.socket.shutdown(socket.SHUT_RD)  # more can't come, what is there can
            self._drain(producer)

    def _drain(self, producer: _Producer) -> None:
        """Read on until the input ends; of a FIFO, what its pipe can hold."""
        self._ready.add(producer.fd)
        begun = self._progress.bytes
        while producer.fd in self._ready and (
            isinstance(producer, _Connection) or self._progress.bytes - begun < libc.PIPE_BYTES
        ):
            self._serve(producer)
        if isinstance(producer, _Fifo) and producer.heard and producer.fd in self._producers:
            self._say_ended(producer)


def _tell(connection: socket.socket, text: str) -> None:
    """For producers that read, too; most don't."""
    with suppress(OSError):
        connection.send(f"kvstore: {text}\n".encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
