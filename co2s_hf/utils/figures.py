"""Pictures of predictions, label maps, confusion matrices and losses (matplotlib)."""

import textwrap
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image


CELL_INCHES = 2.2  # side of one panel


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


def draw_predictions(examples: list[Example], id2label: dict[int, str], palette: np.ndarray, path: str | Path):
    """Draw one row per example: the image, its coloured label maps and the confidence. The legend is below.

    Args:
        examples: One or more examples. All of them have maps with the same titles.
        id2label: Class index -> class name, for the legend.
        palette: RGB colours (classes, 3), uint8.
        path: Picture to write.
    """
    columns = ["image", *examples[0].maps, "confidence"]
    figure = Figure(figsize=(CELL_INCHES * len(columns), CELL_INCHES * len(examples) + 0.6), layout="constrained")
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
    handles = [Patch(color=palette[index] / 255, label=label) for index, label in id2label.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 8))
    figure.savefig(path, dpi=100)


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
    side = 2.5 + 0.6 * len(counts)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axis = figure.subplots()
    matrix = axis.imshow(shares, vmin=0, vmax=100, cmap="Blues")
    for (row, column), share in np.ndenumerate(shares):
        color = "white" if share > 50 else "black"
        axis.text(column, row, f"{share:.0f}" if totals[row, 0] else "-", ha="center", va="center", color=color)
    names = [id2label[index] for index in range(len(counts))]
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    figure.colorbar(matrix, ax=axis, label="% of the true class", shrink=0.8)
    figure.savefig(path, dpi=100)


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
    names = {index: textwrap.shorten(text, 60, placeholder=" ...") for index, text in legend.items()}
    figure_width = max(columns * panel[0] + 0.8, 7.0)
    # 0.085 inches per character and 0.7 for the patch and the margins; 0.24 inches per line of the legend.
    legend_columns = max(1, int(figure_width / (0.085 * max(map(len, names.values()), default=1) + 0.7)))
    legend_height = 0.24 * -(-len(names) // legend_columns) + 0.3
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
    handles = [Patch(color=palette[index] / 255, label=text) for index, text in names.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(legend_columns, max(len(handles), 1)))
    figure.savefig(path, dpi=150, format="png")


def draw_curves(log: list[dict], path: str | Path):
    """Draw the losses over the steps: one panel per loss term, one line per student.

    Args:
        log: Lines of log.jsonl. Each line has `step` and entries with names like `<student>/<term>`. Some lines may
            lack an entry.
        path: Picture to write.
    """
    names = dict.fromkeys(name for entry in log for name in entry if "/" in name and not isinstance(entry[name], dict))
    terms = dict.fromkeys(name.split("/")[1] for name in names)
    columns = 4
    rows = -(-len(terms) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.4 * rows), layout="constrained")
    for axis, term in zip(figure.subplots(rows, columns, squeeze=False).flat, terms):
        for name in names:
            if name.split("/")[1] == term:
                points = [(entry["step"], entry[name]) for entry in log if name in entry]
                axis.plot(*zip(*points), label=name.split("/")[0], marker=".")
        axis.set_title(term)
        axis.set_xlabel("step")
        axis.legend()
    for axis in figure.axes[len(terms) :]:
        axis.remove()
    figure.savefig(path, dpi=100)
