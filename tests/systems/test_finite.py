"""NaN and infinity stop a run before they reach the optimizer or a checkpoint."""

import pytest
import torch
from torch import nn

from fourdfy.launching.experiment import load_experiment
from fourdfy.systems import finite
from fourdfy.systems.broken_step import first_not_finite
from fourdfy.systems.checkpoint import read_checkpoint, write_checkpoint
from fourdfy.systems.finite import OVERFLOWS, FiniteCheck
from fourdfy.systems.fourdfy import FourdfySystem
from tests.commands import CONFIGS, TINY, launch, trial

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def prepared():
    """A stage-1 system with its four-view prior, and a batch for it."""
    guided = "system.guidance_multi_view.guidance_scale=3.0"  # without guidance, one of the texts is not read
    this = load_experiment([CONFIGS / "shapes_stage_1.yaml"], [*TINY, guided])
    system = this.build_system()
    system.prepare(torch.device("cpu"), resumed=False)
    return system, this.build_data().batch(0)


def plant_in_vae(system):
    return next(system.guidance_multi_view.prior.vae.encoder.parameters())


def plant_in_noise_levels(system):
    return system.guidance_multi_view.prior.denoiser.schedule.alphas_cumprod


def plant_in_text_embeddings(system):
    return system.texts["multi_view"].uncond


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (plant_in_vae, "guidance_multi_view.prior.vae.encoder.conv_in.weight"),
        (plant_in_noise_levels, "guidance_multi_view.prior.denoiser.schedule.alphas_cumprod"),
        (plant_in_text_embeddings, "texts.multi_view.uncond"),
    ],
)
def test_a_prior_that_fails_is_noticed_in_its_loss_and_found(prepared, place, name):
    system, batch = prepared
    assert first_not_finite(system, [batch]) == ""
    tensor = place(system)
    before = tensor.detach().clone()
    with torch.no_grad():
        tensor.fill_(NAN)
    out, found = system.training_step(batch), first_not_finite(system, [batch])
    with torch.no_grad():
        tensor.copy_(before)
    assert found.startswith(f"what the step is given: {name}, nan at [0")
    with pytest.raises(FloatingPointError, match=r"^here: the loss sds is nan; stopped before"):
        check_step(out.losses, toy()[1], "here")


def toy():
    network = nn.Linear(2, 1)
    network(torch.ones(1, 2)).sum().backward()
    return network, [
        {"name": "a", "params": [network.weight]},
        {"name": "b", "params": [network.bias]},
    ]


def check_step(losses, groups, step, scaled=False):
    return FiniteCheck(torch.optim.SGD(groups))(losses, step, scaled=scaled)


def test_large_but_finite_gradients_are_no_reason_to_stop():
    network, groups = toy()
    network.weight.grad.fill_(3e38)
    check_step({"sds": torch.tensor(3e38)}, groups, "here")


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_the_group_of_a_gradient_that_is_not_finite_is_named(value):
    network, groups = toy()
    network.bias.grad[0] = value
    with pytest.raises(FloatingPointError, match=r"^here: the gradient of b is (nan|inf); stopped"):
        check_step({"sds": torch.zeros(())}, groups, "here")


def test_parameters_that_were_broken_before_are_named():
    network, groups = toy()
    with torch.no_grad():
        network.weight[0, 0] = NAN
    with pytest.raises(FloatingPointError, match=r"^here: a parameter of a is nan \(is its learning rate"):
        check_step({"sds": torch.tensor(NAN)}, groups, "here")


def test_a_group_of_nothing_is_finite():
    _, groups = toy()
    empty = nn.Parameter(torch.zeros(0))
    check_step({"sds": torch.zeros(())}, [*groups, {"name": "c", "params": [empty]}], "here")


def test_gradients_that_overflow_are_the_scaler_s_affair():
    network, groups = toy()
    network.bias.grad[0] = INF
    assert check_step({"sds": torch.zeros(())}, groups, "here", scaled=True)


def test_gradients_that_no_scale_makes_finite_do_not_overflow():
    network, groups = toy()
    network.bias.grad[0] = NAN
    check = FiniteCheck(torch.optim.SGD(groups))
    for _ in range(OVERFLOWS):
        check({"sds": torch.zeros(())}, "before", scaled=True)
    with pytest.raises(FloatingPointError, match=r"^here: the gradient of b is nan"):
        check({"sds": torch.zeros(())}, "here", scaled=True)


