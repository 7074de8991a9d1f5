"""The entry of a compile worker: one module or package, one answer, and the process ends.

It may be anything. It is read, checked and compiled nowhere else, under limits of processor time and memory, so
that the worst it can do is to end this process.
"""

import errno
import os
import resource
import signal
import socket
import threading
from typing import Any, cast

from spark_workers.channel import Channel
from spark_workers.engines.outline import COMPONENT, MAGIC, MODULE, Outline, OutlineUnreadable, read_outline
from spark_workers.engines.seam import Engine, LinkingEngine, Settings, open_engine
from spark_workers.engines.streams import read_all
from spark_workers.failpoints import hit
from spark_workers.hosts.failures import GuestFailed
from spark_workers.hosts.look import check_imports, report
from spark_workers.messages import Compile, Compiled, Message, Refused

ZIP = b"PK\x03\x04"
_LAST_SECONDS = 1  # between the limit at which we say so and the one at which the kernel kills


def start(channel_descriptor: int, bell_descriptor: int) -> int:
    """Compile what the supervisor at the other end sends."""
    os.close(bell_descriptor)  # there is nothing to pause or to stop here
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=channel_descriptor))
    try:
        message, descriptors = channel.receive()
    except EOFError:
        return 0  # the supervisor has changed its mind, or is gone
    if not isinstance(message, Compile):
        raise RuntimeError(f"the first message was {type(message).__name__}, not Compile")
    module, target = descriptors
    hit("compile.begin")
    seconds, size = message.limits
    _limit(channel, seconds, size)
    try:
        channel.send(_answer(message, module, target, size))
    except (BrokenPipeError, ConnectionResetError):
        pass  # nobody waits any more
    return 0


def _answer(message: Compile, module: int, target: int, memory: int) -> Message:
    settings = Settings(**message.settings)
    try:
        wasm = read_all(module)
        engine = open_engine(message.engine, settings)
        if wasm.startswith(ZIP):
            code, found = compile_package(message.engine, engine, wasm)
        else:
            code, found = compile_module(engine, wasm, settings)
        hit("compile.write")
        _write(target, code)
    except GuestFailed as problem:
        return Refused(problem.kind, str(problem), problem.details)
    except MemoryError:
        return Refused("over-limit", f"compiling it takes more than the {memory} bytes of memory it may", {})
    except OSError as problem:
        # Such as a full disk. `errno` tells the supervisor that it is not the module's fault.
        text = f"its machine code cannot be written: {problem.strerror}"
        return Refused("over-limit", text, {"errno": problem.errno or errno.EIO})
    return Compiled(found)


def compile_package(name: str, engine: Engine, data: bytes) -> tuple[bytes, dict[str, Any]]:
    """Return all that replicas need of the Neuron package *data*, and the report on it.

    Raises:
        GuestFailed: As `compile_module`.
    """
    from spark_workers.hosts.neuron_prepare import prepare_package  # only for packages, and never in a replica

    if name != "wasmtime":
        text = f"Neuron packages run on wasmtime, and this model asks for {name}; leave its engine out"
        raise GuestFailed("unsupported-import", text)
    return prepare_package(cast(LinkingEngine, engine), data)


def compile_module(engine: Engine, wasm: bytes, settings: Settings) -> tuple[bytes, dict[str, Any]]:
    """Return the machine code for *wasm* and the report on it.

    Raises:
        GuestFailed: invalid-module, unsupported-import, or what the engine has against it.
    """
    _check_beginning(wasm)
    outline: Outline | None = None
    try:
        outline = read_outline(wasm)
    except OutlineUnreadable as problem:
        reason = problem  # the engine can say better what is wrong with it
    else:
        check_imports(outline.imports)  # before a compile that may take seconds
        if any(each.is_shared for each in outline.memories):
            raise GuestFailed("invalid-module", "its memory is shared between threads; build it without threads")
    code = engine.compile(wasm)
    if outline is None:
        raise GuestFailed("invalid-module", f"it cannot be read: {reason}")
    return code, report(outline, len(wasm), settings)


def _check_beginning(wasm: bytes) -> None:
    """Find out by the first bytes what else than a module it may be."""
    if wasm[:4] == MAGIC and wasm[4:8] == MODULE:
        return
    if wasm[:4] == MAGIC and wasm[4:8] == COMPONENT:
        text = "it is a component, and plain modules are what can be run here; build it for wasm32-wasip1"
    elif wasm[:4] == MAGIC and len(wasm) >= 8:
        text = f"it is WASM of version {int.from_bytes(wasm[4:8], 'little')}, and only version 1 is known"
    elif not wasm:
        text = "the file is empty"
    elif wasm.lstrip()[:7] == b"(module":
        text = "it is WASM as text; translate it first, for example with wat2wasm"
    else:
        text = "it is no WASM module: it does not begin with the bytes 00 61 73 6d"
    raise GuestFailed("invalid-module", text)


def _write(target: int, code: bytes) -> None:
    rest = memoryview(code)
    while rest:
        rest = rest[os.write(target, rest) :]
    os.fsync(target)


def _limit(channel: Channel, seconds: int, size: int) -> None:
    """Take at most *seconds* of processor time and *size* bytes of memory; 0 is no limit."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # what is compiled may crash us, and nobody wants the pieces
    if size:
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))
    if seconds:
        # No handler in Python runs while the main thread compiles. So the signal is held back in every thread and one
        # waits for it; if even that fails, the kernel kills.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGXCPU})
        threading.Thread(target=_tell_of_the_limit, args=(channel, seconds), daemon=True).start()
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + _LAST_SECONDS))


def _tell_of_the_limit(channel: Channel, seconds: int) -> None:
    signal.sigwait({signal.SIGXCPU})
    try:
        channel.send(
            Refused("over-limit", f"compiling it takes more than the {seconds} s of processor time it may", {})
        )
    finally:
        os._exit(0)
