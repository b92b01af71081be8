"""A card shows the facts of the folder and of the evaluation, and nothing else."""

import ast
import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from helpers import make_model
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from co2s_hf.data.benchmarks import BENCHMARKS
from co2s_hf.hub.cards import (
    add_evaluation,
    figure_path,
    reproduce_command,
    with_evaluation,
    without_secrets,
    write_card,
)


ROOT = Path(__file__).parents[2]
SELECTED = "This training step was selected by its result on these images"


def training(**arguments):
    """The content of a training.json."""
    arguments = {"clip_model": None, "dinov3_model": None, "method": "co2s", "max_train_steps": 20} | arguments
    data = {"name": "fields", "id": None, "partition": None, "is_drawn": False}
    data |= {"num_labeled": 8, "num_unlabeled": 40, "num_validation": 16}
    return {
        "command": ["train", "--data_dir", "my fields"],
        "arguments": arguments,
        "num_processes": 1,
        "device": "cpu",
        "mixed_precision": "no",
        "versions": {"torch": "2.13.0"},
        "git_revision": "0123abc",
        "data": data,
        "data_hash": "abc123",
    }


def write_training(folder, **arguments):
    (folder / "training.json").write_text(json.dumps(training(**arguments)), encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    make_model(crop_size=64).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def card_of(folder):
    return ModelCard.load(folder / "README.md")


def options_of(text):
    """The YAML block with the options of the run."""
    return text.split("```yaml\n")[1].split("```")[0]


def test_card_of_weights_alone_says_that_nothing_is_known(folder):
    write_card(folder)
    card = card_of(folder)
    assert "Nothing has been measured yet." in card.text and "The training was not recorded." in card.text
    assert card.data.eval_results is None and card.data.pipeline_tag == "image-segmentation"
    assert card.data.library_name == "transformers"
    assert "land, road, water" in card.text and "crops of 64 px" in card.text


def test_card_shows_the_facts_of_the_run(folder, make_evaluation):
    write_training(folder, learning_rate=0.001, dataset=None)
    write_card(folder, make_evaluation())
    card = card_of(folder)
    assert "# Co2S trained on fields" in card.text
    assert "| labelled images | 8 |" in card.text and "| unlabelled images | 40 |" in card.text
    assert "accelerate launch -m co2s_hf train --data_dir 'my fields'" in card.text
    assert "| git revision | 0123abc |" in card.text and "torch 2.13.0" in card.text
    assert yaml.safe_load(options_of(card.text)) == {"method": "co2s", "max_train_steps": 20, "learning_rate": 0.001}
    assert "no pretrained weights were used" in card.text and card.data.license is None
    assert "IEEE Transactions on Geoscience and Remote Sensing" in card.text and "2512.23035" in card.text


def test_card_shows_every_score(folder, make_evaluation):
    write_card(folder, make_evaluation())
    card = card_of(folder)
    assert "on the 7 validation images of fields:" in card.text
    assert "| land | 40.0 | 45.0 | 50.0 |" in card.text and "| road | - | - | - |" in card.text
    assert "| **mean IoU** | 40.0 | 45.0 | 50.0 |" in card.text
    assert "| **mean IoU (paper's convention: absent classes count as 0)** | 20.0 | 22.5 | 25.0 |" in card.text
    assert "| **mean F1** | 60.0 | 60.0 | 60.0 |" in card.text
    assert "| **pixel accuracy** | 75.0 | 75.0 | 75.0 |" in card.text
    assert "gives a mean IoU of 12.5." in card.text and "Nothing has been measured" not in card.text
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert results == {
        "Mean IoU, fused": 0.5,
        "Mean IoU, DINOv3 student": 0.45,
        "Mean IoU, CLIP student": 0.4,
        "Pixel accuracy, fused": 0.75,
    }
    assert {result.dataset_name for result in card.data.eval_results} == {"fields"}


def test_step_of_the_evaluation_is_shown_if_known(folder, make_evaluation):
    write_card(folder, make_evaluation(step=20))
    assert "Measured after training step 20." in card_of(folder).text
    write_card(folder, make_evaluation())
    assert "Measured after" not in card_of(folder).text


def test_options_of_a_card_are_a_file_for_config(folder):
    arguments = {"num_train_epochs": 80, "max_train_steps": 1200, "eval_epochs": 5, "eval_steps": 75}
    arguments |= {"hub_model_id": "me/mine", "push_to_hub": True, "resume_from_checkpoint": "last"}
    arguments |= {"partition": "1_24", "bands": [4, 3, 2], "label_map": {"7": 0}, "scale": [[0, 3000]]}
    write_training(folder, **arguments, labeled_fraction=0.125)
    write_card(folder)
    text = options_of(card_of(folder).text)
    assert yaml.safe_load(text) == {
        "method": "co2s",
        "num_train_epochs": 80,
        "eval_epochs": 5,
        "partition": "1_24",
        "bands": [4, 3, 2],
        "label_map": {"7": 0},
        "scale": [[0, 3000]],
        "labeled_fraction": 0.125,
    }
    # `--config` reads all values as text: 1_24 would be the number 124 in plain YAML.
    assert yaml.load(text, Loader=yaml.BaseLoader)["partition"] == "1_24"


def test_card_of_a_supervised_run_does_not_mention_unlabelled_training(folder):
    write_training(folder, method="supervised")
    write_card(folder)
    text = card_of(folder).text
    assert "| unlabelled images | not used |" in text and "many unlabelled images" not in text.split("## Use")[0]
    write_training(folder, method="co2s")
    write_card(folder)
    assert "many unlabelled images" in card_of(folder).text.split("## Use")[0]


def test_pretrained_backbones_bring_their_licences(folder):
    backbones = {"clip_model": "openai/clip-vit-base-patch16"}
    backbones |= {"dinov3_model": "facebook/dinov3-vitb16-pretrain-lvd1689m"}
    write_training(folder, **backbones)
    write_card(folder)
    card = card_of(folder)
    assert card.data.license == "other" and card.data.license_name == "dinov3-license"
    assert card.data.base_model == list(backbones.values())
    assert "MIT licence" in card.text and "DINOv3 licence" in card.text
    write_training(folder, clip_model=str(folder), dinov3_model="a/local/folder")
    write_card(folder)
    assert card_of(folder).data.license_name == "dinov3-license" and card_of(folder).data.base_model is None


def test_shipped_backbones_bring_the_licence_of_this_package(folder):
    write_training(folder, clip_model="co2s-tiny-clip", dinov3_model="co2s-tiny-dinov3")
    write_card(folder)
    card = card_of(folder)
    assert card.data.license is None and card.data.base_model is None
    assert card.text.count("these weights ship with co2s_hf, under Apache-2.0.") == 2
    assert "MIT licence" not in card.text and "dinov3-license" not in card.text
    write_training(folder, clip_model="openai/clip-vit-base-patch16", dinov3_model="co2s-tiny-dinov3")
    write_card(folder)
    card = card_of(folder)
    assert card.data.license is None and card.data.base_model == ["openai/clip-vit-base-patch16"]
    assert "MIT licence" in card.text and "dinov3-license" not in card.text


def test_bands_are_named_with_and_without_a_scale(tmp_path):
    make_model(image_bands=[4, 3, 2]).save_pretrained(tmp_path)
    write_card(tmp_path)
    assert "made from bands [4, 3, 2] of the files. Prepare" in card_of(tmp_path).text
    make_model(image_scale=[[0, 3000]]).save_pretrained(tmp_path)
    write_card(tmp_path)
    text = card_of(tmp_path).text
    assert "made from bands 1, 2, 3 of the files; the (low, high) values [[0, 3000]] became 0 and 255." in text


def test_the_ground_sampling_distance_is_named_if_it_is_known(tmp_path):
    make_model(ground_sampling_distance_m=0.3).save_pretrained(tmp_path)
    write_card(tmp_path)
    assert "A pixel of the training images covers 0.3 m on the ground." in card_of(tmp_path).text
    make_model().save_pretrained(tmp_path)
    write_card(tmp_path)
    assert "on the ground" not in card_of(tmp_path).text


def test_prediction_of_one_student_is_not_called_fused(tmp_path):
    make_model(fusion="clip").save_pretrained(tmp_path)
    write_card(tmp_path)
    assert "those of the CLIP student alone" in card_of(tmp_path).text


def test_pictures_and_samples_are_shown_if_they_exist(folder):
    for place in ("figures/predictions.png", "figures/curves.png", "samples/validation_0.png"):
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).write_bytes(b"")
    write_training(folder)
    write_card(folder)
    card = card_of(folder)
    assert "](figures/predictions.png)" in card.text and "](figures/curves.png)" in card.text
    assert card.data["widget"] == [{"src": "samples/validation_0.png", "example_title": "validation_0"}]


