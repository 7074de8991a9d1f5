"""Tell what the watched files hold, each time that changes.

How it works. A *save* is a change of content, whatever way it came about: written in place, renamed over, a link turned
elsewhere. So nothing here interprets events. An event, a timer and a call of `watch()` all do the same: they make the
watcher *look*. A look reads a file and hashes it; the digest alone decides whether there is something to tell.

    event in a folder ─┐
    1 s net            ├─► look ─► stands still? ─► digest differs? ─► on_saved({path: content})
    watch(files)      ─┘     ▲          │ no
                             └── 5 ms ──┘

Where to listen. watchfiles watches folders, because a watched *file* is lost with the first rename over it. A path is
walked link by link (`_places`), and the folder of every link on the way counts, so that a swapped link, also one of a
parent folder (`..data` of a Kubernetes ConfigMap), is seen like a write. Other names in these folders are ignored.

When a save is whole. How long content must stand still depends on what is known about the writer (`_patience`):

    nobody has it open for writing          at once
    the system does not say                 20 ms
    somebody keeps it open for writing      0.5 s
    the file is empty, or is gone           0.5 s, since something else is about to come

Who is writing? Linux tells through leases: a read lease is granted only while no descriptor and no mapping is open for
writing, and a writer who comes while we hold one waits until we give it back. We hold it for the one read of the file,
some 10 µs for a script, so what was read is what the last writer left. Pitfalls:

* A writer who has to wait makes the kernel send *us* SIGIO, which kills by default. So we choose a signal that is
  ignored by default. A writer that opens with O_NONBLOCK in these 10 µs gets EAGAIN; editors and shells do not.
* Leases are refused for files of another user (without CAP_LEASE) and on many network and FUSE file systems: "does not
  say". NFSv4 refuses with the errno that means "somebody writes", which costs 0.5 s a save.
* With `poll` none is asked for, because the writer may then be on another machine.

Rules that keep it simple:

* One task (`_run`) owns the ledger. Threads and `watch()` only post and wake it.
* `watch()` makes a new ledger. What was seen with the old one in mind is thrown away; all files are looked at again.
* A new folder watch starts before the old one stops, and all files are looked at afterwards, so no save falls between.
* The net asks every second what events may have missed: an overflowing queue, no free inotify instance, a folder that
  was replaced, and writes through a mapping, which make no event at all. `poll` is the net alone, asking more often.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
import math
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if sys.platform == "linux":
    import fcntl

if TYPE_CHECKING:
    from watchfiles._rust_notify import RustNotify

P = ParamSpec("P")
T = TypeVar("T")

# The sha256 of the content, in hexadecimal; None stands for a file that is not there.
Digest = str | None

# What `stat` says about a file. The ctime is in it because nobody can set it back, as `cp -p` does with the mtime.
Signature = tuple[int, ...] | None
GONE: Signature = None
ASK_AGAIN: Signature = ()  # equals no file's signature, so the net looks at the file each time

NET_SECONDS = 1.0
NET_ALONE_SECONDS = 0.25  # when there are no events
RETRY_SECONDS = 0.005
RETRY_SECONDS_PER_BYTE = 5e-9  # reading a big file again and again takes a small part of a core
STILL_SECONDS = 0.02
STILL_LONG_SECONDS = 0.5
FOLD_SECONDS = 0.02
MOST_LINKS = 40  # as the kernel counts

NO_EVENTS = "the system gives no file events, files are asked for every 0.25 s"

_log = logging.getLogger(__name__)


# --- Looking at one file ----------------------------------------------------------------------------------------------


class Writer(Enum):
    """Whether anyone has the file open for writing."""

    NONE = auto()
    SOME = auto()
    UNKNOWN = auto()


@dataclass(frozen=True, slots=True)
class Look:
    """What one look at a file found. Without a file `content` and `digest` are None."""

    at: float
    content: bytes | None
    digest: Digest
    signature: Signature
    writer: Writer


def look_at(path: Path, *, ask_for_writers: bool = True) -> Look:
    """Read *path* as it is now, whole or not.

    Raises:
        OSError: It is there and cannot be read, or is no regular file.
    """
    at = time.monotonic()
    try:
        # O_NONBLOCK: opening a named pipe would otherwise wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return Look(at, None, None, GONE, Writer.NONE)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        with _writers_held_back(fd, ask_for_writers) as writer:
            # The signature comes first: a write between the two then makes the next look differ from this one.
            signature = _signature(os.fstat(fd))
            content = _read_all(fd)
        return Look(at, content, hashlib.sha256(content).hexdigest(), signature, writer)
    finally:
        os.close(fd)


def _read_all(fd: int) -> bytes:
    with open(fd, "rb", buffering=0, closefd=False) as file:
        return file.readall()


def _signature(status: os.stat_result) -> Signature:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _signature_of(path: Path) -> Signature:
    try:
        return _signature(os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return GONE
    except OSError:
        return ASK_AGAIN  # the look that follows says what is wrong


@contextmanager
def _writers_held_back(fd: int, ask: bool) -> Iterator[Writer]:
    """Find out who writes to *fd*. With the answer NONE nobody can begin to until the block ends."""
    writer = _take_lease(fd) if ask else Writer.UNKNOWN
    try:
        yield writer
    finally:
        if writer is Writer.NONE:
            _give_lease_back(fd)


if sys.platform == "linux":

    def _take_lease(fd: int) -> Writer:
        try:
            # Before the lease, for the signal may come at once. SIGURG: ignored by default, and who handles it (only
            # out-of-band data raises it) must expect it to come for nothing.
            fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except OSError as refusal:
            return Writer.SOME if refusal.errno == errno.EAGAIN else Writer.UNKNOWN
        return Writer.NONE

    def _give_lease_back(fd: int) -> None:
        # Closing would do it too, but not while a child that was forked just now still has a copy of the descriptor.
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)

else:

    def _take_lease(fd: int) -> Writer:
        return Writer.UNKNOWN

    def _give_lease_back(fd: int) -> None:
        pass


# --- The ledger of one file -------------------------------------------------------------------------------------------


def _patience(look: Look) -> float:
    """How many seconds this must stand still to count as whole."""
    if not look.content or look.writer is Writer.SOME:
        return STILL_LONG_SECONDS
    return 0.0 if look.writer is Writer.NONE else STILL_SECONDS


@dataclass(slots=True)
class WatchedFile:
    """What is known about one file. It has no clock: time comes with the looks.

    Attributes:
        known: The digest the caller has: given with `watch()` or reported since.
        due: When to look next; infinity once the file has settled.
        signature: What the net compares with; of the last settled look.
        fresh: A settled look that the caller does not know of yet.
    """

    known: Digest
    due: float = -math.inf
    signature: Signature = ASK_AGAIN
    fresh: Look | None = None
    _state: tuple[Digest, Signature] | None = None
    _since: float = field(default=math.inf)

    def see(self, look: Look) -> None:
        """Take in a look: the file has settled, or is due again soon."""
        state = (look.digest, look.signature)
        if state != self._state:
            self._state, self._since = state, look.at
        missing = _patience(look) - (look.at - self._since)
        if missing > 0:
            pause = RETRY_SECONDS + RETRY_SECONDS_PER_BYTE * len(look.content or b"")
            self.due = look.at + min(missing, pause)
        else:
            self._settle(look)

    def see_failure(self) -> None:
        """Take in that the file cannot be read. The net tries again."""
        self.due, self.signature, self._state = math.inf, ASK_AGAIN, None

    def tell(self) -> bytes | None:
        """Return the fresh content. From here on the caller knows it."""
        assert self.fresh is not None
        content, self.known, self.fresh = self.fresh.content, self.fresh.digest, None
        return content

    def _settle(self, look: Look) -> None:
        self.due = math.inf
        # Who keeps a file open may write through a mapping, and that changes the mtime once, not each time.
        self.signature = ASK_AGAIN if look.writer is Writer.SOME else look.signature
        # A fresh look that was not told is replaced: the latest save wins, and one that was taken back is none.
        self.fresh = look if look.digest != self.known else None


def _survey(
    files: Mapping[Path, WatchedFile], closely: set[Path], *, all_files: bool, ask_for_writers: bool
) -> dict[Path, Look | OSError]:
    """Look at the files in *closely*, and with *all_files* at those too whose `stat` has changed."""
    found: dict[Path, Look | OSError] = {}
    for path, file in files.items():
        if path in closely or (all_files and _signature_of(path) != file.signature):
            try:
                found[path] = look_at(path, ask_for_writers=ask_for_writers)
            except OSError as failure:
                found[path] = failure
    return found


# --- Folders ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Places:
    """Where the watched files can change: files by place, and the identity of each folder that has such a place."""

    files: dict[str, frozenset[Path]] = field(default_factory=dict)
    folders: dict[str, tuple[int, int]] = field(default_factory=dict)


def _places(path: Path) -> set[str]:
    """Return what a save of *path* may replace: every link on the way, and its end. The folders in them are real."""
    places: set[str] = set()
    at, to_go, links = "/", path.absolute().as_posix().split("/")[::-1], 0
    while to_go and links < MOST_LINKS:  # counted, for a link to itself is one place for ever
        name = to_go.pop()
        if name in ("", ".", ".."):
            at = os.path.dirname(at) if name == ".." else at
            continue
        place = os.path.join(at, name)
        try:
            target = os.readlink(place)
        except OSError:  # no link, or nothing there
            at = place
            continue
        places.add(place)
        links += 1
        at = "/" if target.startswith("/") else at
        to_go.extend(target.split("/")[::-1])
    return places | {at}


def _find_places(paths: Iterable[Path]) -> Places:
    files: dict[str, frozenset[Path]] = {}
    for path in paths:
        for place in _places(path):
            files[place] = files.get(place, frozenset()) | {path}
    folders: dict[str, tuple[int, int]] = {}
    for folder in sorted({os.path.dirname(place) for place in files}):
        try:
            status = os.stat(folder)
        except OSError:
            continue  # not there now; the net asks again
        folders[folder] = (status.st_dev, status.st_ino)
    return Places(files, folders)


class FolderWatch:
    """A thread that waits for events in some folders and posts the names to the loop.

    `started` is done when no later event can be missed; it raises what kept the watch from starting.
    """

    def __init__(
        self,
        folders: Iterable[str],
        on_events: Callable[[set[str]], None],
        on_failed: Callable[[Exception], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.started: asyncio.Future[None] = self._loop.create_future()
        self._folders = list(folders)
        self._on_events = on_events
        self._on_failed = on_failed
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._body, name="spark-watch-folders")
        self._thread.start()

    def ask_to_stop(self) -> None:
        """Return at once; the thread ends some milliseconds later."""
        self._stop.set()

    def join(self) -> None:
        """Wait for the end of the thread. Call it in another thread than the loop's."""
        self._thread.join()

    def is_running(self) -> bool:
        return self._thread.is_alive()

    def _body(self) -> None:
        try:
            # Here, and not at the top: the import takes 60 ms, and neither the loop nor `import` of this should wait.
            from watchfiles._rust_notify import RustNotify

            with RustNotify(self._folders, False, False, 300, False, True) as notify:
                self._post(self._settle_started, None)
                self._pump(notify)
        except Exception as failure:  # noqa: BLE001  a thread has no caller; the owner hears it and goes on without
            self._post(self._settle_started, failure)

    def _pump(self, notify: RustNotify) -> None:
        while not self._is_orphan():
            changes = notify.watch(20, 1, 1000, self._stop)
            if changes == "stop":
                return
            if isinstance(changes, set):
                self._post(self._on_events, {name for _, name in changes})

    def _is_orphan(self) -> bool:
        # Without this a program that forgets `aclose()` would never end, for the thread is no daemon: a daemon that
        # comes back from Rust while the interpreter goes down aborts the process.
        return self._loop.is_closed() or not threading.main_thread().is_alive()

    def _settle_started(self, failure: Exception | None) -> None:
        if not self.started.done():
            if failure is None:
                self.started.set_result(None)
            else:
                self.started.set_exception(failure)
        elif failure is not None:
            self._on_failed(failure)

    def _post(self, act: Callable[[T], None], argument: T) -> None:
        try:
            self._loop.call_soon_threadsafe(act, argument)
        except RuntimeError:
            self._stop.set()  # the loop is closed: nobody is left to tell


