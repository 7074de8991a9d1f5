"""What is told between processes, and the ledgers on both sides, as data: no process and no socket."""

import asyncio
import functools
import json
import typing
import warnings
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_workers import messages as m
from spark_workers.frames import HEADER, MAX_DESCRIPTORS, MAX_PAYLOAD, Frame, FrameBroken, FrameDecoder, encode_frame
from spark_workers.scripts.asks import Asks
from spark_workers.scripts.checkpoint import DONE, PauseTurn, idle_checkpoint, make_checkpoint
from spark_workers.scripts.errors import SparkCancelError, SparkReloadError, SparkStopError, SparkUsageError
from spark_workers.scripts.exposed import ExposedNames
from spark_workers.scripts.loops import Loops
from spark_workers.scripts.values import plain, summary

# --- frames ----------------------------------------------------------------------------------------------------------


def frames_of(decoder: FrameDecoder) -> list[Frame]:
    """Every whole frame that the decoder has now."""
    return list(iter(decoder.next_frame, None))


def test_frames_arrive_whole_wherever_the_stream_is_cut() -> None:
    sent = [Frame(b"", 0), Frame(b"one", 2), Frame(b"SK" * 20, 0), Frame(b"\x00", MAX_DESCRIPTORS)]
    stream = b"".join(encode_frame(each.payload, each.descriptors) for each in sent)
    for cut in range(len(stream) + 1):
        decoder, arrived = FrameDecoder(), []
        for part in (stream[:cut], stream[cut:]):
            decoder.feed(part)
            arrived += frames_of(decoder)
        assert arrived == sent
        assert decoder.is_empty()


def test_frames_arrive_whole_byte_by_byte() -> None:
    decoder, arrived = FrameDecoder(), []
    for number, byte in enumerate(encode_frame(b"hello", 1) + encode_frame(b"again"), 1):
        decoder.feed(bytes([byte]))
        arrived += frames_of(decoder)
        assert len(arrived) == number // (HEADER.size + 5)
    assert arrived == [Frame(b"hello", 1), Frame(b"again", 0)]


@given(st.lists(st.tuples(st.binary(max_size=50), st.integers(0, MAX_DESCRIPTORS)), max_size=5), st.data())
def test_frames_arrive_whole_however_the_stream_is_cut(sent: list[tuple[bytes, int]], data: st.DataObject) -> None:
    stream = b"".join(encode_frame(*each) for each in sent)
    decoder, arrived = FrameDecoder(), []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        decoder.feed(memoryview(stream)[:size])
        stream = stream[size:]
        arrived += frames_of(decoder)
    assert arrived == [Frame(*each) for each in sent]
    assert decoder.is_empty()


@pytest.mark.parametrize("length", [MAX_PAYLOAD + 1, 2**31, 2**32 - 1])
def test_a_giant_length_is_refused_from_the_header_alone(length: int) -> None:
    decoder = FrameDecoder()
    decoder.feed(HEADER.pack(b"SK", 1, 0, length))
    with pytest.raises(FrameBroken, match=str(length)):
        decoder.next_frame()


def test_the_longest_payload_is_taken_and_one_byte_more_is_not() -> None:
    decoder = FrameDecoder(limit=4)
    decoder.feed(encode_frame(b"1234") + encode_frame(b"12345"))
    assert decoder.next_frame() == Frame(b"1234")
    with pytest.raises(FrameBroken):
        decoder.next_frame()
    with pytest.raises(FrameBroken):
        encode_frame(bytes(MAX_PAYLOAD + 1))


@pytest.mark.parametrize("count", [MAX_DESCRIPTORS + 1, 255])
def test_too_many_descriptors_are_refused_on_both_sides(count: int) -> None:
    with pytest.raises(FrameBroken, match=str(count)):
        encode_frame(b"", count)
    decoder = FrameDecoder()
    decoder.feed(HEADER.pack(b"SK", 1, count, 0))
    with pytest.raises(FrameBroken, match=str(count)):
        decoder.next_frame()


@pytest.mark.parametrize("version", [0, 2, 255])
def test_another_version_is_refused(version: int) -> None:
    decoder = FrameDecoder()
    decoder.feed(HEADER.pack(b"SK", version, 0, 0))
    with pytest.raises(FrameBroken, match=str(version)):
        decoder.next_frame()


