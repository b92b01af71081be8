"""Read scenes at the ground sampling distance of the training images, if a model knows it."""

from collections.abc import Iterable
from contextlib import suppress

from ..model.modeling_co2s import Co2SForSemanticSegmentation
from ..utils.errors import UserValueError
from .options import NOT_RESAMPLED
from .rasters import SceneRaster


LARGEST_DIFFERENCE = 0.1  # share of the distance of the training images; scenes that differ more are resampled


def trained_distance_m(model: Co2SForSemanticSegmentation) -> float | None:
    """Return the ground sampling distance of the training images of a model in metres; None if it is unknown."""
    # The code that was saved beside an earlier model has no such field.
    return getattr(model.config, "ground_sampling_distance_m", None)


def resample(scene: SceneRaster, resample_to: float | str | None, trained_m: float | None):
    """Read a scene at the ground sampling distance that was asked for, or at that of the training images.

    Args:
        scene: The scene, before it is read.
        resample_to: See [`SceneOptions`].
        trained_m: Ground sampling distance of the training images in metres. None: unknown.

    Raises:
        UserValueError: `resample_to` is a distance, and the coordinates of the scene cannot be converted to metres.
    """
    if resample_to == NOT_RESAMPLED:
        return
    if resample_to is not None:
        scene.resample(resample_to)
    elif trained_m is not None:
        with suppress(UserValueError):  # the distance of the scene is unknown, so there is nothing to compare
            if differs(scene.pixel_size_m(), trained_m):
                scene.resample(trained_m)


def differs(sizes_m: Iterable[float], trained_m: float) -> bool:
    """Return whether the height or the width of a pixel differs by more than 10 % from that of training images."""
    return any(abs(size - trained_m) > LARGEST_DIFFERENCE * trained_m for size in sizes_m)


def describe_difference(scene: SceneRaster, resample_to: float | str | None, trained_m: float | None) -> str | None:
    """Return a note about a scene whose ground sampling distance is not that of the training images.

    The arguments are those of [`resample`]. None: they differ by 10 % at most, or that of the training is unknown.
    """
    if trained_m is None:
        return None
    note = f"the ground sampling distance of the training images is {trained_m:.3g} m"
    try:
        if not differs(scene.pixel_size_m(), trained_m):
            return None
    except UserValueError:
        return f"{note}, that of the scene is unknown"
    return f"{note} (`resample_to='none'` keeps that of the scene)" if resample_to is None else note


__all__ = ["describe_difference", "differs", "resample", "trained_distance_m"]
