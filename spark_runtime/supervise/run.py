"""One run of one script: the supervisor of ``spark run``. Read this first, then `stage`, `lifecycle` and `state`.

`Run` translates between ledgers that know nothing of each other: the stage (which worker runs what), the lifecycle
(which state leads where), the state (snapshots), the jobs (calls and answers) and the picture (what clients see).
Everything happens on one asyncio loop, one event at a time; nothing here blocks.
"""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from spark_runtime.config import RunOptions
from spark_runtime.errors import NurseryDied, ProtocolViolated, RequestRefused
from spark_runtime.supervise.code import Code, CodeBroken, Version
from spark_runtime.supervise.jobs import Job, Jobs
from spark_runtime.supervise.lifecycle import LIVE, Event, State, next_state
from spark_runtime.supervise.nursery import Nurseries
from spark_runtime.supervise.picture import Picture
from spark_runtime.supervise.preload import PreloadList
from spark_runtime.supervise.restarts import Restarts
from spark_runtime.supervise.segments import Segments
from spark_runtime.supervise.stage import Cast, Stage
from spark_runtime.supervise.state import RunState
from spark_runtime.supervise.store import RunFolder
from spark_runtime.supervise.watcher import Watcher
from spark_runtime.supervise.worker import Death, Frozen, Worker
from spark_runtime.supervise.worker import Event as WorkerEvent
from spark_workers import messages as m
from spark_workers import system

TICK_SECONDS = 1 / 30
FROZEN_SECONDS = 1.0
WHERE_SECONDS = 10.0
NATIVE_SECONDS = 1.0


