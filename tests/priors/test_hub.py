"""Finding models: folders, checkpoint files, embedded ones, the hub's cache, mirrors, and nothing at all."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

from fourdfy.priors import convert, hub
from fourdfy.priors.frozen import load_text_encoder
from fourdfy.priors.hub import (
    MODELS,
    converted_folder,
    locate_model,
    resolve_file,
    resolve_model,
    stored_bytes,
)
from fourdfy.priors.model_folder import DESCRIPTIONS, wanted_files, weight_files
from tests.fake_hub import serving
from tests.tiny_models import save_clip_text, save_mvdream_checkpoint

SD = "stabilityai/stable-diffusion-2-1-base"
MVDREAM = "MVDream/MVDream"
PARTS = ("unet", "scheduler")
EMBEDDED = {name: source.asset for name, (source, *_) in MODELS.items() if source.asset}
MIRRORS = [source.repo for source in MODELS[SD][1:]]


SAFETENSORS = (2).to_bytes(8, "little") + b"{}"
"""A file without tensors."""
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 3463726504\n"
UNET = "diffusion_pytorch_model"


def make_parts(folder: Path, parts=PARTS) -> Path:
    for part in parts:
        (folder / part).mkdir(parents=True)
        (folder / part / DESCRIPTIONS.get(part, "config.json")).write_text("{}")
        if part == "tokenizer":
            (folder / part / "tokenizer.json").write_text("{}")
        elif part != "scheduler":
            name = "model" if part == "text_encoder" else UNET
            (folder / part / f"{name}.safetensors").write_bytes(SAFETENSORS)
    return folder


def put(folder: Path, files: dict[str, bytes | str]) -> Path:
    """Write the ``files`` of a part, in place of its weights."""
    (folder / f"{UNET}.safetensors").unlink(missing_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def index(*shards: str) -> str:
    return json.dumps(
        {"metadata": {}, "weight_map": {f"{k}.weight": shard for k, shard in enumerate(shards)}}
    )


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch) -> Path:
    """A hub cache of this test alone, and no way to a network."""
    cache = tmp_path / "hub_cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("FOURDFY_CACHE", str(tmp_path / "fourdfy_cache"))

    def refuse(*_args, **_kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return cache


def snapshot(cache: Path, hub_id: str, commit: str | None = None) -> Path:
    """An empty snapshot in the hub's cache: of a commit, or of the main branch."""
    repo = cache / f"models--{hub_id.replace('/', '--')}"
    if commit is None:
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text("abc")
    folder = repo / "snapshots" / (commit or "abc")
    folder.mkdir(parents=True)
    return folder


def put_in_cache(cache: Path, hub_id: str, parts=PARTS, commit: str | None = None) -> Path:
    return make_parts(snapshot(cache, hub_id, commit), parts)


def test_a_local_folder_is_taken_as_it_is(tmp_path):
    folder = make_parts(tmp_path / "model")
    assert resolve_model(str(folder), PARTS) == folder
    assert locate_model(folder, PARTS) == str(folder)


def test_a_local_folder_without_a_part_says_which(tmp_path):
    folder = make_parts(tmp_path / "model", ("scheduler",))
    with pytest.raises(FileNotFoundError, match="lacks unet"):
        resolve_model(folder, PARTS)


ONE, TWO = (f"{UNET}-0000{k}-of-00002.safetensors" for k in (1, 2))
INDEX = f"{UNET}.safetensors.index.json"
FP16_ONE, FP16_TWO = (f"{UNET}.fp16-0000{k}-of-00002.safetensors" for k in (1, 2))


