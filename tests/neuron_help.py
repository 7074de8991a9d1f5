"""Small Neuron packages written as WASM text, for what those in the folder of models do not do.

Their modules have plain names, so their JavaScript has nothing to say.
"""

import io
import zipfile
from pathlib import Path
from typing import Any

PACKAGES = Path(__file__).parent / "models" / "packages"
GLUE = "module.exports = function () { return null; };"


def package_of(module: bytes, glue: str = GLUE, **files: bytes) -> bytes:
    """Return a zip with a module, its JavaScript and more files, by their names with a dot for each ``__``."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("small.js", glue)
        archive.writestr("small.wasm", module)
        for name, content in files.items():
            archive.writestr(name.replace("__", "."), content)
    return target.getvalue()


def text_of(calculate: str, imports: str = "", more: str = "", construct: str = "i32.const 1", pages: int = 2) -> str:
    """Return a module as text that fits the contract.

    *calculate* sees $book, $in, $count and $length, and leaves the answer's place. The function ``$say`` takes place
    and length of an answer, puts the length where it belongs and gives the place back. Allocations are never freed,
    and the memory grows for them.
    """
    return f"""(module {imports}
      (memory (export "memory") {pages})
      (global $next (mut i32) (i32.const 65536))
      (func $malloc (export "malloc") (param $count i32) (result i32) (local $place i32)
        (local.set $place (global.get $next))
        (global.set $next
          (i32.and (i32.add (i32.add (global.get $next) (local.get $count)) (i32.const 15)) (i32.const -16)))
        (if (i32.gt_u (global.get $next) (i32.mul (memory.size) (i32.const 65536)))
          (then (if (i32.eq (memory.grow
              (i32.add (i32.shr_u (local.get $count) (i32.const 16)) (i32.const 2))) (i32.const -1))
            (then (global.set $next (local.get $place)) (return (i32.const 0))))))
        (local.get $place))
      (func (export "free") (param i32))
      (func (export "construct") (result i32) {construct})
      (func $say (param $place i32) (param $count i32) (param $length i32) (result i32)
        (i32.store (local.get $length) (local.get $count)) (local.get $place))
      {more}
      (func $calc (export "node_calc_v3")
        (param $book i32) (param $in i32) (param $count i32) (param $length i32) (result i32)
        {calculate}))"""


def package_from(calculate: str, imports: str = "", more: str = "", **options: Any) -> bytes:
    """Return a package whose module is the text of `text_of`."""
    from wasmtime import wat2wasm

    return package_of(bytes(wat2wasm(text_of(calculate, imports, more, **options))))


#: Answers with the request itself, which the buffer after it holds.
ECHO = "(call $say (local.get $in) (local.get $count) (local.get $length))"


def answering(text: str) -> tuple[str, str]:
    """Return a calculation that answers with *text*, and what it needs beside it."""
    escaped = "".join(f"\\{byte:02x}" for byte in text.encode())
    data = f'(data (i32.const 1024) "{escaped}")'
    return f"(call $say (i32.const 1024) (i32.const {len(text.encode())}) (local.get $length))", data
