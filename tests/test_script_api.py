"""What the object `spark` does for a script, seen from outside: state, names, calls, control, loops, signals."""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from harness import RunProcess, running, write

from spark_runtime.supervise.runtime_folder import find_run

needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="PyTorch is not installed")
needs_numpy = pytest.mark.skipif(find_spec("numpy") is None, reason="numpy is not installed")


class Refused(Exception):
    """An error answer; *data* may hold the traceback."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(error["message"])
        self.traceback = (error.get("data") or {}).get("traceback", "")


class Client:
    """A program that talks to a run over its socket, as `spark ctl` does, but in this process."""

    def __init__(self, run: RunProcess) -> None:
        started = next((each for each in run.events if each["event"] == "start"), None) or run.wait_for("start")
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(20)
        self._socket.connect(str(find_run(started["run"]).socket))
        self._file = self._socket.makefile("rwb")
        self._last = 0

    def send(self, method: str, **params: Any) -> None:
        """Send a request; `answer` gives what comes back."""
        self._last += 1
        request = {"jsonrpc": "2.0", "id": self._last, "method": method, "params": params}
        self._file.write(json.dumps(request).encode() + b"\n")
        self._file.flush()

    def answer(self) -> Any:
        """Read one answer, which must be real JSON."""
        line = self._file.readline()
        assert line, "the run closed the connection"
        answer = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        if "error" in answer:
            raise Refused(answer["error"])
        return answer["result"]

    def request(self, method: str, **params: Any) -> Any:
        """Send a request and return its result."""
        self.send(method, **params)
        return self.answer()

    def call(self, name: str, params: Any = None) -> Any:
        """Call an exposed function and wait for what it returns."""
        self.send("call", name=name, params=params)
        return self.result()

    def result(self) -> Any:
        """Read the answer to a call that was sent, and wait for its result."""
        answer = self.answer()
        return answer["result"] if "result" in answer else self.request("wait", job=answer["job"])["result"]

    def close(self) -> None:
        self._file.close()
        self._socket.close()


@contextlib.contextmanager
def talking(script: Path, *options: str, **rest: Any) -> Iterator[tuple[RunProcess, Client]]:
    """A run and a client of it."""
    with running(script, *options, **rest) as run:
        run.wait_for("start")
        with contextlib.closing(Client(run)) as client:
            yield run, client


def finished(script: Path, *options: str, **rest: Any) -> RunProcess:
    """Run a script to its end, which must be a good one."""
    with running(script, *options, **rest) as run:
        code = run.wait_end(seconds=50)  # PyTorch takes a while to import
    assert code == 0, run._story()
    return run


def lines(run: RunProcess) -> list[str]:
    """What the script has printed."""
    return run.printed().splitlines()


LOOP = "while True: spark.checkpoint(); time.sleep(0.002)"

# --- persist ---------------------------------------------------------------------------------------------------------


def test_persist_calls_its_initializer_once_over_reloads(tmp_path: Path) -> None:
    source = f"""
        import time
        RATE = 1

        def make(what):
            print("made", what)
            return what

        def torch():
            numbers = spark.persist("numbers", lambda: make([1]))
            nothing = spark.persist("nothing", lambda: make(None))
            again = spark.persist("numbers", lambda: make([2]))
            numbers.append(RATE)
            print("rate", RATE, numbers, nothing, again is numbers)
            {LOOP}
    """
    with running(write(tmp_path / "train.py", source)) as run:
        run.wait_printed("rate 1 [1, 1] None True")
        run.save(source.replace("RATE = 1", "RATE = 2"))
        run.wait_printed("rate 2 [1, 1, 2] None True")
        assert sorted(each for each in lines(run) if "made" in each) == ["made None", "made [1]"]


def test_persisted_is_a_mapping_with_three_more_names(tmp_path: Path) -> None:
    source = """
        def torch():
            persisted = spark.persisted
            assert not spark.has_persisted("a") and "a" not in persisted and len(persisted) == 0
            spark.persist("a", lambda: 1)
            persisted["b"] = 2
            assert spark.has_persisted("a") and "b" in persisted and persisted["a"] == 1 == persisted.get("a")
            assert sorted(persisted) == ["a", "b"] and sorted(persisted.values()) == [1, 2] and len(persisted) == 2
            assert spark.persist("b", lambda: 3) == 2
            del persisted["b"]
            assert not spark.has_persisted("b") and spark.persist("b", lambda: 3) == 3
            spark.clear_persisted("b")
            spark.clear_persisted("never there")
            assert "b" not in persisted
            spark.clear_all_persisted()
            assert "a" not in persisted
            persisted.update(c=1, d=2)
            assert persisted.pop("c") == 1 and persisted.setdefault("d", 9) == 2
            persisted.clear()
            assert dict(persisted) == {}
            for wrong in (lambda: persisted["none"], lambda: persisted.pop("none")):
                try: wrong()
                except KeyError: pass
                else: raise AssertionError
            print("good")
    """
    assert finished(write(tmp_path / "train.py", source)).printed() == "good\n"


def test_a_cleared_value_begins_anew_after_a_reload(tmp_path: Path) -> None:
    source = f"""
        import time
        RATE = 1

        def torch():
            print("rate", RATE, "a" in spark.persisted, "b" in spark.persisted, spark.persist("b", lambda: 5))
            spark.persist("a", lambda: 1)
            spark.clear_persisted("a")
            spark.persisted["b"] = RATE
            {LOOP}
    """
    with running(write(tmp_path / "train.py", source)) as run:
        run.wait_printed("rate 1 False False 5")
        run.save(source.replace("RATE = 1", "RATE = 2"))
        run.wait_printed("rate 2 False True 1")


@pytest.mark.parametrize("line", ["spark.persist('key', lambda: 1)", "spark.persisted['key'] = 1"])
def test_persist_at_the_top_level_is_refused_with_a_sentence(tmp_path: Path, line: str) -> None:
    with running(write(tmp_path / "train.py", f"x = 1\n{line}\ndef torch():\n    pass\n")) as run:
        assert run.wait_end() == 1
    error = run.all_events("error")[-1]
    assert (error["kind"], error["line"]) == ("load", 2)
    last = error["text"].strip().splitlines()[-1]
    assert "top level" in last
    assert "torch()" in last


def test_persist_takes_a_function_and_says_so(tmp_path: Path) -> None:
    source = """
        def torch():
            for key, maker in (("key", [1]), (5, list), ("", list)):
                try: spark.persist(key, maker)
                except RuntimeError as problem: print(problem)
    """
    assert len(lines(finished(write(tmp_path / "train.py", source)))) == 3


def test_an_initializer_that_raises_stores_nothing(tmp_path: Path) -> None:
    source = """
        def torch():
            try: spark.persist("key", lambda: 1 / 0)
            except ZeroDivisionError: print("raised", "key" in spark.persisted)
            print(spark.persist("key", lambda: 5))
    """
    assert lines(finished(write(tmp_path / "train.py", source))) == ["raised False", "5"]


def test_a_new_version_goes_through_migrate_or_the_initializer(tmp_path: Path) -> None:
    source = f"""
        import time
        RATE = 1

        def torch():
            a = spark.persist("a", lambda: [1], version=RATE, migrate=lambda old: old + ["migrated"])
            b = spark.persist("b", lambda: [RATE], version=RATE)
            c = spark.persist("c", lambda: [RATE], version=7, migrate=lambda old: 1 / 0)
            print("rate", RATE, a, b, c)
            {LOOP}
    """
    with running(write(tmp_path / "train.py", source)) as run:
        run.wait_printed("rate 1 [1] [1] [1]")
        run.save(source.replace("RATE = 1", "RATE = 2"))
        run.wait_printed("rate 2 [1, 'migrated'] [2] [1]")
        run.save(source.replace("RATE = 1", "RATE = 2").replace('"rate"', '"same"'))
        run.wait_printed("same 2 [1, 'migrated'] [2] [1]")


def test_a_migrate_that_raises_keeps_the_old_value_for_the_next_save(tmp_path: Path) -> None:
    source = f"""
        import time

        def torch():
            print("value", spark.persist("a", lambda: [1], version=1))
            {LOOP}
    """
    with running(write(tmp_path / "train.py", source), "--no-watch") as run:
        run.wait_printed("value [1]")
        run.stop()
    broken = source.replace("version=1", "version=2, migrate=lambda old: 1 / 0")
    with running(write(tmp_path / "train.py", broken), "--resume") as run:
        assert run.wait_end() == 1
        assert "ZeroDivisionError" in run.all_events("error")[-1]["text"]
    mended = source.replace("version=1", "version=2, migrate=lambda old: old + [2]")
    with running(write(tmp_path / "train.py", mended), "--resume") as run:
        run.wait_printed("value [1, 2]")


# --- expose: values --------------------------------------------------------------------------------------------------


def test_all_three_ways_of_exposing_add_up(tmp_path: Path) -> None:
    source = f"""
        import time

        @spark.expose
        def decorated(): return "decorated"

        def torch():
            assert decorated() == "decorated"
            spark.expose(named=1, function=lambda: "function")
            spark.expose({{"mapped": 2, "other": decorated}})
            spark.expose({{"both": 3}}, ways=4)
            spark.expose(named=5)
            {LOOP}
    """
    with talking(write(tmp_path / "train.py", source)) as (run, client):
        run.wait_for("values", values=lambda shown: "ways" in shown)
        assert client.request("status")["values"] == {"named": 5, "mapped": 2, "both": 3, "ways": 4}
        assert set(client.request("status")["functions"]) == {"decorated", "function", "other"}
        assert client.call("decorated") == client.call("other") == "decorated"
        assert client.call("function") == "function"


def test_values_of_every_kind_are_shown(tmp_path: Path) -> None:
    source = f"""
        import time, enum, pathlib, datetime, collections
        from dataclasses import dataclass, field
        from types import SimpleNamespace

        @dataclass
        class State:
            step: int = 3
            losses: list = field(default_factory=lambda: [0.5, 0.25])
            inner: "State | None" = None

        class Colour(enum.Enum):
            RED = "red"

        class Plain:
            def __init__(self): self.x, self._hidden = 1, 2

        class Rude:
            __slots__ = ()
            def __repr__(self): raise ValueError("no")

        loop = {{"name": "loop"}}
        loop["self"] = loop

        def torch():
            spark.expose(
                state=State(inner=State(step=4)), mapping={{"a": {{"b": [1, 2]}}, 5: "five"}},
                space=SimpleNamespace(lr=0.1), number=7, fraction=0.5, text="hello", truth=True, nothing=None,
                items=(1, "two"), colour=Colour.RED,
                plain=Plain(), rude=Rude(), large=2**100, kind=int,
                path=pathlib.Path("a/b"), raw=b"ab", loop=loop, chars="x" * 10_000, many=list(range(10_000)),
                unique={{1}}, counter=collections.Counter("aab"), control="\\x00\\x1b[2J",
            )
            spark.expose({{"a b": 1, "": 2, "é": 4}})
            {LOOP}
    """
    with talking(write(tmp_path / "train.py", source)) as (run, client):
        run.wait_for("values", values=lambda shown: shown.get("é") == 4)
        shown = client.request("status")["values"]
        assert shown["state"] == {
            "step": 3,
            "losses": [0.5, 0.25],
            "inner": {"step": 4, "losses": [0.5, 0.25], "inner": None},
        }
        assert shown["mapping"] == {"a": {"b": [1, 2]}, "5": "five"}
        assert shown["space"] == {"lr": 0.1}
        assert (shown["number"], shown["fraction"], shown["text"], shown["truth"]) == (7, 0.5, "hello", True)
        assert (shown["nothing"], shown["items"], shown["colour"]) == (None, [1, "two"], "red")
        assert (shown["plain"], shown["path"], shown["unique"]) == ({"x": 1}, "a/b", [1])
        assert shown["counter"] == {"a": 2, "b": 1}
        assert str(shown["large"]) == str(2**100)
        assert len(str(shown["chars"])) < 10_000
        assert len(str(shown["many"])) < 10_000
        assert {"rude", "kind", "raw", "a b", "loop", "control"} <= set(shown)


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')", "[1.0, -float('inf')]", "{'loss': float('nan')}"])
def test_numbers_that_json_has_not_are_shown_as_real_json(tmp_path: Path, value: str) -> None:
    source = f"""
        import time

        def torch():
            spark.expose(value={value}, call=lambda: {value})
            spark.log(loss=float("nan"))
            {LOOP}
    """
    with talking(write(tmp_path / "train.py", source)) as (run, client):
        run.wait_for("values", values=lambda shown: "value" in shown)
        assert "value" in client.request("status")["values"]  # `request` takes nothing but real JSON
        client.call("call")


@pytest.mark.parametrize(
    "bindings",
    ['{"value": "a\\ud800b"}', '{"value": {"\\udfff": 1}}', '{"\\ud800": 1}', "{5: 1}", '{"f\\ud800": print}'],
)
def test_a_text_that_cannot_be_encoded_does_not_end_the_run(tmp_path: Path, bindings: str) -> None:
    source = f"""
        import time

        def torch():
            try: spark.expose({bindings})
            except Exception as problem: print("refused at the call", problem)
            spark.expose(good=1)
            {LOOP}
    """
    with running(write(tmp_path / "train.py", source)) as run:
        run.wait_for("values", values=lambda shown: shown.get("good") == 1)
        assert run.stop() == 0


def test_output_that_is_no_text_does_not_end_the_run(tmp_path: Path) -> None:
    source = """
        import os, sys

        def torch():
            sys.stdout.buffer.write(b"\\xff\\xfe bytes\\n")
            sys.stdout.flush()
            os.write(1, b"raw\\n")
            print("é")
            spark.checkpoint()
            print("end")
    """
    assert lines(finished(write(tmp_path / "train.py", source)))[1:] == ["raw", "é", "end"]


@needs_numpy
def test_arrays_are_shown_as_numbers_or_as_a_summary(tmp_path: Path) -> None:
    source = f"""
        import time
        import numpy as np

        def torch():
            spark.expose(
                scalar=np.float32(0.5), zero=np.array(2), small=np.array([1, 2]), large=np.zeros((100, 200)),
                nothing=np.zeros((0, 3)), words=np.array(["a", "b"]), moments=np.array(["2020-01-01"], "datetime64[D]"),
                objects=np.array([object()]), complexes=np.array([1j]),
            )
            {LOOP}
    """
    with talking(write(tmp_path / "train.py", source)) as (run, client):
        run.wait_for("values", values=lambda shown: "complexes" in shown)
        shown = client.request("status")["values"]
        assert (shown["scalar"], shown["zero"], shown["small"], shown["words"]) == (0.5, 2, [1, 2], ["a", "b"])
        assert "100" in str(shown["large"])
        assert "200" in str(shown["large"])
        assert len(str(shown["large"])) < 200


@needs_torch
def test_tensors_are_shown_as_numbers_or_as_a_summary(tmp_path: Path) -> None:
    source = f"""
        import time
        import torch as pt

        def torch():
            weight = pt.nn.Parameter(pt.ones(2))
            spark.expose(
                scalar=pt.tensor(0.5), loss=(weight * 2).sum(), small=pt.tensor([1, 2]), large=pt.zeros(100, 200),
                weight=weight, half=pt.ones(2, dtype=pt.bfloat16), nothing=pt.zeros(0), model=pt.nn.Linear(2, 2),
            )
            {LOOP}
    """
    with talking(write(tmp_path / "train.py", source)) as (run, client):
        run.wait_for("values", values=lambda shown: "model" in shown)
        shown = client.request("status")["values"]
        assert (shown["scalar"], shown["loss"], shown["small"]) == (0.5, 4.0, [1, 2])
        assert (shown["weight"], shown["half"]) == ([1.0, 1.0], [1.0, 1.0])
        assert "100" in str(shown["large"])
        assert len(str(shown["large"])) < 200


def test_an_assignment_is_shown(tmp_path: Path) -> None:
    source = """
        import time
        from types import SimpleNamespace

        def torch():
            state = SimpleNamespace(step=0, inner={"deep": [0]})
            spark.expose(state=state)
            while True:
                state.step += 1
                state.inner["deep"][0] = -state.step
                spark.checkpoint()
                time.sleep(0.002)
    """
    with running(write(tmp_path / "train.py", source)) as run:
        seen = run.wait_for("values", values=lambda shown: shown["state"]["step"] > 3)["values"]["state"]
        assert seen["inner"]["deep"] == [-seen["step"]]
        run.wait_for("values", values=lambda shown: shown["state"]["step"] > seen["step"])


def test_values_are_sent_at_most_thirty_times_a_second(tmp_path: Path) -> None:
    source = """
        import time

        def torch():
            state = {"step": 0}
            spark.expose(state=state)
            began = time.monotonic()
            while time.monotonic() - began < 2.0:
                state["step"] += 1
                spark.checkpoint()
                time.sleep(0.0005)
    """
    run = finished(write(tmp_path / "train.py", source))
    assert 15 <= len(run.all_events("values")) <= 66


def test_names_that_new_code_does_not_expose_disappear(tmp_path: Path) -> None:
    source = f"""
        import time

        def torch():
            spark.expose(old=1, stays=2, gone=lambda: 1, kept=lambda: 1)
            spark.control("knob", 1)
            {LOOP}
    """
    new = source.replace("old=1, stays=2, gone=lambda: 1,", "new=3, stays=2,").replace(
        'spark.control("knob", 1)', "pass"
    )
    with talking(write(tmp_path / "train.py", source)) as (run, client):
        run.wait_for("values", values=lambda shown: "old" in shown)
        assert set(client.request("status")["controls"]) == {"knob"}
        run.save(new)
        run.wait_for("values", values=lambda shown: "new" in shown)
        status = client.request("status")
        assert status["values"] == {"new": 3, "stays": 2}
        assert (set(status["functions"]), status["controls"]) == ({"kept"}, {})


RUDE = {
    "a mapping": "Rude()",
    "a property": "Shy()",
    "a sparse tensor": "__import__('torch').eye(2).to_sparse()",
    "a tensor without data": "__import__('torch').zeros(3, device='meta')",
    "a list that is a subclass": "Longer([1])",
}


@pytest.mark.parametrize("kind", [each for each in RUDE if "tensor" not in each or find_spec("torch")])
def test_a_value_that_raises_when_it_is_looked_at_does_not_end_the_run(tmp_path: Path, kind: str) -> None:
    source = f"""
        import time
        from collections.abc import Mapping

        class Rude(Mapping):
            def __getitem__(self, key): raise ValueError("no")
            def __iter__(self): return iter(["a"])
            def __len__(self): return 1

        class Shy:
            shape = dtype = property(lambda self: 1 / 0)

        class Longer(list):
            def __len__(self): raise OSError("no")

        def torch():
            spark.expose(rude={RUDE[kind]}, good=1, call=lambda: {RUDE[kind]})
            {LOOP}
    """
    with talking(write(tmp_path / "train.py", source)) as (run, client):
        run.wait_for("values", values=lambda shown: shown.get("good") == 1)
        with contextlib.suppress(Refused):
            client.call("call")
        assert client.request("status")["state"] == "running"
        assert run.stop() == 0


def test_a_value_that_changes_in_a_thread_while_it_is_looked_at_does_not_end_the_run(tmp_path: Path) -> None:
    source = """
        import sys, threading, time

        def torch():
            sys.setswitchinterval(1e-5)
            busy = {}
            ended = []

            def change():
                number = 0
                while not ended:
                    busy[number % 60] = number
                    busy.pop((number + 30) % 60, None)
                    number += 1

            thread = threading.Thread(target=change)
            thread.start()
            spark.expose(busy=busy)
            began = time.monotonic()
            while time.monotonic() - began < 1: spark.checkpoint(); time.sleep(0.001)
            ended.append(1)
            thread.join()
            print("end")
    """
    assert finished(write(tmp_path / "train.py", source)).printed() == "end\n"


# --- expose: calls ---------------------------------------------------------------------------------------------------

CALLED = """
    import time, asyncio

    def echo(*args, **kwargs):
        return [list(args), kwargs]

    def add(a: int, b: int = 2) -> int:
        "Add two numbers."
        return a + b

    def fail(text):
        inner(text)

    def inner(text):
        raise ValueError(text)

    async def later(value):
        await asyncio.sleep(0.001)
        await spark.checkpoint()
        return value

    def returns(what):
        loop = []
        loop.append(loop)
        deep = []
        for _ in range(5000): deep = [deep]
        return {"object": object(), "function": lambda: 1, "loop": loop, "deep": deep, "nan": float("nan"),
                "surrogate": "\\ud800", "set": {1}, "bytes": b"a", "generator": (x for x in ()), "module": time,
                "keys": {(1, 2): 3, None: 4}, "long": "x" * 70_000_000, "exception": ValueError("x")}[what]

    def expose():
        spark.expose(echo=echo, add=add, fail=fail, later=later, returns=returns)
