"""The benchmarks run at toy size."""

import importlib
import json
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageColor

from fourdfy.config_files import PROMPT
from fourdfy.evaluation.scenes import ground_truth
from fourdfy.launching.experiment import load_experiment
from fourdfy.launching.recipe import load_recipe
from fourdfy.launching.sweeps.jobs import read_sweep
from fourdfy.shapes.prompts import parse
from tests.commands import ROOT, TINY


@pytest.fixture
def load(monkeypatch):
    """Import a benchmark by name."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module


def test_every_kind_of_step_is_measured_at_toy_size(load, tmp_path, capsys):
    config = "fourdfy_stage_2"
    folders = ["--models", str(tmp_path / "models"), "--out", str(tmp_path)]
    load("train_step").main([config, "--state", "ball", "--toy", *folders])
    measured = json.loads((tmp_path / f"{config}-ball.json").read_text())
    blocks = measured["blocks"]
    assert list(blocks) == ["multi_view 8", "multi_view 16", "single_view 16"]
    for block in blocks.values():
        assert 0 < block["min"] <= block["median"] <= block["max"] and block["steps"] == 2
        parts = block["parts_ms"]
        assert all(parts[part] > 0 for part in load("profiling").PARTS)
    small, large, single = (block["mean"] for block in blocks.values())
    early, late = (small + single) / 2, (large + single) / 2  # half of the steps are multi-view
    duration = f"25,000 steps in {(5000 * early + 20000 * late) / 3.6e6:.2f} h"
    assert f"| stage_2 | ball | mixture | {late:.1f} | {duration} |" in capsys.readouterr().out

    only = ["--kinds", "single_view", "--times-only"]
    load("train_step").main([config, "--state", "ball", "--toy", *only, *folders])
    assert [cells[2] for cells in rows(capsys.readouterr().out)] == ["single_view 16"], "and no mixture"


def test_a_soak_sees_what_grows(load, tmp_path, capsys):
    soak = load("soak")
    soak.main(["--toy", "--steps", "8", "--out", str(tmp_path), "trainer.val_check_interval=0"])
    table, _, grown = capsys.readouterr().out.rpartition("\n\n")
    assert [cells[1] for cells in rows(table)] == [str(step) for step in range(1, 9)]
    assert grown.startswith("stage 1/1: RSS ") and "CPU time" in grown

    watch = soak.Watch(learns=False)
    for leak, fine in ((0.0, True), (1.0, False)):
        watch.stages["stage"] = [
            soak.Row(step, 5.0, 5.0, dict.fromkeys(soak.memory_mib(), 100 + leak * step), 9.0)
            for step in range(8)
        ]
        assert soak.report(watch)[1] == fine


@pytest.mark.parametrize(
    ("variants", "options"),
    [("variants", []), ("variants_wan", ["--config", "configs/shapes_stage_3_wan.yaml"])],
)
def test_variants_of_the_third_stage_follow_on_second_ones_of_their_prompt_and_seed(
    variants, options, load, tmp_path, monkeypatch, capsys
):
    shapes, commands = load("shapes"), []
    measured = {"held_out": False, "iou": 0.5, "psnr": 20.0, "colour_ok": True, "fronts": 1, "seconds": 9.0}
    measured |= {"motion_corr": 0.9, "motion_right": True, "saturation_error": 0.25, "steps_per_second": 5.0}
    measured |= {"motion_gain": 0.75, "untracked": 1, "mark_seen": 11, "ghosts": 2}

    def run(tasks, runner):
        for command in (list(task.arguments) for task in tasks):
            commands.append(command)
            row = measured | {"prompt": command[command.index("--prompt") + 1], "drop": None}
            Path(command[command.index("--json") + 1]).write_text(json.dumps([row]))

    monkeypatch.setattr(shapes, "run_all", run)
    base, out = tmp_path / "base", tmp_path / "out"
    file = Path(shapes.__file__).with_name(f"{variants}.yaml")
    which = ["--out", str(out), "--prompts", "2", "--seed", "0", "--seed", "3", *options]
    shapes.main([*which, "--after", str(base), "--variants", str(file), "trainer.max_steps=9"])
    ways = yaml.safe_load(file.read_text())
    assert len(commands) == len(ways) * 2 * 2
    printed = capsys.readouterr().out.splitlines()
    assert printed[2].endswith("| 0.50 | 20.0 | right | 0.90 | 0.75 | 1 | 11 | 2 | 1 | 9 |")
    means = "0.500 | 20.0 | 4/4 | 4/4 | 0.900 | 0.75 | 1.0 | 11.0 | 2.0 | 4/4 | +0.250 | 5.0"
    assert printed[-1] == f"| {[*ways][-1]} | {means} |"

    *some, last = [
        command for command in commands if "seed=0" in command and "a blue ball spinning" in command
    ]
    folder = base / "trials" / "shapes_stage_2" / "a_blue_ball_spinning"
    assert all(f"system.weights={folder / 'ckpts' / 'last.ckpt'}" in command for command in [*some, last])
    assert len({word for words in [*some, last] for word in words if "exp_root" in word}) == len(ways)
    assert last[-1] == "system.prompt_processor_video.prompt_still=a blue ball standing still"
    assert f"system.weights={base}/trials/none_3/shapes_stage_2/" in " ".join(commands[-1])
    alone = ["system.prompt_processor.prompt=a blue ball spinning", "system.weights=null"]
    for options in (
        [word for words in some for word in words[6:]],
        last[6:],
    ):  # the last has another guidance
        given = load_experiment([last[3]], [*options, *alone])
        assert given.cfg.trainer.max_steps == 9 and given.cfg.system.guidance_video.still_source
    with pytest.raises(SystemExit):
        shapes.main(["--out", str(out), "--after", str(base)])
    assert "--after needs --variants" in capsys.readouterr().err

    commands.clear()
    shapes.main(["--out", str(out / "whole"), "--variants", str(file), "--prompt", "a dog walking"])
    assert len(commands) == len(ways) and {command[1] for command in commands} == {"a dog walking"}
    assert {command[3] for command in commands} == {"configs/shapes.yaml"}


@pytest.mark.parametrize(
    ("variants", "config", "noise"),
    [
        ("variants_pixels", "shapes_stage_3", [0, 0.98, 0.5, 350]),
        ("untimed", "shapes_stage_3", 0.5),
        ("variants_recipe", "shapes", 0.98),
    ],
)
def test_the_keys_of_variants_exist_and_take_their_values(variants, config, noise, load):
    file = Path(load("shapes").__file__).with_name(f"{variants}.yaml")
    options = chain(*yaml.safe_load(file.read_text()).values())
    given = ["system.prompt_processor.prompt=a dog walking", *options]
    *_, last = load_recipe([f"configs/{config}.yaml"], given)  # a ConfigError names a key that is wrong
    assert last.experiment.cfg.system.guidance_multi_view.max_step_percent == noise


@pytest.mark.parametrize("stage", [1, 3])
def test_the_sweeps_of_troubleshooting_can_be_run(stage):
    sweep = read_sweep(ROOT / f"benchmarks/troubleshooting_stage_{stage}.yaml", {}, ["system.weights=null"])
    sweep.check()
    (_, _, plain), *others = sweep.recipes
    assert all(stages[0].cfg != plain[0].cfg for _, _, stages in others)


@pytest.mark.parametrize("moves", [False, True])
def test_the_pictures_of_trials_have_a_row_for_each_and_the_truth_for_each_prompt(
    moves, load, tmp_path, monkeypatch
):
    strips, config = load("strips"), ROOT / f"configs/shapes_stage_{3 if moves else 1}.yaml"
    shown = {"a": "a red cube bouncing", "b": "a red cube bouncing", "c": "a blue ball bouncing"}
    experiments = {name: load_experiment([config], [f"{PROMPT}={shown[name]}"]) for name in shown}
    monkeypatch.setattr(strips, "load_experiment", lambda files: experiments[files[0].parts[-3]])
    monkeypatch.setattr(type(experiments["a"]), "load_system", lambda self, device, file: self.cfg.system)
    monkeypatch.setattr(strips, "scene_renderer", lambda system: ground_truth(parse(system.prompt)))
    strips.main(tmp_path / "strips.png", {name: tmp_path / name for name in shown})
    with Image.open(tmp_path / "strips.png") as image:
        pixels = np.asarray(image)[:, -strips.COLUMNS * strips.SIZE :]
    first, second, truth, other, other_truth = np.split(pixels, 5)
    assert (first == second).all() and (first == truth).all()
    assert (other == other_truth).all() and (other != truth).any()
    here, _, there, *_ = np.split(truth, strips.COLUMNS, axis=1)
    first_row = [(picture != picture[0, 0]).any(axis=(1, 2)).argmax() for picture in (here, there)]
    assert (first_row[0] > first_row[1]) == moves and (here != there).any()


def rows(table):
    """Cells of the Markdown table's rows, without its head."""
    lines = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][2:]
    return [[cell.strip("| ") for cell in line] for line in lines]


