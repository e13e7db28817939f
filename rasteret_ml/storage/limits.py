"""Timeouts, retries and connection limits of readers; the one owner of these defaults."""

from __future__ import annotations

from dataclasses import dataclass

from rasteret_ml.errors import UsageError

__all__ = ["FetchLimits", "RetryPolicy", "Timeouts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """How long to wait for a server, in seconds."""

    connect: float = 5.0
    """For a connection, TLS included."""
    read: float = 15.0
    """For the first bytes of a response, and between any two pieces of it."""
    total: float = 60.0
    """For one attempt as a whole."""

    def __post_init__(self) -> None:
        if min(self.connect, self.read, self.total) <= 0:
            raise UsageError(f"Timeouts must be positive seconds, got {self}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Which failures are retried, and how often.

    Pauses follow decorrelated jitter (AWS Architecture Blog, "Exponential Backoff And Jitter", 2015), unless the
    server sends Retry-After.
    """

    attempts: int = 6
    """Attempts in total, including the first."""
    base: float = 0.1
    """Shortest pause in seconds."""
    cap: float = 8.0
    """Longest pause in seconds; a longer Retry-After ends the retries."""
    statuses: frozenset[int] = frozenset({408, 425, 429, 500, 502, 503, 504})
    """HTTP statuses that are retried."""

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.base < 0 or self.cap < self.base:
            raise UsageError(f"A retry policy must have attempts >= 1 and 0 <= base <= cap, got {self}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchLimits:
    """Settings of a reader, shared by all requests of a process.

    >>> FetchLimits(retry=RetryPolicy(attempts=2), timeouts=Timeouts(total=20.0)).connections
    64
    """

    timeouts: Timeouts = Timeouts()
    """How long to wait for a server."""
    retry: RetryPolicy = RetryPolicy()
    """Which failures are retried."""
    connections: int = 64
    """Open connections of a process, to all hosts together; those through a proxy or with a netrc login count apart."""
    keepalive: float = 60.0
    """Seconds that an idle connection is kept open, since a worker may idle while the model trains."""
    dns_ttl: float = 120.0
    """Seconds that a resolved address is cached."""
