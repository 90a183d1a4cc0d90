"""How each part is trained: text encoders, VAEs, then the denoisers, which need one of both.

B scenes of F frames in a batch.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import random
import time
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, interpolate, l1_loss, mse_loss

from fourdfy.ops.diffusion import add_noise, prediction_target, sample_noise
from fourdfy.ops.replay import Replay
from fourdfy.priors.acceleration import Compiled
from fourdfy.priors.causal_vae import STRIDE
from fourdfy.seeds import step_generator, step_seed
from fourdfy.shapes.grammar import VIEWS
from fourdfy.shapes.prompts import words as prompt_words
from tools.shapes_training import store
from tools.shapes_training.data import (
    EMPTY_TEXT,
    Pool,
    Scenes,
    TextTable,
    draw_scenes,
    full_text,
    latent_pool,
    prompts_of,
    render_scenes,
)
from tools.shapes_training.models import (
    DENOISERS,
    FRAMES,
    TEXTS,
    VAES,
    build,
    decode,
    encode,
    latent_shape,
    needs,
    noise_schedule,
    posterior,
    predict_velocity,
)
from tools.shapes_training.quality import measure
from tools.shapes_training.text import build_tokenizer, embed, text_words, tokenize
from tools.shapes_training.trainee import Options, Trainee

logger = logging.getLogger(__name__)

POOL = {"image": 200_000, "multi_view": 50_000, "video": 25_000, "wan": 40_000}
POOL |= {"vae": 60_000, "wan_vae": 4_000}
SHARES = {"text": (1.0, 0.1), "vae": (4.0, 0.2), "wan_text": (0.5, 0.05), "wan_vae": (5.0, 0.3)}
"""Minutes that each of these has in a call for all, at most, and share of the call."""
TEXT_DROPOUT = 0.1
FILL_SHARE = 0.1
"""Of a call's time, in which the pool is filled at most before the first step."""
RENEW_EVERY = 30
"""Steps between two renewals of a part of the pool."""
RENDER_AT_ONCE = 1024
"""Images rendered at once on an accelerator; the CPU renders 32."""
VAE_LOSSES = ("l1", "l2", "edges", "kl")


