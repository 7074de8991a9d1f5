"""Taking values through a dump and back, and script modules that can be edited and taken away."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from spark_workers.scripts.graph import Dump, Load, dump, load

SCRIPT = "graph_test_script"


def read(dumped: Dump) -> Load:
    """Load a dump from a copy of its memory, as another process would."""
    return load(dumped.stream, [memoryview(bytearray(one)) for one in dumped.buffers], dumped.keys, dumped.offsets)


def round_trip(values: Mapping[str, object]) -> dict[str, Any]:
    """Return the values after a dump and a load in which nothing may go wrong."""
    dumped = dump(values)
    assert dumped.dropped == ()
    assert dumped.keys == tuple(values)
    loaded = read(dumped)
    assert loaded.unreadable == ()
    return loaded.values


@contextmanager
def script(source: str) -> Iterator[ModuleType]:
    """A module with this source, for as long as the block lasts."""
    module = ModuleType(SCRIPT)
    exec(source, module.__dict__)
    sys.modules[SCRIPT] = module
    try:
        yield module
    finally:
        sys.modules.pop(SCRIPT, None)
