"""A page of a file in headless Chromium, over the DevTools protocol on pipes: no port, and no package."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..web.browser import FLAGS


class Page:
    """One page. `requests` are the addresses that it asked for, `messages` what its console and the browser said."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers, self._rest, self._number = commands, answers, b"", 0
        self.requests: list[str] = []
        self.messages: list[str] = []
        self._session: str | None = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> Any:
        """Calls a method of the protocol, and returns its result. Events before it are noted."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self) -> Any:
        while b"\0" not in self._rest:
            content = os.read(self._answers, 1 << 20)
            assert content, "chromium has ended"
            self._rest += content
        line, self._rest = self._rest.split(b"\0", 1)
        event = json.loads(line)
        parameters = event.get("params", {})
        match event.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(parameters["request"]["url"])
            case "Runtime.consoleAPICalled" | "Runtime.exceptionThrown" | "Log.entryAdded":
                self.messages.append(json.dumps(parameters))
        return event

    def open(self, file: Path, *, width: int = 1100, height: int = 900, scheme: str = "light") -> None:
        """Opens a file at this size, in the "light" or "dark" colours."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.send("Emulation.setEmulatedMedia", features=[feature])
        mobile = width < 600
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        self.send("Page.navigate", url=file.absolute().as_uri())
        while self.run("document.readyState") != "complete":
            time.sleep(0.05)

    def run(self, script: str) -> Any:
        """Evaluates a script, whatever the page's policy, and returns the value, also that of a promise."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def picture(self) -> bytes:
        """The whole page as a PNG."""
        return base64.b64decode(self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"])


@contextlib.contextmanager
def opened(chromium: str) -> Iterator[Page]:
    """Starts Chromium, which reaches no address."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        (read_commands, commands), (answers, write_answers) = os.pipe(), os.pipe()
        # Chromium reads from descriptor 3 and writes to 4.
        script = f'exec "$@" 3<&{read_commands} 4>&{write_answers}'
        command = [chromium, *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        home = os.environ | {"HOME": profile, "XDG_CONFIG_HOME": profile}
        quiet = subprocess.DEVNULL
        with subprocess.Popen(
            ["bash", "-c", script, "bash", *command],
            stdout=quiet, stderr=quiet, env=home, pass_fds=(read_commands, write_answers),
        ) as browser:  # fmt: skip
            os.close(read_commands)
            os.close(write_answers)
            try:
                yield Page(commands, answers)
            finally:
                browser.terminate()
                browser.wait()
                os.close(commands)
                os.close(answers)
