"""``spark exec``: one call of one model, its answer on standard output and nothing else."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from spark_cli.model_options import build_model, model_options
from spark_cli.words import visible
from spark_runtime.errors import BadRequestError, ExecuteError, SparkError

FAILED = 1
INPUT_LIMIT = 256 << 20


@click.command("exec", context_settings={"ignore_unknown_options": False})
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("numbers", nargs=-1)
@click.option("--input", "request", metavar="JSON|@FILE|-", help="The request; @FILE reads a file, - standard input.")
@click.option("--function", metavar="NAME", help="Call this export with NUMBERS in place of sending a request.")
@click.option("--raw", is_flag=True, help="Pass the input on as the bytes it is, and print the answer as it is.")
@click.option("--timeout", type=click.FloatRange(min=0.001), metavar="SECONDS", help="Give up after this long.")
@click.option("--watch", is_flag=True, help="Run again whenever the model file, or an input @FILE, changes.")
@model_options
def command(
    model: Path,
    numbers: tuple[str, ...],
    request: str | None,
    function: str | None,
    raw: bool,
    timeout: float | None,
    watch: bool,
    **given: Any,
) -> None:
    """Run MODEL once. With --function, NUMBERS are the arguments (put -- before negative ones).

    Exit code: 0 answered, 1 the call failed, 2 it could not be tried, 130 interrupted.
    """
    if function is None and numbers:
        raise click.UsageError(f"{numbers[0]!r} is one argument too many; numbers go with --function NAME")
    if function is not None and (request is not None or raw):
        raise click.UsageError("--function takes numbers, not --input or --raw")
    if watch and request == "-":
        raise click.UsageError("--watch reads its input again each time, which standard input cannot give; use @FILE")
    from spark_runtime.runtime import Spark

    chosen = build_model(model, given, timeout=timeout)
    with Spark([chosen], timeout=None, on_note=_note) as spark:

        def once() -> int:
            try:
                if function is not None:
                    answer = spark.call(chosen.name, function, *map(_number, numbers))
                else:
                    answer = spark.execute(_read_request(request, raw=raw), chosen.name)
            except ExecuteError as problem:
                _show(problem)
                return FAILED
            _write(answer)
            return 0

        if not watch:
            sys.exit(once())
        from spark_cli.exec_watch import repeat

        repeat(once, spark, chosen, request)


def _read_request(request: str | None, *, raw: bool) -> Any:
    """Return what the model is asked: data, or bytes with *raw*."""
    if request is None:
        text, where = (b"" if raw else b"{}"), "--input"
    elif request == "-":
        text, where = sys.stdin.buffer.read(INPUT_LIMIT + 1), "standard input"
    elif request.startswith("@"):
        text, where = _read_file(Path(request[1:])), request[1:]
    else:
        text, where = request.encode("utf-8", "surrogateescape"), "--input"
    if len(text) > INPUT_LIMIT:
        raise BadRequestError(f"{where}: more than {INPUT_LIMIT >> 20} MiB; use spark batch for many rows")
    if raw:
        return text
    try:
        return json.loads(text)
    except RecursionError as problem:
        raise BadRequestError(f"{where} is nested too deep") from problem
    except ValueError as problem:
        hint = "; --raw passes bytes on as they are" if text.strip() else ", it is empty"
        raise BadRequestError(f"{where} is not JSON{hint}: {problem}") from problem


def _read_file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(INPUT_LIMIT + 1)
    except OSError as problem:
        raise BadRequestError(f"{path} cannot be read: {problem.strerror}") from problem


def _number(text: str) -> int | float:
    try:
        return int(text, 0)
    except ValueError:
        pass  # then it may be a float
    try:
        return float(text)
    except ValueError as problem:
        raise BadRequestError(f"{text!r} is not a number; exports are called with numbers") from problem


def _write(answer: Any) -> None:
    if isinstance(answer, bytes):
        sys.stdout.buffer.write(answer)
    else:
        text = json.dumps(answer, ensure_ascii=False)
        sys.stdout.buffer.write(text.encode("utf-8", "surrogatepass") + b"\n")
    sys.stdout.buffer.flush()


def _show(problem: SparkError) -> None:
    """Tell a failed call: one sentence, and what the guest left to say."""
    click.echo(f"spark: {visible(str(problem))}", err=True)
    details = getattr(problem, "details", {})
    for line in details.get("backtrace", []):
        click.echo(f"    {visible(str(line))}", err=True)
    if details.get("stderr"):
        for line in str(details["stderr"]).splitlines():
            click.echo(visible(line), err=True)


def _note(text: str) -> None:
    click.echo(f"spark: {visible(text)}", err=True)
