"""Which model a request means: models are known by what their packages say, and found by what a request says.

A request may name a version, a service (by folder and name, by id, or by both in one text, the "uri") and a date. The
order in which that counts is the service's own:

    version id;   service name, service id, service uri: each with a version, else on a date, else now

A version or a date is never left aside: a version that is not here is missing, even where another one of its service
is here. Of several that fit, the highest revision counts.
"""

import logging
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time
from typing import Any, Generic, NamedTuple, TypeVar

from spark_runtime.errors import BadRequestError, MissingModelError
from spark_workers.packages.package import Identity as Told

LOCAL_FOLDER = "local"
MOST_SHOWN = 10

T = TypeVar("T")

_URI = re.compile(r"([^/\[\]]+)/([^/\[\]]+)(?:\[([^\[\]]*)\])?")

_log = logging.getLogger("spark_runtime")


# --- who a model is ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a model is.

    Attributes:
        folder: ``local`` for a package that says nothing of it.
        service: The service's name.
        version_id: Of exactly this version.
        version: Its revision, such as ``1.2.0``; empty if it is not known.
        service_id: Of the service; empty if it is not known.
        effective_from: When it begins to be the service's version; None for always.
        effective_until: When it ends to be; None for never.
        is_derived: The version id was derived from the package's bytes, so nobody else knows it.
    """

    folder: str
    service: str
    version_id: str
    version: str = ""
    service_id: str = ""
    effective_from: datetime | None = None
    effective_until: datetime | None = None
    is_derived: bool = False

    @property
    def uri(self) -> str:
        """Folder, service and version in one text, such as ``sales/volume[1.2.0]``."""
        return f"{self.folder}/{self.service}" + (f"[{self.version}]" if self.version else "")

    def is_effective(self, when: datetime) -> bool:
        """Tell whether this is a version of its service on that day."""
        begun = self.effective_from is None or self.effective_from <= when
        return begun and (self.effective_until is None or when <= self.effective_until)

    @property
    def revision(self) -> tuple[int, ...]:
        """The version as numbers, for comparing; a version that is not known is the lowest."""
        return tuple(int(each) for each in re.findall(r"\d{1,18}", self.version))


def identify(
    service: str,
    sha256: str,
    told: Told | None = None,
    *,
    folder: str = "",
    version_id: str = "",
) -> Identity:
    """Return who a model is.

    Args:
        service: What counts where nothing else is said: the name that the package's files carry, else the file's stem.
        sha256: Of the package, in hexadecimal.
        told: What an export or a configuration says.
        folder: If the user named the model: its folder. *service* then is the user's word as well, and both overrule.
        version_id: The user's word for the version.

    Raises:
        BadRequestError: *folder* or *service* cannot be such a name.
    """
    told = told or Told()
    known_id = version_id or told.version_id
    found = Identity(
        folder=folder or told.folder or LOCAL_FOLDER,
        service=service if folder else told.service or service,
        version_id=known_id or derived_version_id(sha256),
        version=told.revision,
        service_id=told.service_id,
        effective_from=_told_date(told.effective_start),
        effective_until=_told_date(told.effective_end),
        is_derived=not known_id,
    )
    if folder:
        _check_name("folder", found.folder)
        _check_name("service", found.service)
    return found


def derived_version_id(sha256: str) -> str:
    """Return the version id of a package that says none: the same for the same bytes, everywhere."""
    import uuid  # few runs need it, and it takes a while to import

    return str(uuid.UUID(hex=sha256[:32], version=5))


def split_assignment(text: str) -> tuple[str, str, str]:
    """Return folder, service and path of ``FOLDER/SERVICE=PATH``; a path alone has neither folder nor service.

    Raises:
        BadRequestError: What stands before the ``=`` is no ``FOLDER/SERVICE``.
    """
    name, separator, path = text.partition("=")
    if not separator or ("/" in name and len(name.split("/")) != 2) or name.startswith((".", "/")):
        return "", "", text  # a path may have an = in it
    folder, slash, service = name.partition("/")
    if not slash or not path:
        raise BadRequestError(f"{text!r} is not FOLDER/SERVICE=PATH, such as sales/volume=volume.zip")
    _check_name("folder", folder)
    _check_name("service", service)
    return folder, service, path


def _check_name(what: str, name: str) -> None:
    if not name.strip() or re.search(r"[/\[\]\x00-\x1f]", name):
        raise BadRequestError(f"{name!r} cannot be the name of a {what}: it must not be empty, nor have / [ or ] in it")


def _told_date(text: str) -> datetime | None:
    """Return a date that a package says. One that cannot be read does not keep the model from running."""
    if not text:
        return None
    try:
        return read_date(text)
    except BadRequestError:
        _log.warning("an effective date in a package is %s, which is no date; it is left aside", ascii(text[:60]))
        return None


def read_date(value: Any) -> datetime:
    """Return a moment given as ISO 8601, as milliseconds since 1970, or as a date of Python's; UTC if it says no zone.

    Raises:
        BadRequestError: It is none of these.
    """
    try:
        if isinstance(value, datetime):
            found = value
        elif isinstance(value, date):
            found = datetime.combine(value, time())
        elif isinstance(value, int) and not isinstance(value, bool):
            found = datetime.fromtimestamp(value / 1000, UTC)
        elif isinstance(value, str):
            found = datetime.fromisoformat(value.strip())
        else:
            raise ValueError
    except (ValueError, OverflowError, OSError) as problem:
        shown = ascii(value)[:60]
        raise BadRequestError(f"{shown} is no date; give it as 2026-01-31 or 2026-01-31T12:00:00Z") from problem
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


# --- what a request wants ---------------------------------------------------------------------------------------------


class Wanted(NamedTuple):
    """What is said of the model that is meant. Empty text says nothing. (A tuple: one is made for every call.)

    Attributes:
        model: What the caller named beside the request: a name of a model's, a version id, or a uri.
        version_id: Of exactly one version.
        folder: The folder of *service*.
        service: A service's name.
        version: The revision.
        service_id: Of a service.
        service_uri: ``folder/service[version]``, ``service/ID``, ``version/ID``, or a service's id or name alone.
        transaction_date: When the version is to be effective, as `read_date` takes it; None for now. It is read only
            where a model is chosen by it: many requests carry one that nobody ever looked at.
    """

    model: str = ""
    version_id: str = ""
    folder: str = ""
    service: str = ""
    version: str = ""
    service_id: str = ""
    service_uri: str = ""
    transaction_date: Any = None

    def names_a_model(self) -> bool:
        """Tell whether anything is said that a model could be found by."""
        return bool(self.model or self.version_id or self.service or self.service_id or self.service_uri)

    def resolved(self) -> "Wanted":
        """Return the same without uris: what the caller named alone counts, a uri where nothing else is said."""
        if self.model:
            return parse_uri(self.model)._replace(transaction_date=self.transaction_date)
        if self.version_id or self.service or self.service_id or not self.service_uri:
            return self
        found = parse_uri(self.service_uri)
        return found._replace(version=found.version or self.version, transaction_date=self.transaction_date)

    def __str__(self) -> str:
        """Say what is wanted, for people."""
        said = {
            "": self.model,
            "version id": self.version_id,
            "folder": self.folder if self.service else "",
            "service": self.service,
            "version": self.version,
            "service id": self.service_id,
            "service uri": self.service_uri,
            "date": str(self.transaction_date or ""),
        }
        return ", ".join(f"{what} {value[:80]!a}".strip() for what, value in said.items() if value)


def parse_uri(text: str) -> Wanted:
    """Return what a uri says: ``folders/F/services/S``, ``F/S[version]``, ``version/ID``, ``service/ID``, or an ID."""
    parts = [part for part in text.strip().split("/") if part]
    if len(parts) == 4 and parts[0].lower() == "folders" and parts[2].lower() == "services":
        parts = [parts[1], parts[3]]
    if len(parts) == 1:
        return Wanted(version_id=parts[0])
    if len(parts) == 2 and parts[0].lower() == "version":
        return Wanted(version_id=parts[1])
    if len(parts) == 2 and parts[0].lower() == "service":
        return Wanted(service_id=parts[1])
    found = _URI.fullmatch("/".join(parts))
    if found is None:
        return Wanted(service_uri=text)
    return Wanted(folder=found[1], service=found[2], version=found[3] or "")


# --- finding ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entry(Generic[T]):
    """One model: how its owner calls it, who it is, and whatever runs it."""

    name: str
    identity: Identity
    model: T = field(compare=False)


class Registry(Generic[T]):
    """Knows models by who they are. Thread-safe: finding takes no lock, because entries are replaced as a whole."""

    def __init__(self) -> None:
        self._changing = threading.Lock()
        self._entries: tuple[Entry[T], ...]
        self._by_name: dict[str, Entry[T]]
        self._by_version_id: dict[str, Entry[T]]
        self._by_service: dict[str, list[Entry[T]]]
        self._by_service_id: dict[str, list[Entry[T]]]
        self._set(())

    def __iter__(self) -> Iterator[Entry[T]]:
        """Every model, in the order in which they were added."""
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, name: str, identity: Identity, model: T) -> None:
        """Add a model. One of the same name is replaced; one of the same version id under another name stays first."""
        with self._changing:
            entry = Entry(name, identity, model)
            kept = {each.name: each for each in self._entries} | {name: entry}
            self._set(tuple(kept.values()))

    def remove(self, name: str) -> None:
        """Forget a model; it need not be there."""
        with self._changing:
            self._set(tuple(each for each in self._entries if each.name != name))

    def find(self, wanted: Wanted, now: datetime | None = None) -> T:
        """Return the model that is wanted.

        Args:
            wanted: What is said of it; if that is nothing, the only model there is.
            now: What counts as now.

        Raises:
            MissingModelError: It is not here.
            BadRequestError: Nothing is said of it, and there is not just one.
        """
        return self.find_entry(wanted, now).model

    def find_entry(self, wanted: Wanted, now: datetime | None = None) -> Entry[T]:
        """As `find`, with all that is known of it."""
        if not wanted.names_a_model():
            return self._only()
        found = self._named(wanted, now) if wanted.model else self._described(wanted, now)
        if found is None:
            raise MissingModelError(f"there is no model with {wanted}; {self._listed()}{self._why_not(wanted, now)}")
        return found

    def _named(self, wanted: Wanted, now: datetime | None) -> Entry[T] | None:
        name = wanted.model
        found = self._by_name.get(name) or self._by_version_id.get(name.casefold())
        if found is not None:
            return found
        return self._by_uri(Wanted(service_uri=name, transaction_date=wanted.transaction_date), now)

    def _described(self, wanted: Wanted, now: datetime | None) -> Entry[T] | None:
        if wanted.version_id:
            return self._by_version_id.get(wanted.version_id.casefold())
        found = None
        if wanted.service:
            found = self._choose(self._of_service(wanted.folder, wanted.service), wanted, now)
        if found is None and wanted.service_id:
            found = self._choose(self._of_service_id(wanted.service_id), wanted, now)
        if found is None and wanted.service_uri:
            found = self._by_uri(wanted, now)
        return found

    def _by_uri(self, wanted: Wanted, now: datetime | None) -> Entry[T] | None:
        said = parse_uri(wanted.service_uri)
        limits = wanted._replace(version=said.version or wanted.version)
        if said.service:
            return self._choose(self._of_service(said.folder, said.service), limits, now)
        if said.service_id:
            return self._choose(self._of_service_id(said.service_id), limits, now)
        found = self._by_version_id.get(said.version_id.casefold())
        if found is None and said.version_id == wanted.service_uri:  # an id of a service, or its name
            services = self._of_service_id(said.version_id) or self._of_service("", said.version_id)
            found = self._choose(services, limits, now)
        return found

    def _of_service(self, folder: str, service: str) -> list[Entry[T]]:
        found = self._by_service.get(service.casefold(), [])
        return [each for each in found if not folder or each.identity.folder.casefold() == folder.casefold()]

    def _of_service_id(self, service_id: str) -> list[Entry[T]]:
        return self._by_service_id.get(service_id.casefold(), [])

    @staticmethod
    def _choose(found: list[Entry[T]], wanted: Wanted, now: datetime | None) -> Entry[T] | None:
        if wanted.version:
            version = Identity("", "", "", wanted.version).revision
            fit = [
                each
                for each in found
                if each.identity.version == wanted.version or (version and each.identity.revision == version)
            ]
        else:
            when = _moment(wanted, now)
            fit = [each for each in found if each.identity.is_effective(when)]
        return max(fit, key=lambda each: each.identity.revision, default=None)

    def _only(self) -> Entry[T]:
        if len(self._entries) == 1:
            return self._entries[0]
        raise BadRequestError(f"which model is to be called? The request names none; {self._listed()}")

    def _listed(self) -> str:
        if not self._entries:
            return "there are none"
        shown = [f"{each.identity.uri} ({each.identity.version_id})" for each in self._entries[:MOST_SHOWN]]
        more = len(self._entries) - len(shown)
        return "there are " + ", ".join(shown) + (f" and {more} more" if more else "")

    def _why_not(self, wanted: Wanted, now: datetime | None) -> str:
        """Say it where a model is there and only its time is not."""
        said = wanted.resolved()
        if said.version_id or said.version or not said.service:
            return ""
        found = self._of_service(said.folder, said.service)
        if not found:
            return ""
        return f"; no version of it is effective at {_moment(said, now).isoformat(timespec='seconds')}"

    def _set(self, entries: tuple[Entry[T], ...]) -> None:
        by_version_id: dict[str, Entry[T]] = {}
        by_service: dict[str, list[Entry[T]]] = {}
        by_service_id: dict[str, list[Entry[T]]] = {}
        for each in entries:
            by_version_id.setdefault(each.identity.version_id.casefold(), each)
            by_service.setdefault(each.identity.service.casefold(), []).append(each)
            if each.identity.service_id:
                by_service_id.setdefault(each.identity.service_id.casefold(), []).append(each)
        self._entries, self._by_name = entries, {each.name: each for each in entries}
        self._by_version_id, self._by_service, self._by_service_id = by_version_id, by_service, by_service_id


def _moment(wanted: Wanted, now: datetime | None) -> datetime:
    return read_date(wanted.transaction_date) if wanted.transaction_date else now or datetime.now(UTC)
