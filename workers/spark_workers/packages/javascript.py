"""Cuts JavaScript into tokens and matches its brackets, in one pass and in time that grows with its length only."""

import re

LONGEST = 8 << 20

#: After these words a slash begins a regular expression; after other names it divides.
_BEFORE_PATTERN = frozenset(
    ("return", "typeof", "case", "in", "of", "void", "delete", "throw", "new", "else", "do", "instanceof", "await")
)
_CONDITIONS = frozenset(("if", "while", "for", "with"))
_PAIRS = {")": "(", "]": "[", "}": "{"}

# No two parts of an alternative can match the same characters in two ways, so nothing is ever tried twice.
_TOKEN = re.compile(
    r"""
      (?P<space>[\s\ufeff]+)
    | (?P<name>\#?(?:[^\W\d]|\$)[\w$]*)
    | (?P<number>0[xXbBoO][0-9a-fA-F_]+n?|(?:\d[\d_]*(?:\.[\d_]*)?|\.\d[\d_]*)(?:[eE][+-]?\d+)?n?)
    | (?P<line>//[^\n\r\u2028\u2029]*)
    | (?P<block>/\*)
    | (?P<quote>["'])
    | (?P<template>`)
    | (?P<open>[(\[{])
    | (?P<close>[)\]}])
    | (?P<slash>/)
    | (?P<sign>=>|={2,3}|!={1,2}|[<>]=|>{2,3}=?|<<=?|\+\+|--|[-+*%&|^]=|\?\?=?|&&=?|\|\|=?|\?\.|\.\.\.|[^\s])
    """,
    re.VERBOSE,
)
_IN_STRING = {quote: re.compile(rf"[\\\n\r{quote}]") for quote in "\"'"}
_IN_TEMPLATE = re.compile(r"[\\`]|\$\{")
_IN_PATTERN = re.compile(r"[\\/\[\]\n\r]")
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|u\{([0-9a-fA-F]{1,6})\}|(\r\n|.))", re.DOTALL)
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t", "b": "\b", "f": "\f", "v": "\v", "0": "\0", "\n": "", "\r": "", "\r\n": ""}


class ScriptUnreadable(ValueError):
    """The text is no JavaScript. The message says where."""


