"""The data module: pure batches, evaluation chunks, and the original's keys."""

import itertools
import logging
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from fourdfy.config import ConfigError, parse_config
from fourdfy.data.base import DataModule
from fourdfy.data.datamodule import CombinedCameraDataModule
from fourdfy.registry import find

STILL = {"batch_size": [2, 1], "width": [8, 9], "height": [6, 7], "resolution_milestones": [5]}
CAMERAS = {
    "camera_distance_range": [2.5, 3],
    "fovy_range": [15, 60],
    "elevation_range": [0, 30],
    "camera_perturb": 0.0,
    "center_perturb": 0.0,
    "up_perturb": 0.0,
}
EVALUATION = {"eval_camera_distance": 3.0, "eval_fovy_deg": 40.0, "eval_height": 4, "eval_width": 5}
STAGE_3 = {
    "prob_multi_view": 0.5,
    "single_view": {
        **STILL,
        **CAMERAS,
        **EVALUATION,
        "static": False,
        "num_frames": 4,
        "simultan": True,
        "prob_single_view_video": 0.5,
        "width_vid": 10,
        "height_vid": 6,
        "sample_rand_frames": "t0",
        "num_frames_factor": 2,
        "test_traj": "motion_smooth",
    },
    "multi_view": {
        **STILL,
        **CAMERAS,
        "batch_size": [8, 4],
        "n_view": 4,
        "relative_radius": False,
        "num_frames": 4,
        "sample_rand_frames": "t0",
    },
}
KINDS = ("multi_view", "single_view", "video")


def make(given=STAGE_3, seed=0, choose_kind=lambda step: KINDS[step % 3]):
    cls = find("single-multiview-combined-camera-datamodule", DataModule)
    cfg = parse_config(cls.Config, given, "data")
    return cls(cfg, seed=seed, choose_kind=choose_kind, samplers=cfg.samplers())


def static(**single_view):
    inherited = {key: STAGE_3["single_view"][key] for key in (*STILL, *CAMERAS, *EVALUATION)}
    return {**STAGE_3, "single_view": {**inherited, "static": True, **single_view}}


def equal(first, second):
    return all(
        torch.equal(getattr(first, f.name), getattr(second, f.name))
        if isinstance(getattr(first, f.name), Tensor)
        else getattr(first, f.name) == getattr(second, f.name)
        for f in fields(first)
    )


def test_batches_are_a_pure_function_of_seed_and_step():
    torch.manual_seed(1)
    straight = [make().batch(step) for step in range(8)]
    torch.manual_seed(2)
    resumed = list(itertools.islice(make().train_dataloader(start_step=5), 3))
    assert [batch.step for batch in resumed] == [5, 6, 7]
    for late, early in zip(resumed, straight[5:], strict=True):
        assert late.kind == early.kind and equal(late.cameras, early.cameras)
    assert not equal(straight[0].cameras, make(seed=1).batch(0).cameras)
    assert not equal(straight[0].cameras, straight[3].cameras)


def test_the_parts_of_a_step_are_of_one_kind_with_cameras_of_their_own():
    batches = list(itertools.islice(make().train_dataloader(start_step=2, parts=2), 4))
    assert [(batch.step, batch.part) for batch in batches] == [(2, 0), (2, 1), (3, 0), (3, 1)]
    first, second = batches[:2]
    assert first.kind == second.kind and not equal(first.cameras, second.cameras)
    assert equal(first.cameras, make().batch(2).cameras)


def test_the_step_names_its_cameras():
    frames = {batch.kind: batch.cameras for batch in map(make().batch, range(3))}
    assert {name: (len(c), c.height, c.width) for name, c in frames.items()} == {
        "multi_view": (8, 6, 8),
        "single_view": (2, 6, 8),
        "video": (8, 6, 10),
    }
    later = make().batch(6).cameras
    assert (len(later), later.height, later.width) == (4, 7, 9)


def test_what_the_memory_plan_reads_is_what_is_drawn():
    data = make()
    for kind, sampler in data.samplers.items():
        step = KINDS.index(kind)
        drawn = [data.batch(at).cameras for at in (step, step + 60_000)]
        sizes = list(dict.fromkeys((len(c), c.height, c.width) for c in drawn))
        assert sampler.sizes() == sizes
        assert {c.group_size for c in drawn} == {sampler.group_size}


def test_evaluation_sequences_of_a_dynamic_stage():
    data = make()
    assert list(data.val_cameras(dynamic=True)) == ["val", "val_video"]
    assert len(data.val_cameras(dynamic=True)["val_video"]) == 8
    tests = data.test_cameras(dynamic=True)
    assert list(tests) == ["test", "test_static"]
    assert torch.equal(tests["test"].c2w, tests["test_static"].c2w)
    assert tests["test"].times.any() and not tests["test_static"].times.any()


def test_evaluation_sequences_of_a_static_stage():
    data = make(static(n_test_views=7))
    batches = list(data.val_dataloader()), list(data.test_dataloader())
    assert [{batch.split for batch in split} for split in batches] == [{"val"}, {"test"}]
    assert len(batches[1]) == 7


def test_evaluation_comes_in_chunks_that_cover_each_sequence():
    given = {**STAGE_3, "single_view": {**STAGE_3["single_view"], "eval_batch_size": 3}}
    data = make(given)
    for loader, sequences in (
        (data.val_dataloader(), data.val_cameras(dynamic=True)),
        (data.test_dataloader(), data.test_cameras(dynamic=True)),
    ):
        batches = list(loader)
        assert max(len(batch.cameras) for batch in batches) == 3
        for split, cameras in sequences.items():
            own = [batch for batch in batches if batch.split == split]
            for name, values in cameras.tensors().items():
                assert torch.equal(torch.cat([getattr(batch.cameras, name) for batch in own]), values)


def test_batches_move_to_a_device():
    data = make()
    for batch in (data.batch(0), next(iter(data.val_dataloader()))):
        assert equal(batch.to(torch.device("cpu")).cameras, batch.cameras)


def test_milestones_without_lists_are_said_to_have_no_effect(caplog):
    with caplog.at_level(logging.WARNING):
        make(static(width=8, height=8, batch_size=1)).cfg.check()
    assert "data.single_view.resolution_milestones: no effect" in caplog.text
    assert "multi_view" not in caplog.text


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("prob_multi_view", 1.5, "data.prob_multi_view: 1.5 is outside the range; expected 0 to 1"),
        ("single_view.test_traj", "smooth", "test_traj"),
        ("single_view.sample_rand_frames", "t1", "sample_rand_frames"),
        ("multi_view.n_views", 4, "did you mean 'n_view'"),
        ("single_view.light_sample_strategy", "sun", "light_sample_strategy"),
    ],
)
def test_wrong_settings_are_named(path, value, message):
    given = {key: dict(part) if isinstance(part, dict) else part for key, part in STAGE_3.items()}
    *parents, key = path.split(".")
    (given[parents[0]] if parents else given)[key] = value
    with pytest.raises(ConfigError, match=message):
        parse_config(CombinedCameraDataModule.Config, given, "data")


def test_the_parsed_config_builds_its_module():
    cfg = parse_config(CombinedCameraDataModule.Config, STAGE_3, "data")
    data = cfg.build(seed=0, choose_kind=lambda step: "video", samplers=cfg.samplers())
    assert data.batch(0).kind == "video"
