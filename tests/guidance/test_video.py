"""Video guidances, and images encoded in parts."""

from __future__ import annotations

import pytest
import torch

from fourdfy.priors.frozen import encode_images
from fourdfy.prompts.views import for_views
from fourdfy.types import Conditions
from tests.guidance.networks import TEXT, context, generator, images, make, make_any, run
from tests.guidance.reference import cameras, distil
from tests.renders import images_of


@pytest.fixture(scope="module")
def vae(tiny):
    return make("stable-diffusion-guidance", tiny["sd"]).prior.vae


def encoded(vae, count: int, *args, source: torch.Generator | None = None):
    """(latents, gradient of their squares on the pixels) of ``count`` images."""
    pictures = images(count, 32)
    latents = encode_images(vae, pictures.movedim(-1, 1), source or generator(), *args)
    return latents.detach(), torch.autograd.grad(latents.square().sum(), pictures)[0]


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 7])
def test_encoding_in_chunks_changes_neither_latents_nor_gradients(vae, chunk):
    for whole, chunked in zip(encoded(vae, 5), encoded(vae, 5, chunk), strict=True):
        torch.testing.assert_close(whole, chunked, rtol=1e-4, atol=1e-6)


def test_encoding_in_chunks_holds_one_chunk_of_activations(vae):
    def stored(chunk: int) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            encode_images(vae, images(4, 32).movedim(-1, 1), generator(), chunk)
        return sum(sizes)

    assert stored(1) < stored(0) / 10


def test_a_subset_learns_and_the_others_do_not(vae):
    learned = set()
    for seed in range(8):
        latents, gradient = encoded(vae, 5, 2, "subset", source=generator(seed))
        # The subset is drawn before the noise.
        source = generator(seed)
        chosen = torch.randperm(5, generator=source)[:2]
        wanted, full = encoded(vae, 5, source=source)
        torch.testing.assert_close(latents, wanted, rtol=1e-4, atol=1e-6)
        others = torch.ones(5).index_fill(0, chosen, 0).bool()
        torch.testing.assert_close(gradient[chosen], full[chosen], rtol=1e-4, atol=1e-6)
        assert not gradient[others].any()
        learned |= set(chosen.tolist())
    assert learned == set(range(5))


@pytest.mark.parametrize("count", [4, 9])
def test_a_subset_of_all_images_is_all_of_them(vae, count):
    for whole, subset in zip(encoded(vae, 4), encoded(vae, 4, count, "subset"), strict=True):
        assert torch.equal(whole, subset)


@pytest.mark.parametrize(("gradient", "learning"), [("exact", 4), ("subset", 1)])
@pytest.mark.parametrize("kind", ["two_videos", "videocrafter"])
def test_video_guidances_learn_from_as_many_frames_as_the_config_says(tiny, kind, gradient, learning):
    rgb, out = run(make_any(tiny, kind, low_ram_vae=1, gradient=gradient))
    out.losses["sds_video"].backward()
    assert (rgb.grad.abs().amax(dim=(1, 2, 3)) > 0).sum() == learning


@pytest.mark.parametrize("kind", ["two_videos", "videocrafter"])
def test_the_loss_of_two_videos_is_the_mean_of_theirs(tiny, kind):
    guidance = make_any(tiny, kind, guidance_scale=1.0)  # 100 is also the factor of the rounding
    g = generator()
    latents, noise = (torch.randn(2, 4, 3, 8, 8, generator=g) for _ in range(2))
    timesteps = torch.tensor([30, 800])
    texts = for_views(TEXT, cameras([0.0, 90.0]), True)

    def gradient_of(videos: slice):
        x = latents[videos].clone().requires_grad_()
        some = Conditions(texts.text[videos], texts.uncond[videos])
        losses, _ = distil(guidance, x, timesteps[videos], noise[videos], some)
        loss = losses["sds_video"]
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    both, gradient = gradient_of(slice(0, 2))
    (first, first_gradient), (second, second_gradient) = (gradient_of(slice(i, i + 1)) for i in (0, 1))
    torch.testing.assert_close(both, (first + second) / 2, rtol=1e-4, atol=0)
    wanted = torch.cat([first_gradient, second_gradient]) / 2
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


def test_videocrafter_is_told_the_frame_rate(tiny):
    g = generator()
    shapes = ((1, 4, 3, 8, 8), (1, 77, 16))
    noisy, text = (torch.randn(s, generator=g) for s in shapes)

    @torch.no_grad()
    def predicted(**fps):
        prior = make_any(tiny, "videocrafter", **fps).prior
        return prior.predict(prior.denoiser.network, noisy, torch.tensor([500]), text)

    default, slow = predicted(), predicted(fps=8)
    assert torch.equal(default, predicted(fps=28))
    assert (default - slow).abs().max() > 1e-4


def test_videocrafter_needs_its_frame_rate_embedding(tiny):
    with pytest.raises(FileNotFoundError, match="fps_embedding"):
        make("videocrafter-guidance", tiny["zeroscope"])


def test_a_video_is_conditioned_on_the_view_of_its_first_frame(tiny, monkeypatch):
    guidance = make_any(tiny, "two_videos")
    seen = {}

    def keep(x, context):
        seen["text"] = x.conditions.text
        return {}, x.latents

    monkeypatch.setattr(guidance, "distil", keep)
    views = cameras([0.0, 90.0, 180.0, 0.0], group_size=2)
    guidance(images_of(images(4)), TEXT, views, context())
    assert torch.equal(seen["text"], TEXT.text_directions[0, [1, 2]]), "front, back"


def test_frames_of_a_video_stay_in_order(tiny):
    guidance = make_any(tiny, "two_videos")
    rgb = images(4)
    videos = guidance.prior.encode(rgb, 2, generator())
    frames = guidance.prior.encode_images(rgb, generator())
    assert videos.shape == (2, 4, 2, 4, 8)
    for video in range(2):
        for frame in range(2):
            assert torch.equal(videos[video, :, frame], frames[2 * video + frame])
