"""Emscripten's functions in Python, compared with what Emscripten itself answered under node.

`emscripten_answers.json` holds questions and answers; its note says how they were made. Times are asked in several
time zones, since both sides take that of the process.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from spark_workers.engines.outline import read_outline
from spark_workers.hosts.emscripten import zones
from spark_workers.hosts.emscripten.dates import fields_of, local_seconds
from spark_workers.hosts.emscripten.files import FileTable, Log
from spark_workers.hosts.emscripten.functions import FUNCTIONS
from spark_workers.hosts.emscripten.memory import Heap
from spark_workers.hosts.emscripten.system import System
from spark_workers.hosts.emscripten.thrown import describe
from spark_workers.hosts.failures import KINDS, GuestFailed
from spark_workers.packages.glue import Glue, Preloaded, read_glue
from spark_workers.packages.package import read_package

HERE = Path(__file__).resolve().parent
ANSWERS = json.loads((HERE / "emscripten_answers.json").read_text(encoding="utf-8"))
PROBE = HERE.parent / "models" / "packages" / "emscripten-probe.zip"
OLD = ("year", "yearday", "weeks")  # what emcc 3.1.6 does otherwise than later ones
DATA = b"hello preload archivesecond"
FILES = (Preloaded("/assets/data.gz", 0, 21), Preloaded("/assets/sub/two.txt", 21, 27))
TM, TIME, VECTOR, BUFFER = 1024, 2048, 2064, 4096


class Plain:
    """A memory that is no guest's. Fits `emscripten.memory.Memory`."""

    def __init__(self, pages: int = 16, most: int = 32) -> None:
        self.data = bytearray(pages << 16)
        self._most = most << 16

    def size(self) -> int:
        return len(self.data)

    def read(self, address: int, length: int) -> bytes:
        self._check(address, length)
        return bytes(self.data[address : address + length])

    def write(self, address: int, data: bytes) -> None:
        self._check(address, len(data))
        self.data[address : address + len(data)] = data

    def grow(self, pages: int) -> bool:
        if len(self.data) + (pages << 16) > self._most:
            return False
        self.data += bytes(pages << 16)
        return True

    def _check(self, address: int, length: int) -> None:
        if not 0 <= address <= address + length <= len(self.data):
            raise GuestFailed("bad-answer", f"{length} bytes at {address} are outside")


