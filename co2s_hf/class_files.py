"""What is known of a data set's classes: names, colours and concepts, from JSON beside the data.

Either a list in label order, `[{"name": "water", "color": [0, 0, 255], "concepts": ["water", "lake"]}, ...]`, or
`{"classes": [...], "ignore_index": 255}`. An entry with `"ignore": true` is a colour that means no class.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .reading import IGNORE


CLASSES_FILE = "classes.json"


@dataclass(frozen=True)
class ClassDescription:
    """The classes in label order, colours that mean none of them, and the value in label files that does."""

    classes: tuple[dict, ...] = ()
    ignore_colors: tuple[tuple[int, int, int], ...] = ()
    ignore_index: int = IGNORE

    @property
    def names(self) -> list[str]:
        return [entry["name"] for entry in self.classes]

    @property
    def palette(self) -> list[list[int]] | None:
        """RGB colours of all classes, if all have one."""
        colors = [list(entry["color"]) for entry in self.classes if "color" in entry]
        return colors if colors and len(colors) == len(self.classes) else None

    @property
    def concepts(self) -> dict[str, list[str]] | None:
        """What a class's text embedding is the mean of: its name where nothing is said."""
        return {c["name"]: c.get("concepts") or [c["name"].replace("_", " ")] for c in self.classes} or None

    def renamed(self, names: Sequence[str]) -> "ClassDescription":
        """Other names in label order; what is known of a name stays known."""
        known = {entry["name"]: entry for entry in self.classes}
        return ClassDescription(tuple(known.get(name, {"name": name}) for name in names), (), self.ignore_index)


def read_classes(path: Path) -> ClassDescription:
    """The classes that a file describes.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It does not describe classes.
    """
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' does not exist; it should describe the classes.")
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON file: {error}.") from error
    content = {"classes": content} if isinstance(content, list) else content
    entries = content.get("classes") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and isinstance(e.get("name"), str) for e in entries
    ):
        raise ValueError(
            f'{path} must be a list in label order, with a name for every class: [{{"name": "water", "color": '
            "[0, 0, 255]}, ...]."
        )
    for entry in entries:
        _check_entry(path, entry)
    for what in ("name", "color"):
        seen = [str(entry[what]) for entry in entries if what in entry]
        if twice := {value for value in seen if seen.count(value) > 1}:
            raise ValueError(f"{path} gives the {what} {min(twice)} to two classes.")
    ignore_index = content.get("ignore_index", IGNORE)
    if not isinstance(ignore_index, int):
        raise ValueError(f"{path} gives the ignore_index {ignore_index}; expected a number such as 255.")
    classes = tuple(entry for entry in entries if not entry.get("ignore"))
    ignored = tuple(tuple(entry["color"]) for entry in entries if entry.get("ignore") and "color" in entry)
    return ClassDescription(classes, ignored, ignore_index)


def _check_entry(path: Path, entry: dict):
    color, concepts = entry.get("color", [0, 0, 0]), entry.get("concepts", [])
    if not isinstance(color, list) or len(color) != 3 or not all(isinstance(c, int) and 0 <= c <= 255 for c in color):
        raise ValueError(f"{path} gives '{entry['name']}' the color {color}; expected three numbers, [0, 0, 255].")
    if not isinstance(concepts, list) or not all(isinstance(concept, str) for concept in concepts):
        raise ValueError(f"{path} gives '{entry['name']}' the concepts {concepts}; expected a list of words.")
