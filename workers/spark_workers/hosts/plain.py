"""Modules with one instance: requests and answers in linear memory, or nothing but functions to call with numbers."""

from collections.abc import Callable

from spark_workers.engines import traps
from spark_workers.engines.seam import Code, Engine, Function, Instance, Number, Settings
from spark_workers.hosts.failures import GuestFailed
from spark_workers.hosts.guest import Guest
from spark_workers.hosts.look import RESET, allocator_of, functions_of, releaser_of, why_no_requests

_LOW = (1 << 32) - 1


class FunctionsHost:
    """A module that takes no requests. Fits `host.Host`."""

    def __init__(self, engine: Engine, code: Code, settings: Settings) -> None:
        self.interrupt = engine.interrupt
        self._reason = why_no_requests(code.exports, settings.entry)
        self._guest = Guest(code, settings)
        self.call = self._guest.call
        self.take_printed = self._guest.take_printed
        self._guest.instance()

    def run(self, request: bytes) -> bytes:
        """Refuse.

        Raises:
            GuestFailed: "no-entry", with the reason.
        """
        raise GuestFailed("no-entry", self._reason)


class PlainHost:
    """A plain module or a reactor: bytes in, bytes out, through its memory. Fits `host.Host`."""

    def __init__(self, engine: Engine, code: Code, settings: Settings) -> None:
        reason = why_no_requests(code.exports, settings.entry)
        if reason:
            raise GuestFailed("no-entry", reason)
        self.interrupt = engine.interrupt
        self._functions = functions_of(code.exports)
        self._settings = settings
        self._guest = Guest(code, settings)
        self.take_printed = self._guest.take_printed
        self._exchange: Exchange | None = None
        self._begin()

    def _begin(self) -> "Exchange":
        """Return the exchange with an instance that is ready to be interrupted."""
        instance = self._guest.instance()
        if self._exchange is None:
            self._exchange = Exchange(instance, self._functions, self._settings)
        return self._exchange

    def run(self, request: bytes) -> bytes:
        """Answer one request.

        Raises:
            GuestFailed: trap, out-of-memory, stack-overflow, exit, interrupted, bad-answer.
        """
        try:
            answer = self._begin().answer(request)
        except GuestFailed as problem:
            self._exchange = None
            raise self._guest.failed(problem) from problem.__cause__
        except BaseException:
            self._drop()
            raise
        if self._settings.fresh:
            self._drop()
        return answer

    def call(self, function: str, arguments: list[Number]) -> list[Number]:
        """Call an export with numbers; see `Host.call`."""
        try:
            return self._guest.call(function, arguments)
        finally:
            if not self._guest.is_there():
                self._exchange = None

    def _drop(self) -> None:
        self._exchange = None
        self._guest.drop()


class Exchange:
    """Carries requests into the memory of one instance and answers out of it."""

    def __init__(self, instance: Instance, functions: dict[str, str], settings: Settings) -> None:
        self._instance = instance
        self._limit = settings.memory_limit
        self._names = settings.entry, allocator_of(functions) or ""
        self._execute = _function(instance, self._names[0])
        self._allocate = _function(instance, self._names[1])
        self._read, self._write = instance.read, instance.write
        releaser = None if settings.fresh else releaser_of(functions)
        self._reset: Callable[[], object] | None = None
        self._free: Function | None = None
        if releaser == RESET:
            self._reset = _function(instance, releaser)
        elif releaser is not None:
            self._free = _function(instance, releaser)

    def answer(self, request: bytes) -> bytes:
        """Answer one request.

        Raises:
            GuestFailed: What happens in the guest; "bad-answer", "out-of-memory".
        """
        length = len(request)
        room = length or 1  # because malloc(0) may return 0, and that means something else
        place = self._allocate(room) & _LOW
        if not place:
            what = f"`{self._names[1]}` has no room for a request of {traps.sized(length)}"
            raise traps.out_of_memory(what, self._instance.memory_size(), self._limit)
        self._write(place, request)
        packed = self._execute(place, length)
        answer_place, answer_length = (packed >> 32) & _LOW, packed & _LOW
        if not packed:
            self._check_nothing()
        answer = self._read(answer_place, answer_length)  # before anything is freed
        if self._reset is not None:
            self._reset()
        elif self._free is not None:
            self._release(place, room, answer_place, answer_length)
        return answer

    def _check_nothing(self) -> None:
        """A null pointer without length may be an empty answer, or mean that there was no room for one."""
        memory = self._instance.memory_size()
        if memory * 2 > self._limit:
            raise traps.out_of_memory(f"`{self._names[0]}` gave no answer", memory, self._limit)

    def _release(self, place: int, room: int, answer_place: int, answer_length: int) -> None:
        """Give both buffers back. An answer inside of the request's buffer is freed with it, an empty one has none."""
        assert self._free is not None
        takes_length = len(self._free.params) == 2
        if answer_length and not place <= answer_place < place + room:
            self._free(answer_place, answer_length) if takes_length else self._free(answer_place)
        self._free(place, room) if takes_length else self._free(place)


def _function(instance: Instance, name: str) -> Function:
    found = instance.function(name)
    if found is None:  # the exports said that there is one
        raise GuestFailed("no-entry", f"it exports no function `{name}`")
    return found
