"""Publish with the real client of the Hub, to a local server."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_model, read_metrics, run_command, save_checkpoint
from huggingface_hub import HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from isolation import make_environment, run_isolated
from PIL import Image
from safetensors.torch import load_file

import co2s_hf
from co2s_hf import Co2SForSemanticSegmentation, Co2SImageProcessor
from co2s_hf.cli.arguments import CardArguments
from co2s_hf.cli.train import COMMAND
from co2s_hf.hub.cards import figure_path, write_card
from co2s_hf.hub.publishing import (
    PublishError,
    add_handler,
    check_publishable,
    claim_repository,
    publish,
    publish_evaluation,
)
from co2s_hf.training.options import TrainingOptions
from co2s_hf.utils.errors import UserError


# Loads a model by its name on the Hub, without this package, and saves the logits of an image.
SAVE_LOGITS = """
import importlib.util, sys
from pathlib import Path

assert importlib.util.find_spec("co2s_hf") is None
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

name, folder = sys.argv[1], Path(sys.argv[2])
model = AutoModelForSemanticSegmentation.from_pretrained(name, trust_remote_code=True)
image_processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=True)
with torch.no_grad():
    logits = model(**image_processor(Image.open(folder / "image.png"), return_tensors="pt")).logits
save_file({"logits": logits}, folder / "logits.safetensors")
"""


@pytest.fixture
def folder(tmp_path):
    save_checkpoint(tmp_path / "model", crop_size=16)
    write_card(tmp_path / "model")
    return tmp_path / "model"


def contents(folder):
    """Path -> content of every file in a local folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def files(hub, name, branch="main", kind="model"):
    """Path -> blob of every file in a repository."""
    repository = hub.repositories[kind, name]
    return repository.trees[repository.refs[branch]]


def test_pulled_files_equal_pushed_files(hub, folder):
    before = contents(folder)
    name = claim_repository("user/fields")
    assert publish(folder, name) == f"{hub.url}/user/fields"
    assert contents(folder) == before
    sent = Co2SForSemanticSegmentation.from_pretrained(folder)
    pulled = Co2SForSemanticSegmentation.from_pretrained(name)
    assert all(torch.equal(sent.state_dict()[key], value) for key, value in pulled.state_dict().items())
    snapshot = Path(snapshot_download(name))
    received = contents(snapshot)
    assert received.keys() == before.keys() | {".gitattributes"}
    assert {name for name in before if received[name] != before[name]} == {"README.md"}
    assert 'pipeline("image-segmentation", model="user/fields"' in (snapshot / "README.md").read_text(encoding="utf-8")
    assert files(hub, name)["model.safetensors"].is_large


def test_model_is_loaded_by_name_without_this_package(hub, folder, tmp_path):
    publish(folder, claim_repository("user/fields"))
    image = Image.fromarray((255 * np.random.default_rng(0).random((24, 40, 3))).astype(np.uint8))
    image.save(tmp_path / "image.png")
    environment = make_environment(tmp_path / "stranger" / "packages")
    done = run_isolated(environment, SAVE_LOGITS, "user/fields", tmp_path, HF_ENDPOINT=hub.url)
    assert done.returncode == 0, done.stderr[-3000:]
    model = Co2SForSemanticSegmentation.from_pretrained(folder)
    with torch.no_grad():
        expected = model(**Co2SImageProcessor.from_pretrained(folder)(image, return_tensors="pt")).logits
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], expected)


def test_push_to_hub_of_transformers_includes_the_code(hub, folder):
    model = Co2SForSemanticSegmentation.from_pretrained(folder)
    model.push_to_hub("user/direct")
    Co2SImageProcessor.from_pretrained(folder).push_to_hub("user/direct")
    code = {name for name in files(hub, "user/direct") if name.endswith(".py")}
    assert code == {path.name for path in (Path(co2s_hf.__file__).parent / "model").glob("*_co2s.py")}
    assert {"configuration_co2s.py", "modeling_co2s.py", "image_processing_co2s.py"} <= code
    assert "custom_pipelines" in json.loads(files(hub, "user/direct")["config.json"].data)


