"""Turns a script's source into a module and its entry, in all the forms people write.

    A   import torch            and  def torch():   the entry leaves the module, so that `torch` stays PyTorch
    B   def torch():  import torch                  inside the function
    C   from torch import nn    and  def torch():   nothing clashes
    D   @spark.main             over def torch():   the decorator's result forwards to the module it shadows
    E   @spark.main             over any name

The script is loaded as an importable module under its file's name, so that pickle and multiprocessing find its
classes; ``__name__`` is that name, and a ``__main__`` guard stays for plain Python.
"""

import ast
import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from typing import Any

from spark_workers.scripts.errors import SparkUsageError
from spark_workers.scripts.tree import OwnFinder, OwnLoader, Tree

HIDDEN = "__spark_entry__"
ENTRY = "torch"

Entry = Callable[[], Any]


class NoEntry(SparkUsageError):
    """The script has nothing to run."""


def compile_script(source: bytes, path: str) -> types.CodeType:
    """Compile a script, with a clashing ``def torch()`` (form A) moved to a hidden name."""
    tree = ast.parse(source, path)
    for entry in _clashing_entries(tree):
        entry.name = HIDDEN
    return compile(tree, path, "exec", dont_inherit=True)


def load_script(path: str, name: str, tree: Tree, offered: object) -> types.ModuleType:
    """Execute the top level of a script and return its module; *offered* is its global ``spark``.

    Raises:
        BaseException: Whatever the script's top level raises.
    """
    finder = OwnFinder(tree, {os.path.realpath(path): compile_script})
    sys.meta_path.insert(0, finder)
    loader = OwnLoader(name, path, tree, compile_script)
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__dict__["spark"] = offered
    sys.modules[name] = module
    loader.exec_module(module)
    return module


def find_entry(module: types.ModuleType, marked: Entry | None) -> Entry:
    """Return the function to run: the one under ``@spark.main``, else ``torch``.

    Raises:
        NoEntry: There is none.
    """
    entry = marked or module.__dict__.get(HIDDEN) or module.__dict__.get(ENTRY)
    if isinstance(entry, types.FunctionType) and entry.__name__ == HIDDEN:
        _show_as_written(entry)
    if not callable(entry) or isinstance(entry, (types.ModuleType, type)):
        raise NoEntry(
            f"{module.__file__}:1: there is no torch(): define `def torch():`, or put `@spark.main` over a function"
        )
    return entry


class Shadow:
    """What ``@spark.main`` makes of ``def torch()`` below ``import torch``: the function, with the module behind it."""

    def __init__(self, function: Entry, module: types.ModuleType) -> None:
        self.__wrapped__ = function
        self.__module = module

    def __call__(self) -> Any:
        return self.__wrapped__()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__module, name)


def _show_as_written(entry: types.FunctionType) -> None:
    entry.__name__ = entry.__qualname__ = ENTRY
    entry.__code__ = entry.__code__.replace(co_name=ENTRY)
    if sys.version_info >= (3, 11):
        entry.__code__ = entry.__code__.replace(co_qualname=ENTRY)


def _clashing_entries(tree: ast.Module) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    if not any(_imports_torch(node) for node in _top_level(tree.body)):
        return []
    functions = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return [node for node in functions if node.name == ENTRY and not _is_marked(node)]


def _top_level(body: list[ast.stmt]) -> list[ast.stmt]:
    """The statements that run at the top level, those inside ``if``, ``for``, ``try`` and the like included."""
    found = []
    for node in body:
        found.append(node)
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            inner = [
                each
                for part in (node, *getattr(node, "handlers", ()), *getattr(node, "cases", ()))
                for each in ast.iter_child_nodes(part)
                if isinstance(each, ast.stmt)
            ]
            found += _top_level(inner)
    return found


def _imports_torch(node: ast.stmt) -> bool:
    if not isinstance(node, ast.Import):
        return False
    return any((each.asname or each.name.partition(".")[0]) == ENTRY for each in node.names)


def _is_marked(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(isinstance(each, ast.Attribute) and each.attr == "main" for each in node.decorator_list)
