"""Calls at an endpoint, over real sockets; and when a call goes there at all."""

import asyncio
import contextlib
import gzip
import json
import logging
import pickle
import ssl
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from online_help import GOOD, FakeEndpoint, Peer, Received, free_port, good, in_turn, reply, serving

from spark_runtime import errors
from spark_runtime.config import Endpoint
from spark_runtime.errors import (
    BadRequestError,
    EndpointAnswerInvalid,
    EndpointUnreachable,
    ExecuteCancelled,
    ExecuteTimeout,
    FallbackFailed,
    OnlineError,
    SparkClosed,
    SparkError,
)
from spark_runtime.models.envelope import Envelope, open_request
from spark_runtime.models.registry import Wanted
from spark_runtime.online.client import OnlineClient, address
from spark_runtime.online.fallback import (
    FallbackCall,
    acall_with_fallback,
    call_with_fallback,
    mark,
    reason_to_go_online,
)
from spark_runtime.online.retry import Retry, read_retry_after
from spark_workers.errors import from_dict, online_error
from spark_workers.futures import StoppableFuture

AT_ONCE = Retry(2, first_seconds=0.0)
REQUEST = {"request_data": {"inputs": {"radius": 3}}, "request_meta": {"version_id": "v 1"}}
MORE_THAN_ENOUGH = 30.0


@contextlib.contextmanager
def client(server: FakeEndpoint | str, retry: Retry = AT_ONCE, **options: Any) -> Iterator[OnlineClient]:
    """A client of an endpoint, closed at the end of the block."""
    url = server if isinstance(server, str) else server.url
    made = OnlineClient(Endpoint(url, "acme", **{"timeout": MORE_THAN_ENOUGH, **options}), retry=retry)
    try:
        yield made
    finally:
        made.close()


def opened(request: Any = REQUEST, model: str | None = None) -> Envelope:
    return open_request(request, model)


# --- where a request goes, and what goes there ---


@pytest.mark.parametrize(
    ("request_", "model", "path"),
    [
        (REQUEST, None, "/acme/api/v3/public/version/v%201"),
        (REQUEST, "f/s", "/acme/api/v3/public/folders/f/services/s/execute"),
        (REQUEST, "f x/s y[1.2]", "/acme/api/v3/public/folders/f%20x/services/s%20y%5B1.2%5D/execute"),
        (REQUEST, "service/7", "/acme/api/v3/public/service/7"),
        (REQUEST, "../../etc", "/acme/api/v3/public/execute"),
        ({"request_meta": {"version_id": "a/../b?c#d"}}, None, "/acme/api/v3/public/version/a%2F..%2Fb%3Fc%23d"),
        (
            {"request_meta": {"service_uri": "f/s", "version": "2"}},
            None,
            "/acme/api/v3/public/folders/f/services/s%5B2%5D/execute",
        ),
        ({"request_meta": {"service_id": "7"}}, None, "/acme/api/v3/public/service/7"),
        ({"request_meta": {"service_name": "s"}}, None, "/acme/api/v3/public/execute"),
        ({"radius": 3}, "v1", "/acme/api/v3/public/version/v1"),
        ({"inputs": [["a"], [1]], "version_id": "v1"}, None, "/acme/api/v4/public/execute"),
        ({"inputs": [["a"], [1]]}, "f/s", "/acme/api/v4/public/execute"),
    ],
)
def test_a_request_goes_to_the_address_of_its_model(request_: Any, model: str | None, path: str) -> None:
    with serving(good) as server, client(server) as online:
        assert online.execute(opened(request_, model)) == GOOD
        assert [each.path for each in server.received] == [path]
        assert server.received[0].method == "POST"


def test_the_addresses_of_those_who_say_who_they_are_have_no_public_in_them() -> None:
    endpoint = Endpoint("https://excel.example.com/base/", "acme", "bearerToken", "x")
    wanted = Wanted(version_id="v")
    assert (
        address(endpoint, "acme", wanted, is_columnar=False) == "https://excel.example.com/base/acme/api/v3/version/v"
    )
    assert address(endpoint, "a b", wanted, is_columnar=True) == "https://excel.example.com/base/a%20b/api/v4/execute"


def test_the_whole_request_is_sent_with_its_inputs_and_without_the_context() -> None:
    request = {
        "request_data": {"inputs": {"radius": 3}, "more": [1]},
        "request_meta": {"version_id": "v", "_ctx": {"authorization": "secret"}, "x": 1},
        "extra": "ü",
    }
    with serving(good) as server, client(server) as online:
        online.execute(opened(request))
        sent = server.received[0]
        assert sent.json() == {**request, "request_meta": {"version_id": "v", "x": 1}}
        assert sent.headers["content-type"] == "application/json"
        assert sent.headers["content-length"] == str(len(sent.body))
        assert b"secret" not in sent.body


def test_plain_inputs_are_sent_as_a_request() -> None:
    with serving(good) as server, client(server) as online:
        online.execute(opened({"radius": 3}, "f/s"))
        assert server.received[0].json() == {"request_data": {"inputs": {"radius": 3}}, "request_meta": {}}


