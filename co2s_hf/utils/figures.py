"""Pictures of predictions, label maps, confusion matrices and losses (matplotlib).

The names of classes, methods and files are drawn as they are: `$`, `\\`, `^` and `_` have no meaning. See
[`literal_text`], [`one_line`] and [`add_legend`].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch
from PIL import Image


CELL_INCHES = 2.2  # side of one panel
NAME_LENGTH = 40  # largest number of characters of a name in a legend
TICK_LENGTH = 24  # the same, for a name beside an axis
CHARACTER_INCHES = 0.085  # mean width of a character
LEGEND_LINE_INCHES = 0.24

# Decorator of functions that draw: texts are neither mathematics ("$x^2$") nor TeX, whatever the user's settings are.
literal_text = matplotlib.rc_context(
    {"text.parse_math": False, "text.usetex": False, "axes.formatter.use_mathtext": False}
)


@dataclass(frozen=True)
class Example:
    """One image with its label maps, for [`draw_predictions`].

    Args:
        image: The image.
        maps: Title -> label map (height, width), integers: the truth and the predictions.
        confidence: Confidence of the fused prediction, (height, width), 0 to 1.
    """

    image: Image.Image
    maps: dict[str, np.ndarray]
    confidence: np.ndarray


def palette_or_default(palette: list[list[int]] | None, num_labels: int) -> np.ndarray:
    """Return the class colours as an array.

    Args:
        palette: RGB colour of every class. None: the 20 colours of matplotlib's tab20, repeated.
        num_labels: Number of classes, used if there is no palette.

    Returns:
        RGB colours (classes, 3), uint8.
    """
    if palette is not None:
        return np.array(palette, dtype=np.uint8)
    colors = matplotlib.colormaps["tab20"](np.arange(num_labels) % 20)[:, :3]
    return (255 * colors).astype(np.uint8)


def colorize(labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Colour a label map.

    Args:
        labels: (height, width), 0 to 255. Values without a colour in the palette, such as 255, become black.
        palette: RGB colours (classes, 3), uint8.

    Returns:
        (height, width, 3), uint8.
    """
    colors = np.zeros((256, 3), dtype=np.uint8)
    colors[: len(palette)] = palette
    return colors[labels.astype(np.uint8)]


def overlay(image: Image.Image, labels: np.ndarray, palette: np.ndarray, opacity: float = 0.5) -> Image.Image:
    """Draw a coloured label map over its image.

    Args:
        image: The image.
        labels: Label map (height, width) of the same size.
        palette: RGB colours (classes, 3), uint8.
        opacity: Weight of the colours, 0 (the image alone) to 1 (the colours alone).
    """
    return Image.blend(image.convert("RGB"), Image.fromarray(colorize(labels, palette)), opacity)


def confidence_picture(confidence: np.ndarray) -> Image.Image:
    """Colour a confidence map (height, width), 0 to 1, with viridis: dark means low. The figures use viridis, too."""
    colors = matplotlib.colormaps["viridis"](confidence)[:, :, :3]
    return Image.fromarray((255 * colors).astype(np.uint8))


def one_line(text: str, length: int = NAME_LENGTH) -> str:
    """Return a text in one line of at most `length` characters.

    Line breaks and other characters that cannot be printed become spaces. The middle of a longer text becomes "…".
    """
    text = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    if len(text) <= length:
        return text
    end = length // 3
    return f"{text[: length - end - 1]}…{text[-end:]}"


def add_legend(
    place: Figure | SubFigure | Axes,
    handles: Sequence[Artist],
    names: Sequence[str],
    length: int = NAME_LENGTH,
    **kwargs,
):
    """Add a legend. Unlike matplotlib's own, it also shows names that start with "_".

    Args:
        place: Where to add it.
        handles: A patch or a curve for each name.
        names: The names, which [`one_line`] shortens.
        length: Largest number of characters of a name.
        kwargs: Further arguments of matplotlib's `legend`.
    """
    legend = place.legend(handles, [str(number) for number in range(len(names))], **kwargs)
    for text, name in zip(legend.get_texts(), names):
        text.set_text(one_line(name, length))


def legend_columns(names: Sequence[str], inches: float, length: int = NAME_LENGTH) -> int:
    """Return how many columns of a legend fit into a width."""
    longest = max((len(one_line(name, length)) for name in names), default=1)
    fitting = int(inches / (CHARACTER_INCHES * longest + 0.7))  # 0.7 inches for the patch and the margins
    return max(1, min(fitting, len(names)))


