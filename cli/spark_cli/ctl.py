"""``spark ctl``: a client of the control socket."""

import json
import socket
from typing import Any

import click


class Control:
    """A connection to one run. Requests go out one at a time; each waits for its answer."""

    def __init__(self, run: str | None) -> None:
        from spark_runtime.supervise.runtime_folder import find_run

        found = find_run(run)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(found.socket))
        self._file = self._socket.makefile("rwb")
        self._last = 0

    def request(self, method: str, **params: Any) -> Any:
        """Send a request and return its result.

        Raises:
            click.ClickException: The run refused, or went away.
        """
        self._last += 1
        request = {"jsonrpc": "2.0", "id": self._last, "method": method, "params": params}
        self._file.write(json.dumps(request).encode() + b"\n")
        self._file.flush()
        line = self._file.readline()
        if not line:
            raise click.ClickException("the run ended before it answered")
        answer = json.loads(line)
        if "error" in answer:
            traceback = (answer["error"].get("data") or {}).get("traceback")
            if traceback:
                click.echo(traceback, err=True, nl=False)
            raise click.ClickException(answer["error"]["message"])
        return answer["result"]


@click.group("ctl")
@click.option("--run", metavar="ID", help="Which run, by its id or its script; needed when several run.")
@click.pass_context
def command(ctx: click.Context, run: str | None) -> None:
    """Steer a run: pause, resume, stop and more, or call a function that the script exposes."""
    ctx.obj = run


# --run is understood on either side of the command's name.
_run = click.option("--run", metavar="ID", help="Which run, by its id or its script.")


def _simple(name: str, text: str) -> None:
    @command.command(name, help=text)
    @_run
    @click.pass_obj
    def act(outer: str | None, run: str | None) -> None:
        Control(run or outer).request(name)


for _name, _text in {
    "pause": "Pause at the next checkpoint.",
    "resume": "Go on after a pause; after a stop or an error, start again from the last snapshot.",
    "stop": "Stop at the next checkpoint; what is persisted is kept.",
    "reload": "Load the code again, as after a save.",
    "restart": "Start again from the last snapshot, whatever the script is doing.",
    "reset": "Forget what is persisted and start from the beginning.",
    "back": "Go back to the last code that passed a checkpoint.",
    "quit": "Stop, keep the state, end the run.",
}.items():
    _simple(_name, _text)


@command.command("step")
@click.argument("count", type=click.IntRange(min=1), default=1)
@_run
@click.pass_obj
def step(outer: str | None, run: str | None, count: int) -> None:
    """Run COUNT checkpoints, then pause."""
    Control(run or outer).request("step", count=count)


@command.command("status")
@_run
@click.option("--json", "as_json", is_flag=True, help="Everything, as JSON.")
@click.pass_obj
def status(outer: str | None, run: str | None, as_json: bool) -> None:
    """Show what a run is doing."""
    picture = Control(run or outer).request("status")
    if as_json:
        click.echo(json.dumps(picture, indent=2))
        return
    click.echo(f"{picture['script']}  run {picture['run']}")
    pace = f"checkpoint {picture['checkpoints']}, {picture['rate']:.1f}/s"
    click.echo(f"{picture['state']}, {pace}, code version {picture['version']}")
    for name, value in picture["values"].items():
        click.echo(f"  {name} = {json.dumps(value)}")
    for name, control in picture["controls"].items():
        click.echo(f"  {name} = {json.dumps(control['value'])} (control)")
    for name in picture["functions"]:
        click.echo(f"  {name}()")
    if picture["error"]:
        click.echo(picture["error"]["text"], err=True, nl=False)


@command.command("call")
@click.argument("name")
@click.argument("arguments", required=False, metavar="[JSON]")
@_run
@click.pass_obj
def call(outer: str | None, run: str | None, name: str, arguments: str | None) -> None:
    """Call the exposed function NAME and print what it returns, as JSON.

    An object in JSON gives arguments by name, a list in order, anything else is the only argument.
    """
    try:
        params = json.loads(arguments) if arguments is not None else None
    except ValueError as problem:
        raise click.BadParameter(f"the arguments are not JSON: {problem}") from problem
    control = Control(run or outer)
    answer = control.request("call", name=name, params=params)
    if "result" not in answer:
        click.echo(f"{answer['job']} runs", err=True)
        answer = control.request("wait", job=answer["job"])
    click.echo(json.dumps(answer["result"]))


@command.command("wait")
@click.argument("job")
@_run
@click.pass_obj
def wait(outer: str | None, run: str | None, job: str) -> None:
    """Wait for the call JOB and print what it returns, as JSON."""
    click.echo(json.dumps(Control(run or outer).request("wait", job=job)["result"]))


@command.command("cancel")
@click.argument("job")
@_run
@click.pass_obj
def cancel(outer: str | None, run: str | None, job: str) -> None:
    """Cancel the call JOB at its next checkpoint."""
    Control(run or outer).request("cancel", job=job)


@command.command("set")
@click.argument("name")
@click.argument("value", metavar="JSON")
@_run
@click.pass_obj
def turn(outer: str | None, run: str | None, name: str, value: str) -> None:
    """Set the control NAME, made with spark.control, to a value."""
    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = value  # a plain word is a text
    Control(run or outer).request("set", control=name, value=parsed)


@command.command("list")
def listing() -> None:
    """List the runs of this user."""
    from spark_runtime.supervise.runtime_folder import live_runs

    for run in live_runs():
        click.echo(f"{run.run_id}  {run.pid}  {run.script}")
