"""Rows and columns: the round trips that the format is documented with, and what it cannot say."""

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_runtime.columnar import ColumnarSerializer
from spark_runtime.errors import BadRequestError

columnar = ColumnarSerializer()

ROUND_TRIPS = [
    ([{"a": 1}, {"a": 2}], [["a"], [1], [2]]),
    ([{"a": 1, "b": 2}, {"b": 3, "a": 4}], [["a", "b"], [1, 2], [4, 3]]),
    ([{"a": 1}, None, {"a": 2}], [["a"], [1], None, [2]]),
    ([None, {"key": "value"}], [["key"], None, ["value"]]),
    ([{"a": 1}, None], [["a"], [1], None]),
    ([{"a": 1}, {"a": None}], [["a"], [1], [None]]),
    ([], []),
    ([{}], [[], []]),
    ([{}, None], [[], [], None]),
    ([None], [None]),
    ([None, None], [None, None]),
    ([{"t": [{"x": 1}, None, {"x": 2}]}], [["t"], [[["x"], [1], None, [2]]]]),
    ([{"t": [None]}], [["t"], [[None]]]),
    ([{"t": []}], [["t"], [[]]]),
    ([{"t": [{}]}], [["t"], [[[], []]]]),
    ([{"t": ["x", 1, None, True]}], [["t"], [["x", 1, None, True]]]),
    ([{"t": [1, {"a": 2}]}], [["t"], [[1, [[["a"], [2]]]]]]),
    ([{"t": [{"u": [{"v": [{"w": 1}]}]}]}], [["t"], [[["u"], [[["v"], [[["w"], [1]]]]]]]]),
]


@pytest.mark.parametrize(("rows", "columns"), ROUND_TRIPS, ids=str)
def test_rows_become_columns_and_rows_again(rows: Any, columns: Any) -> None:
    assert columnar.serialize(rows) == columns
    assert columnar.deserialize(columns) == rows
    assert json.loads(columnar.serialize_string(json.dumps(rows))) == columns
    assert json.loads(columnar.deserialize_string(json.dumps(columns))) == rows


@pytest.mark.parametrize(
    ("rows", "columns", "again"),
    [
        ([{"a": 1}, {"b": 2}], [["a", "b"], [1], [None, 2]], [{"a": 1}, {"a": None, "b": 2}]),
        ([{"a": 1}, None, {"b": 2}], [["a", "b"], [1], None, [None, 2]], [{"a": 1}, None, {"a": None, "b": 2}]),
        ({"a": 1, "b": 2}, [["a", "b"], [1, 2]], [{"a": 1, "b": 2}]),
        ([{"a": {"b": 1}}], [["a"], [[["b"], [1]]]], [{"a": [{"b": 1}]}]),
        ([[1, 2], [3, 4]], [[1, 2], [3, 4]], [{"1": 3, "2": 4}]),
        ({"T": [[{"x": 1}, {"x": 2}]]}, [["T"], [[[["x"], [1], [2]]]]], [{"T": {"x": 1}}]),
        ([1, {"a": 2}], [1, [[["a"], [2]]]], [1, [[["a"], [2]]]]),
        ([{"a": 1}, 2], [[1], [[["a"], 2]]], None),
        (["x", "y"], ["x", "y"], ["x", "y"]),
        ([{"b": 1}, {"a": 2}], [["b", "a"], [1], [None, 2]], [{"b": 1}, {"b": None, "a": 2}]),
    ],
    ids=str,
)
def test_what_the_format_cannot_say_comes_back_as_is_documented(rows: Any, columns: Any, again: Any) -> None:
    assert columnar.serialize(rows) == columns
    if again is not None:
        assert columnar.deserialize(columns) == again


def test_a_short_row_gains_nothing() -> None:
    assert columnar.deserialize([["a", "b"], [1], []]) == [{"a": 1}, {}]


def test_one_object_in_columnar_form_is_an_object() -> None:
    assert columnar.deserialize([[["a", "b"], [1, [["x"], [2]]]]]) == {"a": 1, "b": [{"x": 2}]}


def test_numbers_are_headers_too() -> None:
    assert columnar.deserialize([[1, 2.0, 2.5, "x"], ["a", "b", "c", "d"]]) == [
        {"1": "a", "2": "b", "2.5": "c", "x": "d"}
    ]


