"""A float32 text encoder is read once, and from then on its copy in bfloat16."""

from __future__ import annotations

import os

import pytest
import torch
from transformers import UMT5EncoderModel

from fourdfy.files import atomic
from fourdfy.priors import half_copy
from fourdfy.priors.frozen import load_text_encoder
from tests.tiny_models import save_wan

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FOURDFY_CACHE", str(tmp_path / "cache"))
    return save_wan(tmp_path / "wan")


@pytest.fixture
def read(monkeypatch):
    """The folders that encoders were loaded from."""
    found, inner = [], UMT5EncoderModel.from_pretrained.__func__
    monkeypatch.setattr(
        UMT5EncoderModel,
        "from_pretrained",
        classmethod(lambda cls, place, **more: found.append(place) or inner(cls, place, **more)),
    )
    return found


def load(folder, dtype=torch.bfloat16) -> dict[str, torch.Tensor]:
    _, encoder = load_text_encoder(folder, CPU, "UMT5EncoderModel", "T5Tokenizer", dtype)
    return encoder.state_dict()


def copies(tmp_path) -> list:
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_dir() and path.name == "text_encoder"]


def test_the_second_time_its_copy_is_read(folder, tmp_path, read):
    first, second = load(folder), load(folder)
    assert read[0] == folder / "text_encoder" and [read[1]] == copies(tmp_path)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert all(tensor.dtype == torch.bfloat16 for tensor in second.values())
    size = sum(file.stat().st_size for file in read[1].glob("*.safetensors"))
    assert size < 0.6 * (folder / "text_encoder" / "model.safetensors").stat().st_size


def test_other_types_make_no_copy(folder, tmp_path, read):
    load(folder, torch.float32)
    half = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.bfloat16)
    half.save_pretrained(folder / "text_encoder")
    load(folder)
    assert not copies(tmp_path), "it was in bfloat16 already"


def test_changed_weights_and_cut_copies_are_read_anew(folder, tmp_path, read):
    load(folder)
    (copy,) = copies(tmp_path)
    (copy / "model.safetensors").write_bytes(b"")
    load(folder)
    load(folder)
    assert read[-2:] == [folder / "text_encoder", copy], "which was written again"
    os.utime(folder / "text_encoder" / "model.safetensors", ns=(1, 1))
    load(folder)
    load(folder)
    assert read[-2] == folder / "text_encoder" and read[-1] not in (copy, folder / "text_encoder")


def test_a_copy_leaves_room_and_one_that_fails_ends_nothing(folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(half_copy, "free_bytes", lambda _: 1000)
    load(folder)
    assert not copies(tmp_path)
    monkeypatch.undo()
    monkeypatch.setenv("FOURDFY_CACHE", str(tmp_path / "cache"))

    def fail(*_args, **_more):
        raise OSError("no space left on device")

    monkeypatch.setattr(UMT5EncoderModel, "save_pretrained", fail)
    with atomic.losses_noted():
        assert load(folder)
    assert "the copy of a text encoder in bfloat16 could not be written" in caplog.text
    assert not copies(tmp_path)
