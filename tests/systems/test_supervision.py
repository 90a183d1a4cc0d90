"""The plan of a stage: the table of the paper's configs, and which step comes next."""

from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from fourdfy.config import Component, ConfigError, parse_config
from fourdfy.data.base import CameraSampler
from fourdfy.data.datamodule import CombinedCameraDataModule
from fourdfy.guidance.base import Guidance
from fourdfy.systems.supervision import StepConfig, plan_supervision


class Textless(Guidance):
    @dataclass(frozen=True, kw_only=True)
    class Config(Guidance.Config):
        reads_text = False


class Front(CameraSampler):
    @dataclass(frozen=True, kw_only=True)
    class Config(Component.Config):
        pass

    def sample(self, context):
        raise NotImplementedError

    def sizes(self):
        return [(1, 4, 4)]


TEXTLESS, FRONT = Textless.Config(), Front.Config()


def plan(pm, pv, *, simultan=True, static=False, freeze=False, steps=None):
    single = {"static": static, "simultan": simultan, "prob_single_view_video": pv, "num_frames": 2}
    data = parse_config(
        CombinedCameraDataModule.Config, {"prob_multi_view": pm, "single_view": single}, "data"
    )
    data.check()
    parts = {
        f"{key}{suffix}": part
        for suffix in ("", "_multi_view", "_video")
        for key, part in {"guidance": TEXTLESS, "guidance_type": "a", "prompt_processor": None}.items()
    }
    system = SimpleNamespace(freeze_static_modules=freeze, loss={}, **parts)
    return plan_supervision(system, data, steps)


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
    kinds = plan(pm, pv, simultan=not static, static=static).kinds
    assert {kind.name: kind.probability for kind in kinds} == expected


def test_video_steps_need_simultan():
    assert [s.name for s in plan(0.5, 0.5, simultan=False).kinds] == ["multi_view", "single_view"]


@pytest.mark.parametrize(
    ("static", "freeze", "kind", "trains"),
    [
        (True, False, "multi_view", {"static"}),
        (True, True, "single_view", {"static"}),
        (False, False, "multi_view", {"static"}),
        (False, False, "single_view", {"static"}),
        (False, False, "video", {"static", "dynamic"}),
        (False, True, "multi_view", {"dynamic"}),
        (False, True, "video", {"dynamic"}),
    ],
)
def test_which_half_learns(static, freeze, kind, trains):
    assert plan(0.5, 0.0 if static else 0.5, static=static, freeze=freeze)[kind].trains == trains


def test_video_steps_have_a_budget_of_their_own():
    assert {kind.name: kind.budget for kind in plan(0.5, 0.5).kinds} == {
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
    with pytest.raises(ConfigError, match="leaves video steps nothing to train"):
        plan(0.5, 0.5, static=True)


def step(probability, **given):
    given = {"cameras": FRONT, "guidance_type": "textless", "guidance": TEXTLESS} | given
    return StepConfig(probability=probability, **given)


def test_further_kinds_take_their_share_and_the_others_divide_the_rest():
    chosen = plan(0.5, 0.5, steps={"reference": step(0.2), "unused": step(0.0), "off": None})
    shares = {kind.name: kind.probability for kind in chosen.kinds}
    assert shares == pytest.approx({"multi_view": 0.4, "single_view": 0.2, "video": 0.2, "reference": 0.2})
    counts = Counter(chosen.choose(0, n).name for n in range(2000))
    assert abs(counts["reference"] - 400) < 54  # three standard deviations


def test_a_further_kind_says_what_it_trains_or_trains_what_images_do():
    steps = {"a": step(0.1), "b": step(0.1, trains=["static", "dynamic"])}
    assert plan(0.5, 0.5, steps=steps)["a"].trains == {"static"}
    assert plan(0.5, 0.5, steps=steps)["b"].trains == {"static", "dynamic"}
    assert plan(0.5, 0.5, freeze=True, steps=steps)["a"].trains == {"dynamic"}
    assert plan(0.5, 0.0, static=True, steps=steps)["b"].trains == {"static", "dynamic"}  # in a later stage
    assert plan(0.5, 0.5, steps={"c": step(0.1, trains=[])})["c"].trains == set()  # its guidance's alone


@pytest.mark.parametrize(
    ("static", "freeze", "asked", "expected"),
    [(True, False, "dynamic", "static"), (False, True, "static", "dynamic")],
)
def test_a_further_kind_that_would_teach_the_scene_nothing_is_refused(static, freeze, asked, expected):
    message = rf"^steps\.c\.trains=\['{asked}'\]: nothing of it learns .*; expected one of {expected}"
    of_stage = {"static": static, "freeze": freeze}
    with pytest.raises(ConfigError, match=message):
        plan(0.5, 0.0 if static else 0.5, **of_stage, steps={"c": step(0.1, trains=[asked])})
    plan(0.5, 0.0 if static else 0.5, **of_stage, steps={"c": step(0.0, trains=[asked])})  # of another stage


def test_a_further_kind_may_have_the_cameras_of_another():
    chosen = plan(0.5, 0.5, steps={"second": step(0.1, cameras=None, cameras_of="video", budget="video")})
    assert chosen["second"].cameras == chosen["video"].cameras
    assert chosen["second"].cameras.group_size == 2


def test_a_further_kind_may_weigh_losses_otherwise():
    loss = {"lambda_sds": [10, 0.0, 3.0, 11]}
    chosen = plan(0.5, 0.5, steps={"a": step(0.1, loss=loss)})
    assert chosen["a"].loss_weights(10) == {} and chosen["a"].loss_weights(11) == {"sds": 3.0}
    assert chosen["video"].loss_weights(11) == {}


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ({"a": step(0.1, cameras=None, cameras_of="vdeo")}, "steps.a.cameras_of=vdeo: .*single_view, video"),
        ({"a": step(0.1, cameras_of="video")}, "steps.a: cameras_of and cameras_type exclude each other"),
        ({"a": step(0.7), "b": step(0.4)}, r"steps: the probabilities of a, b exceed 1 by 0\.1"),
        ({"video": step(0.1)}, r"steps\.video: the original's keys describe this kind"),
    ],
)
def test_shares_that_exceed_1_and_names_that_are_taken_are_refused(steps, message):
    with pytest.raises(ConfigError, match=message):
        plan(0.5, 0.5, steps=steps)


def test_shares_that_make_1_leave_nothing_to_the_other_kinds():
    steps = {"a": step(0.2), "b": step(0.7), "c": step(0.1)}  # 1.1e-16 below 1 in floats
    assert [kind.name for kind in plan(0.5, 0.5, steps=steps).kinds] == ["a", "b", "c"]


def test_an_unknown_kind_is_named():
    with pytest.raises(KeyError, match="no kind of step 'panorama'; the plan has multi_view, single_view"):
        plan(0.5, 0.0)["panorama"]