@literal_text
def draw_predictions(examples: list[Example], id2label: dict[int, str], palette: np.ndarray, path: str | Path):
    """Draw one row per example: the image, its coloured label maps and the confidence. The legend is below.

    Args:
        examples: One or more examples. All of them have maps with the same titles.
        id2label: Class index -> class name, for the legend.
        palette: RGB colours (classes, 3), uint8.
        path: Picture to write.
    """
    columns, names = ["image", *examples[0].maps, "confidence"], list(id2label.values())
    width = CELL_INCHES * len(columns)
    ncols = min(legend_columns(names, width), 8)
    legend_height = LEGEND_LINE_INCHES * -(-len(names) // ncols) + 0.36
    figure = Figure(figsize=(width, CELL_INCHES * len(examples) + legend_height), layout="constrained")
    axes = figure.subplots(len(examples), len(columns), squeeze=False)
    for row, example in zip(axes, examples):
        pictures = [example.image, *(colorize(labels, palette) for labels in example.maps.values())]
        for axis, picture in zip(row, pictures):
            axis.imshow(picture, interpolation="nearest")
        confidence = row[-1].imshow(example.confidence, vmin=0, vmax=1, cmap="viridis")
    for axis, title in zip(axes[0], columns):
        axis.set_title(title)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.colorbar(confidence, ax=axes[:, -1], shrink=0.7)
    handles = [Patch(color=palette[index] / 255) for index in id2label]
    add_legend(figure, handles, names, loc="outside lower center", ncols=ncols)
    figure.savefig(path, dpi=100)


@literal_text
def draw_confusion(counts: np.ndarray, id2label: dict[int, str], path: str | Path):
    """Draw a confusion matrix.

    Each cell shows which percentage of the pixels of its true class (row) was predicted as its class (column).

    Args:
        counts: Number of pixels, (true classes, predicted classes). The row of a class without pixels shows "-".
        id2label: Class index -> class name.
        path: Picture to write.
    """
    totals = counts.sum(axis=1, keepdims=True)
    shares = 100 * counts / np.maximum(totals, 1)
    names = [one_line(id2label[index], TICK_LENGTH) for index in range(len(counts))]
    side = 2.5 + 0.6 * len(counts) + CHARACTER_INCHES * max(0, max(map(len, names)) - 12)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axis = figure.subplots()
    matrix = axis.imshow(shares, vmin=0, vmax=100, cmap="Blues")
    for (row, column), share in np.ndenumerate(shares):
        color = "white" if share > 50 else "black"
        axis.text(column, row, f"{share:.0f}" if totals[row, 0] else "-", ha="center", va="center", color=color)
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    figure.colorbar(matrix, ax=axis, label="% of the true class", shrink=0.8)
    figure.savefig(path, dpi=100)


@literal_text
def draw_scene_map(
    image: np.ndarray,
    labels: np.ndarray,
    confidence: np.ndarray,
    legend: dict[int, str],
    palette: np.ndarray,
    path: str | Path,
):
    """Draw a scene, its map and the map's confidence, with a legend below.

    The panels stand side by side, or one below the other if the scene is much wider than high.

    Args:
        image: (height, width, 3), uint8.
        labels: Label map (height, width). Values without a colour in the palette are white.
        confidence: (height, width), 0 to 1. NaN is white.
        legend: Class index -> text of its legend entry.
        palette: RGB colours (classes, 3), uint8.
        path: PNG file to write.
    """
    height, width = labels.shape
    is_wide = width > 2.2 * height
    side = 9.0 if is_wide else 4.5
    panel = side * min(1.0, max(width / height, 0.4)), side * min(max(height / width, 0.1), 1.6)
    rows, columns = (3, 1) if is_wide else (1, 3)
    names, length = list(legend.values()), 60
    figure_width = max(columns * panel[0] + 0.8, 7.0)
    ncols = legend_columns(names, figure_width, length)
    legend_height = LEGEND_LINE_INCHES * -(-len(names) // ncols) + 0.3
    figure = Figure(figsize=(figure_width, rows * (panel[1] + 0.35) + legend_height), layout="constrained")
    axes = figure.subplots(rows, columns)
    colors = np.where((labels < len(palette))[..., None], colorize(labels, palette), np.uint8(255))
    axes[0].imshow(image)
    axes[1].imshow(colors, interpolation="nearest")
    confidence_image = axes[2].imshow(confidence, vmin=0, vmax=1, cmap="viridis")
    for axis, title in zip(axes, ("scene", "map", "confidence")):
        axis.set_title(title)
        axis.set_axis_off()
    figure.colorbar(confidence_image, ax=axes[2], shrink=0.7)
    handles = [Patch(color=palette[index] / 255) for index in legend]
    add_legend(figure, handles, names, length, loc="outside lower center", ncols=ncols)
    figure.savefig(path, dpi=150, format="png")


@literal_text
def draw_curves(log: list[dict], path: str | Path):
    """Draw the losses and the quality of the pseudo-labels over the steps.

    There is one panel per loss term, with one line per student. Values per class have one panel per student, with one
    line per class.

    Args:
        log: Lines of log.jsonl. Each line has `step` and entries with names like `<student>/<term>`. An entry is a
            number, or class name -> number. Some lines may lack an entry, and some entries a class.
        path: Picture to write.
    """
    panels = {}  # title -> label of the curve -> points
    for line in log:
        for name, value in line.items():
            if "/" not in name:
                continue
            student, term = name.split("/", 1)
            by_label = value if isinstance(value, dict) else {student: value}
            for label, number in by_label.items():
                curves = panels.setdefault(f"{student} {term}" if isinstance(value, dict) else term, {})
                curves.setdefault(label, []).append((line["step"], number))
    columns = 4
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.4 * rows), layout="constrained")
    for axis, (title, curves) in zip(figure.subplots(rows, columns, squeeze=False).flat, panels.items()):
        lines = [axis.plot(*zip(*points), marker=".")[0] for points in curves.values()]
        axis.set_title(title.replace("_", " "))
        axis.set_xlabel("step")
        add_legend(axis, lines, list(curves), TICK_LENGTH, fontsize="x-small" if len(curves) > 2 else None)
    for axis in figure.axes[len(panels) :]:
        axis.remove()
    figure.savefig(path, dpi=100)