def set_up() -> None:
    """Global settings that each training process makes once."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    transformers.utils.logging.disable_progress_bar()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True


def train(options: Options) -> None:
    """Train one part, continuing its earlier training if there was any."""
    trainee = Trainee(options)
    logger.info("%s: up to %.2f minutes on %s", options.part, options.minutes, trainee.device_name)
    kinds = dict.fromkeys(TEXTS, train_text) | dict.fromkeys(VAES, train_vae)
    measured = kinds.get(options.part, train_denoiser)(trainee)
    trainee.save(**measured)
    logger.info("%s: step %d, %s", options.part, trainee.step, trainee.last_losses | measured)


def train_all(options: Options, sampling: dict[str, Any]) -> None:
    """Text encoders that don't exist, VAEs, then the denoisers side by side, one on each GPU.

    The denoisers are processes of their own, round robin over the GPUs, and each measures its
    samples in the last part of its time.
    """
    began, minutes = time.time(), options.minutes
    for part in dict.fromkeys(chain.from_iterable(map(needs, DENOISERS))):
        shipped = part in TEXTS and store.shipped_folder(part).is_dir()
        if not (shipped or store.weights_path(options.out, part).exists()):
            most, share = SHARES[part]
            train(replace(options, part=part, minutes=min(most, share * minutes)))
    # An absolute end, since a child's imports count too.
    until = began + 60 * minutes - min(54, 6 * minutes)
    context, children = multiprocessing.get_context("spawn"), {}
    for k, part in enumerate(DENOISERS):
        device = torch.device("cuda", k % torch.cuda.device_count()) if options.on_gpu else options.device
        mine = replace(options, part=part, device=device)
        children[part] = context.Process(target=_train_and_measure, args=(mine, until, sampling))
        children[part].start()
    for child in children.values():
        child.join()
    failed = [part for part, child in children.items() if child.exitcode]
    if failed:
        logger.error("training failed for %s", ", ".join(failed))


def _train_and_measure(options: Options, until: float, sampling: dict[str, Any]) -> None:
    set_up()
    train(replace(options, minutes=(until - time.time()) / 60))
    measure(options.part, options.out, device=options.device, seed=options.seed, **sampling)


def train_text(trainee: Trainee) -> dict[str, float]:
    """Train a text encoder to tell colour, shape, motion, moment and view from its embeddings.

    Texts have parts left out at random, down to the empty prompt, and each token's embedding must
    still name its token, so that the diffusion models find every word where it stands.
    """
    encoder, device = trainee.model, trainee.options.device
    tokenizer = build_tokenizer(trainee.options.part)
    width, words_known = encoder.config.hidden_size, text_words(trainee.options.part)
    torch.manual_seed(step_seed(trainee.options.seed, 0, "heads"))
    heads = nn.ModuleList(nn.Linear(width, len(words) + 1) for words in words_known).to(device)
    namer = nn.Linear(width, encoder.config.vocab_size).to(device)
    head_optimizer = torch.optim.AdamW([*heads.parameters(), *namer.parameters()], lr=trainee.peak_lr)
    coin = random.Random(trainee.seed("text"))
    right = torch.zeros(())
    while trainee.goes_on():
        texts, labels = _draw_texts(trainee.options.part, coin, trainee.batch)
        ids, attended = (tokens.to(device) for tokens in tokenize(tokenizer, texts))
        target = torch.tensor(labels, device=device)
        embeddings = embed(encoder, ids, attended)
        last = attended.sum(-1) - 1
        logits = [head(embeddings[torch.arange(len(ids)), last]) for head in heads]
        said = sum(cross_entropy(logit, target[:, k]) for k, logit in enumerate(logits))
        own = attended.bool()
        word = cross_entropy(namer(embeddings[own]), ids[own])
        head_optimizer.zero_grad(set_to_none=True)
        trainee.learn({"attributes": said, "words": word})
        head_optimizer.step()
        told = torch.stack([logit.argmax(-1) for logit in logits], dim=-1)
        right = (told == target).all(-1).float().mean()
    return {"batch_right": float(right)}


def train_vae(trainee: Trainee) -> dict[str, Any]:
    """Train an autoencoder on renderings, clean and half-made, and measure its latents' scale."""
    vae, options = trainee.model, trainee.options

    def learn(images: Float[Tensor, "B F 3 H W"], noise: Float[Tensor, "B *S"]) -> tuple[Tensor, ...]:
        """Learn from a batch; that of each of VAE_LOSSES."""
        with trainee.autocast():
            latent = posterior(vae, images)
            drawn = latent.mean + latent.std * noise.view_as(latent.mean)
            decoded = vae.decode(drawn).sample.float()
        mean, logvar = latent.mean.float(), latent.logvar.float()
        if options.part == "wan_vae":
            # Its first frame has latents of its own, as four of the others have: it counts as much.
            decoded, images = (
                torch.cat([x[:, :, :1].expand(-1, -1, STRIDE - 1, -1, -1), x], 2)
                for x in (decoded, images.transpose(1, 2))
            )
        else:
            images = images.flatten(0, 1)
        edges = sum(l1_loss(decoded.diff(dim=axis), images.diff(dim=axis)) for axis in (-1, -2))
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        found = l1_loss(decoded, images), 2 * mse_loss(decoded, images), 0.5 * edges, 1e-4 * kl
        trainee.descend(found)
        return tuple(loss.detach() for loss in found)

    def prepare(scenes: Scenes) -> dict[str, Tensor]:
        return {"images": ((render_scenes(scenes, options.device) + 1) * 127.5).round().byte()}

    step = Replay(learn, f"the training step of {options.part}")
    generator = torch.Generator().manual_seed(trainee.seed(options.part))
    noises = step_generator(options.seed, trainee.step, "noise", options.device)
    pool = Pool(options.part, options.pool or POOL[options.part], prepare, trainee.seed("pool"))
    _fill(pool, trainee)
    while trainee.goes_on():
        images = pool.batch(trainee.batch, noises)["images"] / 127.5 - 1
        noise = sample_noise((trainee.batch, *latent_shape(options.part)), noises, options.device)
        found = step(_spoil(images, generator), noise)
        trainee.count_step(dict(zip(VAE_LOSSES, found, strict=True)))
        _renew(pool, trainee)
    return _measure_vae(trainee, generator)


def train_denoiser(trainee: Trainee) -> dict[str, float]:
    """Train a diffusion model on a pool of encoded scenes that is slowly renewed."""
    options, part, device = trainee.options, trainee.options.part, trainee.options.device
    text_part, _ = needs(part)
    texts, schedule = TextTable(options.out, text_part, device), noise_schedule(part, device)
    predict = partial(predict_velocity, part, trainee.model)
    if options.on_gpu:
        predict = Compiled(predict, trainee.model, part)

    def learn(latents: Tensor, noise: Tensor, timesteps: Tensor, text: Tensor, cameras: Tensor) -> Tensor:
        """Learn from a batch; the loss."""
        scales = schedule.scales(timesteps, latents.ndim)
        with trainee.autocast():
            velocity = predict(add_noise(latents, noise, scales), timesteps, text, cameras)
        target = prediction_target(latents, noise, scales, schedule.prediction)
        loss = mse_loss(velocity.float(), target)
        trainee.descend([loss])
        return loss.detach()

    step = Replay(learn, f"the training step of {part}")
    pool = latent_pool(part, options.pool or POOL[part], options.out, trainee.seed("pool"), texts)
    pool.restore(options.out, device)
    if pool.filled:
        texts.require(pool.rows["text"][: pool.filled])
    _fill(pool, trainee)
    generator = step_generator(options.seed, trainee.step, "noise", device)
    while trainee.goes_on():
        scenes = pool.batch(trainee.batch, generator)
        latents = scenes["latents"].float()
        dropped = torch.rand(len(latents), generator=generator, device=device) < TEXT_DROPOUT
        rows = torch.where(dropped[:, None], EMPTY_TEXT, scenes["text"])
        text = texts.mixed(rows, scenes["share"])
        timesteps = schedule.draw(0, 1, len(text), generator)
        noise = sample_noise(latents.shape, generator, device)
        trainee.count_step({"velocity": step(latents, noise, timesteps, text, scenes.get("cameras"))})
        _renew(pool, trainee)
    pool.save(options.out)
    return {}


