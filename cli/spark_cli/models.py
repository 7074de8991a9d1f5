"""``spark models``: what a model is, and what is kept of models that were compiled."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spark_cli.model_options import build_model, model_options
from spark_cli.words import plural, size_text, visible, write_table

if TYPE_CHECKING:
    from spark_runtime.config import Model
    from spark_runtime.models.prepared import CacheEntry, ModelFile, Prepared

PAGE = 64 * 1024  # bytes of a page of linear memory
KEY_SHOWN = 12
ASK_SECONDS = 10.0  # for each of the empty requests

_MISSED = re.compile(r"Input parameter missing for '([^']+)'")


@click.group("models")
def command() -> None:
    """Look at WASM models and at what is prepared of them."""


@command.command("inspect")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, nothing else.")
@model_options
def inspect(model: Path, as_json: bool, **given: Any) -> None:
    """Say what MODEL is, what it imports and exports, and how it will be called.

    It is compiled, not run. Only a Neuron package is asked two empty requests, to see which inputs it misses and
    whether it knows columnar ones.
    """
    from spark_runtime.runtime import prepare_model

    chosen = build_model(model, given)
    file, prepared = prepare_model(chosen, _note)
    document = describe(file, prepared)
    if "package" in document:
        document["package"].update(ask_empty(chosen))
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
    package = {"package": _package(file, report["package"])} if "package" in report else {}
    return {
        **package,
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


def _package(file: ModelFile, told: dict[str, Any]) -> dict[str, Any]:
    """Return what is known of a Neuron package as a whole: who it is, and what it comes with."""
    from spark_runtime.models.registry import identify
    from spark_workers.packages.package import Identity

    said = Identity(**told["identity"]) if told["identity"] else None
    who = identify(told["service"] or file.path.stem, file.sha256, said)
    return {
        "folder": who.folder,
        "service": who.service,
        "version_id": who.version_id,
        "version_id_is_derived": who.is_derived,
        "version": who.version,
        "service_id": who.service_id,
        "compiler_version": told["compiler_version"],
        "has_metadata": told["has_static"],
        "has_formspec": told["has_formspec"],
        "calls_services": told["calls_services"],
        "heap_limit": told["heap_limit"],
        "warnings": told["warnings"],
    }


def ask_empty(model: Model) -> dict[str, Any]:
    """Return what can be seen of a Neuron model by asking it nothing: inputs that it misses, and columnar or not."""
    from spark_runtime.errors import SparkError
    from spark_runtime.models.rowwise import is_columnar_answer
    from spark_runtime.runtime import Spark

    seen: dict[str, Any] = {"inputs": [], "is_columnar": None, "failed": ""}
    try:
        with Spark([model], timeout=ASK_SECONDS) as spark:
            data = spark.execute({"request_data": {"inputs": {}}, "request_meta": {}}).get("response_data", {})
            told = [str(each.get("message", "")) for each in data.get("warnings") or ()]
            seen["inputs"] = sorted({found[1] for found in map(_MISSED.search, told) if found})
            columnar = spark.execute({"inputs": [seen["inputs"][:1] or ["input"], [None]]})
            seen["is_columnar"] = is_columnar_answer(columnar)
    except (SparkError, AttributeError, TypeError) as problem:  # it fails, or answers what no Neuron model does
        seen["failed"] = str(problem)
    return seen


def _package_lines(package: dict[str, Any]) -> list[tuple[str, str]]:
    version = f", version {package['version']}" if package["version"] else ""
    derived = " (derived from its bytes)" if package["version_id_is_derived"] else ""
    beside = [
        name
        for name, is_there in (("metadata", package["has_metadata"]), ("a form specification", package["has_formspec"]))
        if is_there
    ]
    calls = "calls other services" if package["calls_services"] else "calls no other services"
    columns = {True: "knows columnar requests", False: "knows no columnar requests", None: ""}
    asked = ", ".join(package["inputs"]) or "none that it misses"
    return [
        ("service", f"{package['folder']}/{package['service']}{version}"),
        ("id", f"{package['version_id']}{derived}"),
        (
            "built",
            f"by compiler {package['compiler_version']}" if package["compiler_version"] else "by an unknown compiler",
        ),
        ("has", ", ".join([*(beside or ["no metadata"]), calls])),
        ("inputs", f"not found out: {package['failed']}" if package["failed"] else asked),
        ("rows", columns[package["is_columnar"]] or "not found out"),
        *(("warning", text) for text in package["warnings"]),
    ]


def _write_model(document: dict[str, Any]) -> None:
    kept = document["cache"]
    state = "was prepared before" if kept["was_cached"] else "prepared now"
    code = f"{size_text(kept['code_size'])} of machine code, compiled in {kept['compile_seconds']:.2f} s"
    lines = [
        ("model", f"{document['path']} ({size_text(document['size'])})"),
        ("kind", str(document["kind"])),
        *(_package_lines(document["package"]) if "package" in document else ()),
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
        if "package" in document:  # one letter for each, and what it stands for
            meant = [(*row, each["meaning"]) for row, each in zip(rows, document[title], strict=True)]
            write_table(("name", "kind", "type", "in C"), meant)
            continue
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
