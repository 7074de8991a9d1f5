"""The graph of persisted values: plain Python and numpy. PyTorch is in `test_graph_torch`."""

from __future__ import annotations

import collections
import dataclasses
import enum
import gc
import pickle
import random
import re
import subprocess
import sys
import threading
import warnings
import weakref
from typing import Any

import numpy as np
import pytest
from graph_help import SCRIPT, read, round_trip, script
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spark_workers.scripts.graph import Dump, NeedsInitializer, dump, load


class Color(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass
class Config:
    rate: float
    names: list[str]


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    x: int
    y: object


Point = collections.namedtuple("Point", "x y")


class Thing:
    """Takes any attribute."""


class Counter:
    """Cannot be pickled, and saves its state."""

    def __init__(self, start: int = 0) -> None:
        self.count = start
        self.hook = lambda: None

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def helper() -> int:
    return 7


# Containers, classes, identity


def test_ordinary_values_come_back_equal() -> None:
    values: dict[str, Any] = {
        "enum": Color.BLUE,
        "dataclass": Config(0.1, ["a"]),
        "slots": Slotted(1, [2]),
        "namedtuple": Point(1, (2, 3)),
        "deque": collections.deque([1, 2], maxlen=3),
        "defaultdict": collections.defaultdict(list, {"a": [1]}),
        "ordered": collections.OrderedDict(b=1, a=2),
        "counter": collections.Counter("hello"),
        "sets": ({1, 2}, frozenset({3})),
        "text": "ünïcode\udcff",
        "numbers": (1, -(2**100), 1.5, float("inf"), 1j, None, True),
        "bytes": (b"a" * 10_000, bytearray(b"b" * 10_000)),
        "function": helper,
        "type": Config,
        "builtin": len,
    }
    assert round_trip(values) == values


def test_identity_is_kept_within_and_across_keys() -> None:
    shared = [1]
    values = round_trip({"a": {"x": shared, "y": shared}, "b": shared})
    assert values["a"]["x"] is values["a"]["y"] is values["b"]


def test_cycles_come_back_as_cycles() -> None:
    thing, ring = Thing(), []
    thing.me, thing.ring = thing, ring
    ring.append((ring, thing))
    values = round_trip({"thing": thing, "ring": ring})
    assert values["thing"].me is values["thing"]
    assert values["ring"][0][0] is values["ring"] is values["thing"].ring
    assert values["ring"][0][1] is values["thing"]


def test_random_generators_go_on_where_they_were() -> None:
    plain, new, old = random.Random(3), np.random.default_rng(3), np.random.RandomState(3)
    plain.random(), new.random(), old.rand()
    values = round_trip({"plain": plain, "new": new, "old": old, "bits": new.bit_generator})
    assert values["plain"].random() == plain.random()
    assert values["new"].random() == new.random()
    assert values["old"].rand() == old.rand()
    assert values["new"].bit_generator is values["bits"]


def test_no_values_are_a_dump_too() -> None:
    assert round_trip({}) == {}


def test_offsets_say_where_each_key_starts() -> None:
    dumped = dump({"a": 1, "b": [2]})
    assert [pickle.loads(dumped.stream[offset:]) for offset in dumped.offsets] == [1, [2]]


def test_old_objects_get_the_methods_of_the_new_code() -> None:
    with script("class Model:\n    def area(self): return self.x") as module:
        model = module.Model()
        model.x = 3
        model.__class__.__module__ = SCRIPT
        dumped = dump({"model": model})
    with script("class Model:\n    def area(self): return self.x ** 2"):
        assert read(dumped).values["model"].area() == 9  # type: ignore[attr-defined]


def test_importing_the_module_loads_nothing_but_the_standard_library() -> None:
    code = (
        "import sys; before = set(sys.modules); import spark_workers.scripts.graph as g; d = g.dump({'a': [1]});"
        "g.load(d.stream, [], d.keys, d.offsets);"
        "new = {m.split('.')[0] for m in set(sys.modules) - before};"
        "print(sorted(m for m in new if m not in sys.stdlib_module_names))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "['spark_workers']"


# numpy


def aliases(a: Any, b: Any) -> bool:
    return bool(np.shares_memory(a, b))


def test_a_view_still_writes_into_its_base() -> None:
    base = np.zeros((100, 100))
    values = round_trip({"base": base, "view": base[::2, 1], "flat": base.ravel(), "other": np.zeros(3)})
    values["view"][:] = 5
    assert values["base"][2, 1] == 5
    assert values["flat"][201] == 5
    assert not aliases(values["base"], values["other"])


def test_a_view_before_its_base_and_small_arrays_alias_too() -> None:
    base = np.arange(10)
    values = round_trip({"view": base[3:5], "base": base})
    values["view"][0] = -1
    assert values["base"][3] == -1


def test_views_of_memory_without_a_common_array_are_merged() -> None:
    raw = bytearray(20_000)
    low, high = np.frombuffer(raw, np.uint8, 12_000), np.frombuffer(raw, np.uint8, 12_000, 8_000)
    both = np.frombuffer(raw, np.uint8)
    far = np.frombuffer(raw, np.uint8, 10)
    dumped = dump({"low": low, "high": high, "far": far, "both": both})
    assert [one.nbytes for one in dumped.buffers] == [20_000]
    values: dict[str, Any] = read(dumped).values
    values["both"][9_000] = 7
    assert values["low"][9_000] == values["high"][1_000] == 7
    assert aliases(values["far"], values["low"])


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12.0).reshape(3, 4)[::-1, ::-2],
        np.asfortranarray(np.arange(12).reshape(3, 4)),
        np.arange(5000)[::-1],
        np.broadcast_to(np.arange(4), (1000, 4)),
        np.array(3.5),
        np.array([]),
        np.empty((3, 0, 2), np.int16),
        np.array(["2020-01-01", "NaT"], "datetime64[D]"),
        np.array([1, 2], "timedelta64[s]"),
        np.array([(1, "a"), (2, "b")], [("n", "<i4"), ("s", "U3")]),
        np.array(["a", "bcd"]),
        np.array([b"x"], "S5"),
        np.array([1, 2], ">i4"),
        np.array([1 + 2j]),
        np.array([True, False]),
        np.array([1.5], np.float16),
        np.array([1.5], np.longdouble),
        np.array([1, "a", None], object),
        np.array(["a", "bcd" * 100], np.dtypes.StringDType()),
        np.empty(3, "V4").view("V4"),
        np.ones(3, "S0"),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}{array.strides}",
)
def test_any_array_comes_back_as_it_was(array: Any) -> None:
    back = round_trip({"array": array})["array"]
    assert type(back) is type(array)
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert np.array_equal(back, array) or array.dtype.kind in "MV"
    assert array.dtype.hasobject or back.tobytes() == array.tobytes()
    assert back.flags.writeable == array.flags.writeable
    if array.size and not array.dtype.hasobject and array.itemsize:
        assert back.strides == array.strides


