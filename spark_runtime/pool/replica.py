"""One replica as the supervisor sees it: a process, a channel, a page, a pipe of tokens. It knows no futures."""

import os
import select
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING, Protocol

import msgpack

from spark_runtime.errors import ProtocolViolated
from spark_runtime.pool.job import SENT, Job
from spark_runtime.pool.loop import PoolLoop
from spark_runtime.processes.nursery import Nursery, Process, shared_page
from spark_workers.frames import FrameBroken, FrameDecoder, encode_frame
from spark_workers.messages import Host, Message, MessageBroken, answer_in, decode, encode
from spark_workers.replicas.page import Page
from spark_workers.spin import Spin

if TYPE_CHECKING:
    from spark_runtime.pool.dispatch import Lane

READ_SIZE = 64 * 1024
BUSY_SECONDS = 0.002
WRITE_MS = 100
STABLE_SECONDS = 1.0  # a process that ends sooner, and was at no call, has not really started
ENTRY = "spark_workers.replicas.worker:start"


class Observer(Protocol):
    """Whoever looks after a replica. Called on the loop, without the pool's lock."""

    def on_answers(self, replica: "Replica", answers: list[tuple[int, bytes, float]]) -> None:
        """Pieces of work, by serial, gave answers, after so many seconds in the guest."""

    def on_message(self, replica: "Replica", message: Message) -> None:
        """It said anything else. What it must not say raises ProtocolViolated."""

    def on_death(self, replica: "Replica", status: int, reason: str) -> None:
        """Its process has ended, and everything it said was told. *reason* is ours, if we ended it."""

    def on_stopped(self, replica: "Replica", is_stopped: bool) -> None:
        """The kernel reports its process stopped, or going on."""


