"""The entry of a replica: one model, one instance, one call at a time.

Everything happens on one thread: receive, run what came, send each answer before the next call begins. So an answer
is with the supervisor before anything later can go wrong, and there is no hand-over on the way. A model that calls
another service waits for that answer where it is; work that comes meanwhile waits behind it.
"""

import os
import signal
import socket
import threading
import time
from collections import deque

import msgpack

from spark_workers.channel import Channel
from spark_workers.engines.seam import Settings
from spark_workers.failpoints import hit
from spark_workers.frames import HEADER, MAGIC, MAX_PAYLOAD, VERSION, FrameDecoder
from spark_workers.hosts.failures import GuestFailed
from spark_workers.hosts.host import Host as ModelHost
from spark_workers.hosts.host import open_host
from spark_workers.messages import Failed, Host, Hosted, Printed, Refused, XAnswer, XCall, decode, work_in
from spark_workers.replicas.page import OUT_OF_MEMORY, Page
from spark_workers.spin import QUICK_SECONDS, Spin

_pack = msgpack.Packer(autoreset=True).pack
_STOP_SIGNAL = signal.SIGUSR1
AGAIN_SECONDS = 0.005
READ_SIZE = 64 * 1024  # every byte of it is memory that a replica has for itself
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
    replica = Replica(end, channel, page, descriptors[0])
    try:
        settings = Settings(**message.settings)
        replica.host = open_host(message.engine, message.kind, message.code, settings, replica.ask)
    except GuestFailed as problem:
        channel.send(Refused(problem.kind, str(problem), problem.details))
        return 0
    if settings.epochs:
        replica.listen_for_stops()
    try:
        channel.send(Hosted())
        replica.serve()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the supervisor has let this replica go, or is gone
    except MemoryError:
        return OUT_OF_MEMORY
    return 0


class Replica:
    """The loop from work to answers. What it does for every call is written out, because it is done for every call."""

    host: ModelHost  # set before `serve`

    def __init__(self, end: socket.socket, channel: Channel, page: Page, tokens: int) -> None:
        self._end = end
        self._channel = channel
        self._page = page
        self._tokens = tokens
        self._decoder = FrameDecoder()
        self._buffer = memoryview(bytearray(READ_SIZE))  # kept: a fresh one for each receive costs more than the call
        self._later: deque[bytes] = deque()  # work that came while a call waited for another service
        os.set_blocking(tokens, False)
        self._lock = threading.Lock()
        self._current = 0  # the call that may be interrupted, under the lock
        self._is_stoppable = False
        self._is_quick = False  # the last call was
        self._spin = Spin(end.fileno())

    def serve(self) -> None:
        """Run calls until the supervisor goes, which `EOFError` tells."""
        later, decoder = self._later, self._decoder
        decoder.feed(self._channel.take_rest())
        while True:
            while (payload := later.popleft() if later else decoder.next_payload()) is not None:
                calls, is_ahead = work_in(payload)
                for serial, function, request in calls:
                    if not is_ahead or self._take_token():
                        self._run(serial, function, request)
            if self._is_quick:
                self._spin()
            self._receive()

    def _receive(self) -> None:
        size = self._end.recv_into(self._buffer)
        if not size:
            raise EOFError("the supervisor is gone")
        self._decoder.feed(self._buffer[:size])

    def ask(self, request: bytes) -> bytes:
        """Have the supervisor answer a request that the model makes to another service; wait for it.

        Raises:
            GuestFailed: "xcall": there is no answer.
        """
        serial = self._page.at()
        self._channel.send(XCall(serial, request))
        while True:
            while (payload := self._decoder.next_payload()) is None:
                self._receive()
            message = decode(payload)
            if not isinstance(message, XAnswer):
                self._later.append(payload)
            elif message.serial == serial:
                if message.error:
                    raise GuestFailed("xcall", message.error)
                return message.answer

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
                self.host.interrupt()
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
            answer = self._call(function, request) if function else self.host.run(request)
        except GuestFailed as problem:
            seconds = time.perf_counter() - began
            failed: Failed | None = Failed(serial, problem.kind, str(problem), problem.details, seconds)
        else:
            seconds = time.perf_counter() - began
            failed = None
        if self._is_stoppable:
            with self._lock:
                self._current = 0
        if printed := self.host.take_printed():
            self._channel.send(Printed(serial, printed))
        hit("replica.answer")
        if failed is None and len(answer) > MOST:
            text = f"an answer of {len(answer)} bytes is over the limit of {MOST}"
            failed = Failed(serial, "bad-answer", text, {}, seconds)
        if failed is not None:
            self._channel.send(failed)
            return
        self._is_quick = seconds < QUICK_SECONDS
        packed = _pack(["Answered", serial, answer, seconds])
        self._end.sendall(HEADER.pack(MAGIC, VERSION, 0, len(packed)) + packed)

    def _call(self, function: str, request: bytes) -> bytes:
        numbers = self.host.call(function, msgpack.unpackb(request))
        packed: bytes = msgpack.packb(numbers)
        return packed

    def _begin(self, serial: int) -> bool:
        """Have interrupts of this call reach the guest; tell whether it shall begin at all."""
        with self._lock:
            is_wanted = self._page.to_stop() != serial
            self._current = serial if is_wanted else 0
        return is_wanted
