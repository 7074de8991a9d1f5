"""The options that every command with a model has, and the `Model` made of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from spark_runtime.config import ENGINES, GIB, INTERRUPTS, MODEL_KINDS, Model, parse_size

F = TypeVar("F", bound=Callable[..., Any])


class Size(click.ParamType):  # type: ignore[type-arg]
    """A number of bytes: 268435456, 256MiB, 256MB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_size(value)
        except ValueError as problem:
            self.fail(f"{value!r} is not {problem}", param, ctx)


_OPTIONS = (
    click.option("--kind", type=click.Choice(MODEL_KINDS), default="auto", show_default=True, help="What it is."),
    click.option("--arg", "args", multiple=True, metavar="ARG", help="An argument of a WASI command. Repeatable."),
    click.option("--env", "env", multiple=True, metavar="NAME=VALUE", help="A variable a WASI model sees. Repeatable."),
    click.option("--entry", default="execute", show_default=True, help="The export that takes requests."),
    click.option("--engine", type=click.Choice(ENGINES), default="wasmtime", show_default=True),
    click.option("--worker-python", metavar="PATH", help="The Python that replicas run under; wasmer needs a 3.10."),
    click.option("--memory-limit", type=Size(), default=2 * GIB, metavar="SIZE", help="Per instance.  [default: 2GiB]"),
    click.option(
        "--interrupt", type=click.Choice(INTERRUPTS), default="kill", show_default=True, help="How to stop it."
    ),
    click.option("--fresh", is_flag=True, help="A new instance for every call."),
)


def model_options(command: F) -> F:
    """Add the options to a command, which gets them under these names for `build_model`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def build_model(path: Path, given: dict[str, Any], **more: Any) -> Model:
    """Make the model at *path* of the options, taking them out of *given*. Its name is the file's.

    Raises:
        BadRequestError: An option makes no sense.
    """
    env = {}
    for each in given.pop("env"):
        name, equals, value = each.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"{each!r} is not NAME=VALUE", param_hint="--env")
        env[name] = value
    return Model(
        path.stem or str(path),
        path,
        kind=given.pop("kind"),
        args=given.pop("args"),
        env=env,
        entry=given.pop("entry"),
        engine=given.pop("engine"),
        python=given.pop("worker_python"),
        memory_limit=given.pop("memory_limit"),
        interrupt=given.pop("interrupt"),
        fresh=given.pop("fresh"),
        **more,
    )
