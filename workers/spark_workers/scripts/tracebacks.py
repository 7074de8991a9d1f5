"""The script's own tracebacks: without the runtime's frames, and as text, so that no frame stays alive."""

import os
import traceback
from collections.abc import Callable
from types import TracebackType

_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_IMPORT = "<frozen importlib"


def format_script_error(problem: BaseException) -> str:
    """Return the traceback as plain Python would print it for the script."""
    shown = traceback.TracebackException.from_exception(problem)
    _trim(shown)
    return "".join(shown.format())


def place_of(problem: BaseException, is_own: Callable[[str], bool]) -> tuple[str, int]:
    """Return file and line of the innermost code of the user's that *problem* came through."""
    if isinstance(problem, SyntaxError) and problem.filename:
        return problem.filename, problem.lineno or 0
    found = ("", 0)
    trace: TracebackType | None = problem.__traceback__
    while trace is not None:
        path = trace.tb_frame.f_code.co_filename
        if is_own(path):
            found = (path, trace.tb_lineno)
        trace = trace.tb_next
    return found


def _trim(shown: traceback.TracebackException) -> None:
    seen: set[int] = set()
    waiting: list[traceback.TracebackException | None] = [shown]
    while waiting:
        each = waiting.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        kept = [frame for frame in each.stack if not frame.filename.startswith((_OURS, _IMPORT))]
        each.stack = traceback.StackSummary.from_list(kept)
        waiting += [each.__cause__, each.__context__, *(getattr(each, "exceptions", None) or ())]
