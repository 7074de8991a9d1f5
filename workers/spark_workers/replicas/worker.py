"""The entry of a replica: one model, one instance, one call at a time.

Everything happens on one thread: receive, run what came, send each answer before the next call begins. So an answer
is with the supervisor before anything later can go wrong, and there is no hand-over on the way.
"""

import os
import signal
import socket
import threading
import time

import msgpack

from spark_workers.channel import READ_SIZE, Channel
from spark_workers.engines.seam import Settings
from spark_workers.failpoints import hit
from spark_workers.frames import HEADER, MAGIC, MAX_PAYLOAD, VERSION, FrameDecoder
from spark_workers.hosts.failures import GuestFailed
from spark_workers.hosts.host import Host as ModelHost
from spark_workers.hosts.host import open_host
from spark_workers.messages import Failed, Host, Hosted, Printed, Refused, work_in
from spark_workers.replicas.page import Page

_pack = msgpack.Packer(autoreset=True).pack
_STOP_SIGNAL = signal.SIGUSR1
AGAIN_SECONDS = 0.005
MOST = MAX_PAYLOAD - 64  # of an answer: the message around it takes a little


def start(channel_descriptor: int, bell_descriptor: int) -> int:
    """Serve the supervisor at the other end until it goes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end = socket.socket(fileno=channel_descriptor)
    channel = Channel(end)
    page = Page(bell_descriptor)
    os.close(bell_descriptor)
    message, descriptors = channel.receive()
    if not isinstance(message, Host):
        raise RuntimeError(f"the first message was {type(message).__name__}, not Host")
    hit("replica.load")
    try:
        settings = Settings(**message.settings)
        host = open_host(message.engine, message.kind, message.code, settings)
    except GuestFailed as problem:
        channel.send(Refused(problem.kind, str(problem), problem.details))
        return 0
    replica = Replica(end, channel, page, host, descriptors[0])
    if settings.epochs:
        replica.listen_for_stops()
    try:
        channel.send(Hosted())
        replica.serve()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the supervisor has let this replica go, or is gone
    return 0


class Replica:
    """The loop from work to answers. What it does for every call is written out, because it is done for every call."""

    def __init__(self, end: socket.socket, channel: Channel, page: Page, host: ModelHost, tokens: int) -> None:
        self._end = end
        self._channel = channel
        self._page = page
        self._host = host
        self._tokens = tokens
        os.set_blocking(tokens, False)
        self._lock = threading.Lock()
        self._current = 0  # the call that may be interrupted, under the lock
        self._is_stoppable = False

    def serve(self) -> None:
        """Run calls until the supervisor goes, which `EOFError` tells."""
        buffer = memoryview(bytearray(READ_SIZE))  # kept: a fresh one for each receive costs more than the call
        decoder = FrameDecoder()
        decoder.feed(self._channel.take_rest())
        while True:
            while (payload := decoder.next_payload()) is not None:
                calls, is_ahead = work_in(payload)
                for serial, function, request in calls:
                    if not is_ahead or self._take_token():
                        self._run(serial, function, request)
            size = self._end.recv_into(buffer)
            if not size:
                raise EOFError("the supervisor is gone")
            decoder.feed(buffer[:size])

    def listen_for_stops(self) -> None:
        """Interrupt the guest when the supervisor signals, from a thread of its own.

        A handler in Python would not run while the main thread is inside a guest; the wake-up pipe is written anyway.
        """
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        self._is_stoppable = True
        signal.signal(_STOP_SIGNAL, lambda number, frame: None)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        threading.Thread(target=self._stop_when_asked, args=(read_end,), name="spark-stops", daemon=True).start()

    def _stop_when_asked(self, read_end: int) -> None:
        while os.read(read_end, 64):
            while self._interrupt():
                time.sleep(AGAIN_SECONDS)

    def _interrupt(self) -> bool:
        """Interrupt the guest if its call is the one to be stopped; tell whether to do so again.

        Again, because the call may be begun but its guest not yet armed, or be in code that knows no interrupts.
        """
        with self._lock:  # so that a stop that comes late never meets the next call
            is_it = self._current != 0 and self._page.to_stop() == self._current
            if is_it:
                self._host.interrupt()
            return is_it

    def _take_token(self) -> bool:
        try:
            return bool(os.read(self._tokens, 1))
        except BlockingIOError:
            return False  # the supervisor has taken this call back

    def _run(self, serial: int, function: str, request: bytes) -> None:
        """Run one call and send its answer."""
        self._page.mark(serial)
        hit("replica.begin")
        if self._is_stoppable and not self._begin(serial):
            self._channel.send(Failed(serial, "interrupted", "it was stopped before it began", {}, 0.0))
            return
        began = time.perf_counter()
        try:
            answer = self._call(function, request) if function else self._host.run(request)
        except GuestFailed as problem:
            seconds = time.perf_counter() - began
            failed: Failed | None = Failed(serial, problem.kind, str(problem), problem.details, seconds)
        else:
            seconds = time.perf_counter() - began
            failed = None
        if self._is_stoppable:
            with self._lock:
                self._current = 0
        if printed := self._host.take_printed():
            self._channel.send(Printed(serial, printed))
        hit("replica.answer")
        if failed is None and len(answer) > MOST:
            text = f"an answer of {len(answer)} bytes is over the limit of {MOST}"
            failed = Failed(serial, "bad-answer", text, {}, seconds)
        if failed is not None:
            self._channel.send(failed)
            return
        packed = _pack(["Answered", serial, answer, seconds])
        self._end.sendall(HEADER.pack(MAGIC, VERSION, 0, len(packed)) + packed)

    def _call(self, function: str, request: bytes) -> bytes:
        numbers = self._host.call(function, msgpack.unpackb(request))
        packed: bytes = msgpack.packb(numbers)
        return packed

    def _begin(self, serial: int) -> bool:
        """Have interrupts of this call reach the guest; tell whether it shall begin at all."""
        with self._lock:
            is_wanted = self._page.to_stop() != serial
            self._current = serial if is_wanted else 0
        return is_wanted
