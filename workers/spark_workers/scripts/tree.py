"""The user's own source files: found, read and compiled here, never from a bytecode cache.

Python's cache goes by a file's time in whole seconds and its size, so an edit within the second it was loaded in can
be missed. A supervisor that reloads at every save would meet that daily. Reading the source here also gives the exact
digest of what runs, lets the supervisor hand over the very bytes it has checked, and keeps tracebacks showing the
lines that run rather than those on disk.
"""

import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import linecache
import os
import sys
import sysconfig
import tempfile
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

ENVIRONMENT = "SPARKRT_TREE"
_INSTALLED_PARTS = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")

Compile = Callable[[bytes, str], types.CodeType]


def compile_plainly(source: bytes, path: str) -> types.CodeType:
    """Compile a helper module as it stands."""
    return compile(source, path, "exec", dont_inherit=True)


class Tree:
    """Knows which files are the user's and what was read of them."""

    def __init__(self, roots: Sequence[str], sources: Mapping[str, bytes]) -> None:
        self.files: dict[str, str] = {}  # path to digest, of everything read
        self.wanted: list[str] = []  # files that an import of the user's looked for and did not find
        self._roots = [os.path.join(os.path.realpath(root), "") for root in roots]
        self._given = dict(sources)
        self._known: dict[str, bool] = {}
        self._read: dict[str, bytes] = {}
        self._installed = _installed_folders()
        self._published: str | None = None

    def is_own(self, path: str) -> bool:
        """Tell whether *path* is a file of the user's rather than an installed one."""
        known = self._known.get(path)
        if known is None:
            known = self._known[path] = self._is_own(path)
        return known

    def _is_own(self, path: str) -> bool:
        if any(part in path for part in _INSTALLED_PARTS) or path.startswith(self._installed):
            return False  # most are: told without asking the file system
        real = os.path.realpath(path)
        if any(part in real for part in _INSTALLED_PARTS) or real.startswith(self._installed):
            return False
        return any(real.startswith(root) for root in self._roots)

    def read(self, path: str) -> bytes:
        """Return the source to run for *path*: the supervisor's if it gave one, else the file's."""
        source = self._given.get(path)
        if source is None:
            with open(path, "rb") as file:
                source = file.read()
        self.files[path] = hashlib.sha256(source).hexdigest()
        self._read[path] = source
        text = importlib.util.decode_source(source) if source else ""
        # No time of change: linecache then never looks at the disk again.
        linecache.cache[path] = (len(source), None, text.splitlines(keepends=True), path)
        if self._published is not None:
            self.publish(self._script)
        return source

    def miss(self, name: str) -> None:
        """An import of *name* found nothing: these files would change that."""
        relative = name.replace(".", os.sep)
        for root in self._roots:
            self.wanted += [f"{root}{relative}.py", os.path.join(root, relative, "__init__.py")]

    def publish(self, script: "tuple[str, str]") -> None:
        """Let processes that the script spawns run the same sources, whatever is on disk by then.

        multiprocessing's children import the script again, minutes later perhaps, when the file may be edited and
        broken. *script* is its path and its module name.
        """
        self._script = script
        content = {
            "script": script,
            "roots": self._roots,
            "sources": {path: source.decode("latin-1") for path, source in self._read.items()},
        }
        encoded = json.dumps(content).encode()
        if self._published is None:
            self._descriptor, self._published = _shared_file()
            os.environ[ENVIRONMENT] = self._published
        os.pwrite(self._descriptor, encoded, 0)
        os.ftruncate(self._descriptor, len(encoded))


def read_published(path: str) -> tuple[Tree, tuple[str, str]]:
    """Return what the parent worker published: its tree, and its script's path and module name."""
    with open(path, "rb") as file:
        content: dict[str, Any] = json.loads(file.read())
    sources = {path: source.encode("latin-1") for path, source in content["sources"].items()}
    script, module = content["script"]
    return Tree(content["roots"], sources), (script, module)


class OwnFinder(importlib.abc.MetaPathFinder):
    """Finds what Python's own path finder finds, and loads the user's files through `Tree`."""

    def __init__(self, tree: Tree, special: Mapping[str, Compile]) -> None:
        self._tree = tree
        self._special = special  # files that are not compiled as they stand

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None:
            self._tree.miss(name)
            return None
        loader, origin = spec.loader, spec.origin
        if type(loader) is importlib.machinery.SourceFileLoader and origin and self._tree.is_own(origin):
            compiler = self._special.get(os.path.realpath(origin), compile_plainly)
            spec.loader = OwnLoader(name, origin, self._tree, compiler)
            spec.cached = None
        return spec


class OwnLoader(importlib.machinery.SourceFileLoader):
    """Loads one file of the user's."""

    def __init__(self, name: str, path: str, tree: Tree, compiler: Compile) -> None:
        super().__init__(name, path)
        self._tree = tree
        self._compiler = compiler

    def get_code(self, fullname: str) -> types.CodeType:
        path = self.get_filename(fullname)
        return self._compiler(self._tree.read(path), path)


def forget_shadowed(roots: Sequence[str], tree: Tree) -> None:
    """Drop preloaded modules that the user's own files of the same name would hide in plain Python."""
    for root in roots[:1]:
        try:
            entries = os.listdir(root)
        except OSError:
            continue
        own = {entry.removesuffix(".py") for entry in entries if entry.endswith(".py")}
        own |= {entry for entry in entries if os.path.isfile(os.path.join(root, entry, "__init__.py"))}
        for name in filter(sys.modules.__contains__, own):
            origin = getattr(sys.modules.get(name), "__file__", None)
            if (
                name not in sys.stdlib_module_names
                and not (origin and tree.is_own(origin))
                and not name.startswith("spark_")
            ):
                for each in [each for each in sys.modules if each == name or each.startswith(f"{name}.")]:
                    del sys.modules[each]


def installed_modules(tree: Tree) -> list[str]:
    """Return the imported modules that a nursery may import ahead: those that are not the user's own."""
    names = []
    for name, module in list(sys.modules.items()):
        spec = getattr(module, "__spec__", None)
        origin = getattr(module, "__file__", None)
        if spec is None or spec.name != name or origin is None or tree.is_own(origin):
            continue
        if name.startswith(("spark_workers.scripts.main_module", "__")):
            continue
        names.append(name)
    return names


def _installed_folders() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    folders = {os.path.realpath(paths[key]) for key in ("stdlib", "platstdlib", "purelib", "platlib")}
    own = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # our package in a checkout
    return tuple(os.path.join(folder, "") for folder in {*folders, os.path.join(own, "spark_workers")})


def _shared_file() -> tuple[int, str]:
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("sparkrt-tree")
        return descriptor, f"/proc/{os.getpid()}/fd/{descriptor}"
    descriptor, path = tempfile.mkstemp(prefix="sparkrt-tree-")
    return descriptor, path
