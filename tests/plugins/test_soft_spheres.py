"""A scene that is no NeRF, from one file outside of the package, docs/plugins/soft_spheres.py."""

import sys

import pytest
import torch

from fourdfy.config import ConfigError
from fourdfy.launching.cli import main
from fourdfy.launching.experiment import load_experiment
from tests.commands import CONFIGS, ROOT, TINY, trial

FILES = [CONFIGS / "shapes_stage_3.yaml", ROOT / "docs" / "plugins" / "soft_spheres.yaml"]
VIDEO_STEPS = ["data.prob_multi_view=0", "data.single_view.prob_single_view_video=1"]


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.setattr("sys.path", [*sys.path])


def launch(root, *words):
    files = [word for file in FILES for word in ("--config", str(file))]
    return main([*files, "--gpu", "cpu", f"exp_root_dir={root}", *TINY, *VIDEO_STEPS, *words])


def go_on(made, *words):
    return main(["--trial", str(made), "--gpu", "cpu", *words])


def state(made):
    return torch.load(made / "ckpts" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Four steps; after the gradients of step 1 each of the three spheres becomes two."""
    root = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.path", [*sys.path])
        given = ("trainer.max_steps=4", "system.scene.count=3", "system.scene.split_at=1")
        assert launch(root, "--train", *given) == 0
    return trial(root, "shapes_stage_3")


def test_it_trains_and_renders(whole):
    trained = state(whole)
    assert list(trained) == ["centers", "velocities", "colors", "sizes"]
    assert all(len(tensor) == 6 and tensor.isfinite().all() for tensor in trained.values())
    assert trained["velocities"].any(), "video steps teach it to move"
    assert (trained["sizes"] != 0.2).all()
    assert list((whole / "save").glob("it4-test*"))


def test_a_run_resumed_before_and_after_the_spheres_split_ends_as_a_whole_one(whole, tmp_path):
    given = ("system.scene.count=3", "system.scene.split_at=1")
    assert launch(tmp_path, "--train", *given, "trainer.max_steps=1") == 0
    made = trial(tmp_path, "shapes_stage_3")
    for steps in (3, 4):
        assert go_on(made, "--train", f"trainer.max_steps={steps}") == 0
    assert all(torch.equal(state(made)[name], value) for name, value in state(whole).items())


def test_another_stage_starts_from_as_many_spheres_as_the_file_holds(whole):
    given = [*TINY, *VIDEO_STEPS, "system.scene.count=2", f"system.weights={whole}/ckpts/last.ckpt"]
    system = load_experiment(FILES, given).build_system()
    system.load_weights(system.read_weights())
    assert torch.equal(system.scene.centers, state(whole)["centers"])


def test_tensors_that_no_rule_fits_are_refused_by_name(whole):
    system = load_experiment(FILES, [*TINY]).build_system()
    with pytest.raises(ConfigError, match=r"resume: colors has shape \[6, 4\], this config expects \[8, 3\]"):
        torn = state(whole) | {"colors": torch.zeros(6, 4)}
        system.load_checkpoint({"state_dict": torn, "global_step": 1})


def test_a_video_is_exported_and_a_mesh_refused(whole, capfd):
    assert go_on(whole, "--export", "system.exporter.alpha=true", "system.exporter.formats=[png]") == 0
    assert go_on(whole, "--export", "system.exporter_type=mesh-exporter") == 2
    assert "a SoftSpheres has no density to make a mesh of; use system.exporter_type=video" in (
        capfd.readouterr().err
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("system.loss.lambda_orient=1", "lambda_orient=1: needs normals, which this scene does not"),
        (
            "system.loss.lambda_z_variance=1",
            "needs z_variance, .* composited from samples",
        ),
        (
            "system.scene_type=soft-sphere",
            "no Scene is .* 'soft-sphere'; did you mean 'soft-spheres'",
        ),
        ("system.scene.counts=3", r"system\.scene\.counts.*did you mean 'count'"),
    ],
)
def test_what_it_cannot_serve_is_refused_by_name(given, message):
    with pytest.raises(ConfigError, match=message):
        load_experiment(FILES, [*TINY, *VIDEO_STEPS, given])


def test_a_group_of_a_part_that_it_lacks_is_refused_with_a_guess(tmp_path, capfd):
    assert launch(tmp_path, "--check", "system.optimizer.params.centres.lr=0.1") == 2
    assert "'centres' leads nowhere at 'centres'; did you mean 'centers'?" in capfd.readouterr().err


def test_each_step_trains_its_half():
    system = load_experiment(FILES, [*TINY]).build_system()
    assert list(system.parameters_outside(frozenset({"static"}))) == [system.scene.velocities]
    assert len([*system.parameters_outside(frozenset({"dynamic"}))]) == 3
