"""What stands between a caller's request and a model: how it is written, how the answer is read.

A plain or WASI model gets its request as it is. A Neuron model gets it in an envelope, and what its package says in
files is answered from there. Whether a model is a package its file tells, by its first bytes; nothing else of it is
looked at before somebody asks for what is in the files.
"""

import os
import stat
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from spark_runtime.config import Model
from spark_runtime.errors import BadRequestError, ModelUnusable
from spark_runtime.models.model_file import ModelFile
from spark_runtime.pool.job import Context
from spark_workers.requests import read_bytes, read_json, write_request

if TYPE_CHECKING:  # imported where a package is first asked for something
    from spark_runtime.models.envelope import Documents, Envelope
    from spark_runtime.models.registry import Identity

ZIP = b"PK\x03\x04"

Read = Callable[[bytes, str, int], Any]
_State = tuple[int, int, int]
_Content = tuple[_State, "Documents", "Identity"]


def begins_as_zip(path: str | Path) -> bool:
    """Tell whether the file at *path* begins as a zip does; one that cannot be read at once does not."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a FIFO that nobody writes to would hang
    try:
        return stat.S_ISREG(os.fstat(descriptor).st_mode) and os.read(descriptor, len(ZIP)) == ZIP
    finally:
        os.close(descriptor)


class Opened(NamedTuple):
    """A request on its way. (A tuple: one is made for every call.)

    Attributes:
        payload: What the model gets.
        read: Makes of an answer, the model's name and the number of the replica what the caller gets.
        context: What came beside the request, for the calls that the model makes; None if nothing did.
        is_answered: The model need not be asked: *read* gives the answer, whatever it is given.
    """

    payload: bytes
    read: Read
    context: Context | None = None
    is_answered: bool = False


class Fronts:
    """Knows which models are packages, and what was read of their files, as long as these stay as they are."""

    def __init__(self, models: Mapping[str, Model]) -> None:
        self._models = models
        self._packages: dict[str, bool] = {}
        self._contents: dict[str, _Content] = {}
        self._reading = threading.Lock()
        self._open_request: Callable[[Any], Envelope] | None = None

    def open(self, name: str, request: Any) -> Opened:
        """Return a request as the model *name* gets it; bytes are passed on as they are.

        Raises:
            BadRequestError: It is not JSON, too long, or nothing that a Neuron model can be asked.
            ModelUnusable: It asks for what is in the package's files, and these cannot be read.
        """
        if isinstance(request, (bytes, bytearray, memoryview)):
            return Opened(write_request(request), read_bytes)
        if not (self._packages.get(name) or self.is_package(name)):
            return Opened(write_request(request), read_json)
        envelope = (self._open_request or self._import())(request)
        context = Context(envelope.context, (name,)) if envelope.context else None
        if envelope.categories:
            return self._open_with_documents(name, envelope, context)
        return Opened(write_request(envelope.body), read_json, context)

    def open_text(self, name: str, text: bytes) -> Opened:
        """As `open`, for a request that is JSON already, if it is meant to be; so is the answer."""
        if not self.is_package(name):
            return Opened(text, read_bytes)
        try:
            opened = self.open(name, read_json(text, name, 0))
        except BadRequestError:
            raise
        except Exception:  # noqa: BLE001 - it is no JSON: then it is bytes, which the model may say something to
            return Opened(text, read_bytes)
        if opened.read is read_json:
            return Opened(opened.payload, read_bytes, opened.context)
        return Opened(opened.payload, lambda *answer: write_request(opened.read(*answer)), None, opened.is_answered)

    def is_package(self, name: str) -> bool:
        """Tell whether a model is a Neuron package."""
        known = self._packages.get(name)
        if known is None:
            try:
                known = self._packages[name] = begins_as_zip(self._models[name].path)
            except (OSError, ValueError):
                return False  # whoever loads it says what is wrong with it
        return known

    def documents(self, name: str) -> "Documents":
        """Return what a package says of itself in files. Raises ModelUnusable."""
        return self._content(name)[1]

    def identity(self, name: str) -> "Identity":
        """Return who the model in a package is. Raises ModelUnusable."""
        return self._content(name)[2]

    def _import(self) -> "Callable[[Any], Envelope]":
        from spark_runtime.models.envelope import open_request

        self._open_request = open_request
        return open_request

    def _open_with_documents(self, name: str, envelope: "Envelope", context: Context | None) -> Opened:
        documents = self.documents(name)
        answer = documents.answer(envelope)
        if answer is not None:
            return Opened(b"", lambda *_: answer, is_answered=True)

        def read(answer: bytes, model: str, replica: int) -> Any:
            return documents.complete(envelope, read_json(answer, model, replica))

        return Opened(write_request(envelope.body), read, context)

    def _content(self, name: str) -> _Content:
        with self._reading:
            path = self._models[name].path
            try:
                status = os.stat(path)
                state = (status.st_mtime_ns, status.st_size, status.st_ino)
            except OSError as problem:
                raise ModelUnusable(f"{path} cannot be read: {problem.strerror}", "unreadable") from problem
            found = self._contents.get(name)
            if found is None or found[0] != state:
                found = self._contents[name] = (state, *_read(name, ModelFile.read(path)))
            return found


def _read(name: str, file: ModelFile) -> "tuple[Documents, Identity]":
    from spark_runtime.models.envelope import Documents
    from spark_runtime.models.registry import identify
    from spark_workers.packages.archive import ArchiveRefused
    from spark_workers.packages.package import PackageUnreadable, read_package

    try:
        package = read_package(file.data)
    except (ArchiveRefused, PackageUnreadable) as problem:
        raise ModelUnusable(f"model {name!r}: the package cannot be used: {problem}") from problem
    documents = Documents(package.static, package.formspec, package.compiler_version)
    return documents, identify(package.service or file.path.stem, file.sha256, package.identity)
