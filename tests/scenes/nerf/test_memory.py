"""The samples with a graph are bounded by what fits into a GPU's memory."""

import pytest
import torch
from analytic_scene import frames, make_scene, training

from fourdfy.launching.experiment import load_experiment
from fourdfy.launching.lightning import memory_budget
from fourdfy.scenes.nerf import memory
from fourdfy.scenes.nerf import renderer as module
from fourdfy.scenes.nerf.memory import through_the_box
from tests.commands import CONFIGS, TINY

GIB = 2**30


@pytest.fixture
def measured(monkeypatch):
    """Each sample takes 1000 bytes, and few suffice."""
    monkeypatch.setattr(module, "bytes_per_sample", lambda *args: 1000.0)
    monkeypatch.setattr(module, "FEWEST", 10)


@pytest.fixture
def passes(monkeypatch):
    """Lengths of all passes that are shaded."""
    lengths, shade = [], module.NeRFVolumeRenderer._shade

    def counted(self, rays, samples, *others):
        lengths.append(len(samples))
        return shade(self, rays, samples, *others)

    monkeypatch.setattr(module.NeRFVolumeRenderer, "_shade", counted)
    return lengths


def test_a_step_is_shaded_in_passes_that_fit(measured, passes):
    made = make_scene()
    whole = made.renderer(frames(), training())
    assert passes == [len(whole.samples)]
    passes.clear()
    made.renderer.bound_memory(100_500.0)
    parts = made.renderer(frames(), training())
    assert len(passes) > 3 and max(passes) <= 100 and sum(passes) == len(whole.samples)
    torch.testing.assert_close(parts.comp_rgb, whole.comp_rgb)


@pytest.mark.parametrize(
    ("given", "available", "most"),
    [({"train_max_nums_static": 40}, 1e5, 40), ({"train_max_nums_static": 400}, 1e5, 100), ({}, -1e9, 20)],
)
def test_a_bound_that_is_given_stays_one_and_little_memory_still_renders(
    measured, passes, given, available, most
):
    made = make_scene(**given)
    made.renderer.bound_memory(available)
    made.renderer(frames(), training())
    assert max(passes) <= most


def test_the_original_s_subsets_do_not_depend_on_memory(measured):
    made = make_scene(gradient="subset", train_max_nums=50, train_max_nums_static=50)
    before = made.renderer.fitting
    made.renderer.bound_memory(1e5)
    assert made.renderer.fitting == before


def test_where_nothing_can_be_measured_the_fewest_samples_are_shaded_at_once(measured, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "bytes_per_sample", full)
    renderer = make_scene().renderer
    renderer.bound_memory(1e5)
    assert renderer.fitting == 10


@pytest.mark.parametrize("frozen", [(), ("orbit",), "all"])
def test_samples_are_measured_whatever_is_frozen(monkeypatch, frozen):
    """The memory of a GPU is pretended: 10 bytes for each sample."""
    seen, shade = [0], module.NeRFVolumeRenderer._shade

    def counted(self, rays, samples, *others):
        seen.append(len(samples))
        return shade(self, rays, samples, *others)

    monkeypatch.setattr(module.NeRFVolumeRenderer, "_shade", counted)
    monkeypatch.setattr(memory, "COUNTS", (128, 256))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5000 + 10 * seen[-1])
    monkeypatch.setattr(module, "FEWEST", 1)
    made = make_scene()
    for name, parameter in made.scene.geometry.named_parameters():
        parameter.requires_grad_(frozen != "all" and name not in frozen)
    made.renderer.bound_memory(1000.0)
    assert made.renderer.fitting == (module.NO_CAP if frozen == "all" else 100)
    assert all(parameter.grad is None for parameter in made.scene.geometry.parameters())


def test_what_is_measured_lies_in_the_box_and_is_sorted_by_ray():
    rays, samples = through_the_box(640, 1.5, torch.device("cpu"))
    positions, times = rays.midpoints(samples)
    assert len(samples) == 640 and (samples.ray_indices.diff() >= 0).all()
    assert positions.norm(dim=-1).max() < 1.5 and times.min() >= 0 and times.max() <= 1


@pytest.fixture
def system():
    """With its prior."""
    built = load_experiment([CONFIGS / "shapes_stage_1.yaml"], TINY).build_system()
    (kind,) = built.plan.kinds
    setattr(built, kind.module, kind.guidance.build(device=torch.device("cpu")))
    return built


