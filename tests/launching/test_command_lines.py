"""Every command line of the original's README, and every knob it names, with tiny models on the CPU."""

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fourdfy.launching.cli import main
from fourdfy.launching.experiment import Experiment
from fourdfy.launching.recipe import load_recipe
from fourdfy.priors import latent
from fourdfy.priors.latent import LatentPrior
from fourdfy.scenes.nerf.implicit_volume import ImplicitVolume
from fourdfy.systems.checkpoint import read_checkpoint
from fourdfy.systems.fourdfy import FourdfySystem
from tests import tiny_models
from tests.commands import CONFIGS, ROOT
from tests.tiny_transformers import save_cogvideox, save_ltx, save_sd3, save_sdxl

PROMPT = "system.prompt_processor.prompt=a panda dancing"

# The original README's stages, and ours; each starts from the one named behind it.
COMMANDS = {
    "fourdfy_stage_1": None,
    "fourdfy_stage_2": "fourdfy_stage_1",
    "fourdfy_stage_3": "fourdfy_stage_2",
    "fourdfy_stage_3_vc": "fourdfy_stage_2",
    "fourdfy_stage_3_wan": "fourdfy_stage_2",
    "fourdfy_stage_3_cogvideox": "fourdfy_stage_2",
    "fourdfy_stage_3_animatediff": "fourdfy_stage_2",
    "fourdfy_stage_3_ltx": "fourdfy_stage_2",
    "fourdfy_stage_1_low_vram": None,
    "fourdfy_stage_2_low_vram": "fourdfy_stage_1_low_vram",
    "fourdfy_stage_3_low_vram": "fourdfy_stage_2_low_vram",
    "fourdfy_stage_3_low_vram_vc": "fourdfy_stage_2_low_vram",
    "fourdfy_stage_1_low_vram_deformation": None,
    "fourdfy_stage_2_low_vram_deformation": "fourdfy_stage_1_low_vram_deformation",
    "fourdfy_stage_3_low_vram_vc_deformation": "fourdfy_stage_2_low_vram_deformation",
    "fourdfy_stage_3_vc_deformation": "fourdfy_stage_2_low_vram_deformation",
}
MODERN = ("wan", "animatediff", "cogvideox", "ltx")
"""Video models, as the names of their configs end."""
RECIPES = sorted(path.stem for path in CONFIGS.glob("fourdfy*.yaml") if "stage" not in path.stem)
STEPS = 2


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """One tiny model of each kind, in the layouts that the hub has or our converter makes."""
    root = tmp_path_factory.mktemp("models")
    tiny_models.save_stable_diffusion(root / "sd")
    tiny_models.save_stable_diffusion(root / "sd-v", prediction_type="v_prediction", seed=1)
    tiny_models.save_multi_view(root / "mvdream")
    tiny_models.save_zeroscope(root / "zeroscope")
    tiny_models.save_videocrafter2(root / "videocrafter2")
    tiny_models.save_wan(root / "wan")
    save_cogvideox(root / "cogvideox")
    save_ltx(root / "ltx")
    tiny_models.save_animatediff(root / "animatediff")
    return root


def toy(name: str, models: Path) -> list[str]:
    """Overrides that make an experiment run in seconds, and change nothing else."""
    ends = {"_vc": "videocrafter2"} | {f"_{model}": model for model in MODERN}
    video = models / next((model for end, model in ends.items() if end in name), "zeroscope")
    masked = any(end in name for end in ("_low_vram", "_vc", "_deformation"))
    renderer = "renderer.base_renderer" if masked else "renderer"
    adapter = [f"system.guidance_video.motion_adapter={video / 'motion_adapter'}"]
    return [
        *(adapter if video.name == "animatediff" else []),
        f"trainer.max_steps={STEPS}",
        "trainer.val_check_interval=0",
        "data.single_view.width=16",
        "data.single_view.height=16",
        "data.single_view.eval_width=8",
        "data.single_view.eval_height=8",
        "data.single_view.eval_batch_size=16",
        "data.single_view.n_test_views=2",
        "data.single_view.num_frames_factor=1",
        "data.single_view.width_vid=16",
        "data.single_view.height_vid=8",
        "data.multi_view.width=16",
        "data.multi_view.height=16",
        "data.multi_view.batch_size=4",
        "data.single_view.resolution_milestones=[]",
        "data.multi_view.resolution_milestones=[]",
        "data.single_view.batch_size=1",
        "system.geometry.pos_encoding_config.n_levels=4",
        "system.geometry.pos_encoding_config.log2_hashmap_size=8",
        f"system.{renderer}.num_samples_per_ray=16",
        f"system.prompt_processor.pretrained_model_name_or_path={models / 'sd'}",
        f"system.prompt_processor_multi_view.pretrained_model_name_or_path={models / 'sd'}",
        f"system.guidance.pretrained_model_name_or_path={models / 'sd'}",
        f"system.guidance.pretrained_model_name_or_path_lora={models / 'sd-v'}",
        f"system.guidance_multi_view.pretrained_model_name_or_path={models / 'mvdream'}",
        f"system.prompt_processor_video.pretrained_model_name_or_path={video}",
        f"system.guidance_video.pretrained_model_name_or_path={video}",
        "system.guidance_video.height=32",
        "system.guidance_video.width=32",
    ]


