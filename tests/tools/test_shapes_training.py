"""The training command at toy size, from the first step to folders that from_pretrained loads."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import CLIPTokenizer

from fourdfy.priors.wan import Wan
from fourdfy.prompts.views import at_times
from fourdfy.prompts.wan import WanPromptProcessor
from fourdfy.shapes.creature_prompts import CreaturePrompt
from fourdfy.shapes.grammar import MOMENTS, VIEWS, ShapePrompt
from fourdfy.shapes.prompts import encode as encode_prompts
from fourdfy.shapes.prompts import every_prompt, is_held_out
from tools.shapes_training import __main__ as command
from tools.shapes_training import quality, store, training
from tools.shapes_training.data import (
    TextTable,
    between_sixteenths,
    draw_scenes,
    full_text,
    moments_of,
    render_scenes,
    table_texts,
    text_row,
)
from tools.shapes_training.models import (
    CLASSES,
    CLIPS,
    DENOISERS,
    FOLDERS,
    FRAMES,
    SETTINGS,
    decode,
    encode,
    noise_schedule,
)
from tools.shapes_training.text import NUM_TOKENS, build_tokenizer, grammar_words, write_tokenizer

main = command.main
CPU = torch.device("cpu")
TINY = ["--minutes", "2", "--max-steps", "2", "--batch", "2", "--pool", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run in which every part made two steps, exported. Wan's are of a fraction of their size."""
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        for part, small in {
            "wan_vae": {"base_dim": 4, "decoder_base_dim": 4},
            "wan": {"num_attention_heads": 2, "num_layers": 1, "ffn_dim": 32},
        }.items():
            patch.setitem(SETTINGS, part, SETTINGS[part] | small)
            patch.setitem(FRAMES, part, 5)
        for part in CLASSES:
            main([part, "--out", str(out), *TINY])
        few = ["--num-prompts", "2", "--sample-steps", "2"]
        main(["samples", "--out", str(out), "--models", "image", "wan", *few])
        main(["export", "--out", str(out), "--assets", str(out / "assets")])
        yield out


def test_a_part_goes_on_where_it_stopped(run, tmp_path):
    for name in ("vae.json", "vae.safetensors", "vae.state.pt"):
        shutil.copyfile(run / name, tmp_path / name)
    main(["vae", "--out", str(tmp_path), *TINY])
    state = store.load_state(tmp_path, "vae")
    assert state["step"] == 4
    assert store.read_record(tmp_path, "vae")["steps"] == 4
    assert all(entry["step"] == 4 for entry in state["optimizer"]["state"].values())


def test_without_its_state_a_part_starts_from_its_averaged_weights(run):
    (run / "image.state.pt").unlink(missing_ok=True)
    before = store.read_record(run, "image")["steps"]
    main(["image", "--out", str(run), *TINY])
    assert store.read_record(run, "image")["steps"] == before + 2
    assert all(weights.isfinite().all() for weights in store.load_part(run, "image").parameters())


