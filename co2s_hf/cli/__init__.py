"""The `co2s` command: one module per command, the arguments, and the only place that speaks of --flags.

- `command_line`: builds a command line from options dataclasses.
- `output`: rewrites what a command prints.
- `arguments`: flags that several commands share.
- `train`, `pretrain`, `finetune`, `evaluate`, `predict`, `prepare`, `push`, `convert`, `demo`: the commands.
- `vector_flags`: the flags of `prepare` for rasters with polygons as labels.
- `model_folders`: completes a trained folder with its card, and publishes it.
- `demo_page`: the page of `co2s demo`.

May import every other package. The commands import heavy libraries inside functions, so that --help is quick.
"""

import difflib
import importlib
import sys
from collections.abc import Sequence

from ..utils.redaction import redact


COMMANDS = {
    "train": "Train both students on a few labelled and many unlabelled images.",
    "pretrain": "Pretrain a small backbone on images without label maps.",
    "finetune": "Adapt a trained model to a new area or new classes with LoRA.",
    "evaluate": "Measure a model on labelled images.",
    "predict": "Predict georeferenced scenes and images.",
    "prepare": "Check data, cut it into tiles, and make one data set of it.",
    "push": "Publish a model or its demo on the Hub.",
    "convert": "Convert the authors' checkpoints to a model, and back.",
    "demo": "Serve a page for the browser to try a model.",
}


def main(words: Sequence[str] | None = None):
    """Run `co2s COMMAND ...`.

    Args:
        words: Name and flags of the command. None: the words of this process.
    """
    words = list(sys.argv[1:] if words is None else words)
    if words and words[0] in COMMANDS:
        importlib.import_module(f".{words[0]}", __name__).main(words[1:])
        return
    if words and words[0] == "--version":
        from .. import __version__

        print(f"co2s_hf {__version__}")
        return
    lines = [
        "usage: co2s COMMAND [--flag value ...]",
        "",
        "Co2S: semi-supervised segmentation of remote-sensing images.",
    ]
    lines += ["", *(f"  {name:10}{text}" for name, text in COMMANDS.items())]
    lines += [
        "",
        "`co2s COMMAND --help` explains a command. On several devices: accelerate launch -m co2s_hf COMMAND ...",
    ]
    if words and words[0] not in ("-h", "--help"):
        meant = difflib.get_close_matches(words[0].lower(), COMMANDS, n=1)
        end = f"; did you mean '{meant[0]}'?" if meant else "."
        sys.exit("\n".join([*lines, "", f"error: there is no command '{redact(words[0])}'{end}"]))
    print("\n".join(lines))
