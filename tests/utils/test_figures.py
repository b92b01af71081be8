import matplotlib
import numpy as np
import pytest
from pictures import color_runs, middle_row, read_picture
from PIL import Image

from co2s_hf.utils.figures import (
    Example,
    colorize,
    confidence_picture,
    draw_comparison,
    draw_confusion,
    draw_curves,
    draw_predictions,
    draw_scene_map,
    one_line,
    overlay,
    palette_or_default,
)


PALETTE = np.array([[255, 0, 0], [0, 0, 255]], dtype=np.uint8)
RED, BLUE, GREEN, OLIVE = (255, 0, 0), (0, 0, 255), (0, 255, 0), (90, 140, 20)


def colormap(name: str, value: float) -> tuple[int, int, int]:
    """Return the colour of a value from 0 to 1."""
    return tuple(map(int, matplotlib.colormaps[name](value, bytes=True)[:3]))


def test_labels_get_the_colours_of_their_classes_and_pixels_without_a_class_are_black():
    found = colorize(np.array([[0, 1], [255, 0]]), PALETTE)
    assert found.tolist() == [[[255, 0, 0], [0, 0, 255]], [[0, 0, 0], [255, 0, 0]]]
    assert palette_or_default([[1, 2, 3]], 1).tolist() == [[1, 2, 3]]
    assert len(np.unique(palette_or_default(None, 15), axis=0)) == 15


def test_an_overlay_mixes_the_image_with_the_colours_of_the_classes():
    image, labels = Image.new("RGB", (2, 1), (100, 100, 100)), np.array([[0, 1]])
    assert np.asarray(overlay(image, labels, PALETTE, 0.5)).tolist() == [[[177, 50, 50], [50, 50, 177]]]
    assert np.array_equal(overlay(image, labels, PALETTE, 0), image)
    assert np.array_equal(overlay(image, labels, PALETTE, 1), colorize(labels, PALETTE))


def test_a_confidence_picture_has_the_colours_of_viridis():
    found = np.asarray(confidence_picture(np.array([[0.0, 0.5, 1.0]])))
    for color, value in zip(found[0], (0.0, 0.5, 1.0)):
        assert np.abs(color.astype(int) - colormap("viridis", value)).max() <= 1


def test_predictions_are_rows_of_image_maps_and_confidence(tmp_path):
    zeros, ones = np.zeros((40, 40), dtype=int), np.ones((40, 40), dtype=int)
    first = Example(Image.new("RGB", (40, 40), GREEN), {"truth": zeros, "fused": ones}, np.full((40, 40), 0.5))
    second = Example(Image.new("RGB", (40, 40), OLIVE), {"truth": ones, "fused": zeros}, np.full((40, 40), 1.0))
    draw_predictions([first, second], {0: "roof", 1: "lake"}, PALETTE, tmp_path / "predictions.png")
    picture = read_picture(tmp_path / "predictions.png")
    rows = [middle_row(picture, color) for color in (GREEN, OLIVE)]
    assert rows[0] < rows[1]
    assert color_runs(picture[rows[0]]) == [GREEN, RED, BLUE, colormap("viridis", 0.5)]
    assert color_runs(picture[rows[1]]) == [OLIVE, BLUE, RED, colormap("viridis", 1.0)]
    legend = picture[-30:].transpose(1, 0, 2).reshape(-1, 3)  # column by column
    red, blue = (np.flatnonzero((legend == color).all(axis=1)) for color in (RED, BLUE))
    assert len(red) > 50 and len(blue) > 50 and red.max() < blue.min()  # the patches of roof and lake


def test_a_confusion_matrix_has_the_shares_of_each_true_class(tmp_path):
    draw_confusion(np.array([[80, 20], [0, 0]]), {0: "roof", 1: "lake"}, tmp_path / "confusion.png")
    picture = read_picture(tmp_path / "confusion.png")
    strong, weak, none = (colormap("Blues", share) for share in (0.8, 0.2, 0.0))
    cell = np.argwhere((picture == strong).all(axis=-1))
    top, bottom = cell[:, 0].min(), cell[:, 0].max()
    assert color_runs(picture[top + 5]) == [strong, weak]  # 5 px below the edge: above the number in the cell
    assert color_runs(picture[bottom + 10]) == [none]  # both cells of the class without pixels


