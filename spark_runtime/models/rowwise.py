"""Columnar requests for models that do not know them: one call a row, put together to the same answer.

A package made by an older compiler takes a columnar request for an empty one: its answer has no columns. That is found
out with the first such answer, and remembered by whoever owns the model.
"""

from collections.abc import Sequence
from typing import Any

from spark_runtime.columnar import ColumnarSerializer
from spark_runtime.errors import BadRequestError
from spark_runtime.models.envelope import Envelope, Json

_columnar = ColumnarSerializer()

#: What of a columnar request does not go into the meta of each row's own, and what has another name there.
_OF_THE_WHOLE = ("inputs", "request_data", "request_meta")
_NAMES = {"version_by_timestamp": "transaction_date", "subservice": "service_category", "output": "requested_output"}


def is_columnar_answer(answer: Any) -> bool:
    """Tell whether a model's answer to a columnar request has columns, so that the model knows such requests."""
    return isinstance(answer, dict) and isinstance(answer.get("outputs"), list) and "response_data" not in answer


def row_requests(envelope: Envelope) -> list[Json]:
    """Return the body of one v3 request for each row. A blank or short row leaves inputs out, and defaults count.

    Raises:
        BadRequestError: The rows and the headers do not fit each other.
    """
    inputs = envelope.body["inputs"]
    if inputs and not ColumnarSerializer.is_deserializable(inputs):
        raise BadRequestError("the request's inputs are not columnar: a row of headers, then rows of values")
    rows = _columnar.deserialize(inputs)
    shared = {_NAMES.get(name, name): each for name, each in envelope.body.items() if name not in _OF_THE_WHOLE}
    meta = {**shared, **envelope.body["request_meta"]}
    every = rows if isinstance(rows, list) else [rows]
    return [{"request_data": {"inputs": row or {}}, "request_meta": meta} for row in every]


def columnar_answer(answers: Sequence[Any]) -> Json:
    """Return the answers to the rows' own requests as the answer to the columnar one."""
    datas = [_object(answer, "response_data") for answer in answers]
    metas = [_object(answer, "response_meta") for answer in answers]
    rows = [_object(data, "outputs") for data in datas]
    shared = {name: value for name, value in (metas[0] if metas else {}).items() if name != "process_time"}
    return {
        "outputs": _columnar.serialize(rows) or [[]],
        "warnings": [data.get("warnings") or None for data in datas],
        "errors": [data.get("errors") or None for data in datas],
        "process_time": [meta.get("process_time", 0) for meta in metas],
        **shared,
    }


def _object(where: Any, name: str) -> Json:
    found = where.get(name) if isinstance(where, dict) else None
    return found if isinstance(found, dict) else {}
