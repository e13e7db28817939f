"""A file of which only some bytes have been fetched."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from property_settings import examples

from rasteret_ml.cog.header.ifd import NeedBytes, SparseFile
from rasteret_ml.errors import CorruptTiffError

CONTENT = bytes(i * 37 % 256 for i in range(300))
EXTENTS = st.lists(st.tuples(st.integers(0, 299), st.integers(0, 120)), max_size=8)


def _file(extents: list[tuple[int, int]]) -> tuple[SparseFile, set[int]]:
    file, known = SparseFile(len(CONTENT)), set()
    for start, length in extents:
        file.add(start, CONTENT[start : start + length])
        known |= set(range(start, min(start + length, 300)))
    return file, known


@examples(150)
@given(extents=EXTENTS, start=st.integers(0, 320), length=st.integers(0, 320))
def test_peek_gives_what_is_known_or_says_what_is_missing(extents, start: int, length: int) -> None:
    """Extents in any order, overlapping or not: the right bytes, or a request within the range."""
    file, known = _file(extents)
    wanted = set(range(start, min(start + length, 300)))
    if wanted <= known:
        assert file.peek(start, length) == CONTENT[start : start + length]
        return
    with pytest.raises(NeedBytes) as caught:
        file.peek(start, length)
    missing = set(range(caught.value.ranges[0].start, caught.value.ranges[0].stop))
    assert caught.value.ranges[0].start not in known
    assert wanted - known <= missing <= wanted


@examples(50)
@given(extents=EXTENTS, start=st.integers(0, 299), length=st.integers(1, 300))
def test_one_answer_is_enough(extents, start: int, length: int) -> None:
    """After the requested bytes are added, the same peek needs no second request."""
    file, _ = _file(extents)
    try:
        file.peek(start, length)
    except NeedBytes as need:
        file.add(need.ranges[0].start, CONTENT[need.ranges[0].start : need.ranges[0].stop])
    assert file.peek(start, length) == CONTENT[start : start + length]


def test_an_absurd_claim_is_not_fetched() -> None:
    """A tag that claims a gigabyte is corrupt, and nothing is requested."""
    with pytest.raises(CorruptTiffError, match="claims"):
        SparseFile(1 << 40).peek(0, 1 << 30)