@pytest.mark.parametrize(
    ("request_", "model", "more"),
    [
        ({"inputs": [["a"]], "version_id": "v"}, None, {}),
        ({"inputs": [["a"]], "service": "f/s"}, None, {}),
        ({"inputs": [["a"]], "version_id": "v"}, "other", {}),
        ({"inputs": [["a"]]}, "v", {"version_id": "v"}),
        ({"inputs": [["a"]]}, "f/s[2]", {"service": "f/s[2]"}),
        ({"inputs": [["a"]]}, "service/7", {"service": "7"}),
    ],
)
def test_a_columnar_request_says_which_model_it_means(request_: Any, model: str | None, more: Any) -> None:
    with serving(good) as server, client(server) as online:
        online.execute(opened(request_, model))
        assert server.received[0].json() == {**request_, **more}


def test_a_request_that_names_no_model_is_refused_before_it_is_sent() -> None:
    with serving(good) as server, client(server) as online:
        with pytest.raises(BadRequestError, match="which model is to be called online"):
            online.execute(opened({"radius": 3}))
        assert online.execute(opened({"radius": 3}), Wanted(version_id="v")) == GOOD
        assert len(server.received) == 1


def test_long_requests_are_packed_where_the_endpoint_reads_that() -> None:
    request = {"request_data": {"inputs": {"text": "x" * 10_000}}, "request_meta": {"version_id": "v"}}
    with serving(good) as server, client(server, compress=True) as online:
        online.execute(opened(request))
        online.execute(opened(REQUEST))
        long, short = server.received
        assert (long.headers["content-encoding"], json.loads(gzip.decompress(long.body))) == ("gzip", request)
        assert "content-encoding" not in short.headers


def test_one_connection_serves_many_calls() -> None:
    with serving(good) as server, client(server) as online:
        for _ in range(5):
            online.execute(opened())
        assert server.connections == 1
        assert len(server.received) == 5


def test_no_more_calls_are_sent_at_once_than_the_endpoint_allows() -> None:
    gate, both = threading.Event(), threading.Barrier(2)
    now, most, lock = 0, 0, threading.Lock()

    def answer(received: Received, peer: Peer) -> bytes:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        if not gate.is_set():
            both.wait(MORE_THAN_ENOUGH)
            gate.set()
        with lock:
            now -= 1
        return reply(200, GOOD)

    with serving(answer) as server, client(server, connections=2) as online:
        calls = [online.submit(opened()) for _ in range(8)]
        assert [call.result(MORE_THAN_ENOUGH) for call in calls] == [GOOD] * 8
        assert most == 2


# --- who calls ---


@pytest.mark.parametrize(
    ("options", "headers"),
    [
        ({}, {}),
        ({"auth": "syntheticKey", "credential": "key"}, {"x-synthetic-key": "key", "x-tenant-name": "acme"}),
        ({"auth": "syntheticKey", "credential": lambda: "key"}, {"x-synthetic-key": "key", "x-tenant-name": "acme"}),
        ({"auth": "bearerToken", "credential": "token"}, {"authorization": "Bearer token"}),
        ({"auth": "bearerToken", "credential": " Bearer token\n"}, {"authorization": "Bearer token"}),
        ({"auth": "bearerToken", "credential": lambda: "token"}, {"authorization": "Bearer token"}),
    ],
)
def test_the_headers_say_who_calls(options: Any, headers: dict[str, str]) -> None:
    with serving(good) as server, client(server, **options) as online:
        online.execute(opened())
        sent = server.received[0].headers
        assert {
            name: sent[name] for name in ("x-synthetic-key", "x-tenant-name", "authorization") if name in sent
        } == headers
        assert ("/public/" in server.received[0].path) is not bool(headers)


def test_a_function_for_the_token_is_called_once_for_each_call_repeated_or_not() -> None:
    tokens = iter(["one", "two"])
    answers = in_turn(reply(503), reply(503), reply(200, GOOD))
    with serving(answers) as server, client(server, auth="bearerToken", credential=lambda: next(tokens)) as online:
        online.execute(opened())
        online.execute(opened())
        sent = [each.headers["authorization"] for each in server.received]
        assert sent == ["Bearer one"] * 3 + ["Bearer two"]


def test_an_async_function_for_the_token_is_awaited_with_and_without_a_loop() -> None:
    loops: list[asyncio.AbstractEventLoop] = []

    async def token() -> str:
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0)
        return "token"

    async def use(online: OnlineClient) -> None:
        assert await online.aexecute(opened()) == GOOD
        assert loops[-1] is asyncio.get_running_loop()  # it may hold connections that belong to this loop
        assert online.execute(opened()) == GOOD  # blocks this loop, so it has to run on another
        assert loops[-1] is not asyncio.get_running_loop()

    with serving(good) as server, client(server, auth="bearerToken", credential=token) as online:
        assert online.execute(opened()) == GOOD
        asyncio.run(use(online))
        assert [each.headers["authorization"] for each in server.received] == ["Bearer token"] * 3


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (None, "bearerToken is NoneType, not a text"),
        ("", "bearerToken is str, not a text with something in it"),
        ("to\nken", "characters in it that cannot be sent"),
        ("tokén", "characters in it that cannot be sent"),
        (ValueError("no token today"), "the function for the bearerToken failed: ValueError: no token today"),
    ],
)
def test_a_token_that_cannot_be_sent_is_told_and_not_shown(found: Any, words: str) -> None:
    def token() -> Any:
        if isinstance(found, Exception):
            raise found
        return found

    with serving(good) as server, client(server, auth="bearerToken", credential=token) as online:
        with pytest.raises(BadRequestError, match=words) as caught:
            online.execute(opened())
        assert "ken" not in str(caught.value).replace("Token", "").replace("token today", "")
        assert server.received == []


