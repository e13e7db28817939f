"""The directories of a TIFF from byte ranges (TIFF 6.0, section 2; BigTIFF).

A directory is a table of tags. Most values lie elsewhere in the file and are looked up only when asked for, so a
page that does not matter costs its table alone, and an unwanted tag (a colour profile, a thumbnail) nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rasteret_ml.cog.header.sparse_file import NeedBytes, SparseFile
from rasteret_ml.errors import CorruptTiffError, NotATiffError
from rasteret_ml.ranges import ByteRange

__all__ = ["Directory", "read_directories"]

_MAX_DIRECTORIES = 256
_SUB_DIRECTORIES = 330
_MAX_TAGS = 4096
_TYPES = {
    1: "u1", 2: "u1", 3: "u2", 4: "u4", 5: "u4", 6: "i1", 7: "u1", 8: "i2", 9: "i4", 10: "i4", 11: "f4", 12: "f8",
    13: "u4", 16: "u8", 17: "i8", 18: "u8",
}  # fmt: skip
_DTYPES = {order: {kind: np.dtype(order + name) for kind, name in _TYPES.items()} for order in "<>"}
_RATIONALS = (5, 10)
_SIGNED = (6, 8, 9, 17)
_SIZES = {kind: np.dtype(name).itemsize * (2 if kind in _RATIONALS else 1) for kind, name in _TYPES.items()}
_INTEGERS = {kind: size for kind, size in _SIZES.items() if kind not in _RATIONALS and _TYPES[kind][0] in "ui"}
_LONG_OR_SHORT = (3, 4)
_MOST = np.iinfo(np.int64).max

_Tag = tuple[int, int, bytes | None, int]
"""(type, number of values, the values themselves where they fit in the entry, else None, and where they are)"""


class Directory:
    """One image's tags; values come from the file when they are asked for."""

    def __init__(
        self, file: SparseFile, order: Literal["<", ">"], tags: dict[int, _Tag], numbers: dict[int, int]
    ) -> None:
        self._file = file
        self._order = order
        self._tags = tags
        self._numbers = numbers  # first values, as far as they are known
        self._outside = {code for code, tag in tags.items() if tag[2] is None}

    @property
    def big_endian(self) -> bool:
        """Whether the file stores numbers most significant byte first."""
        return self._order == ">"

    def __contains__(self, code: int) -> bool:
        return code in self._tags

    def count(self, code: int) -> int:
        """How many values a tag has; 0 where it is absent."""
        return self._tags[code][1] if code in self._tags else 0

    def is_signed(self, code: int) -> bool:
        """Whether a tag's type has negative numbers."""
        return code in self._tags and self._tags[code][0] in _SIGNED

    def data(self, code: int, most: int | None = None) -> bytes | None:
        """A tag's stored bytes (of its first `most` values), None where it is absent.

        Raises:
            NeedBytes: they are not known yet.
            CorruptTiffError: they lie past the end of the file.
        """
        tag = self._tags.get(code)
        if tag is None:
            return None
        kind, count, held, offset = tag
        size = _SIZES[kind] * (count if most is None else min(most, count))
        if held is not None:
            return held[:size]
        found = self._file.peek(offset, size)
        if len(found) < size:
            raise CorruptTiffError(f"tag {code} claims {size} bytes at {offset}, past the end of the file")
        return found

    def numbers(self, code: int, most: int | None = None) -> npt.NDArray[Any]:
        """A tag's values (at most the first `most`): int64 or float64; empty where it is absent.

        Raises:
            NeedBytes, CorruptTiffError: as `data`.
        """
        data = self.data(code, most)
        if data is None:
            return np.empty(0, np.int64)
        kind = self._tags[code][0]
        values = np.frombuffer(data, _DTYPES[self._order][kind])
        if kind in _RATIONALS:
            with np.errstate(divide="ignore", invalid="ignore"):
                return values[::2] / values[1::2].astype(np.float64)
        if values.dtype.kind == "f":
            with np.errstate(invalid="ignore"):  # a signalling NaN
                return values.astype(np.float64)
        if kind in (16, 18) and (values > _MOST).any():
            raise CorruptTiffError(f"tag {code} holds {int(values.max())}")
        return values.astype(np.int64)

    def integers(self, code: int, most: int | None = None) -> npt.NDArray[np.int64]:
        """As `numbers`, of a tag that must hold integers."""
        found = self.numbers(code, most)
        if found.dtype != np.int64:
            raise CorruptTiffError(f"tag {code} holds {found[0]}, not an integer")
        return found

    def number(self, code: int, default: int) -> int:
        """The first value of a tag as an integer."""
        known = self._numbers.get(code)
        if known is None:
            if code not in self._tags:
                return default
            known = self._numbers[code] = self._first(code)
        return known

    def _first(self, code: int) -> int:
        # Without numpy: a header asks for hundreds of these, and an array costs more than all of its parsing.
        kind = self._tags[code][0]
        width = _INTEGERS.get(kind)
        if width is None:
            return int(self.integers(code, 1)[0])
        data = self.data(code, 1) or b""
        value = int.from_bytes(data[:width], "big" if self._order == ">" else "little", signed=kind in _SIGNED)
        if value > _MOST:
            raise CorruptTiffError(f"tag {code} holds {value}")
        return value

    def distinct(self, code: int, default: int) -> set[int]:
        """The different values of a tag of integers; `default` alone where it is absent."""
        return {self.number(code, default)} if self.count(code) <= 1 else set(self.integers(code).tolist())

    def text(self, code: int) -> str | None:
        """A text tag up to its first NUL, None where it is absent."""
        data = self.data(code)
        return None if data is None else data.split(b"\0", 1)[0].decode("utf-8", "replace")

    def missing(self, codes: Iterable[int], most: int | None = None) -> list[ByteRange]:
        """The bytes of these tags (of the first `most` values of each) that are not known yet."""
        wanted: list[ByteRange] = []
        for code in codes:
            if code not in self._outside:
                continue
            try:
                self.data(code, most)
            except NeedBytes as need:
                wanted.extend(need.ranges)
        return wanted


