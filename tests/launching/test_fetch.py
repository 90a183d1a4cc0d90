"""``--fetch`` of the models of today, from a hub on this machine."""

from __future__ import annotations

import huggingface_hub
import pytest

from fourdfy.evaluation.networks import Judge, revision_of
from fourdfy.launching.cli import main
from fourdfy.priors import hub
from tests.commands import CONFIGS
from tests.fake_hub import NEWEST, serving
from tests.tiny_models import (
    save_animatediff,
    save_clip,
    save_multi_view,
    save_stable_diffusion,
    save_wan,
    save_xclip,
)
from tests.tiny_transformers import save_cogvideox, save_ltx, save_sd3, save_sdxl

MODELS = {
    "wan": (save_wan, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
    "ltx": (save_ltx, "Lightricks/LTX-Video"),
    "cogvideox": (save_cogvideox, "zai-org/CogVideoX-2b"),
    "animatediff": (save_animatediff, "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    "sdxl": (save_sdxl, "stabilityai/stable-diffusion-xl-base-1.0"),
    "sd3": (save_sd3, "stabilityai/stable-diffusion-3.5-medium"),
}
"""The end of a config's name, or an overlay -> what makes its model, and its name on the hub."""
ADAPTER = "guoyww/animatediff-motion-adapter-v1-5-3"
NOT_WANTED = ("README.md", "ltx-video-2b-v0.9.1.safetensors", "transformer/unused.safetensors")


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Overrides that name the other steps' models on this disk."""
    root = tmp_path_factory.mktemp("models")
    image, views = save_stable_diffusion(root / "sd"), save_multi_view(root / "mvdream")
    return [
        f"system.{key}={folder}"
        for key, folder in {
            "prompt_processor.pretrained_model_name_or_path": image,
            "prompt_processor_multi_view.pretrained_model_name_or_path": image,
            "guidance.pretrained_model_name_or_path": image,
            "guidance.pretrained_model_name_or_path_lora": image,
            "guidance_multi_view.pretrained_model_name_or_path": views,
        }.items()
    ]


def fetch_twice(command, served, tmp_path, monkeypatch):
    """Run a command with an empty cache and a hub, of which the second run asks nothing."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    with serving(served) as (endpoint, asked):
        template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        assert main(command) == 0
        first = len(asked)
        assert main(command) == 0
    assert len(asked) == first, "nothing is asked again"


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_is_fetched_once_at_its_commit_and_found_offline(kind, others, tmp_path, monkeypatch, caplog):
    save, name = MODELS[kind]
    served = {name: save(tmp_path / "served" / "model")}
    if kind == "animatediff":
        served[ADAPTER] = (served[name] / "motion_adapter").rename(tmp_path / "served" / "adapter")
    for folder in served.values():
        for file in NOT_WANTED:
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_bytes(b"not wanted")
    files, own = [f"fourdfy_stage_3_{kind}.yaml"], ()
    if (CONFIGS / "overlays" / f"{kind}.yaml").exists():
        files = ["fourdfy_stage_2.yaml", f"overlays/{kind}.yaml"]
        own = ("system.prompt_processor.", "system.guidance.")
    command = [word for file in files for word in ("--config", str(CONFIGS / file))]
    command += ["--fetch", "--gpu", "cpu", *(line for line in others if not line.startswith(own))]
    with caplog.at_level("INFO", "fourdfy"):
        fetch_twice(command, served, tmp_path, monkeypatch)
    source = hub.MODELS[name][0]
    assert f"fetching {name}: {source.download}" in caplog.text
    for repo, folder in served.items():
        commit = hub.MODELS[repo][0].revision or NEWEST
        place = tmp_path / "cache" / f"models--{repo.replace('/', '--')}" / "snapshots" / commit
        found = {str(file.relative_to(place)) for file in place.rglob("*") if not file.is_dir()}
        wanted = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
        assert found == wanted - set(NOT_WANTED)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    parts = ("vae", "scheduler", "text_encoder", "tokenizer")
    assert hub.locate_model(name, parts) == f"{name} (in the hub cache)"


def test_the_networks_that_judge_are_fetched_if_a_stage_is_judged(tmp_path, monkeypatch, capsys):
    """At their commit, which a judgement names, and without what other programs read."""
    names = {"clip": "openai/clip-vit-base-patch32", "xclip": "microsoft/xclip-base-patch32"}
    served = {names["clip"]: save_clip(tmp_path / "clip"), names["xclip"]: save_xclip(tmp_path / "xclip")}
    for folder in served.values():
        (folder / "tf_model.h5").write_bytes(b"not wanted")
    command = [
        "--config",
        str(CONFIGS / "shapes_stage_1.yaml"),
        "--gpu",
        "cpu",
        "evaluation.after_training=true",
    ]
    fetch_twice([*command, "--fetch"], served, tmp_path, monkeypatch)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main([*command, "--check", "--prompt", "a fox"]) == 0
    assert f"model: {names['xclip']} (in the hub cache), for its xclip" in capsys.readouterr().out
    for part, name in names.items():
        judge = Judge(name, part, "cpu")
        assert revision_of(judge.folder) == (hub.MODELS[name][0].revision or NEWEST)
        assert judge.texts(["a fox"]).shape == (1, 16)
        assert not (judge.folder / "tf_model.h5").exists()
