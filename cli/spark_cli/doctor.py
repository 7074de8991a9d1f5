"""``spark doctor``."""

import sys

import click

NAME_WIDTH = 16


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, nothing else.")
def command(as_json: bool) -> None:
    """Say what is in force on this machine, and what will not work, by trying it.

    Exit code: 0, or 1 if there is a problem.
    """
    from spark_cli.checks import CHECKS, PROBLEM, Finding, examine

    found: list[tuple[str, Finding]] = []
    show = _Lines()
    for name, check in CHECKS:
        finding = examine(check)
        found.append((name, finding))
        if not as_json:
            show.line(name, finding.state, finding.text, finding.advice)
    problems = sum(finding.state == PROBLEM for _, finding in found)
    if as_json:
        from spark_runtime.supervise.jsontext import dumps

        checks = [
            {"name": name, "state": each.state, "text": each.text, "advice": each.advice, **each.facts}
            for name, each in found
        ]
        click.echo(dumps({"ok": not problems, "checks": checks}, indent=2))
    elif problems:
        show.end(f"{problems} {'problem' if problems == 1 else 'problems'}; what to do stands below each")
    sys.exit(1 if problems else 0)


class _Lines:
    """One line for each finding, as soon as it is known; in colour on a terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        # Not a table: checks take a second together, and a person sees the first line at once.
        self._console = Console(highlight=False, soft_wrap=True)

    def line(self, name: str, state: str, text: str, advice: str) -> None:
        from rich.text import Text

        from spark_cli.words import visible

        colour = {"ok": "green", "note": "yellow", "problem": "bold red"}[state]
        word = "PROBLEM" if state == "problem" else state
        self._console.print(Text.assemble((f"{word:8}", colour), f"{name:{NAME_WIDTH}}", visible(text)))
        if advice:
            self._console.print(Text(f"{'':8}{'':{NAME_WIDTH}}{visible(advice)}", style="dim"))

    def end(self, text: str) -> None:
        self._console.print(text)