def test_private_repositories_need_a_token(hub, folder, monkeypatch, tmp_path):
    name = claim_repository("user/secret", private=True)
    publish(folder, name)
    assert hub.repositories["model", name].private
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RepositoryNotFoundError, match=r"401"):
        HfApi().model_info(name)
    with pytest.raises(OSError, match=r"user/secret is not a local folder[\s\S]*private"):
        Co2SForSemanticSegmentation.from_pretrained(name, cache_dir=tmp_path)


def test_public_repository_is_refused_if_a_private_one_was_requested(hub):
    hub.create("model", "user/open")
    with pytest.raises(UserError, match=r"user/open exists and is public, but a private one was requested"):
        claim_repository("user/open", private=True)


def test_names_that_are_not_valid_are_refused_with_the_expected_form(hub):
    with pytest.raises(PublishError, match=r"no/such/name cannot be written to.*Give a name such as user/name"):
        claim_repository("no/such/name")
    assert not hub.repositories


def test_publishing_on_a_branch_does_not_change_main(hub, folder):
    name = claim_repository("user/fields", revision="v1")
    publish(folder, name, revision="v1")
    assert "model.safetensors" in files(hub, name, "v1") and "model.safetensors" not in files(hub, name)
    claim_repository("user/fields", revision="v1")  # again
    pulled = Co2SForSemanticSegmentation.from_pretrained(name, revision="v1")
    assert pulled.config.crop_size == 16


def test_missing_token_is_reported_before_anything_is_done(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PublishError, match=r"user/fields cannot be written to.*hf auth login.*start again"):
        claim_repository("user/fields")
    assert not hub.repositories


@pytest.mark.parametrize(
    ("failing", "status"), [("/commit/", 403), ("/commit/", 412), ("/large/", 403), ("/commit/", 0)]
)
def test_refused_or_broken_upload_changes_nothing_and_can_be_repeated(hub, folder, failing, status):
    before = contents(folder)
    name = claim_repository("user/fields", revision="v1")
    hub.failures[failing] = status
    with pytest.raises(PublishError) as error:
        publish(folder, name, revision="v1")
    message = str(error.value)
    assert f"co2s push --checkpoint {folder} --hub_model_id user/fields --hub_revision v1" in message
    assert "hf_local" not in message
    assert contents(folder) == before and "config.json" not in files(hub, name, "v1")
    hub.failures.clear()
    publish(folder, name, revision="v1")
    assert "config.json" in files(hub, name, "v1")


