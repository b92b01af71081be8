"""Build command lines from options dataclasses: grouped help, options from a file, and errors that name flags."""

import argparse
import ast
import difflib
import json
import re
import shlex
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar

import yaml

from ..utils.errors import UserError
from ..utils.redaction import redact
from .output import rewritten_output, show_traceback


T = TypeVar("T")
EXTRAS = {  # optional library -> extra of this package that installs it
    **dict.fromkeys(("accelerate", "datasets", "jinja2", "kornia", "matplotlib", "peft"), "train"),
    **dict.fromkeys(("affine", "pyarrow", "pyogrio", "rasterio", "shapely"), "scenes"),
    "gradio": "demo",
}
INTERRUPTED = 130  # exit status after Ctrl-C, as of other programs
RECIPES = Path(__file__).parents[1] / "assets" / "recipes"


@dataclass(frozen=True)
class Flag:
    """How one option is given on a command line.

    Args:
        help: Help text.
        parse: Function that converts the word (or, with `many`, the list of words) to the value. It raises ValueError
            for a wrong word. None: convert with the type of the field.
        many: The flag takes several words.
        name: Name of the values in the help.
    """

    help: str
    parse: Callable[[Any], Any] | None = None
    many: bool = False
    name: str | None = None


@dataclass(frozen=True)
class Group:
    """Flags that belong together.

    Args:
        title: Heading in the help.
        options: Dataclass with the fields that the flags set.
        flags: Field -> flag. Fields that are left out have no flag.
    """

    title: str
    options: type
    flags: dict[str, Flag]


