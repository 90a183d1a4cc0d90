"""A prompt, its view-dependent texts, and their embeddings, computed once and cached on disk.

D view directions (side, front, back, overhead), L tokens, C channels.
"""

from __future__ import annotations

import gc
import hashlib
import logging
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from omegaconf import MISSING
from torch import Tensor

from fourdfy.bounds import number
from fourdfy.config import Component, file_path
from fourdfy.files.atomic import by_product, write_whole
from fourdfy.priors.hub import cache_root, knows_text, resolve_model, stored_folder
from fourdfy.prompts.library import check_text, resolve_prompt
from fourdfy.prompts.views import DIRECTIONS
from fourdfy.types import MomentsBetween, PerpNegDecays, TextEmbeddings

logger = logging.getLogger(__name__)

TextEncoder = Any
"""Callable: texts (list of str) -> their embeddings, [texts, L, C]."""


class PromptProcessor(Component, ABC):
    """Provides the text embeddings that a guidance is conditioned on."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Component.Config):
        parts: ClassVar[tuple[str, ...]] = ("tokenizer", "text_encoder")
        """Parts of the model that are needed."""

        prompt: str = MISSING
        """The prompt. ``lib:panda_dancing`` takes the one library prompt that has both words."""
        prompt_front: str | None = None
        """The complete text for the front view, instead of the prompt with the view's words."""
        prompt_side: str | None = None
        """The same for the side views."""
        prompt_back: str | None = None
        """The same for the back view."""
        prompt_overhead: str | None = None
        """The same for the view from above."""
        prompt_still: str | None = None
        """The prompt without its motion ("a panda standing still"), for a guidance with ``still_source``;
        null: the prompt itself."""
        moments: list[str] = field(default_factory=list)
        """Words for equal parts of the scene's time (e.g. four quarters). Only this processor appends them to
        the prompt, before the view's words; a single entry applies to all times."""
        moments_between: MomentsBetween = "step"
        """What a time gets that is not the middle of a part: ``step`` the words of its own part, ``linear`` a
        mixture of the embeddings of the two parts whose middles are nearest, by how near each is, ``loop``
        the same in a clip that repeats, where the last part is next to the first."""
        negative_prompt: str = ""
        """The negative prompt, which guidance steers away from; the same for all views."""
        pretrained_model_name_or_path: str = file_path("stabilityai/stable-diffusion-2-1-base")
        """Folder, embedded name or hub id with ``tokenizer`` and ``text_encoder``."""
        overhead_threshold: float = number(60.0, 0, 90)
        """Degrees of elevation above which a camera has the overhead view."""
        front_threshold: float = number(45.0, 0, 180)
        """Degrees of azimuth, to both sides of 0, within which it has the front view."""
        back_threshold: float = number(45.0, 0, 180)
        """Degrees of azimuth, to both sides of 180, within which it has the back view."""
        view_dependent_prompt_front: bool = False
        """"front view of PROMPT" instead of "PROMPT, front view"."""
        use_cache: bool = True
        """Keep embeddings in $FOURDFY_CACHE, or ~/.cache/fourdfy."""
        use_perp_neg: bool = False
        """Mix texts by azimuth, with the front and side views as negative texts; see
        ``prompts.views.perp_neg_texts``. The guidance must have view_dependent_prompting=true."""
        perp_neg_f_sb: tuple[float, float, float] = number((1.0, 0.5, -0.606), -1000, 1000)
        """(a, b, c) of a negative's weight -(a exp(-b r) + c), r the share of the view nearer to the front;
        this one is the side's, seen from behind. See ``types.PerpNegDecays``."""
        perp_neg_f_fsb: tuple[float, float, float] = number((1.0, 0.5, 0.967), -1000, 1000)
        """The same for the front's weight, seen from behind."""
        perp_neg_f_fs: tuple[float, float, float] = number((4.0, 0.5, -2.426), -1000, 1000)
        """The same for the front's weight, seen from the front."""
        perp_neg_f_sf: tuple[float, float, float] = number((4.0, 0.5, -2.426), -1000, 1000)
        """The same for the side's weight, seen from the front, with 1 - r for r."""

        def models(self) -> list[tuple[str, tuple[str, ...]]]:
            """Every model that is needed, with its parts."""
            return [(self.pretrained_model_name_or_path, self.parts)]

        def __post_init__(self) -> None:
            for prompt in (self.prompt, self.prompt_still):
                if prompt in (MISSING, None):
                    continue
                if not resolve_prompt(prompt).strip():
                    raise ValueError("the prompt is empty; say what the scene shows: --prompt TEXT")
            if self.moments_between != "step" and len(self.moments) < 2:
                raise ValueError(
                    f"moments_between={self.moments_between}: moments has {len(self.moments)} entries, "
                    "between which there is nothing; give it two or more, or set moments_between=step"
                )

    cfg: Config

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.prompts = self._at_moments(cfg.prompt)
        self.still_prompts = [] if cfg.prompt_still is None else self._at_moments(cfg.prompt_still)

    @abstractmethod
    def load_encoder(self, folder: Path, device: torch.device) -> TextEncoder:
        """The text encoder of a model folder, on ``device``."""

    def direction_texts(self, prompt: str) -> list[str]:
        """One text for each of ``DIRECTIONS``; ``prompt`` is one of ``prompts``, or of those held still."""
        if prompt in self.still_prompts and prompt not in self.prompts:
            return [self._with_view(prompt, name) for name in DIRECTIONS]
        given = (getattr(self.cfg, f"prompt_{direction}") for direction in DIRECTIONS)
        return [text or self._with_view(prompt, name) for text, name in zip(given, DIRECTIONS, strict=True)]

    def check_length(self, texts: Collection[str], folder: Path) -> None:
        """Refuse texts that the encoder in ``folder`` would cut, without loading it.

        Raises:
            ValueError: shows where a text would be cut.
        """

    def identity(self, folder: Path) -> str:
        """A name for what makes the embeddings, under which they are cached."""
        return model_identity(folder, self.cfg.parts)

    def texts(self) -> set[str]:
        """Every text that is encoded: prompts, their texts for views, and the negative prompt."""
        prompts = [*self.prompts, *self.still_prompts]
        return {*prompts, *chain(*map(self.direction_texts, prompts)), self.cfg.negative_prompt}

    def check_texts(self) -> None:
        """Warn of texts that the model has not learned, and refuse texts that are too long for it.

        Loads no weights; nothing is too long for a model that is not on this disk yet.

        Raises:
            ValueError: a text is longer than the encoder reads; shows where it would be cut.
        """
        folder = stored_folder(self.cfg.pretrained_model_name_or_path, self.cfg.parts)
        if (others := self._others_than_learned()) and folder:
            self.check_length(others, folder)

    def _others_than_learned(self) -> list[str]:
        """The texts that the model is not known to have learned; warns of those that it surely has not."""
        others = []
        for text in sorted(self.texts()):
            try:
                if knows_text(self.cfg.pretrained_model_name_or_path, text):
                    continue
            except ValueError as error:
                _warn_once(f"the models were not trained on such a prompt: {error}")
            others.append(text)
        return others

    def embeddings(self, device: torch.device | str) -> TextEmbeddings:
        """The embeddings of all texts, on ``device``, in float32.

        The text encoder is loaded only if a text is not in the cache, and freed before this returns.

        Raises:
            ModelNotFound: the model was not found.
            ValueError: a text is longer than the encoder reads; shows where it would be cut.
        """
        self._others_than_learned()
        device = torch.device(device)
        embeddings = self._embeddings(self.texts(), device)
        still = self._text_embeddings(self.still_prompts, embeddings) if self.still_prompts else None
        return replace(self._text_embeddings(self.prompts, embeddings), still=still)

    def _text_embeddings(
        self, prompts: Sequence[str], embeddings: Mapping[str, Float[Tensor, "L C"]]
    ) -> TextEmbeddings:
        views = map(self.direction_texts, prompts)
        decays = PerpNegDecays(*(tuple(getattr(self.cfg, f"perp_neg_f_{f}")) for f in PerpNegDecays._fields))
        return TextEmbeddings(
            text=torch.stack([embeddings[prompt] for prompt in prompts]),
            text_directions=torch.stack(
                [torch.stack([embeddings[text] for text in texts]) for texts in views]
            ),
            uncond=embeddings[self.cfg.negative_prompt],
            front_threshold=self.cfg.front_threshold,
            back_threshold=self.cfg.back_threshold,
            overhead_threshold=self.cfg.overhead_threshold,
            perp_neg=decays if self.cfg.use_perp_neg else None,
            moments_between=self.cfg.moments_between,
        )

    def _at_moments(self, prompt: str) -> list[str]:
        text = resolve_prompt(prompt)
        return [f"{text}, {moment}" for moment in self.cfg.moments] or [text]

    def _with_view(self, prompt: str, direction: str) -> str:
        if not self.cfg.view_dependent_prompt_front:
            return f"{prompt}, {direction} view"
        view = "backside" if direction == "back" else direction
        return f"{view} view of {prompt}"

    def _embeddings(self, texts: set[str], device: torch.device) -> dict[str, Float[Tensor, "L C"]]:
        folder = resolve_model(self.cfg.pretrained_model_name_or_path, self.cfg.parts)
        identity = self.identity(folder)
        known = {}
        if self.cfg.use_cache:
            read = ((text, read_cached(identity, text)) for text in texts)
            known = {text: embedding for text, embedding in read if embedding is not None}
        new = sorted(texts - known.keys())
        if new:
            encoder = self.load_encoder(folder, device)
            computed = _computed(encoder, new)
            del encoder
            _free_memory()
            if self.cfg.use_cache:
                write_cached(identity, computed)
            known |= computed
        return {text: embedding.to(device) for text, embedding in known.items()}


