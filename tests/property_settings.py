"""How many examples a property test runs: a number for the full run, a share of it otherwise.

`conftest.py` registers the profiles and loads one of them: 100 examples by default under `ci`, 20 under `dev`.
"""

from __future__ import annotations

from typing import Any

from hypothesis import settings

_FEWEST = 5


def share(number: int) -> int:
    """`number` under the profile `ci`, a fifth of it under `dev`: for tests that count their own random cases."""
    return number * settings.default.max_examples // 100


def examples(number: int, **options: Any) -> settings:
    """Run `number` examples under the profile `ci`, and a fifth of them, but not fewer than five, under `dev`."""
    return settings(max_examples=min(number, max(share(number), _FEWEST)), **options)
