"""How a row of output looks in a file, so that the file tells by itself what has been done.

Whatever the format, a row is one line: JSON has line ends only between its tokens, where a space is as good. A line
without its end was torn when its writer was killed. Every row carries its number, from 0, and its key, which is two
digests: of what the model got, and of what answered (the model and its settings). So the file needs nothing beside it
to be gone on with.

    JSON lines   {"row": 7, "key": "f7fbba6e0636f890-81d9a3c1", "output": ...}  or  "error": {...}  in place of output
    CSV          7,f7fbba6e0636f890-81d9a3c1,"...",  or  7,...,,"..."  under the header row,key,output,error
"""

import json
import re
from typing import Any, NamedTuple, Protocol

from spark_runtime.supervise.jsontext import dumps

_ROW = rb'\{"row": (\d{1,18}), "key": "([0-9a-f]{16})-([0-9a-f]{8})", "(output|error)": '
_RECORD = rb'(\d{1,18}),([0-9a-f]{16})-([0-9a-f]{8}),(,?)"'


class WrittenRow(NamedTuple):
    """What a line of output says of itself."""

    number: int
    content: bytes
    maker: bytes
    is_failed: bool


class LineFormat(Protocol):
    """The lines of one format."""

    header: bytes

    def answered(self, number: int, key: bytes, answer: bytes) -> bytes:
        """Return the line for an answer, which is JSON on one line."""

    def failed(self, number: int, key: bytes, error: dict[str, Any]) -> bytes:
        """Return the line for an error."""

    def parse(self, line: bytes) -> WrittenRow | None:
        """Return what a whole line says, or None if no batch wrote it."""

    def may_be_torn(self, line: bytes) -> bool:
        """Tell whether *line*, which has no end, may be the beginning of one of ours."""


class JsonLines:
    """JSON lines."""

    header = b""
    _parse = re.compile(_ROW).match

    def answered(self, number: int, key: bytes, answer: bytes) -> bytes:
        return b'{"row": %d, "key": "%s", "output": %s}\n' % (number, key, answer)

    def failed(self, number: int, key: bytes, error: dict[str, Any]) -> bytes:
        return b'{"row": %d, "key": "%s", "error": %s}\n' % (number, key, error_json(error))

    def parse(self, line: bytes) -> WrittenRow | None:
        match = JsonLines._parse(line)
        if match is None or not line.endswith(b"}\n"):
            return None
        return WrittenRow(int(match[1]), match[2], match[3], match[4] == b"error")

    def may_be_torn(self, line: bytes) -> bool:
        start = b'{"row": '
        return line.startswith(start) or start.startswith(line)

    @staticmethod
    def value(line: bytes) -> bytes:
        """Return the JSON of the output or the error in a line that parses."""
        match = JsonLines._parse(line)
        assert match is not None
        return line[match.end() : -2]


class Csv:
    """CSV under the header ``row,key,output,error``; output and error are JSON in quotes."""

    header = b"row,key,output,error\n"
    _parse = re.compile(_RECORD).match

    def answered(self, number: int, key: bytes, answer: bytes) -> bytes:
        return b'%d,%s,"%s",\n' % (number, key, answer.replace(b'"', b'""'))

    def failed(self, number: int, key: bytes, error: dict[str, Any]) -> bytes:
        return b'%d,%s,,"%s"\n' % (number, key, error_json(error).replace(b'"', b'""'))

    def parse(self, line: bytes) -> WrittenRow | None:
        match = Csv._parse(line)
        if match is None or not line.endswith(b'"\n' if match[4] else b'",\n'):
            return None
        return WrittenRow(int(match[1]), match[2], match[3], bool(match[4]))

    def may_be_torn(self, line: bytes) -> bool:
        return self.header.startswith(line) or re.match(rb"\d{1,18}(,|\Z)", line) is not None


LINE_FORMATS: dict[str, type[JsonLines] | type[Csv]] = {"jsonl": JsonLines, "csv": Csv}


def error_json(error: dict[str, Any]) -> bytes:
    """Return an error as JSON on one line."""
    try:
        return dumps(error).encode()
    except (TypeError, ValueError, RecursionError):
        return json.dumps({name: str(value) for name, value in error.items()}).encode()


def on_one_line(answer: bytes) -> bytes:
    """Return valid JSON without line ends."""
    answer = answer.strip(b" \t\r\n")
    if b"\n" in answer or b"\r" in answer:
        answer = answer.replace(b"\r", b" ").replace(b"\n", b" ")
    return answer
