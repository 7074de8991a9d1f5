"""Every function that a Neuron model was seen to import, by its name in C and the types of its parameters.

Types are letters: ``i`` for 32 bits, ``j`` for 64, ``d`` for a double. A parameter of 64 bits is often two of 32, the
lower half first. What a function returns for errors is what Emscripten returns; texts of failures are for people.
"""

import os
import time
from collections.abc import Callable

from spark_workers.hosts.emscripten import calendar
from spark_workers.hosts.emscripten.files import EINVAL, ENOTTY, EOVERFLOW, FileError
from spark_workers.hosts.emscripten.memory import PAGE, joined
from spark_workers.hosts.emscripten.system import HostFunction, System
from spark_workers.hosts.emscripten.thrown import describe
from spark_workers.hosts.failures import GuestFailed

_CURRENT_FOLDER = -100
_EXCEPTION_HEADER = 24
_HEADROOM = 96 << 20
_LONGEST_TEXT = 4096
_MOST_PARTS = 1024
_LARGEST = 1 << 53  # of whole numbers in JavaScript
_REALTIME, _MONOTONIC, _MONOTONIC_RAW = 0, 1, 4

ENVIRONMENT = {
    "USER": "web_user",
    "LOGNAME": "web_user",
    "PATH": "/",
    "PWD": "/",
    "HOME": "/home/web_user",
    "LANG": "C.UTF-8",
    "_": "./this.program",
}


