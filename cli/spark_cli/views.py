"""How a run is shown: a quiet live line on a terminal, plain lines elsewhere, or events as JSON.

What the script prints goes through unchanged, to the stream it was meant for; our own lines go to standard error.
"""

import sys
from typing import Any

from spark_cli.keys import Keys
from spark_cli.outlet import Outlet
from spark_runtime.supervise.jsontext import dumps
from spark_runtime.supervise.picture import Event
from spark_runtime.supervise.rpc import plain_event
from spark_runtime.supervise.run import Run

REFRESH_SECONDS = 0.1


def choose_view(as_json: bool) -> "JsonView | PlainView | LiveView":
    """Return the view that fits where our streams lead."""
    if as_json:
        return JsonView()
    if sys.stderr.isatty():
        return LiveView()
    return PlainView()


class JsonView:
    """One event a line on stdout. What the script prints on stdout is an event too; its stderr passes through."""

    def open(self, run: Run) -> None:
        self._out = Outlet(sys.stdout.buffer, run.hold_output)
        self._err = Outlet(sys.stderr.buffer, run.hold_output)
        run.picture.subscribe(self._show)

    async def aclose(self) -> None:
        await self._out.aclose()
        await self._err.aclose()

    def _show(self, event: Event) -> None:
        if event["event"] == "output" and event["stream"] == "stderr":
            self._err.write(event["data"])
        else:
            self._out.write(dumps(plain_event(event)).encode() + b"\n")


class PlainView:
    """Plain lines on stderr, for pipes and files."""

    def open(self, run: Run) -> None:
        self._out = Outlet(sys.stdout.buffer, run.hold_output)
        self._err = Outlet(sys.stderr.buffer, run.hold_output)
        self._next_spoke = False
        run.picture.subscribe(self._show)

    async def aclose(self) -> None:
        await self._out.aclose()
        await self._err.aclose()

    def _show(self, event: Event) -> None:
        if event["event"] == "output":
            self._output(event)
            return
        text = describe(event)
        if text:
            self._err.write(text.encode())

    def _output(self, event: Event) -> None:
        if event["next"] and not self._next_spoke:
            self._err.write(line("the new code prints while it is loaded:").encode())
        self._next_spoke = event["next"]
        (self._out if event["stream"] == "stdout" else self._err).write(event["data"])


class LiveView(PlainView):
    """One live line at the bottom of the terminal, out of the way of what the script prints.

    The line is cleared before anything else is written and drawn again after, but only where the last output ended
    its line: a progress bar that rewrites its own line has the terminal to itself.
    """

    def open(self, run: Run) -> None:
        from rich.console import Console

        super().open(run)
        self._run = run
        if sys.stdout.isatty():
            self._out = self._err  # one terminal, one order
        self._console = Console(file=sys.stderr, highlight=False)
        self._drawn = False
        self._at_line_start = True
        self._is_tty_out = sys.stdout.isatty()
        self._keys = Keys(run, self._help)
        self._keys.open()
        self._schedule()

    async def aclose(self) -> None:
        self._timer.cancel()
        self._clear()
        self._keys.close()
        await super().aclose()

    def _show(self, event: Event) -> None:
        if event["event"] in ("values", "series", "snapshot", "exposed"):
            return  # the live line shows these when it is drawn next
        self._clear()
        super()._show(event)
        if event["event"] == "output" and (event["stream"] == "stderr" or self._is_tty_out):
            self._at_line_start = event["data"].endswith(b"\n")
        self._draw()

    def _schedule(self) -> None:
        import asyncio

        self._draw()
        self._timer = asyncio.get_running_loop().call_later(REFRESH_SECONDS, self._schedule)

    def _clear(self) -> None:
        if self._drawn:
            self._err.write(b"\r\x1b[2K")
            self._drawn = False

    def _draw(self) -> None:
        if not self._at_line_start:
            return
        with self._console.capture() as capture:
            self._console.print(self._line(), end="", overflow="ellipsis", no_wrap=True, crop=True)
        self._err.write(b"\r\x1b[2K" + capture.get().encode())
        self._drawn = True

    def _line(self) -> Any:
        from rich.text import Text

        picture = self._run.picture
        colour = {"running": "green", "error": "red", "paused": "yellow", "pausing": "yellow"}.get(
            picture.state, "cyan"
        )
        text = Text.assemble((f" {picture.state}", f"bold {colour}"), f"  {picture.checkpoints:,}")
        if picture.state == "running":
            text.append(f"  {picture.rate():.1f}/s", "dim")
        for name, (item, total, left) in picture.loops.items():
            of = f"/{total:.0f}" if total >= 0 else ""
            eta = f" {_duration(left)} left" if left >= 0 else ""
            text.append(f"  {name if not name.startswith('loop ') else ''} {item:.0f}{of}{eta}")
        for name, value in list(_flat(picture.values).items())[:12]:
            text.append(f"  {name} ", "dim")
            text.append(_short(value))
        if picture.error is not None:
            text.append("  see the error above", "red")
        return text

    def _help(self) -> None:
        self._clear()
        keys = "p pause or resume   s stop   r restart from the last snapshot   b back to the last good code   q quit"
        self._err.write(line(keys).encode())


