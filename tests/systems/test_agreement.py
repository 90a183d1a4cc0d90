"""What the data draws together is what a prior takes together; settings that disagree are refused."""

import logging
from dataclasses import dataclass, replace

import pytest
import torch
from safetensors.torch import save_file

from fourdfy.config import ConfigError
from fourdfy.launching.experiment import load_experiment
from fourdfy.priors.mvdream import MultiViewAttention
from fourdfy.prompts.wan import WanPromptProcessor
from fourdfy.systems.agreement import check_agreement
from fourdfy.systems.supervision import SupervisionPlan
from fourdfy.types import StepContext
from tests.commands import CONFIGS
from tests.guidance.reference import CPU, embeddings
from tests.renders import images_of

STAGE_3 = CONFIGS / "shapes_stage_3.yaml"
STAGE_2 = CONFIGS / "shapes_stage_2.yaml"
STAGE_1 = CONFIGS / "shapes_stage_1.yaml"
TEXT = embeddings(channels=64, tokens=32)


def parsed(config, *overrides):
    prompt = "system.prompt_processor.prompt=a red cube bouncing"
    return load_experiment([config], [prompt, *overrides])


def asked_of_the_prior(this, kind: str, guidance_key: str):
    """(batch of a step of ``kind``, noisy latents with the text, their texts, guidance)."""
    data, guidance, seen = this.build_data(), getattr(this.cfg.system, guidance_key).build(device=CPU), {}

    def record(network, noisy, timesteps, text_embeddings, cameras=None):
        seen.update(noisy=noisy.chunk(2)[0], texts=text_embeddings.chunk(2)[0])
        return torch.zeros_like(noisy)

    guidance.prior.predict = record
    step = next(n for n in range(200) if this.plan.choose(this.cfg.seed, n).name == kind)
    batch = data.batch(step)
    rgb = torch.rand(len(batch.cameras), batch.cameras.height, batch.cameras.width, 3)
    generator = torch.Generator().manual_seed(0)
    guidance(images_of(rgb), TEXT, batch.cameras, StepContext(step, generator))
    return batch, seen["noisy"], seen["texts"], guidance


@pytest.mark.parametrize("more", [[], ["system.guidance_video.num_frames=8"]])
def test_two_clips_of_a_batch_are_two_clips_for_the_video_prior(more):
    views = "data.single_view.azimuth_range=[-25, 85]"  # one camera for each half: front, side
    this = parsed(STAGE_3, "data.single_view.batch_size=2", "data.single_view.num_frames=8", views, *more)
    batch, noisy, texts, _ = asked_of_the_prior(this, "video", "guidance_video")
    assert noisy.shape == (2, 4, 8, 16, 16)
    assert torch.equal(texts, TEXT.text_directions[0, [1, 0]]), "front, side"
    assert batch.cameras.azimuth_deg.unique().numel() == 2


def test_eight_views_are_two_groups_of_four_for_the_multi_view_prior():
    both = "system.guidance_multi_view.guidance_scale=2"  # at 1, the prior is asked with the text alone
    this = parsed(STAGE_1, "data.multi_view.batch_size=8", "data.multi_view.n_view=4", both)
    batch, noisy, _, guidance = asked_of_the_prior(this, "multi_view", "guidance_multi_view")
    assert len(noisy) == 8
    turns = batch.cameras.azimuth_deg.view(2, 4).diff()
    torch.testing.assert_close(turns, torch.full((2, 3), 90.0))
    attention = [
        module.processor
        for module in guidance.prior.denoiser.network.modules()
        if hasattr(module, "processor")
    ]
    groups = {one.num_views for one in attention if isinstance(one, MultiViewAttention)}
    assert groups == {4} == {batch.cameras.group_size}


def test_images_of_a_step_are_single():
    this = parsed(STAGE_3, "data.single_view.batch_size=3")
    batch = next(b for b in map(this.build_data().batch, range(200)) if b.kind == "single_view")
    assert (len(batch.cameras), batch.cameras.group_size) == (3, 1)


