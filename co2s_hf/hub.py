"""Publishing on the Hub: a repository is claimed before the work, and all files arrive in one commit, or none."""

import json
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from httpx2 import HTTPError  # what huggingface_hub lets through where nobody answers
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalTokenNotFoundError

from .adapters_co2s import PEFT_CONFIG_FILE
from .arguments import setting
from .files import write_text
from .model_card import MODEL_PATH, figure_place, is_hub_name, with_evaluation, without_secrets


CARD = "README.md"
PICTURE_FOLDERS = ("figures/", "samples/")
# What Inference Endpoints lack to run handler.py.
HANDLER_REQUIREMENTS = "transformers>=5.23,<6\npillow\n"


@dataclass
class HubTarget:
    """A repository to publish in; named as in transformers' TrainingArguments."""

    hub_model_id: str | None = setting(None, "Name of the repository, as user/name.")
    hub_private_repo: bool = setting(False, "Make the repository private, if it is new; refuse a public one.")
    hub_revision: str | None = setting(None, "Branch to publish on, made if it is new. Left out: main.")


@dataclass
class HubArguments(HubTarget):
    """Whether and where a script publishes what it made."""

    push_to_hub: bool = setting(False, "Publish the model with its card on the Hub (`hf auth login` first).")

    def check_hub(self):
        """Refuse settings that would have no effect, or none that would be needed."""
        if self.push_to_hub and self.hub_model_id is None:
            raise ValueError("--push_to_hub needs a name for the repository: --hub_model_id user/name.")
        if not self.push_to_hub and (self.hub_model_id or self.hub_private_repo or self.hub_revision):
            raise ValueError("--hub_model_id, --hub_private_repo and --hub_revision go with --push_to_hub.")


class PublishError(OSError):
    """The Hub could not be reached or refused; nothing local changed."""


def claim_repository(
    name: str, private: bool = False, revision: str | None = None, kind: str = "model", sdk: str | None = None
) -> str:
    """Make sure of a repository that may be written to, before anything expensive starts.

    Args:
        name: As user/name; a bare name is in the namespace of who is logged in.
        private: Make it private, if it is new.
        revision: Branch to make there, if it is new.
        kind: "model" or "space".
        sdk: Of a space.

    Returns:
        The full name.

    Raises:
        PublishError: Nobody is logged in, the token may not write, or the Hub cannot be reached.
        ValueError: The repository should be private, but exists and is public.
    """
    api = HfApi()
    with _explained(f"The repository {name} cannot be written to", "Then start again; nothing was done yet."):
        # Without a wish it is left to the Hub: an organisation may make everything private.
        name = api.create_repo(name, private=private or None, repo_type=kind, space_sdk=sdk, exist_ok=True).repo_id
        if private and not api.repo_info(name, repo_type=kind).private:
            raise ValueError(
                f"The repository {name} exists and is public. Make it private in its settings, or choose another name."
            )
        if revision is not None:
            api.create_branch(name, branch=revision, repo_type=kind, exist_ok=True)
    return name


def check_publishable(folder: str | Path):
    """Refuse a folder that nobody could load from the Hub.

    Raises:
        ValueError: It holds no model, or an adapter whose base is not on the Hub.
        PublishError: The Hub cannot be asked.
    """
    folder = Path(folder)
    if (folder / PEFT_CONFIG_FILE).exists():
        base = json.loads((folder / PEFT_CONFIG_FILE).read_text())["base_model_name_or_path"]
        with _explained(f"Whether {base} is on the Hub cannot be told", "Then start again."):
            is_published = is_hub_name(base or "") and HfApi().repo_exists(base)
        if not is_published:
            raise ValueError(
                f"The adapter {folder} needs its base, '{base}', which is not on the Hub. Publish that first, and put "
                f"its name on the Hub into {folder / PEFT_CONFIG_FILE} (base_model_name_or_path)."
            )
    elif not (folder / "config.json").exists():
        raise ValueError(f"'{folder}' is no folder with config.json or {PEFT_CONFIG_FILE}; give a trained model's.")


