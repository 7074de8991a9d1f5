"""What supervisor, nursery and worker say to each other: small frozen types, msgpack on the wire.

A message travels as ``[name, field, field, ...]``. Decoding checks the name, the number of fields and the type of each
one, and refuses anything else: nothing that a worker sends is trusted. The receiver chooses by type.
"""

import typing
from typing import Any

import msgpack

Json = Any  # None, bool, int, float, str, bytes, list or dict of these: what msgpack carries

#: Where one part of a snapshot lies: segment, offset, length.
Place = list[int]


class MessageBroken(ValueError):
    """The payload is not a message that this side knows."""


_TYPES: dict[str, type["Message"]] = {}
T = typing.TypeVar("T", bound="Message")

if typing.TYPE_CHECKING:
    from typing import dataclass_transform
else:

    def dataclass_transform(**_: object) -> object:
        """Stand in for what Python 3.10 does not have and no Python needs to run."""
        return lambda decorator: decorator


class Message:
    """Base of everything that travels: a frozen record with slots, known by its name. Made by `message`."""

    __slots__: tuple[str, ...] = ()

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and _values(self) == _values(other)

    def __hash__(self) -> int:
        return hash((type(self), *_values(self)))

    def __repr__(self) -> str:
        shown = (f"{name}={getattr(self, name)!r}" for name in type(self).__slots__)
        return f"{type(self).__name__}({', '.join(shown)})"

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__}.{name}: a message does not change")


@dataclass_transform(frozen_default=True)
def message(cls: type[T]) -> type[T]:
    """Make a message of a class with annotations, as ``dataclass(frozen=True, slots=True)`` would.

    That takes half a millisecond for each, and there are fifty, to be made at the start of every process there is.
    """
    names = tuple(cls.__annotations__)
    kept = {
        name: value
        for name, value in cls.__dict__.items()
        if name not in (*names, "__slots__", "__dict__", "__weakref__")
    }
    made: type[T] = type(cls.__name__, cls.__bases__, {**kept, "__slots__": names, "__match_args__": names})
    given = {f"_default_{name}": cls.__dict__[name] for name in names if name in cls.__dict__}
    setters = {f"_set_{name}": made.__dict__[name].__set__ for name in names}
    params = ", ".join(f"{name}=_default_{name}" if f"_default_{name}" in given else name for name in names)
    body = "; ".join(f"_set_{name}(self, {name})" for name in names) or "pass"
    space: dict[str, typing.Any] = {**given, **setters}
    exec(f"def __init__(self, {params}): {body}", space)  # noqa: S102 - our own field names, nothing else
    made.__init__ = space["__init__"]  # type: ignore[method-assign]
    _TYPES[made.__name__] = made
    return made


def _values(each: Message) -> list[object]:
    return [getattr(each, name) for name in type(each).__slots__]


# --- supervisor to nursery -------------------------------------------------------------------------------------------


@message
class Preload(Message):
    """Import *modules*, then answer `NurseryReady`. Sent once, first."""

    modules: list[str]


@message
class Fork(Message):
    """Start worker *worker* at *entry*. Descriptors: channel, bell, stdout, stderr."""

    worker: int
    entry: str


@message
class Signal(Message):
    """Send *number* to worker *worker*; used where there are no pidfds."""

    worker: int
    number: int


# --- nursery to supervisor -------------------------------------------------------------------------------------------


@message
class NurseryReady(Message):
    """The imports are done: these *modules* are there now. Those that failed are the worker's to import and to show."""

    modules: list[str]


@message
class NurserySpoiled(Message):
    """After importing *module* a forked child hangs: this nursery must not be used, and the module be left out."""

    module: str


@message
class Forked(Message):
    """Worker *worker* runs as *pid*. Descriptor: its pidfd, where there are pidfds."""

    worker: int
    pid: int


@message
class Stopped(Message):
    """The kernel reports worker *worker* stopped (SIGSTOP) or, with *stopped* false, going on."""

    worker: int
    stopped: bool


@message
class Exited(Message):
    """Worker *worker* is dead and so is its session. A negative *status* is minus the signal."""

    worker: int
    status: int


# --- supervisor to script worker -------------------------------------------------------------------------------------


