"""Names of time zones as Emscripten's glue makes them, from ``Date.prototype.toTimeString`` of an English node."""

import time

#: By abbreviation and offset in minutes, since neither alone says which zone it is.
_LONG = {
    ("ACDT", 630): "Australian Central Daylight Time",
    ("ACST", 570): "Australian Central Standard Time",
    ("ADT", -180): "Atlantic Daylight Time",
    ("AEDT", 660): "Australian Eastern Daylight Time",
    ("AEST", 600): "Australian Eastern Standard Time",
    ("AKDT", -480): "Alaska Daylight Time",
    ("AKST", -540): "Alaska Standard Time",
    ("AST", -240): "Atlantic Standard Time",
    ("AWST", 480): "Australian Western Standard Time",
    ("BST", 60): "British Summer Time",
    ("CAT", 120): "Central Africa Time",
    ("CDT", -300): "Central Daylight Time",
    ("CDT", -240): "Cuba Daylight Time",
    ("CEST", 120): "Central European Summer Time",
    ("CET", 60): "Central European Standard Time",
    ("CST", -360): "Central Standard Time",
    ("CST", -300): "Cuba Standard Time",
    ("CST", 480): "China Standard Time",
    ("ChST", 600): "Chamorro Standard Time",
    ("EAT", 180): "East Africa Time",
    ("EDT", -240): "Eastern Daylight Time",
    ("EEST", 180): "Eastern European Summer Time",
    ("EET", 120): "Eastern European Standard Time",
    ("EST", -300): "Eastern Standard Time",
    ("GMT", 0): "Greenwich Mean Time",
    ("HKT", 480): "Hong Kong Standard Time",
    ("IDT", 180): "Israel Daylight Time",
    ("IST", 60): "Irish Standard Time",
    ("IST", 120): "Israel Standard Time",
    ("IST", 330): "India Standard Time",
    ("JST", 540): "Japan Standard Time",
    ("KST", 540): "Korean Standard Time",
    ("MDT", -360): "Mountain Daylight Time",
    ("MSK", 180): "Moscow Standard Time",
    ("MST", -420): "Mountain Standard Time",
    ("NDT", -150): "Newfoundland Daylight Time",
    ("NST", -210): "Newfoundland Standard Time",
    ("NZDT", 780): "New Zealand Daylight Time",
    ("NZST", 720): "New Zealand Standard Time",
    ("PDT", -420): "Pacific Daylight Time",
    ("PKT", 300): "Pakistan Standard Time",
    ("PST", -480): "Pacific Standard Time",
    ("PST", 480): "Philippine Standard Time",
    ("SAST", 120): "South Africa Standard Time",
    ("SST", -660): "American Samoa Standard Time",
    ("UTC", 0): "Coordinated Universal Time",
    ("WAT", 60): "West Africa Time",
    ("WEST", 60): "Western European Summer Time",
    ("WET", 0): "Western European Standard Time",
    ("WIB", 420): "Western Indonesia Time",
    ("WIT", 540): "Eastern Indonesia Time",
    ("WITA", 480): "Central Indonesia Time",
}


def long_name(seconds: int) -> str:
    """Return the name in words that local time has at a moment, such as Central European Summer Time.

    Emscripten says GMT where it finds no name in words; so do we for zones that are not in the table.
    """
    local = time.localtime(seconds)
    return _LONG.get((local.tm_zone, local.tm_gmtoff // 60), "GMT")


def offset_name(minutes_west: int) -> str:
    """Return the name that later versions give: ``UTC+0100``."""
    hours, minutes = divmod(abs(minutes_west), 60)
    return f"UTC{'-' if minutes_west >= 0 else '+'}{hours:02}{minutes:02}"
