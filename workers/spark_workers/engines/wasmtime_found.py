"""Where wasmtime is installed and which one it is, without importing it, which takes 40 ms."""

import importlib.util
import os
import platform
import sys
from dataclasses import dataclass

#: Versions whose structures and functions are known to be as `wasmtime_raw` has them. A new one is added when
#: the test that compares them with the package's own declarations passes with it.
VERIFIED = ("50.0.",)

_LIBRARIES = {"linux": "_libwasmtime.so", "darwin": "_libwasmtime.dylib"}
_MACHINES = {"AMD64": "x86_64", "arm64": "aarch64"}


@dataclass(frozen=True, slots=True)
class Installed:
    """The package as it is on the disk. *library* is its shared library, whether it is there or not."""

    version: str
    library: str

    def why_not_raw(self) -> str:
        """Return why its library cannot be called directly, or nothing if it can."""
        if not self.version.startswith(VERIFIED):
            known = ", ".join(f"{each}x" for each in VERIFIED)
            return f"wasmtime {self.version or 'of an unknown version'} is installed and {known} is known here"
        if not os.path.exists(self.library):
            return f"wasmtime {self.version} has no {self.library}"
        return ""


def find_installed() -> Installed | None:
    """Return the wasmtime of this interpreter, None if there is none."""
    try:
        spec = importlib.util.find_spec("wasmtime")
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    package = spec.submodule_search_locations[0]
    machine = _MACHINES.get(platform.machine(), platform.machine())
    library = os.path.join(package, f"{sys.platform}-{machine}", _LIBRARIES.get(sys.platform, "unknown"))
    return Installed(_version_beside(os.path.dirname(package)), library)


def _version_beside(folder: str) -> str:
    """The version in the name of the package's dist-info folder; nothing if there is not exactly one."""
    try:
        names = [name for name in os.listdir(folder) if name.startswith("wasmtime-") and name.endswith(".dist-info")]
    except OSError:
        return ""
    return names[0][len("wasmtime-") : -len(".dist-info")] if len(names) == 1 else ""
