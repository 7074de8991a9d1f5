"""Names from JavaScript glue: the forms that builds have, what is missing, and text that was made to cost time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spark_workers import packages
from spark_workers.engines.outline import Memory, Outline, read_outline
from spark_workers.engines.seam import Extern
from spark_workers.packages.glue import Glue, GlueUnreadable, Preloaded, read_glue
from spark_workers.packages.javascript import LONGEST, Script, ScriptUnreadable
from spark_workers.packages.package import read_package

MODELS = Path(__file__).resolve().parent.parent / "models" / "packages"
WORKERS = Path(packages.__file__).resolve().parent.parent.parent

#: A build's own letters: imports a and b; memory m, table t, constructors c and the functions of a model.
EXPORTS = {"d": "construct", "e": "node_calc_v3", "f": "malloc", "g": "free", "h": "stackSave"}


def outline(
    imports: str = "ab", functions: str = "cdefgh", memories: str = "m", tables: str = "t", maximum: int | None = 32768
) -> Outline:
    """The outline of a module with those letters."""
    return Outline(
        imports=[Extern("a", each, "function", "(i32) -> i32") for each in imports],
        exports=[
            *(Extern("", each, "function", "() -> ()") for each in functions),
            *(Extern("", each, "memory", "1 or more pages") for each in memories),
            *(Extern("", each, "table", "1 or more func") for each in tables),
        ],
        memories=[Memory(1, maximum)],
    )


JS_NAMES = {"d": "_construct", "e": "_node_calc_v3", "f": "_malloc", "g": "_free", "h": "stackSave"}
OLD_EXPORTS = "".join(
    f'var {js}=Module["{js}"]=function(){{return({js}=Module["{js}"]=Module["asm"]["{letter}"]).apply(0,arguments)}};'
    for letter, js in JS_NAMES.items()
)
OLD = (
    'function receiveInstance(instance){Module["asm"]=instance.exports;wasmMemory=Module["asm"]["m"];'
    'wasmTable=Module["asm"]["t"];addOnInit(Module["asm"]["c"])}'
    'var asmLibraryArg={"a":___cxa_throw,"b":_emscripten_memcpy_big};var asm=createWasm();' + OLD_EXPORTS
)
NEW = (
    "var wasmImports={b:_emscripten_memcpy_big,a:___cxa_throw};function initRuntime(){runtimeInitialized=true;"
    'FS.init();wasmExports["c"]()}'
    'var _construct=Module["_construct"]=()=>(_construct=Module["_construct"]=wasmExports["d"])();'
    'var _node_calc_v3=Module["_node_calc_v3"]=(a0,a1,a2,a3)=>(_node_calc_v3=wasmExports["e"])(a0,a1,a2,a3);'
    'var _malloc=Module["_malloc"]=a0=>(_malloc=Module["_malloc"]=wasmExports["f"])(a0);'
    'var _free=Module["_free"]=a0=>(_free=Module["_free"]=wasmExports["g"])(a0);'
    'var stackSave=()=>(stackSave=wasmExports["h"])();'
)
NEWEST = (
    "function initRuntime(){runtimeInitialized=true;wasmExports.c()}"
    "var _construct,_node_calc_v3,_malloc,_free,memory,wasmMemory;function assignWasmExports(wasmExports){"
    '_construct=Module["_construct"]=wasmExports.d;Module._node_calc_v3=_node_calc_v3=wasmExports.e;'
    "_malloc=wasmExports['f'];_free=wasmExports.g;stackSave=wasmExports.h;"
    'memory=wasmMemory=wasmExports["m"]}'
    "var wasmImports={/** @export */ a:___cxa_throw,/* } */b:_emscripten_memcpy_big,};"
)
READABLE = """
// include: postamble.js  } it's a comment
var wasmImports = {
  /** @export */
  'a' : ___cxa_throw, // "quoted
  "b" : _emscripten_memcpy_big
}
function receiveInstance ( instance ) {
  wasmExports = instance . exports ;
  addOnInit( wasmExports [ 'c' ] );
}
function _construct ( ) { return ( wasmExports [ 'd' ] ) ( ) }
var _node_calc_v3 = Module [ '_node_calc_v3' ] = function ( a, b, c, d ) {
  return wasmExports [ 'e' ] . apply ( null, arguments )
}
Module . _malloc = createExportWrapper ( "f" , 1 )
Module["_free"] = async (a) => { return ( wasmExports["g"] ) ( a ) }
Module["stackSave"] = wasmExports["h"]
"""
RENAMED = (
    "var q={a:___cxa_throw,b:_emscripten_memcpy_big},k;function z(e){k=e.exports;B.unshift(k.c)}"
    "h._construct=function(){return(h._construct=k.d).apply(null,arguments)};h._node_calc_v3=(...a)=>(h._x=k.e)(...a);"
    "h._malloc=k.f;h._free=k.g;h.stackSave=k.h;"
)
FORMS = {"old": OLD, "new": NEW, "newest": NEWEST, "readable": READABLE, "renamed": RENAMED}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_glue_tells_the_same_names(form: str) -> None:
    found = read_glue(FORMS[form], outline())
    assert found.imports == {"a": "cxa_throw", "b": "emscripten_memcpy_big"}
    assert {letter: name for name, letter in found.exports.items() if name in EXPORTS.values()} == EXPORTS
    assert (found.memory, found.table, found.constructors) == ("m", "t", "c")


@pytest.mark.parametrize("form", FORMS)
def test_what_stands_in_strings_comments_and_patterns_is_no_code(form: str) -> None:
    decoys = """
      /* var wasmImports={a:_wrong,b:_wrong}; Module["_malloc"]=wasmExports["g"]; */
      // Module["_free"]=wasmExports["f"] "
      var text = 'Module["_malloc"]=wasmExports["g"]', more = "\\"//", quote = '\\'';
      var template = `${ {a: 1}.a + `inner ${"}"} /* ` } Module["_malloc"]=wasmExports["g"]`;
      var pattern = /[/"'`{]\\/{/g, half = 8 / 2 / 1; if (x) /"/.test(y); a = b++ / c; z = x.return / 2;
    """
    assert read_glue(decoys + FORMS[form], outline()) == read_glue(FORMS[form], outline())


def test_a_second_object_with_the_same_letters_does_not_count() -> None:
    assert read_glue("var table={a:_wrong,b:_wrong,c:1};" + NEW, outline()).imports["a"] == "cxa_throw"


def test_functions_written_into_the_object_have_the_name_they_say_or_that_of_the_letter() -> None:
    text = NEW.replace("b:_emscripten_memcpy_big", "b:function _exit(x){return {x}}")
    assert read_glue(text, outline()).imports["b"] == "exit"
    text = NEW.replace("b:_emscripten_memcpy_big", "b:(x,y)=>{return {x,y}}").replace(
        "a:___cxa_throw", "a(x){return x}"
    )
    assert read_glue(text, outline()).imports == {"a": "a", "b": "b"}
    text = NEW.replace("b:_emscripten_memcpy_big", "_emscripten_memcpy_big")
    assert read_glue(text, outline(imports=["a", "_emscripten_memcpy_big"])).imports["_emscripten_memcpy_big"]


def test_names_that_no_build_made_short_are_taken_as_they_are() -> None:
    names = ["construct", "node_calc_v3", "malloc", "free", "__wasm_call_ctors"]
    found = read_glue("// no glue", outline(imports=["__cxa_throw", "fd_write"], functions=names))
    assert found.imports == {"__cxa_throw": "cxa_throw", "fd_write": "fd_write"}
    assert found.exports["malloc"] == "malloc"
    assert found.constructors == "__wasm_call_ctors"


def test_of_several_memories_the_glue_names_the_one() -> None:
    assert read_glue(OLD, outline(memories="mn", tables="tu")).memory == "m"
    with pytest.raises(GlueUnreadable, match="exports 2 of the kind memory"):
        read_glue(RENAMED, outline(memories="xy"))


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        (OLD.replace('"_malloc"', '"_nalloc"').replace("_malloc", "_nalloc"), "`malloc`"),
        (NEW.replace("_node_calc_v3", "_calculate"), "`node_calc_v3`"),
        (NEW.replace("wasmImports", "x").replace("a:___cxa", "z:___cxa"), "imports `a`, `b`"),
        (OLD.replace('addOnInit(Module["asm"]["c"])', ""), "constructors"),
        ("", "`construct`, `node_calc_v3`, `malloc`, `free`"),
        ("var a = {", "never closed"),
        ("}", "closes nothing"),
        ("(]", "closed by a"),
        ("var a = 'text", "a string"),
        ("var a = 'te\nxt'", "a string"),
        ("/* comment", "a comment"),
        ("`template ${1}", "a template"),
        ("x = /pattern\n/", "a regular expression"),
    ],
)
def test_glue_that_does_not_say_something_is_refused_with_what_it_is(text: str, missing: str) -> None:
    with pytest.raises(GlueUnreadable, match="its JavaScript") as caught:
        read_glue(text, outline())
    assert missing in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_module_without_an_exported_memory_is_refused() -> None:
    with pytest.raises(GlueUnreadable, match="exports no memory"):
        read_glue(OLD, outline(memories=""))


@pytest.mark.parametrize(
    "table",
    [
        'loadPackage({"files":[{"filename":"/a/x.gz","start":0,"end":57},{"filename":"b","start":57,"end":60}],"n":1})',
        'loadPackage({files:[{filename:"/a/x.gz",start:0,end:57,audio:0},{audio:!1,end:60,start:57,filename:"b"}]});',
        "loadPackage({'files': [\n{'filename': '/a\\x2fx.gz', 'start': 0, 'end': 0x39},"
        " {'filename': '\\u0062', 'start': 57, 'end': 6e1},],})",
    ],
)
def test_preloaded_files_are_found(table: str) -> None:
    found = read_glue(OLD + table, outline())
    assert found.files == (Preloaded("/a/x.gz", 0, 57), Preloaded("/b", 57, 60))


@pytest.mark.parametrize(
    "table", ["files:[]", "files:[1]", "files:[{filename:x}]", 'files:[{filename:"x",start:5,end:1}]', "files:[f()]"]
)
def test_what_only_looks_like_a_table_of_files_is_none(table: str) -> None:
    assert read_glue(OLD + "x({" + table + "})", outline()).files == ()


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("var getHeapMax=()=>4294901760;", 4294901760),
        ("function getHeapMax() { // Stay one page short of 4 GB\n return 2147483648; }", 2147483648),
        (
            "function _emscripten_get_heap_max(){return 4294901760}var maxHeapSize=_emscripten_get_heap_max();",
            4294901760,
        ),
        ("var maxHeapSize=536870912;", 536870912),
        ("var maxHeapSize=0x20000000;", 536870912),
        ("function _emscripten_get_heap_max(){return HEAPU8.length}", 32768 << 16),
        ("", 32768 << 16),
    ],
)
def test_the_heap_limit_is_that_of_the_glue_or_of_the_module(text: str, limit: int) -> None:
    assert read_glue(OLD + text, outline()).heap_limit == limit


def test_without_any_limit_memory_may_grow_to_two_gib() -> None:
    assert read_glue(OLD, outline(maximum=None)).heap_limit == 2 << 30


def test_the_width_of_times_and_the_names_of_zones_are_read_from_the_functions_that_use_them() -> None:
    wide = OLD + "function __localtime_js(time,tmPtr){var date=new Date(readI53FromI64(time)*1e3)}"
    assert (read_glue(OLD, outline()).time_bits, read_glue(wide, outline()).time_bits) == (32, 64)
    clock = OLD + "var _clock_gettime=(clk_id,tp)=>{HEAP32[tp>>2]=a,HEAP32[tp+4>>2]=b;HEAP32[tp+8>>2]=c;return 0};"
    assert read_glue(clock, outline()).time_bits == 64
    named = OLD + "var __tzset_js=(a,b,c,d)=>{var z=o=>String(o).padStart(2,'0');return z};"
    assert (read_glue(OLD, outline()).zone_names, read_glue(named, outline()).zone_names) == ("long", "offset")


def test_what_older_builds_did_otherwise_is_known() -> None:
    old = (
        "function __mktime_js(p){var d=new Date(HEAP32[p+20>>2]+1900)}function _strftime(s,m,f,t){var firstSunday=1}"
        "function __localtime_js(t,p){var yday=(date.getTime()-start.getTime())/864e5|0}"
    )
    new = (
        "var __mktime_js=function(p){var d=new Date(HEAP32[p+20>>2]+1900);HEAP32[p+20>>2]=d.getYear()};"
        "function __localtime_js(t,p){var yday=ydayFromDate(date)|0}"
        'var _strftime=(s,m,f,t)=>{p.replace(/%%/g,"\\0\\0")};'
    )
    assert read_glue(OLD + old, outline()).quirks == ("year", "yearday", "weeks", "percent")
    assert read_glue(OLD + new, outline()).quirks == ()
    assert read_glue(OLD, outline()).quirks == ()


def test_what_was_found_survives_being_plain_data() -> None:
    found = read_glue(OLD + 'loadPackage({files:[{filename:"/x",start:0,end:1}]});function _strftime(){}', outline())
    assert Glue.from_data(json.loads(json.dumps(found.as_data()))) == found


@pytest.mark.parametrize("name", ["own-model", "own-xcall", "wat-echo"])
def test_our_own_packages_tell_all_their_names(name: str) -> None:
    package = read_package((MODELS / f"{name}.zip").read_bytes())
    found = read_glue(package.glue, read_outline(package.wasm))
    assert {"construct", "destroy", "is_async", "node_calc_v3", "malloc", "free"} <= found.exports.keys()
    if name == "wat-echo":
        assert (found.imports, found.files, found.constructors) == ({}, (), "")
        return
    assert {"fd_write", "syscall_open", "emscripten_resize_heap"} <= set(found.imports.values())
    assert ("asyncjs__dispatch" in found.imports.values()) == (name == "own-xcall")
    assert found.files == (Preloaded("/assets/data.gz", 0, 57),)
    assert found.heap_limit == 4294901760


HOSTILE = """
import resource, sys
from spark_workers.engines.outline import Memory, Outline
from spark_workers.engines.seam import Extern
from spark_workers.packages.glue import GlueUnreadable, read_glue

exports = [Extern("", "a", "function", "() -> ()"), Extern("", "m", "memory", "1 or more pages")]
outline = Outline([Extern("a", "x", "function", "() -> ()")], exports, [Memory(1, None)])
n = 30_000
texts = [
    "{" * n, "(" * n + ")" * n, "{a:" * n + "1" + "}" * n, "`${" * n, "a=" * n, "[[" * n + "]]" * n,
    "{files:[" * n + "]}" * n, "a.a=" * n + "a.a", "=>{" * n + "}" * n, "'" + "\\\\" * n, "/" + "[" * n, "/*" * n,
    "function initRuntime(){" * n + "}" * n, "var getHeapMax=()=>" * n, "x.a=>(" * n + ")" * n, "a?.b" * n,
    'Module["_malloc"]=' * n + 'asm["a"];' * 10, "0" * n + "." + "0" * n + "e" + "1" * n, "\\\\u{" * n, "$" * n * 8,
    "{" + "".join(f"k{i}:{{a:_b}}," for i in range(n)) + "}", "function _strftime(){" * 30 + "+8" * n + "}" * 30,
]
for text in texts:
    resource.setrlimit(resource.RLIMIT_CPU, (int(resource.getrusage(resource.RUSAGE_SELF).ru_utime) + 6, -1))
    try:
        read_glue(text, outline)
    except GlueUnreadable as problem:
        assert len(str(problem)) < 300, problem
print("all", len(texts))
"""


def test_text_that_was_made_to_cost_time_does_not() -> None:
    # In a process of its own, which the kernel ends when one of the texts takes too much of the processor's time.
    environment = {**os.environ, "PYTHONPATH": str(WORKERS)}
    done = subprocess.run([sys.executable, "-c", HOSTILE], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "all 22\n"


def test_text_that_is_too_long_is_not_read_at_all() -> None:
    with pytest.raises(ScriptUnreadable, match="more than 8 Mi"):
        Script(" " * (LONGEST + 1))


def test_numbers_are_read_in_all_their_forms() -> None:
    script = Script("12 1_000 0x1F 0b11 0o17 1e3 6e1 5n .5 1.5 x 1e999 017")
    found = [script.number(index) for index in range(1, len(script) - 1)]
    assert found == [12, 1000, 31, 3, 15, 1000, 60, 5, None, None, None, None, 17]
