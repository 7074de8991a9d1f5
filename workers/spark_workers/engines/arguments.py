"""Numbers on their way into a guest: which ones a type takes, and the sentence for those that it does not."""

from collections.abc import Sequence

from spark_workers.engines.seam import Number
from spark_workers.hosts.failures import GuestFailed

#: What an integer parameter takes: everything that its bits can mean, signed or unsigned.
RANGES = {"i32": (-(1 << 31), (1 << 32) - 1), "i64": (-(1 << 63), (1 << 64) - 1)}
CALLABLE = ("i32", "i64", "f32", "f64")


def convert_all(name: str, params: Sequence[str], arguments: Sequence[object]) -> list[Number]:
    """Return *arguments* as the function *name* takes them.

    Raises:
        GuestFailed: wrong-signature.
    """
    if len(arguments) != len(params):
        raise wrong_count(name, params, len(arguments))
    return [convert(name, params, at, value) for at, value in enumerate(arguments)]


def convert(name: str, params: Sequence[str], at: int, value: object) -> Number:
    """Return *value* as parameter *at* takes it: integers within its range, anything that is a number for a float.

    Raises:
        GuestFailed: wrong-signature.
    """
    kind = params[at]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise wrong_argument(name, params, at, f"not {value!r:.80}")
    if kind not in RANGES:
        return _floating(name, params, at, value)
    if isinstance(value, float):
        if not value.is_integer():
            raise wrong_argument(name, params, at, f"a whole number, not {value!r}")
        value = int(value)  # exact: it is whole
    low, high = RANGES[kind]
    if not low <= value <= high:
        raise wrong_argument(name, params, at, f"from {low} to {high}, not {_shown(value)}")
    return value


def _floating(name: str, params: Sequence[str], at: int, value: Number) -> float:
    try:
        return float(value)
    except OverflowError:
        raise wrong_argument(name, params, at, f"and {_shown(value)} is too large for that") from None


def _shown(value: Number) -> str:
    bits = value.bit_length() if isinstance(value, int) else 0
    return f"a number of {bits} bits" if bits > 200 else str(value)


def wrong_count(name: str, params: Sequence[str], count: int) -> GuestFailed:
    """The failure of a call with too many or too few arguments."""
    takes = f"({', '.join(params)})"
    text = f"the function `{name}` takes {len(params)} argument{'' if len(params) == 1 else 's'} {takes}"
    text += f", and {count} {'was' if count == 1 else 'were'} given"
    return GuestFailed("wrong-signature", text, {"function": name, "takes": takes})


def wrong_argument(name: str, params: Sequence[str], at: int, problem: str) -> GuestFailed:
    """The failure of a call with an argument that its type does not take."""
    text = f"argument {at + 1} of `{name}` is {params[at]}, {problem}; it takes ({', '.join(params)})"
    return GuestFailed("wrong-signature", text, {"function": name, "takes": f"({', '.join(params)})"})


def not_callable(name: str, params: Sequence[str], results: Sequence[str]) -> GuestFailed:
    """The failure of a call to a function that takes or gives more than numbers."""
    others = [each for each in (*params, *results) if each not in CALLABLE]
    text = f"the function `{name}` takes or returns {', '.join(sorted(set(others)))}; only numbers can be passed"
    return GuestFailed("wrong-signature", text, {"function": name})
