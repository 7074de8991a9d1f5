"""``strptime`` by Emscripten's rules: the format becomes a regular expression, by replacing pieces of text in order.

Much of what C asks for follows not from that: only the first of several equal conversions is one, the others vanish;
space must be where it is in the format; ``%%`` is an error; a day and month that are not in the text come from the
structure. Models were built and tested with this, so it is repeated piece by piece.
"""

import re

from spark_workers.hosts.emscripten.dates import Tm, days_of, fields_of, local_fields, local_seconds
from spark_workers.hosts.emscripten.formatting import days_in_month
from spark_workers.hosts.failures import GuestFailed

_SPECIAL = "\\!@#$^&*()+=-[]/{}|:<>?,."
_EQUIVALENT = (
    *(("%A", "%a"), ("%B", "%b"), ("%c", "%a %b %d %H:%M:%S %Y"), ("%D", r"%m\/%d\/%y"), ("%e", "%d")),
    *(("%F", "%Y-%m-%d"), ("%h", "%b"), ("%R", r"%H\:%M"), ("%r", r"%I\:%M\:%S\s%p"), ("%T", r"%H\:%M\:%S")),
    *(("%x", r"%m\/%d\/(?:%y|%Y)"), ("%X", r"%H\:%M\:%S")),
)
_WEEKDAY = "(?:Sun(?:day)?)|(?:Mon(?:day)?)|(?:Tue(?:sday)?)|(?:Wed(?:nesday)?)|(?:Thu(?:rsday)?)|(?:Fri(?:day)?)"
_MONTH = (
    "(?:Jan(?:uary)?)|(?:Feb(?:ruary)?)|(?:Mar(?:ch)?)|(?:Apr(?:il)?)|May|(?:Jun(?:e)?)|(?:Jul(?:y)?)"
    "|(?:Aug(?:ust)?)|(?:Sep(?:tember)?)|(?:Oct(?:ober)?)|(?:Nov(?:ember)?)|(?:Dec(?:ember)?)"
)
_PATTERNS = (
    ("%a", _WEEKDAY + "|(?:Sat(?:urday)?)"),
    ("%b", _MONTH),
    ("%C", r"\d\d"),
    ("%d", r"0[1-9]|[1-9](?!\d)|1\d|2\d|30|31"),
    ("%H", r"\d(?!\d)|[0,1]\d|20|21|22|23"),
    ("%I", r"\d(?!\d)|0\d|10|11|12"),
    ("%j", r"00[1-9]|0?[1-9](?!\d)|0?[1-9]\d(?!\d)|[1,2]\d\d|3[0-6]\d"),
    ("%m", r"0[1-9]|[1-9](?!\d)|10|11|12"),
    ("%M", r"0\d|\d(?!\d)|[1-5]\d"),
    ("%n", r"\s"),
    ("%p", r"AM|am|PM|pm|A\.M\.|a\.m\.|P\.M\.|p\.m\."),
    ("%S", r"0\d|\d(?!\d)|[1-5]\d|60"),
    ("%U", r"0\d|\d(?!\d)|[1-4]\d|50|51|52|53"),
    ("%W", r"0\d|\d(?!\d)|[1-4]\d|50|51|52|53"),
    ("%w", "[0-6]"),
    ("%y", r"\d\d"),
    ("%Y", r"\d\d\d\d"),
    ("%%", "%"),
    ("%t", r"\s"),
)
_MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
_DAYS = ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT")
_LONGEST_FORMAT = 4096
#: What must not follow a per cent sign: there it makes a regular expression that is none, or a search without an end.
_FATAL = ("", "\\", "(", ")")


def strptime(text: str, pattern: str, tm: Tm) -> str | None:
    """Read *text* into *tm*, which also gives what the text does not; return the part that was read, None if none was.

    Raises:
        GuestFailed: The format is one at which Emscripten fails as well, such as one with ``%%``.
    """
    expression, symbols = _compiled(pattern)
    found = expression.match(text)
    if found is None:
        return None
    values = dict[str, str]()
    for symbol, value in zip(symbols, found.groups(), strict=False):
        if symbol not in values:
            values[symbol] = value or ""
    _Reading(values, tm).finish()
    return found.group()