@pytest.mark.parametrize(
    ("files", "flaw"),
    [
        ({}, f"{UNET}.safetensors is missing"),
        ({f"{UNET}.safetensors": b""}, "is empty"),
        ({f"{UNET}.bin": POINTER}, f"{UNET}.bin is a Git LFS pointer"),
        ({f"{UNET}.safetensors": POINTER}, "is a Git LFS pointer"),
        ({f"{UNET}.safetensors": SAFETENSORS[:9]}, "is cut short"),
        ({f"{UNET}.fp16.safetensors": b""}, f"{UNET}.fp16.safetensors is empty"),
        ({INDEX: index(ONE, TWO), ONE: SAFETENSORS}, f"{TWO} is missing"),
        ({INDEX: index(ONE, TWO), ONE: SAFETENSORS, TWO: POINTER}, f"{TWO} is a Git LFS pointer"),
        ({INDEX: "[1]", ONE: SAFETENSORS}, "names no shards"),
        ({ONE: SAFETENSORS, TWO: SAFETENSORS}, f"{UNET}.safetensors is missing"),
        ({"other.safetensors": SAFETENSORS}, f"{UNET}.safetensors is missing"),
        ({f"{UNET}.safetensors": SAFETENSORS, "config.json": b""}, "config.json is empty"),
    ],
)
def test_a_part_without_what_its_loader_opens_is_no_part(tmp_path, empty_cache, files, flaw):
    folder = make_parts(tmp_path / "model")
    put(folder / "unet", files)
    with pytest.raises(FileNotFoundError, match="lacks unet") as error:
        resolve_model(folder, PARTS)
    assert flaw in str(error.value)
    assert flaw in locate_model(folder, PARTS)
    assert stored_bytes(folder, PARTS) is None
    put(put_in_cache(empty_cache, SD) / "unet", files)
    with pytest.raises(FileNotFoundError, match=r"hub cache, .* lacks unet"):
        resolve_model(SD, PARTS)
    assert flaw in locate_model(SD, PARTS)
    assert stored_bytes(SD, PARTS) is None


@pytest.mark.parametrize(
    ("files", "taken", "variant"),
    [
        ({f"{UNET}.safetensors": SAFETENSORS, f"{UNET}.bin": b"pickle"}, [f"{UNET}.safetensors"], None),
        ({f"{UNET}.safetensors": POINTER, f"{UNET}.bin": b"pickle"}, [f"{UNET}.bin"], None),
        ({f"{UNET}.bin": b"pickle", f"{UNET}.fp16.safetensors": SAFETENSORS}, [f"{UNET}.bin"], None),
        ({f"{UNET}.fp16.safetensors": SAFETENSORS}, [f"{UNET}.fp16.safetensors"], "fp16"),
        ({INDEX: index(ONE, TWO), ONE: SAFETENSORS, TWO: SAFETENSORS}, [INDEX, ONE, TWO], None),
        (
            {
                f"{UNET}.safetensors.index.fp16.json": index(FP16_ONE, FP16_TWO),
                FP16_ONE: SAFETENSORS,
                FP16_TWO: SAFETENSORS,
            },
            [f"{UNET}.safetensors.index.fp16.json", FP16_ONE, FP16_TWO],
            "fp16",
        ),
    ],
)
def test_the_weights_that_serve_are_taken(tmp_path, files, taken, variant):
    folder = make_parts(tmp_path / "model")
    put(folder / "unet", files)
    assert resolve_model(folder, PARTS) == folder
    weights = weight_files(folder, "unet")
    assert ([path.name for path in weights.paths], weights.variant) == (taken, variant)
    assert stored_bytes(folder, PARTS) == sum(len(files[name]) for name in taken)


def test_a_tokenizer_without_its_vocabulary_is_no_part(tmp_path):
    folder = make_parts(tmp_path / "model", ("tokenizer",))
    assert resolve_model(folder, ("tokenizer",)) == folder
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"lacks tokenizer \(merges.txt is missing\)"):
        resolve_model(folder, ("tokenizer",))


@pytest.mark.parametrize("content", [b"", POINTER])
def test_a_checkpoint_file_that_stands_for_another_is_not_converted(tmp_path, empty_cache, content):
    file = tmp_path / "mvdream.pt"
    file.write_bytes(content)
    with pytest.raises(FileNotFoundError, match=r"local file .* is (empty|a Git LFS pointer)"):
        resolve_model(file, PARTS)
    (snapshot(empty_cache, MVDREAM) / "sd-v2.1-base-4view.pt").write_bytes(content)
    assert "(MISSING; hub cache, " in locate_model(MVDREAM, PARTS)


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_names_point_into_the_package(name, monkeypatch, tmp_path):
    package = tmp_path / "fourdfy"
    monkeypatch.setattr(hub, "__file__", str(package / "diffusion" / "hub.py"))
    folder = make_parts(package / "shapes" / "assets" / EMBEDDED[name])
    assert resolve_model(name, PARTS) == folder


def test_the_cache_is_used_without_a_socket(empty_cache):
    folder = put_in_cache(empty_cache, SD)
    assert resolve_model(SD, PARTS) == folder
    assert locate_model(SD, PARTS) == f"{SD} (in the hub cache)"