@pytest.mark.parametrize("start", [b"X", b"SX", b"KS", b"\x00", b"S\x00KS", b"Hello, world"])
def test_another_beginning_is_refused_as_soon_as_it_can_be_seen(start: bytes) -> None:
    decoder = FrameDecoder()
    decoder.feed(start)
    with pytest.raises(FrameBroken):
        decoder.next_frame()


def test_what_came_before_the_break_is_delivered_and_nothing_after_it() -> None:
    decoder = FrameDecoder()
    decoder.feed(encode_frame(b"good") + b"bad" + encode_frame(b"late"))
    assert decoder.next_frame() == Frame(b"good")
    for _ in range(2):
        with pytest.raises(FrameBroken):
            decoder.next_frame()
        decoder.feed(encode_frame(b"more"))


@given(st.binary(max_size=64))
def test_arbitrary_bytes_raise_nothing_but_frame_broken(data: bytes) -> None:
    decoder = FrameDecoder()
    decoder.feed(data)
    try:
        frames_of(decoder)
    except FrameBroken:
        pass


@given(st.binary(min_size=1, max_size=20), st.integers(0, 7), st.integers(0, 255))
def test_a_changed_header_raises_nothing_but_frame_broken(payload: bytes, position: int, byte: int) -> None:
    stream = bytearray(encode_frame(payload))
    stream[position] = byte
    decoder = FrameDecoder()
    decoder.feed(bytes(stream))
    try:
        frames_of(decoder)
    except FrameBroken:
        pass


# --- messages --------------------------------------------------------------------------------------------------------

KINDS = sorted(m._TYPES.values(), key=lambda kind: kind.__name__)
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)

_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
_integers = st.integers(-(2**63), 2**64 - 1)
_json = st.recursive(
    st.none() | st.booleans() | _integers | st.floats(allow_nan=False) | _text | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_text, inner, max_size=3),
    max_leaves=8,
)
_plain: dict[Any, st.SearchStrategy[Any]] = {
    int: _integers,
    float: st.floats(allow_nan=False),
    str: _text,
    bytes: st.binary(max_size=8),
    bool: st.booleans(),
    Any: _json,
}


def values_for(hint: Any) -> st.SearchStrategy[Any]:
    """A strategy for a field with this annotation."""
    if hint in _plain:
        return _plain[hint]
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is list:
        return st.lists(values_for(inner[0]), max_size=3)
    assert typing.get_origin(hint) is dict, hint
    return st.dictionaries(values_for(inner[0]), values_for(inner[1]), max_size=3)


def hints_of(kind: type[m.Message]) -> dict[str, Any]:
    """The annotations of a message's fields, in order."""
    hints = typing.get_type_hints(kind)
    return {name: hints[name] for name in kind.__slots__}


def messages_of(kind: type[m.Message]) -> st.SearchStrategy[Any]:
    """A strategy for messages of this kind."""
    return st.builds(kind, **{name: values_for(hint) for name, hint in hints_of(kind).items()})


any_message = st.one_of([messages_of(kind) for kind in KINDS])


@each_kind
def test_every_message_travels_as_it_is(kind: type[m.Message]) -> None:
    @given(messages_of(kind))
    @settings(max_examples=30)
    def travels(message: m.Message) -> None:
        decoder = FrameDecoder()
        decoder.feed(encode_frame(m.encode(message)))
        frame = decoder.next_frame()
        assert frame is not None
        arrived = m.decode(frame.payload)
        assert (type(arrived), arrived) == (type(message), message)

    travels()


def wrong_values(hint: Any) -> list[Any]:
    """Values that do not fit an annotation."""
    if hint is Any:
        return []
    if hint in _plain:
        values = {int: 1, float: 1.5, str: "x", bytes: b"x", bool: True}
        wrong = [value for kind, value in values.items() if kind is not hint and (hint, kind) != (float, int)]
        return [*wrong, None, [], {}, [values[hint]]]
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is list:
        return [None, 1, "x", b"x", {}, *([each] for each in wrong_values(inner[0]))]
    return [None, 1, "x", b"x", [], {1: "x"}, *({"key": each} for each in wrong_values(inner[1]))]