def test_results_on_other_images_are_added_and_results_on_the_same_images_replaced(folder, make_evaluation):
    write_card(folder, make_evaluation())
    first = card_of(folder)
    first.text = first.text.replace("## Training", "By hand, https://x.org/?q=mine.\n\n## Training")
    both = with_evaluation(first, make_evaluation("towns", 0.3, dataset_id="user/towns"), "figures/towns.png")
    again = with_evaluation(both, make_evaluation(fused=0.9))
    assert again.text.count("| land |") == 2 and "| land | 40.0 | 45.0 | 90.0 |" in again.text
    assert "| land | 40.0 | 45.0 | 30.0 |" in again.text and "](figures/towns.png)" in again.text
    assert "| land | 40.0 | 45.0 | 50.0 |" not in again.text and "By hand, https://x.org/?q=mine." in again.text
    fused = {r.dataset_name: r.metric_value for r in again.data.eval_results if r.metric_name == "Mean IoU, fused"}
    assert fused == {"fields": 0.9, "towns": 0.3}
    assert {r.dataset_type for r in again.data.eval_results} == {"fields", "user/towns"}


def test_other_settings_and_other_sets_of_the_same_name_are_other_results(folder, make_evaluation):
    write_card(folder, replace(make_evaluation(), is_best=True))
    card = with_evaluation(card_of(folder), make_evaluation(fused=0.6, flip=True))
    card = with_evaluation(card, make_evaluation(fused=0.7, data_hash="other"))
    fused = [r.metric_value for r in card.data.eval_results if r.metric_name == "Mean IoU, fused"]
    assert sorted(fused) == [0.5, 0.6, 0.7]
    reloaded = ModelCard(str(card))  # the results also survive writing and reading the model-index
    assert len(reloaded.data.eval_results) == 12
    # The step was selected on these images, so every result on them is optimistic. Results on other images are not.
    optimistic = [line for line in card.text.splitlines() if SELECTED in line]
    assert len(optimistic) == 2 and all("image sets: abc123." in line for line in optimistic)
    again = with_evaluation(card, make_evaluation(fused=0.4))
    assert again.text.count(SELECTED) == 2


