"""Check that the numbers of options are in their range."""

import math
from collections.abc import Mapping
from typing import Any

from .errors import UserValueError


LARGEST = 2**31 - 1  # PyTorch, NumPy and GDAL store sizes and counts in 32 bits in some places
LARGEST_SEED = 2**32 - 1  # NumPy accepts no larger one


def check_ranges(options: Any, least: Mapping[str, float]):
    """Refuse numbers that are too small, too large or not finite.

    Args:
        options: Object with the numbers as attributes. None is always allowed.
        least: Name of a number -> smallest value that is allowed. The largest value is [`LARGEST_SEED`] for `seed`,
            and [`LARGEST`] for all others.

    Raises:
        UserValueError: A number is out of range.
    """
    for name, minimum in least.items():
        value = getattr(options, name)
        if value is None:
            continue
        largest = LARGEST_SEED if name == "seed" else LARGEST
        if not math.isfinite(value):
            raise UserValueError(f"`{name}` is {value}; it must be a finite number of at least {minimum}.")
        if value < minimum:
            raise UserValueError(f"`{name}` is {value}; it must be at least {minimum}.")
        if value > largest:
            raise UserValueError(f"`{name}` is {value}; it must be at most {largest}.")


def check_above_zero(options: Any, *names: str):
    """Refuse numbers that are not above 0, or not finite. None is always allowed.

    Raises:
        UserValueError: A number is out of range.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise UserValueError(f"`{name}` is {value}; it must be a finite number above 0.")


__all__ = ["LARGEST", "LARGEST_SEED", "check_above_zero", "check_ranges"]
