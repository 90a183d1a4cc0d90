"""Finding models: folders, embedded ones, the hub's cache, mirrors, and nothing at all."""

from __future__ import annotations

import socket
from pathlib import Path

import huggingface_hub
import pytest

from fourdfy.diffusion import hub
from fourdfy.diffusion.hub import EMBEDDED, MIRRORS, locate_model, resolve_model

SD = "stabilityai/stable-diffusion-2-1-base"
PARTS = ("unet", "scheduler")


def make_parts(folder: Path, parts=PARTS) -> Path:
    for part in parts:
        (folder / part).mkdir(parents=True)
        (folder / part / hub.DESCRIPTIONS.get(part, "config.json")).write_text("{}")
        if part == "unet":
            (folder / part / "diffusion_pytorch_model.safetensors").touch()
    return folder


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch) -> Path:
    """A hub cache of this test alone, and no way to a network."""
    cache = tmp_path / "hub_cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def refuse(*_args, **_kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return cache


def put_in_cache(cache: Path, hub_id: str, parts=PARTS) -> Path:
    repo = cache / f"models--{hub_id.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    return make_parts(repo / "snapshots" / "abc", parts)


def test_a_local_folder_is_taken_as_it_is(tmp_path):
    folder = make_parts(tmp_path / "model")
    assert resolve_model(str(folder), PARTS) == folder
    assert locate_model(folder, PARTS) == str(folder)


def test_a_local_folder_without_a_part_says_which(tmp_path):
    folder = make_parts(tmp_path / "model", ("scheduler",))
    with pytest.raises(FileNotFoundError, match="lacks unet"):
        resolve_model(folder, PARTS)


def test_a_part_without_weights_is_no_part(tmp_path):
    folder = make_parts(tmp_path / "model")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks unet"):
        resolve_model(folder, PARTS)


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


@pytest.mark.parametrize("mirror", MIRRORS[SD])
def test_a_mirror_in_the_cache_serves_as_well(empty_cache, mirror):
    folder = put_in_cache(empty_cache, mirror)
    assert resolve_model(SD, PARTS) == folder


def test_a_half_fetched_model_in_the_cache_is_not_taken(empty_cache):
    put_in_cache(empty_cache, SD, ("scheduler",))
    with pytest.raises(FileNotFoundError):
        resolve_model(SD, ("scheduler", "unet"))


def test_offline_a_missing_model_lists_everything_tried_and_what_to_type():
    with pytest.raises(FileNotFoundError) as error:
        resolve_model(SD, PARTS)
    message = str(error.value)
    for hub_id in (SD, *MIRRORS[SD]):
        assert f"hub cache, {hub_id}: not there" in message
        assert f"hub, {hub_id}: not asked, HF_HUB_OFFLINE is set" in message
    assert f'hf download {MIRRORS[SD][0]} --include "unet/*" --include "scheduler/*"' in message
    assert locate_model(SD, PARTS) == f"{SD} (MISSING)"


def test_a_missing_folder_is_not_looked_for_on_the_hub(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(FileNotFoundError, match="local folder /no/such/model: not there"):
        resolve_model("/no/such/model", PARTS)


def test_online_the_next_mirror_is_asked_when_one_fails(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    folder, asked = make_parts(tmp_path / "snapshot"), []

    def fetch(hub_id, parts):
        asked.append(hub_id)
        if hub_id == SD:
            raise OSError("404 gone")
        return folder

    monkeypatch.setattr(hub, "_fetch", fetch)
    assert resolve_model(SD, PARTS) == folder
    assert asked == [SD, MIRRORS[SD][0]]
    assert locate_model(SD, PARTS).endswith("(to be fetched)")


def test_only_the_wanted_files_are_fetched_and_pickles_only_where_nothing_is_safer():
    files = [
        "model_index.json", "README.md", "v2-1_512.ckpt", "vae/config.json",
        "unet/config.json", "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.bin",
        "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/config.json", "text_encoder/pytorch_model.bin",
        "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json",
    ]  # fmt: skip
    assert hub._wanted_files(files, ("unet", "text_encoder", "tokenizer")) == [
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "text_encoder/pytorch_model.bin",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "tokenizer/tokenizer_config.json",
    ]
