"""Neuron packages on replicas: requests and their envelopes, failures, cancelling, and calls of other services."""

import copy
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import spark as run_command
from models_help import JSON, PACKAGES, is_alive, replica_pids, serving, until, wait_computing, wait_in_service
from neuron_help import ECHO, answering, package_from, package_of

from spark_runtime import Model, Spark
from spark_runtime.errors import (
    AnswerInvalid,
    BadRequestError,
    ExecuteCancelled,
    ExecuteError,
    ExecuteTimeout,
    ModelTrapped,
    ModelUnusable,
)

OWN, XCALL, SMALLEST = PACKAGES / "own-model.zip", PACKAGES / "own-xcall.zip", PACKAGES / "wat-echo.zip"
SPIN = "(loop $l (br $l)) unreachable"

#: Answers with what another service answers to the text at 4096, which ends in a zero byte.
ASKS = """(local.set $at (call $dispatch (i32.const 0) (i32.const 4096) (i32.const {length})))
  (local.set $end (local.get $at))
  (block $found (loop $next
    (br_if $found (i32.eqz (i32.load8_u (local.get $end))))
    (local.set $end (i32.add (local.get $end) (i32.const 1))) (br $next)))
  (call $say (local.get $at) (i32.sub (local.get $end) (local.get $at)) (local.get $length))"""
DISPATCH = '(import "env" "__asyncjs__dispatch" (func $dispatch (param i32 i32 i32) (result i32)))'


@pytest.fixture
def spark() -> Iterator[Spark]:
    models = [Model("own", OWN), Model("xcall", XCALL), Model("echo", SMALLEST)]
    with Spark(models, timeout=30) as spark:
        yield spark
        spark.close()  # what still runs is not waited for


@pytest.fixture
def package(tmp_path: Path) -> Callable[..., Path]:
    """Writes a small package; see `neuron_help`."""

    def write(name: str, calculate: str, *more: str) -> Path:
        path = tmp_path / f"{name}.zip"
        path.write_bytes(package_from(calculate, *more))
        return path

    return write


@pytest.fixture
def asking(package: Callable[..., Path]) -> Callable[..., Path]:
    """Writes a package that answers with what another service answers."""

    def write(name: str, service: str, **fields: Any) -> Path:
        asked = {
            "folder_name": "F",
            "service_name": service,
            "request_body": '{"request_data":{"inputs":{}}}',
            **fields,
        }
        text = json.dumps(asked)
        escaped = "".join(f"\\{byte:02x}" for byte in text.encode())
        calculate = f"(local $at i32) (local $end i32) {ASKS.format(length=len(text.encode()))}"
        return package(name, calculate, DISPATCH, f'(data (i32.const 4096) "{escaped}")')

    return write


# --- requests --------------------------------------------------------------------------------------------------------


def test_plain_inputs_and_whole_requests_are_answered_alike(spark: Spark) -> None:
    plain = spark.execute({"radius": 3, "height": 5}, "own")
    whole = spark.execute({"request_data": {"inputs": {"radius": 3, "height": 5}}, "request_meta": {}}, "own")
    assert plain["response_data"]["outputs"]["volume"] == pytest.approx(141.371669411541)
    assert plain["response_data"]["outputs"]["volume"] == whole["response_data"]["outputs"]["volume"]
    assert plain["response_meta"]["system"] == "SPARK"


def test_bytes_are_passed_on_and_come_back_as_they_are(spark: Spark) -> None:
    answer = spark.execute(b'{"radius":1,"height":1}', "own")
    assert isinstance(answer, bytes)
    assert json.loads(answer)["response_data"]["outputs"]["volume"] == pytest.approx(3.14159265358979)


def test_the_callers_request_is_not_changed_and_its_context_not_shown_to_the_model(spark: Spark) -> None:
    request = {"request_data": {"inputs": {"a": 1}}, "request_meta": {"version_id": "x"}}
    with_context = copy.deepcopy(request)
    with_context["request_meta"]["_ctx"] = {"authorization": "Bearer secret", "tenant": "t"}
    before = copy.deepcopy(with_context)
    shown = [spark.execute(each, "echo")["response_data"]["outputs"]["bytes_in"] for each in (request, with_context)]
    seen = {**request, "request_meta": {"version_id": "x", "allow_range_address": False}}
    assert shown[0] == shown[1] == len(json.dumps(seen, separators=(",", ":")))
    assert with_context == before


@pytest.mark.parametrize("request_", ["text", 3, [1], None, {"request_meta": 3}])
def test_what_no_neuron_model_can_be_asked_is_refused_before_it_is_sent(spark: Spark, request_: Any) -> None:
    with pytest.raises(BadRequestError):
        spark.execute(request_, "own")


