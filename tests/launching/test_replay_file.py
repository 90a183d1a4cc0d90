"""A step that is not finite leaves a file from which it is repeated, and its first cause is named."""

import logging

import pytest
import torch
from torch import nn

import fourdfy
from fourdfy.callbacks.base import Callback
from fourdfy.guidance import reconstruction
from fourdfy.launching.cli import main
from fourdfy.systems.base import System
from fourdfy.systems.broken_step import StepRecord, first_not_finite, read_step, write_step
from fourdfy.systems.checkpoint import read_checkpoint
from fourdfy.systems.finite import StepNumbers
from fourdfy.types import StepBatch
from tests.commands import TINY, launch, trial
from tests.launching.test_steps import CAMERAS, Toy

NAN = float("nan")


class Overflow(Callback):
    """After the first step, features overflow: infinity minus infinity."""

    def after_step(self, run, batch, losses):
        if run.step == 1:
            for parameter in run.system.scene.geometry.feature_network.parameters():
                parameter.data *= 1e30


def train(root, *overrides):
    given = [*TINY, f"exp_root_dir={root}", *overrides]
    return fourdfy.train("shapes_stage_1", given, device="cpu", callbacks=[Overflow()], test=False)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The error of a run whose second step is not finite, and its replay file."""
    root = tmp_path_factory.mktemp("stopped")
    with pytest.raises(FloatingPointError) as caught:
        train(root)
    return str(caught.value), trial(root, "shapes_stage_1") / "replay.pt"


def test_the_error_says_what_to_type(stopped):
    message, file = stopped
    assert message.startswith("global step 1, a multi_view step: the loss sds is nan; stopped before the ")
    assert message.endswith(f"launch.py --replay {file}")


def test_the_file_holds_everything_and_runs_no_code(stopped):
    content = torch.load(stopped[1], weights_only=True)
    assert content["step"] == 1 and content["parts"][0]["kind"] == "multi_view"
    assert content["losses"].keys() == {"sds", "sparsity"} and "the loss sds" in content["not_finite"]
    assert content["config"] == (stopped[1].parent / "configs" / "parsed.yaml").read_text()
    assert content["generators"]["cpu"].shape == torch.get_rng_state().shape
    assert content["state_dict"]["geometry.feature_network.layers.0.weight"].abs().max() > 1e28


def test_the_step_is_repeated_and_the_first_cause_is_named(stopped, caplog):
    with caplog.at_level(logging.INFO):
        assert main(["--replay", str(stopped[1]), "--gpu", "cpu"]) == 0
    assert "global step 1, a multi_view step: its losses were sds nan, sparsity 0.2" in caplog.text
    assert "the first that is not finite: what geometry.feature_network gives, " in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_of_a_gpu_is_repeated_there_and_on_a_cpu(tmp_path, caplog, monkeypatch):
    loss = reconstruction.reconstruction_loss
    monkeypatch.setattr(reconstruction, "reconstruction_loss", lambda *given: loss(*given) * NAN)
    given = [*TINY, f"exp_root_dir={tmp_path}"]
    with pytest.raises(FloatingPointError, match="global step 0, a multi_view step: the loss sds is nan"):
        fourdfy.train("shapes_stage_1", given, device="cuda")
    for gpu in ("0", "cpu"):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert main(["--replay", str(trial(tmp_path, "shapes_stage_1") / "replay.pt"), "--gpu", gpu]) == 0
        assert "the first that is not finite: what guidance_multi_view gives: losses.sds, nan" in caplog.text


def test_parameters_that_were_broken_before_are_named(stopped, tmp_path, caplog):
    content = torch.load(stopped[1], weights_only=True)
    content["state_dict"]["geometry.density_network.layers.0.weight"][0] = NAN
    torch.save(content, tmp_path / "replay.pt")
    with caplog.at_level(logging.INFO):
        assert main(["--replay", str(tmp_path / "replay.pt"), "--gpu", "cpu"]) == 0
    assert "the step is given, geometry.density_network.layers.0.weight" in caplog.text


def test_other_files_and_modes_are_refused(stopped, tmp_path, capsys):
    last, other = tmp_path / "last.ckpt", tmp_path / "other.pt"
    torch.save({"state_dict": {}, "global_step": 1}, last)
    torch.save(torch.load(stopped[1], weights_only=True) | {"parts": [{"cameras": 1}]}, other)
    for file, problem in {
        last: "is a checkpoint",
        other: "is a file of another kind",
        tmp_path: "is a folder",
        tmp_path / "none": "no such file",
    }.items():
        assert main(["--replay", str(file), "--gpu", "cpu"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert (
            line == f"error: --replay {file}: {problem}; a step that is not finite writes <trial>/replay.pt"
        )
    for wrong in (["--replay", "x", "--train"], ["--config", "x"]):
        with pytest.raises(SystemExit):
            main(wrong)


def test_so_many_steps_are_left_out_and_the_count_is_saved(tmp_path, caplog):
    train(tmp_path, "trainer.max_skipped_steps=1")
    assert "global step 1, a multi_view step: the loss sds is nan; skipped (1 of 1 allowed" in caplog.text
    last = trial(tmp_path, "shapes_stage_1") / "ckpts" / "last.ckpt"
    assert read_checkpoint(last)["skipped_steps"] == 1
    # One more is too many, also after a new start.
    more = ("trainer.max_skipped_steps=1", "trainer.max_steps=3")
    assert launch("shapes_stage_1.yaml", "train", tmp_path, *more) == 1
    assert read_checkpoint(last)["global_step"] == 2


class Parts(Toy, System):
    """A system with a part whose place in the step breaks."""

    def __init__(self):
        super().__init__()
        self.part = nn.Linear(2, 1)

    def training_step(self, batch):
        out = super().training_step(batch)
        given = self.weight * (NAN if self.broken == "given" else 1)
        gives = self.part(given)
        # The gradient of a root at 0 is infinite.
        loss = ((gives - gives.detach()) ** 2).sum().sqrt() if self.broken == "gradient" else gives.sum()
        return type(out)(loss=loss, losses={"a": loss.detach()}, loss_weights={}, metrics={})


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        ("given", "what part is given: 0, nan at [0]"),
        ("gradient", "the gradient of what part gives, nan at [0]"),
        ("parameter", "what the step is given: part.bias, nan at [0] (1 of 1 entries)"),
        ("", ""),
    ],
)
def test_the_search_looks_at_everything_in_the_order_of_time(broken, found):
    system, batch = Parts(), StepBatch(kind="toy", cameras=CAMERAS, step=3)
    system.broken = broken
    if broken == "parameter":
        system.part.bias.data.fill_(NAN)
    assert first_not_finite(system, [batch]).startswith(found)
    assert found or first_not_finite(system, [batch]) == ""
    assert not system.part._forward_hooks and not system.part._forward_pre_hooks


def test_a_file_has_the_buffers_as_the_step_saw_them(tmp_path):
    system, record = Parts(), StepRecord.begin(torch.device("cpu"))
    record.parts.append(StepBatch(kind="toy", cameras=CAMERAS, step=3))
    record.buffers = [buffer.clone() for buffer in system.buffers()]
    system.slopes.zero_()  # as the next step does, before the numbers of this one have come
    write_step(tmp_path / "replay.pt", system, StepNumbers({"a": torch.tensor(NAN)}, [], record), "")
    content = read_step(tmp_path / "replay.pt")
    assert content["state_dict"]["slopes"].tolist() == [1.0, 10.0]
    assert [(part.kind, part.step) for part in content["parts"]] == [("toy", 3)]
    assert system.slopes.tolist() == [0.0, 0.0]
