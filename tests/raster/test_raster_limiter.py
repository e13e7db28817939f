"""What is in flight is bounded twice, served in order, and never leaks."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pixel_oracle import run
from property_settings import examples

from rasteret_ml.raster.engine import RequestLimiter


@examples(200, database=None)
@given(
    sizes=st.lists(st.integers(0, 150), max_size=20),
    requests=st.integers(1, 4),
    cancelled=st.sets(st.integers(0, 19)),
)
def test_never_more_than_allowed_in_order_and_nothing_leaks(
    sizes: list[int], requests: int, cancelled: set[int]
) -> None:
    """Whatever is cancelled, waiting or holding: both bounds hold, the others go in order, all is given back."""
    limit = 100
    held: dict[int, int] = {}
    served: list[int] = []

    async def one(slots: RequestLimiter, i: int) -> None:
        async with slots.hold(sizes[i]):
            served.append(i)
            held[i] = min(sizes[i], limit)
            try:
                assert len(held) <= requests
                assert sum(held.values()) <= limit
                for _ in range(3):
                    await asyncio.sleep(0)
            finally:
                del held[i]

    async def all_of_them() -> None:
        slots = RequestLimiter(requests, limit)
        tasks = [asyncio.create_task(one(slots, i)) for i in range(len(sizes))]
        for i, task in enumerate(tasks):
            await asyncio.sleep(0)
            if i in cancelled:
                task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for i, result in enumerate(results):
            assert result is None or (i in cancelled and isinstance(result, asyncio.CancelledError)), result
        async with asyncio.timeout(5), slots.hold(limit):  # everything was given back
            pass

    run(all_of_them())
    assert served == sorted(served)
    assert set(range(len(sizes))) - set(served) <= cancelled


def test_a_request_larger_than_the_bound_runs_alone() -> None:
    """It is not refused, and nothing runs beside it."""

    async def main() -> None:
        slots = RequestLimiter(4, 100)
        async with slots.hold(10**9):
            other = asyncio.create_task(slots.hold(1).__aenter__())
            await asyncio.sleep(0)
            assert not other.done()
        await other

    run(main())


def test_an_error_inside_gives_the_place_back() -> None:
    """The next one runs."""

    async def main() -> None:
        slots = RequestLimiter(1)
        with pytest.raises(ZeroDivisionError):
            async with slots.hold(1):
                raise ZeroDivisionError
        async with asyncio.timeout(5), slots.hold(1):
            pass

    run(main())