# --- The watcher ------------------------------------------------------------------------------------------------------


class Watcher:
    """Tell what the watched files hold, each time that changes.

    Make it inside a running asyncio loop, in which *on_saved* is then called.

    Args:
        on_saved: Receives the settled new content of each file that changed; None for a file that is gone. Files saved
            within some milliseconds come in one call. A touch, and a save of the same bytes, are not told. An exception
            that it raises goes to the loop's exception handler, and watching goes on.
        poll: Do without events, for folders where they do not arrive (WSL, NFS, Docker); ask every 0.25 s.
        on_degraded: Receives a sentence, once for each cause, when something cannot be watched as it should be: there
            are no events, or a file cannot be read. Watching goes on with the net. By default the sentence is logged.
    """

    def __init__(
        self,
        on_saved: Callable[[dict[Path, bytes | None]], None],
        *,
        poll: bool = False,
        on_degraded: Callable[[str], None] | None = None,
    ) -> None:
        self._on_saved = on_saved
        self._on_degraded = on_degraded or _log.warning
        self._poll = poll
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._files: dict[Path, WatchedFile] = {}
        self._named: set[Path] = set()  # events came for these
        self._places = Places()
        self._folder_watches: list[FolderWatch] = []  # the last one counts, those before it are about to end
        self._troubles: set[str] = set()  # what has been told and still holds
        self._next_net = math.inf
        self._closing = False
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spark-watch-look")
        self._task = self._loop.create_task(self._run(), name="spark-watch")
        self._task.add_done_callback(self._on_ended)

    def watch(self, files: Mapping[Path, Digest]) -> None:
        """Watch *files* from now on, and no others.

        Args:
            files: For each file the sha256 of the content in use, in hexadecimal, or None where there is no file. What
                differs from it on disk is told soon. A digest given here takes the place of what was told before, so
                for content that was told and refused give the digest of the refused content, or it is told again.
        """
        self._files = {path: WatchedFile(known) for path, known in files.items()}
        self._next_net = self._loop.time()
        self._wake.set()

    async def aclose(self) -> None:
        """Stop watching; *on_saved* is not called any more.

        Our threads have ended then. The thread of watchfiles in Rust closes its descriptors some milliseconds later.
        """
        if not self._closing:  # a second cancel would end the clean-up of the first
            self._closing = True
            self._task.cancel()
        await asyncio.wait({self._task})

    # The one task.

    async def _run(self) -> None:
        try:
            while True:
                await self._sleep()
                await self._look_around()
        finally:
            await self._stop_listening(self._folder_watches)
            self._executor.shutdown()

    async def _sleep(self) -> None:
        """Wait for an event, or for the next thing that is due."""
        timer = self._loop.call_at(self._next_due(), self._wake.set) if self._files else None
        try:
            await self._wake.wait()
        finally:
            if timer is not None:
                timer.cancel()
        self._wake.clear()

    def _next_due(self) -> float:
        looks = min(file.due for file in self._files.values())
        return max(0.0, min(self._next_net, looks, self._fold_until()))

    async def _look_around(self) -> None:
        """Look where there is reason to, tell what has settled, follow the places."""
        files, now = self._files, self._loop.time()
        net = now >= self._next_net
        if net:
            self._next_net = now + (NET_SECONDS if self._hears_events() else NET_ALONE_SECONDS)
        # An event for a file that has not settled is no reason to look: that file is due soon anyway, and whoever
        # copies 100 MB makes an event for each block.
        named, self._named = self._named, set()
        closely = {p for p, file in files.items() if file.due <= now or (p in named and file.due == math.inf)}
        found = await self._in_thread(_survey, files, closely, all_files=net, ask_for_writers=not self._poll)
        if files is not self._files:
            return  # watch() was called; its own looks are on their way
        for path, look in found.items():
            self._take(path, look)
        self._tell()
        if net or found:
            # Also after each look: the save may have been a link that now leads to another folder.
            await self._follow_places()

    def _take(self, path: Path, look: Look | OSError) -> None:
        trouble = f"cannot read {path}"
        if isinstance(look, OSError):
            self._files[path].see_failure()
            self._degrade(trouble, look)
        else:
            self._files[path].see(look)
            self._troubles.discard(trouble)

    def _tell(self) -> None:
        """Call *on_saved*, unless more is about to settle and there is time to tell it in one call."""
        unsettled = self._named or any(file.due < math.inf for file in self._files.values())
        if unsettled and self._loop.time() < self._fold_until():
            return
        report = {path: file.tell() for path, file in self._files.items() if file.fresh}
        if report:
            self._call(self._on_saved, report)

    def _fold_until(self) -> float:
        """When the oldest fresh look has waited long enough for others to be told with it."""
        return min((file.fresh.at + FOLD_SECONDS for file in self._files.values() if file.fresh), default=math.inf)

    # Places and folders.

    async def _follow_places(self) -> None:
        """Listen where the files now are. After a change look at all of them, for nobody listened there before."""
        if self._poll:
            return
        files = self._files
        places = await self._in_thread(_find_places, list(files))
        if places == self._places:
            return
        folders_differ = places.folders != self._places.folders
        self._places = places  # before the new watch starts, so that its first events find their files
        if folders_differ:
            await self._listen(places.folders)
        for file in files.values():
            file.due = -math.inf
        self._wake.set()

    async def _listen(self, folders: Iterable[str]) -> None:
        old = list(self._folder_watches)
        if folders:
            new = FolderWatch(folders, self._on_events, self._on_folders_failed)
            self._folder_watches.append(new)
            try:
                await new.started
                self._troubles.discard(NO_EVENTS)
            except Exception as failure:  # noqa: BLE001  whatever it is, the net goes on without events
                self._on_folders_failed(failure)
        await self._stop_listening(old)

    async def _stop_listening(self, watches: Iterable[FolderWatch]) -> None:
        # A watch leaves the list when its thread has ended, so whatever a cancel interrupts, the clean-up finds it.
        for watch in list(watches):
            watch.ask_to_stop()
        for watch in list(watches):
            await self._in_thread(watch.join)
            self._folder_watches.remove(watch)

    def _hears_events(self) -> bool:
        return bool(self._folder_watches) and self._folder_watches[-1].is_running()

    def _on_events(self, names: set[str]) -> None:
        for name in names:
            self._named |= self._places.files.get(name, frozenset())
        if self._named:
            self._wake.set()

    def _on_folders_failed(self, failure: Exception) -> None:
        self._degrade(NO_EVENTS, failure)

    # Small services.

    def _degrade(self, trouble: str, failure: Exception) -> None:
        if trouble not in self._troubles:
            self._troubles.add(trouble)
            self._call(self._on_degraded, f"{trouble}: {failure}")

    def _call(self, callback: Callable[[T], None], argument: T) -> None:
        try:
            callback(argument)
        except Exception as failure:  # noqa: BLE001  the caller's mistake must be heard and must not end the watching
            self._loop.call_exception_handler({"message": f"{callback!r} failed", "exception": failure})

    async def _in_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._loop.run_in_executor(self._executor, lambda: work(*args, **kwargs))

    def _on_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (failure := task.exception()) is not None:
            self._loop.call_exception_handler({"message": "the watcher ended", "exception": failure, "task": task})
