"""Every command refuses wrong options and broken files: one message, no traceback, and no file changes."""

import json
import shlex
import shutil
import typing
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from helpers import SMALL_RUN, run_command
from PIL import Image
from safetensors.torch import load_file, save_file

from co2s_hf.cli import convert, demo, evaluate, finetune, predict, prepare, pretrain, push, train
from co2s_hf.training import loop


BINARY = bytes(range(256)) * 4
PRETRAINING = ("--hidden_size", 16, "--num_hidden_layers", 2, "--num_attention_heads", 2, "--tile_size", 32)
PRETRAINING += ("--crop_size", 32, "--per_device_train_batch_size", 2, "--max_train_steps", 2)
# Complete words of each command. {data}, {base} (a trained model), {image} and {out} (missing) are paths.
WORDS = {
    "train": ("train", "--data_dir", "{data}", *SMALL_RUN, "--output_dir", "{out}"),
    "finetune": (
        *("finetune", "--checkpoint", "{base}", "--data_dir", "{data}", "--max_train_steps", 2),
        *("--output_dir", "{out}"),
    ),
    "evaluate": ("evaluate", "--checkpoint", "{base}", "--data_dir", "{data}", "--output_dir", "{out}"),
    "predict": ("predict", "--checkpoint", "{base}", "--images", "{image}", "--output_dir", "{out}"),
    "predict scene": ("predict", "{image}", "--checkpoint", "{base}", "--output", "{out}/map.tif"),
    "prepare": ("prepare", "--data_dir", "{data}", "--output_dir", "{out}"),
    "push": ("push", "--checkpoint", "{base}", "--hub_model_id", "user/name"),
    "push --space_dir": ("push", "--checkpoint", "user/name", "--space_dir", "{out}"),
    "convert": ("convert", "--to_original", "{base}", "--output_dir", "{out}"),
    "demo": ("demo", "--checkpoint", "{base}"),
    "pretrain": ("pretrain", "dinov3", "--images", "{data}/images", *PRETRAINING, "--output_dir", "{out}"),
}
COMMANDS = {
    "train": train.COMMAND,
    "finetune": finetune.COMMAND,
    "evaluate": evaluate.COMMAND,
    "predict": predict.COMMAND,
    "prepare": prepare.COMMAND,
    "push": push.COMMAND,
    "convert": convert.COMMAND,
    "demo": demo.COMMAND,
    "pretrain": pretrain.COMMANDS["dinov3"],
}


