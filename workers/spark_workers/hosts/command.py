"""WASI commands: a new instance for every request, which comes on standard input; standard output is the answer."""

from spark_workers.engines.seam import Code, Engine, Function, Instance, Number, Settings
from spark_workers.engines.traps import sized
from spark_workers.hosts.failures import GuestFailed
from spark_workers.hosts.files import OUTPUT_LIMIT, Files
from spark_workers.hosts.guest import HARMLESS, call_export, with_stderr
from spark_workers.hosts.look import START, functions_of, listed


class CommandHost:
    """Fits `host.Host`."""

    def __init__(self, engine: Engine, code: Code, settings: Settings) -> None:
        functions = functions_of(code.exports)
        if functions.get(START) != "() -> ()":
            text = f"it exports no `{START}` () -> (), so it is no WASI command; it exports {listed(functions)}"
            raise GuestFailed("no-entry", text)
        self.interrupt = engine.interrupt
        self._code = code
        self._settings = settings
        self._files = Files()
        self._wasi = self._files.as_seen_by_guest(settings)
        self._printed = ""

    def run(self, request: bytes) -> bytes:
        """Answer one request.

        Raises:
            GuestFailed: exit, trap, out-of-memory, stack-overflow, interrupted, bad-answer.
        """
        instance = self._instance(request)
        try:
            self._start(instance)
        except GuestFailed as problem:
            raise self._failed(problem) from problem.__cause__
        finally:
            instance.close()
        if self._files.is_full():
            raise _wrote_too_much()
        answer = self._files.answer()
        self._printed = self._files.take_printed(with_stdout=False)
        return answer

    def _instance(self, request: bytes) -> Instance:
        self._files.begin(request)
        instance = self._code.instantiate(self._wasi)
        if self._settings.epochs:
            instance.arm()
        return instance

    def _failed(self, problem: GuestFailed) -> GuestFailed:
        """What it wrote to standard error goes with the failure, and what would have been its answer is printed."""
        if problem.kind in HARMLESS:
            return problem
        if self._files.is_full():
            return _wrote_too_much()
        found = with_stderr(problem, self._files, self._settings.memory_limit)
        self._printed = self._files.take_printed(with_stdout=True)
        return found

    def _start(self, instance: Instance) -> None:
        start: Function | None = instance.function(START)
        assert start is not None
        try:
            start()
        except GuestFailed as problem:
            if problem.kind != "exit" or problem.details["exit_code"] != 0:
                raise

    def call(self, function: str, arguments: list[Number]) -> list[Number]:
        """Call an export with numbers, in an instance of its own in which ``_start`` does not run."""
        instance = self._instance(b"")
        try:
            results = call_export(instance, self._code.exports, function, arguments)
        except GuestFailed as problem:
            raise self._failed(problem) from problem.__cause__
        finally:
            instance.close()
        self._printed = self._files.take_printed(with_stdout=True)
        return results

    def take_printed(self) -> str:
        """Return what the last call printed beside its answer."""
        printed, self._printed = self._printed, ""
        return printed


def _wrote_too_much() -> GuestFailed:
    return GuestFailed("bad-answer", f"it wrote more than the {sized(OUTPUT_LIMIT)} that a command may write")
