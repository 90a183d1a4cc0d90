"""``launch.py --evaluate``: the numbers of a trial, and all that they depend on."""

import json
import math
import re
from dataclasses import replace
from importlib.metadata import version
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import normalize

from fourdfy.config import ConfigError
from fourdfy.config_files import CONFIGS
from fourdfy.evaluation import likeness
from fourdfy.evaluation.judge import evaluate, measured, print_numbers
from fourdfy.evaluation.networks import Judge
from fourdfy.evaluation.protocol import EvaluationConfig
from fourdfy.evaluation.registry import METRICS, Metric, metric
from fourdfy.files.prompt_lists import read_prompts
from fourdfy.launching.cli import main
from fourdfy.launching.experiment import load_experiment
from fourdfy.launching.sweeps.jobs import read_sweep
from tests.commands import ROOT, launch, trial
from tests.evaluation.scenes_to_judge import ball, faces, views
from tests.tiny_models import save_clip, save_xclip

ZEBRA = "system.prompt_processor.prompt=a zebra dancing"


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    """Overrides that name tiny networks."""
    root = tmp_path_factory.mktemp("judges")
    return [f"evaluation.clip={save_clip(root / 'clip')}", f"evaluation.xclip={save_xclip(root / 'xclip')}"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Of a tiny trial of stage 3."""
    root = tmp_path_factory.mktemp("trained")
    assert launch("shapes_stage_3.yaml", "train", root, "trainer.max_steps=1", ZEBRA) == 0
    return root


def evaluated(root, *overrides):
    assert launch("shapes_stage_3.yaml", "evaluate", root, "trainer.max_steps=1", *overrides) == 0
    save = trial(root, "shapes_stage_3") / "save"
    return json.loads((save / "it1-evaluation.json").read_text())


def test_a_prompt_without_a_truth_gets_every_metric(root, judges, capsys):
    found = evaluated(root, ZEBRA, *judges)
    shown = capsys.readouterr().out
    assert found["prompt"] == "a zebra dancing" and "a zebra dancing" in shown and "iou" not in found
    for name in EvaluationConfig.measurable():
        assert name in found and name in shown, name
    assert -100 <= found["clip_score"] <= 100 and found["loop_closure"] is not None
    protocol = found["protocol"]
    assert (protocol["elevation_deg"], protocol["pixels"], protocol["seed"]) == (15.0, 24, 0)
    assert protocol["networks"]["clip"] == {"model": judges[0].partition("=")[2], "commit": None}
    assert protocol["captions"] == {"file": "sweeps/benchmark.yaml", "count": 40}
    assert protocol["versions"]["torch"] == version("torch") and protocol["step"] == 1
    assert (protocol["distance"], protocol["fovy_deg"]) == (3.0, 40.0)


def test_a_prompt_of_the_shapes_world_is_compared_with_it_and_needs_no_network(root, tmp_path):
    command = ["--trial", str(trial(root, "shapes_stage_3")), "--evaluate", "--gpu", "cpu"]
    assert main([*command, "--prompt", "a red cube bouncing", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "it1-evaluation.json").read_text())
    assert 0 <= found["iou"] <= 1 and found["flow"] >= 0 and "clip_score" not in found
    assert found["protocol"]["networks"] == {}


def test_metrics_can_be_chosen_and_the_last_line_names_the_file(root, caplog):
    found = evaluated(root, ZEBRA, "evaluation.metrics=[flicker]")
    assert "flicker" in found and "flow" not in found
    file = trial(root, "shapes_stage_3") / "save" / "it1-evaluation.json"
    assert caplog.messages[-1] == f"written to {file}"


def test_a_network_that_is_missing_is_named_before_anything_is_rendered(root, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert launch("shapes_stage_3.yaml", "evaluate", root, "trainer.max_steps=1", ZEBRA) == 2
    said = capsys.readouterr().err
    assert "the model 'openai/clip-vit-base-patch32' was not found" in said
    assert "its 0.6 GB on a machine with internet:  hf download openai/clip-vit-base-patch32" in said
    assert "--fetch evaluation.after_training=true\nor do without it:  evaluation.metrics=[" in said
    assert launch("shapes_stage_3.yaml", "fetch", root, ZEBRA, "evaluation.after_training=true") == 2
    assert "--fetch evaluation.after_training=true" in capsys.readouterr().err
    # The prompt of the config has a ground truth, and needs no network.
    assert launch("shapes_stage_3.yaml", "fetch", root, "evaluation.after_training=true") == 0


def test_a_scene_without_a_prompt_has_the_numbers_that_need_none(root, capsys):
    experiment = load_experiment([trial(root, "shapes_stage_3") / "configs" / "parsed.yaml"])
    system = experiment.load_system("cpu", experiment.last_checkpoint)
    camera = experiment.build_data().test_cameras(dynamic=True)["test"]
    given = {"prompt": None, "learned": False, "dynamic": True, "seed": 0}
    found = evaluate(system, camera, experiment.cfg.evaluation, **given)
    assert found.numbers.keys() == {
        name for name, entry in EvaluationConfig.measurable().items() if not entry.needs
    }
    print_numbers(found)
    assert "flicker" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="clip_score needs a prompt"):
        evaluate(system, camera, replace(experiment.cfg.evaluation, metrics=["flow", "clip_score"]), **given)


def test_what_is_no_number_is_not_defined():
    found = measured(
        views(ball()), [Metric("empty", "lowest", lambda views: math.nan), METRICS["view_consistency"]]
    )
    assert found["empty"] is None and found["view_consistency"] is not None


def test_another_kind_of_model_is_refused(root, judges, capsys):
    wrong = [judges[1], judges[1].replace("evaluation.xclip", "evaluation.clip")]
    assert launch("shapes_stage_3.yaml", "evaluate", root, ZEBRA, *wrong) == 2
    assert 'holds a ["XCLIPModel"], expected a CLIPModel' in capsys.readouterr().err


def test_a_wrong_name_is_refused_with_the_known_ones(root, capsys):
    assert launch("shapes_stage_3.yaml", "evaluate", root, "evaluation.metrics=[flicer]") == 2
    said = capsys.readouterr().err
    assert "no metric 'flicer' that can be asked for; expected clip_fronts, clip_r_precision" in said
    assert said.count("\n") == 1 and "prior" not in said


def test_a_stage_can_be_judged_after_its_training(judges, tmp_path):
    given = ["trainer.max_steps=1", ZEBRA, *judges, "evaluation.metrics=[clip_score, flow]"]
    assert launch("shapes_stage_1.yaml", "train", tmp_path, *given, "evaluation.after_training=true") == 0
    save = trial(tmp_path, "shapes_stage_1") / "save"
    found = json.loads((save / "it1-evaluation.json").read_text())
    assert abs(found["clip_score"]) <= 100 and found["flow"] is None  # the first stage stands still


def test_a_sweep_that_keeps_seeds_by_a_metric_has_its_jobs_judged(tmp_path):
    text = "config: shapes\nprompts: [a red cube spinning]\nseeds: 0-1\nkeep: 1 of 2 after stage 1\n"
    for by, is_judged in (("prior", False), ("highest motion", False), ("flow", True), ("lowest iou", True)):
        (tmp_path / "many.yaml").write_text(f"{text}keep_by: {by}\nexp_root_dir: {tmp_path}\n")
        ((_, given),) = read_sweep(tmp_path / "many.yaml", {}, [])._combinations()
        assert given == ["evaluation.after_training=true"] * is_judged, by


# ---------------------------------------------------------------------------------------------
# The networks


def test_clip_s_vectors_are_those_of_transformers(judges):
    """Of the prepared images, and of texts of any length."""
    judge = Judge(judges[0].partition("=")[2], "clip", "cpu")
    rgb = torch.rand(3, 32, 32, 3)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])  # of its own file
    pixels = ((rgb - mean) / std).movedim(-1, 1)
    wanted = judge.network.get_image_features(pixel_values=pixels).pooler_output
    torch.testing.assert_close(judge.images(rgb), normalize(wanted, dim=-1).detach())
    short, long = judge.texts(["a fox", "a fox " * 200])
    assert short.norm() == pytest.approx(1) and not torch.equal(short, long)
    torch.testing.assert_close(judge.texts(["a fox"])[0], short)  # whatever stands beside it
    smaller = judge.images(rgb[:, ::2, ::2].repeat_interleave(4, 1).repeat_interleave(4, 2))
    assert smaller.shape == (3, 16)  # resized to what the network reads


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("config.json", {"text_config": {"num_hidden_layers": 10**9}}, r"num_hidden_layers=1000000000; exp"),
        ("config.json", {"vision_config": {"image_size": None}}, r"image_size=null; expected"),
        ("preprocessor_config.json", {"image_std": [0, 1, 1]}, r"can't be loaded: .*image_std"),
        ("preprocessor_config.json", {"image_mean": "x"}, r"can't be loaded: "),
        ("vocab.json", [], r"can't be loaded: "),
    ],
)
def test_a_folder_that_no_network_can_be_made_from_is_refused(file, values, message, tmp_path):
    folder = save_clip(tmp_path)
    content = json.loads((folder / file).read_text())
    for key in values if isinstance(values, dict) else ():
        inner = values[key]
        content[key] = {**content[key], **inner} if isinstance(inner, dict) else inner
    (folder / file).write_text(json.dumps(content if isinstance(values, dict) else values))
    with pytest.raises(ConfigError, match=message):
        Judge(str(folder), "clip", "cpu")


def test_x_clip_s_cosine_is_its_own_logit_without_the_scale(judges):
    judge = Judge(judges[1].partition("=")[2], "xclip", "cpu")
    rgb = torch.rand(9, 32, 32, 3)
    chosen = rgb[[0, 3, 5, 8]]  # four of them, evenly
    assert judge.video_similarity(rgb, "a fox") == pytest.approx(judge.video_similarity(chosen, "a fox"))
    assert abs(judge.video_similarity(rgb, "a fox")) <= 1


class Knows(SimpleNamespace):
    """A judge whose vectors are the brightness of a picture's centre, and given texts'."""

    def images(self, rgb):
        bright = rgb[:, rgb.shape[1] // 2, rgb.shape[2] // 2].mean(dim=-1)
        return torch.stack([bright, 1 - bright], dim=-1)

    def texts(self, texts):
        return torch.tensor([self.known[text] for text in texts])

    def video_similarity(self, rgb, text):
        return float(rgb.mean())


DARK, BRIGHT = [0.0, 1.0], [1.0, 0.0]
SIDES = {"front view of a ball": DARK, "side view of a ball": BRIGHT, "back view of a ball": BRIGHT}


@pytest.mark.parametrize(("at", "count"), [((), 0), ((0,), 1), ((0, 180), 2), ((0, 120, 240), 3)])
def test_planted_faces_are_fronts(at, count):
    """Also of what turns: it is looked at around its first moment."""

    def turning(azimuth, times):
        return faces(*at)(azimuth - 2 * torch.pi * times, times)

    for paint, dynamic in ((faces(*at), False), (turning, True)):
        seen = views(ball(paint), dynamic=dynamic, networks=lambda part: Knows(known=SIDES))
        assert likeness.clip_fronts(seen) == count


def test_score_and_precision_of_known_vectors():
    """A bright ball with one dark side; its own text says bright, one caption dark."""
    known = {"a ball": BRIGHT, "a dark ball": DARK}
    seen = views(ball(faces(0)), networks=lambda part: Knows(known=known), captions=["a dark ball", "a ball"])
    middle = seen.around.rgb[:, 24, 24, 0]
    dark = int((middle < 0.5).sum())
    assert 3 <= dark <= 9
    assert likeness.clip_score(seen) == pytest.approx(100 * float(middle.mean()))
    assert likeness.clip_r_precision(seen) == pytest.approx(1 - dark / 24)
    assert likeness.xclip_score(seen) is None  # it stands still
    moving = views(ball(), dynamic=True, networks=lambda part: Knows())
    expected = 100 * fmean(float(clip.rgb.mean()) for clip in moving.clips)
    assert likeness.xclip_score(moving) == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------
# Names and lists


def test_a_plugin_s_metric_is_one_of_them(monkeypatch):
    monkeypatch.setattr("fourdfy.evaluation.registry.METRICS", METRICS)
    try:

        @metric("lowest")
        def darkness(views):
            """How dark it is."""
            return 1 - float(views.around.rgb.mean())

        assert EvaluationConfig(metrics=["darkness"]).chosen("a ball", False) == [METRICS["darkness"]]
    finally:
        METRICS.pop("darkness", None)
    with pytest.raises(ValueError, match=r"a metric 'flow' is already registered"):

        @metric("lowest")
        def flow(views):
            return 0.0


def test_the_page_lists_every_metric_with_its_direction():
    page = (ROOT / "docs" / "evaluation.md").read_text()
    rows = re.findall(r"^\| (`.*?`) \| (lowest|highest) \|", page, re.MULTILINE)
    listed = {name: best for names, best in rows for name in re.findall(r"`(\w+)`", names)}
    assert listed == {name: entry.best for name, entry in METRICS.items()}


def test_the_benchmark_list_is_a_sweep_of_forty_prompts():
    file = CONFIGS / "sweeps" / "benchmark.yaml"
    sweep = read_sweep(file, {}, [])
    assert len({*sweep.prompts}) == 40 and len(sweep.jobs) == 120
    assert read_prompts(file) == sweep.prompts
    last = sweep.recipes[0][2][-1].cfg.evaluation
    assert last.after_training and last == EvaluationConfig(after_training=True)  # the defaults, spelled out
    assert not sweep.recipes[0][2][0].cfg.evaluation.after_training


def test_anybody_s_list_is_read(tmp_path, caplog):
    (tmp_path / "list.txt").write_text("a fox\n# a comment\n\n an owl \n")
    assert read_prompts(tmp_path / "list.txt") == ["a fox", "an owl"] and not caplog.text
    (tmp_path / "list.txt").write_text("a fox\nan owl\na fox\n")
    assert read_prompts(tmp_path / "list.txt") == ["a fox", "an owl"]
    assert "list.txt: 'a fox' is there more than once; it counts once" in caplog.text
    (tmp_path / "list.yaml").write_text("prompts: list.txt\n")
    with pytest.raises(ConfigError, match=r"^captions: .*list\.yaml: expected a list of texts"):
        read_prompts(tmp_path / "list.yaml", "captions")


@pytest.mark.parametrize("content", ["prompts: []", "prompts: [a fox, ' ']"])
def test_a_list_without_prompts_is_refused(tmp_path, content):
    (tmp_path / "list.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"^captions: .*list\.yaml: there are none, or empty ones"):
        read_prompts(tmp_path / "list.yaml", "captions")