def test_metadata_come_from_the_package_without_running_it(spark: Spark) -> None:
    request = {"request_meta": {"service_category": "Metadata"}}
    answer = spark.execute(request, "own")
    assert answer["response_data"]["outputs"] == {"Metadata.Title": "own", "Logo": "AAAA"}
    assert replica_pids(spark) == []
    assert spark.submit(request, "own").result(0) == answer
    assert list(spark.map("own", [request, request])) == [answer, answer]
    assert replica_pids(spark) == []


def test_metadata_with_inputs_are_added_to_what_the_model_answers(spark: Spark) -> None:
    request = {"request_data": {"inputs": {"radius": 1}}, "request_meta": {"service_category": "metadata"}}
    outputs = spark.execute(request, "own")["response_data"]["outputs"]
    assert outputs["Metadata.Title"] == "own"
    assert outputs["volume"] == pytest.approx(12.5663706143592)


def test_map_wraps_every_row_and_keeps_their_order(spark: Spark) -> None:
    rows = [{"radius": n, "height": 1} for n in range(200)]
    volumes = [each["response_data"]["outputs"]["volume"] for each in spark.map("own", rows)]
    assert volumes == [pytest.approx(3.14159265358979 * n * n) for n in range(200)]


def test_four_replicas_share_the_calls() -> None:
    with Spark([Model("own", OWN, replicas=4)], timeout=30) as spark:
        spark.load()
        wait_in_service(spark, 4)
        calls = [spark.submit({"radius": n, "height": 1}) for n in range(400)]
        for n, call in enumerate(calls):
            assert call.result()["response_data"]["outputs"]["volume"] == pytest.approx(3.14159265358979 * n * n)
        assert {call.replica for call in calls} == {1, 2, 3, 4}


def test_exports_are_called_by_their_names_in_c(spark: Spark) -> None:
    assert spark.call("own", "is_async", 0) == 0
    assert spark.call("own", "malloc", 16) > 0


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("boom", "said"), [(1, "abort"), (2, "outside of its bounds"), (3, "unreachable")])
def test_a_failing_request_says_what_happened_where_and_harms_no_other(spark: Spark, boom: int, said: str) -> None:
    with pytest.raises(ModelTrapped, match=said) as caught:
        spark.execute({"boom": boom}, "own")
    assert str(caught.value).startswith("model 'own', replica 1: ")
    assert caught.value.details["backtrace"][0].startswith("node_calc_v3 ")
    pids = replica_pids(spark)
    assert spark.execute({}, "own")["response_data"]["outputs"]["calls"] == 1
    assert replica_pids(spark) == pids  # a new instance, not a new process


def test_an_answer_that_is_no_json_is_told(spark: Spark) -> None:
    with pytest.raises(AnswerInvalid, match="not JSON"):
        spark.execute({"radius": "NaN"}, "own")


def test_a_thousand_bad_requests_poison_nothing(spark: Spark) -> None:
    calls = [spark.submit({"boom": 1 + n % 3}, "own") for n in range(1000)]
    assert all(isinstance(call.exception(), ModelTrapped) for call in calls)
    assert spark.execute({"radius": 1, "height": 1}, "own")["response_data"]["outputs"]["calls"] == 1
    assert len(replica_pids(spark)) == 1


