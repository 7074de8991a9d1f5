"""The state of a run: the newest snapshot in memory, and its copy on disk.

The worker writes a snapshot into shared memory; here it becomes the newest one the moment its message has arrived
whole, and a thread copies it to disk without holding anybody up. If snapshots come faster than the disk takes them,
those between are skipped: the latest wins.
"""

import asyncio
import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from spark_runtime.errors import StoreError
from spark_runtime.supervise.segments import OwnedSegment, Segments
from spark_runtime.supervise.store import RunFolder, StoredSnapshot
from spark_workers.failpoints import hit
from spark_workers.messages import Place, Snapshot, Start

NEWEST, DISK = "newest", "disk"
QUIET_SECONDS = 2.0  # after a large snapshot, which may be a reload's: the first steps of the new code come first
LARGE = 4 << 20


@dataclass(frozen=True, slots=True)
class Kept:
    """A complete snapshot: what the worker said of it, and where its parts lie."""

    meta: dict[str, Any]
    parts: list[Place]

    @property
    def checkpoints(self) -> int:
        """How many checkpoints the run had passed."""
        return int(self.meta.get("checkpoints", 0))

    @property
    def nbytes(self) -> int:
        """The size of all parts."""
        return sum(length for _, _, length in self.parts)

    def segments(self) -> set[int]:
        """The segments that it lies in."""
        return {segment for segment, _, _ in self.parts}