@literal_text
def draw_comparison(
    scores: dict[str, dict[str, list[float]]], classes: dict[str, dict[str, float | None]], path: str | Path
):
    """Draw the results of several methods: the mean IoU of their predictors, and the IoU of each class.

    A bar is the mean over the seeds. A dot is one seed. A line joins the last predictor's dots of a seed.

    Args:
        scores: Method -> predictor -> mean IoU of each seed, in per cent. All methods have the same predictors.
        classes: Method -> class name -> IoU in per cent. None for a class that occurs nowhere: it has no bar.
        path: Picture to write.
    """
    methods, greys = list(scores), ("0.85", "0.7", "0.5")
    predictors, labels = list(scores[methods[0]]), list(classes[methods[0]])
    widths = [max(8, 1 + len(methods) * len(predictors)), max(8, 1 + len(labels) * len(methods))]
    figure = Figure(figsize=(4 + 0.3 * sum(widths), 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=widths)
    for place, predictor in enumerate(predictors):
        values = np.array([scores[method][predictor] for method in methods])  # (methods, seeds)
        x = np.arange(len(methods)) + 0.8 * ((place + 0.5) / len(predictors) - 0.5)
        left.bar(x, values.mean(axis=1), 0.8 / len(predictors), color=greys[place], label=predictor)
        style = {"color": "black", "marker": "o", "markersize": 3.5, "linewidth": 0}
        left.plot(x, values, **style | ({"linewidth": 0.6} if predictor == predictors[-1] else {}))
    left.set_xticks(range(len(methods)), methods)
    left.set_ylabel("mean IoU (%)")
    left.set_title("means (bars) and seeds (dots)")
    for place, method in enumerate(methods):
        values = [np.nan if value is None else value for value in classes[method].values()]
        x = np.arange(len(labels)) + 0.8 * ((place + 0.5) / len(methods) - 0.5)
        right.bar(x, values, 0.8 / len(methods), color=matplotlib.colormaps["Dark2"](place), label=method)
    right.set_xticks(range(len(labels)), [one_line(label, TICK_LENGTH) for label in labels])
    right.set_ylabel("IoU (%)")
    right.set_title("fused prediction, per class")
    for axis in (left, right):
        axis.set_axisbelow(True)
        axis.grid(axis="y", alpha=0.4)
        axis.tick_params(axis="x", rotation=20)
        axis.legend(loc="upper left", bbox_to_anchor=(0, -0.17), ncols=5, frameon=False)
    figure.savefig(path, dpi=100)
