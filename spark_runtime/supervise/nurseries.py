"""The nurseries that script workers come from.

There may be two for a while: the first one starts empty, so that the first worker need not wait; when that worker's
imports are known a second one imports them ahead, and later workers come from there. A nursery that is not needed any
more is kept while it has workers, because it is their parent.
"""

import asyncio
from collections.abc import Callable

from spark_runtime.errors import NurseryDied
from spark_runtime.processes.children import our_children
from spark_runtime.processes.nursery import Nursery, Process
from spark_workers import system

SCRIPT_WORKER = "spark_workers.scripts.worker"  # every nursery has the runtime's own part imported
END_SECONDS = 3.0
ORPHAN_SECONDS = 1.0
MANY_MODULES = 10  # fewer are not worth another nursery


class Nurseries:
    """Knows the nursery that starts workers now, and the older ones that still have some."""

    def __init__(self, modules: list[str], left_out: set[str], on_left_out: Callable[[str], None]) -> None:
        self._left_out = set(left_out)
        self._on_left_out = on_left_out
        self._all: list[Nursery] = []
        self._next: Nursery | None = None
        self._failures = 0
        self._is_closing = False
        self._tried: set[str] = set()
        self._burials: set[asyncio.Future[None]] = set()
        self._current = self._start(modules)

    def start(self, process: Process, entry: str, descriptors: list[int]) -> None:
        """Have a worker process started.

        Raises:
            NurseryDied: No nursery can be started.
        """
        if self._current not in self._all:
            if self._failures > 3:
                raise NurseryDied("the process that starts workers ends at once; `python -m spark_workers` shows why")
            self._current = self._start([])
        self._current.start(process, entry, descriptors)

    def prepare(self, modules: list[str]) -> None:
        """Import *modules* in a new nursery, which takes over when it is ready."""
        wanted = [name for name in modules if name.partition(".")[0] not in self._left_out]
        missing = set(wanted) - self._current.modules - self._tried
        if self._next is None and self._current.is_ready and not self._is_closing and len(missing) > MANY_MODULES:
            self._tried = missing  # what cannot be imported ahead is not tried again and again
            self._next = self._start(wanted)

    def _bury(self, nursery: Nursery) -> None:
        """Have a nursery that has ended, or is about to, reaped; waiting here would hold the loop."""
        burial = asyncio.ensure_future(self._reap(nursery))
        self._burials.add(burial)
        burial.add_done_callback(self._burials.discard)

    async def _reap(self, nursery: Nursery) -> None:
        limit = asyncio.get_running_loop().time() + END_SECONDS
        while not nursery.has_ended():
            if asyncio.get_running_loop().time() > limit:
                nursery.kill()
                break
            await asyncio.sleep(0.005)
        await self._clear_orphans()

    async def _clear_orphans(self) -> None:
        """Kill what a lost nursery's workers left behind; it has fallen to us, if we take orphans.

        multiprocessing's resource trackers end by themselves when the others have, and clean up as they do.
        """
        if not system.adopts_orphans():
            return
        limit = asyncio.get_running_loop().time() + ORPHAN_SECONDS
        while orphans := our_children.orphans():
            is_late = asyncio.get_running_loop().time() > limit
            for pid in [each for orphan in orphans for each in (*system.descendants(orphan), orphan)]:
                if is_late or not system.is_resource_tracker(pid):
                    system.kill(pid)
            for pid in orphans:
                system.reap_nowait(pid)
            await asyncio.sleep(0.01)

    async def aclose(self) -> None:
        """End every nursery and wait until they and all their descendants are gone."""
        self._is_closing = True
        for each in self._all:
            each.close()
        for each in self._all:
            self._bury(each)
        self._all.clear()
        await asyncio.gather(*self._burials)

    def pids(self) -> list[int]:
        """The nurseries' own processes."""
        return [each.pid for each in self._all]

    def _start(self, modules: list[str]) -> Nursery:
        nursery = Nursery(asyncio.get_running_loop(), [SCRIPT_WORKER, *modules], self._ready, self._lost)
        self._all.append(nursery)
        return nursery

    def _ready(self, nursery: Nursery) -> None:
        self._failures = 0
        if nursery is self._next:
            self._current, self._next = nursery, None
        self.tidy()

    def tidy(self) -> None:
        """End nurseries that are neither used nor needed."""
        for each in list(self._all):
            if each not in (self._current, self._next) and not each.is_needed():
                each.close()
                self._all.remove(each)
                self._bury(each)

    def _lost(self, nursery: Nursery) -> None:
        self._all.remove(nursery)
        self._bury(nursery)
        if nursery.spoiled_by is not None:
            package = nursery.spoiled_by.partition(".")[0]
            self._left_out.add(package)
            self._on_left_out(package)
        else:
            self._failures += 1
        if nursery is self._next:
            self._next = None
