"""What runs out of memory is repeated with less at once, and comes to the same; a budget is kept."""

from __future__ import annotations

import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fourdfy.callbacks.base import Callback, Run
from fourdfy.callbacks.last_checkpoint import LastCheckpoint
from fourdfy.devices import memory_capped
from fourdfy.launching import cli, lightning, retries
from fourdfy.launching.experiment import load_experiment
from fourdfy.launching.lightning import Trainer
from fourdfy.launching.retries import until_it_fits
from fourdfy.ops.replay import Replay
from fourdfy.priors.latent import LatentPrior
from fourdfy.scenes.nerf import renderer
from fourdfy.scenes.nerf.renderer import NeRFVolumeRenderer
from fourdfy.systems.fourdfy import FourdfySystem
from tests.commands import CONFIGS, TINY

STAGE = CONFIGS / "shapes_stage_3.yaml"
GIVEN = (
    "trainer.max_steps=2",
    "trainer.accumulate_grad_batches=2",
    "data.prob_multi_view=0.5",
    "data.single_view.prob_single_view_video=1",
    "data.single_view.num_frames=3",
)
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB. And more."


class Experiment:
    """A multi-view step and a video step, each of two parts, that can be taken again from the start."""

    def __init__(self, root, device: str, *given: str) -> None:
        given = (*TINY, *GIVEN, f"exp_root_dir={root}", *given)
        self.experiment = load_experiment([STAGE], given)
        self.device = device
        self.system = self.experiment.build_system().to(device)
        self.system.prepare(torch.device(device), resumed=False)
        # On the CPU, to which a system returns when its training ends.
        self.start = {name: value.to("cpu", copy=True) for name, value in self.system.state_dict().items()}
        self.settings = [(part, part.cfg) for part in self.parts()]

    def parts(self):
        for kind in self.system.plan.kinds:
            yield from (part := getattr(self.system, kind.module), part.prior)
        yield self.system.scene.renderer

    def trainer(self, *callbacks: Callback) -> Trainer:
        """For the first two steps, with the settings of the start."""
        for part, cfg in self.settings:
            part.cfg = cfg
        system, self.system.step = self.system, 0
        system.load_state_dict(self.start)
        data = self.experiment.build_data()
        data.choose_kind = lambda step: ("multi_view", "video")[step % 2]
        groups = [
            {"params": g["params"], "name": g["name"]} for g in system.configure_optimizer().param_groups
        ]
        self.optimizer = torch.optim.SGD(groups, lr=1e-3, momentum=0.9)  # in proportion to the gradients
        folder = self.experiment.trial_dir
        run = Run(system=system, data=data, folder=folder, label="", max_steps=2, optimizer=self.optimizer)
        named = {type(callback).__name__: callback for callback in callbacks}
        return Trainer(self.experiment.cfg.trainer, run, named, device=self.device)

    def train(self, *callbacks: Callback) -> dict[str, torch.Tensor]:
        """The state after the two steps."""
        self.trainer(*callbacks).fit(None)
        return {name: value.clone() for name, value in self.system.state_dict().items()}

    def assert_as_good_as(self, expected, state) -> None:
        """Equal to rounding, which is small beside what was learned."""
        for name in self.start.keys() - {"renderer.estimator.binaries"}:  # cells at their threshold
            value = expected[name]
            learned = (value.float() - self.start[name].float()).abs().max()
            assert (state[name].float() - value.float()).abs().max() <= 1e-4 * learned, name


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return Experiment(tmp_path_factory.mktemp("trained"), "cpu")


@pytest.fixture(scope="module")
def whole(experiment):
    return experiment.train()


@pytest.fixture(autouse=True)
def few_suffice(monkeypatch):
    monkeypatch.setattr(renderer, "FEWEST", 10)


def bounded(monkeypatch, owner, name: str, limit: int, size) -> list[int]:
    """Let a method fail where ``size`` of its arguments is above the limit; gives all sizes."""
    sizes, method = [], getattr(owner, name)

    def checked(self, *args):
        sizes.append(size(*args))
        if sizes[-1] > limit:
            raise torch.OutOfMemoryError(FULL)
        return method(self, *args)

    monkeypatch.setattr(owner, name, checked)
    return sizes


def does_not_fit(monkeypatch) -> None:
    bounded(monkeypatch, NeRFVolumeRenderer, "_shade", 1500, lambda rays, samples, *_: len(samples))
    bounded(monkeypatch, LatentPrior, "_posterior", 2, len)