def test_a_read_only_view_stays_read_only_and_its_base_writable() -> None:
    base = np.zeros(1000)
    view = base.view()
    view.flags.writeable = False
    values = round_trip({"view": view, "base": base})
    values["base"][0] = 1
    assert values["view"][0] == 1
    with pytest.raises(ValueError, match="read-only"):
        values["view"][0] = 2


def test_subclasses_of_arrays_go_the_default_way() -> None:
    masked = np.ma.masked_array([1, 2, 3], mask=[0, 1, 0])
    record = np.rec.array([(1, 2.0)], dtype=[("a", int), ("b", float)])
    values = round_trip({"masked": masked, "record": record})
    assert values["masked"].tolist() == [1, None, 3]
    assert type(values["record"]) is np.recarray
    assert values["record"].a[0] == 1


def test_a_column_beside_objects_does_not_carry_their_pointers() -> None:
    rows = np.array([(1, "a")], [("n", "i8"), ("o", "O")])
    values = round_trip({"n": rows["n"], "rows": rows})
    assert values["n"].tolist() == [1]
    assert values["rows"]["o"][0] == "a"


def test_buffers_are_the_live_memory_and_loaded_arrays_lie_in_the_given_memory() -> None:
    array = np.arange(1000.0)
    dumped = dump({"array": array})
    (buffer,) = dumped.buffers
    assert (buffer.format, buffer.ndim, buffer.contiguous, buffer.nbytes) == ("B", 1, True, 8000)
    array[0] = 42
    assert np.frombuffer(buffer)[0] == 42
    memory = memoryview(bytearray(buffer))
    back: Any = load(dumped.stream, [memory], dumped.keys, dumped.offsets).values["array"]
    back[1] = 43
    assert np.frombuffer(memory)[1] == 43


