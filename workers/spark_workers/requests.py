"""Requests and answers of models as bytes: written and read by whoever holds the call, supervisor or script."""

import json
from collections.abc import Callable
from typing import Any, NoReturn

import msgpack

from spark_workers.errors import AnswerInvalid, BadRequestError
from spark_workers.frames import MAX_PAYLOAD

ENVELOPE = 4096  # more than what a message adds to its payload


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _refuse_kind(value: object) -> NoReturn:
    raise TypeError(f"a {type(value).__name__} is no JSON")


def _encoder(*, ascii_only: bool) -> Callable[[Any], str]:
    """Return a function that writes JSON without spaces.

    Made once, because an encoder is dear: `json.dumps` with arguments makes two for each call, its `encode` one, and
    that takes a third of the throughput.
    """
    plain = json.JSONEncoder(ensure_ascii=ascii_only, allow_nan=False, separators=(",", ":"), default=_refuse_kind)
    make = getattr(json.encoder, "c_make_encoder", None)  # not there in a Python without its C parts
    if make is None:
        return plain.encode
    text = json.encoder.encode_basestring_ascii if ascii_only else json.encoder.encode_basestring
    write = make(None, _refuse_kind, text, None, ":", ",", False, False, False)
    return lambda value: "".join(write(value, 0))


_to_text = _encoder(ascii_only=False)
_to_ascii = _encoder(ascii_only=True)
_from_text = json.JSONDecoder(parse_constant=_refuse).decode


def write_request(request: Any) -> bytes:
    """Return the bytes that a model gets: *request* as JSON, or as it is if it is bytes.

    Raises:
        BadRequestError: It is not JSON, or too long.
    """
    if isinstance(request, bytes | bytearray | memoryview):
        payload = bytes(request)
    else:
        try:
            payload = _to_text(request).encode()
        except UnicodeEncodeError:  # half of a surrogate pair: JSON can say it, UTF-8 cannot
            payload = _to_ascii(request).encode()
        except (TypeError, ValueError, RecursionError) as problem:
            raise BadRequestError(f"the request cannot be sent as JSON: {problem}") from problem
    if len(payload) > MAX_PAYLOAD - ENVELOPE:
        raise BadRequestError(f"a request of {len(payload)} bytes is over the limit of {MAX_PAYLOAD - ENVELOPE}")
    return payload


def read_json(answer: bytes, model: str, replica: int) -> Any:
    """Return the answer as data.

    Raises:
        AnswerInvalid: It is not JSON.
    """
    try:
        return _from_text(answer.decode())
    except (ValueError, RecursionError) as problem:
        shown = answer[:80].decode(errors="replace") if answer else ""
        text = f"it begins with {shown!r}" if answer else "it is empty"
        raise AnswerInvalid(
            f"model {model!r}, replica {replica}: the answer is not JSON ({problem}); {text}", model, replica
        ) from problem


def read_bytes(answer: bytes, model: str, replica: int) -> Any:
    """Return the answer as it is, for a request that was bytes."""
    return answer


def write_numbers(numbers: tuple[Any, ...]) -> bytes:
    """Return the arguments of a call of an export.

    Raises:
        BadRequestError: One is not a number that WASM has.
    """
    for each in numbers:
        if isinstance(each, bool) or not isinstance(each, int | float):
            raise BadRequestError(f"{each!r} is not a number; exports are called with numbers")
    try:
        packed: bytes = msgpack.packb(list(numbers))
    except OverflowError as problem:
        raise BadRequestError(f"a number needs more than 64 bits: {problem}") from problem
    return packed


def read_numbers(answer: bytes, model: str, replica: int) -> Any:
    """Return what an export returned: None, a number, or a tuple of them."""
    numbers = msgpack.unpackb(answer)
    return None if not numbers else numbers[0] if len(numbers) == 1 else tuple(numbers)
