"""What a replica asks of a host, and the choice of one. A host gives a kind of model its meaning."""

from collections.abc import Callable
from typing import Protocol, cast

from spark_workers.engines.seam import Code, Engine, LinkingEngine, Number, Settings, open_engine
from spark_workers.hosts.command import CommandHost
from spark_workers.hosts.failures import GuestFailed
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


#: What makes the host of each kind of module. A package is more than a module, and `open_host` knows it by its kind.
_HOSTS: dict[str, Callable[[Engine, Code, Settings], Host]] = {
    "plain": PlainHost,
    "reactor": PlainHost,
    "command": CommandHost,
    "functions": FunctionsHost,
}


def open_host(
    engine: str, kind: str, code: str, settings: Settings, dispatch: Callable[[bytes], bytes] | None = None
) -> Host:
    """Load the machine code at path *code* and make the first instance.

    Args:
        engine: wasmtime or wasmer.
        kind: plain, command, reactor, functions, neuron, or auto, which looks.
        code: What `Engine.compile` or `neuron_prepare.prepare_package` returned, as a file.
        settings: How it is to be run.
        dispatch: Has requests of a Neuron model for other services answered; they fail if None.

    Raises:
        GuestFailed: It cannot be loaded, it is not of that kind, or its initialization failed.
    """
    opened = open_engine(engine, settings)
    if kind == "neuron":
        from spark_workers.hosts.neuron import NeuronHost

        return NeuronHost(cast(LinkingEngine, opened), code, settings, dispatch or _nobody)
    loaded = opened.load(code)
    if kind == "auto":
        kind = kind_of(loaded.imports, loaded.exports, settings.entry)
    return _HOSTS[kind](opened, loaded, settings)


def _nobody(request: bytes) -> bytes:
    raise GuestFailed("xcall", "it calls another service, and nobody is here to answer")
