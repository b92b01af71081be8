"""The card says what the folder and the measurement tell, and nothing else."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import make_model
from huggingface_hub import ModelCard

from co2s_hf.catalog import BENCHMARKS
from co2s_hf.model_card import (
    add_evaluation,
    figure_place,
    reproduce_command,
    with_evaluation,
    without_secrets,
    write_card,
)


def evaluation(data="fields", fused=0.5, **changes):
    def result(iou):
        return {"mean_iou": iou, "mean_iou_paper": iou / 2, "mean_f1": 0.6, "accuracy": 0.75} | {
            "iou": {"land": iou, "road": None, "water": 0.25}
        }

    facts = {"data": data, "dataset_id": None, "data_hash": "abc123", "num_images": 7, "crop_size": 64}
    facts |= {"fusion": "confidence", "flip": False, "largest_class_mean_iou": 0.125}
    return facts | {"clip": result(0.4), "dinov3": result(0.45), "fused": result(fused)} | changes


def training(**arguments):
    arguments = {"clip_model": None, "dinov3_model": None, "method": "co2s", "max_train_steps": 20} | arguments
    data = {"name": "fields", "id": None, "partition": None, "is_drawn": False}
    data |= {"num_labeled": 8, "num_unlabeled": 40, "num_validation": 16}
    return {
        "command": ["/somewhere/examples/train_semi.py", "--data_dir", "my fields"],
        "arguments": arguments,
        "num_processes": 1,
        "device": "cpu",
        "mixed_precision": "no",
        "versions": {"torch": "2.13.0"},
        "git_revision": "0123abc",
        "data": data,
        "data_hash": "abc123",
    }


@pytest.fixture
def folder(tmp_path):
    make_model(crop_size=64).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def card_of(folder):
    return ModelCard.load(folder / "README.md")


def test_a_card_of_weights_alone_says_that_nothing_is_known(folder):
    write_card(folder)
    card = card_of(folder)
    assert "Nothing has been measured yet." in card.text and "How it was trained was not recorded." in card.text
    assert card.data.eval_results is None and card.data.pipeline_tag == "image-segmentation"
    assert card.data.library_name == "transformers"
    assert "land, road, water" in card.text and "crops of 64 px" in card.text


def test_a_card_holds_the_run(folder):
    (folder / "training.json").write_text(json.dumps(training(learning_rate=0.001, dataset=None)))
    write_card(folder, evaluation())
    card = card_of(folder)
    assert (
        "# Co2S trained on fields" in card.text
        and "| labelled images | 8 |" in card.text
        and "| unlabelled images | 40 |" in card.text
    )
    assert "accelerate launch examples/train_semi.py --data_dir 'my fields'" in card.text
    assert "| git revision | 0123abc |" in card.text and "torch 2.13.0" in card.text
    settings = yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])
    assert settings == {"method": "co2s", "max_train_steps": 20, "learning_rate": 0.001}
    assert "| land | 40.0 | 45.0 | 50.0 |" in card.text and "| road | - | - | - |" in card.text
    assert "Nothing has been measured" not in card.text
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert results == {
        "Mean IoU, fused": 0.5,
        "Mean IoU, DINOv3 student": 0.45,
        "Mean IoU, CLIP student": 0.4,
        "Pixel accuracy, fused": 0.75,
    }
    assert {result.dataset_name for result in card.data.eval_results} == {"fields"}
    assert "no pretrained weights went in" in card.text and card.data.license is None


def test_the_settings_of_a_card_are_a_file_for_config(folder):
    arguments = {"num_train_epochs": 80, "max_train_steps": 1200, "eval_epochs": 5, "eval_steps": 75}
    arguments |= {
        "hub_model_id": "me/mine",
        "push_to_hub": True,
        "resume_from_checkpoint": "last",
        "partition": "1_24",
    }
    (folder / "training.json").write_text(json.dumps(training(**arguments)))
    write_card(folder)
    text = card_of(folder).text.split("```yaml\n")[1].split("```")[0]
    settings = yaml.load(text, Loader=yaml.BaseLoader)  # as `--config` does
    assert settings == {"method": "co2s", "num_train_epochs": "80", "eval_epochs": "5", "partition": "1_24"}


def test_a_supervised_run_does_not_boast_of_unlabelled_images(folder):
    (folder / "training.json").write_text(json.dumps(training(method="supervised")))
    write_card(folder)
    text = card_of(folder).text
    assert "| unlabelled images | not used |" in text and "many unlabelled images" not in text.split("## Use")[0]


def test_pretrained_towers_bring_their_licences(folder):
    towers = {"clip_model": "openai/clip-vit-base-patch16", "dinov3_model": "facebook/dinov3-vitb16-pretrain-lvd1689m"}
    (folder / "training.json").write_text(json.dumps(training(**towers)))
    write_card(folder)
    card = card_of(folder)
    assert card.data.license == "other" and card.data.license_name == "dinov3-license"
    assert card.data.base_model == list(towers.values())
    assert "MIT licence" in card.text and "DINOv3 licence" in card.text
    towers = {"clip_model": str(folder), "dinov3_model": "here/without/its/name"}
    (folder / "training.json").write_text(json.dumps(training(**towers)))
    write_card(folder)
    assert card_of(folder).data.license_name == "dinov3-license" and card_of(folder).data.base_model is None


def test_bands_are_named_with_and_without_a_scale(tmp_path):
    make_model(image_bands=[4, 3, 2]).save_pretrained(tmp_path)
    write_card(tmp_path)
    assert "made of the files' bands [4, 3, 2]; do the same" in card_of(tmp_path).text


def test_one_student_is_not_called_fused(tmp_path):
    make_model(fusion="clip").save_pretrained(tmp_path)
    write_card(tmp_path)
    assert "those of the CLIP student alone" in card_of(tmp_path).text


def test_pictures_and_examples_are_shown_where_they_are(folder):
    for place in ("figures/predictions.png", "figures/curves.png", "samples/validation_0.png"):
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).write_bytes(b"")
    (folder / "training.json").write_text(json.dumps(training()))
    write_card(folder)
    card = card_of(folder)
    assert "](figures/predictions.png)" in card.text and "](figures/curves.png)" in card.text
    assert card.data["widget"] == [{"src": "samples/validation_0.png", "example_title": "validation_0"}]


def test_results_on_other_images_join_and_on_the_same_replace(folder):
    write_card(folder, evaluation())
    first = card_of(folder)
    first.text = first.text.replace("## Training", "By hand, https://x.org/?q=mine.\n\n## Training")
    both = with_evaluation(first, evaluation("towns", 0.3, dataset_id="user/towns"), "figures/towns.png")
    again = with_evaluation(both, evaluation(fused=0.9))
    assert again.text.count("| land |") == 2 and "| land | 40.0 | 45.0 | 90.0 |" in again.text
    assert "| land | 40.0 | 45.0 | 30.0 |" in again.text and "](figures/towns.png)" in again.text
    assert "| land | 40.0 | 45.0 | 50.0 |" not in again.text and "By hand, https://x.org/?q=mine." in again.text
    fused = {r.dataset_name: r.metric_value for r in again.data.eval_results if r.metric_name == "Mean IoU, fused"}
    assert fused == {"fields": 0.9, "towns": 0.3}
    assert {r.dataset_type for r in again.data.eval_results} == {"fields", "user/towns"}


def test_other_settings_and_other_sets_of_the_same_name_are_other_results(folder):
    write_card(folder, evaluation() | {"is_best": True})
    card = with_evaluation(card_of(folder), evaluation(fused=0.6, flip=True))
    card = with_evaluation(card, evaluation(fused=0.7, data_hash="other"))
    fused = [r.metric_value for r in card.data.eval_results if r.metric_name == "Mean IoU, fused"]
    assert sorted(fused) == [0.5, 0.6, 0.7]
    reloaded = ModelCard(str(card))  # and through the model-index
    assert len(reloaded.data.eval_results) == 12
    # The step was chosen by these images, with whatever settings they are measured; not by the others.
    flattered = [line for line in card.text.splitlines() if "which flatters it" in line]
    assert len(flattered) == 2 and all("sets abc123" in line for line in flattered)
    again = with_evaluation(card, evaluation(fused=0.4))
    assert again.text.count("which flatters it") == 2


def test_results_join_a_card_that_somebody_else_wrote():
    card = with_evaluation(ModelCard("---\nlicense: mit\n---\n# Mine\n\nAll by hand.\n"), evaluation())
    assert "# Mine\n\nAll by hand.\n\n## Results\n" in card.text
    assert card.data.license == "mit" and len(card.data.eval_results) == 4


def test_an_evaluation_of_a_folder_without_card_makes_one(folder, tmp_path):
    (tmp_path / "confusion.png").write_bytes(b"picture")
    add_evaluation(folder, evaluation("my fields/2024"), tmp_path / "confusion.png")
    text = card_of(folder).text
    place = figure_place(evaluation("my fields/2024"))
    assert place != figure_place(evaluation("my-fields/2024"))
    assert f"]({place})" in text and "| land | 40.0 | 45.0 | 50.0 |" in text
    assert (folder / place).read_bytes() == b"picture"


def test_one_student_has_one_column_besides_the_fusion(folder):
    measured = evaluation(fusion="clip")
    del measured["dinov3"]
    write_card(folder, measured)
    assert "| class | CLIP student | fused |" in card_of(folder).text


def test_commands_are_repeated_as_they_were_launched():
    facts = training()
    assert reproduce_command(facts) == "accelerate launch examples/train_semi.py --data_dir 'my fields'"
    facts["command"] += [
        "--push_to_hub",
        "--hub_model_id",
        "me/mine",
        "--seed",
        "3",
        "--resume_from_checkpoint",
        "last",
    ]
    assert reproduce_command(facts).endswith("--data_dir 'my fields' --seed 3")
    facts["mixed_precision"] = "bf16"  # which `accelerate launch` was told
    assert reproduce_command(facts).endswith("--seed 3 --mixed_precision bf16")
    facts["num_processes"] = 4
    assert reproduce_command(facts).startswith("accelerate launch --multi_gpu --num_processes 4 examples/")


def test_secrets_and_homes_stay_here(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = f"--token hf_AbCdEfGhIjKlMn --splits_url https://me:secret@host/lists --data_dir {tmp_path}/fields"
    assert without_secrets(text) == "--token hf_... --splits_url https://...@host/lists --data_dir ~/fields"
    assert without_secrets("https://ghp_123@host/x and (https://host/x?token=abc&b=1)") == (
        "https://...@host/x and (https://host/x?...)"
    )
    assert without_secrets(f"{tmp_path}ice/x /other{tmp_path}/x") == f"{tmp_path}ice/x /other{tmp_path}/x"


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_cards_agree_with_the_catalog_and_claim_no_results(name):
    facts = BENCHMARKS[name]
    path = Path(__file__).parents[1] / "model_cards" / f"{name}.md"
    card = ModelCard.load(path)
    assert card.data.eval_results is None and "model-index" not in path.read_text()
    assert "The paper's numbers, not ours" in card.text
    table = [line.strip("| ").partition(" | ") for line in card.text.splitlines() if line.startswith("| ")]
    rows = {key: value for key, _, value in table}
    assert rows["classes"] == ", ".join(c.name for c in facts.classes)
    assert rows["training images"] == str(facts.num_training)
    assert rows["validation images"] == str(facts.num_validation)
    assert rows["crops"] == f"{facts.crop_size} px" and rows["epochs"].startswith(f"{facts.num_epochs} walks")
    assert rows["labelled images per step and GPU"].startswith(f"{facts.images_per_device},")
    for partition in facts.partitions:
        assert f"1/{partition} ({facts.num_labeled(partition)} images)" in rows["labelled shares with lists"]
    config_file = path.parents[1] / "examples" / "configs" / f"{name}.yaml"
    config = yaml.load(config_file.read_text(), Loader=yaml.BaseLoader)  # 1_24 is a number in YAML
    assert f"1/{config['partition'].removeprefix('1_')}" in rows  # the paper's number for what the command runs