class Guest:
    """A system without a guest, and a plain memory to call its functions with."""

    def __init__(self, pages: int = 16, most: int = 32, **facts: Any) -> None:
        self.memory = Plain(pages, most)
        self.log = Log()
        self.exports: dict[str, Callable[..., int]] = {"malloc": self.allocate}
        self.glue = Glue(imports={}, exports={}, memory="m", files=FILES, **facts)
        self.system = System(self.memory, FileTable(self.log, DATA, FILES), self.glue, self.exports.get)
        self.heap = Heap(self.memory)
        self.moments = "i"  # the type in which they are returned
        self._top = 1 << 17

    def allocate(self, size: int) -> int:
        self._top += size + 15 & ~15
        return self._top - (size + 15 & ~15)

    def text(self, text: str) -> int:
        place = self.allocate(len(text.encode()) + 1)
        self.memory.write(place, text.encode() + b"\0")
        return place

    def call(self, name: str, letters: str, result: str, *arguments: float) -> Any:
        """Call a function by the letters of its parameters and result."""
        types = {"i": "i32", "j": "i64", "d": "f64"}
        params, results = ", ".join(types[each] for each in letters), types.get(result, "()")
        return self.system.function(name, f"({params}) -> {results}")(*arguments)

    def tm(self, count: int = 10) -> list[int]:
        return [self.heap.i32(TM + 4 * each) for each in range(count)]

    def set_tm(self, values: list[int]) -> None:
        for index, value in enumerate(values):
            self.heap.set_i32(TM + 4 * index, value)

    def open(self, path: str, flags: int = 0) -> int:
        return int(self.call("syscall_open", "iii", "i", self.text(path), flags, 0))

    def read(self, number: int, length: int) -> int:
        self.heap.set_i32(VECTOR, BUFFER)
        self.heap.set_i32(VECTOR + 4, length)
        return self._moved("fd_read", number)

    def write(self, number: int, data: bytes) -> int:
        self.memory.write(BUFFER, data)
        self.heap.set_i32(VECTOR, BUFFER)
        self.heap.set_i32(VECTOR + 4, len(data))
        return self._moved("fd_write", number)

    def _moved(self, name: str, number: int) -> int:
        error = self.call(name, "iiii", "i", number, VECTOR, 1, VECTOR + 8)
        return -error if error else self.heap.i32(VECTOR + 8)

    def asked(self, operation: str, *given: Any) -> Any:
        """Answer what the probe was asked."""
        try:
            return getattr(self, f"_do_{operation}")(*given)
        except GuestFailed as problem:
            return f"threw {problem}"

    def _do_localtime(self, moment: int) -> list[int]:
        self.heap.set_i32(TIME, moment)
        self.call("localtime_js", "ii", "", TIME, TM)
        return self.tm()

    def _do_gmtime(self, moment: int) -> list[int]:
        self.heap.set_i32(TIME, moment)
        self.call("gmtime_js", "ii", "", TIME, TM)
        return self.tm(8)

    def _do_mktime(self, values: list[int]) -> list[Any]:
        self.set_tm(values)
        return [self.call("mktime_js", "i", self.moments, TM), self.tm(9)]

    def _do_timegm(self, values: list[int]) -> list[Any]:
        self.set_tm(values)
        return [self.call("timegm_js", "i", "i", TM), self.tm()[6:8]]

    def _do_tz(self) -> str:
        self.call("tzset_js", "iii", "", 3000, 3004, 3008)
        names = [self.heap.text(self.heap.u32(place)) for place in (3008, 3012)]
        return "|".join([str(self.heap.i32(3000)), str(self.heap.i32(3004)), *names])

    def _do_strftime(self, values: list[int], pattern: str, room: int) -> list[Any]:
        self.set_tm(values)
        self.heap.set_i32(TM + 40, self.text("XYZ"))
        length = self.call("strftime", "iiii", "i", BUFFER, room, self.text(pattern), TM)
        return [length, self.heap.text(BUFFER) if length else None]

    def _do_strptime(self, values: list[int], text: str, pattern: str) -> list[Any]:
        self.set_tm(values)
        place = self.text(text)
        end = self.call("strptime", "iii", "i", place, self.text(pattern), TM)
        return [end - place if end else -1, self.tm(9)]

    def _do_open(self, path: str, flags: int) -> int:
        return self.open(path, flags | 0o100000)  # which C adds

    def _do_read(self, number: int, length: int) -> list[Any]:
        count = self.read(number, length)
        return [count, self.memory.read(BUFFER, count).decode("latin-1") if count > 0 else ""]

    def _do_write(self, number: int, length: int) -> int:
        return self.write(number, bytes(length))

    def _do_seek(self, number: int, offset: int, whence: int) -> int:
        halves = offset & 0xFFFFFFFF, -1 if offset < 0 else 0
        error = self.call("fd_seek", "iiiii", "i", number, *halves, whence, VECTOR)
        return -error if error else self.heap.i32(VECTOR)

    def _do_close(self, number: int) -> int:
        return -int(self.call("fd_close", "i", "i", number))

    def _do_fcntl(self, number: int, command: int, argument: int) -> int:
        self.heap.set_i32(VECTOR, argument)
        return int(self.call("syscall_fcntl64", "iii", "i", number, command, VECTOR))

    def _do_ioctl(self, number: int, request: int) -> int:
        self.heap.set_i32(VECTOR, BUFFER)
        return int(self.call("syscall_ioctl", "iii", "i", number, request, VECTOR))

    def _do_env(self) -> str:
        self.call("environ_sizes_get", "ii", "i", VECTOR, VECTOR + 4)
        self.call("environ_get", "ii", "i", BUFFER, BUFFER + 500)
        count = self.heap.i32(VECTOR)
        texts = [self.heap.text(self.heap.u32(BUFFER + 4 * each)) for each in range(count)]
        assert self.heap.i32(VECTOR + 4) == sum(len(each) + 1 for each in texts)
        return "".join(f"{each}\n" for each in texts if not each.startswith("_="))

    def _do_entropy(self, length: int) -> int:
        return int(self.call("getentropy", "ii", "i", BUFFER, length))


