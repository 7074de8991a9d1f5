"""The ways in which a model can fail, as the worker tells them and the supervisor raises them."""

from typing import Any

#: What each kind means; the supervisor turns it into an error of its own class.
KINDS = {
    # of a module
    "invalid-module": "the bytes are no WASM module, or one that this engine cannot compile",
    "unsupported-import": "it imports something that its host does not have",
    "no-entry": "it has nothing that takes a request",
    "stale-code": "the prepared machine code does not fit this engine; compile again",
    "engine-missing": "the engine is not installed in this interpreter",
    "over-limit": "compiling or loading it took more time or memory than it may",
    # of a call
    "trap": "the guest trapped",
    "out-of-memory": "the guest wanted more than its memory limit",
    "stack-overflow": "the guest's calls nest too deep",
    "exit": "a WASI command ended with a code other than 0",
    "missing-export": "there is no such function",
    "wrong-signature": "the function takes other arguments",
    "bad-answer": "the answer does not lie in the guest's memory",
    "interrupted": "the supervisor asked for it to be stopped",
    "xcall": "another service that it called gave no answer",
}


class GuestFailed(Exception):
    """A model failed in one of the ways of `KINDS`. The instance is of no use any more, its host makes a new one."""

    def __init__(self, kind: str, message: str, details: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.details = details or {}
