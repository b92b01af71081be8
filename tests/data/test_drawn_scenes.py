import numpy as np
import pytest

from co2s_hf.data.drawn_scenes import draw_scene, write_scenes


def test_the_same_seed_draws_the_same_folder(scenes_folder, tmp_path):
    again = write_scenes(tmp_path / "again", 3, 5, 2, size=48, seed=7)
    paths = sorted(scenes_folder.rglob("*.*"))
    assert len(paths) == 10 + 10 + 3 + 1  # images, labels, lists, classes.json
    for path in paths:
        assert path.read_bytes() == (again / path.relative_to(scenes_folder)).read_bytes()
    other = write_scenes(tmp_path / "other", 1, 1, 1, size=48, seed=8)
    name = "images/labeled_0000.png"
    assert (other / name).read_bytes() != (scenes_folder / name).read_bytes()


def test_a_scene_has_known_colours_and_sizes_of_its_classes():
    """Mean colour and number of pixels of each class in the first scene: building, road, pavement, vegetation ..."""
    image, labels = draw_scene(np.random.default_rng(0), 64)
    assert image.shape == (64, 64, 3) and labels.shape == (64, 64)
    assert image.dtype == labels.dtype == np.uint8
    means = [image[labels == index].mean(axis=0) for index in range(6)]
    expected = [
        [168.3, 126.9, 117.9],
        [131.4, 148.0, 146.6],
        [175.7, 199.6, 187.3],
        [143.4, 182.3, 121.3],
        [186.0, 179.2, 145.6],
        [97.0, 125.8, 131.6],
    ]
    assert np.array(means) == pytest.approx(np.array(expected), abs=1)
    assert np.bincount(labels.ravel()) == pytest.approx(np.array([509, 748, 606, 692, 921, 620]), abs=8)


def test_every_class_is_frequent_enough_to_learn():
    counts = sum(np.bincount(draw_scene(np.random.default_rng(n), 96)[1].ravel(), minlength=6) for n in range(20))
    assert (counts / counts.sum() > 0.02).all()
