"""The forms that a script can have, and that it finds what it would find under plain Python."""

import json
import os
import subprocess
import sys
import textwrap
import types
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from harness import RunProcess, running, spark, write

from spark_workers.scripts.api import Spark
from spark_workers.scripts.loader import NoEntry, find_entry, load_script
from spark_workers.scripts.tree import Tree

needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="PyTorch is not installed")

SLOW_SECONDS = 50.0  # PyTorch takes a while to import, once more in each spawned child
LONG = "while True: spark.checkpoint(); time.sleep(0.002)"


def ended(script: Path, *options: str, **rest: Any) -> RunProcess:
    """Run a script to its end and return what it said, with ``code``."""
    with running(script, *options, **rest) as run:
        run.code = run.wait_end(SLOW_SECONDS)  # type: ignore[attr-defined]
    return run


def plain(script: Path, *arguments: str, cwd: Path | None = None, **environment: str) -> str:
    """What plain Python prints for the script."""
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=cwd or script.parent,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- the loader, without a process -----------------------------------------------------------------------------------


@pytest.fixture
def pytorch(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Something that is imported as torch, with torch.nn."""
    fake, nn = types.ModuleType("torch"), types.ModuleType("torch.nn")
    fake.nn, fake.__path__, fake.tensor, nn.Linear = nn, [], lambda: "a tensor", "a layer"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", fake)
    monkeypatch.setitem(sys.modules, "torch.nn", nn)
    return fake


class Loading:
    """Loads sources as scripts in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0

    def __call__(self, source: str) -> Any:
        """Load a script and return what its entry returns."""
        self.count += 1
        name = f"script_{os.getpid()}_{self.count}"
        path = write(self.folder / f"{name}.py", source)
        offered = Spark()
        self.module = load_script(str(path), name, Tree([str(self.folder)], {str(path): path.read_bytes()}), offered)
        self.entry = find_entry(self.module, offered.main_entry)
        return self.entry()


@pytest.fixture
def load(tmp_path: Path, pytorch: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loading]:
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    before = set(sys.modules)
    yield Loading(tmp_path)
    for each in set(sys.modules) - before:
        if each.startswith("script_"):
            del sys.modules[each]


@pytest.mark.parametrize(
    "imports",
    [
        "import torch",
        "import torch as torch",
        "import torch.nn as nn\nimport torch",
        "import torch\nimport torch.nn as nn",
        "import torch.nn",
        "import os, torch",
        "try:\n    import torch\nexcept ImportError:\n    raise",
        "if True:\n    import torch",
        "from typing import TYPE_CHECKING\nif not TYPE_CHECKING:\n    import torch",
        "for _ in range(1):\n    import torch",
        "match 1:\n    case 1:\n        import torch",
        "while True:\n    import torch\n    break",
    ],
)
def test_form_a_keeps_torch_pytorch_however_it_is_imported(load: Loading, imports: str) -> None:
    assert load(imports + "\n\ndef torch():\n    return torch.tensor(), torch.nn.Linear\n") == ("a tensor", "a layer")


def test_form_a_with_the_import_below_the_function(load: Loading) -> None:
    assert load("def torch():\n    return torch.tensor()\n\nimport torch\n") == "a tensor"


def test_form_a_with_module_code_after_the_entry_that_uses_pytorch(load: Loading) -> None:
    source = "import torch\n\ndef torch():\n    return LAYER\n\nLAYER = torch.nn.Linear\n"
    assert load(source) == "a layer"


def test_form_a_async(load: Loading) -> None:
    found = load("import torch\n\nasync def torch():\n    return torch.tensor()\n")
    with pytest.raises(StopIteration) as returned:
        found.send(None)
    assert returned.value.value == "a tensor"


def test_form_a_with_two_definitions_runs_the_last(load: Loading) -> None:
    source = "import torch\n\ndef torch():\n    return 1\n\ndef torch():\n    return torch.tensor(), 2\n"
    assert load(source) == ("a tensor", 2)


def test_form_a_with_a_decorator_keeps_the_decorator(load: Loading) -> None:
    source = """
        import functools
        import torch

        def twice(function):
            @functools.wraps(function)
            def both():
                return [function(), function()]
            return both

        @twice
        def torch():
            return torch.tensor()
    """
    assert load(source) == ["a tensor", "a tensor"]


def test_form_a_shows_the_name_that_was_written(load: Loading) -> None:
    source = "import torch, sys\n\ndef torch():\n    return sys._getframe().f_code.co_name, sys._getframe().f_lineno\n"
    assert load(source) == ("torch", 4)
    assert load.entry.__name__ == load.entry.__qualname__ == "torch"


def test_form_b_import_inside_the_function(load: Loading) -> None:
    assert load("def torch():\n    import torch\n    return torch.tensor()\n") == "a tensor"


@pytest.mark.parametrize("line", ["from torch import nn", "import torch.nn as nn"])
def test_form_c_from_import(load: Loading, line: str) -> None:
    assert load(f"{line}\n\ndef torch():\n    return nn.Linear\n") == "a layer"
    assert load.module.torch is load.entry


def test_form_c_import_as(load: Loading) -> None:
    assert load("import torch as pt\n\ndef torch():\n    return pt.tensor()\n") == "a tensor"


def test_form_d_forwards_attributes_to_pytorch(load: Loading) -> None:
    assert load("import torch\n\n@spark.main\ndef torch():\n    return torch.tensor(), torch.nn.Linear\n") == (
        "a tensor",
        "a layer",
    )


def test_form_d_is_no_pytorch_when_asked_for_what_pytorch_has_not(load: Loading) -> None:
    with pytest.raises(AttributeError):
        load("import torch\n\n@spark.main\ndef torch():\n    return torch.no_such_thing\n")


def test_form_d_async_is_still_seen_as_async(load: Loading) -> None:
    import inspect

    coroutine = load("import torch\n\n@spark.main\nasync def torch():\n    return torch.tensor()\n")
    coroutine.close()
    assert inspect.iscoroutinefunction(inspect.unwrap(load.entry))


def test_form_e_runs_whatever_name_is_marked(load: Loading) -> None:
    assert load("import torch\n\n@spark.main\ndef learn():\n    return torch.tensor()\n") == "a tensor"


def test_main_wins_over_torch(load: Loading) -> None:
    assert load("@spark.main\ndef learn():\n    return 'learn'\n\ndef torch():\n    return 'torch'\n") == "learn"


def test_the_last_main_wins(load: Loading) -> None:
    assert load("@spark.main\ndef one():\n    return 1\n\n@spark.main\ndef two():\n    return 2\n") == 2


def test_main_under_another_name_of_spark(load: Loading) -> None:
    source = "import torch\nmain = spark.main\n\n@main\ndef torch():\n    return torch.tensor()\n"
    assert load(source) == "a tensor"


def test_two_definitions_the_last_wins(load: Loading) -> None:
    assert load("def torch():\n    return 1\n\ndef torch():\n    return 2\n") == 2


@pytest.mark.parametrize(
    "source",
    [
        "x = 1\n",
        "",
        "import torch\n",
        "import torch as pt\n",
        "torch = 5\n",
        "torch = None\n",
        "class Model:\n    def torch(self): pass\n",
        "def outer():\n    def torch(): pass\n",
    ],
)
def test_a_script_without_an_entry_says_what_to_write(load: Loading, source: str) -> None:
    with pytest.raises(NoEntry, match=r"def torch\(\)"):
        load(source)


def test_from_future_imports_and_docstrings_work_in_form_a(load: Loading) -> None:
    source = (
        '"""Trains."""\nfrom __future__ import annotations\nimport torch\ndef torch() -> Nowhere:\n    return __doc__\n'
    )
    assert load(source) == "Trains."


def test_a_source_with_an_encoding_line_and_one_with_a_byte_order_mark(load: Loading, tmp_path: Path) -> None:
    for number, raw in enumerate(
        [
            b"# -*- coding: latin-1 -*-\ndef torch():\n    return '\xe9'\n",
            b"\xef\xbb\xbfdef torch():\n    return '\xc3\xa9'\n",
        ]
    ):
        path = tmp_path / f"script_enc_{number}.py"
        path.write_bytes(raw)
        module = load_script(str(path), path.stem, Tree([str(tmp_path)], {str(path): raw}), Spark())
        assert find_entry(module, None)() == "é"


# --- in the command --------------------------------------------------------------------------------------------------


@needs_torch
def test_form_a_trains_with_pytorch(tmp_path: Path) -> None:
    source = """
        import torch
        import torch.nn as nn

        def torch():
            model = nn.Linear(2, 1)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.ones(1, 2)).sum().backward()
                optimizer.step()
                spark.checkpoint()
            print("trained", torch.is_tensor(model.weight))
            raise ValueError("and then")
    """
    run = ended(write(tmp_path / "train.py", source))
    assert "trained True" in run.printed()
    assert run.code == 1
    error = run.all_events("error")[-1]
    assert "in torch\n" in error["text"]
    assert "__spark" not in error["text"]
    assert error["line"] == 13


@needs_torch
def test_form_d_works_under_the_runtime_and_under_plain_python(tmp_path: Path) -> None:
    source = """
        import torch
        from spark_runtime import spark

        @spark.main
        def torch():
            ones = spark.persist("ones", lambda: torch.ones(3))
            spark.checkpoint()
            print("sum", ones.sum().item(), torch.nn.Linear(1, 1).in_features)

        if __name__ == "__main__":
            print("guard")
            torch()
    """
    script = write(tmp_path / "train.py", source)
    run = ended(script)
    assert (run.printed(), run.code) == ("sum 3.0 1\n", 0)
    assert plain(script) == "guard\nsum 3.0 1\n"


@needs_torch
def test_form_c_works_under_plain_python(tmp_path: Path) -> None:
    source = """
        import torch as pt
        from torch import nn
        from spark_runtime import spark

        def torch():
            spark.checkpoint()
            print(nn.Linear(2, 1)(pt.zeros(2)).shape)

        if __name__ == "__main__":
            torch()
    """
    assert "torch.Size([1])" in plain(write(tmp_path / "train.py", source))


@pytest.mark.parametrize(
    ("head", "call"),
    [("def torch():", "torch()"), ("@spark.main\n        def learn():", "learn()")],
    ids=["form B", "form E"],
)
def test_forms_b_and_e_work_under_the_runtime_and_under_plain_python(tmp_path: Path, head: str, call: str) -> None:
    source = f"""
        from spark_runtime import spark

        {head}
            import math
            made = []
            value = spark.persist("key", lambda: made.append(1) or [7])
            print(value is spark.persist("key", lambda: [8]), made, spark.checkpoint() is not None)
            print(list(spark.range(3)), "key" in spark.persisted, spark.controller.status)
            spark.expose(value=value)
            spark.log(loss=1.0)
            print(spark.control("lr", 0.5, min=0, max=1))

        if __name__ == "__main__":
            print("guard")
            {call}
    """
    script = write(tmp_path / "train.py", source)
    expected = "True [1] True\n[0, 1, 2] True running\n0.5\n"
    run = ended(script)
    assert (run.printed(), run.code) == (expected, 0)
    assert plain(script) == "guard\n" + expected


def test_async_scripts_work_under_the_runtime_and_under_plain_python(tmp_path: Path) -> None:
    source = """
        import asyncio
        from spark_runtime import spark

        async def torch():
            value = spark.persist("key", lambda: [1])
            for _ in range(1000):
                await spark.checkpoint()
            async for i in spark.range(2):
                value.append(i)
            print(value)

        if __name__ == "__main__":
            print("guard")
            asyncio.run(torch())
    """
    script = write(tmp_path / "train.py", source)
    run = ended(script)
    assert (run.printed(), run.code) == ("[1, 0, 1]\n", 0)
    assert plain(script) == "guard\n[1, 0, 1]\n"


def test_await_under_plain_python_gives_other_tasks_a_turn(tmp_path: Path) -> None:
    source = """
        import asyncio, time
        from spark_runtime import spark

        async def other(turns):
            while True:
                turns.append(1)
                await asyncio.sleep(0)

        async def torch():
            turns = []
            task = asyncio.ensure_future(other(turns))
            for _ in range(20):
                time.sleep(0.002)
                await spark.checkpoint()
            print(len(turns) >= 10)

        if __name__ == "__main__":
            asyncio.run(torch())
    """
    assert plain(write(tmp_path / "train.py", source)) == "True\n"


@pytest.mark.parametrize("source", ["x = 1\n", "torch = 5\n"])
def test_a_script_without_torch_ends_with_one_sentence(tmp_path: Path, source: str) -> None:
    done = spark("run", str(write(tmp_path / "train.py", source)), cwd=tmp_path)
    assert done.returncode not in (0, None)
    assert "def torch():" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_script_that_defines_main_but_no_torch_is_told_what_to_do(tmp_path: Path) -> None:
    run = ended(write(tmp_path / "train.py", "def main():\n    pass\n"))
    assert "@spark.main" in run.all_events("error")[-1]["text"]


@pytest.mark.parametrize("name", ["torch.py", "random.py", "json.py"])
def test_a_script_named_like_a_module_is_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    script = write(tmp_path / name, "def torch():\n    pass\n")
    done = spark("run", str(script), cwd=tmp_path.parent)  # `python -m spark_cli` itself would import it from here
    assert done.returncode == 2
    assert name.removesuffix(".py") in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_named_torch_beside_the_script_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("")
    done = spark("run", str(write(tmp_path / "train.py", "def torch():\n    pass\n")), cwd=tmp_path)
    assert done.returncode == 2
    assert "torch" in done.stderr
    assert "Traceback" not in done.stderr


# --- as in plain Python ----------------------------------------------------------------------------------------------

ABOUT = """
    import json, os, sys

    def torch():
        print(json.dumps({
            "file": __file__, "argv": sys.argv, "path": sys.path[0], "cwd": os.getcwd(),
            "is absolute": os.path.isabs(__file__), "doc": __doc__, "stdin": sys.stdin.read(),
        }))

    if __name__ == "__main__":
        torch()
"""


def test_file_arguments_path_and_folder_are_as_in_plain_python(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    script = write(tmp_path / "sub" / "train.py", ABOUT)
    arguments = ("one", "--two", "--json", "-x", "a b", "")
    done = spark("run", str(script), "--", *arguments, cwd=tmp_path)
    assert json.loads(done.stdout) == json.loads(plain(script, *arguments, cwd=tmp_path))


def test_a_relative_script_in_another_folder_is_as_in_plain_python(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "train.py", ABOUT)
    done = spark("run", "sub/train.py", "--", "one", cwd=tmp_path)
    assert json.loads(done.stdout) == json.loads(plain(Path("sub/train.py"), "one", cwd=tmp_path))


def test_a_script_behind_a_link_is_as_in_plain_python(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    write(tmp_path / "real" / "train.py", ABOUT)
    (tmp_path / "link.py").symlink_to(tmp_path / "real" / "train.py")
    done = spark("run", str(tmp_path / "link.py"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    mine, pythons = json.loads(done.stdout), json.loads(plain(tmp_path / "link.py", cwd=tmp_path))
    assert mine["path"] == pythons["path"]
    assert (mine["file"], mine["argv"]) == (pythons["file"], pythons["argv"])


def test_the_name_is_the_file_s_and_the_guard_does_not_run(tmp_path: Path) -> None:
    source = """
        def torch():
            print(__name__)

        if __name__ == "__main__":
            raise SystemExit("the guard ran")
    """
    run = ended(write(tmp_path / "train.py", source))
    assert (run.printed(), run.code) == ("train\n", 0)


def test_a_script_with_a_dash_in_its_name_reloads_and_finds_its_classes(tmp_path: Path) -> None:
    source = """
        import pickle, time
        RATE = 1

        class Kept:
            rate = property(lambda self: RATE)

        def torch():
            kept = spark.persist("kept", Kept)
            print("rate", kept.rate, isinstance(pickle.loads(pickle.dumps(kept)), Kept), type(kept) is Kept)
            while True: spark.checkpoint(); time.sleep(0.002)
    """
    with running(write(tmp_path / "my-script 2.py", source)) as run:
        run.wait_printed("rate 1 True True")
        run.save(source.replace("RATE = 1", "RATE = 2"))
        run.wait_printed("rate 2 True True")


def test_classes_of_the_script_pickle_by_name(tmp_path: Path) -> None:
    source = """
        import pickle, sys
        from dataclasses import dataclass

        @dataclass
        class Point:
            x: int
            class Inner: pass

        def helper(): pass

        def torch():
            for each in (Point, Point.Inner, helper, Point(3)):
                assert pickle.loads(pickle.dumps(each)) == each
            print(sys.modules[Point.__module__].Point is Point, b"train" in pickle.dumps(Point))
    """
    assert ended(write(tmp_path / "train.py", source)).printed() == "True True\n"


def test_standard_input_is_empty(tmp_path: Path) -> None:
    run = ended(write(tmp_path / "train.py", "import sys\ndef torch():\n    print(repr(sys.stdin.read()))\n"))
    assert run.printed() == "''\n"


@pytest.mark.parametrize("what", ["input('name? ')", "breakpoint()"])
def test_input_and_breakpoint_say_what_to_do(tmp_path: Path, what: str) -> None:
    run = ended(write(tmp_path / "train.py", f"def torch():\n    {what}\n"))
    assert run.code == 1
    error = run.all_events("error")[-1]
    last = error["text"].strip().splitlines()[-1]
    assert what.partition("(")[0] in last
    assert "spark run" in last
    assert error["line"] == 2


# --- processes of the script's own -----------------------------------------------------------------------------------

POOL = """
    import multiprocessing, os, sys, time
    VALUE = 1

    class Item:
        def __init__(self, number): self.number = number
        def doubled(self): return Item(self.number * 2 * VALUE)

    def work(item):
        return item.doubled()

    def torch():
        context = multiprocessing.get_context("METHOD")
        def go():
            with context.Pool(1) as pool:
                found = pool.map(work, [Item(1), Item(2)])
            return [type(each) is Item and each.number for each in found]
        print("found", go())
        spark.expose(go=go)
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_find_the_script_s_classes_with_every_start_method(tmp_path: Path, method: str) -> None:
    with running(write(tmp_path / "train.py", POOL.replace("METHOD", method))) as run:
        run.wait_for("state", state="idle")
        run.wait_printed("found [2, 4]\n")
        assert json.loads(run.ctl("call", "go").stdout) == [2, 4]
        assert run.stop() == 0
    assert run.stderr == ""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_child_runs_the_code_that_runs_though_the_file_is_broken(tmp_path: Path, method: str) -> None:
    with running(write(tmp_path / "train.py", POOL.replace("METHOD", method))) as run:
        run.wait_for("state", state="idle")
        run.wait_printed("found [2, 4]\n")
        run.save("this is no Python\n")
        run.wait_for("error", kind="syntax")
        assert json.loads(run.ctl("call", "go").stdout) == [2, 4]
        run.save(POOL.replace("METHOD", method).replace("VALUE = 1", "VALUE = 10"))
        run.wait_for("state", state="idle")
        run.wait_printed("found [20, 40]\n")
        assert json.loads(run.ctl("call", "go").stdout) == [20, 40]


def test_a_child_finds_helper_modules_as_they_ran(tmp_path: Path) -> None:
    write(tmp_path / "helper.py", "VALUE = 3\n")
    source = """
        import multiprocessing, time
        import helper

        def work(number): return number * helper.VALUE

        def go():
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                return pool.map(work, [1, 2])

        def torch():
            spark.expose(go=go)
    """
    with running(write(tmp_path / "train.py", source), "--no-watch") as run:
        run.wait_for("state", state="idle")
        write(tmp_path / "helper.py", "VALUE = 4\n")
        assert json.loads(run.ctl("call", "go").stdout) == [3, 6]


@needs_torch
@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_form_a_s_dataloader_has_workers_with_every_start_method(tmp_path: Path, method: str) -> None:
    source = f"""
        import torch
        from torch.utils.data import DataLoader, Dataset

        class Squares(Dataset):
            def __len__(self): return 4
            def __getitem__(self, index): return torch.tensor(index * index)

        def collate(items):
            return torch.stack(items)

        def torch():
            torch.set_num_threads(1)
            loader = DataLoader(
                Squares(), batch_size=2, num_workers=1, multiprocessing_context={method!r}, collate_fn=collate
            )
            for epoch in range(2):
                for batch in loader:
                    spark.checkpoint()
                    print("batch", batch.tolist())
    """
    run = ended(write(tmp_path / "train.py", source))
    assert run.printed() == "batch [0, 1]\nbatch [4, 9]\n" * 2, run.stderr
    assert run.code == 0


def test_a_fork_in_the_script_does_not_disturb_the_channel(tmp_path: Path) -> None:
    source = """
        import os, time
        RATE = 1

        def torch():
            step = spark.persist("step", lambda: [0])
            child = os.fork()
            if child == 0:
                spark.expose(wrong=1, bad=lambda: 1)
                spark.persist("other", lambda: 1)
                for _ in range(200):
                    spark.checkpoint()
                spark.controller.stop()
                spark.checkpoint()
                os._exit(7)
            _, status = os.waitpid(child, 0)
            print("child", os.waitstatus_to_exitcode(status), "rate", RATE)
            spark.expose(step=step)
            while True:
                step[0] += 1
                spark.checkpoint()
                time.sleep(0.002)
    """
    with running(write(tmp_path / "train.py", source)) as run:
        run.wait_printed("child 7 rate 1")
        run.wait_for("values", values=lambda shown: shown.get("step", [0])[0] > 5)
        run.save(source.replace("RATE = 1", "RATE = 2"))
        run.wait_printed("child 7 rate 2")
        shown = run.wait_for("values", values=lambda shown: shown.get("step", [0])[0] > 5)
        assert "wrong" not in shown["values"]
        assert run.status()["functions"] == {}
        assert run.stop() == 0


@pytest.mark.parametrize("ending", ["return", "raise ValueError('in the child')", "raise SystemExit(3)"])
def test_a_forked_child_that_leaves_torch_is_not_the_end_of_the_run(tmp_path: Path, ending: str) -> None:
    source = f"""
        import os, time

        def torch():
            child = os.fork()
            if child == 0:
                {ending}
            _, status = os.waitpid(child, 0)
            print("child ended")
            for _ in range(10):
                spark.checkpoint()
                time.sleep(0.005)
            print("parent ends")
    """
    run = ended(write(tmp_path / "train.py", source))
    assert run.printed() == "child ended\nparent ends\n"
    assert run.code == 0
    assert not run.all_events("error")


def test_a_fork_that_outlives_the_worker_does_not_hold_up_a_reload(tmp_path: Path) -> None:
    source = """
        import os, time
        RATE = 1

        def torch():
            if os.fork() == 0:
                time.sleep(30)
                os._exit(0)
            print("rate", RATE)
            while True: spark.checkpoint(); time.sleep(0.002)
    """
    with running(write(tmp_path / "train.py", source)) as run:
        run.wait_printed("rate 1")
        run.save(source.replace("RATE = 1", "RATE = 2"))
        run.wait_for("reload", seconds=5)
        run.wait_printed("rate 2")
        assert run.stop() == 0


# --- helper modules --------------------------------------------------------------------------------------------------


def test_an_edited_helper_module_reloads(tmp_path: Path) -> None:
    write(tmp_path / "helper.py", "VALUE = 1\n")
    source = f"""
        import time, helper

        def torch():
            print("value", helper.VALUE)
            {LONG}
    """
    with running(write(tmp_path / "train.py", source)) as run:
        run.wait_printed("value 1\n")
        run.save("VALUE = 2\n", tmp_path / "helper.py")
        run.wait_printed("value 2\n")


def test_helpers_in_packages_with_relative_imports_reload(tmp_path: Path) -> None:
    package = tmp_path / "parts" / "deep"
    package.mkdir(parents=True)
    write(tmp_path / "parts" / "__init__.py", "from .layers import LAYERS\n")
    write(tmp_path / "parts" / "layers.py", "from .deep.numbers import NUMBER\nLAYERS = NUMBER\n")
    write(package / "__init__.py", "")
    write(package / "numbers.py", "NUMBER = 1\n")
    source = f"""
        import time, parts

        def torch():
            print("value", parts.LAYERS)
            {LONG}
    """
    with running(write(tmp_path / "train.py", source)) as run:
        run.wait_printed("value 1\n")
        run.save("NUMBER = 2\n", package / "numbers.py")
        run.wait_printed("value 2\n")
        run.save("from .layers import LAYERS as L\nLAYERS = L + 5\n", tmp_path / "parts" / "__init__.py")
        run.wait_printed("value 7\n")


def test_a_helper_without_init_file_reloads(tmp_path: Path) -> None:
    (tmp_path / "space").mkdir()
    write(tmp_path / "space" / "one.py", "VALUE = 1\n")
    source = f"""
        import time
        from space import one

        def torch():
            print("value", one.VALUE)
            {LONG}
    """
    with running(write(tmp_path / "train.py", source)) as run:
        run.wait_printed("value 1\n")
        run.save("VALUE = 2\n", tmp_path / "space" / "one.py")
        run.wait_printed("value 2\n")


def test_a_helper_imported_inside_torch_reloads(tmp_path: Path) -> None:
    (tmp_path / "late").mkdir()
    write(tmp_path / "late" / "__init__.py", "")
    write(tmp_path / "late" / "helper.py", "VALUE = 1\n")
    source = f"""
        import time

        def torch():
            from late.helper import VALUE
            spark.expose(value=VALUE)
            print("value", VALUE)
            {LONG}
    """
    with running(write(tmp_path / "train.py", source)) as run:
        run.wait_for("values", values={"value": 1})
        run.save("VALUE = 2\n", tmp_path / "late" / "helper.py")
        run.wait_for("values", values={"value": 2})


def test_a_helper_imported_after_it_was_edited_runs_as_it_is_now(tmp_path: Path) -> None:
    write(tmp_path / "helper.py", "VALUE = 1\n")
    source = """
        import time, os

        def torch():
            while not os.path.exists("go"): spark.checkpoint(); time.sleep(0.002)
            import helper
            print("value", helper.VALUE)
    """
    with running(write(tmp_path / "train.py", source)) as run:
        run.wait_for("state", state="running")
        write(tmp_path / "helper.py", "VALUE = 2\n")
        (tmp_path / "go").touch()
        run.wait_printed("value 2\n")
        assert run.wait_end() == 0


def test_a_helper_missing_at_first_is_picked_up_when_it_appears(tmp_path: Path) -> None:
    source = f"""
        import time
        try:
            import helper
            VALUE = helper.VALUE
        except ImportError:
            VALUE = "nothing"

        def torch():
            print("value", VALUE)
            {LONG}
    """
    with running(write(tmp_path / "train.py", source)) as run:
        run.wait_printed("value nothing\n")
        run.save("VALUE = 2\n", tmp_path / "helper.py")
        run.wait_printed("value 2\n")


def test_a_broken_helper_leaves_the_old_code_running_and_names_the_line(tmp_path: Path) -> None:
    write(tmp_path / "helper.py", "VALUE = 1\n")
    source = """
        import time, helper

        def torch():
            step = spark.persist("step", lambda: [0])
            spark.expose(step=step)
            print("value", helper.VALUE)
            while True: step[0] += 1; spark.checkpoint(); time.sleep(0.002)
    """
    with running(write(tmp_path / "train.py", source)) as run:
        run.wait_printed("value 1\n")
        run.save("VALUE = 2\n1 / 0\n", tmp_path / "helper.py")
        error = run.wait_for("error", kind="load")
        assert (Path(error["file"]).name, error["line"]) == ("helper.py", 2)
        run.wait_for("values")
        run.save("VALUE = 3\n", tmp_path / "helper.py")
        run.wait_printed("value 3\n")
        assert "value 2" not in run.printed()


def test_a_save_that_changes_only_comments_does_nothing(tmp_path: Path) -> None:
    write(tmp_path / "helper.py", "VALUE = 1\n")
    source = textwrap.dedent(f"""
        import time, helper

        def torch():
            print("value", helper.VALUE)
            {LONG}
    """)
    with running(write(tmp_path / "train.py", source)) as run:
        run.wait_printed("value 1\n")
        run.save("# a remark\nVALUE  =  1  # another\n", tmp_path / "helper.py")
        run.save("# a remark\n" + source)
        run.save("VALUE = 2\n", tmp_path / "helper.py")
        run.wait_for("reload")
        run.wait_printed("value 2\n")
        assert run.printed() == "value 1\nvalue 2\n"


def _same_second(path: Path, source: str) -> None:
    """Replace a file by one of the same size and time."""
    before = path.stat()
    assert len(source) == before.st_size
    fresh = path.with_name("fresh")
    fresh.write_text(source)
    os.utime(fresh, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(fresh, path)


def test_a_stale_bytecode_file_is_never_used(tmp_path: Path) -> None:
    helper = write(tmp_path / "helper.py", "VALUE = 1\n")
    command = write(tmp_path / "look.py", "import helper\nprint(helper.VALUE)\n")
    environment = {"PYTHONDONTWRITEBYTECODE": ""}
    assert plain(command, **environment) == "1\n"
    _same_second(helper, "VALUE = 2\n")
    assert plain(command, **environment) == "1\n"  # plain Python is fooled: that is what this test is about
    script = write(tmp_path / "train.py", "import helper\ndef torch():\n    print(helper.VALUE)\n")
    assert ended(script).printed() == "2\n"


def test_an_edit_of_the_same_size_and_second_reloads(tmp_path: Path) -> None:
    helper = write(tmp_path / "helper.py", "VALUE = 1\n")
    source = f"""
        import time, helper

        def torch():
            print("value", helper.VALUE)
            {LONG}
    """
    with running(write(tmp_path / "train.py", source)) as run:
        run.wait_printed("value 1\n")
        _same_second(helper, "VALUE = 2\n")
        run.wait_printed("value 2\n")
        _same_second(helper, "VALUE = 3\n")
        run.wait_printed("value 3\n")