def test_a_function_for_the_token_that_hangs_ends_with_the_calls_time() -> None:
    gate = threading.Event()
    with serving(good) as server, client(server, auth="bearerToken", credential=lambda: str(gate.wait(60))) as online:
        with pytest.raises(ExecuteTimeout):
            online.execute(opened(), timeout=0.1)
        gate.set()
        assert server.received == []


def test_a_call_that_a_model_makes_uses_the_credentials_of_its_own_caller() -> None:
    with serving(good) as server, client(server, auth="syntheticKey", credential="ours") as online:
        online.execute(opened(), context={"authorization": "Bearer theirs", "tenant": "other"})
        online.execute(opened(), context={"x-synthetic-key": "theirs", "tenant": "other"})
        online.execute(opened(), context={"correlationId": "1"})
        first, second, third = server.received
        assert first.headers["authorization"] == "Bearer theirs"
        assert "x-synthetic-key" not in first.headers
        assert first.path.startswith("/other/")
        assert (second.headers["x-synthetic-key"], second.headers["x-tenant-name"]) == ("theirs", "other")
        assert third.headers["x-synthetic-key"] == "ours"
        assert third.path.startswith("/acme/")


def test_nothing_shows_the_credential() -> None:
    endpoint = Endpoint("http://127.0.0.1:1", "acme", "bearerToken", "secret-token")
    assert "secret" not in repr(endpoint)
    told = reply(401, {"error": {"message": "secret-token is not a good token"}})
    with serving(in_turn(told)) as server, client(server, auth="bearerToken", credential="secret-token") as online:
        with pytest.raises(errors.UnauthorizedError) as caught:
            online.execute(opened())
        assert "secret" not in str(caught.value.to_dict())
        assert "*** is not a good token" in str(caught.value)


