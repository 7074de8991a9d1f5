"""``spark batch``."""

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from spark_cli.model_options import build_model, model_options
from spark_cli.words import plural, visible
from spark_runtime.config import Model

if TYPE_CHECKING:
    from spark_runtime.batch.batch import Batch, BatchOptions, Progress
    from spark_runtime.batch.stop import Stop
    from spark_runtime.runtime import Spark

FAILED, USAGE, FAILING_ROWS, INTERRUPTED = 1, 2, 3, 130
PLAIN_SECONDS = 5.0
TICK_SECONDS = 0.2
_FORMATS = click.Choice(["jsonl", "csv", "parquet"])


def _share(context: click.Context, parameter: click.Parameter, value: str) -> float | None:
    """Read ``--fail-on`` as the share of failing rows that is too much; None if none is."""
    if value in ("any", "none"):
        return 0.0 if value == "any" else None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)%", value)
    if match is None or not 0 < float(match[1]) <= 100:
        raise click.BadParameter(f"{value!r} is not any, none, or a share such as 5%")
    return float(match[1]) / 100


class Paths(NamedTuple):
    """Where rows come from and go to, and the formats if they are given."""

    source: str
    output: str
    source_format: str | None
    output_format: str | None


@click.command("batch")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("source", metavar="INPUT")
@click.option("-o", "--output", required=True, metavar="OUTPUT", help="The file for the rows; - for stdout.")
@click.option("--replicas", type=click.IntRange(1, 1024), default=1, show_default=True, metavar="N", help="Processes.")
@click.option("--unordered", is_flag=True, help="Write rows as they come, which keeps replicas busier.")
@click.option(
    "--fail-on",
    default="any",
    show_default=True,
    metavar="any|none|N%",
    callback=_share,
    help="End with exit code 3 if any row failed, never, or if at least N % of the rows did.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N rows.")
@click.option("--dry-run", is_flag=True, help="Look at the first rows, run one, write nothing.")
@click.option("--restart", is_flag=True, help="Drop the rows of an earlier batch in OUTPUT and begin anew.")
@click.option("--mix", is_flag=True, help="Go on although another model made the rows that are there.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long a row may take; 0 for no limit.",
)
@click.option(
    "--retries", type=click.IntRange(0, 100), default=0, metavar="N", help="Run a row again whose process died."
)
@click.option("--input-format", type=_FORMATS, help="If INPUT's name does not say it.")
@click.option("--output-format", type=_FORMATS, help="If OUTPUT's name does not say it.")
@model_options
def command(
    model: Path,
    source: str,
    output: str,
    replicas: int,
    unordered: bool,
    fail_on: float | None,
    limit: int | None,
    dry_run: bool,
    restart: bool,
    mix: bool,
    timeout: float,
    retries: int,
    input_format: str | None,
    output_format: str | None,
    **given: Any,
) -> None:
    """Run every row of INPUT through MODEL and write one row each to OUTPUT.

    Formats are JSON lines (.jsonl, .ndjson), CSV and Parquet; - is stdin or stdout. A batch that was interrupted, in
    whatever way, goes on with the same command.

    Exit code: 0 done, 1 the model or the output failed, 2 usage, 3 rows failed (see --fail-on), 130 interrupted.
    """
    from spark_runtime.batch.batch import BatchOptions

    chosen = build_model(model, given, replicas=replicas, retries=retries)
    options = BatchOptions(
        chosen.name, replicas, ordered=not unordered, limit=limit, timeout=timeout or None, mix=mix, restart=restart
    )
    paths = Paths(source, output, input_format, output_format)
    sys.exit(_run(chosen, paths, options, fail_on, is_dry=dry_run))


