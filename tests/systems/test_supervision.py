"""The plan of a stage: the table of the paper's configs, and which step comes next."""

from collections import Counter

import pytest

from fourdfy.config import ConfigError
from fourdfy.systems.supervision import plan_supervision


def plan(pm, pv, *, simultan=True, static=False, freeze=False):
    return plan_supervision(
        prob_multi_view=pm,
        prob_single_view_video=pv,
        simultan=simultan,
        static=static,
        freeze_static_modules=freeze,
    )


@pytest.mark.parametrize(
    ("pm", "pv", "static", "expected"),
    [
        (1.0, None, True, {"multi_view": 1.0}),
        (0.5, None, True, {"multi_view": 0.5, "single_view": 0.5}),
        (0.5, 0.5, False, {"multi_view": 0.5, "single_view": 0.25, "video": 0.25}),
        (0.75, 1.0, False, {"multi_view": 0.75, "video": 0.25}),
        (0.5, 1.0, False, {"multi_view": 0.5, "video": 0.5}),
        (None, 1.0, False, {"video": 1.0}),
    ],
)
def test_probabilities_of_the_papers_stages(pm, pv, static, expected):
    steps = plan(pm, pv, simultan=not static, static=static).steps
    assert {step.name: step.probability for step in steps} == expected


def test_video_steps_need_simultan():
    assert [s.name for s in plan(0.5, 0.5, simultan=False).steps] == ["multi_view", "single_view"]


@pytest.mark.parametrize(
    ("static", "freeze", "kind", "trains"),
    [
        (True, False, "multi_view", {"static", "guidance"}),
        (True, True, "single_view", {"static", "guidance"}),
        (False, False, "multi_view", {"static", "guidance"}),
        (False, False, "single_view", {"static", "guidance"}),
        (False, False, "video", {"static", "dynamic", "guidance"}),
        (False, True, "multi_view", {"dynamic", "guidance"}),
        (False, True, "video", {"dynamic", "guidance"}),
    ],
)
def test_which_half_learns(static, freeze, kind, trains):
    assert plan(0.5, 0.0 if static else 0.5, static=static, freeze=freeze)[kind].trains == trains


def test_video_steps_have_a_sample_budget_of_their_own():
    assert {step.name: step.sample_budget for step in plan(0.5, 0.5).steps} == {
        "multi_view": "image",
        "single_view": "image",
        "video": "video",
    }


def test_the_next_step_is_a_pure_function_of_seed_and_step():
    steps = [plan(0.5, 0.5).choose(3, n).name for n in range(50)]
    assert steps == [plan(0.5, 0.5).choose(3, n).name for n in range(50)]
    assert steps != [plan(0.5, 0.5).choose(4, n).name for n in range(50)]


def test_steps_come_with_their_probabilities():
    chosen = plan(0.5, 0.5)
    counts = Counter(chosen.choose(0, n).name for n in range(4000))
    # three standard deviations of a binomial with n = 4000
    assert abs(counts["multi_view"] - 2000) < 95
    assert abs(counts["video"] - 1000) < 83


def test_video_steps_in_a_static_stage_are_refused():
    with pytest.raises(ConfigError, match="leaves video steps nothing to teach"):
        plan(0.5, 0.5, static=True)


def test_a_probability_above_1_is_refused():
    with pytest.raises(ConfigError, match=r"data\.prob_multi_view=1\.5"):
        plan(1.5, 0.0)