def test_results_are_added_to_a_card_from_somebody_else(make_evaluation):
    card = with_evaluation(ModelCard("---\nlicense: mit\n---\n# Mine\n\nAll by hand.\n"), make_evaluation())
    assert "# Mine\n\nAll by hand.\n\n## Results\n" in card.text
    assert card.data.license == "mit" and len(card.data.eval_results) == 4


def test_evaluation_of_a_folder_without_card_writes_one(folder, tmp_path, make_evaluation):
    (tmp_path / "confusion.png").write_bytes(b"picture")
    add_evaluation(folder, make_evaluation("my fields/2024"), tmp_path / "confusion.png")
    text = card_of(folder).text
    place = figure_path(make_evaluation("my fields/2024"))
    assert place != figure_path(make_evaluation("my-fields/2024"))
    assert f"]({place})" in text and "| land | 40.0 | 45.0 | 50.0 |" in text
    assert (folder / place).read_bytes() == b"picture"


def test_one_student_has_one_column_beside_the_fusion(folder, make_evaluation):
    scores = make_evaluation().scores
    write_card(folder, make_evaluation(fusion="clip", scores={name: scores[name] for name in ("clip", "fused")}))
    text = card_of(folder).text
    assert "| class | CLIP student | fused |" in text and "| land | 40.0 | 50.0 |" in text