def _run(model: Model, paths: Paths, options: "BatchOptions", fail_on: float | None, *, is_dry: bool) -> int:
    """Run the batch; return the exit code."""
    from spark_runtime.batch.journal import BatchStopped
    from spark_runtime.errors import BatchError, ModelNotFound, SparkError

    try:
        with ExitStack() as stack:
            job = Job(model, paths, options, stack, is_dry=is_dry)
            return job.rehearse(fail_on) if is_dry else job.run(fail_on)
    except BatchStopped as problem:
        _say(str(problem))
        return FAILED
    except (BatchError, ModelNotFound):
        raise  # the command line's own: a file that cannot be used is a matter of usage
    except SparkError as problem:
        _say(str(problem))
        return FAILED


class Job:
    """A batch with everything that is open for it."""

    def __init__(self, model: Model, paths: Paths, options: "BatchOptions", stack: ExitStack, *, is_dry: bool) -> None:
        from spark_runtime.batch.batch import Batch, maker_of
        from spark_runtime.batch.inputs import format_of, open_source
        from spark_runtime.batch.outputs import open_output
        from spark_runtime.batch.stop import Stop

        self._model = model
        self._options = options
        self._paths = paths
        self._source_format = format_of(paths.source, paths.source_format, "--input-format")
        output_format = format_of(paths.output, paths.output_format, "--output-format")
        _refuse_same(paths.source, paths.output)
        maker = maker_of(model)
        self._stop = stack.enter_context(closing(Stop()))
        source = stack.enter_context(closing(open_source(paths.source, self._source_format, self._stop)))
        # A dry run writes nothing, so it goes without the output that it is told.
        target = (os.devnull, "jsonl") if is_dry else (paths.output, output_format)
        output = stack.enter_context(closing(open_output(*target, maker)))
        self._batch = Batch(options, maker, source, output, self._stop)

    def run(self, fail_on: float | None) -> int:
        """Run it; return the exit code."""
        name = "stdout" if self._paths.output == "-" else self._paths.output
        progress = self._batch.progress
        with Signals(self._stop):
            try:
                with View(name, self._paths, self._source_format, self._options, self._batch, self._stop):
                    self._batch.run(self._spark)
            except KeyboardInterrupt:
                progress.state = "stopped"
        for text in _summary(name, progress, self._options.ordered and name != "stdout"):
            _say(text)
        if progress.state == "stopped":
            return INTERRUPTED
        failed = progress.all_failed()
        if progress.state == "finished" or fail_on is None or not failed:
            return 0
        return FAILING_ROWS if failed >= fail_on * progress.all_rows() else 0

    def rehearse(self, fail_on: float | None) -> int:
        """Look at the first rows and run one; return the exit code."""
        with Signals(self._stop):
            found = self._batch.rehearse(self._spark)
        for problem in found.unusable[:3]:
            _say(str(problem))
        bad = len(found.unusable)
        _say(f"dry run: {_rows(found.rows)} looked at, {bad:,} of them unusable; nothing is written")
        if found.line is not None:
            _say("the first usable row would give:")
            sys.stdout.write(found.line.decode())
            bad += found.is_failed
        if fail_on is None or not bad:
            return 0
        return FAILING_ROWS if bad >= fail_on * found.rows else 0

    def _spark(self) -> "Spark":
        from spark_runtime.runtime import Spark

        return Spark([self._model], timeout=None, on_note=_say)


class Signals:
    """The first Ctrl-C, or SIGTERM, asks for the stop; the second ends at once."""

    _NUMBERS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, stop: "Stop") -> None:
        self._stop = stop

    def __enter__(self) -> None:
        self._before = [signal.signal(number, self._handle) for number in self._NUMBERS]

    def __exit__(self, kind: object, problem: object, trace: object) -> None:
        for number, handler in zip(self._NUMBERS, self._before, strict=True):
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._stop.asked:
            raise KeyboardInterrupt
        self._stop.ask()


