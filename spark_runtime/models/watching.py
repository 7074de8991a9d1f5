"""Watches the files of models that are to be replaced when they are built anew."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import watchfiles

from spark_runtime.config import Model
from spark_runtime.errors import SparkError

STEP_MS = 20
DEBOUNCE_MS = 200  # a linker writes in pieces; a module that is read too soon is refused, and read again

LOOK_MS = 1000  # also look without having been told: a change may come before the watch stands

Signature = tuple[int, int, int] | None


def signatures(paths: Iterable[str]) -> dict[str, Signature]:
    """Return what tells one state of each file from another; None for one that is not there."""
    found: dict[str, Signature] = {}
    for path in paths:
        try:
            status = os.stat(path)
        except OSError:
            found[path] = None
        else:
            found[path] = (status.st_mtime_ns, status.st_size, status.st_ino)
    return found


def watch_folders(paths: Iterable[str], stop: threading.Event | None) -> Iterator[object]:
    """Yield whenever something may have changed where the files lie; without *stop* Ctrl-C ends it by raising."""
    folders = {str(Path(path).parent) for path in paths}
    yield from watchfiles.watch(
        *(each for each in folders if os.path.isdir(each)),
        watch_filter=None,
        step=STEP_MS,
        debounce=DEBOUNCE_MS,
        rust_timeout=LOOK_MS,
        yield_on_timeout=True,
        stop_event=stop,
        recursive=False,
        raise_interrupt=stop is None,
    )


class ModelWatcher:
    """One thread for all models of a `Spark`. It watches folders, because a build replaces the file itself."""

    def __init__(
        self,
        models: Iterable[Model],
        renew: Callable[[str], "Future[bool]"],
        note: Callable[[str], None],
    ) -> None:
        self._names: dict[str, list[str]] = {}
        for model in models:
            self._names.setdefault(os.path.realpath(model.path), []).append(model.name)
        self._renew = renew
        self._note = note
        self._seen = signatures(self._names)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="spark-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Watch no more."""
        self._stop.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        seen = self._seen
        for _ in watch_folders(self._names, self._stop):
            now = signatures(self._names)
            for path, names in self._names.items():
                if now[path] is not None and now[path] != seen[path]:  # between removal and new file nothing is read
                    seen[path] = now[path]
                    for name in names:
                        self._renew(name).add_done_callback(partial(self._tell, name))

    def _tell(self, name: str, renewal: "Future[bool]") -> None:
        problem = renewal.exception()
        if isinstance(problem, SparkError):
            self._note(str(problem))
        elif problem is None and renewal.result():
            self._note(f"model {name!r}: new code has taken the old one's place")