"""
BUSY = CALLED + "\n    def torch():\n        expose()\n        while True: spark.checkpoint(); time.sleep(0.002)\n"
IDLE = CALLED + "\n    def torch():\n        expose()\n"
ASYNC = (
    CALLED
    + "\n    async def torch():\n        expose()\n        while True:\n            await spark.checkpoint()"
    + "\n            await asyncio.sleep(0.002)\n"
)
ASYNC_IDLE = CALLED + "\n    async def torch():\n        expose()\n"
every_kind = pytest.mark.parametrize(
    "source", [BUSY, IDLE, ASYNC, ASYNC_IDLE], ids=["busy", "idle", "async busy", "async idle"]
)


@every_kind
def test_calls_take_arguments_by_name_in_order_and_alone(tmp_path: Path, source: str) -> None:
    with talking(write(tmp_path / "train.py", source)) as (run, client):
        run.wait_for("exposed", functions=lambda shown: "add" in shown)
        assert client.call("echo") == [[], {}]
        assert client.call("echo", {"a": 1, "b": [2]}) == [[], {"a": 1, "b": [2]}]
        assert client.call("echo", [1, {"x": 2}]) == [[1, {"x": 2}], {}]
        assert client.call("echo", "alone") == [["alone"], {}]
        assert client.call("add", {"a": 5}) == 7
        assert client.call("later", "async") == "async"
        described = client.request("status")["functions"]["add"]
        assert described["doc"] == "Add two numbers."
        assert [each["name"] for each in described["parameters"]] == ["a", "b"]


@every_kind
def test_a_call_that_raises_answers_with_the_script_s_own_traceback(tmp_path: Path, source: str) -> None:
    with talking(write(tmp_path / "train.py", source)) as (run, client):
        run.wait_for("exposed", functions=lambda shown: "add" in shown)
        with pytest.raises(Refused, match="ValueError: too bad") as raised:
            client.call("fail", ["too bad"])
        text = raised.value.traceback
        assert text.startswith("Traceback (most recent call last):")
        assert text.index("in fail") < text.index("in inner") < text.index("ValueError: too bad")
        assert "spark_" not in text
        assert client.call("add", [1, 1]) == 2
        assert not run.all_events("error")


@every_kind
def test_a_call_that_cannot_be_made_says_why(tmp_path: Path, source: str) -> None:
    with talking(write(tmp_path / "train.py", source)) as (run, client):
        run.wait_for("exposed", functions=lambda shown: "add" in shown)
        with pytest.raises(Refused, match=r"(?s)nothing.*add"):
            client.call("nothing")
        with pytest.raises(Refused, match="argument") as raised:
            client.call("add", {"wrong": 1})
        assert "spark_" not in raised.value.traceback
        assert client.call("add", [1, 1]) == 2


WHAT = [
    "object",
    "function",
    "loop",
    "deep",
    "nan",
    "surrogate",
    "set",
    "bytes",
    "generator",
    "module",
    "keys",
    "long",
    "exception",
]


@pytest.mark.parametrize("what", WHAT)
def test_a_result_that_is_no_data_is_an_answer_and_not_the_end(tmp_path: Path, what: str) -> None:
    with talking(write(tmp_path / "train.py", BUSY)) as (run, client):
        run.wait_for("exposed", functions=lambda shown: "add" in shown)
        with contextlib.suppress(Refused):
            client.call("returns", what)
        assert client.call("add", [1, 1]) == 2
        assert not run.all_events("error")


def test_the_command_line_calls_and_prints_json(tmp_path: Path) -> None:
    with running(write(tmp_path / "train.py", BUSY)) as run:
        run.wait_for("exposed", functions=lambda shown: "add" in shown)
        assert json.loads(run.ctl("call", "add", '{"a": 1, "b": 10}').stdout) == 11
        failed = run.ctl("call", "fail", '"bad"', check=False)
        assert failed.returncode == 1
        assert "ValueError: bad" in failed.stderr
        assert "in inner" in failed.stderr


def test_calls_are_served_while_paused(tmp_path: Path) -> None:
    for name, source in (("sync", BUSY), ("asynchronous", ASYNC), ("waiting", IDLE)):
        with talking(write(tmp_path / f"{name}.py", source)) as (run, client):
            run.wait_for("exposed", functions=lambda shown: "add" in shown)
            client.request("pause")
            run.wait_for("state", state="paused")
            assert client.call("add", [1, 1]) == 2
            assert client.request("status")["state"] == "paused"
            client.request("resume")
            run.wait_for("state", state="idle" if name == "waiting" else "running")


@every_kind
def test_a_call_made_while_paused_comes_to_its_end_though_it_passes_checkpoints(tmp_path: Path, source: str) -> None:
    source = source.replace(
        "def add(a: int, b: int = 2) -> int:", "def add(a: int, b: int = 2) -> int:\n        spark.checkpoint()"
    )
    with talking(write(tmp_path / "train.py", source)) as (run, client):
        run.wait_for("exposed", functions=lambda shown: "add" in shown)
        client.request("pause")
        run.wait_for("state", state="paused")
        with contextlib.closing(Client(run)) as other:
            other.send("call", name="add", params=[1, 1])
            run.wait_for("job", step="returned", seconds=5)
        assert client.request("status")["state"] == "paused"


def test_a_call_at_a_checkpoint_inside_a_call_runs_inside_it(tmp_path: Path) -> None:
    source = """
        import time

        def outer():
            print("outer begins")
            while not spark.persisted.get("done"):
                spark.checkpoint()
                time.sleep(0.002)
            return "outer"

        def inner():
            spark.persisted["done"] = True
            return "inner"

        def torch():
            spark.expose(outer=outer, inner=inner)
    """
    with talking(write(tmp_path / "train.py", source)) as (run, client):
        run.wait_for("state", state="idle")
        client.send("call", name="outer")
        run.wait_printed("outer begins")
        with contextlib.closing(Client(run)) as other:
            assert other.call("inner") == "inner"
        assert client.result() == "outer"
        run.wait_for("state", state="idle")


def test_a_running_and_a_waiting_call_can_be_cancelled(tmp_path: Path) -> None:
    source = """
        import time
        ran = []

        def work():
            print("work begins")
            try:
                while True: spark.checkpoint(); time.sleep(0.002)
            finally:
                print("work ends")

        def blind():
            print("blind begins")
            while not spark.persisted.get("free"): time.sleep(0.002)

        def other():
            ran.append(1)
            return len(ran)

        def torch():
            spark.expose(work=work, other=other)
    """
    with talking(write(tmp_path / "train.py", source)) as (run, client):
        run.wait_for("state", state="idle")
        job = client.request("call", name="work")["job"]
        run.wait_for("job", name="work", step="running")
        client.request("cancel", job=job)
        run.wait_printed("work ends")
        with pytest.raises(Refused, match=r"(?i)cancel"):
            client.request("wait", job=job)
        assert client.call("other") == 1
        run.wait_for("state", state="idle")
        with pytest.raises(Refused):
            client.request("cancel", job="job-999")


def test_a_call_that_waits_behind_another_is_dropped_when_cancelled(tmp_path: Path) -> None:
    source = """
        import os, time

        def blind():
            print("blind begins")
            while not os.path.exists("free"): time.sleep(0.002)
            return "blind"

        def other():
            print("other ran")

        def torch():
            spark.expose(blind=blind, other=other)
    """
    with talking(write(tmp_path / "train.py", source)) as (run, client):
        run.wait_for("state", state="idle")
        with contextlib.closing(Client(run)) as second:
            client.send("call", name="blind")
            run.wait_printed("blind begins")
            second.send("call", name="other")
            waiting = run.wait_for("job", name="other", step="waiting")["id"]
            with contextlib.closing(Client(run)) as third:
                third.request("cancel", job=waiting)
            (tmp_path / "free").touch()
            with pytest.raises(Refused, match=r"(?i)cancel"):
                second.result()
            assert client.result() == "blind"
        assert "other ran" not in run.printed()


def test_cancel_of_an_outer_call_waits_for_the_inner_one(tmp_path: Path) -> None:
    source = """
        import time

        def outer():
            print("outer begins")
            while True: spark.checkpoint(); time.sleep(0.002)

        def inner():
            print("inner begins")
            for _ in range(50): spark.checkpoint(); time.sleep(0.002)
            return "inner"

        def torch():
            spark.expose(outer=outer, inner=inner)
    """
    with talking(write(tmp_path / "train.py", source)) as (run, client):
        run.wait_for("state", state="idle")
        client.send("call", name="outer")
        run.wait_printed("outer begins")
        outer = next(each["id"] for each in run.all_events("job") if each["name"] == "outer")
        with contextlib.closing(Client(run)) as second:
            second.send("call", name="inner")
            run.wait_printed("inner begins")
            with contextlib.closing(Client(run)) as third:
                third.request("cancel", job=outer)
            assert second.result() == "inner"
        with pytest.raises(Refused, match=r"(?i)cancel"):
            client.result()
        run.wait_for("state", state="idle")


def test_an_asynchronous_call_is_cancelled_beside_others(tmp_path: Path) -> None:
    source = """
        import asyncio

        async def work(name):
            print(name, "begins")
            while True:
                await spark.checkpoint()
                await asyncio.sleep(0.002)
                if name in spark.persisted: return name

        async def finish(name):
            spark.persisted[name] = 1

        async def torch():
            spark.expose(work=work, finish=finish)
            while True:
                await spark.checkpoint()
                await asyncio.sleep(0.002)
    """
    with talking(write(tmp_path / "train.py", source)) as (run, client):
        run.wait_for("exposed", functions=lambda shown: "work" in shown)
        one = client.request("call", name="work", params="one")["job"]
        two = client.request("call", name="work", params="two")["job"]
        client.request("cancel", job=one)
        with pytest.raises(Refused, match=r"(?i)cancel"):
            client.request("wait", job=one)
        client.call("finish", "two")
        assert client.request("wait", job=two)["result"] == "two"
        assert client.request("status")["state"] == "running"


def test_a_call_interrupted_by_a_reload_is_made_again_under_the_same_job(tmp_path: Path) -> None:
    source = """
        import time
        RATE = 1

        def work(limit):
            seen = spark.persist("seen", list)
            print("work", limit, RATE)
            for i in spark.range(limit):
                seen.append(i)
                time.sleep(0.005)
            return [RATE, seen]

        def torch():
            spark.expose(work=work)
    """
    with talking(write(tmp_path / "train.py", source)) as (run, client):
        run.wait_for("state", state="idle")
        job = client.request("call", name="work", params={"limit": 400})["job"]
        run.save(source.replace("RATE = 1", "RATE = 2"))
        run.wait_printed("work 400 2")
        assert client.request("wait", job=job)["result"] == [2, list(range(400))]


def test_a_call_of_a_function_that_new_code_has_no_more_fails_its_job(tmp_path: Path) -> None:
    source = f"""
        import time

        def work():
            {LOOP}

        def torch():
            spark.expose(work=work, other=lambda: 1)
    """
    with talking(write(tmp_path / "train.py", source)) as (run, client):
        run.wait_for("state", state="idle")
        job = client.request("call", name="work")["job"]
        run.save(source.replace("work=work, ", ""))
        with pytest.raises(Refused, match="work"):
            client.request("wait", job=job)
        assert client.call("other") == 1


# --- the controller --------------------------------------------------------------------------------------------------


def test_the_controller_pauses_steps_and_stops_from_inside(tmp_path: Path) -> None:
    source = """
        import time

        def torch():
            controller = spark.controller
            assert spark.create_controller() is controller
            step = spark.persist("step", lambda: [0])
            spark.expose(step=step, ctrl=controller)
            print("status", controller.status)
            controller.pause()
            print("status", controller.status)
            spark.checkpoint()
            print("resumed", controller.status)
            controller.step(3)
            for _ in range(3):
                step[0] += 1
                spark.checkpoint()
            controller.stop()
            print("status", controller.status)
            step[0] += 1
            controller.checkpoint()
            print("never")
    """
    with talking(write(tmp_path / "train.py", source)) as (run, client):
        run.wait_for("state", state="paused")
        run.wait_printed("status running\nstatus pausing\n")
        assert client.request("status")["values"]["ctrl"]["status"] == "paused"
        client.request("resume")
        run.wait_for("state", state="paused")
        assert client.request("status")["values"]["step"] == [3]
        client.request("resume")
        run.wait_for("state", state="stopped")
        assert lines(run) == ["status running", "status pausing", "resumed running", "status stopping"]


def test_pause_and_resume_of_the_controller_cancel_each_other(tmp_path: Path) -> None:
    source = """
        def torch():
            spark.controller.pause()
            spark.controller.resume()
            spark.checkpoint()
            print(spark.controller.status)
    """
    assert finished(write(tmp_path / "train.py", source)).printed() == "running\n"


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_step_runs_exactly_as_many_checkpoints(tmp_path: Path, kind: str) -> None:
    source = """
        import time

        def torch():
            step = [0]
            spark.expose(step=step)
            while True:
                spark.checkpoint()
                step[0] += 1
                time.sleep(0.002)
    """
    if kind == "async":
        source = source.replace("def torch", "async def torch").replace(
            "spark.checkpoint()", "await spark.checkpoint()"
        )
    with talking(write(tmp_path / "train.py", source)) as (run, client):
        run.wait_for("values")
        client.request("pause")
        run.wait_for("state", state="paused")
        for count in (1, 3, 1):
            before = client.request("status")
            client.request("step", count=count)
            run.wait_for("state", state="running")
            run.wait_for("state", state="paused")
            after = client.request("status")
            assert after["checkpoints"] - before["checkpoints"] == count
            assert after["values"]["step"][0] - before["values"]["step"][0] == count
        client.request("resume")
        run.wait_for("state", state="running")


def test_a_step_of_no_checkpoints_is_refused(tmp_path: Path) -> None:
    source = """
        def torch():
            for count in (0, -1):
                try: spark.controller.step(count)
                except RuntimeError as problem: print("refused")
            spark.checkpoint()
    """
    assert finished(write(tmp_path / "train.py", source)).printed() == "refused\n" * 2


# --- knobs and series ------------------------------------------------------------------------------------------------

KNOBS = """
    import time
    RATE = 1

    def torch():
        seen = {}
        spark.expose(seen=seen)
        print("rate", RATE, spark.control("lr", 0.5, min=0, max=2))
        while True:
            seen["lr"] = spark.control("lr", 0.5, min=0, max=2)
            seen["batch"] = spark.control("batch", 8, min=1)
            seen["mode"] = spark.control("mode", "fast")
            seen["on"] = spark.control("on", True)
            spark.checkpoint()
            time.sleep(0.002)
