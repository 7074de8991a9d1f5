"""Reads a Neuron package: a zip whose files are known by the ends of their names, without a manifest.

An export of the platform ("ImpEx") is a zip around that zip; its ``ModelMetaData.json`` says folder, service and
version. Of several files for one part the last one counts, as in the vendor's runner.
"""

import hashlib
import json
import posixpath
from dataclasses import dataclass, field
from typing import Any

from spark_workers.packages.archive import MAGIC, Archive, ArchiveRefused, Limits

_METADATA = "modelmetadata.json"
_CHECKSUMS = "checksums.md5"
_INFORMATION = "EngineInformation"
_LARGEST_TEXT = 64 << 20
_DEEPEST = 4  # objects around the engine information


class PackageUnreadable(ValueError):
    """A zip that is no Neuron package. The message says what is missing or wrong, without naming the file."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What an export says about its model. Text is empty, and the revision too, where it says nothing.

    Attributes:
        folder: ``ProductName``.
        service: ``ServiceName``.
        revision: Such as ``1.2.0``.
        version_id: ``ServiceVersionGuid``.
        service_id: ``ServiceGuid`` or ``ServiceId``.
        compiler_version: ``CompilerVersion``.
        effective_start: ``EffectiveStartDate``, as it is written.
        effective_end: ``EffectiveEndDate``, as it is written.
    """

    folder: str = ""
    service: str = ""
    revision: str = ""
    version_id: str = ""
    service_id: str = ""
    compiler_version: str = ""
    effective_start: str = ""
    effective_end: str = ""


@dataclass(frozen=True, slots=True)
class Package:
    """The parts of a package.

    Attributes:
        service: The name that its own files carry.
        glue: The JavaScript, as text. It is read for names and never run.
        wasm: The module.
        data: Emscripten's preload archive, if there is one.
        static: Metadata, ``{"Outputs": {...}, "ImageOutputs": [...]}``; None if there is none.
        formspec: The form specification, any JSON; None if there is none.
        compiler_version: Of the compiler that made the package; empty if it does not say.
        identity: Folder, service and version; None without an export around the package.
        warnings: Sentences about what is odd and does not keep the model from running.
    """

    service: str
    glue: str = field(repr=False)
    wasm: bytes = field(repr=False)
    data: bytes | None = field(default=None, repr=False)
    static: dict[str, Any] | None = field(default=None, repr=False)
    formspec: Any = field(default=None, repr=False)
    compiler_version: str = ""
    identity: Identity | None = None
    warnings: tuple[str, ...] = ()


def is_archive(data: bytes) -> bool:
    """Tell whether *data* begin as a zip archive does."""
    return data[: len(MAGIC)] == MAGIC


def read_package(data: bytes, limits: Limits | None = None) -> Package:
    """Read the package *data*, or the one inside of the export *data*.

    Raises:
        ArchiveRefused: The zip is damaged, or other than one wants to read.
        PackageUnreadable: It is no package; such as "Missing runtime file".
    """
    archive = Archive(data, limits)
    inner = _inner_name(archive)
    if inner is None:
        return _Reader(archive).read()
    warnings: list[str] = []
    information = _information(archive, inner)
    content = archive.read(inner)
    _check_hash(information, content, warnings)
    try:
        package = _Reader(Archive(content, limits)).read()
    except ArchiveRefused as problem:
        raise ArchiveRefused(f"of the package in it: {problem}") from problem
    return _with_identity(package, information, warnings)


# --- exports ---


def _inner_name(archive: Archive) -> str | None:
    """Return the name of the package in an export; None if *archive* is a package itself."""
    names = archive.names
    if any(posixpath.splitext(name)[1] in (".js", ".wasm") for name in names):
        return None
    inner = [name for name in names if name.lower().endswith(".zip")]
    if len(inner) > 1:
        raise PackageUnreadable(f"it holds {len(inner)} packages; export one model at a time")
    return inner[0] if inner else None


def _information(archive: Archive, inner: str) -> dict[str, Any]:
    """Return what the export says about its engine; the file that lies beside the package counts."""
    names = [name for name in archive.names if posixpath.basename(name).lower() == _METADATA]
    if not names:
        raise PackageUnreadable("it holds a package and no ModelMetaData.json that says which model it is")
    beside = [name for name in names if posixpath.dirname(name) == posixpath.dirname(inner)]
    metadata = _json(archive, (beside or names)[-1])
    found = _find_information(metadata, _DEEPEST)
    if found is None:
        raise PackageUnreadable(f"its ModelMetaData.json has no {_INFORMATION}, which says which model it is")
    return found


def _find_information(value: Any, depth: int) -> dict[str, Any] | None:
    if not isinstance(value, dict) or depth == 0:
        return None
    found = value.get(_INFORMATION)
    if isinstance(found, dict):
        return found
    deeper = (_find_information(each, depth - 1) for each in value.values())
    return next((each for each in deeper if each is not None), None)


