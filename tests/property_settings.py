"""How many examples a property test runs: a number for the full run, a share of it otherwise."""

from __future__ import annotations

from typing import Any

from hypothesis import settings

_FEWEST = 5


def examples(number: int, **options: Any) -> settings:
    """Run `number` examples under the profile `ci`, and the same share of them as of the default under `dev`.

    The default is 100 examples under `ci`; `conftest.py` registers the profiles and loads one of them.
    """
    share = number * settings.default.max_examples // 100
    return settings(max_examples=min(number, max(share, _FEWEST)), **options)
