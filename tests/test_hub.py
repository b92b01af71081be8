"""Publishing through the real client to a Hub that runs here."""

import importlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import make_model, run_example, save_checkpoint
from huggingface_hub import HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from isolation import make_environment, run_isolated
from PIL import Image
from safetensors.torch import load_file
from test_model_card import evaluation
from test_remote_code import LOAD_AND_RUN

from co2s_hf import Co2SForSemanticSegmentation, Co2SImageProcessor
from co2s_hf.arguments import parse_arguments
from co2s_hf.hub import HubArguments, PublishError, claim_repository, publish, publish_evaluation
from co2s_hf.model_card import figure_place, write_card


ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path):
    save_checkpoint(tmp_path / "model", crop_size=16)
    write_card(tmp_path / "model")
    return tmp_path / "model"


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def files(hub, name, branch="main", kind="model"):
    repository = hub.repositories[kind, name]
    return repository.trees[repository.refs[branch]]


def test_what_is_pushed_is_what_is_pulled(hub, folder):
    before = contents(folder)
    name = claim_repository("user/fields")
    assert publish(folder, name) == f"{hub.url}/user/fields"
    assert contents(folder) == before
    sent, pulled = (
        Co2SForSemanticSegmentation.from_pretrained(folder),
        Co2SForSemanticSegmentation.from_pretrained(name),
    )
    assert all(torch.equal(sent.state_dict()[key], value) for key, value in pulled.state_dict().items())
    snapshot = Path(snapshot_download(name))
    received = contents(snapshot)
    assert received.keys() == before.keys() | {".gitattributes"}
    assert {name for name in before if received[name] != before[name]} == {"README.md"}
    assert 'pipeline("image-segmentation", model="user/fields"' in (snapshot / "README.md").read_text()
    assert files(hub, name)["model.safetensors"].is_large


def test_a_stranger_pulls_by_name(hub, folder, tmp_path):
    publish(folder, claim_repository("user/fields"))
    image = Image.fromarray((255 * np.random.default_rng(0).random((24, 40, 3))).astype(np.uint8))
    image.save(tmp_path / "image.png")
    environment = make_environment(tmp_path / "stranger" / "packages")
    done = run_isolated(environment, LOAD_AND_RUN, "user/fields", tmp_path, HF_ENDPOINT=hub.url)
    assert done.returncode == 0, done.stderr[-3000:]
    model = Co2SForSemanticSegmentation.from_pretrained(folder)
    with torch.no_grad():
        expected = model(**Co2SImageProcessor.from_pretrained(folder)(image, return_tensors="pt")).logits
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], expected)


def test_transformers_own_push_carries_the_code(hub, folder):
    model = Co2SForSemanticSegmentation.from_pretrained(folder)
    model.push_to_hub("user/direct")
    Co2SImageProcessor.from_pretrained(folder).push_to_hub("user/direct")
    code = {name for name in files(hub, "user/direct") if name.endswith(".py")}
    assert code == {f"{n}_co2s.py" for n in ("adapters", "configuration", "modeling", "image_processing")} | {
        "text_guidance.py"
    }
    assert "custom_pipelines" in json.loads(files(hub, "user/direct")["config.json"].data)


def test_private_repositories_are_for_those_with_a_token(hub, folder, monkeypatch, tmp_path):
    name = claim_repository("user/secret", private=True)
    publish(folder, name)
    assert hub.repositories["model", name].private
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RepositoryNotFoundError, match=r"401"):
        HfApi().model_info(name)
    with pytest.raises(OSError, match=r"user/secret is not a local folder[\s\S]*private"):
        Co2SForSemanticSegmentation.from_pretrained(name, cache_dir=tmp_path)


def test_nothing_private_goes_into_a_public_repository(hub):
    hub.create("model", "user/open")
    with pytest.raises(ValueError, match=r"user/open exists and is public"):
        claim_repository("user/open", private=True)


def test_a_branch_leaves_main_as_it_was(hub, folder):
    name = claim_repository("user/fields", revision="v1")
    publish(folder, name, revision="v1")
    assert "model.safetensors" in files(hub, name, "v1") and "model.safetensors" not in files(hub, name)
    claim_repository("user/fields", revision="v1")  # again
    pulled = Co2SForSemanticSegmentation.from_pretrained(name, revision="v1")
    assert pulled.config.crop_size == 16


def test_without_a_token_it_is_said_before_anything_is_done(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PublishError, match=r"user/fields cannot be written to.*hf auth login.*start again"):
        claim_repository("user/fields")
    assert not hub.repositories


@pytest.mark.parametrize(
    ("failing", "status"), [("/commit/", 403), ("/commit/", 412), ("/large/", 403), ("/commit/", 0)]
)
def test_a_refused_or_broken_upload_loses_nothing_and_can_be_repeated(hub, folder, failing, status):
    before = contents(folder)
    name = claim_repository("user/fields", revision="v1")
    hub.failures[failing] = status
    with pytest.raises(PublishError) as error:
        publish(folder, name, revision="v1")
    message = str(error.value)
    assert (
        f"--checkpoint {folder} --hub_model_id user/fields --hub_revision v1" in message and "hf_local" not in message
    )
    assert contents(folder) == before and "config.json" not in files(hub, name, "v1")
    hub.failures.clear()
    publish(folder, name, revision="v1")
    assert "config.json" in files(hub, name, "v1")