def test_curves_run_through_the_losses_of_each_term(tmp_path):
    log = [{"step": 1, "loss": 2.0, "clip/loss": 1.0}, {"step": 2, "loss": 1.0, "clip/loss": 0.5, "clip/new": 0.1}]
    draw_curves(log, tmp_path / "curves.png")
    picture = read_picture(tmp_path / "curves.png")
    line = (picture == (31, 119, 180)).all(axis=-1)  # the first colour of matplotlib
    panels = line[:, :335], line[:, 335:700]
    assert all(panel.any() for panel in panels) and (picture[:, 700:] == 255).all()  # two terms, two panels
    places = np.argwhere(panels[0])
    left, right = (places[places[:, 1] == column][:, 0].mean() for column in (places[:, 1].min(), places[:, 1].max()))
    assert right - left > 50  # the loss falls from step 1 to step 2


def bar_heights(picture: np.ndarray, color: tuple[int, int, int]) -> list[int]:
    """Return the heights in pixels of the bars of a colour, from left to right."""
    heights = (picture == color).all(axis=-1).sum(axis=0)
    bars = np.split(heights, np.flatnonzero(np.diff(heights > 15)) + 1)
    return [int(bar.max()) for bar in bars if bar.max() > 15]  # dots and lines cover a few pixels of some columns


