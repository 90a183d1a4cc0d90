"""Train the small models of the shapes world.

    python -m fourdfy.shapes.training all --out DIR --minutes 9.3
    python -m fourdfy.shapes.training image --out DIR --minutes 4      # again to go on
    python -m fourdfy.shapes.training samples --out DIR                # grids and measured quality
    python -m fourdfy.shapes.training export --out DIR --assets FOLDER # genuine model folders

Parts: text, vae, then image, multi_view and video, which need the first two. ``--minutes`` bounds
the wall clock of a call. B scenes of F frames in a batch, L tokens of C channels.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, l1_loss, mse_loss

from fourdfy.seeds import step_seed
from fourdfy.shapes import store
from fourdfy.shapes.data import (
    EMPTY_TEXT,
    FRAMES,
    LatentPool,
    draw_scenes,
    render_scenes,
)
from fourdfy.shapes.denoising import predict_velocity, text_table
from fourdfy.shapes.grammar import COLOURS, MOMENTS, MOTIONS, SHAPES, VIEWS, full_text, training_prompts
from fourdfy.shapes.models import DENOISERS, build_scheduler, build_tokenizer

logger = logging.getLogger(__name__)

PARTS = ("text", "vae", *DENOISERS)
EMA_DECAY = 0.999
TEXT_DROPOUT = 0.1
WARMUP_STEPS = 200
LAST_LR_FRACTION = 0.02
SAVE_EVERY_SECONDS = 90.0
REFRESH_EVERY = 50
"""Steps between two renewals of a part of the pool."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How one part is trained in one call."""

    part: str
    out: Path
    minutes: float
    """Wall clock of this call, set-up and saving included."""
    device: str = "cpu"
    seed: int = 0
    max_steps: int | None = None
    """End after this many steps of this call, if time has not run out before."""
    batch: int | None = None
    """Scenes per step; None takes the part's own (BATCH)."""
    pool: int | None = None
    """Scenes kept on the device; None takes the part's own (POOL)."""
    lr: float | None = None


BATCH = {"text": 256, "vae": 192, "image": 512, "multi_view": 128, "video": 64}
POOL = {"image": 200_000, "multi_view": 50_000, "video": 25_000}
LEARNING_RATE = {"text": 2e-3, "vae": 1.5e-3, "image": 6e-4, "multi_view": 6e-4, "video": 6e-4}
RENDER_AT_ONCE = 2048
"""Images rendered in one go on an accelerator; the CPU takes 32."""