@dataclass(frozen=True)
class Command:
    """A command of `co2s`: its flags, its help, and how its errors are shown.

    Args:
        name: The command's name.
        description: Text before the flags, with example commands.
        groups: All flags.
        first: The flags that matter most; the help shows them first.
        positional: Name of a list field. Words before the first flag go into it.
        program: Program that runs the command.
        has_recipes: `--config` also takes the name of a recipe of the paper.
    """

    name: str
    description: str
    groups: Sequence[Group]
    first: Sequence[str] = ()
    positional: str | None = None
    program: str = "co2s"
    has_recipes: bool = False

    def parse(self, words: Sequence[str] | None = None) -> dict[type, Any]:
        """Parse a command line, which overrides the options of `--config FILE`.

        Args:
            words: The words after the command's name. None: those of this process.

        Returns:
            Options class -> its instance.
        """
        words = self._explicit_switches(list(sys.argv[1:] if words is None else words))
        parser = self._parser()
        try:
            # The file and the command line are parsed separately. Otherwise a last option of the file that takes
            # several words would also take the first words of the command line.
            given = self._given(parser, self._words_of_config(words)) | self._given(parser, words)
            if zero := next((name for name, value in given.items() if "\0" in str(value)), None):
                raise argparse.ArgumentTypeError(f"argument --{zero}: {given[zero]!r} contains the character NUL")
            given.pop("config", None)
            for group in self.groups:
                for name, flag in group.flags.items():
                    if name in given and flag.parse is not None:
                        given[name] = _parsed(name, flag, given[name])
            values: dict[type, dict[str, Any]] = {}
            for group in self.groups:
                chosen = {name: given[name] for name in group.flags if name in given}
                values.setdefault(group.options, {}).update(chosen)
            return {options: options(**chosen) for options, chosen in values.items()}
        except (UserError, argparse.ArgumentTypeError) as error:
            parser.error(self.in_flags(str(error)))

    @contextmanager
    def user_errors(self, advice: Callable[[], str] = lambda: "Run the same command again.") -> Iterator[None]:
        """End the program with the message alone when the user can correct the error, or interrupts the command.

        Everything that is printed in the block names flags instead of parameters, and hides the secrets of addresses.

        Args:
            advice: Function that returns how to go on after an interruption by Ctrl-C.
        """
        sys.excepthook = show_traceback  # for all other errors
        try:
            with rewritten_output(lambda text: self.in_flags(redact(text))):
                yield
        except UserError as error:
            sys.exit(f"error: {self.in_flags(str(error))}")
        except KeyboardInterrupt as interruption:  # Ctrl-C
            traceback.clear_frames(interruption.__traceback__)  # closes progress bars, so the message is the last line
            print(f"\nInterrupted. {advice()}", file=sys.stderr)
            sys.exit(INTERRUPTED)
        except ModuleNotFoundError as error:
            extra = EXTRAS.get((error.name or "").partition(".")[0])
            if extra is None:
                raise
            sys.exit(f"error: {self.program} {self.name} needs {error.name}: pip install 'co2s_hf[{extra}]'")

    def in_flags(self, message: str) -> str:
        """Rewrite parameter names in an error message as flags: `bands=(4, 3, 2)` becomes --bands 4,3,2."""

        def as_flag(match: re.Match) -> str:
            name, value = match["name"], match["value"]
            if self._group_of(name) is None:
                return match[0]
            try:
                words = self._words(name, True if value is None else ast.literal_eval(value))
            except (ValueError, SyntaxError):
                return match[0]
            return shlex.join(words) if words else match[0]

        return re.sub(r"`(?P<name>[a-z]\w*)(?:=(?P<value>[^`]+))?`", as_flag, message)

    def has_flag(self, name: str) -> bool:
        """Return whether an option has a flag."""
        return self._group_of(name) is not None

    def _group_of(self, name: str) -> Group | None:
        return next((group for group in self.groups if name in group.flags), None)

    def _similar(self, wrong: str) -> str | None:
        """Return the option whose name is most similar to a misspelt one. None: no name is similar."""
        names = [name for group in self.groups for name in group.flags]
        return next(iter(difflib.get_close_matches(wrong, names, n=1)), None)

    def _words(self, name: str, value: Any) -> list[str]:
        """Return a flag and its value as words: bands (4, 3, 2) as --bands 4,3,2, a switch as --flip."""
        if value is True:
            return [f"--{name}"]
        words = _words_of_value(value)
        if words and not _takes_many(self._group_of(name), name):
            words = [",".join(words)]
        return [f"--{name}", *words] if words else []

    def _parser(self) -> argparse.ArgumentParser:
        before = f"[{self.positional} ...] " if self.positional else ""
        parser = _Parser(
            prog=f"{self.program} {self.name}",
            usage=f"%(prog)s {before}[--flag value ...]",
            description=self.description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )
        if self.positional is not None:
            parser.add_argument(self.positional, nargs="*", help=f"The same as --{self.positional}.")
        first = parser.add_argument_group("the flags that matter most") if self.first else None
        places = {group.title: parser.add_argument_group(group.title) for group in self.groups}
        flags = {name: (group, flag) for group in self.groups for name, flag in group.flags.items()}
        for name in [*self.first, *(name for name in flags if name not in self.first)]:
            group, flag = flags[name]
            _add_flag(first if name in self.first else places[group.title], name, flag, group)
        parser.add_argument(
            "--config",
            metavar="FILE",
            help="YAML or JSON file with any of these options"
            + (f", or a recipe of the paper: {', '.join(recipe_names())}" if self.has_recipes else "")
            + ". Flags on the command line override it.",
        )
        return parser

    def _given(self, parser: argparse.ArgumentParser, words: list[str]) -> dict[str, Any]:
        """Parse words; a mistyped flag is an error with a suggestion."""
        found, unknown = parser.parse_known_args(words)
        if unknown:
            wrong = next((word for word in unknown if word.startswith("-")), "").partition("=")[0]
            meant = self._similar(wrong.lstrip("-").replace("-", "_"))
            text = f"unrecognized arguments: {' '.join(unknown)}" + (f"; did you mean --{meant}?" if meant else "")
            raise argparse.ArgumentTypeError(text)
        return vars(found)

    def _explicit_switches(self, words: list[str]) -> list[str]:
        """Write `--flip scene.tif` as `--flip=true scene.tif`: argparse would take the scene for the flag's value."""
        if self.positional is None:
            return words
        switches = {f"--{name}" for group in self.groups for name in group.flags if _is_switch(group, name)}
        return [
            f"{word}=true" if word in switches and not _is_bool(after) and not after.startswith("-") else word
            for word, after in zip(words, [*words[1:], "--"])
        ]

    def _words_of_config(self, words: list[str]) -> list[str]:
        """Return the options of the file that `--config` names, as words of a command line."""
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--config")
        name = finder.parse_known_args(words)[0].config
        if name is None:
            return []
        path = find_config(name)
        found = []
        for option, value in read_config(path).items():
            if self._group_of(option) is None:
                meant = self._similar(option)
                raise argparse.ArgumentTypeError(
                    f"{path}: there is no option '{option}'" + (f"; did you mean '{meant}'?" if meant else ".")
                )
            words = self._words(option, value)
            # One word, with "=": argparse would take a value that begins with a hyphen for a flag.
            found += ["=".join(words)] if len(words) == 2 else words
        return found


