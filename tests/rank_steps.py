"""Steps on several ranks, as a program of its own: ``python -m tests.rank_steps FOLDER DEVICE COUNT ...``.

All modules are imported once; then the ranks are forked, COUNT together. Each group runs all ``CASES``, on
the CPU or with a GPU for each rank (DEVICE is ``cpu`` or ``cuda``), and its first rank writes what it found
to ``FOLDER/COUNT.pt``.
"""

import os
import signal
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments.lightning import find_free_network_port
from torch import Tensor
from torch.distributed.tensor import DTensor

from fourdfy.callbacks.base import Callback, Run
from fourdfy.launching.experiment import Experiment, load_experiment
from fourdfy.launching.lightning import LightningSystem, Trainer
from fourdfy.ops.ranks import Ranks, together
from fourdfy.systems.base import System
from tests.commands import CONFIGS, TINY, launch
from tests.tiny_models import save_multi_view, save_stable_diffusion

FREE = ("system.freeze_static_modules=false", "data.single_view.num_frames=5")
NORMALS = (
    "system.material_type=diffuse-with-point-light-material",
    "system.material={ambient_only_steps: 0}",
    "system.loss.lambda_orient=1",
    "system.loss.lambda_z_variance=1",
)
LONG = ("trainer.max_steps=6", "trainer.val_check_interval=2", "checkpoint.every_n_train_steps=100")
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "reconstruction, vsd with a LoRA, sds of clips": ("shapes_stage_3", FREE),
    "a deformation, in passes and parts, a causal VAE, a sharded transformer": (
        "shapes_stage_3_wan",
        (
            *FREE,
            "system.geometry.pos_encoding_config.otype=HashGridSpatialTimeDeform",
            "system.loss.lambda_deformation=1",
            "system.renderer.train_max_nums=300",
            "system.renderer.train_max_nums_static=300",
            "system.guidance_multi_view.low_ram_vae=1",
            "system.guidance_video.shard_over_ranks=true",
            "trainer.accumulate_grad_batches=2",
        ),
    ),
    "sds of images, normals, a network for the background, sharded priors": (
        "shapes_stage_3",
        (
            *FREE,
            *NORMALS,
            "data.single_view.batch_size=3",
            "data.multi_view.batch_size=8",
            "system.background_type=neural-environment-map-background",
            "system.background={random_aug: true}",
            "system.guidance_type=stable-diffusion-guidance",
            "system.guidance={pretrained_model_name_or_path: fourdfy/shapes-image}",
            "system.guidance.half_precision_weights=false",
            "system.guidance.shard_over_ranks=true",
            "system.guidance_multi_view.shard_over_ranks=true",
        ),
    ),
    "random subsets of samples and frames": (
        "shapes_stage_3",
        (
            *FREE,
            "system.renderer_type=stable-nerf-volume-renderer",
            "system.renderer={base_renderer: {gradient: subset, train_max_nums: 900}}",
            "system.renderer.base_renderer.num_samples_per_ray=16",
            "system.guidance_video.gradient=subset",
            "system.guidance_video.low_ram_vae=3",
        ),
    ),
}
"""Name -> config, overrides. Each runs every kind of step."""


class Gradients(Callback):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[dict[str, Any]] = []

    def after_step(self, run: Run, batch: Any, losses: Any) -> None:
        grads = {}
        for name, parameter in run.system.named_parameters():
            if parameter.grad is not None:
                grads[name] = parameter.grad.clone()
        samples = run.means.read()[f"{batch.kind}/samples"]
        seen = {"kind": batch.kind, "samples": samples, "losses": {k: v.item() for k, v in losses.items()}}
        self.steps.append({**seen, "grads": grads})


def prepared(config: str, overrides: tuple[str, ...], device: str) -> tuple[Experiment, System]:
    experiment = load_experiment([CONFIGS / f"{config}.yaml"], [*TINY, *overrides])
    system = experiment.build_system().to(device)
    system.prepare(torch.device(device), resumed=False)
    return experiment, system


