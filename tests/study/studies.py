"""A small study of a few still clips, and raters' answers as its page would make them."""

import itertools
import json
import random
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import yaml

from fourdfy.files.images import write_video
from fourdfy.study.folder import ANSWERS, read_key, write_study

PROMPTS = ("a cube", "a ball")
QUESTIONS = {"text": "Which fits the text?", "overall": "Which is better?"}


@cache
def still(grey):
    """A webm of a tenth of a second."""
    with TemporaryDirectory() as folder:
        write_video(Path(folder) / "clip.webm", np.full((3, 32, 32, 3), grey, np.uint8), fps=30)
        return (Path(folder) / "clip.webm").read_bytes()


def write_clips(folder, methods, prompts=PROMPTS):
    """Method -> prompt -> a clip, each with its own grey."""
    found = {}
    for number, (method, prompt) in enumerate(itertools.product(methods, prompts)):
        file = folder / f"clip{number}.webm"
        file.write_bytes(still(10 + 7 * number))
        found.setdefault(method, {})[prompt] = str(file)
    return found


def study(folder, methods=("ours", "theirs"), prompts=PROMPTS, **settings):
    """The folder of a study."""
    given = {"methods": write_clips(folder, methods, prompts), "questions": QUESTIONS, "checks": 1, "port": 0}
    file = folder / "study.yaml"
    file.write_text(
        yaml.safe_dump({**given, "exp_root_dir": str(folder / "out"), **settings}, sort_keys=False)
    )
    write_study(file, [])
    return folder / "out"


def answers(folder, rater, choose, *, check="left"):
    """What a rater sends who saw every pair, the check being "left". ``choose(question, first, second)``
    names the preferred one of two methods, or neither."""
    key, entries = read_key(folder), []
    for pair in itertools.combinations(key.clips, 2):
        left, right = random.Random(rater).sample(pair, 2)
        methods = [key.clips[side].method for side in (left, right)]
        if key.clips[left].prompt == key.clips[right].prompt:
            for question in key.questions:
                best = choose(question, *methods)
                side = dict(zip(methods, ("left", "right"), strict=True)).get(best, "tie")
                entries.append({"left": left, "right": right, "question": question, "answer": side})
    checks = [{"expected": "left", "answer": check}]
    return {"study": key.study, "rater": rater, "answers": entries, "checks": checks}


def put(folder, *given):
    for number, each in enumerate(given):
        (folder / ANSWERS / f"{number}.json").write_text(json.dumps(each))