def test_an_interrupted_upload_says_how_to_go_on(hub, folder, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(HfApi, "create_commit", interrupted)
    with pytest.raises(PublishError, match=r"interrupted.*whole, here; retry with"):
        publish(folder, claim_repository("user/fields"))


def test_results_are_added_to_a_published_card(hub, folder, tmp_path):
    name = claim_repository("user/fields")
    publish(folder, name)
    (tmp_path / "confusion.png").write_bytes(b"picture")
    publish_evaluation(name, evaluation("towns"), tmp_path / "confusion.png")
    card = ModelCard(files(hub, name)["README.md"].data.decode())
    assert "| land | 40.0 | 45.0 | 50.0 |" in card.text and {r.dataset_name for r in card.data.eval_results} == {
        "towns"
    }
    assert files(hub, name)[figure_place(evaluation("towns"))].data == b"picture"
    assert "model.safetensors" in files(hub, name)


def test_pictures_that_are_gone_here_go_there(hub, folder):
    name = claim_repository("user/fields")
    for place in ("samples/validation_0.png", "figures/predictions.png", "notes.txt"):
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).write_bytes(b"mine")
    publish(folder, name)
    shutil.rmtree(folder / "samples")
    (folder / "notes.txt").unlink()
    publish(folder, name)
    assert {"figures/predictions.png", "notes.txt"} <= set(files(hub, name))  # others' files stay
    assert "samples/validation_0.png" not in files(hub, name)


def test_a_card_of_a_branch_is_about_its_weights(hub, folder, scenes_folder, tmp_path):
    labels = ["building", "road", "pavement", "vegetation", "bare soil", "water"]
    for seed, revision in ((1, None), (2, "v1")):
        model = make_model(seed=seed, crop_size=16, id2label=dict(enumerate(labels)), palette=None)
        model.save_pretrained(folder)
        publish(folder, claim_repository("user/two", revision=revision), revision)
    words = ("evaluate.py", "--data_dir", scenes_folder, "--use_cpu")
    local = run_example(*words, "--checkpoint", folder, "--output_dir", tmp_path / "local")
    done = run_example(
        *words, "--checkpoint", "user/two", "--hub_revision", "v1", "--push_to_hub", "--output_dir", tmp_path / "hub"
    )
    assert local.returncode == done.returncode == 0, done.stderr[-2000:]
    measured = [json.loads((tmp_path / name / "metrics.json").read_text())["fused"] for name in ("local", "hub")]
    assert measured[0] == measured[1]
    assert "IoU in per cent" in files(hub, "user/two", "v1")["README.md"].data.decode()
    assert "IoU in per cent" not in files(hub, "user/two")["README.md"].data.decode()


def test_a_mistyped_name_makes_no_repository(hub, scenes_folder, tmp_path):
    words = ("--checkpoint", "user/nmae", "--data_dir", scenes_folder, "--push_to_hub", "--output_dir", tmp_path / "o")
    done = run_example("evaluate.py", *words)
    assert done.returncode == 1 and "user/nmae" in done.stderr and "Traceback" not in done.stderr
    assert not hub.repositories


def test_hidden_files_stay_behind(hub, folder):
    (folder / ".secret").write_text("mine")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("mine")
    publish(folder, claim_repository("user/fields"))
    assert {name for name in files(hub, "user/fields") if "secret" in name or "cache" in name} == set()


# --- the scripts