def _signed(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


# --- clocks ---


def _now(system: System) -> float:
    return system.milliseconds()


def _is_monotonic(system: System) -> int:
    return 1


def _date_now(system: System) -> float:
    return float(time.time_ns() // 1_000_000)


def _time(system: System, pointer: int) -> int:
    seconds = int(time.time())
    if pointer:
        calendar.write_seconds(system, pointer, seconds)
    return seconds


def _clock_gettime(system: System, clock: int, pointer: int) -> int:
    if clock == _REALTIME:
        now = _date_now(system)
    elif clock in (_MONOTONIC, _MONOTONIC_RAW):
        now = _now(system)
    else:
        system.set_errno(EINVAL)
        return -1
    width = calendar.write_seconds(system, pointer, int(now / 1000))
    system.heap.set_i32(pointer + width, int(now % 1000 * 1000 * 1000))
    return 0


def _clock_time_get(system: System, clock: int, low: int, high: int, pointer: int) -> int:
    return _clock_time_get_whole(system, clock, joined(low, high), pointer)


def _clock_time_get_whole(system: System, clock: int, precision: int, pointer: int) -> int:
    if not 0 <= clock <= 3:
        return EINVAL
    now = _date_now(system) if clock == _REALTIME else _now(system)
    system.heap.set_i64(pointer, round(now * 1_000_000))
    return 0


# --- files ---


def _refusable(function: Callable[..., int], sign: int) -> HostFunction:
    """Answer with the number of the error: negative from system calls, positive from WASI's functions."""

    def call(system: System, *arguments: int) -> int:
        try:
            return function(system, *arguments)
        except FileError as problem:
            return sign * problem.number

    return call


def _openat(system: System, folder: int, path: int, flags: int, _arguments: int) -> int:
    under = None if _signed(folder) == _CURRENT_FOLDER else folder
    return system.files.open(system.heap.text(path, _LONGEST_TEXT), flags, under)


def _open(system: System, path: int, flags: int, _arguments: int) -> int:
    return system.files.open(system.heap.text(path, _LONGEST_TEXT), flags)


def _fcntl(system: System, number: int, command: int, arguments: int) -> int:
    files = system.files
    files.flags(number)
    if command == 0:
        lowest = system.heap.i32(arguments)
        return -EINVAL if lowest < 0 else files.duplicate(number, lowest)
    if command in (1, 2, 6, 7, 13, 14):
        return 0
    if command == 3:
        return files.flags(number)
    if command == 4:
        files.add_flags(number, system.heap.i32(arguments))
        return 0
    if command in (5, 12):  # nobody else holds a lock
        system.heap.write(system.heap.u32(arguments), b"\2\0")
        return 0
    if command == 9:
        system.set_errno(EINVAL)
        return -1
    return -EINVAL


def _ioctl(system: System, number: int, request: int, arguments: int) -> int:
    system.files.flags(number)
    if not system.files.is_console(number) or request == 21531:
        return -ENOTTY
    if request == 21519:
        system.heap.set_i32(system.heap.u32(arguments), 0)
    known = (21505, 21506, 21507, 21508, 21509, 21510, 21511, 21512, 21515, 21519, 21523, 21524)
    return 0 if request in known else -EINVAL


def _parts(system: System, vector: int, count: int) -> list[tuple[int, int]]:
    if not 0 <= count <= _MOST_PARTS:
        raise FileError(EINVAL)
    return [(system.heap.u32(vector + 8 * each), system.heap.u32(vector + 8 * each + 4)) for each in range(count)]


def _fd_read(system: System, number: int, vector: int, count: int, pointer: int) -> int:
    system.files.flags(number)
    total = 0
    for address, length in _parts(system, vector, count):
        # More than the memory holds cannot be wanted, and a device would make as much as it is asked for.
        data = system.files.read(number, min(length, system.heap.memory.size()))
        system.heap.write(address, data)
        total += len(data)
        if len(data) < length:
            break
    system.heap.set_i32(pointer, total)
    return 0


def _fd_write(system: System, number: int, vector: int, count: int, pointer: int) -> int:
    system.files.flags(number)
    total = 0
    for address, length in _parts(system, vector, count):
        total += system.files.write(number, system.heap.read(address, length))
    system.heap.set_i32(pointer, total)
    return 0


def _fd_seek(system: System, number: int, low: int, high: int, whence: int, pointer: int) -> int:
    return _fd_seek_whole(system, number, joined(low, high), whence, pointer)


def _fd_seek_whole(system: System, number: int, offset: int, whence: int, pointer: int) -> int:
    system.files.flags(number)
    if abs(offset) >= _LARGEST:
        return EOVERFLOW
    system.heap.set_i64(pointer, system.files.seek(number, offset, whence))
    return 0


def _fd_close(system: System, number: int) -> int:
    system.files.close(number)
    return 0


# --- environment ---


def _environ_get(system: System, pointers: int, texts: int) -> int:
    for index, (name, value) in enumerate(ENVIRONMENT.items()):
        data = f"{name}={value}".encode() + b"\0"
        system.heap.set_i32(pointers + 4 * index, texts)
        system.heap.write(texts, data)
        texts += len(data)
    return 0


def _environ_sizes_get(system: System, count: int, size: int) -> int:
    system.heap.set_i32(count, len(ENVIRONMENT))
    system.heap.set_i32(size, sum(len(name) + len(value) + 2 for name, value in ENVIRONMENT.items()))
    return 0


def _getentropy(system: System, address: int, length: int) -> int:
    length &= 0xFFFFFFFF
    system.heap.read(address, length)  # fails outside of the memory, before so many are made
    system.heap.write(address, os.urandom(length))
    return 0


# --- memory ---


def _heap_max(system: System) -> int:
    return _signed(min(system.glue.heap_limit, 0xFFFFFFFF))


def _resize_heap(system: System, requested: int) -> int:
    """Grow by a fifth more than is there, so that it need not grow often; by less if there is not so much."""
    requested &= 0xFFFFFFFF
    limit, memory = system.glue.heap_limit, system.heap.memory
    if requested > limit:
        return 0
    size = memory.size()
    for cut in (1, 2, 4):
        wanted = min(size * (1 + 0.2 / cut), requested + _HEADROOM)
        target = min(limit, -(-int(max(requested, wanted)) // PAGE) * PAGE)
        if memory.grow(max(0, -(-(target - size) // PAGE))):
            return 1
    return 0


def _memcpy(system: System, target: int, source: int, length: int) -> int:
    system.heap.write(target, system.heap.read(source, length & 0xFFFFFFFF))
    return target


def _get_high(system: System) -> int:
    return _signed(system.high)


def _set_high(system: System, value: int) -> None:
    system.high = value & 0xFFFFFFFF


# --- ends ---


def _allocate_exception(system: System, size: int) -> int:
    address = system.allocate(size + _EXCEPTION_HEADER)
    if not address:
        text = f"there is no room for an exception of {size} bytes"
        raise GuestFailed("out-of-memory", text, {"memory": system.heap.memory.size()})
    return _signed(address + _EXCEPTION_HEADER)


def _throw(system: System, thrown: int, type_info: int, _destructor: int) -> None:
    name, text = describe(system.heap, thrown & 0xFFFFFFFF, type_info & 0xFFFFFFFF)
    message = f"it threw a C++ exception{f' of type {name}' if name else ''} that nothing catches"
    details = {"trap": "uncaught-exception", "exception": name, "what": text}
    raise GuestFailed("trap", f"{message}: {text}" if text else message, details)


def _abort(system: System) -> None:
    raise GuestFailed("trap", "it called `abort`", {"trap": "abort"})


def _assert_fail(system: System, condition: int, file: int, line: int, function: int) -> None:
    heap = system.heap
    where = f"{heap.text(file, 500)}:{line}" if file else "an unknown place"
    name = heap.text(function, 500) or "an unknown function"
    text = f"its assertion `{heap.text(condition, 500)}` does not hold, at {where} in {name}"
    raise GuestFailed("trap", text, {"trap": "assertion"})


def _exit(system: System, code: int) -> None:
    code = _signed(code)
    raise GuestFailed("exit", f"it ended itself with exit code {code}", {"exit_code": code})


Variants = dict[str, HostFunction]

#: By name in C without underscores in front, then by the types of the parameters.
FUNCTIONS: dict[str, Variants] = {
    # clocks
    "emscripten_get_now": {"": _now},
    "emscripten_get_now_is_monotonic": {"": _is_monotonic},
    "emscripten_date_now": {"": _date_now},
    "clock_gettime": {"ii": _clock_gettime},
    "clock_time_get": {"iiii": _clock_time_get, "iji": _clock_time_get_whole},
    "time": {"i": _time},
    # calendar
    "localtime_js": {
        "ii": calendar.localtime_at,
        "iii": calendar.localtime_halves,
        "ji": calendar.localtime,
    },
    "gmtime_js": {"ii": calendar.gmtime_at, "iii": calendar.gmtime_halves, "ji": calendar.gmtime},
    "localtime_r": {"ii": calendar.localtime_r},
    "gmtime_r": {"ii": calendar.gmtime_r},
    "mktime_js": {"i": calendar.mktime},
    "mktime": {"i": calendar.mktime_with_zone},
    "timegm_js": {"i": calendar.timegm},
    "timegm": {"i": calendar.timegm},
    "tzset_js": {"iii": calendar.tzset_pointers, "iiii": calendar.tzset_texts},
    "tzset": {"": calendar.tzset},
    "strftime": {"iiii": calendar.strftime},
    "strftime_l": {"iiiii": calendar.strftime, "iiii": calendar.strftime},
    "strptime": {"iii": calendar.strptime},
    "strptime_l": {"iiii": calendar.strptime, "iii": calendar.strptime},
    # files
    "syscall_openat": {"iiii": _refusable(_openat, -1)},
    "syscall_open": {"iii": _refusable(_open, -1)},
    "syscall_fcntl64": {"iii": _refusable(_fcntl, -1)},
    "syscall_ioctl": {"iii": _refusable(_ioctl, -1)},
    "fd_read": {"iiii": _refusable(_fd_read, 1)},
    "fd_write": {"iiii": _refusable(_fd_write, 1)},
    "fd_seek": {"iiiii": _refusable(_fd_seek, 1), "ijii": _refusable(_fd_seek_whole, 1)},
    "fd_close": {"i": _refusable(_fd_close, 1)},
    # environment
    "environ_get": {"ii": _environ_get},
    "environ_sizes_get": {"ii": _environ_sizes_get},
    "getentropy": {"ii": _getentropy},
    "random_get": {"ii": _getentropy},
    # memory
    "emscripten_get_heap_max": {"": _heap_max},
    "emscripten_resize_heap": {"i": _resize_heap},
    "emscripten_memcpy_big": {"iii": _memcpy},
    "emscripten_memcpy_js": {"iii": _memcpy},
    "getTempRet0": {"": _get_high},
    "setTempRet0": {"i": _set_high},
    # ends
    "cxa_allocate_exception": {"i": _allocate_exception},
    "cxa_throw": {"iii": _throw},
    "abort": {"": _abort},
    "abort_js": {"": _abort},
    "assert_fail": {"iiii": _assert_fail},
    "exit": {"i": _exit},
    "proc_exit": {"i": _exit},
}
