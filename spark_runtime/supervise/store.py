"""The folder ``.spark/`` beside a user's script, where state outlives the death of every process.

    .spark/.gitignore                       so that git never sees any of it
    .spark/train.py/lock                    held while a supervisor runs train.py, and says who holds it
    .spark/train.py/runs/<run id>/run.json  what is known about the run
                                  000007.snapshot  its newest three generations
    .spark/train.py/aside/                  snapshots that are never pruned, each with its reasons in a text beside it

A snapshot gets its name by a rename after the disk has its content, so a name like ``000007.snapshot`` always stands
for a whole one, whatever is killed at whatever moment. What a killed writer leaves begins with ``.writing-`` or
``.gone-`` and is removed by the next supervisor, which knows from the lock that nobody else is at work.

Rules that keep it simple:

* The lock excludes other processes. The operating system gives it back when its holder dies, so a lock is never stale
  and no process id is ever checked. The text in the lock file is only for the message.
* The folder's content is the only ledger: generations and runs are listed when they are needed, never remembered.
* `RunFolder.write` may run in a background thread. Everything else belongs to one thread, and the caller waits for the
  background thread before it closes the `StateFolder`.
* An unfinished run is never removed here, and neither is anything in ``aside/``.
* Opening and choosing raise `StoreError` with a sentence for the user. Saving raises `OSError` as it is, because the
  caller goes on running and tries again.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from spark_runtime.errors import StoreError
from spark_runtime.supervise.snapshot_file import (
    SnapshotDamaged,
    SnapshotParts,
    StoredSnapshot,
    sync_to_disk,
    write_snapshot,
)
from spark_workers.failpoints import hit

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "RunFolder",
    "RunInfo",
    "SnapshotDamaged",
    "SnapshotParts",
    "StateFolder",
    "StoreBusy",
    "StoreError",
    "StoredSnapshot",
]

FOLDER = ".spark"
GENERATIONS_KEPT = 3
UNFINISHED = "unfinished"
FINISHED = "finished"

# A run's id is a folder's name and comes from the command line too; neither prefix below can be mistaken for one.
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SNAPSHOT = re.compile(r"(\d{6,18})\.snapshot")
_WRITING = ".writing-"
_GONE = ".gone-"

Clock = Callable[[], datetime]


class StoreBusy(StoreError):
    """Another supervisor is running the same script. Stop it first; its death, too, frees the folder at once.

    Attributes:
        script: The script.
        pid: The other supervisor's process, where it has said so.
        run_id: Its run, where it has said so.
        since: When it began, in ISO format, where it has said so.
    """

    def __init__(self, script: Path, pid: int | None, run_id: str | None, since: str | None) -> None:
        who = ", ".join(
            f"{name} {value}"
            for name, value in (("process", pid), ("run", run_id), ("since", since))
            if value is not None
        )
        super().__init__(f"{script} is already running ({who or 'in another process'}); stop that run first")
        self.script = script
        self.pid = pid
        self.run_id = run_id
        self.since = since

    def __reduce__(self) -> tuple[type[StoreBusy], tuple[Path, int | None, str | None, str | None]]:
        return type(self), (self.script, self.pid, self.run_id, self.since)


@dataclass(frozen=True, slots=True)
class RunInfo:
    """A stored run, for people to choose from.

    Attributes:
        run_id: Its id.
        started: When it began, in ISO format; empty if its record cannot be read.
        finished: Whether it reached its end.
        step: The step at its last `RunFolder.mark`.
        size_bytes: What its snapshots take on the disk.
    """

    run_id: str
    started: str
    finished: bool
    step: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class _RunRecord:
    """What ``run.json`` holds."""

    run_id: str
    started: str = ""
    resumed: str = ""  # when it was last begun again
    status: str = UNFINISHED
    step: int = 0
    pid: int = 0
    cleared: bool = False  # its state was dropped on purpose: it goes on from the beginning

    @property
    def last_begun(self) -> tuple[str, str]:
        return max(self.started, self.resumed), self.run_id


class StateFolder:
    """What is stored for one script, locked for this process.

    Attributes:
        path: ``.spark/<script file name>``.
        warning: One sentence if two runs of the script cannot be kept apart here, as the file system has no locks.
    """

    def __init__(self, path: Path, lock: _FolderLock, now: Clock) -> None:
        self.path = path
        self._lock = lock
        self._now = now

    @classmethod
    def open(cls, script: Path, *, now: Clock = lambda: datetime.now(UTC)) -> StateFolder:
        """Lock the state of *script*, make its folder if need be, and remove what a killed writer has left.

        Raises:
            StoreBusy: Another process has it; nothing is waited for.
            StoreError: The folder cannot be made or used; the message says what to do.
        """
        script = Path(os.path.abspath(script))
        path = script.parent / FOLDER / script.name
        with _explained(path):
            _private_folder(path.parent)
            _hide_from_git(path.parent)
            for folder in (path, path / "runs", path / "aside"):
                _private_folder(folder)
            lock = _FolderLock.take(path / "lock", script)
            try:
                _remove_leftovers(path)
            except BaseException:
                lock.close()
                raise
        return cls(path, lock, now)

    @property
    def warning(self) -> str | None:
        return self._lock.warning

    def announce(self, run_id: str) -> None:
        """Let whoever finds the folder locked know who holds it."""
        with _explained(self.path):
            self._lock.announce(run_id, _iso(self._now()))

    def new_run(self, run_id: str) -> RunFolder:
        """Make the folder of a fresh run.

        Unfinished runs stay as they are. Of the finished ones only the newest stays.

        Raises:
            StoreError: *run_id* is taken or is no good name, or the folder cannot be made.
        """
        if not _RUN_ID.fullmatch(run_id):
            raise StoreError(
                f"{run_id!r} cannot name a run; use up to 64 letters, digits, dots, dashes and underscores"
            )
        path = self.path / "runs" / run_id
        if os.path.lexists(path):
            raise StoreError(f"there is already a run {run_id} in {self.path}; choose another id, or resume that one")
        with _explained(self.path):
            self._forget_finished()
            _private_folder(path)
            record = _RunRecord(run_id, started=_iso(self._now()), pid=os.getpid())
            return self._begin(record)

    def unfinished(self) -> list[RunInfo]:
        """Return the unfinished runs that have a snapshot, the last begun first.

        Headers and lengths of the snapshots are checked here, their content only by `RunFolder.newest`.
        """
        with _explained(self.path):
            return [
                self._info(record)
                for record in self._records()
                if record.status != FINISHED and self._has_snapshot(record)
            ]

    def resume(self, run_id: str | None = None) -> RunFolder:
        """Return a stored run to go on with; it counts as unfinished from now on.

        Args:
            run_id: The run. Without it: the last begun one that has a snapshot or was cleared, unfinished ones
                first.

        Raises:
            StoreError: There is no such run. The message says what there is.
        """
        with _explained(self.path):
            records = self._records()
            able = [record for record in records if self._has_snapshot(record) or record.cleared]
            if run_id is not None:
                able = [record for record in able if record.run_id == run_id]
            if not able:
                raise StoreError(self._nothing_to_resume(run_id, records))
            chosen = min(able, key=lambda record: record.status == FINISHED)
            return self._begin(replace(chosen, resumed=_iso(self._now()), status=UNFINISHED, pid=os.getpid()))

    def close(self) -> None:
        """Give the lock back. A second call does nothing."""
        self._lock.close()

    def __enter__(self) -> StateFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run_folder(self, record: _RunRecord) -> RunFolder:
        return RunFolder(self.path / "runs" / record.run_id, self.path / "aside", record, self._now)

    def _begin(self, record: _RunRecord) -> RunFolder:
        run = self._run_folder(record)
        run.save_record()
        return run

    def _records(self) -> list[_RunRecord]:
        """Return all stored runs, the last begun first."""
        with os.scandir(self.path / "runs") as entries:
            folders = [
                Path(entry.path)
                for entry in entries
                if _RUN_ID.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
            ]
        return sorted(map(_read_record, folders), key=lambda record: record.last_begun, reverse=True)

    def _has_snapshot(self, record: _RunRecord) -> bool:
        return self._run_folder(record).trouble() is None

    def _info(self, record: _RunRecord) -> RunInfo:
        size = self._run_folder(record).size_bytes()
        return RunInfo(record.run_id, record.started, record.status == FINISHED, record.step, size)

    def _forget_finished(self) -> None:
        finished = [record for record in self._records() if record.status == FINISHED]
        for record in finished[1:]:
            # Renamed first: a removal that is cut short must not leave half a run under a run's name.
            doomed = self.path / "runs" / f"{_GONE}{record.run_id}"
            os.rename(self.path / "runs" / record.run_id, doomed)
            shutil.rmtree(doomed)

    def _nothing_to_resume(self, run_id: str | None, records: Sequence[_RunRecord]) -> str:
        """Say what was looked for, and what there is."""
        there = []
        for record in records:
            trouble = self._run_folder(record).trouble()
            state = f"{record.status}, step {record.step}" + (f", {trouble}" if trouble else "")
            there.append(f"{record.run_id} ({state})")
        wanted = "no run that can be resumed" if run_id is None else f"no run {run_id} that can be resumed"
        return f"there is {wanted} in {self.path}; stored there: {', '.join(there) or 'nothing'}"


class RunFolder:
    """One run's snapshots and its record.

    Attributes:
        path: The folder.
        damaged: What the last `newest` had to skip, newest first.
    """

    def __init__(self, path: Path, aside: Path, record: _RunRecord, now: Clock) -> None:
        self.path = path
        self.damaged: list[SnapshotDamaged] = []
        self._aside = aside
        self._record = record
        self._now = now
        # Two writers would choose the same number, and the first to fail would remove the other's file.
        self._writing = threading.Lock()

    @property
    def run_id(self) -> str:
        """The run's id."""
        return self._record.run_id

    def write(self, meta: dict[str, object], parts: Sequence[Buffer]) -> int:
        """Store a snapshot, and drop the oldest once the new one is safe. May be called from any thread.

        Args:
            meta: Anything that msgpack can hold.
            parts: Contiguous buffers, which must not change meanwhile.

        Returns:
            The snapshot's generation.

        Raises:
            OSError: As the system says it, a full disk for example. The older generations are as they were.
            TypeError, ValueError, OverflowError: *meta* or *parts* hold what cannot be stored.
        """
        with self._writing:
            generation = max(self._generations(), default=0) + 1
            self._write_new(self._file(generation), SnapshotParts(meta, parts))
            hit("store.before_prune")
            self._prune()
        return generation

    def newest(self) -> StoredSnapshot:
        """Return the newest whole snapshot, every byte of it checked; `damaged` tells what was skipped.

        Raises:
            StoreError: There is none; the message says why.
        """
        self.damaged = []
        for generation in reversed(self._generations()):
            try:
                return _open_verified(self._file(generation), generation)
            except SnapshotDamaged as damage:
                self.damaged.append(damage)
        found = "; ".join(map(str, self.damaged)) or "it has none yet"
        raise StoreError(f"run {self.run_id} has no whole snapshot: {found}")

    def keep_aside(self, reason: str) -> Path:
        """Keep the newest whole snapshot for good, beyond every pruning, with *reason* in a text beside it.

        Returns:
            The kept file. Keeping the same snapshot again only adds the new reason.

        Raises:
            StoreError: There is no whole snapshot.
            OSError: As the system says it.
        """
        with self.newest() as snapshot:
            kept = self._aside / f"{self.run_id}-{snapshot.path.name}"
            if not kept.exists():
                _link_or_copy(snapshot.path, kept)
        # One more line in place of a new file: a reason given before is never lost.
        with open(kept.with_suffix(".txt"), "a", encoding="utf-8", errors="backslashreplace", opener=_private) as text:
            text.write(f"{_iso(self._now())} {reason}\n")
            text.flush()
            sync_to_disk(text.fileno())
        _sync_folder(self._aside)
        return kept

    def clear(self) -> None:
        """Remove every generation: the run has nothing to go on from. What is in ``aside/`` stays."""
        for generation in self._generations():
            self._file(generation).unlink(missing_ok=True)
        self._record = replace(self._record, cleared=True, step=0)
        self.save_record()

    def is_cleared(self) -> bool:
        """Tell whether the state was dropped on purpose, and none has come since."""
        return self._record.cleared and not self._generations()

    def mark(self, *, step: int) -> None:
        """Record how far the run has come, for the list of unfinished runs."""
        self._record = replace(self._record, step=step)
        self.save_record()

    def finish(self) -> None:
        """Record that the run has reached its end. Its snapshots stay until a later run replaces them."""
        self._record = replace(self._record, status=FINISHED)
        self.save_record()

    def save_record(self) -> None:
        """Write ``run.json``: what it said before, or all of the new."""
        text = json.dumps(asdict(self._record), indent=1) + "\n"
        with _replacing(self.path / "run.json") as temp, open(temp, "x", encoding="utf-8", opener=_private) as file:
            file.write(text)
            file.flush()
            sync_to_disk(file.fileno())
        _sync_folder(self.path)

    def trouble(self) -> str | None:
        """Return why no snapshot here can be used, or None if the header and the length of one are right."""
        newest_damage = ""
        for generation in reversed(self._generations()):
            try:
                StoredSnapshot.open(self._file(generation), generation).close()
            except SnapshotDamaged as damage:
                newest_damage = newest_damage or str(damage)
            else:
                return None
        return newest_damage or "no snapshot yet"

    def size_bytes(self) -> int:
        """Return what the snapshots take on the disk."""
        size = 0
        for generation in self._generations():
            with suppress(FileNotFoundError):  # pruned meanwhile by the thread that writes
                size += os.lstat(self._file(generation)).st_size
        return size

    def _write_new(self, final: Path, snapshot: SnapshotParts) -> None:
        with _replacing(final) as temp:
            write_snapshot(temp, snapshot)
            hit("store.before_rename")
        hit("store.after_rename")
        _sync_folder(self.path)

    def _generations(self) -> list[int]:
        """Return the generations on disk, oldest first."""
        matches = map(_SNAPSHOT.fullmatch, os.listdir(self.path))
        return sorted(int(match[1]) for match in matches if match)

    def _file(self, generation: int) -> Path:
        return self.path / f"{generation:06}.snapshot"

    def _prune(self) -> None:
        for generation in self._generations()[:-GENERATIONS_KEPT]:
            self._file(generation).unlink(missing_ok=True)


