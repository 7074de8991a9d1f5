"""The object that scripts call `spark`.

In a worker it is attached to the script's `Session`. Under plain Python it is attached to nothing: `persist` calls the
initializer, a checkpoint does nothing, and the script runs from top to bottom.
"""

import os
import types
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, overload

from spark_workers.messages import Wish
from spark_workers.scripts.checkpoint import PauseTurn, Turn, idle_checkpoint
from spark_workers.scripts.errors import SparkUsageError
from spark_workers.scripts.loader import Entry, Shadow
from spark_workers.scripts.loops import Loop, Loops
from spark_workers.scripts.persist import Persisted
from spark_workers.scripts.session import Session
from spark_workers.scripts.values import Shown

if TYPE_CHECKING:
    from spark_workers.scripts.models import ModelCall, Models

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class Controller(Shown):
    """Steers the script from inside: what the terminal's keys and ``spark ctl`` do from outside."""

    def __init__(self, owner: "Spark") -> None:
        self._owner = owner

    @property
    def status(self) -> str:
        """starting, running, pausing, paused, idle or stopping; always running without the runtime."""
        session = self._owner.session
        return session.status if session is not None else "running"

    def shown(self) -> object:
        """What is shown of an exposed controller."""
        return {"status": self.status}

    def pause(self) -> None:
        """Pause at the next checkpoint."""
        self._ask("pause")

    def resume(self) -> None:
        """Go on after a pause."""
        self._ask("resume")

    def stop(self) -> None:
        """Raise `SparkStopError` at the next checkpoint."""
        self._ask("stop")

    def step(self, n: int = 1) -> None:
        """Run to the *n*-th checkpoint from here, then pause."""
        if n < 1:
            raise SparkUsageError(f"step({n}): the number of checkpoints is at least 1")
        self._ask("step", n)

    def checkpoint(self) -> "Turn | PauseTurn":
        """The same as ``spark.checkpoint()``."""
        return self._owner.checkpoint()

    def _ask(self, what: str, count: int = 0) -> None:
        session = self._owner.session
        if session is not None:
            session.wish(Wish(what, count))


