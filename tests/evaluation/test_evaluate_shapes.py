"""The evaluation knows the truth when it sees it, and every planted defect by its number."""

import io
import json
import math
from dataclasses import asdict, replace
from functools import cache, lru_cache
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch.nn.functional import conv2d, pad

from fourdfy.config import ConfigError
from fourdfy.evaluation import frames, marks, scenes, shapes
from fourdfy.evaluation.report import brief, print_report, summary_tables
from fourdfy.evaluation.scenes import BACKGROUND, evaluate_scene, evaluate_system
from fourdfy.evaluation.shapes import main
from fourdfy.ops.cameras import orbit_cameras
from fourdfy.shapes import world
from fourdfy.shapes.grammar import COLOURS, MOTIONS, SHAPES, ShapePrompt, parse_prompt
from fourdfy.systems.base import System
from fourdfy.types import Cameras

LIGHT_GREY = torch.tensor(BACKGROUND)
MOVING = [motion for motion in MOTIONS if motion != "standing still"]


def coloured(shape: str, motion: str) -> ShapePrompt:
    """A prompt for each shape and motion, colours mixed; few prompts, so that frames are shared."""
    colour = COLOURS[(SHAPES.index(shape) + 2 * MOTIONS.index(motion)) % len(COLOURS)]
    return ShapePrompt(colour, shape, motion)


@cache
def truth(prompt: ShapePrompt) -> scenes.Render:
    """The true scene with one ray per pixel, and no frame rendered twice, for speed."""
    known = {}

    def render(cameras: Cameras):
        if prompt.motion == "standing still":
            cameras = replace(cameras, times=torch.zeros_like(cameras.times))
        keys = list(zip(map(tuple, cameras.c2w[:, :3, 3].tolist()), cameras.times.tolist(), strict=True))
        new = [k for k, key in enumerate(keys) if key not in known]
        if new:
            images = world.render([prompt] * len(new), cameras[torch.tensor(new)], LIGHT_GREY, supersample=1)
            known.update(zip([keys[k] for k in new], zip(*images, strict=True), strict=True))
        rgb, opacity = zip(*[known[key] for key in keys], strict=True)
        return torch.stack(rgb), torch.stack(opacity)

    return render


KEPT = {name: lru_cache(maxsize=8)(getattr(scenes, name).__wrapped__) for name in ("_truth", "_poses")}


@pytest.fixture(autouse=True)
def fast_truth(monkeypatch):
    """What is kept of it is not mixed with what the evaluation keeps of the other."""
    for name, value in {"ground_truth": truth, **KEPT}.items():
        monkeypatch.setattr(scenes, name, value)


def at_times(render, change):
    """The scene with its clock changed."""
    return lambda cameras: render(replace(cameras, times=change(cameras.times)))


def seen_from(render, *, turn_deg=0.0, distance=world.CAMERA_DISTANCE):
    """The scene turned counter-clockwise, and smaller the greater the distance."""

    def turned(cameras):
        return render(
            orbit_cameras(
                cameras.elevation_deg,
                cameras.azimuth_deg - turn_deg,
                distance=distance,
                fovy_deg=cameras.fovy_deg,
                times=cameras.times,
                height=cameras.height,
                width=cameras.width,
            )
        )

    return turned


def marked_pixels(rgb, opacity):
    colours = marks.foreground_colour(rgb, opacity, LIGHT_GREY)
    return (colours.amax(-1) - colours.amin(-1) < marks.MIN_CHROMA) & (opacity[..., 0] > 0.5)


def with_faces(prompt, turns_deg):
    """The object with further marks; right for turns that map its body to itself."""

    def render(cameras):
        rgb, opacity = truth(prompt)(cameras)
        for turn_deg in turns_deg:
            other, other_opacity = seen_from(truth(prompt), turn_deg=turn_deg)(cameras)
            rgb = torch.where(marked_pixels(other, other_opacity)[..., None], other, rgb)
        return rgb, opacity

    return render


