"""The configuration of the Node SDK, taken as it stands: a mapping, or a JSON file.

    {"sparkEndpoint": {"url", "tenant", "authType", "syntheticKey", "bearerToken"},
     "nodegenModels": [{"versionId", "type", "binary", "preventCleanup", "replica", "metaData"}],
     "offlineMaxService": 20, "timeout": 60000}

Only models: offline. Only an endpoint, or an empty list of models beside it: online. Both: offline first.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spark_runtime.config import AUTHS, Endpoint
from spark_runtime.errors import BadRequestError
from spark_runtime.models.binary import Binary
from spark_workers.packages.package import Identity as Told

MAX_MODELS = 20
MAX_MODELS_VARIABLE = "OFFLINE_MAX_SERVICE"
TIMEOUT_MS = 60_000

_TOP = ("sparkEndpoint", "nodegenModels", "nodeGenModels", "offlineMaxService", "timeout")
_ENDPOINT = ("url", "tenant", "authType", "syntheticKey", "bearerToken")
_MODEL = ("versionId", "type", "binary", "preventCleanup", "replica", "metaData")


@dataclass(frozen=True, slots=True)
class ConfiguredModel:
    """One model of the configuration.

    Attributes:
        version_id: What requests name it by; also its name.
        binary: Its package, fetched at the first use.
        told: What ``metaData.EngineInformation`` says of it.
        replicas: ``replica``.
        keep: ``preventCleanup``.
    """

    version_id: str
    binary: Binary
    told: Told
    replicas: int = 1
    keep: bool = False


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """All that a configuration says.

    Attributes:
        models: What can be called offline; none for online only.
        endpoint: Where models are called online; None for offline only.
        max_models: ``offlineMaxService``, or the environment variable ``OFFLINE_MAX_SERVICE``.
        timeout: Seconds, though the configuration gives milliseconds.
    """

    models: tuple[ConfiguredModel, ...]
    endpoint: Endpoint | None
    max_models: int
    timeout: float


def from_config(given: Mapping[str, Any] | str | os.PathLike[str]) -> NodeConfig:
    """Return what a configuration of the Node SDK says.

    Args:
        given: The configuration, or the JSON file that it is in. Paths in a file begin at its folder.

    Raises:
        BadRequestError: It cannot be read, has keys that are not known (all of them are named), values that make no
            sense, or neither models nor an endpoint.
    """
    if isinstance(given, Mapping):
        return _Reader("the configuration", None).read(given)
    path = Path(given)
    return _Reader(str(path), path.absolute().parent).read(_from_file(path))


def _from_file(path: Path) -> Any:
    try:
        text = path.read_bytes()
        return json.loads(text.decode("utf-8-sig"))
    except OSError as problem:
        raise BadRequestError(f"{path} cannot be read: {problem.strerror or problem}") from problem
    except (ValueError, RecursionError) as problem:
        raise BadRequestError(f"{path} is not a configuration in JSON: {problem}") from problem


class _Reader:
    """Reads one configuration; knows what it is called and where its paths begin."""

    def __init__(self, name: str, folder: Path | None) -> None:
        self._name = name
        self._folder = folder

    def read(self, given: Any) -> NodeConfig:
        """Return what *given* says."""
        top = self._object(given, "")
        self._check_keys(top)
        timeout = self._milliseconds(top) / 1000
        models = self._models(top)
        endpoint = self._endpoint(top.get("sparkEndpoint"), timeout)
        if not models and endpoint is None:
            raise BadRequestError(f"{self._name} has neither models (nodegenModels) nor an endpoint (sparkEndpoint)")
        return NodeConfig(models, endpoint, self._max_models(top), timeout)

    # --- keys ---

    def _check_keys(self, top: Mapping[str, Any]) -> None:
        unknown = list(_unknown(top, _TOP, ""))
        if isinstance(endpoint := top.get("sparkEndpoint"), Mapping):
            unknown += _unknown(endpoint, _ENDPOINT, "sparkEndpoint.")
        for name in ("nodegenModels", "nodeGenModels"):
            models = top.get(name)
            for number, model in enumerate(models if isinstance(models, list | tuple) else ()):
                if isinstance(model, Mapping):
                    unknown += _unknown(model, _MODEL, f"{name}[{number}].")
        if unknown:
            known = f"{', '.join(_TOP)}; of an endpoint {', '.join(_ENDPOINT)}; of a model {', '.join(_MODEL)}"
            raise BadRequestError(f"{self._name} has keys that are not known: {', '.join(unknown)}. There are {known}")

    # --- models ---

    def _models(self, top: Mapping[str, Any]) -> tuple[ConfiguredModel, ...]:
        names = [name for name in ("nodegenModels", "nodeGenModels") if top.get(name) is not None]
        if len(names) > 1:
            raise BadRequestError(f"{self._name} has both nodegenModels and nodeGenModels; they are the same")
        if not names:
            return ()
        given = top[names[0]]
        if not isinstance(given, list | tuple):
            raise self._wrong(names[0], given, "a list of models")
        models = tuple(self._model(each, f"{names[0]}[{number}]") for number, each in enumerate(given))
        seen: set[str] = set()
        for each in models:
            if each.version_id.casefold() in seen:
                raise BadRequestError(f"{self._name}: two models have the versionId {each.version_id!r}")
            seen.add(each.version_id.casefold())
        return models

    def _model(self, given: Any, where: str) -> ConfiguredModel:
        model = self._object(given, where)
        version_id = self._text(model, "versionId", where)
        kind = model.get("type")
        if kind is not None and not isinstance(kind, str):
            raise self._wrong(f"{where}.type", kind, "a text, such as base64")
        binary = model.get("binary")
        if binary is None or isinstance(binary, bool | int | float | Mapping | list | tuple):
            raise self._wrong(f"{where}.binary", binary, "base64, bytes, a path, a file, an address or a function")
        keep = model.get("preventCleanup")
        if keep is not None and not isinstance(keep, bool):
            raise self._wrong(f"{where}.preventCleanup", keep, "true or false")
        return ConfiguredModel(
            version_id,
            Binary(binary, version_id, self._folder, is_encoded=(kind or "").lower() == "base64"),
            self._told(model.get("metaData"), where),
            self._whole(model, "replica", f"{where}.", 1, 1024),
            bool(keep),
        )

    def _told(self, given: Any, where: str) -> Told:
        """Return what the metadata say. They are a document of the platform's, with much in it that is not for us."""
        if given is None:
            return Told()
        meta = self._object(given, f"{where}.metaData")
        if meta.get("EngineInformation") is None:
            return Told()
        told = self._object(meta["EngineInformation"], f"{where}.metaData.EngineInformation")

        def text(*names: str) -> str:
            return next((str(told[name]) for name in names if told.get(name) not in (None, "")), "")

        return Told(
            folder=text("ProductName"),
            service=text("ServiceName"),
            revision=text("Revision"),
            version_id=text("VersionId", "ServiceVersionGuid"),
            service_id=text("ServiceGuid", "ServiceId"),
            compiler_version=text("CompilerVersion"),
            effective_start=text("EffectiveStartDate"),
            effective_end=text("EffectiveEndDate"),
        )

    # --- the endpoint ---

    def _endpoint(self, given: Any, timeout: float) -> Endpoint | None:
        if given is None:
            return None
        where = "sparkEndpoint"
        endpoint = self._object(given, where)
        auth = self._auth(endpoint)
        credential = None
        if auth != "public":
            credential = endpoint.get(auth)
            if not callable(credential) and not (isinstance(credential, str) and credential):
                what = "nothing" if credential is None else f"{type(credential).__name__}"
                raise BadRequestError(f"{self._name}: {where}.{auth} is {what}, not a text or a function")
        url, tenant = self._text(endpoint, "url", where), self._text(endpoint, "tenant", where)
        try:
            return Endpoint(url, tenant, auth, credential, timeout)
        except BadRequestError as problem:
            raise BadRequestError(f"{self._name}: {problem}") from problem

    def _auth(self, endpoint: Mapping[str, Any]) -> str:
        """Return the kind of credential: what ``authType`` says, else the one that is there."""
        given = endpoint.get("authType")
        if given is None:
            there = [each for each in AUTHS[1:] if endpoint.get(each) is not None]
            if len(there) > 1:
                raise BadRequestError(f"{self._name}: sparkEndpoint has {' and '.join(there)}; authType says which")
            return there[0] if there else "public"
        found = next((each for each in AUTHS if isinstance(given, str) and each.lower() == given.lower()), None)
        if found is None:
            raise self._wrong("sparkEndpoint.authType", given, f"one of {', '.join(AUTHS)}")
        return found

    # --- numbers and the like ---

    def _max_models(self, top: Mapping[str, Any]) -> int:
        if top.get("offlineMaxService") is not None:
            return self._whole(top, "offlineMaxService", "", MAX_MODELS, 1_000_000)
        told = os.environ.get(MAX_MODELS_VARIABLE, "").strip()
        if not told:
            return MAX_MODELS
        if not told.isdecimal() or not 1 <= int(told[:7]) <= 1_000_000:
            raise BadRequestError(f"{MAX_MODELS_VARIABLE} is {told[:60]!a}, not a number of models above 0")
        return int(told)

    def _milliseconds(self, top: Mapping[str, Any]) -> float:
        given = top.get("timeout")
        if given is None:
            return TIMEOUT_MS
        if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given < float("inf"):
            raise self._wrong("timeout", given, "a number of milliseconds above 0")
        return given

    def _whole(self, where: Mapping[str, Any], name: str, path: str, otherwise: int, most: int) -> int:
        given = where.get(name)
        if given is None:
            return otherwise
        if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= most:
            raise self._wrong(f"{path}{name}", given, f"a whole number from 1 to {most}")
        return given

    def _text(self, where: Mapping[str, Any], name: str, path: str) -> str:
        given = where.get(name)
        if not isinstance(given, str) or not given.strip():
            raise self._wrong(f"{path}.{name}", given, "a text")
        return given.strip()

    def _object(self, given: Any, where: str) -> Mapping[str, Any]:
        if not isinstance(given, Mapping):
            raise self._wrong(where, given, "an object")
        return given

    def _wrong(self, where: str, given: Any, right: str) -> BadRequestError:
        shown = (
            "missing" if given is None else f"{given!a:.60}" if isinstance(given, str | int | float) else _kind(given)
        )
        return BadRequestError(f"{self._name}{': ' + where if where else ''} is {shown}, not {right}")


def _unknown(where: Mapping[str, Any], known: tuple[str, ...], path: str) -> Iterator[str]:
    return (f"{path}{name}" for name in where if name not in known)


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return "an object"
    return "a list" if isinstance(value, list | tuple) else f"a {type(value).__name__}"