class RunState:
    """Holds the newest snapshot and looks after its copy on disk."""

    def __init__(self, segments: Segments, folder: RunFolder | None, on_trouble: Callable[[str], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._segments = segments
        self._spare: asyncio.Future[None] | None = None
        self._spare_waits = False
        trouble = self._posted(on_trouble)
        self._writer = None if folder is None else DiskWriter(folder, trouble)
        self.folder = folder
        self.is_finished = False
        self.newest: Kept | None = None

    def segment_for(self, worker: int, size: int) -> OwnedSegment:
        """Return memory for a snapshot that *worker* is about to write.

        Raises:
            OSError: There is no room.
        """
        hit("state.segment")
        return self._segments.take(size, f"writer {worker}")

    def commit(self, worker: int, snapshot: Snapshot) -> Kept:
        """A snapshot is complete: it is the newest from now on.

        Raises:
            ValueError: It names memory that is not there; the one before stays.
        """
        for number, offset, length in snapshot.parts:
            if (
                number not in self._segments
                or offset < 0
                or length < 0
                or offset + length > self._segments[number].size
            ):
                raise ValueError(f"a snapshot names bytes {offset}+{length} of segment {number}")
        kept = Kept(snapshot.meta, snapshot.parts)
        self.newest = kept
        self._segments.hold(kept.segments(), NEWEST)
        self._segments.release(f"writer {worker}")
        self._to_disk(kept)
        if (self._spare is None or self._spare.done()) and self._segments.wants_spare(kept.nbytes):
            self._spare = asyncio.ensure_future(self._make_spare(kept.nbytes))
        return kept

    async def _make_spare(self, size: int) -> None:
        """Have pages ready for the next snapshot, so that a reload does not wait for the kernel to find them."""
        self._spare_waits = True
        await asyncio.sleep(QUIET_SECONDS)
        self._spare_waits = False
        try:
            self._segments.add(await asyncio.to_thread(self._segments.make_spare, size))
        except OSError:
            pass  # no room for a spare; the next snapshot asks for itself and says so if there is none

    def resume(self, stored: StoredSnapshot) -> None:
        """Take a snapshot from disk as the newest one."""
        lengths = stored.part_lengths()
        segment = self._segments.take(max(1, sum(-(-each // 64) * 64 for each in lengths)), NEWEST)
        parts, offset = [], 0
        for index, length in enumerate(lengths):
            with _Writable(segment) as memory:
                stored.read_into(index, memory[offset : offset + length])
            parts.append([segment.number, offset, length])
            offset += -(-length // 64) * 64
        self.newest = Kept(dict(stored.meta), parts)
        self._segments.hold({segment.number}, NEWEST)

    def start_message(self, worker: int, *, paused: bool, is_first: bool) -> tuple[Start, list[int]]:
        """Return what *worker* must be told to go on from the newest snapshot, and the memory to send along.

        Args:
            worker: Its number.
            paused: It pauses at its first checkpoint.
            is_first: It is this run's first worker: calls that a snapshot from disk was taken in are not repeated.
        """
        if self.newest is None:
            return Start(paused, is_first, {}, [], []), []
        numbers = sorted(self.newest.segments())
        self._segments.hold(set(numbers), f"reader {worker}", mapped=True)
        descriptors = [os.dup(self._segments[number].descriptor) for number in numbers]
        return Start(paused, is_first, self.newest.meta, self.newest.parts, numbers), descriptors

    def forget_worker(self, worker: int) -> None:
        """*worker* and everything in its session is dead."""
        self._segments.release(f"reader {worker}")
        self._segments.release(f"writer {worker}")

    def reset(self, reason: str) -> None:
        """Forget the newest snapshot; on disk it is kept aside, and nothing is left there to go on from."""
        if self._writer is not None and self.newest is not None:
            self._writer.keep_aside(reason, clear=True)
        self.newest = None
        self._segments.release(NEWEST)

    def keep_aside(self, reason: str) -> None:
        """Have the newest snapshot kept on disk for good, beside those that newer ones replace."""
        if self._writer is not None:
            self._writer.keep_aside(reason)

    async def aclose(self) -> None:
        """Wait until the newest snapshot is on disk, then give the memory back."""
        if self._spare is not None:
            if self._spare_waits:
                self._spare.cancel()
            await asyncio.gather(self._spare, return_exceptions=True)
        if self._writer is not None:
            await asyncio.to_thread(self._writer.close, finished=self.is_finished)
        self._segments.close()

    def _to_disk(self, kept: Kept) -> None:
        if self._writer is None:
            return
        # Mapped here, so that the thread needs nothing of ours; held until it says that it is done.
        views = {number: self._segments[number].view() for number in kept.segments()}
        parts = [views[number][offset : offset + length] for number, offset, length in kept.parts]
        holder = f"{DISK} {id(kept)}"
        self._segments.hold(kept.segments(), holder)
        self._writer.put(kept.meta, parts, lambda: self._posted(self._segments.release)(holder))

    def _posted(self, function: Callable[[str], None]) -> Callable[[str], None]:
        """Return *function* as another thread may call it: it runs on the loop."""

        def post(text: str) -> None:
            self._loop.call_soon_threadsafe(function, text)

        return post


class _Writable:
    """A segment mapped for writing, for the length of a block."""

    def __init__(self, segment: OwnedSegment) -> None:
        self._map = mmap.mmap(segment.descriptor, segment.size)

    def __enter__(self) -> memoryview:
        self._view = memoryview(self._map)
        return self._view

    def __exit__(self, *error: object) -> None:
        self._view.release()


@dataclass(eq=False)
class _Job:
    meta: dict[str, Any]
    parts: list[memoryview]
    done: Callable[[], None]

    def __post_init__(self) -> None:
        is_large = sum(part.nbytes for part in self.parts) > LARGE
        self.due = time.monotonic() + (QUIET_SECONDS if is_large else 0.0)


@dataclass(frozen=True, slots=True)
class _Aside:
    reason: str
    clear: bool


class DiskWriter:
    """A thread that writes the latest snapshot. *on_trouble* and *done* are called on it: they must only post."""

    def __init__(self, folder: RunFolder, on_trouble: Callable[[str], None]) -> None:
        self._folder = folder
        self._on_trouble = on_trouble
        # In order, because setting aside concerns the snapshots before it; of snapshots in a row the last is enough.
        self._entries: deque[_Job | _Aside] = deque()
        self._is_failing = False
        self._is_closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="spark-disk", daemon=True)
        self._thread.start()

    def put(self, meta: dict[str, Any], parts: list[memoryview], done: Callable[[], None]) -> None:
        """Write this snapshot next, in place of one that still waits."""
        skipped = None
        with self._changed:
            if self._entries and isinstance(self._entries[-1], _Job):
                skipped = self._entries.pop()
            self._entries.append(_Job(meta, parts, done))
            self._changed.notify()
        if isinstance(skipped, _Job):
            skipped.done()

    def keep_aside(self, reason: str, *, clear: bool = False) -> None:
        """Keep the newest snapshot for good, once it is written; with *clear* it is no generation of the run then."""
        with self._changed:
            self._entries.append(_Aside(reason, clear))
            self._changed.notify()

    def close(self, *, finished: bool) -> None:
        """Write what waits, then end; *finished*: the script has come to its own end."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()
        if finished:
            self._guarded(self._folder.finish)

    def _run(self) -> None:
        while (entry := self._take()) is not None:
            if isinstance(entry, _Job):
                self._guarded(lambda job=entry: self._write_down(job))  # type: ignore[misc]
                entry.done()
            else:
                self._guarded(lambda aside=entry: self._set_aside(aside))  # type: ignore[misc]

    def _take(self) -> "_Job | _Aside | None":
        """Wait for the next entry, and for its time; None when all is written and there will be no more."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._entries or self._is_closing)
                if not self._entries:
                    return None
                first = self._entries[0]
                left = first.due - time.monotonic() if isinstance(first, _Job) and len(self._entries) == 1 else 0.0
                if left <= 0 or self._is_closing:
                    return self._entries.popleft()
                self._changed.wait(left)

    def _set_aside(self, aside: _Aside) -> None:
        self._folder.keep_aside(aside.reason)
        if aside.clear:
            self._folder.clear()

    def _write_down(self, job: _Job) -> None:
        self._folder.write(job.meta, job.parts)
        self._folder.mark(step=int(job.meta.get("checkpoints", 0)))

    def _guarded(self, write: Callable[[], object]) -> None:
        """Write; tell of the first failure in a row, and of the first success after it."""
        try:
            write()
        except (OSError, StoreError) as problem:
            if not self._is_failing:
                self._on_trouble(f"the state is kept in memory only, not in {self._folder.path}: {problem}")
            self._is_failing = True
        else:
            if self._is_failing:
                self._on_trouble(f"the state is written to {self._folder.path} again")
            self._is_failing = False