# --- answers that are errors ---


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (400, errors.BadRequestError, "BAD_REQUEST"),
        (401, errors.UnauthorizedError, "UNAUTHORIZED"),
        (403, errors.ForbiddenError, "FORBIDDEN"),
        (404, errors.NotFoundError, "NOT_FOUND"),
        (408, errors.OnlineError, "HTTP_408"),
        (409, errors.ConflictError, "CONFLICT"),
        (415, errors.UnsupportedMediaTypeError, "UNSUPPORTED_MEDIA_TYPE"),
        (418, errors.OnlineError, "HTTP_418"),
        (422, errors.UnprocessableEntityError, "UNPROCESSABLE_ENTITY"),
        (429, errors.RateLimitError, "RATE_LIMIT_EXCEEDED"),
        (500, errors.InternalServerError, "INTERNAL_SERVER_ERROR"),
        (502, errors.OnlineError, "HTTP_502"),
        (503, errors.ServiceUnavailableError, "SERVICE_UNAVAILABLE"),
        (504, errors.GatewayTimeoutError, "GATEWAY_TIMEOUT"),
    ],
)
def test_every_status_is_an_error_of_its_own(status: int, kind: type[OnlineError], code: str) -> None:
    answer = reply(status, {"error": {"status": status, "message": "because"}}, X_Request_Id="r1")
    with serving(in_turn(answer)) as server, client(server, Retry(0)) as online:
        with pytest.raises(kind, match=f"answers {status}: because") as caught:
            online.execute(opened())
        problem = caught.value
        assert isinstance(problem, OnlineError)
        assert type(problem) is kind or status == 400
        told = problem.to_dict()
        assert told["error"] | {"message": ""} == {
            "status": status,
            "message": "",
            "code": code,
            "endpoint": server.url,
            "request_id": "r1",
        }
        for again in (from_dict(told), pickle.loads(pickle.dumps(problem))):
            assert (type(again), again.to_dict(), str(again)) == (type(problem), told, str(problem))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": {"message": "because", "code": "OWN_CODE"}}, "because"),
        ({"message": "because"}, '{"message": "because"}'),
        (b"<html>broken</html>", "<html>broken</html>"),
        (b"", "Word"),
        (b"\xff\x1b[31mred\n", "� [31mred"),
        ({"error": "because"}, '{"error": "because"}'),
        (b"[" * 100_000, "[[["),
    ],
)
def test_whatever_an_error_says_reaches_the_user_on_one_line(body: Any, message: str) -> None:
    with serving(in_turn(reply(500, body))) as server, client(server) as online:
        with pytest.raises(errors.InternalServerError) as caught:
            online.execute(opened())
        text = str(caught.value)
        assert f"answers 500: {message}" in text
        assert text.isprintable()
        assert len(text) < 500
        assert caught.value.code == ("OWN_CODE" if "OWN_CODE" in str(body) else "INTERNAL_SERVER_ERROR")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (reply(200, b"<html>"), "is not JSON; it begins with '<html>'"),
        (reply(200, b""), "is not JSON; it is empty"),
        (reply(204, b""), "is not JSON; it is empty"),
        (reply(200, b"[1]"), "is not an object, but list"),
        (reply(200, b"\xff\xfe"), "is not JSON"),
        (reply(200, b"[" * 10_000), "is not JSON"),
        (reply(200, b"x" * 20_000), "answers with 20000 bytes, and 10000 may come"),
        (reply(200, gzip.compress(b"x" * 20_000), Content_Encoding="gzip"), "more than the 10000 bytes"),
        (reply(200, gzip.compress(b" " * 9_000) * 2, Content_Encoding="gzip"), "more than the 10000 bytes"),
        (reply(200, gzip.compress(b"{}")[:-9], Content_Encoding="gzip"), "whose end is missing"),
        (reply(200, b"no gzip", Content_Encoding="gzip"), "sent a damaged answer"),
        (reply(200, zlib.compress(b"{}"), Content_Encoding="deflate"), "packs its answer as 'deflate'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_answer_that_is_none_is_told_and_not_asked_for_again(answer: bytes, words: str) -> None:
    with serving(in_turn(answer)) as server, client(server, max_bytes=10_000) as online:
        with pytest.raises(EndpointAnswerInvalid, match=words) as caught:
            online.execute(opened())
        assert caught.value.to_dict()["error"]["code"] == "ENDPOINT_ANSWER_INVALID"
        assert type(from_dict(caught.value.to_dict())) is EndpointAnswerInvalid
        assert len(server.received) == 1


def test_an_answer_without_end_is_cut_off() -> None:
    def answer(received: Received, peer: Peer) -> None:
        chunk = b"1000\r\n" + b" " * 4096 + b"\r\n"
        peer.drip(reply(200, b"", Transfer_Encoding="chunked"), chunk)

    with serving(answer) as server, client(server, max_bytes=10_000) as online:
        call = online.submit(opened())
        with pytest.raises(EndpointAnswerInvalid, match="more than the 10000 bytes"):
            call.result(MORE_THAN_ENOUGH)


@pytest.mark.parametrize(
    "answer",
    [
        reply(200, GOOD),
        reply(200, gzip.compress(json.dumps(GOOD).encode()), Content_Encoding="gzip"),
        reply(
            200,
            gzip.compress(b'{"response_data": {"outputs": {"volume": 1}}, ')
            + gzip.compress(b'"response_meta": {"version_id": "v"}}'),
            Content_Encoding="x-gzip",
        ),
        reply(201, GOOD, Content_Type="text/plain"),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        + b"".join(b"1\r\n%c\r\n" % each for each in json.dumps(GOOD).encode())
        + b"0\r\n\r\n",
    ],
    ids=["plain", "gzip", "two members", "created", "chunked"],
)
def test_answers_are_read_in_every_form(answer: bytes) -> None:
    with serving(in_turn(answer)) as server, client(server) as online:
        assert online.execute(opened()) == GOOD
        assert server.received[0].headers["accept-encoding"] == "gzip"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_and_the_token_stays_here(status: int) -> None:
    with serving(good) as elsewhere:
        answer = reply(status, b"", Location=f"{elsewhere.url}/a?token=x")
        with serving(in_turn(answer)) as server, client(server, auth="bearerToken", credential="secret") as online:
            with pytest.raises(EndpointAnswerInvalid, match=rf"a redirect to '{elsewhere.url}/a', and redirects"):
                online.execute(opened())
            assert len(server.received) == 1
        assert elsewhere.connections == 0


# --- connections that fail ---


def test_a_refused_connection_is_tried_again_and_told() -> None:
    tries: list[float] = []
    endpoint = Endpoint(f"http://127.0.0.1:{free_port()}", "acme", timeout=MORE_THAN_ENOUGH)
    online = OnlineClient(endpoint, retry=AT_ONCE, chance=lambda: tries.append(1) or 0.5)  # type: ignore[func-returns-value]
    with pytest.raises(EndpointUnreachable, match=r"127\.0\.0\.1:.* refuses the connection") as caught:
        online.execute(opened())
    online.close()
    assert len(tries) == 3
    assert caught.value.to_dict()["error"]["code"] == "ENDPOINT_UNREACHABLE"


def test_a_host_that_is_not_there_is_told() -> None:
    with (
        client("http://nobody.invalid", Retry(0)) as online,
        pytest.raises(EndpointUnreachable, match=r"nobody\.invalid"),
    ):
        online.execute(opened())


def test_a_connection_that_breaks_is_made_again() -> None:
    count = 0

    def answer(received: Received, peer: Peer) -> bytes | None:
        nonlocal count
        count += 1
        if count == 1:
            peer.reset()
            return None
        if count == 2:  # in the middle of an answer
            peer.is_open = False
            return reply(200, b'{"response', Content_Length="1000")
        return reply(200, GOOD)

    with serving(answer) as server, client(server) as online:
        assert online.execute(opened()) == GOOD
        assert len(server.received) == 3


def test_a_connection_that_breaks_each_time_is_told() -> None:
    def answer(received: Received, peer: Peer) -> None:
        peer.reset()

    with serving(answer) as server, client(server) as online:
        with pytest.raises(EndpointUnreachable, match=r"the connection to 127\.0\.0\.1:.* broke"):
            online.execute(opened())
        assert len(server.received) == 3


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"", b"H"),
        (b"HTTP/1.1 200 OK\r\nX: ", b"x"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b" "),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        (b"HTTP/1.1 200 OK\r\n\r\n", b" "),
        (b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
    ids=["first line", "headers", "body", "chunks", "without end", "continue"],
)
def test_a_server_that_drips_holds_no_call_beyond_its_time(start: bytes, piece: bytes) -> None:
    with serving(lambda received, peer: peer.drip(start, piece)) as server, client(server) as online:
        with pytest.raises(ExecuteTimeout, match=r"no answer from http://127.* within 0\.3 s") as caught:
            online.execute(opened(), timeout=0.3)
        assert isinstance(caught.value, TimeoutError)
        assert len(server.received) == 1  # a late call is not repeated


