"""What the worker that runs the script says, and what is done about each of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from spark_runtime.errors import ProtocolViolated, RequestRefused
from spark_runtime.supervise.executions import Executions
from spark_runtime.supervise.nurseries import Nurseries
from spark_runtime.supervise.preload import PreloadList
from spark_runtime.supervise.saves import Saves
from spark_runtime.supervise.stage import Cast
from spark_runtime.supervise.worker import Event, Frozen
from spark_workers import messages as m

if TYPE_CHECKING:
    from spark_runtime.supervise.course import Course

FROZEN_SECONDS = 1.0


class Reports:
    """One method for each message. A message that is not in the table, or does not fit, ends the worker."""

    def __init__(
        self, course: Course, saves: Saves, preload: PreloadList, nurseries: Nurseries, executions: Executions
    ) -> None:
        self._course = course
        self._saves = saves
        self._preload = preload
        self._nurseries = nurseries
        self._picture = course.picture
        self._state = course.state
        jobs = course.jobs
        self._table: dict[type, Callable[[Cast, Any], None]] = {
            m.Entered: self._entered,
            m.Flush: self._flush,
            m.Exposed: lambda cast, event: self._picture.exposed(event.functions, event.controls),
            m.Imported: self._imported,
            m.NeedSegment: self._need_segment,
            m.Snapshot: self._snapshot,
            m.Began: lambda cast, event: jobs.began(event.id),
            m.Returned: lambda cast, event: jobs.returned(event),
            m.Raised: lambda cast, event: jobs.raised(event),
            m.Execute: lambda cast, event: executions.execute(cast.worker, event),
            m.StopExecute: lambda cast, event: executions.stop(cast.worker, event),
            m.Note: lambda cast, event: self._picture.note(event.text, event.level),
            m.Stayed: lambda cast, event: course.on_stayed(),
            m.Unread: self._unread,
            m.Wish: self._wish,
            m.Here: self._here,
            m.Left: self._left,
            Frozen: self._frozen,
        }

    def take(self, cast: Cast, event: Event) -> None:
        """Act on one message."""
        try:
            self._table[type(event)](cast, event)
        except (KeyError, ValueError, ProtocolViolated) as problem:
            cast.worker.kill(f"it broke the protocol with {type(event).__name__}: {problem}")

    def _entered(self, cast: Cast, event: m.Entered) -> None:
        if event.state == "running":
            self._course.go("running")
        elif event.state == "idle":
            self._course.go("idle")
        elif event.state == "paused":
            self._course.go("paused")
        else:
            raise ProtocolViolated(f"a worker cannot be {event.state!r}")

    def _flush(self, cast: Cast, event: m.Flush) -> None:
        self._picture.flushed(event.checkpoints, event.place, event.values, event.loops)
        if event.series:
            self._picture.publish("series", points=event.series)
        if not cast.has_run:
            cast.has_run = True
            self._course.on_applied(cast)

    def _imported(self, cast: Cast, event: m.Imported) -> None:
        cast.version = self._saves.learn(cast.version, event.files, [])
        if event.installed:
            self._preload.save(event.installed)
            self._nurseries.prepare(self._preload.modules)

    def _need_segment(self, cast: Cast, event: m.NeedSegment) -> None:
        try:
            segment = self._state.segment_for(cast.worker.number, event.size)
        except OSError as problem:
            self._picture.warn(f"no room for a snapshot of {event.size} bytes: {problem}")
            cast.worker.send(m.Segment(0, 0))
        else:
            cast.worker.send(m.Segment(segment.number, segment.size), [os.dup(segment.descriptor)])

    def _snapshot(self, cast: Cast, event: m.Snapshot) -> None:
        kept = self._state.commit(cast.worker.number, event)
        cast.has_kept = True
        self._picture.checkpoints = max(self._picture.checkpoints, kept.checkpoints)
        seconds = round(event.seconds, 4)
        self._picture.publish("snapshot", checkpoints=kept.checkpoints, bytes=kept.nbytes, seconds=seconds)

    def _unread(self, cast: Cast, event: m.Unread) -> None:
        for key, reason in event.keys.items():
            self._picture.warn(f"the state of {key!r} cannot be read by this code and is kept aside: {reason}")
        self._state.keep_aside("; ".join(f"{key}: {reason}" for key, reason in event.keys.items()))

    def _wish(self, cast: Cast, event: m.Wish) -> None:
        try:
            if event.what == "pause":
                self._course.go("pause")
            elif event.what == "resume":
                self._course.go("resume")
            elif event.what == "step":
                self._course.go("step")
            elif event.what == "stop":
                self._course.stop()
        except RequestRefused as problem:
            self._picture.note(f"the script's controller: {problem}")
        else:
            self._course.starts_paused = event.what in ("pause", "step")

    def _here(self, cast: Cast, event: m.Here) -> None:
        self._course.answered()
        age = time.monotonic() - self._picture.last_flush
        where = f"it is at {event.place}" if event.place else "it is not in code of its own"
        hint = "r restarts from the last snapshot"
        self._picture.note(f"{self._picture.state}: no checkpoint for {age:.0f} s; {where} ({hint})")

    def _left(self, cast: Cast, event: m.Left) -> None:
        cast.left = event

    def _frozen(self, cast: Cast, event: Frozen) -> None:
        timers = self._course.timers
        if event.stopped:
            reason = "it was stopped (SIGSTOP) and did not go on"
            timers.start("frozen", FROZEN_SECONDS, lambda: cast.worker.kill(reason))
        else:
            timers.cancel("frozen")
