"""The short form of the fuzzers; ``python -m tests.reliability.fuzzing COUNT`` is the long one."""

import pytest

from fourdfy.config import ConfigError
from tests.reliability.fuzzing import SECRET, judge, run

COUNTS = {
    "checkpoints": 40, "safetensors": 15, "folders": 12, "yaml": 12, "resolvers": 10,
    "prompts": 6, "sizes": 8,
}  # fmt: skip


@pytest.mark.parametrize("subject", COUNTS)
def test_hostile_input_is_taken_or_refused_in_one_line(subject):
    tally = run(subject, COUNTS[subject])
    assert not tally.wrong
    assert tally.accepted + tally.refused == COUNTS[subject]


@pytest.mark.parametrize(
    ("error", "wrong"),
    [
        (ConfigError("a line"), ""),
        (ConfigError("two\nlines"), "not one short line"),
        (ValueError("x"), "ValueError: 'x'"),
    ],
)
def test_a_reader_is_judged_by_how_it_refuses(error, wrong):
    def read():
        raise error

    assert judge(read)[0].startswith(wrong) and bool(judge(read)[0]) == bool(wrong)
    assert judge(lambda: SECRET)[0].startswith("the secret came out")
