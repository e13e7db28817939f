"""What the environment says of a host: a proxy to go through, a login in netrc.

aiohttp's `trust_env` asks the environment anew for each request: twice on another thread, once for a file on disk.
That costs more than the request itself. Here the environment is looked at once, and a host it says nothing about is
spoken to without asking again.
"""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from urllib.request import getproxies, proxy_bypass

__all__ = ["Environment"]


class Environment:
    """The proxies and logins as they stand when it is made; answers are kept by scheme and host."""

    def __init__(self) -> None:
        self._proxies = getproxies()
        self._netrc = _netrc()
        self._answers: dict[tuple[str, str], bool] = {}

    def concerns(self, scheme: str, host: str) -> bool:
        """Whether requests to this host may need a proxy or a login from the environment."""
        key = (scheme, host)
        if key not in self._answers:
            proxied = scheme in self._proxies and not proxy_bypass(host)
            self._answers[key] = proxied or (self._netrc is not None and self._netrc.authenticators(host) is not None)
        return self._answers[key]

    def note(self, scheme: str, host: str) -> None:
        """From now on it concerns this host: it sends requests on to others, about which nothing is known here."""
        self._answers[scheme, host] = True


def _netrc() -> netrc.netrc | None:
    """The logins that aiohttp would find; None where there are none."""
    named = os.environ.get("NETRC")
    try:
        return netrc.netrc(named or Path.home() / ("_netrc" if os.name == "nt" else ".netrc"))
    except (OSError, RuntimeError, ValueError, netrc.NetrcParseError):
        return None  # as for aiohttp, which says so in its log