def test_buffers_outlive_the_objects_that_only_the_dump_made() -> None:
    class Lazy:
        def __reduce__(self) -> Any:
            return np.asarray, (np.full(100_000, 7.0),)

    dumped = dump({"lazy": Lazy()})
    np.full(100_000, 8.0)
    assert (np.frombuffer(dumped.buffers[0]) == 7).all()


def test_small_memory_travels_in_the_stream_and_large_does_not() -> None:
    assert dump({"a": np.zeros(4095, np.uint8)}).buffers == []
    dumped = dump({"a": np.zeros(4096, np.uint8)})
    assert [one.nbytes for one in dumped.buffers] == [4096]
    assert len(dumped.stream) < 1000


def test_a_second_dump_of_loaded_values_is_as_good_as_the_first() -> None:
    base = np.arange(5000)
    values = round_trip(round_trip({"base": base, "view": base[10:], "small": base[:2].copy()}))
    values["view"][0] = -1
    assert values["base"][10] == -1


def test_memory_that_is_laid_out_anew_each_time_ends_with_an_answer() -> None:
    class Restless:
        def __reduce__(self) -> Any:
            raw = bytearray(10_000)
            return (
                Thing,
                (),
                {"a": np.frombuffer(raw, np.uint8, 6_000), "b": np.frombuffer(raw, np.uint8, 6_000, 4_000)},
            )

    dumped = dump({"restless": Restless(), "fine": np.zeros(3)})
    assert dumped.keys == ("fine",)
    assert dumped.dropped[0].reason == "its memory lies differently each time it is looked at"


# What cannot be kept


def refusal(value: object, key: str = "bad") -> tuple[str, str]:
    dumped = dump({"before": [1], key: value, "after": [2]})
    assert read(dumped).values == {"before": [1], "after": [2]}
    (dropped,) = dumped.dropped
    assert dropped.key == key
    return dropped.path, dropped.reason


def test_a_generator_is_named_with_its_path() -> None:
    thing = Thing()
    thing.gen = (x for x in ())
    assert refusal({"it": thing}, "loader") == ('loader["it"].gen', "cannot pickle 'generator' object")


def test_a_slot_an_index_and_an_argument_are_part_of_the_path() -> None:
    assert refusal([0, (1, Slotted(1, threading.Lock()))])[0] == "bad[1][1].y"
    assert refusal(collections.deque([threading.Lock()]))[0] == "bad[0]"
    assert refusal(collections.OrderedDict(a=threading.Lock()))[0] == 'bad["a"]'
    assert refusal({3: {"q": threading.Lock()}})[0] == 'bad[3]["q"]'
    assert refusal(threading.Lock())[0] == "bad"


def test_lambdas_local_functions_and_files_are_named() -> None:
    def local() -> None: ...

    class Local: ...

    assert refusal({"f": lambda: 0}) == ('bad["f"]', "cannot pickle a lambda")
    assert "it is defined inside a function" in refusal(local)[1]
    assert "it is defined inside a function" in refusal([Local()])[1]
    with open(__file__, encoding="utf-8") as file:
        assert re.fullmatch("cannot pickle '(_io.)?TextIOWrapper' (object|instances)", refusal(file)[1])


def test_whatever_a_reduction_raises_drops_only_its_key() -> None:
    class Angry:
        def __reduce__(self) -> Any:
            raise MemoryError

    class Empty:
        def __getstate__(self) -> Any:
            raise ZeroDivisionError

    assert refusal(Angry()) == ("bad", "not enough memory to pickle it")
    assert refusal([Empty()]) == ("bad[0]", "ZeroDivisionError")


def test_a_stop_of_the_script_is_no_failure_of_a_value() -> None:
    class Stops:
        def __reduce__(self) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dump({"stops": Stops()})


def test_objects_that_fail_even_when_looked_at_are_only_dropped() -> None:
    class Hostile:
        __slots__ = ("lock",)

        def __getattr__(self, name: str) -> Any:
            raise ZeroDivisionError(name)

        def __reduce__(self) -> Any:
            return Thing, (), {"lock": threading.Lock()}

    class Mute(Exception):
        def __str__(self) -> str:
            raise ValueError

    class Raises:
        def __reduce__(self) -> Any:
            raise Mute

    assert refusal([Hostile()])[0].startswith("bad")
    assert refusal(Raises()) == ("bad", "Mute")