def unmarked(prompt):
    def render(cameras):
        rgb, opacity = truth(prompt)(cameras)
        body = 0.75 * torch.tensor(world.COLOUR_RGB[prompt.colour])
        return torch.where(marked_pixels(rgb, opacity)[..., None], body, rgb), opacity

    return render


def blurred(render, sigma=1.5, noise=0.05):
    """Gaussian blur (pixels) and noise on colours and opacity."""
    generator = torch.Generator().manual_seed(0)
    offsets = torch.arange(-4.0, 5.0)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()

    def worse(cameras):
        images = torch.cat(render(cameras), dim=-1).movedim(-1, 1)
        images = pad(images, (4, 4, 4, 4), mode="replicate")
        images = conv2d(images, kernel.view(1, 1, 1, -1).expand(4, 1, 1, -1), groups=4)
        images = conv2d(images, kernel.view(1, 1, -1, 1).expand(4, 1, -1, 1), groups=4).movedim(1, -1)
        images = (images + noise * torch.randn(images.shape, generator=generator)).clamp(0, 1)
        return images[..., :3], images[..., 3:]

    return worse


# -- the truth -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("motion", MOTIONS)
def test_the_truth_is_right_in_everything(shape, motion):
    prompt = coloured(shape, motion)
    report = evaluate_scene(prompt.text, truth(prompt))
    assert report.prompt == prompt.text
    assert report.iou == 1
    assert report.psnr == pytest.approx(100)
    assert report.colour_ok and report.colour_error == report.saturation_error == 0
    assert report.fronts == 1
    assert report.mark_seen == len(report.over_time) and report.ghosts == 0
    assert {(moment.mark, moment.ghost) for moment in report.over_time} == {(1, 0)}
    if motion == "standing still":
        assert report.motion_corr is None and report.motion_right is None and report.untracked is None
        assert report.still_drift == 0
    else:
        assert report.motion_corr > 0.999 and report.motion_right
        assert report.motion_gain == pytest.approx(1, abs=0.04)  # one ray per pixel: edges jump
        assert report.untracked == 0 and report.still_drift is None


@pytest.mark.parametrize("colour", COLOURS)
def test_every_colour_is_told_from_the_five_others(colour):
    prompt = ShapePrompt(colour, "cube", "standing still")
    right = evaluate_scene(prompt, blurred(truth(prompt)))
    assert right.colour_ok and right.colour_error < 0.05
    other = ShapePrompt(COLOURS[COLOURS.index(colour) - 1], "cube", "standing still")
    wrong = evaluate_scene(prompt, truth(other))
    assert not wrong.colour_ok and wrong.colour_error > 0.15
    assert wrong.iou == 1 and wrong.fronts == 1


@pytest.mark.parametrize(
    "text",
    [
        "a yellow cone spinning",  # the faintest mark: a small pupil on a light body
        "a red cube bouncing",
        "a green cylinder sliding",
        "a purple diamond pulsing",
        "a blue ball standing still",
    ],
)
def test_a_blurred_and_noisy_truth_passes(text):
    prompt = parse_prompt(text)
    report = evaluate_scene(prompt, blurred(truth(prompt)))
    assert report.iou > 0.9 and report.psnr > 20
    assert report.colour_ok
    assert report.fronts == 1
    assert report.motion_right in (True, None) and not report.ghosts
    assert report.motion_corr is None or report.motion_corr > 0.98


def test_a_front_between_two_views_is_seen():
    prompt = ShapePrompt("orange", "cube", "spinning")
    report = evaluate_scene(prompt, seen_from(truth(prompt), turn_deg=7.5))
    assert report.fronts == 1
    assert report.motion_corr > 0.999


# -- planted defects -----------------------------------------------------------------------------


@pytest.mark.parametrize("motion", MOVING)
def test_a_frozen_scene_has_correlation_zero(motion):
    prompt = ShapePrompt("red", "cone", motion)
    report = evaluate_scene(prompt, at_times(truth(prompt), torch.zeros_like))
    assert report.motion_corr == 0 and report.motion_gain == 0
    assert report.motion_right is False and report.untracked == 0
    assert report.fronts == 1


