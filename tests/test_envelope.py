"""What of a request the model gets, which model it means, and what is kept beside it."""

import copy
import json
import types
from typing import Any

import pytest

from spark_runtime.errors import BadRequestError
from spark_runtime.models.envelope import Documents, open_request
from spark_runtime.models.registry import Wanted
from spark_runtime.models.rowwise import columnar_answer, is_columnar_answer, row_requests

SECRETS = {
    "tenant": "t",
    "authorization": "Bearer secret",
    "secretkey": "secret",
    "x-synthetic-key": "secret",
    "correlationId": "c",
    "callId": "1",
    "servicemap": {"a": 1},
}


# --- what the model gets ---


def test_plain_inputs_are_put_into_a_request() -> None:
    opened = open_request({"radius": 3})
    assert opened.body == {
        "request_data": {"inputs": {"radius": 3}},
        "request_meta": {"allow_range_address": False},
    }
    assert opened.request == {"request_data": {"inputs": {"radius": 3}}, "request_meta": {}}
    assert not opened.is_columnar
    assert not opened.wanted.names_a_model()


@pytest.mark.parametrize(
    "inputs", [{}, {"inputs": {"a": 1}}, {"inputs": "x"}, {"version_id": "x"}, {"outputs": []}], ids=str
)
def test_an_object_that_is_no_request_is_inputs_whatever_its_names(inputs: Any) -> None:
    assert open_request(inputs).body["request_data"]["inputs"] == inputs


def test_a_request_reaches_the_model_as_it_is() -> None:
    request = {
        "request_data": {"inputs": {"a": [1, {"b": None}]}, "more": 1},
        "request_meta": {"version_id": "x", "call_purpose": "test"},
        "extra": [1],
    }
    opened = open_request(request)
    assert opened.body == {**request, "request_meta": {**request["request_meta"], "allow_range_address": False}}  # type: ignore[dict-item]
    assert opened.request == request


@pytest.mark.parametrize(("given", "sent"), [(True, True), (False, False), (None, False), ("A1", "A1"), (0, False)])
def test_range_addresses_are_off_unless_asked_for(given: Any, sent: Any) -> None:
    request = {"request_data": {}, "request_meta": {"allow_range_address": given}}
    assert open_request(request).body["request_meta"]["allow_range_address"] == sent
    assert open_request(request).request == request


@pytest.mark.parametrize(
    "request_",
    [{"request_meta": {}}, {"request_data": None, "request_meta": None}, {"request_data": {}}, {"request_data": None}],
    ids=str,
)
def test_parts_that_are_left_out_are_empty(request_: Any) -> None:
    assert open_request(request_).body == {"request_data": {}, "request_meta": {"allow_range_address": False}}


def test_a_columnar_request_keeps_its_form() -> None:
    request = {"inputs": [["a"], [1], None], "version_id": "x", "request_meta": {"b": 1}}
    opened = open_request(request)
    assert opened.is_columnar
    assert opened.body == {
        **request,
        "request_data": {},
        "request_meta": {"b": 1, "allow_range_address": False},
    }
    assert opened.request == request


def test_with_request_data_it_is_one_call_whatever_stands_beside() -> None:
    assert not open_request({"inputs": [["a"], [1]], "request_data": {"inputs": {}}}).is_columnar


@pytest.mark.parametrize("request_", [None, 5, "x", [], [["a"], [1]], True, b"{}"], ids=str)
def test_what_is_no_object_is_refused(request_: Any) -> None:
    with pytest.raises(BadRequestError, match="a request to a Neuron model is an object of inputs, not"):
        open_request(request_)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"request_data": []}, "request_data is a list, not an object"),
        ({"request_data": {}, "request_meta": "x"}, "request_meta is a text, not an object"),
        ({"request_meta": {"_ctx": 5}}, "_ctx is a number, not an object"),
        ({"request_meta": {"version_id": ["x"]}}, "version_id is a list, not a text"),
    ],
)
def test_parts_of_the_wrong_type_are_refused(request_: Any, words: str) -> None:
    with pytest.raises(BadRequestError, match=words):
        open_request(request_).wanted


def test_other_mappings_are_objects_too() -> None:
    meta = types.MappingProxyType({"version_id": "x"})
    assert open_request(types.MappingProxyType({"request_meta": meta})).wanted.version_id == "x"


# --- the context ---


def test_the_context_is_taken_out_and_kept_with_this_request() -> None:
    request = {"request_data": {"inputs": {}}, "request_meta": {"a": 1, "_ctx": SECRETS}}
    opened = open_request(request)
    assert opened.context == SECRETS
    for sent in (opened.body, opened.request, repr(opened)):
        assert "secret" not in str(sent)
        assert "_ctx" not in str(sent)
    assert opened.request["request_meta"] == {"a": 1}


def test_the_context_of_one_request_never_reaches_the_next() -> None:
    assert open_request({"request_meta": {"_ctx": SECRETS}}).context == SECRETS
    for request in ({"request_meta": {}}, {"request_meta": {"_ctx": {}}}, {"request_meta": {"_ctx": None}}, {"a": 1}):
        assert open_request(request).context == {}


