"""A hub on this machine, with the few answers that a download needs."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

NEWEST = "f" * 40
"""The commit of every repository's main branch; any other that is asked for exists as well."""


class Asked(NamedTuple):
    path: str
    authorization: str | None


@contextlib.contextmanager
def serving(repositories: Mapping[str, Path]) -> Iterator[tuple[str, list[Asked]]]:
    """(the endpoint, all requests so far) of a hub with these folders, while it lasts."""
    asked: list[Asked] = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            asked.append(Asked(self.path, self.headers.get("authorization")))
            owner, name, *rest = self.path.partition("?")[0].removeprefix("/api/models").strip("/").split("/")
            folder = repositories.get(f"{owner}/{name}")
            if folder is None:
                self.send_error(404)
            elif not self.path.startswith("/api/"):
                self.send_file(rest[1], folder / "/".join(rest[2:]))
            elif rest[:1] == ["tree"]:
                self.send_json([entry(folder, file) for file in files_of(folder)])
            else:
                siblings = [{"rfilename": entry(folder, file)["path"]} for file in files_of(folder)]
                sha = commit_of(rest[1] if rest else "main")
                self.send_json({"id": f"{owner}/{name}", "sha": sha, "siblings": siblings})

        def send_json(self, content: Any) -> None:
            self.send_content(json.dumps(content).encode(), {"content-type": "application/json"})

        def send_file(self, revision: str, file: Path) -> None:
            if not file.is_file():
                self.send_error(404)
                return
            content = file.read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            self.send_content(content, {"x-repo-commit": commit_of(revision), "etag": f'"{etag}"'})

        def send_content(self, content: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(200)
            for key, value in {**headers, "content-length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_args: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def commit_of(revision: str) -> str:
    return NEWEST if revision == "main" else revision


def files_of(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def entry(folder: Path, file: Path) -> dict[str, Any]:
    oid = hashlib.sha1(file.read_bytes()).hexdigest()
    return {"type": "file", "path": str(file.relative_to(folder)), "size": file.stat().st_size, "oid": oid}