def test_a_server_that_does_not_listen_holds_no_call_beyond_its_time() -> None:
    def answer(received: Received, peer: Peer) -> None:
        peer.wait_gone()

    big = {"request_data": {"inputs": {"x": "y" * 20_000_000}}, "request_meta": {"version_id": "v"}}
    with serving(answer) as server, client(server) as online, pytest.raises(ExecuteTimeout):
        online.execute(opened(), timeout=0.2)
    import socket

    with socket.create_server(("127.0.0.1", 0)) as deaf:  # it accepts, and never reads
        with client(f"http://127.0.0.1:{deaf.getsockname()[1]}") as online, pytest.raises(ExecuteTimeout):
            online.execute(opened(big), timeout=0.3)
        with client(f"https://127.0.0.1:{deaf.getsockname()[1]}") as online, pytest.raises(ExecuteTimeout):
            online.execute(opened(), timeout=0.3)


def test_the_environment_names_neither_proxies_nor_passwords(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password other\n")
    with serving(good) as proxy, serving(good) as server:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("NETRC", str(netrc))
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "nothing"))
        with client(server, auth="bearerToken", credential="token") as online:
            assert online.execute(opened()) == GOOD
            assert (proxy.connections, server.connections) == (0, 1)
        with client(server, auth="bearerToken", credential="token", trust_env=True) as online:
            assert online.execute(opened()) == GOOD
            assert (proxy.connections, server.connections) == (1, 1)
        for sent in (*proxy.received, *server.received):
            assert sent.headers["authorization"] == "Bearer token"


def test_cookies_are_not_kept() -> None:
    with serving(in_turn(reply(200, GOOD, Set_Cookie="a=b; Path=/"))) as server, client(server) as online:
        online.execute(opened())
        online.execute(opened())
        assert "cookie" not in server.received[1].headers


