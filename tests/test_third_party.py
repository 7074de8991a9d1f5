"""Modules that nobody here wrote do their own work on replicas; those that need another host are refused in a sentence.

What they answer is compared with what is known without them: this interpreter, published test vectors, or a second
implementation.
"""

import hashlib
import json
import statistics
import struct
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import third_party
from harness import spark as run_command
from third_party import NotFetched, ThirdParty

from spark_runtime import Model, Spark
from spark_runtime.errors import (
    AnswerInvalid,
    ExecuteCancelled,
    ExecuteTimeout,
    FunctionMissing,
    ModelExited,
    ModelTrapped,
    ModelUnusable,
    WrongSignature,
)

# They download, and compiling Yosys takes ten seconds on two cores.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

U32, U64 = 2**32, 2**64
SECONDS = 250.0  # for a call: the first one of a model waits until it is compiled, on machines that may be busy


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Prepared models of this file: compiled once for all its tests, gone with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARKRT_CACHE_DIR", str(tmp_path_factory.mktemp("prepared") / "cache"))
        yield


@pytest.fixture(scope="session")
def downloads(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where modules are kept from one run of the tests to the next."""
    cache = getattr(request.config, "cache", None)  # absent with -p no:cacheprovider
    return Path(cache.mkdir("third-party")) if cache else tmp_path_factory.mktemp("third-party")


def fetched(module: ThirdParty, downloads: Path) -> Path:
    """Return the module's path; skip the test where it cannot be had."""
    try:
        return module.fetch(downloads)
    except NotFetched as reason:
        pytest.skip(str(reason))


def exec_command(module: Path, *options: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """Run ``spark exec`` to its end."""
    return run_command("exec", str(module), "--timeout", str(SECONDS), *options, cwd=cwd, timeout=SECONDS)


@pytest.fixture(scope="module")
def python(downloads: Path) -> Path:
    return fetched(third_party.PYTHON, downloads)


@pytest.fixture(scope="module")
def yosys(downloads: Path) -> Path:
    return fetched(third_party.YOSYS, downloads)


@pytest.fixture(scope="module")
def circom(downloads: Path) -> Path:
    return fetched(third_party.CIRCOM, downloads)


@pytest.fixture(scope="module")
def taglib(downloads: Path) -> Path:
    return fetched(third_party.TAGLIB, downloads)


@pytest.fixture(scope="module")
def xxhash(downloads: Path) -> Path:
    return fetched(third_party.XXHASH, downloads)


# -- CPython 3.12: a WASI command that reads JSON and prints JSON


def running(python: Path, code: str, **settings: Any) -> Spark:
    """Return a Spark with the interpreter as its one model, which runs *code* for each request."""
    source = f"import json, os, sys\nrequest = json.load(sys.stdin)\n{code}"
    return Spark(models=[Model("python", python, args=["-c", source], timeout=SECONDS, **settings)])


def test_python_computes_what_this_interpreter_computes(python: Path) -> None:
    code = """
import hashlib, statistics, zlib
xs = request["xs"]
text = request["text"].encode()
print(json.dumps({"mean": statistics.fmean(xs), "deviation": statistics.stdev(xs), "sorted": sorted(xs),
                  "sha256": hashlib.sha256(text).hexdigest(), "crc32": zlib.crc32(text),
                  "platform": sys.platform, "version": list(sys.version_info[:3])}))
"""
    xs, text = [3.5, -1.25, 2.0, 1e300, 7e-5], "Grüße, 世界 \U0001f40d"
    with running(python, code) as spark:
        answer = spark.execute({"xs": xs, "text": text}, "python")
    assert answer == {
        "mean": statistics.fmean(xs),
        "deviation": statistics.stdev(xs),
        "sorted": sorted(xs),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "crc32": zlib.crc32(text.encode()),
        "platform": "wasi",
        "version": [3, 12, 0],
    }


def test_python_answers_many_rows_in_order_on_two_replicas(python: Path) -> None:
    with running(python, 'print(json.dumps(request["n"] ** 3))', replicas=2) as spark:
        answers = list(spark.map("python", ({"n": n} for n in range(40)), ordered=True))
    assert answers == [n**3 for n in range(40)]


def test_python_takes_a_megabyte_and_gives_one_back(python: Path) -> None:
    rows = [{"id": n, "name": f"row {n}"} for n in range(30_000)]
    with running(python, "print(json.dumps(request[::-1]))") as spark:
        assert spark.execute(rows, "python") == rows[::-1]


def test_python_starts_anew_for_each_call(python: Path) -> None:
    code = """
import builtins
seen = getattr(builtins, "seen", 0)
builtins.seen = seen + 1
print(seen)
"""
    with running(python, code) as spark:
        assert [spark.execute({}, "python") for _ in range(3)] == [0, 0, 0]


def test_bytes_go_in_and_bytes_come_out(python: Path) -> None:
    reverse = "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read()[::-1])"
    blob = bytes(range(256)) * 300
    with Spark(models=[Model("reverse", python, args=["-c", reverse], timeout=SECONDS)]) as spark:
        assert spark.execute(blob, "reverse") == blob[::-1]


def test_python_sees_the_environment_of_its_model_and_nothing_of_ours(python: Path, tmp_path: Path) -> None:
    code = """
try:
    found = open(request["path"]).read()
except OSError as problem:
    found = type(problem).__name__
print(json.dumps({"environment": dict(os.environ), "arguments": sys.argv, "file": found}))
"""
    secret = tmp_path / "secret"
    secret.write_text("ours")
    with running(python, code, env={"REGION": "eu-west-1"}) as spark:
        answer = spark.execute({"path": str(secret)}, "python")
    assert answer == {"environment": {"REGION": "eu-west-1"}, "arguments": ["-c"], "file": "FileNotFoundError"}


def test_exit_code_and_stderr_of_python_are_kept(python: Path) -> None:
    code = 'print("no such row", file=sys.stderr); sys.exit(3)'
    with running(python, code) as spark, pytest.raises(ModelExited) as caught:
        spark.execute({}, "python")
    assert caught.value.details["exit_code"] == 3
    assert caught.value.details["stderr"] == "no such row\n"


def test_an_exception_in_python_is_an_exit_whose_stderr_is_the_traceback(python: Path) -> None:
    with running(python, 'print(json.dumps(1 / request["by"]))') as spark:
        with pytest.raises(ModelExited) as caught:
            spark.execute({"by": 0}, "python")
        assert spark.execute({"by": 4}, "python") == 0.25
    assert caught.value.details["exit_code"] == 1
    assert caught.value.details["stderr"].endswith("ZeroDivisionError: division by zero\n")


def test_what_is_no_json_is_an_invalid_answer(python: Path) -> None:
    code = 'print("fine,", request["who"])'
    with running(python, code) as spark, pytest.raises(AnswerInvalid, match="fine, you"):
        spark.execute({"who": "you"}, "python")


def test_python_out_of_memory_says_so_itself_and_the_next_call_is_answered(python: Path) -> None:
    code = """
try:
    print(len(bytearray(request["bytes"])))
except MemoryError:
    print('"no memory"')
"""
    with running(python, code, memory_limit=128 << 20) as spark:
        assert spark.execute({"bytes": 512 << 20}, "python") == "no memory"
        assert spark.execute({"bytes": 1 << 20}, "python") == 1 << 20


def test_python_that_never_ends_is_stopped_by_its_time_limit_and_by_cancel(python: Path) -> None:
    code = """
while request.get("spin"):
    pass
print('"done"')
"""
    with running(python, code) as spark:
        assert spark.execute({}, "python") == "done"
        with pytest.raises(ExecuteTimeout):
            spark.execute({"spin": True}, "python", timeout=0.5)
        endless = spark.submit({"spin": True}, "python")
        behind = spark.submit({}, "python")
        assert endless.cancel()
        with pytest.raises(ExecuteCancelled):
            endless.result()
        assert behind.result() == "done"


def test_python_answers_on_the_command_line(python: Path, tmp_path: Path) -> None:
    code = 'import json, sys; print(json.dumps({"sum": sum(json.load(sys.stdin)["xs"])}))'
    done = exec_command(python, "--input", '{"xs": [1, 2, 3]}', "--arg", "-c", "--arg", code, cwd=tmp_path)
    assert (done.returncode, json.loads(done.stdout)) == (0, {"sum": 6}), done.stderr


# -- Yosys 0.11: a WASI command that is told by its arguments what to do with its standard input

COUNTER = b"""
module counter(input clk, input rst, output reg [3:0] q);
  always @(posedge clk) if (rst) q <= 0; else q <= q + 1;
endmodule
"""
SYNTHESIZE = ["-q", "-f", "verilog", "-", "-p", "proc; write_json"]


def test_yosys_turns_verilog_into_a_netlist(yosys: Path) -> None:
    with Spark(models=[Model("yosys", yosys, args=SYNTHESIZE, timeout=SECONDS)]) as spark:
        netlist = json.loads(spark.execute(COUNTER, "yosys"))
    counter = netlist["modules"]["counter"]
    ports = {name: (port["direction"], len(port["bits"])) for name, port in counter["ports"].items()}
    assert ports == {"clk": ("input", 1), "rst": ("input", 1), "q": ("output", 4)}
    assert sorted(cell["type"] for cell in counter["cells"].values()) == ["$add", "$dff", "$mux"]


def test_yosys_proves_a_theorem(yosys: Path) -> None:
    """Its SAT solver: subtraction undoes addition, whatever the bits; of *a & b* the same is false."""
    prove = "proc; opt; sat -verify -prove same 1 claim"
    claim = b"module claim(input [7:0] a, b, output same); assign same = ((a %s b) - b) == a; endmodule"
    model = Model("yosys", yosys, args=["-q", "-f", "verilog", "-", "-p", prove], timeout=SECONDS)
    with Spark(models=[model]) as spark:
        assert spark.execute(claim % b"+", "yosys") == b""
        with pytest.raises(ModelExited) as caught:
            spark.execute(claim % b"&", "yosys")
    assert "proof did fail" in caught.value.details["stderr"]


def test_yosys_says_where_the_verilog_is_wrong(yosys: Path) -> None:
    with Spark(models=[Model("yosys", yosys, args=SYNTHESIZE, timeout=SECONDS)]) as spark:
        with pytest.raises(ModelExited) as caught:
            spark.execute(b"module broken(input a;\nendmodule\n", "yosys")
        assert spark.execute(COUNTER, "yosys").startswith(b"{")
    assert caught.value.details["exit_code"] == 1
    assert "<stdin>:1: ERROR: syntax error" in caught.value.details["stderr"]


# -- circom 2.2.3: a WASI command in Rust that leaves its standard input unread


def test_a_command_that_does_not_read_its_request_answers_all_the_same(circom: Path) -> None:
    with Spark(models=[Model("circom", circom, args=["--version"], timeout=SECONDS)]) as spark:
        assert spark.execute(b"x" * (4 << 20), "circom") == b"circom compiler 2.2.3\n"


def test_circom_finds_no_file_and_exits(circom: Path) -> None:
    model = Model("circom", circom, args=["circuit.circom"], timeout=SECONDS)
    with Spark(models=[model]) as spark, pytest.raises(ModelExited) as caught:
        spark.execute({}, "circom")
    assert caught.value.details["exit_code"] == 1
    assert "Input file does not exist" in caught.value.details["stderr"]


def test_a_command_that_prints_text_is_run_raw_on_the_command_line(circom: Path, tmp_path: Path) -> None:
    done = exec_command(circom, "--raw", "--arg", "--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "circom compiler 2.2.3\n"), done.stderr


# -- TagLib 2.3: a WASI reactor in C++, with WASM exceptions and state of its own


def test_a_reactor_keeps_its_state_from_call_to_call(taglib: Path) -> None:
    with Spark(models=[Model("taglib", taglib)]) as spark:
        assert spark.call("taglib", "tl_api_version") == 3
        assert spark.call("taglib", "tl_get_last_error_code") == 0
        assert spark.call("taglib", "tl_read_tags", 0, 0, 0, 0) == 0
        assert spark.call("taglib", "tl_get_last_error_code") % U32 == U32 - 1
        assert spark.call("taglib", "tl_clear_error") is None
        assert spark.call("taglib", "tl_get_last_error_code") == 0


def test_a_fresh_reactor_for_each_call_has_no_state(taglib: Path) -> None:
    with Spark(models=[Model("taglib", taglib, fresh=True)]) as spark:
        assert spark.call("taglib", "tl_read_tags", 0, 0, 0, 0) == 0
        assert spark.call("taglib", "tl_get_last_error_code") == 0


def test_a_reactor_allocates_and_frees_by_number(taglib: Path) -> None:
    with Spark(models=[Model("taglib", taglib)]) as spark:
        first, second = (spark.call("taglib", "tl_malloc", 100_000) for _ in range(2))
        assert 0 < first < second - 100_000 + 1
        spark.call("taglib", "tl_free", second)
        assert spark.call("taglib", "tl_malloc", 100_000) == second


# -- xxHash: a plain module without imports, called with numbers


def xxh32(data: bytes, seed: int) -> int:
    """Return XXH32 as its specification has it, for data of at least 16 bytes and a length that 4 divides."""
    p1, p2, p3, p4 = 2654435761, 2246822519, 3266489917, 668265263

    def rotate(x: int, by: int) -> int:
        x %= U32
        return (x << by | x >> 32 - by) % U32

    lanes = [seed + p1 + p2, seed + p2, seed, seed - p1]
    whole = len(data) // 16 * 16
    for stripe in struct.iter_unpack("<4I", data[:whole]):
        lanes = [rotate(lane + word * p2, 13) * p1 for lane, word in zip(lanes, stripe, strict=True)]
    total = sum(rotate(lane, by) for lane, by in zip(lanes, (1, 7, 12, 18), strict=True)) + len(data)
    for (word,) in struct.iter_unpack("<I", data[whole:]):
        total = rotate(total + word * p3, 17) * p4
    for shift, factor in ((15, p2), (13, p3), (16, 1)):
        total %= U32
        total = (total ^ total >> shift) * factor
    return total % U32


def test_numbers_reach_a_plain_module_in_the_widths_that_it_declares(xxhash: Path) -> None:
    prime = 2654435761  # above 2**31: an i32 is a number of either sign
    with Spark(models=[Model("xxhash", xxhash)]) as spark:
        hashes = [spark.call("xxhash", name, 0, 0, seed) for name in ("xxh32", "xxh64") for seed in (0, prime)]
        assert spark.call("xxhash", "xxh32", 0, 0, prime - U32) == hashes[1]
        assert spark.call("xxhash", "xxh64", 0, 0, U64 - 1) == spark.call("xxhash", "xxh64", 0, 0, -1)
    # The test vectors of https://github.com/Cyan4973/xxHash for no bytes at all.
    assert [hashes[0] % U32, hashes[1] % U32] == [0x02CC5D05, 0x36B78AE7]
    assert [hashes[2] % U64, hashes[3] % U64] == [0xEF46DB3751D8E999, 0xAC75FDA2929B17EF]


def test_a_plain_module_hashes_its_memory_in_one_piece_and_in_many(xxhash: Path) -> None:
    state, data, seed = 40_000, 0, 77
    with Spark(models=[Model("xxhash", xxhash)]) as spark:
        at_once = spark.call("xxhash", "xxh32", data, 1000, seed)
        spark.call("xxhash", "init32", state, seed)
        for length in (1, 499, 500):
            spark.call("xxhash", "update32", state, data, length)
        in_pieces = spark.call("xxhash", "digest32", state)
    assert at_once % U32 == in_pieces % U32 == xxh32(bytes(1000), seed)


def test_a_plain_module_that_reads_past_its_memory_traps_and_goes_on(xxhash: Path) -> None:
    with Spark(models=[Model("xxhash", xxhash)]) as spark:
        with pytest.raises(ModelTrapped) as caught:
            spark.call("xxhash", "xxh32", U32 - 16, 16, 0)
        assert spark.call("xxhash", "xxh32", 0, 0, 0) % U32 == 0x02CC5D05
    assert caught.value.details["trap"] == "out-of-bounds-memory"


def test_a_plain_module_is_asked_for_what_it_does_not_have(xxhash: Path) -> None:
    with Spark(models=[Model("xxhash", xxhash)]) as spark:
        with pytest.raises(FunctionMissing, match="xxh128"):
            spark.call("xxhash", "xxh128", 0, 0, 0)
        with pytest.raises(WrongSignature):
            spark.call("xxhash", "xxh32", 0)
        with pytest.raises(FunctionMissing, match=r"`execute`.*it exports `xxh32`, "):
            spark.execute({}, "xxhash")
        assert spark.call("xxhash", "xxh32", 0, 0, 0) % U32 == 0x02CC5D05


def test_a_plain_module_is_called_on_the_command_line(xxhash: Path, tmp_path: Path) -> None:
    done = exec_command(xxhash, "--function", "xxh32", "0", "0", "0", cwd=tmp_path)
    assert (done.returncode, json.loads(done.stdout) % U32) == (0, 0x02CC5D05), done.stderr


# -- modules that need a host of their own


@pytest.mark.parametrize(
    ("module", "named"),
    [
        pytest.param(third_party.QUICKJS, "env.host_get_timezone_offset", id="a-reactor-with-a-javascript-host"),
        pytest.param(third_party.SOURCE_MAP, "env.mapping_callback", id="a-javascript-callback"),
        pytest.param(third_party.TREE_SITTER_JSON, "env.__memory_base", id="a-side-module-of-emscripten"),
        pytest.param(third_party.TAGLIB_WEB, "a.a", id="a-main-module-of-emscripten"),
    ],
)
def test_a_module_that_needs_another_host_is_refused_in_one_sentence(
    module: ThirdParty, named: str, downloads: Path
) -> None:
    path = fetched(module, downloads)
    with Spark(models=[Model("foreign", path)]) as spark, pytest.raises(ModelUnusable) as caught:
        spark.execute({}, "foreign")
    message = str(caught.value)
    assert caught.value.kind == "unsupported-import"
    assert f"`{named}`" in message
    assert "\n" not in message
    assert "Traceback" not in message
