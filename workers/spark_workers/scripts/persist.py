"""The values that outlive the code that made them."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, TypeVar

from spark_workers.scripts.errors import SparkUsageError
from spark_workers.scripts.graph import Load, NeedsInitializer

T = TypeVar("T")

ASIDE = "\0aside "  # before the key of a value that could not be read


class Persisted(MutableMapping[str, Any]):
    """Persisted values by key, as a mapping: ``in``, ``[]``, ``del``, ``clear()``.

    A value that still needs its initializer (an LR scheduler with lambdas, say) is not shown until `persist` was
    called for it.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self._values: dict[str, Any] = {}
        self._aside: dict[str, Any] = {}
        self.versions: dict[str, Any] = {}
        self._note = note
        self.is_open = True  # false while the top level of a script runs

    def persist(
        self, key: str, initializer: Callable[[], T], version: Any = None, migrate: Callable[[Any], T] | None = None
    ) -> T:
        """Return the stored value of *key*, or store what *initializer* returns."""
        self._check(key)
        if not callable(initializer):
            raise SparkUsageError(f"persist({key!r}, ...) takes a function that makes the value: `lambda: value`")
        if key not in self._values:
            self._values[key] = initializer()
        elif self.versions.get(key) != version:
            self._values[key] = self._migrated(key, initializer, migrate)
        elif isinstance(self._values[key], NeedsInitializer):
            self._values[key] = self._values[key].apply(initializer())
        self.versions[key] = version
        return self._values[key]  # type: ignore[no-any-return]

    def _migrated(self, key: str, initializer: Callable[[], T], migrate: Callable[[Any], T] | None) -> T:
        if migrate is None:
            self._note(f"persist({key!r}) has a new version and no migrate=: its value begins anew")
            return initializer()
        old = self._values[key]
        return migrate(old.apply(initializer()) if isinstance(old, NeedsInitializer) else old)

    def _check(self, key: object) -> None:
        if not isinstance(key, str) or not key or key.startswith("\0"):
            raise SparkUsageError(f"a persisted key is a text that is not empty, not {key!r}")
        if not self.is_open:
            raise SparkUsageError(
                f"persist({key!r}) at the top level of the script: call it inside torch(); the top level of new "
                "code runs while the old code still works on its values"
            )

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if isinstance(value, NeedsInitializer):
            raise KeyError(key)
        return value

    def __setitem__(self, key: str, value: Any) -> None:
        self._check(key)
        self._values[key] = value
        self.versions.setdefault(key, None)

    def __delitem__(self, key: str) -> None:
        del self._values[key]
        self.discard(key)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter([key for key, value in self._values.items() if not isinstance(value, NeedsInitializer)])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def clear(self) -> None:
        """Forget every value."""
        self._values.clear()
        self._aside.clear()
        self.versions.clear()

    def discard(self, key: str) -> None:
        """Forget a value, one that could not be read included; nothing happens if there is none."""
        self._values.pop(key, None)
        self._aside.pop(key, None)
        self.versions.pop(key, None)

    def content(self) -> dict[str, Any]:
        """Return all values for a snapshot: unfinished ones and those set aside included."""
        return {**self._values, **{ASIDE + key: value for key, value in self._aside.items()}}

    def restore(self, load: Load, versions: Mapping[str, Any]) -> dict[str, str]:
        """Put back what a snapshot held; return the keys that could not be read, with the reasons.

        A value that cannot be read (its class is gone, say) is carried along as it is. When newer code can read it
        again it comes back, because it is what was trained; what took its place meanwhile stays in the snapshot.
        """
        self.versions.update(versions)
        self._values.update({key: value for key, value in load.values.items() if not key.startswith(ASIDE)})
        unread = {each.key: each.reason for each in load.unreadable if not each.key.startswith(ASIDE)}
        for key, value in load.aside.items():
            self._aside[key.removeprefix(ASIDE)] = value
        for key, value in load.values.items():
            if key.startswith(ASIDE):
                name = key.removeprefix(ASIDE)
                if name in self._values:
                    unread[name] = "its older value can be read again and is back; this one had taken its place"
                self._values[name] = value
        return unread

    def __repr__(self) -> str:
        return f"<persisted: {', '.join(self._values) or 'nothing'}>"