class Trainee:
    """A model with its average, its optimizer, and how far it has come."""

    def __init__(self, options: Options, model: nn.Module) -> None:
        self.options, self.model = options, model
        self.step, self._prior_seconds = 0, 0.0
        self.saved_at = 0.0
        self.last_losses: dict[str, float] = {}
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        device, part = options.device, options.part
        self.peak_lr = options.lr or LEARNING_RATE[part]
        self.model.to(device, memory_format=_memory_format(part)).train().requires_grad_(True)
        state = store.load_state(options.out, part)
        if state is None and store.weights_path(options.out, part).exists():
            # The state did not come along; the average of the last piece is a good start.
            self.model.load_state_dict(store.load_part(options.out, part).state_dict())
            record = store.read_record(options.out, part)
            self.step, self._prior_seconds = record["steps"], record["seconds"]
        self.ema = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.peak_lr, betas=(0.9, 0.99), weight_decay=0.01,
            fused=torch.device(device).type == "cuda",
        )  # fmt: skip
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.ema = {name: value.to(device) for name, value in state["ema"].items()}
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self._prior_seconds = state["step"], state["seconds"]
        self.first_step = self.step
        current = self.model.state_dict()
        names = [name for name, value in current.items() if value.is_floating_point()]
        self._averages, self._currents = [self.ema[n] for n in names], [current[n] for n in names]

    def set_lr(self, fraction: float) -> None:
        """Warm-up in steps, then a cosine over ``fraction`` (0..1) of this call's time."""
        warmup = min(1.0, (self.step - self.first_step + 1) / WARMUP_STEPS)
        cosine = 0.5 + 0.5 * math.cos(math.pi * min(1.0, fraction))
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak_lr * warmup * (LAST_LR_FRACTION + (1 - LAST_LR_FRACTION) * cosine)

    def learn(self, losses: dict[str, Tensor]) -> None:
        """One optimizer step on the sum of ``losses``, which must be weighted."""
        self.optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()  # type: ignore[union-attr]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self._averages, self._currents, 1 - decay)
        self._sums = {k: self._sums.get(k, 0) + v.detach() for k, v in losses.items()}
        self._count += 1

    def mean_losses(self) -> dict[str, float]:
        """Means since the last call; waits for the device."""
        if self._count:
            self.last_losses = {k: float(v) / self._count for k, v in self._sums.items()}
        self._sums, self._count = {}, 0
        return self.last_losses

    def save(self, elapsed: float, **record: Any) -> None:
        """State, averaged weights and record."""
        out, part = self.options.out, self.options.part
        seconds = self._prior_seconds + elapsed
        state = {"model": self.model.state_dict(), "ema": self.ema, "optimizer": self.optimizer.state_dict()}
        store.save_state(out, part, state | {"step": self.step, "seconds": seconds})
        store.save_weights(out, part, self.ema)
        store.update_record(
            out, part, seed=self.options.seed, steps=self.step, seconds=round(seconds, 1),
            batch=self.options.batch or BATCH[part], peak_lr=self.peak_lr,
            device=_device_name(self.options.device),
            parameters=sum(p.numel() for p in self.model.parameters()), losses=self.mean_losses(), **record,
        )  # fmt: skip


class Clock:
    """This call's budget of wall clock."""

    def __init__(self, minutes: float, reserve_s: float = 0.0) -> None:
        self.start = time.perf_counter()
        self.budget = max(1e-6, 60 * minutes - reserve_s)

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.start

    @property
    def fraction(self) -> float:
        return self.elapsed / self.budget


def train_text(options: Options) -> None:
    """Train the text encoder to tell colour, shape, motion, moment and view from its states.

    Texts have parts left out at random, down to the empty prompt, and each token's state must
    still name its token, so that the diffusion models find every word where it stands.
    """
    clock = Clock(options.minutes)
    trainee, encoder, tokenizer = _start(options)
    device = options.device
    kinds = (COLOURS, SHAPES, MOTIONS, MOMENTS, VIEWS)
    width = encoder.config.hidden_size
    torch.manual_seed(step_seed(options.seed, 0, "heads"))
    heads = nn.ModuleList(nn.Linear(width, len(kind) + 1) for kind in kinds).to(device)
    words = nn.Linear(width, encoder.config.vocab_size).to(device)
    head_optimizer = torch.optim.AdamW([*heads.parameters(), *words.parameters()], lr=trainee.peak_lr)
    coin = random.Random(step_seed(options.seed, trainee.step, "text"))
    right = 0.0
    while _goes_on(trainee, clock):
        texts, labels = _draw_texts(coin, options.batch or BATCH["text"])
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        ids, target = tokens.input_ids.to(device), torch.tensor(labels, device=device)
        states = encoder(ids).last_hidden_state
        logits = [head(states[:, -1]) for head in heads]
        said = sum(cross_entropy(logit, target[:, k]) for k, logit in enumerate(logits))
        word = cross_entropy(words(states).flatten(0, 1), ids.flatten())
        head_optimizer.zero_grad(set_to_none=True)
        trainee.learn({"attributes": said, "words": word})
        head_optimizer.step()
        right = float(
            torch.stack([x.argmax(-1) == target[:, k] for k, x in enumerate(logits)]).all(0).float().mean()
        )
    trainee.save(clock.elapsed, batch_right=right)
    logger.info(
        "text: step %d, %s, all attributes right in %.1f %%", trainee.step, trainee.last_losses, 100 * right
    )


