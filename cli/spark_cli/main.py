"""The commands. Each lives in a file of its own, imported when it is used, so that ``spark --help`` stays quick."""

import importlib
import sys

import click

import spark_runtime

_COMMANDS = {
    "run": ("spark_cli.run", "Run a script; reload it when it is saved, keep its state."),
    "batch": ("spark_cli.batch", "Run every row of a file through a WASM model."),
    "ctl": ("spark_cli.ctl", "Steer a run from another shell."),
    "models": ("spark_cli.models", "Look at models and at what is prepared of them."),
    "doctor": ("spark_cli.doctor", "Say what is in force on this machine, and what will not work."),
    "init": ("spark_cli.init", "Write a script to start from."),
    "exec": ("spark_cli.execute", "Run a model once."),
}

USAGE = 2


class LazyGroup(click.Group):
    """A group that imports a command only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        if ctx.resilient_parsing or "--help" in sys.argv[1:2] or len(sys.argv) == 1:
            return click.Command(cmd_name, help=_COMMANDS[cmd_name][1])
        command: click.Command = importlib.import_module(_COMMANDS[cmd_name][0]).command
        return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(spark_runtime.__version__, prog_name="spark")
def cli() -> None:
    """Run training and simulation scripts in workers that reload as you save and never lose their state."""


def main() -> None:
    """Run the command line; a mistake of the user's is one sentence, never a traceback."""
    from spark_runtime.errors import SparkError

    try:
        sys.exit(cli.main(standalone_mode=False))
    except click.ClickException as problem:
        problem.show()
        sys.exit(problem.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except SparkError as problem:
        from spark_cli.words import visible

        click.echo(f"spark: {visible(str(problem))}", err=True)
        sys.exit(USAGE)
    except BrokenPipeError:
        sys.exit(0)  # whoever read our output has seen enough


if __name__ == "__main__":
    main()
