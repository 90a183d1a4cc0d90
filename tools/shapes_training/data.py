"""Training data of the small models: scenes drawn at random, rendered, encoded, kept in a pool.

G scenes (an image, a group of views or a clip) of F frames each, L tokens of C channels.
A scene's text is a row of the table of all texts: prompt, moment words, view words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fourdfy.priors.mvdream import camera_vectors
from fourdfy.prompts.views import direction_indices
from fourdfy.shapes.grammar import MOMENTS, VIEWS
from fourdfy.shapes.prompts import Prompt, every_prompt, is_held_out, render_codes
from fourdfy.shapes.prompts import encode as encode_prompts
from fourdfy.shapes.world import BACKGROUNDS, orbit
from fourdfy.types import Cameras, TensorRecord
from tools.shapes_training import store
from tools.shapes_training.models import CLIPS, FRAMES, NUM_VIEWS, encode, latent_shape
from tools.shapes_training.text import build_tokenizer, embed, tokenize

VIEW_THRESHOLDS_DEG = {
    "image": (30.0, 30.0, 60.0),
    "video": (45.0, 45.0, 60.0),
    "wan": (45.0, 45.0, 60.0),
}
"""Front, back and overhead, as in the prompt processors of these priors."""

ELEVATION_RANGE_DEG = (0.0, 30.0)
VIEW_PROBABILITY = 0.7
MOMENT_PROBABILITIES = (0.45, 0.30, 0.25)
"""No time words, "at the start", a quarter."""

TRAINING_PROMPTS = tuple(prompt for prompt in every_prompt() if not is_held_out(prompt))
HELD_OUT_PROMPTS = tuple(prompt for prompt in every_prompt() if is_held_out(prompt))

NUM_TEXTS = len(every_prompt()) * (len(MOMENTS) + 1) * (len(VIEWS) + 1) + 1
EMPTY_TEXT = NUM_TEXTS - 1


def full_text(prompt: Prompt, moment: str | None = None, view: str | None = None) -> str:
    """The prompt followed by its time words and view words, where given."""
    return ", ".join(part for part in (prompt.text, moment, view) if part)


def text_row(
    prompt: Int[Tensor, "*G"], moment: Int[Tensor, "*G"], view: Int[Tensor, "*G"]
) -> Int[Tensor, "*G"]:
    """Row in the table of texts; ``moment`` and ``view`` are 0 for none, else 1 + the word's index."""
    return (prompt * (len(MOMENTS) + 1) + moment) * (len(VIEWS) + 1) + view


def table_texts() -> Iterator[str]:
    """The NUM_TEXTS texts, the empty prompt last."""
    for prompt in every_prompt():
        for moment in (None, *MOMENTS):
            for view in (None, *VIEWS):
                yield full_text(prompt, moment, view)
    yield ""


@torch.no_grad()
def text_table(out: Path, part: str, device: torch.device) -> Float[Tensor, "NUM_TEXTS L C"]:
    """What the text encoder ``part`` makes of every text of the world, the empty prompt last."""
    encoder = store.load_part(out, part, device)
    pairs = (tokens.to(device).split(512) for tokens in tokenize(build_tokenizer(part), table_texts()))
    return torch.cat([embed(encoder, ids, attended) for ids, attended in zip(*pairs, strict=True)])


@dataclass(frozen=True, kw_only=True)
class Scenes(TensorRecord):
    """G scenes to render, on the CPU."""

    codes: Int[Tensor, "G 4"]
    """Those of ``shapes.prompts.encode``."""
    times: Float[Tensor, "G F"]
    azimuth_deg: Float[Tensor, "G F"]
    elevation_deg: Float[Tensor, "G F"]
    background: Float[Tensor, "G 3"]
    text: Int[Tensor, "G"]
    """Row in the table of texts."""

    def __len__(self) -> int:
        return len(self.codes)

    def cameras(self, device: torch.device) -> Cameras:
        """The G*F cameras, frames of a scene neighbours."""
        frames = (self.elevation_deg, self.azimuth_deg, self.times)
        return orbit(*(values.flatten().to(device) for values in frames))


