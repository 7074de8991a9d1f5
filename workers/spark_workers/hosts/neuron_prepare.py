"""Makes of a Neuron package what replicas need. In a compile worker: the package may have been made to do harm.

The glue's JavaScript is read for names here, never run, and goes no further.
"""

from dataclasses import asdict
from typing import Any

from spark_workers.engines import code_file
from spark_workers.engines.arguments import CALLABLE
from spark_workers.engines.outline import Outline, OutlineUnreadable, read_outline, signature_of
from spark_workers.engines.seam import Extern, LinkingEngine
from spark_workers.hosts import neuron_bridge
from spark_workers.hosts.emscripten.files import FileTable, Log
from spark_workers.hosts.failures import GuestFailed
from spark_workers.hosts.look import look_at
from spark_workers.hosts.neuron_parts import (
    ALLOCATE,
    CALCULATE,
    CONSTRUCT,
    DATA,
    DISPATCH,
    DRIVER,
    GLUE,
    KIND,
    RELEASE,
    STUBS,
    write_glue_part,
)
from spark_workers.packages.archive import ArchiveRefused
from spark_workers.packages.glue import Glue, GlueUnreadable, read_glue
from spark_workers.packages.package import Package, PackageUnreadable, read_package

#: What a package must export, by the names in C.
_TYPES = {
    CONSTRUCT: "() -> i32",
    CALCULATE: "(i32, i32, i32, i32) -> i32",
    ALLOCATE: "(i32) -> i32",
    RELEASE: "(i32) -> ()",
}


def prepare_package(engine: LinkingEngine, data: bytes) -> tuple[bytes, dict[str, Any]]:
    """Return the file for replicas and the report on the package in the zip *data*.

    Raises:
        GuestFailed: "invalid-module" or "unsupported-import": it cannot be read, or is no Neuron package.
    """
    try:
        package = read_package(data)
    except (ArchiveRefused, PackageUnreadable) as problem:
        raise GuestFailed("invalid-module", f"the package cannot be used: {problem}") from problem
    try:
        outline = read_outline(package.wasm)
        glue = read_glue(package.glue, outline)
        FileTable(Log(), package.data or b"", glue.files)  # a look at whether they fit each other
    except OutlineUnreadable as problem:
        raise GuestFailed("invalid-module", f"the package's module cannot be read: {problem}") from problem
    except GlueUnreadable as problem:
        raise GuestFailed("invalid-module", f"the package cannot be used: {problem}") from problem
    except ValueError as problem:
        raise GuestFailed("invalid-module", f"the package's parts do not fit each other: {problem}") from problem
    _check_exports(outline, glue)
    _check_imports(outline.imports)
    code = engine.compile(package.wasm)
    parts = {
        STUBS: engine.compile(neuron_bridge.STUBS),
        DRIVER: engine.compile(neuron_bridge.DRIVER),
        GLUE: write_glue_part(glue),
        DATA: package.data or b"",
    }
    return code_file.with_parts(code, parts), _report(package, outline, glue)


def _check_exports(outline: Outline, glue: Glue) -> None:
    types = {each.name: each.type for each in outline.exports if each.kind == "function"}
    for name, wanted in _TYPES.items():
        found = types.get(glue.exports.get(name, ""))
        if found != wanted:
            what = f"is {found}" if found else "is not there"
            text = f"it is no Neuron package: its function `{name}` {what}, and should be {wanted}"
            raise GuestFailed("invalid-module", text)
    if not any(each.kind == "memory" and each.name == glue.memory for each in outline.exports):
        raise GuestFailed("invalid-module", "it is no Neuron package: its module does not export its memory")
    if any(each.is_shared for each in outline.memories):
        raise GuestFailed("invalid-module", "its memory is shared between threads; build it without threads")


def _check_imports(imports: list[Extern]) -> None:
    for each in imports:
        if each.kind != "function":
            text = f"its module imports the {each.kind} `{each.module}.{each.name}`, and only functions can be given"
            raise GuestFailed("unsupported-import", text)
        params, results = signature_of(each.type)
        if len(results) > 1 or not all(kind in CALLABLE for kind in (*params, *results)):
            text = f"its module imports `{each.module}.{each.name}` of type {each.type}, which has more than numbers"
            raise GuestFailed("unsupported-import", text)


def _report(package: Package, outline: Outline, glue: Glue) -> dict[str, Any]:
    looked = look_at(outline, len(package.wasm))
    exported = {letter: name for name, letter in glue.exports.items()} | {glue.memory: "memory", glue.table: "table"}
    for each in looked["imports"]:
        each["meaning"] = glue.imports.get(each["name"], "")
    for each in looked["exports"]:
        each["meaning"] = exported.get(each["name"], "")
    names = set(glue.imports.values())
    return {
        **looked,
        "kind": KIND,
        "entry": CALCULATE,
        "runs": "as a Neuron model: whole requests, or plain inputs, as JSON; its JavaScript is read for names only",
        "package": {
            "service": package.service,
            "compiler_version": package.compiler_version,
            "identity": asdict(package.identity) if package.identity is not None else None,
            "warnings": list(package.warnings),
            "heap_limit": glue.heap_limit,
            "has_static": package.static is not None,
            "has_formspec": package.formspec is not None,
            "calls_services": DISPATCH in names,
        },
    }
