"""Read tags or captions of images from a CSV file."""

import csv
import os
from dataclasses import dataclass
from pathlib import Path

from ...utils.errors import UserValueError


TEXT_COLUMNS = ("tags", "caption")


@dataclass(frozen=True)
class ImageLabels:
    """Texts of images.

    Args:
        texts: Resolved path of an image -> its tags, or a tuple with its caption alone.
        are_tags: Whether the texts are tags.
    """

    texts: dict[Path, tuple[str, ...]]
    are_tags: bool

    @property
    def vocabulary(self) -> list[str]:
        """All different texts in alphabetical order."""
        return sorted({text for texts in self.texts.values() for text in texts})


def read_image_labels(path: Path) -> ImageLabels:
    """Read a CSV file with the columns `image` and `tags` or `caption`.

    Args:
        path: The file. Its column `image` has paths relative to its folder. A backslash separates folders, too.

    Raises:
        UserValueError: The file cannot be read, a column is missing, an image does not exist or is named twice, or it
            has no text. The message lists the first lines with errors.
    """
    column, rows = _read_rows(path)
    texts, problems = {}, []
    for line, name, text in rows:
        image = (path.parent / name.replace("\\", "/")).resolve()
        if not name or not os.path.isfile(image):
            problems.append(f"line {line}: '{name:.200}' is not a file")
        elif image in texts:
            problems.append(f"line {line}: '{name:.200}' is named twice")
        elif not text.strip():
            problems.append(f"line {line}: '{name:.200}' has no {column}")
        else:
            tags = (tag.replace("-", " ").lower() for tag in text.split())
            texts[image] = tuple(dict.fromkeys(tags)) if column == "tags" else (" ".join(text.lower().split()),)
    if problems:
        more = f" ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UserValueError(f"{path} cannot be used. {'; '.join(problems[:10])}{more}. Correct these lines.")
    if not texts:
        raise UserValueError(f"{path} has no lines. Add one line per image.")
    return ImageLabels(texts, are_tags=column == "tags")


def _read_rows(path: Path) -> tuple[str, list[tuple[int, str, str]]]:
    """Return the column with the texts, and of each row: the number of its line, the image and the text."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            column = next((name for name in TEXT_COLUMNS if name in columns), None)
            if "image" not in columns or column is None:
                raise UserValueError(
                    f"{path} has the columns {', '.join(columns) or '(none)'}; expected 'image' and 'tags' or "
                    "'caption'."
                )
            return column, [(reader.line_num, row["image"] or "", row[column] or "") for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserValueError(f"{path} is not a CSV file in UTF-8: {error}. Save it as one.") from error


__all__ = ["ImageLabels", "read_image_labels"]
