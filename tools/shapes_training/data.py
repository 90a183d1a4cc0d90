"""Training data of the small models: scenes drawn at random, rendered, encoded, kept in a pool.

G scenes (an image, a group of views or a clip) of F frames each, L tokens of C channels.
A scene's text is a mixture of two rows of the table of all texts: prompt, moment words, view words.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from fourdfy.priors.mvdream import camera_vectors
from fourdfy.prompts.views import direction_indices, nearest_moments
from fourdfy.shapes.grammar import VIEWS, ShapePrompt
from fourdfy.shapes.prompts import Prompt, every_prompt, is_held_out, render_codes
from fourdfy.shapes.prompts import encode as encode_prompts
from fourdfy.shapes.world import BACKGROUNDS, orbit
from fourdfy.types import Cameras, TensorRecord
from tools.shapes_training import store
from tools.shapes_training.models import CLIPS, FRAMES, NUM_VIEWS, encode, needs
from tools.shapes_training.text import (
    NUM_TOKENS,
    SOLIDS_ONLY,
    TEXT_WIDTH,
    build_tokenizer,
    embed,
    text_words,
    tokenize,
)

VIEW_THRESHOLDS_DEG = {
    "image": (30.0, 30.0, 60.0),
    "video": (45.0, 45.0, 60.0),
    "wan": (45.0, 45.0, 60.0),
}
"""Front, back and overhead, as in the prompt processors of these priors."""

ELEVATION_RANGE_DEG = (0.0, 30.0)
VIEW_PROBABILITY = 0.7
MOMENT_PROBABILITIES = (0.10, 0.25, 0.65)
"""No time words, "at the start", a sixteenth."""

EMPTY_TEXT = -1
"""The last row of every table of texts."""


@lru_cache
def prompts_of(part: str, *, held_out: bool | None = None) -> tuple[Prompt, ...]:
    """The prompts that a part knows, or those of them that are held out from training, or are not."""
    known = (p for p in every_prompt() if isinstance(p, ShapePrompt) or part not in SOLIDS_ONLY)
    return tuple(prompt for prompt in known if held_out in (None, is_held_out(prompt)))


def full_text(prompt: Prompt, moment: str | None = None, view: str | None = None) -> str:
    """The prompt followed by its time words and view words, where given."""
    return ", ".join(part for part in (prompt.text, moment, view) if part)


def moments_of(part: str) -> tuple[str, ...]:
    """The time words that a part knows."""
    return text_words(part)[3]


def text_row(
    part: str, prompt: Int[Tensor, "*G"], moment: Int[Tensor, "*G"], view: Int[Tensor, "*G"]
) -> Int[Tensor, "*G"]:
    """Row in the table of texts; ``moment`` and ``view`` are 0 for none, else 1 + the word's index."""
    return (prompt * (len(moments_of(part)) + 1) + moment) * (len(VIEWS) + 1) + view


@lru_cache
def table_texts(part: str) -> tuple[str, ...]:
    """All texts that a part knows, the empty prompt last."""
    words = product(prompts_of(part), (None, *moments_of(part)), (None, *VIEWS))
    return (*(full_text(*some) for some in words), "")


class TextTable:
    """What the text encoder ``part`` makes of those of ``table_texts`` that were required so far."""

    def __init__(self, out: Path, part: str, device: torch.device) -> None:
        self.encoder, self.tokenizer = store.load_part(out, part, device), build_tokenizer(part)
        self.texts = table_texts(part)
        self.missing = torch.ones(len(self.texts), dtype=torch.bool)
        size = len(self.texts), NUM_TOKENS, TEXT_WIDTH
        self.rows: Float[Tensor, "T L C"] = torch.full(size, math.nan, device=device)
        """NaN where nothing was required."""
        self.require(torch.tensor([EMPTY_TEXT]))

    @torch.no_grad()
    def require(self, rows: Int[Tensor, "*G"]) -> None:
        """Encode those of these rows that are missing."""
        rows = rows.cpu().unique()
        missing = rows[self.missing[rows]]
        for new in missing.split(512) if len(missing) else ():  # nothing splits into one empty part
            tokens = tokenize(self.tokenizer, [self.texts[row] for row in new])
            states = embed(self.encoder, *(ids.to(self.rows.device) for ids in tokens))
            self.rows[new] = pad(states, (0, 0, 0, NUM_TOKENS - states.shape[1]))
            self.missing[new] = False

    def mixed(self, rows: Int[Tensor, "G 2"], share: Float[Tensor, "G"]) -> Float[Tensor, "G L C"]:
        """Mixtures of two rows each; ``share`` is that of the second."""
        one, other = self.rows[rows.to(self.rows.device)].unbind(1)
        return one.lerp(other, share.to(one)[:, None, None])


