"""Neuron packages answer as the vendor's own runner answers, to hundreds of requests, odd ones among them."""

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from models_help import PACKAGES
from wasm_runner import NotInstalled, WasmRunner, install

from spark_runtime import Model, Spark
from spark_runtime.errors import AnswerInvalid, ExecuteError

# They install the runner from npm and start a Node.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

OWN, XCALL, ECHO = PACKAGES / "own-model.zip", PACKAGES / "own-xcall.zip", PACKAGES / "wat-echo.zip"
MODELS = {"own": OWN, "xcall": XCALL, "echo": ECHO, "F/own": OWN}
ROUNDS = 400


@pytest.fixture(scope="module")
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WasmRunner]:
    cache = getattr(request.config, "cache", None)  # absent with -p no:cacheprovider
    folder = Path(cache.mkdir("wasm-runner")) if cache else tmp_path_factory.mktemp("wasm-runner")
    try:
        install(folder)
    except NotInstalled as reason:
        pytest.skip(str(reason))
    ids = {name.replace("/", "-"): path for name, path in MODELS.items()}  # the runner makes folders of these names
    with WasmRunner(folder, ids, target="F-own") as runner:
        yield runner


@pytest.fixture
def spark(tmp_path: Path) -> Iterator[Spark]:
    models = [Model(name, path) for name, path in MODELS.items()]
    with Spark(models, timeout=60, cache_dir=tmp_path / "cache") as spark:
        yield spark


def comparable(value: Any) -> Any:
    """Return an answer with numbers as doubles, without times."""
    if isinstance(value, dict):
        return {name: comparable(each) for name, each in value.items() if name != "process_time"}
    if isinstance(value, list):
        return [comparable(each) for each in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value)
        return "NaN" if math.isnan(number) else number
    return value


def odd_value(chance: random.Random) -> Any:
    """Return something that somebody might send for a number."""
    return chance.choice(
        [
            chance.uniform(-1e3, 1e3),
            chance.randrange(-(10**6), 10**6),
            chance.choice([0, -0.0, 1e-300, 1e300, 2**53 + 2, 0.1 + 0.2, -1]),
            str(chance.uniform(0, 10)),
            chance.choice(["", "x", "1e3", " 7", "ü€😀", 'a"b\\c', "\u2028", "NaN"]),
            chance.choice([None, True, False, [], {}, [1, [2, {"radius": 3}]], {"height": 4}]),
        ]
    )


def odd_request(chance: random.Random) -> dict[str, Any]:
    """Return a whole request, usual or odd."""
    inputs: dict[str, Any] = {}
    for name in chance.sample(["radius", "height", "Radius", "note", "calls", "ünïcode", "", "list"], k=4):
        inputs[name] = odd_value(chance)
    if chance.random() < 0.1:
        inputs["padding"] = "p" * chance.choice([1, 4095, 4096, 4097, 100_000])
    meta: dict[str, Any] = {}
    if chance.random() < 0.5:
        meta["version_id"] = chance.choice(["3f2c", "", "a" * 90, "ü", "x\\y"])
    if chance.random() < 0.3:
        meta["allow_range_address"] = chance.choice([True, False, None])
    if chance.random() < 0.2:
        meta["service_category"] = chance.choice(["metadata", "Metadata, other", "formspec", "x", ""])
    if chance.random() < 0.2:
        meta["call_purpose"] = odd_value(chance)
    return {"request_data": {"inputs": inputs}, "request_meta": meta}


@pytest.mark.parametrize("model", ["own", "xcall"])
def test_answers_to_hundreds_of_requests_are_the_runners_own(runner: WasmRunner, spark: Spark, model: str) -> None:
    chance = random.Random(f"requests of {model}")
    for number in range(ROUNDS):
        request = odd_request(chance)
        theirs = runner.ask(model, request)
        if "error" in theirs:  # what the model wrote is no JSON: it says inf or nan
            with pytest.raises(AnswerInvalid):
                spark.execute(request, model)
        else:
            assert comparable(spark.execute(request, model)) == comparable(theirs["answer"]), (number, request)


def test_a_model_sees_as_many_bytes_as_the_runner_shows_it(runner: WasmRunner, spark: Spark) -> None:
    chance = random.Random("bytes")
    for number in range(ROUNDS // 4):
        inputs = {f"n{chance.randrange(9)}": chance.choice([chance.randrange(10**9), "ü" * chance.randrange(99), None])}
        request = {"request_data": {"inputs": inputs}, "request_meta": {"version_id": "v" * chance.randrange(9)}}
        assert spark.execute(request, "echo") == runner.ask("echo", request)["answer"], (number, request)


@pytest.mark.parametrize(
    "request_",
    [
        {"inputs": [["radius"], [1], [2]], "version_id": "v4"},
        {"request_meta": {"version_id": "only meta"}},
    ],
)
def test_odd_forms_of_requests_are_answered_alike(runner: WasmRunner, spark: Spark, request_: dict[str, Any]) -> None:
    theirs = comparable(runner.ask("own", request_)["answer"])
    ours = comparable(spark.execute(request_, "own"))
    for answer in (ours, theirs):
        del answer["response_data"]["outputs"]["calls"]  # theirs has been called before
    assert ours == theirs


def test_calls_of_another_service_are_answered_alike(runner: WasmRunner, spark: Spark) -> None:
    for radius in (1, 2.5, -3):
        request = {"request_data": {"inputs": {"radius": radius, "height": 2, "xcall": 1}}, "request_meta": {}}
        theirs, ours = runner.ask("xcall", request)["answer"], spark.execute(request, "xcall")
        for answer in (ours, theirs):
            del answer["response_data"]["outputs"]["calls"]
            del answer["response_data"]["outputs"]["down"]["response_data"]["outputs"]["calls"]
        assert comparable(ours) == comparable(theirs)
        assert ours["response_data"]["outputs"]["down"]["xcall_meta"]["http_status_code"] == 202


@pytest.mark.parametrize("inputs", [{"alloc_mb": 40}, {"alloc_mb": 6000}, {"spin": 1}])
def test_memory_and_time_are_given_and_refused_alike(runner: WasmRunner, spark: Spark, inputs: dict[str, Any]) -> None:
    request = {"request_data": {"inputs": {"radius": 2, "height": 2, **inputs}}, "request_meta": {}}
    ours, theirs = spark.execute(request, "own"), runner.ask("own", request)["answer"]
    assert ours["response_data"]["outputs"]["volume"] == theirs["response_data"]["outputs"]["volume"]


@pytest.mark.parametrize("boom", [1, 2, 3])
def test_what_fails_there_fails_here(runner: WasmRunner, spark: Spark, boom: int) -> None:
    request = {"request_data": {"inputs": {"boom": boom}}, "request_meta": {}}
    assert "error" in runner.ask("own", request)
    with pytest.raises(ExecuteError):
        spark.execute(request, "own")
    assert spark.execute({"radius": 1, "height": 1}, "own")["response_data"]["outputs"]["calls"] == 1