@message
class Load(Message):
    """Execute the top level of a script. Answer: `Loaded` or `LoadFailed`. *program* is its ``sys.argv[0]``.

    *sources* maps paths to the bytes to execute for them, the script's own first; files of the user's tree
    (*roots*) that are not in it are read from disk.
    """

    program: str
    module: str
    arguments: list[str]
    sources: dict[str, bytes]
    roots: list[str]


@message
class Start(Message):
    """Run ``torch()``.

    *parts* are places in the segments whose descriptors come along, the stream first. With *is_first* no call that was
    running when the snapshot was taken is repeated.
    """

    paused: bool
    is_first: bool
    meta: dict[str, Json]
    parts: list[Place]
    segments: list[int]


@message
class Call(Message):
    """Call the exposed function *name*. Answer: `Returned` or `Raised`."""

    id: str
    name: str
    args: list[Json]
    kwargs: dict[str, Json]


@message
class CancelCall(Message):
    """Raise in call *id* at its next checkpoint, or drop it if it has not begun."""

    id: str


@message
class Ask(Message):
    """Ask for something at the next checkpoint: pause, resume, stop, leave, or step with a *count*."""

    what: str
    count: int = 0


@message
class Turn(Message):
    """Set the control *name*, made with ``spark.control``, to *value*."""

    name: str
    value: Json


@message
class Where(Message):
    """Ask where the main thread is. Answered at once, by the side thread: `Here`."""


@message
class Segment(Message):
    """The answer to `NeedSegment`. Descriptor: the memory."""

    segment: int
    size: int


@message
class Executed(Message):
    """The answer to `Execute` *id*, from this replica of this model: as the model gave it, or a msgpack list."""

    id: int
    model: str
    replica: int
    answer: bytes


@message
class ExecuteFailed(Message):
    """`Execute` *id* has no answer. *error* is `spark_workers.errors.SparkError.to_dict`."""

    id: int
    error: dict[str, Json]


# --- script worker to supervisor -------------------------------------------------------------------------------------


@message
class Loaded(Message):
    """The top level ran. *files*: path to sha256 of every file of the user's tree that was read."""

    files: dict[str, str]
    wanted: list[str]


@message
class LoadFailed(Message):
    """The top level raised or, with *unusable*, there is no entry. *text* is for people."""

    unusable: bool
    text: str
    path: str
    line: int
    files: dict[str, str]
    wanted: list[str]


@message
class Entered(Message):
    """The worker's own state changed: running, idle or paused."""

    state: str


@message
class Flush(Message):
    """Checkpoints passed in all, where the last was, values that changed, points of series, running loops."""

    checkpoints: int
    place: str
    values: dict[str, Json]
    series: list[list[Json]]
    loops: dict[str, list[float]]


@message
class Exposed(Message):
    """The names that can be called, with their signatures, and the controls."""

    functions: dict[str, Json]
    controls: dict[str, Json]


@message
class Imported(Message):
    """Files of the user's tree read since `Loaded`, and the installed modules a nursery may preload."""

    files: dict[str, str]
    installed: list[str]


@message
class NeedSegment(Message):
    """Ask for memory of at least *size* bytes. Answer: `Segment`."""

    size: int


@message
class Snapshot(Message):
    """A complete snapshot: it replaces the one before. *seconds*: how long the script was held for it."""

    meta: dict[str, Json]
    parts: list[Place]
    seconds: float


@message
class Began(Message):
    """Call *id* has begun."""

    id: str


@message
class Returned(Message):
    """Call *id* returned *value*."""

    id: str
    value: Json


@message
class Raised(Message):
    """Call *id* raised; *text* is the traceback."""

    id: str
    kind: str
    message: str
    text: str


@message
class Note(Message):
    """One line for the user, from the runtime; *level* is info or warning."""

    level: str
    text: str


@message
class Wish(Message):
    """The script itself asks, through its controller: pause, resume, stop, or step with a *count*."""

    what: str
    count: int = 0


@message
class Stayed(Message):
    """There was no room for the state, so the worker does not leave as it was asked to."""


@message
class Unread(Message):
    """Persisted keys that the new code could not read, with the reasons. Their snapshot must be kept."""

    keys: dict[str, str]