def _fill(pool: Pool, trainee: Trainee) -> None:
    """As much of the pool as a share of the call's time allows."""
    while not pool.full and (pool.filled == 0 or trainee.fraction < FILL_SHARE):
        pool.refresh(_scenes_at_once(trainee.options))
    logger.info("%s: %d scenes ready after %.0f s", pool.part, pool.filled, trainee.elapsed)


def _renew(pool: Pool, trainee: Trainee) -> None:
    """A part of the pool, sometimes."""
    if trainee.step % RENEW_EVERY == 0:
        pool.refresh(_scenes_at_once(trainee.options))


def _scenes_at_once(options: Options) -> int:
    return max(1, (RENDER_AT_ONCE if options.on_gpu else 32) // FRAMES[options.part])


def _draw_texts(part: str, coin: random.Random, count: int) -> tuple[list[str], list[list[int]]]:
    """Texts and, for each of ``text_words``, 0 where it is missing or 1 + its index."""
    texts, labels = [], []
    prompts, known = prompts_of(part, held_out=False), text_words(part)
    for _ in range(count):
        prompt = coin.choice(prompts)
        moment = coin.choice((None, *known[3])) if coin.random() < 0.9 else None
        view = coin.choice((None, *VIEWS)) if coin.random() < 0.8 else None
        empty = coin.random() < 0.1
        words = (*prompt_words(prompt), moment, view)
        texts.append("" if empty else full_text(prompt, moment, view))
        pairs = zip(known, [None] * len(words) if empty else words, strict=True)
        labels.append([0 if word is None else 1 + those.index(word) for those, word in pairs])
    return texts, labels


def _spoil(images: Float[Tensor, "B F 3 H W"], generator: torch.Generator) -> Float[Tensor, "B F 3 H W"]:
    """Some of the scenes as in the making: mixed, faded, blurred, or moving less than they should."""
    count = len(images)
    kind, weight = (torch.rand(count, 1, 1, 1, 1, generator=generator).to(images.device) for _ in range(2))
    plain = (torch.rand(count, 1, 3, 1, 1, generator=generator) * 2 - 1).to(images.device).expand_as(images)
    small = avg_pool2d(images.flatten(0, 1), 4)
    blurred = interpolate(small, scale_factor=4, mode="bilinear", align_corners=False).view_as(images)
    spoiled = torch.where(kind < 0.12, images.lerp(images.roll(1, 0), weight), images)
    spoiled = torch.where((kind > 0.12) & (kind < 0.22), images.lerp(plain, weight), spoiled)
    spoiled = torch.where((kind > 0.32) & (kind < 0.42), images.lerp(images[:, :1], weight), spoiled)
    return torch.where((kind > 0.22) & (kind < 0.32), images.lerp(blurred, weight), spoiled)


@torch.no_grad()
def _measure_vae(trainee: Trainee, generator: torch.Generator) -> dict[str, Any]:
    """The scale of the average model's latents on clean renderings, and its PSNR in dB on each world."""
    options, part = trainee.options, trainee.options.part
    vae = build(part).to(options.device)
    vae.load_state_dict(trainee.ema)
    scenes = draw_scenes(part, 2 * _scenes_at_once(options), generator)
    images = render_scenes(scenes, options.device)
    latents = encode(vae, images)
    error = (decode(vae, latents) - images).square().flatten(1).mean(1).cpu() / 4
    psnr = {
        key: -10 * math.log10(float(error[rows].mean()))
        for key, rows in {"psnr": scenes.codes[:, 0] == 0, "psnr_creatures": scenes.codes[:, 0] == 1}.items()
        if rows.any()
    }
    if part == "vae":
        return {"scaling_factor": 1 / float(latents.std()), **psnr}
    channels = latents.transpose(0, 1).flatten(1)
    return {"latents_mean": channels.mean(1).tolist(), "latents_std": channels.std(1).tolist(), **psnr}