@contextmanager
def time_zone(name: str) -> Iterator[None]:
    """Have the process in another time zone for a while."""
    before = os.environ.get("TZ")
    os.environ["TZ"] = name
    time.tzset()
    try:
        if name != "UTC" and time.timezone == 0 and not time.daylight:
            pytest.skip(f"this machine does not know the time zone {name}")
        yield
    finally:
        os.environ.pop("TZ") if before is None else os.environ.__setitem__("TZ", before)
        time.tzset()


def differences(ours: list[Any], theirs: list[Any], asked: list[Any]) -> list[Any]:
    """Answers that differ, with their questions. That both fail is equal, whatever each says about it."""

    def equal(one: Any, other: Any) -> bool:
        failed = [isinstance(each, str) and each.startswith("threw") for each in (one, other)]
        return all(failed) or one == other

    return [each for each in zip(asked, ours, theirs, strict=True) if not equal(each[1], each[2])]


# --- compared with Emscripten ---


@pytest.mark.parametrize("zone", [each for each in ANSWERS["zones"] if each != "ask"])
def test_calendars_are_those_of_emscripten_in_every_time_zone(zone: str) -> None:
    asked = ANSWERS["zones"]["ask"]
    with time_zone(zone):
        guest = Guest(quirks=OLD)
        ours = [guest.asked(*each) for each in asked]
    assert not differences(ours, ANSWERS["zones"][zone], asked)


def test_texts_of_dates_files_and_environment_are_those_of_emscripten() -> None:
    asked = [each for each, _ in ANSWERS["program"]]
    with time_zone("UTC"):
        guest = Guest(quirks=OLD)
        ours = [guest.asked(*each) for each in asked]
    assert not differences(ours, [answer for _, answer in ANSWERS["program"]], asked)


@pytest.mark.parametrize("zone", [each for each in ANSWERS["later"] if each != "ask"])
def test_calendars_of_later_builds_are_theirs(zone: str) -> None:
    weeks = {"strftime": ["%U %V %W", 99]}
    asked = [[name, *given, *weeks.get(name, [])] for name, *given in ANSWERS["later"]["ask"]]
    with time_zone(zone):
        guest = Guest()
        guest.moments = "j"
        ours = [guest.asked(*each) for each in asked]
    ours = [each[1] if name == "strftime" else each for each, (name, *_) in zip(ours, asked, strict=True)]
    assert not differences(ours, ANSWERS["later"][zone], asked)


# --- the forms of a function ---


def test_a_time_may_be_a_pointer_two_numbers_or_one() -> None:
    moment = 5_000_000_000  # more than 32 bits
    expected = [20, 53, 8, 11, 5, 228, 5, 162]
    with time_zone("UTC"):
        guest = Guest(time_bits=64)
        guest.heap.set_i64(TIME, moment)
        for name in ("gmtime_js", "localtime_js"):
            forms = (("ii", (TIME, TM)), ("iii", (moment & 0xFFFFFFFF, moment >> 32, TM)), ("ji", (moment, TM)))
            for letters, arguments in forms:
                guest.set_tm([0] * 10)
                assert guest.call(name, letters, "i", *arguments) == 0
                assert guest.tm(8) == expected
        guest.set_tm([0] * 10)
        guest.call("localtime_js", "iii", "", -1, -1, TM)  # halves of -1, as an engine gives them
        assert guest.tm(8) == [59, 59, 23, 31, 11, 69, 3, 364]


