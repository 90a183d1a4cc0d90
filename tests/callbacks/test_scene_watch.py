"""What is said of scenes that have come to nothing, and that nothing is said of others."""

import csv

import pytest
import torch

import fourdfy
from fourdfy.callbacks import scene_watch
from fourdfy.callbacks.curves import Curves
from fourdfy.callbacks.scene_watch import SceneWatch
from fourdfy.data.base import EvalBatch
from fourdfy.evaluation.scenes import evaluate_scene, ground_truth
from fourdfy.launching.experiment import load_experiment
from fourdfy.ops.cameras import orbit_cameras
from fourdfy.shapes.grammar import parse_prompt
from fourdfy.systems.base import WandbConfig
from fourdfy.types import RenderOutput
from tests.commands import CONFIGS, TINY
from tests.runs import new_run

ZERO = torch.zeros(1).expand(4)
CAMERAS = orbit_cameras(ZERO, ZERO, distance=3.0, fovy_deg=40.0, times=ZERO, height=32, width=32)


def square(opacity=1.0, around=0.0, shift=0):
    """Four frames of a square that is a quarter of the image, ``shift`` pixels further in each."""
    image = torch.full((4, 32, 32, 1), around)
    for n, frame in enumerate(image):
        frame[8:24, n * shift : n * shift + 16] = opacity
    return RenderOutput(comp_rgb=image.expand(-1, -1, -1, 3), opacity=image, depth=image)


def told(caplog, step=150, max_steps=300, hook="after_validation", **frames):
    watch, run = SceneWatch(), new_run(step=step, max_steps=max_steps)
    for _ in range(2):  # the second validation says nothing new
        for split, shown in frames.items():
            watch.after_frames(run, EvalBatch(split=split, cameras=CAMERAS), shown, done=1, total=1)
        getattr(watch, hook)(run)
    return [message.partition("; ")[0] for message in caplog.messages]


EMPTY, FOG, STILL = "the scene is empty", "fog fills the whole scene", "the scene does not move"


@pytest.mark.parametrize(
    ("shown", "said"),
    [
        (square(), []),
        (square(opacity=0.02), []),
        (square(opacity=0.0), [EMPTY]),
        (square(opacity=0.001), [EMPTY]),
        (square(around=1.0), [FOG]),
        (square(around=0.3), [FOG]),
    ],
)
def test_empty_and_full_scenes(shown, said, caplog):
    assert told(caplog, val=shown) == [f"step 150: {problem}" for problem in said]


@pytest.mark.parametrize(
    ("frames", "said"),
    [
        ({"val_video": square()}, [STILL]),
        ({"val_video": square(shift=4)}, []),
        ({"test": square(shift=4), "test_static": square()}, []),
        ({"test": square(shift=4), "test_static": square(shift=4)}, [STILL]),
        ({"test": square()}, []),  # a static stage
    ],
)
def test_scenes_that_should_move(frames, said, caplog):
    assert told(caplog, hook="after_test", **frames) == [f"step 150: {problem}" for problem in said]


def test_validations_log_how_much_the_scene_moves(tmp_path):
    """In the row of the step before it, if that is logged; a static stage logs nothing."""
    run, curves = new_run(step=0), Curves(tmp_path, 1, WandbConfig(), {})
    watch, clip = SceneWatch(curves), EvalBatch(split="val_video", cameras=CAMERAS)
    still = EvalBatch(split="val", cameras=CAMERAS)
    curves.begin(run)
    for batch, shown, step in (
        (clip, square(), 3),
        (clip, square(opacity=0.75, shift=4), 4),
        (still, square(), 5),
    ):
        run.system.step = step
        run.means.add({"loss/video/sds": 0.5})
        curves.after_step(run)
        watch.after_frames(run, batch, shown, done=1, total=1)
        watch.after_validation(run)
    curves.end(run, None)
    with open(tmp_path / "csv_logs" / "version_0" / "metrics.csv") as file:
        rows = [*csv.DictReader(file)]
    assert [(row["step"], row["loss/video/sds"], row["validation/motion"]) for row in rows] == [
        ("2", "0.5", "0.0"), ("3", "0.5", "0.75"), ("4", "0.5", ""),
    ]  # fmt: skip


@pytest.mark.parametrize("lengths", [(149, 300), (99, 99)])
def test_a_scene_may_be_still_in_the_first_half_of_its_training_and_in_a_short_one(lengths, caplog):
    assert told(caplog, *lengths, val_video=square()) == []


def train(config, root, *overrides):
    given = [*TINY, f"exp_root_dir={root}", *overrides]
    fourdfy.train(config, given, device="cpu")


@pytest.mark.parametrize(
    ("config", "planted", "said"),
    [
        ("shapes_stage_1", [], []),
        ("shapes_stage_1", ["system.geometry.density_bias=-100"], [EMPTY]),
        (
            "shapes_stage_3",
            [
                "system.geometry.density_bias=100.0",
                "system.guidance_video.grad_clip=0",
                "data.prob_multi_view=0",
                "data.single_view.prob_single_view_video=1",
            ],
            ["system.guidance_video: no gradient of its losses reaches the images", FOG, STILL],
        ),
    ],
)
def test_planted_in_a_run(config, planted, said, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(scene_watch, "MOVING", 1)
    train(config, tmp_path, "trainer.max_steps=1", *planted)
    messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    problems = [message.removeprefix("step 1: ").partition("; ")[0] for message in messages]
    assert [
        problem for problem in problems if problem in (EMPTY, FOG, STILL) or "gradient" in problem
    ] == said


@pytest.mark.parametrize("config", ["shapes_stage_3", "fourdfy_stage_3", "fourdfy_stage_3_vc"])
def test_every_key_that_is_named_exists(config):
    loaded = load_experiment([CONFIGS / f"{config}.yaml"], ["system.prompt_processor.prompt=a red cube"]).cfg
    for key in (
        "system.loss",
        "system.optimizer.params",
        "system.geometry.density_blob_scale",
        "system.background.random_aug",
        "data.single_view.prob_single_view_video",
        "system.guidance_video.motion_amp_scale",
        "system.guidance_video.grad_clip",
    ):
        node = loaded
        for part in key.split("."):
            node = getattr(node, part)


def test_an_evaluation_says_it_too(caplog):
    evaluate_scene("a red cube spinning", ground_truth(parse_prompt("a red cube spinning")))
    assert not caplog.messages
    nothing = torch.zeros(24, 64, 64, 3), torch.zeros(24, 64, 64, 1)
    evaluate_scene("a red cube spinning", lambda cameras: tuple(x[: len(cameras)] for x in nothing))
    assert caplog.messages[0].startswith(f"a red cube spinning: {EMPTY}; lower system.loss.lambda_sparsity")