def publish(
    folder: str | Path, name: str, revision: str | None = None, kind: str = "model", retry: str | None = None
) -> str:
    """Upload a folder's files in one commit; the folder itself is only read.

    Pictures that were published before and are not in the folder any more are removed.

    Args:
        folder: What to publish. Hidden files stay behind.
        name: Repository, claimed before.
        revision: Branch, main when left out.
        kind: "model" or "space".
        retry: How to try again, if not by push_to_hub.py with this folder.

    Returns:
        The repository's address.

    Raises:
        PublishError: The upload was refused or interrupted: nothing of it is visible on the Hub.
    """
    folder = Path(folder)
    paths = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {name: path for name, path in paths.items() if not any(part.startswith(".") for part in name.parts)}
    contents = {place.as_posix(): path for place, path in files.items()}
    if CARD in contents:  # which has not known where it would be published
        contents[CARD] = contents[CARD].read_text().replace(MODEL_PATH, name).encode()
    if retry is None:
        words = ["python", "examples/push_to_hub.py", "--checkpoint", str(folder), "--hub_model_id", name]
        words += ["--hub_revision", revision] if revision else []
        retry = f"{folder} is whole, here; retry with: {shlex.join(words)}"
    with _explained(f"{name} was not published", retry):
        published = HfApi().list_repo_files(name, revision=revision, repo_type=kind)
        stale = [place for place in published if place.startswith(PICTURE_FOLDERS) and place not in contents]
        return _commit(contents, name, "Upload with co2s_hf", revision, kind, stale=stale)


def publish_evaluation(name: str, evaluation: dict, picture: Path, revision: str | None = None) -> str:
    """Add what was measured to the card of a published model.

    Args:
        name: The model's repository, claimed before.
        evaluation: As in metrics.json.
        picture: Figure to go with it.
        revision: Branch, main when left out.

    Returns:
        The repository's address.

    Raises:
        PublishError: It was refused or interrupted: the published card is as it was.
    """
    with _explained(f"The card of {name} was not changed", "The results are whole, here; then evaluate again."):
        parent = HfApi().repo_info(name, revision=revision).sha  # nobody else's change in between is lost
        try:
            card = ModelCard.load(hf_hub_download(name, CARD, revision=parent))
        except EntryNotFoundError:
            card = ModelCard(f"# {name}\n")
        place = figure_place(evaluation)
        card = with_evaluation(card, evaluation, place)
        contents = {CARD: str(card).encode(), place: picture}
        return _commit(contents, name, f"Add results on {evaluation['data']}", revision, parent=parent)


def add_handler(folder: str | Path):
    """Put what Inference Endpoints run, handler.py and requirements.txt, into a checkpoint's folder."""
    folder = Path(folder)
    shutil.copyfile(Path(__file__).with_name("handler.py"), folder / "handler.py")
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
    operations = [CommitOperationAdd(place, content) for place, content in contents.items()]
    operations += [CommitOperationDelete(place) for place in stale]
    info = HfApi().create_commit(
        name, operations, commit_message=message, revision=revision, repo_type=kind, parent_commit=parent
    )
    return str(info.repo_url)


@contextmanager
def _explained(problem: str, remedy: str) -> Iterator[None]:
    """Turn the many ways in which the Hub fails into one error that says what to do."""
    try:
        yield
    except KeyboardInterrupt:
        raise PublishError(f"{problem}: interrupted. {remedy}") from None
    except (OSError, HTTPError, RuntimeError) as error:  # RuntimeError: what large files' uploads are wrapped into
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status in (401, 403) or isinstance(cause, LocalTokenNotFoundError):
            remedy = f"Log in with a token that may write there (`hf auth login`). {remedy}"
        elif status is None and isinstance(cause, HTTPError):
            remedy = f"Look after the connection. {remedy}"
        reason = without_secrets(str(cause)).strip().splitlines() or [type(cause).__name__]
        raise PublishError(f"{problem}: {reason[0]} {remedy}") from error


__all__ = [
    "HubArguments",
    "HubTarget",
    "PublishError",
    "add_handler",
    "check_publishable",
    "claim_repository",
    "publish",
    "publish_evaluation",
]