class Run:
    """Runs one script until it has ended; see `run`."""

    def __init__(
        self, options: RunOptions, run_id: str, folder: RunFolder | None, preload: PreloadList, scratch: Path
    ) -> None:
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = self._loop.create_future()
        self._code = Code(options.script)
        self._preload = preload
        self._restarts = Restarts()
        self._good: Version | None = None  # the last version that passed a checkpoint
        self._then: Callable[[], None] | None = (
            None  # what to do when the current worker is gone, in place of the usual
        )
        self._is_quitting = False
        self._interrupts = 0
        self._starts_paused = False
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._saving: asyncio.Future[None] | None = None
        self._saved_at: float | None = None
        self._failed_calls = 0
        self._oom_kills = system.count_oom_kills()
        self.picture = Picture(run_id, str(options.script))
        self.jobs = Jobs(self._on_job)
        self.state = RunState(Segments(scratch), folder, lambda text: self.note(text, "warning"))
        self._planned: set[Job] = set()
        self._nurseries = Nurseries(preload.modules, preload.left_out, self._leave_out)
        self._stage = Stage(self, self._nurseries, self._on_output, str(options.script), options.arguments)
        self._watcher = Watcher(self._on_saved, poll=options.poll, on_degraded=lambda text: self.note(text, "warning"))

    # --- the life of a run ---

    async def run(self) -> int:
        """Run the script to its end; return the exit code of the command."""
        for call in self._options.calls:
            self._planned.add(self.jobs.add(call.name, list(call.args), call.kwargs))
        self._load(self._code.version())
        self._watch()
        self._tick()
        try:
            return await self._ended
        finally:
            await self._close()

    async def _close(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        await self._watcher.aclose()
        for worker in self._stage.workers():
            worker.kill("the run is over")
        await self._nurseries.aclose()
        self.jobs.fail_all("the run is over")
        await self.state.aclose()

    def _end(self, code: int) -> None:
        if not self._ended.done():
            self._ended.set_result(code or (1 if self._failed_calls else 0))

    def _go(self, event: Event) -> None:
        """Let *event* happen to the run, and tell if that changes its state.

        Raises:
            RequestRefused, ProtocolViolated: It cannot happen now.
        """
        after = next_state(self.picture.state, event)  # type: ignore[arg-type]
        if after != self.picture.state:
            self.picture.state = after
            self.picture.publish("state", state=after, checkpoints=self.picture.checkpoints)
            self._watch_over_wait(after)
        self._decide(after)

    def _decide(self, state: State) -> None:
        """End the run where its state and its options say so."""
        if state == "done":
            if self.state.folder is not None:
                self.state.folder.finish()
            self._end(0)
        elif state == "error" and (self._is_quitting or not self._options.waits_for_save):
            self._end(1)
        elif state == "stopped" and (self._is_quitting or self._options.exit_when_called):
            self._end(0)
        elif state == "idle" and self._options.exit_when_called and not self._planned:
            self.quit()

    # --- the stage ---

    def _load(self, version: Version) -> None:
        self._cancel("restart")
        try:
            cast = self._stage.load(version)
        except NurseryDied as problem:
            self._fail("worker", str(problem))
            return
        limit = self._options.load_seconds
        if self._stage.current is not None:
            self._later("load", limit, lambda: cast.worker.kill(f"its top level took longer than {limit:g} s"))
        else:
            self._later("load", WHERE_SECONDS, lambda: self.note("the script's top level is still running"))

    def on_ready(self, cast: Cast, loaded: m.Loaded) -> None:
        """The next worker has executed the script's top level: begin, or ask the current one to make room."""
        self._cancel("load")
        sources = self._code.learn(loaded.files, loaded.wanted)
        cast.version = _with(cast.version, sources)
        self._watch()
        if self._stage.current is None:
            self._begin()
        elif self.picture.state != "stopping":
            self._stage.current.worker.send(m.Ask("leave"))
            self._go("leave")

    def on_unready(self, cast: Cast, why: m.LoadFailed | Death) -> None:
        """New code could not be loaded: the old code goes on, if there is any."""
        self._cancel("load")
        self._saved_at = None
        if isinstance(why, m.LoadFailed):
            self._code.learn(why.files, why.wanted)
            self._watch()
            self._tell_error("load", why.text, why.path, why.line)
        else:
            self._tell_error("load", f"the new code was not loaded: {_describe(why)}\n", str(cast.version.script), 0)
        if self._stage.current is not None:
            return
        if self._is_quitting:
            self._end(0)
        elif self._good is not None and self.picture.state == "reloading":
            self.note("going on with the code from before")
            self._load(self._good)
        elif isinstance(why, Death) and not why.reason:
            self._restart_later(_describe(why), cast.version)
        elif isinstance(why, m.LoadFailed) and why.unusable and not self._options.waits_for_save:
            self._end(2)
        else:
            self._go("failed")

    def _begin(self) -> None:
        """Have the next worker run ``torch()`` from the newest snapshot."""
        cast = self._stage.promote()
        self.picture.begin_worker()
        self.picture.version = cast.version.number
        reloaded = self.state.newest is not None
        message, descriptors = self.state.start_message(
            cast.worker.number, paused=self._starts_paused, reloaded=reloaded
        )
        cast.worker.send(message, descriptors)
        for job in self.jobs.unfinished():
            cast.worker.send(job.message())
        if self._is_quitting:
            cast.worker.send(m.Ask("stop"))
        self._go("start")

    def on_gone(self, cast: Cast, death: Death) -> None:
        """The worker that ran the script is dead: go on as it left."""
        self.state.forget_worker(cast.worker.number)
        self._cancel("frozen")
        then, self._then = self._then, None
        if self._ended.done():
            return
        if then is not None:
            self.jobs.worker_left()
            then()
        elif cast.left is None:
            self._on_crash(cast, death)
        else:
            self._on_left(cast, cast.left)

    def _on_left(self, cast: Cast, left: m.Left) -> None:
        if left.reason == "reload":
            self.jobs.worker_left()
            self._go_on(cast.version)
        elif left.reason == "exit":
            self._end(left.status)
        elif left.reason == "error":
            self._tell_error("script", left.text, left.path, left.line)
            self.jobs.worker_left()
            if self._stage.next is not None and not self._is_quitting:
                self._go_on(cast.version)  # newer code is on its way already
            else:
                self._go("failed")
        else:
            self._stage.drop_next("the run has ended")
            self.jobs.fail_all(f"the run is {left.reason}")
            self._go("finished" if left.reason == "done" else "halted")

    def _go_on(self, version: Version) -> None:
        """Begin with the worker that is ready, wait for the one that is being made ready, or make *version* ready."""
        if self._stage.next is None:
            self._load(version)
        elif self._stage.next.is_loaded:
            self._begin()

    def _on_crash(self, cast: Cast, death: Death) -> None:
        how = _describe(death)
        kills = system.count_oom_kills()
        if death.status == -signal.SIGKILL and not death.reason and kills > self._oom_kills:
            how += ": the kernel had run out of memory"
        self._oom_kills = kills
        self._tell_error("worker", f"the worker (process {cast.worker.pid}) {how}\n", str(cast.version.script), 0)
        self.jobs.worker_died(how)
        if self._is_quitting:
            self._end(130 if self._interrupts > 1 else 1)
        elif self._stage.next is not None:
            self._go("start")
            self._go_on(cast.version)
        else:
            self._restart_later(how, cast.version)

    def _restart_later(self, how: str, version: Version) -> None:
        delay = self._restarts.died(self.picture.checkpoints)
        if delay is None:
            self._fail("worker", f"given up after several deaths in a row without progress; the last worker {how}")
            return
        newest = self.state.newest
        source = f"from the snapshot at checkpoint {newest.checkpoints}" if newest else "from the beginning"
        self.note(f"starting again {source} in {delay:.1f} s")
        self._go("start")
        self._later("restart", delay, lambda: self._load(version))

    def _fail(self, kind: str, text: str) -> None:
        self._tell_error(kind, text + "\n", str(self._options.script), 0)
        self._go("failed")

    # --- what the script's worker says ---

    def on_script(self, cast: Cast, event: WorkerEvent) -> None:
        """Act on one message of the worker that runs the script."""
        try:
            self._handlers[type(event)](self, cast, event)
        except (KeyError, ProtocolViolated, ValueError) as problem:
            cast.worker.kill(f"it broke the protocol: {type(event).__name__}: {problem}")

    def _on_entered(self, cast: Cast, event: m.Entered) -> None:
        if event.state not in ("running", "idle", "paused"):
            raise ProtocolViolated(f"a worker cannot be {event.state!r}")
        self._go(event.state)  # type: ignore[arg-type]

    def _on_flush(self, cast: Cast, event: m.Flush) -> None:
        self.picture.flushed(event.checkpoints, event.place, event.values, event.loops)
        if event.series:
            self.picture.publish("series", points=event.series)
        if not cast.has_run:
            cast.has_run = True
            self._good = cast.version
            self._tell_applied(cast)

    def _tell_applied(self, cast: Cast) -> None:
        """The new code has passed its first checkpoint, or waits for calls."""
        if self.picture.error is not None:
            self.picture.error = None
            self.picture.publish("mended")
        if self._saved_at is not None:
            seconds, self._saved_at = time.monotonic() - self._saved_at, None
            self.picture.reloads += 1
            self.picture.publish("reload", version=cast.version.number, seconds=round(seconds, 4))

    def _on_exposed(self, cast: Cast, event: m.Exposed) -> None:
        self.picture.functions, self.picture.controls = event.functions, event.controls
        self.picture.publish("exposed", functions=event.functions, controls=event.controls)

    def _on_imported(self, cast: Cast, event: m.Imported) -> None:
        sources = self._code.learn(event.files, [])
        cast.version = _with(cast.version, sources)
        self._watch()
        if event.installed:
            self._preload.save(event.installed)
            self._nurseries.prepare(self._preload.modules)

    def _on_need_segment(self, cast: Cast, event: m.NeedSegment) -> None:
        try:
            segment = self.state.segment_for(cast.worker.number, event.size)
            cast.worker.send(m.Segment(segment.number, segment.size), [os.dup(segment.descriptor)])
        except OSError as problem:
            self.note(f"no room for a snapshot of {event.size} bytes: {problem}", "warning")
            cast.worker.send(m.Segment(0, 0))

    def _on_snapshot(self, cast: Cast, event: m.Snapshot) -> None:
        kept = self.state.commit(cast.worker.number, event)
        self.picture.publish(
            "snapshot", checkpoints=kept.checkpoints, bytes=kept.nbytes, seconds=round(event.seconds, 4)
        )

    def _on_unread(self, cast: Cast, event: m.Unread) -> None:
        for key, reason in event.keys.items():
            self.note(f"the state of {key!r} cannot be read by this code and is kept aside: {reason}", "warning")
        self.state.keep_aside("; ".join(f"{key}: {reason}" for key, reason in event.keys.items()))

    def _on_wish(self, cast: Cast, event: m.Wish) -> None:
        self._starts_paused = event.what == "pause" or (self._starts_paused and event.what == "stop")
        if event.what in ("pause", "resume", "step", "stop"):
            self._go(event.what)  # type: ignore[arg-type]

    def _on_here(self, cast: Cast, event: m.Here) -> None:
        self._cancel("native")
        age = time.monotonic() - self.picture.last_flush
        where = f"it is at {event.place}" if event.place else "it is not in code of its own"
        self.note(f"{self.picture.state}: no checkpoint for {age:.0f} s; {where} (r restarts from the last snapshot)")

    def _on_left_message(self, cast: Cast, event: m.Left) -> None:
        cast.left = event

    def _on_frozen(self, cast: Cast, event: Frozen) -> None:
        if event.stopped:
            self._later(
                "frozen", FROZEN_SECONDS, lambda: cast.worker.kill("it was stopped (SIGSTOP) and did not go on")
            )
        else:
            self._cancel("frozen")

    _handlers: dict[type, Callable[["Run", Cast, Any], None]] = {  # noqa: RUF012 - a table, never changed
        m.Entered: _on_entered,
        m.Flush: _on_flush,
        m.Exposed: _on_exposed,
        m.Imported: _on_imported,
        m.NeedSegment: _on_need_segment,
        m.Snapshot: _on_snapshot,
        m.Began: lambda run, cast, event: run.jobs.began(event.id),
        m.Returned: lambda run, cast, event: run.jobs.returned(event),
        m.Raised: lambda run, cast, event: run.jobs.raised(event),
        m.Note: lambda run, cast, event: run.note(event.text, event.level),
        m.Unread: _on_unread,
        m.Wish: _on_wish,
        m.Here: _on_here,
        m.Left: _on_left_message,
        Frozen: _on_frozen,
    }

    # --- saves ---

    def _watch(self) -> None:
        if self._options.watch:
            self._watcher.watch(self._code.watched())

    def _on_saved(self, changes: dict[Path, bytes | None]) -> None:
        saved_at = time.monotonic()
        self._code.saved(changes)  # at once: a later `_watch` must not name the content from before
        before = self._saving
        self._saving = asyncio.ensure_future(self._take_saved(changes, saved_at, before))

    async def _take_saved(
        self, changes: dict[Path, bytes | None], saved_at: float, before: "asyncio.Future[None] | None"
    ) -> None:
        """Look at what was saved, off the loop because a large file takes a while, one save after another."""
        if before is not None:
            await before
        runs = self._stage.next or self._stage.current
        try:
            await asyncio.to_thread(self._code.check)
            if runs is not None and not await asyncio.to_thread(self._code.differences, runs.version):
                self._on_same(runs)
                return
        except CodeBroken as problem:
            self._tell_error("syntax", problem.text, str(problem.path), problem.line)
            return
        finally:
            self._watch()
        self.picture.publish("saved", files=[str(path) for path in changes])
        self._restarts.forgive()
        if self.picture.state == "stopped":
            self.note("saved; the run is stopped, r goes on with the new code")
        elif self.picture.state not in ("stopping", "done") and not self._ended.done():
            self._saved_at = saved_at
            self._load(self._code.version())

    def _on_same(self, runs: Cast) -> None:
        """What was saved is what runs: a mistake that was shown is mended."""
        if self.picture.error is not None and self.picture.error["kind"] in ("syntax", "load"):
            self.picture.error = None
            self.picture.publish("mended")

    # --- requests, from the terminal, the page and other programs ---

    def pause(self) -> None:
        """Pause at the next checkpoint."""
        self._go("pause")
        self._starts_paused = True
        self._ask("pause")

    def resume(self) -> None:
        """Go on after a pause; after a stop or an error, start again from the last snapshot."""
        if self.picture.state in ("stopped", "error"):
            self._starts_paused = False
            self.restart()
            return
        self._go("resume")
        self._starts_paused = False
        self._ask("resume")

    def step(self, count: int = 1) -> None:
        """Run *count* checkpoints, then pause."""
        self._go("step")
        self._starts_paused = True
        self._ask("step", count)

    def stop(self) -> None:
        """Stop at the next checkpoint; the values are kept."""
        self._go("stop")
        self._stage.drop_next("stop was asked")
        self._cancel("restart")
        if self._stage.current is None:
            self._go("halted")
        else:
            self._ask("stop")

    def reload(self) -> None:
        """Load the code again, as after a save."""
        if self.picture.state in ("stopping", "done"):
            raise RequestRefused(f"cannot reload: the run is {self.picture.state}")
        self._restarts.forgive()
        self._saved_at = time.monotonic()
        self._load(self._code.version())

    def restart(self) -> None:
        """Start again from the last snapshot, with the newest code, whatever the script is doing."""
        if self.picture.state == "done":
            raise RequestRefused("cannot restart: the run is done")
        self._restarts.forgive()
        if self._stage.next is None or self._stage.current is None:
            self._replace("a restart was asked for", self._start_again)
        else:
            self._replace("a restart was asked for", lambda: self._restart_with(self._code.version()))

    def reset(self) -> None:
        """Forget every persisted value and start from the beginning; what was is kept aside on disk."""
        if self.picture.state == "done":
            raise RequestRefused("cannot reset: the run is done")
        self._restarts.forgive()

        def begin_anew() -> None:
            if self.state.newest is not None:
                self.state.keep_aside("reset was asked for")
            self.state.drop()
            self.picture.checkpoints = 0
            self._start_again()

        self._replace("a reset was asked for", begin_anew)

    def back(self) -> None:
        """Go back to the last code that passed a checkpoint."""
        good = self._good
        if good is None:
            raise RequestRefused("no version of the code has passed a checkpoint yet")
        self._replace("going back was asked for", lambda: self._restart_with(good))

    def call(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> Job:
        """Call an exposed function.

        Raises:
            RequestRefused: No worker will be there to serve it.
        """
        if self.picture.state in ("stopped", "done"):
            raise RequestRefused(f"cannot call {name}(): the run is {self.picture.state}")
        job = self.jobs.add(name, args, kwargs)
        if self._stage.current is not None and self.picture.state != "reloading":
            self._stage.current.worker.send(job.message())
        return job

    def cancel(self, job: str) -> None:
        """Cancel a call at its next checkpoint."""
        self.jobs.find(job)
        if self._stage.current is not None:
            self._stage.current.worker.send(m.CancelCall(job))

    def turn(self, control: str, value: Any) -> None:
        """Set a control of the script."""
        if control not in self.picture.controls:
            known = ", ".join(self.picture.controls) or "none"
            raise RequestRefused(f"there is no control {control!r}; there is {known}")
        if self._stage.current is not None:
            self._stage.current.worker.send(m.Turn(control, value))

    def quit(self) -> None:
        """Stop, take the last snapshot, end."""
        self._is_quitting = True
        if self.picture.state in ("stopped", "error", "done"):
            self._end(0)
        elif self.picture.state != "stopping":
            self.stop()

    def interrupt(self) -> None:
        """Ctrl-C: the first quits, the second raises KeyboardInterrupt in the script, the third ends everything."""
        self._interrupts += 1
        if self._interrupts == 1:
            self.quit()
        elif self._interrupts == 2 and self._stage.current is not None:
            self._stage.current.worker.interrupt()
        else:
            self._end(130)

    def _ask(self, what: str, count: int = 0) -> None:
        if self._stage.current is not None:
            self._stage.current.worker.send(m.Ask(what, count))

    def _replace(self, reason: str, then: Callable[[], None]) -> None:
        """Kill the worker that runs the script, then do *then*."""
        self._cancel("restart")
        self._stage.drop_next(reason)
        if self._stage.current is None:
            then()
        else:
            self._then = then
            self._stage.current.worker.kill(reason)

    def _start_again(self) -> None:
        self._restart_with(self._code.version())

    def _restart_with(self, version: Version) -> None:
        self._go("start")
        self._load(version)

    # --- time ---

    def _tick(self) -> None:
        """Have the running script look up now and then, so that it shows its values."""
        current = self._stage.current
        if current is not None and self.picture.state in ("starting", "running", "pausing"):
            current.worker.ring()
        self._later("tick", TICK_SECONDS, self._tick)

    def _later(self, name: str, seconds: float, act: Callable[[], None]) -> None:
        self._cancel(name)
        self._timers[name] = self._loop.call_later(seconds, act)

    def _cancel(self, name: str) -> None:
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()

    def _watch_over_wait(self, state: State) -> None:
        """Where the next checkpoint is waited for, say after a while what the script is doing in place of one."""
        self._cancel("where")
        if state in ("pausing", "stopping", "reloading"):
            self._later("where", WHERE_SECONDS, lambda: self._ask_where(state))

    def _ask_where(self, state: State) -> None:
        if self._stage.current is None or self.picture.state != state:
            return
        self._stage.current.worker.send(m.Where())
        text = f"{state}: no checkpoint comes and the script does not answer; it is stuck in native code, or frozen"
        self._later("native", NATIVE_SECONDS, lambda: self.note(f"{text} (r restarts from the last snapshot)"))
        self._later("where", 3 * WHERE_SECONDS, lambda: self._ask_where(state))

    # --- telling ---

    def note(self, text: str, level: str = "info") -> None:
        """Tell the user one line."""
        self.picture.publish("note", level=level, text=text)

    def _tell_error(self, kind: str, text: str, path: str, line: int) -> None:
        self.picture.error = {"kind": kind, "text": text, "file": path, "line": line}
        self.picture.publish("error", **self.picture.error)

    def _on_output(self, worker: Worker, stream: str, text: bytes) -> None:
        current = self._stage.current
        is_next = current is not None and current.worker is not worker
        self.picture.publish("output", stream=stream, data=text, next=is_next)

    def hold_output(self, held: bool) -> None:
        """Stop or go on reading what the script prints, while nobody takes it."""
        for worker in self._stage.workers():
            worker.hold_output(held)

    def _on_job(self, job: Job, step: str) -> None:
        fields: dict[str, Any] = {"id": job.id, "name": job.name, "step": step}
        if step == "returned":
            fields["result"] = job.answer.result()
        elif step == "raised":
            problem = job.answer.exception()
            fields |= {"error": str(problem), "text": getattr(problem, "text", "")}
        self.picture.publish("job", **fields)
        if step in ("returned", "raised") and job in self._planned:
            self._planned.discard(job)
            self._failed_calls += step == "raised"
            if not self._planned and self._options.exit_when_called and not self._is_quitting:
                self._loop.call_soon(self.quit)

    def _leave_out(self, package: str) -> None:
        self._preload.leave_out(package)
        self.note(
            f"{package} cannot be imported ahead: forked processes hang after it; it is imported by each worker",
            "warning",
        )

    def is_live(self) -> bool:
        """Tell whether a worker runs the script, or is about to."""
        return self.picture.state in LIVE


def _with(version: Version, imported: Mapping[Path, bytes]) -> Version:
    """Return *version* with the files that its worker has imported since; what it was given stays as it was."""
    return replace(
        version, sources={**version.sources, **{k: v for k, v in imported.items() if k not in version.sources}}
    )


def _describe(death: Death) -> str:
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
