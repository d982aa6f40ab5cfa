"""Serves the page of a running job to this machine alone, and makes it again when there is something new.

What the page shows is a function that is passed in: from a directory to HTML, or None while there is nothing to show.
The browser asks for the version of the page, a digest of its HTML, and loads it again when that has changed, except
while the reader has zoomed into a chart: then a button says that there is something new.
"""

import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from socketserver import TCPServer
from typing import Any

from .html import render

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The policy of the report; beyond it the page may ask this server for its version."""

HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}

HOST = re.compile(r"(localhost|127\.0\.0\.1)(:\d{1,5})?", re.IGNORECASE)
"""Any port will do, as one may be forwarded; any other name is that of a site that had it point here."""

PATTERNS = ("*.json", "*.jsonl", "*.parquet", "*.html", "log/*.jsonl")
"""Files whose change may change the page."""

Page = Callable[[Path], str | None]


@dataclass(frozen=True)
class View:
    """The page that the browser is given, and the `version` by which it notices another one."""

    html: str
    version: str
    waiting: bool = False


class Live:
    """The page of a directory, made again when its files have changed.

    However fast a run writes, at most this fraction of the time is spent on making pages.
    """

    def __init__(
        self, directory: Path, page: Page, finished: Callable[[Path], bool], *, max_fraction: float = 0.1
    ) -> None:
        self.directory = directory
        self.page = page
        self.finished = finished
        self.max_fraction = max_fraction
        self._lock = threading.Lock()
        self._digest = ""  # of the names, sizes and times of the files that the view was made of
        self._view = View("", "")
        self._not_before = 0.0

    def view(self) -> View:
        """The page as it is now, or was a moment ago."""
        with self._lock:
            digest = hashlib.sha256(repr(sorted(_stamps(self.directory))).encode()).hexdigest()
            began = time.monotonic()
            if digest != self._digest and began >= self._not_before:
                self._view, self._digest = self._make(), digest
                ended = time.monotonic()
                self._not_before = ended + (ended - began) * (1 / self.max_fraction - 1)
            return self._view

    def state(self) -> dict[str, str | float]:
        """Version of the page, what the run is doing, and the seconds since it wrote something."""
        view = self.view()
        newest = max((changed for _, _, changed in _stamps(self.directory)), default=None)
        age = 0.0 if newest is None else max(0.0, time.time() - newest / 1e9)
        state = "waiting" if view.waiting else "finished" if self.finished(self.directory) else "running"
        return {"version": view.version, "state": state, "age": round(age, 1)}

    def _make(self) -> View:
        try:
            html = self.page(self.directory)
        except Exception as error:  # a file that is half there, say: the next page may be good
            html = _plain(f"The run in {self.directory} cannot be shown at present", str(error) or type(error).__name__)
        shown = html or _plain("Waiting for the first measurement", f"{self.directory} holds none yet.")
        version = hashlib.sha256(shown.encode()).hexdigest()[:16]
        return View(_with_updates(shown, version), version, html is None)


def _stamps(directory: Path) -> Iterator[tuple[str, int, int]]:
    """Name, size and time of change of each file that matters."""
    for path in (path for pattern in PATTERNS for path in directory.glob(pattern)):
        try:
            found = path.stat()
        except OSError:  # gone meanwhile
            continue
        yield str(path), found.st_size, found.st_mtime_ns


def _plain(title: str, text: str) -> str:
    none: dict[str, object] = {}
    return render(title=title, subtitle="", lead=text, charts=(), columns={}, config=none, environment=none)


def _with_updates(html: str, version: str) -> str:
    """Add what keeps the page up to date; the policy it carries for use as a file gives way to the server's."""
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html, count=1)
    asset = (files("sharpscope.report") / "assets" / "watch.html").read_text(encoding="utf-8")
    before, end, after = html.rpartition("</body>")
    return before + asset.replace("$version", version) + end + after


def server(live: Live, port: int = 0) -> ThreadingHTTPServer:
    """Make a server of the page on this machine's own address; port 0 takes any that is free.

    Raises:
        OSError, OverflowError: the port cannot be had.
    """

    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version, timeout = "sharpscope", "", 30

        def do_GET(self) -> None:
            status, kind, body = _answer(live, self.path, self.headers.get_all("Host", []))
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET

        def end_headers(self) -> None:
            for name, value in HEADERS.items():
                self.send_header(name, value)
            BaseHTTPRequestHandler.end_headers(self)

        def log_message(self, *_: object) -> None:
            pass

    return _Server(("127.0.0.1", port), Handler)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def server_bind(self) -> None:
        """Bind without asking for the name of this machine, which may take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore readers who disconnect."""
        if not isinstance(sys.exception(), OSError):
            TCPServer.handle_error(self, request, client_address)


def _answer(live: Live, path: str, hosts: list[str]) -> tuple[int, str, bytes]:
    """Return status, type and body of the answer."""
    if len(hosts) != 1 or not HOST.fullmatch(hosts[0]):
        return 403, "text/plain", b"This page is for this machine alone: ask for localhost or 127.0.0.1.\n"
    if path == "/":
        return 200, "text/html", live.view().html.encode()
    if path == "/version":
        return 200, "application/json", json.dumps(live.state()).encode()
    return 404, "text/plain", b"There is nothing here; the page is at /\n"