def test_interrupted_upload_is_reported_with_the_command_to_retry(hub, folder, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(HfApi, "create_commit", interrupted)
    with pytest.raises(PublishError, match=r"interrupted.*are complete; retry with: co2s push"):
        publish(folder, claim_repository("user/fields"))


def test_results_are_added_to_a_published_card(hub, folder, tmp_path, make_evaluation):
    name = claim_repository("user/fields")
    publish(folder, name)
    (tmp_path / "confusion.png").write_bytes(b"picture")
    publish_evaluation(name, make_evaluation("towns"), tmp_path / "confusion.png")
    card = ModelCard(files(hub, name)["README.md"].data.decode())
    assert "| land | 40.0 | 45.0 | 50.0 |" in card.text
    assert {result.dataset_name for result in card.data.eval_results} == {"towns"}
    assert files(hub, name)[figure_path(make_evaluation("towns"))].data == b"picture"
    assert "model.safetensors" in files(hub, name)


@pytest.mark.parametrize("status", [0, 403])
def test_published_card_is_not_replaced_if_it_cannot_be_read(hub, folder, tmp_path, make_evaluation, status):
    name = claim_repository("user/unreadable")
    publish(folder, name)
    before = files(hub, name)
    (tmp_path / "confusion.png").write_bytes(b"picture")
    hub.failures["/resolve/"] = status
    with pytest.raises(PublishError, match=r"The card of user/unreadable was not changed.*run the evaluation again"):
        publish_evaluation(name, make_evaluation("towns"), tmp_path / "confusion.png")
    assert files(hub, name) == before


def test_results_are_published_for_a_model_without_card(hub, folder, tmp_path, make_evaluation):
    (folder / "README.md").unlink()
    name = claim_repository("user/fields")
    publish(folder, name)
    (tmp_path / "confusion.png").write_bytes(b"picture")
    publish_evaluation(name, make_evaluation("towns"), tmp_path / "confusion.png")
    text = files(hub, name)["README.md"].data.decode()
    assert "# user/fields" in text and "| land | 40.0 | 45.0 | 50.0 |" in text


def test_pictures_that_were_removed_locally_are_removed_on_the_hub(hub, folder):
    name = claim_repository("user/fields")
    for place in ("samples/validation_0.png", "figures/predictions.png", "notes.txt"):
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).write_bytes(b"mine")
    publish(folder, name)
    shutil.rmtree(folder / "samples")
    (folder / "notes.txt").unlink()
    publish(folder, name)
    assert {"figures/predictions.png", "notes.txt"} <= set(files(hub, name))  # files that are not pictures stay
    assert "samples/validation_0.png" not in files(hub, name)


def test_results_of_a_branch_are_added_to_the_card_of_the_branch(hub, folder, scenes_folder, tmp_path):
    labels = ["building", "road", "pavement", "vegetation", "bare soil", "water"]
    for seed, revision in ((1, None), (2, "v1")):
        model = make_model(seed=seed, crop_size=16, id2label=dict(enumerate(labels)), palette=None)
        model.save_pretrained(folder)
        publish(folder, claim_repository("user/two", revision=revision), revision)
    words = ("evaluate", "--data_dir", scenes_folder, "--use_cpu", "--crop_size", 48)
    local = run_command(*words, "--checkpoint", folder, "--output_dir", tmp_path / "local")
    assert local.returncode == 0, local.stderr
    branch = ("--checkpoint", "user/two", "--hub_revision", "v1", "--push_to_hub", "--output_dir", tmp_path / "hub")
    done = run_command(*words, *branch)
    assert done.returncode == 0, done.stderr
    assert read_metrics(tmp_path / "local")["fused"] == read_metrics(tmp_path / "hub")["fused"]
    assert "IoU of every class" in files(hub, "user/two", "v1")["README.md"].data.decode()
    assert "IoU of every class" not in files(hub, "user/two")["README.md"].data.decode()


def test_results_on_a_new_branch_are_those_of_main(hub, folder, scenes_folder, tmp_path):
    labels = ["building", "road", "pavement", "vegetation", "bare soil", "water"]
    model = make_model(crop_size=16, id2label=dict(enumerate(labels)), palette=None)
    model.save_pretrained(folder)
    publish(folder, claim_repository("user/one"))
    words = ("evaluate", "--data_dir", scenes_folder, "--use_cpu", "--crop_size", 48, "--checkpoint")
    local = run_command(*words, folder, "--output_dir", tmp_path / "local")
    assert local.returncode == 0, local.stderr
    new = ("--hub_revision", "new", "--push_to_hub", "--output_dir", tmp_path / "hub")
    done = run_command(*words, "user/one", *new)
    assert done.returncode == 0, done.stderr
    assert "user/one has no branch new. It is made from main, and evaluated." in done.stdout
    assert read_metrics(tmp_path / "local")["fused"] == read_metrics(tmp_path / "hub")["fused"]
    assert "IoU of every class" in files(hub, "user/one", "new")["README.md"].data.decode()
    assert "IoU of every class" not in files(hub, "user/one")["README.md"].data.decode()
    mistyped = run_command(*words, "user/noe", *new[:-1], tmp_path / "other")
    assert mistyped.returncode == 1 and "user/noe" in mistyped.stderr and len(hub.repositories) == 1