def test_a_moment_of_64_bits_is_returned_whole_or_in_two_halves() -> None:
    with time_zone("UTC"):
        guest = Guest()
        guest.set_tm([20, 53, 8, 11, 5, 228, 0, 0, 0, 0])
        assert guest.call("mktime_js", "i", "j", TM) == 5_000_000_000
        assert guest.call("mktime_js", "i", "d", TM) == 5e9
        assert guest.call("mktime_js", "i", "i", TM) == 5_000_000_000 - (1 << 32)
        assert guest.call("getTempRet0", "", "i") == 1
        told: list[int] = []
        guest.exports["setTempRet0"] = lambda value: told.append(value) or 0
        guest.set_tm([59, 59, 23, 31, 11, 69, 0, 0, 0, 0])
        assert guest.call("mktime_js", "i", "i", TM) == -1
        assert told == [-1]


def test_dates_that_javascript_does_not_have_are_answered_and_not_computed() -> None:
    guest = Guest()
    for name in ("gmtime_js", "localtime_js"):
        assert guest.call(name, "ji", "i", 1 << 62, TM) == 1
        assert guest.tm(8) == [0] * 8
    guest.set_tm([0, 0, 0, 1, 0, 2**31 - 2000, 0, 0, 0, 0])
    assert guest.call("mktime_js", "i", "j", TM) == -1
    assert guest.call("timegm_js", "i", "j", TM) == -1


def test_the_old_forms_set_the_zone_and_return_the_structure() -> None:
    with time_zone("Europe/Berlin"):
        guest = Guest()
        guest.heap.set_i32(TIME, 1719784800)
        assert guest.call("localtime_r", "ii", "i", TIME, TM) == TM
        assert guest.heap.text(guest.heap.u32(TM + 40)) == "Central European Summer Time"
        assert guest.call("mktime", "i", "i", TM) == 1719784800
        assert guest.call("gmtime_r", "ii", "i", TIME, TM) == TM
        assert (guest.tm()[9], guest.heap.text(guest.heap.u32(TM + 40))) == (0, "GMT")
        guest.exports.update(get_timezone=lambda: 3000, get_daylight=lambda: 3004, get_tzname=lambda: 3008)
        other = Guest()
        other.exports.update(guest.exports, malloc=other.allocate)
        other.call("tzset", "", "")
        assert [other.heap.i32(3000), other.heap.i32(3004)] == [-3600, 1]
        assert other.heap.text(other.heap.u32(3012)) == "Central European Summer Time"


def test_the_later_form_of_tzset_writes_names_into_the_room_there_is() -> None:
    with time_zone("America/New_York"):
        forms = {"long": ["Eastern Standard", "Eastern Daylight"], "offset": ["UTC-0500", "UTC-0400"]}
        for names, expected in forms.items():
            guest = Guest(zone_names=names)
            guest.call("tzset_js", "iiii", "", 3000, 3004, 3100, 3200)
            assert [guest.heap.i32(3000), guest.heap.i32(3004)] == [18000, 1]
            assert [guest.heap.text(3100), guest.heap.text(3200)] == expected


def test_zones_east_and_west_have_their_offsets_in_their_names() -> None:
    assert [zones.offset_name(each) for each in (0, -60, -330, 210)] == ["UTC-0000", "UTC+0100", "UTC+0530", "UTC-0330"]


def test_percent_signs_take_part_in_conversions_only_in_the_oldest_builds() -> None:
    values = [0, 0, 0, 5, 0, 124, 5, 4, 0, 0]
    assert Guest().asked("strftime", values, "%%d %d", 99)[1] == "%d 05"
    assert Guest(quirks=("percent",)).asked("strftime", values, "%%d %d %%", 99)[1] == "%05 05 %"


