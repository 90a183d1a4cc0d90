"""The evaluation of creatures knows the truth, and every planted defect by its number."""

import io
from dataclasses import asdict, replace
from functools import cache

import pytest
import torch
from rich.console import Console

from fourdfy.evaluation import creatures
from fourdfy.evaluation.creatures import evaluate_creature, ground_truth
from fourdfy.evaluation.frames import BACKGROUND, Frames, orbit
from fourdfy.evaluation.report import (
    CreatureReport,
    ShapesReport,
    brief,
    print_report,
    read_report,
    summary_tables,
    write_json,
)
from fourdfy.evaluation.scenes import evaluate_scene
from fourdfy.evaluation.scenes import ground_truth as any_truth
from fourdfy.ops.cameras import orbit_cameras
from fourdfy.shapes.creature_prompts import parse_creature
from fourdfy.shapes.prompts import parse

DANCING = "a panda dancing"


@pytest.fixture(autouse=True)
def few_views(monkeypatch):
    monkeypatch.setattr(creatures, "VIEWS_DEG", (0.0, 120.0, 240.0))


@cache
def report(text, change=None):
    truth = ground_truth(parse_creature(text), supersample=1)
    return evaluate_creature(parse_creature(text), change(truth) if change else truth, supersample=1)


def frozen(truth):
    return lambda cameras: truth(replace(cameras, times=torch.zeros_like(cameras.times)))


def two_faced(truth):
    """The front half of the creature from both sides."""

    def render(cameras):
        behind = torch.deg2rad(cameras.azimuth_deg).cos() < 0
        azimuth = torch.where(behind, cameras.azimuth_deg - 180, cameras.azimuth_deg)
        turned = orbit_cameras(
            cameras.elevation_deg,
            azimuth,
            distance=cameras.distances,
            fovy_deg=cameras.fovy_deg,
            times=cameras.times,
            height=cameras.height,
            width=cameras.width,
        )
        return truth(turned)

    return render


def greyed(truth):
    def render(cameras):
        rgb, opacity = truth(cameras)
        return rgb.mean(dim=-1, keepdim=True).expand_as(rgb), opacity

    return render


def empty(truth):
    def render(cameras):
        rgb, opacity = truth(cameras)
        return torch.full_like(rgb, 0.8), torch.zeros_like(opacity)

    return render


@pytest.mark.parametrize("text", [DANCING, "a red dog waving", "a fish jumping", "a robot standing still"])
def test_the_truth_is_right_in_everything(text):
    found = report(text)
    assert found.iou == 1 and found.psnr == pytest.approx(100)
    assert found.colours_right == 1 and max(found.colour_errors.values()) == 0
    assert found.faces == 1
    if "still" in text:
        assert found.parts_right is None and found.motion_corr is None and not found.part_motion
        assert found.still_drift == 0
    else:
        assert found.parts_right == 1 and min(found.part_motion.values()) > 0.999
        assert found.motion_corr > 0.999 and found.still_drift is None


def test_limbs_are_among_the_parts_that_move_and_others_stand():
    assert {"left_arm", "right_arm", "head", "left_leg"} <= set(report(DANCING).part_motion)
    moving = report("a red dog waving").part_motion
    assert "right_arm" in moving and "left_leg" not in moving


def test_pixels_of_the_truth_are_told_apart_by_groups():
    prompt = parse_creature("a robot standing still")
    creature = creatures.CREATURES["robot"]
    _, group = creatures._truth(prompt, creature, orbit([0.0], [0.0, 180.0], "cpu"), 1)
    names = creatures._names(creature)
    ahead, behind = ({names[n] for n in seen.unique().tolist() if n >= 0} for seen in group)
    assert ahead - behind == {"chest", "face"} and behind <= ahead


def test_a_still_copy_has_no_motion():
    found = report(DANCING, frozen)
    assert found.parts_right == 0 and set(found.part_motion.values()) == {0.0}
    assert found.faces == 1 and found.iou < 0.95
    assert found.over_time[0].iou == 1 and found.over_time[3].iou < 0.95


def test_a_face_on_either_side_is_two_faces():
    assert report("a bird standing still", two_faced).faces == 2