@pytest.mark.parametrize("mirror", MIRRORS)
def test_a_mirror_in_the_cache_serves_as_well(empty_cache, mirror):
    folder = put_in_cache(empty_cache, mirror)
    assert resolve_model(SD, PARTS) == folder


def test_a_pinned_commit_in_the_cache_is_found_and_goes_before_another(empty_cache):
    pinned = MODELS[SD][1]
    put_in_cache(empty_cache, pinned.repo)
    folder = put_in_cache(empty_cache, pinned.repo, commit=pinned.revision)
    assert resolve_model(SD, PARTS) == folder


@pytest.mark.parametrize("source", [source for sources in MODELS.values() for source in sources], ids=str)
def test_pinned_commits_are_whole(source):
    assert source.revision is None or re.fullmatch("[0-9a-f]{40}", source.revision)


def test_a_half_fetched_model_in_the_cache_is_not_taken(empty_cache):
    put_in_cache(empty_cache, SD, ("scheduler",))
    with pytest.raises(FileNotFoundError):
        resolve_model(SD, ("scheduler", "unet"))


def test_offline_a_missing_model_lists_everything_tried_and_what_to_type():
    with pytest.raises(FileNotFoundError) as error:
        resolve_model(SD, PARTS)
    message = str(error.value)
    for hub_id in (SD, *MIRRORS):
        assert f"hub cache, {hub_id}: not there" in message
        assert f"hub, {hub_id}: not asked, HF_HUB_OFFLINE is set" in message
    command = f'hf download {MIRRORS[0]} --include "unet/*" --include "scheduler/*" --revision '
    assert command + MODELS[SD][1].revision in message
    assert "python launch.py --config CONFIG --fetch" in message
    assert locate_model(SD, PARTS) == f"{SD} (MISSING)"


