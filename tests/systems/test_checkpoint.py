"""Checkpoints are atomic, and files from strangers run no code."""

import pickle

import pytest
import torch

from fourdfy.config import ConfigError
from fourdfy.systems.checkpoint import read_checkpoint, write_checkpoint


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code was run')",))


def test_what_is_saved_is_read_back(tmp_path):
    path = tmp_path / "deep" / "last.ckpt"
    write_checkpoint({"state_dict": {"a": torch.ones(2)}, "global_step": 3}, path)
    assert read_checkpoint(path)["global_step"] == 3


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, synced = tmp_path / "last.ckpt", []
    monkeypatch.setattr("os.fsync", lambda file: synced.append(path.exists()))
    write_checkpoint({"state_dict": {"a": torch.ones(2)}, "global_step": 3}, path)
    assert synced[0] is False and path.exists()


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "last.ckpt"
    write_checkpoint({"state_dict": {}, "global_step": 3}, path)
    with pytest.raises(Exception, match="pickle"):
        write_checkpoint({"state_dict": {}, "bad": lambda: 0}, path)
    assert read_checkpoint(path)["global_step"] == 3
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": Bomb()}, path)
    with pytest.raises(ConfigError, match="no state_dict"):
        read_checkpoint(path)
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ConfigError, match="can't be read"):
        read_checkpoint(path)


def test_a_missing_checkpoint_names_what_is_there(tmp_path):
    (tmp_path / "last.ckpt").touch()
    with pytest.raises(ConfigError, match=r"no such checkpoint; there is .*last\.ckpt"):
        read_checkpoint(tmp_path / "first.ckpt")