N_VIEW, NUM_FRAMES = "data.multi_view.n_view", "data.single_view.num_frames"


@pytest.mark.parametrize(
    ("config", "overrides", "keys"),
    [
        (
            STAGE_1,
            [f"{N_VIEW}=2"],
            ["system.guidance_multi_view.n_view=4", f"{N_VIEW}=2", f"set {N_VIEW}=4"],
        ),
        (STAGE_1, [f"{N_VIEW}=8", "data.multi_view.batch_size=8"], [f"set {N_VIEW}=4"]),
        (STAGE_1, [f"{N_VIEW}=3", "data.multi_view.batch_size=3"], [f"set {N_VIEW}=4"]),
        (STAGE_1, [f"{N_VIEW}=1"], [f"set {N_VIEW}=4"]),
        (
            STAGE_1,
            [f"{N_VIEW}=2", "system.guidance_multi_view.n_view=2"],
            ["system.guidance_multi_view", "fourdfy/shapes-4view denoises 4 views", "set n_view=4"],
        ),
        (
            STAGE_3,
            ["system.guidance_video.num_frames=4"],
            ["system.guidance_video.num_frames=4", f"{NUM_FRAMES}=8", "set num_frames=null"],
        ),
        (STAGE_3, [f"{NUM_FRAMES}=1"], [f"{NUM_FRAMES}=1", "one frame cannot move"]),
        (
            STAGE_3,
            ["data.multi_view.num_frames=4"],
            ["data.multi_view.num_frames=4", f"{NUM_FRAMES}=8", "set data.multi_view.num_frames=null"],
        ),
        (
            STAGE_3,
            ["data.single_view.sample_rand_frames=null", "data.multi_view.sample_rand_frames=t0"],
            ["data.multi_view.sample_rand_frames=t0", "data.single_view.sample_rand_frames=None"],
        ),
        (
            STAGE_3,
            ["system.geometry.pos_encoding_config.static=true"],
            ["system.geometry.pos_encoding_config.static=true", "data.single_view.static=false"],
        ),
        (
            STAGE_3,
            ["system.renderer.radius=2"],
            ["system.renderer.radius=2", "system.geometry.radius=1", "set system.renderer.radius=1"],
        ),
        (
            CONFIGS / "fourdfy_stage_3_low_vram.yaml",
            ["system.renderer.base_renderer.radius=0.5"],
            ["system.renderer.base_renderer.radius=0.5", "system.geometry.radius=1"],
        ),
        (
            STAGE_3,
            ["data.single_view.prob_single_view_video=null"],
            ["data.single_view.simultan=true", "data.single_view.prob_single_view_video=0.5"],
        ),
        (
            STAGE_1,
            ["system.freeze_static_modules=true"],
            ["system.freeze_static_modules=true", "data.single_view.static=true"],
        ),
        (
            STAGE_1,
            ["system.prompt_processor_multi_view.use_perp_neg=true"],
            ["use_perp_neg=true", "system.guidance_multi_view.view_dependent_prompting=true"],
        ),
        (
            STAGE_3,
            ["system.guidance_type=multiview-diffusion-guidance", "system.guidance.n_view=4"],
            ["system.guidance.n_view=4 disagrees with the number of single_view images"],
        ),
    ],
)
def test_two_settings_that_disagree_are_refused_by_both_names(config, overrides, keys):
    with pytest.raises(ConfigError) as error:
        parsed(config, *overrides)
    assert [key for key in keys if key not in str(error.value)] == [], error.value


def test_a_text_encoder_that_the_prior_does_not_read_is_refused(tmp_path):
    encoder = tmp_path / "text_encoder"
    encoder.mkdir()
    (encoder / "config.json").write_text('{"hidden_size": 768}')
    save_file({"weight": torch.zeros(1)}, encoder / "model.safetensors")
    model = f"system.prompt_processor_multi_view.pretrained_model_name_or_path={tmp_path}"
    with pytest.raises(ConfigError, match=r"fourdfy/shapes-4view reads texts of 64 channels.* gives 768"):
        parsed(STAGE_1, model)