class View:
    """Shows how far the batch is, from a thread of its own: a bar on a terminal, a line now and then elsewhere."""

    def __init__(
        self, name: str, paths: Paths, form: str, options: "BatchOptions", batch: "Batch", stop: "Stop"
    ) -> None:
        self._name = name
        self._paths = paths
        self._form = form
        self._options = options
        self._progress = batch.progress
        self._stop = stop
        self._total: int | None = None
        self._is_over = threading.Event()
        is_bar = sys.stderr.isatty() and not (paths.output == "-" and sys.stdout.isatty())
        self._thread = threading.Thread(target=self._show_bar if is_bar else self._show_lines, daemon=True)
        self._counter = threading.Thread(target=self._count, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()
        self._counter.start()

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()

    def _count(self) -> None:
        from spark_runtime.batch.inputs import count_rows

        total = count_rows(self._paths.source, self._form)
        limit = self._options.limit
        self._total = total if limit is None else limit if total is None else min(total, limit)

    def _show_lines(self) -> None:
        shown = time.monotonic()
        notices = self._notices()
        while not self._is_over.wait(TICK_SECONDS):
            for text in notices():
                _say(text)
            if time.monotonic() - shown >= PLAIN_SECONDS and self._progress.state == "running":
                _say(self._line())
                shown = time.monotonic()

    def _show_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True, highlight=False)
        columns = (TextColumn("{task.description}", markup=False), BarColumn())
        notices = self._notices()
        with Bar(*columns, console=console, transient=True, auto_refresh=False) as bar:
            task = bar.add_task("", total=None)
            while not self._is_over.wait(TICK_SECONDS):
                for text in notices():
                    console.print(f"spark: {text}", markup=False)
                bar.update(
                    task, description=self._line(), total=self._total, completed=self._progress.all_rows(), refresh=True
                )

    def _notices(self) -> Callable[[], list[str]]:
        """Return a function that gives what is to be said once."""
        said: set[str] = set()

        def new() -> list[str]:
            texts = []
            if self._progress.state == "running" and self._progress.before and "before" not in said:
                said.add("before")
                texts.append(f"{self._name} has {_rows(self._progress.before)}; going on from there")
            if self._stop.asked and "stop" not in said:
                said.add("stop")
                texts.append("stopping as soon as the rows that are out have come back; Ctrl-C again ends at once")
            return texts

        return new

    def _line(self) -> str:
        progress = self._progress
        rows, failed, seconds = progress.all_rows(), progress.all_failed(), progress.seconds()
        rate = progress.rows / seconds if seconds else 0.0
        parts = [_rows(rows) if self._total is None else f"{rows:,} of {_rows(max(self._total, rows))}"]
        if failed:
            parts.append(f"{failed:,} failed")
        parts.append(f"{rate:,.1f} rows/s")
        if self._total is not None and rate and self._total > rows:
            parts.append(f"{_duration((self._total - rows) / rate)} left")
        return ", ".join(parts)


def _summary(name: str, progress: "Progress", is_ordered: bool) -> list[str]:
    rows, failed, seconds = progress.all_rows(), progress.all_failed(), progress.seconds()
    failures = f", {failed:,} failed" if failed else ""
    if progress.state == "finished":
        return [f"{name} is finished already: {_rows(rows)}{failures}"]
    if progress.state == "stopped":
        if name == "stdout":
            return [f"stopped after {_rows(rows)}{failures}"]
        where = f" at row {rows}" if is_ordered else " with those that are missing"
        return [f"stopped; {name} has {_rows(rows)}{failures}, and the same command goes on{where}"]
    there = f" and {progress.before:,} from before" if progress.before else ""
    rate = progress.rows / seconds if seconds else 0.0
    return [f"{name}: {_rows(progress.rows)} in {seconds:,.1f} s ({rate:,.1f} rows/s){there}{failures}"]


def _rows(count: int) -> str:
    return f"{count:,} {plural('row', count)}"


def _refuse_same(source: str, output: str) -> None:
    from spark_runtime.errors import BatchError

    if "-" in (source, output) or not (os.path.exists(source) and os.path.exists(output)):
        return
    if os.path.samefile(source, output):
        raise BatchError(f"{output} is the input; choose another name for the output")


def _say(text: str) -> None:
    click.echo(f"spark: {visible(text)}", err=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
