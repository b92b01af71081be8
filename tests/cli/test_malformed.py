"""Malformed input of every kind, for every command: one message, no traceback, no changed file, no request."""

import contextlib
import json
import os
import resource
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import malformed
import pytest
from helpers import SMALL_RUN, made_once, run_command, save_checkpoint
from hostile import WebServer
from malformed import Damage, copy_of

from co2s_hf import Co2SForSemanticSegmentation
from co2s_hf.cli import convert, demo, evaluate, finetune, predict, prepare, pretrain, push, train
from co2s_hf.training.lora import co2s_lora_config


SEED = 18
FAST = 20  # so many cases are tested by default
MEMORY = 12 * 2**30  # bytes above the present use; threads reserve address space, and a machine may have many cores
LONGEST_MESSAGE = 4000  # characters

IMAGE, LABEL = "data/images/validation_0000.png", "data/labels/validation_0000.png"
RUN = ("--data_dir", "data", *SMALL_RUN, "--card_samples", 0, "--checkpointing_steps", 2)
BACKBONES = tuple(word for word in RUN if word != "--from_scratch")
BACKBONES += ("--clip_model", "clip", "--dinov3_model", "dinov3", "--output_dir", "out")
PRETRAIN = ("--images", "data/images", "--tile_size", 32, "--crop_size", 32, "--per_device_train_batch_size", 2)
PRETRAIN += ("--max_train_steps", 2, "--output_dir", "out")
SIZES = ("--hidden_size", 16, "--num_hidden_layers", 2, "--num_attention_heads", 2)
TAGS = ("--image_labels", "tags.csv")
CHECKPOINT = ("--checkpoint", "base")
OUT = ("--output_dir", "out")
ORIGINAL_SIZES = ("--num_attention_heads", 4, "--decoder_num_attention_heads", 4, "--decoder_pool_size", 2)
ORIGINAL_SIZES += ("--clip_logits_size", 56, "--dinov3_logits_size", 64)
# Complete words of each command. Paths are those of `good`; `out` does not exist.
WORDS = {
    "train": ("train", *RUN, *OUT),
    "train backbones": ("train", *BACKBONES),
    "train again": ("train", *RUN, "--output_dir", "run", "--resume_from_checkpoint", "last"),
    "train set": ("train", "--dataset_name", "set", *RUN[2:], *OUT),
    "finetune": ("finetune", *CHECKPOINT, "--data_dir", "data", "--max_train_steps", 2, "--card_samples", 0, *OUT),
    "evaluate": ("evaluate", *CHECKPOINT, "--data_dir", "data", *OUT),
    "evaluate adapter": ("evaluate", "--checkpoint", "adapter", "--data_dir", "data", *OUT),
    "predict images": ("predict", *CHECKPOINT, "--images", IMAGE, *OUT),
    "predict data": ("predict", *CHECKPOINT, "--data_dir", "data", "--split", "validation", *OUT),
    "predict scene": ("predict", "scene.tif", *CHECKPOINT, "--output", "out/map.tif"),
    "predict adapter": ("predict", "--checkpoint", "adapter", "--images", IMAGE, *OUT),
    "prepare": ("prepare", "--data_dir", "data", *OUT),
    "prepare report": ("prepare", "--data_dir", "data", "--report", "out/report.html"),
    "prepare set": ("prepare", "--dataset_name", "set", *OUT),
    "push": ("push", *CHECKPOINT, "--hub_model_id", "user/name"),
    "convert": (
        *("convert", "--clip_checkpoint", "clip.pth", "--dinov3_checkpoint", "dinov3.pth"),
        *("--dataset", "whdld", *ORIGINAL_SIZES, *OUT),
    ),
    "convert back": ("convert", "--to_original", "base", *OUT),
    "demo": ("demo", *CHECKPOINT),
    "pretrain dinov3": ("pretrain", "dinov3", *PRETRAIN, *SIZES),
    "pretrain dinov3 init": ("pretrain", "dinov3", *PRETRAIN, "--init", "dinov3"),
    "pretrain dinov3 teacher": ("pretrain", "dinov3", *PRETRAIN, *SIZES, "--teacher", "dinov3"),
    "pretrain clip": ("pretrain", "clip", *PRETRAIN, *SIZES, *TAGS),
    "pretrain clip init": ("pretrain", "clip", *PRETRAIN, "--init", "clip", *TAGS),
}
# Folders that a run makes, and its command.
MADE_BY = {"run": ("train", *RUN), "set": ("prepare", "--data_dir", "data")}
COMMANDS = {
    "train": train.COMMAND,
    "finetune": finetune.COMMAND,
    "evaluate": evaluate.COMMAND,
    "predict images": predict.COMMAND,
    "predict scene": predict.COMMAND,
    "prepare": prepare.COMMAND,
    "push": push.COMMAND,
    "convert": convert.COMMAND,
    "demo": demo.COMMAND,
    "pretrain dinov3": pretrain.COMMANDS["dinov3"],
    "pretrain clip": pretrain.COMMANDS["clip"],
}
TRAININGS = ("train", "finetune")
LABELLED = (*TRAININGS, "evaluate", "prepare", "prepare report")
OF_MODELS = ("evaluate", "predict images", "predict scene", "finetune", "demo", "push", "convert back")


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Args:
        target: The file that is damaged.
        damages: Name -> damage.
        commands: Keys of WORDS, of commands that read the file. The damages are shared out among them.
        words: Further words of the command.
        named: What a message may name, too, such as a file that a list names.
    """

    target: str
    damages: dict[str, Damage]
    commands: tuple[str, ...]
    words: tuple = ()
    named: tuple[str, ...] = ()


KINDS = {
    "image": Kind(
        IMAGE,
        malformed.IMAGES | {"missing": malformed.missing} | malformed.FILES,
        (*LABELLED, "predict images", "predict data"),
    ),
    "image to pretrain": Kind(IMAGE, malformed.IMAGES, ("pretrain dinov3", "pretrain clip")),
    "label": Kind(LABEL, malformed.LABELS | {"missing": malformed.missing} | malformed.FILES, LABELLED),
    "scene": Kind("scene.tif", malformed.SCENES, ("predict scene",)),
    "list": Kind(
        "data/splits/val.txt", malformed.LISTS, (*LABELLED, "predict data"), named=("data/images/", "data/images ")
    ),
    "list to leave out": Kind("names.txt", malformed.NAMES, ("pretrain dinov3",), ("--exclude", "names.txt")),
    "classes": Kind("data/classes.json", malformed.CLASSES, LABELLED),
    "colours": Kind("colors.json", malformed.COLORS, LABELLED, ("--label_colors", "colors.json")),
    "options": Kind(
        "options.yaml",
        malformed.CONFIGS,
        tuple(COMMANDS),
        ("--config", "options.yaml"),
        ("--seed", "--port", "--crop_size"),
    ),
    "tags": Kind("tags.csv", malformed.TABLES, ("pretrain clip",)),
    "config of a model": Kind("base/config.json", malformed.MODEL_CONFIGS, OF_MODELS),
    "weights": Kind("base/model.safetensors", malformed.WEIGHTS, OF_MODELS),
    "image processor": Kind("base/preprocessor_config.json", malformed.PROCESSORS, OF_MODELS[:5]),
    "config of an adapter": Kind(
        "adapter/adapter_config.json",
        malformed.OBJECTS | {"other rank": malformed.change(r=3), "rank is text": malformed.change(r="many")},
        ("evaluate adapter", "predict adapter"),
    ),
    "weights of an adapter": Kind(
        "adapter/adapter_model.safetensors", malformed.WEIGHTS, ("evaluate adapter", "predict adapter")
    ),
    "config of CLIP": Kind("clip/config.json", malformed.CLIP_CONFIGS, ("train backbones", "pretrain clip init")),
    "weights of CLIP": Kind(
        "clip/model.safetensors", malformed.BACKBONE_WEIGHTS, ("train backbones", "pretrain clip init")
    ),
    "tokenizer": Kind("clip/tokenizer.json", malformed.TOKENIZERS, ("train backbones", "pretrain clip init")),
    "config of DINOv3": Kind(
        "dinov3/config.json",
        malformed.DINOV3_CONFIGS,
        ("train backbones", "pretrain dinov3 init", "pretrain dinov3 teacher"),
    ),
    "weights of DINOv3": Kind(
        "dinov3/model.safetensors",
        malformed.BACKBONE_WEIGHTS,
        ("train backbones", "pretrain dinov3 init", "pretrain dinov3 teacher"),
    ),
    "weights to resume": Kind("run/checkpoints/step-0000002/model.safetensors", malformed.WEIGHTS, ("train again",)),
    "optimizer": Kind("run/checkpoints/step-0000002/optimizer.bin", malformed.PICKLES, ("train again",)),
    "random states": Kind("run/checkpoints/step-0000002/random_states_0.pkl", malformed.PICKLES, ("train again",)),
    "states": Kind("run/checkpoints/step-0000002/states.json", malformed.RECORDS, ("train again",)),
    "record of a run": Kind("run/arguments.json", malformed.RECORDS, ("train again",)),
    "log of a run": Kind("run/log.jsonl", malformed.LOGS, ("train again",)),
    "CLIP of the authors": Kind("clip.pth", malformed.ORIGINALS, ("convert",)),
    "DINOv3 of the authors": Kind("dinov3.pth", malformed.ORIGINALS, ("convert",)),
    "rows of a data set": Kind(
        "set/labeled/data-00000-of-00001.arrow", malformed.DATA_SETS, ("prepare set", "train set"), named=("'set'",)
    ),
    "record of a data set": Kind(
        "set/labeled/dataset_info.json", malformed.DATA_SET_RECORDS, ("prepare set", "train set"), named=("'set'",)
    ),
}
NUMBERS = ("nan", "-inf", "1e999", "-1e300", "9" * 5000, "many", "", "0x1F", "1,5", "--1", "1e-9e", "None")


def cases() -> list:
    """Return all cases: (kind or "number", name of the damage or option, command). FAST of them are not slow."""
    found = []
    for name, kind in KINDS.items():
        for place, damage in enumerate(kind.damages):
            found.append((name, damage, kind.commands[place % len(kind.commands)]))
    for command, definition in COMMANDS.items():
        for group in definition.groups:
            for option, annotation in typing.get_type_hints(group.options).items():
                parts = {annotation, *typing.get_args(annotation)}
                if option in group.flags and parts & {int, float}:
                    found.append(("number", option, command))
    quick = [place for place, (_, _, command) in enumerate(found) if command not in ("train again", "train set")]
    fast = set(Random(SEED).sample(quick, FAST))
    return [
        pytest.param(*case, id="-".join(case), marks=[] if place in fast else pytest.mark.slow)
        for place, case in enumerate(found)
    ]


@pytest.fixture(scope="module")
def good(tmp_path_factory, scenes_folder, backbones, original_checkpoints) -> Path:
    """A folder with one good file or folder of each kind."""

    def make(folder: Path):
        folder.mkdir()
        copy_of(scenes_folder, folder / "data")
        entries = json.loads((folder / "data" / "classes.json").read_text(encoding="utf-8"))
        names, colors = [entry["name"] for entry in entries], [entry["color"] for entry in entries]
        save_checkpoint(folder / "base", crop_size=16, id2label=dict(enumerate(names)), palette=colors)
        with contextlib.chdir(folder):
            model = Co2SForSemanticSegmentation.from_pretrained("base")
            model.add_adapter(co2s_lora_config(model, rank=2))
            model.save_pretrained("adapter")
        copy_of(folder / "base" / "preprocessor_config.json", folder / "adapter" / "preprocessor_config.json")
        for name, source in zip(("clip", "dinov3"), backbones):
            copy_of(source, folder / name)
            copy_of(original_checkpoints[name], folder / f"{name}.pth")
        (folder / "names.txt").write_text(IMAGE.removeprefix("data/"), encoding="utf-8")
        (folder / "options.yaml").write_text("crop_size: 16\n", encoding="utf-8")
        copy_of(folder / "data" / "classes.json", folder / "colors.json")
        images = sorted((folder / "data" / "images").iterdir())
        rows = [f"data/images/{path.name},{('land', 'water')[n % 2]}" for n, path in enumerate(images)]
        (folder / "tags.csv").write_text("\n".join(["image,tags", *rows]) + "\n", encoding="utf-8")
        malformed.scene(folder / "scene.tif", Random(SEED))

    return made_once(tmp_path_factory, "good", make)


@pytest.fixture(scope="module")
def web(tmp_path_factory) -> Iterator[WebServer]:
    server = WebServer(tmp_path_factory.mktemp("server"))
    yield server
    assert server.requests() == []
    server.stop()


@pytest.fixture
def home(good, tmp_path, tmp_path_factory, monkeypatch, hub) -> Iterator[Callable[[Sequence], None]]:
    """Copies the files that the words of a command name into the current folder. No command asks the Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("co2s_hf.cli.demo_page.launch", lambda *args: None)

    def make(name: str, folder: Path):
        with contextlib.chdir(good):
            done = run_command(*MADE_BY[name], "--output_dir", folder)
        assert done.returncode == 0, done.stderr

    def fill(words: Sequence):
        names = {str(word).partition("/")[0] for word in words}
        if "adapter" in names:
            names.add("base")
        for name in names & {path.name for path in good.iterdir()}:
            copy_of(good / name, tmp_path / name)
        for name in names & MADE_BY.keys():
            copy_of(made_once(tmp_path_factory, f"good-{name}", partial(make, name)), tmp_path / name)

    yield fill
    assert not hub.requests


