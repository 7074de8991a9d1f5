"""What a run or a model is told, once, by the command line or a program."""

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spark_runtime.errors import BadRequestError

LOAD_SECONDS = 30.0
MODEL_KINDS = ("auto", "plain", "command", "reactor", "neuron")
ENGINES = ("wasmtime", "wasmer")
INTERRUPTS = ("kill", "epoch")
GIB = 1 << 30

_SIZE = re.compile(r"(\d+)\s*([kmg]i?)?b?", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_size(text: str) -> int:
    """Return a number of bytes given as 268435456, 256MiB or 256MB.

    Raises:
        ValueError: It is no size; the message says what one looks like.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ValueError("a size such as 268435456, 256MiB or 2GiB")
    return int(found[1]) * _UNITS[(found[2] or "").lower()]


@dataclass(frozen=True, slots=True)
class PlannedCall:
    """A call of an exposed function, to be made as soon as the script can serve it."""

    name: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How to run one script.

    Attributes:
        script: The file.
        program: The script's ``sys.argv[0]``: its path as it was given.
        arguments: The script's ``sys.argv[1:]``.
        watch: Reload when the file or a module of the user's that it imports is saved.
        poll: Look at the files from time to time; for file systems that do not tell of changes.
        exit_when_called: End when every call in *calls* has its answer.
        calls: Made at the start.
        resume: Go on from the last snapshot on disk.
        resume_from: The run to go on from; the newest unfinished one if None.
        waits_for_save: After an error wait for the next save in place of ending.
        load_seconds: How long the top level of *new* code may take before the old code simply goes on.
        models: What the script may call with ``spark.execute``.
    """

    script: Path
    program: str = ""
    arguments: tuple[str, ...] = ()
    watch: bool = True
    poll: bool = False
    exit_when_called: bool = False
    calls: tuple[PlannedCall, ...] = ()
    resume: bool = False
    resume_from: str | None = None
    waits_for_save: bool = False
    load_seconds: float = LOAD_SECONDS
    models: "tuple[Model, ...]" = ()


@dataclass(frozen=True, slots=True)
class Model:
    """A WASM model and how to run it.

    Attributes:
        name: What calls name it by.
        path: The ``.wasm`` file, or the ``.zip`` of a Neuron package.
        replicas: Worker processes, each with an instance of its own.
        keep: Never unload it to make room for others.
        kind: ``"plain"`` (exports ``execute`` and ``alloc`` or ``malloc``), ``"command"`` (WASI, JSON on its standard
            input and output), ``"reactor"`` (WASI, exports as plain), ``"neuron"`` (a package); ``"auto"`` looks.
        engine: ``"wasmtime"`` or ``"wasmer"``.
        python: The interpreter that replicas run under; needed for wasmer only.
        args: A WASI command's arguments, after its own name.
        env: A WASI model's environment variables. It sees none but these.
        memory_limit: Bytes of linear memory an instance may have.
        stack_limit: Bytes of stack, 1 MiB at most.
        table_limit: Elements of a table.
        interrupt: How running calls are stopped: ``"kill"`` replaces the process, in milliseconds; ``"epoch"``
            interrupts the guest, for instances that are dear to rebuild, and costs up to a third of its speed.
        fresh: A new instance for every call.
        retries: How often a call whose replica died is begun again. 0: never run twice.
        watch: Replace the replicas when the file changes.
        timeout: Seconds a call may take, from submit; None for the `Spark`'s own.
        entry: The export that takes requests.
    """

    name: str
    path: str | Path
    replicas: int = 1
    keep: bool = False
    kind: str = "auto"
    engine: str = "wasmtime"
    python: str | None = None
    args: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    memory_limit: int = 2 * GIB
    stack_limit: int = 512 * 1024
    table_limit: int = 1_000_000
    interrupt: str = "kill"
    fresh: bool = False
    retries: int = 0
    watch: bool = False
    timeout: float | None = None
    entry: str = "execute"

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            BadRequestError: A field has a value that makes no sense; the message names it.
        """
        if not self.name or not isinstance(self.name, str):
            raise BadRequestError("a model needs a name, a text that is not empty")
        for name, value, allowed in (
            ("kind", self.kind, MODEL_KINDS),
            ("engine", self.engine, ENGINES),
            ("interrupt", self.interrupt, INTERRUPTS),
        ):
            if value not in allowed:
                raise BadRequestError(f"model {self.name!r}: {name} is {value!r}, not one of {', '.join(allowed)}")
        for name, number, least, most in (
            ("replicas", self.replicas, 1, 1024),
            ("memory_limit", self.memory_limit, 64 * 1024, 4 * GIB),
            ("stack_limit", self.stack_limit, 16 * 1024, 1024 * 1024),
            ("table_limit", self.table_limit, 1, 100_000_000),
            ("retries", self.retries, 0, 100),
        ):
            if isinstance(number, bool) or not isinstance(number, int) or not least <= number <= most:
                raise BadRequestError(f"model {self.name!r}: {name} is {number!r}, not between {least} and {most}")
        if self.timeout is not None and not self.timeout > 0:
            raise BadRequestError(f"model {self.name!r}: timeout is {self.timeout!r}, not a number of seconds above 0")
        if isinstance(self.args, str) or not all(isinstance(each, str) for each in self.args):
            raise BadRequestError(f"model {self.name!r}: args is {self.args!r}, not a list of texts")
        if self.engine == "wasmer" and self.interrupt == "epoch":
            raise BadRequestError(f"model {self.name!r}: wasmer cannot interrupt a guest; use interrupt='kill'")

    def settings(self) -> dict[str, Any]:
        """Return what the worker is told, as plain data: `spark_workers.engines.seam.Settings`."""
        return {
            "args": list(self.args),
            "env": dict(self.env),
            "memory_limit": self.memory_limit,
            "stack_limit": self.stack_limit,
            "table_limit": self.table_limit,
            "epochs": self.interrupt == "epoch",
            "fresh": self.fresh,
            "entry": self.entry,
        }


AUTHS = ("public", "syntheticKey", "bearerToken")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where models are called online.

    Attributes:
        url: Of the service, without the tenant, such as ``https://excel.example.com``.
        tenant: Whose models they are.
        auth: ``"public"`` sends no credential, ``"syntheticKey"`` a key, ``"bearerToken"`` a token.
        credential: The key or the token, or a function, also an async one, that returns it; called once for each call.
        timeout: Seconds that a call may take in all, repetitions included.
        connect_timeout: Seconds that one attempt to connect may take.
        retries: How often a call is repeated when the endpoint cannot be reached or has no time.
        connections: How many calls are sent at once; more wait for their turn.
        max_bytes: The longest answer that is read, and the longest once it is unpacked.
        ca_file: A file of certificates that are trusted in place of the usual ones.
        trust_env: Use the proxies and certificates that environment variables name.
        compress: Send requests of more than a few KiB as gzip; not every runner reads that.
    """

    url: str
    tenant: str
    auth: str = "public"
    credential: str | Callable[[], str | Awaitable[str]] | None = field(default=None, repr=False)
    timeout: float = 60.0
    connect_timeout: float = 10.0
    retries: int = 2
    connections: int = 16
    max_bytes: int = 64 * 1024 * 1024
    ca_file: str | Path | None = None
    trust_env: bool = False
    compress: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            BadRequestError: A field has a value that makes no sense; the message names it.
        """
        _check_url(self.url)
        if not isinstance(self.tenant, str) or not re.fullmatch(r"[^\s/?#%\\]+", self.tenant):
            raise BadRequestError(f"endpoint: tenant is {self.tenant!r}, not a name")
        if self.auth not in AUTHS:
            raise BadRequestError(f"endpoint: auth is {self.auth!r}, not one of {', '.join(AUTHS)}")
        if self.auth == "public" and self.credential is not None:
            raise BadRequestError("endpoint: there is a credential, and auth is 'public', which sends none")
        if self.auth != "public" and not (
            callable(self.credential) or (isinstance(self.credential, str) and self.credential)
        ):
            raise BadRequestError(f"endpoint: auth is {self.auth!r} and needs a credential: a text, or a function")
        for name, number in (("timeout", self.timeout), ("connect_timeout", self.connect_timeout)):
            if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < float("inf"):
                raise BadRequestError(f"endpoint: {name} is {number!r}, not a number of seconds above 0")
        for name, count, least, most in (
            ("retries", self.retries, 0, 100),
            ("connections", self.connections, 1, 1024),
            ("max_bytes", self.max_bytes, 1, GIB),
        ):
            if isinstance(count, bool) or not isinstance(count, int) or not least <= count <= most:
                raise BadRequestError(f"endpoint: {name} is {count!r}, not between {least} and {most}")


def _check_url(url: Any) -> None:
    from urllib.parse import urlsplit  # few runs have an endpoint

    try:
        parts = urlsplit(url if isinstance(url, str) else "")
        is_right = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # a port that is none, or brackets without their other half
        is_right = False
    if not is_right or re.search(r"[\s\\]", url):
        shown = "no address" if "@" in str(url) else f"{url!r:.80}"  # before an @ there may be a password
        raise BadRequestError(f"endpoint: url is {shown}, not such as https://excel.example.com")
    if parts.username is not None or parts.query or parts.fragment:
        raise BadRequestError("endpoint: url has a user, a query or a fragment in it; credentials go into credential")
