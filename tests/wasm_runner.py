"""The vendor's own runner, `@coherentglobal/wasm-runner` from npm, as something to compare with.

It runs in a Node of its own, in a folder that is given; nothing of it is part of this repository. It is told a line of
JSON for each request and answers with one.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

PACKAGE, VERSION = "@coherentglobal/wasm-runner", "0.6.1"
FETCH_SECONDS = 180.0

# The resolver answers a model's calls of other services with what the model `TARGET` says, as version 3 has it.
_PROGRAM = """
const { WasmRunner } = require('@coherentglobal/wasm-runner');
const silent = new Proxy({}, { get: () => () => {} });
const say = (value) => process.stdout.write('@' + JSON.stringify(value) + '\\n');
(async () => {
  const models = JSON.parse(process.argv[2]), size = Number(process.argv[3]);
  const runner = new WasmRunner([], require.resolve('./resolver.js'), { logger: silent });
  require('./resolver.js').answer = async (request) => {
    const answer = await runner.execute(JSON.parse(request.request_body), process.argv[4]);
    const xcall_meta = { http_status_code: 202, http_response_time: 0, error_details: null };
    return JSON.stringify({ ...answer, xcall_meta });
  };
  for (const [id, url] of Object.entries(models)) await runner.append({ id, url, size });
  for (const id of Object.keys(models)) {
    while (!(await runner.getModel(id).worker.execute('isReady')).payload) await new Promise((r) => setTimeout(r, 5));
  }
  say({ ready: true });
  const lines = require('readline').createInterface({ input: process.stdin });
  for await (const line of lines) {
    const { model, request, times, flight } = JSON.parse(line);
    if (times) {
      let left = times;
      const again = async () => { while (left-- > 0) await runner.execute(JSON.parse(request), model); };
      const begin = process.hrtime.bigint();
      await Promise.all(Array.from({ length: flight }, again));
      say({ seconds: Number(process.hrtime.bigint() - begin) / 1e9 });
      continue;
    }
    try { say({ answer: await runner.execute(request, model) }); }
    catch (problem) { say({ error: String(problem && problem.message) }); }
  }
  process.exit(0);
})().catch((problem) => { say({ error: String(problem.stack) }); process.exit(1); });
"""
_RESOLVER = "exports.answer = null; exports.sparkService = (request) => exports.answer(request);"


class NotInstalled(Exception):
    """It cannot be had here and now; the message says why in one line."""


def install(folder: Path) -> Path:
    """Install the runner in *folder* unless it is there; return the folder.

    Raises:
        NotInstalled: There is no Node, no npm, or no network.
    """
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            raise NotInstalled(f"there is no {program} on this machine")
    if not (folder / "node_modules" / PACKAGE / "package.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text("{}")
        command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries", "1"]
        try:
            done = subprocess.run(
                [*command, f"{PACKAGE}@{VERSION}"],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=FETCH_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise NotInstalled(f"no answer from the registry in {FETCH_SECONDS:.0f} s") from None
        if done.returncode:
            raise NotInstalled(f"{PACKAGE} cannot be installed: {done.stderr.strip().splitlines()[-1:]}")
    (folder / "run.js").write_text(_PROGRAM)
    (folder / "resolver.js").write_text(_RESOLVER)
    return folder


class WasmRunner:
    """A Node with the runner in it, and models by their ids."""

    def __init__(self, folder: Path, models: Mapping[str, Path], *, replicas: int = 1, target: str = "") -> None:
        paths = json.dumps({name: str(path.resolve()) for name, path in models.items()})
        self._process = subprocess.Popen(
            ["node", "run.js", paths, str(replicas), target],
            cwd=folder,
            env={**os.environ, "TMPDIR": str(folder)},  # it leaves files there
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        ready = self._line()
        assert ready.get("ready"), ready

    def ask(self, model: str, request: Any) -> dict[str, Any]:
        """Return ``{"answer": ...}`` or ``{"error": ...}``."""
        return self._exchange({"model": model, "request": request})

    def seconds(self, model: str, request: Any, times: int, flight: int) -> float:
        """Return how long so many requests take, so many of them at once."""
        told = {"model": model, "request": json.dumps(request), "times": times, "flight": flight}
        return float(self._exchange(told)["seconds"])

    def __enter__(self) -> "WasmRunner":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream(self._process.stdin).close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._process.wait()
        self._stream(self._process.stdout).close()

    def _exchange(self, told: dict[str, Any]) -> dict[str, Any]:
        stream = self._stream(self._process.stdin)
        stream.write(json.dumps(told) + "\n")
        stream.flush()
        return self._line()

    def _line(self) -> dict[str, Any]:
        for line in self._stream(self._process.stdout):
            if line.startswith("@"):  # all else is what models and the runner print
                found: dict[str, Any] = json.loads(line[1:])
                return found
        raise AssertionError("the runner has ended")

    @staticmethod
    def _stream(stream: IO[str] | None) -> IO[str]:
        assert stream is not None
        return stream
