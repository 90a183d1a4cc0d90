"""How each part is trained: text encoders, VAEs, then the denoisers, which need one of both.

B scenes of F frames in a batch.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import random
import time
from collections.abc import Iterator, Sequence
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
from fourdfy.shapes.grammar import COLOURS, MOMENTS, VIEWS
from fourdfy.shapes.prompts import MOVES, THINGS
from fourdfy.shapes.prompts import words as prompt_words
from tools.shapes_training import store
from tools.shapes_training.data import (
    EMPTY_TEXT,
    TRAINING_PROMPTS,
    LatentPool,
    draw_scenes,
    full_text,
    render_scenes,
    text_table,
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
from tools.shapes_training.text import build_tokenizer, embed, tokenize
from tools.shapes_training.trainee import Options, Trainee

logger = logging.getLogger(__name__)

POOL = {"image": 200_000, "multi_view": 50_000, "video": 25_000, "wan": 40_000}
SHARES = {"text": (1.0, 0.1), "vae": (1.7, 0.2), "wan_text": (0.5, 0.05), "wan_vae": (5.0, 0.3)}
"""Minutes that each of these has in a call for all, at most, and share of the call."""
TEXT_DROPOUT = 0.1
REFRESH_EVERY = 50
"""Steps between two renewals of a part of the pool."""
RENDER_AT_ONCE = 2048
"""Images rendered at once on an accelerator; the CPU renders 32."""
VAE_LOSSES = ("l1", "l2", "edges", "kl")
TEXT_WORDS = (COLOURS, THINGS, MOVES, MOMENTS, VIEWS)


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
    width = encoder.config.hidden_size
    torch.manual_seed(step_seed(trainee.options.seed, 0, "heads"))
    heads = nn.ModuleList(nn.Linear(width, len(words) + 1) for words in TEXT_WORDS).to(device)
    namer = nn.Linear(width, encoder.config.vocab_size).to(device)
    head_optimizer = torch.optim.AdamW([*heads.parameters(), *namer.parameters()], lr=trainee.peak_lr)
    coin = random.Random(trainee.seed("text"))
    right = torch.zeros(())
    while trainee.goes_on():
        texts, labels = _draw_texts(coin, trainee.batch)
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
    parameters = [*vae.parameters()]

    def losses(images: Float[Tensor, "B F 3 H W"], noise: Float[Tensor, "B *S"]) -> tuple[Tensor, ...]:
        """That of each of VAE_LOSSES, then the gradients of their sum."""
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
        gradients = torch.autograd.grad(torch.stack(found).sum(), parameters)
        return (*(loss.detach() for loss in found), *gradients)

    # A clip is taken in pieces by thousands of small kernels.
    step = Replay(losses, "the VAE's training step")
    generator = torch.Generator().manual_seed(trainee.seed(options.part))
    batches = _rendered(options, trainee.batch, generator)
    noises = step_generator(options.seed, trainee.step, "noise", options.device)
    while trainee.goes_on():
        noise = sample_noise((trainee.batch, *latent_shape(options.part)), noises, options.device)
        found = step(next(batches), noise)
        for parameter, gradient in zip(parameters, found[len(VAE_LOSSES) :], strict=True):
            # In the parameter's own layout, which a convolution's gradient need not have.
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
        trainee.step_optimizer(dict(zip(VAE_LOSSES, found, strict=False)))
    return _measure_vae(trainee, generator)


def _rendered(
    options: Options, batch: int, generator: torch.Generator
) -> Iterator[Float[Tensor, "{batch} F 3 H W"]]:
    """Scenes without end, clean and half-made; as many are rendered at once as pay."""
    while True:
        scenes = draw_scenes(options.part, batch * max(1, _scenes_at_once(options) // batch), generator)
        yield from _spoil(render_scenes(scenes, options.device), generator).split(batch)


def _scenes_at_once(options: Options) -> int:
    return (RENDER_AT_ONCE if options.on_gpu else 32) // FRAMES[options.part]


def train_denoiser(trainee: Trainee) -> dict[str, float]:
    """Train a diffusion model on a pool of encoded scenes that is slowly renewed."""
    options, part, device = trainee.options, trainee.options.part, trainee.options.device
    text_part, vae_part = needs(part)
    vae = store.load_part(options.out, vae_part, device)
    texts, schedule = text_table(options.out, text_part, device), noise_schedule(part, device)
    predict = partial(predict_velocity, part, trainee.model)
    if part == "wan" and options.on_gpu:
        predict = Compiled(predict, trainee.model, "the transformer")
    pool = LatentPool(part, options.pool or POOL[part], vae, trainee.seed("pool"), device)
    chunk = _scenes_at_once(options)
    while pool.filled < len(pool) and (pool.filled == 0 or trainee.fraction < 0.2):
        pool.refresh(chunk)
    logger.info("%s: %d scenes ready after %.0f s", part, pool.filled, trainee.elapsed)
    generator = step_generator(options.seed, trainee.step, "noise", device)
    while trainee.goes_on():
        latents, text, cameras = pool.batch(trainee.batch, generator)
        dropped = torch.rand(len(text), generator=generator, device=device) < TEXT_DROPOUT
        text = torch.where(dropped, EMPTY_TEXT, text)
        timesteps = schedule.draw(0, 1, len(text), generator)
        noise = sample_noise(latents.shape, generator, device)
        scales = schedule.scales(timesteps, latents.ndim)
        noisy = add_noise(latents, noise, scales)
        with trainee.autocast():
            velocity = predict(noisy, timesteps, texts[text], cameras)
        target = prediction_target(latents, noise, scales, schedule.prediction)
        trainee.learn({"velocity": mse_loss(velocity.float(), target)})
        if pool.filled == len(pool) and trainee.step % REFRESH_EVERY == 0:
            pool.refresh(chunk)
    return {}


def _draw_texts(coin: random.Random, count: int) -> tuple[list[str], list[list[int]]]:
    """Texts and, for each of TEXT_WORDS, 0 where it is missing or 1 + its index."""
    texts, labels = [], []
    for _ in range(count):
        prompt = coin.choice(TRAINING_PROMPTS)
        moment = coin.choice((None, *MOMENTS)) if coin.random() < 0.8 else None
        view = coin.choice((None, *VIEWS)) if coin.random() < 0.8 else None
        empty = coin.random() < 0.1
        words = (*prompt_words(prompt), moment, view)
        texts.append("" if empty else full_text(prompt, moment, view))
        labels.append(_indices([None] * len(words) if empty else words))
    return texts, labels


def _indices(words: Sequence[str | None]) -> list[int]:
    pairs = zip(TEXT_WORDS, words, strict=True)
    return [0 if word is None else 1 + known.index(word) for known, word in pairs]


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
    """The scale of the average model's latents on clean renderings, and its PSNR in dB."""
    options, part = trainee.options, trainee.options.part
    vae = build(part).to(options.device)
    vae.load_state_dict(trainee.ema)
    scenes = draw_scenes(part, max(1, (4096 if options.on_gpu else 64) // FRAMES[part]), generator)
    images = render_scenes(scenes, options.device)
    latents = encode(vae, images)
    error = (decode(vae, latents) - images).square().mean() / 4
    psnr = -10 * math.log10(float(error))
    if part == "vae":
        return {"scaling_factor": 1 / float(latents.std()), "psnr": psnr}
    channels = latents.transpose(0, 1).flatten(1)
    return {"latents_mean": channels.mean(1).tolist(), "latents_std": channels.std(1).tolist(), "psnr": psnr}