def test_bars_in_names_do_not_break_tables(folder, make_evaluation):
    write_training(folder)
    facts = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    facts["data"]["name"] = "a|b"
    (folder / "training.json").write_text(json.dumps(facts), encoding="utf-8")
    scores = make_evaluation().scores["fused"]
    write_card(folder, make_evaluation(scores={"fused": replace(scores, iou={"land|sea": 0.5})}))
    text = card_of(folder).text
    assert r"| data | a\|b |" in text and r"| land\|sea | 50.0 |" in text


# A name with Markdown, HTML, YAML, the marks of this package's cards, and a template.
HOSTILE = (
    "a|b `c` ``` *d* <script>alert(1)</script> <!-- end of the results --> [e](javascript:f) {{ 7 * 7 }} {% if %}"
)
HOSTILE += " \\ ' \n---\n```\n\n# g\n| h |\nlicense: i\n~~~\n\r\n---\r\n&lt; \x00\u2028end"
SHOWN = HOSTILE.replace("\x00", " ").split()  # white space and control characters become a space


def parsed(text):
    """Parse the Markdown of a card."""
    return MarkdownIt("commonmark").enable("table").parse(text)


def structure(tokens):
    """The kinds of blocks and of the elements in each block, without texts and ends of lines."""
    inner = {None: [], "text": [], "softbreak": []}
    return [
        (token.type, [child.type for child in token.children or () if child.type not in inner])
        for token in tokens
        if token.type != "html_block" or token.content.startswith(("<!-- ", "<details>", "</details>"))
    ]


def write_named(folder, evaluation, name, base):
    """Write a card in which the classes, the data and the base have this name; return it."""
    make_model(id2label={0: name, 1: f"{name} 1", 2: f"{name} 2"}).save_pretrained(folder)
    facts = training(class_names=[name, f"{name} 1", f"{name} 2"], checkpoint=base)
    facts["data"] |= {"name": name, "id": name, "partition": name}
    facts |= {"command": ["train", "--data_dir", name], "device": name, "versions": {name: name}, "git_revision": name}
    (folder / "training.json").write_text(json.dumps(facts), encoding="utf-8")
    scores = replace(evaluation.scores["fused"], iou={name: 0.5})
    write_card(folder, replace(evaluation, data=name, scores={"fused": scores}))
    return card_of(folder)


def test_names_are_shown_as_they_are_and_change_nothing_else(tmp_path, make_evaluation):
    plain = write_named(tmp_path / "plain", make_evaluation(), "plain", "models/base/plain")
    hostile = write_named(tmp_path / "hostile", make_evaluation(), HOSTILE, HOSTILE)
    tokens = parsed(hostile.text)
    # "plain" may be the name of a data set on the Hub, the other name is not: there is no link.
    without_link = write_named(tmp_path / "link", make_evaluation(), "no id!", "models/base/plain")
    assert structure(tokens) == structure(parsed(without_link.text))
    assert structure(parsed(plain.text)) != structure(parsed(without_link.text))
    assert not [token for token in tokens if "script" in token.content and token.type == "html_block"]
    texts = [
        "".join(child.content for child in token.children if child.type == "text")
        for token in tokens
        if token.type == "inline"
    ]
    assert "".join(["Co2S adapted to ", " ".join(SHOWN)]) == " ".join(texts[0].split())
    cells = [" ".join(text.split()) for text in texts]
    assert cells.count(" ".join(SHOWN)) == 5  # data, partition, base, revision, and the row of the class
    # The metadata is that of the other card but for the names, and the options are a file for --config.
    ours, theirs = (card.data.to_dict() for card in (hostile, without_link))
    assert ours.keys() == theirs.keys() and ours["tags"] == theirs["tags"] and "license" not in ours
    assert ours["model-index"][0]["name"].split() == ["Co2S", "adapted", "to", *SHOWN]
    assert ours["model-index"][0]["results"][0]["dataset"]["name"].split() == SHOWN
    fences = {token.info: token.content for token in tokens if token.type == "fence"}
    assert yaml.safe_load(fences["yaml"])["class_names"][0] == HOSTILE
    in_markdown = HOSTILE.replace("\r\n", "\n").replace("\x00", "\ufffd")  # Markdown knows no others
    assert shlex.split(fences["bash"])[-2:] == ["--data_dir", in_markdown]
    line = next(line for line in fences["python"].splitlines() if line.startswith("segment("))
    assert ast.literal_eval(line.split('"label": ')[1].split(', "score"')[0]).split() == SHOWN