"""


def test_a_control_is_set_from_outside_and_keeps_its_value_over_a_reload(tmp_path: Path) -> None:
    with talking(write(tmp_path / "train.py", KNOBS)) as (run, client):
        run.wait_for("values", values={"seen": {"lr": 0.5, "batch": 8, "mode": "fast", "on": True}})
        run.wait_count("exposed", controls=lambda shown: "on" in shown)
        lr = client.request("status")["controls"]["lr"]
        assert (lr["min"], lr["max"], lr["value"]) == (0, 2, 0.5)
        assert run.ctl("set", "lr", "1").returncode == 0
        run.ctl("set", "mode", "slow")
        run.ctl("set", "on", "false")
        run.wait_for("values", values={"seen": {"lr": 1.0, "batch": 8, "mode": "slow", "on": False}})
        assert client.request("status")["controls"]["lr"]["value"] == 1.0
        run.save(KNOBS.replace("RATE = 1", "RATE = 2"))
        run.wait_printed("rate 2 1.0")
        run.wait_for("values", values={"seen": {"lr": 1.0, "batch": 8, "mode": "slow", "on": False}})
        assert client.request("status")["controls"]["lr"]["value"] == 1.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 3),
        ("lr", -1),
        ("lr", "high"),
        ("lr", True),
        ("lr", None),
        ("lr", float("nan")),
        ("batch", 0.5),
        ("batch", 0),
        ("on", 1),
        ("mode", 5),
    ],
)
def test_a_wrong_value_for_a_control_is_told_and_not_taken(tmp_path: Path, name: str, value: Any) -> None:
    with talking(write(tmp_path / "train.py", KNOBS)) as (run, client):
        run.wait_for("values", values=lambda shown: shown.get("seen", {}).get("on"))
        run.wait_count("exposed", controls=lambda shown: "on" in shown)
        with contextlib.suppress(Refused):
            client.request("set", control=name, value=value)
            assert name in run.wait_for("note", level="warning", seconds=5)["text"]
        client.request("set", control="batch", value=9)
        run.wait_for("values", values={"seen": {"lr": 0.5, "batch": 9, "mode": "fast", "on": True}})


def test_a_control_that_is_not_there_is_refused_and_those_there_are_named(tmp_path: Path) -> None:
    with talking(write(tmp_path / "train.py", KNOBS)) as (run, client):
        run.wait_for("values", values=lambda shown: shown.get("seen", {}).get("on"))
        with pytest.raises(Refused, match="batch"):
            client.request("set", control="nothing", value=1)


def test_logged_numbers_come_as_one_series_over_a_reload(tmp_path: Path) -> None:
    source = """
        import time
        RATE = 1

        def torch():
            step = spark.persist("step", lambda: [0])
            print("rate", RATE)
            while step[0] < 300:
                spark.log(loss=step[0], rate=RATE)
                step[0] += 1
                spark.checkpoint()
                time.sleep(0.003)
    """
    with running(write(tmp_path / "train.py", source)) as run:
        run.wait_for("series")
        run.save(source.replace("RATE = 1", "RATE = 2"))
        run.wait_printed("rate 2")
        assert run.wait_end() == 0
    points = [numbers for event in run.all_events("series") for _, _, numbers in event["points"]]
    assert [each["loss"] for each in points] == list(range(300))
    assert [each["rate"] for each in points] == sorted(each["rate"] for each in points)
    assert {each["rate"] for each in points} == {1, 2}
    positions = [position for event in run.all_events("series") for position, _, _ in event["points"]]
    assert positions == sorted(positions)


@needs_numpy
def test_log_takes_any_number_and_refuses_the_rest_at_the_call(tmp_path: Path) -> None:
    source = """
        import numpy as np
        from fractions import Fraction

        def torch():
            spark.log(a=1, b=0.5, c=np.float32(0.25), d=True, e=float("nan"), f=np.array(3))
            spark.checkpoint()
            for value in (object(), "text", None, [1], "\\ud800", 2**70, 1j):
                try: spark.log(x=value)
                except Exception as problem: print(type(problem).__name__)
                spark.checkpoint()
            print("end")
    """
    run = finished(write(tmp_path / "train.py", source))
    assert lines(run)[-1] == "end"
    assert "MessageBroken" not in run.printed()


# --- loops -----------------------------------------------------------------------------------------------------------


PRELUDE = """
import os, time
RATE = 0

