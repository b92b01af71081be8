"""`co2s finetune`: adapters, merging, cards, errors."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import read_metrics, run_command
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from co2s_hf import Co2SForSemanticSegmentation
from co2s_hf.cli.finetune import COMMAND
from co2s_hf.hub.publishing import claim_repository, publish
from co2s_hf.training import models
from co2s_hf.training.lora import co2s_lora_config
from co2s_hf.training.options import AdaptationOptions


SHORT = ("--use_cpu", "--max_train_steps", 2, "--per_device_train_batch_size", 2, "--logging_steps", 1)


def load(folder):
    return Co2SForSemanticSegmentation.from_pretrained(folder)


def logits(folder):
    with torch.no_grad():
        return load(folder)(torch.ones(1, 3, 16, 16)).logits


def test_new_classes_on_a_published_base(hub, base_folder, scenes_folder, tmp_path):
    output = tmp_path / "run"
    publish(base_folder, claim_repository("user/base"))
    words = ("--checkpoint", "user/base", "--data_dir", scenes_folder, "--output_dir", output, *SHORT)
    words += ("--lora_rank", 2, "--card_samples", 1, "--merge", "--method", "co2s")
    done = run_command("finetune", *words, "--push_to_hub", "--hub_model_id", "user/valley")
    assert done.returncode == 0, done.stderr
    assert "Before the first step:" in done.stdout and "optimiser state" in done.stdout
    before = json.loads((output / "metrics_before.json").read_text())
    after = read_metrics(output)
    assert before["step"] == 0 and after["step"] == 2 and list(after["fused"]["iou"]) != ["land", "road", "water"]
    assert before["fused"] != after["fused"]
    check_card(output / "adapter", scenes_folder, tmp_path)
    assert torch.equal(logits("user/valley"), logits(output / "adapter"))
    # The adapter is evaluated like a model, and so is the merged model.
    for name in ("adapter", "merged"):
        words = ("--checkpoint", output / name, "--data_dir", scenes_folder, "--output_dir", tmp_path / name)
        measured = run_command("evaluate", *words, "--use_cpu")
        assert measured.returncode == 0, measured.stderr
        result = read_metrics(tmp_path / name)
        assert result["fused"]["mean_iou"] == pytest.approx(after["fused"]["mean_iou"], abs=1e-3)
        assert result["crop_size"] == 16
    assert load(output / "merged").config.num_labels == 6
    card = ModelCard.load(output / "merged" / "README.md")
    assert card.data["base_model_relation"] == "finetune" and card.data.base_model == "user/base"
    assert "| base model | user/base |" in card.text and "from scratch" not in card.text
    assert "The base model, `user/base`: see its card" in card.text and "Nothing has been measured" not in card.text


def check_card(adapter: Path, data: Path, tmp_path: Path):
    """Compare an adapter's card with the run, and read its options back."""
    card = ModelCard.load(adapter / "README.md")
    assert card.data["library_name"] == "peft" and card.data["base_model_relation"] == "adapter"
    assert card.data.base_model == "user/base"
    assert "| base model | user/base |" in card.text and "LoRA of rank 2" in card.text
    assert f"# Co2S adapted to {data.name}" in card.text and "load_adapter(" in card.text
    assert "accelerate launch -m co2s_hf finetune --checkpoint user/base" in card.text
    path = tmp_path / "options.yaml"
    path.write_text(card.text.split("```yaml\n")[1].split("```")[0])
    again = COMMAND.parse(["--config", str(path)])[AdaptationOptions]
    assert (again.method, again.lora_rank, again.max_train_steps, again.checkpoint) == ("co2s", 2, 2, "user/base")


def test_the_same_classes_keep_the_weights_of_the_base(base_folder, scenes_folder, tmp_path):
    data = Path(shutil.copytree(scenes_folder, tmp_path / "data"))
    (data / "classes.json").unlink()
    words = ["--data_dir", data, "--label_map", "0=0,1=1,2=0,3=0,4=0,5=2", "--class_names", "land", "road", "water"]
    run = ("--checkpoint", base_folder, "--output_dir", tmp_path / "run", *words, *SHORT)
    done = run_command("finetune", *run, "--card_samples", 0, "--freeze_decoders")
    assert done.returncode == 0, done.stderr
    plain = run_command(
        "evaluate", "--checkpoint", base_folder, "--output_dir", tmp_path / "base", "--use_cpu", *words
    )
    assert plain.returncode == 0, plain.stderr
    before = json.loads((tmp_path / "run" / "metrics_before.json").read_text())
    assert before["fused"] == read_metrics(tmp_path / "base")["fused"]
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert saved and not [name for name in saved if "decoder" in name]


def test_training_with_lora_ends_in_a_plain_model(backbones, scenes_folder, tmp_path):
    words = ("--clip_model", backbones[0], "--dinov3_model", backbones[1], "--data_dir", scenes_folder, *SHORT)
    words += ("--output_dir", tmp_path / "run", "--lora", "--lora_rank", 2, "--crop_size", 16, "--eval_steps", 1)
    done = run_command("train", *words, "--card_samples", 0)
    assert done.returncode == 0, done.stderr
    saved, best = load(tmp_path / "run" / "model"), load(tmp_path / "run" / "best_model")
    assert not [name for name in saved.state_dict() if "lora" in name] and not hasattr(best, "peft_config")
    pretrained = Co2SForSemanticSegmentation.from_backbones(*map(str, backbones), id2label={0: "a", 1: "b"})
    before, after = (m.dinov3.encoder.vision_model.model.layer[0] for m in (pretrained, saved))
    difference = (after.attention.v_proj.weight - before.attention.v_proj.weight).detach()
    assert difference.abs().max() > 0 and torch.linalg.matrix_rank(difference, rtol=1e-3) <= 2
    assert torch.equal(after.mlp.up_proj.weight, before.mlp.up_proj.weight)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((), 2, "Name the model to adapt: --checkpoint user/name"),
        (("--checkpoint", "."), 1, "Name the data to adapt to: --data_dir"),
        (("--checkpoint", ".", "--data_dir", ".", "--clip_model", "x"), 2, "unrecognized arguments: --clip_model x"),
        (("--checkpoint", ".", "--data_dir", ".", "--push_to_hub", "--hub_model_id", "a/b"), 1, "Publish the base"),
        (("--checkpoint", ".", "--data_dir", ".", "--quantize", "4bit"), 1, "pip install bitsandbytes"),
        (("--checkpoint", "no/where", "--data_dir", "."), 1, "no/where"),
        (("--checkpoint", "ADAPTER", "--data_dir", "."), 1, "is an adapter. Merge it (--merge)"),
    ],
)
def test_wrong_arguments_stop_before_anything_is_written(
    words, code, message, hub, monkeypatch, base_folder, tmp_path
):
    if "ADAPTER" in words:
        model = load(base_folder)
        model.add_adapter(co2s_lora_config(model))
        model.save_pretrained(tmp_path / "adapter")
        words = [tmp_path / "adapter" if word == "ADAPTER" else word for word in words]
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    done = run_command("finetune", *words, "--output_dir", tmp_path / "run")
    assert done.returncode == code and message in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()