class Spark:
    """What a script uses of the runtime. One object for a process, `spark`.

    Attributes:
        checkpoint: Call it at every step: ``spark.checkpoint()``, in asynchronous code ``await spark.checkpoint()``.
            It raises `SparkStopError` or `SparkReloadError` when that was asked, waits while paused, serves calls of
            exposed functions, and otherwise costs about a tenth of a microsecond.
        persisted: The persisted values, as a mutable mapping.
        controller: Pause, resume, stop and step from inside the script.
    """

    checkpoint: Callable[[], "Turn | PauseTurn"]
    persisted: Persisted

    def __init__(self) -> None:
        self.session: Session | None = None
        self.main_entry: Entry | None = None
        self.controller = Controller(self)
        self.persisted = Persisted(print)
        self.detach()

    # --- state ---

    def persist(
        self,
        key: str,
        initializer: Callable[[], T],
        *,
        version: Any = None,
        migrate: Callable[[Any], T] | None = None,
    ) -> T:
        """Return the value stored under *key*, which outlives a reload and a crash; make it the first time.

        Args:
            key: Its name.
            initializer: Makes the value when nothing is stored.
            version: Change it when the value's shape changes: the stored value then goes through *migrate*, or is
                made anew.
            migrate: Takes the old value, returns the new one.

        Raises:
            SparkUsageError: Called at the top level of a script.
        """
        return self.persisted.persist(key, initializer, version, migrate)

    def has_persisted(self, key: str) -> bool:
        """Tell whether a value is stored under *key*."""
        return key in self.persisted

    def clear_persisted(self, key: str) -> None:
        """Forget the value under *key*; nothing happens if there is none."""
        self.persisted.discard(key)

    def clear_all_persisted(self) -> None:
        """Forget every stored value."""
        self.persisted.clear()

    # --- showing and being called ---

    @overload
    def expose(self, function: F, /) -> F: ...

    @overload
    def expose(self, bindings: Mapping[str, Any] | None = None, /, **named: Any) -> None: ...

    def expose(self, first: Any = None, /, **named: Any) -> Any:
        """Show values and offer functions: ``expose(train=train, state=state)``, a mapping, or as a decorator.

        Values are read thirty times a second while the script passes checkpoints; functions can be called from the
        terminal, the page and other programs. Calls add to earlier ones.
        """
        if first is not None and not isinstance(first, Mapping):
            if not callable(first):
                raise SparkUsageError(f"expose() takes name=value, a mapping, or a function to decorate, not {first!r}")
            self._expose({first.__name__: first})
            return first
        self._expose({**(first or {}), **named})
        return None

    def _expose(self, bindings: Mapping[str, Any]) -> None:
        if self.session is not None:
            self.session.exposed.add(bindings)

    def log(self, **numbers: Any) -> None:
        """Add one point to each named series."""
        if self.session is not None:
            points = {name: _number(name, value) for name, value in numbers.items()}
            self.session.display.log(self.session.passed(), points)

    def control(self, name: str, default: T, *, min: Any = None, max: Any = None) -> T:
        """Return the value of a knob that users can turn while the script runs; read it at every step."""
        if self.session is None:
            return default
        described = {"default": default, "min": min, "max": max}
        return self.session.exposed.control(name, default, described)  # type: ignore[no-any-return]

    # --- loops ---

    def range(self, n: int, key: str | None = None) -> Loop[int]:
        """Count from 0 to *n* - 1 with a checkpoint before each; after a reload go on where the last code was.

        Args:
            n: How many.
            key: Names the position, for loops whose order may change from one version of the code to the next.
        """
        return self._loops().loop(range(n), key)

    def loop(self, iterable: Iterable[T], key: str | None = None) -> Loop[T]:
        """Iterate with a checkpoint before each item; after a reload skip what was done already."""
        return self._loops().loop(iterable, key)

    def _loops(self) -> Loops:
        return self.session.loops if self.session is not None else Loops(idle_checkpoint)

    # --- models ---

    def execute(self, request: Any, model: str | None = None, *, timeout: float | None = None) -> Any:
        """Return a model's whole answer to *request*. The models are those that the run was given.

        While it waits longer than a quarter of a second it is a checkpoint for stop and reload: the call is cancelled
        and the signal raised. A pause waits for the answer.

        Args:
            request: Anything that JSON can say, which the model gets as JSON, and the answer is read as JSON; or
                bytes, which it gets as they are, and the answer is bytes.
            model: Its name; may be left out if there is only one.
            timeout: Seconds for this call, in place of the model's own.

        Raises:
            ExecuteError: The call failed; see `spark_runtime.errors` for the ways.
            ModelUnusable, EngineMissing: The model cannot be run at all.
            BadRequestError, QueueFull: It was not tried.
            SparkUsageError: There is no runtime, or this is the top level of a script.
        """
        models = self._models()
        return models.wait(models.submit(request, model, timeout))

    def submit(self, request: Any, model: str | None = None, *, timeout: float | None = None) -> "ModelCall":
        """Begin a call; return its future, whose `ModelCall.cancel` stops the work and which gives the errors."""
        return self._models().submit(request, model, timeout)

    async def aexecute(self, request: Any, model: str | None = None, *, timeout: float | None = None) -> Any:
        """As `execute`, for asynchronous code. Cancelling the task stops the work."""
        models = self._models()
        return await models.wait_async(models.submit(request, model, timeout))

    def call(self, model: str, function: str, *numbers: float, timeout: float | None = None) -> Any:
        """Call an export of a model with numbers; return None, a number, or a tuple of them. Errors as `execute`."""
        models = self._models()
        return models.wait(models.submit_call(model, function, numbers, timeout))

    def _models(self) -> "Models":
        if self.session is None:
            raise SparkUsageError(
                "only the script's own process under the runtime has models: run it with "
                "`spark run SCRIPT --model NAME=PATH`"
            )
        return self.session.models()

    # --- the entry ---

    def main(self, function: F) -> F:
        """Mark the function that the runtime runs, whatever its name.

        Over ``def torch()`` in a module that imports PyTorch as ``torch`` the result also forwards attributes to
        PyTorch, so that both uses of the name work.
        """
        shadowed = function.__globals__.get(function.__name__)
        self.main_entry = function
        if isinstance(shadowed, types.ModuleType):
            return Shadow(function, shadowed)  # type: ignore[return-value]
        return function

    def create_controller(self) -> Controller:
        """Return `controller`."""
        return self.controller

    # --- attachment ---

    def attach(self, session: Session) -> None:
        """Serve *session* from now on; what the script forks does not."""
        self.session = session
        self.checkpoint = session.checkpoint
        self.persisted = session.persisted
        os.register_at_fork(after_in_child=self.detach)

    def detach(self) -> None:
        """Be the object of a program that runs without the runtime. What a forked child inherits it may go on using."""
        self.session = None
        self.checkpoint = idle_checkpoint


def _number(name: str, value: Any) -> float | int:
    """Return what a series can hold: a number of Python's, also out of an array or tensor with one element."""
    if hasattr(value, "item"):
        try:
            value = value.item()
        except (ValueError, RuntimeError, TypeError):
            pass  # more than one element, or none: refused below
    if isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63):
        return value
    raise SparkUsageError(f"log({name}=...) takes one number, not {type(value).__name__}: {str(value)[:80]}")


spark = Spark()