class _FolderLock:
    """The lock on one script's state, held from `take` to `close` or to the death of the process.

    Processes that are forked without exec would share it; the supervisor never forks.
    """

    def __init__(self, descriptor: int, warning: str | None) -> None:
        self.warning = warning
        self._descriptor: int | None = descriptor

    @classmethod
    def take(cls, path: Path, script: Path) -> _FolderLock:
        # The file is never removed: whoever removed it could lock a new one while an old one is still held.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)  # not inheritable, as all of os.open
        try:
            lock = cls(descriptor, _try_lock(descriptor, path))
            # Else a run that comes before our announcement would read our predecessor's.
            lock._write({"pid": os.getpid()})
        except BlockingIOError as error:
            holder = _read_holder(descriptor)
            os.close(descriptor)
            raise StoreBusy(script, *holder) from error
        except BaseException:
            os.close(descriptor)
            raise
        return lock

    def announce(self, run_id: str, since: str) -> None:
        self._write({"pid": os.getpid(), "run_id": run_id, "since": since})

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _write(self, holder: dict[str, object]) -> None:
        if self._descriptor is None:
            raise StoreError("the state folder is closed")
        # Always one write of the same length: a reader sees the old text or the new, and no empty file between.
        os.pwrite(self._descriptor, json.dumps(holder).ljust(_HOLDER_SIZE).encode(), 0)