def run_case(config: str, overrides: tuple[str, ...], device: str, is_first: bool) -> dict[str, Any]:
    """The steps of one case, and the scene behind them."""
    experiment, system = prepared(config, overrides, device)
    kinds = [kind.name for kind in experiment.plan.kinds]
    data = experiment.build_data()
    data.choose_kind = lambda step: kinds[step % len(kinds)]
    run = Run(
        system=system,
        data=data,
        folder=Path("unused"),
        label="ranks",
        max_steps=len(kinds),
        # Of all parameters; Adam would divide rounding by rounding.
        optimizer=torch.optim.SGD([{"params": system.parameters(), "name": "all"}], lr=1e-6),
    )
    gradients = Gradients()
    cfg = experiment.cfg.trainer
    object.__setattr__(cfg, "max_steps", run.max_steps)
    Trainer(cfg, run, {"gradients": gradients} if is_first else {}, device=device).fit(None)
    guidances = {kind.name: getattr(system, kind.module) for kind in experiment.plan.kinds}
    sharded = {
        name
        for name, guidance in guidances.items()
        if any(isinstance(p, DTensor) for p in guidance.prior.denoiser.network.parameters())
    }
    state: dict[str, Tensor] = {name: value.clone() for name, value in system.state_dict().items()}
    return {"steps": gradients.steps, "state": state, "sharded": sharded}


COMMANDS: dict[str, tuple[str, ...]] = {"stopped": (), "died": ("trainer.max_steps=50",)}
"""Runs of ``launch.py`` on two ranks; what the second one does in its third step says the name."""


def run_command(folder: Path, name: str, port: int, rank: int) -> None:
    """The command line as torchrun starts it; its exit status and what it says go to ``folder``."""
    ours = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in ours.items()}
    os.environ |= {"TORCHELASTIC_RUN_ID": "tests", "MASTER_ADDR": "127.0.0.1"}
    step = LightningSystem.training_step

    def watched(self: LightningSystem, batch: Any, batch_idx: int) -> Tensor:
        if rank == 1 and batch.step == 2:
            if name == "died":
                os._exit(9)
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, batch_idx)

    LightningSystem.training_step = watched
    with open(folder / f"{name}.{rank}.log", "w") as log:
        os.dup2(log.fileno(), 2)
    try:
        status = launch("shapes_stage_1.yaml", "train", folder / name, *LONG, *COMMANDS[name])
    except SystemExit as error:
        status = error.code
    (folder / f"{name}.{rank}.status").write_text(str(status))


def run_cases(folder: Path, device: str, rank: int, count: int) -> None:
    backend = "gloo"
    if device == "cuda":
        device, backend = f"cuda:{rank}", "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(rank)
    if count > 1:
        store = f"file://{folder / f'{count}.store'}"
        wait = timedelta(seconds=60)
        dist.init_process_group(backend, init_method=store, rank=rank, world_size=count, timeout=wait)
    with together(Ranks(rank, count)):
        cases = dict([*CASES.items()][: 2 if count > 2 else None])  # enough of shares that are empty
        found = {name: run_case(*case, device, rank == 0) for name, case in cases.items()}
    if rank == 0:
        torch.save(found, folder / f"{count}.pt")


def run_benchmark(folder: Path, rank: int) -> None:
    """``benchmarks/ranks.py`` at toy size, of two ranks."""
    sys.path.insert(0, str(CONFIGS.parent / "benchmarks"))
    from benchmarks import ranks

    toy = ["fourdfy_stage_1", "--toy", "--gpu", "cpu,cpu", "--out", str(folder), "--models", str(folder)]
    toy += ["data.multi_view.width=8", "data.multi_view.height=8"]
    dist.init_process_group("gloo", init_method=f"file://{folder / 'toy.store'}", rank=rank, world_size=2)
    with together(Ranks(rank, 2)):
        ranks.measure(ranks.parse(toy), "cpu")


def forked(work: Any, *arguments: Any) -> int:
    """The process id of a copy of this one that does the work."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        work(*arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def run_others(folder: Path) -> int:
    """Runs of the command line, and the benchmark, on two ranks of the CPU."""
    for name in COMMANDS:
        port = find_free_network_port()
        for pid in [forked(run_command, folder, name, port, rank) for rank in range(2)]:
            os.waitpid(pid, 0)
    save_stable_diffusion(folder / "stable-diffusion")
    save_multi_view(folder / "mvdream")
    return max(os.waitpid(pid, 0)[1] for pid in [forked(run_benchmark, folder, rank) for rank in range(2)])


def main() -> int:
    folder, device, *counts = sys.argv[1:]
    torch.set_num_threads(1)  # for all: a thread that works does not survive a fork
    failed = 0
    if device == "cpu":  # not with GPUs: a process that has looked at them can't be forked
        for case in [*CASES.values()][:2]:
            prepared(*case, "cpu")  # imports what is imported late
        failed = run_others(Path(folder))
    for count in map(int, counts):
        pids = [forked(run_cases, Path(folder), device, rank, count) for rank in range(count)]
        failed |= max(os.waitpid(pid, 0)[1] for pid in pids)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