@dataclass(frozen=True, kw_only=True)
class Scenes(TensorRecord):
    """G scenes to render, on the CPU."""

    codes: Int[Tensor, "G 4"]
    """Those of ``shapes.prompts.encode``."""
    times: Float[Tensor, "G F"]
    azimuth_deg: Float[Tensor, "G F"]
    elevation_deg: Float[Tensor, "G F"]
    background: Float[Tensor, "G 3"]
    text: Int[Tensor, "G 2"]
    """Rows in the table of texts."""
    share: Float[Tensor, "G"]
    """That of the second row in their mixture."""

    def __len__(self) -> int:
        return len(self.codes)

    def cameras(self, device: torch.device) -> Cameras:
        """The G*F cameras, frames of a scene neighbours."""
        frames = (self.elevation_deg, self.azimuth_deg, self.times)
        return orbit(*(values.flatten().to(device) for values in frames))


def draw_scenes(part: str, count: int, generator: torch.Generator, *, held_out: bool = False) -> Scenes:
    """Random scenes over the training prompts for ``part``, a VAE or a denoiser, or over the held-out ones.

    Cameras as the recipe's samplers draw them: any azimuth, elevation by an even coin uniform or
    "on the sphere" within 0 to 30 degrees. Images and groups have one moment, and most of their texts say
    which, as the recipe's do. Clips have all of a period, from the first frame's share of it on; half of the
    transformer's begin in the quarter that the text names.
    """

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator)

    frames = FRAMES[part]
    allowed = torch.tensor([every_prompt().index(prompt) for prompt in prompts_of(part, held_out=held_out)])
    prompt = allowed[torch.randint(len(allowed), (count,), generator=generator)]
    azimuth = 360 * uniform(count, 1).expand(-1, frames)
    if part == "multi_view":
        azimuth = azimuth + 360 / NUM_VIEWS * torch.arange(frames)

    moment, share = torch.zeros(count, 2, dtype=torch.long), torch.zeros(count)
    if part in CLIPS:
        start = uniform(count, 1) / frames
        if part in ("wan", "wan_vae"):
            named, anywhere = uniform(count, 1) < 0.5, uniform(count, 1)
            start = torch.where(named, anywhere, start)
            moment = torch.where(named, 2 + (4 * anywhere).long(), 0).expand(-1, 2)
        times = (start + torch.arange(frames) / frames) % 1
    else:
        none, start, _ = MOMENT_PROBABILITIES
        coin, fraction = uniform(count), uniform(count)
        named, starts = coin >= none + start, (coin >= none) & (coin < none + start)
        sixteenths, share = between_sixteenths(fraction)
        moment = torch.where(named[:, None], 2 + sixteenths, starts[:, None].long())
        times = torch.where(starts, 0.0, fraction)[:, None].expand(-1, frames)

    elevation = _draw_elevation(uniform(count), uniform(count))
    view = torch.zeros(count, dtype=torch.long)
    if part in VIEW_THRESHOLDS_DEG:
        worded = uniform(count) < VIEW_PROBABILITY
        view = torch.where(worded, 1 + view_index(part, elevation, azimuth[:, 0]), 0)
    return Scenes(
        codes=encode_prompts(every_prompt())[prompt],
        times=times,
        azimuth_deg=azimuth,
        elevation_deg=elevation[:, None].expand(-1, frames),
        background=torch.tensor(BACKGROUNDS)[torch.randint(2, (count,), generator=generator)],
        text=text_row(part, twice(prompt), moment, twice(view)),
        share=share,
    )


def twice(indices: Int[Tensor, "G"]) -> Int[Tensor, "G 2"]:
    """The same for both rows of a mixture."""
    return indices[:, None].expand(-1, 2)


def between_sixteenths(times: Float[Tensor, "G"]) -> tuple[Int[Tensor, "G 2"], Float[Tensor, "G"]]:
    """The two sixteenths that ``moments_between: loop`` mixes, and the share of the second."""
    nearest, share = nearest_moments(times, 16)
    return nearest % 16, share


def told_cameras(part: str, scenes: Scenes, device: torch.device) -> Float[Tensor, "G F 16"] | None:
    """What the four-view model is told of the cameras; the others are told nothing."""
    if part != "multi_view":
        return None
    return camera_vectors(scenes.cameras(device).c2w).unflatten(0, scenes.times.shape)


