import numpy as np
import pytest
from PIL import Image

from co2s_hf.figures import Example, colorize, draw_curves, draw_predictions, draw_scene_map, palette_or_default


PALETTE = np.array([[255, 0, 0], [0, 0, 255]], dtype=np.uint8)


def test_labels_become_their_colours_and_no_class_black():
    found = colorize(np.array([[0, 1], [255, 0]]), PALETTE)
    assert found.tolist() == [[[255, 0, 0], [0, 0, 255]], [[0, 0, 0], [255, 0, 0]]]
    assert palette_or_default([[1, 2, 3]], 1).tolist() == [[1, 2, 3]]
    assert len(np.unique(palette_or_default(None, 15), axis=0)) == 15


def test_figures_hold_what_they_are_given(tmp_path):
    maps = {"truth": np.zeros((40, 40), dtype=int), "fused": np.ones((40, 40), dtype=int)}
    example = Example(Image.new("RGB", (40, 40), (0, 255, 0)), maps, np.full((40, 40), 0.5))
    draw_predictions([example, example], {0: "roof", 1: "lake"}, PALETTE, tmp_path / "predictions.png")
    pixels = np.asarray(Image.open(tmp_path / "predictions.png").convert("RGB")).reshape(-1, 3)
    for color in ((0, 255, 0), (255, 0, 0), (0, 0, 255)):  # the image, the truth, the prediction
        assert (pixels == color).all(axis=1).mean() > 0.05
    log = [{"step": 1, "loss": 2.0, "clip/loss": 1.0}, {"step": 2, "loss": 1.0, "clip/loss": 0.5, "clip/new": 0.1}]
    draw_curves(log, tmp_path / "curves.png")
    assert np.asarray(Image.open(tmp_path / "curves.png").convert("L")).std() > 5


@pytest.mark.parametrize(("size", "num_classes"), [((200, 200), 3), ((20, 400), 20), ((400, 20), 3), ((150, 200), 60)])
def test_a_scenes_panels_and_legend_have_room(size, num_classes, tmp_path, recwarn):
    """However long a scene or its legend is, matplotlib finds a layout, and the map is no thumbnail."""
    labels = np.arange(size[0] * size[1]).reshape(size) % num_classes
    palette = np.array([[200, n, 255 - n] for n in range(num_classes)], dtype=np.uint8)
    legend = {n: f"a class with quite a long name: {n}.0 %, 12.00 km²" for n in range(num_classes)}
    image = np.full((*size, 3), (1, 254, 7), dtype=np.uint8)
    draw_scene_map(image, labels, np.ones(size), legend, palette, tmp_path / "map.png")
    assert not recwarn.list
    picture = np.asarray(Image.open(tmp_path / "map.png").convert("RGB"))
    extent = np.ptp(np.argwhere((picture == (1, 254, 7)).all(axis=-1)), axis=0)
    assert extent.max() > 400 and max(picture.shape) < 4000
