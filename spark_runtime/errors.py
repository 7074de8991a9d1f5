"""Every error of the runtime.

SparkError
├── ScriptUnusable       the user's: the script cannot be run at all (missing, a folder, misnamed, unreadable)
├── CallFailed           the script's: an exposed function raised, or there is none of that name
├── RequestRefused       the user's: what was asked does not fit the run's state
├── WorkerDied           the machine's: a worker ended while it owed an answer
├── NurseryDied          the machine's: the process that starts workers ended
├── ProtocolViolated     ours: the other side sent what it must not
├── NoSuchRun            the user's: there is no run to talk to, or more than one
└── StoreError           the state folder: see supervise/store.py
"""


class SparkError(Exception):
    """Base of everything that the runtime raises on purpose. The message is one sentence for people."""


class ScriptUnusable(SparkError):
    """The script cannot be run. The message names the file and what to do."""


class CallFailed(SparkError):
    """A call of an exposed function failed in the script.

    Attributes:
        kind: The name of the exception's class.
        text: The script's traceback; empty when the function was never reached.
    """

    def __init__(self, kind: str, message: str, text: str) -> None:
        super().__init__(f"{kind}: {message}" if message else kind)
        self.kind = kind
        self.text = text


class RequestRefused(SparkError):
    """What was asked makes no sense in the state that the run is in."""


class WorkerDied(SparkError):
    """The worker ended while it owed an answer.

    The call may have run in part. Repeat it only if running it twice is harmless.
    """


class NurseryDied(SparkError):
    """The process that starts workers ended, and its workers with it."""


class ProtocolViolated(SparkError):
    """The other side of a channel sent something that does not belong there. It is not used any more."""


class NoSuchRun(SparkError):
    """There is no run to talk to, or several and none was named."""


class StoreError(SparkError):
    """The state folder cannot be used as asked. The message names the path and what to do."""
