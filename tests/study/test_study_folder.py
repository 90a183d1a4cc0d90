"""What ``--study`` makes of a file, and what it refuses."""

import json
import re
from pathlib import Path

import pytest
import yaml

from fourdfy.config import ConfigError
from fourdfy.launching.cli import main
from fourdfy.study.folder import ANSWERS, KEY, SITE, read_key, write_study
from fourdfy.study.settings import QUESTIONS
from tests.pages.elements import EVIL, Found
from tests.study.studies import PROMPTS, answers, put, study, write_clips


def data_of(folder):
    text = (folder / SITE / "index.html").read_text()
    return json.loads(re.search(r'id="data">(.*)</script>\n', text)[1])


def test_the_site_has_all_pairs_of_a_prompt_and_names_no_method(tmp_path):
    folder = study(tmp_path, ["ours", "theirs", "third"])
    data, key = data_of(folder), read_key(folder)
    assert len(data["pairs"]) == data["comparisons"] == 3 * len(PROMPTS)
    assert all(key.clips[a].prompt == key.clips[b].prompt == prompt for a, b, prompt in data["pairs"])
    assert {(folder / SITE / address).is_file() for address in data["clips"].values()} == {True}
    site = b"".join(file.read_bytes() + file.name.encode() for file in (folder / SITE).rglob("*.*"))
    assert b"theirs" not in site and b"clip0" not in site
    assert [*data["clips"]] == sorted(data["clips"]), "an order would tell"
    assert all(first < second for first, second, _ in data["pairs"])


def test_the_six_questions_of_the_field_are_asked_unless_there_are_others(tmp_path):
    assert dict(data_of(study(tmp_path, questions={}))["questions"]) == QUESTIONS
    assert data_of(study(tmp_path, questions={"own": "Which?"}))["questions"] == [["own", "Which?"]]
    assert data_of(study(tmp_path, comparisons=1))["comparisons"] == 1


def test_what_is_typed_is_text_and_nothing_else(tmp_path):
    evil = {"title": EVIL, "consent": EVIL, "instructions": EVIL, "questions": {EVIL: EVIL}}
    folder = study(tmp_path, [EVIL, "ours"], [EVIL], **evil)
    found = Found((folder / SITE / "index.html").read_text())
    assert found.under("h1")[0] == EVIL and found.is_inert()
    put(folder, answers(folder, EVIL, lambda *_: EVIL))
    assert main(["--study-results", str(folder)]) == 0
    assert EVIL in Found((folder / "results.html").read_text()).under("th")[-1]


def test_trials_know_their_prompts_and_their_last_video(tmp_path):
    methods = {}
    prompts = ("a panda dancing", "a ball")
    for method, of in write_clips(tmp_path, ["ours", "theirs"], prompts).items():
        for prompt, video in of.items():
            trial = tmp_path / method / prompt.replace(" ", "_")
            (trial / "configs").mkdir(parents=True)
            (trial / "save").mkdir()
            given = "lib:panda_dancing" if prompt == "a panda dancing" else prompt  # a short name of it
            settings = {"system": {"prompt_processor": {"prompt": given}}}
            (trial / "configs" / "parsed.yaml").write_text(yaml.safe_dump(settings))
            (trial / "save" / "it9-test.mp4").write_bytes(b"an earlier one")
            (trial / "save" / "it10-test.mp4").write_bytes(Path(video).read_bytes())
            methods.setdefault(method, []).append(str(trial))
    folder = study(tmp_path, methods=("unused", "other"))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({"methods": methods, "exp_root_dir": str(folder)}))
    write_study(tmp_path / "study.yaml", [])
    assert {(clip.method, clip.prompt) for clip in read_key(folder).clips.values()} == {
        (method, prompt) for method in ("ours", "theirs") for prompt in prompts
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": {"ours": ["x"]}}, "methods .* expected two or more"),
        ({"methods": {"a": ["nowhere"], "b": []}}, "methods.a .* nowhere is not a trial folder"),
        ({"methods": {"a": {"p": "none.mp4"}, "b": 1}}, "methods.a .* none.mp4 does not exist"),
        ({"methods": {"a": {"p": 7}, "b": {}}}, "expected a list of trial folders"),
        ({"question": {}}, "question.*did you mean 'questions'"),
        ({"checks": -1}, "checks"),
    ],
)
def test_mistakes_in_the_file_cost_one_line_that_names_the_key(tmp_path, change, message):
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"methods": {"a": ["x"], "b": ["y"]}, **change}))
    with pytest.raises(ConfigError, match=message) as raised:
        write_study(tmp_path / "s.yaml", [])
    assert "\n" not in str(raised.value)


def test_a_missing_prompt_and_the_same_clip_twice_are_refused(tmp_path):
    clips = write_clips(tmp_path, ["ours", "theirs"])
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({"methods": {**clips, "theirs": {"a cube": clips["theirs"]["a cube"]}}}))
    with pytest.raises(ConfigError, match=r"methods.theirs .* no clip of 'a ball', which ours has"):
        write_study(file, [])
    file.write_text(yaml.safe_dump({"methods": {"ours": clips["ours"], "theirs": clips["ours"]}}))
    with pytest.raises(ConfigError, match="is the same clip"):
        write_study(file, [])


@pytest.mark.parametrize("content", [b"no video", b""])
def test_what_no_browser_plays_is_refused(tmp_path, content):
    folder = study(tmp_path)
    given = yaml.safe_load((tmp_path / "study.yaml").read_text())
    video = Path(given["methods"]["ours"][PROMPTS[0]])
    video.write_bytes(content)
    with pytest.raises(
        ConfigError, match=rf"^methods\.ours .*{video.name} is no video; browsers play h264, vp8, vp9, av1$"
    ):
        write_study(tmp_path / "study.yaml", [])
    assert folder.is_dir()


def test_clips_of_an_earlier_study_are_not_sent(tmp_path):
    folder = study(tmp_path, ["ours", "theirs", "third"])
    assert len([*(folder / SITE / "clips").iterdir()]) == 3 * len(PROMPTS)
    given = yaml.safe_load((tmp_path / "study.yaml").read_text())
    del given["methods"]["third"]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(given))
    write_study(tmp_path / "study.yaml", [])
    sent = {f"clips/{file.name}" for file in (folder / SITE / "clips").iterdir()}
    assert sent == {*data_of(folder)["clips"].values()} and len(sent) == 2 * len(PROMPTS)


def test_a_study_with_answers_is_not_replaced_by_another(tmp_path):
    folder = study(tmp_path)
    before = (folder / KEY).read_bytes()
    (folder / ANSWERS / "anna.JSON").write_text(json.dumps(answers(folder, "anna", lambda *_: "ours")))
    assert study(tmp_path, title="Another title") == folder, "texts may change"
    assert (folder / KEY).read_bytes() == before
    (folder / KEY).write_bytes(before[:40])
    with pytest.raises(ConfigError, match="is damaged; the same --study command writes it anew"):
        read_key(folder)
    assert study(tmp_path) == folder
    assert (folder / KEY).read_bytes() == before
    with pytest.raises(ConfigError, match="has answers of another study; write elsewhere: exp_root_dir=DIR"):
        study(tmp_path, questions={"own": "Which?"})
    assert main(["--study", str(tmp_path / "study.yaml"), f"exp_root_dir={tmp_path / 'elsewhere'}"]) == 0
    assert (tmp_path / "elsewhere" / ANSWERS).is_dir()
