"""Whole pretrainings: they learn, resume bit for bit, and refuse bad input before expensive work."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from transformers import AutoTokenizer, CLIPModel, DINOv3ViTModel, ResNetConfig

from co2s_hf.training.logbook import read_log
from co2s_hf.training.pretraining import loop
from co2s_hf.training.pretraining.outputs import LossLog, begin, check_outputs
from co2s_hf.utils.errors import UserError, UserFileExistsError, UserFileNotFoundError, UserOSError, UserValueError


KINDS = ("distillation", "masked", "clip")
LONG = {"max_train_steps": 24, "checkpointing_steps": 10, "logging_steps": 1, "learning_rate": 3e-3}
LONG |= {"per_device_train_batch_size": 8}
DEFAULT_SIZES = {"hidden_size": 160, "num_hidden_layers": 6, "num_attention_heads": 5}


@pytest.fixture(scope="module", params=KINDS)
def finished(request, pretrain, tmp_path_factory) -> tuple[str, Path]:
    """A kind, and the output folder of a pretraining of 24 steps."""
    output_dir = tmp_path_factory.mktemp(request.param) / "run"
    pretrain(request.param, output_dir, **LONG)
    return request.param, output_dir


@pytest.fixture(scope="module")
def masked(pretrain, tmp_path_factory) -> Path:
    """The output folder of a pretraining of two steps without a teacher, with a checkpoint after the first."""
    output_dir = tmp_path_factory.mktemp("short") / "run"
    pretrain("masked", output_dir, max_train_steps=2, checkpointing_steps=1)
    return output_dir


def test_the_loss_falls(finished):
    kind, output_dir = finished
    log = read_log(output_dir / "log.jsonl")
    assert [line["step"] for line in log] == list(range(1, 25))
    terms = {"masked": [], "distillation": ["loss_patches", "loss_class_token"]}
    terms["clip"] = ["loss_teacher", "loss_presence", "loss_places", "loss_contrast"]
    assert list(log[0]) == ["step", "loss", *terms[kind]]
    first, last = ({term: sum(line[term] for line in lines) / 4 for term in lines[0]} for lines in (log[:4], log[-4:]))
    assert last["loss"] < 0.95 * first["loss"]
    for term in {"loss_patches", "loss_class_token", "loss_teacher", "loss_presence"} & set(terms[kind]):
        assert last[term] < first[term], term


def test_the_result_loads_and_says_how_it_was_made(finished, make_options, labels_file):
    kind, output_dir = finished
    folder = output_dir / "model"
    model = (CLIPModel if kind == "clip" else DINOv3ViTModel).from_pretrained(folder)
    vision = model.config.vision_config if kind == "clip" else model.config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.patch_size, vision.image_size) == (16, 2, 8, 16)
    if kind == "clip":
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert (
            len(tokenizer) == model.config.text_config.vocab_size
            and tokenizer.unk_token_id not in tokenizer("a photo of a mobile home").input_ids
        )
    else:
        assert torch.isfinite(model(torch.zeros(1, 3, 32, 16)).last_hidden_state).all()
    saved = json.loads((folder / "pretraining.json").read_text(encoding="utf-8"))
    assert saved["options"]["max_train_steps"] == 24 and saved["options"]["mixed_precision"] == "no"
    assert ("mean_average_precision" in saved["results"]) == (kind == "clip")
    with Image.open(output_dir / "curves.png") as curves:
        assert curves.width > 1000

    card = (folder / "README.md").read_text(encoding="utf-8")
    method = " ".join(card.partition("It was made")[2].partition("```")[0].split())
    last = read_log(output_dir / "log.jsonl")[-1]["loss"]
    assert f"| loss | {last:.4g} |\n" in card and "\nmax_train_steps: 24\n" in card and "mixed_precision: 'no'" in card
    assert str(output_dir) not in card and str(labels_file) not in card
    assert f"{'CLIPModel' if kind == 'clip' else 'DINOv3ViTModel'}.from_pretrained(" in card
    if kind == "clip":
        value = saved["results"]["mean_average_precision"]
        assert f"| mean average precision | {value:.4g} |\n" in card and "| different texts | 5 |\n" in card
        assert "with the patch features of layer 2 of `dinov2` as another target." in method
        assert "\npipeline_tag: zero-shot-image-classification\n" in card
    elif kind == "distillation":
        assert "with `co2s pretrain dinov3` of the package co2s_hf: distillation of the patch features of" in method
        assert "| images | 10 |\n| tiles | 40 |\n" in card and "and of the teacher." in card
    else:
        assert "masked image modelling (SimMIM), without a teacher." in method and "of the teacher" not in card


def test_an_interrupted_pretraining_is_resumed_bit_for_bit(finished, pretrain, tmp_path, monkeypatch):
    kind, whole = finished
    write = LossLog.write

    def interrupt(log: LossLog, step: int):
        if step == 14:
            raise KeyboardInterrupt  # Ctrl-C, four steps after the checkpoint
        write(log, step)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(LossLog, "write", interrupt)
        pretrain(kind, tmp_path / "run", **LONG)
    assert not (tmp_path / "run" / "model").exists() and len(read_log(tmp_path / "run" / "log.jsonl")) == 13
    cache = tmp_path / "run" / "teacher_features"
    if kind != "masked":  # other options that may change: another place of the features
        cache.rename(tmp_path / "cache")
    moved = {} if kind == "masked" else {"cache_dir": str(tmp_path / "cache")}
    folder = pretrain(kind, tmp_path / "run", **LONG, **moved, resume=True)
    for path in ("model/model.safetensors", "log.jsonl", "model/README.md"):
        assert (tmp_path / "run" / path).read_bytes() == (whole / path).read_bytes(), path
    assert folder == tmp_path / "run" / "model" and not cache.exists()
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-0000010", "step-0000020"]


def test_only_the_same_pretraining_is_resumed(masked, make_options, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(masked, run)
    one, two = (SimpleNamespace(num_processes=count, is_main_process=True) for count in (1, 2))

    def check(processes=one, **changes) -> Path | None:
        settings = {"max_train_steps": 2, "checkpointing_steps": 1, "resume": True} | changes
        return check_outputs(make_options("masked", run, **settings), processes)

    assert check(logging_steps=7, dataloader_num_workers=2) == run / "checkpoints" / "step-0000001"
    with pytest.raises(UserValueError) as error:
        check(learning_rate=0.5, seed=8, checkpointing_steps=9)
    assert str(error.value) == (
        f"The pretraining in '{run}' had other options: `learning_rate` was 0.001 and is 0.5; `seed` was 3 and is 8. "
        "Give the same ones."
    )
    with pytest.raises(UserValueError, match=r"`mixed_precision` was no and is bf16. .* A CPU without bfloat16 instr"):
        check(mixed_precision="bf16")
    with pytest.raises(UserValueError, match="step-0000001' was saved by 1 processes, but this pretraining has 2"):
        check(processes=two)
    record = run / "pretraining.json"
    facts = json.loads(record.read_text(encoding="utf-8"))
    record.write_text(json.dumps({name: facts[name] for name in facts if name not in ("seed", "init")}))
    with pytest.raises(UserValueError, match=r"pretraining\.json' is not complete: it lacks init, seed\. Restore it"):
        check()
    for damaged in ('{"seed": 3, ', "[3]", ""):
        record.write_text(damaged, encoding="utf-8")
        with pytest.raises(UserValueError, match=r"pretraining\.json' is damaged: "):
            check()
    record.unlink()
    with pytest.raises(
        UserFileNotFoundError, match=r"pretraining\.json' does not exist, so '.*run' is not the folder"
    ):
        check()
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserFileNotFoundError, match=r"There is no checkpoint in '.*checkpoints' to resume from"):
        check()


def test_other_images_and_damaged_checkpoints_are_not_resumed(masked, make_options, pretrain, tmp_path, scenes_folder):
    run = tmp_path / "run"
    shutil.copytree(masked, run)
    options = make_options("masked", run, max_train_steps=2, checkpointing_steps=1, resume=True)
    tiles = loop.list_tiles(options.images, None, 32)
    begin(options, tiles, run / "checkpoints" / "step-0000001")
    with pytest.raises(UserValueError, match=r"The images are not those of the pretraining in '.*run'. Restore them"):
        begin(options, tiles[1:], run / "checkpoints" / "step-0000001")
    (weights,) = (run / "checkpoints" / "step-0000001").glob("model*.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    damaged = r"step-0000001' cannot be loaded: 'model\.safetensors' is damaged\. Start again with `overwrite"
    with pytest.raises(UserOSError, match=damaged):
        pretrain("masked", run, max_train_steps=2, checkpointing_steps=1, resume=True)


def test_earlier_results_are_removed_and_other_files_kept(masked, make_options, pretrain, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(masked, run)
    accelerator = SimpleNamespace(num_processes=1, is_main_process=True)
    with pytest.raises(UserFileExistsError, match="start again with `overwrite_output_dir=True`"):
        check_outputs(make_options("masked", run), accelerator)
    (run / "checkpoints" / "step-9999999").mkdir()  # it would be the newest one
    for name in ("notes.txt", "teacher_features/features-1.f16", "model/old.txt"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).touch()
    pretrain("masked", run, max_train_steps=3, checkpointing_steps=2, overwrite_output_dir=True)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-0000002"]
    assert [line["step"] for line in read_log(run / "log.jsonl")] == [2, 3]
    assert (run / "notes.txt").exists() and (run / "teacher_features" / "features-1.f16").exists()
    assert not (run / "model" / "old.txt").exists()
    (run / "pretraining.json").unlink()  # now it is no folder of a pretraining
    with pytest.raises(UserFileExistsError, match="already exists and is not an empty folder"):
        check_outputs(make_options("masked", run, overwrite_output_dir=True), accelerator)
    # The features of a pretraining that was interrupted early are no reason to refuse the folder.
    (tmp_path / "early" / "teacher_features").mkdir(parents=True)
    assert check_outputs(make_options("distillation", tmp_path / "early"), accelerator) is None


def test_bad_input_is_refused_before_images_are_decoded(make_options, tmp_path, monkeypatch, backbones, masked):
    def never(*args, **kwargs):
        raise AssertionError("images were decoded")

    monkeypatch.setattr(loop, "list_tiles", never)
    ResNetConfig().save_pretrained(tmp_path / "resnet")
    (tmp_path / "file").touch()
    (tmp_path / "words.csv").write_text("image,words\n", encoding="utf-8")
    clip, dinov3 = map(str, backbones)
    text_sizes = {"projection_dim": 128, "text_hidden_size": 128, "text_num_hidden_layers": 3}
    cases = [
        ("masked", {"init": clip, **DEFAULT_SIZES}, "`init` is .*clip, a clip model; expected dinov3_vit"),
        ("clip", {"init": dinov3, **DEFAULT_SIZES, **text_sizes}, "a dinov3_vit model; expected clip"),
        ("masked", {"init": str(tmp_path / "no"), **DEFAULT_SIZES}, "`init` .*no cannot be loaded"),
        ("masked", {"init": dinov3, **DEFAULT_SIZES, "crop_size": 20}, "`crop_size` is 20; .* patches of 8 px"),
        ("distillation", {"teacher": str(tmp_path / "resnet")}, "a resnet model, which has no patch tokens"),
        ("distillation", {"teacher_layer": 9}, "`teacher_layer` is 9; .* has the layers 1 to 3"),
        (
            "distillation",
            {"cache_dir": str(tmp_path / "file" / "x")},
            "file' is no folder .* Choose another `cache_dir`",
        ),
        ("masked", {"output_dir": masked}, "already exists and is not an empty folder"),
        ("masked", {"output_dir": tmp_path / "file"}, "already exists and is not an empty folder"),
        ("masked", {"resume": True}, "There is no checkpoint"),
        ("clip", {"image_labels": str(tmp_path / "words.csv")}, "has the columns image, words"),
    ]
    for kind, changes, message in cases:
        output_dir = changes.pop("output_dir", tmp_path / "run")
        options = make_options(kind, output_dir, **changes)
        with pytest.raises(UserError, match=message):
            (loop.pretrain_clip if kind == "clip" else loop.pretrain_dinov3)(options)
    assert not (tmp_path / "run").exists()


def test_labels_must_name_images_to_train_on(pretrain, scenes_folder, labels_file, tmp_path):
    (tmp_path / "images").mkdir()
    image = next((scenes_folder / "images").iterdir())
    shutil.copy(image, tmp_path / "images" / "other.png")
    with pytest.raises(UserValueError, match=r"labels\.csv names no image in .*images"):
        pretrain("clip", tmp_path / "run", images=[str(tmp_path / "images")])
    with pytest.raises(UserValueError, match=r"names are held out.* lower `held_out_fraction`, which is 0\.9999"):
        pretrain("clip", tmp_path / "run", held_out_fraction=0.9999)
    assert not (tmp_path / "run" / "model").exists()


def test_words_that_init_does_not_know_are_named(clip_init, pretrain, tmp_path, capsys):
    labels = tmp_path / "labels.csv"
    labels.write_text(clip_init[1].read_text(encoding="utf-8").replace("sea", "lava"), encoding="utf-8")
    sizes = {**DEFAULT_SIZES, "projection_dim": 128, "text_hidden_size": 128, "text_num_hidden_layers": 3}
    changes = {"init": str(clip_init[0]), "image_labels": str(labels), "max_train_steps": 1, "teacher": None}
    folder = pretrain("clip", tmp_path / "run", **sizes, **changes, teacher_layer=None)
    assert f"Warning: {clip_init[0]} does not know lava. All unknown words mean the same" in capsys.readouterr().out
    first, then = (CLIPModel.from_pretrained(path).visual_projection.weight for path in (clip_init[0], folder))
    assert 0 < (first - then).abs().max() < 0.005  # it started from there
    assert "It started from `model`." in (folder / "README.md").read_text(encoding="utf-8").replace("\n", " ")


@pytest.fixture
def clip_init(pretrain, labels_file, tmp_path) -> tuple[Path, Path]:
    """A pretrained CLIP, and its labels."""
    return pretrain("clip", tmp_path / "first", max_train_steps=1, teacher=None, teacher_layer=None), labels_file


def test_the_learning_rate_rises_then_falls_along_a_cosine():
    assert [loop.rate(step, 40) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert loop.rate(21, 40) == pytest.approx(0.5 * (1 + math.cos(math.pi * 19 / 38)))
    assert loop.rate(40, 40) == pytest.approx(0)
    assert [loop.rate(step, 1) for step in (0, 1)] == [1.0, 1.0]


def test_the_log_has_the_mean_over_the_steps_that_have_a_loss(tmp_path, capsys):
    log = LossLog(Accelerator(cpu=True), tmp_path / "log.jsonl")
    for loss, presence in ((1.0, 4.0), (2.0, None), (6.0, 8.0)):
        losses = {"loss": torch.tensor(loss, requires_grad=True)}
        log.add(losses if presence is None else losses | {"loss_presence": torch.tensor(presence)})
    log.write(3)
    log.add({"loss": torch.tensor(5.0)})
    log.write(4)
    assert read_log(tmp_path / "log.jsonl") == [
        {"step": 3, "loss": 3.0, "loss_presence": 6.0},
        {"step": 4, "loss": 5.0},
    ]
    assert "step     3  loss 3.000  loss_presence 6.000\n" in capsys.readouterr().out
    log.add({"loss": torch.tensor(7.0)})
    log.write(2)  # of a resumed pretraining
    assert read_log(tmp_path / "log.jsonl") == [{"step": 2, "loss": 7.0}]
    log.add({"loss": torch.tensor(math.nan)})
    with pytest.raises(UserValueError, match=r"The loss is not finite at step 5. Lower `learning_rate`"):
        log.write(5)