def experiment(name: str, overrides: list[str]) -> Experiment:
    return load_recipe([CONFIGS / f"{name}.yaml"], [PROMPT, *overrides])[0].experiment


def seed_of_all_kinds(this: Experiment) -> int:
    """A seed whose first steps are of different kinds, the video's among them."""
    wanted = min(STEPS, len(this.plan.kinds))
    moving = {"video"} if this.plan.dynamic else set()
    for seed in count():
        kinds = {this.plan.choose(seed, step).name for step in range(STEPS)}
        if len(kinds) == wanted and moving <= kinds:
            return seed
    raise AssertionError


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> dict[str, Path]:
    """The last checkpoints of the stages that have run, and under "" the folder of them all."""
    return {"": tmp_path_factory.mktemp("outputs")}


@pytest.fixture(autouse=True)
def the_cpu_stands_in_for_the_gpu_that_is_asked_for(monkeypatch):
    for home in ("fourdfy.devices", "fourdfy.launching.run"):
        monkeypatch.setattr(f"{home}.select_device", lambda gpu, *_: {"0": "cpu", "cpu": "cpu"}[gpu])


def run_command(name: str, outputs: dict[str, Path], models: Path) -> Path:
    """The README's line for a stage, and for those before it; gives its last checkpoint."""
    if name in outputs:
        return outputs[name]
    before = COMMANDS[name]
    weights = [f"system.weights={run_command(before, outputs, models)}"] if before else []
    reduced = toy(name, models)
    seed = seed_of_all_kinds(experiment(name, reduced))
    line = ["--config", f"configs/{name}.yaml", "--train", "--gpu", "0", f"exp_root_dir={outputs['']}"]
    line += [f"seed={seed}", PROMPT, *weights, *reduced]
    assert main(line) == 0
    (checkpoint,) = outputs[""].glob(f"{name}/a_panda_dancing@*/ckpts/last.ckpt")
    outputs[name] = checkpoint
    return checkpoint


