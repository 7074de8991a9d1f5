"""What happens next in a run: the supervisor's decisions, and nothing else.

Reload, in the order in which it happens:

    a file is saved ──> it compiles and differs ──> a worker executes its top level, beside the one that runs
      ──> that worker is ready ──> the running one is asked to leave ──> at its next checkpoint it hands over its
      state, unwinds and ends ──> its process is dead ──> the new worker restores the state and runs torch()

Whatever goes wrong before the asking changes nothing but what is shown.
"""

import asyncio
import signal
import time
from collections.abc import Callable
from pathlib import Path

from spark_runtime.config import RunOptions
from spark_runtime.errors import NurseryDied
from spark_runtime.supervise.code import Code, CodeBroken, Version
from spark_runtime.supervise.executions import Executions
from spark_runtime.supervise.jobs import Job, Jobs
from spark_runtime.supervise.lifecycle import Event, State, next_state
from spark_runtime.supervise.picture import Picture
from spark_runtime.supervise.reports import Reports
from spark_runtime.supervise.restarts import Restarts
from spark_runtime.supervise.saves import Saves
from spark_runtime.supervise.stage import Cast, Stage
from spark_runtime.supervise.state import RunState
from spark_runtime.supervise.timers import Timers
from spark_runtime.supervise.waits import Waits
from spark_runtime.supervise.worker import Death
from spark_runtime.supervise.worker import Event as WorkerEvent
from spark_workers import messages as m
from spark_workers import system

SLOW_START_SECONDS = 10.0