def test_a_missing_folder_is_not_looked_for_on_the_hub(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(FileNotFoundError, match="local file or folder /no/such/model: not there"):
        resolve_model("/no/such/model", PARTS)


def test_online_the_next_mirror_is_asked_when_one_fails(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    folder, asked = make_parts(tmp_path / "snapshot"), []

    def fetch(source, parts):
        asked.append(source.repo)
        if source.repo == SD:
            raise OSError("404 gone")
        return folder

    monkeypatch.setattr(hub, "_fetch", fetch)
    assert resolve_model(SD, PARTS) == folder
    assert asked == [SD, MIRRORS[0]]
    assert locate_model(SD, PARTS).endswith("(to be fetched)")


def test_a_hub_that_can_not_be_reached_is_asked_once(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    asked = []

    def fetch(source, parts):
        asked.append(source.repo)
        raise FileNotFoundError("no connection") from ConnectionRefusedError()

    monkeypatch.setattr(hub, "_fetch", fetch)
    with pytest.raises(FileNotFoundError, match="no connection"):
        resolve_model(SD, PARTS)
    assert asked == [SD]


def test_only_the_wanted_files_are_fetched_and_pickles_only_where_nothing_is_safer():
    files = [
        "model_index.json", "README.md", "v2-1_512.ckpt", "vae/config.json",
        "unet/config.json", "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.bin",
        "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/config.json", "text_encoder/pytorch_model.bin",
        "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json",
    ]  # fmt: skip
    assert wanted_files(files, ("unet", "text_encoder", "tokenizer")) == [
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "text_encoder/pytorch_model.bin",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "tokenizer/tokenizer_config.json",
    ]


@pytest.mark.parametrize(
    ("part", "files", "wanted"),
    [
        (
            "text_encoder",
            "config.json model.safetensors.index.json model-00001-of-00002.safetensors "
            "model-00002-of-00002.safetensors model.fp16-00001-of-00002.safetensors pytorch_model.bin",
            "config.json model.safetensors.index.json model-00001-of-00002.safetensors "
            "model-00002-of-00002.safetensors",
        ),
        (
            "unet",
            f"config.json {UNET}.fp16.bin {UNET}.fp16.safetensors {UNET}.non_ema.safetensors",
            f"config.json {UNET}.fp16.safetensors",
        ),
        ("tokenizer", "tokenizer_config.json spiece.model README.md", "tokenizer_config.json spiece.model"),
        (
            "text_encoder_2",
            "config.json flax_model.msgpack model.fp16.safetensors model.onnx model.safetensors",
            "config.json model.safetensors",
        ),
        ("tokenizer_2", "tokenizer_config.json vocab.json", "tokenizer_config.json vocab.json"),
    ],
)
def test_shards_variants_and_sentencepiece_models_are_fetched(part, files, wanted):
    inside = [f"{part}/{name}" for name in files.split()]
    assert wanted_files(inside, (part,)) == [f"{part}/{name}" for name in wanted.split()]


def test_what_is_partial_is_completed_and_what_is_broken_fetched_again(empty_cache, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    folder = put_in_cache(empty_cache, SD, ("unet",))
    weights = folder / "unet" / f"{UNET}.safetensors"
    weights.write_bytes(POINTER)
    files = ["unet/config.json", f"unet/{UNET}.safetensors", "scheduler/scheduler_config.json"]
    forced = []

    def snapshot_download(_repo, revision, allow_patterns):
        """Like the hub's: a file that exists is left alone."""
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / "scheduler_config.json").write_text("{}")
        return str(folder)

    def hf_hub_download(_repo, file, revision, force_download):
        forced.append(file)
        (folder / file).write_bytes(SAFETENSORS)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_args, **_kwargs: files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    assert "to be fetched; hub cache" in locate_model(SD, PARTS)
    assert resolve_model(SD, PARTS) == folder
    assert forced == [f"unet/{UNET}.safetensors"]


def test_a_broken_checkpoint_file_is_fetched_again(empty_cache, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    file = snapshot(empty_cache, MVDREAM) / "sd-v2.1-base-4view.pt"
    file.write_bytes(POINTER)

    def hf_hub_download(_repo, _file, revision, force_download):
        if force_download:
            file.write_bytes(b"weights")
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    assert resolve_file(MVDREAM).read_bytes() == b"weights"


# Original checkpoints


@pytest.fixture(scope="module")
def mvdream_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("original") / "mvdream.pt"
    save_mvdream_checkpoint(file)
    return file


@pytest.fixture
def conversions(monkeypatch) -> list[Path]:
    """Conversions as they are made; they write parts that are only names."""
    made = []

    def fake(file: Path, folder: Path) -> None:
        make_parts(folder, ("unet", "vae", "scheduler", "text_encoder"))
        made.append(file)

    monkeypatch.setattr(convert, "convert_checkpoint", fake)
    return made


def test_a_checkpoint_file_is_converted_and_found_again(mvdream_file, conversions, tmp_path):
    assert locate_model(mvdream_file, PARTS) == f"{mvdream_file} (to be converted)"
    assert stored_bytes(mvdream_file, PARTS) == mvdream_file.stat().st_size
    folder = resolve_model(mvdream_file, PARTS)
    assert folder == resolve_model(str(mvdream_file), PARTS) == converted_folder(mvdream_file)
    assert folder.is_relative_to(tmp_path / "fourdfy_cache" / "converted")
    assert conversions == [mvdream_file]
    assert locate_model(mvdream_file, PARTS) == f"{mvdream_file} (converted in {folder})"
    assert stored_bytes(mvdream_file, PARTS) == len(SAFETENSORS)


def test_another_file_of_the_same_name_is_converted_anew(tmp_path, conversions):
    file = tmp_path / "model.ckpt"
    file.write_bytes(b"one")
    first = resolve_model(file, PARTS)
    file.write_bytes(b"another")
    assert resolve_model(file, PARTS) != first
    assert len(conversions) == 2


def test_a_conversion_that_was_killed_leaves_nothing_half(tmp_path, conversions, monkeypatch):
    file = tmp_path / "model.ckpt"
    file.write_bytes(b"one")
    whole = convert.convert_checkpoint

    def killed(file: Path, folder: Path) -> None:
        make_parts(folder, ("unet", "scheduler"))
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "convert_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        resolve_model(file, PARTS)
    assert not converted_folder(file).exists()
    assert locate_model(file, PARTS).endswith("(to be converted)")
    monkeypatch.setattr(convert, "convert_checkpoint", whole)
    folder = resolve_model(file, PARTS)
    assert [place.name for place in folder.parent.iterdir() if place.is_dir()] == [folder.name]


@pytest.mark.parametrize("commit", [MODELS[MVDREAM][0].revision, None])
def test_a_checkpoint_in_the_hubs_cache_is_used_without_a_socket(empty_cache, conversions, commit):
    file = snapshot(empty_cache, MVDREAM, commit) / "sd-v2.1-base-4view.pt"
    file.write_bytes(b"weights")
    assert resolve_model(MVDREAM, PARTS) == converted_folder(file)
    assert conversions == [file]


def test_the_file_itself_is_to_be_had_too(empty_cache, conversions, tmp_path):
    file = snapshot(empty_cache, MVDREAM) / "sd-v2.1-base-4view.pt"
    file.write_bytes(b"weights")
    assert resolve_file(MVDREAM) == resolve_file(file) == file
    assert not conversions
    with pytest.raises(ValueError, match="is a folder; expected an original checkpoint file"):
        resolve_file(tmp_path)


def test_a_missing_checkpoint_says_how_its_file_is_fetched():
    with pytest.raises(FileNotFoundError) as error:
        resolve_model(MVDREAM, PARTS)
    message = str(error.value)
    assert f"hub cache, {MVDREAM}/sd-v2.1-base-4view.pt: not there" in message
    assert f"hf download {MVDREAM} sd-v2.1-base-4view.pt --revision " in message
    assert "or an original checkpoint file" in message


def test_a_part_that_the_family_has_not_is_named(mvdream_file, conversions):
    with pytest.raises(FileNotFoundError, match=r"mvdream.pt lacks fps_embedding .*: it is another kind"):
        resolve_model(mvdream_file, ("unet", "fps_embedding"))


def test_prompts_of_a_checkpoint_are_read_with_its_encoder_and_sd21s_tokenizer(mvdream_file, empty_cache):
    import torch

    parts = ("tokenizer", "text_encoder")
    assert locate_model(mvdream_file, parts).endswith(f"(to be converted), tokenizer of {SD} (MISSING)")
    with pytest.raises(FileNotFoundError, match=rf"'{SD}' was not found"):
        resolve_model(mvdream_file, parts)
    assert not converted_folder(mvdream_file).exists(), "a minute's work for nothing"
    save_clip_text(snapshot(empty_cache, MIRRORS[0]))
    assert locate_model(mvdream_file, parts).endswith(f"tokenizer of {MIRRORS[0]} (in the hub cache)")
    folder = resolve_model(mvdream_file, parts)
    assert locate_model(mvdream_file, parts) == f"{mvdream_file} (converted in {folder})"
    tokenizer, encoder = load_text_encoder(folder, torch.device("cpu"))
    assert tokenizer("red").input_ids
    assert encoder.config.num_hidden_layers == 2
    (folder / "tokenizer" / "vocab.json").write_bytes(b"")
    assert resolve_model(mvdream_file, parts) == folder
    assert load_text_encoder(folder, torch.device("cpu"))[0]("red").input_ids


def test_a_file_that_is_no_model_is_an_error_with_its_name(tmp_path):
    (tmp_path / "notes.ckpt").write_text("hello")
    with pytest.raises(ValueError, match=r"notes.ckpt can't be read as a torch file"):
        resolve_model(tmp_path / "notes.ckpt", PARTS)


# A hub of our own, asked by a process that has not imported anything yet


def test_a_checkpoint_is_fetched_from_the_named_endpoint_with_the_token(tmp_path, monkeypatch):
    monkeypatch.undo()
    served = tmp_path / "served"
    served.mkdir()
    (served / "sd-v2.1-base-4view.pt").write_bytes(b"weights")
    plain = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    settings = {
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hf_secret",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    code = (
        "from fourdfy.priors import hub; "
        f"print(hub.locate_model({MVDREAM!r}, {PARTS})); print(hub._fetched({MVDREAM!r}, {PARTS}, [])); "
        f"print(hub.locate_model({MVDREAM!r}, {PARTS}))"
    )
    with serving({MVDREAM: served}) as (endpoint, asked):
        command, environment = [sys.executable, "-c", code], plain | settings | {"HF_ENDPOINT": endpoint}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, file, after = done.stdout.splitlines()
    assert before == f"{MVDREAM}/sd-v2.1-base-4view.pt (to be fetched)"
    assert Path(file).is_relative_to(tmp_path / "home")
    assert Path(file).read_bytes() == b"weights"
    assert after == f"{file} (to be converted)"
    resolved = [request for request in asked if "/resolve/" in request.path]
    assert {request.authorization for request in resolved} == {"Bearer hf_secret"}
    assert MODELS[MVDREAM][0].revision in resolved[0].path
