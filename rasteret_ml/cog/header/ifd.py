"""TIFF directories (IFDs) from a file of which only some bytes have been fetched (TIFF 6.0, section 2; BigTIFF).

A directory is a table of tags. Most values are stored elsewhere in the file and are read only when they are needed:
a page that is not used costs its table alone, and an unused tag (a colour profile, a thumbnail) costs nothing.

`SparseFile` never reads anything itself. It raises `NeedBytes` with the missing ranges, and the caller fetches them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rasteret_ml.errors import CorruptTiffError, NotATiffError
from rasteret_ml.ranges import ByteRange

_MAX_PEEK = 32 * 1024 * 1024  # Largest run of bytes that a header may require: the offsets of four million tiles.
_MAX_DIRECTORIES = 256
_MAX_TAGS = 4096
_MAX_INT64 = np.iinfo(np.int64).max
_SUB_IFDS = 330
# numpy type code of each TIFF field type; a rational (5, 10) is two values.
_TYPES = {
    1: "u1", 2: "u1", 3: "u2", 4: "u4", 5: "u4", 6: "i1", 7: "u1", 8: "i2", 9: "i4", 10: "i4", 11: "f4", 12: "f8",
    13: "u4", 16: "u8", 17: "i8", 18: "u8",
}  # fmt: skip
_DTYPES = {order: {kind: np.dtype(order + name) for kind, name in _TYPES.items()} for order in "<>"}
_RATIONALS = (5, 10)
_SIGNED = (6, 8, 9, 17)
_SIZES = {kind: np.dtype(name).itemsize * (2 if kind in _RATIONALS else 1) for kind, name in _TYPES.items()}
_INTEGER_SIZES = {kind: size for kind, size in _SIZES.items() if kind not in _RATIONALS and _TYPES[kind][0] in "ui"}
_SHORT_OR_LONG = (3, 4)
# Codes of `struct` for an entry, the number of entries and an offset, by the first bytes of the file.
_CLASSIC, _BIG = ("HHI4s", "H", "I"), ("HHQ8s", "Q", "Q")
_FORMATS = {b"II*\0": _CLASSIC, b"MM\0*": _CLASSIC, b"II+\0": _BIG, b"MM\0+": _BIG}

_ByteOrder = Literal["<", ">"]
# (type, number of values, the bytes if they fit in the entry, otherwise None, and their offset in the file)
_Tag = tuple[int, int, bytes | None, int]


class NeedBytes(Exception):  # noqa: N818 - a request, not an error
    """Parsing needs more bytes: fetch all of `ranges`, add them to the file and parse again."""

    def __init__(self, ranges: Sequence[ByteRange]) -> None:
        super().__init__(", ".join(map(str, ranges)))
        self.ranges = tuple(ranges)


class SparseFile:
    """The bytes of a file that have been fetched so far."""

    def __init__(self, size: int) -> None:
        self.size = size  #: Bytes of the whole file.
        self._extents: list[tuple[int, bytes]] = []

    def add(self, start: int, data: bytes) -> None:
        """Store the bytes that begin at offset `start`."""
        self._extents.append((start, bytes(data)))
        self._extents.sort(key=lambda extent: extent[0])
        merged: list[tuple[int, bytes]] = []
        for begin, chunk in self._extents:
            if merged and begin <= merged[-1][0] + len(merged[-1][1]):
                first, known = merged[-1]
                merged[-1] = (first, known + chunk[first + len(known) - begin :])
            else:
                merged.append((begin, chunk))
        self._extents = merged

    def peek(self, start: int, length: int) -> bytes:
        """Return `length` bytes at `start`, fewer at the end of the file.

        Raise NeedBytes if some have not been fetched, CorruptTiffError if they are more than any header needs.
        """
        stop = min(start + length, self.size)
        if stop <= start:
            return b""
        if stop - start > _MAX_PEEK:
            raise CorruptTiffError(f"the header claims {stop - start} bytes in one piece, the limit is {_MAX_PEEK}")
        missing = start
        for begin, chunk in self._extents:
            if begin <= start < begin + len(chunk):
                if stop <= begin + len(chunk):
                    return chunk[start - begin : stop - begin]
                missing = begin + len(chunk)
        raise NeedBytes([ByteRange(missing, stop - missing)])


class Directory:
    """The tags of one image; values are read from the file on access."""

    def __init__(
        self, file: SparseFile, order: _ByteOrder, tags: dict[int, _Tag], first_values: dict[int, int]
    ) -> None:
        self._file = file
        self._order = order
        self._tags = tags
        self._first_values = first_values  # a cache, filled on access

    @property
    def big_endian(self) -> bool:
        """Whether the file stores the most significant byte first."""
        return self._order == ">"

    def __contains__(self, code: int) -> bool:
        return code in self._tags

    def count(self, code: int) -> int:
        """Number of values of a tag; 0 if it is absent."""
        return self._tags[code][1] if code in self._tags else 0

    def is_signed(self, code: int) -> bool:
        """Whether the type of a tag allows negative integers."""
        return code in self._tags and self._tags[code][0] in _SIGNED

    def data(self, code: int, limit: int | None = None) -> bytes | None:
        """Return the stored bytes of a tag (of its first `limit` values), None if it is absent.

        Raise NeedBytes if they have not been fetched, CorruptTiffError if they extend past the end of the file.
        """
        tag = self._tags.get(code)
        if tag is None:
            return None
        kind, count, inline, offset = tag
        size = _SIZES[kind] * (count if limit is None else min(limit, count))
        if inline is not None:
            return inline[:size]
        data = self._file.peek(offset, size)
        if len(data) < size:
            raise CorruptTiffError(f"tag {code} claims {size} bytes at {offset}, past the end of the file")
        return data

    def numbers(self, code: int, limit: int | None = None) -> npt.NDArray[Any]:
        """Return the values of a tag (at most the first `limit`) as int64 or float64; empty if it is absent."""
        data = self.data(code, limit)
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
        if kind in (16, 18) and (values > _MAX_INT64).any():
            raise CorruptTiffError(f"tag {code} holds {int(values.max())}, which does not fit in 64 signed bits")
        return values.astype(np.int64)

    def integers(self, code: int, limit: int | None = None) -> npt.NDArray[np.int64]:
        """As `numbers`, for a tag that must hold integers."""
        values = self.numbers(code, limit)
        if values.dtype != np.int64:
            raise CorruptTiffError(f"tag {code} holds {values[0]}, not an integer")
        return values

    def integer(self, code: int, default: int) -> int:
        """Return the first value of a tag of integers, `default` if it is absent."""
        if code not in self._tags:
            return default
        if code not in self._first_values:
            self._first_values[code] = self._read_first(code)
        return self._first_values[code]

    def _read_first(self, code: int) -> int:
        # Without numpy: a header reads hundreds of single values, and creating an array costs more than the parsing.
        kind = self._tags[code][0]
        size = _INTEGER_SIZES.get(kind)
        if size is None:
            return int(self.integers(code, 1)[0])
        data = self.data(code, 1) or b""
        value = int.from_bytes(data[:size], "big" if self.big_endian else "little", signed=kind in _SIGNED)
        if value > _MAX_INT64:
            raise CorruptTiffError(f"tag {code} holds {value}, which does not fit in 64 signed bits")
        return value

    def distinct(self, code: int, default: int) -> set[int]:
        """Return the distinct values of a tag of integers; `default` alone if it is absent."""
        return {self.integer(code, default)} if self.count(code) <= 1 else set(self.integers(code).tolist())

    def text(self, code: int) -> str | None:
        """Return a text tag up to its first NUL, None if it is absent."""
        data = self.data(code)
        return None if data is None else data.split(b"\0", 1)[0].decode("utf-8", "replace")

    def missing(self, codes: Iterable[int], limit: int | None = None) -> list[ByteRange]:
        """Return the byte ranges of these tags (of the first `limit` values of each) that have not been fetched."""
        ranges: list[ByteRange] = []
        for code in codes:
            if code in self._tags and self._tags[code][2] is None:
                try:
                    self.data(code, limit)
                except NeedBytes as need:
                    ranges.extend(need.ranges)
        return ranges


@dataclass(frozen=True, slots=True)
class _Format:
    """Field sizes of a classic TIFF or a BigTIFF."""

    order: _ByteOrder
    entry: struct.Struct
    count: struct.Struct
    offset: struct.Struct


def read_directories(file: SparseFile) -> tuple[list[Directory], NeedBytes | None]:
    """Read the chain of directories, and the SubIFDs of the first one (where some writers keep overviews).

    Return the directories whose tables have been fetched, and what to fetch to read further ones (None = all read).
    Raise NeedBytes if the first one has not been fetched, NotATiffError, or CorruptTiffError if the chain leaves the
    file.
    """
    layout = _read_format(file.peek(0, 16))
    directories: list[Directory] = []
    seen: set[int] = set()
    width = layout.offset.size  # the first offset is as far into the file as it is wide
    (offset,) = layout.offset.unpack(_peek_exactly(file, width, width))
    try:
        while offset and offset not in seen and len(directories) < _MAX_DIRECTORIES:  # a chain may be circular
            seen.add(offset)
            directory, offset = _read_directory(file, layout, offset)
            directories.append(directory)
        if not directories:
            raise CorruptTiffError("the TIFF has no image directory")
        for start in directories[0].integers(_SUB_IFDS, _MAX_DIRECTORIES).tolist():
            if start not in seen:
                seen.add(start)
                directories.append(_read_directory(file, layout, start)[0])
    except NeedBytes as need:
        if not directories:
            raise
        return directories, need
    return directories, None


def _read_format(magic: bytes) -> _Format:
    order: _ByteOrder = "<" if magic[:2] == b"II" else ">"
    codes = _FORMATS.get(magic[:4])
    if codes is None:
        raise NotATiffError(f"not a TIFF: it starts with {_describe_content(magic)}")
    if codes is _BIG and magic[4:8] not in (b"\x08\0\0\0", b"\0\x08\0\0"):
        raise CorruptTiffError("the BigTIFF header does not declare 8-byte offsets")
    return _Format(order, *(struct.Struct(order + code) for code in codes))


def _read_directory(file: SparseFile, layout: _Format, start: int) -> tuple[Directory, int]:
    """Return the directory at `start` and the offset of the next one (0 = the last)."""
    if start >= file.size:
        raise CorruptTiffError(f"a link points to a directory at byte {start}, past the end of the file")
    (count,) = layout.count.unpack(_peek_exactly(file, start, layout.count.size))
    if not 0 < count <= _MAX_TAGS:
        raise CorruptTiffError(f"the directory at byte {start} claims {count} tags, the limit is {_MAX_TAGS}")
    size = count * layout.entry.size
    content = file.peek(start + layout.count.size, size + layout.offset.size)
    if len(content) < size:
        raise CorruptTiffError(f"the directory at byte {start} extends past the end of the file")
    tags: dict[int, _Tag] = {}
    first_values: dict[int, int] = {}
    byte_order: Literal["little", "big"] = "little" if layout.order == "<" else "big"
    for code, kind, number, value in layout.entry.iter_unpack(content[:size]):
        if kind not in _SIZES or not number or code in tags:  # as libtiff: ignore unknown types and repeated tags
            continue
        length = _SIZES[kind] * number
        if length <= len(value):
            tags[code] = (kind, number, value[:length], 0)
            if number == 1 and kind in _SHORT_OR_LONG:  # most tags of an image
                first_values[code] = int.from_bytes(value[:length], byte_order)
        else:
            tags[code] = (kind, number, None, layout.offset.unpack(value)[0])
    link = content[size:]  # the link of the last directory may be missing at the end of the file
    (following,) = layout.offset.unpack(link) if len(link) == layout.offset.size else (0,)
    return Directory(file, layout.order, tags, first_values), following


def _peek_exactly(file: SparseFile, start: int, length: int) -> bytes:
    data = file.peek(start, length)
    if len(data) < length:
        raise CorruptTiffError(f"the file ends at byte {start + len(data)}, inside its header")
    return data


def _describe_content(start: bytes) -> str:
    if not start:
        return "nothing: the file is empty"
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html")):
        return "an HTML page"
    if text.startswith((b"<?xml", b"<error", b"<code")):
        return "an XML document, perhaps an error message of the server"
    known = {
        b"\x89PNG": "a PNG",
        b"\xff\xd8\xff": "a JPEG",
        b"PK\x03\x04": "a ZIP",
        b"\x1f\x8b": "gzip data",
        b"CDF": "a NetCDF file",
        b"\x89HDF": "an HDF5 file",
        b"\0\0\0\x0cjP": "a JPEG 2000 file",
        b"{": "JSON",
    }
    return next((name for sign, name in known.items() if start.startswith(sign)), repr(start[:8]))