def test_a_dump_holds_on_to_nothing_but_its_buffers() -> None:
    gc.collect()
    gc.disable()
    try:
        for bad in (None, threading.Lock()):
            thing = Thing()
            thing.array, thing.bad = np.zeros(1000), bad
            seen = weakref.ref(thing), weakref.ref(thing.array)
            dumped = dump({"thing": thing, "more": [thing.array]})
            del thing
            assert seen[0]() is None
            assert (seen[1]() is None) == (bad is not None)
            del dumped
            assert seen[1]() is None
    finally:
        gc.enable()


def test_several_bad_keys_are_all_named() -> None:
    dumped = dump({"a": threading.Lock(), "b": 1, "c": (x for x in ()), "d": lambda: 0})
    assert dumped.keys == ("b",)
    assert [dropped.key for dropped in dumped.dropped] == ["a", "c", "d"]


def test_a_failure_halfway_leaves_nothing_half_written_behind() -> None:
    shared = [1]
    dumped = dump({"bad": [shared, lambda: 0], "good": [shared]})
    assert read(dumped).values == {"good": [[1]]}


def test_who_shares_memory_with_a_lost_value_is_lost_too() -> None:
    weights, alone = np.zeros(1000), np.zeros(1000)
    dumped = dump({"view": {"w": weights[5:]}, "model": [weights, lambda: 0], "second": weights[:2], "alone": alone})
    assert dumped.keys == ("alone",)
    reasons = {dropped.key: (dropped.path, dropped.reason) for dropped in dumped.dropped}
    assert reasons["view"][0] == 'view["w"]'
    assert reasons["view"][1].startswith("shares memory with 'model', which cannot be kept")
    assert reasons["second"][1].startswith("shares memory with")


@pytest.mark.skipif(sys.version_info[:2] == (3, 12), reason="Python 3.12 has a lower limit of its own, for C code")
def test_a_nesting_of_a_thousand_comes_back() -> None:
    deep: list[Any] = []
    for _ in range(1000):
        deep = [deep]
    back = round_trip({"deep": deep})["deep"]
    for _ in range(1000):
        (back,) = back
    assert back == []


@pytest.mark.parametrize("kind", ["[deep]", "(deep,)", "{'a': deep}", "Link(deep)"])
def test_no_depth_ends_the_interpreter_even_if_the_script_lifts_the_limit(kind: str) -> None:
    code = f"""
import sys
from spark_workers.scripts.graph import dump, load
class Link:
    def __init__(self, next): self.next = next
sys.setrecursionlimit(10**6)
deep = None
for _ in range(100_000): deep = {kind}
d = dump({{"deep": deep, "fine": [1]}})
print(d.dropped[0].reason, d.keys, sys.getrecursionlimit(), len(d.dropped[0].path) < 200)
import os; sys.stdout.flush(); os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "nested too deeply to be pickled ('fine',) 1000000 True", done.stderr


def test_many_small_objects_are_no_special_case() -> None:
    many = [Point(n, str(n)) for n in range(50_000)]
    assert round_trip({"many": many})["many"] == many


def test_warnings_reach_nobody() -> None:
    class Warns:
        def __reduce__(self) -> Any:
            warnings.warn("deprecated", DeprecationWarning, stacklevel=2)
            return list, ()

    assert round_trip({"warns": Warns()})["warns"] == []


def test_an_object_with_a_state_is_kept_by_it() -> None:
    counter = Counter(5)
    first = read(dump({"counter": counter})).values["counter"]
    assert isinstance(first, NeedsInitializer)
    again = round_trip({"counter": first})["counter"]
    fresh = Counter()
    assert again.apply(fresh) is fresh
    assert fresh.count == 5


# What cannot be read

CLASSES = """
class Model:
    def __init__(self): self.weights, self.me = None, self
class Picky:
    def __setstate__(self, state):
        if broken: raise KeyError("shape")
        self.__dict__.update(state)
class Listy(list):
    def append(self, item):
        if broken: raise ValueError("full")
        super().append(item)
    extend = None
class Key:
    def __init__(self, name): self.name = name
    def __reduce__(self): return Key, (self.name,)
    def __hash__(self):
        if broken: raise TypeError("no hash")
        return hash(self.name)
    def __eq__(self, other): return self.name == other.name
import enum
class Color(enum.Enum):
    RED = 1
class Newer:
    def __new__(cls, *args, **kwargs): return super().__new__(cls)
    def __getnewargs_ex__(self): return (1,), {"a": 2}
