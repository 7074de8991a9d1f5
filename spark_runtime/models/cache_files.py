"""Names, locks and rights of the files in the folder with prepared models; what they mean is in `cache_folder`."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from pathlib import Path

from spark_runtime.errors import StoreError
from spark_workers.failpoints import hit

FOLDER_VARIABLE = "SPARKRT_CACHE_DIR"

KEY_SIZE = 64  # digits of keys and digests
START_SIZE = 16  # digits of a digest in the name of a code file
_DIGITS = frozenset("0123456789abcdef")
WRITING = ".writing-"
SECRET = "secret"  # noqa: S105 - the name of a file
_SECRET_SIZE = 32
_POLL_SECONDS = 0.02  # flock knows no time limit


class Doubt(Exception):
    """An entry cannot be trusted. Nobody outside sees this."""


# --- names (no regular expressions: compiling these would be most of this module's import) ---------------------------


def read_name(name: str) -> tuple[str, str, str]:
    """Return what a file in the folder is (entry, lock, code or writing), its key, and the start of its digest."""
    stem, _, kind = name.rpartition(".")
    key, dash, start = stem.partition("-")
    if kind in ("entry", "lock") and not dash and is_hex(key, KEY_SIZE):
        return kind, key, ""
    if kind == "code" and is_hex(key, KEY_SIZE) and is_hex(start, START_SIZE):
        return kind, key, start
    if name.startswith(WRITING) and is_hex(name[len(WRITING) :], START_SIZE):
        return "writing", "", ""
    return "", "", ""


def is_hex(text: str, size: int) -> bool:
    """Tell whether *text* is so many hexadecimal digits."""
    return len(text) == size and _DIGITS.issuperset(text)


# --- files and locks -------------------------------------------------------------------------------------------------


def random_name() -> str:
    """Return digits that no other file has in its name."""
    return os.urandom(8).hex()  # the module `secrets` imports for 3 ms


def create(path: Path) -> int:
    """Make a new file for this user alone; return its descriptor."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    os.fchmod(descriptor, 0o600)  # whatever the umask
    return descriptor


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of *data*."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def check_private(descriptor: int) -> os.stat_result:
    """Return the status of a regular file that only we can write. Raises Doubt if it is another kind of file."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise Doubt("others may have written it")
    return status


def share(descriptor: int) -> bool:
    """Keep the file from being removed while *descriptor* is open; tell whether it was in time."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks: nothing is removed there
    return os.fstat(descriptor).st_nlink > 0


def exclusive(path: Path, flags: int = 0) -> int | None:
    """Return a descriptor of the only lock on the file at *path*, or None if somebody has one.

    Raises:
        OSError: There is no such file, or there are no locks.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)  # held by somebody, or removed by its holder before we had the lock
    return None


def wait_exclusive(path: Path, limit: float) -> int | None:
    """Return a descriptor of the only lock, or None if it cannot be had in time or at all."""
    while True:
        try:
            descriptor = exclusive(path, os.O_CREAT)
        except OSError:
            return None
        if descriptor is not None or time.monotonic() >= limit:
            return descriptor
        time.sleep(_POLL_SECONDS)


def remove_unused(path: Path) -> None:
    """Remove a file that nobody has a lock on."""
    try:
        descriptor = exclusive(path)
    except OSError:
        return  # gone, or no locks here
    if descriptor is not None:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Return when the disk knows the names in *path*."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as problem:
        if problem.errno != errno.EINVAL:  # some network file systems cannot do it for a folder
            raise
    finally:
        os.close(descriptor)


# --- the folder itself -----------------------------------------------------------------------------------------------


def own(path: Path) -> None:
    """Make sure that only we can write in the folder.

    Raises:
        StoreError: It cannot be made sure.
    """
    status = path.stat()
    if status.st_uid != os.geteuid():
        raise StoreError(
            f"{path} belongs to another user (id {status.st_uid}), and machine code from there would be run; set "
            f"{FOLDER_VARIABLE} to a folder of yours"
        )
    if status.st_mode & 0o077 and all(map(_is_ours, os.listdir(path))):
        try:
            os.chmod(path, 0o700)
        except OSError:
            pass  # the look below decides
        status = path.stat()
    if status.st_mode & 0o022:
        raise StoreError(
            f"other users may write in {path}, and machine code from there would be run; `chmod 700` it, or set "
            f"{FOLDER_VARIABLE} to a folder for this alone"
        )


def _is_ours(name: str) -> bool:
    return name == SECRET or bool(read_name(name)[0])


def load_secret(folder: Path) -> bytes:
    """Return the secret of this folder, made if need be. Several processes may come here at once.

    Raises:
        OSError: There is none and it cannot be made.
    """
    path = folder / SECRET
    found = _read_secret(path)
    if found is not None:
        return found
    temporary = folder / f"{WRITING}{random_name()}"
    made = os.urandom(_SECRET_SIZE)
    descriptor = create(temporary)
    try:
        write_all(descriptor, made)
        os.fsync(descriptor)
        hit("cache.secret")
        if _link(temporary, path):
            return made
        found = _read_secret(path)  # somebody else was first, or what is there is no secret
        if found is not None:
            return found
        os.replace(temporary, path)
        return made
    finally:
        os.close(descriptor)
        temporary.unlink(missing_ok=True)


def _link(temporary: Path, path: Path) -> bool:
    """Give a file its name unless something has it; tell whether it was given."""
    try:
        os.link(temporary, path)
    except OSError:
        return False  # it exists, or there are no hard links here
    return True


def _read_secret(path: Path) -> bytes | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    with open(descriptor, "rb", buffering=0) as file:
        try:
            check_private(descriptor)
            content = file.read(_SECRET_SIZE + 1)
        except (Doubt, OSError):
            return None
    return content if len(content) == _SECRET_SIZE else None
