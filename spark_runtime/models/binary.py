"""The bytes of a package, given in any of the ways that the Node SDK's configuration allows.

That is base64, bytes, the path of a file, an open file, an address, or a function of the version id, also an async one,
that returns any of these. They are fetched at their first use, and once, however many want them at the same time.
"""

import asyncio
import base64
import os
import re
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from spark_runtime.errors import ModelNotFound, ModelUnusable, OnlineError, SparkError
from spark_runtime.models.model_file import SIZE_LIMIT
from spark_runtime.online.given import value_of, within

FETCH_SECONDS = 60.0
MOST_REDIRECTS = 5
RETRIES = 2

_ENCODED = ("UEsD", "AGFzbQ")  # how a zip and a WASM module begin in base64
_NOT_BASE64 = re.compile(r"[^A-Za-z0-9+/_=\s-]")
_LONGEST_PATH = 4096


class Binary:
    """A package that may have to be fetched.

    Args:
        given: It, in any form.
        version_id: Whose package it is: what a function is called with, and what messages name.
        folder: Where a path that is not absolute begins; the current folder if None.
        is_encoded: A text is base64 where it could be a path as well.
    """

    def __init__(self, given: Any, version_id: str, folder: Path | None = None, *, is_encoded: bool = False) -> None:
        self._given = given
        self._version_id = version_id
        self._folder = folder
        self._is_encoded = is_encoded
        self._changing = threading.Lock()
        self._fetched: Future[bytes] | None = None

    def __repr__(self) -> str:
        return f"Binary({self._version_id!r})"  # not what was given: an address may have a key in it

    def load(self, seconds: float | None = FETCH_SECONDS, loop: asyncio.AbstractEventLoop | None = None) -> bytes:
        """Return the bytes. Whoever comes first fetches them, the others wait; after an error the next one tries again.

        Args:
            seconds: How long it may take; None for as long as it wants.
            loop: Where an async function runs; a loop of its own if None. Not the one of this thread.

        Raises:
            ModelNotFound: There is no such file.
            ModelUnusable: They cannot be had, or are damaged; the message says where.
        """
        with self._changing:
            fetched, is_ours = self._fetched, self._fetched is None
            if fetched is None:
                fetched = self._fetched = Future()
        if not is_ours:
            try:
                return fetched.result(seconds)
            except TimeoutError as problem:
                raise self._late(seconds) from problem
        try:
            # On a thread of its own: this one may have an event loop, and what is given may take any time.
            data = within(seconds, lambda: self._fetch(seconds, loop))
        except BaseException as problem:
            error = self._told(problem, seconds)
            with self._changing:
                self._fetched = None
            fetched.set_exception(error)
            if error is problem or not isinstance(problem, Exception):
                raise
            raise error from problem
        fetched.set_result(data)
        return data

    async def aload(self, seconds: float | None = FETCH_SECONDS) -> bytes:
        """As `load`, for asyncio: an async function runs on this loop."""
        return await asyncio.to_thread(self.load, seconds, asyncio.get_running_loop())

    def _told(self, problem: BaseException, seconds: float | None) -> SparkError:
        if isinstance(problem, SparkError):
            return problem
        if isinstance(problem, TimeoutError):
            return self._late(seconds)
        text = f"the binary of version {self._version_id} cannot be had: {type(problem).__name__}: {problem}"
        return ModelUnusable(text, "unreadable")

    def _late(self, seconds: float | None) -> ModelUnusable:
        return ModelUnusable(
            f"the binary of version {self._version_id} did not come within {seconds or 0:g} s", "unreadable"
        )

    # --- on a thread of its own ---

    def _fetch(self, seconds: float | None, loop: asyncio.AbstractEventLoop | None) -> bytes:
        given = value_of(self._given, self._version_id, seconds=seconds, loop=loop)
        if hasattr(given, "read"):
            given = value_of(given.read, seconds=seconds, loop=loop)
        if isinstance(given, bytes | bytearray | memoryview):
            data = bytes(given)
        elif isinstance(given, str):
            data = self._from_text(given, seconds)
        elif isinstance(given, os.PathLike):
            data = self._from_file(os.fspath(given))
        else:
            raise self._odd(f"is {type(given).__name__}, not base64, bytes, a path, a file or an address")
        if not data:
            raise self._odd("is empty")
        return data

    def _from_text(self, text: str, seconds: float | None) -> bytes:
        start = text[:64].strip()
        if start.lower().startswith(("http://", "https://")):
            return self._from_address(text.strip(), seconds)
        if self._is_encoded or start.startswith((*_ENCODED, "data:")) or len(text) > _LONGEST_PATH:
            return self._from_base64(text)
        path = self._path(text)
        if path.is_file() or path.suffix.lower() in (".zip", ".wasm"):
            return self._from_file(text)
        return self._from_base64(text)

    def _path(self, text: str) -> Path:
        return Path(text) if self._folder is None else self._folder / text

    def _from_file(self, text: str | bytes) -> bytes:
        path = self._path(os.fsdecode(text))
        try:
            with open(path, "rb") as file:
                data = file.read(SIZE_LIMIT + 1)
        except FileNotFoundError as problem:
            raise ModelNotFound(f"version {self._version_id}: there is no file {path}") from problem
        except (OSError, ValueError) as problem:
            reason = getattr(problem, "strerror", None) or problem
            raise self._odd(f"is the file {path}, which cannot be read: {reason}") from problem
        if len(data) > SIZE_LIMIT:
            raise self._odd(f"is the file {path}, which is larger than {SIZE_LIMIT >> 30} GiB")
        return data

    def _from_base64(self, text: str) -> bytes:
        head = re.match(r"\s*data:[^,]{0,200},", text)
        begin = head.end() if head else 0
        padding = re.compile("=").search(text, begin)
        end = padding.start() if padding else len(text)
        wrong = _NOT_BASE64.search(text, begin) or re.compile(r"[^=\s]").search(text, end)
        if wrong is not None:
            raise self._damaged(text, wrong.start(), f"{wrong[0]!a} does not belong there")
        digits = "".join(text[begin:end].split()).translate({ord("-"): "+", ord("_"): "/"})
        if len(digits) % 4 == 1:
            raise self._damaged(text, end, "the end is missing")
        return base64.b64decode(digits + "=" * (-len(digits) % 4))

    def _damaged(self, text: str, position: int, what: str) -> ModelUnusable:
        line = text.count("\n", 0, position) + 1
        column = position - text.rfind("\n", 0, position)
        return self._odd(f"is damaged base64 at line {line} column {column} (char {position}): {what}")

    def _from_address(self, url: str, seconds: float | None) -> bytes:
        import random
        import time

        from spark_runtime.online.retry import Retry
        from spark_runtime.online.transport import Line, LineLate, Transport

        line = Line(time.monotonic() + (FETCH_SECONDS if seconds is None else seconds), 10.0)
        transport, retry, repeated = Transport(), Retry(RETRIES), 0
        try:
            while True:
                try:
                    return self._download(transport, line, url)
                except OnlineError as problem:
                    pause = retry.pause(repeated, problem, random.random())  # noqa: S311 - it guards nothing
                    if pause is None or pause >= line.left():
                        raise self._odd(f"cannot be fetched: {problem}") from problem
                line.pause(pause)
                repeated += 1
        except LineLate as problem:
            raise self._late(seconds) from problem
        finally:
            transport.close()

    def _download(self, transport: Any, line: Any, url: str) -> bytes:
        """Fetch from *url*. Nothing secret is sent, so redirects are followed, though not from https to http."""
        from spark_workers.errors import online_error

        for _ in range(MOST_REDIRECTS + 1):
            reply = transport.send(line, "GET", url, {"Accept": "*/*"}, None, SIZE_LIMIT)
            if reply.status == 200:
                data: bytes = reply.body
                return data
            if reply.status not in (301, 302, 303, 307, 308):
                raise online_error(reply.status, f"{_shown(url)} answers {reply.status} {reply.reason[:60]!a}")
            to = urljoin(url, reply.headers.get("location", ""))
            if urlsplit(to).scheme not in ("https", urlsplit(url).scheme):
                raise self._odd(f"cannot be fetched: {_shown(url)} leads to {_shown(to)}, which is not as safe")
            url = to
        raise self._odd(f"cannot be fetched: {_shown(url)} leads from one address to the next without end")

    def _odd(self, text: str) -> ModelUnusable:
        return ModelUnusable(f"the binary of version {self._version_id} {text}", "unreadable")


def _shown(url: str) -> str:
    """Return an address without what may be a key in it."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}{parts.path}"[:200]