def test_the_runners_own_call_id_belongs_to_the_context() -> None:
    opened = open_request({"callid": "7", "request_data": {}})
    assert opened.context == {"callId": "7"}
    assert "callid" not in opened.body
    assert open_request({"callid": "7", "request_meta": {"_ctx": {"callId": "8"}}}).context["callId"] == "8"


@pytest.mark.parametrize(
    "request_",
    [
        {"radius": 3, "list": [1]},
        {"callid": "7", "request_data": {"inputs": {"a": {"b": 1}}}, "request_meta": {"_ctx": SECRETS, "x": 1}},
        {"inputs": [["a"], [{"b": 1}]], "version_id": "x", "request_meta": {"_ctx": SECRETS}},
    ],
    ids=["plain", "v3", "v4"],
)
def test_nothing_that_happens_changes_the_callers_object(request_: Any) -> None:
    before = copy.deepcopy(request_)
    opened = open_request(request_, "model")
    opened.body["request_meta"]["x"] = "changed"
    opened.body["request_data"]["x"] = "changed"
    opened.request["x"] = "changed"
    opened.context["x"] = "changed"  # type: ignore[index]
    assert opened.wanted.model == "model"
    assert request_ == before


# --- which model ---


@pytest.mark.parametrize(
    ("request_", "wanted"),
    [
        ({"request_meta": {"version_uuid": "a", "version_id": "b"}, "version_id": "c"}, Wanted(version_id="a")),
        ({"request_meta": {"version_uuid": "", "version_id": "b"}, "version_id": "c"}, Wanted(version_id="b")),
        ({"request_meta": {"version_id": None}, "version_id": "c"}, Wanted(version_id="c")),
        ({"request_data": {}, "version_id": " c "}, Wanted(version_id="c")),
        ({"inputs": [], "version_id": "c"}, Wanted(version_id="c")),
        ({"inputs": [], "service": "f/s[1]"}, Wanted(service_uri="f/s[1]")),
        (
            {"inputs": [], "service": "f/s", "version_by_timestamp": "2021-01-01"},
            Wanted(service_uri="f/s", transaction_date="2021-01-01"),
        ),
        ({"request_data": {}, "service": "f/s"}, Wanted()),
        ({"request_meta": {"service_uri": "f/s", "version": "1.2"}}, Wanted(service_uri="f/s", version="1.2")),
        ({"request_meta": {"service_uuid": "s", "version": ""}}, Wanted(service_id="s")),
        (
            {"request_meta": {"service_name": "s", "folder_name": "f", "transaction_date": "2021-01-01"}},
            Wanted(folder="f", service="s", transaction_date="2021-01-01"),
        ),
        ({"request_meta": {"version_id": 7}}, Wanted(version_id="7")),
    ],
    ids=str,
)
def test_the_request_says_which_model_it_means(request_: Any, wanted: Wanted) -> None:
    assert open_request(request_).wanted == wanted


def test_what_the_caller_names_goes_along() -> None:
    wanted = open_request({"request_meta": {"version_id": "b"}}, "a").wanted
    assert (wanted.model, wanted.version_id) == ("a", "b")


# --- metadata and form specification ---

STATIC = {
    "Outputs": {"Metadata.Title": "own"},
    "ImageOutputs": [{"ImageName": "Logo", "Base64Content": "AAAA"}, {"ImageName": "None"}, {"x": 1}, 5],
}
BOTH = Documents(STATIC, {"fields": [1]}, "1.22.3")
OUTPUTS = {"Metadata.Title": "own", "Logo": "AAAA", "None": None}


def asks(categories: Any, **inputs: Any) -> Any:
    return open_request({"request_data": {"inputs": inputs}, "request_meta": {"service_category": categories, "x": 1}})


@pytest.mark.parametrize("categories", ["metadata", "MetaData", "metadata,formspec", "formspec,METADATA", "metadata,"])
def test_metadata_are_answered_from_the_file(categories: str) -> None:
    assert BOTH.answer(asks(categories)) == {
        "response_data": {"outputs": OUTPUTS},
        "response_meta": {
            "service_category": categories,
            "x": 1,
            "allow_range_address": False,
            "compiler_type": "Neuron",
            "system": "SPARK",
            "compiler_version": "1.22.3",
            "process_time": 0,
        },
    }


def test_the_form_specification_is_answered_from_the_file() -> None:
    answer = BOTH.answer(asks("formspec"))
    assert answer is not None
    assert answer["response_data"] == {"outputs": {"fields": [1]}}
    only = Documents(None, {"fields": [1]}).answer(asks("metadata,formspec"))
    assert only is not None
    assert only["response_data"] == {"outputs": {"fields": [1]}}


