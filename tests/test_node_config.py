"""The Node SDK's configuration as it stands, and the packages that it names in every possible way."""

import asyncio
import base64
import io
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from online_help import Peer, Received, free_port, in_turn, reply, serving

from spark_runtime.errors import BadRequestError, ModelNotFound, ModelUnusable
from spark_runtime.models.binary import Binary
from spark_runtime.models.registry import identify
from spark_runtime.node_config import NodeConfig, from_config

PACKAGE = b"PK\x03\x04" + bytes(range(256)) * 40
ENCODED = base64.b64encode(PACKAGE).decode()
ENDPOINT = {"url": "https://excel.example.com", "tenant": "acme", "authType": "public"}
MODEL = {"versionId": "v1", "type": "base64", "binary": ENCODED}


# --- the whole ---


def test_a_configuration_is_taken_as_it_stands() -> None:
    found = from_config(
        {
            "sparkEndpoint": {
                "url": "https://excel.example.com",
                "tenant": "acme",
                "authType": "bearerToken",
                "syntheticKey": "unused",
                "bearerToken": lambda: "token",
            },
            "nodegenModels": [
                {
                    "versionId": "v1",
                    "type": "base64",
                    "binary": ENCODED,
                    "preventCleanup": True,
                    "replica": 3,
                    "metaData": {
                        "EngineInformation": {
                            "ProductName": "sales",
                            "ServiceName": "volume",
                            "VersionId": "other",
                            "Revision": "1.2.0",
                            "Anything": {"else": [1]},
                        },
                        "More": 1,
                    },
                },
                {"versionId": "v2", "binary": PACKAGE, "metaData": {}},
            ],
            "offlineMaxService": 5,
            "timeout": 1500,
        }
    )
    first, second = found.models
    assert (first.version_id, first.replicas, first.keep) == ("v1", 3, True)
    assert (second.version_id, second.replicas, second.keep) == ("v2", 1, False)
    assert first.binary.load() == second.binary.load() == PACKAGE
    identity = identify("stem", "ab" * 32, first.told, version_id=first.version_id)
    assert (identity.uri, identity.version_id) == ("sales/volume[1.2.0]", "v1")
    assert (found.max_models, found.timeout) == (5, 1.5)
    assert found.endpoint is not None
    assert (found.endpoint.auth, found.endpoint.timeout) == ("bearerToken", 1.5)
    assert callable(found.endpoint.credential)
    assert ENCODED[:20] not in repr(found)


def test_both_spellings_of_the_models_are_known_and_only_one_is_used() -> None:
    assert from_config({"nodeGenModels": [MODEL]}).models[0].version_id == "v1"
    with pytest.raises(BadRequestError, match="both nodegenModels and nodeGenModels"):
        from_config({"nodeGenModels": [MODEL], "nodegenModels": []})


def test_defaults_are_those_of_the_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OFFLINE_MAX_SERVICE", raising=False)
    found = from_config({"nodegenModels": [MODEL]})
    assert (found.max_models, found.timeout, found.endpoint) == (20, 60, None)


def test_the_environment_says_how_many_models_are_kept_where_the_configuration_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OFFLINE_MAX_SERVICE", "7")
    assert from_config({"nodegenModels": [MODEL]}).max_models == 7
    assert from_config({"nodegenModels": [MODEL], "offlineMaxService": 8}).max_models == 8
    for wrong in ("many", "0", "-1", "1.5", "9" * 20):
        monkeypatch.setenv("OFFLINE_MAX_SERVICE", wrong)
        with pytest.raises(BadRequestError, match="OFFLINE_MAX_SERVICE is"):
            from_config({"nodegenModels": [MODEL]})


@pytest.mark.parametrize("models", [{}, {"nodegenModels": []}, {"nodegenModels": None}, {"nodeGenModels": []}])
def test_without_models_everything_is_online_and_without_an_endpoint_nothing_is(models: Any) -> None:
    found = from_config({"sparkEndpoint": ENDPOINT, **models})
    assert found.models == ()
    assert found.endpoint is not None
    for nothing in ({}, {"sparkEndpoint": None}):
        with pytest.raises(BadRequestError, match=r"has neither models \(nodegenModels\) nor an endpoint"):
            from_config({**nothing, **models})