def test_a_training_refuses_a_public_repository_if_a_private_one_was_requested(hub, scenes_folder, tmp_path):
    repository = hub.create("model", "user/open")
    words = ("--data_dir", scenes_folder, "--max_train_steps", 1, "--crop_size", 16, "--use_cpu", "--from_scratch")
    words += ("--push_to_hub", "--hub_model_id", "user/open", "--hub_private_repo", "--output_dir", tmp_path / "run")
    done = run_command("train", *words)
    assert done.returncode == 1 and "user/open exists and is public, but a private one was requested" in done.stderr
    assert len(repository.trees) == 1 and not (tmp_path / "run").exists()


def test_mistyped_name_creates_no_repository(hub, scenes_folder, tmp_path):
    words = ("--checkpoint", "user/nmae", "--data_dir", scenes_folder, "--push_to_hub", "--output_dir", tmp_path / "o")
    done = run_command("evaluate", *words, "--use_cpu")
    assert done.returncode == 1 and "user/nmae" in done.stderr and "Traceback" not in done.stderr
    assert not hub.repositories and not any(tmp_path.iterdir())


def test_folders_without_a_loadable_model_are_refused(hub, tmp_path):
    with pytest.raises(UserError, match=r"is not the folder of a model: it has neither config.json nor adapter"):
        check_publishable(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "user/base"}', encoding="utf-8")
    with pytest.raises(UserError, match=r"needs its base model 'user/base', which is not on the Hub"):
        check_publishable(tmp_path)
    hub.create("model", "user/base")
    check_publishable(tmp_path)
    hub.failures["/api/models/user/base"] = 0
    with pytest.raises(PublishError, match=r"Cannot check whether user/base is on the Hub"):
        check_publishable(tmp_path)


def test_handler_is_published_with_its_requirements(hub, folder):
    add_handler(folder)
    publish(folder, claim_repository("user/fields"))
    published = files(hub, "user/fields")
    assert b"class EndpointHandler" in published["handler.py"].data
    assert published["requirements.txt"].data == b"transformers>=5.23,<6\npillow\n"


def test_hidden_files_are_not_published(hub, folder):
    (folder / ".secret").write_text("mine", encoding="utf-8")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("mine", encoding="utf-8")
    publish(folder, claim_repository("user/fields"))
    assert {name for name in files(hub, "user/fields") if "secret" in name or "cache" in name} == set()


# --- the commands that train and evaluate; tests/cli/test_push.py tests `co2s push`


