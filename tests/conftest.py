"""What every test has: folders of its own, so that runs and models of other tests and of the user are not seen."""

import faulthandler
import os
import signal
import tempfile
from collections.abc import Iterator

import pytest

faulthandler.enable()
# A shell gives what it starts in the background an ignored SIGINT, and so would we to every program under test.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _own_runtime_folder() -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="sparkrt-test-") as folder:
        os.environ["SPARKRT_RUNTIME_DIR"] = folder
        os.environ["SPARKRT_CACHE_DIR"] = os.path.join(folder, "cache")
        yield
        del os.environ["SPARKRT_RUNTIME_DIR"], os.environ["SPARKRT_CACHE_DIR"]


@pytest.fixture(autouse=True)
def _nothing_in_shared_memory() -> Iterator[None]:
    before = _shared_memory()
    yield
    left = _shared_memory() - before
    assert not {name for name in left if "spark" in name}, f"left in /dev/shm: {left}"


def _shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