@each_kind
def test_a_field_of_the_wrong_type_is_refused_by_name(kind: type[m.Message]) -> None:
    right = {int: 1, float: 1.5, str: "x", bytes: b"x", bool: True, Any: None}
    hints = hints_of(kind)
    good = [right.get(hint, [] if typing.get_origin(hint) is list else {}) for hint in hints.values()]
    assert isinstance(m.decode(msgpack.packb([kind.__name__, *good])), kind)
    for position, (name, hint) in enumerate(hints.items()):
        for wrong in wrong_values(hint):
            fields = [*good[:position], wrong, *good[position + 1 :]]
            with pytest.raises(m.MessageBroken, match=f"{kind.__name__}.{name}|map key"):
                m.decode(msgpack.packb([kind.__name__, *fields]))


@each_kind
def test_a_message_with_too_few_or_too_many_fields_is_refused(kind: type[m.Message]) -> None:
    count = len(hints_of(kind))
    for wrong in {0, count - 1, count + 1} - {count, -1}:
        with pytest.raises(m.MessageBroken, match=kind.__name__):
            m.decode(msgpack.packb([kind.__name__, *[1] * wrong]))


@pytest.mark.parametrize(
    "content",
    [
        ["Nothing"],
        ["message"],
        ["Message"],
        ["__class__"],
        [""],
        [None],
        [1],
        [[]],
        [["Where"]],
        [b"Where"],
        [{}],
        [],
        {},
        "Where",
        1,
        None,
        {"Where": 1},
    ],
    ids=str,
)
def test_what_is_no_message_is_refused(content: Any) -> None:
    with pytest.raises(m.MessageBroken):
        m.decode(msgpack.packb(content))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",  # never used by msgpack
        m.encode(m.Where()) + b"\x00",
        m.encode(m.Began("job"))[:-1],
        b"\x92\xa5Began\xa2\xff\xfe",  # a text that is not UTF-8
        b"\xdd\xff\xff\xff\xff",  # four billion items announced, none there
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xffx",
        b"\x92\xa5Began\x81\x90\x01",  # a list as a key
        b"\x91" * 100_000,
        b"\x93\xa8Returned\xa1x" + b"\x91" * 5_000 + b"\x01",
        b"\x93\xa8Returned\xa1x" + b"\x81\xa1k" * 5_000 + b"\x01",
        b"\x93\xa8Returned\xa1x\xd4\x05x",  # an extension type
        b"\x93\xa8Returned\xa1x\xd6\xff\x00\x00\x00\x01",  # a time stamp
        b"\x93\xa8Returned\xa1x\x91\xd6\xff\x00\x00\x00\x01",  # ... inside a list
    ],
    ids=lambda payload: payload[:12].hex() or "nothing",
)
def test_a_payload_that_is_broken_is_refused(payload: bytes) -> None:
    with pytest.raises(m.MessageBroken):
        m.decode(payload)


@given(st.binary(max_size=64))
@settings(max_examples=300)
def test_arbitrary_payloads_raise_nothing_but_message_broken(payload: bytes) -> None:
    try:
        m.decode(payload)
    except m.MessageBroken:
        pass


@given(any_message, st.data())
def test_a_damaged_message_raises_nothing_but_message_broken(message: m.Message, data: st.DataObject) -> None:
    payload = bytearray(m.encode(message))
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    try:
        m.decode(bytes(payload[: data.draw(st.integers(0, len(payload)))]))
    except m.MessageBroken:
        pass


class _Odd:
    pass


_deep: list[Any] = []
for _ in range(2000):
    _deep = [_deep]
_loop: list[Any] = []
_loop.append(_loop)


