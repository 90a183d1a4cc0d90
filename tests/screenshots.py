"""A headless browser for tests of pages."""

import re
import shutil
import subprocess
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OWN = re.compile(r"\.(google|googleapis|gvt1)\.com\b")
"""What the browser asks for by itself."""
CONTROL = "http://control.test/"
needs_browser = pytest.mark.skipif(PROGRAM is None, reason="needs Chromium or Chrome")


@contextmanager
def listening():
    """A proxy that answers nothing; gives its port, and the addresses that it was asked for."""
    asked = []

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_CONNECT = do_POST = do_GET

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port, asked
        server.shutdown()


def screenshot(page, *, width=800, height=600):
    """What a page shows after two seconds of its time, as pixels; and every address that it asked for."""
    target, profile = page.with_suffix(".png"), page.with_suffix(".profile")
    with listening() as (port, asked):
        done = subprocess.run(
            [
                PROGRAM, "--headless", "--no-sandbox", "--hide-scrollbars",
                "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
                "--no-first-run", "--disable-background-networking", "--disable-sync",
                "--disable-component-update", "--allow-file-access-from-files", f"--user-data-dir={profile}",
                f"--proxy-server=127.0.0.1:{port}", "--proxy-bypass-list=<-loopback>",
                "--virtual-time-budget=2000", f"--window-size={width},{height}", f"--screenshot={target}",
                page.as_uri(),
            ],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert target.is_file(), done.stderr
    of_pages = [address for address in asked if not OWN.search(address)]
    return np.asarray(Image.open(target).convert("RGB")).astype(int), of_pages


def framed(folder, *addresses, width=300, height=800):
    """A page that shows others side by side in rows; it may load anything, and loads ``CONTROL``."""
    frames = "".join(
        f'<iframe src="{address}" width="{width}" height="{height}" style="border:0"></iframe>'
        for address in addresses
    )
    page = folder / "framed.html"
    page.write_text(
        f'<body style="margin:0;display:flex;flex-wrap:wrap"><img src="{CONTROL}" hidden>{frames}'
    )
    return page
