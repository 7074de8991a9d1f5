"""Archives: what is read, and that no archive made to do harm is. Packages: their parts, exports, checksums."""

import hashlib
import io
import json
import random
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spark_workers.packages.archive import Archive, ArchiveRefused, Limits
from spark_workers.packages.package import PackageUnreadable, is_archive, read_package

MODELS = Path(__file__).resolve().parent.parent / "models" / "packages"
FEW = Limits(entries=10, total=10_000, one=6_000, small=1000, ratio=50, depth=4)


def zipped(*entries: tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """An archive as Python makes it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return file.getvalue()


def entry(name: str, content: bytes = b"x", **fields: Any) -> dict[str, Any]:
    """One entry for `crafted`; *fields* lie about it."""
    return {"name": name.encode(), "content": content, **fields}


def crafted(*entries: dict[str, Any], **end: Any) -> bytes:
    """An archive put together by hand, that may say anything of itself."""
    body, directory = b"", b""
    for each in entries:
        content, name = each["content"], each["name"]
        method = each.get("method", 8)
        packer = zlib.compressobj(9, wbits=-15)
        packed = each.get("packed", packer.compress(content) + packer.flush() if method == 8 else content)
        size, length = each.get("size", len(content)), each.get("packed_size", len(packed))
        flags, crc = each.get("flags", 0x800), each.get("crc", zlib.crc32(content))
        offset = each.get("offset", len(body))
        local = each.get("local_name", name)
        if "offset" not in each:
            body += struct.pack("<4s5H3L2H", b"PK\3\4", 20, flags, method, 0, 0, crc, length, size, len(local), 0)
            body += local + packed
        extra = each.get("extra", b"")
        numbers = (20, 20, flags, method, 0, 0, crc, length, size, len(name), len(extra), 0, each.get("disk", 0), 0)
        directory += struct.pack("<4s6H3L5H2L", b"PK\1\2", *numbers, each.get("attributes", 0) << 16, offset)
        directory += name + extra
    counts = end.get("disk", 0), 0, end.get("here", len(entries)), end.get("count", len(entries))
    size, offset = end.get("size", len(directory)), end.get("offset", len(body))
    closing = struct.pack("<4s4H2LH", b"PK\5\6", *counts, size, offset, 0)
    return body + directory + end.get("before_end", b"") + closing


# --- what is read ---


def test_stored_and_deflated_files_come_out_as_they_went_in() -> None:
    files = [("a.txt", b"hello"), ("folder/b.bin", bytes(range(256)) * 10), ("empty", b"")]
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        archive = Archive(zipped(*files, method=method))
        assert [(name, archive.read(name)) for name in archive.names] == files
        assert archive.size("a.txt") == 5


def test_folders_and_what_macos_adds_are_left_out() -> None:
    data = zipped(("folder/", b""), ("folder/a", b"1"), ("__MACOSX/folder/._a", b"2"), ("b/__MACOSX/c", b"3"))
    assert Archive(data).names == ["folder/a"]


def test_an_archive_written_to_a_pipe_with_sizes_behind_the_data_is_read() -> None:
    class Pipe(io.RawIOBase):
        def __init__(self) -> None:
            self.data = b""

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            self.data += bytes(data)
            return len(data)

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:  # type: ignore[arg-type]
        archive.writestr("a", b"1" * 100)
        archive.writestr("b", b"2" * 100)
    assert Archive(pipe.data).read("b") == b"2" * 100


def test_an_archive_with_large_fields_and_a_comment_is_read() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        with archive.open("a", "w", force_zip64=True) as target:
            target.write(b"content")
        archive.comment = b"PK\5\6 is not the end"
    assert Archive(file.getvalue()).read("a") == b"content"


def test_sizes_in_the_extra_field_are_used() -> None:
    extra = struct.pack("<2H2Q", 1, 16, 7, 7)
    data = crafted(entry("a", b"content", method=0, size=0xFFFFFFFF, packed_size=0xFFFFFFFF, extra=extra))
    assert Archive(data).read("a") == b"content"


def test_a_name_in_the_old_encoding_is_read() -> None:
    data = crafted({"name": b"caf\x82", "content": b"x", "flags": 0})
    assert Archive(data).names == ["café"]


# --- what is refused ---


def read_all(data: bytes) -> None:
    """Read every file of an archive that may have few."""
    archive = Archive(data, FEW)
    for name in archive.names:
        archive.read(name)


ZIP64_END = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, 0, 0)

HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "a path that leads upwards": (lambda: crafted(entry("a/../../b")), "lead upwards"),
    "an absolute path": (lambda: crafted(entry("/etc/passwd")), "relative"),
    "a path with a drive": (lambda: crafted(entry("C:/a")), "relative"),
    "a backslash": (lambda: crafted(entry("..\\a")), "backslashes"),
    "a NUL in a name": (lambda: crafted(entry("a.wasm\0.txt")), "control characters"),
    "a line end in a name": (lambda: crafted(entry("a\nb")), "control characters"),
    "a name that is not in its shortest form": (lambda: crafted(entry("a/./b")), "shortest"),
    "an empty name": (lambda: crafted(entry("")), "0 bytes"),
    "a very long name": (lambda: crafted(entry("a" * 2000)), "2000 bytes"),
    "a name that is not UTF-8": (lambda: crafted({"name": b"\xff\xfe", "content": b"x"}), "UTF-8"),
    "two entries of one name": (lambda: crafted(entry("a"), entry("a")), "two entries"),
    "two names that differ in case": (lambda: crafted(entry("model.WASM"), entry("MODEL.wasm")), "two entries"),
    "two names that differ in form": (
        lambda: crafted(entry("é"), entry(unicodedata.normalize("NFD", "é"))),
        "two entries",
    ),
    "a file and a folder of one name": (lambda: crafted(entry("a"), entry("a/", b"")), "two entries"),
    "a link": (lambda: crafted(entry("a", b"/etc/passwd", attributes=stat.S_IFLNK | 0o777)), "is a link"),
    "a device": (lambda: crafted(entry("a", attributes=stat.S_IFCHR | 0o666)), "neither a file"),
    "a folder with content": (lambda: crafted(entry("a/", b"content")), "folder with content"),
    "an encrypted entry": (lambda: crafted(entry("a", flags=1)), "encrypted"),
    "another compression": (lambda: crafted(entry("a", method=14)), "lzma"),
    "many entries": (lambda: crafted(*(entry(str(each)) for each in range(11))), "11 entries"),
    "deep folders": (lambda: crafted(entry("a/b/c/d/e")), "deep"),
    "an entry too large": (lambda: crafted(entry("a", random.Random(1).randbytes(6001))), "6001 bytes"),
    "entries too large together": (
        lambda: crafted(*(entry(str(each), random.Random(each).randbytes(4000)) for each in range(3))),
        "expands to more",
    ),
    "a bomb": (lambda: crafted(entry("a", bytes(5000))), "more than 50 times"),
    "an entry larger than it announces": (lambda: crafted(entry("a", bytes(900), size=10)), "larger than the 10"),
    "an entry smaller than it announces": (lambda: crafted(entry("a", b"abc", size=10)), "does not end"),
    "a stored entry of two sizes": (lambda: crafted(entry("a", b"abc", method=0, size=900)), "two sizes"),
    "bytes after the data": (lambda: crafted(entry("a", b"abc", packed=b"\x03\x00more")), "does not end"),
    "data that are no deflate": (lambda: crafted(entry("a", b"abc", packed=b"\xff\xff\xff")), "damaged"),
    "a wrong checksum": (lambda: crafted(entry("a", crc=1)), "checksum"),
    "entries that share their bytes": (lambda: crafted(entry("a"), entry("b", offset=0, local_name=b"b")), "of itself"),
    "an entry inside of another": (
        lambda: crafted(entry("a", crafted(entry("b"))[:34], method=0), entry("b", offset=31)),
        "share bytes",
    ),
    "an entry that reaches into the directory": (lambda: crafted(entry("a", packed_size=500)), "over its end"),
    "an entry that is nowhere": (lambda: crafted(entry("a", offset=5000)), "not where"),
    "an entry with two names": (lambda: crafted(entry("a", local_name=b"b")), "of itself"),
    "a part of several": (lambda: crafted(entry("a"), disk=1), "several files"),
    "an entry in another part": (lambda: crafted(entry("a", disk=2)), "another file"),
    "fewer entries than announced": (lambda: crafted(entry("a"), here=2, count=2), "does not begin"),
    "more entries than announced": (lambda: crafted(entry("a"), entry("b"), here=1, count=1), "other entries"),
    "a directory elsewhere": (lambda: crafted(entry("a"), offset=3), "not where"),
    "a larger directory that is missing": (lambda: crafted(entry("a"), here=0xFFFF, count=0xFFFF), "has none"),
    "a larger directory elsewhere": (
        lambda: crafted(entry("a"), count=0xFFFF, before_end=struct.pack("<4sLQL", b"PK\6\7", 0, 1 << 60, 1)),
        "not where it says",
    ),
    "a larger directory of another size": (
        lambda: crafted(
            entry("a"), count=0xFFFF, before_end=ZIP64_END + b"abc" + struct.pack("<4sLQL", b"PK\6\7", 0, 81, 1)
        ),
        "another size",
    ),
    "larger sizes that are missing": (lambda: crafted(entry("a", size=0xFFFFFFFF)), "zip64"),
    "larger sizes that are short": (
        lambda: crafted(entry("a", size=0xFFFFFFFF, extra=struct.pack("<2HL", 1, 4, 1))),
        "zip64",
    ),
    "a beginning without an end": (lambda: crafted(entry("a"))[:-5], "end is missing"),
    "nothing": (lambda: b"", "no directory"),
    "text": (lambda: b"this is no archive at all", "no directory"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_an_archive_made_to_do_harm_is_refused_with_its_reason(what: str) -> None:
    make, reason = HOSTILE[what]
    with pytest.raises(ArchiveRefused, match=reason) as caught:
        read_all(make())
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_bomb_expands_no_further_than_it_announces() -> None:
    bomb = crafted(entry("a", bytes(200 << 20), size=100))
    assert len(bomb) < 300_000
    with pytest.raises(ArchiveRefused, match="larger than the 100"):
        Archive(bomb).read("a")


def test_damaged_archives_are_read_or_refused_and_nothing_else() -> None:
    chance = random.Random(3)
    whole = zipped(("a.js", b"var x = 1;" * 20), ("b/c.wasm", bytes(range(200))), ("d.json", b"{}"))
    for _ in range(3000):
        data = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        cut = bytes(data[: chance.randrange(len(data))]) if chance.random() < 0.2 else bytes(data)
        try:
            archive = Archive(cut)
            for name in archive.names:
                archive.read(name)
        except ArchiveRefused:
            pass


# --- packages ---

PARTS = (("m.js", b"glue"), ("m.wasm", b"\0asm\1\0\0\0"))


def test_parts_are_known_by_the_ends_of_their_names() -> None:
    package = read_package(
        zipped(
            *PARTS,
            ("m.data", b"assets"),
            ("m_Static.json", b'{"Outputs": {"a": 1}}'),
            ("m_JsonFormSpec.json", b"[1]"),
            ("m_CompilerLog.json", b'{"CompilerVersion": "1.22.3"}'),
            ("m_DefaultValidations.json", b"{}"),
        )
    )
    assert (package.service, package.glue, package.wasm, package.data) == ("m", "glue", PARTS[1][1], b"assets")
    assert (package.static, package.formspec, package.compiler_version) == ({"Outputs": {"a": 1}}, [1], "1.22.3")
    assert (package.identity, package.warnings) == (None, ())


def test_folders_are_tolerated_and_the_last_file_of_a_kind_counts() -> None:
    package = read_package(zipped(("x/a.js", b"1"), ("x/a.wasm", b"2"), ("x/b.js", b"3"), ("__MACOSX/x/c.js", b"4")))
    assert (package.glue, package.wasm, package.service) == ("3", b"2", "a")


@pytest.mark.parametrize(("missing", "text"), [(0, "Missing runtime file"), (1, "Missing engine file")])
def test_a_package_without_one_of_its_two_files_is_none(missing: int, text: str) -> None:
    with pytest.raises(PackageUnreadable, match=text):
        read_package(zipped(*(each for index, each in enumerate(PARTS) if index != missing), ("readme", b"")))


def test_parts_that_are_damaged_are_left_out_with_a_warning() -> None:
    deep = b"[" * 100_000 + b"]" * 100_000
    package = read_package(zipped(*PARTS, ("m_static.json", b"[]"), ("m_jsonformspec.json", deep), ("m_x.json", b"")))
    assert (package.static, package.formspec) == (None, None)
    assert len(package.warnings) == 2


def test_files_that_are_not_what_the_checksums_say_are_warned_of() -> None:
    sums = f"{hashlib.md5(b'glue').hexdigest()}  m.js\n{'0' * 32} *m.wasm\n{'0' * 32}  gone.data\nnonsense\n"
    package = read_package(zipped(*PARTS, ("checksums.md5", sums.encode())))
    assert [("m.wasm" in each, "gone.data" in each) for each in package.warnings] == [(True, False), (False, True)]


def test_glue_that_is_no_text_is_refused() -> None:
    with pytest.raises(PackageUnreadable, match="not UTF-8"):
        read_package(zipped(("m.js", b"\xff\xfe"), PARTS[1]))


def exported(information: Any, inner: bytes, *more: tuple[str, bytes]) -> bytes:
    """An export of the platform."""
    folder = "tenant/sales/volume/1.2.0"
    metadata = json.dumps({"Model": {"EngineInformation": information}}).encode()
    return zipped((f"{folder}/ModelMetaData.json", metadata), (f"{folder}/0000-1111.zip", inner), *more)


def test_an_export_tells_folder_service_and_version() -> None:
    inner = zipped(*PARTS)
    information = {
        "ProductName": "sales",
        "ServiceName": "volume",
        "Revision": "1.2.0",
        "ServiceVersionGuid": "0000-1111",
        "CompilerVersion": "1.22.3",
        "CompiledOutputHash": hashlib.sha256(inner).hexdigest().upper(),
    }
    package = read_package(exported(information, inner))
    identity = package.identity
    assert identity is not None
    assert (identity.folder, identity.service, identity.revision) == ("sales", "volume", "1.2.0")
    assert (identity.version_id, identity.service_id, package.service) == ("0000-1111", "", "volume")
    assert (package.compiler_version, package.warnings, package.glue) == ("1.22.3", (), "glue")


def test_an_export_of_another_package_than_it_says_is_warned_of() -> None:
    package = read_package(exported({"CompiledOutputHash": "ABC"}, zipped(*PARTS)))
    assert [("CompiledOutputHash" in each) for each in package.warnings] == [True]


def test_exports_that_do_not_say_which_model_they_are_or_hold_several_are_refused() -> None:
    inner = zipped(*PARTS)
    with pytest.raises(PackageUnreadable, match="EngineInformation"):
        read_package(exported(None, inner))
    with pytest.raises(PackageUnreadable, match="2 packages"):
        read_package(exported({}, inner, ("other.zip", inner)))
    with pytest.raises(PackageUnreadable, match="no ModelMetaData"):
        read_package(zipped(("a.zip", inner)))
    with pytest.raises(ArchiveRefused, match="of the package in it"):
        read_package(exported({}, b"nonsense"))
    with pytest.raises(PackageUnreadable, match="Missing runtime file"):
        read_package(exported({}, exported({}, inner)))


@pytest.mark.parametrize("name", ["own-model", "own-xcall", "wat-echo"])
def test_our_own_packages_are_read(name: str) -> None:
    data = (MODELS / f"{name}.zip").read_bytes()
    assert is_archive(data)
    package = read_package(data)
    assert package.wasm.startswith(b"\0asm")
    assert package.warnings == ()
    if name != "wat-echo":
        assert (package.compiler_version, len(package.data or b"")) == ("1.22.3", 57)
