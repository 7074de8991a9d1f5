"""The names that a script shows: values, functions, controls, and which of them changed since the last look."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import msgpack

from spark_workers.scripts.errors import SparkUsageError
from spark_workers.scripts.values import is_text, summary

Function = Callable[..., Any]


class ExposedNames:
    """What `spark.expose` and `spark.control` were given. Later calls add to earlier ones."""

    def __init__(self) -> None:
        self.functions: dict[str, Function] = {}
        self.controls: dict[str, dict[str, Any]] = {}
        self.turned: dict[str, Any] = {}  # what users set; kept over reloads
        self.is_announced = False
        self._values: dict[str, object] = {}
        self._shown: dict[str, bytes] = {}

    def add(self, bindings: Mapping[str, object]) -> None:
        """Expose each name: routines can be called, everything else is watched."""
        for name in bindings:
            if not isinstance(name, str) or not is_text(name):
                raise SparkUsageError(f"expose() takes names that are texts, not {name!r}")
        for name, value in bindings.items():
            if inspect.isroutine(value) or isinstance(value, functools.partial):
                self.functions[name] = value
                self._values.pop(name, None)
                self.is_announced = False
            else:
                self._values[name] = value
                if self.functions.pop(name, None) is not None:
                    self.is_announced = False

    def control(self, name: str, default: Any, description: dict[str, Any]) -> Any:
        """Declare a control and return its value now."""
        if self.controls.get(name) != description:
            self.controls[name] = description
            self.is_announced = False
        if name in self.turned:
            try:
                return fitting(name, self.turned[name], description)
            except SparkUsageError:  # new code has other bounds, or another kind of value
                del self.turned[name]
        return default

    def turn(self, name: str, value: Any) -> None:
        """Set a control.

        Raises:
            SparkUsageError: The script has no such control, or the value does not fit it.
        """
        if name not in self.controls:
            raise SparkUsageError(f"there is no control {name!r}; there is {', '.join(self.controls) or 'none'}")
        self.turned[name] = fitting(name, value, self.controls[name])
        self.is_announced = False

    def describe(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return functions and controls as plain data, for the supervisor."""
        self.is_announced = True
        functions = {name: _signature(function) for name, function in self.functions.items()}
        controls = {
            name: {**each, "value": self.turned.get(name, each["default"])} for name, each in self.controls.items()
        }
        return functions, controls

    def changes(self) -> dict[str, Any]:
        """Return the values that look different from the last time."""
        changed: dict[str, Any] = {}
        for name, value in list(self._values.items()):
            now = summary(value)
            packed = msgpack.packb(now)  # compares 1 with True as different, and NaN with NaN as equal
            if self._shown.get(name) != packed:
                self._shown[name] = packed
                changed[name] = now
        return changed

    def has_functions(self) -> bool:
        """Tell whether the script can be called once ``torch()`` has returned."""
        return bool(self.functions)


def fitting(name: str, value: Any, control: Mapping[str, Any]) -> Any:
    """Return *value* as the control takes it.

    Raises:
        SparkUsageError: It does not fit; the message says what would.
    """
    default, low, high = control["default"], control.get("min"), control.get("max")
    if isinstance(default, bool) != isinstance(value, bool):
        raise SparkUsageError(f"control {name!r} is {default!r}; it cannot become {value!r}")
    if isinstance(default, float) and isinstance(value, int):
        value = float(value)
    if type(value) is not type(default):
        raise SparkUsageError(f"control {name!r} takes {type(default).__name__}, not {value!r}")
    if value != value or (low is not None and value < low) or (high is not None and value > high):
        raise SparkUsageError(f"control {name!r} goes from {low} to {high}; {value!r} is outside")
    return value


def _signature(function: Function) -> dict[str, Any]:
    """Describe a function for whoever wants to offer it: parameters, defaults, annotations, documentation."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):
        return {"parameters": [], "doc": inspect.getdoc(function) or ""}
    return {"parameters": [_parameter(each) for each in parameters], "doc": inspect.getdoc(function) or ""}


def _parameter(parameter: inspect.Parameter) -> dict[str, Any]:
    empty = inspect.Parameter.empty
    described: dict[str, Any] = {"name": parameter.name, "kind": parameter.kind.name.lower()}
    if parameter.default is not empty:
        described["default"] = summary(parameter.default)
    if parameter.annotation is not empty:
        described["annotation"] = inspect.formatannotation(parameter.annotation)
    return described
