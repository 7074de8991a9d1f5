"""The user's code as the supervisor knows it: what runs, what was saved, and whether the difference matters."""

import ast
import hashlib
import os
import stat
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from spark_runtime.errors import ScriptUnusable, SparkError


class CodeBroken(SparkError):
    """A saved file does not compile. The message is what Python would print."""

    def __init__(self, text: str, path: Path, line: int) -> None:
        super().__init__(text)
        self.text = text
        self.path = path
        self.line = line


@dataclass(frozen=True)
class Version:
    """One state of the script and the modules of the user's that it imports. The script comes first."""

    number: int
    sources: Mapping[Path, bytes]

    @property
    def script(self) -> Path:
        """The script's own file."""
        return next(iter(self.sources))


class Code:
    """Knows what every file that belongs to the script holds on disk."""

    def __init__(self, script: Path) -> None:
        self._script = script
        self._known: dict[Path, bytes] = {script: script.read_bytes()}
        self._wanted: set[Path] = set()
        self._versions = 0
        self._is_gone = False
        self._shapes: dict[str, str] = {}

    def version(self) -> Version:
        """Return the files as they are known now, as a new version."""
        self._versions += 1
        script = {self._script: self._known[self._script]}
        return Version(self._versions, {**script, **self._known})

    def learn(self, files: Mapping[str, str], wanted: list[str]) -> dict[Path, bytes]:
        """A worker has read *files* (path to digest) and looked for *wanted* in vain; return the sources of *files*."""
        for path, digest in ((Path(name), digest) for name, digest in files.items()):
            if path not in self._known:
                content = _read(path)
                # If it was saved since, the digest differs, and watching will report it.
                self._known[path] = content if content is not None and _digest(content) == digest else b""
        self._wanted.update(Path(name) for name in wanted)
        return {Path(name): self._known[Path(name)] for name in files}

    def watched(self) -> dict[Path, str | None]:
        """Every file whose saving matters, with the digest of what is known of it; None if it is not there."""
        missing: dict[Path, str | None] = dict.fromkeys(self._wanted)
        return {**missing, **{path: _digest(source) for path, source in self._known.items()}}

    def saved(self, changes: Mapping[Path, bytes | None]) -> None:
        """Take in what saved files hold; None for a file that is gone."""
        self._is_gone = changes.get(self._script, b"") is None
        for path, source in changes.items():
            if source is not None:
                self._known[path] = source
            elif path != self._script:
                self._known.pop(path, None)
                self._wanted.add(path)

    def check(self) -> None:
        """Compile what is known. Slow for large files, so it is called beside the loop.

        Raises:
            CodeBroken: The script is gone, or one of the files does not compile.
        """
        if self._is_gone:
            raise CodeBroken(f"{self._script} is gone\n", self._script, 0)
        for path, source in list(self._known.items()):
            self._check(path, source)

    def differences(self, version: Version) -> list[Path]:
        """Return the files that would run differently from *version*: comments and spaces make no difference."""
        paths = {**version.sources, **self._known}
        return [path for path in paths if self._differs(path, version.sources.get(path), self._known.get(path))]

    def _differs(self, path: Path, old: bytes | None, new: bytes | None) -> bool:
        if old is None or new is None or old == new:
            return old is not new and old != new
        return self._shape(path, old) != self._shape(path, new)

    def _check(self, path: Path, source: bytes) -> None:
        try:
            self._shape(path, source)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as problem:
            line = getattr(problem, "lineno", 0) or 0
            raise CodeBroken(describe_syntax_error(problem, path), path, line) from problem

    def _shape(self, path: Path, source: bytes) -> str:
        digest = _digest(source)
        if digest not in self._shapes:
            self._shapes[digest] = _shape(source, path)
        return self._shapes[digest]


def check_script(script: Path) -> tuple[Path, list[str]]:
    """Return the script's absolute path, and warnings for the user.

    Raises:
        ScriptUnusable: It cannot be run; the message says why and what to do.
    """
    try:
        status = script.stat()
    except OSError as problem:
        raise ScriptUnusable(f"{script}: {problem.strerror}; give the path of a Python file") from problem
    if stat.S_ISDIR(status.st_mode):
        raise ScriptUnusable(f"{script} is a folder; give the path of a Python file in it")
    if not stat.S_ISREG(status.st_mode):
        raise ScriptUnusable(f"{script} is not a regular file; give the path of a Python file")
    path = Path(os.path.abspath(script))
    check_names(path)
    check_names(Path(os.path.realpath(path)))
    _check_text(path)
    notes = []
    if status.st_mode & stat.S_IWOTH:
        notes.append(
            f"{script} can be written by every user of this machine, and runs when saved: `chmod o-w {script}`"
        )
    return path, notes


def describe_syntax_error(problem: BaseException, path: Path) -> str:
    """Return the error as Python prints it."""
    import traceback

    if isinstance(problem, SyntaxError):
        return "".join(traceback.format_exception_only(problem))
    return f"{path}: {type(problem).__name__}: {problem}\n"


def check_names(path: Path) -> None:
    """See that neither the script nor what lies beside it hides a module that scripts need.

    Raises:
        ScriptUnusable: One does.
    """
    if path.stem == "torch":
        raise ScriptUnusable(f"{path} hides PyTorch from itself and every module beside it; rename it, to train.py say")
    if path.stem in sys.stdlib_module_names:
        raise ScriptUnusable(f"{path} hides Python's own module {path.stem!r} from every module beside it; rename it")
    for name in sorted(os.listdir(path.parent)):
        stem = name.removesuffix(".py")
        is_module = name.endswith(".py") or (path.parent / name / "__init__.py").is_file()
        if stem == "torch" and (is_module or (path.parent / name).is_dir()):
            raise ScriptUnusable(f"{path.parent / name} hides PyTorch from {path.name}; rename it")
        if is_module and stem in sys.stdlib_module_names:
            raise ScriptUnusable(f"{path.parent / name} hides Python's own module {stem!r} from {path.name}; rename it")


def _check_text(path: Path) -> None:
    try:
        source = path.read_bytes()
    except OSError as problem:
        raise ScriptUnusable(f"{path}: {problem.strerror}; make it readable") from problem
    try:
        source.decode("utf-8")
    except UnicodeDecodeError as problem:
        if b"coding" in b"".join(source.splitlines()[:2]):
            return  # it says what it is; Python judges that
        line = source.count(b"\n", 0, problem.start) + 1
        raise ScriptUnusable(
            f"{path}:{line}: byte {source[problem.start]:#x} is not UTF-8; save the file as UTF-8, or name its "
            "encoding in the first line: # -*- coding: latin-1 -*-"
        ) from problem


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _digest(source: bytes) -> str:
    return hashlib.sha256(source).hexdigest()


def _shape(source: bytes, path: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a SyntaxWarning is the worker's to show, once
        tree = ast.parse(source, str(path))
        compile(tree, str(path), "exec", dont_inherit=True)  # finds what parsing does not: `return` outside a function
    return hashlib.sha256(ast.dump(tree).encode("utf-8", "surrogatepass")).hexdigest()
