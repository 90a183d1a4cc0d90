"""Torch files from strangers: what is in them comes out, and nothing in them runs."""

from __future__ import annotations

import pickle
import tarfile
from collections import OrderedDict
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from fourdfy.files.safe_load import InertPickle, Placeholder, read_torch_file

FORMATS = {"zip": {}, "legacy": {"_use_new_zipfile_serialization": False}}


def tensors() -> dict:
    base = torch.arange(12.0).reshape(3, 4)
    return {
        "view": base[1:, ::2],
        "whole": base,
        "half": torch.ones(2, dtype=torch.bfloat16),
        "long": torch.tensor(7),
        "parameter": torch.nn.Parameter(torch.ones(3)),
    }


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("foreign", [False, True])
def test_tensors_and_plain_values_come_out(tmp_path, form, foreign):
    content = {
        "state_dict": OrderedDict(tensors()),
        "plain": {"step": 3, "name": "x", "items": [1.5, (None, True), {2}, b"bytes", torch.float16]},
    }
    if foreign:
        content["hyper_parameters"] = OmegaConf.create({"lr": 0.1, "nested": {"a": [1, 2]}})
        content["callbacks"] = {"path": Path("x"), "score": np.float64(0.5), "array": np.zeros(2)}
    torch.save(content, tmp_path / "file.ckpt", **FORMATS[form])
    read = read_torch_file(tmp_path / "file.ckpt")
    for key, tensor in tensors().items():
        assert torch.equal(read["state_dict"][key], tensor)
        assert read["state_dict"][key].dtype == tensor.dtype
    assert read["plain"] == content["plain"]
    if foreign:
        assert repr(read["hyper_parameters"]) == "<placeholder of omegaconf.dictconfig.DictConfig>"
        assert "lr" in read["hyper_parameters"].state["_content"]
        assert isinstance(read["callbacks"]["path"], Placeholder)


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *args) -> None:
        self.call = function, args

    def __reduce__(self):
        return self.call


def write(code: str) -> str:
    return f"open({code!r}, 'w').close()"


def bad_file(marker: Path) -> Path:
    file = marker.with_name("inner.pt")
    torch.save({"a": Call(exec, write(str(marker)))}, file, _use_new_zipfile_serialization=False)
    return file


EVIL = {
    "exec": lambda marker: Call(exec, write(str(marker))),
    "eval within a call": lambda marker: Call(str, Call(eval, write(str(marker)))),
    "a method": lambda marker: Call(Path.touch, marker),
    "a nested torch file": lambda marker: Call(torch.storage._load_from_bytes, bad_file(marker).read_bytes()),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", EVIL)
def test_what_a_file_wants_to_call_is_not_called(tmp_path, kind, form):
    marker, file = tmp_path / "was_here", tmp_path / "evil.pt"
    torch.save({"evil": EVIL[kind](marker), "good": torch.ones(1)}, file, **FORMATS[form])
    assert torch.equal(read_torch_file(file)["good"], torch.ones(1))
    assert not marker.exists()
    torch.load(file, weights_only=False)
    assert marker.exists(), "this file is harmless, so nothing was shown"


def test_a_file_cannot_change_what_the_next_one_is_built_with(tmp_path):
    """Pickles may set attributes on what they look up: on functions of torch, say."""

    spoiling = (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n"  # look it up,
        b"N}X\x05\x00\x00\x00spoilX\x03\x00\x00\x00bads\x86b."  # and set .spoil = "bad" on it
    )
    builder = torch._utils._rebuild_tensor_v2
    assert InertPickle.load(BytesIO(spoiling)) is not builder
    assert not hasattr(builder, "spoil")
    pickle.loads(spoiling)
    assert builder.__dict__.pop("spoil") == "bad", "this pickle is harmless, so nothing was shown"


def test_large_files_are_mapped_not_read(tmp_path):
    torch.save({"a": torch.zeros(1000), "b": Path("x")}, tmp_path / "file.pt")
    tensor = read_torch_file(tmp_path / "file.pt")["a"]
    assert tensor.untyped_storage().nbytes() == 4000
    assert not tensor.untyped_storage().resizable()  # memory of its own could be resized


def test_what_is_no_torch_file_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_torch_file(tmp_path / "none.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list.pt holds a list; expected a dict"):
        read_torch_file(tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("<html>404</html>")
    with pytest.raises(ValueError, match=r"text.pt can't be read as a torch file"):
        read_torch_file(tmp_path / "text.pt")
    torch.save(tensors(), tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cut.pt is cut short$"):
        read_torch_file(tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cut.pt is empty$"):
        read_torch_file(tmp_path / "cut.pt")
    with tarfile.open(tmp_path / "old.pt", "w") as tar:
        tar.add(tmp_path / "text.pt", "pickle")
    with pytest.raises(ValueError, match="tar file"):
        read_torch_file(tmp_path / "old.pt")


@pytest.mark.filterwarnings("ignore:.*TorchScript archive")
def test_a_torchscript_archive_is_refused_before_it_is_loaded(tmp_path, monkeypatch):
    torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / "script.pt")
    monkeypatch.setattr(torch.jit, "load", lambda *_a, **_k: pytest.fail("torch.jit.load was called"))
    with pytest.raises(ValueError, match="TorchScript"):
        read_torch_file(tmp_path / "script.pt")
