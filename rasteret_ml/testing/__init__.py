"""Tools for tests: a range server with injected errors, readers that record, small COGs, a suite for readers.

The library imports nothing from here; tests and examples may, those of users included.
"""

from rasteret_ml.testing.checks import MemoryReader, RangeReaderSuite, RecordingReader, batch_digest, check_resume
from rasteret_ml.testing.cogs import make_cog
from rasteret_ml.testing.server import BrokenBytes, InjectedError, RangeServer

__all__ = [
    "BrokenBytes",
    "InjectedError",
    "MemoryReader",
    "RangeReaderSuite",
    "RangeServer",
    "RecordingReader",
    "batch_digest",
    "check_resume",
    "make_cog",
]