def train_vae(options: Options) -> None:
    """Train the image autoencoder on renderings, clean and half-made, and measure its latents' scale."""
    clock = Clock(options.minutes, reserve_s=3.0)
    trainee, vae, _ = _start(options)
    device, count = options.device, options.batch or BATCH["vae"]
    generator = torch.Generator().manual_seed(step_seed(options.seed, trainee.step, "vae"))
    while _goes_on(trainee, clock):
        images = _spoil(render_scenes(draw_scenes("vae", count, generator), device)[:, 0], generator)
        images = images.contiguous(memory_format=_memory_format("vae"))
        with _autocast(device):
            latent = vae.encode(images).latent_dist
            decoded = vae.decode(latent.sample()).sample
        decoded = decoded.float()
        edges = l1_loss(decoded.diff(dim=-1), images.diff(dim=-1)) + l1_loss(
            decoded.diff(dim=-2), images.diff(dim=-2)
        )
        mean, logvar = latent.mean.float(), latent.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        trainee.learn(
            {
                "l1": l1_loss(decoded, images),
                "l2": 2 * mse_loss(decoded, images),
                "edges": 0.5 * edges,
                "kl": 1e-4 * kl,
            }
        )
    scale, psnr = _measure_vae(trainee, generator)
    trainee.save(clock.elapsed, scaling_factor=scale, psnr=psnr)
    logger.info("vae: scaling factor %.4f, PSNR %.1f dB", scale, psnr)


def train_denoiser(options: Options) -> None:
    """Train a diffusion model on a pool of encoded scenes that is slowly renewed."""
    part, device = options.part, options.device
    clock = Clock(options.minutes, reserve_s=3.0)
    trainee, unet, _ = _start(options)
    vae = store.load_part(options.out, "vae", device)
    texts = text_table(options.out, device)
    alphas_cumprod = build_scheduler().alphas_cumprod.to(device)
    pool = LatentPool(
        part, options.pool or POOL[part], vae, step_seed(options.seed, trainee.step, "pool"), device
    )
    chunk = (RENDER_AT_ONCE if _on_gpu(device) else 32) // FRAMES[part]
    while pool.filled < len(pool) and (pool.filled == 0 or clock.fraction < 0.2):
        pool.refresh(chunk)
    logger.info("%s: %d scenes ready after %.0f s", part, pool.filled, clock.elapsed)
    generator = torch.Generator(device).manual_seed(step_seed(options.seed, trainee.step, "noise"))
    count = options.batch or BATCH[part]
    while _goes_on(trainee, clock):
        latents, text, cameras = pool.batch(count, generator)
        dropped = torch.rand(count, generator=generator, device=device) < TEXT_DROPOUT
        text = torch.where(dropped, EMPTY_TEXT, text)
        timesteps = torch.randint(len(alphas_cumprod), (count,), generator=generator, device=device)
        noise = torch.randn(latents.shape, generator=generator, device=device)
        alpha = alphas_cumprod[timesteps].view(-1, 1, 1, 1, 1)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        with _autocast(device):
            velocity = predict_velocity(part, unet, noisy, timesteps, texts[text], cameras)
        target = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        trainee.learn({"velocity": mse_loss(velocity.float(), target)})
        if pool.filled == len(pool) and trainee.step % REFRESH_EVERY == 0:
            pool.refresh(chunk)
    trainee.save(clock.elapsed)
    logger.info("%s: step %d, %s", part, trainee.step, trainee.last_losses)


def train(options: Options) -> None:
    """Train one part; a part trained before goes on."""
    logger.info("%s: up to %.2f minutes on %s", options.part, options.minutes, _device_name(options.device))
    {"text": train_text, "vae": train_vae}.get(options.part, train_denoiser)(options)