def test_results_with_such_names_are_replaced_and_keep_the_card(tmp_path, make_evaluation):
    card = write_named(tmp_path / "model", make_evaluation(), HOSTILE, HOSTILE)
    scores = make_evaluation().scores["fused"]
    again = make_evaluation(data=HOSTILE, scores={"fused": replace(scores, iou={HOSTILE: 0.25})})
    blocks = card.text.count("<!-- results ")
    for _ in range(2):
        card = ModelCard(str(with_evaluation(card, again)))
    rows = [line for line in card.text.splitlines() if line.startswith("| a")]
    assert len(rows) == 1 and rows[0].endswith("end | 25.0 |") and card.text.count("<!-- results ") == blocks == 1
    assert [r.metric_value for r in card.data.eval_results if r.metric_name == "Mean IoU, fused"] == [0.5]


def test_command_repeats_the_launch_without_publishing_and_resuming():
    facts = training()
    assert reproduce_command(facts) == "accelerate launch -m co2s_hf train --data_dir 'my fields'"
    facts["command"] += ["--push_to_hub", "--hub_model_id", "me/mine", "--seed", "3"]
    facts["command"] += ["--resume_from_checkpoint", "last", "--hub_revision=v1"]
    assert reproduce_command(facts) == "accelerate launch -m co2s_hf train --data_dir 'my fields' --seed 3"
    facts["mixed_precision"] = "bf16"  # an option of `accelerate launch`, which is not in the command
    assert reproduce_command(facts).endswith("--data_dir 'my fields' --seed 3 --mixed_precision bf16")
    facts["num_processes"] = 4
    launch = "accelerate launch --multi_gpu --num_processes 4 -m co2s_hf train "
    assert reproduce_command(facts).startswith(launch)
    facts["command"] += ["--mixed_precision=bf16"]
    assert reproduce_command(facts) == f"{launch}--data_dir 'my fields' --seed 3 --mixed_precision=bf16"


def test_secrets_and_the_home_folder_are_removed(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    token = "hf_" + 30 * "a"
    text = f"--token {token} --dataset_name https://me:secret@host/lists --data_dir {tmp_path}/fields"
    assert without_secrets({"command": [text]}) == {
        "command": ["--token hf_HIDDEN --dataset_name https://HIDDEN@host/lists --data_dir ~/fields"]
    }
    assert without_secrets(f"{tmp_path}ice/x /other{tmp_path}/x") == f"{tmp_path}ice/x /other{tmp_path}/x"


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_cards_agree_with_the_benchmarks_and_claim_no_results(name):
    facts = BENCHMARKS[name]
    path = ROOT / "model_cards" / f"{name}.md"
    card = ModelCard.load(path)
    assert card.data.eval_results is None and "model-index" not in path.read_text(encoding="utf-8")
    assert "The paper's results, not ours" in card.text and f" -m co2s_hf train --config {name} " in card.text
    table = [line.strip("| ").partition(" | ") for line in card.text.splitlines() if line.startswith("| ")]
    rows = {key: value for key, _, value in table}
    assert rows["classes"] == ", ".join(c.name for c in facts.classes)
    assert rows["training images"] == str(facts.num_training)
    assert rows["validation images"] == str(facts.num_validation)
    assert rows["crops"] == f"{facts.crop_size} px" and rows["epochs"].startswith(f"{facts.num_epochs} passes")
    assert rows["labelled images per step and GPU"].startswith(f"{facts.images_per_device},")
    for partition in facts.partitions:
        assert f"1/{partition} ({facts.num_labeled(partition)} images)" in rows["labelled shares with lists"]
    recipe = ROOT / "co2s_hf" / "assets" / "recipes" / f"{name}.yaml"
    options = yaml.load(recipe.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)  # 1_24 is a number in YAML
    assert f"1/{options['partition'].removeprefix('1_')}" in rows  # the paper has a result for the recipe
    assert card.data.base_model == [options["clip_model"], options["dinov3_model"]]
