"""Which worker runs the script, and which one is being made ready to take its place.

A new worker is loaded beside the one that runs, so that code which cannot even be loaded changes nothing. Only when it
is ready is the old one asked to leave, and only when the old process is dead does the new one begin ``torch()``: two
models never have to fit on one GPU.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from spark_runtime.errors import NurseryDied
from spark_runtime.supervise.code import Version
from spark_runtime.supervise.nurseries import Nurseries
from spark_runtime.supervise.worker import Death, Event, Frozen, Worker
from spark_workers.messages import Left, Load, Loaded, LoadFailed

MOST_TRIES = 3


@dataclass(eq=False)
class Cast:
    """A worker with the version of the code that it was given."""

    worker: Worker
    version: Version
    saved_at: float | None = None  # when its code was saved, if a save made it
    tries: int = 1  # how many nurseries were asked for it
    is_loaded: bool = False
    has_run: bool = False  # it has passed a checkpoint
    has_kept: bool = False  # it has handed over a snapshot
    left: Left | None = None


class StageOwner(Protocol):
    """What the run does about the workers on its stage."""

    def on_ready(self, cast: Cast, loaded: Loaded) -> None:
        """The next worker has executed the script's top level."""

    def on_unready(self, cast: Cast, why: LoadFailed | Death) -> None:
        """The next worker could not, and is no longer on the stage."""

    def on_script(self, cast: Cast, event: Event) -> None:
        """The worker that runs the script has said something."""

    def on_gone(self, cast: Cast, death: Death) -> None:
        """The worker that ran the script is dead, and no longer on the stage."""


class Stage:
    """Knows the current worker and the next one, and no more than that about the run."""

    def __init__(
        self,
        owner: StageOwner,
        nurseries: Nurseries,
        on_output: Callable[[Worker, str, bytes], None],
        program: str,
        arguments: Sequence[str],
    ) -> None:
        self.current: Cast | None = None
        self.next: Cast | None = None
        self._owner = owner
        self._nurseries = nurseries
        self._on_output = on_output
        self._program = program
        self._arguments = list(arguments)
        self._numbers = 0

    def load(self, version: Version, saved_at: float | None, tries: int = 1) -> Cast:
        """Make a worker ready with *version*, in place of one that is being made ready."""
        self.drop_next("newer code was saved")
        self._numbers += 1
        worker = Worker(self._numbers, self._nurseries, self._on_event, self._on_output)
        self.next = Cast(worker, version, saved_at, tries)
        sources = {str(path): source for path, source in version.sources.items()}
        # As in plain Python, the folder of the file itself, not that of a link to it.
        roots = list(dict.fromkeys([os.path.dirname(os.path.realpath(version.script)), os.getcwd()]))
        worker.send(Load(self._program, module_name(version.script), self._arguments, sources, roots))
        return self.next

    def promote(self) -> Cast:
        """The next worker is the current one from now on."""
        assert self.next is not None
        assert self.current is None
        self.current, self.next = self.next, None
        return self.current

    def drop_next(self, reason: str) -> None:
        """Give up the worker that is being made ready."""
        if self.next is not None:
            self.next.worker.kill(reason)
            self.next = None

    def workers(self) -> list[Worker]:
        """Those on the stage."""
        return [cast.worker for cast in (self.current, self.next) if cast is not None]

    def _on_event(self, worker: Worker, event: Event) -> None:
        if self.current is not None and worker is self.current.worker:
            self._on_current(self.current, event)
        elif self.next is not None and worker is self.next.worker:
            self._on_next(self.next, event)
        # Else it was dropped: what it still says is of no use.

    def _on_current(self, cast: Cast, event: Event) -> None:
        if isinstance(event, Death):
            self.current = None
            self._owner.on_gone(cast, event)
        else:
            self._owner.on_script(cast, event)

    def _on_next(self, cast: Cast, event: Event) -> None:
        if isinstance(event, Loaded):
            cast.is_loaded = True
            self._owner.on_ready(cast, event)
        elif isinstance(event, Death) and cast.worker.pid is None and cast.tries < MOST_TRIES:
            self._load_again(cast, event)
        elif isinstance(event, (LoadFailed, Death)):
            self.next = None
            self._owner.on_unready(cast, event)
        elif isinstance(event, Frozen) and event.stopped:
            cast.worker.kill("it was stopped (SIGSTOP) while it was being loaded")

    def _load_again(self, cast: Cast, death: Death) -> None:
        """Its nursery went down before the worker was there: ask another one."""
        self.next = None
        try:
            self.load(cast.version, cast.saved_at, cast.tries + 1)
        except NurseryDied as problem:
            self._owner.on_unready(cast, Death(death.status, str(problem)))


def module_name(script: Path) -> str:
    """The name under which the script is imported."""
    return script.stem
