"""The package as a whole: what it exports, what its parts import."""

import subprocess
import sys
from pathlib import Path

import spark_runtime

TOP = Path(spark_runtime.__file__).parent


def imported_by(statement: str) -> set[str]:
    """Return the modules that a fresh interpreter has after *statement*."""
    code = f"{statement}\nimport sys; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=20, check=True)
    return set(done.stdout.split())


def test_everything_that_is_listed_is_there() -> None:
    for name in spark_runtime.__all__:
        assert getattr(spark_runtime, name) is not None
    assert set(spark_runtime.__all__) <= set(dir(spark_runtime))


def test_importing_the_package_imports_nothing_of_it() -> None:
    assert not {name for name in imported_by("import spark_runtime") if name.startswith(("spark_workers", "spark_cli"))}


def test_a_worker_imports_nothing_of_the_supervisor_and_no_library_but_msgpack() -> None:
    modules = imported_by("import spark_workers.scripts.worker")
    assert not {name for name in modules if name.startswith(("spark_runtime", "spark_cli"))}
    assert not modules & {"click", "rich", "watchfiles", "anyio", "numpy", "torch"}


def test_the_nursery_starts_as_a_leaf() -> None:
    bare = imported_by("pass")
    assert len(imported_by("import spark_workers.nursery") - bare) <= 100


def test_types_are_shipped() -> None:
    for package in (TOP, TOP.parent / "workers" / "spark_workers", TOP.parent / "cli" / "spark_cli"):
        if package.exists():
            assert (package / "py.typed").exists()


def test_the_supervisor_never_unpickles() -> None:
    import ast

    for path in TOP.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [each.name for each in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            module = getattr(node, "module", None) or ""
            found = {"pickle", "marshal", "shelve", "dill", "cloudpickle"} & {module, *names}
            assert not found, f"{path} imports {found}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), f"{path}:{node.lineno}"
