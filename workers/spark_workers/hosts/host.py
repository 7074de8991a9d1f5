"""What a replica asks of a host, and the choice of one. A host gives a kind of model its meaning."""

from typing import Protocol

from spark_workers.engines.seam import Number, Settings


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


def open_host(engine: str, kind: str, code: str, settings: Settings) -> Host:
    """Load the machine code at path *code* and make the first instance. *kind*: plain, command or reactor.

    Raises:
        GuestFailed: It cannot be loaded.
    """
    raise NotImplementedError  # the hosts come with the next change
