"""A further kind of step that comes from one file outside of the package, docs/plugins/reference_image.py."""

import csv
import sys
from dataclasses import replace

import imageio.v3 as imageio
import numpy as np
import pytest
import torch

from fourdfy.config import ConfigError
from fourdfy.launching.cli import main
from fourdfy.launching.experiment import load_experiment
from tests.commands import CONFIGS, ROOT, TINY, trial

PLUGIN = ROOT / "docs" / "plugins" / "reference_image.yaml"
FILES = [CONFIGS / "shapes_stage_1.yaml", PLUGIN]
SMALL = ["steps.reference.cameras.size=16"]


@pytest.fixture
def photo(tmp_path, monkeypatch):
    """A red disc on white, as an override that names it."""
    monkeypatch.setattr("sys.path", [*sys.path])
    row, column = np.mgrid[:32, :32]
    disc = (row - 15.5) ** 2 + (column - 15.5) ** 2 < 80
    pixels = np.where(disc[..., None], [200, 30, 30], 255).astype(np.uint8)
    imageio.imwrite(tmp_path / "photo.png", pixels)
    return f"steps.reference.guidance.image={tmp_path}/photo.png"


def launch(tmp_path, *words):
    files = [word for file in FILES for word in ("--config", str(file))]
    return main([*files, "--gpu", "cpu", f"exp_root_dir={tmp_path}", *TINY, *words])


def curves(made):
    with open(made / "csv_logs" / "version_0" / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_it_takes_its_share_beside_the_original_s_kinds(tmp_path, photo, capfd):
    assert launch(tmp_path, "--check", photo) == 0
    plan = capfd.readouterr().out
    assert "multi_view   probability 0.7 " in plan
    assert "reference    probability 0.3   1 frame of 64 x 64, trains static" in plan
    assert "image-reconstruction" in plan


def test_it_trains_and_resumes_and_the_trial_needs_nothing_more(tmp_path, photo):
    given = [
        photo,
        "trainer.max_steps=8",
        *SMALL,
        "steps.reference.probability=0.5",
    ]
    assert launch(tmp_path / "whole", "--train", *given) == 0
    assert launch(tmp_path / "cut", "--train", *given, "trainer.max_steps=3") == 0
    assert main(["--trial", str(trial(tmp_path / "cut", "shapes_stage_1")), "--train", "--gpu", "cpu",
                 "trainer.max_steps=8"]) == 0  # fmt: skip
    whole, cut = (trial(tmp_path / part, "shapes_stage_1") for part in ("whole", "cut"))
    seen = {key for row in curves(whole) for key, value in row.items() if value}
    assert {"loss/reference/image", "reference/psnr", "loss/multi_view/sds"} <= seen
    states = [
        torch.load(made / "ckpts" / "last.ckpt", weights_only=True)["state_dict"] for made in (whole, cut)
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_alone_it_makes_the_front_look_like_the_picture(tmp_path, photo):
    given = [
        photo,
        "steps.reference.probability=1",
        *SMALL,
        "trainer.max_steps=60",
        "system.renderer.num_samples_per_ray=24",
        "system.optimizer.params.geometry.lr=0.02",
    ]
    assert launch(tmp_path, "--train", *given) == 0
    psnr = [float(row["reference/psnr"]) for row in curves(trial(tmp_path, "shapes_stage_1"))]
    assert np.mean(psnr[-5:]) > np.mean(psnr[:5]) + 3


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("steps.reference.probability=1.5", r"steps\.reference\.probability.*1\.5 is outside the range"),
        (
            "steps.reference.cameras_type=front-camra",
            "cameras_type.*did you mean 'front-camera'",
        ),
        ("steps.reference.cameras.sise=3", r"steps\.reference\.cameras\.sise.*did you mean 'size'"),
        ("steps.reference.guidance_type=null", r"steps\.reference\.guidance: missing, and reference steps"),
        ("steps.reference.probabilty=0.1", r"steps\.reference\.probabilty.*did you mean 'probability'"),
        (
            "steps.reference.loss.lambda_imagee=1",
            "lambda_imagee=1: there is no such loss; known: ",
        ),
        ("steps.reference.trains=[moving]", r"steps\.reference\.trains"),
        ("system.scene.count=3", r"^system\.scene_type: missing; one of "),
    ],
)
def test_what_is_wrong_with_it_is_said_with_its_key(word, message, photo):
    with pytest.raises(ConfigError, match=message):
        load_experiment(FILES, [*TINY, photo, word])


def test_it_is_switched_off_like_any_entry(photo):
    this = load_experiment(FILES, [*TINY, photo, "steps.reference=null", "system.loss.lambda_image=0"])
    assert [kind.name for kind in this.plan.kinds] == ["multi_view"]


def test_its_weights_differ_from_those_of_other_steps_where_it_says_so(photo):
    this = load_experiment(FILES, [*TINY, photo, "steps.reference.loss.lambda_sparsity=7"])
    assert this.plan["reference"].loss_weights(0)["sparsity"] == 7
    assert this.plan["multi_view"].loss_weights(0).get("sparsity") != 7


def test_a_guidance_without_any_weight_is_refused(photo):
    this = load_experiment(FILES, [*TINY, photo])
    kinds = tuple(replace(kind, loss={"lambda_sds": 1.0}) for kind in this.plan.kinds)
    message = r"^steps\.reference\.guidance: none of its losses .* set system\.loss\.lambda_image$"
    with pytest.raises(ConfigError, match=message):
        this.cfg.system.check(this.cfg.data, replace(this.plan, kinds=kinds))


@pytest.mark.parametrize("name", ["nowhere.png", "text.png"])
def test_a_picture_that_can_not_be_read_is_named(name, tmp_path, photo, capfd):
    (tmp_path / "text.png").write_text("not a picture", encoding="utf-8")
    given = [f"steps.reference.guidance.image={tmp_path / name}", *SMALL]
    assert launch(tmp_path, "--train", *given) == 2
    assert f"error: steps.reference.guidance: image={tmp_path / name} can't be read" in capfd.readouterr().err