def cache_embeddings(prompts: Iterable[PromptProcessor.Config], device: torch.device | str) -> None:
    """Have the embeddings of many prompts in the cache, to the last bit as runs one after the other leave
    them there; each text encoder is loaded once, and only if a text of it is missing.

    A prompt that its own run will refuse (a text that is too long) is left out.

    Raises:
        ModelNotFound: a model was not found.
    """
    device = torch.device(device)
    alike: dict[tuple[type, str, Path], list[set[str]]] = defaultdict(list)
    processors: dict[type, PromptProcessor] = {}
    for cfg in prompts:
        if cfg.use_cache:
            processor = cfg.build()
            folder = resolve_model(cfg.pretrained_model_name_or_path, cfg.parts)
            alike[type(processor), processor.identity(folder), folder].append(processor.texts())
            processors[type(processor)] = processor
    for (kind, identity, folder), each in alike.items():
        encoder = None
        for texts in each:
            if new := sorted(text for text in texts if read_cached(identity, text) is None):
                encoder = encoder or processors[kind].load_encoder(folder, device)
                with suppress(ValueError):
                    write_cached(identity, _computed(encoder, new))
        del encoder
        _free_memory()


@torch.no_grad()
def _computed(encoder: TextEncoder, texts: list[str]) -> dict[str, Float[Tensor, "L C"]]:
    return dict(zip(texts, encoder(texts).float().cpu(), strict=True))