def _check_hash(information: dict[str, Any], content: bytes, warnings: list[str]) -> None:
    announced = information.get("CompiledOutputHash")
    if announced and str(announced).upper() != hashlib.sha256(content).hexdigest().upper():
        warnings.append("the package in the export is not the one it was made for: CompiledOutputHash differs")


def _with_identity(package: Package, information: dict[str, Any], warnings: list[str]) -> Package:
    def text(*keys: str) -> str:
        found = (information.get(key) for key in keys)
        return next((str(each) for each in found if each is not None and each != ""), "")

    identity = Identity(
        folder=text("ProductName"),
        service=text("ServiceName"),
        revision=text("Revision"),
        version_id=text("ServiceVersionGuid", "VersionId"),
        service_id=text("ServiceGuid", "ServiceId"),
        compiler_version=text("CompilerVersion"),
        effective_start=text("EffectiveStartDate"),
        effective_end=text("EffectiveEndDate"),
    )
    return Package(
        service=identity.service or package.service,
        glue=package.glue,
        wasm=package.wasm,
        data=package.data,
        static=package.static,
        formspec=package.formspec,
        compiler_version=package.compiler_version or identity.compiler_version,
        identity=identity,
        warnings=(*warnings, *package.warnings),
    )


# --- packages ---


class _Reader:
    """Finds the parts of one package and keeps what is odd about them."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._warnings: list[str] = []

    def read(self) -> Package:
        glue, wasm, data = self._by_end(".js"), self._by_end(".wasm"), self._by_end(".data")
        if glue is None:
            raise PackageUnreadable("Missing runtime file: it holds no .js file, so it is no Neuron package")
        if wasm is None:
            raise PackageUnreadable("Missing engine file: it holds no .wasm file, so it is no Neuron package")
        self._check_sums()
        static = self._optional("_static.json")
        if static is not None and not isinstance(static, dict):
            self._warnings.append("its static metadata are left out: they are no JSON object")
            static = None
        log = self._optional("_compilerlog.json")
        version = log.get("CompilerVersion") if isinstance(log, dict) else None
        return Package(
            service=posixpath.splitext(posixpath.basename(wasm))[0],
            glue=_text(self._archive, glue),
            wasm=self._archive.read(wasm),
            data=None if data is None else self._archive.read(data),
            static=static,
            formspec=self._optional("_jsonformspec.json"),
            compiler_version="" if version is None else str(version),
            warnings=tuple(self._warnings),
        )

    def _by_end(self, end: str) -> str | None:
        found = [name for name in self._archive.names if posixpath.splitext(name)[1] == end]
        return found[-1] if found else None

    def _optional(self, part: str) -> Any:
        """Return the JSON of the file with *part* in its name, None if there is none that can be read."""
        found = [name for name in self._archive.names if part in name.lower()]
        if not found:
            return None
        try:
            return _json(self._archive, found[-1])
        except PackageUnreadable as problem:
            self._warnings.append(f"a part is left out: {problem}")
            return None

    def _check_sums(self) -> None:
        names = [name for name in self._archive.names if posixpath.basename(name).lower() == _CHECKSUMS]
        if not names:
            return
        folder = posixpath.dirname(names[-1])
        for line in self._archive.read(names[-1]).decode(errors="replace").splitlines():
            announced, _, rest = line.strip().partition(" ")
            name = posixpath.join(folder, rest.lstrip().removeprefix("*").removeprefix("./"))
            if len(announced) == 32 and rest:
                self._check_sum(announced.lower(), name)

    def _check_sum(self, announced: str, name: str) -> None:
        if name not in self._archive.names:
            self._warnings.append(f"{_CHECKSUMS} names {name[:200]!a}, which is not there")
            return
        content = self._archive.read(name)
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != announced:
            self._warnings.append(f"{name[:200]!a} is not what {_CHECKSUMS} says; the package was changed")


def _text(archive: Archive, name: str) -> str:
    if archive.size(name) > _LARGEST_TEXT:
        raise PackageUnreadable(f"{name[:200]!a} is larger than {_LARGEST_TEXT >> 20} MiB")
    try:
        return archive.read(name).decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise PackageUnreadable(f"{name[:200]!a} is not UTF-8") from problem


def _json(archive: Archive, name: str) -> Any:
    try:
        return json.loads(_text(archive, name))
    except RecursionError as problem:
        raise PackageUnreadable(f"{name[:200]!a} nests too deep") from problem
    except ValueError as problem:
        if isinstance(problem, (PackageUnreadable, ArchiveRefused)):
            raise
        raise PackageUnreadable(f"{name[:200]!a} is not JSON: {problem}") from problem