def test_clocks_run() -> None:
    guest = Guest()
    before = time.time()
    assert abs(guest.call("emscripten_date_now", "", "d") / 1000 - before) < 60
    first, second = (guest.call("emscripten_get_now", "", "d") for _ in range(2))
    assert 0 <= first <= second
    assert guest.call("emscripten_get_now_is_monotonic", "", "i") == 1
    assert guest.call("clock_gettime", "ii", "i", 0, TIME) == 0
    assert abs(guest.heap.i32(TIME) - before) < 60
    assert 0 <= guest.heap.i32(TIME + 4) < 1_000_000_000
    assert abs(guest.call("time", "i", "i", TIME) - before) < 60
    wide = Guest(time_bits=64)
    assert wide.call("clock_gettime", "ii", "i", 1, TIME) == 0
    assert wide.heap.i64(TIME) >= 0
    assert 0 <= wide.heap.i32(TIME + 8) < 1_000_000_000
    for letters, precision in (("iiii", (0, 0)), ("iji", (0,))):
        assert guest.call("clock_time_get", letters, "i", 0, *precision, TIME) == 0
        assert abs(guest.heap.i64(TIME) / 1e9 - before) < 60
    assert guest.call("clock_time_get", "iji", "i", 9, 0, TIME) == 28


def test_an_unknown_clock_sets_errno() -> None:
    guest = Guest()
    guest.exports["errno_location"] = lambda: 3000
    assert guest.call("clock_gettime", "ii", "i", 77, TIME) == -1
    assert guest.heap.i32(3000) == 28


def test_every_day_of_many_centuries_has_its_date() -> None:
    days = range(-800_000, 800_000, 331)
    with time_zone("UTC"):
        for day in days:
            fields = fields_of(day * 86400)
            found = local_seconds(fields.year, fields.month, fields.day)
            assert found == day * 86400 or 0 <= fields.year <= 99
            assert fields.weekday == (day + 4) % 7


# --- files ---


def test_reading_goes_over_several_buffers_and_stops_where_the_file_ends() -> None:
    guest = Guest()
    number = guest.call("syscall_openat", "iiii", "i", -100, guest.text("assets/data.gz"), 0, 0)
    assert number == 3
    for index, (place, length) in enumerate([(5000, 6), (6000, 0), (7000, 100), (8000, 10)]):
        guest.heap.set_i32(VECTOR + 8 * index, place)
        guest.heap.set_i32(VECTOR + 8 * index + 4, length)
    assert guest.call("fd_read", "iiii", "i", number, VECTOR, 4, TIME) == 0
    assert guest.heap.i32(TIME) == 21
    assert (guest.memory.read(5000, 6), guest.memory.read(7000, 15)) == (b"hello ", b"preload archive")
    assert guest.call("fd_seek", "ijii", "i", number, -3, 2, TIME) == 0
    assert guest.heap.i64(TIME) == 18
    assert guest.call("fd_seek", "ijii", "i", number, 1 << 60, 0, TIME) == 61


def test_a_path_may_be_relative_to_an_open_folder() -> None:
    guest = Guest()
    folder = guest.open("/assets")
    number = guest.call("syscall_openat", "iiii", "i", folder, guest.text("sub/two.txt"), 0, 0)
    assert guest.asked("read", number, 99) == [6, "second"]
    assert guest.call("syscall_openat", "iiii", "i", 77, guest.text("x"), 0, 0) == -8


def test_nothing_can_be_changed_or_created() -> None:
    guest = Guest()
    assert guest.open("/assets/data.gz", 1) == -69
    assert guest.open("/assets/data.gz", 0o1000) == -69
    assert guest.open("/tmp/new", 0o101) == -69
    assert guest.open("/nowhere/new", 0o101) == -44


