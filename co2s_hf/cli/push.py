"""Publish a trained model on the Hub, or a demo of it.

  # `hf auth login` first. The training wrote the card into the model's folder.
  co2s push --checkpoint outputs/train_semi/model --hub_model_id user/name --hub_private_repo

  # Also publish the handler of Inference Endpoints; publish on a branch.
  co2s push --checkpoint outputs/train_semi/model --hub_model_id user/name --handler --hub_revision v1

  # Publish the page of `co2s demo` as a Space, for a published model.
  co2s push --checkpoint user/name --space user/demo

  # Write the same Space into a local folder, to look at it first.
  co2s push --checkpoint user/name --space_dir outputs/space

All files are uploaded in one commit, or none is. The command first writes a missing card, and the files of --handler,
into the local folder. It changes nothing else there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..utils.errors import UserFileNotFoundError, UserValueError, loading
from ..utils.model_files import CONFIG, is_path
from .arguments import DEFAULT_MODEL, HubTarget
from .command_line import Command, own_group, setting


@dataclass
class PushArguments(HubTarget):
    """What to publish, and where."""

    checkpoint: str = setting(DEFAULT_MODEL, "Folder of a trained model. For a Space: name of a model on the Hub.")
    handler: bool = setting(False, "Also publish handler.py and requirements.txt for Inference Endpoints.")
    space: str | None = setting(None, "Publish a demo of the model as this Space (user/name) instead.")
    space_dir: str | None = setting(None, "Write the files of the Space into this new folder instead.")

    def __post_init__(self):
        if self.space is not None and self.space_dir is not None:
            raise UserValueError("Give either `space` or `space_dir`.")
        is_space = self.space is not None or self.space_dir is not None
        if is_space and (self.handler or self.hub_model_id or self.hub_revision):
            raise UserValueError(
                "`handler`, `hub_model_id` and `hub_revision` are for models. A Space runs its main branch."
            )
        if not is_space and self.hub_model_id is None:
            raise UserValueError("Name the repository: `hub_model_id='user/name'`.")
        if is_space and is_path(self.checkpoint) and not Path(self.checkpoint).exists():
            raise UserFileNotFoundError(
                f"`checkpoint` is '{self.checkpoint}', which does not exist. A Space needs the name of a model on the "
                "Hub, such as user/name."
            )
        if self.space is not None and Path(self.checkpoint).exists():
            raise UserValueError(
                f"A Space needs a published model, but '{self.checkpoint}' is a local folder. Publish it first: co2s "
                f"push --checkpoint {self.checkpoint} --hub_model_id user/name"
            )


COMMAND = Command(name="push", description=__doc__, groups=[own_group("publishing", PushArguments)])


def main(words: Sequence[str] | None = None):
    """Run `co2s push` with these words, or those of this process."""
    args = COMMAND.parse(words)[PushArguments]
    with COMMAND.user_errors():
        if args.space_dir is not None:
            push_space_to_folder(args)
        elif args.space is not None:
            push_space(args)
        else:
            push_model(args)


def push_model(args: PushArguments):
    """Publish the folder of a model, with a card and, if asked for, a handler."""
    from ..hub.cards import write_card
    from ..hub.publishing import add_handler, check_publishable, claim_repository, publish
    from ..inference.images import load_model

    check_publishable(args.checkpoint)
    folder = Path(args.checkpoint)
    if (folder / CONFIG).exists():
        load_model(args.checkpoint)  # so that no model is published that others cannot load
    else:  # an adapter, whose base is on the Hub
        with loading(f"`checkpoint` is '{args.checkpoint}', which", "the folder of a trained model", folder):
            pass
    name = claim_repository(args.hub_model_id, args.hub_private_repo, args.hub_revision)
    if not (folder / "README.md").exists():
        write_card(folder)
    if args.handler:
        add_handler(folder)
    print(f"Published {folder}: {publish(folder, name, args.hub_revision)}")


def push_space(args: PushArguments):
    """Publish the demo as a Space."""
    import tempfile

    from ..hub.publishing import claim_repository, publish
    from ..hub.spaces import write_space

    name = claim_repository(args.space, args.hub_private_repo, kind="space", sdk="gradio")
    with tempfile.TemporaryDirectory() as temporary:
        write_space(Path(temporary), args.checkpoint)
        retry = "Run the same command again."
        print(f"Published the demo: {publish(temporary, name, kind='space', retry=retry)}")


def push_space_to_folder(args: PushArguments):
    """Write the Space's files into a new local folder."""
    from ..hub.spaces import write_space
    from ..utils.files import check_new_folder, written_beside

    with written_beside(check_new_folder(args.space_dir)) as folder:
        write_space(folder, args.checkpoint)
    print(f"Wrote {args.space_dir}; try it with: python {args.space_dir}/app.py")
