"""How patient, how greedy: the values that configure fetching, each with one owner."""

from __future__ import annotations

from dataclasses import dataclass

from rasteret_ml.errors import UsageError

__all__ = ["FetchLimits", "RetryPolicy", "Timeouts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Seconds to wait for a server."""

    connect: float = 5.0
    """For a TCP and TLS connection."""
    read: float = 15.0
    """Between two pieces of a body (and for the first)."""
    total: float = 60.0
    """For one attempt as a whole."""

    def __post_init__(self) -> None:
        if min(self.connect, self.read, self.total) <= 0:
            raise UsageError(f"Timeouts are positive seconds, not {self}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """What is tried again, and when. Backoff is decorrelated jitter (AWS Architecture Blog, 2015)."""

    attempts: int = 6
    """Attempts in all, the first included."""
    base: float = 0.1
    """Shortest pause in seconds."""
    cap: float = 8.0
    """Longest pause in seconds; a longer Retry-After is not waited for."""
    statuses: frozenset[int] = frozenset({408, 425, 429, 500, 502, 503, 504})
    """HTTP statuses that are transient."""

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.base < 0 or self.cap < self.base:
            raise UsageError(f"A retry policy needs attempts >= 1 and 0 <= base <= cap, not {self}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchLimits:
    """Everything that configures a reader."""

    timeouts: Timeouts = Timeouts()
    """Patience with a server."""
    retry: RetryPolicy = RetryPolicy()
    """Patience with its failures."""
    connections: int = 64
    """Open connections in a process, to all hosts together; those behind a proxy or a login are counted apart."""
    keepalive: float = 60.0
    """Seconds that an idle connection is kept: a worker idles while the model trains."""
    dns_ttl: float = 120.0
    """Seconds that a resolved address is trusted."""
