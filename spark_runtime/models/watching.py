"""Watches the files of models that are to be replaced when they are built anew."""

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import watchfiles

from spark_runtime.config import Model
from spark_runtime.errors import SparkError

STEP_MS = 20
DEBOUNCE_MS = 200  # a linker writes in pieces; a module that is read too soon is refused, and read again


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
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="spark-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Watch no more."""
        self._stop.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        folders = {str(Path(path).parent) for path in self._names}
        changes = watchfiles.watch(
            *(each for each in folders if os.path.isdir(each)),
            watch_filter=None,
            step=STEP_MS,
            debounce=DEBOUNCE_MS,
            rust_timeout=500,
            yield_on_timeout=False,
            stop_event=self._stop,
            recursive=False,
            raise_interrupt=False,
        )
        for found in changes:
            for path in {path for _, path in found} & self._names.keys():
                if os.path.exists(path):  # between a removal and the new file there is nothing to read
                    for name in self._names[path]:
                        self._renew(name).add_done_callback(partial(self._tell, name))

    def _tell(self, name: str, renewal: "Future[bool]") -> None:
        problem = renewal.exception()
        if isinstance(problem, SparkError):
            self._note(str(problem))
        elif problem is None and renewal.result():
            self._note(f"model {name!r}: new code has taken the old one's place")
