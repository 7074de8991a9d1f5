"""What a batch reads and writes, byte by byte: JSON lines, CSV and Parquet, good rows and every kind of bad one."""

from __future__ import annotations

import csv
import datetime
import decimal
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_runtime.batch import lines as lines_module
from spark_runtime.batch.csv_source import cell_to_json
from spark_runtime.batch.inputs import count_rows, format_of, open_source
from spark_runtime.batch.lines import Lines, LongLine
from spark_runtime.batch.rows import Row, check_json
from spark_runtime.batch.stop import Stop
from spark_runtime.batch.written import LINE_FORMATS, error_json, on_one_line
from spark_runtime.errors import BatchError


@pytest.fixture
def stop() -> Iterator[Stop]:
    stop = Stop()
    yield stop
    stop.close()


def read(path: Path, content: bytes | str, form: str | None = None) -> list[Row]:
    """Return the rows of a file with this content."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    stop = Stop()
    source = open_source(str(path), form or format_of(str(path), None, "--input-format"), stop)
    try:
        return list(source.rows())
    finally:
        source.close()
        stop.close()


def values(rows: list[Row]) -> list[Any]:
    """Return the rows as data, and the problems as texts."""
    return [json.loads(row.data) if row.problem is None else str(row.problem) for row in rows]


# --- JSON lines ---


def test_a_line_reaches_the_model_byte_by_byte(tmp_path: Path) -> None:
    odd = b'{"a":1.10,  "a": 2, "u":"\\ud800\\u0000\xc3\xa9", "n": 123456789012345678901234567890.0e+2}'
    assert read(tmp_path / "x.jsonl", b" \t" + odd + b" \r\n") == [Row(odd)]


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    rows = read(tmp_path / "x.jsonl", b"\xef\xbb\xbf1\n\n  \r\n\t\n2\n\n")
    assert values(rows) == [1, 2]


def test_the_last_line_may_lack_its_end(tmp_path: Path) -> None:
    assert values(read(tmp_path / "x.jsonl", "1\n2")) == [1, 2]
    assert values(read(tmp_path / "x.jsonl", "")) == []


def test_a_row_may_be_any_json_value(tmp_path: Path) -> None:
    assert values(read(tmp_path / "x.ndjson", 'null\ntrue\n"x"\n[1]\n-0.5e3\n{}\n')) == [None, True, "x", [1], -500, {}]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"a": }', "line 2, column 7 is not JSON: Expecting value"),
        (b"   {'a': 1}", "line 2, column 5 is not JSON: Expecting property name"),
        (b'{"a": 1} x', "line 2, column 10 is not JSON: Extra data"),
        (b"NaN", "line 2 is not JSON: NaN is not JSON"),
        (b"[1, -Infinity]", "line 2 is not JSON: -Infinity is not JSON"),
        (b'"\xff"', "line 2, column 2 is not JSON: byte 0xff is not UTF-8"),
        (b'"\xed\xa0\x80"', "line 2, column 2 is not JSON: byte 0xed is not UTF-8"),
        (b'"a\x00b"', "line 2, column 3 is not JSON: Invalid control character at"),
        (b"\x00", "line 2, column 1 is not JSON: Expecting value"),
        (b'"open', "line 2, column 1 is not JSON: Unterminated string"),
        (b"[" * 100_000, "line 2 is not JSON: it nests too deep"),
        (b'{"a":' * 100_000, "line 2 is not JSON: it nests too deep"),
    ],
)
def test_a_malformed_line_is_a_row_with_its_place_and_not_the_end(tmp_path: Path, line: bytes, complaint: str) -> None:
    first, bad, last = read(tmp_path / "x.jsonl", b"1\n" + line + b"\n3\n")
    assert (first, last) == (Row(b"1"), Row(b"3"))
    assert bad.data == line.strip()
    assert bad.problem is not None
    assert str(bad.problem).startswith(complaint)
    assert bad.problem.to_dict()["line"] == 2
    assert bad.problem.to_dict()["error"] == "RowUnusable"


def test_numbers_that_python_does_not_read_are_json_all_the_same(tmp_path: Path) -> None:
    huge = b"9" * 5000
    assert read(tmp_path / "x.jsonl", huge + b"\n1e99999\n") == [Row(huge), Row(b"1e99999")]


def test_a_line_over_the_limit_is_one_bad_row(tmp_path: Path, stop: Stop) -> None:
    limit = 300_000
    path = tmp_path / "x"
    path.write_bytes(b"\n".join([b"a" * limit, b"b" * (limit + 1), b"c" * 10**6, b"3", b"d" * (limit + 2)]))
    with open(path, "rb") as file:
        found = list(Lines(file.fileno(), stop, limit=limit))
    sizes = [each.size if isinstance(each, LongLine) else each for each in found]
    assert sizes == [b"a" * limit, limit + 1, 10**6, b"3", limit + 2]
    assert len({each.digest for each in found if isinstance(each, LongLine)}) == 3


def test_a_json_row_over_64_megabytes_is_an_error_row(tmp_path: Path) -> None:
    first, second, third = read(tmp_path / "x.jsonl", b'1\n"' + b"x" * (65 << 20) + b'"\n3\n')
    assert (first, third) == (Row(b"1"), Row(b"3"))
    assert str(second.problem) == f"line 2 is {(65 << 20) + 2} bytes long; a row may have 64 MB"
    assert len(second.data) == 64


@given(
    chunks=st.lists(st.binary(max_size=12).map(lambda text: text.replace(b"a", b"\n")), max_size=8),
    block=st.integers(min_value=1, max_value=9),
)
@settings(max_examples=200, deadline=None)
def test_lines_are_the_same_however_they_arrive(chunks: list[bytes], block: int) -> None:
    whole = b"".join(chunks)
    stop, (end, begin) = Stop(), os.pipe()
    before, lines_module.BLOCK = lines_module.BLOCK, block
    try:
        os.write(begin, whole)
        os.close(begin)
        found = list(Lines(end, stop))
    finally:
        lines_module.BLOCK = before
        os.close(end)
        stop.close()
    assert found == [*whole.split(b"\n")[:-1], *([whole.split(b"\n")[-1]] if whole.split(b"\n")[-1] else [])]


def test_a_line_is_ready_when_it_is_whole_and_not_before(stop: Stop) -> None:
    end, begin = os.pipe()
    try:
        lines = Lines(end, stop)
        assert not lines.is_ready()
        os.write(begin, b"on")
        assert not lines.is_ready()
        os.write(begin, b"e\nt")
        assert lines.is_ready()
        assert next(lines) == b"one"
        assert not lines.is_ready()
        os.close(begin)
        assert lines.is_ready()
        assert list(lines) == [b"t"]
    finally:
        os.close(end)


def test_a_stop_wakes_whoever_waits_for_a_line_and_gives_no_half_of_one(stop: Stop) -> None:
    end, begin = os.pipe()
    found: list[object] = []
    reader = threading.Thread(target=lambda: found.extend(Lines(end, stop)))
    try:
        os.write(begin, b"half")
        reader.start()
        stop.ask()
        reader.join()
    finally:
        os.close(begin)
        os.close(end)
    assert found == []


def test_one_json_array_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BatchError, match=r"x\.json holds one JSON array, .* one row a line; make it lines, with `jq"):
        read(tmp_path / "x.json", "[\n 1,\n 2\n]\n")
    assert values(read(tmp_path / "x.json", '{"a": 1}\n[2]\n')) == [{"a": 1}, [2]]


# --- CSV ---


def test_a_header_names_the_columns_and_cells_are_what_they_look_like(tmp_path: Path) -> None:
    text = 'name,n,x,ok,none\n"Smith, J.",1,-1.50,true,\nO\'Neil,007,1e3,False,""\n'
    rows = read(tmp_path / "x.csv", text)
    assert values(rows) == [
        {"name": "Smith, J.", "n": 1, "x": -1.5, "ok": True, "none": None},
        {"name": "O'Neil", "n": "007", "x": 1000, "ok": False, "none": None},
    ]
    assert b'"x": -1.50,' in rows[0].data


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ("0", 0), ("-0", 0), ("12", 12), ("1.5", 1.5), ("-1E-3", -0.001), ("9007199254740992", 2**53),
        ("true", True), ("TRUE", True), ("False", False), ("", None),
        ("9007199254740993", "9007199254740993"), ("12345678901234567890", "12345678901234567890"),
        ("00", "00"), ("+1", "+1"), (".5", ".5"), ("1.", "1."), ("1e999", "1e999"), ("NaN", "NaN"), ("inf", "inf"),
        (" 1", " 1"), ("1_000", "1_000"), ("0x10", "0x10"), ("٣", "٣"), ("null", "null"), ("tRUE", "tRUE"),
        ('a"b\\c\n\x00\x7f', 'a"b\\c\n\x00\x7f'), ("1\n", "1\n"), ("\u2028é", "\u2028é"),
    ],
)  # fmt: skip
def test_a_cell_becomes(cell: str, value: object) -> None:
    found = json.loads(cell_to_json(cell))
    assert found == value
    assert type(found) is type(value) or isinstance(value, int)


def test_quotes_hold_line_ends_commas_and_quotes(tmp_path: Path) -> None:
    rows = read(tmp_path / "x.csv", 'a,b\r\n"1\r\n2","say ""hi"", you"\r\n3,4\r\n')
    assert values(rows) == [{"a": "1\r\n2", "b": 'say "hi", you'}, {"a": 3, "b": 4}]


def test_a_byte_order_mark_and_blank_lines_are_passed_over(tmp_path: Path) -> None:
    assert values(read(tmp_path / "x.csv", b"\xef\xbb\xbfa,b\n\n1,2\n\n\n3,4")) == [{"a": 1, "b": 2}, {"a": 3, "b": 4}]
    assert values(read(tmp_path / "x.csv", b"")) == []
    assert values(read(tmp_path / "x.csv", b"a,b\n")) == []


def test_bad_records_are_rows_with_their_line_and_not_the_end(tmp_path: Path) -> None:
    text = b'a,b\n1,2\n1\n1,2,3\n"x"y,2\n\xff,2\n"two\nlines",5\nlast,"open\nto the end'
    found = values(read(tmp_path / "x.csv", text))
    assert found[0] == {"a": 1, "b": 2}
    assert found[1] == "line 3 has 1 fields and the header 2"
    assert found[2] == "line 4 has 3 fields and the header 2"
    assert found[3].startswith("line 5 is not CSV: ")
    assert found[4] == "line 6 is not UTF-8"
    assert found[5] == {"a": "two\nlines", "b": 5}
    assert found[6].startswith("line 9 is not CSV: ")
    assert len(found) == 7


def test_fields_over_pythons_own_limit_are_read(tmp_path: Path) -> None:
    assert values(read(tmp_path / "x.csv", "a\n" + "x" * 200_000)) == [{"a": "x" * 200_000}]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"a,b,a\n1,2,3\n", "two columns are named 'a'; give each its own name"),
        (b'"a\n1\n', "its header is not CSV"),
        (b"\xffa,b\n1,2\n", "its header is not UTF-8"),
    ],
)
def test_a_header_that_cannot_be_used_is_refused(tmp_path: Path, text: bytes, complaint: str) -> None:
    with pytest.raises(BatchError, match=f"x.csv: {complaint}"):
        read(tmp_path / "x.csv", text)


@given(
    st.lists(
        st.tuples(*[st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), min_size=1)] * 2),
        max_size=6,
    )
)
@settings(max_examples=150, deadline=None)
def test_what_csv_writes_is_read_back(records: list[tuple[str, str]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.csv"
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("a", "b"), *records])
        found = values(read(path, path.read_bytes()))
    expected = [tuple(json.loads(cell_to_json(cell)) for cell in record) for record in records]
    assert [(each["a"], each["b"]) for each in found] == expected


# --- Parquet ---


def write_parquet(path: Path, columns: dict[str, Any]) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path.read_bytes()


def test_parquet_values_become_json(tmp_path: Path) -> None:
    moment = datetime.datetime(2030, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    columns = {
        "n": [1, None, 2**62],
        "x": [1.5, float("nan"), -0.0],
        "t": ["é", "", "a\nb"],
        "l": [[1, 2], [], None],
        "s": [{"a": 1}, {"a": None}, None],
        "at": [moment, None, None],
        "d": [datetime.date(2030, 1, 2), None, None],
        "m": [decimal.Decimal("1.10"), None, None],
        "b": [b"\x00\xff", None, None],
        "w": [datetime.timedelta(seconds=1.5), None, None],
    }
    first, second, third = values(read(tmp_path / "x.parquet", write_parquet(tmp_path / "x.parquet", columns)))
    assert first == {
        "n": 1,
        "x": 1.5,
        "t": "é",
        "l": [1, 2],
        "s": {"a": 1},
        "at": "2030-01-02T03:04:05+00:00",
        "d": "2030-01-02",
        "m": "1.10",
        "b": "AP8=",
        "w": 1.5,
    }
    assert (second["n"], second["x"], second["l"]) == (None, None, [])
    assert (third["n"], third["t"], third["s"]) == (2**62, "a\nb", None)


def test_an_infinity_in_parquet_is_a_bad_row(tmp_path: Path) -> None:
    content = write_parquet(tmp_path / "x.parquet", {"x": [1.0, float("inf"), 2.0]})
    first, bad, last = values(read(tmp_path / "x.parquet", content))
    assert (first, last) == ({"x": 1.0}, {"x": 2.0})
    assert bad.startswith("row 1 cannot be JSON: ")


def test_what_is_not_parquet_is_refused_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    with pytest.raises(BatchError, match=r"x\.parquet is not Parquet: ") as caught:
        read(tmp_path / "x.parquet", b"hello, this is a text")
    assert "\n" not in str(caught.value)
    with pytest.raises(BatchError, match=r"cannot read .*missing\.parquet: No such file"):
        open_source(str(tmp_path / "missing.parquet"), "parquet", Stop())


def test_without_pyarrow_parquet_says_how_to_get_it(tmp_path: Path) -> None:
    code = "import sys; sys.modules['pyarrow'] = None\nfrom spark_cli.main import main; main()"
    model = Path(__file__).parent / "models" / "fussy.wasm"
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    for words in (("x.parquet", "-o", "y.jsonl"), ("x.jsonl", "-o", "y.parquet")):
        (tmp_path / "x.jsonl").write_text("1\n")
        done = subprocess.run(
            [sys.executable, "-c", code, "batch", str(model), *words],
            cwd=tmp_path, capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert done.stderr == "spark: Parquet needs pyarrow; get it with: pip install 'spark-runtime[parquet]'\n"
        assert not list(tmp_path.glob("y*"))


# --- the lines of output ---

KEY = b"0123456789abcdef-01234567"


@given(
    value=st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3), max_leaves=9)
)
@settings(max_examples=150, deadline=None)
def test_a_line_of_output_says_what_it_is_and_its_pieces_are_torn(value: Any) -> None:
    answer = on_one_line(json.dumps(value, indent=1).encode())
    for kind in LINE_FORMATS.values():
        form = kind()
        for line, is_failed in (
            (form.answered(7, KEY, answer), False),
            (form.failed(7, KEY, {"error": "X", "message": json.dumps(value)}), True),
        ):
            assert line.count(b"\n") == 1
            row = form.parse(line)
            assert row == (7, KEY[:16], KEY[17:], is_failed)
            for size in range(1, len(line)):
                assert form.may_be_torn(line[:size])


def test_output_is_what_its_format_says() -> None:
    answer = on_one_line(b' {"a":\r\n [1, "x\\ny"]}\n')
    line = LINE_FORMATS["jsonl"]().answered(3, KEY, answer)
    assert json.loads(line) == {"row": 3, "key": KEY.decode(), "output": {"a": [1, "x\ny"]}}
    form = LINE_FORMATS["csv"]()
    text = form.header + form.answered(3, KEY, answer) + form.failed(4, KEY, {"message": 'say "no", please'})
    first, second = csv.DictReader(text.decode().splitlines(keepends=True))
    assert (first["row"], json.loads(first["output"]), first["error"]) == ("3", {"a": [1, "x\ny"]}, "")
    assert (second["row"], second["output"], json.loads(second["error"])) == ("4", "", {"message": 'say "no", please'})


@pytest.mark.parametrize("name", ["jsonl", "csv"])
@pytest.mark.parametrize(
    "line",
    [b"hello\n", b"{}\n", b'{"row": 1}\n', b'{"row":1,"key":"a","output":1}\n', b"1,2,3,4\n", b"\n", b"a,b\n", b"0\n"],
)
def test_foreign_lines_are_not_ours(name: str, line: bytes) -> None:
    assert LINE_FORMATS[name]().parse(line) is None


def test_an_error_is_json_whatever_is_in_it() -> None:
    assert json.loads(error_json({"a": float("nan"), "b": [1]})) == {"a": "NaN", "b": [1]}
    assert json.loads(error_json({"a": b"\xff"})) == {"a": "b'\\xff'"}
    assert b"\n" not in error_json({"a": "x\ny"})


# --- the rest ---


@pytest.mark.parametrize(
    ("name", "form"),
    [("x.jsonl", "jsonl"), ("x.NDJSON", "jsonl"), ("x.json", "jsonl"), ("a.b.csv", "csv"), ("x.parquet", "parquet")],
)
def test_the_name_says_the_format(name: str, form: str) -> None:
    assert format_of(name, None, "--input-format") == form


def test_a_name_that_says_nothing_is_refused_with_the_option() -> None:
    with pytest.raises(BatchError, match=r"rows\.txt: its name does not say .* add --input-format"):
        format_of("rows.txt", None, "--input-format")
    assert format_of("rows.txt", "csv", "--input-format") == "csv"
    assert format_of("-", None, "--input-format") == "jsonl"


def test_rows_are_counted_before_they_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("1\n2\n3")
    (tmp_path / "x.csv").write_text("a\n2\n3\n")
    (tmp_path / "empty.csv").write_text("")
    assert count_rows(str(tmp_path / "x.jsonl"), "jsonl") == 3
    assert count_rows(str(tmp_path / "x.csv"), "csv") == 2
    assert count_rows(str(tmp_path / "empty.csv"), "csv") == 0
    assert count_rows(str(tmp_path / "missing.csv"), "csv") is None
    assert count_rows("-", "jsonl") is None
    write_parquet(tmp_path / "x.parquet", {"a": [1, 2, 3, 4, 5]})
    assert count_rows(str(tmp_path / "x.parquet"), "parquet") == 5


@given(st.binary(max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_json_or_not_and_nothing_else_happens(data: bytes) -> None:
    try:
        check_json(data)
    except ValueError:
        return
    json.loads(data)
