"""`spark.range` and `spark.loop`: a checkpoint for every item, and a position that survives a reload.

A position is found again by where its loop stands, not by a line number, because lines move when code is edited. The
path of a loop is made of the loops around it with the item each of them is at, and its own key or its turn among its
siblings: ``main@0/0@5/1`` is the second loop begun in the sixth item of the first loop of
``torch()``. When a loop moves
to its next item the positions inside it are forgotten, and a call of an exposed function keeps positions of its own.
"""

import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextvars import ContextVar, Token
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class _Place:
    """Something that loops can stand in: ``torch()``, a call of an exposed function, or another loop."""

    __slots__ = ("began", "children", "first", "item", "label", "path", "total")

    def __init__(self, path: str, label: str = "", total: int | None = None, first: int = 0) -> None:
        self.path = path
        self.label = label
        self.total = total
        self.first = self.item = first
        self.began = time.monotonic()
        self.children = 0

    def inside(self) -> str:
        """The path that loops in the current item begin with."""
        return f"{self.path}@{self.item}"


class Loop(Generic[T]):
    """What `spark.range` and `spark.loop` return: iterate with ``for``, or with ``async for`` in asynchronous code."""

    def __init__(self, loops: "Loops", items: Iterable[T], key: str | None) -> None:
        self._loops = loops
        self._items = items
        self._key = key

    def __iter__(self) -> Iterator[T]:
        with _Running(self._loops, self._items, self._key) as running:
            for item in running.rest(self._items):
                self._loops.checkpoint()
                yield item
                running.advance()

    async def __aiter__(self) -> AsyncIterator[T]:
        with _Running(self._loops, self._items, self._key) as running:
            for item in running.rest(self._items):
                await self._loops.checkpoint()
                yield item
                running.advance()


class _Running:
    """One loop from its first item to its last."""

    def __init__(self, loops: "Loops", items: Iterable[Any], key: str | None) -> None:
        self._loops = loops
        around = loops.current()
        name = key if key is not None else str(around.children)
        around.children += 1
        path = f"{around.inside()}/{name}"
        total = len(items) if isinstance(items, Sized) else None
        self._place = _Place(path, key or f"loop {path}", total, loops.positions.get(path, 0))

    def __enter__(self) -> "_Running":
        self._token = self._loops.descend(self._place)
        self._loops.positions[self._place.path] = self._place.item
        return self

    def __exit__(self, *error: object) -> None:
        self._loops.ascend(self._place, self._token)

    def rest(self, items: Iterable[T]) -> Iterator[T]:
        """The items from where this loop was."""
        first = self._place.first
        if isinstance(items, Sequence):
            return (items[index] for index in range(first, len(items)))
        return itertools.islice(items, first, None)

    def advance(self) -> None:
        """The item is done: its inner loops' positions are not needed any more."""
        place = self._place
        if place.children:
            self._loops.forget(place.inside())
            place.children = 0
        place.item += 1
        self._loops.positions[place.path] = place.item


class Loops:
    """Knows where every loop is. *positions* is persisted with the script's values."""

    def __init__(self, checkpoint: Callable[[], Awaitable[object]]) -> None:
        self.positions: dict[str, int] = {}
        self.checkpoint = checkpoint
        self._main = _Place("main")
        # A context variable, because each asyncio task stands in loops of its own.
        self._current: ContextVar[_Place | None] = ContextVar("current", default=None)
        self._running: list[_Place] = []

    def loop(self, items: Iterable[T], key: str | None) -> Loop[T]:
        """Return the loop over *items*; it begins when it is iterated."""
        return Loop(self, items, key)

    def current(self) -> _Place:
        """Where the code that asks stands."""
        return self._current.get() or self._main

    def descend(self, place: _Place) -> "Token[_Place | None]":
        """Stand in *place* from now on."""
        self._running.append(place)
        return self._current.set(place)

    def ascend(self, place: _Place, token: "Token[_Place | None]") -> None:
        """Stand where we stood before *place*."""
        self._running.remove(place)
        try:
            self._current.reset(token)
        except ValueError:
            pass  # an abandoned asynchronous loop is closed in another context, where it never was current

    def enter_call(self, call: str) -> "tuple[_Place, Token[_Place | None]]":
        """A call of an exposed function begins: its loops are its own."""
        place = _Place(f"call {call}")
        return place, self.descend(place)

    def leave_call(self, entered: "tuple[_Place, Token[_Place | None]]", *, finished: bool) -> None:
        """The call is over; its positions are needed again only if it was interrupted."""
        self.ascend(*entered)
        if finished:
            self.forget(entered[0].path)

    def restore(self, positions: Mapping[str, int], *, with_calls: bool) -> None:
        """Take over the positions of a snapshot; those inside calls only where the calls are repeated."""
        kept = {path: item for path, item in positions.items() if with_calls or path.startswith("main@")}
        self.positions.update(kept)

    def finish_main(self) -> None:
        """``torch()`` returned: another run of it begins its loops from the start."""
        self.forget("main")

    def forget(self, path: str) -> None:
        """Drop the positions of every loop inside *path*."""
        for known in [each for each in self.positions if each.startswith((f"{path}/", f"{path}@"))]:
            del self.positions[known]

    def progress(self) -> dict[str, list[float]]:
        """Return item, total and seconds left of each running loop, -1 for what is unknown."""
        loops = [place for place in self._running if place.label]
        return {each.label: [each.item, -1 if each.total is None else each.total, _left(each)] for each in loops}


def _left(place: _Place) -> float:
    done = place.item - place.first
    if place.total is None or done <= 0:
        return -1.0
    return (time.monotonic() - place.began) / done * (place.total - place.item)