@message
class Here(Message):
    """Where the main thread is: the innermost line of the user's code, empty if it is in none."""

    place: str


@message
class Execute(Message):
    """Have a model answer a request. Answer: `Executed` or `ExecuteFailed`.

    An empty *model* is the only one there is. With a *function* the payload is a msgpack list of numbers, as in `Work`.
    *seconds* is how long it may take; 0 for as long as the supervisor allows.
    """

    id: int
    model: str
    function: str
    payload: bytes
    seconds: float


@message
class StopExecute(Message):
    """Nobody waits for `Execute` *id* any more: stop the work. There is no answer then."""

    id: int


@message
class Left(Message):
    """``torch()`` is over and the process will end: done, stopped, reload, error or exit."""

    reason: str
    status: int
    text: str
    path: str
    line: int


# --- supervisor to compile worker ------------------------------------------------------------------------------------


@message
class Compile(Message):
    """Look at a WASM module and compile it with *engine*. Answer: `Compiled` or `Refused`.

    Descriptors: the module to read, and the empty file that takes the machine code. *settings* is `Settings` of
    `spark_workers.engines.seam`, as a dict. *limits*: seconds of processor time and bytes of memory, 0 for none.
    """

    engine: str
    settings: dict[str, Json]
    limits: list[int]


# --- compile worker to supervisor ------------------------------------------------------------------------------------


@message
class Compiled(Message):
    """The machine code is written. *report* says what the module is, imports and exports."""

    report: dict[str, Json]


@message
class Refused(Message):
    """A model cannot be compiled or loaded. *kind* is one of `spark_workers.hosts.failures.KINDS`."""

    kind: str
    message: str
    details: dict[str, Json]


# --- supervisor to replica -------------------------------------------------------------------------------------------


@message
class Host(Message):
    """Load a prepared model. Answer: `Hosted` or `Refused`. *code* is the path of the machine code.

    Descriptor: the pipe that tokens come from, see `Work`.
    """

    engine: str
    kind: str
    code: str
    settings: dict[str, Json]


@message
class Work(Message):
    """Calls to run in this order, each ``[serial, function, payload]``.

    With an empty *function* the payload is a request, bytes in and bytes out. Otherwise the export of that name is
    called with the numbers in the payload, a msgpack list; the answer is a msgpack list too. Calls sent *ahead*, while
    the replica has others, may be taken back: each is begun only with a token, a byte from the pipe, and dropped if
    there is none.
    """

    calls: list[list[Json]]
    ahead: bool


@message
class XAnswer(Message):
    """The answer to `XCall` of call *serial*; with an *error*, a sentence, there is none and the call fails with it."""

    serial: int
    answer: bytes
    error: str


# --- replica to supervisor -------------------------------------------------------------------------------------------


@message
class Hosted(Message):
    """The model is loaded and its first instance stands."""


@message
class Answered(Message):
    """Call *serial* gave *answer*, after *seconds* in the guest."""

    serial: int
    answer: bytes
    seconds: float


@message
class Failed(Message):
    """Call *serial* failed. *kind* is one of `spark_workers.hosts.failures.KINDS`."""

    serial: int
    kind: str
    message: str
    details: dict[str, Json]
    seconds: float


@message
class XCall(Message):
    """During call *serial* the model asks another service for something, as JSON. It waits for an `XAnswer`."""

    serial: int
    request: bytes


@message
class Printed(Message):
    """What the model wrote to its standard output and error beside its answer, during call *serial*."""

    serial: int
    text: str


# --- the wire --------------------------------------------------------------------------------------------------------

_PLAIN: dict[object, tuple[type, ...]] = {int: (int,), float: (float, int), str: (str,), bytes: (bytes,), bool: (bool,)}


def _checker(hint: object) -> typing.Callable[[object], bool]:
    """Return a function that tells whether a decoded value fits the annotation *hint*."""
    if hint is Any:
        return _is_json
    if hint in _PLAIN:
        kinds = _PLAIN[hint]
        exact = bool in kinds
        return lambda value: isinstance(value, kinds) and isinstance(value, bool) == exact
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        item = _checker(inner[0])
        return lambda value: isinstance(value, list) and all(item(each) for each in value)
    if origin is dict:
        key, item = _checker(inner[0]), _checker(inner[1])
        return lambda value: isinstance(value, dict) and all(key(k) and item(v) for k, v in value.items())
    raise TypeError(f"a message field cannot be {hint!r}")


