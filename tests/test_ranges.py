"""Byte ranges: coalescing serves every range, within limits."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from property_settings import examples

from rasteret_ml.errors import UsageError
from rasteret_ml.ranges import ByteRange, CoalesceLimits, coalesce

RANGES = st.lists(st.builds(ByteRange, st.integers(0, 4000), st.integers(1, 300)), max_size=30)
LIMITS = st.builds(
    CoalesceLimits,
    gap=st.integers(0, 500),
    touching=st.integers(0, 20),
    waste=st.floats(0, 2),
    span=st.integers(1, 3000),
)
NEVER = CoalesceLimits(gap=0, touching=0, waste=0, span=1)


@pytest.mark.parametrize(("start", "length"), [(-1, 5), (0, 0), (3, -1)])
def test_invalid_ranges_are_refused(start: int, length: int) -> None:
    """A negative start or an empty range is an error that names the values."""
    with pytest.raises(UsageError, match=f"{start}, {length}"):
        ByteRange(start, length)


def test_stop_text_order_and_pickle_of_a_range() -> None:
    """`stop` is exclusive, the HTTP form inclusive; ranges sort by start, then length, and pickle."""
    r = ByteRange(10, 5)
    assert (r.stop, str(r)) == (15, "bytes 10-14")
    assert sorted([r, ByteRange(2, 9), ByteRange(10, 4)]) == [ByteRange(2, 9), ByteRange(10, 4), r]
    assert pickle.loads(pickle.dumps(r)) == r


@examples(100)
@given(ranges=RANGES, limits=LIMITS)
def test_slicing_back_is_the_identity(ranges: list[ByteRange], limits: CoalesceLimits) -> None:
    """Each range is served exactly once, whole, and cutting it out of the merged bytes gives its bytes."""
    content = bytes(i * 7 % 251 for i in range(5000))
    served: dict[int, bytes] = {}
    for request in coalesce(ranges, limits):
        body = content[request.span.start : request.span.stop]
        for i in request.parts:
            assert i not in served
            begin = ranges[i].start - request.span.start
            assert begin >= 0
            served[i] = body[begin : begin + ranges[i].length]
    assert served == {i: content[r.start : r.stop] for i, r in enumerate(ranges)}


@examples(100)
@given(ranges=RANGES, limits=LIMITS)
def test_no_request_is_larger_than_what_it_serves(ranges: list[ByteRange], limits: CoalesceLimits) -> None:
    """A request starts at its first range, ends at its last, and the list is sorted."""
    requests = coalesce(ranges, limits)
    for request in requests:
        assert request.span.start == min(ranges[i].start for i in request.parts)
        assert request.span.stop == max(ranges[i].stop for i in request.parts)
    assert [r.span.start for r in requests] == sorted(r.span.start for r in requests)


def _holes(parts: list[ByteRange]) -> list[int]:
    holes, stop = [], parts[0].stop
    for r in sorted(parts)[1:]:
        holes.append(max(0, r.start - stop))
        stop = max(stop, r.stop)
    return holes


@examples(100)
@given(ranges=RANGES, limits=LIMITS)
def test_limits_are_kept(ranges: list[ByteRange], limits: CoalesceLimits) -> None:
    """Span, gap and waste stay within their limits; only touching gaps are free, only one range may be larger."""
    for request in coalesce(ranges, limits):
        parts = sorted(ranges[i] for i in request.parts)
        if len(set(parts)) > 1 and request.span.length > limits.span:
            assert any(p.start == request.span.start and p.stop == request.span.stop for p in parts)
        holes = _holes(parts)
        assert all(hole <= max(limits.gap, limits.touching) for hole in holes)
        wanted = request.span.length - sum(holes)
        paid = sum(hole for hole in holes if hole > limits.touching)
        assert paid <= limits.waste * wanted + 1e-9


@examples(50)
@given(ranges=RANGES, limits=LIMITS, order=st.randoms(use_true_random=False))
def test_requests_do_not_depend_on_the_order_asked(ranges: list[ByteRange], limits: CoalesceLimits, order) -> None:
    """The spans are a function of the set of ranges."""
    shuffled = list(ranges)
    order.shuffle(shuffled)
    assert [r.span for r in coalesce(shuffled, limits)] == [r.span for r in coalesce(ranges, limits)]


def test_nothing_gives_nothing() -> None:
    """No ranges, no requests."""
    assert coalesce([], CoalesceLimits()) == []


def test_neighbouring_cog_tiles_are_one_request() -> None:
    """Tiles that leader and trailer bytes part are merged by the defaults, even tiny ones."""
    tiles = [ByteRange(1000 + i * 108, 100) for i in range(10)]
    (request,) = coalesce(tiles, CoalesceLimits())
    assert request.span == ByteRange(1000, 9 * 108 + 100)
    assert request.parts == tuple(range(10))


def test_far_ranges_stay_apart_and_near_ones_merge() -> None:
    """The gap limit decides where waste allows: 64 KiB are read through, more is not."""
    size = 1024 * 1024
    near = [ByteRange(0, size), ByteRange(size + 64 * 1024, size)]
    far = [ByteRange(0, size), ByteRange(size + 64 * 1024 + 1, size)]
    assert len(coalesce(near, CoalesceLimits())) == 1
    assert len(coalesce(far, CoalesceLimits())) == 2


def test_waste_is_measured_against_what_is_wanted() -> None:
    """A gap of 30 % of the wanted bytes is not worth it, one of 20 % is."""
    assert len(coalesce([ByteRange(0, 500), ByteRange(800, 500)], CoalesceLimits())) == 2
    assert len(coalesce([ByteRange(0, 500), ByteRange(700, 500)], CoalesceLimits())) == 1


def test_a_range_larger_than_the_span_limit_is_one_request() -> None:
    """A tile is never cut, and a range inside it costs nothing more."""
    big = ByteRange(0, 100)
    assert [r.span for r in coalesce([big, ByteRange(10, 5), ByteRange(100, 5)], NEVER)] == [big, ByteRange(100, 5)]
