"""The instance of a model: made when it is needed, and dropped when it has failed."""

import difflib
from collections.abc import Sequence

from spark_workers.engines import traps
from spark_workers.engines.seam import Code, Extern, Instance, Number, Settings
from spark_workers.hosts.failures import GuestFailed
from spark_workers.hosts.files import Files
from spark_workers.hosts.look import INITIALIZE, LONGEST_NAME, START, functions_of, is_wasi, listed

#: Failures of the caller's, found before the guest ran; the instance is as good as before.
HARMLESS = ("missing-export", "wrong-signature")


class Guest:
    """Knows the one instance of a module, and the files that it writes to."""

    def __init__(self, code: Code, settings: Settings) -> None:
        self._code = code
        self._settings = settings
        self._files = Files() if is_wasi(code.imports) else None
        self._instance: Instance | None = None

    def instance(self) -> Instance:
        """Return the instance, ready to run and to be interrupted from now on; made and initialized if there is none.

        Raises:
            GuestFailed: It cannot be made, or its initialization failed.
        """
        if self._instance is None:
            try:
                self._instance = self._make()
            except GuestFailed as problem:
                raise self.failed(problem) from problem.__cause__
        if self._settings.epochs:
            self._instance.arm()
        return self._instance

    def _make(self) -> Instance:
        wasi = None
        if self._files is not None:
            self._files.begin()
            wasi = self._files.as_seen_by_guest(self._settings)
        instance = self._code.instantiate(wasi)
        try:
            _initialize(instance)
        except BaseException:
            instance.close()
            raise
        return instance

    def is_there(self) -> bool:
        """Tell whether there is an instance, which a failed call or a wish for fresh ones has dropped."""
        return self._instance is not None

    def drop(self) -> None:
        """Let the instance go; the next call makes another one."""
        instance, self._instance = self._instance, None
        if instance is not None:
            instance.close()

    def failed(self, problem: GuestFailed) -> GuestFailed:
        """Return *problem* with what the guest wrote before it; the instance is dropped if the failure is its own."""
        if problem.kind in HARMLESS:
            return problem
        self.drop()
        if self._files is None:
            return problem
        return with_stderr(problem, self._files, self._settings.memory_limit)

    def call(self, function: str, arguments: list[Number]) -> list[Number]:
        """Call an export with numbers; see `Host.call`."""
        try:
            results = call_export(self.instance(), self._code.exports, function, arguments)
        except GuestFailed as problem:
            raise self.failed(problem) from problem.__cause__
        except BaseException:
            self.drop()
            raise
        if self._settings.fresh:
            self.drop()
        return results

    def take_printed(self) -> str:
        """Return what the guest has written since the last time."""
        return "" if self._files is None else self._files.take_printed(with_stdout=True)


def _initialize(instance: Instance) -> None:
    """Run what has to run once: a reactor's ``_initialize``, or the ``_start`` of a module that has only that.

    Some compilers (TinyGo, for one) set up their runtime in ``_start`` and leave exports to be called after it.
    """
    initialize = instance.function(INITIALIZE) or instance.function(START)
    if initialize is None:
        return
    try:
        initialize()
    except GuestFailed as problem:
        if problem.kind != "exit" or problem.details["exit_code"] != 0:
            raise


def call_export(
    instance: Instance, exports: Sequence[Extern], function: str, arguments: Sequence[Number], export: str = ""
) -> list[Number]:
    """Call an export of *instance* with numbers; *export* is its name in the module if callers use another one.

    Raises:
        GuestFailed: missing-export, wrong-signature, or what happens in the guest.
    """
    found = instance.function(export or function)
    if found is None:
        raise _missing(function, exports)
    result = found(*arguments)
    if result is None:
        return []
    return list(result) if isinstance(result, tuple) else [result]


def _missing(name: str, exports: Sequence[Extern]) -> GuestFailed:
    other = next((each.kind for each in exports if each.name == name), None)
    names = [each[:LONGEST_NAME] for each in functions_of(exports)]
    # Closest first, among as many as can be compared in no time: modules may export thousands.
    close = difflib.get_close_matches(name[:LONGEST_NAME], names[:500], n=5, cutoff=0.5)
    ordered = [*close, *(each for each in names if each not in close)]
    asked = f"`{name[:LONGEST_NAME]}`"
    what = f"{asked} is a {other}, not a function" if other else f"it exports no function {asked}"
    return GuestFailed("missing-export", f"{what}; it exports {listed(ordered)}", {"exports": ordered[:100]})


def with_stderr(problem: GuestFailed, files: Files, memory_limit: int) -> GuestFailed:
    """Return *problem* with the end of what the guest wrote to standard error, and call it by what is said there."""
    written = files.take_stderr_tail()
    if written or "stderr" not in problem.details:
        problem.details["stderr"] = written.decode(errors="replace")
    if problem.kind == "trap" and traps.speaks_of_memory(written):
        return traps.out_of_memory(str(problem), problem.details.get("memory", 0), memory_limit, problem.details)
    return problem