def test_the_mark_of_a_frozen_scene_is_a_ghost_when_it_should_have_turned_away():
    prompt = ShapePrompt("red", "ball", "spinning")
    report = evaluate_scene(prompt, at_times(truth(prompt), torch.zeros_like))
    assert report.mark_seen == 1  # at the start
    assert report.ghosts >= 9  # at 30 degrees it still covers most of its place
    assert report.over_time[0].ghost == 0 and all(moment.ghost > 0.8 for moment in report.over_time[3:10])


@pytest.mark.parametrize("motion", MOVING)
def test_a_frozen_noisy_scene_does_not_move_by_chance(motion):
    prompt = ShapePrompt("red", "ball", motion)
    report = evaluate_scene(prompt, blurred(at_times(truth(prompt), torch.zeros_like)))
    assert report.motion_corr == 0


@pytest.mark.parametrize("motion", ["spinning", "sliding"])
def test_a_clip_played_backwards_has_correlation_minus_one(motion):
    prompt = ShapePrompt("green", "cylinder", motion)
    report = evaluate_scene(prompt, at_times(truth(prompt), lambda times: (1 - times) % 1))
    assert report.motion_corr == pytest.approx(-1, abs=1e-3)
    assert report.motion_right is False


@pytest.mark.parametrize("gain", [0.5, 2.0])
def test_half_a_turn_has_half_the_gain_and_two_turns_are_too_many(gain):
    prompt = ShapePrompt("blue", "ball", "spinning")
    report = evaluate_scene(prompt, at_times(truth(prompt), lambda times: gain * times))
    assert report.motion_corr > 0.999 and report.motion_gain == pytest.approx(gain, abs=0.06 * gain)
    assert report.motion_right is False


# -- the mark and the motion are two things --------------------------------------------------------


@pytest.mark.parametrize("shape", ["ball", "cone", "cylinder"])
def test_a_washed_out_mark_is_lost_and_its_motion_is_kept(shape):
    prompt = ShapePrompt("orange", shape, "spinning")

    def washed(cameras):
        """From the second moment on the pupil is white, and the white is pale."""
        rgb, opacity = truth(prompt)(cameras)
        pale = 0.7 * torch.tensor(world.EYE_WHITE) + 0.225 * torch.tensor(world.COLOUR_RGB["orange"])
        lost = marked_pixels(rgb, opacity) & (cameras.times > 0)[:, None, None]
        return torch.where(lost[..., None], pale, rgb), opacity

    report = evaluate_scene(prompt, blurred(washed))
    assert report.motion_right and report.motion_corr > 0.99 and report.untracked == 0
    assert report.motion_gain == pytest.approx(1, abs=0.05)
    assert report.mark_seen <= 1
    assert report.fronts == 1


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_a_ghost_at_the_front_is_counted_and_does_not_hold_the_motion(strength):
    prompt = ShapePrompt("blue", "ball", "spinning")

    def haunted(cameras):
        rgb, opacity = truth(prompt)(cameras)
        other, at_rest = at_times(truth(prompt), torch.zeros_like)(cameras)
        ghost = marked_pixels(other, at_rest) & ~marked_pixels(rgb, opacity)
        return torch.where(ghost[..., None], strength * other + (1 - strength) * rgb, rgb), opacity

    report = evaluate_scene(prompt, haunted)
    assert report.mark_seen == 12 and report.over_time[0].ghost == 0
    assert report.ghosts >= 9 and report.fronts == 1, "at the start"
    if strength < 1:
        assert report.motion_right and report.motion_gain == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("shape", ["cube", "diamond"])
def test_an_edged_object_without_its_mark_is_followed_by_its_edges(shape):
    prompt = ShapePrompt("green", shape, "spinning")
    report = evaluate_scene(prompt, blurred(unmarked(prompt)))
    assert report.motion_right and report.mark_seen == 0 and report.fronts == 0