class Course:
    """Takes one event at a time and lets the run go on from it."""

    stage: Stage
    saves: Saves
    _reports: Reports
    _waits: Waits

    def __init__(
        self,
        options: RunOptions,
        code: Code,
        picture: Picture,
        jobs: Jobs,
        state: RunState,
        executions: Executions,
    ) -> None:
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.picture = picture
        self.jobs = jobs
        self.state = state
        self.timers = Timers()
        self.restarts = Restarts()
        self.good: Version | None = None  # the last version that passed a checkpoint
        self.starts_paused = False
        self.is_quitting = False
        self.interrupts = 0
        self._options = options
        self._code = code
        self._executions = executions
        self._fallback: Version | None = None  # what ran before, while nothing runs and newer code is being loaded
        self._then: Callable[[], None] | None = None  # in place of the usual, when the current worker is gone
        self._planned: set[Job] = set()
        self._failed_calls = 0
        self._has_begun = False
        self._oom_kills = system.count_oom_kills()

    def join(self, stage: Stage, saves: Saves, reports: Reports, waits: Waits) -> None:
        """Learn of the parts that themselves need a course."""
        self.stage, self.saves, self._reports, self._waits = stage, saves, reports, waits

    # --- the states ---

    def begin(self) -> None:
        """Start the script, and book the calls that were planned."""
        for call in self._options.calls:
            job = self.jobs.add(call.name, list(call.args), call.kwargs)
            self._planned.add(job)
            job.answer.add_done_callback(lambda answer, job=job: self._on_planned(job))  # type: ignore[misc]
        self.load(self._code.version())

    def go(self, event: Event) -> None:
        """Let *event* happen to the run, and tell if that changes its state.

        Raises:
            RequestRefused, ProtocolViolated: It cannot happen now.
        """
        after = next_state(self.picture.state, event)
        if after != self.picture.state:
            options = self._options
            self.picture.enter(
                after, waits=options.waits_for_save if after == "error" else not options.exit_when_called
            )
            self._waits.entered(after)
        self._decide(after)

    def end(self, code: int) -> None:
        """The run is over; where it was there for its calls, one that failed makes the code 1."""
        if not self.ended.done():
            unanswered = bool(self._planned) and not self.is_quitting
            failed = self._options.exit_when_called and (unanswered or self._failed_calls > 0)
            self.ended.set_result(code or int(failed))

    def quit(self) -> None:
        """Stop, take the last snapshot, end."""
        self.is_quitting = True
        if self.picture.state in ("stopped", "error", "done"):
            self.end(0)
        elif self.picture.state != "stopping":
            self.stop()

    def stop(self) -> None:
        """Stop at the next checkpoint; without a worker at once."""
        self.go("stop")
        self.stage.drop_next("stop was asked")
        self.timers.cancel("restart")
        self.timers.cancel("load")
        if self.stage.current is None:
            self.go("halted")
        else:
            self.stage.current.worker.send(m.Ask("stop"))

    def _decide(self, state: State) -> None:
        """End the run where its state and its options say so."""
        if state == "done":
            self.state.is_finished = True
            self.end(0)
        elif state == "error" and (self.is_quitting or not self._options.waits_for_save):
            self.end(1)
        elif state == "stopped" and (self.is_quitting or self._options.exit_when_called):
            self.end(0)
        elif state == "idle" and self._options.exit_when_called and not self._planned:
            self.state.is_finished = True  # torch() has returned, and nobody will call any more
            self.quit()

    def _on_planned(self, job: Job) -> None:
        self._planned.discard(job)
        self._failed_calls += job.answer.cancelled() or job.answer.exception() is not None
        if not self._planned and self._options.exit_when_called and not self.is_quitting and not self.ended.done():
            self.quit()

    # --- loading and beginning ---

    def load(self, version: Version, saved_at: float | None = None) -> None:
        """Have a worker execute the top level of *version*; it begins when it is ready and the stage is free.

        Args:
            version: The code.
            saved_at: When it was saved, if that is why it is loaded.
        """
        self.timers.cancel("restart")
        try:
            self.stage.load(version, saved_at)
        except NurseryDied as problem:
            self._fail(str(problem))
            return
        limit = self._options.load_seconds
        if self.stage.current is not None:
            self.timers.start("load", limit, lambda: self._give_up_loading(limit))
        else:
            text = "the script's top level is still running"
            self.timers.start("load", SLOW_START_SECONDS, lambda: self.picture.note(text))

    def _give_up_loading(self, limit: float) -> None:
        if self.stage.next is not None:
            self.stage.next.worker.kill(f"its top level took longer than {limit:g} s")

    def on_ready(self, cast: Cast, loaded: m.Loaded) -> None:
        """The next worker has executed the script's top level: begin, or ask the current one to make room."""
        self.timers.cancel("load")
        cast.version = self.saves.learn(cast.version, loaded.files, loaded.wanted)
        if self.stage.current is None:
            self._begin()
        elif self.picture.state != "stopping":
            self.stage.current.worker.send(m.Ask("leave"))
            self.go("leave")

    def on_unready(self, cast: Cast, why: m.LoadFailed | Death) -> None:
        """New code could not be loaded: the old code goes on, if there is any."""
        self.timers.cancel("load")
        if isinstance(why, m.LoadFailed):
            self.saves.learn(cast.version, why.files, why.wanted)
            self.picture.fail("load", why.text, why.path, why.line)
        else:
            self.picture.fail("load", f"the new code was not loaded: it {describe(why)}\n", str(cast.version.script), 0)
        if self.stage.current is not None:
            return
        if self.is_quitting:
            self.end(0)
        elif self._fallback is not None:
            version, self._fallback = self._fallback, None  # once: if that cannot be loaded any more either, it failed
            self.picture.note("going on with the code from before")
            self.load(version)
        elif isinstance(why, Death) and not why.reason:
            self._restart_later(describe(why), cast)
        elif isinstance(why, m.LoadFailed) and why.unusable and not self._options.waits_for_save:
            self.end(2)
        else:
            self.go("failed")

    def on_stayed(self) -> None:
        """The worker cannot hand over its state and goes on, rather than lose it."""
        self.stage.drop_next("the old code could not hand over its state")
        self.timers.cancel("load")
        self.go("stayed")

    def on_applied(self, cast: Cast) -> None:
        """The worker has passed its first checkpoint, or waits for calls: its code is good."""
        self.good = cast.version
        self.picture.mend()
        if cast.saved_at is not None:
            self.picture.reloaded(cast.version.number, time.monotonic() - cast.saved_at)

    def _begin(self) -> None:
        """Have the next worker run ``torch()`` from the newest snapshot."""
        cast = self.stage.promote()
        self._fallback = None
        newest = self.state.newest
        self.picture.begin_worker(cast.version.number, newest.checkpoints if newest is not None else 0)
        message, descriptors = self.state.start_message(
            cast.worker.number, paused=self.starts_paused, is_first=not self._has_begun
        )
        self._has_begun = True
        cast.worker.send(message, descriptors)
        for job in self.jobs.unfinished():
            cast.worker.send(job.message())
        if self.is_quitting:
            cast.worker.send(m.Ask("stop"))
        self.go("start")

    # --- the end of a worker ---

    def answered(self) -> None:
        """The worker has said where it is."""
        self._waits.answered()

    def on_script(self, cast: Cast, event: WorkerEvent) -> None:
        """The worker that runs the script has said something."""
        self._reports.take(cast, event)

    def on_gone(self, cast: Cast, death: Death) -> None:
        """The worker that ran the script is dead: go on as it left."""
        self.state.forget_worker(cast.worker.number)
        self._executions.drop(cast.worker)
        self.timers.cancel("frozen")
        then, self._then = self._then, None
        if self.ended.done():
            return
        if then is not None:
            self.jobs.worker_left()
            then()
        elif cast.left is None:
            self._on_crash(cast, death)
        else:
            self._on_left(cast, cast.left)

    def replace(self, reason: str, then: Callable[[], None]) -> None:
        """Kill the worker that runs the script, then do *then*."""
        self.timers.cancel("restart")
        self.timers.cancel("load")
        self.stage.drop_next(reason)
        if self.stage.current is None:
            then()
        else:
            self._then = then
            self.stage.current.worker.kill(reason)

    def _on_left(self, cast: Cast, left: m.Left) -> None:
        if left.reason == "reload":
            self.jobs.worker_left()
            self._go_on(cast.version)
        elif left.reason == "exit":
            self.end(left.status)
        elif left.reason == "error":
            self.picture.fail("script", left.text, left.path, left.line)
            self.jobs.worker_left()
            if self.stage.next is not None and not self.is_quitting:
                self.go("start")
                self._go_on(cast.version)  # newer code is on its way already
            else:
                self.go("failed")
        else:
            self.stage.drop_next("the run has ended")
            self.jobs.fail_all(f"the run is {left.reason}")
            self.go("finished" if left.reason == "done" else "halted")

    def _go_on(self, version: Version) -> None:
        """Begin with the worker that is ready, wait for the one that is being made ready, or make *version* ready."""
        if self.stage.next is None:
            self.load(version)
        elif self.stage.next.is_loaded:
            self._begin()
        else:
            self._fallback = version

    def _on_crash(self, cast: Cast, death: Death) -> None:
        how = describe(death)
        kills = system.count_oom_kills()
        if death.status == -signal.SIGKILL and not death.reason and kills > self._oom_kills:
            how += ": the kernel had run out of memory"
        self._oom_kills = kills
        self.picture.fail("worker", f"the worker (process {cast.worker.pid}) {how}\n", str(cast.version.script), 0)
        self.jobs.worker_died(how)
        if self.is_quitting:
            self.end(130 if self.interrupts > 1 else 1)
        elif self.stage.next is not None:
            self.go("start")
            self._go_on(cast.version)
        else:
            self._restart_later(how, cast)

    def _restart_later(self, how: str, cast: Cast) -> None:
        delay = self.restarts.died(self.picture.checkpoints, self.picture.stride, has_kept=cast.has_kept)
        if delay is None:
            self._fail(f"given up after several deaths in a row without progress; the last worker {how}")
            return
        newest = self.state.newest
        source = f"from the snapshot at checkpoint {newest.checkpoints}" if newest else "from the beginning"
        self.picture.note(f"starting again {source} in {delay:.1f} s")
        self.go("start")
        self.timers.start("restart", delay, lambda: self.load(cast.version))

    def _fail(self, text: str) -> None:
        self.picture.fail("worker", text + "\n", str(self._options.script), 0)
        self.go("failed")

    # --- saves ---

    def running_version(self) -> Version | None:
        """The version that a save is compared with."""
        cast = self.stage.next or self.stage.current
        return cast.version if cast is not None else None

    def on_new_code(self, files: list[Path], saved_at: float) -> None:
        """Load what was saved beside what runs."""
        if self.ended.done():
            return
        self.picture.publish("saved", files=[str(path) for path in files])
        self.restarts.forgive()
        if self.picture.state == "stopped":
            self.picture.note("saved; the run is stopped, r goes on with the new code")
        elif self.picture.state not in ("stopping", "done"):
            self.reload(saved_at)

    def reload(self, saved_at: float) -> None:
        """Load the newest code, in place of newer code that is being loaded."""
        self.load(self._code.version(), saved_at)

    def on_same_code(self) -> None:
        """A mistake that was shown is mended, by going back to what runs."""
        if self.picture.error is not None and self.picture.error["kind"] in ("syntax", "load"):
            self.picture.mend()

    def on_broken_code(self, problem: CodeBroken) -> None:
        """Show it; what runs goes on."""
        self.picture.fail("syntax", problem.text, str(problem.path), problem.line)


def describe(death: Death) -> str:
    """Say how a process ended."""
    if death.reason:
        return f"was ended: {death.reason}"
    if death.status < 0:
        try:
            name = signal.Signals(-death.status).name
        except ValueError:
            name = f"signal {-death.status}"
        return f"was killed by {name}"
    return f"ended by itself with exit code {death.status}"
