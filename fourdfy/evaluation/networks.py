"""The networks that judge: CLIP and X-CLIP, loaded from the hub or a folder like every other model.

F frames, H x W pixels, T texts, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from fourdfy.priors.frozen import check_part, load_transformer, loading
from fourdfy.priors.hub import resolve_model
from fourdfy.priors.model_folder import read_mapping

CLASSES = {"clip": "CLIPModel", "xclip": "XCLIPModel"}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the images that CLIP was trained on (Radford et al. 2021), for a folder that does not say."""


class Judge:
    """A network that places images or clips and texts in one space.

    Args:
        name: folder or hub id.
        part: ``clip`` or ``xclip``.

    Raises:
        ModelNotFound: it was not found; says what to type.
        ConfigError: it is another kind of model, or can't be loaded.
    """

    def __init__(self, name: str, part: str, device: torch.device | str) -> None:
        self.folder, self.device = resolve_model(name, (part,)), torch.device(device)
        check_part(self.folder, part, CLASSES[part])
        with loading(self.folder):
            from transformers import CLIPTokenizer

            self._tokenizer = CLIPTokenizer.from_pretrained(self.folder, local_files_only=True)
            file = self.folder / "preprocessor_config.json"
            given = read_mapping(file) if file.is_file() else {}
            self._mean, self._std = (
                torch.tensor(given.get(key, usual)).view(3, 1, 1)
                for key, usual in (("image_mean", MEAN), ("image_std", STD))
            )
            if not (self._mean.isfinite().all() and (self._std > 0).all()):
                raise ValueError(f"image_mean and image_std of {file.name} are no numbers to divide by")
        self.network = load_transformer(
            self.folder, part, CLASSES[part], self.device, tokenizer=self._tokenizer
        )
        self.pixels: int = self.network.config.vision_config.image_size

    @torch.no_grad()
    def images(self, rgb: Float[Tensor, "F H W 3"]) -> Float[Tensor, "F C"]:
        """Unit vectors of images in 0..1."""
        found = self.network.get_image_features(pixel_values=self._prepared(rgb))
        return _unit(found)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Float[Tensor, "T C"]:
        """Unit vectors of texts; what does not fit into the 77 tokens is cut off."""
        return _unit(self.network.get_text_features(**self._tokens(texts)))

    @torch.no_grad()
    def video_similarity(self, rgb: Float[Tensor, "F H W 3"], text: str) -> float:
        """Cosine of a clip and a text, -1..1, of an X-CLIP, whose texts depend on the clip.

        Frames are chosen evenly, as many as it was trained on.
        """
        count = self.network.config.vision_config.num_frames
        chosen = torch.linspace(0, len(rgb) - 1, count).round().long()
        out = self.network(pixel_values=self._prepared(rgb[chosen])[None], **self._tokens([text]))
        return float(out.logits_per_video / self.network.logit_scale.exp())

    def _tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        most = self.network.config.text_config.max_position_embeddings
        found = self._tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=most, return_tensors="pt"
        )
        return {name: found[name].to(self.device) for name in ("input_ids", "attention_mask")}

    def _prepared(self, rgb: Float[Tensor, "F H W 3"]) -> Float[Tensor, "F 3 h w"]:
        size = (self.pixels, self.pixels)
        images = rgb.movedim(-1, 1)
        if images.shape[-2:] != size:
            images = interpolate(images, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        return ((images - self._mean) / self._std).to(self.device)


def revision_of(folder: Path) -> str | None:
    """The commit of a model in the hub's cache; None of a folder elsewhere."""
    return folder.name if folder.parent.name == "snapshots" else None


def _unit(found: Any) -> Float[Tensor, "N C"]:
    vectors = found if isinstance(found, Tensor) else found.pooler_output
    return normalize(vectors, dim=-1).cpu()
