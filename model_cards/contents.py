"""What the files of a checkpoint hold, archives and compressed files unpacked, and which of it is a pickle."""

from __future__ import annotations

import ast
import bz2
import gzip
import io
import lzma
import mmap
import pickletools
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..configuration_attnres import AttnResError

# Of what is packed in one file: bytes that are looked into, archives within archives, and members of an archive.
MAX_UNPACKED_BYTES = 2**28
MAX_NESTING = 3
MAX_MEMBERS = 10_000

PICKLE_NAMES = re.compile(
    r"\.(bin|ckpt|dill|joblib|p|pck|pickle|pkl|pt|pth|sav)(\.(bz2|gz|lz4|lzma|xz|z|zst))?$", re.IGNORECASE
)
PICKLE_START = re.compile(rb"\x80[\x00-\x05]")
MAX_PICKLE_START = 2**20  # bytes that are read to tell a pickle without such a start
NAMES = {"GLOBAL", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"}
CALLS = {"REDUCE", "NEWOBJ", "NEWOBJ_EX"}
TUPLES = {"TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE"}
ARRAY_START = b"\x93NUMPY"

COMPRESSED: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
    b"]\0\0": partial(lzma.LZMAFile, format=lzma.FORMAT_ALONE),
}
ZLIB_START = re.compile(rb"\x78[\x01\x5e\x9c\xda]")
NOT_UNPACKED = {
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"\x04\x22\x4d\x18": "LZ4",
    b"7z\xbc\xaf\x27\x1c": "7-Zip",
    b"Rar!\x1a\x07": "RAR",
    b"\x1f\x9d": "compress",
}


class PackedError(AttnResError):
    """An archive or a compressed file cannot be looked into."""


def contents(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    """What a file holds: itself, and all that is packed in it, each under a name that tells where it is.

    Args:
        path (`Path`): the file. Of weights in safetensors only the header is read.
        name (`str`): what to call it.

    Returns:
        iterator of `(str, bytes or mmap)`.

    Raises:
        PackedError: it is packed in a way that is not known, broken, encrypted, or holds too much.
    """
    with _mapped(path) as content:
        yield name, content
        if path.suffix != ".safetensors":  # whose first bytes are a length
            yield from _unpacked(name, content, [MAX_UNPACKED_BYTES], MAX_NESTING)


@contextmanager
def _mapped(path: Path) -> Iterator[Any]:
    size = path.stat().st_size
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            yield file.read(min(int.from_bytes(file.read(8), "little"), size))
        elif size == 0:
            yield b""
        else:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                yield content


def _unpacked(name: str, content: Any, budget: list[int], nesting: int) -> Iterator[tuple[str, bytes]]:
    """`budget` holds the number of bytes that may still be unpacked."""
    start = content[:8]
    if packer := next((packer for magic, packer in NOT_UNPACKED.items() if start.startswith(magic)), None):
        raise PackedError(f"{name} is packed by {packer}, which is not looked into; unpack or remove it.")
    try:
        for member, inner in _members(content, budget):
            if nesting == 0:
                raise PackedError(f"{name} holds archives within archives; unpack or remove it.")
            label = f"{name}: {member}" if member else f"{name}, unpacked"
            yield label, inner
            yield from _unpacked(label, inner, budget, nesting - 1)
    except PackedError:
        raise
    except BROKEN_ARCHIVE as error:
        raise PackedError(f"{name} is an archive that cannot be read ({error}); mend or remove it.") from error


# What the readers of archives raise: for damaged, encrypted and truncated ones, and for methods they do not have.
BROKEN_ARCHIVE = (
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    tarfile.TarError,
)


def _members(content: Any, budget: list[int]) -> Iterator[tuple[str, bytes]]:
    """The members of an archive by their names, or what is in a compressed file; nothing if it is neither."""
    start = content[:8]
    file = io.BytesIO(content[:]) if isinstance(content, bytes) else _View(content)
    if zipfile.is_zipfile(file):  # whatever stands before it
        with zipfile.ZipFile(file) as archive:
            for number, member in enumerate(archive.infolist()):
                _check_count(number)
                if not member.is_dir():
                    with archive.open(member) as opened:
                        yield member.filename, _bounded(opened, budget)
        return
    file.seek(0)
    for magic, opener in COMPRESSED.items():
        if start.startswith(magic):
            with opener(file) as opened:
                yield "", _bounded(opened, budget)
            return
    if ZLIB_START.match(start):
        unpacker = zlib.decompressobj()
        try:
            inner = unpacker.decompress(content[:], budget[0] + 1)
        except zlib.error:  # begins by chance as compressed data do
            return
        yield "", _counted(inner, budget)
    elif content[257:262] == b"ustar":
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for number, entry in enumerate(archive):
                _check_count(number)
                if entry.isfile() and (extracted := archive.extractfile(entry)) is not None:
                    yield entry.name, _bounded(extracted, budget)


class _View(io.RawIOBase):
    """A mapped file as a file that can be read and sought."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content = content
        self.position = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        base = (0, self.position, len(self.content))[whence]
        if base + offset < 0:
            raise OSError("a position before the start")
        self.position = base + offset
        return self.position

    def readinto(self, buffer: Any) -> int:
        part = self.content[self.position : self.position + len(buffer)]
        buffer[: len(part)] = part
        self.position += len(part)
        return len(part)


def _bounded(file: Any, budget: list[int]) -> bytes:
    return _counted(file.read(budget[0] + 1), budget)


def _counted(content: bytes, budget: list[int]) -> bytes:
    budget[0] -= len(content)
    if budget[0] < 0:
        raise ValueError(f"more than {MAX_UNPACKED_BYTES} bytes are packed in it")
    return content


def _check_count(number: int) -> None:
    if number >= MAX_MEMBERS:
        raise ValueError(f"more than {MAX_MEMBERS} members")


def is_pickle(content: Any) -> bool:
    """Whether loading it as a pickle, or as an array of NumPy, would run what it says.

    Pickles of the protocols 0 and 1 have no start of their own. They are told by what they do: name something, make
    its arguments, and call it.
    """
    if PICKLE_START.match(content[:2]):
        return True
    if content[:6] == ARRAY_START:
        return _holds_objects(content)
    named = has_mark = has_arguments = False
    try:
        for opcode, argument, _ in pickletools.genops(content[:MAX_PICKLE_START]):
            name = opcode.name
            if name in CALLS and named and has_arguments:
                return True
            if has_mark and ((name == "INST" and _is_qualified(argument)) or (name == "OBJ" and named)):
                return True
            named = named or (name in NAMES and (name != "GLOBAL" or _is_qualified(argument)))
            has_mark = has_mark or name == "MARK"
            has_arguments = has_arguments or (named and (name in TUPLES or (name == "TUPLE" and has_mark)))
    except Exception:  # no pickle, or a broken one that did not come to call anything
        return False
    return False


def _is_qualified(argument: Any) -> bool:
    return isinstance(argument, str) and re.fullmatch(r"[A-Za-z_][\w.]* [A-Za-z_][\w.]*", argument) is not None


def _holds_objects(content: Any) -> bool:
    """Whether an array in NumPy's format holds Python objects, which are pickled, or is broken."""
    length = 2 if content[6] == 1 else 4
    end = 8 + length + int.from_bytes(content[8 : 8 + length], "little")
    if end > 2**16:
        return True
    try:
        header = ast.literal_eval(content[8 + length : end].decode("latin-1"))
        return bool(np.lib.format.descr_to_dtype(header["descr"]).hasobject)
    except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError):
        return True