class Setter:
    def __reduce__(self): return Setter, (), [3], None, None, put
def put(thing, state): thing.got = state
def make(x):
    if broken: raise OSError("no device")
    return Model()
class Made:
    def __reduce__(self): return make, (1,), {"x": 5}
def function(): return 4
broken = False
for thing in list(globals().values()):
    if hasattr(thing, "__module__"): thing.__module__ = NAME
""".replace("NAME", repr(SCRIPT))
BROKEN = CLASSES.replace("broken = False", "broken = True")


def dump_with(make: Any) -> Dump:
    with script(CLASSES) as module:
        dumped = dump(make(module))
        assert dumped.dropped == ()
        return dumped


def through_absence(dumped: Dump, source: str = "") -> tuple[dict[str, Any], Any]:
    """Load while the classes are gone, dump what came, and load with the classes back."""
    with script(source):
        absent = read(dumped)
        again = dump({key: {**absent.values, **absent.aside}[key] for key in dumped.keys})
        assert again.dropped == ()
    with script(CLASSES):
        back = read(again)
    assert back.unreadable == ()
    return back.values, absent


def test_only_keys_that_reach_a_missing_class_are_set_aside_and_they_come_back_whole() -> None:
    def make(module: Any) -> dict[str, Any]:
        model = module.Model()
        model.weights = np.arange(1000.0)
        return {"model": {"deep": [model]}, "view": model.weights[1:], "plain": [1]}

    dumped = dump_with(make)
    values, absent = through_absence(dumped)
    assert set(absent.values) == {"view", "plain"}
    assert set(absent.aside) == {"model"}
    assert absent.unreadable[0].reason.startswith(f"{SCRIPT}.Model is missing (AttributeError")
    model = values["model"]["deep"][0]
    assert type(model).__name__ == "Model"
    assert model.me is model
    values["view"][0] = -1
    assert model.weights[1] == -1


def test_a_missing_module_is_like_a_missing_class() -> None:
    dumped = dump_with(lambda module: {"model": module.Model(), "plain": [1]})
    absent = read(dumped)
    assert "ModuleNotFoundError" in absent.unreadable[0].reason
    again = dump({**absent.aside, **absent.values})
    with script(CLASSES):
        assert type(read(again).values["model"]).__name__ == "Model"


@pytest.mark.parametrize("source", ["", BROKEN], ids=["gone", "failing"])
@pytest.mark.parametrize(
    ("make", "check"),
    [
        (lambda m: m.Color.RED, lambda v: v.name == "RED"),
        (lambda m: {m.Color.RED: 1}, lambda v: [k.name for k in v] == ["RED"]),
        (lambda m: m.Listy([1, 2]), lambda v: list(v) == [1, 2]),
        (lambda m: m.Listy([1]), lambda v: list(v) == [1]),
        (lambda m: [m.Newer()], lambda v: type(v[0]).__name__ == "Newer"),
        (lambda m: m.Setter(), lambda v: v.got == [3]),
        (lambda m: m.function, lambda v: v() == 4),
        (lambda m: m.Made(), lambda v: v.x == 5),
        (lambda m: {m.Key("a"): 1, m.Key("b"): 2}, lambda v: sorted(k.name for k in v) == ["a", "b"]),
        (lambda m: {m.Key("a")}, lambda v: [k.name for k in v] == ["a"]),
        (lambda m: frozenset({(1, m.Key("a"))}), lambda v: [k[1].name for k in v] == ["a"]),
        (lambda m: collections.defaultdict(m.Model, a=1), lambda v: type(v["b"]).__name__ == "Model" and v["a"] == 1),
        (lambda m: collections.OrderedDict(a=m.Model()), lambda v: type(v["a"]).__name__ == "Model"),
    ],
    ids=[*"abcdefghijklm"],
)
def test_what_cannot_be_made_is_whole_again_later(make: Any, check: Any, source: str) -> None:
    dumped = dump_with(lambda module: {"value": make(module), "other": [2]})
    values, absent = through_absence(dumped, source)
    assert "other" in absent.values
    if not source:
        assert set(absent.aside) == {"value"}
    assert check(values["value"])


def test_a_failing_setstate_sets_aside_only_its_own_keys() -> None:
    def make(module: Any) -> dict[str, Any]:
        picky = module.Picky()
        picky.x, picky.me, shared = 3, [picky], [1]
        picky.shared = shared
        return {"first": [picky], "second": {"p": picky}, "third": shared, "model": module.Model()}

    values, absent = through_absence(dump_with(make), BROKEN)
    assert set(absent.values) == {"third", "model"}
    assert absent.unreadable[0].reason == f"{SCRIPT}.Picky.__setstate__ failed: KeyError: 'shape'"
    picky = values["first"][0]
    assert picky.me[0] is picky is values["second"]["p"]
    assert picky.shared is values["third"]


def test_a_value_set_aside_can_be_set_aside_again() -> None:
    dumped = dump_with(lambda module: {"model": module.Model()})
    for _ in range(3):
        absent = read(dumped)
        assert absent.unreadable[0].reason.startswith(f"{SCRIPT}.Model is missing")
        dumped = dump(absent.aside)
    with script(CLASSES):
        assert type(read(dumped).values["model"]).__name__ == "Model"


def test_a_stream_that_is_cut_or_mixed_up_is_refused() -> None:
    dumped = dump({"a": [1, 2, "three"], "b": np.zeros(3)})
    for stream, offsets in ((dumped.stream[:-5], dumped.offsets), (dumped.stream, (0, 3)), (b"", dumped.offsets)):
        with pytest.raises(pickle.UnpicklingError):
            load(stream, [], dumped.keys, offsets)


# Anything with anything


def _arrays(draw: Any) -> list[Any]:
    bases = [np.arange(draw(st.sampled_from([0, 1, 6, 700]))) for _ in range(draw(st.integers(1, 3)))]
    arrays = list(bases)
    for _ in range(draw(st.integers(0, 5))):
        source = draw(st.sampled_from(arrays))
        cut = slice(
            draw(st.none() | st.integers(-8, 8)),
            draw(st.none() | st.integers(-8, 8)),
            draw(st.sampled_from([1, 2, -1, -3])),
        )
        view = source[cut]
        arrays.append(
            draw(st.sampled_from([view, view.view(np.uint8) if view.strides == (8,) else view, view.T[None]]))[0:]
        )
    return arrays


@st.composite
def graphs(draw: Any) -> tuple[dict[str, Any], list[Any]]:
    arrays = _arrays(draw)
    pool: list[Any] = [*arrays, 1, "a", None, 2.5]
    for _ in range(draw(st.integers(1, 8))):
        members = draw(st.lists(st.sampled_from(range(len(pool))), max_size=4))
        inside = [pool[n] for n in members]
        thing = Thing()
        thing.inside = inside
        pool.append(draw(st.sampled_from([inside, tuple(inside), dict(enumerate(inside)), thing])))
    keys = draw(st.lists(st.sampled_from("abcdef"), unique=True, min_size=1))
    return {key: draw(st.sampled_from(pool)) for key in keys}, arrays


def walk(value: Any, seen: dict[int, int], out: list[Any], arrays: list[Any]) -> None:
    """Write down structure, identity and arrays in an order that equal graphs have in common."""
    if isinstance(value, int | str | float | None) or (isinstance(value, tuple) and not value):
        out.append(value)
        return
    if id(value) in seen:
        out.append(("again", seen[id(value)]))
        return
    seen[id(value)] = len(seen)
    out.append(type(value))
    if isinstance(value, np.ndarray):
        arrays.append(value)
        return
    children = value.values() if isinstance(value, dict) else [value.inside] if isinstance(value, Thing) else value
    out.append(len(children))
    for child in children:
        walk(child, seen, out, arrays)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(graphs())
def test_any_graph_of_aliased_arrays_comes_back_the_same(drawn: tuple[dict[str, Any], list[Any]]) -> None:
    values, _ = drawn
    back = round_trip(values)
    shapes: list[list[Any]] = [[], []]
    arrays: list[list[Any]] = [[], []]
    for graph, shape, found in zip((values, back), shapes, arrays, strict=True):
        walk([graph[key] for key in values], {}, shape, found)
    assert shapes[0] == shapes[1]
    for old, new in zip(*arrays, strict=True):
        assert old.dtype == new.dtype
        assert np.array_equal(old, new)
    places = [[one.__array_interface__["data"][0] for one in found] for found in arrays]
    for i, one in enumerate(arrays[0]):
        for j, other in enumerate(arrays[0][:i]):
            assert np.may_share_memory(one, other) == np.may_share_memory(arrays[1][i], arrays[1][j])
            if np.may_share_memory(one, other):
                assert places[0][i] - places[0][j] == places[1][i] - places[1][j]
