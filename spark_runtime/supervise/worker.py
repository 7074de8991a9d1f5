"""One script worker as the supervisor sees it: a process, a channel, two pipes, a bell."""

import asyncio
import mmap
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass

from spark_runtime.processes.channel import LoopChannel
from spark_runtime.processes.nursery import Process, shared_page
from spark_runtime.supervise.nurseries import SCRIPT_WORKER, Nurseries
from spark_runtime.supervise.output import OutputPipe
from spark_workers.messages import Message

ENTRY = f"{SCRIPT_WORKER}:start"


@dataclass(frozen=True, slots=True)
class Death:
    """The process is gone, everything it sent has been read. A negative status is minus the signal."""

    status: int
    reason: str = ""  # why we ended it, when we did


@dataclass(frozen=True, slots=True)
class Frozen:
    """The kernel reports the process stopped, or going on again."""

    stopped: bool


Event = Message | Death | Frozen


class Worker:
    """A script worker. *on_event* gets its messages and, last, its `Death`; *on_output* gets what the script prints."""

    def __init__(
        self,
        number: int,
        nurseries: Nurseries,
        on_event: Callable[["Worker", Event], None],
        on_output: Callable[["Worker", str, bytes], None],
    ) -> None:
        self.number = number
        self._on_event = on_event
        self._reason = ""
        self._rings = 0
        self.is_alive = True
        ours, theirs = socket.socketpair()
        bell = shared_page()
        self._bell = mmap.mmap(bell, mmap.PAGESIZE)
        out_read, out_write = os.pipe()
        err_read, err_write = os.pipe()
        self._channel = LoopChannel(asyncio.get_running_loop(), ours, self._message, self._closed)
        self._pipes = [
            OutputPipe(out_read, lambda text: on_output(self, "stdout", text)),
            OutputPipe(err_read, lambda text: on_output(self, "stderr", text)),
        ]
        self._process = Process(number, self._exited, lambda stopped: self._on_event(self, Frozen(stopped)))
        nurseries.start(self._process, ENTRY, [theirs.detach(), bell, out_write, err_write])

    @property
    def pid(self) -> int | None:
        """The process, once it is there."""
        return self._process.pid

    def send(self, message: Message, descriptors: list[int] | None = None) -> None:
        """Send a message; the script's next checkpoint takes it. Descriptors are taken over."""
        self._channel.send(message, descriptors or [])

    def ring(self) -> None:
        """Have the script's next checkpoint look up. The first byte is ours, the second the side thread's there."""
        self._rings = (self._rings + 1) % 256
        self._bell[0] = self._rings

    def interrupt(self) -> None:
        """Raise KeyboardInterrupt in the script."""
        self._process.send_signal(signal.SIGINT)

    def kill(self, reason: str) -> None:
        """End the process at once; *reason* is part of its `Death`."""
        if self.is_alive:
            self._reason = self._reason or reason
            self._process.kill()

    def hold_output(self, held: bool) -> None:
        """Stop or go on reading what the script prints."""
        for pipe in self._pipes:
            pipe.pause(held)

    def _message(self, message: Message, descriptors: list[int]) -> None:
        for descriptor in descriptors:  # workers have no reason to send any
            os.close(descriptor)
        self._on_event(self, message)

    def _closed(self, reason: str) -> None:
        """End-of-file is not death yet; a channel that broke is the end of a worker that cannot be trusted."""
        if reason:
            self.kill(f"it broke the protocol: {reason}")

    def _exited(self, status: int) -> None:
        self._channel.drain()
        self._channel.close()
        for pipe in self._pipes:
            pipe.drain()
        self._bell.close()
        self.is_alive = False
        self._on_event(self, Death(status, self._reason))