def test_the_hash_grid_is_measured_at_toy_size(load, capsys):
    load("hash_grid").main(["--toy"])
    found = rows(capsys.readouterr().out)
    assert [cells[:3] for cells in found] == [
        [n_dims, "2^8", name] for n_dims in ("3", "4") for name in ("numba", "torch")
    ]
    assert all(float(cells[3].split(" ")[0]) >= 0 for cells in found)


def test_the_field_is_measured_at_toy_size(load, capsys):
    load("field").main(["--toy", "--device", "cpu"])
    found = rows(capsys.readouterr().out)
    assert [cells[:2] for cells in found] == [
        [name, f"1,024 {layout}"]
        for name in ("static", "moving", "deformed")
        for layout in ("random", "rays")
    ]
    assert all(float(cells[5].split(" ")[0]) >= 0 for cells in found)


def test_renders_of_all_sizes_are_measured_at_toy_size(load, tmp_path, capsys):
    scaling = load("scaling")
    scaling.main(["--toy", "--device", "cpu", "--out", str(tmp_path / "measured.json")])
    samples = {(axis, value): count for axis, value, count, *_ in rows(capsys.readouterr().out)}
    axes = json.loads((tmp_path / "measured.json").read_text())["axes"]
    assert list(axes) == ["rays", "frames", "samples per ray", "levels", "table", "chunk"]
    everything = samples["chunk", "all"]
    assert everything != "0"
    for other in [("frames", "4"), ("rays", "6 x 8"), ("chunk", "50"), ("chunk", "subset 50")]:
        assert samples[other] == everything, "these render the same samples"
    assert 1.5 < axes["frames"][3]["samples"] / axes["frames"][2]["samples"] < 2.5, "twice the frames"
    picture = tmp_path / "scaling.png"
    scaling.main(["--out", str(tmp_path / "measured.json"), "--plot", str(picture)])
    with Image.open(picture) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 16)}
    assert {ImageColor.getrgb(line) for line in (scaling.TIME, scaling.MEMORY)} <= colours