def test_a_run_publishes_its_best_model_and_an_evaluation_joins(hub, scenes_folder, tmp_path, monkeypatch):
    output = tmp_path / "run"
    run = run_example(
        "train_semi.py", "--data_dir", scenes_folder, "--output_dir", output, "--max_train_steps", 2,
        "--supervised_warmup_steps", 1, "--per_device_train_batch_size", 2, "--crop_size", 16, "--eval_steps", 1,
        "--card_samples", 1, "--push_to_hub", "--hub_model_id", "user/scenes", "--hub_private_repo", "--use_cpu",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert f"Published {output / 'best_model'}: {hub.url}/user/scenes" in run.stdout
    published = files(hub, "user/scenes")
    assert hub.repositories["model", "user/scenes"].private
    pictures = {"samples/validation_0.png", "figures/predictions.png", "figures/curves.png"}
    assert pictures | {"model.safetensors", "modeling_co2s.py", "training.json", "metrics.json"} <= set(published)
    metrics = json.loads((output / "best_model" / "metrics.json").read_text())
    card = ModelCard(published["README.md"].data.decode())
    fused = [result for result in card.data.eval_results if result.metric_name == "Mean IoU, fused"]
    assert [result.metric_value for result in fused] == [round(metrics["fused"]["mean_iou"], 4)]
    assert "| labelled images | 3 |" in card.text and "This step was chosen" in card.text
    settings = tmp_path / "settings.yaml"
    settings.write_text(card.text.split("```yaml\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(ROOT / "examples")
    again = parse_arguments(importlib.import_module("train_semi").Arguments, "", ["--config", str(settings)])
    assert (again.max_train_steps, again.crop_size, again.push_to_hub) == (2, 16, False)
    assert "This step was chosen" not in (output / "model" / "README.md").read_text()

    other = Path(shutil.copytree(scenes_folder, tmp_path / "elsewhere"))
    evaluate = ("evaluate.py", "--checkpoint", "user/scenes", "--data_dir", other, "--push_to_hub", "--use_cpu")
    done = run_example(*evaluate, "--output_dir", tmp_path / "evaluation")
    assert done.returncode == 0, done.stderr[-3000:]
    card = ModelCard(files(hub, "user/scenes")["README.md"].data.decode())
    assert {result.dataset_name for result in card.data.eval_results} == {scenes_folder.name, "elsewhere"}
    measured = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    results = {r.dataset_name: r.metric_value for r in card.data.eval_results if r.metric_name == "Mean IoU, fused"}
    assert results["elsewhere"] == round(measured["fused"]["mean_iou"], 4)


def test_a_failed_upload_at_the_end_of_a_run_keeps_everything(hub, scenes_folder, tmp_path):
    hub.failures["/commit/"] = 403
    run = run_example(
        "train_semi.py", "--data_dir", scenes_folder, "--output_dir", tmp_path / "run", "--max_train_steps", 1,
        "--per_device_train_batch_size", 1, "--crop_size", 16, "--method", "supervised", "--card_samples", 0,
        "--push_to_hub", "--hub_model_id", "user/scenes", "--use_cpu",
    )  # fmt: skip
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert "retry with: python examples/push_to_hub.py --checkpoint" in run.stderr and "hf_local" not in run.stderr
    hub.failures.clear()
    retry = run_example("push_to_hub.py", "--checkpoint", tmp_path / "run/model", "--hub_model_id", "user/scenes")
    assert retry.returncode == 0, retry.stderr
    assert "model.safetensors" in files(hub, "user/scenes")
    assert not [name for name in files(hub, "user/scenes") if name.startswith("samples") or "predictions" in name]


def test_pushing_a_folder_with_handler_writes_what_is_missing(hub, folder):
    (folder / "README.md").unlink()
    done = run_example("push_to_hub.py", "--checkpoint", folder, "--hub_model_id", "user/fields", "--handler")
    assert done.returncode == 0, done.stderr
    assert {"README.md", "handler.py", "requirements.txt"} <= set(files(hub, "user/fields"))
    assert "EndpointHandler" in files(hub, "user/fields")["handler.py"].data.decode()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoint": "nowhere", "hub_model_id": "user/x"}, r"'nowhere' is no folder with config.json"),
        ({"checkpoint": str(ROOT / "tests"), "hub_model_id": "user/x"}, r"is no folder with config.json"),
        ({"checkpoint": "nowhere"}, r"Name the repository: --hub_model_id"),
        ({"space": "user/demo", "checkpoint": "."}, r"needs the name of a published model"),
        ({"space": "user/demo", "space_dir": "here"}, r"either --space or --space_dir"),
        ({"space": "user/demo", "handler": True}, r"are for models"),
        ({"space": "user/demo", "hub_revision": "v1"}, r"a Space runs its main branch"),
    ],
)
def test_wrong_settings_are_refused(settings, message, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    with pytest.raises(ValueError, match=message):
        importlib.import_module("push_to_hub").Arguments(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"push_to_hub": True}, r"needs a name for the repository"),
        ({"hub_private_repo": True}, r"go with --push_to_hub"),
    ],
)
def test_publishing_is_asked_for_whole(settings, message):
    with pytest.raises(ValueError, match=message):
        HubArguments(**settings).check_hub()


def test_a_space_is_the_demo_with_everything_it_imports(hub):
    done = run_example("push_to_hub.py", "--checkpoint", "user/fields", "--space", "user/demo")
    assert done.returncode == 0, done.stderr
    space = files(hub, "user/demo", kind="space")
    assert space["app.py"].data == (ROOT / "examples" / "app.py").read_bytes()
    assert yaml.safe_load(space["app.yaml"].data) == {"checkpoint": "user/fields"}
    assert "co2s_hf/modeling_co2s.py" in space and not [name for name in space if "__pycache__" in name]
    metadata = yaml.safe_load(space["README.md"].data.decode().split("---")[1])
    assert metadata["python_version"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert metadata["sdk"] == "gradio" and metadata["app_file"] == "app.py" and metadata["models"] == ["user/fields"]
    assert b"gradio" not in space["requirements.txt"].data  # the Space brings it: sdk_version
    assert b"torch==2." in space["requirements.txt"].data and b"+cpu" not in space["requirements.txt"].data
