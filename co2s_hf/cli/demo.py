"""Serve a page for the browser: drop an aerial or satellite image to see its land cover and the model's confidence.

  pip install "co2s_hf[demo]"
  co2s demo --checkpoint outputs/train_semi/model

  # A published model.
  co2s demo --checkpoint user/name

The command prints the address of the page. A GPU is not necessary. Only this machine can open the page, unless --share
is given. The page shows the images that are dropped on it, and no other file of this machine. `co2s push --space`
publishes the page as a Space.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..utils.errors import UserImportError, UserOSError, UserValueError
from ..utils.ranges import check_ranges
from .arguments import DEFAULT_MODEL
from .command_line import Command, own_group, setting


@dataclass
class DemoArguments:
    """Which model to show, and the address of the page."""

    checkpoint: str = setting(DEFAULT_MODEL, "Folder or Hub name of a trained model.")
    crop_size: int | None = setting(None, "Side of the windows in pixels. Default: the side of the crops in training.")
    share: bool = setting(False, "Also make a public link, through Gradio's servers.")
    port: int | None = setting(None, "Port of the page. Default: the first free one from 7860.")

    def __post_init__(self):
        check_ranges(self, {"crop_size": 1, "port": 1})
        if self.port is not None and self.port > 65535:
            raise UserValueError(f"`port` is {self.port}; it must be at most 65535.")


COMMAND = Command(name="demo", description=__doc__, groups=[own_group("page", DemoArguments)])


def main(words: Sequence[str] | None = None):
    """Run `co2s demo` with these words, or those of this process."""
    args = COMMAND.parse(words)[DemoArguments]
    with COMMAND.user_errors():
        try:
            from .demo_page import Demo, launch
        except ImportError as error:
            raise UserImportError(f"The demo needs more libraries ({error}): pip install 'co2s_hf[demo]'.") from error
        demo = Demo(args.checkpoint, args.crop_size)
        try:
            launch(demo, args.share, args.port)
        except OSError as error:  # gradio's, if the port is in use
            raise UserOSError(f"The page cannot be opened: {error}. Choose another `port`.") from error
