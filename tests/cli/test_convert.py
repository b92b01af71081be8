"""`co2s convert`: the authors' checkpoints become a model, and a model becomes checkpoints again."""

import pytest
import torch
from helpers import run_command
from local_hub import Blob

from co2s_hf import Co2SForSemanticSegmentation, Co2SImageProcessor
from co2s_hf.hub.convert_co2s_to_hf import CHECKPOINT_NAMES, load_original


@pytest.fixture
def sizes(parity_sizes) -> tuple:
    """The flags with the sizes of the small checkpoints of the tests."""
    return tuple(word for name, value in parity_sizes.items() for word in (f"--{name}", value))


@pytest.fixture
def files(original_checkpoints) -> tuple:
    return (
        "--clip_checkpoint", original_checkpoints["clip"], "--dinov3_checkpoint", original_checkpoints["dinov3"],
    )  # fmt: skip


def assert_same_weights(folder, other):
    ours = Co2SForSemanticSegmentation.from_pretrained(folder).state_dict()
    theirs = Co2SForSemanticSegmentation.from_pretrained(other).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_local_files_are_converted_and_verified(files, sizes, converted_folder, tmp_path):
    output = tmp_path / "model"
    done = run_command("convert", *files, "--dataset", "whdld", "--output_dir", output, "--verify", *sizes)
    assert done.returncode == 0, done.stderr
    assert f"Wrote {output}. Load it with Co2SForSemanticSegmentation.from_pretrained('{output}').\n" in done.stdout
    assert "Verified: 465 tensors reload bit-equal to the authors' files.\n" in done.stdout
    config = Co2SForSemanticSegmentation.from_pretrained(output).config
    assert list(config.id2label.values()) == ["building", "road", "pavement", "vegetation", "bare soil", "water"]
    assert Co2SImageProcessor.from_pretrained(output).do_resize is False
    assert_same_weights(output, converted_folder)
    assert (output / "config.json").read_text("utf-8") == (converted_folder / "config.json").read_text("utf-8")


def test_checkpoints_come_from_a_folder_on_the_hub(hub, original_checkpoints, sizes, converted_folder, tmp_path):
    paths = {f"WHDLD/1_24/{path.name}": path.read_bytes() for path in original_checkpoints.values()}
    repository = hub.create("model", "someone/models")
    repository.commit("main", {path: Blob(data, is_large=True) for path, data in paths.items()}, "checkpoints")
    words = ("--hub_repo", "someone/models", "--hub_folder", "WHDLD/1_24", "--dataset", "whdld", "--verify")
    done = run_command("convert", *words, "--output_dir", tmp_path / "model", *sizes)
    assert done.returncode == 0, done.stderr
    assert "Verified: 465 tensors" in done.stdout
    assert_same_weights(tmp_path / "model", converted_folder)


def test_a_model_is_converted_back(converted_folder, original_checkpoints, tmp_path):
    done = run_command("convert", "--to_original", converted_folder, "--output_dir", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"Wrote best_clip.pth and best_dinov3.pth to {tmp_path / 'back'}.\n"
    for student, name in CHECKPOINT_NAMES.items():
        ours, theirs = (
            load_original(path, student) for path in (tmp_path / "back" / name, original_checkpoints[student])
        )
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            if key.endswith("attn.qkv.bias"):  # the authors' code masks out key biases; they come back as zeros
                tensor = tensor * theirs[key + "_mask"]
            assert torch.equal(ours[key], tensor), key


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "Name a new folder for the result: --output_dir."),
        (("--output_dir", "new"), "Name the benchmark that the checkpoints were trained on: --dataset."),
        (("--output_dir", "new", "--dataset", "moon"), "argument --dataset: invalid choice: 'moon' (choose from "),
        (
            ("--output_dir", "new", "--dataset", "gid"),
            "Give both --clip_checkpoint and --dinov3_checkpoint, or --hub_repo.",
        ),
        (
            ("--output_dir", "new", "--dataset", "gid", "--clip_checkpoint", "a"),
            "Give both --clip_checkpoint and --dinov3_checkpoint, or --hub_repo.",
        ),
        (("--output_dir", "new", "--to_original", "a", "--verify"), "--to_original goes with --output_dir alone."),
        (
            ("--output_dir", "new", "--to_original", "a", "--hub_repo", "b"),
            "--to_original goes with --output_dir alone.",
        ),
        (
            ("--output_dir", "new", "--decoder_pool_size", "big"),
            "argument --decoder_pool_size: invalid int value: 'big'",
        ),
    ],
)
def test_wrong_words_write_nothing(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run_command("convert", *words)
    assert (done.returncode, done.stdout) == (2, "") and message in done.stderr
    assert not any(tmp_path.iterdir())


def test_files_that_do_not_fit_write_nothing(files, sizes, converted_folder, tmp_path, hub):
    words = ("--dataset", "whdld", "--output_dir", tmp_path / "new", *sizes)
    exchanged = ("--clip_checkpoint", files[3], "--dinov3_checkpoint", files[1])
    cases = [
        ((*files[:3], tmp_path / "no.pth", *words), f"'{tmp_path / 'no.pth'}' is not a file. Expected the authors'"),
        ((*exchanged, *words), "The clip checkpoint has no 'backbone.patch_embed.projection.weight'"),
        ((*files, *words[:2], "--output_dir", converted_folder, *sizes), "already exists and is not an empty folder"),
        (
            ("--to_original", tmp_path / "no", "--output_dir", tmp_path / "new"),
            f"'{tmp_path / 'no'}' cannot be loaded; expected",
        ),
        (("--hub_repo", "someone/nothing", *words), "of the repository 'someone/nothing' could not be downloaded"),
    ]
    before = sorted(converted_folder.iterdir())
    for case, message in cases:
        done = run_command("convert", *case)
        assert done.returncode == 1 and message in done.stderr, (message, done)
        assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
        assert not any(tmp_path.iterdir()) and sorted(converted_folder.iterdir()) == before
