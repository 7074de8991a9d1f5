"""Makes `spark_workers` work under an interpreter in which it is not installed: ``PYTHON .../bootstrap.py ROLE ...``.

    nursery FD PARENT     and the other words of ``python -m spark_workers``
    identify ENGINE       print one line of JSON: what this interpreter is and has

This file lies in a folder among the packages of another Python. Of those none may be importable here, so the path of
imports is left without that folder, and the package is loaded from where this file lies.

The words of this file are those of old Pythons, so that each of them can say how old it is.
"""

import json
import os
import platform
import sys
from typing import Any

_OLDEST = (3, 10)


def _main(role: str, *rest: str) -> int:
    folder = os.path.dirname(os.path.abspath(__file__))
    # Python puts the folder of the script that it runs first. Our modules are no top-level ones.
    sys.path[:] = [each for each in sys.path if os.path.abspath(each or os.curdir) != folder]
    if role == "identify":
        print(json.dumps(_identify(*rest)))
        return 0
    _load_package(folder)
    from spark_workers.__main__ import _main as main

    return main(role, *rest)


def _load_package(folder: str) -> None:
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("spark_workers", os.path.join(folder, "__init__.py"))
    assert spec is not None
    assert spec.loader is not None
    package = module_from_spec(spec)
    sys.modules["spark_workers"] = package
    spec.loader.exec_module(package)


def _identify(engine: str) -> Any:
    """Return what there is: versions, null for what is missing, and in "problem" what an import said."""
    found = {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "machine": platform.machine(),
        "executable": sys.executable,
        "msgpack": None,
        engine: None,
        "compiler": None,
        "problem": "",
    }
    if sys.version_info >= _OLDEST:
        found["msgpack"] = _version("msgpack", found)
        found[engine] = _version(engine, found)
        if engine == "wasmer":
            found["compiler"] = _compiler(found)
    return found


def _compiler(found: Any) -> Any:
    # In the order in which the engine takes them. wasmer_compiler_llvm is no choice: importing it ends the process.
    for name in ("cranelift", "singlepass"):
        version = _version("wasmer_compiler_" + name, found)
        if version is not None:
            return name + " " + version
    return None


def _version(package: str, found: Any) -> Any:
    """Return the version of a package that can be imported, or None."""
    from importlib import import_module, metadata

    try:
        module = import_module(package)
    except ModuleNotFoundError as problem:
        if problem.name != package:  # it is there, and something that it needs is not
            found["problem"] = found["problem"] or package + ": " + str(problem)
        return None
    except Exception as problem:  # noqa: BLE001  the stub for newer Pythons raises, a broken library whatever it likes
        found["problem"] = found["problem"] or package + ": " + str(problem)
        return None
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return str(getattr(module, "__version__", "unknown"))


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