def test_the_priors_and_what_the_optimizer_will_need_come_off_the_budget(system, monkeypatch):
    told = []
    monkeypatch.setattr(type(system.scene), "bound_memory", lambda self, available: told.append(available))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * GIB)
    system.bound_memory(8.0 * GIB)
    (kind,) = system.plan.kinds
    later = 16 * sum(p.numel() for p in system.parameters() if p.requires_grad)
    assert told == [6 * GIB - later - kind.guidance.activation_bytes(4, 16, 16)]


def test_fewer_frames_are_in_the_vae_at_once_where_all_would_leave_no_room(system, monkeypatch, caplog):
    told = []
    monkeypatch.setattr(type(system.scene), "bound_memory", lambda self, available: told.append(available))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * GIB)
    caplog.set_level("INFO")
    (kind,) = system.plan.kinds
    guidance = getattr(system, kind.module)
    later = 16 * sum(p.numel() for p in system.parameters() if p.requires_grad)
    whole = guidance.cfg.activation_bytes(4, 16, 16)
    system.bound_memory(float(2 * GIB + later + whole))
    assert guidance.prior.cfg.low_ram_vae == guidance.cfg.low_ram_vae == 2
    assert guidance.cfg.activation_bytes(4, 16, 16) == whole // 2 == told[0]
    assert "as if system.guidance_multi_view.low_ram_vae=2 were set" in caplog.text


def test_a_budget_without_room_for_samples_is_warned_of(system, monkeypatch, caplog):
    monkeypatch.setattr(type(system.scene), "bound_memory", lambda self, available: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * GIB)
    system.bound_memory(1.0 * GIB)
    assert "trainer.memory_budget_gb: the models and the scene alone take about 2.0 GiB" in caplog.text


def test_the_budget_is_what_is_given_or_free_less_a_reserve(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10 * GIB)
    assert memory_budget(torch.device("cuda"), 20.0) == pytest.approx(18 * GIB)
    assert memory_budget(torch.device("cuda"), None) == pytest.approx(36 * GIB)


@pytest.mark.parametrize(
    ("given", "budget", "expected"),
    [
        ({}, "video", [("train_max_nums", 500), ("train_max_nums", 250), ("eval_chunk_size", 80_000)]),
        ({"train_max_nums_static": 800}, "image", [("train_max_nums_static", 400)]),
        ({"train_max_nums": 800, "gradient": "subset"}, "video", [("eval_chunk_size", 80_000)]),
        ({"eval_chunk_size": 500}, None, [("eval_chunk_size", 250), None]),
    ],
)
def test_what_has_a_graph_is_halved_first_then_what_has_none(monkeypatch, given, budget, expected):
    monkeypatch.setattr(module, "FEWEST", 250)
    renderer = make_scene(**given).renderer
    renderer.shaded = 1000
    assert [renderer.halve_chunks(budget) for _ in expected] == [
        dict([pair] if pair else []) for pair in expected
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_that_does_not_fit_at_once_takes_less_memory(monkeypatch):
    monkeypatch.setattr(module, "FEWEST", 1000)
    given = ["system.prompt_processor.prompt=x", "system.geometry.pos_encoding_config.log2_hashmap_size=12"]
    system = load_experiment([CONFIGS / "fourdfy_stage_1.yaml"], given).build_system().to("cuda")
    renderer, rays = system.scene.renderer, frames(4, 96).to("cuda")
    renderer.estimator.binaries.fill_(True)

    def peak(available):
        """Bytes of a backward pass and of what the forward pass keeps for it; number of samples."""
        renderer.bound_memory(available)
        before = torch.cuda.memory_allocated()
        render = renderer(rays, module.StepContext(0, torch.Generator("cuda").manual_seed(0)))
        torch.cuda.reset_peak_memory_stats()
        render.comp_rgb.square().sum().backward()
        return torch.cuda.max_memory_allocated() - before, len(render.samples)

    peak(1e12)  # gradients and caches exist from now on
    whole, count = peak(1e12)
    assert renderer.fitting > count
    parts, _ = peak(whole / 8)
    assert renderer.fitting < count / 4
    assert parts < 0.6 * whole  # 20 bytes of each sample are kept
