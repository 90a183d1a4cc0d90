"""Measure the frozen networks of the paper's third stage, alone and at the sizes of a training step.

    python benchmarks/priors.py --models outputs/models        # real sizes, on a GPU
    python benchmarks/priors.py --toy                          # seconds; what the test runs

``eager`` is the network as diffusers computes it, ``graph`` the same replayed as a CUDA graph, ``trained``
what a training step calls: compiled and replayed, with the project's VAE encoder. The rows ``VAE`` include
the backward pass to the images. ``all`` is the whole distillation; that of a single view is the encoder, the
prior's U-Net, the LoRA without and with its gradients, and the backward pass. The floor is the operations of
the eager network over 790 TFLOP/s. "Cosine" compares what ``trained`` and ``eager`` give: the U-Net's output,
otherwise the gradient of the images.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from models import make_models, make_tiny_models, model_paths, parse_with_models
from timing import floor_ms, head, row, times_ms, where
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fourdfy.guidance.base import Guidance
from fourdfy.launching.experiment import load_experiment
from fourdfy.ops.replay import Replay
from fourdfy.priors.frozen import encode_images
from fourdfy.systems.supervision import StepKind
from fourdfy.types import RenderOutput, StepContext

ROOT = Path(__file__).parents[1]
KINDS = ["multi_view", "single_view", "video"]
STEP = 6000
TOY = (
    "data.single_view.num_frames=2",
    *(f"data.single_view.{side}=16" for side in ("width", "height", "width_vid", "height_vid")),
    *(f"data.multi_view.{side}=16" for side in ("width", "height")),
    *(
        f"system.{guidance}.{side}=32"
        for guidance in ("guidance", "guidance_multi_view", "guidance_video")
        for side in ("height", "width")
    ),
)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    needed = ("stable-diffusion", "stable-diffusion-v", "mvdream", "zeroscope")
    make_tiny_models(args.models) if args.toy else make_models(args.models, needed)
    config = "fourdfy_stage_3"
    settings = [
        "system.prompt_processor.prompt=a panda dancing",
        f"exp_root_dir={args.models / 'trials'}",
        *model_paths(args.models, config),
        *(TOY if args.toy else ()),
        *args.overrides,
    ]
    plan = load_experiment([ROOT / "configs" / f"{config}.yaml"], settings).plan
    print(f"{where(str(device))}; median ms of {args.repeats}\n")
    print(head("network", "eager", "graph", "trained", "TFLOP", "floor", "distance", "cosine"))
    for kind in (kind for kind in plan.kinds if kind.name in args.kinds):
        for name, cells in measure(kind, device, args).items():
            print(row([f"{kind.name}: {name}", *cells]), flush=True)


def measure(kind: StepKind, device: torch.device, args: argparse.Namespace) -> dict[str, list[str]]:
    """Cells by the name of what is measured."""
    generator = torch.Generator(device).manual_seed(0)
    guidance: Guidance = kind.guidance.build(device=device)
    prior, text = guidance.prior, kind.prompts.build().embeddings(device)
    cameras = kind.cameras.sample(StepContext(STEP, torch.Generator().manual_seed(0))).to(device)
    shape = (len(cameras), cameras.height, cameras.width, 3)
    rgb = torch.rand(shape, generator=generator, device=device).requires_grad_()
    frames = RenderOutput(
        comp_rgb=rgb, opacity=rgb[..., :1], depth=rgb[..., :1], group_size=cameras.group_size
    )
    images = F.interpolate(rgb.detach().movedim(-1, 1), prior.image_size).requires_grad_()

    def distil() -> Tensor:
        out = guidance(frames, text, cameras, StepContext(STEP, generator.manual_seed(1)))
        return gradient(sum(out.losses.values()), rgb, *guidance.parameters())

    def plain_posterior(images: Tensor) -> tuple[Tensor, Tensor]:
        distribution = prior.vae.encode(images.to(prior.vae.dtype)).latent_dist
        return distribution.mean.float(), distribution.std.float()

    def encoded(encode: Callable[..., Tensor], images: Tensor = images) -> Tensor:
        return gradient(encode(images, generator.manual_seed(1)).sum(), images)

    def encoded_with(posterior: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Callable[[], Tensor]:
        return partial(encoded, partial(encode_images, prior.vae, posterior_of=posterior))

    network, *inputs = arguments_of_predict(prior, distil)
    plain_unet = partial(prior.predict, network)
    replayed_unet, replayed_vae = (Replay(call, kind.name) for call in (plain_unet, plain_posterior))
    eager = {"U-Net": partial(plain_unet, *inputs), "VAE": encoded_with(plain_posterior), "all": distil}
    graph = {"U-Net": partial(replayed_unet, *inputs), "VAE": encoded_with(replayed_vae)}
    trained = {
        "U-Net": lambda: prior.denoise(*inputs),
        "VAE": partial(encoded, lambda images, draws: prior.encode_images(images.movedim(1, -1), draws)),
        "all": distil,
    }
    operations = {name: tera_operations(run) for name, run in eager.items()}
    results = {name: run() for name, run in eager.items()}
    ms = {name: [measured(name, run, args)] for name, run in eager.items()}
    for name in eager:
        ms[name].append(measured(name, graph[name], args) if name in graph else None)
    guidance.accelerate(False)
    for name, run in trained.items():
        ms[name].append(measured(name, run, args))
    return {
        name: cells(ms[name], operations[name], F.cosine_similarity(*both(results[name], run()), dim=0))
        for name, run in trained.items()
    }


def gradient(loss: Tensor, x: Tensor, *others: Tensor) -> Tensor:
    """The gradient of ``x``; computes and forgets that of the others."""
    loss.backward()
    found = x.grad
    for leaf in (x, *others):
        leaf.grad = None
    return found


def measured(name: str, run: Callable[[], Tensor], args: argparse.Namespace) -> float:
    """The median ms; without gradients for the U-Net."""
    with torch.set_grad_enabled(name != "U-Net"):
        return median(times_ms(run, args.repeats, args.warm_up))


def arguments_of_predict(prior: Any, distil: Callable[[], Tensor]) -> tuple[Any, ...]:
    """What a training step gives the prior's network."""
    calls: list[tuple[Any, ...]] = []
    predict = prior.predict

    def noted(*inputs: Any) -> Tensor:
        calls.append(inputs)
        return predict(*inputs)

    prior.predict = noted
    distil()
    del prior.predict
    return calls[0]


def tera_operations(run: Callable[[], Tensor]) -> float:
    # torch's own formula for matrix products does not know that they take a type for their result.
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.bmm: bmm_operations}) as counter:
        run()
    return counter.get_total_flops() / 1e12


def bmm_operations(a: torch.Size, b: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * a.numel() * b[-1]


def both(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a.detach().double().flatten(), b.detach().double().flatten()


def cells(ms: list[float | None], tera: float, cosine: Tensor) -> list[str]:
    floor = floor_ms(operations=tera * 1e12)
    times = ["-" if value is None else f"{value:.1f}" for value in ms]
    return [*times, f"{tera:.2f}", f"{floor:.1f}", f"{ms[-1] / floor:.1f} x", f"{cosine.item():.5f}"]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=6)
    args = parse_with_models(parser, argv)
    if args.toy:
        args.repeats, args.warm_up = 1, 1
    return args


if __name__ == "__main__":
    main()