def test_all_keys_that_are_not_known_are_named_in_one_error() -> None:
    with pytest.raises(BadRequestError) as caught:
        from_config(
            {
                "sparkEndpont": ENDPOINT,
                "sparkEndpoint": {**ENDPOINT, "apiKey": "secret"},
                "nodegenModels": [MODEL, {**MODEL, "versionID": "v", "keep": 1}],
                "logger": True,
            }
        )
    text = str(caught.value)
    named = "sparkEndpont, logger, sparkEndpoint.apiKey, nodegenModels[1].versionID, nodegenModels[1].keep. There are"
    assert named in text
    assert "preventCleanup" in text
    assert "secret" not in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"nodegenModels": {}}, "nodegenModels is an object, not a list of models"),
        ({"nodegenModels": ["x"]}, r"nodegenModels\[0\] is 'x', not an object"),
        ({"nodegenModels": [{"binary": "x"}]}, r"nodegenModels\[0\].versionId is missing, not a text"),
        ({"nodegenModels": [{"versionId": 5, "binary": "x"}]}, r"versionId is 5, not a text"),
        ({"nodegenModels": [{"versionId": "v"}]}, r"binary is missing, not base64, bytes, a path"),
        ({"nodegenModels": [{"versionId": "v", "binary": ["x"]}]}, r"binary is a list, not base64"),
        ({"nodegenModels": [{**MODEL, "type": 1}]}, "type is 1, not a text"),
        ({"nodegenModels": [{**MODEL, "replica": 0}]}, "replica is 0, not a whole number from 1 to 1024"),
        ({"nodegenModels": [{**MODEL, "replica": True}]}, "replica is True"),
        ({"nodegenModels": [{**MODEL, "replica": "2"}]}, "replica is '2'"),
        ({"nodegenModels": [{**MODEL, "preventCleanup": "yes"}]}, "preventCleanup is 'yes', not true or false"),
        ({"nodegenModels": [{**MODEL, "metaData": 1}]}, "metaData is 1, not an object"),
        ({"nodegenModels": [{**MODEL, "metaData": {"EngineInformation": []}}]}, "EngineInformation is a list"),
        ({"nodegenModels": [MODEL, {**MODEL, "versionId": "V1"}]}, "two models have the versionId 'V1'"),
        ({"nodegenModels": [MODEL], "timeout": 0}, "timeout is 0, not a number of milliseconds above 0"),
        ({"nodegenModels": [MODEL], "timeout": "60"}, "timeout is '60'"),
        ({"nodegenModels": [MODEL], "offlineMaxService": 0}, "offlineMaxService is 0, not a whole number"),
        ({"sparkEndpoint": []}, "sparkEndpoint is a list, not an object"),
        ({"sparkEndpoint": {}}, "sparkEndpoint.url is missing, not a text"),
        ({"sparkEndpoint": {"url": "https://a"}}, "sparkEndpoint.tenant is missing"),
        ({"sparkEndpoint": {"url": "a", "tenant": "b"}}, "endpoint: url is 'a', not such as https"),
        ({"sparkEndpoint": {**ENDPOINT, "authType": "basic"}}, "authType is 'basic', not one of public, syntheticKey"),
        ({"sparkEndpoint": {**ENDPOINT, "authType": "syntheticKey"}}, "syntheticKey is nothing, not a text or a func"),
        (
            {"sparkEndpoint": {**ENDPOINT, "authType": "bearerToken", "bearerToken": 5}},
            "bearerToken is int, not a text or a function",
        ),
        (
            {"sparkEndpoint": {"url": "https://a", "tenant": "b", "bearerToken": "x", "syntheticKey": "y"}},
            "has syntheticKey and bearerToken; authType says which",
        ),
    ],
)
def test_what_makes_no_sense_is_named_with_its_place(config: Any, words: str) -> None:
    with pytest.raises(BadRequestError, match=words):
        from_config(config)


@pytest.mark.parametrize(
    ("given", "auth", "credential"),
    [
        ({}, "public", None),
        ({"authType": "public", "bearerToken": "unused"}, "public", None),
        ({"syntheticKey": "k"}, "syntheticKey", "k"),
        ({"bearerToken": "t"}, "bearerToken", "t"),
        ({"authType": "BearerToken", "bearerToken": "t", "syntheticKey": "k"}, "bearerToken", "t"),
    ],
)
def test_the_endpoint_says_who_calls(given: Any, auth: str, credential: Any) -> None:
    found = from_config({"sparkEndpoint": {"url": "https://a", "tenant": "b", **given}}).endpoint
    assert found is not None
    assert (found.auth, found.credential) == (auth, credential)


# --- a file ---