def test_the_priors_are_measured_at_toy_size(load, tmp_path, capsys):
    load("priors").main(["--toy", "--models", str(tmp_path)])
    found = rows(capsys.readouterr().out)
    kinds, networks = ("multi_view", "single_view", "video"), ("U-Net", "VAE", "all")
    assert [cells[0] for cells in found] == [f"{kind}: {network}" for kind in kinds for network in networks]
    assert all(float(cells[-1]) > 0.9999 for cells in found), "the same numbers in every way"


def test_matrix_products_of_another_result_type_are_counted(load):
    a = torch.empty(2, 3, 4, dtype=torch.bfloat16, device="meta")
    counted = load("priors").tera_operations(lambda: torch.bmm(a, a.mT, out_dtype=torch.float32))
    assert counted == pytest.approx(2 * 2 * 3 * 3 * 4 / 1e12)


def test_the_cost_of_the_viewer_is_measured_at_toy_size(load, capsys, monkeypatch):
    pytest.importorskip("viser")
    viewer = load("viewer")
    monkeypatch.setattr(viewer, "CASES", {"without": None, "one who moves": 0.5})
    tiny = [word for word in TINY if "max_steps" not in word and "prompt" not in word]
    viewer.main(["--config", "shapes_stage_1", "--steps", "3", "--warm-up", "1", *tiny])
    plain, moving = rows(capsys.readouterr().out)
    assert plain[0] == "without" and plain[2] == "1.000"
    assert moving[0] == "one who moves" and float(moving[2]) > 0 and float(moving[3]) > 0
