"""Command lines of the examples: dataclasses that explain themselves, filled from a file and the command line."""

import argparse
import difflib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import Field, field, fields
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

import yaml
from transformers import HfArgumentParser


T = TypeVar("T")


def setting(default, text: str) -> Field:
    """A field of an arguments dataclass with its help."""
    return field(default=default, metadata={"help": text})


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keep the examples' lines, and name a default where it says something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default in (None, False, argparse.SUPPRESS) else f"{action.help} [%(default)s]"


def parse_arguments(
    arguments_class: type[T],
    description: str,
    command_line: Sequence[str] | None = None,
    positional: str | None = None,
) -> T:
    """Fill a dataclass from `--config FILE` (YAML or JSON) and the command line, which wins.

    Args:
        arguments_class: Dataclass whose fields are made with [`setting`]; a ValueError of its `__post_init__` is
            shown as a usage error.
        description: What `--help` begins with.
        command_line: Words after the program's name; `sys.argv` when left out.
        positional: Field, a list, that words before the first --setting fill, too.
    """
    parser = HfArgumentParser(
        arguments_class,
        usage=f"%(prog)s {f'[{positional} ...] ' if positional else ''}[--setting value ...]",
        description=description,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, help="YAML or JSON file with any of these settings.")
    if positional is not None:
        parser.add_argument(positional, nargs="*", default=argparse.SUPPRESS, help=f"As --{positional}.")
    config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config.add_argument("--config", type=Path)
    path = config.parse_known_args(command_line)[0].config
    try:
        if path is not None:
            words = _words_of_file(path, [f.name for f in fields(arguments_class)])
            command_line = [*words, *(sys.argv[1:] if command_line is None else command_line)]
        return parser.parse_args_into_dataclasses(command_line)[0]
    except (ValueError, OSError) as error:
        parser.error(str(error))


@contextmanager
def told_plainly() -> Iterator[None]:
    """End the program with the message alone, no traceback, where what is wrong is the user's to mend."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


def parse_fraction(text: str) -> float:
    """The number that "1/8" or "0.125" means.

    Raises:
        ValueError: The text is no fraction.
    """
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"'{text}' is no fraction; write it as 1/8 or 0.125.") from error


def _words_of_file(path: Path, names: list[str]) -> list[str]:
    """The file's settings as words of a command line, so that they are checked like those."""
    text = path.read_text()
    try:
        # Words as they stand: YAML would take "off" and "no", which are values here, for False.
        settings = json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader=yaml.BaseLoader)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no settings; expected lines such as 'crop_size: 256'.")
    words = []
    for name, value in settings.items():
        if name not in names:
            meant = difflib.get_close_matches(str(name), names, n=1)
            raise ValueError(f"{path}: there is no setting '{name}'" + (f"; '{meant[0]}'?" if meant else "."))
        if value not in (None, "", "null", []):
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words
