"""Prepared models: compiled once, checked and mapped ever after.

`ModelCache.prepare` is the way from a module to machine code that replicas can map. It knows no processes: whoever
calls it says how compiling is done. What is on the disk is the ledger of `cache_folder`; here are the order of things
and what happens where there is no folder to be had: the code then lives in memory for as long as this process uses it.
"""

from __future__ import annotations

import json
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from spark_runtime.errors import BadRequestError, ProtocolViolated, StoreError
from spark_runtime.models.cache_folder import CacheFolder, Found, Removed, default_folder
from spark_runtime.models.identity import engine_identity, entry_key
from spark_runtime.models.model_file import ModelFile
from spark_runtime.models.scratch import Scratch

__all__ = ["CacheEntry", "ModelCache", "ModelFile", "Prepared", "Removed", "engine_identity"]

LIMIT_VARIABLE = "SPARKRT_CACHE_BYTES"
LIMIT_BYTES = 2 << 30
WAIT_SECONDS = 600.0  # as long as a compilation may take

#: Compile what the first descriptor holds into the file of the second one, and return the report.
Compiling = Callable[[int, int], dict[str, Any]]


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Prepared:
    """A model that replicas can load. Its code stays where it is for as long as this object lives.

    Attributes:
        code: The path of the machine code.
        report: What the compile worker said of the module.
        key: The name of the entry in the cache.
        from_cache: Nothing was compiled for it now.
        seconds: How long compiling took, now or when it was done.
        size: Bytes of machine code.
    """

    code: str
    report: dict[str, Any]
    key: str
    from_cache: bool
    seconds: float
    size: int
    _keeper: object = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """A prepared model in the folder, for people to look at.

    Attributes:
        key: Its name.
        name: The file name of the module.
        path: Where the module lay when it was compiled.
        engine: Engine and version.
        module_size: Bytes of the module.
        size: Bytes on the disk.
        seconds: How long compiling took.
        used: When it was last used, in seconds since 1970.
    """

    key: str
    name: str
    path: str
    engine: str
    module_size: int
    size: int
    seconds: float
    used: float


class ModelCache:
    """Gives machine code for modules. Any thread may use it, and any number of processes one folder.

    Args:
        folder: Where code is kept; the user's cache folder if None.
        limit_bytes: How much of it; 2 GiB or what SPARKRT_CACHE_BYTES says if None.
        warn: Is told once for each thing that does not work and is done without.

    Raises:
        BadRequestError: SPARKRT_CACHE_BYTES is no number.
    """

    def __init__(
        self, folder: Path | None = None, *, limit_bytes: int | None = None, warn: Callable[[str], None] | None = None
    ) -> None:
        self._path = folder
        self._limit = _limit_from_environment() if limit_bytes is None else limit_bytes
        self._warn = warn or _log_warning
        self._warned: set[str] = set()
        self._opened: tuple[CacheFolder | None] | None = None
        self._opening = threading.Lock()
        self._turns = _Turns()
        # Code that has no place in a folder, for the next one here who wants the same.
        self._private: weakref.WeakValueDictionary[str, Prepared] = weakref.WeakValueDictionary()

    def prepare(
        self,
        model: ModelFile,
        engine: str,
        settings: Mapping[str, Any],
        compiling: Compiling,
        *,
        wait_seconds: float = WAIT_SECONDS,
    ) -> Prepared:
        """Return the model's code: the stored one if every byte of it is right, else a new one.

        Args:
            model: The module.
            engine: What tells one build of the engine from another; see `engine_identity`.
            settings: `spark_runtime.config.Model.settings()`.
            compiling: Called if need be, once; the code descriptor must not be written to after it has returned.
            wait_seconds: How long to wait for somebody else who compiles the same.

        Raises:
            StoreError: Others could write in the cache folder.
            Exception: Whatever *compiling* raises; nothing is stored then.
        """
        key = entry_key(model.sha256, engine, settings)
        folder = self._folder()
        if (prepared := self._look(folder, key)) is not None:
            return prepared
        with self._turns.taken(key, wait_seconds), folder.locked(key, wait_seconds) if folder else nullcontext():
            prepared = self._look(folder, key)  # whoever was waited for has done it
            return prepared or self._compile(folder, key, model, engine, compiling)

    def discard(self, prepared: Prepared) -> None:
        """Forget an entry that its engine refused. The next `prepare` compiles again."""
        self._private.pop(prepared.key, None)
        folder = self._folder()
        if folder is not None:
            folder.remove(prepared.key)

    def entries(self) -> list[CacheEntry]:
        """Return what is in the folder, the last used first, without checking or making anything.

        Raises:
            StoreError: The folder is not ours.
        """
        folder = self._existing_folder()
        return [_entry(each.key, each.about, each.size, each.used) for each in folder.listed()] if folder else []

    def clear(self) -> Removed:
        """Remove everything that nobody uses.

        Raises:
            StoreError: The folder is not ours.
        """
        folder = self._existing_folder()
        return folder.clear() if folder else Removed(0, 0, 0)

    @property
    def path(self) -> Path:
        """The folder, whether there is one yet or not. Raises OSError if this user has no home."""
        return self._path or default_folder()

    # --- the steps ---

    def _look(self, folder: CacheFolder | None, key: str) -> Prepared | None:
        private = self._private.get(key)
        if private is not None:
            return replace(private, from_cache=True)
        found = folder.find(key) if folder else None
        return _prepared(key, found, from_cache=True) if found else None

    def _compile(
        self, folder: CacheFolder | None, key: str, model: ModelFile, engine: str, compiling: Compiling
    ) -> Prepared:
        began = time.monotonic()
        source, code = _scratch(model.data), _scratch()
        try:
            source.seal()
            report = _checked(compiling(source.descriptor, code.descriptor))
        finally:
            source.close()
        code.seal()
        if not code.size():
            raise ProtocolViolated(f"the compile worker wrote no code for {model.path}")
        about = {
            "report": report,
            "name": model.path.name,
            "path": str(model.path),
            "engine": engine,
            "module_size": model.size,
            "code_size": code.size(),
            "seconds": time.monotonic() - began,
        }
        prepared = self._publish(folder, key, about, code) if folder else None
        return prepared or self._keep_private(key, about, code)

    def _publish(self, folder: CacheFolder, key: str, about: dict[str, Any], code: Scratch) -> Prepared | None:
        """Store new code; None if it cannot be stored."""
        try:
            prepared = _prepared(key, folder.publish(key, about, code.descriptor), from_cache=False)
            folder.tidy()
            folder.trim(self._limit)
        except OSError as problem:
            self._warn_once(
                f"prepared models cannot be kept in {folder.path}: {problem.strerror or problem}; they are compiled "
                "again at every start"
            )
            return None
        return prepared

    def _keep_private(self, key: str, about: dict[str, Any], code: Scratch) -> Prepared:
        prepared = Prepared(code.path, about["report"], key, False, about["seconds"], about["code_size"], code)
        self._private[key] = prepared
        return prepared

    # --- the folder ---

    def _folder(self) -> CacheFolder | None:
        """Return the folder, opened once; None if there is none to be had, of which the user is told."""
        with self._opening:
            if self._opened is None:
                self._opened = (self._open_folder(),)
            return self._opened[0]

    def _open_folder(self) -> CacheFolder | None:
        try:
            folder = CacheFolder.open(self.path)
            _ = folder.secret  # now, while one thread is here
            is_barred = bool(os.statvfs(folder.path).f_flag & getattr(os, "ST_NOEXEC", 0))
        except OSError as problem:
            where = f"{problem.filename}: " if problem.filename else ""
            self._warn_once(
                f"there is no folder for prepared models ({where}{problem.strerror or problem}); they are compiled "
                "again at every start unless SPARKRT_CACHE_DIR names a folder of yours"
            )
            return None
        if is_barred:
            self._warn_once(
                f"{folder.path} is mounted noexec, and prepared models are machine code; they are compiled again at "
                "every start unless SPARKRT_CACHE_DIR names a folder elsewhere"
            )
            return None
        return folder

    def _existing_folder(self) -> CacheFolder | None:
        try:
            return CacheFolder.open(self.path) if self.path.is_dir() else None
        except OSError as problem:
            raise StoreError(f"{self.path} cannot be read: {problem.strerror or problem}") from problem

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            self._warn(text)


