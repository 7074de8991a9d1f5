"""Dates as JavaScript has them, in the time zone of the process, and ``struct tm``.

Emscripten computes calendars with JavaScript's ``Date``. Its rules differ from those of C: every field may have any
value and carries over, years from 0 to 99 mean 1900 to 1999, a local time that a change of clocks skips counts by the
clock before it, and one that there is twice is the first. Python's own dates end at the year 9999; these do not.
"""

import time
from dataclasses import dataclass

from spark_workers.hosts.emscripten.memory import Heap

DAY = 86400
FARTHEST = 8_640_000_000_000  # seconds from 1970; JavaScript knows no other dates
_CUMULATED = (0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334)
ZONE_OFFSET = 40  # of tm_zone


@dataclass(frozen=True, slots=True)
class Fields:
    """A date's parts: the month from 0, the day from 1, the weekday from Sunday as 0, the day of the year from 0."""

    year: int
    month: int
    day: int
    hour: int
    minute: int
    second: int
    weekday: int
    yearday: int


def is_leap(year: int) -> bool:
    """Tell whether *year* has a 29th of February."""
    return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)


def days_of(year: int, month: int, day: int) -> int:
    """Return the days from 1970 to a date, whose month (from 0) and day may be any."""
    year += month // 12
    month %= 12
    before = year - 1
    days = before * 365 + before // 4 - before // 100 + before // 400 - 719162
    return days + _CUMULATED[month] + (1 if month > 1 and is_leap(year) else 0) + day - 1


def _civil(days: int) -> tuple[int, int, int, int]:
    """Return year, month from 0, day from 1 and day of the year from 0."""
    shifted = days + 719468  # from the 1st of March of the year 0
    era, of_era = divmod(shifted, 146097)
    year = (of_era - of_era // 1460 + of_era // 36524 - of_era // 146096) // 365
    of_year = of_era - (365 * year + year // 4 - year // 100)
    march = (5 * of_year + 2) // 153
    month = (march + 2) % 12
    year += era * 400 + (1 if month < 2 else 0)
    return year, month, of_year - (153 * march + 2) // 5 + 1, days - days_of(year, 0, 1)


def fields_of(seconds: int) -> Fields:
    """Return the parts of a moment in UTC."""
    days, rest = divmod(seconds, DAY)
    year, month, day, yearday = _civil(days)
    return Fields(year, month, day, rest // 3600, rest // 60 % 60, rest % 60, (days + 4) % 7, yearday)


def offset_at(seconds: int) -> int:
    """Return by how many seconds local time is ahead of UTC at a moment."""
    try:
        return time.localtime(seconds).tm_gmtoff
    except (OverflowError, OSError, ValueError):  # a system whose calendar ends earlier
        return -time.timezone


def local_fields(seconds: int) -> Fields:
    """Return the parts of a moment in local time."""
    return fields_of(seconds + offset_at(seconds))


def minutes_west(seconds: int) -> int:
    """Return what ``getTimezoneOffset`` gives: minutes that local time is behind UTC."""
    return int(-offset_at(seconds) / 60)


def local_seconds(year: int, month: int, day: int, hour: int = 0, minute: int = 0, second: int = 0) -> int | None:
    """Return the moment of a local date, None if JavaScript has none."""
    if 0 <= year <= 99:
        year += 1900
    wall = days_of(year, month, day) * DAY + hour * 3600 + minute * 60 + second
    if abs(wall) > FARTHEST + DAY:
        return None
    before, after = offset_at(wall - DAY), offset_at(wall + DAY)
    found = wall - before
    if before != after and offset_at(found) != before and offset_at(wall - after) == after:
        found = wall - after
    return found if abs(found) <= FARTHEST else None


def local_midnight(year: int, month: int, day: int) -> int:
    """Return the moment at which a day of a year that there is begins."""
    found = local_seconds(year, month, day)
    return 0 if found is None else found


def year_offsets(year: int) -> tuple[int, int]:
    """Return the minutes west on the 1st of January and of July; one of them is standard time."""
    return minutes_west(local_midnight(year, 0, 1)), minutes_west(local_midnight(year, 6, 1))


@dataclass(slots=True)
class Tm:
    """``struct tm``, all but the name of the zone."""

    sec: int = 0
    min: int = 0
    hour: int = 0
    mday: int = 0
    mon: int = 0
    year: int = 0
    wday: int = 0
    yday: int = 0
    isdst: int = 0
    gmtoff: int = 0

    @classmethod
    def read(cls, heap: Heap, address: int) -> "Tm":
        """Read one."""
        raw = heap.read(address, 40)
        return cls(*(int.from_bytes(raw[at : at + 4], "little", signed=True) for at in range(0, 40, 4)))

    def write(self, heap: Heap, address: int, with_offset: bool = True) -> None:
        """Write all of it, or all but the offset."""
        values = [self.sec, self.min, self.hour, self.mday, self.mon, self.year, self.wday, self.yday, self.isdst]
        if with_offset:
            values.append(self.gmtoff)
        heap.write(address, b"".join((each & 0xFFFFFFFF).to_bytes(4, "little") for each in values))

    def set_fields(self, fields: Fields) -> None:
        """Take over the parts of a date."""
        self.sec, self.min, self.hour, self.mday = fields.second, fields.minute, fields.hour, fields.day
        self.mon, self.year, self.wday, self.yday = fields.month, fields.year - 1900, fields.weekday, fields.yearday
