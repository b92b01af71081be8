"""`co2s push`: models, their cards and handlers, and Spaces."""

import shlex
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from helpers import EXAMPLES, run_command, save_checkpoint

from co2s_hf.hub.cards import write_card
from co2s_hf.hub.spaces import APP


PACKAGE = EXAMPLES.parent / "co2s_hf"


@pytest.fixture
def folder(tmp_path):
    save_checkpoint(tmp_path / "model", crop_size=16)
    write_card(tmp_path / "model")
    return tmp_path / "model"


def contents(folder: Path) -> dict[str, bytes]:
    """Read every file in a folder: path -> content."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def published(hub, name: str, branch: str = "main", kind: str = "model") -> dict[str, bytes]:
    """Read every file in a repository: path -> content."""
    repository = hub.repositories[kind, name]
    return {path: blob.data for path, blob in repository.trees[repository.refs[branch]].items()}


def test_a_model_is_published_as_it_is(hub, folder):
    before = contents(folder)
    done = run_command("push", "--checkpoint", folder, "--hub_model_id", "user/fields", "--hub_private_repo")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"Published {folder}: {hub.url}/user/fields\n" and contents(folder) == before
    found = published(hub, "user/fields")
    assert hub.repositories["model", "user/fields"].private
    assert found.keys() == before.keys() | {".gitattributes"}
    assert {name for name in before if found[name] != before[name]} == {"README.md"}
    assert b'model="user/fields"' in found["README.md"]  # the card has the name on the Hub


def test_a_branch_of_its_own(hub, folder):
    done = run_command("push", "--checkpoint", folder, "--hub_model_id", "user/fields", "--hub_revision", "v1")
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in published(hub, "user/fields", "v1")
    assert "model.safetensors" not in published(hub, "user/fields")


def test_a_missing_card_and_the_handler_are_written(hub, folder):
    (folder / "README.md").unlink()
    done = run_command("push", "--checkpoint", folder, "--hub_model_id", "user/fields", "--handler")
    assert done.returncode == 0, done.stderr
    found = published(hub, "user/fields")
    assert found["handler.py"] == (PACKAGE / "model" / "handler.py").read_bytes()
    assert found["requirements.txt"] == b"transformers>=5.23,<6\npillow\n" and b"user/fields" in found["README.md"]
    assert {"README.md", "handler.py", "requirements.txt"} <= set(contents(folder))


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--checkpoint", "nowhere"), 2, "Name the repository: --hub_model_id user/name."),
        (
            ("--space", "user/demo", "--checkpoint", "here"),
            2,
            "A Space needs a published model, but 'here' is a local",
        ),
        (("--space", "user/demo", "--space_dir", "there"), 2, "Give either --space or --space_dir."),
        (("--space", "user/demo", "--handler"), 2, "--handler, --hub_model_id and --hub_revision are for models."),
        (("--space", "user/demo", "--hub_revision", "v1"), 2, "are for models. A Space runs its main branch."),
        (("--space_dir", "there", "--hub_model_id", "user/x"), 2, "are for models. A Space runs its main branch."),
        (("--checkpoint", "nowhere", "--hub_model_id", "user/x"), 1, "'nowhere' does not exist"),
        (
            ("--checkpoint", "here", "--hub_model_id", "user/x"),
            1,
            "'here' is not the folder of a model: it has neither",
        ),
        (
            ("--checkpoint", "user/fields", "--space_dir", "here"),
            1,
            "'here' already exists and is not an empty folder",
        ),
    ],
)
def test_wrong_words_publish_and_write_nothing(words, code, message, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "notes.txt").write_text("mine", encoding="utf-8")
    done = run_command("push", *words)
    assert (done.returncode, done.stdout) == (code, "") and message in done.stderr
    assert not hub.repositories and contents(tmp_path) == {"here/notes.txt": b"mine"}


def test_a_refused_upload_is_an_error_with_the_command_to_retry(hub, folder):
    hub.failures["/commit/"] = 403
    words = ("--checkpoint", folder, "--hub_model_id", "user/fields", "--hub_revision", "v1")
    done = run_command("push", *words)
    assert done.returncode == 1 and "error: user/fields was not published: " in done.stderr
    command = shlex.split(done.stderr.split("retry with: co2s ")[1])
    assert command == ["push", *map(str, words)] and "hf_local" not in done.stderr
    hub.failures.clear()
    assert run_command(*command).returncode == 0 and "config.json" in published(hub, "user/fields", "v1")


def check_space(files: dict[str, bytes], checkpoint: str):
    """Compare the files of a Space with the package, and its metadata with the installed versions."""
    assert files["app.py"].decode() == APP and yaml.safe_load(files["app.yaml"]) == {"checkpoint": checkpoint}
    copied = {name.removeprefix("co2s_hf/"): data for name, data in files.items() if name.startswith("co2s_hf/")}
    ours = {name: data for name, data in contents(PACKAGE).items() if "__pycache__" not in name}
    ours = {name: data for name, data in ours.items() if not name.startswith("assets/")}
    assert copied == ours and "model/modeling_co2s.py" in ours
    assert not [name for name in files if "__pycache__" in name]
    lines = files["requirements.txt"].decode().splitlines()
    pins = dict(line.split("==") for line in lines)
    assert pins["transformers"] == version("transformers") and "+" not in pins["torch"]
    assert {"numpy", "pyyaml", "peft"} <= set(pins)
    assert "gradio" not in pins  # the Space installs it: sdk_version
    metadata = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert metadata["python_version"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert (metadata["sdk"], metadata["sdk_version"]) == ("gradio", version("gradio"))
    assert metadata["app_file"] == "app.py"
    assert metadata.get("models") == (None if Path(checkpoint).exists() else [checkpoint])
    assert len(metadata["short_description"]) <= 60  # the Hub's limit


def test_a_space_has_the_page_and_all_that_it_imports(hub):
    done = run_command("push", "--checkpoint", "user/fields", "--space", "user/demo", "--hub_private_repo")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"Published the demo: {hub.url}/spaces/user/demo\n"
    assert hub.repositories["space", "user/demo"].private and ("model", "user/fields") not in hub.repositories
    found = published(hub, "user/demo", kind="space")
    del found[".gitattributes"]
    check_space(found, "user/fields")


def test_a_space_can_be_written_into_a_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run_command("push", "--checkpoint", "model", "--space_dir", "space")
    assert (done.returncode, done.stdout) == (0, "Wrote space; try it with: python space/app.py\n"), done.stderr
    check_space(contents(tmp_path / "space"), str(folder))  # a local model has its absolute path
    shutil.rmtree("space")
    assert run_command("push", "--checkpoint", "user/fields", "--space_dir", "space").returncode == 0
    check_space(contents(tmp_path / "space"), "user/fields")


@pytest.mark.parametrize(("kind", "flag"), [("space", "--space"), ("model", "--hub_model_id")])
def test_a_public_repository_is_refused_if_a_private_one_was_requested(kind, flag, hub, folder):
    repository = hub.create(kind, "user/open")
    hub.create("model", "user/fields")
    checkpoint = folder if kind == "model" else "user/fields"
    done = run_command("push", "--checkpoint", checkpoint, flag, "user/open", "--hub_private_repo")
    assert done.returncode == 1 and "user/open exists and is public, but a private one was requested" in done.stderr
    assert len(repository.trees) == 1 and not repository.private


def test_a_refused_space_is_an_error_with_the_remedy(hub):
    hub.failures["/commit/"] = 403
    done = run_command("push", "--checkpoint", "user/fields", "--space", "user/demo")
    assert done.returncode == 1 and "user/demo was not published" in done.stderr
    assert done.stderr.endswith("Run the same command again.\n") and "hf auth login" in done.stderr