def _is_json(value: object) -> bool:
    """Tell whether *value* is plain data: msgpack also knows time stamps, extensions and keys that are no texts."""
    kind = type(value)
    if value is None or kind in (bool, int, float, str, bytes):
        return True
    if kind is dict:
        return all(type(key) is str and _is_json(item) for key, item in value.items())  # type: ignore[attr-defined]
    return kind is list and all(map(_is_json, value))  # type: ignore[call-overload]


def _spec(kind: type[Message]) -> tuple[type[Message], list[tuple[str, typing.Callable[[object], bool]]]]:
    return kind, [(name, _checker(kind.__annotations__[name])) for name in kind.__slots__]


_SPECS = {name: _spec(kind) for name, kind in _TYPES.items()}
_GETTERS = {kind: [name for name, _ in fields] for kind, fields in _SPECS.values()}


def encode(message: Message) -> bytes:
    """Return the payload of *message*.

    Raises:
        MessageBroken: A field holds something that msgpack cannot carry.
    """
    kind = type(message)
    try:
        for name, fits in _SPECS[kind.__name__][1]:
            if not fits(getattr(message, name)):
                raise MessageBroken(f"{kind.__name__}.{name} cannot be {type(getattr(message, name)).__name__}")
        packed: bytes = msgpack.packb([kind.__name__, *(getattr(message, name) for name in _GETTERS[kind])])
    except (TypeError, ValueError, OverflowError, RecursionError) as problem:
        raise MessageBroken(f"{kind.__name__} cannot be encoded: {problem}") from problem
    return packed


def answer_in(payload: bytes) -> tuple[int, bytes, float] | None:
    """Return the fields of an `Answered` without making one; None if it is anything else, which `decode` then tells.

    As strict as `decode`, at a sixth of its cost: a supervisor does this for every call there is.
    """
    try:
        items = msgpack.unpackb(payload)
    except Exception:  # noqa: BLE001 - whatever is wrong with it, decode says so
        return None
    if type(items) is not list or len(items) != 4 or items[0] != "Answered":
        return None
    _, serial, answer, seconds = items
    if type(serial) is int and type(answer) is bytes and type(seconds) is float:
        return serial, answer, seconds
    return None


def work_in(payload: bytes) -> tuple[list[tuple[int, str, bytes]], bool]:
    """Return the fields of a `Work`, for a replica, which is sent nothing else unasked and trusts its supervisor.

    Raises:
        MessageBroken: It is something else.
    """
    try:
        name, calls, ahead = msgpack.unpackb(payload)
    except (ValueError, TypeError, msgpack.UnpackException) as problem:
        raise MessageBroken(f"not work: {problem}") from problem
    if name != "Work":
        raise MessageBroken(f"a replica was sent {name}")
    return calls, ahead


def decode(payload: bytes) -> Message:
    """Return the message in *payload*.

    Raises:
        MessageBroken: Not msgpack, nested too deep, an unknown name, or a field of the wrong type.
    """
    try:
        items = msgpack.unpackb(payload, strict_map_key=True)
    except (ValueError, RecursionError, msgpack.UnpackException, TypeError) as problem:
        raise MessageBroken(f"not a message: {type(problem).__name__}: {problem}") from problem
    if not isinstance(items, list) or not items or not isinstance(items[0], str) or items[0] not in _SPECS:
        raise MessageBroken(f"not a message: {str(items)[:80]}")
    kind, fields = _SPECS[items[0]]
    if len(items) != len(fields) + 1:
        raise MessageBroken(f"{items[0]} has {len(items) - 1} fields in place of {len(fields)}")
    for value, (name, fits) in zip(items[1:], fields, strict=True):
        if not fits(value):
            raise MessageBroken(f"{items[0]}.{name} cannot be {type(value).__name__}: {str(value)[:80]}")
    return kind(*items[1:])
