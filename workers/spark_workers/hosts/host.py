"""What a replica asks of a host, and the choice of one. A host gives a kind of model its meaning."""

from collections.abc import Callable
from typing import Protocol

from spark_workers.engines.seam import Code, Engine, Number, Settings, open_engine
from spark_workers.hosts.command import CommandHost
from spark_workers.hosts.look import kind_of
from spark_workers.hosts.plain import FunctionsHost, PlainHost


class Host(Protocol):
    """One model with its instance. After a `GuestFailed` the next call finds a fresh instance."""

    def run(self, request: bytes) -> bytes:
        """Answer one request. Raises GuestFailed."""

    def call(self, function: str, arguments: list[Number]) -> list[Number]:
        """Call an export with numbers; the results are a list of none, one or more. Raises GuestFailed."""

    def take_printed(self) -> str:
        """Return what the guest printed beside its answers since the last time; usually nothing."""

    def interrupt(self) -> None:
        """Stop what runs now, from another thread; only where the engine can."""


#: What makes the host of each kind. A kind with imports of its own, such as packages that come with JavaScript glue,
#: gets its place here; what it needs besides, functions of the host's that a guest can import, the seam then learns.
_HOSTS: dict[str, Callable[[Engine, Code, Settings], Host]] = {
    "plain": PlainHost,
    "reactor": PlainHost,
    "command": CommandHost,
    "functions": FunctionsHost,
}


def open_host(engine: str, kind: str, code: str, settings: Settings) -> Host:
    """Load the machine code at path *code* and make the first instance.

    Args:
        engine: wasmtime or wasmer.
        kind: plain, command, reactor, functions, or auto, which looks.
        code: What `Engine.compile` returned, as a file.
        settings: How it is to be run.

    Raises:
        GuestFailed: It cannot be loaded, it is not of that kind, or its initialization failed.
    """
    opened = open_engine(engine, settings)
    loaded = opened.load(code)
    if kind == "auto":
        kind = kind_of(loaded.imports, loaded.exports, settings.entry)
    return _HOSTS[kind](opened, loaded, settings)
