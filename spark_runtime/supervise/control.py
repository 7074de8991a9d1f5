"""The control socket: a JSON-RPC request a line, an answer a line, for ``spark ctl`` and this user's programs."""

import asyncio
import os
from pathlib import Path
from typing import Any

from spark_runtime.supervise.jsontext import dumps
from spark_runtime.supervise.rpc import MOST_BYTES, RpcClient
from spark_runtime.supervise.run import Run

MOST_UNSENT = 4 * 1024 * 1024  # a client that does not read is dropped, not waited for


class ControlSocket:
    """Listens at a path in the runtime folder, which only this user can enter."""

    def __init__(self, run: Run, path: Path) -> None:
        self._run = run
        self._path = path
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Begin to listen."""
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, str(self._path), limit=MOST_BYTES)
        os.chmod(self._path, 0o600)

    async def aclose(self) -> None:
        """Let the requests under way have their answers, then stop listening."""
        self._server.close()
        self._path.unlink(missing_ok=True)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=0.5)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def send(message: dict[str, Any]) -> None:
            if writer.transport.get_write_buffer_size() > MOST_UNSENT:
                writer.transport.abort()
            else:
                writer.write(dumps(message).encode() + b"\n")

        client = RpcClient(self._run, send)
        try:
            while line := await reader.readline():
                task = asyncio.ensure_future(client.take(line))  # beside others: a long `wait` holds nobody up
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        except (ConnectionError, ValueError):
            pass  # gone, or a line over the limit: in both cases there is nobody to talk to any more
        finally:
            client.close()
            writer.close()
