"""An endpoint on the loopback interface that behaves, or misbehaves, as a test wants it to."""

import contextlib
import json
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

GOOD = {"response_data": {"outputs": {"volume": 1}}, "response_meta": {"version_id": "v"}}


@dataclass
class Received:
    """One request as it arrived. *headers* have names in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    connection: int

    def json(self) -> Any:
        """The body as data."""
        return json.loads(self.body)


def reply(status: int, body: Any = None, **headers: str) -> bytes:
    """Return the bytes of an HTTP answer; *body* is bytes, or becomes JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} Word"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if "Transfer_Encoding" not in headers and "Content_Length" not in headers:
        lines.append(f"Content-Length: {len(content)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


@dataclass
class Peer:
    """The connection that an answer goes out on."""

    socket: socket.socket
    stop: threading.Event
    is_open: bool = True

    def send(self, data: bytes) -> None:
        """Send bytes; the other side may be gone already."""
        with contextlib.suppress(OSError):
            self.socket.sendall(data)

    def drip(self, start: bytes, piece: bytes) -> None:
        """Send *start*, then *piece* again and again until nobody listens."""
        try:
            self.socket.sendall(start)
            while not self.stop.wait(0.01):
                self.socket.sendall(piece)
        except OSError:
            pass
        self.is_open = False

    def reset(self) -> None:
        """Cut the connection as a crash does."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.is_open = False

    def wait_gone(self) -> None:
        """Wait until the other side closes."""
        with contextlib.suppress(OSError):
            while self.socket.recv(65536):
                pass
        self.is_open = False


Answer = Callable[[Received, Peer], bytes | None]


@dataclass
class FakeEndpoint:
    """Accepts connections and answers each request with what *answer* returns or sends itself."""

    answer: Answer
    context: ssl.SSLContext | None = None
    greeting: bytes = b""  # sent before anything is asked
    received: list[Received] = field(default_factory=list)
    connections: int = 0

    def __post_init__(self) -> None:
        self.stop = threading.Event()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    @property
    def url(self) -> str:
        """Where it is."""
        return f"{'https' if self.context else 'http'}://{'localhost' if self.context else '127.0.0.1'}:{self.port}"

    def close(self) -> None:
        """End it, and every connection."""
        self.stop.set()
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for each in list(self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)

    def _start(self, function: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=function, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self.stop.is_set():
            try:
                end, _ = self._listening.accept()
            except OSError:
                return
            self.connections += 1
            self._open.add(end)
            self._start(self._serve, end, self.connections)

    def _serve(self, plain: socket.socket, number: int) -> None:
        end = plain
        try:
            if self.context is not None:
                end = self.context.wrap_socket(plain, server_side=True)
                self._open.add(end)
            peer = Peer(end, self.stop)
            peer.send(self.greeting)
            with end.makefile("rb") as stream:
                while peer.is_open and (received := _receive(stream, number)) is not None:
                    self.received.append(received)
                    answer = self.answer(received, peer)
                    if answer is not None:
                        peer.send(answer)
        except OSError:
            pass  # the other side is gone, or does not like our certificate
        finally:
            end.close()
            plain.close()


def _receive(stream: Any, number: int) -> Received | None:
    first = stream.readline().decode("latin-1").split()
    if len(first) < 2:
        return None
    headers: dict[str, str] = {}
    while (line := stream.readline().decode("latin-1").strip()) != "":
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    body = stream.read(int(headers.get("content-length", "0")))
    return Received(first[0], first[1], headers, body, number)


@contextlib.contextmanager
def serving(answer: Answer, context: ssl.SSLContext | None = None, greeting: bytes = b"") -> Iterator[FakeEndpoint]:
    """Have such an endpoint for the length of a block."""
    endpoint = FakeEndpoint(answer, context, greeting)
    try:
        yield endpoint
    finally:
        endpoint.close()


def in_turn(*answers: bytes) -> Answer:
    """Answer with each of these, then with the last for ever."""
    left = list(answers)
    lock = threading.Lock()

    def answer(received: Received, peer: Peer) -> bytes:
        with lock:
            return left.pop(0) if len(left) > 1 else left[0]

    return answer


def good(received: Received, peer: Peer) -> bytes:
    """Answer well."""
    return reply(200, GOOD)


def free_port() -> int:
    """A port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
    return port
