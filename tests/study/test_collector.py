"""What the collector takes, and what it refuses."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection

import pytest

from fourdfy.launching.cli import main
from fourdfy.study.collector import collector
from fourdfy.study.folder import ANSWERS, KEY, SITE
from tests.study.studies import answers, study

JSON = {"Content-Type": "application/json"}


@contextmanager
def collecting(folder):
    with collector(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(server, method, path, body=None, headers=JSON):
    """(status, body) of a reply."""
    connection = HTTPConnection(*server.server_address, timeout=20)
    connection.request(method, path, body, headers)
    reply = connection.getresponse()
    content = reply.read()
    connection.close()
    return reply.status, content


def test_many_raters_at_once_have_a_whole_file_each(tmp_path):
    folder = study(tmp_path)
    given = [answers(folder, f"../{name}", lambda *_: "ours") for name in range(24)]
    given.append(answers(folder, "../0", lambda *_: "theirs"))  # once more, and changed
    bodies = [json.dumps(each).encode() for each in given]
    with collecting(folder) as server, ThreadPoolExecutor(12) as pool:
        statuses = pool.map(lambda body: ask(server, "POST", "/answers", body)[0], [*bodies, *bodies])
        assert {*statuses} == {204}
    assert {file.read_bytes() for file in (folder / ANSWERS).iterdir()} == {*bodies}
    assert len([*(folder / ANSWERS).iterdir()]) == len(bodies), "twice the same is once"


def test_the_page_is_shown_and_the_key_is_not(tmp_path):
    folder = study(tmp_path)
    with collecting(folder) as server:
        assert server.server_address[0] == "127.0.0.1"
        assert ask(server, "GET", "/") == (200, (folder / SITE / "index.html").read_bytes())
        for path in (f"/../{KEY}", f"/%2e%2e/{KEY}", f"/{KEY}", "/clips/../../key.json"):
            assert ask(server, "GET", path)[0] == 404, path


def test_the_names_of_the_clips_are_not_listed(tmp_path):
    with collecting(study(tmp_path)) as server:
        assert ask(server, "GET", "/clips/")[0] == ask(server, "HEAD", "/clips/")[0] == 404


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8770", 200),  # a tunnel's port
        ("LOCALHOST", 200),
        ("127.0.0.1", 200),
        ("evil.test", 421),
        ("127.0.0.1.evil.test:8770", 421),
        ("localhost:8770@evil.test", 421),
        ("", 421),
    ],
)
def test_another_name_of_this_machine_is_refused(tmp_path, host, status):
    folder = study(tmp_path)
    body = json.dumps(answers(folder, "anna", lambda *_: "ours"))
    with collecting(folder) as server:
        assert ask(server, "GET", "/", headers={"Host": host})[0] == status
        is_taken = ask(server, "POST", "/answers", body, {**JSON, "Host": host})[0] == 204
    assert is_taken == any((folder / ANSWERS).iterdir()) == (status == 200)


@pytest.mark.parametrize(
    ("path", "headers", "change", "status"),
    [
        ("/answers", {"Content-Type": "text/plain"}, {}, 404),  # which any site's page may send
        ("/other", JSON, {}, 404),
        ("/answers", JSON, {"study": "another"}, 400),
        ("/answers", JSON, {"answers": [{}]}, 400),
        ("/answers", JSON, {"rater": "a" * 201}, 400),
        ("/answers", {**JSON, "Content-Length": "99999999999"}, {}, 413),
        ("/answers", {**JSON, "Content-Length": "-1"}, {}, 413),
    ],
)
def test_what_is_no_answer_of_the_study_is_refused(tmp_path, path, headers, change, status):
    folder = study(tmp_path)
    body = json.dumps({**answers(folder, "anna", lambda *_: "ours"), **change})
    with collecting(folder) as server:
        assert ask(server, "POST", path, body, headers)[0] == status
        assert ask(server, "POST", "/answers", "[" * 200_000)[0] == 400
    assert not any((folder / ANSWERS).iterdir())


def test_a_port_that_is_taken_is_said(tmp_path, capsys):
    with collecting(study(tmp_path)) as server:
        folder = study(tmp_path, port=server.server_port)
        assert main(["--collect", str(folder)]) == 2
    assert "repeat --study with port=0" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--collect", "x", "--train"], ["--study-results", "x", "a=1"]])
def test_what_does_not_go_with_a_study_is_refused(words, capsys):
    with pytest.raises(SystemExit):
        main(words)
    assert "--study takes key=value and nothing else" in capsys.readouterr().err