_HOLDER_SIZE = 256


def _try_lock(descriptor: int, path: Path) -> str | None:
    """Lock without waiting.

    Returns:
        A warning if the file system has no locks at all.

    Raises:
        BlockingIOError: Somebody else has the lock.
    """
    # flock comes first: fcntl's lock is lost as soon as this process closes any descriptor of the file. Some network
    # file systems have only that one.
    for lock in (fcntl.flock, fcntl.lockf):
        try:
            lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES):
                raise BlockingIOError(error.errno, "locked") from error
        else:
            return None
    return f"the file system of {path} has no locks; never run the same script twice at a time here"


def _read_holder(descriptor: int) -> tuple[int | None, str | None, str | None]:
    """Return process, run and start time of the lock's holder, as far as the file tells."""
    try:
        holder = json.loads(os.pread(descriptor, _HOLDER_SIZE, 0))
    except (OSError, ValueError):
        return None, None, None
    if not isinstance(holder, dict):
        return None, None, None
    pid, run_id, since = holder.get("pid"), holder.get("run_id"), holder.get("since")
    return (
        pid if isinstance(pid, int) else None,
        run_id if isinstance(run_id, str) else None,
        since if isinstance(since, str) else None,
    )


def _read_record(folder: Path) -> _RunRecord:
    """Return what ``run.json`` in *folder* says. What it does not say takes the default, which keeps the run."""
    try:
        found = json.loads((folder / "run.json").read_bytes())
    except (OSError, ValueError):
        found = {}
    default = _RunRecord(folder.name)
    known = {
        field.name: found[field.name]
        for field in fields(default)
        if isinstance(found, dict) and isinstance(found.get(field.name), type(getattr(default, field.name)))
    }
    return replace(default, **known | {"run_id": folder.name})