@pytest.fixture
def paths(tmp_path, monkeypatch, scenes_folder, base_folder, hub) -> dict[str, Path]:
    """Copies of an image, a data folder and a trained model, and the path of an output that does not exist."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("co2s_hf.cli.demo_page.launch", lambda *args: pytest.fail("The page was opened."))
    shutil.copytree(scenes_folder, tmp_path / "data")
    shutil.copytree(base_folder, tmp_path / "base")
    Image.new("RGB", (24, 24), (90, 120, 60)).save(tmp_path / "image.png")
    return {name: tmp_path / name for name in ("data", "base", "out")} | {"image": tmp_path / "image.png"}


def fast_for(command: str, cases: Iterable) -> list:
    """Return parameters that begin with a command. Only those of one command are tested by default."""
    cases = [(case,) if isinstance(case, str) else tuple(case) for case in cases]
    return [pytest.param(*case, marks=[] if case[0] == command else pytest.mark.slow) for case in cases]


def files_below(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(paths: dict[str, Path], command: str, *words, expected: str | tuple[str, ...]) -> str:
    """Run a command with further words. Check that it ends with one message, and changes no file.

    Args:
        paths: Of the fixture.
        command: Key of WORDS.
        words: Words that are added. The last value of an option wins.
        expected: Texts of the message, with the keys of `paths` in braces.
    """
    before = files_below(paths["out"].parent)
    run = run_command(*(str(word).format(**paths) for word in (*WORDS[command], *words)))
    assert run.returncode in (1, 2), run
    assert "Traceback" not in run.stderr
    messages = [line for line in run.stderr.splitlines() if "error: " in line or line.startswith("Left out: ")]
    assert len(messages) == 1, run.stderr
    for text in (expected,) if isinstance(expected, str) else expected:
        assert text.format(**paths) in messages[0]
    assert files_below(paths["out"].parent) == before
    return messages[0]


# Any number may mean "no class". The words of the training commands give a number of steps, which excludes epochs.
OTHER_OPTIONS = ("ignore_index", "num_train_epochs")


def numeric_options(kind: type) -> list[tuple[str, str]]:
    """Return (command, option) of all options with one number of this type."""
    found = []
    for name, command in COMMANDS.items():
        for group in command.groups:
            for field, annotation in typing.get_type_hints(group.options).items():
                parts = typing.get_args(annotation) or (annotation,)
                if field not in group.flags or field in OTHER_OPTIONS:
                    continue
                if kind in parts and typing.get_origin(annotation) is not list:
                    found.append((name, field))
    return found


@pytest.mark.parametrize(("command", "option"), fast_for("predict", numeric_options(float)))
@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_numbers_out_of_range_are_refused(command, option, value, paths):
    shown = str(float(value))
    words = ["--vector", "map.gpkg"] if option in ("min_area_m2", "simplify_m") else []
    message = refused(paths, command, *words, f"--{option}", value, expected=f"--{option}")
    assert shown in message or f"'{value}'" in message


@pytest.mark.parametrize(("command", "option"), fast_for("predict", numeric_options(int)))
@pytest.mark.parametrize("value", [-1, 2**64])
def test_whole_numbers_out_of_range_are_refused(command, option, value, paths):
    message = refused(paths, command, f"--{option}", value, expected=f"--{option}")
    assert str(value) in message


@pytest.mark.parametrize(
    ("command", "option"),
    [
        *(("train", option) for option in ("learning_rate", "lora_rank", "crop_size", "max_train_steps")),
        *(("pretrain", option) for option in ("learning_rate", "crop_size", "patch_size")),
        *((command, "crop_size") for command in ("evaluate", "predict", "demo")),
        ("finetune", "lora_rank"),
        ("finetune", "lora_alpha"),
        ("evaluate", "eval_short_side"),
        ("evaluate", "num_shown"),
        ("prepare", "tile_size"),
        ("convert", "num_attention_heads"),
        ("convert", "decoder_pool_size"),
    ],
)
def test_zero_is_refused_where_it_has_no_meaning(command, option, paths):
    refused(paths, command, f"--{option}", 0, expected=f"--{option} is 0")


@pytest.mark.parametrize("command", ["train", "finetune"])
@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((1, 2), "has 2 weights for 6 classes: "),
        ((1, 2, 3, 4, 5, "nan"), "is 1 2 3 4 5 nan; expected finite numbers"),
        ((1, 2, 3, 4, 5, "inf"), "is 1 2 3 4 5 inf; expected finite numbers"),
        ((1, 2, 3, 4, 5, -4), "is 1 2 3 4 5 -4; expected finite numbers of at least 0"),
        ((0, 0, 0, 0, 0, 0), "is 0 0 0 0 0 0; expected"),
        ((1, 2, 3, 4, 5, "balanced"), "could not convert string to float: 'balanced'"),
    ],
)
def test_class_weights_that_cannot_be_used_are_refused(command, weights, expected, paths):
    refused(paths, command, "--class_weights", *weights, expected=("--class_weights", expected, "one number per"))


@pytest.mark.parametrize("targets", ["[", "no_such_layer", "mlp", ""])
def test_lora_targets_that_match_no_layer_name_the_layers(targets, paths):
    layers = "q_proj"
    refused(paths, "finetune", "--lora_targets", targets, expected=("--lora_targets", f"'{targets}'", layers))


@pytest.mark.parametrize("command", ["train", "finetune"])
@pytest.mark.parametrize("name", ["nope", "last", "{base}", "{image}", "step-7", ""])
def test_checkpoints_that_do_not_exist_are_refused(command, name, paths):
    refused(paths, command, "--resume_from_checkpoint", name, expected=("checkpoint", "{out}/checkpoints"))


OUTPUTS = {
    "predict scene": "--output",
    "push --space_dir": "--space_dir",
    **dict.fromkeys(("train", "finetune", "evaluate", "predict", "prepare", "convert", "pretrain"), "--output_dir"),
}


@pytest.mark.parametrize("command", fast_for("evaluate", OUTPUTS))
@pytest.mark.parametrize("out", ["{image}", "{image}/run", "/proc/run", "a\0b"])
def test_outputs_that_cannot_be_written_are_refused(command, out, paths):
    refused(paths, command, OUTPUTS[command], out, expected=OUTPUTS[command] if "\0" in out else out)


@pytest.mark.parametrize("command", sorted(OUTPUTS.keys() - {"predict scene"}))
def test_outputs_with_other_files_are_refused(command, paths):
    refused(paths, command, OUTPUTS[command], "{data}", expected="'{data}' already exists")


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def replace(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content)


def truncate(folder: Path):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(folder: Path):
    shutil.rmtree(folder)
    folder.mkdir()


def become_a_file(folder: Path):
    shutil.rmtree(folder)
    folder.write_bytes(BINARY)


def change_config(**changes) -> Callable[[Path], None]:
    def change(folder: Path):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")

    return change


# What happened to a model's folder -> how to do it, and the text that the message has.
DAMAGES = {
    "no config": (remove("config.json"), "config.json"),
    "no weights": (remove("model.safetensors"), "model.safetensors"),
    "truncated weights": (truncate, "model.safetensors"),
    "binary weights": (replace("model.safetensors", BINARY), "model.safetensors"),
    "empty weights": (replace("model.safetensors", b""), "model.safetensors"),
    "binary config": (replace("config.json", BINARY), "config.json"),
    "truncated config": (replace("config.json", b'{"model_type": "co2'), "config.json"),
    "a list as config": (replace("config.json", b"[1, 2]"), "config.json"),
    "an empty config": (replace("config.json", b"{}"), "config.json"),
    "another model type": (change_config(model_type="bert"), "bert"),
    "wrong types": (change_config(clip_config=3, id2label="x"), "config"),
    "an empty folder": (empty, "config.json"),
    "a file": (become_a_file, "{base}"),
    "no folder": (shutil.rmtree, "{base}"),
}
OF_MODELS = ("finetune", "evaluate", "predict", "predict scene", "push", "convert", "demo")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", fast_for("evaluate", OF_MODELS))
def test_broken_models_are_refused_with_the_name_of_the_file(command, damage, paths):
    break_model, expected = DAMAGES[damage]
    break_model(paths["base"])
    refused(paths, command, expected=(expected, "{base}"))


@pytest.mark.parametrize("damage", ["binary", "truncated", "missing"])
@pytest.mark.parametrize("command", ["finetune", "evaluate", "predict", "demo"])
def test_broken_image_processors_are_refused_with_the_name_of_the_file(command, damage, paths):
    path = paths["base"] / "preprocessor_config.json"
    path.unlink() if damage == "missing" else path.write_bytes({"binary": BINARY, "truncated": b'{"a'}[damage])
    refused(paths, command, expected=("preprocessor_config.json", "{base}"))


@pytest.mark.parametrize("command", [name for name in OF_MODELS if name not in ("convert", "push")])
def test_a_missing_folder_is_not_taken_for_a_name_on_the_hub(command, paths, hub):
    message = refused(paths, command, "--checkpoint", "/nope/model", expected="/nope/model")
    assert "Repo id" not in message and "does not exist" in message
    assert not hub.requests


@pytest.mark.parametrize(
    "words", [("--hub_model_id", "user/name"), ("--space", "user/demo"), ("--space_dir", "{out}")]
)
def test_a_missing_model_is_not_published(words, paths, hub):
    """A Space of a model that does not exist would fail on the Hub, where nobody sees why."""
    words = ("push", "--checkpoint", "/nope/model", *(word.format(**paths) for word in words))
    run = run_command(*words)
    assert run.returncode in (1, 2) and run.stderr.count("error: ") == 1
    assert "'/nope/model'" in run.stderr and "does not exist" in run.stderr and "Repo id" not in run.stderr
    assert not hub.requests and not paths["out"].exists()


@pytest.mark.parametrize("command", ["train", "pretrain"])
def test_a_folder_that_another_run_writes_into_is_refused(command, paths):
    from co2s_hf.utils.files import locked_folder

    with locked_folder(paths["out"]):
        refused(paths, command, expected="Another run writes into '{out}'. Wait until it has ended")
    assert run_command(*(str(word).format(**paths) for word in WORDS[command])).returncode == 0


@pytest.mark.parametrize("damage", ["not finite", "truncated", "no weights", "wrong patches"])
def test_damaged_backbones_to_start_from_are_named(damage, paths, backbones):
    folder = paths["out"].parent / "backbone"
    shutil.copytree(backbones[1], folder)
    weights = folder / "model.safetensors"
    if damage == "not finite":
        tensors = load_file(weights)
        tensors["norm.weight"][0] = float("nan")
        save_file(tensors, weights, {"format": "pt"})
    elif damage == "wrong patches":
        change_config(patch_size=0)(folder)
    elif damage == "truncated":
        truncate(folder)
    else:
        weights.unlink()
    sizes = ("--tile_size", 32, "--crop_size", 32, "--per_device_train_batch_size", 2, "--max_train_steps", 2)
    words = ("pretrain", "dinov3", "--images", paths["data"] / "images", *sizes, "--output_dir", paths["out"])
    run = run_command(*words, "--init", folder)
    assert run.returncode == 1 and run.stderr.count("error: ") == 1
    assert f"--init {folder}" in run.stderr.replace("--init is", "--init") and "learning_rate" not in run.stderr
    assert not paths["out"].exists()


@pytest.mark.parametrize("option", ["--clip_model", "--dinov3_model"])
def test_missing_and_unsuitable_backbones_are_named(option, paths, backbones):
    words = [word for word in WORDS["train"] if word != "--from_scratch"]
    both = dict(zip(("--clip_model", "--dinov3_model"), backbones))
    for name in ("/nope/model", paths["base"], paths["data"], paths["image"]):
        before = files_below(paths["out"].parent)
        given = [word for pair in (both | {option: name}).items() for word in pair]
        run = run_command(*(str(word).format(**paths) for word in (*words, *given)))
        assert run.returncode == 1 and run.stderr.count("error: ") == 1, run  # after a progress bar
        assert option in run.stderr and str(name) in run.stderr and "Repo id" not in run.stderr
        assert files_below(paths["out"].parent) == before


@pytest.mark.parametrize("name", ["labeled.txt", "unlabeled.txt", "val.txt"])
@pytest.mark.parametrize("command", ["train", "finetune", "prepare"])
def test_binary_lists_are_named(command, name, paths):
    (paths["data"] / "splits" / name).write_bytes(BINARY)
    refused(paths, command, expected=f"{{data}}/splits/{name}")


@pytest.mark.parametrize("content", [BINARY, b"[", b"3", b'{"classes": 3}'])
@pytest.mark.parametrize("command", ["train", "finetune", "evaluate", "prepare"])
def test_damaged_classes_are_named(command, content, paths):
    (paths["data"] / "classes.json").write_bytes(content)
    refused(paths, command, expected="{data}/classes.json")


@pytest.mark.parametrize("command", ["train", "finetune", "evaluate", "prepare"])
@pytest.mark.parametrize("option", ["--class_names", "--label_colors"])
def test_binary_files_of_classes_are_named(command, option, paths):
    refused(paths, command, option, "{image}", expected="{image}")


def test_a_binary_list_of_excluded_images_is_named(paths):
    refused(paths, "pretrain", "--exclude", "{image}", expected=("--exclude", "{image}"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (BINARY, "cannot be read"),
        (b"\xff\xfe" + "seed: 1".encode("utf-16-le"), "cannot be read"),
        (b"seed: \x00", "cannot be read"),
        (b"seed: 1\nseed: 2", "'seed'"),
        (b"no_such_option: 1", "'no_such_option'"),
        (b"1: 2", "'1'"),
        (b"[a]: 2", "cannot be read"),
        (b"? {a: b}\n: 2", "cannot be read"),
        (b"&a [*a]", "cannot be read"),
        (b"- 1", "no options"),
        (b"", "no options"),
        (b"[" * 5000, "cannot be read"),
    ],
)
@pytest.mark.parametrize("command", fast_for("train", COMMANDS))
def test_broken_files_of_options_are_named(command, content, expected, paths):
    (paths["out"].parent / "run.yaml").write_bytes(content)
    refused(paths, command, "--config", "run.yaml", expected=expected)


@pytest.mark.parametrize("content", [b'{"seed": 1, "seed": 2}', BINARY, b"{", b"[1]", b'{"seed": NaN}'])
def test_broken_json_files_of_options_are_named(content, paths):
    (paths["out"].parent / "run.json").write_bytes(content)
    refused(paths, "train", "--config", "run.json", expected="run.json" if b"NaN" not in content else "nan")


@pytest.mark.parametrize("name", ["{data}", "/proc/self/mem", "/nope.yaml", "whdl"])
def test_files_of_options_that_do_not_exist_are_named(name, paths):
    refused(paths, "train", "--config", name, expected=name)


@pytest.mark.parametrize("command", fast_for("prepare", COMMANDS))
def test_misspelt_options_are_answered_with_the_right_one(command, paths):
    words = COMMANDS[command]
    for group in words.groups:
        for name in group.flags:
            wrong = f"--{name[:-1]}" if name != "data" else "--dtaa"
            if any(wrong == f"--{other}" for one in words.groups for other in one.flags):
                continue
            for text in (f"{wrong}=3", f"--{name.replace('_', '-')}=3", f"-{name}=3"):
                if text != f"--{name}=3" and not text.startswith("-h"):  # -h is --help
                    message = refused(paths, command, text, expected=text)
                    assert "did you mean --" in message


@pytest.mark.parametrize(("word", "meant"), [("trian", "train"), ("finetun", "finetune"), ("Predict", "predict")])
def test_misspelt_commands_are_answered_with_the_right_one(word, meant):
    run = run_command(word)
    assert run.returncode == 1
    assert run.stderr.endswith(f"\nerror: there is no command '{word}'; did you mean '{meant}'?\n")


@pytest.mark.parametrize("command", ["train", "finetune"])
def test_ctrl_c_ends_with_the_command_to_go_on(command, paths, monkeypatch):
    """The command that is printed continues the run from its checkpoint, to the end."""
    words = [str(word).format(**paths) for word in (*WORDS[command], "--checkpointing_steps", 1, "--card_samples", 0)]
    step = loop.training_step

    def interrupted(run, batch, index):
        if index == 1:
            raise KeyboardInterrupt
        return step(run, batch, index)

    monkeypatch.setattr(loop, "training_step", interrupted)
    run = run_command(*words)
    assert run.returncode == 130
    assert run.stderr.splitlines()[-1] == (
        f"Interrupted. Continue with: co2s {shlex.join(words)} --resume_from_checkpoint last"
    )
    monkeypatch.setattr(loop, "training_step", step)
    again = run_command(*shlex.split(run.stderr.splitlines()[-1].partition("co2s ")[2]))
    assert again.returncode == 0 and "Resumed after step 1 " in again.stdout, again.stderr


def test_ctrl_c_before_the_first_checkpoint_starts_again(paths, monkeypatch):
    words = [str(word).format(**paths) for word in WORDS["train"]]

    def interrupted(run, batch, index):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "training_step", interrupted)
    for given in (words, [*words, "--overwrite_output_dir"]):
        run = run_command(*given)
        assert run.returncode == 130 and "Traceback" not in run.stderr
        assert run.stderr.splitlines()[-1] == (
            "Interrupted. There is no checkpoint yet. Start again with: co2s "
            f"{shlex.join(words)} --overwrite_output_dir"
        )


def test_ctrl_c_ends_other_commands_with_one_line(paths, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("co2s_hf.inference.images.load_for_prediction", interrupted)
    run = run_command(*(str(word).format(**paths) for word in WORDS["evaluate"]))
    assert run.returncode == 130 and run.stderr.endswith("\nInterrupted. Run the same command again.\n")
