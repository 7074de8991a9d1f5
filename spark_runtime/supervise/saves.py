"""From a saved file to a version of the code that is worth a reload, or to the reason why not."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from spark_runtime.supervise.code import Code, CodeBroken, Version
from spark_runtime.supervise.watcher import Watcher


class SavesOwner(Protocol):
    """What the run does about saves."""

    def running_version(self) -> Version | None:
        """The version that a save is compared with: what runs, or is about to; None if nothing does."""

    def on_new_code(self, files: list[Path], saved_at: float) -> None:
        """Something that makes a difference was saved, and it compiles. *saved_at*: when that was seen."""

    def on_same_code(self) -> None:
        """What was saved runs the same as what runs now."""

    def on_broken_code(self, problem: CodeBroken) -> None:
        """What was saved does not compile."""


class Saves:
    """Watches the script and what it imports, one save after another."""

    def __init__(
        self, owner: SavesOwner, code: Code, *, watch: bool, poll: bool, on_trouble: Callable[[str], None]
    ) -> None:
        self._owner = owner
        self._code = code
        self._last: asyncio.Future[None] | None = None
        self._watcher = Watcher(self._on_saved, poll=poll, on_degraded=on_trouble) if watch else None

    def watch(self) -> None:
        """Watch the files that belong to the code now."""
        if self._watcher is not None:
            self._watcher.watch(self._code.watched())

    def learn(self, version: Version, files: dict[str, str], wanted: list[str]) -> Version:
        """A worker of *version* has read *files*: watch them, and return the version with them in it.

        What the version had stays as it was: the file may have been saved since.
        """
        sources = self._code.learn(files, wanted)
        self.watch()
        added = {path: source for path, source in sources.items() if path not in version.sources}
        return replace(version, sources={**version.sources, **added})

    async def aclose(self) -> None:
        """Stop watching."""
        if self._watcher is not None:
            await self._watcher.aclose()
        if self._last is not None:
            await self._last

    def _on_saved(self, changes: dict[Path, bytes | None]) -> None:
        saved_at = time.monotonic()
        self._code.saved(changes)  # at once: a later `watch` must not name the content from before
        self._last = asyncio.ensure_future(self._take(list(changes), saved_at, self._last))

    async def _take(self, files: list[Path], saved_at: float, before: "asyncio.Future[None] | None") -> None:
        """Look at what was saved, beside the loop because a large file takes a while."""
        if before is not None:
            await before
        running = self._owner.running_version()
        try:
            await asyncio.to_thread(self._code.check)
            if running is not None and not await asyncio.to_thread(self._code.differences, running):
                self._owner.on_same_code()
            else:
                self._owner.on_new_code(files, saved_at)
        except CodeBroken as problem:
            self._owner.on_broken_code(problem)
        self.watch()
