"""The page of a study in a browser, with simulated raters."""

import json
import random
import threading
from contextlib import contextmanager

import pytest

from fourdfy.study.collector import collector
from fourdfy.study.folder import ANSWERS, SITE, read_key
from fourdfy.study.results import write_results
from tests.browser import Browser, wait_for
from tests.screenshots import needs_browser
from tests.study.studies import study

pytest.importorskip("websockets", reason="needs websockets, which come with viser")
pytestmark = needs_browser

RATER = """(async () => {
    const prefers = PREFERS, method = METHOD, wait = () => new Promise(done => setTimeout(done, 10))
    document.getElementById("agree").click()
    while (!document.getElementById("task").hidden) {
        const rows = [...document.getElementById("questions").children]
        while (rows[0].querySelector("button").disabled) await wait()
        const check = rows[0].textContent.match(/Please answer \\u201c(\\w+)/)
        const ours = method[document.getElementById("left").src.split("/").at(-1).split(".")[0]] === "ours"
        for (const [i, row] of rows.entries()) {
            const side = check ? check[1].toLowerCase() : prefers[i].pop() === ours ? "left" : "right"
            row.querySelector(`[data-side=${side}]`).click()
        }
        document.getElementById("next").click()
    }
    while (!/have been sent|as a file/.test(document.getElementById("told").textContent)) await wait()
    document.getElementById("another").click()
})()"""


@contextmanager
def collecting(folder):
    with collector(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def is_ready(browser):
    return browser.run("!document.querySelector('#questions button').disabled")


def press(browser, *keys, held=0):
    """``held``: how often each is repeated before it is let go."""
    for key in keys:
        for number in range(held + 1):
            browser.call("Input.dispatchKeyEvent", type="keyDown", key=key, autoRepeat=number > 0)
        browser.call("Input.dispatchKeyEvent", type="keyUp", key=key)


def test_what_raters_prefer_is_what_the_results_say(tmp_path):
    folder, raters, prompts = study(tmp_path, prompts=[f"thing {i}" for i in range(6)]), 10, 6
    methods = {name: clip.method for name, clip in read_key(folder).clips.items()}
    planted = [random.Random(0).sample([True] * wins + [False] * (60 - wins), 60) for wins in (30, 39)]
    with collecting(folder) as address, Browser(tmp_path / "profile") as browser:
        browser.open(address)
        for rater in range(raters):
            part = slice(rater * prompts, (rater + 1) * prompts)
            prefers = json.dumps([of[part] for of in planted])
            browser.run(RATER.replace("PREFERS", prefers).replace("METHOD", json.dumps(methods)))
        assert {request.split("/")[2] for request in browser.requests} == {address.split("/")[2]}
    assert len([*(folder / ANSWERS).glob("*.json")]) == raters
    found = write_results(folder)
    text, overall = (row.found for row in found.rows)
    assert (text.wins, text.losses, text.p) == (30, 30, 1.0)
    assert (overall.wins, overall.losses) == (39, 21) and overall.p < 0.05
    assert found.raters == raters and found.left_out == 0
    ways = []
    for file in (folder / ANSWERS).iterdir():
        entries = json.loads(file.read_text())["answers"]
        ways.append([(entry["left"], entry["right"]) for entry in entries if entry["question"] == "overall"])
    assert 12 < sum(left < right for way in ways for left, right in way) < 48, "sides are random"
    assert len({tuple(map(frozenset, way)) for way in ways}) > 5, "the order is random"


@pytest.mark.parametrize(
    "reply", ["new Response('', {status: 200})", "Promise.reject(new TypeError('offline'))"]
)
def test_answers_that_nobody_took_are_a_file(tmp_path, reply):
    folder = study(tmp_path, checks=0, comparisons=1)
    with collecting(folder) as address, Browser(tmp_path / "profile") as browser:
        where = {"behavior": "allow", "downloadPath": str(tmp_path / "saved")}
        browser.call("Browser.setDownloadBehavior", **where)
        browser.open(f"{address}?rater=anna")
        assert browser.run("document.getElementById('another').hidden"), "who comes next has another link"
        browser.run(f"window.fetch = async () => {reply}; 0")
        browser.run(RATER.replace("PREFERS", "[[true], [true]]").replace("METHOD", "{}"))
        wait_for((tmp_path / "saved" / "answers-anna.json").is_file)
    read_key(folder).check(json.loads((tmp_path / "saved" / "answers-anna.json").read_text()))


def test_on_a_phone_answers_are_three_equal_columns_below_clips_that_stay_in_view(tmp_path):
    folder = study(tmp_path, questions={str(i): "Which is better?" for i in range(9)})
    with Browser(tmp_path / "profile") as browser:
        phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": False}
        browser.call("Emulation.setDeviceMetricsOverride", **phone)
        browser.open((folder / SITE / "index.html").as_uri())
        browser.click("I agree, begin")
        buttons = "[...document.querySelectorAll('#questions div:first-child button')]"
        place = "(({y, width}) => `${y} ${Math.round(width)}`)(button.getBoundingClientRect())"
        assert browser.run(f"new Set({buttons}.map(button => {place})).size") == 1
        browser.run("scrollTo(0, 500)")
        assert browser.run("scrollY && document.getElementById('pair').getBoundingClientRect().y") == 0


def test_offline_with_keys_after_both_were_watched_and_on_after_a_reload(tmp_path):
    folder = study(tmp_path, checks=0)
    with Browser(tmp_path / "profile") as browser:
        where = {"behavior": "allow", "downloadPath": str(tmp_path / "saved")}
        browser.call("Browser.setDownloadBehavior", **where)
        page = (folder / SITE / "index.html").as_uri()
        browser.open(f"{page}?rater=anna")
        # Stopped at its start, a clip is not watched.
        browser.run("document.getElementById('left').addEventListener('play', e => e.target.pause())")
        browser.click("I agree, begin")
        wait_for(lambda: browser.run("document.getElementById('right').dataset.watched"))
        press(browser, "ArrowLeft", "ArrowLeft", "Enter")
        assert not is_ready(browser) and browser.run("document.getElementById('next').disabled")
        browser.open(f"{page}?rater=anna")
        wait_for(lambda: is_ready(browser))
        press(browser, "ArrowLeft", held=3)
        assert browser.run("document.getElementById('next').disabled"), "a held key answers once"
        press(browser, "ArrowDown", "ArrowRight", "Enter")
        wait_for(lambda: browser.run("document.getElementById('count').textContent") == "2 of 2")
        browser.open(f"{page}?rater=anna")
        assert browser.run("document.getElementById('count').textContent") == "2 of 2"
        wait_for(lambda: is_ready(browser))
        press(browser, "ArrowDown", "ArrowDown", "ArrowUp", "ArrowLeft", "Enter")
        file = tmp_path / "saved" / "answers-anna.json"
        wait_for(file.is_file)
        assert {request.partition(":")[0] for request in browser.requests} <= {"file", "blob"}
    saved = json.loads(file.read_text())
    read_key(folder).check(saved)
    assert [entry["answer"] for entry in saved["answers"]] == ["left", "right", "left", "tie"]
