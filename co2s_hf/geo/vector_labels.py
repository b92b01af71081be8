"""Use the polygons, lines and points of vector files as labels of rasters: label maps, window by window.

A window of a raster becomes a label map in three steps: its pixels are the background class, or have no class;
features are burned, the class of the highest priority last; and pixels outside the labelled area have no class.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from affine import Affine

from ..data.options import IGNORE
from ..utils.errors import UserValueError
from .burning import PolygonSet
from .georeferencing import GeoGrid
from .options import IGNORE_CLASS, WHOLE_AREA, VectorLabelOptions
from .vector_classes import background_of, choose_classes, priorities
from .vector_features import Counts, FeatureLoader
from .vector_files import open_vector_file


MOST_NAMED = 10  # rasters that the summary names
SAMPLE_PX = 1000  # longer side of the grid on which it is checked whether features cover a raster
LEAST_COVER = 0.999  # share of a raster; below, pixels that no feature covers are more than gaps between outlines


@dataclass(eq=False)
class VectorLabels:
    """Features of vector files as labels of rasters. [`open_vector_labels`] makes it.

    Args:
        class_names: Names of the classes in label order.
        counts: What was found in the files.
        label_of: Value of the class column -> label.
        options: Options by which the features become labels.
        background: Label of pixels in the labelled area that no feature covers.
        without: Names of the rasters without a feature.
        features: The polygons, with their labels.
        area: Polygons of the labelled area. None: it is everywhere.
    """

    class_names: list[str]
    counts: Counts
    label_of: dict[str | None, int]
    options: VectorLabelOptions
    background: int
    without: list[str]
    features: PolygonSet
    area: PolygonSet | None

    def read(self, grid: GeoGrid) -> np.ndarray:
        """Return the label map of a window.

        Args:
            grid: Pixel grid of the window, with the coordinate system of one of the rasters.

        Returns:
            Class indices, uint8 (height, width). 255: the pixel has no class.
        """
        ranked = reversed(priorities(self.class_names, self.options))
        order = [IGNORE, *map(self.class_names.index, ranked)]  # features without a class win over no other ones
        labels = self.features.burn(grid, self.background, order, self.options.all_touched)
        if self.area is not None:
            labels[~self.area.covers(grid)] = IGNORE
        return labels

    def coverage(self, grid: GeoGrid) -> Literal["outside", "partly", "inside"]:
        """Return how many pixels of a window have a class: none ("outside"), some ("partly") or all ("inside")."""
        if self._is_outside(grid):
            return "outside"
        has_class = self.read(grid) != IGNORE
        return "inside" if has_class.all() else "partly" if has_class.any() else "outside"

    def _is_outside(self, grid: GeoGrid) -> bool:
        """Return whether a window is known to be outside without burning anything."""
        if self.area is not None and not self.area.touches(grid):
            return True
        return self.background == IGNORE and not self.features.touches(grid)

    def summary(self) -> list[str]:
        """Return lines for the user: features per class, and what was repaired or left out."""
        counts, names, per_class = self.counts, self.class_names, Counter()
        for value, number in counts.values.items():
            per_class[self.label_of[value]] += number
        shares = ", ".join(f"{name} {per_class[index]:,}" for index, name in enumerate(names))
        missing = counts.values[None]
        lines = [f"Features: {counts.features:,}. Per class: {shares}."]
        if len(names) > 1:
            ranked = ", ".join(priorities(names, self.options))
            lines.append(f"Where features overlap, the first of these classes wins: {ranked}.")
        for number, text in (
            (missing, f"without a value in '{self.options.class_column}', whose pixels have no class"),
            (per_class[IGNORE] - missing, f"of the class '{IGNORE_CLASS}', whose pixels have no class"),
            (counts.repaired, "with invalid polygons, which were repaired"),
            (counts.empty, "without a geometry, which were left out"),
            (counts.outside, "outside the rasters, which were left out"),
            (counts.unplaced + self.features.num_unplaced, "without a position on Earth, which were left out"),
        ):
            if number:
                lines.append(f"Features {text}: {number:,}.")
        if self.without:
            shown = ", ".join(self.without[:MOST_NAMED]) + (" ..." if len(self.without) > MOST_NAMED else "")
            lines.append(f"Rasters without a feature ({len(self.without)}): {shown}.")
        return lines


def open_vector_labels(
    options: VectorLabelOptions, rasters: Mapping[str, GeoGrid], class_names: Sequence[str] | None = None
) -> VectorLabels:
    """Read the features that lie in rasters, and check that they fit them.

    The class of a feature is the value of its column, or what the class map makes of it. Values are compared as text:
    1 and 1.0 are "1". A feature without a value hides the background, but gives no class; features with a class win
    over it.

    Args:
        options: The files, and how they become labels.
        rasters: Name -> pixel grid, of all rasters that get labels.
        class_names: Names of the classes in label order. None: as in [`choose_classes`].

    Raises:
        UserFileNotFoundError: A file does not exist.
        UserValueError: A file cannot be read, or does not fit the rasters or the options.
    """
    if options.class_column is None:
        raise UserValueError("`class_column` is missing: the column with the class of each feature, such as 'type'.")
    for name, grid in rasters.items():
        check_raster(name, grid)
    loader = FeatureLoader(rasters, options.buffer_m)
    for path in options.vector_labels:
        layer = options.layer if path.lower().endswith(".gpkg") else None
        loader.load(open_vector_file(path, options.class_column, layer, "layer"))
    loader.check(", ".join(f"'{path}'" for path in options.vector_labels))
    names, label_of = choose_classes(loader.counts.values, options, class_names)
    # A value of features without a geometry has no label. They are left out.
    features = loader.polygon_set([label_of.get(value, IGNORE) for value in loader.codes])
    area = None
    if options.labeled_area not in (None, WHOLE_AREA):
        area = open_area(options.labeled_area, options.labeled_area_layer, rasters, "labeled_area")
    background = background_of(options)
    if options.background is None and options.labeled_area is None:
        _check_cover(features, rasters)
    return VectorLabels(
        class_names=names,
        counts=loader.counts,
        label_of=label_of,
        options=options,
        background=IGNORE if background is None else names.index(background),
        without=[name for name in rasters if name not in loader.hit],
        features=features,
        area=area,
    )


def check_raster(name: str, grid: GeoGrid):
    """Check that polygons can be placed on a raster.

    Raises:
        UserValueError: The raster has no coordinate system or no transform.
    """
    if grid.crs is None or grid.gcps or grid.transform == Affine.identity():
        missing = "coordinate system" if grid.crs is None else "transform"
        raise UserValueError(
            f"'{name}' has no {missing}, so polygons cannot be placed on it. Add it with `rio edit-info`, or with "
            "`gdalwarp` if the raster has control points."
        )


def open_area(path: str, layer: str | None, rasters: Mapping[str, GeoGrid], option: str) -> PolygonSet:
    """Read the polygons of an area.

    Args:
        path: Vector file with the polygons.
        layer: Layer of a GeoPackage.
        rasters: Name -> pixel grid.
        option: Name of the parameter that gives the file, for messages. That of the layer ends in "_layer".

    Raises:
        UserFileNotFoundError: The file does not exist.
        UserValueError: It cannot be read, or all polygons are outside the rasters.
    """
    loader = FeatureLoader(rasters)
    loader.load(open_vector_file(path, None, layer, f"{option}_layer"))
    loader.check(f"'{path}' (`{option}`)")
    return loader.polygon_set([0] * len(loader.codes))


def _check_cover(features: PolygonSet, rasters: Mapping[str, GeoGrid]):
    """Check that features cover the rasters. This is needed if nothing says what the other pixels are."""
    for name, grid in rasters.items():
        factor = min(1.0, SAMPLE_PX / max(grid.height, grid.width))
        sample = grid.resized(max(1, round(grid.height * factor)), max(1, round(grid.width * factor)))
        share = features.covers(sample).mean()
        if share < LEAST_COVER:
            raise UserValueError(
                f"The features cover {100 * share:.1f} % of '{name}'. Say what the other pixels are. They have no "
                "class and are never trained on: `background='ignore'`. All of them are of one class, such as other: "
                "`background='other'`. Or name polygons of the area in which everything was labelled: "
                "`labeled_area='area.gpkg'`. Then the other pixels in it are the class background, and those outside "
                "have no class."
            )
