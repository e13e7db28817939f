"""Step 22. Shipped fakes: a range server with latency and faults, readers that record, small COGs, a suite.

Nothing in the library imports this room; tests and examples do, yours included.
"""

from rasteret_ml.testing.check_resume import batch_digest, check_resume
from rasteret_ml.testing.cogs import make_cog
from rasteret_ml.testing.readers_suite import MemoryReader, RangeReaderSuite, RecordingReader
from rasteret_ml.testing.server import BrokenBytes, Fault, RangeServer

__all__ = [
    "BrokenBytes",
    "Fault",
    "MemoryReader",
    "RangeReaderSuite",
    "RangeServer",
    "RecordingReader",
    "batch_digest",
    "check_resume",
    "make_cog",
]
