"""nginx on loopback with a delay before each response, and the requests and bytes in its log."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

_CONFIG = """
load_module {modules}/ndk_http_module.so;
load_module {modules}/ngx_http_lua_module.so;
{user}
daemon off;
worker_processes 1;
pid {home}/nginx.pid;
error_log {home}/error.log;
events {{ worker_connections 4096; }}
http {{
  log_format counted '$status $bytes_sent $body_bytes_sent "$request" "$http_range"';
  access_log {home}/access.log counted;
  client_body_temp_path {home}/t1; proxy_temp_path {home}/t2; fastcgi_temp_path {home}/t3;
  uwsgi_temp_path {home}/t4; scgi_temp_path {home}/t5;
  sendfile on; tcp_nopush on; tcp_nodelay on; etag on;
  keepalive_timeout 600s; keepalive_requests 1000000000;
  open_file_cache max=4096 inactive=600s; open_file_cache_valid 600s;
  server {{
    listen 127.0.0.1:{port} backlog=4096;
{locations}
  }}
}}
"""
_LOCATION = """
    location ~ ^/{delay}/many/[^/]*_(\\d)\\.tif$ {{ {sleep} alias {folder}/headers/base_$1.tif; }}
    location /{delay}/ {{ {sleep} alias {folder}/; }}
"""
_INSTALL = "on Debian or Ubuntu: apt-get install nginx libnginx-mod-http-lua"


@dataclass(frozen=True)
class Served:
    """Number of responses and bytes in the log."""

    requests: int
    """Number of responses."""
    body_bytes: int
    """Number of bytes in their bodies."""

    def __sub__(self, other: Served) -> Served:
        return Served(self.requests - other.requests, self.body_bytes - other.body_bytes)


class Server:
    """Serves a folder at `/{delay in ms}/`; `/{delay}/many/NAME_{i}.tif`, with any NAME, is `headers/base_{i}.tif`."""

    def __init__(self, folder: Path, delays: Sequence[int] = (0, 30, 100)) -> None:
        self._folder = folder.resolve()
        self._delays = sorted(set(delays))
        self._home = Path()
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0

    def url(self, delay: int) -> str:
        """Return the URL of the folder with a delay of `delay` ms before each response."""
        return f"http://127.0.0.1:{self._port}/{delay}"

    def __enter__(self) -> Server:
        binary = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
        if binary is None:
            raise SystemExit(f"nginx with its Lua module must be installed; {_INSTALL}")
        modules = _modules(binary)
        self._home = Path(tempfile.mkdtemp(prefix="rasteret_nginx_"))
        self._port = _free_port()
        locations = "".join(
            _LOCATION.format(delay=d, folder=self._folder, sleep=_sleep(d) if d else "") for d in self._delays
        )
        user = f"user {getpass.getuser()};" if os.geteuid() == 0 else ""
        text = _CONFIG.format(modules=modules, home=self._home, port=self._port, locations=locations, user=user)
        (self._home / "nginx.conf").write_text(text)
        command = [binary, "-p", str(self._home), "-e", str(self._home / "error.log"), "-c", "nginx.conf"]
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=_stop_with_parent
        )
        atexit.register(self.stop)
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop nginx and remove its folder; idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(5)
        shutil.rmtree(self._home, ignore_errors=True)
        atexit.unregister(self.stop)

    def _wait(self) -> None:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                break
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.url(self._delays[0])}/manifest.json", timeout=5).close()
                return
            time.sleep(0.05)
        log = self._home / "error.log"
        raise SystemExit(f"nginx did not start: {log.read_text() if log.exists() else 'no log'}")

    def served(self) -> Served:
        """Return the totals so far, once the log has stopped growing."""
        log, size = self._home / "access.log", -1
        while log.stat().st_size != size:
            size = log.stat().st_size
            time.sleep(0.1)
        requests = body = 0
        with log.open() as lines:
            for line in lines:
                requests += 1
                body += int(line.split(" ", 3)[2])
        return Served(requests, body)


def _stop_with_parent() -> None:
    """Make the kernel terminate this child when its parent ends (Linux, prctl's PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _sleep(delay: int) -> str:
    return f"access_by_lua_block {{ ngx.sleep({delay / 1000:g}) }}"


def _modules(binary: str) -> Path:
    """Return the folder of nginx's dynamic modules."""
    output = subprocess.run([binary, "-V"], capture_output=True, text=True, check=False).stderr.split()
    configured = [word.partition("=")[2] for word in output if word.startswith("--modules-path=")]
    for folder in [*configured, "/usr/lib/nginx/modules", "/usr/lib64/nginx/modules", "/usr/share/nginx/modules"]:
        if all((Path(folder) / f"{name}_module.so").exists() for name in ("ndk_http", "ngx_http_lua")):
            return Path(folder)
    raise SystemExit(f"nginx must have the modules ndk_http and ngx_http_lua; {_INSTALL}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