def test_no_more_files_are_open_than_may_be() -> None:
    guest = Guest()
    place = guest.text("/assets/data.gz")
    numbers = [guest.call("syscall_open", "iii", "i", place, 0, 0) for _ in range(4100)]
    assert numbers[4093] == 4096
    assert set(numbers[4094:]) == {-33}


def test_a_preloaded_file_outside_of_the_archive_is_refused() -> None:
    with pytest.raises(ValueError, match="does not lie in the 3 bytes"):
        FileTable(Log(), b"abc", [Preloaded("/a", 1, 4)])


def test_what_is_printed_goes_to_the_log_which_has_a_limit() -> None:
    guest = Guest()
    assert not guest.log.has_any
    assert guest.write(1, b"out\0put ") == 8
    assert guest.write(2, "errör\n".encode()) == 7
    assert guest.log.has_any
    assert guest.log.take() == "output errör\n"
    assert guest.log.take() == ""
    for _ in range(20):
        guest.write(1, b"x" * 8192)
    text = guest.log.take()
    assert text == "x" * 65536 + f"\n[{20 * 8192 - 65536} more bytes were left out]\n"


def test_requests_outside_of_memory_fail_as_such() -> None:
    guest = Guest()
    with pytest.raises(GuestFailed) as caught:
        guest.call("getentropy", "ii", "i", 100, -1)
    assert caught.value.kind == "bad-answer"
    with pytest.raises(GuestFailed):
        guest.call("emscripten_memcpy_big", "iii", "", 0, 1 << 19, 1 << 20)
    assert guest.call("fd_write", "iiii", "i", 1, VECTOR, 1 << 30, TIME) == 28


def test_random_bytes_differ() -> None:
    guest = Guest()
    guest.call("getentropy", "ii", "i", 1000, 32)
    guest.call("random_get", "ii", "i", 2000, 32)
    assert len({guest.memory.read(1000, 32), guest.memory.read(2000, 32), bytes(32)}) == 3
    number = guest.open("/dev/urandom")
    assert guest.read(number, 64) == 64


# --- memory ---


def test_memory_grows_by_a_fifth_more_than_there_is_and_by_less_where_there_is_less() -> None:
    guest = Guest(pages=100, most=1000)
    assert guest.call("emscripten_resize_heap", "i", "i", (100 << 16) + 1) == 1
    assert guest.memory.size() == 120 << 16
    assert guest.call("emscripten_resize_heap", "i", "i", 500 << 16) == 1
    assert guest.memory.size() == 500 << 16
    tight = Guest(pages=100, most=106)
    assert tight.call("emscripten_resize_heap", "i", "i", (100 << 16) + 1) == 1
    assert tight.memory.size() == 105 << 16
    assert tight.call("emscripten_resize_heap", "i", "i", 107 << 16) == 0
    capped = Guest(pages=100, most=1000, heap_limit=110 << 16)
    assert capped.call("emscripten_resize_heap", "i", "i", (110 << 16) + 1) == 0
    assert capped.call("emscripten_resize_heap", "i", "i", -1) == 0
    assert capped.call("emscripten_resize_heap", "i", "i", 101 << 16) == 1
    assert capped.memory.size() == 110 << 16
    assert capped.call("emscripten_get_heap_max", "", "i") == 110 << 16


def test_copies_may_overlap() -> None:
    guest = Guest()
    guest.memory.write(1000, b"abcdef")
    guest.call("emscripten_memcpy_big", "iii", "", 1002, 1000, 4)
    assert guest.memory.read(1000, 6) == b"ababcd"
    assert guest.call("emscripten_memcpy_js", "iii", "i", 1002, 1000, 0) == 1002


