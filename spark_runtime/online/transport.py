"""One POST or GET over `requests`, bounded in every way.

`requests` bounds each wait for a byte and not the whole: a server that sends one byte a second holds a call for ever.
So the connections that it uses are ours, and know the call that they work for: its *line*. A line has a deadline, and
every wait is as long as what is left of it; and it can be cut off by another thread, which wakes whoever waits.

Certificates are checked, redirects are answers like others, cookies are not kept, and neither proxies nor passwords are
taken from the environment unless the user wants that.
"""

import http.cookiejar
import io
import os
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import requests
import urllib3
from requests.adapters import HTTPAdapter

import spark_runtime
from spark_runtime.errors import EndpointAnswerInvalid, EndpointUnreachable
from spark_runtime.online.given import within

CHUNK = 64 * 1024
_GZIP = 31  # zlib's word for it: the largest window, with gzip's header


class LineCut(Exception):
    """The line was cut: nobody waits for this call any more."""


class LineLate(Exception):
    """The line's time is over."""


class Line:
    """What one call has of the network: its time, and the connection that it uses now."""

    def __init__(self, deadline: float, connect_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.connect_seconds = connect_seconds
        self._deadline = deadline
        self._clock = clock
        self._changing = threading.Lock()
        self._held: socket.socket | None = None
        self._cut = threading.Event()

    def left(self) -> float:
        """Return the seconds that are left.

        Raises:
            LineLate: None are.
            LineCut: Nobody waits any more.
        """
        self.check()
        left = self._deadline - self._clock()
        if left <= 0:
            raise LineLate
        return left

    def check(self) -> None:
        """Raise LineCut if nobody waits any more."""
        if self._cut.is_set():
            raise LineCut

    def pause(self, seconds: float) -> None:
        """Wait. Raises as `left`."""
        self._cut.wait(min(seconds, self.left()))
        self.left()

    def hold(self, descriptor: int) -> None:
        """Remember the connection in use. Raises LineCut if it is not wanted any more."""
        with self._changing:
            self._release()
            # Our own descriptor of it: the library closes and replaces its own ones at any time.
            self._held = socket.socket(fileno=os.dup(descriptor))
        self.check()

    def release(self) -> None:
        """Forget the connection."""
        with self._changing:
            self._release()

    def cut(self) -> None:
        """Wake whoever waits on this line, on any thread; it is of no use after that."""
        self._cut.set()
        with self._changing:
            if self._held is not None:
                try:
                    self._held.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # the other side was quicker

    def _release(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None


class _Here(threading.local):
    line: Line | None = None


_here = _Here()


def _line() -> Line:
    assert _here.line is not None, "connections are used by Transport only"
    return _here.line


# --- the connections --------------------------------------------------------------------------------------------------


class _Socket:
    """A connected socket whose every wait ends with the line's time."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def sendall(self, data: Any) -> None:
        self._inner.settimeout(_left())  # of the whole, since Python 3.5
        self._inner.sendall(data)

    def makefile(self, mode: str, *_: Any, **__: Any) -> io.BufferedReader:
        return io.BufferedReader(_Reader(self._inner, self._inner.makefile(mode, buffering=0)), CHUNK)


class _Reader(io.RawIOBase):
    """The reading side of such a socket."""

    def __init__(self, inner: Any, raw: Any) -> None:
        self._inner = inner
        self._raw = raw

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._inner.settimeout(_left())
        count: int | None = self._raw.readinto(buffer)
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


def _left() -> float:
    """As `Line.left`, as an error that the libraries between us know and clean up after."""
    try:
        return _line().left()
    except (LineLate, LineCut) as problem:
        raise TimeoutError("the call's time is over") from problem


def _connect(host: str, port: int, options: Any) -> socket.socket:
    """Connect to the first address of *host* that answers. The library's own way gives each address the full time."""
    line = _line()
    # Nothing ends a look-up of a name before its time.
    found = within(_left(), lambda: socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM))
    problem: OSError = OSError("it has no address")
    for family, kind, protocol, _, address in found:
        sock = socket.socket(family, kind, protocol)
        try:
            for option in options or ():
                sock.setsockopt(*option)
            line.hold(sock.fileno())
            sock.settimeout(min(_left(), line.connect_seconds))
            sock.connect(address)
        except OSError as refusal:
            problem = refusal
            sock.close()
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise problem


class _Plain(urllib3.connection.HTTPConnection):
    """A connection without TLS."""

    def _new_conn(self) -> socket.socket:
        return _connect(self._dns_host, self.port or 80, self.socket_options)

    def connect(self) -> None:
        super().connect()
        self.sock = _Socket(self.sock)

    def request(self, *arguments: Any, **named: Any) -> None:
        if self.sock is not None:  # kept from an earlier call
            _line().hold(self.sock.fileno())
        super().request(*arguments, **named)


class _Secure(urllib3.connection.HTTPSConnection):
    """A connection with TLS."""

    def _new_conn(self) -> socket.socket:
        return _connect(self._dns_host, self.port or 443, self.socket_options)

    def connect(self) -> None:
        super().connect()
        self.sock = _Socket(self.sock)

    def request(self, *arguments: Any, **named: Any) -> None:
        if self.sock is not None:
            _line().hold(self.sock.fileno())
        super().request(*arguments, **named)


class _PlainPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Plain


class _SecurePool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _Secure


class _Adapter(HTTPAdapter):
    """Has `requests` use our connections."""

    def init_poolmanager(self, *arguments: Any, **named: Any) -> None:
        super().init_poolmanager(*arguments, **named)
        self.poolmanager.pool_classes_by_scheme = {"http": _PlainPool, "https": _SecurePool}

    def proxy_manager_for(self, *arguments: Any, **named: Any) -> Any:
        manager = super().proxy_manager_for(*arguments, **named)
        manager.pool_classes_by_scheme = {"http": _PlainPool, "https": _SecurePool}
        return manager


class _NoPasswords(requests.auth.AuthBase):
    """Without this `requests` puts a password of ~/.netrc in place of the header that we set."""

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        return request


# --- the whole --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back, whatever it says. *headers* have names in lower case."""

    status: int
    reason: str
    headers: Mapping[str, str]
    body: bytes


class Transport:
    """Sends requests over connections that are kept and used again. Thread-safe.

    Args:
        connections: How many are kept.
        ca_file: Certificates that are trusted in place of the usual ones.
        trust_env: Use what the environment says of proxies and certificates.
    """

    def __init__(self, connections: int = 1, ca_file: str | None = None, *, trust_env: bool = False) -> None:
        self._session = requests.Session()
        self._session.trust_env = trust_env
        self._session.cookies.set_policy(http.cookiejar.DefaultCookiePolicy(allowed_domains=[]))
        self._session.headers.clear()
        self._session.headers["User-Agent"] = f"spark-runtime/{spark_runtime.__version__}"
        self._session.headers["Accept-Encoding"] = "gzip"
        self._session.verify = ca_file or True
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, _Adapter(pool_connections=2, pool_maxsize=connections))

    def send(
        self,
        line: Line,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | None,
        max_bytes: int,
    ) -> Reply:
        """Send one request; return what comes back. A redirect comes back as well.

        Raises:
            LineLate, LineCut: The line's time is over, or it was cut.
            EndpointUnreachable: There was no connection, or it broke. ``details["reason"]`` is ``"certificate"`` where
                trying again makes no sense.
            EndpointAnswerInvalid: The answer is longer than *max_bytes*, or damaged.
        """
        host = _host(url)
        _here.line = line
        try:
            line.left()
            with self._session.request(
                method,
                url,
                data=body,
                headers=dict(headers),
                auth=_NoPasswords(),
                allow_redirects=False,
                stream=True,
            ) as response:
                content = _read(response, host, max_bytes)
                line.check()  # a body without a length ends where the connection does
                names = {name.lower(): value for name, value in response.headers.items()}
                return Reply(response.status_code, response.reason or "", names, content)
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, EOFError) as problem:
            line.left()  # whatever the libraries say: late is late, and cut is cut
            raise _unreachable(problem, host) from problem
        finally:
            _here.line = None
            line.release()

    def close(self) -> None:
        """Close the connections that nobody uses."""
        self._session.close()


