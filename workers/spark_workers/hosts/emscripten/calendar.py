"""The functions of ``time.h`` that Emscripten leaves to JavaScript."""

import time
from collections.abc import Callable

from spark_workers.hosts.emscripten import formatting, parsing, zones
from spark_workers.hosts.emscripten.dates import (
    DAY,
    FARTHEST,
    ZONE_OFFSET,
    Fields,
    Tm,
    days_of,
    fields_of,
    local_fields,
    local_midnight,
    local_seconds,
    minutes_west,
    year_offsets,
)
from spark_workers.hosts.emscripten.memory import joined
from spark_workers.hosts.emscripten.system import System

_LONGEST_TEXT = 1 << 16
_ZONE_ROOM = 17
_INVALID = 1  # what later versions return for a date that JavaScript does not have


def _seconds_at(system: System, pointer: int) -> int:
    return system.heap.i64(pointer) if system.glue.time_bits == 64 else system.heap.i32(pointer)


def write_seconds(system: System, pointer: int, seconds: int) -> int:
    """Store a ``time_t`` as wide as the build has it, and return how many bytes that are."""
    if system.glue.time_bits == 64:
        system.heap.set_i64(pointer, seconds)
        return 8
    system.heap.set_i32(pointer, seconds)
    return 4


# --- moments to dates ---


def gmtime(system: System, seconds: int, pointer: int) -> int:
    """Write the date in UTC, all but offset and zone, and daylight saving, which C has set before."""
    if abs(seconds) > FARTHEST:
        _write_nothing(system, pointer)
        return _INVALID
    tm = Tm.read(system.heap, pointer)
    tm.set_fields(fields_of(seconds))
    tm.write(system.heap, pointer)
    return 0


def localtime(system: System, seconds: int, pointer: int) -> int:
    """Write the date in local time, all but the name of the zone."""
    if abs(seconds) > FARTHEST:
        _write_nothing(system, pointer)
        return _INVALID
    fields = local_fields(seconds)
    tm = Tm()
    tm.set_fields(fields)
    tm.yday = _yearday(system, seconds, fields)
    tm.gmtoff = -minutes_west(seconds) * 60
    winter, summer = year_offsets(fields.year)
    tm.isdst = int(summer != winter and minutes_west(seconds) == min(winter, summer))
    tm.write(system.heap, pointer)
    return 0


def _yearday(system: System, seconds: int, fields: Fields) -> int:
    if "yearday" in system.glue.quirks:
        return int((seconds - local_midnight(fields.year, 0, 1)) / DAY)
    return fields.yearday


def _write_nothing(system: System, pointer: int) -> None:
    """Write what becomes of the parts of a date that is none: zeros."""
    Tm(isdst=Tm.read(system.heap, pointer).isdst).write(system.heap, pointer, with_offset=False)


def _at(function: Callable[[System, int, int], int]) -> Callable[[System, int, int], int]:
    """The form in which the time is not given but where it is."""
    return lambda system, time_pointer, pointer: function(system, _seconds_at(system, time_pointer), pointer)


def _of_halves(function: Callable[[System, int, int], int]) -> Callable[[System, int, int, int], int]:
    """The form in which the time is two numbers."""
    return lambda system, low, high, pointer: function(system, joined(low, high), pointer)


gmtime_at, gmtime_halves = _at(gmtime), _of_halves(gmtime)
localtime_at, localtime_halves = _at(localtime), _of_halves(localtime)


def localtime_r(system: System, time_pointer: int, pointer: int) -> int:
    """The old form, which also sets the zone, and returns the structure."""
    localtime_at(system, time_pointer, pointer)
    _set_zone(system, pointer)
    return pointer


def gmtime_r(system: System, time_pointer: int, pointer: int) -> int:
    """The old form, which also sets offset and zone, and returns the structure."""
    gmtime_at(system, time_pointer, pointer)
    tm = Tm.read(system.heap, pointer)
    tm.gmtoff = tm.isdst = 0
    tm.write(system.heap, pointer)
    system.heap.set_i32(pointer + ZONE_OFFSET, _stored(system, "GMT"))
    return pointer


# --- dates to moments ---


def mktime(system: System, pointer: int) -> int:
    """Return the moment of a local date, and put its parts into their bounds; -1 if there is no such moment."""
    tm = Tm.read(system.heap, pointer)
    seconds = local_seconds(tm.year + 1900, tm.mon, tm.mday, tm.hour, tm.min, tm.sec)
    if seconds is None:
        return _returned(system, -1)
    winter, summer = year_offsets(local_fields(seconds).year)
    guessed, daylight = minutes_west(seconds), min(winter, summer)
    if tm.isdst < 0:
        tm.isdst = int(summer != winter and daylight == guessed)
    elif (tm.isdst > 0) != (daylight == guessed):
        right = daylight if tm.isdst > 0 else max(winter, summer)
        seconds += (right - guessed) * 60
    year, fields = tm.year, local_fields(seconds)
    tm.set_fields(fields)
    tm.yday = _yearday(system, seconds, fields)
    if "year" in system.glue.quirks:
        tm.year = year
    tm.write(system.heap, pointer, with_offset=False)
    return _returned(system, seconds)


