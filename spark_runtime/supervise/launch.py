"""Starts a run with everything around it: the state folder and its lock, the control socket, signals, the view."""

import asyncio
import os
import secrets
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from spark_runtime.config import RunOptions
from spark_runtime.errors import RequestRefused, StoreError
from spark_runtime.supervise import runtime_folder
from spark_runtime.supervise.code import check_script
from spark_runtime.supervise.control import ControlSocket
from spark_runtime.supervise.preload import PreloadList
from spark_runtime.supervise.run import Run
from spark_runtime.supervise.store import RunFolder, StateFolder, StoreBusy
from spark_workers import system


class View(Protocol):
    """Whatever shows a run to a person or a program."""

    def open(self, run: Run) -> None:
        """Show *run* from now on."""

    async def aclose(self) -> None:
        """Show what is left to show, then stop."""


@dataclass
class _Disk:
    """What a run has on disk; nothing when the script's folder cannot be written."""

    state: StateFolder | None = None
    run: RunFolder | None = None


def launch(options: RunOptions, view: View) -> int:
    """Run a script to its end; return the exit code.

    Raises:
        ScriptUnusable, StoreError: It cannot be run, or another run holds it. Nothing was started.
    """
    script, notes = check_script(options.script)
    system.adopt_orphans()  # this process is the run's alone: whatever falls to it was started by the script
    return asyncio.run(_launch(replace(options, script=script, program=str(options.script)), view, notes))


async def _launch(options: RunOptions, view: View, notes: list[str]) -> int:
    run_id = secrets.token_hex(4)
    disk = _Disk()
    try:
        try:
            disk.state = StateFolder.open(options.script)
            disk.run = _run_folder(disk.state, options, run_id)
            disk.state.announce(disk.run.run_id)
        except StoreBusy:
            raise
        except StoreError as problem:
            if options.resume:
                raise
            notes.append(f"{problem}; this run keeps its state in memory only")
        return await _run(options, view, notes, disk, disk.run.run_id if disk.run else run_id)
    finally:
        if disk.state is not None:
            disk.state.close()


async def _run(options: RunOptions, view: View, notes: list[str], disk: _Disk, run_id: str) -> int:
    folder = disk.state.path if disk.state is not None else None
    preload = PreloadList(folder / "modules.json" if folder is not None else None)
    scratch = folder or Path(tempfile.gettempdir())
    run = Run(options, run_id, disk.run, preload, scratch)
    if options.resume and disk.run is not None and not disk.run.is_cleared():
        with disk.run.newest() as stored:
            run.state.resume(stored)
        run.picture.checkpoints = run.state.newest.checkpoints if run.state.newest else 0
    control = ControlSocket(run, runtime_folder.socket_path(run_id))
    description = runtime_folder.describe(run_id, str(options.script))
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: run.break_down(context))
    signals = _handle_signals(run)
    view.open(run)
    try:
        await control.open()
        _tell_start(run, disk, options, notes)
        return await run.run()
    finally:
        signals()
        await control.aclose()
        description.unlink(missing_ok=True)
        await view.aclose()


def _run_folder(state: StateFolder, options: RunOptions, run_id: str) -> RunFolder:
    return state.resume(options.resume_from) if options.resume else state.new_run(run_id)


def _tell_start(run: Run, disk: _Disk, options: RunOptions, notes: list[str]) -> None:
    for note in notes:
        run.picture.warn(note)
    if disk.state is not None and disk.state.warning:
        run.picture.warn(disk.state.warning)
    run.picture.publish("start", run=run.picture.run_id, script=str(options.script), pid=os.getpid())
    if options.resume:
        run.picture.note(
            f"going on from the snapshot at checkpoint {run.picture.checkpoints} of run {run.picture.run_id}"
        )
    elif disk.state is not None:
        others = [each for each in disk.state.unfinished() if each.run_id != run.picture.run_id]
        if others:
            newest = others[0]
            size = sum(each.size_bytes for each in others) / 1e6
            run.picture.note(
                f"{len(others)} unfinished run{'s' if len(others) > 1 else ''} of this script ({size:.0f} MB) kept in "
                f"{disk.state.path}; --resume --from {newest.run_id} goes on from checkpoint {newest.step}"
            )


def _handle_signals(run: Run) -> Callable[[], None]:
    """Have signals ask the run; return the function that ends that."""
    loop = asyncio.get_running_loop()
    actions: dict[int, Callable[[], None]] = {
        signal.SIGINT: run.requests.interrupt,
        signal.SIGTERM: run.requests.quit,
        signal.SIGHUP: lambda: _reload(run),
    }
    for number, action in actions.items():
        loop.add_signal_handler(number, action)

    def end() -> None:
        for number in actions:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)  # an impatient Ctrl-C must not spoil an end that is all but reached

    return end


def _reload(run: Run) -> None:
    try:
        run.requests.reload()
    except RequestRefused as problem:
        run.picture.warn(str(problem))
