"""``spark init``."""

from pathlib import Path

import click

from spark_runtime.supervise.code import check_names

TEMPLATE = '''"""Train something. Run it with `spark run {name}`, and edit it while it runs."""

import math
from dataclasses import dataclass

from spark_runtime import spark

# With PyTorch write `from torch import nn, optim`, or `import torch as pt`: a plain `import torch` would share its name
# with the function below.


@dataclass
class State:
    """What outlives the code."""

    step: int = 0
    weight: float = 0.0
    loss: float = math.inf


def evaluate(x: float) -> float:
    """Return the model's answer; call it with `spark ctl call evaluate 3`."""
    state = spark.persist("state", State)
    return state.weight * x


def torch():
    state = spark.persist("state", State)
    spark.expose(state=state, evaluate=evaluate)
    while state.step < 10_000:
        spark.checkpoint()
        x = math.sin(state.step)
        error = state.weight * x - 2 * x
        rate = spark.control("rate", 0.01, min=0.0, max=1.0)
        state.weight -= rate * error * x
        state.loss = error * error
        state.step += 1


if __name__ == "__main__":
    torch()
'''


@click.command("init")
@click.argument("name", default="train.py", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Write over a file that is there.")
def command(name: Path, force: bool) -> None:
    """Write a script to start from, train.py unless NAME is given."""
    path = name if name.suffix else name.with_suffix(".py")
    if path.exists() and not force:
        raise click.UsageError(f"{path} is there already; choose another name, or --force")
    try:
        check_names(path.absolute())
        path.write_text(TEMPLATE.format(name=path.name))
    except OSError as problem:
        raise click.ClickException(f"{path}: {problem.strerror}") from problem
    click.echo(f"wrote {path}; run it with: spark run {path}")