class _Parser(argparse.ArgumentParser):
    """A parser whose errors hide the secrets of addresses."""

    def error(self, message: str):
        super().error(redact(re.sub(r"\S{1000,}", _start_of, message)))


def _start_of(word: re.Match) -> str:
    """Return the start of a long word without secrets, and its length."""
    return f"{redact(word[0][:1000])[:100]}... ({len(word[0])} characters)"


def setting(default: T, help: str, name: str | None = None) -> T:
    """Make a field with its help text, for a dataclass that only the command line uses.

    Args:
        default: Default value of the field.
        help: Help text of the flag.
        name: Name of the flag's values in the help. None: the last word of the field's name.
    """
    metadata = {"flag": Flag(help, name=name)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def own_group(title: str, options: type) -> Group:
    """Make a group of the fields that were made with [`setting`]."""
    return Group(title, options, {f.name: f.metadata["flag"] for f in fields(options)})


def how_to_resume(words: Sequence[str], output_dir: str) -> str:
    """Return the command that continues an interrupted training.

    Args:
        words: Words of the interrupted command after the program's name, such as ["train", "--seed", "1"].
        output_dir: Folder of its run.
    """
    words = list(words)
    for option in ("--resume_from_checkpoint", "--overwrite_output_dir"):  # they exclude each other
        for at in [n for n, word in enumerate(words) if word.partition("=")[0] == option][::-1]:
            has_value = at + 1 < len(words) and "=" not in words[at] and not words[at + 1].startswith("-")
            del words[at : at + 1 + has_value]
    if any(Path(output_dir, "checkpoints").glob("step-*")):
        words += ["--resume_from_checkpoint", "last"]
        return f"Continue with: {redact(shlex.join(['co2s', *words]))}"
    words += ["--overwrite_output_dir"] if any(Path(output_dir).glob("*")) else []
    return f"There is no checkpoint yet. Start again with: {redact(shlex.join(['co2s', *words]))}"


def recipe_names() -> list[str]:
    """Return the names of the recipes in the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_config(name: str) -> Path:
    """Return the file that `--config` names: a path, or a recipe of the package."""
    if (path := Path(name)).is_file():
        return path
    if (path := RECIPES / f"{name}.yaml").is_file():
        return path
    raise argparse.ArgumentTypeError(
        f"--config is '{name}': neither a file nor a recipe of this package ({', '.join(recipe_names())})."
    )


def read_config(path: Path) -> dict[str, Any]:
    """Read the options of a YAML or JSON file."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            options = json.loads(text, object_pairs_hook=_without_repetition)
        else:
            options = yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be read: its lists are nested too deeply.") from error
    except (ValueError, yaml.YAMLError, OSError) as error:
        reason = " ".join(str(error).split())
        raise argparse.ArgumentTypeError(f"{path} cannot be read: {reason}") from error
    if not isinstance(options, dict):
        raise argparse.ArgumentTypeError(f"{path} has no options; expected lines such as 'crop_size: 256'.")
    return options


class _Loader(yaml.BaseLoader):
    """Reads all scalars as text, and refuses a name that occurs twice.

    Other loaders read "off" and "no", which are values here, as False.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        if not isinstance(node, yaml.MappingNode):
            return super().construct_mapping(node, deep)  # an error
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"line {key.start_mark.line + 1}: expected the name of an option.")
        return _without_repetition(
            [(self.construct_object(key), self.construct_object(value, deep=deep)) for key, value in node.value]
        )


def _without_repetition(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dictionary of pairs; a name that occurs twice is an error."""
    found = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"'{name}' occurs twice. Keep one of them.")
        found[name] = value
    return found


