"""``strftime`` by Emscripten's rules, which are those of its JavaScript and not of C.

Conversions are replaced one kind after another in the whole text, not from left to right, and what is not known stays
as it is. ``%z`` is wrong for offsets that are no whole hours, as it is there.
"""

from collections.abc import Sequence

from spark_workers.hosts.emscripten.dates import DAY, Tm, days_of, fields_of, is_leap
from spark_workers.hosts.failures import GuestFailed

WEEKDAYS = ("Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)

_EXPANDED = (
    *(("%c", "%a %b %d %H:%M:%S %Y"), ("%D", "%m/%d/%y"), ("%F", "%Y-%m-%d"), ("%h", "%b")),
    *(("%r", "%I:%M:%S %p"), ("%R", "%H:%M"), ("%T", "%H:%M:%S"), ("%x", "%m/%d/%y"), ("%X", "%H:%M:%S")),
    *(("%Ec", "%c"), ("%EC", "%C"), ("%Ex", "%m/%d/%y"), ("%EX", "%H:%M:%S"), ("%Ey", "%y"), ("%EY", "%Y")),
    *((f"%O{each}", f"%{each}") for each in "deHImMSuUVwWy"),
)
_CONVERSIONS = "aAbBCdegGHIjmMnpStuUVwWyYzZ"
_LONGEST = 1 << 20


def strftime(pattern: str, tm: Tm, zone: str, quirks: Sequence[str] = ()) -> str:
    """Return *tm* as *pattern* says.

    Args:
        pattern: With conversions, such as ``%Y``.
        tm: The date.
        zone: What ``%Z`` becomes.
        quirks: Of the build; "weeks" and "percent" matter here.

    Raises:
        GuestFailed: A day of the week or a month is asked for by name that there is not; or far too much of anything.
    """
    for short, long in _EXPANDED:
        pattern = pattern.replace(short, long)
    if "percent" not in quirks:
        pattern = pattern.replace("%%", "\0\0")  # zero bytes cannot be in a text of C's
    for letter in _CONVERSIONS:
        if f"%{letter}" in pattern:
            pattern = pattern.replace(f"%{letter}", _converted(letter, tm, zone, "weeks" in quirks))
            if len(pattern) > _LONGEST:
                raise GuestFailed("trap", f"strftime makes more than {_LONGEST} characters", {"trap": "other"})
    return pattern.replace("%%", "%").replace("\0\0", "%")


def _converted(letter: str, tm: Tm, zone: str, has_old_weeks: bool) -> str:
    year = tm.year + 1900
    if has_old_weeks and letter in "UVW":
        return str(_old_week(letter, tm, year)).rjust(2, "0")
    if letter in "aAbB":
        return _name(letter, tm)
    if letter in "gGVjUW":
        return _of_week(letter, tm, year)
    if letter in "CyY":
        return {"C": str(int(year / 100)).rjust(2, "0"), "y": str(year)[2:], "Y": str(year)}[letter]
    if letter == "I":
        return str(12 if tm.hour == 0 else tm.hour - 12 if tm.hour > 12 else tm.hour).rjust(2, "0")
    if letter == "z":
        return _offset(tm.gmtoff)
    plain = {
        "d": str(tm.mday).rjust(2, "0"),
        "e": str(tm.mday).rjust(2),
        "H": str(tm.hour).rjust(2, "0"),
        "m": str(tm.mon + 1).rjust(2, "0"),
        "M": str(tm.min).rjust(2, "0"),
        "n": "\n",
        "p": "AM" if 0 <= tm.hour < 12 else "PM",
        "S": str(tm.sec).rjust(2, "0"),
        "t": "\t",
        "u": str(tm.wday or 7),
        "w": str(tm.wday),
        "Z": zone,
    }
    return plain[letter]


def _name(letter: str, tm: Tm) -> str:
    names, index = (WEEKDAYS, tm.wday) if letter in "aA" else (MONTHS, tm.mon)
    if not 0 <= index < len(names):
        if letter in "AB":
            return "undefined"  # as JavaScript has it
        what = "day of the week" if letter == "a" else "month"
        raise GuestFailed("trap", f"strftime is asked for the name of a {what} {index}", {"trap": "other"})
    return names[index][:3] if letter in "ab" else names[index]


def _of_week(letter: str, tm: Tm, year: int) -> str:
    if letter == "j":
        return str(days_of(year, tm.mon, tm.mday) - days_of(year, 0, 1) + 1).rjust(3, "0")
    if letter == "U":
        return str((tm.yday + 7 - tm.wday) // 7).rjust(2, "0")
    if letter == "W":
        return str((tm.yday + 7 - (tm.wday + 6) % 7) // 7).rjust(2, "0")
    # The week of ISO 8601 belongs to the year that its Thursday is in.
    day = days_of(year, 0, 1) + tm.yday
    thursday = fields_of((day - (day + 3) % 7 + 3) * DAY)
    if letter == "V":
        return str(thursday.yearday // 7 + 1).rjust(2, "0")
    return str(thursday.year)[2:] if letter == "g" else str(thursday.year)


def _old_week(letter: str, tm: Tm, year: int) -> int:
    """Return the week as older builds counted it, which is right most of the time."""
    if letter == "V":
        return _old_iso_week(tm, year)
    # For %W the weekday of the 1st of January is that of a year 1900 years earlier.
    january = days_of(_meant(tm.year) if letter == "W" else _meant(year), 0, 1)
    on = (january + 4) % 7
    wait = 7 - on if letter == "U" else 1 - on if on < 2 else 8 - on
    first = fields_of((january + wait % 7) * DAY)
    end = fields_of(days_of(_meant(year), tm.mon, tm.mday) * DAY)
    if (first.year, first.month, first.day) < (end.year, end.month, end.day):
        before = sum(days_in_month(end.year, each) for each in range(end.month)) - 31
        return -(-(31 - first.day + before + end.day) // 7)
    return 0 if wait % 7 else 1


def _old_iso_week(tm: Tm, year: int) -> int:
    def first_monday(of: int) -> int:
        fourth = days_of(_meant(of), 0, 4)
        return fourth - (fourth + 3) % 7

    this, end = first_monday(year), days_of(_meant(year), 0, 1) + tm.yday
    if end < this:
        return 53
    if first_monday(year + 1) <= end:
        return 1
    begin = fields_of(this * DAY)
    return -(-(tm.yday + (32 if begin.year < year else 1) - begin.day) // 7)


def _meant(year: int) -> int:
    """Return the year that JavaScript takes a number for."""
    return year + 1900 if 0 <= year <= 99 else year


def _offset(seconds: int) -> str:
    minutes = abs(seconds) / 60
    value = minutes / 60 * 100 + minutes % 60
    text = str(int(value)) if value == int(value) else repr(value)
    return ("+" if seconds >= 0 else "-") + ("0000" + text)[-4:]


def days_in_month(year: int, month: int) -> int:
    """Return how many days a month (from 0) has."""
    return 29 if month == 1 and is_leap(year) else (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)[month]
