"""What people and programs ask of a run: from the keyboard, the control socket, the page."""

import time
from typing import Any

from spark_runtime.errors import RequestRefused
from spark_runtime.supervise.code import Code, Version
from spark_runtime.supervise.course import Course
from spark_runtime.supervise.jobs import Job
from spark_workers import messages as m
from spark_workers.scripts.errors import SparkUsageError
from spark_workers.scripts.exposed import fitting


class Requests:
    """One method for each request.

    Every one raises `RequestRefused` where it makes no sense in the run's state.
    """

    def __init__(self, course: Course, code: Code) -> None:
        self._course = course
        self._code = code
        self._picture = course.picture

    def status(self) -> dict[str, Any]:
        """Return everything that is known of the run."""
        return self._picture.whole()

    def pause(self) -> None:
        """Pause at the next checkpoint."""
        self._course.go("pause")
        self._course.starts_paused = True
        self._tell(m.Ask("pause"))

    def resume(self) -> None:
        """Go on after a pause; after a stop or an error, start again from the last snapshot."""
        if self._picture.state in ("stopped", "error"):
            self._course.starts_paused = False
            self.restart()
            return
        self._course.go("resume")
        self._course.starts_paused = False
        self._tell(m.Ask("resume"))

    def step(self, count: int = 1) -> None:
        """Run *count* checkpoints, then pause."""
        if not isinstance(count, int) or not 1 <= count < 2**63:
            raise RequestRefused(f"cannot step {count!r} checkpoints: give a number from 1 on")
        self._course.go("step")
        self._course.starts_paused = True
        self._tell(m.Ask("step", count))

    def stop(self) -> None:
        """Stop at the next checkpoint; the values are kept."""
        self._course.stop()

    def quit(self) -> None:
        """Stop, take the last snapshot, end the run."""
        self._course.quit()

    def reload(self) -> None:
        """Load the code again, as after a save; after a stop or an error this starts the script again."""
        if self._picture.state in ("stopping", "done"):
            raise RequestRefused(f"cannot reload: the run is {self._picture.state}")
        self._course.restarts.forgive()
        self._course.reload(time.monotonic())

    def restart(self) -> None:
        """Start again from the last snapshot, with the newest code, whatever the script is doing."""
        self._replace("restart", lambda: self._start_with(self._code.version()))

    def reset(self) -> None:
        """Forget every persisted value and start from the beginning; what was is kept aside on disk."""
        self._replace("reset", self._begin_anew)

    def back(self) -> None:
        """Go back to the last code that passed a checkpoint."""
        good = self._course.good
        if good is None:
            raise RequestRefused("cannot go back: no version of the code has passed a checkpoint yet")
        self._replace("go back", lambda: self._start_with(good))

    def interrupt(self) -> None:
        """Ctrl-C: the first quits, the second raises KeyboardInterrupt in the script, the third ends everything."""
        course = self._course
        course.interrupts += 1
        if course.interrupts == 1:
            course.quit()
        elif course.interrupts == 2 and course.stage.current is not None:
            course.stage.current.worker.interrupt()
        else:
            course.end(130)

    def call(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> Job:
        """Call an exposed function."""
        if self._picture.state in ("stopping", "stopped", "done"):
            raise RequestRefused(f"cannot call {name}(): the run is {self._picture.state}")
        job = self._course.jobs.add(name, args, kwargs)
        if self._picture.state != "reloading":  # the worker that makes room is not given any more work
            self._tell(job.message())
        return job

    def cancel(self, job: str) -> None:
        """Cancel a call, at its next checkpoint if it has begun."""
        found = self._course.jobs.find(job)
        if found.answer.done():
            raise RequestRefused(f"cannot cancel {job}: it has ended")
        if not found.has_begun and (self._course.stage.current is None or self._picture.state == "reloading"):
            self._course.jobs.cancel(found)
        else:
            self._tell(m.CancelCall(job))

    def turn(self, control: str, value: Any) -> None:
        """Set a control of the script."""
        if self._course.stage.current is None or self._picture.state in ("reloading", "stopping"):
            raise RequestRefused(f"cannot set {control!r}: the run is {self._picture.state}")
        if control not in self._picture.controls:
            known = ", ".join(self._picture.controls) or "none"
            raise RequestRefused(f"there is no control {control!r}; there is {known}")
        try:
            fitting(control, value, self._picture.controls[control])
        except SparkUsageError as problem:
            raise RequestRefused(str(problem)) from problem
        self._tell(m.Turn(control, value))

    def _tell(self, message: m.Message) -> None:
        if self._course.stage.current is not None:
            try:
                self._course.stage.current.worker.send(message)
            except m.MessageBroken as problem:
                raise RequestRefused(f"it cannot be sent: {problem}") from problem

    def _replace(self, what: str, then: Any) -> None:
        if self._picture.state == "done":
            raise RequestRefused(f"cannot {what}: the run is done")
        self._course.restarts.forgive()
        self._course.replace(f"somebody asked to {what}", then)

    def _start_with(self, version: Version) -> None:
        self._course.go("start")
        self._course.load(version)

    def _begin_anew(self) -> None:
        self._course.state.reset("reset was asked for")
        self._picture.checkpoints = 0
        self._start_with(self._code.version())
