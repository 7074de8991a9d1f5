"""Words, sizes and tables, as every command shows them."""

import sys
from collections.abc import Sequence

import click


def visible(text: str) -> str:
    """Escape what could steer a terminal, line ends included: a module's names are not ours."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def size_text(size: float) -> str:
    """Return a number of bytes for people: ``1.3 MB``."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def write_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a table on stdout: with lines and colours on a terminal, with tabs for other programs. None is no table."""
    if not rows:
        return
    shown = [[visible(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        for row in shown:
            click.echo("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in shown:
        table.add_row(*map(Text, row))  # Text: square brackets in a name are no markup
    Console().print(table)


def plural(word: str, count: int) -> str:
    """Return *word* for so many of it."""
    return word if count == 1 else f"{word}s"
