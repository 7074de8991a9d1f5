"""Who swallowed a control signal: found when the next checkpoint has to raise it again."""

import ast
import linecache

from spark_workers.scripts.errors import SparkControl


def describe_handler(signal: SparkControl) -> str:
    """Name the handler that caught *signal* and did not let it through.

    The exception that was caught remembers the frames it went through; the outermost of them is where it stopped.
    """
    trace = signal.__traceback__
    if trace is None:
        return "a handler"
    path, name = trace.tb_frame.f_code.co_filename, trace.tb_frame.f_code.co_name
    line = _handler_line("".join(linecache.getlines(path)), trace.tb_lineno)
    return f"the handler at {path}:{line or trace.tb_lineno}, in {name}()"


def _handler_line(source: str, line: int) -> int | None:
    """The line of the innermost ``except`` or ``finally`` that guards *line*."""
    try:
        tries = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Try)]
    except SyntaxError:
        return None
    guarding = [node for node in tries if node.body[0].lineno <= line <= (node.body[-1].end_lineno or 0)]
    if not guarding:
        return None
    innermost = max(guarding, key=lambda node: node.lineno)
    broad = innermost.handlers or innermost.finalbody
    return broad[-1].lineno if innermost.handlers else innermost.finalbody[0].lineno