def hold(number):
    "Wait, without a checkpoint, until new code is ready to take over; newer code goes through."
    if RATE < number:
        print("holds", number)
        while not os.path.exists(f"gate{number}"): time.sleep(0.002)
"""


def reloaded(path: Path, source: str, times: int = 1) -> RunProcess:
    """Run *source*, saving a new version of it each time that it calls ``hold``, to its good end."""
    source = PRELUDE + textwrap.dedent(source)
    with running(write(path, source)) as run:
        for number in range(1, times + 1):
            run.wait_printed(f"holds {number}")
            run.save(source.replace("RATE = 0", f"RATE = {number}"))
            run.wait_for("state", state="reloading")
            (path.parent / f"gate{number}").touch()
            run.wait_for("reload")
        assert run.wait_end() == 0, run._story()
    return run


def last(run: RunProcess) -> Any:
    """The last printed line, as JSON."""
    return json.loads(lines(run)[-1])


def test_sequential_loops_go_on_where_they_were(tmp_path: Path) -> None:
    source = """
        import json, time

        def torch():
            seen = spark.persist("seen", list)
            for i in spark.range(40):
                seen.append(["a", i])
                time.sleep(0.002)
                if i == 10: hold(1)
            for i in spark.range(40):
                seen.append(["b", i])
                time.sleep(0.002)
                if i == 10: hold(2)
            for letter in spark.loop("xyz"):
                seen.append(["c", letter])
            print(json.dumps(seen))
    """
    run = reloaded(tmp_path / "train.py", source, 2)
    wanted = [["a", i] for i in range(40)] + [["b", i] for i in range(40)] + [["c", each] for each in "xyz"]
    assert last(run) == wanted


def test_nested_loops_go_on_where_they_were(tmp_path: Path) -> None:
    source = """
        import json, time

        def torch():
            seen = spark.persist("seen", list)
            for epoch in spark.range(3):
                for batch in spark.loop(list("abcdefghij")):
                    seen.append([epoch, batch])
                    time.sleep(0.002)
                    if (epoch, batch) == (1, "c"): hold(1)
                for test in spark.range(10):
                    seen.append([epoch, test])
                    time.sleep(0.002)
                    if (epoch, test) == (1, 3): hold(2)
            print(json.dumps(seen))
    """
    run = reloaded(tmp_path / "train.py", source, 2)
    assert last(run) == [[epoch, each] for epoch in range(3) for each in [*"abcdefghij", *range(10)]]


def test_a_loop_with_a_key_keeps_its_position_though_loops_are_added_before_it(tmp_path: Path) -> None:
    source = """
        import json, time

        def torch():
            seen = spark.persist("seen", list)
            if RATE: [seen.append(["new", i]) for i in spark.range(2, key="new")]
            for i in spark.range(60, key="main"):
                seen.append(i)
                time.sleep(0.002)
                if i == 10: hold(1)
            print(json.dumps(seen))
    """
    run = reloaded(tmp_path / "train.py", source)
    found = last(run)
    assert [each for each in found if isinstance(each, int)] == list(range(60))
    assert [each for each in found if not isinstance(each, int)] == [["new", 0], ["new", 1]]


def test_a_loop_over_a_generator_skips_what_was_done(tmp_path: Path) -> None:
    source = """
        import json, time

        def torch():
            seen = spark.persist("seen", list)
            for name in spark.loop({"a": 1, "b": 2}):
                seen.append(name)
            for i in spark.loop(i * i for i in range(50)):
                seen.append(i)
                time.sleep(0.002)
                if i == 100: hold(1)
            print(json.dumps(seen))
    """
    run = reloaded(tmp_path / "train.py", source)
    assert last(run) == ["a", "b", *(i * i for i in range(50))]


def test_an_asynchronous_loop_goes_on_where_it_was(tmp_path: Path) -> None:
    source = """
        import asyncio, json

        async def torch():
            seen = spark.persist("seen", list)
            async for i in spark.range(3):
                async for j in spark.loop(range(20)):
                    seen.append([i, j])
                    await asyncio.sleep(0.002)
                    if (i, j) == (1, 5): hold(1)
            print(json.dumps(seen))
    """
    run = reloaded(tmp_path / "train.py", source)
    assert last(run) == [[i, j] for i in range(3) for j in range(20)]


def test_loops_of_parallel_tasks_keep_positions_of_their_own(tmp_path: Path) -> None:
    source = """
        import asyncio, json

        async def work(name, seen):
            async for i in spark.range(40, key=name):
                seen.append([name, i])
                await asyncio.sleep(0.002)
                if i == 10: hold(1)

        async def torch():
            seen = spark.persist("seen", list)
            async with asyncio.TaskGroup() as group:
                group.create_task(work("a", seen))
                group.create_task(work("b", seen))
            print(json.dumps(seen))
    """
    run = reloaded(tmp_path / "train.py", source)
    for name in "ab":
        assert [i for each, i in last(run) if each == name] == list(range(40))


def test_a_loop_left_early_is_over(tmp_path: Path) -> None:
    source = """
        import json, time

        def torch():
            seen = spark.persist("seen", list)
            for epoch in spark.range(3):
                for i in spark.range(100):
                    if i == 3: break
                    seen.append([epoch, "a", i])
                for i in spark.range(20):
                    seen.append([epoch, "b", i])
                    time.sleep(0.002)
                    if (epoch, i) == (1, 5): hold(1)
            print(json.dumps(seen))
    """
    run = reloaded(tmp_path / "train.py", source)
    wanted = [[e, *each] for e in range(3) for each in [*(("a", i) for i in range(3)), *(("b", i) for i in range(20))]]
    assert last(run) == wanted


def test_a_loop_object_can_be_iterated_again(tmp_path: Path) -> None:
    source = """
        def torch():
            twice = spark.range(3)
            print(list(twice), list(twice), list(spark.range(0)), sum(spark.loop([1, 2])))
            print(list(zip(spark.range(2), "ab")))
    """
    expected = "[0, 1, 2] [0, 1, 2] [] 3\n[(0, 'a'), (1, 'b')]\n"
    assert finished(write(tmp_path / "train.py", source)).printed() == expected


def test_each_item_is_one_checkpoint_and_the_time_left_is_shown(tmp_path: Path) -> None:
    source = """
        import time

        def torch():
            spark.expose(noop=lambda: 1)
            for i in spark.range(100, key="epochs"):
                for each in spark.loop(iter("ab"), key="inner"):
                    time.sleep(0.002)
                if i == 20: spark.controller.pause()
    """
    with talking(write(tmp_path / "train.py", source)) as (run, client):
        run.wait_for("state", state="paused")
        status = client.request("status")
        assert status["checkpoints"] == 21 + 2 * 21 + 1
        item, total, left = status["loops"]["epochs"]
        assert (item, total) == (21, 100)
        assert 0.1 < left < 20
        client.request("resume")
        run.wait_for("state", state="idle")
        assert client.request("status")["loops"] == {}


def test_the_same_call_made_twice_runs_its_loop_twice(tmp_path: Path) -> None:
    source = """
        def work():
            return list(spark.range(3))

        def torch():
            for _ in spark.range(3): pass
            spark.expose(work=work)
    """
    with talking(write(tmp_path / "train.py", source)) as (run, client):
        run.wait_for("state", state="idle")
        assert client.call("work") == client.call("work") == [0, 1, 2]


def test_a_reload_of_an_idle_script_runs_its_loops_again(tmp_path: Path) -> None:
    source = """
        RATE = 1

        def torch():
            spark.expose(work=lambda: 1)
            print("rate", RATE, list(spark.range(3)))
    """
    with running(write(tmp_path / "train.py", source)) as run:
        run.wait_for("state", state="idle")
        run.save(source.replace("RATE = 1", "RATE = 2"))
        run.wait_printed("rate 2 [0, 1, 2]")


# --- signals ---------------------------------------------------------------------------------------------------------


def test_stop_may_be_caught_to_finish_cleanly_and_values_are_kept(tmp_path: Path) -> None:
    source = """
        import time
        from spark_runtime import SparkStopError

        def torch():
            step = spark.persist("step", lambda: [0])
            print("begin", step[0] > 1000)
            try:
                while True:
                    step[0] += 1
                    spark.checkpoint()
                    time.sleep(0.002)
            except SparkStopError:
                step[0] += 1000
                print("clean")
            finally:
                print("finally")
    """
    with talking(write(tmp_path / "train.py", source)) as (run, client):
        run.wait_printed("begin False\n")
        client.request("stop")
        run.wait_for("state", state="stopped")
        assert lines(run)[-2:] == ["clean", "finally"]
        client.request("resume")
        run.wait_printed("begin True\n")
        assert run.stop() == 0


def test_code_after_a_caught_stop_ends_at_the_next_checkpoint(tmp_path: Path) -> None:
    source = f"""
        import time
        from spark_runtime import SparkStopError

        def torch():
            print("begin")
            try:
                {LOOP}
            except SparkStopError:
                print("clean")
            spark.checkpoint()
            print("never")
    """
    with talking(write(tmp_path / "train.py", source)) as (run, client):
        run.wait_printed("begin")
        client.request("stop")
        run.wait_for("state", state="stopped")
        assert lines(run) == ["begin", "clean"]


def test_except_exception_does_not_swallow_a_reload_or_a_stop(tmp_path: Path) -> None:
    source = """
        import time
        RATE = 1

        def torch():
            print("rate", RATE)
            while True:
                try:
                    spark.checkpoint()
                    time.sleep(0.002)
                except Exception:
                    print("swallowed")
    """
    with talking(write(tmp_path / "train.py", source)) as (run, client):
        run.wait_printed("rate 1")
        run.save(source.replace("RATE = 1", "RATE = 2"))
        run.wait_printed("rate 2")
        client.request("stop")
        run.wait_for("state", state="stopped")
        assert lines(run) == ["rate 1", "rate 2"]
    assert "swallowed" not in str(run.all_events("note"))


@pytest.mark.parametrize("handler", ["except:", "except BaseException as problem:"])
def test_a_handler_that_swallows_is_named_with_its_line(tmp_path: Path, handler: str) -> None:
    source = f"""
        import time
        RATE = 1

        def torch():
            print("rate", RATE)
            swallow = True
            while True:
                try:
                    one_step()
                {handler}
                    if not swallow: raise
                    swallow = False

        def one_step():
            spark.checkpoint()
            time.sleep(0.002)
    """
    with running(write(tmp_path / "train.py", source)) as run:
        run.wait_printed("rate 1")
        run.save(source.replace("RATE = 1", "RATE = 2"))
        text = run.wait_for("note", level="warning")["text"]
        assert "SparkReloadError" in text
        assert "train.py:10" in text
        run.wait_printed("rate 2")


def test_a_return_in_finally_that_swallows_is_named_too_and_not_a_thousand_times(tmp_path: Path) -> None:
    source = """
        import time
        RATE = 1

        def one_step():
            try:
                spark.checkpoint()
                time.sleep(0.002)
            finally:
                return

        def torch():
            print("rate", RATE)
            for _ in range(500):
                one_step()
            while True: spark.checkpoint(); time.sleep(0.002)
    """
    with running(write(tmp_path / "train.py", source)) as run:
        run.wait_printed("rate 1")
        run.save(source.replace("RATE = 1", "RATE = 2"))
        text = run.wait_for("note", level="warning")["text"]
        assert "train.py:" in text
        assert "one_step" in text
        run.wait_printed("rate 2")
        assert len([each for each in run.all_events("note") if "swallowed" in each["text"]]) <= 20


def test_an_error_raised_while_making_room_is_shown_and_new_code_runs(tmp_path: Path) -> None:
    source = f"""
        import time
        RATE = 1

        def torch():
            print("rate", RATE)
            try:
                {LOOP}
            finally:
                if RATE == 1: raise ValueError("in finally")
    """
    with running(write(tmp_path / "train.py", source)) as run:
        run.wait_printed("rate 1")
        run.save(source.replace("RATE = 1", "RATE = 2"))
        run.wait_printed("rate 2")
        assert any("in finally" in each["text"] for each in run.all_events("note") + run.all_events("error"))


def test_signals_inside_a_task_group_are_unwrapped(tmp_path: Path) -> None:
    source = """
        import asyncio
        RATE = 1

        async def work():
            while True:
                await spark.checkpoint()
                await asyncio.sleep(0.002)

        async def torch():
            print("rate", RATE)
            async with asyncio.TaskGroup() as group:
                group.create_task(work())
                group.create_task(work())
    """
    with talking(write(tmp_path / "train.py", source)) as (run, client):
        run.wait_printed("rate 1")
        run.save(source.replace("RATE = 1", "RATE = 2"))
        run.wait_printed("rate 2")
        client.request("stop")
        run.wait_for("state", state="stopped")
        assert not run.all_events("error")


def test_a_signal_in_a_task_that_is_gathered_reaches_the_runtime(tmp_path: Path) -> None:
    source = """
        import asyncio
        RATE = 1

        async def work():
            while True:
                await spark.checkpoint()
                await asyncio.sleep(0.002)

        async def torch():
            print("rate", RATE)
            await asyncio.gather(work(), work())
    """
    with running(write(tmp_path / "train.py", source)) as run:
        run.wait_printed("rate 1")
        run.save(source.replace("RATE = 1", "RATE = 2"))
        run.wait_printed("rate 2")
        assert run.stop() == 0
    assert "Traceback" not in run.stderr


def test_a_checkpoint_that_is_not_awaited_warns_while_paused(tmp_path: Path) -> None:
    source = """
        import asyncio

        async def torch():
            print("begin")
            held = 0
            while held < 5:
                spark.checkpoint()
                held += spark.controller.status != "running"
                await asyncio.sleep(0.002)
    """
    with talking(write(tmp_path / "train.py", source)) as (run, client):
        run.wait_printed("begin")
        client.request("pause")
        assert run.wait_end() == 0
    assert "await spark.checkpoint()" in run.stderr
    assert "train.py:7" in run.stderr


def test_await_of_a_checkpoint_gives_other_tasks_a_turn(tmp_path: Path) -> None:
    source = """
        import asyncio, time

        async def other(turns):
            while True:
                turns.append(1)
                await asyncio.sleep(0)

        async def torch():
            turns = []
            task = asyncio.ensure_future(other(turns))
            began = time.monotonic()
            while time.monotonic() - began < 0.3:
                await spark.checkpoint()
            print(len(turns))
            task.cancel()
    """
    assert int(finished(write(tmp_path / "train.py", source)).printed()) >= 100


def test_pause_holds_a_script_until_resume_and_stop_ends_a_pause(tmp_path: Path) -> None:
    for kind in ("", "async "):
        wait = "await " if kind else ""
        source = f"""
            import time

            {kind}def torch():
                step = [0]
                spark.expose(step=step)
                while True:
                    step[0] += 1
                    {wait}spark.checkpoint()
                    time.sleep(0.002)
        """
        with talking(write(tmp_path / f"train{len(kind)}.py", source)) as (run, client):
            run.wait_for("values")
            client.request("pause")
            run.wait_for("state", state="pausing")
            run.wait_for("state", state="paused")
            before = client.request("status")
            again = client.request("status")
            assert before["values"] == again["values"]
            assert before["checkpoints"] == again["checkpoints"] == before["values"]["step"][0]
            client.request("resume")
            run.wait_for("values", values=lambda shown: shown["step"][0] > before["values"]["step"][0])  # noqa: B023
            client.request("pause")
            run.wait_for("state", state="paused")
            client.request("stop")
            run.wait_for("state", state="stopped")


def test_a_reload_while_paused_loads_at_once_and_stays_paused(tmp_path: Path) -> None:
    source = f"""
        import time
        RATE = 1

        def torch():
            print("rate", RATE)
            {LOOP}
    """
    with talking(write(tmp_path / "train.py", source)) as (run, client):
        run.wait_printed("rate 1")
        client.request("pause")
        run.wait_for("state", state="paused")
        run.save("1 / 0\n" + textwrap.dedent(source))
        run.wait_for("error", kind="load")
        assert client.request("status")["state"] == "paused"
        run.save(source.replace("RATE = 1", "RATE = 2"))
        run.wait_for("state", state="paused")
        run.wait_printed("rate 2")
        client.request("resume")
        run.wait_for("state", state="running")


def test_a_reload_saved_before_the_first_checkpoint_is_told_when_it_has_happened(tmp_path: Path) -> None:
    source = f"""
        import os, time
        RATE = 1

        def torch():
            print("rate", RATE)
            while not os.path.exists("go"): time.sleep(0.002)
            {LOOP}
    """
    with running(write(tmp_path / "train.py", source)) as run:
        run.wait_printed("rate 1")
        run.save(source.replace("RATE = 1", "RATE = 2"))
        run.wait_for("state", state="reloading")
        (tmp_path / "go").touch()
        told = run.wait_for("reload")
        assert told["version"] == 2
        run.wait_printed("rate 2")


# --- as in plain Python ----------------------------------------------------------------------------------------------

MODULES = [
    "random",
    pytest.param("numpy", marks=needs_numpy),
    pytest.param("torch", marks=[needs_torch, pytest.mark.slow]),
]
DRAWS = {"random": "random.random()", "numpy": "float(numpy.random.rand())", "torch": "pt.rand(1).item()"}
SEEDS = {"random": "random.seed(5)", "numpy": "numpy.random.seed(5)", "torch": "pt.manual_seed(5)"}
IMPORTS = {"random": "import random", "numpy": "import numpy", "torch": "import torch as pt"}


@pytest.mark.parametrize("module", MODULES)
def test_fresh_runs_draw_different_numbers(tmp_path: Path, module: str) -> None:
    source = f"{IMPORTS[module]}\nTOP = {DRAWS[module]}\ndef torch():\n    print(TOP, {DRAWS[module]})\n"
    script = write(tmp_path / "train.py", source)
    drawn = [each for _ in range(3) for each in finished(script).printed().split()]  # the second time it is preloaded
    assert len(set(drawn)) == 6


@pytest.mark.parametrize("module", MODULES)
def test_random_numbers_go_on_after_a_reload_as_if_nothing_had_happened(tmp_path: Path, module: str) -> None:
    source = f"""
        import json, time
        {IMPORTS[module]}
        {SEEDS[module].replace("5", "9")}

        def seeded():
            {SEEDS[module]}
            return []

        def torch():
            seen = spark.persist("seen", seeded)
            while len(seen) < 100:
                spark.checkpoint()
                seen.append({DRAWS[module]})
                time.sleep(0.002)
                if len(seen) == 20: hold(1)
            print(json.dumps(seen))
    """
    run = reloaded(tmp_path / "train.py", source)
    names = {"random": random}
    exec(f"{IMPORTS[module]}\n{SEEDS[module]}", names)
    assert last(run) == [eval(DRAWS[module], names) for _ in range(100)]


THREADS = """
    import ctypes, numpy

    def threads():
        found = []
        for line in open("/proc/self/maps"):
            path = line.split(maxsplit=5)[-1].strip()
            if "openblas" in path and path not in found: found.append(path)
        library = ctypes.CDLL(found[0])
        for name in ("scipy_openblas_get_num_threads64_", "scipy_openblas_get_num_threads",
                     "openblas_get_num_threads64_", "openblas_get_num_threads"):
            if hasattr(library, name): return getattr(library, name)()

    def torch():
        print(threads())

    if __name__ == "__main__":
        torch()
"""


@needs_numpy
@pytest.mark.parametrize("setting", [{}, {"OMP_NUM_THREADS": "1"}, {"OPENBLAS_NUM_THREADS": "3"}], ids=str)
def test_numpy_computes_with_as_many_threads_as_in_plain_python(tmp_path: Path, setting: dict[str, str]) -> None:
    script = write(tmp_path / "train.py", THREADS)
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, **setting},
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert done.stdout.strip().isdigit()
    for _ in range(2):  # the second time numpy is imported ahead of the script
        assert finished(script, **setting).printed() == done.stdout


@needs_torch
@pytest.mark.slow
def test_pytorch_computes_with_as_many_threads_as_in_plain_python(tmp_path: Path) -> None:
    source = """
        import torch as pt

        def torch():
            print(pt.get_num_threads(), pt.get_num_interop_threads())

        if __name__ == "__main__":
            torch()
    """
    script = write(tmp_path / "train.py", source)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, timeout=30)
    for _ in range(2):
        assert finished(script).printed() == done.stdout