def draw_scenes(part: str, count: int, generator: torch.Generator) -> Scenes:
    """Random scenes over the training prompts for ``part``, a VAE or a denoiser.

    Cameras as the recipe's samplers draw them: any azimuth, elevation by an even coin uniform or
    "on the sphere" within 0 to 30 degrees. Images and groups have one moment. Clips have all of a period,
    from the first frame's share of it on; half of the transformer's begin in the quarter that the text names.
    """

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator)

    frames = FRAMES[part]
    allowed = torch.tensor([every_prompt().index(prompt) for prompt in TRAINING_PROMPTS])
    prompt = allowed[torch.randint(len(allowed), (count,), generator=generator)]
    azimuth = 360 * uniform(count, 1).expand(-1, frames)
    if part == "multi_view":
        azimuth = azimuth + 360 / NUM_VIEWS * torch.arange(frames)

    moment = torch.zeros(count, dtype=torch.long)
    if part in CLIPS:
        start = uniform(count, 1) / frames
        if part in ("wan", "wan_vae"):
            named, anywhere = uniform(count, 1) < 0.5, uniform(count, 1)
            start = torch.where(named, anywhere, start)
            moment = torch.where(named, 2 + (4 * anywhere).long(), 0)[:, 0]
        times = (start + torch.arange(frames) / frames) % 1
    else:
        none, start, _ = MOMENT_PROBABILITIES
        coin, fraction = uniform(count), uniform(count)
        moment = torch.where(coin < none, 0, torch.where(coin < none + start, 1, 2 + (4 * fraction).long()))
        times = torch.where(moment == 1, 0.0, fraction)[:, None].expand(-1, frames)

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
        text=text_row(prompt, moment, view),
    )


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


class LatentPool:
    """A ring of encoded scenes on the device, from which batches are drawn with replacement."""

    def __init__(self, part: str, size: int, vae: torch.nn.Module, seed: int, device: torch.device) -> None:
        self.part, self.vae, self.device = part, vae, device
        self.generator = torch.Generator().manual_seed(seed)
        self.latents = torch.empty(size, *latent_shape(part), dtype=torch.float16, device=device)
        self.text = torch.empty(size, dtype=torch.long, device=device)
        self.cameras = torch.empty(size, NUM_VIEWS, 16, device=device) if part == "multi_view" else None
        self.filled = 0
        self._next = 0

    def __len__(self) -> int:
        return len(self.text)

    @torch.no_grad()
    def refresh(self, count: int) -> None:
        """Render and encode ``count`` new scenes over the oldest ones."""
        count = min(count, len(self) - self._next)
        scenes = draw_scenes(self.part, count, self.generator)
        images = render_scenes(scenes, self.device)
        rows = slice(self._next, self._next + count)
        self.latents[rows] = encode(self.vae, images).half()
        self.text[rows] = scenes.text.to(self.device)
        if self.cameras is not None:
            vectors = camera_vectors(scenes.cameras(self.device).c2w)
            self.cameras[rows] = vectors.unflatten(0, images.shape[:2])
        self.filled = max(self.filled, rows.stop)
        self._next = rows.stop % len(self)

    def batch(
        self, size: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, "B *S"], Int[Tensor, "B"], Float[Tensor, "B F 16"] | None]:
        """Scaled latents, text rows and cameras of ``size`` scenes."""
        rows = torch.randint(self.filled, (size,), generator=generator, device=self.device)
        cameras = None if self.cameras is None else self.cameras[rows]
        return self.latents[rows].float(), self.text[rows], cameras


def _draw_elevation(coin: Float[Tensor, "G"], u: Float[Tensor, "G"]) -> Float[Tensor, "G"]:
    """Degrees. The second branch is upstream's: its bounds are linear in the angle, not in its sine."""
    low, high = ELEVATION_RANGE_DEG
    low_u, high_u = (low + 90) / 180, (high + 90) / 180
    on_sphere = torch.rad2deg(torch.asin(2 * (low_u + (high_u - low_u) * u) - 1))
    return torch.where(coin < 0.5, low + (high - low) * u, on_sphere)
