"""Lightning around a system of one parameter, whose gradients are the steps' numbers."""

import csv
from dataclasses import replace
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from pytorch_lightning.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from fourdfy.callbacks.base import Callback
from fourdfy.callbacks.curves import Curves
from fourdfy.data.base import DataModule, EvalBatch
from fourdfy.launching.experiment import TrainerConfig
from fourdfy.launching.lightning import Trainer
from fourdfy.ops.cameras import orbit_cameras
from fourdfy.systems import finite
from fourdfy.systems.base import StepOutput
from fourdfy.types import RenderOutput, StepBatch
from tests.runs import new_run

NAN = float("nan")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


ZERO = torch.zeros(1).expand(2)  # as the times of a step are
CAMERAS = orbit_cameras(ZERO, ZERO, distance=3.0, fovy_deg=40.0, times=ZERO, height=2, width=2)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_buffer("slopes", torch.tensor([1.0, 10.0]))
        self.step, self.seen = 0, []

    @property
    def device(self):
        return self.weight.device

    def bound_memory(self, budget):
        """Nothing is kept for long."""

    def before_step(self, batch):
        self.seen.append("before")

    def after_backward(self, batch, optimizer):
        self.seen.append("after")

    def training_step(self, batch):
        self.seen.append((self.training, torch.is_autocast_enabled("cpu"), torch.is_anomaly_enabled()))
        loss = (self.weight * self.slopes * (batch.step + 1) * (batch.part + 1)).sum()
        return StepOutput(loss=loss, losses={"a": loss.detach()}, loss_weights={"a": 1.0}, metrics={})

    def render(self, cameras):
        self.seen.append((self.training, torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        image = torch.zeros(2, 2, 2, 1)
        return RenderOutput(comp_rgb=image.expand(-1, -1, -1, 3), opacity=image, depth=image)


class Steps(IterableDataset):
    def __init__(self, start, parts):
        self.start, self.parts = start, parts

    def __iter__(self):
        for step in count(self.start):
            for part in range(self.parts):
                yield StepBatch(kind="toy", cameras=CAMERAS, step=step, part=part)


class Data(DataModule):
    def __init__(self):
        """Without a config."""

    def train_dataloader(self, start_step, parts=1):
        return DataLoader(Steps(start_step, parts), batch_size=None)

    def val_dataloader(self):
        return DataLoader([EvalBatch(split="val", cameras=CAMERAS)] * 3, batch_size=None)

    test_dataloader = val_dataloader

    def val_cameras(self, dynamic):
        return {}

    test_cameras = val_cameras


class Watch(Callback):
    def __init__(self):
        self.gradients, self.losses, self.told = [], [], []

    def after_step(self, run, batch, losses):
        self.gradients.append(run.system.weight.grad.detach().clone())
        self.losses.append(dict(losses))

    def after_frames(self, run, batch, frames, *, done, total):
        self.told.append((run.step, done, total))

    def after_validation(self, run):
        self.told.append((run.step, "validated"))


def trainer(optimizer=torch.optim.SGD, device="cpu", callbacks=MappingProxyType({}), **keys):
    system = Toy().to(device)
    keys = {"max_steps": 2, "val_check_interval": 0} | keys
    toy = optimizer([{"params": [system.weight], "name": "toy"}], lr=0.1)
    run = new_run(max_steps=keys["max_steps"], optimizer=toy, system=system, data=Data(), folder=Path())
    watch = Watch()
    made = Trainer(TrainerConfig(**keys), run, {"watch": watch, **callbacks}, device=device)
    made.watch, made.run, made.toy = watch, run, system
    return made


def fit(**keys):
    made = trainer(**keys)
    made.fit(None)
    return made


def test_each_step_follows_its_own_gradient():
    made = fit()
    assert [*map(torch.Tensor.tolist, made.watch.gradients)] == [[1, 10], [2, 20]]
    assert made.run.step == 2
    torch.testing.assert_close(made.toy.weight.detach(), torch.tensor([-0.3, -3.0]))


@pytest.mark.parametrize(
    ("algorithm", "expected"), [("value", [1, 5]), ("norm", [5 / 101**0.5, 50 / 101**0.5]), (None, None)]
)
def test_gradients_are_clipped(algorithm, expected):
    made = fit(gradient_clip_val=5.0, gradient_clip_algorithm=algorithm, max_steps=1)
    expected = expected or [5 / 101**0.5, 50 / 101**0.5]
    torch.testing.assert_close(made.watch.gradients[0], torch.tensor(expected).float())


def test_parts_of_a_step_are_averaged():
    made = fit(accumulate_grad_batches=3)
    assert [*map(torch.Tensor.tolist, made.watch.gradients)] == [[2, 20], [4, 40]]
    # The weight is [-0.2, -2] at the second step, whose parts weigh it 2, 4 and 6 times.
    assert made.watch.losses[1]["a"] == pytest.approx((-0.2 - 20) * 4)
    assert [x for x in made.toy.seen if isinstance(x, str)] == ["before", "after"] * 2


def test_validations_come_after_whole_intervals_and_keep_to_their_limit():
    made = fit(max_steps=5, val_check_interval=2, limit_val_batches=2)
    shown = [(step, done, 2) for step in (2, 4) for done in (1, 2)]
    assert made.watch.told == [*shown[:2], (2, "validated"), *shown[2:], (4, "validated")]


def test_a_validation_before_training_checks_that_it_can_be_done():
    assert fit(val_check_interval=9, num_sanity_val_steps=1).watch.told == [(0, 1, 1), (0, "validated")]
    assert fit(val_check_interval=0, num_sanity_val_steps=1).watch.told == []


def test_no_validation_renders_nothing():
    assert fit(val_check_interval=1, limit_val_batches=0).watch.told == []


def test_evaluation_has_its_mode_and_leaves_each_module_in_its_own():
    made = trainer(max_steps=1, val_check_interval=1)
    made.toy.part = nn.Dropout().eval()
    made.fit(None)
    assert made.toy.seen[-1] == (False, False, False)
    assert made.toy.training and not made.toy.part.training


@pytest.mark.parametrize("precision", [32, "bf16-mixed", "bf16"])
def test_steps_and_renders_have_the_precision_that_is_asked_for(precision):
    made = fit(precision=precision, detect_anomaly=True, max_steps=1, val_check_interval=1)
    (step,), render = [x for x in made.toy.seen[:2] if x != "before"], made.toy.seen[-1]
    assert step == (True, precision != 32, True)
    assert render[1] == (precision != 32)
    assert not torch.is_anomaly_enabled()


def test_an_optimizer_may_evaluate_a_step_several_times():
    made = fit(optimizer=torch.optim.LBFGS, max_steps=1)
    assert made.run.step == 1 and made.toy.seen.count("after") > 1


def test_an_error_is_told_to_the_callbacks_with_its_origin():
    ends = []
    bad = SimpleNamespace(begin=lambda run: 1 / 0, end=lambda run, error: ends.append(error))
    made = trainer(callbacks={"bad": bad})
    with pytest.raises(ZeroDivisionError) as caught:
        made.fit(None)
    assert ends == [caught.value]
    assert caught.value.__notes__ == ["raised by begin of the callback 'bad' (SimpleNamespace)"]


def fit_mixed(spoil, weights, monkeypatch):
    """Six steps with a gradient scaler and fused AdamW, whose kernels do on a CPU what they do on a GPU; the
    fourth goes through ``spoil(output, weight)``. Notes the ``weights`` before each step and at the end."""
    monkeypatch.setattr(finite, "skips_on_gpu", finite.is_fused)
    made = trainer(partial(torch.optim.AdamW, fused=True), max_steps=6, gradient_clip_val=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    made.loops.strategy.precision_plugin = MixedPrecision("16-mixed", "cpu", scaler)

    def spoilt(batch):
        out = Toy.training_step(made.toy, batch)
        weights.append(made.toy.weight.detach().clone())
        return spoil(out, made.toy.weight) if batch.step == 3 else out

    made.toy.training_step = spoilt
    try:
        made.fit(None)
    finally:
        weights.append(made.toy.weight.detach().clone())
    return made


def test_in_mixed_precision_fused_optimizers_are_clipped_and_skip_what_overflows(monkeypatch):
    weights = []
    made = fit_mixed(
        lambda out, weight: replace(out, loss=out.loss + weight.sum() * 1e38), weights, monkeypatch
    )
    norms = torch.stack(made.watch.gradients).norm(dim=-1)
    torch.testing.assert_close(norms[[0, 1, 2, 4, 5]], torch.ones(5))
    assert [not torch.equal(*pair) for pair in pairwise(weights)] == [True, True, True, False, True, True]


def test_in_mixed_precision_a_step_of_nan_ends_the_run_and_changes_nothing(monkeypatch):
    weights = []
    with pytest.raises(FloatingPointError, match=r"^global step 3, a toy step: the loss a is nan"):
        fit_mixed(
            lambda out, weight: replace(out, losses={"a": torch.tensor(NAN)}), weights, monkeypatch
        )  # the gradients are finite: the scaler alone would not skip it
    assert torch.equal(weights[-1], weights[3]) and not torch.equal(weights[3], weights[2])


class NoWaiting(Callback):
    """An error for every wait for the GPU, from the second step on."""

    def after_step(self, run, batch, losses):
        torch.cuda.set_sync_debug_mode("error")

    def end(self, run, error):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", [32, "16-mixed"])
def test_no_step_waits_for_the_gpu(tmp_path, precision):
    adam = partial(torch.optim.AdamW, fused=True)
    callbacks = {"curves": Curves(tmp_path, 1, SimpleNamespace(enable=False), {}), "strict": NoWaiting()}
    made = trainer(adam, "cuda:0", callbacks, max_steps=9, precision=precision, gradient_clip_val=1.0)
    made.fit(None)
    with open(tmp_path / "csv_logs" / "version_0" / "metrics.csv") as file:
        assert [row["step"] for row in csv.DictReader(file)] == [str(step) for step in range(9)]
    assert made.toy.weight.abs().min() > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", [32, "16-mixed"])
def test_a_step_of_nan_ends_the_run_and_changes_nothing_on_a_gpu(precision):
    made = trainer(partial(torch.optim.AdamW, fused=True), "cuda:0", max_steps=9, precision=precision)
    weights = []

    def spoilt(batch):
        out = Toy.training_step(made.toy, batch)
        weights.append(made.toy.weight.detach().clone())
        loss = out.loss * (NAN if batch.step == 3 else 1.0)
        return replace(out, loss=loss, losses={"a": loss.detach()})

    made.toy.training_step = spoilt
    with pytest.raises(FloatingPointError, match=r"^global step 3, a toy step: the loss a is nan"):
        made.fit(None)
    assert torch.equal(made.toy.weight.cpu(), weights[3].cpu())