def line(text: str) -> str:
    """Return one line in the runtime's name; what could steer a terminal is shown, not done."""
    return "".join(f"spark: {visible(each)}\n" for each in text.splitlines())


def visible(text: str) -> str:
    """Escape control characters."""
    return "".join(char if char.isprintable() or char == "\t" else repr(char)[1:-1] for char in text)


def describe(event: Event) -> str:
    """Return what a person reads of an event; empty for what is not worth a line."""
    kind = event["event"]
    if kind == "error":
        return _error_text(event)
    if kind == "note":
        prefix = "warning: " if event["level"] == "warning" else ""
        return line(prefix + event["text"])
    if kind == "start":
        return line(f"{event['script']} runs (run {event['run']})")
    if kind == "state" and event["state"] in ("idle", "stopped") and not event["waits"]:
        return ""  # on the way to the end
    if kind == "state" and event["state"] in ("paused", "idle", "stopped", "error", "done"):
        return line(_state_text(event))
    if kind == "reload":
        return line(f"reloaded in {event['seconds'] * 1000:.0f} ms (version {event['version']})")
    if kind == "mended":
        return line("the mistake is mended")
    if kind == "job" and event["step"] in ("returned", "raised"):
        return _job_text(event)
    return ""


def _error_text(event: Event) -> str:
    titles = {
        "syntax": "the saved code does not compile; the run goes on with what it had",
        "load": "the code could not be loaded",
        "script": "the script raised",
        "worker": "the worker is gone",
        "internal": "an error of the runtime itself; the state is kept as of the last snapshot",
    }
    return f"{line(titles[event['kind']] + ':')}{event['text']}"


def _state_text(event: Event) -> str:
    ways = {
        "idle": "torch() has returned; waiting for calls",
        "stopped": "stopped; what is persisted is kept",
        "error": "in error; what is persisted is as of the last snapshot",
    }
    way = ways.get(event["state"], event["state"])
    hint = (
        "; waiting for the next save (r tries again, q quits)" if event["state"] == "error" and event["waits"] else ""
    )
    return f"{way} (checkpoint {event['checkpoints']}){hint}"


def _job_text(event: Event) -> str:
    if event["step"] == "returned":
        return line(f"{event['name']}() returned {dumps(event['result'])[:2000]}")
    return f"{line(event['name'] + '() raised ' + event['error'])}{event['text']}"


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Values with their names, one level of nesting opened."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and "array" not in value:
            flat.update({f"{name}.{inner}": each for inner, each in value.items()})
        else:
            flat[name] = value
    return flat


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    text = visible(value) if isinstance(value, str) else dumps(value)
    return text if len(text) <= 32 else text[:31] + "…"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