@pytest.mark.parametrize("shape", ["ball", "cone", "cylinder"])
def test_a_round_object_without_its_mark_is_untracked_and_not_still(shape):
    prompt = ShapePrompt("purple", shape, "spinning")
    report = evaluate_scene(prompt, blurred(unmarked(prompt)))
    assert report.untracked == 12 and report.motion_corr is report.motion_gain is None
    assert report.motion_right is False
    assert "motion untracked" in brief(report)


def test_a_moment_at_which_nothing_is_seen_is_untracked():
    prompt = ShapePrompt("red", "cone", "bouncing")

    def vanishing(cameras):
        rgb, opacity = truth(prompt)(cameras)
        gone = (cameras.times == scenes.TIMES[3])[:, None, None, None]
        return torch.where(gone, LIGHT_GREY, rgb), torch.where(gone, 0, opacity)

    report = evaluate_scene(prompt, vanishing)
    assert report.untracked == 1 and report.over_time[3].track is None
    assert report.motion_right and report.mark_seen == 11


# -- other motions, other objects ------------------------------------------------------------------


@pytest.mark.parametrize("asked", MOVING)
@pytest.mark.parametrize("shown", MOVING)
def test_another_motion_is_not_the_right_one(asked, shown):
    if asked != shown:
        prompt, other = coloured("diamond", asked), coloured("diamond", shown)
        assert evaluate_scene(prompt, truth(other)).motion_right is False


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("asked, shown", [("bouncing", "pulsing"), ("pulsing", "bouncing")])
def test_growing_is_not_rising_and_coming_nearer_is_not_growing(shape, asked, shown):
    report = evaluate_scene(coloured(shape, asked), truth(coloured(shape, shown)))
    assert report.motion_right is False


def test_a_spin_with_one_wrong_face_in_time_is_still_right():
    prompt = ShapePrompt("purple", "cylinder", "spinning")
    wrong_at = scenes.TIMES[5]

    def half_a_turn_off(times):
        return torch.where(times == torch.tensor(wrong_at), times + 0.5, times)

    report = evaluate_scene(prompt, at_times(truth(prompt), half_a_turn_off))
    assert report.motion_corr > 0.999
    assert report.over_time[5].track is None


def test_a_still_prompt_that_moves_drifts():
    still, spinning = (ShapePrompt("red", "ball", motion) for motion in ("standing still", "spinning"))
    assert evaluate_scene(still, truth(spinning)).still_drift > 0.03


def test_drift_is_the_largest_change_where_an_object_is_or_was():
    """It goes away, is paler there, and comes back."""
    opacity, rgb = torch.zeros(3, 4, 4, 1), torch.full((3, 4, 4, 3), 0.8)
    for moment, (column, grey) in enumerate(((0, 0.2), (2, 0.5), (0, 0.2))):
        opacity[moment, :, column], rgb[moment, :, column] = 1, grey
    assert frames.drift(frames.Frames(rgb=rgb, opacity=opacity), 3) == pytest.approx((0.6 + 0.3) / 2)


def test_a_smaller_object_loses_iou():
    prompt = ShapePrompt("red", "ball", "standing still")
    report = evaluate_scene(prompt, seen_from(truth(prompt), distance=1.25 * world.CAMERA_DISTANCE))
    assert 0.55 < report.iou < 0.72  # (1 / 1.25)^2, pixels and perspective
    assert report.fronts == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_a_second_face_at_the_back_is_two_fronts(shape):
    prompt = ShapePrompt("red", shape, "standing still")
    assert evaluate_scene(prompt, with_faces(prompt, [180])).fronts == 2


@pytest.mark.parametrize("shape", SHAPES)
def test_four_faces_are_four_fronts(shape):
    prompt = ShapePrompt("green", shape, "standing still")
    assert evaluate_scene(prompt, with_faces(prompt, [90, 180, 270])).fronts == 4


def test_a_spinning_janus_spins_all_the_same():
    prompt = ShapePrompt("orange", "cylinder", "spinning")
    report = evaluate_scene(prompt, with_faces(prompt, [180]))
    assert report.fronts == 2
    assert report.motion_corr > 0.99