class Script:
    """The tokens of a script, without space and comments.

    Attributes:
        tokens: Names, numbers and signs as they are written; a string as ``"`` and its value, a template as `````,
            a regular expression as ``/re/``. Empty tokens at both ends spare everybody the question for the end.
        partner: Of every bracket the index of its other half, else -1.
    """

    def __init__(self, text: str) -> None:
        """Read *text*.

        Raises:
            ScriptUnreadable: It is too long, a bracket has no other half, or something does not end.
        """
        if len(text) > LONGEST:
            raise ScriptUnreadable(f"it has {len(text)} characters, more than {LONGEST >> 20} Mi")
        self._text = text
        self.tokens: list[str] = [""]
        self.partner: list[int] = [-1]
        # Of each open bracket: which, its index, and whether a slash after its end begins a regular expression.
        self._open: list[tuple[str, int, bool]] = []
        self._condition_ended = -1  # index of the bracket that ended one
        self._read()
        if self._open:
            raise ScriptUnreadable(f"a {self._open[-1][0]!r} is never closed")
        self._add("")

    def __len__(self) -> int:
        return len(self.tokens)

    def is_name(self, index: int) -> bool:
        """Tell whether the token there is a name or a word of the language."""
        first = self.tokens[index][:1]
        return first == "$" or first == "_" or first.isalpha()

    def string(self, index: int) -> str | None:
        """Return the value of the string there, None if it is something else."""
        token = self.tokens[index]
        return token[1:] if token[:1] == '"' else None

    def number(self, index: int) -> int | None:
        """Return the value of the whole number there, None if it is something else."""
        token = self.tokens[index].replace("_", "").rstrip("n")
        if not token[:1].isdigit():
            return None
        try:
            if token[:2].lower() in ("0x", "0b", "0o"):
                return int(token, 0)
            value = float(token)
        except ValueError:
            return None
        return int(value) if value < 1 << 53 and value == int(value) else None

    def _add(self, token: str) -> None:
        self.tokens.append(token)
        self.partner.append(-1)

    def _read(self) -> None:
        text, at, match = self._text, 0, _TOKEN.match
        if text.startswith("#!"):
            at = len(text.split("\n", 1)[0])
        while found := match(text, at):
            kind, at = found.lastgroup, found.end()
            if kind == "space" or kind == "line":
                continue
            if kind == "name" or kind == "number" or kind == "sign":
                self._add(found.group())
            elif kind == "open":
                self._push(found.group())
            elif kind == "close":
                at = self._pop(found.group(), at)
            elif kind == "quote":
                at = self._string(at)
            elif kind == "block":
                at = self._after("*/", at, "a comment")
            elif kind == "template":
                at = self._template(at, is_begin=True)
            else:
                at = self._slash(at)

    def _push(self, bracket: str) -> None:
        self._open.append((bracket, len(self.tokens), bracket == "(" and self.tokens[-1] in _CONDITIONS))
        self._add(bracket)

    def _pop(self, bracket: str, at: int) -> int:
        if not self._open:
            raise ScriptUnreadable(f"a {bracket!r} at character {at} closes nothing")
        opened, index, is_condition = self._open.pop()
        if opened == "${" and bracket == "}":
            self._link(index, bracket)
            return self._template(at, is_begin=False)
        if opened != _PAIRS[bracket]:
            raise ScriptUnreadable(f"a {opened!r} is closed by a {bracket!r} at character {at}")
        self._link(index, bracket)
        self._condition_ended = len(self.tokens) - 1 if is_condition else -1
        return at

    def _link(self, index: int, bracket: str) -> None:
        self.partner[index] = len(self.tokens)
        self._add(bracket)
        self.partner[-1] = index

    def _after(self, end: str, at: int, what: str) -> int:
        found = self._text.find(end, at)
        if found < 0:
            raise ScriptUnreadable(f"{what} that begins at character {at} does not end")
        return found + len(end)

    def _string(self, begin: int) -> int:
        quote = self._text[begin - 1]
        at = begin
        while found := _IN_STRING[quote].search(self._text, at):
            at = found.end()
            if found.group() == "\\":
                at += 2 if self._text.startswith("\r\n", at) else 1
            elif found.group() == quote:
                value = self._text[begin : at - 1]
                self._add('"' + (_ESCAPE.sub(_unescaped, value) if "\\" in value else value))
                return at
            else:
                break
        raise ScriptUnreadable(f"a string that begins at character {begin} does not end")

    def _template(self, at: int, is_begin: bool) -> int:
        begin = at
        while found := _IN_TEMPLATE.search(self._text, at):
            at = found.end()
            if found.group() == "\\":
                at += 1
                continue
            if is_begin:
                self._add("`")
            if found.group() == "${":
                self._open.append(("${", len(self.tokens), False))
                self._add("${")
            return at
        raise ScriptUnreadable(f"a template that begins at character {begin} does not end")

    def _slash(self, at: int) -> int:
        """A slash divides after a value, and begins a regular expression elsewhere."""
        before = self.tokens[-1]
        if before == ")" and self._condition_ended == len(self.tokens) - 1:
            return self._pattern(at)
        index = len(self.tokens) - 1
        is_value = before in (")", "]", "}", "++", "--", "`", "/re/") or (before[:1] and before[0] in '"0123456789')
        if is_value or (before != "." and before[:1] == "." and before[1:2].isdigit()):
            is_value = True
        elif self.is_name(index):
            is_value = before not in _BEFORE_PATTERN or self.tokens[index - 1] in (".", "?.")
        if not is_value:
            return self._pattern(at)
        self._add("/")
        return at

    def _pattern(self, begin: int) -> int:
        at, in_class = begin, False
        while found := _IN_PATTERN.search(self._text, at):
            at, sign = found.end(), found.group()
            if sign == "\\":
                at += 1
            elif sign in "\n\r":
                break
            elif sign == "/" and not in_class:
                self._add("/re/")  # its flags follow as a name, which does no harm
                return at
            elif sign != "/":
                in_class = sign == "["
        raise ScriptUnreadable(f"a regular expression that begins at character {begin} does not end")


def _unescaped(found: re.Match[str]) -> str:
    code = found[1] or found[2] or found[3]
    if code:
        number = int(code, 16)
        return chr(number) if number < 0x110000 else "\ufffd"
    return _ESCAPED.get(found[4], found[4])