class Replica:
    """One process with one instance of a model.

    Any thread sends, under the pool's *lock* and without waiting: what the socket does not take at once the loop sends
    later. Everything else happens on the loop, and its callbacks are called without the lock. *worker* is the
    nursery's number for it; its own, `number`, it has when it serves.
    """

    def __init__(
        self,
        worker: int,
        loop: PoolLoop,
        lock: threading.Lock,
        nursery: Nursery,
        host: Host,
        observer: Observer,
    ) -> None:
        self.number = 0
        self.ready_at = 0.0  # monotonic; 0 while it starts or stands by
        self.is_frozen = False
        self._loop = loop
        self._lock = lock
        self._observer = observer
        self._decoder = FrameDecoder()
        self._unsent = bytearray()
        self._reason = ""
        self._last = 0
        self.is_open = True
        self._end, theirs = socket.socketpair()
        self._reading = threading.RLock()  # who receives and delivers: the loop, or a caller that waits
        self._spin = Spin(self._end.fileno())
        self._readers = 0  # callers that read, or are about to: one, and what its callbacks call
        self._is_muted = False  # the loop does not look
        self._is_at_end = False  # and will not any more
        # To receive into: one made for each receive costs more than the receive.
        self._buffer = memoryview(bytearray(READ_SIZE))
        bell = shared_page()
        self._page = Page(bell)
        self._token_read, self._token_write = os.pipe()
        os.set_blocking(self._token_read, False)
        os.set_blocking(self._token_write, False)
        self._process = Process(worker, self._exited, lambda stopped: observer.on_stopped(self, stopped))
        # The worker's output is the guest's or a dying engine's: it goes where our own messages go.
        nursery.start(self._process, ENTRY, [theirs.detach(), bell, _standard_error(), _standard_error()])
        socket.send_fds(self._end, [encode_frame(encode(host), 1)], [self._token_read])
        loop.add_reader(self._end.fileno(), self._read)

    @property
    def pid(self) -> int | None:
        """The process, once it is there."""
        return self._process.pid

    def at(self) -> int:
        """The serial of the last call that it began, also when it has ended."""
        return self._page.at() if self.is_open else self._last

    def has_failed_to_start(self) -> bool:
        """Tell, when it has ended, whether it was ever of use."""
        return self._last == 0 and time.monotonic() - self.ready_at < STABLE_SECONDS

    # --- the dispatcher's port ---

    def send(self, first: Job | None, ahead: list[Job]) -> None:
        """Send calls; what is sent to a replica that is gone comes back when its death is dealt with."""
        if not self.is_open:
            return
        if first is not None and first.reads and self._loop.can_mute and not self._is_at_end:
            self._readers += 1
            if not self._is_muted:  # and so it stays afterwards: an idle replica has nothing to say
                self._is_muted = True
                self._loop.mute(self._end.fileno())
        else:
            if first is not None:
                first.reads = False
            if not self._readers:
                self._listen()
        data = b""
        if first is not None:
            data = _frame([[first.serial, first.function, first.payload]], False)
        if ahead:
            os.write(self._token_write, b"\1" * len(ahead))
            data += _frame([[job.serial, job.function, job.payload] for job in ahead], True)
        if not self._send_now(data):
            if first is not None and first.reads:  # it would wait for the answer to what only the loop sends
                first.reads = False
                self._readers -= 1
                self._listen()
            self._loop.post(self._write_later)

    def _send_now(self, data: bytes) -> bool:
        """Send what can be sent without waiting, and keep the rest; tell whether nothing is left."""
        try:
            sent = self._end.send(data, socket.MSG_DONTWAIT) if not self._unsent else 0
        except BlockingIOError:
            sent = 0
        except OSError:
            sent = len(data)  # it has ended; the nursery will say how
        if sent < len(data):
            self._unsent += memoryview(data)[sent:]
        return sent == len(data)

    def reply(self, message: Message) -> None:
        """Send something that the call it is at waits for. Any thread, without the lock."""
        data = encode_frame(encode(message))
        with self._lock:
            if not self.is_open or self._send_now(data):
                return
            if not self._readers:
                self._loop.post(self._write_later)
                return
        # A caller reads, and waits for what needs this: the loop must not look at the socket until it is done.
        threading.Thread(target=self._write_beside, name="spark-reply", daemon=True).start()

    def _write_beside(self) -> None:
        """Send the rest on a thread of its own."""
        poll = select.poll()
        with self._lock:
            if not self.is_open:
                return
            poll.register(self._end.fileno(), select.POLLOUT)
        while True:
            poll.poll(WRITE_MS)
            with self._lock:
                if not self.is_open or not self._unsent:
                    return
                rest = bytes(self._unsent)
                self._unsent.clear()
                if self._send_now(rest):
                    return

    def take_back(self, count: int) -> int:
        """Take back up to *count* tokens; whoever has the token has the call."""
        if not self.is_open:
            return 0
        try:
            return len(os.read(self._token_read, count))
        except BlockingIOError:
            return 0

    def read_for(self, job: Job, lane: "Lane") -> None:
        """Read answers on the calling thread until *job* has ended; what else comes is delivered as ever.

        So a caller that waits is woken by its answer, and not by a thread that was woken by it.
        """
        try:
            with self._reading:
                if lane.is_quick:
                    self._spin()
                # No others' answers here, where Ctrl-C may strike: if their calls stand behind ours, the loop reads.
                while job.state == SENT and len(lane.sent) == 1 and self._receive(flags=0):
                    self._deliver()
        except BaseException:  # a KeyboardInterrupt: what was received may be lost, so nothing more can be read
            self.kill("a caller was interrupted while it read")
            raise
        finally:
            with self._lock:
                self._readers -= 1
                if not self._readers and (lane.sent or job.state == SENT):
                    self._listen()  # others wait for answers; or the process has ended, which the loop deals with

    def _listen(self) -> None:
        """Have the loop read again."""
        if self._is_muted and self.is_open and not self._is_at_end:
            self._is_muted = False
            self._loop.unmute(self._end.fileno())

    # --- the process ---

    def interrupt(self, serial: int) -> None:
        """Have the guest interrupted, if it is at call *serial*."""
        if self.is_open:
            self._page.ask_stop(serial)
            self._process.send_signal(signal.SIGUSR1)

    def kill(self, reason: str) -> None:
        """End the process at once; *reason* is told with its death."""
        self._reason = self._reason or reason
        if self.is_open:
            self._process.kill()

    def release(self) -> None:
        """Let go of everything, when the loop has ended or in a fork of this process."""
        if self.is_open:
            self._release()

    # --- on the loop ---

    def _read(self) -> None:
        if not self._reading.acquire(blocking=False):
            return  # a caller reads, and has us look again when it is done
        try:
            size = self._receive()
            if size:
                self._deliver()
            elif size == 0:  # the process has ended, or is about to
                self._stop_reading()
        finally:
            self._reading.release()

    def _receive(self, flags: int = socket.MSG_DONTWAIT) -> int | None:
        """Receive once; return how much, 0 at the end, None if there is nothing now."""
        try:
            size = self._end.recv_into(self._buffer, 0, flags)
        except BlockingIOError:
            return None
        except OSError:
            return 0
        self._decoder.feed(self._buffer[:size])
        return size

    def _deliver(self) -> None:
        answers: list[tuple[int, bytes, float]] = []
        try:
            while (payload := self._decoder.next_payload()) is not None:
                found = answer_in(payload)
                if found is not None:
                    answers.append(found)
                    continue
                if answers:
                    self._observer.on_answers(self, answers)
                    answers = []
                self._observer.on_message(self, decode(payload))
            if answers:
                self._observer.on_answers(self, answers)
        except (FrameBroken, MessageBroken, ProtocolViolated) as problem:
            self.kill(f"it broke the protocol: {problem}")

    def _write_later(self) -> None:
        with self._lock:
            if self._readers:  # and so the loop must not look
                self._loop.call_later(BUSY_SECONDS, self._write_later)
            elif self.is_open and self._unsent:
                self._listen()
                self._loop.add_writer(self._end.fileno(), self._write)

    def _write(self) -> None:
        with self._lock:
            try:
                sent = self._end.send(self._unsent, socket.MSG_DONTWAIT)
                del self._unsent[:sent]
            except BlockingIOError:
                return
            except OSError:
                self._unsent.clear()
            if not self._unsent:
                self._loop.remove_writer(self._end.fileno())

    def _exited(self, status: int) -> None:
        with self._reading:  # a caller that reads sees the end as well, and lets go
            while self._receive():
                pass
            self._deliver()
            self._stop_reading()
        with self._lock:
            self._last = self._page.at()
            self._release()
        self._observer.on_death(self, status, self._reason)

    def _stop_reading(self) -> None:
        with self._lock:
            self._listen()  # so that there is something to undo
            self._is_at_end = True
            self._loop.remove_reader(self._end.fileno())
            self._loop.remove_writer(self._end.fileno())

    def _release(self) -> None:
        self.is_open = False
        self._unsent.clear()
        self._end.close()
        self._page.close()
        os.close(self._token_read)
        os.close(self._token_write)


def _frame(calls: list[list[object]], ahead: bool) -> bytes:
    # Without the checks of `encode`: the types are right by construction, and this is the hot path.
    return encode_frame(msgpack.packb(["Work", calls, ahead]))


def _standard_error() -> int:
    try:
        return os.dup(2)
    except OSError:  # a program without one
        return os.open(os.devnull, os.O_WRONLY)