def advice(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if "out of memory" in r.getMessage()]


def test_a_step_is_repeated_in_smaller_chunks_with_the_same_result(experiment, whole, monkeypatch, caplog):
    does_not_fit(monkeypatch)
    experiment.assert_as_good_as(whole, experiment.train())
    image, *_, video = advice(caplog)
    assert image == (
        "global step 0, a multi_view step: out of memory; repeated with less at once; for good: "
        "system.renderer.train_max_nums_static=2163 system.guidance_multi_view.low_ram_vae=2"
    )
    assert video.startswith("global step 1, a video step: ")
    assert experiment.system.cfg.renderer.train_max_nums is None  # the run's config stays as it was
    # With all that the last line advises, a run would need no repetition.
    advised = load_experiment([STAGE], [*TINY, *GIVEN, *video.split(": ")[-1].split()]).cfg.system
    used = experiment.system.scene.renderer.cfg
    assert advised.renderer == used and used.train_max_nums <= 1500 and used.train_max_nums_static <= 1500
    assert (advised.guidance_multi_view.low_ram_vae, advised.guidance_video.low_ram_vae) == (1, 1)


def test_what_a_backward_pass_had_added_when_it_failed_does_not_count(experiment, whole, monkeypatch, caplog):
    class FailsOnce(Callback):
        """In the second part of the first step, when one parameter has its gradient."""

        def begin(self, run):
            self.calls, (first, *_) = 0, run.optimizer.param_groups[0]["params"]
            self.handle = first.register_post_accumulate_grad_hook(self.fail)

        def fail(self, parameter):
            self.calls += 1
            if self.calls == 2:
                raise torch.OutOfMemoryError(FULL)

        def end(self, run, error):
            self.handle.remove()

    def step(self, batch):
        draws.append((batch.step, batch.part, torch.rand(1).item()))
        return take(self, batch)

    take, draws = FourdfySystem.training_step, []
    monkeypatch.setattr(FourdfySystem, "training_step", step)
    experiment.assert_as_good_as(whole, experiment.train(FailsOnce()))
    assert [line[:13] for line in advice(caplog)] == ["global step 0"]
    assert len(draws) == 5 and draws[1] == draws[2]  # the second part was repeated with its draws


def test_when_nothing_can_be_halved_the_step_has_changed_nothing(experiment, monkeypatch):
    monkeypatch.setattr(renderer, "FEWEST", 1000)
    sizes = bounded(monkeypatch, NeRFVolumeRenderer, "_shade", 0, lambda rays, samples, *_: len(samples))
    with pytest.raises(torch.OutOfMemoryError) as raised:
        experiment.train()
    assert str(raised.value) == (
        "global step 0, a multi_view step: out of memory, and it computes as little at once as it can; use "
        "images of fewer pixels or fewer frames, or close other programs that use the GPU (CUDA out of "
        "memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB)"
    )
    assert max(sizes[-2:]) <= 1000 < max(sizes)
    assert not experiment.optimizer.state
    for name, parameter in experiment.system.named_parameters():
        assert torch.equal(parameter, experiment.start[name.removeprefix("scene.")])


def test_a_run_that_was_given_up_is_continued_bit_for_bit(experiment, whole, monkeypatch, tmp_path):
    def step(self, batch):
        if (batch.step, batch.part) == (1, 1):
            raise torch.OutOfMemoryError(FULL)
        return take(self, batch)

    take, file = FourdfySystem.training_step, tmp_path / "last.ckpt"
    with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError):
        patched.setattr(FourdfySystem, "training_step", step)
        experiment.train(LastCheckpoint(file, 100))
    experiment.trainer().fit(file)
    for name, value in experiment.system.state_dict().items():
        assert torch.equal(value, whole[name]), name


def test_an_optimizer_s_step_has_room_before_it_changes_anything(experiment, whole, monkeypatch, caplog):
    def room(optimizer):
        calls.append(len(optimizer.state))
        if len(calls) == 1:
            raise torch.OutOfMemoryError(FULL)
        retries.make_room(optimizer)

    calls: list[int] = []
    monkeypatch.setattr(lightning, "make_room", room)
    experiment.assert_as_good_as(whole, experiment.train())
    assert [line[:13] for line in advice(caplog)] == ["global step 0"]
    assert calls[:2] == [0, 0] and len(calls) == 3  # in both steps, as nothing is fused here

    made = []
    monkeypatch.setattr(torch, "empty_like", lambda tensor: made.append(tensor.shape))
    retries.make_room(torch.optim.Adam([torch.zeros(3), torch.zeros(2, 2)]))
    assert made == [(3,), (3,), (2, 2), (2, 2)]


