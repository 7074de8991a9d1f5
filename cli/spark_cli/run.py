"""``spark run``."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from spark_runtime.config import LOAD_SECONDS, Model, PlannedCall, RunOptions


def _planned(text: str) -> PlannedCall:
    """Read ``NAME`` or ``NAME=JSON``."""
    from spark_runtime.supervise.rpc import arguments_of

    name, equals, given = text.partition("=")
    if not name.isidentifier():
        raise click.BadParameter(
            f"{text!r} does not begin with a function's name; write NAME or NAME=JSON", param_hint="--call"
        )
    params: Any = None
    if equals:
        try:
            params = json.loads(given)
        except ValueError as problem:
            raise click.BadParameter(
                f"the arguments of {name} are not JSON: {problem}", param_hint="--call"
            ) from problem
    args, kwargs = arguments_of(params)
    return PlannedCall(name, tuple(args), kwargs)


def _models(script: Path, given: tuple[str, ...], *, watch: bool) -> tuple[Model, ...]:
    """Return the project's models, and those of the options ``NAME=PATH`` or ``PATH``, which win."""
    from spark_runtime.models.configured import configured_models

    models: dict[str, Model] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or "/" in name:  # a path with a = in it
            name, path = Path(text).stem, text
        if not name or not path or not name.isprintable():
            raise click.BadParameter(f"{text!r} is not NAME=PATH, or PATH", param_hint="--model")
        if name in models:
            raise click.BadParameter(f"two models have the name {name!r}; write NAME=PATH", param_hint="--model")
        if not Path(path).exists():
            raise click.BadParameter(f"there is no file {path!r} for the model {name!r}", param_hint="--model")
        models[name] = Model(name, path, watch=watch)
    return tuple({**configured_models(script, watch=watch), **models}.values())


@click.command("run", context_settings={"ignore_unknown_options": False})
@click.argument("script", type=click.Path(path_type=Path))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--call", "calls", multiple=True, metavar="NAME[=JSON]", help="Call an exposed function; may be repeated."
)
@click.option("--exit", "exit_when_called", is_flag=True, help="End when the calls have returned, or torch() has.")
@click.option(
    "--model", "models", multiple=True, metavar="NAME=PATH", help="A WASM model for spark.execute(); may be repeated."
)
@click.option(
    "--watch/--no-watch", default=True, help="Reload when the script or a module of yours it imports is saved."
)
@click.option("--poll", is_flag=True, help="Watch by looking, for network and container file systems.")
@click.option("--resume", is_flag=True, help="Go on from the last snapshot on disk.")
@click.option("--from", "resume_from", metavar="RUN", help="With --resume: the run to go on from, if not the newest.")
@click.option("--json", "as_json", is_flag=True, help="One event a line on stdout, nothing else.")
@click.option(
    "--load-timeout",
    type=click.FloatRange(min=0.1),
    default=LOAD_SECONDS,
    show_default=True,
    metavar="SECONDS",
    help="How long the top level of newly saved code may take.",
)
def command(
    script: Path,
    arguments: tuple[str, ...],
    calls: tuple[str, ...],
    exit_when_called: bool,
    models: tuple[str, ...],
    watch: bool,
    poll: bool,
    resume: bool,
    resume_from: str | None,
    as_json: bool,
    load_timeout: float,
) -> None:
    """Run the torch() of SCRIPT, reload it when it is saved, keep what it persists.

    ARGUMENTS after -- are the script's sys.argv.

    Keys: p pause or resume, s stop, r restart from the last snapshot, b back to the last good code, q quit, h help.
    Exit code: 0 done or stopped, 1 the script raised, 2 usage, 130 interrupted, or what the script gave to sys.exit().
    """
    if resume_from is not None and not resume:
        raise click.UsageError("--from RUN goes with --resume")
    from spark_cli.views import choose_view
    from spark_runtime.supervise.launch import launch

    is_interactive = sys.stdin.isatty() and sys.stderr.isatty()
    options = RunOptions(
        script=script,
        arguments=arguments,
        watch=watch,
        poll=poll,
        exit_when_called=exit_when_called,
        calls=tuple(_planned(each) for each in calls),
        resume=resume,
        resume_from=resume_from,
        waits_for_save=is_interactive and watch and not exit_when_called,
        load_seconds=load_timeout,
        models=_models(script, models, watch=watch),
    )
    sys.exit(launch(options, choose_view(as_json)))