# --- certificates ---


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for localhost that nobody has signed but itself, with its key in the same file."""
    folder = tmp_path_factory.mktemp("certificate")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command += ["-keyout", str(folder / "key"), "-out", str(folder / "certificate")]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=30)
    except (OSError, subprocess.CalledProcessError) as problem:
        pytest.skip(f"openssl makes no certificate here: {problem}")
    both = folder / "both"
    both.write_bytes((folder / "key").read_bytes() + (folder / "certificate").read_bytes())
    return both


@pytest.fixture
def secure(certificate: Path) -> Iterator[FakeEndpoint]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with serving(good, context) as server:
        yield server


def test_a_certificate_that_nobody_signed_is_not_trusted(secure: FakeEndpoint) -> None:
    with client(secure, auth="bearerToken", credential="secret") as online:
        with pytest.raises(EndpointUnreachable, match=r"the certificate of localhost:.* is not trusted: self"):
            online.execute(opened())
        assert secure.received == []
        assert secure.connections == 1  # trying again makes no sense


def test_a_certificate_of_another_host_is_not_trusted(secure: FakeEndpoint, certificate: Path) -> None:
    url = f"https://127.0.0.1:{secure.port}"
    with client(url, ca_file=certificate) as online:
        with pytest.raises(EndpointUnreachable, match=r"the certificate of 127.0.0.1:.* is not trusted"):
            online.execute(opened())
        assert secure.received == []


def test_a_certificate_that_the_user_trusts_is_trusted(secure: FakeEndpoint, certificate: Path) -> None:
    with client(secure, ca_file=certificate) as online:
        assert online.execute(opened()) == GOOD
        assert online.execute(opened()) == GOOD
        assert secure.connections == 1


def test_a_call_over_tls_is_cut_as_well(secure: FakeEndpoint, certificate: Path) -> None:
    arrived = threading.Event()

    def answer(received: Received, peer: Peer) -> None:
        arrived.set()
        peer.wait_gone()

    secure.answer = answer
    with client(secure, ca_file=certificate) as online:
        call = online.submit(opened())
        assert arrived.wait(MORE_THAN_ENOUGH)
        assert call.cancel()
        with pytest.raises(ExecuteCancelled):
            call.result()


def test_an_http_server_where_tls_is_expected_is_told() -> None:
    greeting = b"HTTP/1.1 400 Bad Request\r\n\r\n"
    with (
        serving(good, greeting=greeting) as server,
        client(f"https://127.0.0.1:{server.port}", Retry(0)) as online,
    ):
        call = online.submit(opened())
        with pytest.raises(EndpointUnreachable, match=r"the connection to .* broke"):
            call.result(MORE_THAN_ENOUGH)


# --- calls that are repeated ---


@pytest.mark.parametrize("status", [408, 429, 502, 503, 504])
def test_what_may_pass_is_tried_again(status: int) -> None:
    with serving(in_turn(reply(status), reply(status), reply(200, GOOD))) as server, client(server) as online:
        assert online.execute(opened()) == GOOD
        assert len(server.received) == 3
        assert len({each.body for each in server.received}) == 1


def test_after_two_repetitions_the_last_error_is_told() -> None:
    with serving(in_turn(reply(503), reply(503), reply(504))) as server, client(server) as online:
        with pytest.raises(errors.GatewayTimeoutError):
            online.execute(opened())
        assert len(server.received) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 415, 418, 422, 500, 501])
def test_what_will_not_pass_is_not_tried_again(status: int) -> None:
    with serving(in_turn(reply(status))) as server, client(server) as online:
        with pytest.raises(OnlineError):
            online.execute(opened())
        assert len(server.received) == 1


def test_an_endpoint_that_asks_for_patience_beyond_the_calls_time_is_told_at_once() -> None:
    with serving(in_turn(reply(429, None, Retry_After="3600"))) as server, client(server) as online:
        with pytest.raises(errors.RateLimitError) as caught:
            online.execute(opened())
        assert caught.value.details["retry_after"] == 3600
        assert len(server.received) == 1


def test_a_pause_is_as_long_as_the_endpoint_asks_for_and_grows() -> None:
    retry, busy = Retry(3, 1.0, 3.0), online_error(503, "busy")
    assert [retry.pause(repeated, busy, 1.0) for repeated in range(4)] == [1, 2, 3, None]
    assert retry.pause(0, busy, 0.0) == 0.5
    assert retry.pause(0, online_error(503, "busy", details={"retry_after": 10.0}), 1.0) == 10
    assert retry.pause(0, online_error(503, "busy", details={"retry_after": 0.0}), 1.0) == 1
    assert retry.pause(0, online_error(500, "no"), 1.0) is None
    assert retry.pause(0, EndpointUnreachable("x", details={"reason": "certificate"}), 1.0) is None
    assert retry.pause(0, EndpointUnreachable("x", details={"reason": "refused"}), 1.0) == 1


def test_patience_is_asked_for_in_seconds_or_as_a_date() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert read_retry_after("120") == 120
    assert read_retry_after("Thu, 01 Jan 2026 00:01:00 GMT", now) == 60
    assert read_retry_after("Wed, 31 Dec 2025 00:00:00 GMT", now) == 0
    for text in ("", "soon", "-1", "1" * 30, "1.5"):
        assert read_retry_after(text) is None


# --- the end of calls ---


def test_a_cancelled_call_lets_go_of_its_connection() -> None:
    arrived, gone = threading.Event(), threading.Event()

    def answer(received: Received, peer: Peer) -> None:
        arrived.set()
        peer.wait_gone()
        gone.set()

    with serving(answer) as server, client(server) as online:
        call = online.submit(opened())
        assert arrived.wait(MORE_THAN_ENOUGH)
        assert call.cancel()
        assert call.cancelled()
        with pytest.raises(ExecuteCancelled):
            call.result()
        assert gone.wait(MORE_THAN_ENOUGH)
        assert len(server.received) == 1


def test_a_call_is_cancelled_while_it_waits_to_be_repeated() -> None:
    with serving(in_turn(reply(503, None, Retry_After="20"))) as server, client(server) as online:
        call = online.submit(opened())
        assert call.cancel()
        with pytest.raises(CancelledError):
            call.result()


def test_a_call_that_is_done_cannot_be_cancelled() -> None:
    with serving(good) as server, client(server) as online:
        call = online.submit(opened())
        assert call.result(MORE_THAN_ENOUGH) == GOOD
        assert not call.cancel()
        assert call.result() == GOOD


def test_cancelling_the_task_cancels_the_call() -> None:
    arrived, gone = threading.Event(), threading.Event()

    def answer(received: Received, peer: Peer) -> None:
        arrived.set()
        peer.wait_gone()
        gone.set()

    async def use(online: OnlineClient) -> None:
        task = asyncio.create_task(online.aexecute(opened()))
        await asyncio.to_thread(arrived.wait, MORE_THAN_ENOUGH)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with serving(answer) as server, client(server) as online:
        asyncio.run(use(online))
        assert gone.wait(MORE_THAN_ENOUGH)


def test_closing_fails_what_is_under_way_and_takes_nothing_more() -> None:
    arrived = threading.Event()

    def answer(received: Received, peer: Peer) -> None:
        arrived.set()
        peer.wait_gone()

    with serving(answer) as server, client(server) as online:
        call = online.submit(opened())
        assert arrived.wait(MORE_THAN_ENOUGH)
        online.close()
        with pytest.raises(SparkClosed):
            call.result(MORE_THAN_ENOUGH)
        with pytest.raises(SparkClosed):
            online.execute(opened())


def test_a_fork_of_the_program_has_connections_of_its_own() -> None:
    source = """
    import os, sys, warnings
    warnings.simplefilter("ignore")
    from spark_runtime.config import Endpoint
    from spark_runtime.models.envelope import open_request
    from spark_runtime.online.client import OnlineClient
    online = OnlineClient(Endpoint(sys.argv[1], "acme"))
    ask = lambda: online.execute(open_request({"request_meta": {"version_id": "v"}}))
    ask()
    child = os.fork()
    ask()
    if child:
        assert os.waitpid(child, 0)[1] == 0
    """
    import textwrap

    with serving(good) as server:
        command = [sys.executable, "-c", textwrap.dedent(source), server.url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=40, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert len(server.received) == 3
        assert server.connections == 2


def test_requests_is_imported_only_where_a_call_goes_online() -> None:
    names = "spark_runtime.config, spark_runtime.runtime, spark_runtime.node_config, spark_runtime.online.fallback"
    code = f"import {names}, sys; print('requests' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "False\n"


# --- the endpoint's configuration ---


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"url": "excel.example.com"}, "url is 'excel.example.com', not such as https"),
        ({"url": "ftp://excel.example.com"}, "url is"),
        ({"url": "https://"}, "url is"),
        ({"url": "https://a b"}, "url is"),
        ({"url": "https://a:99999"}, "url is"),
        ({"url": None}, "url is None"),
        ({"url": "https://me:secret@a"}, "url has a user"),
        ({"url": "https://me:sec ret@a"}, "url is no address"),
        ({"url": "https://a?key=1"}, "url has a user, a query or a fragment"),
        ({"tenant": ""}, "tenant is ''"),
        ({"tenant": "a/b"}, "tenant is 'a/b'"),
        ({"auth": "basic"}, "auth is 'basic', not one of public, syntheticKey, bearerToken"),
        ({"auth": "bearerToken"}, "needs a credential"),
        ({"auth": "syntheticKey", "credential": ""}, "needs a credential"),
        ({"auth": "syntheticKey", "credential": 5}, "needs a credential"),
        ({"credential": "x"}, "auth is 'public', which sends none"),
        ({"timeout": 0}, "timeout is 0"),
        ({"timeout": True}, "timeout is True"),
        ({"timeout": float("inf")}, "timeout is inf"),
        ({"connect_timeout": "1"}, "connect_timeout is '1'"),
        ({"retries": -1}, "retries is -1"),
        ({"connections": 0}, "connections is 0"),
        ({"max_bytes": 1.5}, "max_bytes is 1.5"),
    ],
)
def test_an_endpoint_that_makes_no_sense_is_refused(fields: Any, words: str) -> None:
    with pytest.raises(BadRequestError, match=words) as caught:
        Endpoint(**{"url": "https://a", "tenant": "t", **fields})
    assert "secret" not in str(caught.value)


# --- offline first, then online ---


@pytest.mark.parametrize(
    ("problem", "goes"),
    [
        (errors.MissingModelError("x"), True),
        (errors.ModelNotFound("x"), True),
        (errors.ModelUnusable("x"), True),
        (errors.EngineMissing("x"), True),
        (errors.ModelTrapped("x"), True),
        (errors.ModelOutOfMemory("x"), True),
        (errors.ModelStackOverflow("x"), True),
        (errors.ModelExited("x"), True),
        (errors.ExecuteTimeout("x"), True),
        (errors.ReplicaDied("x"), True),
        (errors.NurseryDied("x"), True),
        (errors.ExecuteCancelled("x"), False),
        (errors.BadRequestError("x"), False),
        (errors.QueueFull("x"), False),
        (errors.SparkClosed("x"), False),
        (errors.FunctionMissing("x"), False),
        (errors.UnauthorizedError("x"), False),
        (errors.InternalServerError("x"), False),
        (KeyboardInterrupt(), False),
        (ValueError("x"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_what_the_model_is_to_blame_for_goes_online(problem: BaseException, goes: bool) -> None:
    assert (reason_to_go_online(problem) is not None) is goes


def test_what_the_endpoint_refused_for_a_part_is_not_asked_again_as_a_whole() -> None:
    outer, within = errors.ModelTrapped("x"), errors.ModelTrapped("y")
    outer.__cause__, within.__cause__ = within, errors.NotFoundError("z")
    assert reason_to_go_online(outer) is None
    within.__cause__ = errors.InternalServerError("z")
    assert reason_to_go_online(outer) is not None


def fails(problem: BaseException) -> Any:
    def call() -> Any:
        raise problem

    return call


def test_an_answer_from_here_is_the_answer(caplog: pytest.LogCaptureFixture) -> None:
    answer = {"response_data": {"errors": [{"message": "radius must be above 0"}]}}
    assert call_with_fallback("m", lambda: answer, fails(AssertionError())) == (answer, "offline")
    assert caplog.text == ""


def test_a_call_goes_online_with_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    offline = fails(errors.ReplicaDied("the process\nended", "m", 1))
    assert call_with_fallback("m", offline, lambda: GOOD) == (GOOD, "online")
    assert [each.getMessage() for each in caplog.records] == [
        "the model's process died, so the call of 'm' goes online (the process ended)"
    ]


def test_a_call_that_is_not_for_the_endpoint_fails_as_it_did(caplog: pytest.LogCaptureFixture) -> None:
    problem = ExecuteCancelled("x")
    with pytest.raises(ExecuteCancelled) as caught:
        call_with_fallback("m", fails(problem), fails(AssertionError()))
    assert caught.value is problem
    assert caplog.text == ""


def test_when_both_fail_both_causes_are_told() -> None:
    trapped, refused = errors.ModelTrapped("trapped", "m", 1), errors.UnauthorizedError("no token")
    with pytest.raises(FallbackFailed) as caught:
        call_with_fallback("m", fails(trapped), fails(refused))
    problem = caught.value
    assert str(problem) == "offline: trapped; online: no token"
    assert (problem.offline, problem.online, problem.__cause__) == (trapped, refused, refused)
    told = problem.to_dict()
    assert told["error"]["status"] == 401
    assert told["error"]["offline"]["message"] == "trapped"
    assert told["error"]["online"]["error"]["code"] == "UNAUTHORIZED"
    for again in (from_dict(told), pickle.loads(pickle.dumps(problem))):
        assert isinstance(again, FallbackFailed)
        assert again.to_dict() == told
        assert isinstance(again.offline, errors.ModelTrapped)


def test_a_call_that_is_cancelled_online_was_cancelled() -> None:
    with pytest.raises(ExecuteCancelled):
        call_with_fallback("m", fails(errors.ModelTrapped("x")), fails(ExecuteCancelled("x")))


def test_the_same_rules_hold_under_asyncio() -> None:
    def later(call: Any) -> Any:
        async def run() -> Any:
            await asyncio.sleep(0)
            return call()

        return run

    async def use() -> None:
        trapped = fails(errors.ModelTrapped("x"))
        assert await acall_with_fallback("m", later(lambda: 1), later(fails(AssertionError()))) == (1, "offline")
        assert await acall_with_fallback("m", later(trapped), later(lambda: 2)) == (2, "online")
        with pytest.raises(FallbackFailed):
            await acall_with_fallback("m", later(trapped), later(fails(errors.NotFoundError("y"))))
        with pytest.raises(ExecuteCancelled):
            await acall_with_fallback("m", later(fails(ExecuteCancelled("x"))), later(lambda: 2))

    asyncio.run(use())


def test_the_answer_says_which_path_it_came_by() -> None:
    assert mark(GOOD, "online") == {**GOOD, "response_meta": {"version_id": "v", "served_by": "online"}}
    assert mark({"response_data": {}}, "offline")["response_meta"] == {"served_by": "offline"}
    columnar = {"outputs": [["a"], [1]], "version_id": "v"}
    assert mark(columnar, "offline", is_columnar=True) == {**columnar, "served_by": "offline"}
    assert "served_by" not in GOOD["response_meta"]
    assert mark([1], "offline") == [1]


class Begun(StoppableFuture):
    """A call that a test ends by hand."""

    def __init__(self) -> None:
        super().__init__("m")

    def cancel(self) -> bool:
        self.set_cancelled()
        return True


def test_a_future_follows_its_call_from_one_path_to_the_other() -> None:
    offline, online = Begun(), Begun()
    call = FallbackCall("m", lambda: offline, lambda: online)
    assert not call.done()
    offline.set_exception(errors.ModelTrapped("x"))
    assert not call.done()
    online.set_result(GOOD)
    assert call.result(0)["response_meta"]["served_by"] == "online"
    assert not call.cancel()


def test_a_future_that_needs_no_fallback_begins_none() -> None:
    offline = Begun()
    call = FallbackCall("m", lambda: offline, fails(AssertionError()))
    offline.set_result(GOOD)
    assert call.result(0)["response_meta"]["served_by"] == "offline"
    refused = FallbackCall("m", fails(BadRequestError("x")), fails(AssertionError()))
    with pytest.raises(BadRequestError):
        refused.result(0)


def test_a_future_whose_call_cannot_begin_here_begins_online() -> None:
    online = Begun()
    call = FallbackCall("m", fails(errors.MissingModelError("x")), lambda: online)
    online.set_exception(errors.ForbiddenError("y"))
    with pytest.raises(FallbackFailed, match="offline: x; online: y"):
        call.result(0)
    neither = FallbackCall("m", fails(errors.MissingModelError("x")), fails(BadRequestError("y")))
    with pytest.raises(FallbackFailed):
        neither.result(0)


def test_cancelling_stops_the_path_that_is_under_way_and_begins_no_other() -> None:
    offline, online = Begun(), Begun()
    call = FallbackCall("m", lambda: offline, fails(AssertionError()))
    assert call.cancel()
    assert offline.cancelled()
    call = FallbackCall("m", fails(errors.MissingModelError("x")), lambda: online)
    assert call.cancel()
    assert online.cancelled()
    with pytest.raises(ExecuteCancelled):
        call.result(0)


def test_a_future_over_real_sockets_goes_online() -> None:
    offline: Future[Any] = Future()
    with serving(good) as server, client(server) as online:
        call = FallbackCall("m", lambda: offline, lambda: online.submit(opened()))
        offline.set_exception(errors.ReplicaDied("x"))
        assert call.result(MORE_THAN_ENOUGH)["response_meta"] == {"version_id": "v", "served_by": "online"}


def test_an_answer_that_cannot_be_finished_fails_the_call() -> None:
    offline = Begun()
    call = FallbackCall("m", lambda: offline, fails(AssertionError()), lambda answer, path: fails(SparkError("x"))())
    offline.set_result(GOOD)
    with pytest.raises(SparkError, match="x"):
        call.result(0)
