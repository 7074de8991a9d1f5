"""What the script object raises.

BaseException
└── SparkControl            the runtime takes the script's turn away; ``except Exception`` lets it through
    ├── SparkStopError      stop was asked; may be caught to finish cleanly
    ├── SparkReloadError    new code is waiting; must not be caught
    └── SparkCancelError    this one call of an exposed function was cancelled
RuntimeError
└── SparkUsageError         the script uses the object in a way that cannot work
"""


class SparkControl(BaseException):
    """Raised by a checkpoint to unwind the script. Not an `Exception`, so that broad handlers do not swallow it."""


class SparkStopError(SparkControl):
    """Stop was asked. Clean up and let it through, or return."""


class SparkReloadError(SparkControl):
    """New code is waiting and the state is already handed over. Let it through."""


class SparkCancelError(SparkControl):
    """The call of an exposed function that this code belongs to was cancelled."""


class SparkUsageError(RuntimeError):
    """The script asks the runtime for something that cannot work; the message says what to do instead."""


def control_in(problem: BaseException) -> SparkControl | None:
    """Return the control signal that *problem* is, or holds: task groups wrap what their tasks raise."""
    if isinstance(problem, SparkControl):
        return problem
    for inner in getattr(problem, "exceptions", ()):
        found = control_in(inner)
        if found is not None:
            return found
    return None