def train_all(options: Options, passed_on: Sequence[str]) -> None:
    """Text encoder if there is none, VAE, then the three denoisers side by side, one on each GPU.

    The denoisers run as processes of their own, round robin over the GPUs, and each measures its
    samples in the last part of its time.
    """
    clock = Clock(options.minutes)
    if not store.is_trained(options.out, "text"):
        train(replace(options, part="text", minutes=min(1.0, 0.1 * options.minutes)))
    if not store.weights_path(options.out, "vae").exists():
        train(replace(options, part="vae", minutes=min(1.7, 0.2 * options.minutes)))
    num_gpus = torch.cuda.device_count() if _on_gpu(options.device) else 0
    # An absolute end, since a child's imports count too.
    until = time.time() + clock.budget - clock.elapsed - min(54, 0.1 * clock.budget)
    for command in ("train", "samples"):
        children = []
        for k, part in enumerate(DENOISERS):
            what = (
                ["samples", "--models", part] if command == "samples" else [part, "--until", f"{until:.1f}"]
            )
            environment = dict(os.environ)
            if num_gpus:
                visible = environment.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(num_gpus)))
                environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[k % num_gpus]
            call = [
                sys.executable,
                "-m",
                "fourdfy.shapes.training",
                *what,
                "--out",
                str(options.out),
                *passed_on,
            ]
            children.append((part, subprocess.Popen(call, env=environment)))
        failed = [part for part, child in children if child.wait()]
        if failed:
            logger.error("%s failed for %s", command, ", ".join(failed))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fourdfy.shapes.training", description=__doc__.split("\n")[0]
    )
    parser.add_argument("part", choices=(*PARTS, "all", "samples", "export"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--minutes", type=float, default=5.0, help="wall clock of this call")
    parser.add_argument(
        "--until", type=float, help="end of this call in seconds of the epoch, instead of --minutes"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--pool", type=int, help="scenes kept on the device")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--models", nargs="+", choices=DENOISERS, default=DENOISERS, help="for samples")
    parser.add_argument("--num-prompts", type=int, default=96, help="for samples")
    parser.add_argument("--sample-steps", type=int, default=30, help="for samples")
    parser.add_argument("--guidance", type=float, default=5.0, help="for samples")
    parser.add_argument("--assets", type=Path, default=store.ASSETS, help="for export: where the folders go")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    minutes = given.minutes if given.until is None else (given.until - time.time()) / 60
    transformers.utils.logging.disable_progress_bar()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    options = Options(
        part=given.part, out=given.out, minutes=minutes, device=given.device, seed=given.seed,
        max_steps=given.max_steps, batch=given.batch, pool=given.pool, lr=given.lr,
    )  # fmt: skip
    given.out.mkdir(parents=True, exist_ok=True)
    if given.part == "samples":
        from fourdfy.shapes.quality import measure

        for part in given.models:
            measure(
                part, given.out, device=given.device, seed=given.seed, num_prompts=given.num_prompts,
                steps=given.sample_steps, guidance_scale=given.guidance,
            )  # fmt: skip
    elif given.part == "export":
        from fourdfy.shapes.export import export

        export(given.out, given.assets)
    elif given.part == "all":
        names = (
            "device",
            "seed",
            "max_steps",
            "batch",
            "pool",
            "lr",
            "num_prompts",
            "sample_steps",
            "guidance",
        )
        passed_on = [
            word
            for name in names
            if getattr(given, name) is not None
            for word in (f"--{name.replace('_', '-')}", str(getattr(given, name)))
        ]
        train_all(options, passed_on)
        main(["export", "--out", str(given.out), "--assets", str(given.assets)])
    else:
        train(options)


def _start(options: Options) -> tuple[Trainee, nn.Module, Any]:
    torch.manual_seed(step_seed(options.seed, 0, options.part))
    trainee = Trainee(options, store.build(options.part))
    tokenizer = build_tokenizer() if options.part == "text" else None
    return trainee, trainee.model, tokenizer


def _goes_on(trainee: Trainee, clock: Clock) -> bool:
    """Whether there is time for another step; sets its learning rate, logs and saves now and then."""
    done = trainee.step - trainee.first_step
    limit = trainee.options.max_steps
    if clock.fraction >= 1 or (limit is not None and done >= limit):
        trainee.mean_losses()
        return False
    trainee.set_lr(max(clock.fraction, done / limit if limit else 0))
    if done and done % 200 == 0:
        losses = ", ".join(f"{name} {value:.5f}" for name, value in trainee.mean_losses().items())
        rate = done / clock.elapsed
        logger.info(
            "%s: step %d, %s, %.1f steps/s, %.0f %%",
            trainee.options.part, trainee.step, losses, rate, 100 * clock.fraction,
        )  # fmt: skip
    if clock.elapsed - trainee.saved_at > SAVE_EVERY_SECONDS:
        trainee.saved_at = clock.elapsed
        trainee.save(clock.elapsed)
    return True


def _draw_texts(coin: random.Random, count: int) -> tuple[list[str], list[list[int]]]:
    """Texts and, for each kind of word, 0 where it is missing or 1 + its index."""
    texts, labels = [], []
    prompts = training_prompts()
    for _ in range(count):
        prompt = coin.choice(prompts)
        moment = coin.choice((None, *MOMENTS)) if coin.random() < 0.8 else None
        view = coin.choice((None, *VIEWS)) if coin.random() < 0.8 else None
        if coin.random() < 0.1:
            texts.append("")
            labels.append([0] * 5)
            continue
        texts.append(full_text(prompt, moment, view))
        labels.append(
            [
                1 + COLOURS.index(prompt.colour),
                1 + SHAPES.index(prompt.shape),
                1 + MOTIONS.index(prompt.motion),
                1 + MOMENTS.index(moment) if moment else 0,
                1 + VIEWS.index(view) if view else 0,
            ]
        )
    return texts, labels


def _spoil(images: Float[Tensor, "B 3 H W"], generator: torch.Generator) -> Float[Tensor, "B 3 H W"]:
    """Some of the images as a scene in the making shows them: mixed, faded or blurred."""
    count = len(images)
    kind = torch.rand(count, 1, 1, 1, generator=generator).to(images.device)
    weight = torch.rand(count, 1, 1, 1, generator=generator).to(images.device)
    plain = (torch.rand(count, 3, 1, 1, generator=generator) * 2 - 1).to(images.device)
    blurred = nn.functional.interpolate(
        nn.functional.avg_pool2d(images, 4), scale_factor=4, mode="bilinear", align_corners=False
    )
    spoiled = torch.where(kind < 0.12, images.lerp(images.roll(1, 0), weight), images)
    spoiled = torch.where(
        (kind > 0.12) & (kind < 0.22), images.lerp(plain.expand_as(images), weight), spoiled
    )
    return torch.where((kind > 0.22) & (kind < 0.32), images.lerp(blurred, weight), spoiled)


@torch.no_grad()
def _measure_vae(trainee: Trainee, generator: torch.Generator) -> tuple[float, float]:
    """1 / standard deviation of the average model's latents on clean renderings, and its PSNR in dB."""
    device = trainee.options.device
    vae = store.build("vae").to(device)
    vae.load_state_dict(trainee.ema)
    images = render_scenes(draw_scenes("vae", 1024 if _on_gpu(device) else 64, generator), device)[:, 0]
    latents = vae.encode(images).latent_dist.sample()
    error = (vae.decode(latents).sample - images).square().mean() / 4
    return 1 / float(latents.std()), -10 * math.log10(float(error))


def _autocast(device: str) -> torch.autocast:
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=_on_gpu(device))


def _on_gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if _on_gpu(device) else "CPU"


def _memory_format(part: str) -> torch.memory_format:
    return torch.contiguous_format if part in ("text", "video") else torch.channels_last


if __name__ == "__main__":
    main()