def _read(response: requests.Response, host: str, max_bytes: int) -> bytes:
    """Return the body, unpacked. Neither form of it may be too long: a few bytes of gzip may be gigabytes."""
    announced = response.headers.get("Content-Length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise EndpointAnswerInvalid(f"{host} answers with {announced} bytes, and {max_bytes} may come")
    content = bytearray()
    for chunk in response.raw.stream(CHUNK, decode_content=False):
        content += chunk
        if len(content) > max_bytes:
            raise EndpointAnswerInvalid(f"{host} answers with more than the {max_bytes} bytes that may come")
    packed = response.headers.get("Content-Encoding", "identity").strip().lower()
    if packed in ("", "identity"):
        return bytes(content)
    if packed not in ("gzip", "x-gzip"):
        raise EndpointAnswerInvalid(f"{host} packs its answer as {packed[:40]!a}, which was not asked for")
    return _unpack(bytes(content), host, max_bytes)


def _unpack(packed: bytes, host: str, max_bytes: int) -> bytes:
    content = bytearray()
    while packed:
        unpacker = zlib.decompressobj(_GZIP)
        try:
            content += unpacker.decompress(packed, max_bytes + 1 - len(content))
        except zlib.error as problem:
            raise EndpointAnswerInvalid(f"{host} sent a damaged answer: {problem}") from problem
        if len(content) > max_bytes:
            raise EndpointAnswerInvalid(f"{host} answers with more than the {max_bytes} bytes that may come")
        if not unpacker.eof:
            raise EndpointAnswerInvalid(f"{host} sent an answer whose end is missing")
        packed = unpacker.unused_data
    return bytes(content)


def _unreachable(problem: BaseException, host: str) -> EndpointUnreachable:
    cause = _root(problem)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return EndpointUnreachable(
            f"the certificate of {host} is not trusted: {cause.verify_message}", details={"reason": "certificate"}
        )
    if isinstance(cause, socket.gaierror):
        return EndpointUnreachable(f"there is no host {host}: {cause.strerror}", details={"reason": "name"})
    if isinstance(cause, ConnectionRefusedError):
        return EndpointUnreachable(f"{host} refuses the connection", details={"reason": "refused"})
    if isinstance(cause, TimeoutError):
        return EndpointUnreachable(f"{host} does not answer in time", details={"reason": "timeout"})
    text = getattr(cause, "strerror", None) or str(cause)
    return EndpointUnreachable(f"the connection to {host} broke: {text[:200]}", details={"reason": "broken"})


def _root(problem: BaseException) -> BaseException:
    """Return the error that the others were made of: the libraries wrap it several times."""
    for _ in range(20):
        inner = next((each for each in problem.args if isinstance(each, BaseException)), None)
        found = problem.__cause__ or inner or getattr(problem, "reason", None) or problem.__context__
        if not isinstance(found, BaseException):
            break
        problem = found
    return problem


def _host(url: str) -> str:
    """Return host and port of *url*, for people."""
    return urllib3.util.parse_url(url).netloc or url