def _open_verified(path: Path, generation: int) -> StoredSnapshot:
    snapshot = StoredSnapshot.open(path, generation)
    try:
        snapshot.verify()
    except BaseException:
        snapshot.close()
        raise
    return snapshot


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn an error of the system into a sentence about *path*."""
    try:
        yield
    except OSError as error:
        at = f" at {error.filename}" if error.filename else ""
        raise StoreError(
            f"cannot keep state in {path}: {error.strerror or error}{at}; make that folder writable, with room on its "
            "disk, or move the script to a folder that is"
        ) from error


@contextmanager
def _replacing(final: Path) -> Iterator[Path]:
    """Give a name beside *final* to write to. At the end it becomes *final*; an exception removes it."""
    temp = final.with_name(f"{_WRITING}{final.name}")
    try:
        yield temp
        os.rename(temp, final)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
        return
    except OSError:
        pass  # FAT and some network file systems have no hard links; a real trouble comes again with the copy
    with _replacing(target) as temp, open(source, "rb") as old, open(temp, "xb", opener=_private) as new:
        shutil.copyfileobj(old, new, 1 << 20)
        new.flush()
        sync_to_disk(new.fileno())


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def _private_folder(path: Path) -> None:
    """Make *path* a folder that only we may enter, or refuse it."""
    try:
        os.mkdir(path, 0o700)
        _sync_folder(path.parent)
    except FileExistsError:
        pass
    found = os.lstat(path)
    if stat.S_ISLNK(found.st_mode):
        raise StoreError(f"{path} is a symbolic link, and state stays beside its script; remove the link")
    if not stat.S_ISDIR(found.st_mode):
        raise StoreError(f"{path} is a file where a folder is needed; move it away")
    if found.st_uid != os.geteuid():
        raise StoreError(
            f"{path} belongs to another user (id {found.st_uid}), who could read and change the state; "
            "run as that user, or remove the folder"
        )
    if found.st_mode & 0o077:
        os.chmod(path, 0o700)


def _hide_from_git(path: Path) -> None:
    # Runs of other scripts may do the same now, without a common lock: the same two bytes at the same place do no harm.
    descriptor = os.open(path / ".gitignore", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        if not os.fstat(descriptor).st_size:  # else somebody has changed it on purpose
            os.pwrite(descriptor, b"*\n", 0)
    finally:
        os.close(descriptor)


def _remove_leftovers(path: Path) -> None:
    """Remove what killed writers and removers have left. Only the holder of the lock may."""
    for pattern in (f"aside/{_WRITING}*", f"runs/*/{_WRITING}*"):
        for left in path.glob(pattern):
            left.unlink()
    for left in path.glob(f"runs/{_GONE}*"):
        shutil.rmtree(left)


def _sync_folder(path: Path) -> None:
    """Return when the disk knows the names in *path*."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot do it for a folder
            raise
    finally:
        os.close(descriptor)


def _iso(moment: datetime) -> str:
    return moment.isoformat(timespec="microseconds")