def mktime_with_zone(system: System, pointer: int) -> int:
    """The old form, which also sets the zone."""
    seconds = mktime(system, pointer)
    _set_zone(system, pointer)
    return seconds


def timegm(system: System, pointer: int) -> int:
    """Return the moment of a date in UTC, and set the days of week and year."""
    tm = Tm.read(system.heap, pointer)
    year = tm.year + 1900
    year += 1900 if 0 <= year <= 99 else 0
    seconds = days_of(year, tm.mon, tm.mday) * DAY + tm.hour * 3600 + tm.min * 60 + tm.sec
    if abs(seconds) > FARTHEST:
        return _returned(system, -1)
    fields: Fields = fields_of(seconds)
    tm.wday, tm.yday = fields.weekday, fields.yearday
    tm.write(system.heap, pointer)
    return _returned(system, seconds)


def _returned(system: System, seconds: int) -> int:
    """Leave the upper half where a guest looks for it that takes 64 bits as two numbers."""
    system.set_high(seconds >> 32)
    return seconds


# --- zones ---


def _zone_names(system: System) -> tuple[int, bool, str, str]:
    """Return the seconds west of standard time, whether there is another time, and the names of both."""
    year = local_fields(int(time.time())).year
    winter, summer = year_offsets(year)
    if system.glue.zone_names == "offset":
        names = zones.offset_name(winter), zones.offset_name(summer)
    else:
        names = zones.long_name(local_midnight(year, 0, 1)), zones.long_name(local_midnight(year, 6, 1))
    if summer >= winter:  # the south, or nowhere
        names = names[1], names[0]
    return max(winter, summer) * 60, winter != summer, *names


def tzset_texts(system: System, zone: int, daylight: int, standard: int, summer: int) -> None:
    """Write offset and daylight saving, and the names into the room that there is for them."""
    seconds, has_daylight, *names = _zone_names(system)
    system.heap.set_i32(zone, seconds)
    system.heap.set_i32(daylight, int(has_daylight))
    for address, name in zip((standard, summer), names, strict=True):
        system.heap.write(address, name.encode()[: _ZONE_ROOM - 1] + b"\0")


def tzset_pointers(system: System, zone: int, daylight: int, names: int) -> None:
    """The older form, which gives room of its own to the names; once, for it is never freed."""
    if system.zone_pointers is not None:
        return
    seconds, has_daylight, standard, summer = _zone_names(system)
    system.heap.set_i32(zone, seconds)
    system.heap.set_i32(daylight, int(has_daylight))
    system.zone_pointers = _stored(system, standard), _stored(system, summer)
    for index, pointer in enumerate(system.zone_pointers):
        system.heap.set_i32(names + 4 * index, pointer)


def tzset(system: System) -> None:
    """The oldest form, which asks the guest where its variables are."""
    places = [system.call(name) for name in ("get_timezone", "get_daylight", "get_tzname")]
    if all(places):
        tzset_pointers(system, *(each or 0 for each in places))


def _set_zone(system: System, pointer: int) -> None:
    tzset(system)
    if system.zone_pointers is None:
        _, _, standard, summer = _zone_names(system)
        system.zone_pointers = _stored(system, standard), _stored(system, summer)
    is_summer = Tm.read(system.heap, pointer).isdst > 0
    system.heap.set_i32(pointer + ZONE_OFFSET, system.zone_pointers[is_summer])


def _stored(system: System, text: str) -> int:
    data = text.encode() + b"\0"
    address = system.allocate(len(data))
    if address:
        system.heap.write(address, data)
    return address


# --- text ---


def strftime(system: System, target: int, room: int, pattern: int, pointer: int, _locale: int = 0) -> int:
    """Write a date as text, and return the length; 0 if there is not enough room."""
    heap = system.heap
    zone = heap.text(heap.u32(pointer + ZONE_OFFSET), 1000)
    text = formatting.strftime(heap.text(pattern, _LONGEST_TEXT), Tm.read(heap, pointer), zone, system.glue.quirks)
    data = text.encode(errors="replace") + b"\0"
    if len(data) > room & 0xFFFFFFFF:
        return 0
    heap.write(target, data)
    return len(data) - 1


def strptime(system: System, source: int, pattern: int, pointer: int, _locale: int = 0) -> int:
    """Read a date from text, and return where the rest of it begins; 0 if it does not fit the pattern."""
    heap = system.heap
    tm = Tm.read(heap, pointer)
    read = parsing.strptime(heap.text(source, _LONGEST_TEXT), heap.text(pattern, _LONGEST_TEXT), tm)
    if read is None:
        return 0
    tm.write(heap, pointer, with_offset=False)
    return source + len(read.encode())