@pytest.mark.parametrize("name", ["AdamW", "SGD", "LBFGS"])
def test_so_many_broken_steps_are_left_out_and_one_more_stops(name, caplog):
    network, groups = toy()
    groups = groups if name != "LBFGS" else [{"name": "all", "params": [*network.parameters()]}]
    optimizer = getattr(torch.optim, name)(groups, **({"weight_decay": 0.1} if name == "AdamW" else {}))
    kept = []
    check = FiniteCheck(optimizer, allowed=2, keep=lambda numbers: kept.append(numbers.losses) or "; look")
    before = {key: value.clone() for key, value in network.state_dict().items()}
    for step in range(2):
        network.weight.grad = torch.full_like(network.weight, NAN)
        assert not check({"sds": torch.tensor(1.0)}, f"step {step}")
        optimizer.step(lambda: torch.zeros(()))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert check.skipped == 2 and kept == [{"sds": 1.0}] * 2
    assert "2 of 2 allowed by trainer.max_skipped_steps); look" in caplog.messages[1]
    with pytest.raises(FloatingPointError, match=r"step 2: .*; stopped before the optimizer's step; look$"):
        check({"sds": torch.tensor(NAN)}, "step 2")


def test_a_step_that_is_left_out_late_is_counted(late, caplog):
    check, optimizer, _ = late
    check.allowed = 1
    check({"sds": torch.tensor(NAN)}, "step 0")
    assert check({"sds": torch.zeros(())}, "step 1")
    assert check.skipped == 1 and caplog.messages[0].startswith("step 0: the loss sds is nan; skipped")
    optimizer.step()
    assert check.settle()


@pytest.fixture
def late(monkeypatch):
    """The check of an optimizer that skips a broken step by itself, as fused kernels do on a CPU too."""
    monkeypatch.setattr(finite, "skips_on_gpu", lambda optimizer: optimizer._step_supports_amp_scaling)
    network, groups = toy()
    optimizer = torch.optim.AdamW(groups, lr=0.1, fused=True)
    return FiniteCheck(optimizer), optimizer, network


def test_a_broken_step_is_skipped_without_a_word_and_reported_before_the_next(late):
    check, optimizer, network = late
    good = {"sds": torch.zeros(())}
    check(good, "step 0")
    optimizer.step()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    moments = {key: value.clone() for key, value in optimizer.state[network.weight].items()}
    network.bias.grad[0] = NAN
    check(good, "step 1")
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(torch.equal(value, moments[key]) for key, value in optimizer.state[network.weight].items())
    network.bias.grad[0] = 1.0
    with pytest.raises(FloatingPointError, match=r"^step 1: the gradient of b is nan; stopped before"):
        check(good, "step 2")


def test_after_good_steps_the_optimizer_goes_on(late):
    check, optimizer, network = late
    for step in range(3):
        before = network.weight.detach().clone()
        check({"sds": torch.zeros(())}, f"step {step}")
        optimizer.step()
        assert not torch.equal(network.weight.detach(), before)
    check.settle()
    check.settle()  # there is nothing left to report


@pytest.mark.parametrize("found, loss", [(1.0, 0.0), (0.0, NAN)])
def test_a_gradient_scaler_and_the_check_skip_what_either_of_them_finds(late, found, loss):
    check, optimizer, network = late
    before = network.weight.detach().clone()
    check({"sds": torch.tensor(loss)}, "here", scaled=True)
    optimizer.found_inf = torch.tensor(found)  # as a scaler does right before the step
    optimizer.step()
    assert torch.equal(network.weight.detach(), before)


def test_other_optimizers_are_stopped_at_once():
    network, groups = toy()
    network.bias.grad[0] = NAN
    check = FiniteCheck(torch.optim.AdamW(groups, fused=True))
    with pytest.raises(FloatingPointError, match=r"^here: the gradient of b is nan"):
        check({"sds": torch.zeros(())}, "here")


def test_a_scene_that_is_not_finite_is_not_written_over_one_that_is(tmp_path):
    path = tmp_path / "last.ckpt"
    write_checkpoint({"state_dict": {"a": torch.ones(2)}, "global_step": 3}, path)
    with pytest.raises(FloatingPointError, match=r"global step 4: a is not finite .* stays as it was"):
        write_checkpoint({"state_dict": {"a": torch.tensor([1, NAN])}, "global_step": 4}, path)
    assert read_checkpoint(path)["global_step"] == 3


def test_a_scene_that_breaks_ends_the_run_and_keeps_the_last_checkpoint(tmp_path, capsys, monkeypatch):
    training_step = FourdfySystem.training_step

    def broken_at_step_1(system, batch):
        if batch.step == 1:
            system.scene.geometry.density_network.layers[0].weight.data.fill_(NAN)
        return training_step(system, batch)

    monkeypatch.setattr(FourdfySystem, "training_step", broken_at_step_1)
    assert launch("shapes_stage_1.yaml", "train", tmp_path, "checkpoint.every_n_train_steps=1") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    # Such a scene is empty, as a density of NaN is pruned, and its losses are finite.
    assert line.startswith("error: global step 1, a multi_view step: a parameter of geometry.density_network")
    last = trial(tmp_path, "shapes_stage_1") / "ckpts" / "last.ckpt"
    assert read_checkpoint(last)["global_step"] == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_group_without_gradients_is_on_no_other_device():
    network = nn.Linear(2, 1, device="cuda")
    loss = network(torch.ones(1, 2, device="cuda")).sum()
    check_step({"a": loss.detach()}, [{"name": "idle", "params": [network.weight]}], "here")