def test_colours_are_judged_by_parts_and_not_by_the_motion():
    found = report("a dog walking", greyed)
    assert 0 < found.colours_right < 1
    assert found.colour_errors["torso"] > creatures.RIGHT_COLOUR and found.parts_right > 0.9


def frames_of(group, colours, opacity=1.0):
    """Groups of pixels in their colours, over the background; -1 is empty."""
    opacity = torch.where(group >= 0, opacity, 0.0)[..., None]
    rgb = opacity * torch.tensor(colours)[group] + (1 - opacity) * torch.tensor(BACKGROUND)
    return Frames(rgb=rgb, opacity=opacity)


def test_a_part_s_motion_is_that_of_its_own_place():
    """Two squares go right, each in its row; of the scene's, one at half the pace, and one stands still."""

    def squares(*places):
        group = torch.full((12, 3, 10, 64), -1)
        for row, columns in enumerate(places):
            for k, column in enumerate(columns):
                group[k, :, 5 * row : 5 * row + 4, 5 * column : 5 * column + 4] = row
        return group.flatten(0, 1)

    colours = [[0.9, 0.1, 0.1], [0.1, 0.1, 0.9], [0.0, 0.0, 0.0]]
    truth = squares(range(12), range(12))
    theirs, ours = (
        frames_of(group, colours) for group in (truth, squares([k // 2 for k in range(12)], [0] * 12))
    )
    centroids = torch.zeros(12, 3, 3)
    centroids[:, :2, 1] = torch.linspace(-0.5, 0.5, 12)[:, None]
    motion = creatures.part_motion(ours, theirs, truth, centroids)
    assert motion.keys() == {0, 1} and motion[0] > 0.98 and motion[1] == 0


def test_a_part_s_colour_is_that_of_what_is_seen_of_it():
    group = torch.tensor([0, 1, 2, -1])[:, None, None].expand(4, 10, 10).clone()
    group[2, 3:] = -1  # too small to be judged
    colours = [[0.9, 0.1, 0.1], [0.1, 0.1, 0.9], [0.1, 0.9, 0.1], [0.0, 0.0, 0.0]]
    seen = torch.zeros(4, 10, 10)
    seen[0, :4] = 0.6  # less than half of it, and that is translucent; nothing of the second
    found = creatures.part_colours(frames_of(group, colours, seen), frames_of(group, colours), group)
    assert found == {0: pytest.approx(0, abs=1e-5), 1: pytest.approx((0.83 / 3) ** 0.5)}


def test_an_empty_scene_is_wrong_in_everything():
    found = report("a dog walking", empty)
    assert found.iou == 0 and found.faces == 0 and found.parts_right == 0


@pytest.mark.parametrize(
    ("text", "kind"), [("a blue fish spinning", CreatureReport), ("a red cube spinning", ShapesReport)]
)
def test_a_scene_is_measured_as_what_its_prompt_names(text, kind, monkeypatch):
    monkeypatch.setattr(creatures, "TIMES", (0.0, 0.5))
    found = evaluate_scene(text, any_truth(parse(text)))
    assert isinstance(found, kind) and found.iou == 1 and found.psnr == pytest.approx(100)


def test_the_tables_say_what_was_measured_of_a_creature():
    found = report("a dog walking", greyed)
    console = Console(record=True, width=80, file=io.StringIO())
    print_report(found, console)
    row = asdict(found) | {"seconds": 61.0, "drop": "video"}
    console.print(*summary_tables([row | {"faces": 1}, row]))
    text = console.export_text()
    count = len(found.part_motion)
    for said in (
        "a dog walking",
        "left arm",
        f"{count} of {count} parts",
        "2 in all, 0 held out",
        "1/2 one",
        "122",
    ):
        assert said in text
    line = brief(found)
    assert f"PSNR {found.psnr:.1f} dB, colours " in line and line.endswith(
        f"motion {count} of {count} parts, 0 faces"
    )
    assert "motion still, drift 0.00" in brief(report("a robot standing still"))


def test_a_report_is_read_as_it_was_written(tmp_path):
    found = report("a robot standing still")
    write_json(tmp_path / "report.json", asdict(found) | {"protocol": {}})
    assert read_report(tmp_path / "report.json") == found
