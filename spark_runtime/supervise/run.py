"""One run of one script: the supervisor of ``spark run``. Read this first.

`Run` puts the parts together; each of them has one ledger and knows little of the others:

    course      what happens next: begin, reload, restart, end          (lifecycle: the table of states)
    stage       which worker runs the script, which one is made ready   (worker, nursery: processes)
    reports     what the script's worker says
    requests    what people and programs ask for                        (rpc, control: how they ask)
    saves       which saved files make a difference                     (watcher, code)
    state       the newest snapshot, in memory and on disk              (segments, store)
    jobs        calls of exposed functions, over reloads and crashes
    executions  calls that the script makes of models
    picture     what clients see

Everything happens on one asyncio loop, one event at a time; nothing here blocks.
"""

import traceback
from pathlib import Path
from typing import Any

from spark_runtime.config import RunOptions
from spark_runtime.supervise.code import Code
from spark_runtime.supervise.course import Course
from spark_runtime.supervise.executions import Executions
from spark_runtime.supervise.jobs import Jobs
from spark_runtime.supervise.nurseries import Nurseries
from spark_runtime.supervise.picture import Picture
from spark_runtime.supervise.preload import PreloadList
from spark_runtime.supervise.reports import Reports
from spark_runtime.supervise.requests import Requests
from spark_runtime.supervise.saves import Saves
from spark_runtime.supervise.segments import Segments
from spark_runtime.supervise.stage import Stage
from spark_runtime.supervise.state import RunState
from spark_runtime.supervise.store import RunFolder
from spark_runtime.supervise.waits import Waits
from spark_runtime.supervise.worker import Worker

BROKEN = 70  # the exit code of an error of ours


class Run:
    """Runs one script until it has ended; see `run`."""

    def __init__(
        self, options: RunOptions, run_id: str, folder: RunFolder | None, preload: PreloadList, scratch: Path
    ) -> None:
        self._preload = preload
        self.picture = Picture(run_id, str(options.script))
        self.jobs = Jobs(self.picture.job_changed)
        self.state = RunState(Segments(scratch), folder, self.picture.warn)
        self._nurseries = Nurseries(preload.modules, preload.left_out, self._leave_out)
        self._code = Code(options.script)
        self._executions = Executions(options.models, self.picture.note)
        self._course = Course(options, self._code, self.picture, self.jobs, self.state, self._executions)
        self._saves = Saves(
            self._course, self._code, watch=options.watch, poll=options.poll, on_trouble=self.picture.warn
        )
        reports = Reports(self._course, self._saves, self._preload, self._nurseries, self._executions)
        self._stage = Stage(self._course, self._nurseries, self._on_output, options.program, options.arguments)
        self._waits = Waits(self._stage, self.picture)
        self._course.join(self._stage, self._saves, reports, self._waits)
        self.requests = Requests(self._course, self._code)

    async def run(self) -> int:
        """Run the script to its end; return the exit code of the command."""
        try:
            self._course.begin()
            self._saves.watch()
            self._waits.tick()
            return await self._course.ended
        finally:
            await self._close()

    def break_down(self, context: dict[str, Any]) -> None:
        """Something of ours went wrong: say so and end, in place of going on in an unknown state."""
        problem = context.get("exception")
        text = "".join(traceback.format_exception(problem)) if problem is not None else f"{context.get('message')}\n"
        self.picture.fail("internal", text, "", 0)
        self._course.end(BROKEN)

    def hold_output(self, held: bool) -> None:
        """Stop or go on reading what the script prints, while nobody takes it."""
        for worker in self._stage.workers():
            worker.hold_output(held)

    async def _close(self) -> None:
        self._waits.close()
        self._course.timers.close()
        await self._saves.aclose()
        for worker in self._stage.workers():
            worker.kill("the run is over")
        await self._executions.aclose()
        await self._nurseries.aclose()
        self.jobs.fail_all("the run is over")
        await self.state.aclose()

    def _on_output(self, worker: Worker, stream: str, text: bytes) -> None:
        current = self._stage.current
        is_next = current is not None and current.worker is not worker
        self.picture.publish("output", stream=stream, data=text, next=is_next)

    def _leave_out(self, package: str) -> None:
        self._preload.leave_out(package)
        self.picture.warn(f"{package} is not imported ahead, because forked processes hang after it; each worker does")