def test_a_configuration_may_be_a_file_whose_paths_begin_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "volume.zip").write_bytes(PACKAGE)
    path = tmp_path / "spark.json"
    models = [{"versionId": "v1", "binary": "models/volume.zip"}, {"versionId": "v2", "binary": ENCODED}]
    path.write_text("\ufeff" + json.dumps({"nodegenModels": models}))
    for given in (path, str(path)):
        found: NodeConfig = from_config(given)
        assert [each.binary.load() for each in found.models] == [PACKAGE, PACKAGE]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "spark.json cannot be read: No such file"),
        ("{", "spark.json is not a configuration in JSON: .* line 1 column 2"),
        ("[]", "spark.json is a list, not an object"),
        ("{}", "spark.json has neither models"),
        ('{"nodegenModels": [{"x": 1}]}', r"spark.json has keys that are not known: nodegenModels\[0\].x"),
    ],
)
def test_a_file_that_is_no_configuration_is_told(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "spark.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BadRequestError, match=words):
        from_config(path)


# --- packages in every form ---


async def _async(version_id: str) -> Any:
    await asyncio.sleep(0)
    return PACKAGE


class _AsyncFile:
    async def read(self) -> bytes:
        return PACKAGE


FORMS: dict[str, Callable[[Path], Any]] = {
    "base64": lambda path: ENCODED,
    "base64 in lines": lambda path: base64.encodebytes(PACKAGE).decode(),
    "base64 in lines of Windows": lambda path: (
        "\r\n  " + "\r\n".join(ENCODED[i : i + 76] for i in range(0, len(ENCODED), 76))
    ),
    "base64 without its end": lambda path: ENCODED.rstrip("="),
    "base64 for addresses": lambda path: base64.urlsafe_b64encode(PACKAGE).decode(),
    "base64 as data": lambda path: "data:application/zip;base64," + ENCODED,
    "bytes": lambda path: PACKAGE,
    "bytearray": lambda path: bytearray(PACKAGE),
    "memoryview": lambda path: memoryview(PACKAGE),
    "path": lambda path: path,
    "path as text": lambda path: str(path),
    "open file": lambda path: io.BytesIO(PACKAGE),
    "open file of text": lambda path: io.StringIO(ENCODED),
    "file that is awaited": lambda path: _AsyncFile(),
    "function": lambda path: lambda version_id: PACKAGE,
    "function that gives base64": lambda path: lambda version_id: ENCODED,
    "function that gives a path": lambda path: lambda version_id: path,
    "function that gives a file": lambda path: lambda version_id: io.BytesIO(PACKAGE),
    "async function": lambda path: _async,
}


@pytest.mark.parametrize("form", FORMS)
def test_a_package_is_had_in_every_form(form: str, tmp_path: Path) -> None:
    path = tmp_path / "odd name.of a package.zip"
    path.write_bytes(PACKAGE)
    binary = Binary(FORMS[form](path), "v1")
    assert binary.load() == PACKAGE
    path.unlink()
    assert binary.load() == PACKAGE  # it was fetched once
    other = Binary(FORMS[form](path), "v1")
    path.write_bytes(PACKAGE)
    assert asyncio.run(other.aload()) == PACKAGE


def test_a_package_without_a_suffix_is_found_by_its_path_unless_it_is_said_to_be_base64(tmp_path: Path) -> None:
    (tmp_path / "abcd").write_bytes(PACKAGE)
    assert Binary("abcd", "v1", tmp_path).load() == PACKAGE
    assert Binary("abcd", "v1", tmp_path, is_encoded=True).load() == base64.b64decode("abcd")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (ENCODED[:100] + "!" + ENCODED[101:], r"line 1 column 101 \(char 100\): '!' does not belong there"),
        (ENCODED[:76] + "\n" + ENCODED[76:80] + "é" + ENCODED[81:], r"line 2 column 5 \(char 81\): '\\xe9' does"),
        (ENCODED[:80] + "=" + ENCODED[80:], r"\(char 81\): "),
        (ENCODED[:101], r"line 1 column 102 \(char 101\): the end is missing"),
        ("data:application/zip;base64,UEsD*", r"\(char 32\): '\*' does not belong there"),
        ("UEsD\0", r"\(char 4\): '\\x00' does not belong there"),
    ],
)
def test_damaged_base64_is_told_with_its_position(text: str, words: str) -> None:
    with pytest.raises(ModelUnusable, match="the binary of version v1 is damaged base64 at .*" + words):
        Binary(text, "v1").load()


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        (lambda path: str(path / "nothing.zip"), ModelNotFound, "version v1: there is no file .*nothing.zip"),
        (lambda path: path / "nothing", ModelNotFound, "there is no file"),
        (lambda path: path, ModelUnusable, "is the file .*, which cannot be read: Is a directory"),
        (lambda path: b"", ModelUnusable, "the binary of version v1 is empty"),
        (lambda path: "   ", ModelUnusable, "is empty"),
        (lambda path: lambda version_id: 5, ModelUnusable, "is int, not base64, bytes, a path, a file or an address"),
        (lambda path: lambda version_id: None, ModelUnusable, "is NoneType, not base64"),
        (lambda path: lambda version_id: {}["x"], ModelUnusable, "cannot be had: KeyError: 'x'"),
        (lambda path: lambda: b"x", ModelUnusable, "cannot be had: TypeError"),
    ],
)
def test_a_package_that_cannot_be_had_is_told(tmp_path: Path, given: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        Binary(given(tmp_path), "v1").load()


def test_a_function_is_called_with_the_version_at_the_first_use_and_once() -> None:
    asked: list[str] = []
    gate, waiting = threading.Event(), threading.Semaphore(0)

    def fetch(version_id: str) -> bytes:
        asked.append(version_id)
        gate.wait(30)
        return PACKAGE

    binary = from_config({"nodegenModels": [{"versionId": "v1", "binary": fetch}]}).models[0].binary
    assert asked == []
    found: list[bytes] = []

    def use() -> None:
        waiting.release()
        found.append(binary.load())

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert waiting.acquire(timeout=30)
    gate.set()
    for thread in threads:
        thread.join(30)
    assert found == [PACKAGE] * 8
    assert asked == ["v1"]


def test_an_async_function_is_called_once_for_many_tasks_on_their_loop() -> None:
    loops: list[asyncio.AbstractEventLoop] = []

    async def fetch(version_id: str) -> bytes:
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0.01)
        return PACKAGE

    async def use() -> None:
        binary = Binary(fetch, "v1")
        assert await asyncio.gather(*(binary.aload() for _ in range(4))) == [PACKAGE] * 4
        assert loops == [asyncio.get_running_loop()]
        assert Binary(fetch, "v1").load() == PACKAGE  # with a loop on this very thread
        assert loops[1] is not loops[0]

    asyncio.run(use())