@pytest.mark.parametrize("interrupt", ["kill", "epoch"])
def test_a_hung_model_is_stopped_by_cancel_and_time_out(interrupt: str) -> None:
    with Spark([Model("own", OWN, interrupt=interrupt)], timeout=30) as spark:
        spark.execute({})
        call = spark.submit({"spin": -1})
        wait_computing(spark)
        assert call.cancel()
        with pytest.raises(ExecuteCancelled):
            call.result()
        with pytest.raises(ExecuteTimeout):
            spark.execute({"spin": -1}, timeout=0.05)
        assert spark.execute({"radius": 1, "height": 1})["response_data"]["outputs"]["calls"] == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"PK\x03\x04 and no more", "the package cannot be used"),
        (package_of(b"\0asm\1\0\0\0"), "does not say which export is"),
        (package_of(b"\0asm\1\0\0\0" + b"\xff" * 100_000), "module cannot be read"),
        (OWN.read_bytes()[:20_000], "the package cannot be used"),
    ],
)
def test_a_corrupt_package_is_told_at_once(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "corrupt.zip"
    path.write_bytes(content)
    with Spark([Model("bad", path)], timeout=30) as spark, pytest.raises(ModelUnusable, match=said) as caught:
        spark.execute({})
    assert "\n" not in str(caught.value)


def test_kind_and_engine_must_fit_the_file() -> None:
    cases = [
        (Model("m", OWN, kind="plain"), "is a zip"),
        (Model("m", JSON, kind="neuron"), "is a module"),
        (Model("m", OWN, engine="wasmer", python="python3.10"), "run on wasmtime"),
    ]
    for model, said in cases:
        with Spark([model], timeout=30) as spark, pytest.raises(ModelUnusable, match=said):
            spark.execute({})


def test_a_prepared_package_is_compiled_once(tmp_path: Path) -> None:
    for is_cached in (0, 1):
        with Spark([Model("own", OWN, kind="neuron")], timeout=30, cache_dir=tmp_path) as spark:
            spark.execute({})
            assert spark.statistics().cached == is_cached


def test_a_rebuilt_package_takes_the_place_of_the_old(tmp_path: Path) -> None:
    path = tmp_path / "model.zip"
    for text in ('{"build": 1}', '{"build": 2}'):
        calculate, data = answering(text)
        path.write_bytes(package_from(calculate, more=data))
        if text == '{"build": 1}':
            spark = Spark([Model("m", path)], timeout=30)
        with_new = spark.reload("m")
        assert spark.execute({}, "m") == json.loads(text), with_new
    spark.close()


# --- calls of other services -----------------------------------------------------------------------------------------


def test_a_model_calls_another_one_and_gets_its_answer() -> None:
    with Spark([Model("caller", XCALL), Model("F/own", OWN)], timeout=30) as spark:
        outputs = spark.execute({"radius": 2, "height": 1, "xcall": 1}, "caller")["response_data"]["outputs"]
    down = outputs["down"]
    assert down["response_data"]["outputs"]["volume"] == pytest.approx(3.14159265358979 * 16)
    assert down["xcall_meta"] == {"http_status_code": 202, "http_response_time": 0, "error_details": None}


def test_the_first_version_of_the_protocol_wraps_answers_otherwise(
    asking: Callable[..., Path], package: Callable[..., Path]
) -> None:
    target = package("target", *_answering('{"x": 1}'))
    with Spark([Model("a", asking("a", "b")), Model("F/b", target)], timeout=30) as spark:
        answer = spark.execute({}, "a")
    assert answer["data"] == {"x": 1}
    assert answer["metadata"]["name"] == "folders/F/services/b"
    assert answer["metadata"]["status"] == 202


def test_a_service_is_found_by_what_its_package_says(asking: Callable[..., Path]) -> None:
    caller = asking("caller", "own_model", folder_name="local", xcall_version=2)
    with Spark([Model("a", caller), Model("anything", OWN)], timeout=30) as spark:
        assert spark.execute({}, "a")["response_data"]["outputs"]["calls"] == 1


def test_a_service_that_is_not_here_is_named(spark: Spark) -> None:
    with pytest.raises(ExecuteError, match="folder 'F', service 'own'") as caught:
        spark.execute({"xcall": 1}, "xcall")
    assert "model 'xcall', replica 1" in str(caught.value)
    assert spark.execute({}, "xcall")["response_data"]["outputs"]["calls"] == 1


def test_a_model_that_calls_itself_is_told_so_and_does_not_wait() -> None:
    with Spark([Model("F/own", XCALL)], timeout=30) as spark:
        with pytest.raises(ExecuteError, match="'F/own' → 'F/own'"):
            spark.execute({"xcall": 1})
        assert spark.execute({})["response_data"]["outputs"]["calls"] == 1


def test_a_circle_of_calls_names_its_chain(asking: Callable[..., Path]) -> None:
    models = [Model("F/a", asking("a", "b")), Model("F/b", asking("b", "c")), Model("F/c", asking("c", "a"))]
    with Spark(models, timeout=30) as spark, pytest.raises(ExecuteError, match="'F/a' → 'F/b' → 'F/c' → 'F/a'"):
        spark.execute({}, "F/a")


def test_a_chain_of_calls_ends_after_fifteen(asking: Callable[..., Path], package: Callable[..., Path]) -> None:
    end = package("end", *_answering('{"end": true}'))
    models = [Model(f"F/{n}", asking(f"m{n}", str(n + 1), xcall_version=3)) for n in range(16)]
    with Spark([*models, Model("F/16", end)], timeout=30) as spark:
        assert spark.execute({}, "F/1")["end"] is True  # fifteen
        with pytest.raises(ExecuteError, match="16 calls in a chain, and 15 may be"):
            spark.execute({}, "F/0")


def test_the_others_failure_reaches_the_caller_with_both_names(
    asking: Callable[..., Path], package: Callable[..., Path]
) -> None:
    models = [Model("a", asking("a", "b")), Model("F/b", package("b", "unreachable"))]
    said = r"model 'a', replica 1: .*model 'F/b', replica 1: .*unreachable"
    with Spark(models, timeout=30) as spark, pytest.raises(ExecuteError, match=said):
        spark.execute({}, "a")


@pytest.mark.parametrize("interrupt", ["kill", "epoch"])
def test_stopping_the_outer_call_stops_the_inner_one(
    asking: Callable[..., Path], package: Callable[..., Path], interrupt: str
) -> None:
    hung = f"(if (i32.lt_u (local.get $count) (i32.const 80)) (then {SPIN})) {ECHO}"
    models = [Model("a", asking("a", "b"), interrupt=interrupt), Model("F/b", package("b", hung))]
    with Spark(models, timeout=30) as spark:
        call = spark.submit({}, "a")
        until(lambda: list(serving(spark).values()) == ["busy", "busy"])
        assert call.cancel()
        with pytest.raises(ExecuteCancelled):
            call.result()
        until(lambda: "busy" not in serving(spark).values())
        assert spark.execute({"text": "x" * 80}, "F/b")


def test_the_inner_call_has_no_more_time_than_the_outer_one(
    asking: Callable[..., Path], package: Callable[..., Path]
) -> None:
    with Spark([Model("a", asking("a", "b")), Model("F/b", package("b", SPIN))], timeout=30) as spark:
        with pytest.raises(ExecuteError) as caught:
            spark.execute({}, "a", timeout=0.3)
        assert isinstance(caught.value, ExecuteTimeout) or "no answer in time" in str(caught.value)
        until(lambda: "busy" not in serving(spark).values())


@pytest.mark.parametrize("size", [100, 300_000, 5_000_000])
def test_answers_of_other_services_may_be_long(
    asking: Callable[..., Path], package: Callable[..., Path], size: int
) -> None:
    # The target answers with a long text; after room for its request there is room for that.
    target = f"""(memory.fill (local.get $in) (i32.const 97) (i32.const {size}))
      (i32.store8 (local.get $in) (i32.const 34))
      (i32.store8 (i32.add (local.get $in) (i32.const {size})) (i32.const 34))
      (call $say (local.get $in) (i32.const {size + 1}) (local.get $length))"""
    grown = f"(drop (call $malloc (i32.const {size}))) {target}"
    with Spark([Model("a", asking("a", "b")), Model("F/b", package("b", grown))], timeout=30) as spark:
        for _ in range(2):
            assert len(spark.execute({}, "a")["data"]) == size - 1  # its caller reads the answer by itself
        assert len(spark.submit({}, "a").result()["data"]) == size - 1


def test_work_that_comes_while_a_model_waits_is_done_afterwards_in_order(
    asking: Callable[..., Path], package: Callable[..., Path]
) -> None:
    target = package("b", *_answering("1"))
    with Spark([Model("a", asking("a", "b")), Model("F/b", target)], timeout=30) as spark:
        answers = list(spark.map("a", [{"n": n} for n in range(500)]))
    assert [each["data"] for each in answers] == [1] * 500


def test_callers_on_many_threads_have_their_calls_of_services_answered(
    asking: Callable[..., Path], package: Callable[..., Path]
) -> None:
    found: list[Any] = []
    models = [Model("a", asking("a", "b"), replicas=2), Model("F/b", package("b", *_answering("7")))]
    with Spark(models, timeout=30) as spark:

        def work() -> None:
            found.extend(spark.execute({}, "a")["data"] for _ in range(40))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    assert found == [7] * 160


def test_an_idle_spark_with_packages_ends_its_processes() -> None:
    with Spark([Model("own", OWN, replicas=2)], timeout=30) as spark:
        spark.execute({})
        pids = wait_in_service(spark, 2)
    limit = time.monotonic() + 5
    while any(map(is_alive, pids)):
        assert time.monotonic() < limit
        time.sleep(0.01)


# --- the command line ------------------------------------------------------------------------------------------------


def test_exec_answers_plain_inputs(tmp_path: Path) -> None:
    done = run_command("exec", str(OWN), "--input", '{"radius": 3, "height": 5}', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["response_data"]["outputs"]["volume"] == pytest.approx(141.371669411541)
    done = run_command("exec", str(OWN), "--input", '{"boom": 3}', cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "reached an `unreachable` instruction" in done.stderr


def test_inspect_says_who_the_model_is_and_what_its_letters_mean(tmp_path: Path) -> None:
    done = run_command("models", "inspect", str(OWN), "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["kind"], document["package"]["folder"], document["package"]["service"]) == (
        "neuron",
        "local",
        "own_model",
    )
    assert document["package"]["version_id_is_derived"]
    assert document["package"]["inputs"] == ["height", "radius"]
    assert document["package"]["is_columnar"] is False
    done = run_command("models", "inspect", str(XCALL), cwd=tmp_path)
    assert "service local/own_xcall" in done.stdout
    assert "calls other services" in done.stdout
    assert "\tnode_calc_v3\n" in done.stdout


def _answering(text: str) -> tuple[str, str, str]:
    calculate, data = answering(text)
    return calculate, "", data