def view_index(
    part: str, elevation_deg: Float[Tensor, "*G"], azimuth_deg: Float[Tensor, "*G"]
) -> Int[Tensor, "*G"]:
    """Index into VIEWS, by the same rule as in the prompt processors."""
    angles = torch.broadcast_tensors(elevation_deg, azimuth_deg)
    index = direction_indices(*(angle.flatten() for angle in angles), *VIEW_THRESHOLDS_DEG[part])
    return index.view(angles[0].shape)


def render_scenes(scenes: Scenes, device: torch.device) -> Float[Tensor, "G F 3 H W"]:
    """Images in [-1, 1]."""
    frames = scenes.times.shape[1]
    codes = scenes.codes.repeat_interleave(frames, dim=0)
    background = scenes.background.repeat_interleave(frames, dim=0).to(device)
    rgb, _ = render_codes(codes, scenes.cameras(device), background)
    return rgb.movedim(-1, 1).unflatten(0, (-1, frames)) * 2 - 1


class Pool:
    """A ring of scenes on the device, from which batches are drawn with replacement.

    Args:
        prepare: what is kept of scenes, tensors whose first axis is G.
        made_by: what the tensors depend on; a saved pool of another one is not taken up.
    """

    def __init__(
        self,
        part: str,
        size: int,
        prepare: Callable[[Scenes], dict[str, Tensor]],
        seed: int,
        made_by: Any = None,
    ) -> None:
        self.part, self.size, self.prepare, self.made_by = part, size, prepare, made_by
        self.generator = torch.Generator().manual_seed(seed)
        self.rows: dict[str, Tensor] = {}
        self.filled = 0
        self._next = 0

    @property
    def full(self) -> bool:
        return self.filled == self.size

    @torch.no_grad()
    def refresh(self, count: int) -> None:
        """Prepare ``count`` new scenes over the oldest ones."""
        count = min(count, self.size - self._next)
        made = self.prepare(draw_scenes(self.part, count, self.generator))
        if not self.rows:
            self.rows = {key: value.new_empty(self.size, *value.shape[1:]) for key, value in made.items()}
        for key, value in made.items():
            self.rows[key][self._next : self._next + count] = value
        self._next += count
        self.filled = max(self.filled, self._next)
        self._next %= self.size

    def batch(self, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """What was kept of ``size`` scenes."""
        device = next(iter(self.rows.values())).device
        rows = torch.randint(self.filled, (size,), generator=generator, device=device)
        return {key: value[rows] for key, value in self.rows.items()}

    def save(self, out: Path) -> None:
        """Keep the scenes for the next call."""
        place = {"filled": self.filled, "next": self._next, "made_by": self.made_by}
        store.save_state(out, self.part, {"rows": self.rows, **place}, "pool")

    def restore(self, out: Path, device: torch.device) -> None:
        """Take up what ``save`` kept, if it was of the same size and made by the same."""
        kept = store.load_state(out, self.part, "pool")
        if kept is None or kept["made_by"] != self.made_by:
            return
        if len(next(iter(kept["rows"].values()))) == self.size:
            self.rows = {key: value.to(device) for key, value in kept["rows"].items()}
            self.filled, self._next = kept["filled"], kept["next"]


def latent_pool(part: str, size: int, out: Path, seed: int, texts: TextTable) -> Pool:
    """Scaled latents (in half precision), rows of ``texts`` and cameras, for a denoiser."""
    _, vae_part = needs(part)
    device = texts.rows.device
    vae = store.load_part(out, vae_part, device)

    def prepare(scenes: Scenes) -> dict[str, Tensor]:
        texts.require(scenes.text)
        images = render_scenes(scenes, device)
        made = {"latents": encode(vae, images).half()}
        made |= {"text": scenes.text.to(device), "share": scenes.share.to(device)}
        if (vectors := told_cameras(part, scenes, device)) is not None:
            made["cameras"] = vectors
        return made

    return Pool(part, size, prepare, seed, made_by=store.read_record(out, vae_part).get("steps"))


def _draw_elevation(coin: Float[Tensor, "G"], u: Float[Tensor, "G"]) -> Float[Tensor, "G"]:
    """Degrees. The second branch is upstream's: its bounds are linear in the angle, not in its sine."""
    low, high = ELEVATION_RANGE_DEG
    low_u, high_u = (low + 90) / 180, (high + 90) / 180
    on_sphere = torch.rad2deg(torch.asin(2 * (low_u + (high_u - low_u) * u) - 1))
    return torch.where(coin < 0.5, low + (high - low) * u, on_sphere)