def test_a_function_that_failed_is_called_again_by_the_next_call() -> None:
    left = [ValueError("not yet"), None]

    def fetch(version_id: str) -> bytes:
        problem = left.pop(0)
        if problem is not None:
            raise problem
        return PACKAGE

    binary = Binary(fetch, "v1")
    with pytest.raises(ModelUnusable, match="ValueError: not yet"):
        binary.load()
    assert binary.load() == PACKAGE
    assert left == []


def test_a_function_that_hangs_is_given_up() -> None:
    gate = threading.Event()
    binary = Binary(lambda version_id: str(gate.wait(30)), "v1")
    with pytest.raises(ModelUnusable, match=r"the binary of version v1 did not come within 0\.05 s"):
        binary.load(0.05)

    async def never(version_id: str) -> bytes:
        await asyncio.Event().wait()
        return b""

    with pytest.raises(ModelUnusable, match="did not come within"):
        Binary(never, "v1").load(0.05)
    gate.set()


# --- packages from an address ---


def test_a_package_is_fetched_from_an_address() -> None:
    with serving(in_turn(reply(503), reply(200, PACKAGE))) as server:
        binary = Binary(f" {server.url}/a.zip?signature=secret\n", "v1")
        assert binary.load() == binary.load() == PACKAGE
        assert [each.method + each.path for each in server.received] == ["GET/a.zip?signature=secret"] * 2
        assert Binary(lambda version_id: f"{server.url}/{version_id}", "v1").load() == PACKAGE
        assert server.received[-1].path == "/v1"


def test_a_package_that_moved_is_followed() -> None:
    def answer(received: Received, peer: Peer) -> bytes:
        if received.path != "/there":
            return reply(302, b"", Location="/there")
        return reply(200, PACKAGE)

    with serving(answer) as server:
        assert Binary(server.url, "v1").load() == PACKAGE


def test_a_package_that_moves_without_end_or_to_an_odd_place_is_not_followed() -> None:
    def answer(received: Received, peer: Peer) -> bytes:
        return reply(301, b"", Location="/next")

    with serving(answer) as server, pytest.raises(ModelUnusable, match="leads from one address to the next"):
        Binary(server.url, "v1").load()
    with (
        serving(in_turn(reply(302, b"", Location="file:///etc/passwd"))) as server,
        pytest.raises(ModelUnusable, match="which is not as safe"),
    ):
        Binary(server.url, "v1").load()


def test_an_address_that_does_not_answer_is_told_without_what_may_be_a_key() -> None:
    with serving(in_turn(reply(403, b""))) as server:
        with pytest.raises(ModelUnusable, match=r"cannot be fetched: .*/a\.zip answers 403") as caught:
            Binary(f"{server.url}/a.zip?signature=secret", "v1").load()
        assert "secret" not in str(caught.value)
    with pytest.raises(ModelUnusable, match="refuses the connection"):
        Binary(f"http://127.0.0.1:{free_port()}/?secret", "v1").load()


def test_an_address_that_drips_is_given_up() -> None:
    start = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"
    with (
        serving(lambda received, peer: peer.drip(start, b" ")) as server,
        pytest.raises(ModelUnusable, match="did not come within"),
    ):
        Binary(server.url, "v1").load(0.3)
