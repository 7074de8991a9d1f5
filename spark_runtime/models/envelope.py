"""A request to a Neuron model: what of it the model gets, which model it means, and what is kept beside it.

There are two forms. Rows and single calls have their own:

    {"request_data": {"inputs": {NAME: value}}, "request_meta": {...}}              v3: one call
    {"inputs": [[header...], [row...], ...], "version_id": ID, ...}                 v4: columnar, many rows in one call

Anything else that is an object is plain inputs, and is put into a v3 request. ``request_meta._ctx``, the credentials of
a request for the calls that its model makes, is taken out: the model never sees it, and it lives as long as this
envelope. Nobody's object is changed on the way; what is changed is copied first.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spark_runtime.errors import BadRequestError
from spark_runtime.models.registry import Wanted

Json = dict[str, Any]

METADATA, FORMSPEC = "metadata", "formspec"


class Envelope:
    """One request. What few calls need is found out when it is asked for: a call takes microseconds, and so does this.

    Attributes:
        body: What the model gets.
        is_columnar: It has the v4 form.
        context: ``_ctx``, with the ``callId``: for the calls that the model makes while it answers this very request.
    """

    __slots__ = ("_given", "_meta", "_model", "body", "context", "is_columnar")

    def __init__(self, given: Json, meta: Json, data: Any, context: Json, model: str, *, is_columnar: bool) -> None:
        allowed = meta.get("allow_range_address") or False
        # The JavaScript runner sends both parts, also with v4, and that is what engines are used to.
        self.body = {**given, "request_data": data, "request_meta": {**meta, "allow_range_address": allowed}}
        self.is_columnar = is_columnar
        self.context: Mapping[str, Any] = context
        self._given = given
        self._meta = meta
        self._model = model

    def __repr__(self) -> str:
        return f"<Envelope for {self.wanted}>"  # neither the inputs nor the credentials in the context

    @property
    def request(self) -> Json:
        """What the endpoint gets: the request as it was given, in an envelope, without ``_ctx``."""
        return {**self._given, "request_meta": self._meta} if "request_meta" in self._given else self._given

    @property
    def wanted(self) -> Wanted:
        """What is said of the model that is meant.

        Raises:
            BadRequestError: An id is not a text.
        """
        meta, beside = self._meta, self._given if self.is_columnar else {}
        return Wanted(
            model=self._model,
            version_id=_text(meta, "version_uuid") or _text(meta, "version_id") or _text(self._given, "version_id"),
            folder=_text(meta, "folder_name"),
            service=_text(meta, "service_name"),
            version=_text(meta, "version"),
            service_id=_text(meta, "service_id") or _text(meta, "service_uuid"),
            service_uri=_text(meta, "service_uri") or _text(beside, "service"),
            transaction_date=meta.get("transaction_date") or beside.get("version_by_timestamp") or None,
        )

    @property
    def categories(self) -> frozenset[str]:
        """What ``service_category`` asks for, in lower case."""
        asked = self._meta.get("service_category")
        if not asked or not isinstance(asked, str):
            return _NOTHING
        return frozenset(asked.lower().split(","))  # spaces count, as they do in the JavaScript runner


_NOTHING: frozenset[str] = frozenset()


def open_request(request: Any, model: str | None = None) -> Envelope:
    """Return a request in its envelope.

    Args:
        request: Either form, or plain inputs.
        model: Which model the caller named beside it; that counts before what the request says.

    Raises:
        BadRequestError: It is no object, or a part of it has the wrong type.
    """
    if type(request) is not dict and not isinstance(request, Mapping):
        raise BadRequestError(f"a request to a Neuron model is an object of inputs, not {_name(request)}")
    is_columnar = False
    if "request_data" not in request:
        is_columnar = isinstance(request.get("inputs"), list)
        if not is_columnar and "request_meta" not in request:
            given = {"request_data": {"inputs": request}, "request_meta": {}}
            return Envelope(given, {}, given["request_data"], {}, model or "", is_columnar=False)
    given = dict(request)
    meta, data = _part(given, "request_meta"), _part(given, "request_data")
    context = _part(meta, "_ctx") if "_ctx" in meta else {}
    meta.pop("_ctx", None)
    if "callid" in given:  # the JavaScript runner's own word for it
        context.setdefault("callId", given.pop("callid"))
    return Envelope(given, meta, data, context, model or "", is_columnar=is_columnar)


def _part(whole: Json, name: str) -> Json:
    """Return a copy of an object in a request; an empty one where there is none."""
    part = whole.get(name)
    if type(part) is not dict:
        if part is None:
            return {}
        if not isinstance(part, Mapping):
            raise BadRequestError(f"the request's {name} is {_name(part)}, not an object")
    return dict(part)


def _text(where: Json, name: str) -> str:
    value = where.get(name)
    if not value:  # null and "" are what many clients send for what they do not say
        return ""
    if isinstance(value, str | int | float):
        return str(value).strip()
    raise BadRequestError(f"the request's {name} is {_name(value)}, not a text")


def _name(value: Any) -> str:
    if value is None:
        return "null"
    return {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list"}.get(
        type(value), f"a {type(value).__name__}"
    )


# --- what is known without the model ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Documents:
    """The files of a package that answer questions about it.

    Attributes:
        static: ``{"Outputs": {...}, "ImageOutputs": [{"ImageName", "Base64Content"}]}``; None if there is no such file.
        formspec: The form specification; None if there is none.
        compiler_version: Of the compiler that made the package.
    """

    static: Json | None = None
    formspec: Any = None
    compiler_version: str = ""

    def asked(self, envelope: Envelope) -> str:
        """Return what of this the request asks for: ``"metadata"``, ``"formspec"``, or nothing."""
        if envelope.is_columnar:
            return ""
        if METADATA in envelope.categories and self.static is not None:
            return METADATA
        if FORMSPEC in envelope.categories and self.formspec is not None:
            return FORMSPEC
        return ""

    def answer(self, envelope: Envelope) -> Json | None:
        """Return the whole answer to a request that asks for nothing else; None if the model has to be run."""
        asked = self.asked(envelope)
        if not asked or envelope.categories - {METADATA, FORMSPEC, ""} or envelope.body["request_data"].get("inputs"):
            return None
        meta = {
            **envelope.body["request_meta"],
            "compiler_type": "Neuron",
            "system": "SPARK",
            "compiler_version": self.compiler_version,
            "process_time": 0,
        }
        return {"response_data": {"outputs": self._outputs(asked, {})}, "response_meta": meta}

    def complete(self, envelope: Envelope, answer: Any) -> Any:
        """Return the model's answer with what the request asks for beside it; the same object if that is nothing."""
        asked = self.asked(envelope)
        if not asked or not isinstance(answer, dict):
            return answer
        data = answer.get("response_data")
        data = data if isinstance(data, dict) else {}
        outputs = data.get("outputs")
        return {**answer, "response_data": {**data, "outputs": self._outputs(asked, outputs)}}

    def _outputs(self, asked: str, outputs: Any) -> Any:
        if asked == FORMSPEC:
            return self.formspec
        static = self.static or {}
        own, images = static.get("Outputs"), static.get("ImageOutputs")
        found = dict(outputs) if isinstance(outputs, dict) else {}
        found |= own if isinstance(own, dict) else {}
        for image in images if isinstance(images, list) else ():
            if isinstance(image, dict) and image.get("ImageName"):
                found[str(image["ImageName"])] = image.get("Base64Content") or None
        return found