@pytest.mark.parametrize("shape", SHAPES)
def test_an_object_without_a_mark_has_no_front(shape):
    prompt = ShapePrompt("purple", shape, "standing still")
    report = evaluate_scene(prompt, blurred(unmarked(prompt)))
    assert report.fronts == 0
    assert max(report.front_scores) < 0.1


def test_a_grey_object_has_neither_colour_nor_front():
    prompt = ShapePrompt("red", "ball", "standing still")

    def grey(cameras):
        rgb, opacity = truth(prompt)(cameras)
        return rgb.mean(dim=-1, keepdim=True).expand_as(rgb), opacity

    report = evaluate_scene(prompt, grey)
    assert report.fronts == 0
    assert not report.colour_ok and report.colour_error > 0.15
    assert report.saturation_error < -0.5


def test_what_floats_beside_the_object_is_no_ghost_and_fog_is_said(caplog):
    prompt = ShapePrompt("red", "ball", "standing still")

    def beside(cameras):
        rgb, opacity = (image.clone() for image in truth(prompt)(cameras))
        rgb[:, 4:12, 4:60], opacity[:, 4:12, 4:60] = 0.9, 1
        return rgb, opacity

    report = evaluate_scene(prompt, beside)
    assert report.ghosts == 0 and report.iou < 0.8 and not caplog.messages
    evaluate_scene(
        prompt, lambda cameras: (truth(prompt)(cameras)[0], torch.full((len(cameras), 64, 64, 1), 0.6))
    )
    assert "a red ball standing still: fog fills the whole scene" in caplog.text


@pytest.mark.parametrize("value", [0.0, math.nan])
@pytest.mark.parametrize("motion", ["standing still", "spinning", "sliding"])
def test_an_empty_or_broken_scene_is_scored_and_is_valid_json(value, motion):
    prompt = ShapePrompt("green", "ball", motion)  # green is the colour nearest to black

    def broken(cameras):
        rgb = LIGHT_GREY.expand(len(cameras), cameras.height, cameras.width, 3) + value
        return rgb, torch.full_like(rgb[..., :1], value)

    report = evaluate_scene(prompt, broken)
    assert report.iou == 0 and report.fronts == 0 and not report.colour_ok
    assert report.motion_corr is None and not report.motion_right
    assert report.untracked in (12, None) and not report.mark_seen
    json.dumps(asdict(report), allow_nan=False)


def test_a_renderer_with_other_shapes_is_an_error():
    with pytest.raises(ValueError, match=r"wanted are .*64, 64, 3"):
        evaluate_scene("a red ball spinning", lambda cameras: (torch.zeros(2, 8, 8, 3), torch.zeros(2, 8, 8)))


# -- reports -------------------------------------------------------------------------------------


def test_the_tables_say_what_was_measured():
    prompt = ShapePrompt("red", "ball", "bouncing")
    report = evaluate_scene(prompt, truth(prompt))
    console = Console(record=True, width=160, file=io.StringIO())
    print_report(report, console)
    row = asdict(report) | {"seconds": 61.0, "drop": "video"}
    console.print(*summary_tables([row, row | {"colour_ok": False, "fronts": 2}]))
    text = console.export_text()
    for said in ("a red ball bouncing", "100.0 dB", "correlation 1.00", "1/2", "2/2 right", "video", "122"):
        assert said in text


class TrueSystem(System):
    """The true scene as a system, over a black background."""

    def __init__(self, prompt):
        super().__init__()
        self.prompt, self.step = prompt, 30

    def render(self, cameras):
        rgb, opacity = world.render([self.prompt] * len(cameras), cameras, torch.zeros(3), supersample=1)
        return SimpleNamespace(comp_rgb=rgb, comp_rgb_fg=rgb, opacity=opacity)


def test_a_system_is_evaluated_over_the_light_background(tmp_path):
    prompt = ShapePrompt("blue", "cube", "standing still")
    report = evaluate_system(TrueSystem(prompt), prompt.text, tmp_path)
    assert report.psnr > 60 and report.iou == 1
    written = json.loads((tmp_path / "it30-evaluation.json").read_text())
    assert written["prompt"] == prompt.text and written["fronts"] == 1


