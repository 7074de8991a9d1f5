"""The folder with prepared models: machine code that is mapped and run, so a wrong byte in it is a crash or worse.

    ~/.cache/spark-runtime/secret                       32 random bytes of this installation, mode 0600
                          <key>-<start of digest>.code  machine code, as the engine maps it
                          <key>.entry                   a digest, and what is known about the model
                          <key>.lock                    held while somebody compiles
                          .writing-<random>             a file that has no name yet

An entry is its ``.entry`` file and the code file that the digest in it names. The digest is HMAC-SHA256 with the secret
over all of the entry and all of the code, so a torn, changed, exchanged or foreign file is no entry: it is found out
whenever it is used, and the model is compiled again. The entry file gets its name last, by a rename, and every code
file has a name of its own; two processes that write the same entry at once cannot mix their parts, whatever is killed
in whatever moment.

HMAC-SHA256 in place of BLAKE2b with a key: 8 ms against 16 for 14 MB where the processor has instructions for SHA.

Rules that keep it simple:

* Whoever writes or uses a code file holds a shared ``flock`` on it. Nothing is removed before an exclusive one was had
  without waiting. The system gives locks back when their holder dies, so no lock is ever stale.
* On a file system that has no locks nothing is removed at all: ``rm -r`` while nothing runs does it.
* Files whose names are not of this pattern are never touched: the folder may have been given by mistake.
* Reading raises nothing about an entry; a doubt is a miss. Writing raises `OSError`, and the caller goes on without.
"""

from __future__ import annotations

import errno
import functools
import hmac
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spark_runtime.models.cache_files import (
    FOLDER_VARIABLE,
    KEY_SIZE,
    START_SIZE,
    WRITING,
    Doubt,
    check_private,
    create,
    exclusive,
    is_hex,
    load_secret,
    own,
    random_name,
    read_name,
    remove_unused,
    share,
    sync_folder,
    wait_exclusive,
    write_all,
)
from spark_workers.failpoints import hit

_ENTRY_LIMIT = 64 << 20
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Found:
    """A whole entry, every byte of it checked.

    Attributes:
        code: The path of the machine code.
        about: What was stored with it.
        descriptor: Holds the lock that keeps the code from being removed. Whoever takes the `Found` closes it.
    """

    code: str
    about: dict[str, Any]
    descriptor: int


@dataclass(frozen=True, slots=True)
class Listed:
    """An entry as it lies there, unchecked.

    Attributes:
        key: Its name.
        about: What was stored with it.
        size: Bytes on the disk.
        used: When it was last used, in seconds since 1970.
    """

    key: str
    about: dict[str, Any]
    size: int
    used: float


@dataclass(frozen=True, slots=True)
class Removed:
    """What was removed: entries, bytes of all files together, and entries that stay because somebody uses them."""

    entries: int
    size: int
    in_use: int


def default_folder() -> Path:
    """Return where prepared models are kept unless somebody says otherwise.

    Raises:
        OSError: This user has no home.
    """
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # the specification: anything else is to be ignored
        return Path(base) / "spark-runtime"
    try:
        return Path.home() / ".cache" / "spark-runtime"
    except RuntimeError as problem:
        raise OSError(errno.ENOENT, "this user has no home folder") from problem