@dataclass(frozen=True, slots=True)
class _Layout:
    order: Literal["<", ">"]
    entry: struct.Struct
    count: struct.Struct
    offset: struct.Struct
    first: int
    """Where the offset of the first directory stands."""

    @property
    def byte_order(self) -> Literal["little", "big"]:
        return "little" if self.order == "<" else "big"


def read_directories(file: SparseFile) -> tuple[list[Directory], NeedBytes | None]:
    """The chain of directories, and those that the first one calls its parts (SubIFDs: a pyramid of some writers).

    As far as their tables are known, with what is needed to follow them further.

    Raises:
        NeedBytes: not even the first one is known.
        NotATiffError: not a TIFF at all.
        CorruptTiffError: the chain leaves the file.
    """
    layout = _layout(file.peek(0, 16))
    found: list[Directory] = []
    seen: set[int] = set()
    (offset,) = layout.offset.unpack(_exactly(file, layout.first, layout.offset.size))
    while offset and len(found) < _MAX_DIRECTORIES:
        if offset in seen:  # a circle: every directory has been seen
            break
        seen.add(offset)
        try:
            directory, offset = _directory(file, layout, offset)
        except NeedBytes as need:
            if not found:
                raise
            return found, need
        found.append(directory)
    if not found:
        raise CorruptTiffError("the TIFF has no image directory")
    try:
        for start in found[0].integers(_SUB_DIRECTORIES, _MAX_DIRECTORIES).tolist():
            if start not in seen:
                seen.add(start)
                found.append(_directory(file, layout, start)[0])
    except NeedBytes as need:
        return found, need
    return found, None


def _layout(magic: bytes) -> _Layout:
    if magic[:4] in (b"II*\0", b"MM\0*"):
        order: Literal["<", ">"] = "<" if magic[:2] == b"II" else ">"
        make = [struct.Struct(order + code) for code in ("HHI4s", "H", "I")]
        return _Layout(order, make[0], make[1], make[2], 4)
    if magic[:4] in (b"II+\0", b"MM\0+"):
        order = "<" if magic[:2] == b"II" else ">"
        if magic[4:8] not in (b"\x08\0\0\0", b"\0\x08\0\0"):
            raise CorruptTiffError("its BigTIFF header does not announce 8-byte offsets")
        make = [struct.Struct(order + code) for code in ("HHQ8s", "Q", "Q")]
        return _Layout(order, make[0], make[1], make[2], 8)
    raise NotATiffError(f"not a TIFF: it starts with {_looks_like(magic)}")


def _directory(file: SparseFile, layout: _Layout, start: int) -> tuple[Directory, int]:
    if start >= file.size:
        raise CorruptTiffError(f"a directory is said to lie at byte {start}, past the end of the file")
    (count,) = layout.count.unpack(_exactly(file, start, layout.count.size))
    if not 0 < count <= _MAX_TAGS:
        raise CorruptTiffError(f"the directory at byte {start} claims {count} tags")
    table = start + layout.count.size
    size = count * layout.entry.size
    content = file.peek(table, size + layout.offset.size)
    if len(content) < size:
        raise CorruptTiffError(f"the directory at byte {start} goes on past the end of the file")
    tags: dict[int, _Tag] = {}
    numbers: dict[int, int] = {}
    byte_order = layout.byte_order
    for code, kind, number, value in layout.entry.iter_unpack(content[:size]):
        if kind not in _SIZES or not number or code in tags:  # as libtiff: unknown types and repeats are ignored
            continue
        length = _SIZES[kind] * number
        if length <= len(value):
            tags[code] = (kind, number, value[:length], 0)
            if number == 1 and kind in _LONG_OR_SHORT:  # most tags of an image: worked out while they are at hand
                numbers[code] = int.from_bytes(value[:length], byte_order)
        else:
            tags[code] = (kind, number, None, layout.offset.unpack(value)[0])
    link = content[size:]  # where the file ends with the last directory, its link may be missing
    (following,) = layout.offset.unpack(link) if len(link) == layout.offset.size else (0,)
    return Directory(file, layout.order, tags, numbers), following


def _exactly(file: SparseFile, start: int, length: int) -> bytes:
    found = file.peek(start, length)
    if len(found) < length:
        raise CorruptTiffError(f"the header goes on at byte {start}, where the file ends")
    return found


def _looks_like(start: bytes) -> str:
    head = start.lstrip().lower()
    if not start:
        return "nothing: the file is empty"
    if head.startswith((b"<!doctype", b"<html")):
        return "an HTML page"
    if head.startswith((b"<?xml", b"<error", b"<code")):
        return "an XML document, perhaps an error message of the server"
    known = {b"\x89PNG": "a PNG", b"\xff\xd8\xff": "a JPEG", b"PK\x03\x04": "a ZIP", b"\x1f\x8b": "gzip data"}
    known |= {
        b"CDF": "a NetCDF file",
        b"\x89HDF": "an HDF5 file",
        b"\0\0\0\x0cjP": "a JPEG 2000 file",
        b"{": "JSON",
    }
    return next((what for sign, what in known.items() if start.startswith(sign)), repr(start[:8]))
