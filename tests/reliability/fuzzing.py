"""Hostile input, drawn from a seed: what the readers of foreign files and words make of it, counted.

    python -m tests.reliability.fuzzing 1000                 # of each subject
    python -m tests.reliability.fuzzing 200 yaml prompts

A case passes if it is accepted, or refused by a ``ConfigError`` of one short line, within ``SECONDS``; and if
no planted code ran and no secret of the environment came out.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

from fourdfy.config import ConfigError

SECONDS = 10
SECRET = "hunter2-the-secret"
PLANTED = "planted-code-ran"
SUBJECTS = ("checkpoints", "safetensors", "folders", "yaml", "resolvers", "prompts", "sizes")


@dataclass
class Case:
    """One input: a ``name`` to find it by, and what reads it, whose result must not hold ``SECRET``."""

    name: str
    read: Callable[[], Any]


@dataclass
class Tally:
    subject: str
    accepted: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    """Each case that did not pass, with what came of it."""
    slowest: float = 0.0
    slowest_case: str = ""

    def __str__(self) -> str:
        count = self.accepted + self.refused + len(self.wrong)
        return (
            f"{self.subject:<12} {count:>6} cases: {self.accepted} accepted, {self.refused} refused, "
            f"{len(self.wrong)} wrong; the slowest took {self.slowest:.1f} s ({self.slowest_case!r})"
        )


class TooSlow(BaseException):
    """Not an ``Exception``: nothing on the way may take it for a broken file."""


def run(subject: str, count: int, seed: int = 0) -> Tally:
    """Try ``count`` cases of a subject, in the main thread; the same ones for the same seed."""
    draw = import_module(f"tests.reliability.hostile_{subject}").draw
    tally, random = Tally(subject), Random(f"{subject} {seed}")
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(count):
            case = draw(random, Path(place))
            began = time.monotonic()
            wrong, is_refused = judge(case.read)
            if (took := time.monotonic() - began) > tally.slowest:
                tally.slowest, tally.slowest_case = took, case.name[:60]
            if [*Path(place).rglob(PLANTED)]:
                wrong = "planted code ran"
            if wrong:
                tally.wrong.append(f"{subject} {number} ({case.name[:100]!r}): {wrong}")
            elif is_refused:
                tally.refused += 1
            else:
                tally.accepted += 1
    return tally


def judge(read: Callable[[], Any]) -> tuple[str, bool]:
    """(What went wrong, or "", and whether the input was refused) when ``read`` is called."""
    text, is_refused = "", False
    before = signal.signal(signal.SIGALRM, _stop)
    signal.alarm(SECONDS)
    try:
        text = repr(read())
    except ConfigError as error:
        text, is_refused = str(error), True
    except BaseException as error:  # TooSlow, SystemExit and a library's panic too
        calls = traceback.extract_tb(error.__traceback__)[-4:]
        where = " ".join(f"{Path(call.filename).name}:{call.lineno}" for call in calls)
        return f"{type(error).__name__}: {str(error)[:200]!r} in {where}", False
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    if SECRET in text:
        return f"the secret came out: {text[:200]!r}", is_refused
    is_long = is_refused and ("\n" in text or len(text) > 5000)
    return (f"not one short line: {text[:200]!r}" if is_long else ""), is_refused


def _stop(*_: Any) -> None:
    raise TooSlow(f"after {SECONDS} s")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("count", type=int)
    parser.add_argument("subjects", nargs="*", default=SUBJECTS, help=", ".join(SUBJECTS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    most = 16 * 2**30
    resource.setrlimit(
        resource.RLIMIT_AS, (most, most)
    )  # what takes more fails, and does not fill the machine
    is_wrong = False
    for subject in args.subjects:
        tally = run(subject, args.count, args.seed)
        sys.stdout.write("\n  ".join((str(tally), *tally.wrong)) + "\n")
        sys.stdout.flush()
        is_wrong |= bool(tally.wrong)
    return is_wrong


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.exit(main())
