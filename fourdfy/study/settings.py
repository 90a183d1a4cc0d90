"""``STUDY.yaml``: whose clips are compared, and what raters are asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fourdfy.bounds import number
from fourdfy.config import Schema, file_path, parse_config
from fourdfy.config_files import PROMPT, ConfigError, expand_path, plain, read_layers
from fourdfy.config_layers import load_config
from fourdfy.pages.settings import flat
from fourdfy.pages.trials import video_of_test
from fourdfy.prompts.library import resolve_prompt

VIDEOS = (".mp4", ".webm")
QUESTIONS = {
    "appearance": "Which clip looks better, in a single image of it?",
    "structure": "In which clip is the 3D shape more plausible?",
    "quality of motion": "In which clip is the motion more realistic?",
    "amount of motion": "In which clip is there more motion?",
    "text": "Which clip matches the text better?",
    "overall": "Which clip do you prefer overall?",
}
CONSENT = """Taking part is voluntary, and you can stop at any time by closing this page. Your answers, and
when you gave them, are kept without your name; nothing else is."""
INSTRUCTIONS = """You will see pairs of short clips, each made by a computer from the text above it. Watch
both to their end, then answer each question. Choose "about the same" if you see no difference that
matters."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig(Schema):
    """A study's file. Texts are plain; an empty line begins a paragraph."""

    methods: dict[str, Any] = field(default_factory=dict)
    """Name -> its clips: a mapping from prompts to videos (mp4 or webm) or trial folders, or a list of trial
    folders, which know their prompts. All methods have the same prompts."""
    title: str = "Which clip is better?"
    """What raters read first, with the next two."""
    consent: str = CONSENT
    """What they agree to."""
    instructions: str = INSTRUCTIONS
    """What they are asked to do."""
    questions: dict[str, str] = field(default_factory=dict)
    """Name in the results -> what raters read. Empty: ``QUESTIONS``, six that are usual."""
    comparisons: int = number(0, 0)
    """Of each rater, drawn at random from all pairs of methods and all prompts; 0: all of them."""
    checks: int = number(2, 0, 20)
    """Questions for each rater that say what to answer. The results leave out raters who fail one."""
    port: int = number(8770, 0, 65535)
    """Of ``--collect``; 0: any free one."""
    exp_root_dir: str = file_path("outputs/study")
    """The study's folder."""


def read_study(file: Path, overrides: Sequence[str]) -> tuple[StudyConfig, dict[str, dict[str, Path]]]:
    """The settings, and method -> prompt -> video.

    Raises:
        ConfigError: names the key and the file.
    """
    loaded = load_config([file], overrides, schema=StudyConfig)
    cfg: StudyConfig = parse_config(StudyConfig, loaded.values, sources=loaded.sources)
    if len(cfg.methods) < 2:
        raise ConfigError(
            f"methods ({file}): expected two or more, each with its clips, such as ours: [TRIAL]"
        )
    clips = {method: _clips(f"methods.{method} ({file})", given) for method, given in cfg.methods.items()}
    (first, prompts), *others = clips.items()
    for other, of in others:
        if odd := prompts.keys() ^ of.keys():
            prompt = min(odd)
            has, lacks = (first, other) if prompt in prompts else (other, first)
            raise ConfigError(
                f"methods.{lacks} ({file}): no clip of {prompt!r}, which {has} has; add or drop it"
            )
    return replace(cfg, questions=cfg.questions or QUESTIONS), clips


def _clips(key: str, given: Any) -> dict[str, Path]:
    expected = (
        f"{key}: expected a list of trial folders, or a mapping from prompts to videos or trial folders"
    )
    if not isinstance(given, list | Mapping) or not given:
        raise ConfigError(f"{expected}; got {given!r}")
    named = given.items() if isinstance(given, Mapping) else [(None, path) for path in given]
    clips: dict[str, Path] = {}
    for prompt, path in named:
        if not isinstance(path, str):
            raise ConfigError(f"{expected}; got {path!r}")
        try:
            place = Path(expand_path(path, is_typed=False))
        except ValueError as error:
            raise ConfigError(f"{key}: {error}") from error
        prompt = _prompt(key, place) if prompt is None else str(prompt)
        if prompt in clips:
            raise ConfigError(f"{key}: two trials of {prompt!r}; a method has one clip of each prompt")
        clips[prompt] = _video(key, place)
    return clips


def _prompt(key: str, trial: Path) -> str:
    file = trial / "configs" / "parsed.yaml"
    if not file.is_file():
        raise ConfigError(f"{key}: {trial} is not a trial folder; for videos, write PROMPT: VIDEO")
    given = flat(plain(read_layers(file)[-1]))  # complete, and no code of plugins is run
    try:
        return resolve_prompt(str(given.get(PROMPT, "")))
    except ValueError as error:
        raise ConfigError(f"{key}: {PROMPT} in {file}: {error}") from error


def _video(key: str, path: Path) -> Path:
    video = video_of_test(path) if path.is_dir() else path
    if video is None:
        raise ConfigError(
            f"{key}: {path} has no video of test views; launch.py --trial {path} --test makes it"
        )
    if not video.is_file() or video.suffix.lower() not in VIDEOS:
        problem = f"has none of the formats {' and '.join(VIDEOS)}" if video.is_file() else "does not exist"
        raise ConfigError(f"{key}: {video} {problem}; expected a video or a trial folder")
    return video
