"""A study's folder: ``site/``, all that raters get; ``key.json``, which tells whose clip is which; and
``answers/``, one JSON file of each rater, sent to ``--collect`` or put there by hand.

The site names no method. A clip's name is a hash of it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import imageio_ffmpeg

from fourdfy.config_files import ConfigError
from fourdfy.files.atomic import ELSEWHERE, write_whole
from fourdfy.pages.study import study_page
from fourdfy.study.settings import StudyConfig, read_study

SITE, KEY, ANSWERS = "site", "key.json", "answers"
PLAYED = ("h264", "vp8", "vp9", "av1")
"""What browsers play, by FFmpeg's names."""
CHOICES = ("left", "tie", "right")
MOST_LETTERS = 200
"""Of a rater's name; ``study.js`` cuts those of invitations."""


@dataclass(frozen=True)
class Clip:
    method: str
    prompt: str


@dataclass(frozen=True)
class Key:
    """``key.json``."""

    study: str
    """A hash of its clips, its questions and the number of its checks, which answers name."""
    methods: Sequence[str]
    questions: Sequence[str]
    clips: Mapping[str, Clip]
    checks: int
    """Attention checks of each rater."""
    port: int

    def check(self, answers: Any) -> None:
        """Refuse what the site can't have made.

        Raises:
            ValueError: says what is wrong.
        """
        if not isinstance(answers, dict) or answers.get("study") != self.study:
            raise ValueError("not answers of this study")
        rater = answers.get("rater")
        if not isinstance(rater, str) or not 0 < len(rater) <= MOST_LETTERS:
            raise ValueError(f"its rater has no name of 1 to {MOST_LETTERS} characters")
        for part in ("answers", "checks"):
            entries = answers.get(part)
            if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
                raise ValueError(f"its {part} are no list")
            if any(entry.get("answer") not in CHOICES for entry in entries):
                raise ValueError(f"its {part} have another answer than {', '.join(CHOICES)}")
        if not answers["answers"]:
            raise ValueError("it has no answers")
        if len(answers["checks"]) != self.checks:
            raise ValueError(f"it has {len(answers['checks'])} attention checks; expected {self.checks}")
        seen = set()
        for entry in answers["answers"]:
            left, right = (self.clips.get(str(entry.get(side))) for side in ("left", "right"))
            if not left or not right or left.prompt != right.prompt or left.method == right.method:
                raise ValueError("it compares clips that the study does not")
            if entry.get("question") not in self.questions:
                raise ValueError(f"the study does not ask {entry.get('question')!r}")
            seen.add((frozenset((entry["left"], entry["right"])), entry["question"]))
        if len(seen) < len(answers["answers"]):
            raise ValueError("it answers a question twice")


def write_study(file: Path, overrides: Sequence[str]) -> Path:
    """``--study``: write the folder and return the page.

    Raises:
        ConfigError: names the key and the file; or the folder has answers of another study.
        WriteError: it can't be written.
    """
    cfg, videos = read_study(file, overrides)
    clips, files = dict[str, Clip](), dict[str, bytes]()
    for method, of in videos.items():
        for prompt, video in of.items():
            if (codec := _codec(video)) not in PLAYED:
                kind = f"{codec} video" if codec else "no video"
                raise ConfigError(
                    f"methods.{method} ({file}): {video} is {kind}; browsers play {', '.join(PLAYED)}"
                )
            content = video.read_bytes()
            name = hashlib.sha256(content).hexdigest()[:16]
            if name in clips:
                other = clips[name]
                raise ConfigError(
                    f"methods ({file}): {video} is the same clip for {method}, {prompt!r} and for "
                    f"{other.method}, {other.prompt!r}"
                )
            clips[name], files[f"clips/{name}{video.suffix.lower()}"] = Clip(method, prompt), content
    asked = json.dumps([sorted(clips), cfg.questions, cfg.checks])
    study = hashlib.sha256(asked.encode()).hexdigest()[:16]
    folder = Path(cfg.exp_root_dir)
    if _answered(folder) - {study}:
        raise ConfigError(f"{folder} has answers of another study; {ELSEWHERE}")
    for old in (folder / SITE / "clips").glob("*"):
        if f"clips/{old.name}" not in files:
            old.unlink()  # of an earlier study, which raters should not get
    for name, content in files.items():
        write_whole(folder / SITE / name, content)
    page = folder / SITE / "index.html"
    write_whole(page, _page(cfg, study, clips, [*files]))
    key = Key(study, [*videos], [*cfg.questions], clips, cfg.checks, cfg.port)
    write_whole(folder / KEY, json.dumps(asdict(key), indent=1))
    (folder / ANSWERS).mkdir(exist_ok=True)
    return page


def _codec(video: Path) -> str:
    """Of a video; empty if it is none."""
    frames = imageio_ffmpeg.read_frames(str(video))
    try:
        return str(next(frames)["codec"])
    except (OSError, RuntimeError, LookupError, StopIteration):
        return ""
    finally:
        frames.close()


def _answered(folder: Path) -> set[str]:
    """The studies that the folder's answers are of; those that can't be read are of none."""
    found = set()
    for file in (folder / ANSWERS).glob("*"):
        with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            found.add(str(json.loads(file.read_text(encoding="utf-8"))["study"]))
    return found


def _page(cfg: StudyConfig, study: str, clips: Mapping[str, Clip], files: Sequence[str]) -> str:
    pairs = []
    for first, second in itertools.combinations(sorted(clips), 2):  # by hash: the order tells nothing
        if clips[first].prompt == clips[second].prompt:
            pairs.append((first, second, clips[first].prompt))
    return study_page(
        study,
        cfg.title,
        cfg.consent,
        cfg.instructions,
        questions=cfg.questions,
        pairs=pairs,
        clips={Path(name).stem: name for name in sorted(files)},
        comparisons=min(cfg.comparisons or len(pairs), len(pairs)),
        checks=cfg.checks,
    )


def read_key(folder: Path) -> Key:
    """Raises:
    ConfigError: there is none, or it is damaged.
    """
    try:
        given = json.loads((folder / KEY).read_text(encoding="utf-8"))
        return Key(**given | {"clips": {name: Clip(**clip) for name, clip in given["clips"].items()}})
    except OSError:
        raise ConfigError(f"{folder}: not a study (it has no {KEY}); launch.py --study makes one") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ConfigError(f"{folder / KEY} is damaged; the same --study command writes it anew") from None