def test_texts_end_at_a_zero_at_their_limit_or_with_the_memory() -> None:
    guest = Guest(pages=1)
    guest.memory.write(100, b"a" * 5000 + b"\0")
    guest.memory.write(65530, b"abcdef")
    heap = guest.heap
    assert heap.text(100) == "a" * 5000
    assert heap.text(100, 10) == "a" * 10
    assert heap.text(65530) == "abcdef"
    assert heap.text(0) == ""
    assert heap.text(65536) == ""
    heap.set_i64(8, -2)
    assert (heap.i64(8), heap.u32(8), heap.i32(12)) == (-2, 0xFFFFFFFE, -1)
    guest.memory.write(16, b"\0\0\0\0\0\0\xf8\x3f")
    assert heap.f64(16) == 1.5


# --- ends ---


def test_an_import_that_nobody_knows_fails_when_it_is_called_and_names_itself() -> None:
    guest = Guest()
    function = guest.system.function("invoke_vii", "(i32, i32, i32) -> ()")
    with pytest.raises(GuestFailed, match="`invoke_vii`") as caught:
        function(1, 2, 3)
    assert (caught.value.kind, caught.value.details["import"]) == ("trap", "invoke_vii")
    other = guest.system.function("fd_close", "(i64, f32) -> i32")
    with pytest.raises(GuestFailed, match=r"`fd_close` \(i64, f32\) -> i32"):
        other(1, 2.0)


@pytest.mark.parametrize(
    ("name", "letters", "arguments", "kind", "text"),
    [
        ("abort", "", (), "trap", "it called `abort`"),
        ("abort_js", "", (), "trap", "it called `abort`"),
        ("exit", "i", (-1,), "exit", "exit code -1"),
        ("proc_exit", "i", (3,), "exit", "exit code 3"),
        ("assert_fail", "iiii", (0, 0, 7, 0), "trap", "an unknown place"),
        ("cxa_throw", "iii", (1 << 30, 1 << 30, 0), "trap", "that nothing catches"),
    ],
)
def test_what_ends_a_program_ends_the_call(
    name: str, letters: str, arguments: tuple[int, ...], kind: str, text: str
) -> None:
    guest = Guest()
    with pytest.raises(GuestFailed, match=text) as caught:
        guest.call(name, letters, "", *arguments)
    assert caught.value.kind == kind
    assert kind in KINDS


def test_an_assertion_says_what_and_where() -> None:
    guest = Guest()
    texts = [guest.text(each) for each in ("x > 0", "model.cpp", "calculate")]
    with pytest.raises(GuestFailed, match=r"`x > 0` does not hold, at model.cpp:42 in calculate"):
        guest.call("assert_fail", "iiii", "", texts[0], texts[1], 42, texts[2])


def test_an_exception_is_given_room_by_the_guest() -> None:
    guest = Guest()
    first = guest.call("cxa_allocate_exception", "i", "i", 100)
    assert first - 24 == 1 << 17
    guest.exports["malloc"] = lambda size: 0
    with pytest.raises(GuestFailed, match="no room") as caught:
        guest.call("cxa_allocate_exception", "i", "i", 100)
    assert caught.value.kind == "out-of-memory"


def test_any_bytes_can_be_thrown() -> None:
    heap = Guest(pages=1).heap
    heap.memory.write(0, bytes(range(256)) * 256)
    for address in range(0, 70_000, 997):
        for type_info in range(0, 70_000, 1009):
            name, text = describe(heap, address, type_info)
            assert isinstance(name, str)
            assert len(text) <= 2000
    heap.set_i32(104, 200)
    heap.set_i32(108, 100)  # a class that is its own base
    heap.memory.write(200, b"4Loop\0")
    assert describe(heap, 300, 100)[0] == "Loop"


def test_every_import_of_the_contract_is_there() -> None:
    names = """
    cxa_throw cxa_allocate_exception syscall_fcntl64 syscall_ioctl syscall_openat syscall_open emscripten_get_now
    emscripten_get_now_is_monotonic emscripten_date_now clock_gettime gmtime_js localtime_js localtime_r mktime_js
    mktime tzset_js abort exit emscripten_memcpy_big emscripten_resize_heap environ_get environ_sizes_get fd_close
    fd_read fd_seek fd_write getentropy strftime_l strptime
    """
    assert set(names.split()) <= FUNCTIONS.keys()


