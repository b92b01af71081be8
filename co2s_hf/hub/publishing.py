"""Publish on the Hub: first create the repository, later upload the files of a model or Space in one commit."""

import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from httpx2 import HTTPError  # huggingface_hub raises it when there is no connection
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RemoteEntryNotFoundError,
)

from ..model.adapters_co2s import PEFT_CONFIG_FILE
from ..training.evaluation import Evaluation
from ..utils.errors import UserError, UserFileNotFoundError, UserOSError, UserValueError
from ..utils.files import recover, write_text
from .cards import MODEL_PATH, figure_path, is_hub_name, load_card, read_json, with_evaluation


if TYPE_CHECKING:
    from datasets import DatasetDict

CARD = "README.md"
PICTURE_FOLDERS = ("figures/", "samples/")
# Requirements of handler.py. Inference Endpoints install them in addition to their own libraries.
HANDLER_REQUIREMENTS = "transformers>=5.23,<6\npillow\n"


class PublishError(UserOSError):
    """The Hub could not be reached, refused the request, or was interrupted. The upload changes no local file."""


def claim_repository(
    name: str, private: bool = False, revision: str | None = None, kind: str = "model", sdk: str | None = None
) -> str:
    """Create a repository, or check that it exists and may be written to.

    Call this before expensive work, so that a missing permission is found early.

    Args:
        name: Name such as user/name. A name without "/" belongs to the user who is logged in.
        private: Create the repository as private; refuse an existing public one.
        revision: Branch to create if the repository does not have it.
        kind: "model", "dataset" or "space".
        sdk: SDK of a space, such as "gradio".

    Returns:
        The full name.

    Raises:
        PublishError: Nobody is logged in, the token may not write, the name is not valid, or there is no connection.
        UserValueError: `private` is True, but the repository exists and is public.
    """
    api = HfApi()
    with _publish_errors(f"The repository {name} cannot be written to", "Then start again; no file was uploaded."):
        # None leaves the choice to the Hub: the default of an organisation may be private.
        name = api.create_repo(name, private=private or None, repo_type=kind, space_sdk=sdk, exist_ok=True).repo_id
        if private and not api.repo_info(name, repo_type=kind).private:
            raise UserValueError(
                f"The repository {name} exists and is public, but a private one was requested. Make it private in its "
                "settings on the Hub, or choose another name."
            )
        if revision is not None:
            api.create_branch(name, branch=revision, repo_type=kind, exist_ok=True)
    return name


def find_branch(name: str, revision: str | None) -> str | None:
    """Return a branch of a model on the Hub if it exists.

    Args:
        name: Repository of the model.
        revision: Branch, tag or commit. None: main.

    Returns:
        `revision`, or None (main) if the repository has no such branch, or does not exist.

    Raises:
        PublishError: The Hub cannot be reached.
    """
    with _publish_errors(f"Cannot check whether {name} has a branch {revision}", "Then start again."):
        return revision if revision is not None and HfApi().revision_exists(name, revision) else None


def check_publishable(folder: str | Path):
    """Check that a folder contains a model that can be loaded after it is published.

    Raises:
        UserFileNotFoundError: The folder does not exist.
        UserValueError: The folder contains no model, or it contains an adapter of a base that is not on the Hub.
        PublishError: The Hub cannot be reached.
    """
    folder = Path(folder)
    recover(folder)
    if (folder / PEFT_CONFIG_FILE).exists():
        base = read_json(folder / PEFT_CONFIG_FILE).get("base_model_name_or_path")
        with _publish_errors(f"Cannot check whether {base} is on the Hub", "Then start again."):
            is_published = is_hub_name(base or "") and HfApi().repo_exists(base)
        if not is_published:
            raise UserValueError(
                f"The adapter '{folder}' needs its base model '{base}', which is not on the Hub. Publish the base "
                f"model first. Then write its name on the Hub into {folder / PEFT_CONFIG_FILE}, as "
                "base_model_name_or_path."
            )
    elif not folder.exists():
        raise UserFileNotFoundError(f"'{folder}' does not exist. Give the folder of a trained model.")
    elif not (folder / "config.json").exists():
        raise UserValueError(
            f"'{folder}' is not the folder of a model: it has neither config.json nor {PEFT_CONFIG_FILE}. Give the "
            "folder of a trained model."
        )


def publish(
    folder: str | Path, name: str, revision: str | None = None, kind: str = "model", retry: str | None = None
) -> str:
    """Upload the files of a folder in one commit. The folder itself does not change.

    Pictures from an earlier upload that the folder no longer has are removed from the repository.

    Args:
        folder: Folder to publish. Hidden files and folders are left out.
        name: Repository; call [`claim_repository`] first.
        revision: Branch. None: main.
        kind: "model" or "space".
        retry: Last sentence of the error message: how to try again. None: the `co2s push` command.

    Returns:
        The address of the repository.

    Raises:
        PublishError: The upload was refused or interrupted. The repository has not changed.
    """
    folder = Path(folder)
    paths = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    contents: dict[str, Path | bytes] = {
        place.as_posix(): path
        for place, path in paths.items()
        if not any(part.startswith(".") for part in place.parts)
    }
    if CARD in contents:  # when the card was written, the name on the Hub was not known
        contents[CARD] = contents[CARD].read_text(encoding="utf-8").replace(MODEL_PATH, name).encode()
    if retry is None:
        words = ["co2s", "push", "--checkpoint", str(folder), "--hub_model_id", name]
        words += ["--hub_revision", revision] if revision else []
        retry = f"The files in {folder} are complete; retry with: {shlex.join(words)}"
    with _publish_errors(f"{name} was not published", retry):
        published = HfApi().list_repo_files(name, revision=revision, repo_type=kind)
        stale = [place for place in published if place.startswith(PICTURE_FOLDERS) and place not in contents]
        return _commit(contents, name, "Upload with co2s_hf", revision, kind, stale=stale)