@pytest.mark.parametrize(
    "value",
    [
        object(),
        _Odd,
        {1},
        2**64,
        -(2**63) - 1,
        "\ud800",
        _deep,
        _loop,
        {"a": {"b": object()}},
        1j,
        {5: 1},
        {"a": {None: 1}},
        {(1, 2): 3},
        {True: 1},
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_other_side_could_not_read_is_refused_before_it_is_sent(value: Any) -> None:
    with pytest.raises(m.MessageBroken, match="Returned"):
        m.encode(m.Returned("job", value))


# --- asks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "paused", "pending"),
    [
        (["pause"], True, True),
        (["pause", "resume"], False, False),
        (["resume"], False, False),
        (["pause", "pause", "resume"], False, False),
        (["pause", "step"], False, True),
        (["step", "pause"], True, True),
        (["step", "resume"], False, False),
        (["stop"], False, True),
        (["stop", "resume"], False, True),
        (["leave", "pause"], True, True),
    ],
)
def test_requests_leave_these_flags(asked: list[str], paused: bool, pending: bool) -> None:
    asks = Asks()
    for each in asked:
        asks.take(each, 2)
    assert (asks.paused, asks.pending()) == (paused, pending)


def test_an_unknown_request_is_one_clear_error() -> None:
    with pytest.raises(ValueError, match="dance"):
        Asks().take("dance")


def test_the_most_final_signal_comes_first_and_stays() -> None:
    asks = Asks()
    assert asks.signal("job-1") is None
    asks.cancelled.add("job-1")
    assert isinstance(asks.signal("job-1"), SparkCancelError)
    assert asks.signal("job-2") is None
    assert asks.signal(None) is None
    asks.take("leave")
    assert isinstance(asks.signal("job-1"), SparkReloadError)
    asks.take("stop")
    for _ in range(2):
        assert isinstance(asks.signal("job-1"), SparkStopError)


# --- checkpoints -----------------------------------------------------------------------------------------------------


class Checkpoints:
    """A checkpoint with a bell to ring, that counts how often it takes the slow way."""

    def __init__(self) -> None:
        self.bell = bytearray(2)
        self.slow_calls = 0
        self.is_pending = False
        self.act: Callable[[], object] = lambda: None
        face = memoryview(self.bell).cast("H")
        self.checkpoint, self.passed, self.start_at = make_checkpoint(face, self._slow, lambda: self.is_pending)

    def ring(self) -> None:
        self.bell[0] = (self.bell[0] + 1) % 256

    def _slow(self) -> Any:
        self.slow_calls += 1
        self.act()
        return DONE


def test_a_checkpoint_looks_up_only_when_the_bell_rang() -> None:
    checks = Checkpoints()
    for _ in range(5):
        checks.checkpoint()
    assert (checks.slow_calls, checks.passed()) == (1, 5)  # the first one looks in any case
    checks.ring()
    for _ in range(5):
        checks.checkpoint()
    assert (checks.slow_calls, checks.passed()) == (2, 10)


def test_a_bell_that_rings_while_the_checkpoint_looks_up_is_not_missed() -> None:
    checks = Checkpoints()
    checks.act = checks.ring
    for _ in range(5):
        checks.checkpoint()
    assert checks.slow_calls == 5
    checks.act = lambda: None
    checks.checkpoint()
    checks.checkpoint()
    assert checks.slow_calls == 6


def test_a_checkpoint_that_raised_or_has_something_pending_looks_again() -> None:
    checks = Checkpoints()

    def stop() -> None:
        raise SparkStopError

    checks.act = stop
    for _ in range(3):
        with pytest.raises(SparkStopError):
            checks.checkpoint()
    checks.act, checks.is_pending = lambda: None, True
    checks.checkpoint()
    checks.checkpoint()
    assert (checks.slow_calls, checks.passed()) == (5, 5)
    checks.is_pending = False
    checks.checkpoint()
    checks.checkpoint()
    assert checks.slow_calls == 6


def test_the_count_goes_on_from_where_it_is_set() -> None:
    checks = Checkpoints()
    checks.checkpoint()
    checks.start_at(1000)
    checks.checkpoint()
    assert checks.passed() == 1001


def in_loop(work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine to its end."""
    return asyncio.run(work)


@pytest.mark.parametrize("checkpoint", [lambda: DONE, idle_checkpoint])
def test_await_gives_others_a_turn_each_millisecond_and_no_oftener(checkpoint: Callable[[], Awaitable[None]]) -> None:
    async def work() -> int:
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.ensure_future(other())
        loop = asyncio.get_running_loop()
        began = loop.time()
        passed = 0
        while loop.time() - began < 0.1:
            await checkpoint()
            passed += 1
        assert passed > 5 * turns
        task.cancel()
        return turns

    assert 20 <= in_loop(work()) <= 110


def test_a_pause_that_is_not_awaited_warns_and_one_that_is_awaited_does_not() -> None:
    waited = []

    async def wait() -> None:
        waited.append(1)

    with pytest.warns(RuntimeWarning, match=r"await spark\.checkpoint\(\)"):
        PauseTurn(wait)

    async def work() -> None:
        await PauseTurn(wait)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        in_loop(work())
    assert waited == [1]


# --- loops -----------------------------------------------------------------------------------------------------------


class Interrupted(BaseException):
    """In place of a reload."""


class Machine:
    """Runs programs of loops, with interruptions after so many checkpoints, each time with the positions of before.

    A program is a list: a number is a step to be done, ``(n, key, program)`` a loop of *n* items.
    """

    def __init__(self, interruptions: list[int]) -> None:
        self.left = list(interruptions)
        self.done: list[Any] = []
        self.positions: dict[str, int] = {}

    def checkpoint(self) -> Any:
        if self.left:
            self.left[0] -= 1
            if self.left[0] < 0:
                self.left.pop(0)
                raise Interrupted
        return DONE

    def run(self, program: list[Any], call: str | None = None) -> list[Any]:
        while True:
            self.loops = Loops(self.checkpoint)
            self.loops.positions.update(self.positions)
            entered = self.loops.enter_call(call) if call else None
            try:
                self._run(program, ())
            except Interrupted:
                if entered:
                    self.loops.leave_call(entered, finished=False)
                assert self.loops.current().path == "main"
                self.positions = json.loads(json.dumps(self.loops.positions))
            else:
                if entered:
                    self.loops.leave_call(entered, finished=True)
                else:
                    self.loops.finish_main()
                return self.done

    def _run(self, program: list[Any], where: tuple[int, ...]) -> None:
        for each in program:
            if isinstance(each, int):
                if where:
                    self.done.append((*where, each))  # a step outside every loop is done at each start
            else:
                count, key, inner = each
                for item in self.loops.loop(range(count), key):
                    self._run(inner or [0], (*where, item))


def plainly(program: list[Any], where: tuple[int, ...] = ()) -> list[Any]:
    """What a program does without interruption."""
    done: list[Any] = []
    for each in program:
        if isinstance(each, int):
            done += [(*where, each)] if where else []
        else:
            count, _, inner = each
            for item in range(count):
                done += plainly(inner or [0], (*where, item))
    return done


@pytest.mark.parametrize(
    "program",
    [
        [(5, None, [])],
        [(3, None, []), (3, None, []), (0, None, []), (2, "key", [])],
        [(3, None, [(3, None, []), (2, None, [])])],
        [(2, "epoch", [(2, "batch", [(2, None, [])]), (2, "test", [])]), (2, None, [])],
    ],
)
def test_every_item_is_done_once_wherever_one_interruption_comes(program: list[Any]) -> None:
    wanted = plainly(program)
    for cut in range(len(wanted) * 3):
        assert Machine([cut]).run(program) == wanted
        assert Machine([cut]).run(program, call="job-1") == wanted


_programs = st.recursive(
    st.just([]),
    lambda inner: st.lists(st.tuples(st.integers(0, 3), st.none(), inner), max_size=3),
    max_leaves=8,
)


@given(_programs, st.lists(st.integers(0, 30), max_size=6))
def test_every_item_is_done_once_whatever_the_loops_and_interruptions(program: list[Any], cuts: list[int]) -> None:
    # Only innermost loops do something, and only once their item's checkpoint is behind them: an item around
    # another loop is entered again after an interruption inside it, as it must be.
    assert Machine(cuts).run(program) == plainly(program)


def test_positions_of_what_is_over_are_forgotten() -> None:
    machine = Machine([])
    sizes = []
    machine.checkpoint = lambda: sizes.append(len(machine.loops.positions)) or DONE  # type: ignore[method-assign,func-returns-value]
    machine.run([(50, None, [(10, None, [])]), (50, "b", [(10, "c", [])])])
    assert max(sizes) <= 4
    assert machine.loops.positions == {}
    machine.run([(3, None, [(2, None, [])])], call="job-1")
    assert machine.loops.positions == {}


def test_a_call_has_positions_of_its_own() -> None:
    loops = Loops(idle_checkpoint)
    outer = iter(loops.loop(range(5), "same"))
    next(outer), next(outer)
    entered = loops.enter_call("job-1")
    assert list(loops.loop(range(3), "same")) == [0, 1, 2]
    loops.leave_call(entered, finished=True)
    assert list(outer) == [2, 3, 4]


def test_progress_names_running_loops_with_item_total_and_time_left() -> None:
    loops = Loops(idle_checkpoint)
    assert loops.progress() == {}
    known, unknown = iter(loops.loop([5, 6, 7], "known")), None
    next(known)
    assert loops.progress()["known"] == [0, 3, -1]
    next(known)
    item, total, left = loops.progress()["known"]
    assert (item, total) == (1, 3)
    assert left >= 0
    unknown = iter(loops.loop(iter("ab"), "unknown"))
    next(unknown)
    assert loops.progress()["unknown"] == [0, -1, -1]
    unknown.close()  # type: ignore[attr-defined]
    known.close()  # type: ignore[attr-defined]
    assert loops.progress() == {}


def test_asynchronous_loops_of_two_tasks_do_not_mix() -> None:
    async def work(loops: Loops, key: str, seen: list[Any]) -> None:
        async for i in loops.loop(range(5), key):
            async for j in loops.loop(range(2), None):
                seen.append((i, j))
                await asyncio.sleep(0)

    async def both() -> tuple[list[Any], list[Any], dict[str, int]]:
        loops, one, two = Loops(idle_checkpoint), [], []
        await asyncio.gather(work(loops, "one", one), work(loops, "two", two))
        loops.finish_main()
        return one, two, loops.positions

    wanted = [(i, j) for i in range(5) for j in range(2)]
    assert in_loop(both()) == (wanted, wanted, {})


# --- values ----------------------------------------------------------------------------------------------------------

_python = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8)
    | st.complex_numbers(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(
            st.one_of(st.text(max_size=4), st.integers(), st.booleans(), st.none(), st.binary(max_size=2)),
            inner,
            max_size=4,
        )
    ),
    max_leaves=15,
)


@given(_python)
def test_every_value_becomes_something_that_travels(value: Any) -> None:
    for shown in (plain(value), summary(value)):
        message = m.decode(m.encode(m.Returned("job", shown)))
        json.dumps(message.value)  # type: ignore[attr-defined]


@pytest.mark.parametrize("value", [None, True, 0, -5, 1.5, "text", [1, "two", [3.0]], {"a": {"b": [None]}}, [], {}])
def test_plain_data_stays_as_it_is(value: Any) -> None:
    assert plain(value) == value == summary(value)


def test_plain_keeps_long_things_whole_and_summary_cuts_them() -> None:
    assert plain("x" * 100_000) == "x" * 100_000
    assert plain(list(range(10_000))) == list(range(10_000))
    assert len(summary("x" * 100_000)) < 10_000
    assert len(summary(list(range(10_000)))) < 1000
    assert len(summary({str(i): i for i in range(10_000)})) < 1000


@pytest.mark.parametrize("depth", [2, 3])
def test_a_summary_is_bounded_as_a_whole(depth: int) -> None:
    value: Any = 1
    for _ in range(depth):
        value = [value] * 64
    assert len(json.dumps(summary(value))) < 100_000


def test_values_that_hold_themselves_have_an_end() -> None:
    around: dict[str, Any] = {}
    around["self"] = [around]
    json.dumps([summary(around), plain(around)])


# --- exposed names ---------------------------------------------------------------------------------------------------


def test_only_what_changed_is_told() -> None:
    names, state = ExposedNames(), {"step": 0, "list": [1]}
    names.add({"state": state, "fixed": 1})
    assert names.changes() == {"state": {"step": 0, "list": [1]}, "fixed": 1}
    assert names.changes() == {}
    state["list"].append(2)  # type: ignore[attr-defined]
    assert names.changes() == {"state": {"step": 0, "list": [1, 2]}}
    names.add({"fixed": 1})
    assert names.changes() == {}
    names.add({"fixed": 2, "more": None})
    assert names.changes() == {"fixed": 2, "more": None}


@pytest.mark.parametrize(("before", "after"), [(1, True), (0, False), ([1], [True])])
def test_a_change_of_type_is_a_change(before: Any, after: Any) -> None:
    names = ExposedNames()
    names.add({"x": before})
    names.changes()
    names.add({"x": after})
    assert [type(each) for each in names.changes().values()] == [type(after)]


def test_a_value_that_is_not_a_number_does_not_change_for_ever() -> None:
    names = ExposedNames()
    state = {"loss": float("nan")}
    names.add({"state": state, "loss": float("nan")})
    names.changes()
    state["loss"] = float("nan")
    assert names.changes() == {}


def test_a_name_is_a_value_or_a_function_and_the_last_one_wins() -> None:
    names = ExposedNames()
    names.add({"x": len})
    assert names.has_functions()
    names.add({"x": 1})
    assert not names.has_functions()
    assert names.changes() == {"x": 1}
    names.add({"x": len})
    assert (list(names.functions), names.changes()) == (["x"], {})


class _Callable:
    def method(self) -> int:
        return 1

    def __call__(self) -> int:
        return 2


@pytest.mark.parametrize(
    "function",
    [
        len,
        lambda: 1,
        _Callable().method,
        functools.partial(len, "x"),
        functools.lru_cache(lambda: 1),
        functools.wraps(len)(lambda: 1),
    ],
    ids=["builtin", "lambda", "method", "partial", "cached", "wrapped"],
)
def test_everything_that_is_a_function_can_be_called(function: Any) -> None:
    names = ExposedNames()
    names.add({"f": function})
    functions, _ = names.describe()
    assert list(functions) == ["f"]
    m.decode(m.encode(m.Exposed(functions, {})))


def test_functions_with_odd_signatures_are_described_as_data() -> None:
    class Rude:
        def __repr__(self) -> str:
            raise ValueError("no")

    def odd(a: "Nowhere", /, b: int = 1, *rest: Any, c: Any = None, **named: list[int]) -> None:  # type: ignore[name-defined] # noqa: F821
        pass

    odd.__defaults__, odd.__kwdefaults__ = (object(),), {"c": [Rude(), {1: 2}]}

    names = ExposedNames()
    names.add({"odd": odd, "max": max, "type": type.mro, "dict get": {}.get})
    functions, controls = names.describe()
    described = m.decode(m.encode(m.Exposed(functions, controls)))
    assert [each["name"] for each in described.functions["odd"]["parameters"]] == ["a", "b", "rest", "c", "named"]  # type: ignore[attr-defined]


def control(default: Any, low: Any = None, high: Any = None) -> ExposedNames:
    """Names with one control, ``x``."""
    names = ExposedNames()
    assert names.control("x", default, {"default": default, "min": low, "max": high}) == default
    return names


@pytest.mark.parametrize(
    ("default", "bounds", "value", "taken"),
    [
        (0.5, (0, 1), 1, 1.0),
        (0.5, (0, 1), 0.25, 0.25),
        (8, (1, None), 1, 1),
        (8, (None, 9), -100, -100),
        ("a", (None, None), "b", "b"),
        (True, (None, None), False, False),
    ],
)
def test_a_control_takes_what_fits(default: Any, bounds: tuple[Any, Any], value: Any, taken: Any) -> None:
    names = control(default, *bounds)
    names.turn("x", value)
    found = names.control("x", default, {"default": default, "min": bounds[0], "max": bounds[1]})
    assert (type(found), found) == (type(taken), taken)
    assert names.describe()[1]["x"]["value"] == taken


@pytest.mark.parametrize(
    ("default", "bounds", "value"),
    [
        (0.5, (0, 1), 1.1),
        (0.5, (0, 1), -0.1),
        (0.5, (0, 1), "a"),
        (0.5, (0, 1), True),
        (0.5, (0, 1), None),
        (0.5, (0, 1), [1]),
        (0.5, (0, 1), float("nan")),
        (0.5, (None, None), float("nan")),
        (8, (1, 9), 0.5),
        (8, (1, 9), 10),
        (8, (1, 9), True),
        ("a", (None, None), 1),
        (True, (None, None), 1),
        (True, (None, None), "no"),
    ],
)
def test_a_control_refuses_what_does_not_fit(default: Any, bounds: tuple[Any, Any], value: Any) -> None:
    names = control(default, *bounds)
    with pytest.raises(SparkUsageError, match="'x'"):
        names.turn("x", value)
    assert names.describe()[1]["x"]["value"] == default


def test_a_turned_value_outside_the_new_bounds_is_not_used() -> None:
    names = control(0.5, 0, 10)
    names.turn("x", 9.0)
    assert names.control("x", 0.5, {"default": 0.5, "min": 0, "max": 1}) <= 1


def test_a_turned_value_of_another_type_than_the_new_default_is_not_used() -> None:
    names = control(5)
    names.turn("x", 7)
    assert names.control("x", "fast", {"default": "fast", "min": None, "max": None}) == "fast"