def test_bars_of_a_comparison_are_as_high_as_the_means(tmp_path):
    scores = {
        "without": {"clip": [20.0, 40.0], "fused": [50.0, 50.0]},
        "with": {"clip": [45.0, 45.0], "fused": [40.0, 80.0]},
    }
    classes = {"without": {"roof": 60.0, "lake": None}, "with": {"roof": 30.0, "lake": 45.0}}
    draw_comparison(scores, classes, tmp_path / "comparison.png")
    picture = read_picture(tmp_path / "comparison.png")[:370]  # without the legends
    left, right = picture[:, : picture.shape[1] // 2], picture[:, picture.shape[1] // 2 :]
    (first_clip, second_clip), (first_fused, second_fused) = (bar_heights(left, (n, n, n)) for n in (217, 179))
    assert first_clip / second_fused == pytest.approx(30 / 60, abs=0.02)
    assert second_clip / second_fused == pytest.approx(45 / 60, abs=0.02)
    assert first_fused / second_fused == pytest.approx(50 / 60, abs=0.02)
    (roof,), (other_roof, lake) = (bar_heights(right, colormap("Dark2", n)) for n in (0, 1))
    assert other_roof / roof == pytest.approx(0.5, abs=0.02) and lake / roof == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize(("size", "num_classes"), [((200, 200), 3), ((20, 400), 20), ((400, 20), 3), ((150, 200), 60)])
def test_the_panels_and_the_legend_of_a_scene_map_have_room(size, num_classes, tmp_path, recwarn):
    """Matplotlib finds a layout for long scenes and long legends, and the panels are not too small."""
    labels = np.arange(size[0] * size[1]).reshape(size) % num_classes
    palette = np.array([[200, n, 255 - n] for n in range(num_classes)], dtype=np.uint8)
    legend = {n: f"a class with quite a long name: {n}.0 %, 12.00 km²" for n in range(num_classes)}
    image = np.full((*size, 3), (1, 254, 7), dtype=np.uint8)
    draw_scene_map(image, labels, np.ones(size), legend, palette, tmp_path / "map.png")
    assert not recwarn.list
    picture = read_picture(tmp_path / "map.png")
    extent = np.ptp(np.argwhere((picture == (1, 254, 7)).all(axis=-1)), axis=0)
    assert extent.max() > 400 and max(picture.shape) < 4000


def test_a_scene_map_has_the_scene_the_classes_and_the_confidence(tmp_path):
    labels = np.repeat([[0] * 50 + [1] * 50], 100, axis=0)
    labels[60:] = 255
    confidence = np.where(labels == 255, np.nan, np.where(labels == 0, 0.25, 0.75))
    image = np.full((100, 100, 3), GREEN, dtype=np.uint8)
    draw_scene_map(image, labels, confidence, {0: "roof", 1: "lake"}, PALETTE, tmp_path / "map.png")
    picture = read_picture(tmp_path / "map.png")
    scene = np.flatnonzero((picture == GREEN).all(axis=-1).any(axis=1))
    upper, lower = (int(scene[0] + share * len(scene)) for share in (0.3, 0.8))
    expected = [GREEN, RED, BLUE, colormap("viridis", 0.25), colormap("viridis", 0.75)]
    assert color_runs(picture[upper]) == expected
    assert color_runs(picture[lower]) == [GREEN]  # pixels without data are white


# --- names from users

HOSTILE = [
    "$\\frac$",
    "a $x^2$",
    "_under_score",
    "back\\slash",
    "one\ntwo\x00",
    "مرحبا \u202eabc",
    "\U0001f3e0",
    "x" * 500,
]


def draw_all(names: list[str], folder):
    """Draw every figure with these names of classes, and return the pictures."""
    id2label, count = dict(enumerate(names)), len(names)
    labels = np.arange(40 * 40).reshape(40, 40) % count
    palette = palette_or_default(None, count)
    example = Example(Image.new("RGB", (40, 40), GREEN), {"truth": labels, "fused": labels}, np.full((40, 40), 0.5))
    draw_predictions([example], id2label, palette, folder / "predictions.png")
    draw_confusion(np.eye(count, dtype=int), id2label, folder / "confusion.png")
    image = np.full((40, 40, 3), GREEN, dtype=np.uint8)
    draw_scene_map(image, labels, np.ones((40, 40)), id2label, palette, folder / "map.png")
    log = [{"step": step, "clip/class weight": dict.fromkeys(names, 0.1 * step)} for step in (1, 2)]
    draw_curves(log, folder / "curves.png")
    scores = {"a $x$": {"clip": [20.0], "fused": [50.0]}}
    draw_comparison(scores, {"a $x$": dict.fromkeys(names, 60.0)}, folder / "comparison.png")
    return {path.name: read_picture(path) for path in sorted(folder.glob("*.png"))}


@pytest.mark.filterwarnings("ignore:Glyph .* missing from font", "ignore:Matplotlib currently does not support")
def test_the_names_of_classes_are_drawn_as_they_are(tmp_path):
    """The pictures are those without mathematics. With mathematics, matplotlib would refuse the first name."""
    drawn = draw_all(HOSTILE, tmp_path)
    with matplotlib.rc_context({"text.parse_math": False}):
        literal = draw_all(HOSTILE, tmp_path)
    others = draw_all(["a", *HOSTILE[1:]], tmp_path)
    assert len(drawn) == 5
    for figure, picture in drawn.items():
        assert np.array_equal(picture, literal[figure]) and max(picture.shape) < 2500, figure
        assert picture.shape != others[figure].shape or not np.array_equal(picture, others[figure]), figure


def test_names_are_not_given_to_tex(tmp_path):
    """A user may have switched on TeX in matplotlib's settings."""
    expected = draw_all(["a", "b"], tmp_path)
    with matplotlib.rc_context({"text.usetex": True}):
        drawn = draw_all(["a", "b"], tmp_path)
    assert all(np.array_equal(picture, drawn[name]) for name, picture in expected.items())


def test_a_legend_shows_names_that_start_with_an_underscore(tmp_path):
    zeros = np.zeros((40, 40), dtype=int)
    example = Example(Image.new("RGB", (40, 40), GREEN), {"truth": zeros}, np.full((40, 40), 0.5))
    draw_predictions([example], {0: "roof", 1: "_lake"}, PALETTE, tmp_path / "predictions.png")
    legend = read_picture(tmp_path / "predictions.png")[-30:]
    assert (legend == BLUE).all(axis=-1).sum() > 100
    draw_curves(
        [{"step": 1, "clip/x": {"_lake": 1.0}}, {"step": 2, "clip/x": {"_lake": 2.0}}], tmp_path / "curves.png"
    )
    assert (read_picture(tmp_path / "curves.png") == (31, 119, 180)).all(axis=-1).sum() > 100


def test_names_become_one_short_line():
    assert one_line("bare\n\t soil\x1b[2J ") == "bare soil [2J"
    assert one_line("tank \u202egnp.exe") == "tank gnp.exe"
    assert one_line("x" * 40) == "x" * 40 and one_line("x" * 41) == "x" * 26 + "…" + "x" * 13
    assert one_line("a very long name of a class: 12.0 %, 3.00 km²", 24) == "a very long nam…3.00 km²"
    assert one_line("\n") == ""
