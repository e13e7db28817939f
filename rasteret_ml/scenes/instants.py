"""How long an instant lasts in an index."""

from __future__ import annotations

import pandas as pd

__all__ = ["INSTANT"]

INSTANT = pd.Timedelta(1, unit="us")
"""TorchGeo's `time_series_split` takes a microsecond off every interval, and its datasets find nothing at an interval
without a length."""