# --- a real guest ---

THROWN = [
    ("std::runtime_error", "bad thing happened"),
    ("std::logic_error", "illogical, and long enough not to fit anywhere"),
    ("std::invalid_argument", "x"),
    ("int", "42"),
    ("const char*", "a literal"),
    ("std::string", "a string that does not fit inside of it"),
    ("std::string", "short"),
    ("Mine", "derived from one with a text"),
    ("deep::Odd", "held inside of another"),
    ("Plain", ""),
    ("std::bad_alloc", ""),
    ("double", "3.5"),
    ("std::out_of_range", ""),
]


class Probe:
    """The probe in an engine, through its public interface; fits `emscripten.memory.Memory`."""

    def __init__(self) -> None:
        wasmtime: Any = pytest.importorskip("wasmtime", reason="wasmtime is not installed in this interpreter")
        package = read_package(PROBE.read_bytes())
        outline = read_outline(package.wasm)
        self.glue = glue = read_glue(package.glue, outline)
        self._store = wasmtime.Store()
        module = wasmtime.Module(self._store.engine, package.wasm)
        system = System(self, FileTable(Log(), package.data or b"", glue.files), glue, self.function)
        functions = [system.function(glue.imports[each.name], each.type) for each in outline.imports]
        given = [
            wasmtime.Func(self._store, each.type, function)
            for each, function in zip(module.imports, functions, strict=True)
        ]
        self._exports: Any = wasmtime.Instance(self._store, module, given).exports(self._store)
        self._exports[glue.constructors](self._store)

    def function(self, name: str) -> Callable[..., Any] | None:
        letter = self.glue.exports.get(name)
        return None if letter is None else lambda *numbers: self._exports[letter](self._store, *numbers)

    def call(self, name: str, *numbers: int) -> Any:
        function = self.function(name)
        assert function is not None
        return function(*numbers)

    def size(self) -> int:
        return int(self._exports[self.glue.memory].data_len(self._store))

    def read(self, address: int, length: int) -> bytes:
        if address + length > self.size():
            raise GuestFailed("bad-answer", "outside")
        return bytes(self._exports[self.glue.memory].read(self._store, address, address + length))

    def write(self, address: int, data: bytes) -> None:
        self._exports[self.glue.memory].write(self._store, data, address)

    def grow(self, pages: int) -> bool:
        self._exports[self.glue.memory].grow(self._store, pages)
        return True


@pytest.mark.parametrize("number", range(len(THROWN)))
def test_an_exception_of_a_real_guest_says_its_type_and_its_text(number: int) -> None:
    name, text = THROWN[number]
    with pytest.raises(GuestFailed) as caught:
        Probe().call("do_throw", number)
    assert (caught.value.details["exception"], caught.value.details["what"]) == (name, text)
    assert name in str(caught.value)
    assert text in str(caught.value)


def test_a_real_guest_uses_files_clock_and_memory() -> None:
    probe = Probe()
    probe.write(probe.call("buf_ptr"), b"/assets/sub/two.txt\0")
    number = probe.call("do_open", probe.call("buf_ptr"), 0)
    assert probe.call("do_read", number, 100) == 6
    assert probe.read(probe.call("buf_ptr"), 6) == b"second"
    probe.call("do_gmtime", 86400)
    assert int.from_bytes(probe.read(probe.call("tm_ptr") + 12, 4), "little") == 2
    sizes = {100: 16777216, 1 << 20: 16777216, 10 << 20: 20185088, 5 << 20: 24248320}  # as under node
    for wanted, size in sizes.items():
        assert probe.call("do_malloc", wanted)
        assert probe.size() == size