@pytest.mark.parametrize("part", ["image", "multi_view", "video"])
def test_exported_folders_load_as_genuine_models(run, part):
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel, UNet3DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = run / "assets" / FOLDERS[part]
    cls = UNet3DConditionModel if part == "video" else UNet2DConditionModel
    unet = cls.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32)
    assert (
        DDIMScheduler.from_pretrained(folder, subfolder="scheduler").config.prediction_type == "v_prediction"
    )
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    assert vae.config.scaling_factor == store.load_part(run, "vae").config.scaling_factor
    tokens = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")("a red cube", return_tensors="pt")
    text = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")(tokens.input_ids)
    assert text.last_hidden_state.shape[-1] == unet.config.cross_attention_dim
    index = json.loads((folder / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", cls.__name__]
    assert "## Training" in (folder / "README.md").read_text()
    largest = max(path.stat().st_size for path in folder.rglob("*.safetensors"))
    assert largest <= 16 * 2**20


def test_all_that_is_shipped_stays_within_64_megabytes():
    assert sum(path.stat().st_size for path in store.ASSETS.rglob("*") if path.is_file()) <= 64e6


@pytest.mark.parametrize(("part", "third"), [("image", "view"), ("wan", "motion")])
def test_samples_are_measured_and_shown(run, part, third):
    shares = store.read_record(run, part)["quality"]["shares"]
    assert set(shares["all"]) == {"colour", "shape", third, "right"}
    assert ("creatures" in shares) == (part == "image")
    assert (run / f"{part}.png").exists()
    one_step = store.read_record(run, part)["quality"]["one_step"]
    assert {"all"} <= one_step.keys() <= shares.keys()
    card = (run / "assets" / FOLDERS[part] / "README.md").read_text()
    assert f"- solids: {', '.join(map(str, one_step['all']))}" in card


def test_one_step_of_a_model_that_knows_the_truth_loses_only_what_the_autoencoder_does(tmp_path, monkeypatch):
    known = {}

    def remembered(vae, images):
        known.update(images=images, latents=encode(vae, images), vae=vae)
        return known["latents"]

    def right(part, denoiser, noisy, timesteps, text, cameras):
        scales = noise_schedule(part, CPU).scales(timesteps, noisy.ndim)
        assert cameras.shape == (2, 4, 16)
        return (scales.alphas * noisy - known["latents"]) / scales.sigmas

    monkeypatch.setattr(quality, "encode", remembered)
    few = {"device": CPU, "seed": 0, "count": 2}
    shipped = quality.one_step("multi_view", tmp_path, **few)
    monkeypatch.setattr(quality, "predict_velocity", right)
    best = quality.one_step("multi_view", tmp_path, **few)
    error = (decode(known["vae"], known["latents"]) - known["images"]).square().flatten(1).mean(1) / 4
    held_out = [best[which][0] for which in ("held_out", "creatures_held_out") if which in best]
    assert sum(held_out) / len(held_out) == pytest.approx(float(-10 * error.log10().mean()), abs=0.02)
    for which, psnr in best.items():
        assert max(psnr) - min(psnr) < 0.02
        assert all(20 < less < most for less, most in zip(shipped[which], psnr, strict=True))


def test_the_flow_model_is_trained_on_what_the_prior_computes(run):
    """Its texts, latents and noise levels, those of the classes that load the real Wan."""
    folder = run / "assets" / "shapes-wan"
    prior = Wan(Wan.Config(pretrained_model_name_or_path=str(folder), height=64, width=64), device=CPU)
    images = torch.rand(5, 64, 64, 3)
    clip = images.movedim(-1, 1)[None] * 2 - 1
    given = prior.encode(images, 5, torch.Generator())
    torch.testing.assert_close(given, encode(prior.vae, clip))
    measured = store.read_record(run, "wan_vae")
    assert prior.vae.config.latents_std == measured["latents_std"] != [1.0] * 8
    assert prior.denoiser.schedule == noise_schedule("wan", CPU)
    encode_texts = object.__new__(WanPromptProcessor).load_encoder(folder, CPU)
    shapes = ["", "a red ball standing still", "an orange diamond pulsing, overhead view"]
    table = TextTable(run, "wan_text", CPU)
    rows = torch.tensor([table.texts.index(text) for text in shapes])
    table.require(rows)
    texts = encode_texts(shapes)
    torch.testing.assert_close(texts[:, :NUM_TOKENS], table.rows[rows], atol=2e-3, rtol=0)  # of 16 bits
    assert texts.shape[1] == 512 and not texts[:, NUM_TOKENS:].any()


def test_texts_that_are_all_known_are_required_again(run):
    table = TextTable(run, "text", CPU)
    rows = torch.tensor([3, 5])
    table.require(rows)
    known = table.rows.clone()
    table.require(rows)
    torch.testing.assert_close(table.rows, known, equal_nan=True)
    assert table.missing.sum() == len(table.texts) - 3  # these and the empty one


def test_the_flow_model_s_folder_is_a_genuine_pipeline(run):
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(run / "assets" / "shapes-wan", local_files_only=True)
    clip = pipeline(
        "a red cube spinning", "", height=64, width=64, num_frames=5, num_inference_steps=1, output_type="pt"
    )
    assert clip.frames.shape == (1, 5, 3, 64, 64)


def test_a_four_view_model_sees_the_other_views(run):
    unet = store.load_part(run, "multi_view")
    torch.nn.init.normal_(unet.conv_out.weight)
    latents, text, camera = torch.randn(4, 4, 16, 16), torch.randn(4, 32, 64), torch.randn(4, 16)
    changed = latents.clone()
    changed[3] += 1
    one, other = (unet(x, 500, text, class_labels=camera).sample for x in (latents, changed))
    assert (one[0] - other[0]).abs().max() > 1e-5


@pytest.mark.parametrize("part", DENOISERS)
def test_drawn_scenes_say_what_their_texts_say(part):
    scenes = draw_scenes(part, 400, torch.Generator().manual_seed(1))
    texts = list(table_texts(part))
    said = [texts[row] for row in scenes.text[:, 0]]
    prompts = [every_prompt()[row // (5 * (1 + len(moments_of(part))))] for row in scenes.text[:, 0]]
    assert not any(map(is_held_out, prompts))
    assert scenes.times.shape == (400, FRAMES[part])
    assert scenes.times.min() >= 0 and scenes.times.max() < 1
    assert scenes.elevation_deg.min() >= 0 and scenes.elevation_deg.max() <= 30
    azimuth = (scenes.azimuth_deg[:, 0] + 180) % 360 - 180
    for n, text in enumerate(said):
        if "at the start" in text:
            assert scenes.times[n].max() == 0
        if "third quarter" in text:
            assert 0.5 <= scenes.times[n, 0] < 0.75
        if "third sixteenth" in text:
            assert 2.5 / 16 <= scenes.times[n, 0] < 3.5 / 16
            assert texts[scenes.text[n, 1]] == text.replace("third", "fourth")
            torch.testing.assert_close(scenes.share[n], 16 * scenes.times[n, 0] - 2.5)
        elif "sixteenth" not in text:
            assert texts[scenes.text[n, 1]] == text
        if "front view" in text:
            assert azimuth[n].abs() < (45 if part in CLIPS else 30)
    assert any("view" in text for text in said) == (part != "multi_view")
    assert any("at the start" in text for text in said) == (part not in CLIPS)
    assert any("quarter" in text for text in said) == (part == "wan")
    assert any("sixteenth" in text for text in said) == (part in ("image", "multi_view"))
    if part in CLIPS:
        gaps = (scenes.times.roll(-1, 1) - scenes.times) % 1
        torch.testing.assert_close(gaps, torch.full_like(gaps, 1 / FRAMES[part]))
        plain = [n for n, text in enumerate(said) if "quarter" not in text]
        assert scenes.times[plain, 0].max() < 1 / FRAMES[part]


def test_texts_are_mixed_in_the_training_as_in_the_recipe(run):
    table = TextTable(run, "text", CPU)
    times = torch.tensor([0.0, 0.01, 1 / 32, 0.4, 0.99])
    sixteenths, share = between_sixteenths(times)
    rows = text_row("image", torch.full((5, 2), 7), 2 + sixteenths, torch.zeros(5, 2).long())
    every = text_row("image", torch.full((16,), 7), 2 + torch.arange(16), torch.zeros(16).long())
    table.require(every)
    torch.testing.assert_close(table.mixed(rows, share), at_times(table.rows[every], times, "loop"))


@pytest.mark.parametrize(
    ("part", "kind"),
    [*((part, ShapePrompt) for part in DENOISERS), ("image", CreaturePrompt), ("multi_view", CreaturePrompt)],
)
def test_the_quality_checks_accept_the_ground_truth_and_refuse_other_prompts(part, kind):
    count, azimuths = (5, 8) if kind is ShapePrompt else (3, 4)
    prompts = quality.choose_prompts(kind, count)
    scenes = quality.ask(part, prompts, seed=0)
    images = render_scenes(scenes, CPU) / 2 + 0.5
    others = [prompts[-1], *prompts[:-1]]
    right = quality.check(part, images, scenes, prompts, azimuths)
    # The scenes are those of the other prompts, but for what is seen.
    asked = replace(scenes, codes=encode_prompts(others))
    wrong = quality.check(part, images, asked, others, azimuths)
    assert right.keys() == {"colour", "shape", "motion" if part in CLIPS else "view", "right"}
    assert all(passed.all() for passed in right.values())
    assert not any(wrong[name].all() for name in wrong if name != "view")  # the view is the scenes'


@pytest.mark.parametrize("part", ["image", "multi_view"])
def test_a_view_from_another_side_is_no_right_view(part):
    prompts = quality.choose_prompts(ShapePrompt, 5)
    scenes = quality.ask(part, prompts, seed=0)
    turned = replace(scenes, azimuth_deg=scenes.azimuth_deg + 90)
    images = render_scenes(turned, CPU) / 2 + 0.5
    assert not quality.check(part, images, scenes, prompts, num_azimuths=8)["view"].all()


def test_all_trains_the_denoisers_side_by_side_measures_and_exports(run, tmp_path, monkeypatch):
    """One of them, for the sake of time: a process takes longer to start than to train."""
    monkeypatch.setattr(training, "DENOISERS", ("image",))
    for name in ("vae.json", "vae.safetensors"):
        shutil.copyfile(run / name, tmp_path / name)
    few = ["--num-prompts", "2", "--sample-steps", "1"]
    main(["all", "--out", str(tmp_path), "--assets", str(tmp_path / "assets"), *TINY, *few])
    assert store.read_record(tmp_path, "image")["quality"]["num_prompts"] == 2 + 2  # creatures too
    assert (tmp_path / "assets" / FOLDERS["image"] / "unet" / "config.json").exists()


def test_full_text_has_time_before_view():
    text = full_text(ShapePrompt("orange", "cube", "spinning"), "at the start", "front view")
    assert text == "an orange cube spinning, at the start, front view"


def test_a_row_of_the_text_table_is_the_text_of_its_indices():
    texts = list(table_texts("text"))
    assert len(texts) == 346 * 18 * 5 + 1
    row = text_row("image", torch.tensor(37), torch.tensor(1 + 2), torch.tensor(1 + 3))
    assert texts[int(row)] == full_text(every_prompt()[37], MOMENTS[2], VIEWS[3])


def test_each_word_is_one_token_and_files_mean_the_same_tokenizer(tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path, subfolder="tokenizer", local_files_only=True)
    assert all(len(tokenizer(word).input_ids) == 3 for word in grammar_words("text"))
    text = "an orange diamond standing still, in the thirteenth sixteenth, overhead view"
    padded = tokenizer(text, padding="max_length", truncation=True).input_ids
    assert len(padded) == NUM_TOKENS
    assert padded == build_tokenizer("text")(text, padding="max_length", truncation=True).input_ids
    assert tokenizer.decode(tokenizer("a zebra über 7!").input_ids, skip_special_tokens=True).startswith(
        "a z"
    )


def test_the_shipped_tokenizers_are_those_that_are_written(tmp_path):
    write_tokenizer(tmp_path)
    build_tokenizer("wan_text").save_pretrained(tmp_path)
    for folder, names in {
        "shapes-image": ("vocab.json", "merges.txt"),
        "shapes-4view": ("vocab.json", "merges.txt"),
        "shapes-video": ("vocab.json", "merges.txt"),
        "shapes-wan": ("tokenizer.json",),
    }.items():
        for name in names:
            assert (tmp_path / name).read_bytes() == (store.ASSETS / folder / "tokenizer" / name).read_bytes()


def test_each_word_is_one_piece_and_other_texts_are_letters():
    tokenizer = build_tokenizer("wan_text")
    text = "an orange diamond standing still, in the last quarter, overhead view"
    pieces = [word if word == "," else f"▁{word}" for word in text.replace(",", " ,").split()]
    assert tokenizer.tokenize(text) == pieces
    assert tokenizer.tokenize("a zoo 7!")[1:] == ["▁", "z", "o", "o", "▁", "7", "!"]
    assert tokenizer("").input_ids == [tokenizer.eos_token_id]
