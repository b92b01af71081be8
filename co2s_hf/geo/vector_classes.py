"""Choose the classes of features, and which class wins where features overlap."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..data.options import IGNORE
from ..utils.errors import UserValueError
from .options import IGNORE_CLASS, VectorLabelOptions


BACKGROUND = "background"  # class between the features of a labelled area, if no other name is given
MOST_VALUES = 40  # of the class column, if no class map says what they mean
MOST_NAMED = 10  # values that an error message names


def text_of(value: Any) -> str | None:
    """Return a value of a column as text. None: it is missing."""
    if value is None or (isinstance(value, float) and not np.isfinite(value)):
        return None
    if isinstance(value, float) and value.is_integer():  # integers with missing values are read as such
        value = int(value)
    return str(value).strip() or None


def background_of(options: VectorLabelOptions) -> str | None:
    """Return the class of pixels in the labelled area that no feature covers. None: they have no class."""
    if options.background is None and options.labeled_area is not None:
        return BACKGROUND
    return None if options.background == IGNORE_CLASS else options.background


def choose_classes(
    values: Counter, options: VectorLabelOptions, class_names: Sequence[str] | None
) -> tuple[list[str], dict[str | None, int]]:
    """Choose the classes of the values of a column.

    Args:
        values: Number of features of each value, as text. None: the feature has no value.
        options: Options with the class map, the background and the priority.
        class_names: Names of the classes in label order. None: the order of the class map; without one the values,
            sorted. A `background` that is not among them becomes the first class.

    Returns:
        The names of the classes in label order, and the label of each value. 255: the value is no class.

    Raises:
        UserValueError: A value has no class, there are too many values, or an option names an unknown class.
    """
    found = sorted((value for value in values if value is not None), key=_sort_key)
    if not found:
        raise UserValueError(f"The column '{options.class_column}' has no values. Name the column with the classes.")
    class_of = {value: value for value in found}
    found = [value for value in found if value != IGNORE_CLASS]
    if options.class_map is not None:
        given = {value.strip(): name.strip() for value, name in options.class_map.items()}
        if missing := [value for value in class_of if value not in given]:
            raise UserValueError(
                f"`class_map` leaves out values of '{options.class_column}': {_named(missing, values)}. Add them, "
                f"each with a class or with '{IGNORE_CLASS}'."
            )
        class_of = given
        found = list(dict.fromkeys(name for name in given.values() if name != IGNORE_CLASS))
    elif class_names is None and len(found) > MOST_VALUES:
        raise UserValueError(
            f"The column '{options.class_column}' has {len(found)} different values: {_named(found, values)}. Name "
            "the column with the classes, or say what the values mean: `class_map={'Haus': 'building'}`."
        )
    names = found if class_names is None else list(class_names)
    _check_names(names, set(class_of.values()) - {IGNORE_CLASS}, options, values)
    background = background_of(options)
    if background is not None and background not in names:
        if class_names is not None:
            raise UserValueError(
                f"The background is '{background}', which is none of the classes {', '.join(names)}. Add it to "
                f"`class_names`, choose one of them, or leave these pixels without a class: `background='ignore'`."
            )
        names = [background, *names]
    if not names:
        raise UserValueError(f"All features are of the class '{IGNORE_CLASS}'. Expected at least one other class.")
    if len(names) > IGNORE:
        raise UserValueError(f"There are {len(names)} classes; expected at most {IGNORE}. Merge some in `class_map`.")
    if unknown := [name for name in options.priority or () if name not in names]:
        raise UserValueError(f"`priority` names '{unknown[0]}', but the classes are: {', '.join(names)}.")
    labels = {value: IGNORE if name == IGNORE_CLASS else names.index(name) for value, name in class_of.items()}
    return names, {value: labels.get(value, IGNORE) for value in values}


def _check_names(names: list[str], needed: set[str], options: VectorLabelOptions, values: Counter):
    """Check that every class of the features has a name."""
    if not (unknown := sorted(needed - set(names), key=_sort_key)):
        return
    if options.class_map is not None:
        raise UserValueError(
            f"`class_map` has the class '{unknown[0]}', which is none of `class_names`: {', '.join(names)}."
        )
    raise UserValueError(
        f"Values of '{options.class_column}' are none of the classes {', '.join(names)}: {_named(unknown, values)}. "
        f"Say which class they are: `class_map={dict.fromkeys(unknown[:2], names[0])}`."
    )


def _sort_key(value: str) -> tuple:
    """Sort whole numbers by their size, before all other values."""
    try:
        return 0, int(value), value
    except ValueError:
        return 1, 0, value


def _named(found: list[str], values: Counter) -> str:
    """Name the first of some values, with the number of their features."""
    named = ", ".join(f"'{value}' ({values[value]})" for value in found[:MOST_NAMED])
    return named + (f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else "")


def priorities(class_names: list[str], options: VectorLabelOptions) -> list[str]:
    """Return the classes in the order in which they win where features overlap.

    The background wins over no other class, unless `priority` has it.
    """
    ranked = list(options.priority or ())
    last = [name for name in class_names if name == background_of(options) and name not in ranked]
    return [*ranked, *(name for name in class_names if name not in ranked + last), *last]