def test_a_prompt_outside_the_grammar_has_no_ground_truth(tmp_path):
    system = TrueSystem(ShapePrompt("blue", "cube", "standing still"))
    with pytest.raises(ConfigError, match=r"system\.prompt_processor\.prompt.*COLOUR"):
        evaluate_system(system, "a zebra dancing", tmp_path)


# -- the command ---------------------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch):
    """A command whose training gives the truth; the calls it got."""
    calls = []
    monkeypatch.setenv("COLUMNS", "160")

    def train_prompt(prompt, gpu, drop, overrides, recipe, stop):
        calls.append((prompt.text, gpu, drop, list(overrides)))
        return truth(prompt), {"seconds": 1.5, "steps_per_second": 4.0}

    monkeypatch.setattr(shapes, "train_prompt", train_prompt)
    return calls


def test_the_command_writes_a_row_for_each_prompt(trained, tmp_path, capsys):
    file = tmp_path / "results" / "shapes.json"
    prompts = ["--prompt", "a red ball bouncing", "seed=1", "--prompt", "a blue cube standing still"]
    options = ["--gpu", "cpu", "--drop", "video", "--json", str(file), "trainer.max_steps=2"]
    assert main([*prompts, *options]) == 0
    overrides = ["seed=1", "trainer.max_steps=2"]
    assert trained == [
        ("a red ball bouncing", "cpu", "video", overrides),
        ("a blue cube standing still", "cpu", "video", overrides),
    ]
    rows = json.loads(file.read_text())
    assert [row["prompt"] for row in rows] == ["a red ball bouncing", "a blue cube standing still"]
    wanted = {"prompt", "iou", "psnr", "colour_ok", "motion_corr", "fronts", "seconds", "held_out"}
    assert all(wanted <= set(row) for row in rows)
    assert rows[0]["motion_corr"] == pytest.approx(1, abs=1e-3) and rows[1]["motion_corr"] is None
    assert (rows[0]["seconds"], rows[0]["steps_per_second"], rows[0]["saturation_error"]) == (1.5, 4.0, 0)
    assert "2 in all" in capsys.readouterr().out


def test_a_prompt_that_fails_loses_nothing_of_the_ones_before(trained, tmp_path, monkeypatch):
    file = tmp_path / "shapes.json"
    train = shapes.train_prompt

    def interrupted(prompt, *rest):
        if prompt.colour == "blue":
            raise KeyboardInterrupt
        return train(prompt, *rest)

    monkeypatch.setattr(shapes, "train_prompt", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(["--prompt", "a red ball bouncing", "--prompt", "a blue ball bouncing", "--json", str(file)])
    assert [row["prompt"] for row in json.loads(file.read_text())] == ["a red ball bouncing"]
    assert list(tmp_path.iterdir()) == [file]


def test_ablations_share_a_file_and_a_repeated_prompt_replaces_its_row(trained, tmp_path):
    file = tmp_path / "shapes.json"
    command = ["--prompt", "a red ball standing still", "--json", str(file)]
    main(command)
    main([*command, "--drop", "video"])
    main(command)
    assert [row["drop"] for row in json.loads(file.read_text())] == ["video", None]


def test_a_file_of_something_else_is_not_overwritten(trained, tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text('{"a": 1}')
    with pytest.raises(SystemExit):
        main(["--prompt", "a red ball bouncing", "--json", str(file)])
    assert "name another file" in capsys.readouterr().err
    assert file.read_text() == '{"a": 1}' and not trained


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--prompt", "a red ball bouncing", "--prompt", "a rod ball bouncing"], "did you mean 'red'"),
        (["--prompt", "a red ball bouncing", "seed"], "key=value"),
        (["--prompt", "a red ball bouncing", "--drop", "sound"], "multi_view"),
    ],
)
def test_a_mistake_is_found_before_anything_is_trained(trained, capsys, arguments, said):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err and not trained