class CacheFolder:
    """The files of one folder, and nothing remembered of them but the secret.

    Attributes:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, path: Path) -> CacheFolder:
        """Make the folder if need be, and see that it is ours alone.

        Raises:
            StoreError: Others could write there. The message says what to do.
            OSError: It cannot be made.
        """
        path = Path(os.path.realpath(path))
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        own(path)
        return cls(path)

    @functools.cached_property
    def secret(self) -> bytes:
        """What entries are signed with, made if there is none. Raises OSError if it cannot be."""
        return load_secret(self.path)

    # --- entries ---

    def find(self, key: str) -> Found | None:
        """Return an entry after checking all of it; None if there is none that is right."""
        try:
            return self._find(key)
        except (Doubt, OSError):
            return None

    def publish(self, key: str, about: Mapping[str, Any], source: int) -> Found:
        """Make an entry of what descriptor *source* holds, in place of an old one.

        Raises:
            OSError: It cannot be written: a full disk for example. What was there before stays.
        """
        known = {**about, "nonce": random_name()}  # so that no two code files ever have the same name
        body = json.dumps(known).encode()
        with self._writing() as (temporary, descriptor):
            digest = self._copy(key, body, source, descriptor)
            os.fsync(descriptor)
            hit("cache.rename")
            code = self._code(key, digest)
            os.rename(temporary, code)
            try:
                self._write_entry(key, digest, body)
                held = os.open(code, os.O_RDONLY | os.O_NOFOLLOW)
            except BaseException:
                code.unlink(missing_ok=True)
                raise
            share(held)  # the other descriptor's lock is still there, so nobody can be in between
        return Found(str(code), known, held)

    def remove(self, key: str) -> None:
        """Forget one entry. Its code goes when nobody uses it."""
        (self.path / f"{key}.entry").unlink(missing_ok=True)
        self.tidy()

    def listed(self) -> list[Listed]:
        """Return all entries, the last used first."""
        found = []
        for key in self._keys():
            try:
                header, body = self._read_entry(key)
                about = json.loads(body)
                used = os.stat(self.path / f"{key}.entry").st_mtime
                size = os.stat(self._code(key, header)).st_size + len(body)
            except (Doubt, OSError, ValueError, RecursionError):
                continue
            if isinstance(about, dict):
                found.append(Listed(key, about, size, used))
        return sorted(found, key=lambda entry: entry.used, reverse=True)

    def try_writing(self) -> None:
        """Write a file and remove it. Raises OSError if that cannot be done."""
        path, descriptor = self._new_file()
        try:
            write_all(descriptor, bytes(4096))
        finally:
            os.close(descriptor)
            path.unlink(missing_ok=True)

    def trim(self, limit: int) -> None:
        """Remove what was not used for longest until the rest takes *limit* bytes; what is in use stays."""
        entries = self.listed()
        total = sum(entry.size for entry in entries)
        for entry in reversed(entries):
            if total <= limit:
                return
            if self._drop(entry.key):
                total -= entry.size

    def clear(self) -> Removed:
        """Remove everything of ours that nobody uses."""
        sizes = {entry.key: entry.size for entry in self.listed()}
        kept = removed = size = 0
        for key in self._keys():
            if self._drop(key):
                removed += 1
                size += sizes.get(key, 0)
            else:
                kept += 1
        self.tidy()
        return Removed(removed, size, kept)

    def tidy(self) -> None:
        """Remove what killed processes have left: code without an entry, half-written files, locks."""
        for name in os.listdir(self.path):
            kind, key, start = read_name(name)
            if kind in ("writing", "lock") or (kind == "code" and not self._is_named(key, start)):
                remove_unused(self.path / name)

    @contextmanager
    def locked(self, key: str, seconds: float) -> Iterator[None]:
        """Be the only one who compiles an entry, for the length of a block.

        Whoever is slow is waited for at most *seconds*; whoever died is not waited for. After that, and where there
        are no locks, the block runs all the same: compiling twice costs time, nothing else.
        """
        path = self.path / f"{key}.lock"
        descriptor = wait_exclusive(path, time.monotonic() + seconds)
        try:
            yield
        finally:
            if descriptor is not None:
                path.unlink(missing_ok=True)  # while it is locked: else somebody could hold it and be alone no more
                os.close(descriptor)

    # --- the parts ---

    def _find(self, key: str) -> Found:
        digest, body = self._read_entry(key)
        path = self._code(key, digest)
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            check_private(descriptor)
            if not share(descriptor):
                raise Doubt("it is being removed")
            if not hmac.compare_digest(self._digest(key, body, descriptor), digest):
                raise Doubt("the digest is another one")
            about = json.loads(body)  # ours, as the digest tells
        except BaseException:
            os.close(descriptor)
            raise
        self._note_use(key)
        return Found(str(path), about, descriptor)

    def _note_use(self, key: str) -> None:
        try:
            os.utime(self.path / f"{key}.entry")
        except OSError:
            pass  # a folder that can only be read, or an entry replaced just now: the order of use matters little

    def _read_entry(self, key: str) -> tuple[str, bytes]:
        """Return digest and body, unchecked. Raises Doubt or OSError."""
        descriptor = os.open(self.path / f"{key}.entry", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb", buffering=0) as file:
            if check_private(descriptor).st_size > _ENTRY_LIMIT:
                raise Doubt("it is too long")
            header, newline, body = file.read(_ENTRY_LIMIT).partition(b"\n")
        digest = header.decode("ascii", "replace")
        if not newline or not is_hex(digest, KEY_SIZE):
            raise Doubt("it does not begin with a digest")
        return digest, body

    def _write_entry(self, key: str, digest: str, body: bytes) -> None:
        with self._writing() as (temporary, descriptor):
            write_all(descriptor, f"{digest}\n".encode() + body)
            os.fsync(descriptor)
            hit("cache.sidecar")
            os.replace(temporary, self.path / f"{key}.entry")
        sync_folder(self.path)

    def _copy(self, key: str, body: bytes, source: int, target: int) -> str:
        """Copy the code and return the digest of what was copied."""
        digest = self._begin_digest(key, body)
        position = 0
        while part := os.pread(source, _CHUNK, position):
            digest.update(part)
            write_all(target, part)
            position += len(part)
            hit("cache.write")
        return digest.hexdigest()

    def _digest(self, key: str, body: bytes, descriptor: int) -> str:
        # Read, not mapped: a mapped file that somebody truncates kills the reader. One buffer for all of it, because
        # fresh pages would cost as much as the digest.
        digest = self._begin_digest(key, body)
        buffer = bytearray(_CHUNK)
        view = memoryview(buffer)
        with open(descriptor, "rb", buffering=0, closefd=False) as file:
            while count := file.readinto(buffer):
                digest.update(view[:count])
        return digest.hexdigest()

    def _begin_digest(self, key: str, body: bytes) -> hmac.HMAC:
        # The length keeps body and code apart: bytes cannot move from one to the other.
        beginning = b"spark prepared model\0" + key.encode() + len(body).to_bytes(8, "big") + body
        return hmac.new(self.secret, beginning, "sha256")

    @contextmanager
    def _writing(self) -> Iterator[tuple[Path, int]]:
        """Give a new file to write to, locked; at the end of the block it must have another name, or it is removed."""
        path, descriptor = self._new_file()
        try:
            yield path, descriptor
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)

    def _new_file(self) -> tuple[Path, int]:
        while True:
            path = self.path / f"{WRITING}{random_name()}"
            descriptor = create(path)
            if share(descriptor):
                return path, descriptor
            os.close(descriptor)  # `tidy` of another process came between creating and locking: it is gone already

    def _code(self, key: str, digest: str) -> Path:
        return self.path / f"{key}-{digest[:START_SIZE]}.code"

    def _keys(self) -> list[str]:
        return [key for kind, key, _ in map(read_name, os.listdir(self.path)) if kind == "entry"]

    def _is_named(self, key: str, start: str) -> bool:
        """Tell whether the entry names the code file whose digest begins like this."""
        try:
            return self._read_entry(key)[0].startswith(start)
        except (Doubt, OSError):
            return False

    def _drop(self, key: str) -> bool:
        """Remove an entry and its code, unless somebody uses it; tell whether it is gone."""
        entry = self.path / f"{key}.entry"
        try:
            code = self._code(key, self._read_entry(key)[0])
            descriptor = exclusive(code)
        except (Doubt, FileNotFoundError):
            entry.unlink(missing_ok=True)  # half of an entry, of no use to anybody
            return True
        except OSError:
            return False  # no locks here
        if descriptor is None:
            return False
        try:
            entry.unlink(missing_ok=True)  # first, so that no entry ever names what is not there
            code.unlink(missing_ok=True)
        finally:
            os.close(descriptor)
        return True
