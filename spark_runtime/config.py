"""What a run is told, once, by the command line or a program."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOAD_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class PlannedCall:
    """A call of an exposed function, to be made as soon as the script can serve it."""

    name: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How to run one script.

    Attributes:
        script: The file.
        program: The script's ``sys.argv[0]``: its path as it was given.
        arguments: The script's ``sys.argv[1:]``.
        watch: Reload when the file or a module of the user's that it imports is saved.
        poll: Look at the files from time to time; for file systems that do not tell of changes.
        exit_when_called: End when every call in *calls* has its answer.
        calls: Made at the start.
        resume: Go on from the last snapshot on disk.
        resume_from: The run to go on from; the newest unfinished one if None.
        waits_for_save: After an error wait for the next save in place of ending.
        load_seconds: How long the top level of *new* code may take before the old code simply goes on.
    """

    script: Path
    program: str = ""
    arguments: tuple[str, ...] = ()
    watch: bool = True
    poll: bool = False
    exit_when_called: bool = False
    calls: tuple[PlannedCall, ...] = ()
    resume: bool = False
    resume_from: str | None = None
    waits_for_save: bool = False
    load_seconds: float = LOAD_SECONDS
