"""Streams that are truncated, altered or declare a false size: our error, within the tile's memory."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import imagecodecs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_tiffs import gtiff, make_table, photo
from property_settings import examples
from whole_file import header_of

from rasteret_ml.cog.codecs.byte_codecs import check_lzw_codes
from rasteret_ml.cog.codecs.decode import decode_tile
from rasteret_ml.cog.tile_table import TileTable
from rasteret_ml.errors import CorruptTiffError

PICTURE = np.ascontiguousarray(np.moveaxis(photo(3), 0, -1)[:48, :64])
STREAMS: dict[str, tuple[int, Callable[[Any], Any]]] = {
    "deflate": (8, lambda a: imagecodecs.zlib_encode(a.tobytes())),
    "LZW": (5, lambda a: imagecodecs.lzw_encode(a.tobytes())),
    "PackBits": (32773, lambda a: imagecodecs.packbits_encode(a.tobytes())),
    "LZMA": (34925, lambda a: imagecodecs.lzma_encode(a.tobytes())),
    "ZSTD": (50000, lambda a: imagecodecs.zstd_encode(a.tobytes())),
    "JPEG": (7, lambda a: imagecodecs.jpeg8_encode(a, subsampling="444")),
    "lossless JPEG": (7, lambda a: imagecodecs.jpeg8_encode(a, lossless=True, subsampling="444")),
    "JPEG 2000": (34712, lambda a: imagecodecs.jpeg2k_encode(a, level=0)),
    "JP2": (34712, lambda a: imagecodecs.jpeg2k_encode(a, level=0, codecformat="jp2")),
    "LERC": (34887, imagecodecs.lerc_encode),
    "LERC deflate": (34887, lambda a: imagecodecs.zlib_encode(imagecodecs.lerc_encode(a))),
    "LERC ZSTD": (34887, lambda a: imagecodecs.zstd_encode(imagecodecs.lerc_encode(a))),
    "WebP": (50001, imagecodecs.webp_encode),
    "lossless WebP": (50001, lambda a: imagecodecs.webp_encode(a, lossless=True)),
    "JPEG XL": (50002, imagecodecs.jpegxl_encode),
    "lossless JPEG XL": (50002, lambda a: imagecodecs.jpegxl_encode(a, lossless=True)),
}


@cache
def _stored(name: str) -> bytes:
    """Encoded once, because some encoders do not produce the same bytes twice."""
    return bytes(STREAMS[name][1](PICTURE))


def _table(name: str, size: tuple[int, int] = (48, 64)) -> TileTable:
    return make_table("uint8", size, 3, compression=STREAMS[name][0], photometric=2)


@pytest.mark.parametrize("name", STREAMS)
@examples(40)
@given(data=st.data())
def test_altered_streams(name: str, data: st.DataObject) -> None:
    """Bytes changed, removed, inserted or repeated: pixels of the tile's shape, or CorruptTiffError."""
    stored = bytearray(_stored(name))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(stored) - 1))
        what = data.draw(st.sampled_from(["flip", "set", "cut", "insert", "repeat"]))
        if what == "flip":
            stored[at] ^= 1 << data.draw(st.integers(0, 7))
        elif what == "set":
            stored[at : at + 4] = data.draw(st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"]))
        elif what == "cut":
            del stored[at + 1 :]
        elif what == "insert":
            stored[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        else:
            stored[at:at] = stored[: data.draw(st.integers(1, 40))]
    with suppress(CorruptTiffError):
        assert decode_tile(bytes(stored), _table(name), 48)[0].shape == (48, 64, 3)


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("part", [0.0, 0.2, 0.5, 0.8, 0.97])
def test_streams_that_are_cut_off(name: str, part: float) -> None:
    """Never pixels: neither garbage (JPEG) nor zeros (LZW, PackBits)."""
    stored = _stored(name)
    with pytest.raises(CorruptTiffError):
        decode_tile(stored[: int(len(stored) * part)], _table(name), 48)


def _patched(stored: bytes, at: int, value: bytes) -> bytes:
    return stored[:at] + value + stored[at + len(value) :]


def _bomb(name: str) -> bytes:
    """A stream that declares 8000 x 8000 pixels or more."""
    code, encode = STREAMS[name]
    if code in (5, 8, 32773, 34925, 50000):
        return bytes(encode(np.zeros(300_000 if code in (5, 32773) else 50_000_000, np.uint8)))
    if name == "LERC deflate":
        return bytes(imagecodecs.zlib_encode(b"\0" * 50_000_000))
    if name == "LERC ZSTD":
        return bytes(imagecodecs.zstd_encode(b"\0" * 50_000_000))
    if code == 50002:
        return bytes(encode(np.zeros((700, 700, 3), np.uint8)))
    stored, big = _stored(name), (8000).to_bytes(4, "big")
    if code == 7:
        at = re.search(rb"\xff[\xc0-\xc3]", stored).end()
        return _patched(stored, at + 3, big[2:] * 2)
    if code == 34712:
        at = stored.index(b"\xff\x4f\xff\x51")
        return _patched(_patched(stored, at + 8, big * 2), at + 24, big * 2)
    if code == 34887:
        return _patched(stored, 14, (8000).to_bytes(4, "little") * 2)
    if name == "lossless WebP":
        return _patched(stored, 21, ((8000 | 8000 << 14) | int(stored[24]) & 0xF0 << 24).to_bytes(4, "little"))
    return _patched(stored, 26, (8000).to_bytes(2, "little") * 2)


@pytest.mark.parametrize("name", STREAMS)
def test_bombs(name: str) -> None:
    """Refused before the declared size is allocated; the message has both sizes."""
    bomb = _bomb(name)
    decode_tile(_stored(name), _table(name), 48)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptTiffError, match=r"48 x 64|9216|LERC|8000|700"):
            decode_tile(bomb, _table(name), 48)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


def test_a_jpeg_of_many_scans_is_refused() -> None:
    """Each scan of a progressive JPEG costs a pass over the whole image; libtiff allows 100 too."""
    stored = _stored("JPEG")
    scan = stored[stored.index(b"\xff\xda") : -2]
    with pytest.raises(CorruptTiffError, match="scans"):
        decode_tile(stored[:-2] + scan * 120 + b"\xff\xd9", _table("JPEG"), 48)


def test_jpeg_tables_that_hold_a_picture_are_refused() -> None:
    """Otherwise its size would not be checked."""
    stored = _stored("JPEG")
    table = make_table("uint8", (48, 64), 3, compression=7, photometric=2, jpeg_tables=stored)
    with pytest.raises(CorruptTiffError, match="tables hold an image"):
        decode_tile(stored, table, 48)


def test_jpeg_frames() -> None:
    """No frame, two frames, a second image inside the first."""
    stored = _stored("JPEG")
    sof = stored.index(b"\xff\xc0")
    segment = stored[sof : sof + 2 + int.from_bytes(stored[sof + 2 : sof + 4], "big")]
    for altered, problem in (
        (stored.replace(segment, b""), "no frame"),
        (stored.replace(segment, segment * 2), "two frames"),
        (stored.replace(segment, b"\xff\xd8" + segment), "second start"),
        (b"\xff\xd8\xff\xd9", "no frame"),
        (b"\xff\xd8\xff\xc0\0\x11", "truncated"),
    ):
        with pytest.raises(CorruptTiffError, match=problem):
            decode_tile(altered, _table("JPEG"), 48)


def test_bytes_after_the_end_of_a_jpeg_are_ignored() -> None:
    """Padding and garbage after the end marker are ignored."""
    stored = _stored("JPEG")
    expected = decode_tile(stored, _table("JPEG"), 48)[0].copy()
    for tail in (b"\0" * 9, b"\xff\xda\xff\xc0\xff\xd8"):
        assert np.array_equal(decode_tile(stored + tail, _table("JPEG"), 48)[0], expected)


def test_lzw_that_crashes_older_decoders() -> None:
    """A code after CLEAR that is not a byte crashes imagecodecs before 2026.5; found by fuzzing."""
    with pytest.raises(CorruptTiffError, match="LZW"):
        decode_tile(bytes.fromhex("805fe0488432"), _table("LZW"), 48)


def _packed(codes: list[int]) -> np.ndarray[Any, Any]:
    """LZW codes to bytes, with the widths of TIFF 6.0, section 13."""
    bits, since = "", 0
    for code in codes:
        width = 9 + (since >= 254) + (since >= 766) + (since >= 1790)
        bits += f"{code:0{width}b}"
        since = 0 if code == 256 else since + 1
    return np.packbits([int(bit) for bit in bits])


@examples(30)
@given(tables=st.lists(st.integers(1, 3836), max_size=4), dangling=st.integers(258, 511))
def test_the_lzw_guard_finds_every_restart(tables: list[int], dangling: int) -> None:
    """An invalid code after a CLEAR is found whatever the lengths of the tables before it; valid streams pass."""
    sound = [code for size in tables for code in (256, *[7] * size)] + [256, 7]
    assert len(imagecodecs.lzw_decode(_packed([*sound, 257]), out=np.empty(20_000, np.uint8))) == sound.count(7)
    check_lzw_codes(_packed([*sound, 257]))
    with pytest.raises(CorruptTiffError, match=f"code {dangling}"):
        check_lzw_codes(_packed([*sound, 256, dangling, 7, 257]))


def test_memory_that_is_not_there_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A MemoryError of one tile becomes its CorruptTiffError, with its size in the message."""

    def none_left(size: int, slot: str) -> None:
        raise MemoryError

    monkeypatch.setattr("rasteret_ml.cog.codecs.byte_codecs.scratch", none_left)
    with pytest.raises(CorruptTiffError, match=r"48 x 64 x 3 uint8: MemoryError"):
        decode_tile(_stored("deflate"), _table("deflate"), 48)


@pytest.mark.parametrize("codec", [1, 5, 7, 8, 32773, 32946, 33005, 34712, 34887, 34925, 50000, 50001, 50002, 52546])
@pytest.mark.parametrize("junk", [b"", b"\0", b"x\x9c", b"(\xb5/\xfd", b"Lerc2 ", b"RIFF", bytes(range(200))])
def test_junk_is_an_error_of_ours(codec: int, junk: bytes) -> None:
    """Bytes that no codec can decode raise CorruptTiffError, whatever the codec raises."""
    with pytest.raises(CorruptTiffError):
        decode_tile(junk, make_table("uint8", (16, 16), compression=codec), 16)


@pytest.mark.parametrize("codec", ["jpeg", "webp", "lerc"])
def test_a_tile_of_the_wrong_size_is_an_error(codec: str) -> None:
    """An image smaller than the tile, or with other samples, is corrupt."""
    block = {"tiled": True, "blockxsize": 32, "blockysize": 32, "interleave": "pixel"}
    content, _ = gtiff(photo(3), compress=codec, **block)
    table = header_of(content).image
    start, count = int(table.tile_offsets[0]), int(table.tile_byte_counts[0])
    tile = content[start : start + count]
    facts = {"compression": table.compression, "jpeg_tables": table.jpeg_tables, "photometric": table.photometric}
    assert decode_tile(tile, make_table("uint8", (32, 32), 3, **facts), 32)[0].shape == (32, 32, 3)
    for shape, samples in (((64, 32), 3), ((32, 64), 3), ((32, 32), 1)):
        with pytest.raises(CorruptTiffError):
            decode_tile(tile, make_table("uint8", shape, samples, **facts), shape[0])
