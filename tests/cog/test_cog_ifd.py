"""Directories and their tags: as tifffile reads them, from bytes that arrive in pieces, and from hostile files."""

from __future__ import annotations

import io
import logging
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from property_settings import examples

from rasteret_ml.cog.header.ifd import Directory, NeedBytes, SparseFile, read_directories
from rasteret_ml.errors import CorruptTiffError, DataError, NotATiffError
from rasteret_ml.ranges import ByteRange

_FIRST_CODE = 50100
_CODES = {
    1: "B", 2: "s", 3: "H", 4: "I", 5: "II", 6: "b", 7: "B", 8: "h", 9: "i", 10: "ii", 11: "f", 12: "d", 13: "I",
    16: "Q", 17: "q", 18: "Q",
}  # fmt: skip
_LIMITS = {"B": (0, 255), "b": (-128, 127), "H": (0, 65535), "h": (-(2**15), 2**15 - 1), "I": (0, 2**32 - 1)}
_LIMITS |= {"i": (-(2**31), 2**31 - 1), "Q": (0, 2**63 - 1), "q": (-(2**63), 2**63 - 1)}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """tifffile warns about odd files."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@dataclass
class Tiff:
    """A TIFF of ready-made directories, each a list of (code, type, count, bytes)."""

    order: str = "<"
    big: bool = False
    pages: list[list[tuple[int, int, int, bytes]]] = field(default_factory=list)
    last_link: int = 0

    def content(self, gap: int = 0) -> bytes:
        """Its bytes, with `gap` zero bytes before and after each directory."""
        offset_code, count_code, entry = ("Q", "Q", "HHQ") if self.big else ("I", "H", "HHI")
        width, o = (8 if self.big else 4), self.order
        mark = b"II" if o == "<" else b"MM"
        head = mark + (struct.pack(o + "HHH", 43, 8, 0) if self.big else struct.pack(o + "H", 42))
        body = bytearray(head + bytes(width))
        link = len(head)
        for page in self.pages:
            body += bytes(gap + len(body) % 2)
            body[link : link + width] = struct.pack(o + offset_code, len(body))
            table = len(body)
            size = struct.calcsize(o + count_code) + len(page) * (struct.calcsize(o + entry) + width) + width
            body += bytes(size + gap)
            packed = struct.pack(o + count_code, len(page))
            for code, kind, count, data in page:
                packed += struct.pack(o + entry, code, kind, count)
                if len(data) <= width:
                    packed += data.ljust(width, b"\0")
                else:
                    packed += struct.pack(o + offset_code, len(body))
                    body += data + bytes(len(data) % 2)
            body[table : table + len(packed)] = packed
            link = table + len(packed)
        body[link : link + width] = struct.pack(o + offset_code, self.last_link)
        return bytes(body)


def _known(data: bytes) -> SparseFile:
    file = SparseFile(len(data))
    file.add(0, data)
    return file


def _directories(data: bytes) -> list[Directory]:
    found, further = read_directories(_known(data))
    assert further is None
    return found


def _pack(order: str, kind: int, values: Sequence[Any]) -> bytes:
    return b"".join(struct.pack(order + code, v) for v in values for code in [_CODES[kind][0]])


@st.composite
def _tags(draw: st.DrawFn, order: str, big: bool) -> list[tuple[int, int, list[Any]]]:
    """(code, type, values) of a directory; a rational is two values."""
    found = []
    for i in range(draw(st.integers(1, 8))):
        kind = draw(st.sampled_from([k for k in _CODES if big or k < 16]))
        code = _CODES[kind][0]
        if code == "s":
            text = draw(st.text("abc xyz0", min_size=1, max_size=20)) + "\0"
            found.append((_FIRST_CODE + i, kind, [text]))
            continue
        number = st.floats(allow_nan=False, width=32 if code == "f" else 64) if code in "fd" else None
        number = st.integers(*_LIMITS[code]) if number is None else number
        values = draw(st.lists(number, min_size=1, max_size=12))
        if len(_CODES[kind]) == 2:
            values = [part for v in values for part in (v, abs(v) // 2 or 1)]
        found.append((_FIRST_CODE + i, kind, values))
    return found


def _entry(order: str, code: int, kind: int, values: list[Any]) -> tuple[int, int, int, bytes]:
    if kind == 2:
        return code, kind, len(values[0]), values[0].encode()
    return code, kind, len(values) // len(_CODES[kind]), _pack(order, kind, values)


@examples(100)
@given(data=st.data(), order=st.sampled_from("<>"), big=st.booleans(), pages=st.integers(1, 3))
def test_every_type_as_tifffile_reads_it(data: st.DataObject, order: str, big: bool, pages: int) -> None:
    """Classic and BigTIFF, both byte orders, inline values and others, one directory or several."""
    made = [data.draw(_tags(order, big)) for _ in range(pages)]
    tiff = Tiff(order, big, [[_entry(order, *tag) for tag in tags] for tags in made])
    content = tiff.content(gap=data.draw(st.integers(0, 9)))
    found = _directories(content)
    assert len(found) == pages
    with tifffile.TiffFile(io.BytesIO(content)) as oracle:
        for directory, page, tags in zip(found, oracle.pages, made, strict=True):
            assert directory.big_endian == (order == ">")
            for code, kind, values in tags:
                theirs = page.tags[code]
                assert code in directory
                assert directory.count(code) == theirs.count
                if kind == 2:
                    assert directory.text(code) == values[0].split("\0")[0]
                    assert values[0].strip("\0 ") == theirs.value.strip()
                    continue
                value = np.atleast_1d(
                    np.frombuffer(theirs.value, "u1") if isinstance(theirs.value, bytes) else theirs.value
                )
                if len(_CODES[kind]) == 2:
                    value = value.reshape(-1)[::2] / value.reshape(-1)[1::2].astype(np.float64)
                ours = directory.numbers(code)
                assert ours.dtype == (np.float64 if len(_CODES[kind]) == 2 or _CODES[kind] in "fd" else np.int64)
                np.testing.assert_array_equal(ours, value)
                np.testing.assert_array_equal(directory.numbers(code, 2), ours[:2])
                if ours.dtype == np.int64:  # the shortcuts agree with the array
                    assert directory.integer(code, -1) == ours[0]
                    assert directory.distinct(code, -1) == set(ours.tolist())
                    assert directory.is_signed(code) or (ours >= 0).all()


def test_the_shapes_of_files_that_tifffile_writes() -> None:
    """Real directories: every number of every page."""
    for order in "<>":
        for big in (False, True):
            file = io.BytesIO()
            with tifffile.TiffWriter(file, byteorder=order, bigtiff=big) as writer:
                for side in (90, 45):
                    tags = [(65000, "2I", 2, (1, 3, 2, 7), True), (65001, "d", 5, (0.5, -1, 2, 3, 9), True)]
                    writer.write(np.zeros((side, side, 3), "u2"), tile=(16, 16), photometric="rgb", extratags=tags)
            file.seek(0)
            with tifffile.TiffFile(file) as oracle:
                pairs = list(zip(_directories(file.getvalue()), oracle.pages, strict=True))
                for directory, page in pairs:
                    for tag in page.tags:
                        if isinstance(tag.value, str):
                            assert directory.text(tag.code) == tag.value
                        elif int(tag.dtype) not in (5, 10):
                            assert directory.numbers(tag.code).tolist() == np.atleast_1d(tag.value).tolist()
                    assert directory.numbers(65000).tolist() == [1 / 3, 2 / 7]
                    assert directory.integers(324).tolist() == list(page.dataoffsets)


def test_absent_tags() -> None:
    """They are empty, not errors."""
    (directory,) = _directories(Tiff(pages=[[(256, 3, 1, b"\1\0")]]).content())
    assert 257 not in directory
    assert directory.count(257) == 0
    assert directory.data(257) is directory.text(257) is None
    assert directory.numbers(257).tolist() == directory.integers(257, 3).tolist() == []
    assert directory.integer(257, 42) == 42
    assert directory.missing([257]) == []


def test_rationals_without_a_denominator() -> None:
    """Infinity or NaN, and no warning."""
    pairs = struct.pack("<6I", 1, 0, 0, 0, 3, 2)
    (directory,) = _directories(Tiff(pages=[[(282, 5, 3, pairs)]]).content())
    np.testing.assert_array_equal(directory.numbers(282), [np.inf, np.nan, 1.5])


def test_unknown_types_empty_and_repeated_tags_are_ignored() -> None:
    """As libtiff: the first valid one of repeated tags counts."""
    page = [
        (256, 99, 1, b"\7\0\0\0"),
        (256, 3, 0, b""),
        (256, 3, 1, b"\5\0"),
        (256, 3, 1, b"\6\0"),
        (257, 0, 1, b"\7\0\0\0"),
        (258, 14, 2, b"\7\0\0\0"),
    ]
    (directory,) = _directories(Tiff(pages=[page]).content())
    assert directory.integers(256).tolist() == [5]
    assert 257 not in directory
    assert 258 not in directory


def test_integers_are_asked_for_and_a_float_is_there() -> None:
    """The error names tag and value; a number too large for an offset is an error too."""
    page = [(256, 12, 1, struct.pack("<d", 7.5)), (324, 16, 1, struct.pack("<Q", 2**63 + 1))]
    (directory,) = _directories(Tiff(big=True, pages=[page]).content())
    with pytest.raises(CorruptTiffError, match=r"tag 256 holds 7\.5, not an integer"):
        directory.integer(256, 0)
    with pytest.raises(CorruptTiffError, match=f"tag 324 holds {2**63 + 1}"):
        directory.integers(324)


@pytest.mark.parametrize("to", [0, 1])
def test_a_chain_that_closes_is_read_once(to: int) -> None:
    """To itself or to an earlier directory."""
    tiff = Tiff(pages=[[(256, 3, 1, b"\1\0")], [(256, 3, 1, b"\2\0")]])
    starts = [tifffile.TiffFile(io.BytesIO(tiff.content())).pages[i].offset for i in (0, 1)]
    tiff.last_link = starts[to]
    assert [d.integer(256, 0) for d in _directories(tiff.content())] == [1, 2]


def test_a_chain_without_end_is_cut() -> None:
    """At 256 directories."""
    tiff = Tiff(pages=[[(256, 3, 1, struct.pack("<H", i))] for i in range(300)])
    assert [d.integer(256, 0) for d in _directories(tiff.content())] == list(range(256))


@pytest.mark.parametrize("big", [False, True])
def test_a_link_past_the_end(big: bool) -> None:
    """Of the first directory and of a later one; the message gives the position."""
    tiff = Tiff(big=big, pages=[[(256, 3, 1, b"\1\0")]], last_link=2**31)
    with pytest.raises(CorruptTiffError, match=f"byte {2**31}, past the end"):
        _directories(tiff.content())
    with pytest.raises(CorruptTiffError, match=f"byte {2**31}, past the end"):
        _directories(Tiff(big=big, pages=[], last_link=2**31).content())
    with pytest.raises(CorruptTiffError, match="no image directory"):
        _directories(Tiff(big=big, pages=[]).content())


def test_the_last_link_may_be_missing() -> None:
    """If the file ends with its table."""
    content = Tiff(pages=[[(256, 3, 1, b"\5\0")]]).content()
    for cut in range(1, 5):
        assert [d.integer(256, 0) for d in _directories(content[:-cut])] == [5]
    with pytest.raises(CorruptTiffError, match="extends past the end of the file"):
        _directories(content[:-5])


@pytest.mark.parametrize(("big", "count"), [(False, 0), (False, 5000), (True, 0), (True, 4097), (True, 2**63)])
def test_an_absurd_number_of_tags(big: bool, count: int) -> None:
    """Refused before the table is requested."""
    head = b"II+\0\x08\0\0\0" + struct.pack("<Q", 16) if big else b"II*\0" + struct.pack("<I", 8)
    file = SparseFile(2**40)
    file.add(0, head + struct.pack("<Q" if big else "<H6x", count))
    with pytest.raises(CorruptTiffError, match=f"byte {16 if big else 8} claims {count} tags"):
        read_directories(file)


@pytest.mark.parametrize("kind", [1, 4, 12, 16])
def test_an_absurd_number_of_values_costs_nothing(kind: int) -> None:
    """Neither memory nor a request: more values than a header may have, or than the file has."""
    tiff = Tiff(big=True, pages=[[(324, kind, 2**61 - 1, bytes(9))]])
    content = tiff.content()
    (directory,) = _directories(content)
    with pytest.raises(CorruptTiffError, match=r"tag 324 claims \d+ bytes at \d+, past the end"):
        directory.numbers(324)
    endless = SparseFile(2**62)
    endless.add(0, content)
    (directory,), _ = read_directories(endless)
    with pytest.raises(CorruptTiffError, match=r"claims \d+ bytes in one piece"):
        directory.numbers(324)
    assert len(directory.numbers(324, 1)) == 1  # but the first value can be read


def test_what_is_missing_is_asked_for_at_once() -> None:
    """All missing arrays of a directory are requested at once, known bytes not again."""
    arrays = [(324 + i, 4, 100, bytes(400)) for i in range(3)]
    content = Tiff(pages=[[(256, 3, 1, b"\5\0"), *arrays]]).content()
    file = SparseFile(len(content))
    file.add(0, content[:100])
    (directory,), further = read_directories(file)
    assert further is None
    wanted = directory.missing([256, 324, 325, 326, 999])
    assert [span.stop - span.start for span in wanted][1:] == [400, 400]
    assert wanted[0].start >= 62
    assert wanted[-1].stop == len(content)
    assert directory.missing([326], 3) == [ByteRange(wanted[-1].start, 12)]
    for span in wanted:
        file.add(span.start, content[span.start : span.stop])
    assert directory.missing([256, 324, 325, 326]) == []


@examples(30)
@given(data=st.data(), order=st.sampled_from("<>"), big=st.booleans())
def test_bytes_that_come_in_pieces(data: st.DataObject, order: str, big: bool) -> None:
    """Each round returns the known directories and what is missing; few rounds read them all."""
    made = [data.draw(_tags(order, big)) for _ in range(3)]
    content = Tiff(order, big, [[_entry(order, *tag) for tag in tags] for tags in made]).content(gap=50)
    file = SparseFile(len(content))
    seen, rounds = 0, 0
    further: NeedBytes | None = None
    while rounds == 0 or further is not None:
        try:
            found, further = read_directories(file)
        except NeedBytes as need:
            found, further = [], need
        assert len(found) >= seen
        seen, rounds = len(found), rounds + 1
        for span in further.ranges if further else ():
            file.add(span.start, content[span.start : span.stop])
    assert rounds <= 2 + 2 * len(made) + 1
    for directory, tags in zip(found, made, strict=True):
        for span in directory.missing([code for code, *_ in tags]):
            file.add(span.start, content[span.start : span.stop])
        for code, kind, values in tags:
            assert directory.data(code) == _entry(order, code, kind, values)[3]


@examples(150)
@given(content=st.one_of(st.binary(max_size=80), st.binary(max_size=80).map(lambda b: b"II*\0\x08\0\0\0" + b)))
def test_rubbish_is_a_data_error(content: bytes) -> None:
    """Never another exception and never an endless loop."""
    try:
        for directory in _directories(content):
            directory.missing([256, 273, 324])
    except DataError:
        pass


@pytest.mark.parametrize(
    "content", [b"", b"II", b"II*", b"MM\0+\0\x09\0\0" + bytes(8), b"II+\0\4\0\0\0" + bytes(8), b"II*\0\1"]
)
def test_heads_that_are_none(content: bytes) -> None:
    """Too short, or a BigTIFF with another offset size."""
    with pytest.raises((NotATiffError, CorruptTiffError)):
        _directories(content)