def tokenize(tokenizer: Any, text: str, max_length: int) -> list[int]:
    """Token ids padded to ``max_length``.

    Raises:
        ValueError: the text is longer; shows where it would be cut. Or see ``check_text``.
    """
    check_text(text)
    ids = tokenizer(text, verbose=False).input_ids
    if len(ids) > max_length:
        kept = tokenizer.decode(ids[: max_length - 1], skip_special_tokens=True)
        cut = tokenizer.decode(ids[max_length - 1 :][:100], skip_special_tokens=True)
        raise ValueError(
            f"a prompt has {len(ids)} tokens, the text encoder reads {max_length}; shorten it. "
            f"It would be cut here: {kept!r} >>> {cut!r}"
        )
    return tokenizer(text, padding="max_length", max_length=max_length).input_ids


# ---------------------------------------------------------------------------------------------
# The cache: one safetensors file for each (text encoder, text)

KEY = "states"
"""Name of the tensor in a file of the cache."""


def cache_folder() -> Path:
    """Folder of the embeddings, below the project's ``cache_root``."""
    return cache_root() / "text_embeddings"


def model_identity(folder: Path, parts: Sequence[str]) -> str:
    """A name for these text encoders and tokenizers with these weights; a retrained one has another name."""
    files = sorted(f for part in parts for f in (folder / part).rglob("*"))
    stamps = [
        (str(f.relative_to(folder)), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()
    ]
    return f"{folder.resolve()} {hashlib.blake2b(repr(stamps).encode(), digest_size=16).hexdigest()}"


def read_cached(identity: str, text: str) -> Float[Tensor, "L C"] | None:
    """The embedding of a text, or None if they are not there or can't be read."""
    from safetensors import SafetensorError, safe_open

    file = _cache_file(identity, text)
    try:
        with safe_open(file, framework="pt") as entry:
            if (entry.metadata() or {}) != _label(identity, text):
                return None
            return entry.get_tensor(KEY)
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        logger.warning("%s is not readable (%s); computing it again", file, error)
        return None


def write_cached(identity: str, embeddings: Mapping[str, Float[Tensor, "L C"]]) -> None:
    """Keep the embeddings of some texts; each file appears complete or not at all."""
    from safetensors.torch import save

    with by_product("the cache of text embeddings"):
        for text, tensor in embeddings.items():
            content = save({KEY: tensor.contiguous()}, metadata=_label(identity, text))
            write_whole(_cache_file(identity, text), content)


def _cache_file(identity: str, text: str) -> Path:
    digest = hashlib.blake2b(f"{identity}\0{text}".encode(), digest_size=16).hexdigest()
    return cache_folder() / f"{digest}.safetensors"


def _label(identity: str, text: str) -> dict[str, str]:
    return {"model": identity, "prompt": text}


@cache
def _warn_once(message: str) -> None:
    """A run has several processors, and one prompt for them all."""
    logger.warning(message)


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
