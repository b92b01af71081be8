"""What a run shows people: predictions beside the truth, and the course of the losses (matplotlib)."""

import textwrap
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image


CELL_INCHES = 2.2


@dataclass(frozen=True)
class Example:
    """One image with its true and predicted label maps, by name, and the fused prediction's confidence (0..1)."""

    image: Image.Image
    maps: dict[str, np.ndarray]  # name -> (height, width), integer
    confidence: np.ndarray  # (height, width)


def palette_or_default(palette: list[list[int]] | None, num_labels: int) -> np.ndarray:
    """RGB colours (labels, 3), uint8: the given ones, or distinct ones of matplotlib's."""
    if palette is not None:
        return np.array(palette, dtype=np.uint8)
    colors = matplotlib.colormaps["tab20"](np.arange(num_labels) % 20)[:, :3]
    return (255 * colors).astype(np.uint8)


def colorize(labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """A label map (height, width) in colour, uint8; labels without a class (the ignore value) are black."""
    colors = np.zeros((256, 3), dtype=np.uint8)
    colors[: len(palette)] = palette
    return colors[labels.astype(np.uint8)]


def draw_predictions(examples: list[Example], id2label: dict[int, str], palette: np.ndarray, path: str | Path):
    """One row per example: the image, its maps in colour, the confidence; the classes' colours below."""
    columns = ["image", *examples[0].maps, "confidence"]
    figure = Figure(figsize=(CELL_INCHES * len(columns), CELL_INCHES * len(examples) + 0.6), layout="constrained")
    axes = figure.subplots(len(examples), len(columns), squeeze=False)
    for row, example in zip(axes, examples):
        pictures = [example.image, *(colorize(labels, palette) for labels in example.maps.values())]
        for axis, picture in zip(row, pictures):
            axis.imshow(picture, interpolation="nearest")
        shown = row[-1].imshow(example.confidence, vmin=0, vmax=1, cmap="viridis")
    for axis, title in zip(axes[0], columns):
        axis.set_title(title)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.colorbar(shown, ax=axes[:, -1], shrink=0.7)
    handles = [Patch(color=palette[index] / 255, label=label) for index, label in id2label.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 8))
    figure.savefig(path, dpi=100)


def draw_confusion(counts: np.ndarray, id2label: dict[int, str], path: str | Path):
    """What every class was taken for: rows are true classes, in per cent of their pixels.

    Args:
        counts: Pixels, (true class, predicted class).
        id2label: Names of the classes.
        path: Picture to write.
    """
    totals = counts.sum(axis=1, keepdims=True)
    shares = 100 * counts / np.maximum(totals, 1)
    side = 2.5 + 0.6 * len(counts)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axis = figure.subplots()
    shown = axis.imshow(shares, vmin=0, vmax=100, cmap="Blues")
    for (row, column), share in np.ndenumerate(shares):
        color = "white" if share > 50 else "black"
        axis.text(column, row, f"{share:.0f}" if totals[row, 0] else "-", ha="center", va="center", color=color)
    names = [id2label[index] for index in range(len(counts))]
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    figure.colorbar(shown, ax=axis, label="% of the true class", shrink=0.8)
    figure.savefig(path, dpi=100)


def overlay(image: Image.Image, labels: np.ndarray, palette: np.ndarray, opacity: float = 0.5) -> Image.Image:
    """The image with its label map (height, width) in colour over it."""
    return Image.blend(image.convert("RGB"), Image.fromarray(colorize(labels, palette)), opacity)


def confidence_picture(confidence: np.ndarray) -> Image.Image:
    """Confidence (height, width), 0 to 1, in the colours that the figures show it in: dark where it is low."""
    colors = matplotlib.colormaps["viridis"](confidence)[:, :, :3]
    return Image.fromarray((255 * colors).astype(np.uint8))


def draw_scene_map(
    image: np.ndarray,
    labels: np.ndarray,
    confidence: np.ndarray,
    legend: dict[int, str],
    palette: np.ndarray,
    path: str | Path,
):
    """A scene, its map and the map's confidence side by side, with what the legend says of every class.

    Args:
        image: (height, width, 3), uint8.
        labels: (height, width); what the palette has no colour for stays white.
        confidence: (height, width), 0 to 1; NaN stays white.
        legend: Text by class index.
        palette: (classes, 3), uint8.
        path: Picture to write.
    """
    height, width = labels.shape
    is_wide = width > 2.2 * height  # then one below the other
    side = 9.0 if is_wide else 4.5
    panel = side * min(1.0, max(width / height, 0.4)), side * min(max(height / width, 0.1), 1.6)
    rows, columns = (3, 1) if is_wide else (1, 3)
    names = {index: textwrap.shorten(text, 60, placeholder=" ...") for index, text in legend.items()}
    across = max(columns * panel[0] + 0.8, 7.0)
    num_columns = max(1, int(across / (0.085 * max(map(len, names.values()), default=1) + 0.7)))
    below = 0.24 * -(-len(names) // num_columns) + 0.3
    figure = Figure(figsize=(across, rows * (panel[1] + 0.35) + below), layout="constrained")
    axes = figure.subplots(rows, columns)
    colors = np.where((labels < len(palette))[..., None], colorize(labels, palette), np.uint8(255))
    axes[0].imshow(image)
    axes[1].imshow(colors, interpolation="nearest")
    shown = axes[2].imshow(confidence, vmin=0, vmax=1, cmap="viridis")
    for axis, title in zip(axes, ("scene", "map", "confidence")):
        axis.set_title(title)
        axis.set_axis_off()
    figure.colorbar(shown, ax=axes[2], shrink=0.7)
    handles = [Patch(color=palette[index] / 255, label=text) for index, text in names.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(num_columns, max(len(handles), 1)))
    figure.savefig(path, dpi=150, format="png")


def draw_attention(image: Image.Image, maps: dict[str, np.ndarray], path: str | Path, kind: str = "png"):
    """A sheet of attention maps over an image: for every layer all heads, their mean and their maximum.

    Args:
        image: What the towers saw.
        maps: Title -> (heads, rows, columns), each drawn from its own lowest to its own highest value.
        path: File to write.
        kind: "png" or "pdf".
    """
    columns = min(8, max(map(len, maps.values())) + 3)
    rows = {title: -(-(len(heads) + 3) // columns) for title, heads in maps.items()}
    figure = Figure(figsize=(CELL_INCHES * columns, (CELL_INCHES + 0.3) * sum(rows.values())), layout="constrained")
    parts = figure.subfigures(len(maps), 1, squeeze=False, height_ratios=list(rows.values()))[:, 0]
    extent = (0, image.width, image.height, 0)
    for part, (title, heads) in zip(parts, maps.items()):
        part.suptitle(title)
        panels = {f"head {n}": head for n, head in enumerate(heads)}
        panels |= {"mean": heads.mean(axis=0), "maximum": heads.max(axis=0)}
        axes = part.subplots(rows[title], columns, squeeze=False).ravel()
        for axis in axes:
            axis.set_axis_off()
        axes[0].imshow(image)
        axes[0].set_title("image")
        for axis, (name, values) in zip(axes[1:], panels.items()):
            axis.imshow(image.convert("L"), cmap="gray", extent=extent)
            axis.imshow(values, cmap="inferno", alpha=0.6, extent=extent, interpolation="bilinear")
            axis.set_title(name)
    figure.savefig(path, dpi=100, format=kind)


def draw_curves(log: list[dict], path: str | Path):
    """Every student's losses over the steps, one panel per term.

    Args:
        log: Lines of log.jsonl: `step` and `<student>/<term>` entries, not all of them in every line.
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
