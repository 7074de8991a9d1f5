"""``spark exec --watch``: the same call again whenever the model, or its input, is written anew."""

import os
from collections.abc import Callable

import click

from spark_runtime.config import Model
from spark_runtime.errors import SparkError
from spark_runtime.models.watching import signatures, watch_folders
from spark_runtime.runtime import Spark


def repeat(once: Callable[[], int], spark: Spark, model: Model, request: str | None) -> None:
    """Call *once* now and after every change; ends with Ctrl-C."""
    paths = {os.path.realpath(model.path)}
    if request is not None and request.startswith("@"):
        paths.add(os.path.realpath(request[1:]))
    seen = signatures(paths)
    _try(once)
    for _ in watch_folders(paths, None):
        if (now := signatures(paths)) != seen and all(now.values()):
            seen = now
            _try(lambda: _again(once, spark))


def _again(once: Callable[[], int], spark: Spark) -> int:
    spark.reload()
    return once()


def _try(attempt: Callable[[], object]) -> None:
    try:
        attempt()
    except SparkError as problem:
        click.echo(f"spark: {problem}", err=True)