def test_a_step_that_an_optimizer_has_half_done_is_not_saved(experiment, monkeypatch, tmp_path):
    def step(self, closure):
        closure()
        self.param_groups[0]["params"][0].data += 1
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    with pytest.raises(torch.OutOfMemoryError, match=FULL):
        experiment.train(LastCheckpoint(tmp_path / "last.ckpt", 100))
    assert not (tmp_path / "last.ckpt").exists()


def test_an_evaluation_is_repeated_too(experiment, whole, monkeypatch, caplog):
    trainer = experiment.trainer()
    trainer.system.run.label = "stage 3/3"  # of a recipe, whose other stages may lack the key
    experiment.system.load_state_dict(whole)
    sizes = bounded(monkeypatch, NeRFVolumeRenderer, "_field", 200, lambda positions, *_: len(positions))
    of_scene = experiment.system.scene.renderer
    of_scene.cfg = replace(of_scene.cfg, eval_chunk_size=600)
    trainer.test()
    assert max(sizes) > 200
    (line,) = advice(caplog)[-1:]
    assert line.startswith("global step 0: ") and " stage_3.system.renderer.eval_chunk_size=" in line


def test_other_errors_are_not_repeated():
    calls = []

    def work():
        calls.append(1)
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape"):
        until_it_fits(work, lambda: {"a": 1}, "it")
    assert len(calls) == 1


def test_an_attempt_is_let_go_before_the_next():
    """What its frames hold would take the memory that the next one needs."""
    held: list[weakref.ref] = []

    def work():
        assert not any(large() is not None for large in held)
        large = torch.zeros(1)
        held.append(weakref.ref(large))
        if len(held) < 3:
            raise torch.OutOfMemoryError(FULL)

    until_it_fits(work, lambda: {"a": 1}, "it")
    assert len(held) == 3


def test_a_budget_caps_what_pytorch_reserves_for_a_while(monkeypatch):
    caps = []
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: caps.append(share)
    )
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 2**30)
    )
    for device, gib in (("cpu", 24.0), ("cuda:0", None), ("cuda:0", 24.0), ("cuda:0", 96.0)):
        with memory_capped(device, gib):
            caps.append(device)
    assert caps == ["cpu", "cuda:0", 0.3, "cuda:0", 1.0, 1.0, "cuda:0", 1.0]


def test_a_second_training_replays_nothing_of_the_first(experiment):
    recorded = Replay(torch.exp, "a network")
    recorded._recordings["kind"] = None
    experiment.train()
    assert not recorded._recordings


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_steps_fit_into_a_gpu_that_is_too_small_for_them(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(renderer, "FEWEST", 1 << 14)
    large = (
        "data.multi_view.width=256",
        "data.multi_view.height=256",
        "system.renderer.num_samples_per_ray=256",
    )
    few = (
        "system.renderer.train_max_nums=16384",
        "system.renderer.train_max_nums_static=16384",
        "system.guidance_multi_view.low_ram_vae=1",
        "system.guidance_video.low_ram_vae=1",
    )

    def trained(experiment: Experiment) -> tuple[dict[str, torch.Tensor], int, int]:
        """The state, the memory that it cannot do without, and what it took."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        state = experiment.train()
        return state, torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()

    experiment = Experiment(tmp_path / "few", "cuda:0", *large, *few)
    experiment.train()  # kernels are compiled, libraries loaded
    *_, least = trained(experiment)
    del experiment
    experiment = Experiment(tmp_path / "whole", "cuda:0", *large)
    whole, most, _ = trained(experiment)
    assert not advice(caplog) and most > 1.2 * least
    allowed = (least + most) / 2
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)
    try:
        state, _, taken = trained(experiment)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    experiment.assert_as_good_as(whole, state)
    assert advice(caplog) and taken <= allowed


def test_the_command_line_says_it_in_one_line(monkeypatch, capsys):
    def run(*args, **keywords):
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr("fourdfy.launching.run.run", run)
    assert cli.main(["--config", "shapes.yaml", "--train"]) == 1
    assert capsys.readouterr().err == f"error: {FULL}\n"
