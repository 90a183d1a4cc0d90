"""Measure time and memory of each kind of step in the twelve experiments, with models of the real size.

    python benchmarks/experiments.py --models outputs/models --out outputs/experiments    # on every GPU
    python benchmarks/experiments.py ... --config fourdfy_stage_3 --config fourdfy_stage_3_vc --steps 40

The models have random weights and are made once (11 GB in float16). Learning rates are 0, so that every step
sees the same compact object: the initial blob, which fills about 8 % of the occupancy grid. Stages 1 and 2 go
from 64 x 64 to 256 x 256 pixels half way. The times leave out the first step of each kind.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpus import environment, spread

from fourdfy.callbacks.base import Callback, Run
from fourdfy.launching.experiment import Experiment, load_experiment
from fourdfy.launching.lightning import Trainer

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("fourdfy_stage_*.yaml"))
KINDS = ("multi_view 64", "multi_view 256", "single_view", "video")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", type=Path, required=True, help="folder of the models; made if missing")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--config", action="append", choices=CONFIGS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--here", action="store_true", help="run the one config in this process")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    names = args.config or CONFIGS
    if args.here:
        result = measure(names[0], args.models, args.steps, args.overrides)
        (args.out / f"{names[0]}.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    make_models(args.models)
    spread(names, lambda name, gpu: run(name, gpu, args))
    results = {
        name: json.loads(file.read_text(encoding="utf-8"))
        for name in names
        if (file := args.out / f"{name}.json").exists()
    }
    for name in names:
        if name not in results:
            print(f"{name} failed; see {args.out / name}.log")
    print(
        f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}, torch {torch.__version__}"
    )
    print(table(results))


def run(name: str, gpu: str, args: argparse.Namespace) -> None:
    """Run one config in its own process; the log is written beside the result."""
    command = [sys.executable, __file__, "--here", "--config", name, "--models", str(args.models)]
    command += ["--out", str(args.out), "--steps", str(args.steps), *args.overrides]
    paths = {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    with open(args.out / f"{name}.log", "w", encoding="utf-8") as log:
        subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment(gpu) | paths, check=False
        )


def measure(name: str, models: Path, steps: int, overrides: list[str]) -> dict[str, Any]:
    """Return ms, peak GiB and count of each kind of step, and the ms of their mixture."""
    experiment = load_experiment(
        [ROOT / "configs" / f"{name}.yaml"], [*settings(name, models, steps), *overrides]
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stopwatch = Stopwatch()
    system, cfg = experiment.build_system().to(device), experiment.cfg.trainer
    system.prepare(torch.device(device), resumed=False)
    run = Run(
        system=system,
        data=experiment.build_data(),
        folder=experiment.trial_dir,
        label=name,
        max_steps=cfg.max_steps,
        optimizer=system.configure_optimizer(),
    )
    Trainer(cfg, run, {"stopwatch": stopwatch}, device=device).fit(None)
    return {"kinds": stopwatch.summary(), "mixture_ms": mixture(experiment, stopwatch.summary())}


def settings(name: str, models: Path, steps: int) -> list[str]:
    given = [
        "system.prompt_processor.prompt=a panda dancing",
        f"exp_root_dir={models / 'trials'}",
        f"trainer.max_steps={steps}",
        "trainer.val_check_interval=0",
        f"system.prompt_processor.pretrained_model_name_or_path={models / 'stable-diffusion'}",
        f"system.prompt_processor_multi_view.pretrained_model_name_or_path={models / 'stable-diffusion'}",
        f"system.guidance.pretrained_model_name_or_path={models / 'stable-diffusion'}",
        f"system.guidance.pretrained_model_name_or_path_lora={models / 'stable-diffusion-v'}",
        f"system.guidance_multi_view.pretrained_model_name_or_path={models / 'mvdream'}",
        f"data.multi_view.resolution_milestones=[{steps // 2}]",
    ]
    video = models / ("videocrafter2" if "_vc" in name else "zeroscope")
    given.append(f"system.prompt_processor_video.pretrained_model_name_or_path={video}")
    given.append(f"system.guidance_video.pretrained_model_name_or_path={video}")
    return given


class Stopwatch(Callback):
    """Records time and peak memory of every training step by its kind, and keeps the scene as it is."""

    def __init__(self) -> None:
        self.steps: dict[str, list[tuple[float, int]]] = defaultdict(list)

    def begin(self, run: Run) -> None:
        for group in run.optimizer.param_groups:
            group["lr"] = 0.0
        self._start()

    def after_step(self, run: Run, batch: Any, losses: Any) -> None:
        peak = 0
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        size = f" {batch.cameras.height}" if batch.kind == "multi_view" else ""
        self.steps[batch.kind + size].append((1000 * (time.perf_counter() - self.began), peak))
        self._start()

    def _start(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.began = time.perf_counter()

    def summary(self) -> dict[str, dict[str, float]]:
        return {
            kind: {
                "ms": median(ms for ms, _ in steps[1:] or steps),
                "peak_gib": max(peak for _, peak in steps) / 2**30,
                "steps": len(steps),
            }
            for kind, steps in self.steps.items()
        }


def mixture(experiment: Experiment, kinds: dict[str, dict[str, float]]) -> float | None:
    """Return the mean ms of a step, weighted as in the plan, with multi-view steps at full size."""
    total = 0.0
    for kind in experiment.plan.kinds:
        measured = [kinds[name]["ms"] for name in (kind.name, f"{kind.name} 256") if name in kinds]
        if not measured:
            return None
        total += kind.probability * measured[0]
    return total


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| config | " + " | ".join(f"{kind}: ms, GiB" for kind in KINDS) + " | mixture ms |",
        "|" + " --- |" * 6,
    ]
    for name, result in results.items():
        cells = [
            f"{cell['ms']:.0f}, {cell['peak_gib']:.1f}" if (cell := result["kinds"].get(kind)) else "-"
            for kind in KINDS
        ]
        whole = f"{result['mixture_ms']:.0f}" if result["mixture_ms"] else "-"
        lines.append(f"| {name.removeprefix('fourdfy_')} | {' | '.join(cells)} | {whole} |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------
# Models of the real size


def make_models(root: Path) -> None:
    """Write model folders in diffusers layout, as the hub or our converter would, with random weights."""
    from diffusers import UNet2DConditionModel, UNet3DConditionModel
    from diffusers.models.embeddings import TimestepEmbedding

    image = {
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
        "sample_size": 64,
    }
    views = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 16, "sample_size": 32}
    for name, network, config, prediction in (
        ("stable-diffusion", UNet2DConditionModel, image, "epsilon"),
        ("stable-diffusion-v", UNet2DConditionModel, image | {"upcast_attention": True}, "v_prediction"),
        ("mvdream", UNet2DConditionModel, image | views, "epsilon"),
        ("zeroscope", UNet3DConditionModel, {"sample_size": 32}, "epsilon"),
        ("videocrafter2", UNet3DConditionModel, {"sample_size": (40, 64)}, "epsilon"),
    ):
        folder = root / name
        if folder.exists():
            continue
        began = time.perf_counter()
        half_made = folder.with_suffix(".part")
        save(network, config, half_made / "unet")
        save_common(half_made, prediction)
        if name == "videocrafter2":
            fps = {"in_channels": 320, "time_embed_dim": 1280}
            save_tensors(make(TimestepEmbedding, fps), half_made / "fps_embedding")
        half_made.rename(folder)
        print(f"{name}: made in {time.perf_counter() - began:.0f} s", file=sys.stderr)


def save_common(folder: Path, prediction: str) -> None:
    """Save VAE, schedule, tokenizer, and a text encoder of the right width (one layer: it runs once)."""
    from diffusers import AutoencoderKL, DDIMScheduler
    from transformers import CLIPTextConfig, CLIPTextModel

    from tests.tiny_models import MAX_TOKENS, save_clip_text

    vae = {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": 512,
    }
    save(AutoencoderKL, vae, folder / "vae")
    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, prediction_type=prediction,
    ).save_pretrained(folder / "scheduler")  # fmt: skip
    save_clip_text(folder)
    shape = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 1,
    }
    config = CLIPTextConfig(hidden_act="gelu", max_position_embeddings=MAX_TOKENS, **shape)
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")


def save(network: type, config: dict[str, Any], folder: Path) -> None:
    make(network, config).half().save_pretrained(folder)


def save_tensors(network: torch.nn.Module, folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    save_file(network.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text("{}", encoding="utf-8")


def make(network: type, config: dict[str, Any]) -> torch.nn.Module:
    """Build with PyTorch's initial weights, on the GPU if there is one, which draws them faster."""
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return network(**config)


if __name__ == "__main__":
    main()