@pytest.mark.parametrize(
    ("documents", "opened"),
    [
        (BOTH, asks("metadata", radius=1)),
        (BOTH, asks("formspec", radius=1)),
        (BOTH, asks("pricing,metadata")),
        (BOTH, asks("")),
        (BOTH, asks(None)),
        (BOTH, asks(5)),
        (BOTH, asks("all")),
        (BOTH, open_request({"inputs": [["a"]], "request_meta": {"service_category": "metadata"}})),
        (Documents(), asks("metadata,formspec")),
        (Documents(formspec={"f": 1}), asks("metadata")),
        (Documents(static={}), asks("formspec")),
    ],
)
def test_the_model_is_run_where_anything_else_is_asked(documents: Documents, opened: Any) -> None:
    assert documents.answer(opened) is None


def test_the_models_answer_is_completed_with_what_was_asked_for() -> None:
    answer = {"response_data": {"outputs": {"volume": 1, "Metadata.Title": "?"}, "warnings": [1]}, "response_meta": {}}
    before = copy.deepcopy(answer)
    done = BOTH.complete(asks("pricing,metadata"), answer)
    assert done == {
        "response_data": {"outputs": {"volume": 1, **OUTPUTS}, "warnings": [1]},
        "response_meta": {},
    }
    done = BOTH.complete(asks("formspec", radius=1), answer)
    assert done["response_data"] == {"outputs": {"fields": [1]}, "warnings": [1]}
    assert BOTH.complete(asks("metadata", radius=1), {})["response_data"]["outputs"] == OUTPUTS
    assert answer == before


def test_an_answer_that_nothing_is_added_to_is_the_same_object() -> None:
    answer = {"response_data": {"outputs": {}}}
    assert BOTH.complete(asks("pricing"), answer) is answer
    assert Documents().complete(asks("metadata"), answer) is answer
    assert BOTH.complete(asks("metadata"), "no object") == "no object"


@pytest.mark.parametrize("static", [{}, {"Outputs": None}, {"Outputs": [1], "ImageOutputs": "x"}])
def test_odd_metadata_add_nothing(static: Any) -> None:
    answer = Documents(static).answer(asks("metadata"))
    assert answer is not None
    assert answer["response_data"] == {"outputs": {}}


# --- one call a row ---


def test_a_columnar_request_becomes_one_request_a_row() -> None:
    opened = open_request(
        {
            "inputs": [["radius", "table"], [3, [["x"], [1], [2]]], None, [], [4]],
            "version_id": "v",
            "version_by_timestamp": "2021-01-01",
            "request_meta": {"a": 1, "_ctx": SECRETS},
        }
    )
    requests = row_requests(opened)
    meta = {"version_id": "v", "transaction_date": "2021-01-01", "a": 1, "allow_range_address": False}
    assert requests == [
        {"request_data": {"inputs": inputs}, "request_meta": meta}
        for inputs in ({"radius": 3, "table": [{"x": 1}, {"x": 2}]}, {}, {}, {"radius": 4})
    ]


@pytest.mark.parametrize(("inputs", "count"), [([], 0), ([["a"]], 0), ([[]], 0), ([["a"], [1]], 1), ([[], None], 1)])
def test_there_are_as_many_requests_as_rows(inputs: Any, count: int) -> None:
    assert len(row_requests(open_request({"inputs": inputs}))) == count


@pytest.mark.parametrize(
    ("inputs", "words"),
    [([["a"], [1, 2]], "Empty column detected at row 0"), ([1], "are not columnar"), ([{"a": 1}], "are not columnar")],
)
def test_rows_that_do_not_fit_are_refused(inputs: Any, words: str) -> None:
    with pytest.raises(BadRequestError, match=words):
        row_requests(open_request({"inputs": inputs}))


def test_answers_to_rows_become_the_answer_to_all() -> None:
    meta = {"version_id": "v", "compiler_version": "1.3", "process_time": 2}
    answers = [
        {"response_data": {"outputs": {"volume": 1, "t": [{"x": 1}]}}, "response_meta": meta},
        {
            "response_data": {"outputs": {"volume": 2}, "warnings": ["w"], "errors": []},
            "response_meta": {**meta, "process_time": 3},
        },
        {"response_data": {"errors": ["e"]}, "response_meta": {}},
    ]
    assert columnar_answer(answers) == {
        "outputs": [["volume", "t"], [1, [["x"], [1]]], [2], []],
        "warnings": [None, ["w"], None],
        "errors": [None, None, ["e"]],
        "process_time": [2, 3, 0],
        "version_id": "v",
        "compiler_version": "1.3",
    }
    assert columnar_answer([]) == {"outputs": [[]], "warnings": [], "errors": [], "process_time": []}


def test_a_model_that_knows_columns_is_told_from_one_that_does_not() -> None:
    assert is_columnar_answer({"outputs": [["a"], [1]], "version_id": "v"})
    assert not is_columnar_answer({"response_data": {"outputs": {}, "errors": [{"message": "no inputs"}]}})
    assert not is_columnar_answer({"outputs": {}})
    assert not is_columnar_answer(None)
    assert is_columnar_answer(json.loads(json.dumps(columnar_answer([{}]))))
