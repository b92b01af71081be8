"""Show the content of a data source: a table to print, and a picture or HTML page with samples."""

import base64
import html
import io
from collections import Counter
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch

from ...utils.errors import UserValueError
from ...utils.figures import (
    CELL_INCHES,
    TICK_LENGTH,
    add_legend,
    legend_columns,
    literal_text,
    one_line,
    overlay,
    palette_or_default,
)
from ...utils.files import write_text, written_file
from ..reading import IGNORE
from ..sources import Source
from ..splits import SPLITS
from .checks import report_findings


SHOWN_PER_SET = 6
THUMBNAIL_PX = 320


def class_shares(source: Source) -> dict[str, dict[int, float]]:
    """Compute the share of each class in the pixels of each set with checked label maps.

    Returns:
        "labeled", "unlabeled" or "validation" -> class index, or 255 for "no class" -> share, 0 to 1.
    """
    shares = {}
    for split in SPLITS:
        counts = Counter()
        for facts in source.scans[split].labels or ():
            if facts is not None:
                counts.update(facts.counts)
        if counts:
            shares[split] = {index: count / counts.total() for index, count in counts.items()}
    return shares


def data_table(source: Source, num_tiles: dict[str, int] | None = None) -> str:
    """Format the number of images or blocks, their sizes and the class shares of each set.

    Args:
        source: The opened source.
        num_tiles: "labeled", "unlabeled" and "validation" -> number of tiles, if the images are cut.
    """
    shares = class_shares(source)
    kind = "images" if source.block_px is None else "blocks"
    rows = [(kind, [str(len(getattr(source, split))) for split in SPLITS])]
    if num_tiles is not None:
        rows.append(("tiles", [str(num_tiles.get(split, 0)) for split in SPLITS]))
    sizes = {split: np.array([facts.size for facts in source.scans[split].images]).reshape(-1, 2) for split in SPLITS}
    for axis, name in enumerate(("width, px", "height, px")):
        rows.append((name, [_range(sizes[split][:, axis]) for split in SPLITS]))
    for index, name in (source.id2label | {IGNORE: "(no class)"}).items():
        if index != IGNORE or any(IGNORE in found for found in shares.values()):
            cells = [f"{100 * shares[split].get(index, 0):.1f} %" if split in shares else "-" for split in SPLITS]
            rows.append((one_line(name), cells))
    width = max(len(name) for name, _ in rows)
    lines = [" " * width + "".join(f"{split:>14}" for split in SPLITS)]
    lines += [name.ljust(width) + "".join(f"{cell:>14}" for cell in cells) for name, cells in rows]
    return "\n".join(lines)


def announce(source: Source, report_path: str | Path | None = None, num_tiles: dict[str, int] | None = None):
    """Print the content of the data and the warnings about it, and write a report if a path is given.

    Args:
        source: The opened source.
        report_path: File of the report, see [`write_report`].
        num_tiles: Number of tiles of each set, if the images are cut.
    """
    print(data_table(source, num_tiles))
    if source.findings:
        print(report_findings(source.findings))
    if report_path is not None:
        write_report(source, report_path, num_tiles)
        print(f"Wrote a report of the data: {report_path}")


@literal_text
def write_report(source: Source, path: str | Path, num_tiles: dict[str, int] | None = None):
    """Draw samples of each checked set, class shares and image sizes.

    Args:
        source: The opened source.
        path: File to write. A path that ends in .png gives a picture. A path that ends in .html gives a page, which
            also contains the table and the warnings.
        num_tiles: Number of tiles of each set, if the images are cut.

    Raises:
        UserValueError: The path ends in neither .png nor .html.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".html", ".png"):
        raise UserValueError(f"The report '{path}' must be a file that ends in .html or .png.")
    picture = _sheet(source)
    if suffix == ".png":
        with written_file(path) as target:
            picture.savefig(target, dpi=100, format="png")
        return
    stream = io.BytesIO()
    picture.savefig(stream, dpi=100, format="png")
    picture_bytes = base64.b64encode(stream.getvalue()).decode()
    findings = report_findings(source.findings) or "There are no warnings."
    write_text(
        path,
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Data report</title>"
        "<style>body{font-family:sans-serif;margin:2em}img{max-width:100%}</style>"
        f"<h1>Data report</h1><p>Sets {source.hash}</p><pre>{html.escape(data_table(source, num_tiles))}</pre>"
        f"<h2>Findings</h2><pre>{html.escape(findings)}</pre>"
        "<h2>Samples, class shares, sizes</h2>"
        f"<img alt='samples and histograms' src='data:image/png;base64,{picture_bytes}'>"
        "</html>\n",
    )


def _range(values: np.ndarray) -> str:
    """Format the lowest and the highest value."""
    if not len(values):
        return "-"
    low, high = values.min(), values.max()
    return str(low) if low == high else f"{low} to {high}"


def _sheet(source: Source) -> Figure:
    """Draw a row of samples per set, the colours of the classes, and histograms below."""
    palette = palette_or_default(source.palette, len(source.id2label))
    figure = Figure(figsize=(CELL_INCHES * SHOWN_PER_SET, CELL_INCHES * (len(SPLITS) + 1.6)), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(len(SPLITS), 1.6))
    axes = upper.subplots(len(SPLITS), SHOWN_PER_SET, squeeze=False)
    for row, split in zip(axes, SPLITS):
        samples = getattr(source, split) if source.scans[split].images else ()
        places = np.linspace(0, len(samples) - 1, min(SHOWN_PER_SET, len(samples))).astype(int)
        for axis, place in zip(row, places.tolist()):
            sample = samples[place]
            image = sample.load_image()
            if split != "unlabeled":  # training does not use their labels, so they are not shown
                image = overlay(image, np.asarray(sample.load_label()), palette)
            image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
            axis.imshow(image)
            axis.set_title(one_line(Path(sample.image.path).name), fontsize=7)
        row[0].text(-0.08, 0.5, split, transform=row[0].transAxes, rotation=90, ha="right", va="center")
        for axis in row:
            axis.set_axis_off()
    handles, names = [Patch(color=palette[index] / 255) for index in source.id2label], list(source.id2label.values())
    ncols = min(legend_columns(names, CELL_INCHES * SHOWN_PER_SET), 8)
    add_legend(upper, handles, names, loc="outside lower center", ncols=ncols, fontsize=8)
    _histograms(source, lower)
    return figure


def _histograms(source: Source, figure: SubFigure):
    """Draw the class shares and the image sizes."""
    left, right = figure.subplots(1, 2)
    shares = class_shares(source)
    width = 0.8 / max(len(shares), 1)
    for n, (split, found) in enumerate(shares.items()):
        places = np.arange(len(source.id2label)) + n * width
        left.bar(places, [100 * found.get(index, 0) for index in source.id2label], width, label=split)
    names = [one_line(name, TICK_LENGTH) for name in source.id2label.values()]
    left.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    left.set_ylabel("% of the pixels")
    left.legend()
    megapixels = [[w * h / 1e6 for w, h in (facts.size for facts in source.scans[split].images)] for split in SPLITS]
    right.hist(megapixels, bins=20, label=SPLITS, stacked=True)
    right.set_xlabel("image size, megapixels")
    right.set_ylabel("images")
    right.legend()