@pytest.mark.parametrize("data", [5, "hello", {"a": 1}, None, [None], [1, 2], [None, ["a"]], [{"a": 1}]], ids=str)
def test_what_is_not_columnar_is_passed_on(data: Any) -> None:
    if not isinstance(data, str):
        assert columnar.deserialize(data) == data
    assert json.loads(columnar.deserialize_string(json.dumps(data))) == data


@pytest.mark.parametrize("data", [[["a"], [1], [2]], [["a"]], [[], []], [], [["a"], None]], ids=str)
def test_what_is_columnar_already_is_passed_on(data: Any) -> None:
    assert columnar.serialize(data) is data


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([["a"], [1], [1, 2]], "Empty column detected at row 1 and column 1"),
        ([["t"], [[["a"], [1, 2]]]], "Empty column detected at row 0 and column 1"),
        ([[None], [1]], "Column header must be a string or number. Found null instead."),
        ([[{}], [1]], "Column header must be a string or number. Found object instead."),
        ([[True], [1]], "Column header must be a string or number. Found boolean instead."),
        ([[["a"]], [1]], "Column header must be a string or number. Found array instead."),
        ([["t"], [[1, [None, [1]]]]], "Header row cannot be null"),
    ],
)
def test_damaged_columns_are_told(data: Any, words: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        columnar.deserialize(data)
    assert str(caught.value) == words


@pytest.mark.parametrize("data", [5, None, True, "[]", "text", 1.5])
def test_what_is_no_rows_is_refused_in_place_of_mangled(data: Any) -> None:
    with pytest.raises(BadRequestError, match="rows are a list of objects, not"):
        columnar.serialize(data)


def test_text_goes_through_the_functions_for_text() -> None:
    with pytest.raises(BadRequestError, match="use deserialize_string"):
        columnar.deserialize('[["a"],[1]]')
    with pytest.raises(BadRequestError, match="there is serialize_string"):
        columnar.serialize('[{"a":1}]')
    with pytest.raises(BadRequestError, match="this is not JSON"):
        columnar.serialize_string("[{")
    assert columnar.deserialize([["a"], ['[["x"],[1]]']]) == [{"a": '[["x"],[1]]'}]


def test_a_table_that_is_nested_without_end_is_refused() -> None:
    data: Any = [{"a": 1}]
    for _ in range(100_000):
        data = [{"a": data}]
    with pytest.raises(BadRequestError, match="nested too deep"):
        columnar.serialize(data)
    data = [["a"], [1]]
    for _ in range(100_000):
        data = [["a"], [data]]
    with pytest.raises(BadRequestError, match="nested too deep"):
        columnar.deserialize(data)


def test_rows_that_were_changed_are_written_anew() -> None:
    rows = [{"x": 1}]
    assert columnar.serialize(rows) == [["x"], [1]]
    rows.append({"x": 2})
    assert columnar.serialize(rows) == [["x"], [1], [2]]


@pytest.mark.parametrize(
    ("data", "is_columnar", "is_empty"),
    [
        ([], True, True),
        ([[]], True, True),
        ([[], []], True, True),
        ([[], None], True, True),
        ([["a"], None], True, False),
        ([["a"]], True, False),
        ([None], False, True),
        ([None, None], False, True),
        ([None, []], False, False),
        ([{"a": 1}], False, False),
        ({}, False, False),
        (5, False, False),
        ("[[],[]]", True, True),
        ('[["a"],[1]]', True, False),
        ("[null]", False, True),
        ("no JSON", False, False),
        ("5", False, False),
    ],
)
def test_the_form_is_known_by_its_shape(data: Any, is_columnar: bool, is_empty: bool) -> None:
    assert ColumnarSerializer.is_deserializable(data) is is_columnar
    assert ColumnarSerializer.is_empty(data) is is_empty


SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=3)


def tables(cells: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    """Rows of one set of keys, with blank rows among them."""

    def of(keys: list[str]) -> st.SearchStrategy[list[Any]]:
        return st.lists(st.none() | st.fixed_dictionaries(dict.fromkeys(keys, cells)), max_size=4)

    return st.lists(st.sampled_from("abcd"), unique=True, max_size=3).flatmap(of)


@given(tables(st.recursive(SCALARS, tables, max_leaves=8)))
def test_tables_in_tables_come_back_as_they_were(rows: list[Any]) -> None:
    before = copy.deepcopy(rows)
    columns = columnar.serialize(rows)
    assert columnar.deserialize(columns) == rows
    assert columnar.serialize(columns) == columns
    assert rows == before