class _Turns:
    """Threads of this process that want the same, one after the other."""

    def __init__(self) -> None:
        self._locks: weakref.WeakValueDictionary[str, _Turn] = weakref.WeakValueDictionary()
        self._choosing = threading.Lock()

    @contextmanager
    def taken(self, key: str, seconds: float) -> Iterator[None]:
        """Wait for our turn; after *seconds* it is ours all the same."""
        with self._choosing:
            turn = self._locks.setdefault(key, _Turn())
        is_ours = turn.lock.acquire(timeout=min(seconds, threading.TIMEOUT_MAX))
        try:
            yield
        finally:
            if is_ours:
                turn.lock.release()


class _Turn:
    """A lock that can be referred to weakly."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


class _Keeper:
    """Holds the lock that keeps code on the disk; lets go of it when it is forgotten."""

    def __init__(self, descriptor: int) -> None:
        weakref.finalize(self, os.close, descriptor)


def _prepared(key: str, found: Found, *, from_cache: bool) -> Prepared:
    about = found.about
    keeper = _Keeper(found.descriptor)
    return Prepared(found.code, about["report"], key, from_cache, about["seconds"], about["code_size"], keeper)


def _checked(report: dict[str, Any]) -> dict[str, Any]:
    """Return the report as it will come back from the folder. Raises ProtocolViolated if it is not plain data."""
    try:
        again: dict[str, Any] = json.loads(json.dumps(report))
    except (TypeError, ValueError, RecursionError) as problem:
        raise ProtocolViolated(f"the compile worker's report is not plain data: {problem}") from problem
    return again


def _scratch(data: bytes = b"") -> Scratch:
    try:
        return Scratch(data)
    except OSError as problem:
        raise StoreError(f"there is no room to compile a model: {problem.strerror}; make some in TMPDIR") from problem


def _entry(key: str, about: Mapping[str, Any], size: int, used: float) -> CacheEntry:
    """Return an entry from what nobody has checked: what has the wrong type is left empty."""

    def texts(name: str) -> str:
        value = about.get(name)
        return value if isinstance(value, str) else ""

    def number(name: str) -> float:
        value = about.get(name)
        return value if isinstance(value, (int, float)) else 0

    engine = " ".join(texts("engine").split()[:2])
    return CacheEntry(
        key, texts("name"), texts("path"), engine, int(number("module_size")), size, float(number("seconds")), used
    )


def _limit_from_environment() -> int:
    given = os.environ.get(LIMIT_VARIABLE, "")
    if not given:
        return LIMIT_BYTES
    if not given.isdecimal():
        raise BadRequestError(f"{LIMIT_VARIABLE} is {given!r}, not a number of bytes such as {LIMIT_BYTES}")
    return int(given)


def _log_warning(text: str) -> None:
    import logging

    logging.getLogger("spark_runtime").warning(text)
