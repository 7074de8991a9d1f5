"""``spark exec --watch``: the same call again whenever the model, or its input, is written anew."""

import os
from collections.abc import Callable
from pathlib import Path

import click
import watchfiles

from spark_runtime.config import Model
from spark_runtime.errors import SparkError
from spark_runtime.runtime import Spark


def repeat(once: Callable[[], int], spark: Spark, model: Model, request: str | None) -> None:
    """Call *once* now and after every change; ends with Ctrl-C."""
    paths = {os.path.realpath(model.path)}
    if request is not None and request.startswith("@"):
        paths.add(os.path.realpath(request[1:]))
    _try(once)
    folders = {str(Path(path).parent) for path in paths}
    for changes in watchfiles.watch(*folders, watch_filter=None, step=20, debounce=200, recursive=False):
        changed = {path for _, path in changes} & paths
        if any(os.path.exists(path) for path in changed):
            _try(lambda: _again(once, spark))


def _again(once: Callable[[], int], spark: Spark) -> int:
    spark.reload()
    return once()


def _try(attempt: Callable[[], object]) -> None:
    try:
        attempt()
    except SparkError as problem:
        click.echo(f"spark: {problem}", err=True)