def test_run_publishes_its_best_model_and_an_evaluation_adds_results(hub, scenes_folder, tmp_path):
    output = tmp_path / "run"
    words = ("--data_dir", scenes_folder, "--max_train_steps", 2, "--supervised_warmup_steps", 1, "--crop_size", 16)
    words += ("--per_device_train_batch_size", 2, "--eval_steps", 1, "--card_samples", 1, "--use_cpu")
    words += ("--from_scratch",)
    words += ("--push_to_hub", "--hub_model_id", "user/scenes", "--hub_private_repo")
    run = run_command("train", *words, "--output_dir", output)
    assert run.returncode == 0, run.stderr
    assert f"Published {output / 'best_model'}: {hub.url}/user/scenes" in run.stdout
    published = files(hub, "user/scenes")
    assert hub.repositories["model", "user/scenes"].private
    pictures = {"samples/validation_0.png", "figures/predictions.png", "figures/curves.png"}
    assert pictures | {"model.safetensors", "modeling_co2s.py", "training.json", "metrics.json"} <= set(published)
    metrics = read_metrics(output / "best_model")
    card = ModelCard(published["README.md"].data.decode())
    fused = [result for result in card.data.eval_results if result.metric_name == "Mean IoU, fused"]
    assert [result.metric_value for result in fused] == [round(metrics["fused"]["mean_iou"], 4)]
    assert "| labelled images | 3 |" in card.text and "This training step was selected" in card.text
    assert "This training step was selected" not in (output / "model" / "README.md").read_text(encoding="utf-8")

    # The options on the card repeat the run, and do not publish again.
    config = tmp_path / "options.yaml"
    config.write_text(card.text.split("```yaml\n")[1].split("```")[0], encoding="utf-8")
    again = COMMAND.parse(["--config", str(config)])
    first = COMMAND.parse([str(word) for word in (*words, "--output_dir", output)])
    first[TrainingOptions].fill(
        first[TrainingOptions].defaults | {"mixed_precision": "no", "dataloader_num_workers": 0}
    )
    assert again == first | {CardArguments: CardArguments()}

    other = Path(shutil.copytree(scenes_folder, tmp_path / "elsewhere"))
    evaluate = ("--checkpoint", "user/scenes", "--data_dir", other, "--push_to_hub", "--use_cpu")
    done = run_command("evaluate", *evaluate, "--output_dir", tmp_path / "evaluation")
    assert done.returncode == 0, done.stderr
    card = ModelCard(files(hub, "user/scenes")["README.md"].data.decode())
    assert {result.dataset_name for result in card.data.eval_results} == {scenes_folder.name, "elsewhere"}
    measured = read_metrics(tmp_path / "evaluation")
    results = {r.dataset_name: r.metric_value for r in card.data.eval_results if r.metric_name == "Mean IoU, fused"}
    assert results["elsewhere"] == round(measured["fused"]["mean_iou"], 4)


def test_failed_upload_at_the_end_of_a_run_loses_nothing(hub, scenes_folder, tmp_path):
    hub.failures["/commit/"] = 403
    words = ("--data_dir", scenes_folder, "--max_train_steps", 1, "--per_device_train_batch_size", 1, "--use_cpu")
    words += ("--crop_size", 48, "--method", "supervised", "--card_samples", 0, "--from_scratch")
    words += ("--push_to_hub", "--hub_model_id", "user/scenes", "--output_dir", tmp_path / "run")
    run = run_command("train", *words)
    assert run.returncode == 1 and "Traceback" not in run.stderr and "hf_local" not in run.stderr
    retry = shlex.split(run.stderr.split("retry with: co2s ")[1])
    assert retry == ["push", "--checkpoint", str(tmp_path / "run" / "model"), "--hub_model_id", "user/scenes"]
    hub.failures.clear()
    again = run_command(*retry)
    assert again.returncode == 0, again.stderr
    assert "model.safetensors" in files(hub, "user/scenes")
    assert not [name for name in files(hub, "user/scenes") if name.startswith("samples") or "predictions" in name]


def test_errors_of_the_client_and_damaged_files_are_user_errors(hub, folder, monkeypatch, tmp_path):
    def refused(*args, **kwargs):
        raise ValueError("Invalid metadata in README.md")

    name = claim_repository("user/fields")
    with monkeypatch.context() as patched:
        patched.setattr(HfApi, "create_commit", refused)
        with pytest.raises(PublishError, match=r"Invalid metadata in README.md .*co2s push --checkpoint"):
            publish(folder, name)
    (folder / "README.md").write_text("---\n- a list\n---\ntext")
    (folder / "training.json").write_text("{damaged")
    run = run_command("push", "--checkpoint", folder, "--hub_model_id", "user/fields")
    assert run.returncode == 0  # a card is uploaded as it is
    (folder / "README.md").unlink()
    run = run_command("push", "--checkpoint", folder, "--hub_model_id", "user/fields")
    assert run.returncode == 1 and "training.json' is damaged" in run.stderr
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    run = run_command("predict", "--checkpoint", folder, "--images", __file__, "--output_dir", tmp_path / "out")
    assert run.returncode == 1 and f"--checkpoint is '{folder}'" in run.stderr and "cannot be loaded" in run.stderr