def publish_data_set(splits: "DatasetDict", name: str, classes: Path, private: bool, retry: str):
    """Upload a data set and the file with its classes.

    Args:
        splits: The data set.
        name: Repository; call [`claim_repository`] first.
        classes: The file with the classes.
        private: If the repository was removed in the meantime, create it as private again.
        retry: Last sentence of the error message: how to try again.

    Raises:
        PublishError: The upload was refused or interrupted. The repository may have a part of the files.
    """
    with _publish_errors(f"{name} was not published completely", retry):
        splits.push_to_hub(name, private=private or None)
        HfApi().upload_file(path_or_fileobj=classes, path_in_repo=classes.name, repo_id=name, repo_type="dataset")


def publish_evaluation(name: str, evaluation: Evaluation, picture: Path, revision: str | None = None) -> str:
    """Add evaluation results to the card of a published model.

    Args:
        name: Repository of the model; call [`claim_repository`] first.
        evaluation: Results to add.
        picture: Figure of the confusion matrix, to upload with the results.
        revision: Branch. None: main.

    Returns:
        The address of the repository.

    Raises:
        PublishError: The request was refused or interrupted. The published card has not changed.
    """
    remedy = "The results on this machine are complete; run the evaluation again to publish them."
    with _publish_errors(f"The card of {name} was not changed", remedy):
        # With this parent, the Hub refuses the commit if the repository has changed in the meantime.
        parent = HfApi().repo_info(name, revision=revision).sha
        try:
            card = load_card(hf_hub_download(name, CARD, revision=parent))
        except RemoteEntryNotFoundError:  # its base class also stands for a missing connection
            card = ModelCard(f"# {name}\n")
        place = figure_path(evaluation)
        card = with_evaluation(card, evaluation, place)
        contents = {CARD: str(card).encode(), place: picture}
        return _commit(contents, name, f"Add results on {evaluation.data}", revision, parent=parent)


def add_handler(folder: str | Path):
    """Add handler.py and requirements.txt, which Inference Endpoints use, to a model's folder."""
    folder = Path(folder)
    shutil.copyfile(Path(__file__).parents[1] / "model" / "handler.py", folder / "handler.py")
    is_adapter = (folder / PEFT_CONFIG_FILE).exists()
    write_text(folder / "requirements.txt", HANDLER_REQUIREMENTS + ("peft>=0.21\n" if is_adapter else ""))


def _commit(
    contents: dict[str, Path | bytes],
    name: str,
    message: str,
    revision: str | None,
    kind: str = "model",
    parent: str | None = None,
    stale: Sequence[str] = (),
) -> str:
    """Add files and remove the stale ones, in one commit; return the address of the repository."""
    operations = [CommitOperationAdd(place, content) for place, content in contents.items()]
    operations += [CommitOperationDelete(place) for place in stale]
    info = HfApi().create_commit(
        name, operations, commit_message=message, revision=revision, repo_type=kind, parent_commit=parent
    )
    return str(info.repo_url)


@contextmanager
def _publish_errors(problem: str, remedy: str) -> Iterator[None]:
    """Turn errors of huggingface_hub into a [`PublishError`] with the problem, the reason and the remedy."""
    try:
        yield
    except KeyboardInterrupt:
        raise PublishError(f"{problem}: interrupted. {remedy}") from None
    except UserError:
        raise
    except (OSError, HTTPError, ValueError, RuntimeError) as error:  # HFValidationError is a ValueError
        # If the transfer of a file fails, the cause of these two errors is the real error.
        cause = (isinstance(error, (RuntimeError, LocalEntryNotFoundError)) and error.__cause__) or error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status in (401, 403) or isinstance(cause, LocalTokenNotFoundError):
            remedy = f"Log in with a token that may write to it (`hf auth login`). {remedy}"
        elif isinstance(cause, HFValidationError):
            remedy = f"Give a name such as user/name. {remedy}"
        elif status is None and isinstance(cause, HTTPError):
            remedy = f"Check the network connection. {remedy}"
        reason = str(cause).strip().splitlines() or [type(cause).__name__]
        raise PublishError(f"{problem}: {reason[0]} {remedy}") from error


__all__ = [
    "PublishError",
    "add_handler",
    "check_publishable",
    "claim_repository",
    "find_branch",
    "publish",
    "publish_data_set",
    "publish_evaluation",
]
