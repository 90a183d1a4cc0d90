"""``--collect``: the study's page for browsers of this machine, and a file of each rater's answers."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fourdfy.config_files import ConfigError
from fourdfy.files.atomic import write_whole
from fourdfy.files.names import sanitize_tag
from fourdfy.study.folder import ANSWERS, SITE, Key, read_key

HOST = "127.0.0.1"
MOST_BYTES = 10_000_000
OWN = re.compile(r"(localhost|127\.0\.0\.1)(:\d+)?", re.IGNORECASE)
"""What browsers of this machine call it, on whichever port a tunnel has put it."""
logger = logging.getLogger(__name__)


def collector(folder: Path) -> ThreadingHTTPServer:
    """A server, bound and not yet serving.

    Raises:
        ConfigError: the folder is no study, or its port can't be used.
    """
    key = read_key(folder)
    handler = partial(_Handler, key=key, answers=folder / ANSWERS, directory=str(folder / SITE))
    try:
        server = ThreadingHTTPServer((HOST, key.port), handler)
    except OSError as error:
        raise ConfigError(
            f"port {key.port}: {error.strerror}; repeat --study with port=0, which takes any free one"
        ) from error
    logger.info(
        "http://%s:%d/ (this machine alone); answers go to %s", HOST, server.server_port, folder / ANSWERS
    )
    return server


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, *args: Any, key: Key, answers: Path, **given: Any) -> None:
        self.key, self.answers = key, answers
        super().__init__(*args, **given)

    def parse_request(self) -> bool:
        """Refuse other names of this machine, which any site can give to it (DNS rebinding)."""
        if not super().parse_request():
            return False
        if OWN.fullmatch(self.headers.get("Host", "")):
            return True
        self.send_error(HTTPStatus.MISDIRECTED_REQUEST, explain=f"A proxy has to send: Host: {HOST}")
        return False

    def list_directory(self, path: Any) -> None:
        """Tell no names of files."""
        self.send_error(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        """A file for each body, which appears whole or not at all; the same body twice is one file."""
        size = self.headers.get("Content-Length", "")
        # Pages of other sites can't send this type unless they are allowed to, and nobody is.
        if self.path != "/answers" or self.headers.get_content_type() != "application/json":
            return self.send_error(HTTPStatus.NOT_FOUND)
        if not size.isdecimal() or int(size) > MOST_BYTES:
            return self.send_error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        body = self.rfile.read(int(size))
        try:
            answers = json.loads(body)
            self.key.check(answers)
        except (ValueError, RecursionError) as error:
            logger.warning("answers refused: %s", error)
            return self.send_error(HTTPStatus.BAD_REQUEST)
        name = f"{sanitize_tag(answers['rater'])}-{hashlib.sha256(body).hexdigest()[:8]}.json"
        try:
            write_whole(self.answers / name, body, sync=True)
        except OSError as error:  # the page then keeps them as a file
            logger.error("%s", error)
            return self.send_error(HTTPStatus.INSUFFICIENT_STORAGE)
        logger.info("answers of %s", answers["rater"])
        self.send_response(HTTPStatus.NO_CONTENT)
        self.end_headers()

    def copyfile(self, *args: Any) -> None:
        with suppress(ConnectionError):  # a browser wants no more of a clip
            super().copyfile(*args)

    def log_message(self, *args: Any) -> None:
        """Say nothing of each request."""