@contextmanager
def limited_memory() -> Iterator[None]:
    """Let allocations fail before the machine runs out of memory."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def files_below(folder: Path) -> dict[str, bytes | str | None]:
    """Return the content of all files, and where links point to."""
    found = {}
    for path in folder.rglob("*"):
        is_link = path.is_symlink()
        found[str(path.relative_to(folder))] = (
            os.readlink(path) if is_link else path.read_bytes() if path.is_file() else None
        )
    return found


def check_refused(words: Sequence, expected: Sequence[str]):
    """Run a command. Check that it ends with one short message that has one of the texts, and changes no file."""
    before = files_below(Path())
    with limited_memory():
        run = run_command(*words)
    assert run.returncode in (1, 2), run
    assert "Traceback" not in run.stderr and len(run.stderr) < LONGEST_MESSAGE, run.stderr[:LONGEST_MESSAGE]
    messages = [line for line in run.stderr.splitlines() if "error: " in line or line.startswith("Left out: ")]
    assert len(messages) == 1, run.stderr
    shown = run.stderr[run.stderr.index(messages[0]) :]
    assert any(text in shown for text in expected), shown
    after = files_below(Path())
    # Folders without a file, and the options of predictions that may be continued, are not half a result.
    added = {name for name in after.keys() - before.keys() if after[name] is not None}
    assert added <= ({"out/predictions.json"} if words[0] == "predict" else set())
    assert {name: after.get(name) for name in before} == before


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in WORDS if command not in ("push", "convert back")])
def test_good_files_are_accepted(command, home):
    """So the damage alone is the reason why the others are refused."""
    home(WORDS[command])
    run = run_command(*WORDS[command])
    assert run.returncode == 0, run


@pytest.mark.parametrize(("kind", "damage", "command"), cases())
def test_malformed_input_is_refused(kind, damage, command, home, web):
    rng = Random(f"{SEED} {kind} {damage} {command}")
    if kind == "number":
        value = rng.choice(NUMBERS)
        home(WORDS[command])
        check_refused([*WORDS[command], f"--{damage}={value}"], [f"--{damage}"])
        return
    words = (*WORDS[command], *KINDS[kind].words)
    target = Path(KINDS[kind].target)
    home(words)
    KINDS[kind].damages[damage](target, rng)
    if target.is_file() and malformed.SERVER in (data := target.read_bytes()):
        target.write_bytes(data.replace(malformed.SERVER, web.url.encode()))
    named = [str(target), *([str(target.parent)] if len(target.parts) > 1 else []), *KINDS[kind].named]
    check_refused(words, named)
