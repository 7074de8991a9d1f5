"""``spark models``: what a model is, and what is kept of models that were compiled."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spark_cli.model_options import build_model, model_options
from spark_cli.words import plural, size_text, visible, write_table

if TYPE_CHECKING:
    from spark_runtime.models.prepared import CacheEntry, ModelFile, Prepared

PAGE = 64 * 1024  # bytes of a page of linear memory
KEY_SHOWN = 12


@click.group("models")
def command() -> None:
    """Look at WASM models and at what is prepared of them."""


@command.command("inspect")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, nothing else.")
@model_options
def inspect(model: Path, as_json: bool, **given: Any) -> None:
    """Say what MODEL is, what it imports and exports, and how it will be called. It is compiled, not run."""
    from spark_runtime.runtime import prepare_model

    file, prepared = prepare_model(build_model(model, given), _note)
    document = describe(file, prepared)
    if as_json:
        _write_json(document)
        return
    _write_model(document)


@command.group("cache")
def cache() -> None:
    """Compiled models, which are kept so that they need not be compiled again."""


@cache.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, nothing else.")
def cache_list(as_json: bool) -> None:
    """List them, the last used first."""
    from spark_runtime.models.prepared import ModelCache

    kept = ModelCache()
    folder = _folder_of(kept)
    entries = kept.entries()
    if as_json:
        total = sum(entry.size for entry in entries)
        _write_json({"folder": folder, "bytes": total, "entries": [_entry_document(each) for each in entries]})
        return
    rows = [
        (each.name, size_text(each.size), _age(each.used), f"{each.seconds:.1f} s", each.engine, each.key[:KEY_SHOWN])
        for each in entries
    ]
    write_table(("model", "size", "used", "compiled in", "engine", "key"), rows)
    total = sum(entry.size for entry in entries)
    click.echo(f"{visible(folder)}: {len(entries)} {plural('model', len(entries))}, {size_text(total)}")


@cache.command("clear")
@click.option("--yes", is_flag=True, help="Do not ask.")
def cache_clear(yes: bool) -> None:
    """Remove them; models are compiled again when they are used next. What is in use stays."""
    from spark_runtime.models.prepared import ModelCache

    kept = ModelCache()
    folder = visible(_folder_of(kept))
    if not yes:
        if not sys.stdin.isatty():
            raise click.UsageError("nobody is there to ask; add --yes")
        count = len(kept.entries())
        click.confirm(f"Remove {count} compiled {plural('model', count)} from {folder}?", abort=True)
    removed = kept.clear()
    stays = f"; {removed.in_use} in use, which stay" if removed.in_use else ""
    count = removed.entries
    click.echo(f"removed {count} {plural('model', count)}, {size_text(removed.size)}, from {folder}{stays}")


# --- what is said of a model -----------------------------------------------------------------------------------------


def describe(file: ModelFile, prepared: Prepared) -> dict[str, Any]:
    """Return all that is known of a model, as plain data."""
    report = prepared.report
    return {
        "path": str(file.path),
        "size": file.size,
        "sha256": file.sha256,
        "kind": report["kind"],
        "entry": report["entry"],
        "runs": report["runs"],
        "memories": report["memories"],
        "has_names": report["has_names"],
        "imports": report["imports"],
        "exports": report["exports"],
        "cache": {
            "was_cached": prepared.from_cache,
            "key": prepared.key,
            "code": prepared.code,
            "code_size": prepared.size,
            "compile_seconds": round(prepared.seconds, 3),
        },
    }


def _write_model(document: dict[str, Any]) -> None:
    kept = document["cache"]
    state = "was prepared before" if kept["was_cached"] else "prepared now"
    code = f"{size_text(kept['code_size'])} of machine code, compiled in {kept['compile_seconds']:.2f} s"
    lines = [
        ("model", f"{document['path']} ({size_text(document['size'])})"),
        ("kind", str(document["kind"])),
        ("runs", str(document["runs"])),
        *(("memory", _memory_text(memory)) for memory in document["memories"]),
        (
            "names",
            "functions are named in backtraces" if document["has_names"] else "stripped: backtraces show numbers",
        ),
        ("cache", f"{state}: {code}, key {kept['key'][:KEY_SHOWN]}"),
    ]
    for name, text in lines:
        click.echo(f"{name:8}{visible(text)}")
    for title in ("imports", "exports"):
        click.echo(f"\n{title}{'' if document[title] else ': none'}")
        rows = [
            (f"{each['module']}.{each['name']}" if title == "imports" else each["name"], each["kind"], each["type"])
            for each in document[title]
        ]
        write_table(("name", "kind", "type"), rows)


def _memory_text(memory: dict[str, Any]) -> str:
    most = "no maximum of its own" if memory["max"] is None else f"at most {_pages_text(memory['max'])}"
    return f"{'imported, ' if memory['imported'] else ''}{_pages_text(memory['min'])} at the start, {most}"


def _pages_text(pages: int) -> str:
    kib = pages * PAGE // 1024
    return f"{kib} KiB" if kib < 1024 else f"{kib / 1024:g} MiB"


def _entry_document(entry: CacheEntry) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(entry)


# --- words ---------------------------------------------------------------------------------------------------------


def _write_json(document: dict[str, Any]) -> None:
    from spark_runtime.supervise.jsontext import dumps

    click.echo(dumps(document, indent=2))


def _note(text: str) -> None:
    click.echo(f"spark: {visible(text)}", err=True)


def _folder_of(kept: Any) -> str:
    from spark_runtime.errors import StoreError

    try:
        return str(kept.path)
    except OSError as problem:
        raise StoreError(f"there is no folder for prepared models: {problem.strerror or problem}") from problem


def _age(used: float) -> str:
    seconds = max(0.0, time.time() - used)
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {plural(unit, count)} ago"
    return "just now"
