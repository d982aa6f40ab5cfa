"""Chromium without a window, driven over its debugging pipe."""

import fcntl
import json
import os
import select
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS: tuple[str, ...] = (
    "headless",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
)
FLAGS += ("disable-component-update", "disable-sync", "remote-debugging-pipe")


class Tab:
    """One page of a browser; calling it sends a command of the DevTools protocol and returns the answer."""

    def __init__(self, profile: Path) -> None:
        # The browser reads commands from its descriptor 3 and answers on 4, one JSON text per zero byte.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (*os.pipe(), *os.pipe())]
        theirs, ours = (ends[0], ends[3]), (ends[1], ends[2])
        self.process = subprocess.Popen(
            [str(CHROMIUM), *(f"--{flag}" for flag in FLAGS), f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=lambda: [os.dup2(end, number) for number, end in enumerate(theirs, 3)],
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in theirs:
            os.close(end)
        self.commands, self.answers = ours
        self.sent, self.unread, self.session = 0, b"", {}
        self.events: list[dict[str, Any]] = []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        self.sent += 1
        command = {"id": self.sent, "method": method, "params": params, **self.session}
        os.write(self.commands, json.dumps(command).encode() + b"\0")
        while (message := self.read()).get("id") != self.sent:
            self.events.append(message)
        assert "error" not in message, (method, message)
        return dict(message["result"])

    def read(self) -> dict[str, Any]:
        while b"\0" not in self.unread:
            assert select.select([self.answers], [], [], 20)[0], "the browser has not answered for 20 seconds"
            chunk = os.read(self.answers, 1 << 16)
            assert chunk, "the browser is gone"
            self.unread += chunk
        message, _, self.unread = self.unread.partition(b"\0")
        return dict(json.loads(message))

    def open(self, place: Path | str, width: int = 1280, theme: str = "light") -> None:
        """Show a file or an address."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self.theme(theme)
        self.events.clear()
        self("Page.navigate", url=place if isinstance(place, str) else place.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.read())
        self.settle()

    def theme(self, name: str) -> None:
        self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def js(self, expression: str) -> Any:
        answer = self("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def settle(self) -> None:
        """Wait until what was asked for has been drawn."""
        self.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 30))))")

    def mouse(self, kind: str, x: float, y: float, clicks: int = 0) -> None:
        button = {"button": "left", "buttons": 1, "clickCount": clicks} if clicks else {}
        self("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def complaints(self) -> list[dict[str, Any]]:
        spoken = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [event for event in self.events if event.get("method") in spoken]

    def requests(self) -> list[str]:
        sent = [event for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        os.close(self.commands)
        os.close(self.answers)