def _compiled(pattern: str) -> tuple[re.Pattern[str], list[str]]:
    source = pattern
    if len(pattern) > _LONGEST_FORMAT:
        raise _bad(source)
    for sign in _SPECIAL:
        pattern = pattern.replace(sign, "\\" + sign)
    for short, long in _EQUIVALENT:
        pattern = pattern.replace(short, long, 1)
    for conversion, alternatives in _PATTERNS:
        pattern = pattern.replace(conversion, f"({conversion}{alternatives})", 1)
    symbols = list[str]()
    while (at := pattern.find("%")) >= 0:
        symbol = pattern[at + 1 : at + 2]
        if symbol in _FATAL:
            raise _bad(source)
        symbols.append(symbol)
        pattern = pattern.replace("%" + symbol, "")
    try:
        return re.compile(pattern, re.IGNORECASE | re.ASCII), symbols
    except re.error as problem:
        raise _bad(source) from problem


def _bad(pattern: str) -> GuestFailed:
    return GuestFailed("trap", f"strptime cannot use the format {pattern[:200]!a}", {"trap": "other"})


def _within(value: int, least: int, most: int) -> int:
    return least if value < least else min(value, most)


class _Reading:
    """Puts a date together, from what was in the text and from what the structure had."""

    def __init__(self, values: dict[str, str], tm: Tm) -> None:
        self._values = values
        self._tm = tm
        self._year = _within(tm.year + 1900, 1970, 9999)
        self._month = _within(tm.mon, 0, 11)
        self._day = _within(tm.mday, 1, 31)
        self._clock = [_within(tm.hour, 0, 23), _within(tm.min, 0, 59), _within(tm.sec, 0, 59)]

    def _number(self, symbol: str) -> int | None:
        value = self._values.get(symbol)
        return int(value) if value else None

    def finish(self) -> None:
        """Set the structure."""
        self._read_clock()
        self._read_year()
        self._read_month()
        self._read_day()
        seconds = local_seconds(self._year, self._month, self._day, *self._clock)
        assert seconds is not None  # all parts are within their bounds
        self._tm.set_fields(local_fields(seconds))
        self._tm.isdst = 0

    def _read_clock(self) -> None:
        seconds, minutes = self._number("S"), self._number("M")
        if seconds is not None:
            self._clock[2] = seconds
        if minutes is not None:
            self._clock[1] = minutes
        hour, twelve = self._number("H"), self._number("I")
        if hour is not None:
            self._clock[0] = hour
        elif twelve is not None:
            self._clock[0] = twelve + (12 if self._values.get("p", "")[:1].upper() == "P" else 0)

    def _read_year(self) -> None:
        year, short, century = self._number("Y"), self._number("y"), self._number("C")
        if year is not None:
            self._year = year
        elif short is not None:
            self._year = short + (century * 100 if century is not None else 2000 if short < 69 else 1900)

    def _read_month(self) -> None:
        month, name = self._number("m"), self._values.get("b")
        if month is not None:
            self._month = month - 1
        elif name:
            self._month = _MONTHS.index(name[:3].upper())

    def _read_day(self) -> None:
        day, of_year, weekday = self._number("d"), self._number("j"), self._values.get("a")
        if day is not None:
            self._day = day
        elif of_year is not None:
            self._set_day_of_year(of_year)
        elif weekday:
            self._set_day_of_week(_DAYS.index(weekday[:3].upper()))

    def _set_day_of_year(self, day: int) -> None:
        """Every month from the right one on sets the day, the month is not set: so it is there."""
        before = 0
        for month in range(12):
            length = days_in_month(self._year, month)
            if day <= before + length:
                self._day = day - before
            before += length

    def _set_day_of_week(self, weekday: int) -> None:
        from_sunday, from_monday = self._number("U"), self._number("W")
        first = days_of(self._js_year(), 0, 1)
        on = (first + 4) % 7
        if from_sunday is not None:
            days = weekday + 7 * (from_sunday - 1) + (0 if on == 0 else 7 - on)
        elif from_monday is not None:
            days = (weekday + 6) % 7 + 7 * (from_monday - 1) + (0 if on == 1 else 7 - on + 1)
        else:
            return
        date = fields_of((first + max(days, 0)) * 86400)  # adding less than nothing does nothing there
        self._day, self._month = date.day, date.month

    def _js_year(self) -> int:
        return self._year + 1900 if 0 <= self._year <= 99 else self._year
