"""A page in headless Chromium, driven by the Chrome DevTools Protocol; ``websockets`` comes with viser."""

import base64
import json
import os
import subprocess
import time
from pathlib import Path
from urllib.request import urlopen

from tests.screenshots import PROGRAM

ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--no-first-run",
    "--remote-debugging-port=0",
    "--hide-scrollbars",
)
PATIENCE_SECONDS = 30


class Browser:
    """One tab. Ends with its context.

    Args:
        folder: an empty folder for its profile.
    """

    def __init__(self, folder: Path, width: int = 1280, height: int = 800) -> None:
        self.folder, self.size = folder, (width, height)
        self.requests: list[str] = []
        """The addresses that the page asked for."""

    def __enter__(self) -> "Browser":
        from websockets.sync.client import connect

        size = f"--window-size={self.size[0]},{self.size[1]}"
        command = [PROGRAM, *ARGUMENTS, size, f"--user-data-dir={self.folder}", "about:blank"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, start_new_session=True, **quiet)
        port_file = self.folder / "DevToolsActivePort"
        port = wait_for(lambda: port_file.exists() and port_file.read_text().split("\n")[0])
        tabs = json.load(urlopen(f"http://127.0.0.1:{port}/json"))
        page = next(tab for tab in tabs if tab["type"] == "page")
        self.socket = connect(page["webSocketDebuggerUrl"], max_size=None)
        self._number = 0
        self.call("Network.enable")
        self.call("Page.enable")
        return self

    def __exit__(self, *error) -> None:
        self.socket.close()
        os.killpg(self.process.pid, 9)
        self.process.wait()

    def call(self, method: str, **given):
        """The result of a command of the protocol."""
        self._number += 1
        self.socket.send(json.dumps({"id": self._number, "method": method, "params": given}))
        while True:
            message = json.loads(self.socket.recv(timeout=PATIENCE_SECONDS))
            if message.get("method") == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        wait_for(lambda: self.run("document.readyState") == "complete")

    def run(self, script: str):
        """The value of an expression in JavaScript; promises are awaited."""
        given = {"expression": script, "returnByValue": True, "awaitPromise": True}
        answer = self.call("Runtime.evaluate", **given)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def click(self, text: str) -> None:
        """Click the middle of the last visible element with this text."""
        found = f"""(() => {{
            const all = [...document.querySelectorAll("*")].filter(e => e.checkVisibility())
            const element = all.filter(e => e.textContent.trim() === {json.dumps(text)}).at(-1)
            if (!element) return null
            element.scrollIntoView({{block: "nearest"}})
            const box = element.getBoundingClientRect()
            return [box.x + box.width / 2, box.y + box.height / 2]
        }})()"""

        def stays():
            place = self.run(found)
            time.sleep(0.1)
            return place == self.run(found) and place

        self.click_at(*wait_for(stays))

    def click_at(self, x: float, y: float) -> None:
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def drag(self, start: tuple[int, int], end: tuple[int, int]) -> None:
        """Move the mouse with its button down."""
        where = {"button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type="mousePressed", x=start[0], y=start[1], **where)
        for part in (0.25, 0.5, 0.75, 1.0):
            x, y = (round(a + part * (b - a)) for a, b in zip(start, end, strict=True))
            self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y, buttons=1, **where)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", x=end[0], y=end[1], **where)

    def screenshot(self) -> bytes:
        """What is seen, as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


def wait_for(condition, seconds: float = PATIENCE_SECONDS):
    """What ``condition()`` gives once it is true."""
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.05)
    return value