def test_settings_that_the_stage_does_not_read_are_said(caplog):
    with caplog.at_level(logging.WARNING):
        parsed(STAGE_3, "data.single_view.simultan=false")
        parsed(STAGE_1, "system.prompt_processor_multi_view.moments=[early, late]")
        parsed(STAGE_3, "system.prompt_processor_video.prompt_still=a red cube standing still")
    assert "prob_single_view_video=0.75: no effect, data.single_view.simultan is false" in caplog.text
    assert "prompt_processor_multi_view.moments: a static scene has the first alone, 'early'" in caplog.text
    still = "prompt_processor_video.prompt_still: no effect, system.guidance_video.still_source is false"
    assert still in caplog.text
    caplog.clear()
    parsed(
        STAGE_3,
        "system.prompt_processor_video.prompt_still=a cube",
        "system.guidance_video.still_source=true",
    )
    assert "prompt_still" not in caplog.text


def test_a_text_for_stillness_that_is_missing_or_elsewhere_is_said(caplog):
    parsed(STAGE_3, "system.guidance_video.still_source=true", "system.prompt_processor.prompt_still=a cube")
    missing = "still_source=true without system.prompt_processor_video.prompt_still: the clip held still gets"
    elsewhere = "system.prompt_processor.prompt_still: no effect on images; clips have their own, "
    assert f"system.guidance_video.{missing}" in caplog.text
    assert f"{elsewhere}system.prompt_processor_video.prompt_still" in caplog.text


def test_the_stills_of_a_moving_scene_take_the_moments_of_its_clips():
    this = parsed(STAGE_3, "data.multi_view={num_frames: null, sample_rand_frames: null}")
    batches = [b for b in map(this.build_data().batch, range(60)) if b.kind == "multi_view"]
    assert len({round(float(batch.cameras.times[0]), 6) for batch in batches}) > 8, "t0, not 8 fixed moments"


VIDEO_MODELS = ["wan", "ltx", "cogvideox", "animatediff"]


@pytest.mark.parametrize("model", VIDEO_MODELS)
@pytest.mark.parametrize("other", ["zeroscope", *VIDEO_MODELS])
def test_texts_of_another_models_processor_are_refused_before_anything_is_fetched(model, other):
    given = (f"system.guidance_type_video={model}-guidance", "data.single_view.num_frames=17")
    texts = f"system.prompt_processor_type_video={other}-prompt-processor"
    if other == model:
        this = parsed(STAGE_3, *given, texts)
        assert this.cfg.system.prompt_processor_video.prompt == "a red cube bouncing", "the shared one"
        return
    with pytest.raises(
        ConfigError, match=f"set system.prompt_processor_type_video={model}-prompt-processor$"
    ):
        parsed(STAGE_3, *given, texts)


@pytest.mark.parametrize("model", ["sdxl", "sd3"])
def test_so_are_those_of_another_image_model(model):
    with pytest.raises(ConfigError, match=f"set system.prompt_processor_type={model}-prompt-processor$"):
        parsed(STAGE_2, f"system.guidance_type={model}-guidance")


def test_a_processor_made_from_the_priors_own_fits_it():
    class Longer(WanPromptProcessor):
        max_tokens = 600

        @dataclass(frozen=True, kw_only=True)
        class Config(WanPromptProcessor.Config):
            pass

    this = parsed(CONFIGS / "shapes_stage_3_wan.yaml")
    kind = replace(this.plan["video"], prompts=Longer.Config(prompt="a cube"))
    check_agreement(this.cfg, SupervisionPlan((kind,), dynamic=True))


@pytest.mark.parametrize("given", ["", "null"])
def test_a_model_that_the_prior_needs_is_not_null(given):
    problem = r"system.guidance_video.motion_adapter .*(, got null|write \. for the current folder)$"
    with pytest.raises(ConfigError, match=problem):
        parsed(CONFIGS / "fourdfy_stage_3_animatediff.yaml", f"system.guidance_video.motion_adapter={given}")