def parse_fraction(text: str) -> float:
    """Parse "1/8" or "0.125"."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"'{text}' is not a fraction; write it as 1/8 or 0.125") from error


def _add_flag(place, name: str, flag: Flag, group: Group):
    """Add one flag to a group of the help; its type comes from the dataclass field."""
    kind, choices, _ = _kind_of(typing.get_type_hints(group.options)[name])
    keywords: dict[str, Any] = {"nargs": "+"} if _takes_many(group, name) else {}
    if _is_switch(group, name):
        keywords = {"nargs": "?", "const": True, "type": _parse_bool, "metavar": "true|false"}
    elif flag.parse is None:
        keywords |= {"choices": choices, "metavar": f"{{{'|'.join(choices)}}}"} if choices else {"type": kind}
    if not choices and kind is not bool:
        keywords["metavar"] = flag.name or name.rsplit("_", 1)[-1].upper()
    default = _default_of(group.options, name)
    text = "" if default is False else _text_of(default)
    shown = f"{flag.help} [{text}]" if text else flag.help
    place.add_argument(f"--{name}", help=shown.replace("%", "%%"), **keywords)


def _is_switch(group: Group, name: str) -> bool:
    return group.flags[name].parse is None and _kind_of(typing.get_type_hints(group.options)[name])[0] is bool


def _takes_many(group: Group, name: str) -> bool:
    return group.flags[name].many or _kind_of(typing.get_type_hints(group.options)[name])[2]


def _kind_of(annotation: Any) -> tuple[type, Sequence[str] | None, bool]:
    """Return the type of one word, the choices, and whether there are several words."""
    if typing.get_origin(annotation) in (typing.Union, UnionType):
        annotation = next(part for part in typing.get_args(annotation) if part is not NoneType)
    if typing.get_origin(annotation) is Literal:
        return str, typing.get_args(annotation), False
    if typing.get_origin(annotation) is list:
        return typing.get_args(annotation)[0], None, True
    return annotation, None, False


def _default_of(options: type, name: str) -> Any:
    found = next(f for f in fields(options) if f.name == name)
    return found.default_factory() if found.default_factory is not MISSING else found.default


def _is_bool(text: str) -> bool:
    return text.lower() in ("true", "false")


def _parse_bool(text: str) -> bool:
    if not _is_bool(text):
        raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")
    return text.lower() == "true"


def _parsed(name: str, flag: Flag, given: Any) -> Any:
    try:
        return flag.parse(given)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"argument --{name}: {error}") from error


def _text_of(value: Any) -> str:
    return " ".join(_words_of_value(value))


def _words_of_value(value: Any) -> list[str]:
    """Return a value as words: (4, 3, 2) as "4" "3" "2", [(0, 3000)] as "0" "3000", {7: 0, 9: 1} as "7=0,9=1"."""
    if value in (None, "", "null"):
        return []
    if isinstance(value, bool):
        return [str(value).lower()]
    if isinstance(value, dict):
        return [",".join(f"{key}={entry}" for key, entry in value.items())]
    if isinstance(value, list | tuple):
        return [word for entry in value for word in _words_of_value(entry)]
    return [str(value)]


__all__ = [
    "Command",
    "Flag",
    "Group",
    "find_config",
    "how_to_resume",
    "own_group",
    "parse_fraction",
    "read_config",
    "recipe_names",
    "setting",
]
