"""Decoding the start of a deflate stream equals the start of the whole stream, or is declined."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from property_settings import examples

from rasteret_ml.cog.codecs.byte_codecs import inflate_start
from rasteret_ml.cog.codecs.decode import decode_tile
from rasteret_ml.cog.tile_table import TileTable
from rasteret_ml.geo.grid import Window

_KINDS = st.sampled_from(["noise", "few values", "runs", "both"])
_STRATEGIES = st.sampled_from([zlib.Z_DEFAULT_STRATEGY, zlib.Z_FIXED, zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE])


def _plain(kind: str, length: int, seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    few = rng.integers(0, 4, length, np.uint8).tobytes()
    noise = rng.integers(0, 256, length, np.uint8).tobytes()
    runs = np.repeat(rng.integers(0, 256, length // 50 + 1, np.uint8), 50)[:length].tobytes()
    return {"noise": noise, "few values": few, "runs": runs, "both": few[: length // 2] + noise[length // 2 :]}[kind]


@examples(200, database=None)
@given(
    kind=_KINDS,
    length=st.integers(1, 400_000),
    share=st.floats(0, 1),
    level=st.integers(0, 9),
    strategy=_STRATEGIES,
    seed=st.integers(0, 9),
)
def test_the_front_is_the_front(kind: str, length: int, share: float, level: int, strategy: int, seed: int) -> None:
    """For every kind of block; it is not declined if the rest of the stream is long enough."""
    plain = _plain(kind, length, seed)
    packer = zlib.compressobj(level, strategy=strategy)
    packed = packer.compress(plain) + packer.flush()
    size, out = int(share * length), np.full(length, 77, np.uint8)
    given_ = inflate_start(packed, size, out)
    room = 0.95 * length - size - 2064
    assert given_ == (room >= 0) or kind in ("noise", "both") or not level  # a stored block is never written in part
    if given_:
        assert out[:size].tobytes() == plain[:size]


def test_what_is_broken_or_short_is_not_given() -> None:
    """A bad header and a truncated stream are declined: decoding the whole stream gives the error."""
    plain = _plain("few values", 300_000, 1)
    packed = zlib.compress(plain)
    out = np.empty(len(plain), np.uint8)
    assert not inflate_start(bytes(20) + packed[20:], 1000, out)
    assert not inflate_start(packed[:2000], 100_000, out)
    assert not inflate_start(zlib.compress(plain[:11_000]), 10_000, out)


@examples(100, database=None)
@given(
    dtype=st.sampled_from(["u1", "u2", "i4", "f4", "f8"]),
    predictor=st.sampled_from([1, 2, 3]),
    samples=st.integers(1, 3),
    start=st.integers(0, 255),
    count=st.integers(1, 256),
    cols=st.tuples(st.integers(0, 255), st.integers(1, 256)),
    big=st.booleans(),
)
def test_the_part_wanted_is_that_of_the_whole_tile(
    dtype: str, predictor: int, samples: int, start: int, count: int, cols: tuple[int, int], big: bool
) -> None:
    """With every predictor and byte order, stopping early or not."""
    kind = np.dtype(dtype)
    predictor = 1 if predictor == 3 and kind.kind != "f" else predictor
    raw = _plain("both", 256 * 256 * samples * kind.itemsize, 3)
    table = TileTable(
        width=256,
        height=256,
        tile_width=256,
        tile_height=256,
        dtype=kind,
        tile_offsets=np.array([0]),
        tile_byte_counts=np.array([1]),
        compression=8,
        predictor=predictor,
        samples_per_pixel=samples,
        big_endian=big,
    )
    packed = zlib.compress(raw, 1)
    wanted = Window(row=start, col=cols[0], height=min(count, 256 - start), width=min(cols[1], 256 - cols[0]))
    whole: Any = decode_tile(packed, table, 256)[0].tobytes()
    whole = np.frombuffer(whole, kind).reshape(256, 256, samples)
    for stop_early in (False, True):
        part = decode_tile(packed, table, 256, 256, 256, wanted, stop_early=stop_early)[0]
        assert part[wanted.slices].tobytes() == whole[wanted.slices].tobytes()