@pytest.mark.parametrize("name", list(COMMANDS))
def test_the_readme_s_command_line_works_as_typed(name, outputs, models, monkeypatch):
    monkeypatch.chdir(ROOT)
    checkpoint = read_checkpoint(run_command(name, outputs, models))
    assert checkpoint["global_step"] == STEPS
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
    assert list(outputs[name].parents[1].glob(f"save/it{STEPS}-test.mp4"))
    if before := COMMANDS[name]:
        earlier = read_checkpoint(outputs[before])["state_dict"]
        moved = checkpoint["state_dict"]
        # Of the earlier stage: within two steps of it, which a fresh field would not be.
        layer = "geometry.feature_network.layers.0.weight"
        assert (moved[layer] - earlier[layer]).abs().max() < 0.01
    lora = [value for key, value in checkpoint["state_dict"].items() if key.endswith("lora_B.weight")]
    trains_image_steps = name in (
        "fourdfy_stage_2",
        "fourdfy_stage_2_low_vram",
        "fourdfy_stage_2_low_vram_deformation",
    )
    assert bool(lora and any(value.any() for value in lora)) or not trains_image_steps


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_an_overlay_replaces_the_image_model(name, models, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    folder = {"sdxl": save_sdxl, "sd3": save_sd3}[name](tmp_path / name)
    replaced = ("system.guidance.", "system.prompt_processor.")
    own = [line for line in toy("fourdfy_stage_2", models) if not line.startswith(replaced)]
    own += [f"system.prompt_processor.pretrained_model_name_or_path={folder}", "data.prob_multi_view=0"]
    own += ["system.guidance.height=32", "system.guidance.width=32"]
    files = ["--config", "configs/fourdfy_stage_2.yaml", "--config", f"configs/overlays/{name}.yaml"]
    assert main([*files, "--train", "--gpu", "cpu", f"exp_root_dir={tmp_path}", PROMPT, *own]) == 0
    (checkpoint,) = tmp_path.glob("fourdfy_stage_2/a_panda_dancing@*/ckpts/last.ckpt")
    state = read_checkpoint(checkpoint)["state_dict"]
    assert all(value.isfinite().all() for value in state.values())
    assert any(value.any() for key, value in state.items() if key.endswith("lora_B.weight"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_stages_of_a_recipe_are_those_of_the_readme_s_command_lines(recipe):
    """Each starts from the one before, and a recipe says no more; some of them are run below."""
    content = yaml.safe_load((CONFIGS / f"{recipe}.yaml").read_text())
    stages = [Path(stage).stem for stage in content.pop("stages")]
    assert content == {"use_timestamp": False}
    assert [COMMANDS[stage] for stage in stages] == [None, *stages[:-1]] and len(stages) == 3


@pytest.mark.parametrize("recipe", ["fourdfy", "fourdfy_low_vram_deformation"])
def test_a_recipe_runs_its_three_stages_in_one_command(recipe, models, tmp_path, monkeypatch):
    stages = [stage.experiment.cfg.name for stage in load_recipe([CONFIGS / f"{recipe}.yaml"], [PROMPT])]
    own = [
        f"stage_{number}.{override}"
        for number, name in enumerate(stages, 1)
        for override in toy(name, models)
    ]
    line = [
        "--config",
        str(CONFIGS / f"{recipe}.yaml"),
        "--train",
        "--gpu",
        "cpu",
        f"exp_root_dir={tmp_path}",
        PROMPT,
    ]
    assert main([*line, *own]) == 0
    for name in stages:
        assert (
            read_checkpoint(tmp_path / name / "a_panda_dancing" / "ckpts" / "last.ckpt")["global_step"]
            == STEPS
        )


class Watch:
    """What a run did: its video batches, the most points that had a graph at once, its last system."""

    def __init__(self, monkeypatch) -> None:
        self.batches, self.points, self.autocast, self.options = [], [], [], []
        apply = latent.apply_memory_options
        training_step, forward, predict = (
            FourdfySystem.training_step,
            ImplicitVolume.forward,
            LatentPrior.predict,
        )

        def watched_step(system, batch):
            self.system = system
            self.batches += [batch] if batch.kind == "video" else []
            return training_step(system, batch)

        def watched_forward(geometry, positions, times, **options):
            if torch.is_grad_enabled():
                self.points.append(len(positions))
            return forward(geometry, positions, times, **options)

        def watched_predict(prior, *args):
            self.autocast.append(torch.is_autocast_enabled("cpu"))
            return predict(prior, *args)

        def watched_options(network, options, device):
            self.options.append((type(network).__name__, options))
            apply(network, options, device)

        monkeypatch.setattr(latent, "apply_memory_options", watched_options)
        monkeypatch.setattr(FourdfySystem, "training_step", watched_step)
        monkeypatch.setattr(ImplicitVolume, "forward", watched_forward)
        monkeypatch.setattr(LatentPrior, "predict", watched_predict)


def weight_of_video(watch: Watch) -> float:
    return watch.system.plan["video"].loss_weights(0)["sds_video"]


def grid_levels(watch: Watch) -> int:
    return watch.system.scene.geometry.encoding.encoding.encoding.spec.n_levels


KNOBS: dict[str, tuple[list[str], Callable[[Watch], Any], Any]] = {
    "train_max_nums": (
        [
            "system.renderer.base_renderer.train_max_nums=50",
            "system.renderer.base_renderer.train_max_nums_static=50",
        ],
        lambda w: max(w.points) <= 50,
        True,
    ),
    "resolution": (
        ["data.single_view.width_vid=12", "data.single_view.height_vid=6"],
        lambda w: (w.batches[0].cameras.width, w.batches[0].cameras.height),
        (12, 6),
    ),
    "precision": (["trainer.precision=16-mixed"], lambda w: any(w.autocast), True),
    "attention": (
        ["system.guidance_video.enable_memory_efficient_attention=true"],
        lambda w: [network for network, options in w.options if options.enable_memory_efficient_attention],
        ["UNet3DConditionModel", "AutoencoderKL"],
    ),
    "frames": (["data.single_view.num_frames=8"], lambda w: len(w.batches[0].cameras), 8),
    "levels": (["system.geometry.pos_encoding_config.n_levels=8"], grid_levels, 8),
    "motion": (["system.loss.lambda_sds_video=0.3"], weight_of_video, 0.3),
}
OTHERS: dict[str, tuple[list[str], Callable[[Watch], Any], Any]] = {
    "no train_max_nums": ([], lambda w: max(w.points) > 50, True),
    "full precision": (["trainer.precision=32"], lambda w: any(w.autocast), False),
    "more motion": (["system.loss.lambda_sds_video=0.5"], weight_of_video, 0.5),
}


@pytest.mark.parametrize("knobs", [KNOBS, OTHERS], ids=["less memory", "more"])
def test_the_knobs_of_the_readme_have_their_effects(knobs, models, tmp_path, monkeypatch):
    name = "fourdfy_stage_3_low_vram"
    reduced = [*toy(name, models), *(word for overrides, *_ in knobs.values() for word in overrides)]
    seed = seed_of_all_kinds(experiment(name, reduced))
    watch = Watch(monkeypatch)
    line = ["--config", str(CONFIGS / f"{name}.yaml"), "--train", "--gpu", "cpu", f"exp_root_dir={tmp_path}"]
    assert main([*line, f"seed={seed}", PROMPT, *reduced]) == 0
    assert watch.batches
    found = {knob: effect(watch) for knob, (_, effect, _) in knobs.items()}
    assert found == {knob: expected for knob, (*_, expected) in knobs.items()}
