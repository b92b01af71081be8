"""Images cut into blocks: whole files and windows of large rasters."""

import numpy as np
import pytest
from helpers import write_raster
from PIL import Image

from co2s_hf.data import image_files
from co2s_hf.data.block_files import cut_samples, read_size
from co2s_hf.data.blocks import block_boxes
from co2s_hf.data.reading import ImageRule, LabelRule
from co2s_hf.data.samples import Samples


RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture
def files(tmp_path):
    """An image of four 16-bit bands and its label map of 50 x 40 px: values 3 and 7; in a corner 9, for no class."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 3000, (4, 40, 50), dtype=np.uint16)
    labels = rng.choice(np.array([3, 7], dtype=np.uint16), (1, 40, 50))
    labels[:, :20, :20] = 9
    return write_raster(tmp_path / "image.tif", values), write_raster(tmp_path / "label.tif", labels)


def cut(files, folder, **rules):
    image, label = files
    return cut_samples(Samples.of_files([str(image)], [str(label)], **rules), 20, 16, folder)


def pixels(samples):
    return [(np.asarray(s.load_image()), None if s.label is None else np.asarray(s.load_label())) for s in samples]


RULES = {
    "image_rule": ImageRule((4, 3, 2), ((0, 3000),)),
    "label_rule": LabelRule(ignore_index=9, label_map=((3, 3, 1), (7, 7, 0))),
}


@pytest.mark.parametrize("most", [2**28, 1000], ids=["whole", "windows"])
def test_blocks_have_the_pixels_of_the_image_and_its_classes(most, files, tmp_path, monkeypatch):
    sample = Samples.of_files([str(files[0])], [str(files[1])], **RULES)[0]
    image, label = np.asarray(sample.load_image()), np.asarray(sample.load_label())
    monkeypatch.setattr(image_files, "MAX_PIXELS", most)  # larger images are read in windows
    blocks, origins, findings = cut(files, tmp_path / "blocks", **RULES)
    assert findings == [] and read_size(sample) == (50, 40)
    boxes = block_boxes((50, 40), 20, 16)
    monkeypatch.undo()
    for (left, upper, right, lower), found in zip(boxes, pixels(blocks), strict=True):
        assert np.array_equal(found[0], image[upper:lower, left:right])
        if (left, upper) == (0, 0):
            assert found[1] is None  # no pixel has a class
        else:
            assert np.array_equal(found[1], label[upper:lower, left:right])
    assert origins[blocks[1].image.path] == f"{files[0]} (block at column 20, row 0)"
    assert origins[blocks[1].label.path] == f"{files[1]} (block at column 20, row 0)"


@pytest.mark.parametrize("most", [2**28, 1000], ids=["whole", "windows"])
def test_colours_of_label_files_become_classes(most, files, tmp_path, monkeypatch):
    classes = np.random.default_rng(1).integers(0, 2, (40, 50))
    colors = np.array([RED, BLUE], dtype=np.uint8)[classes]
    label = write_raster(tmp_path / "colors.tif", np.moveaxis(colors, -1, 0), photometric="rgb")
    rules = {"image_rule": RULES["image_rule"], "label_rule": LabelRule(colors=(RED, BLUE))}
    monkeypatch.setattr(image_files, "MAX_PIXELS", most)
    blocks, _, findings = cut((files[0], label), tmp_path / "blocks", **rules)
    assert findings == []
    for (left, upper, right, lower), sample in zip(block_boxes((50, 40), 20, 16), blocks, strict=True):
        assert np.array_equal(np.asarray(sample.load_label()), classes[upper:lower, left:right])


def test_the_palette_of_a_label_map_is_kept(tmp_path):
    Image.new("RGB", (40, 20), RED).save(tmp_path / "image.png")
    label = Image.new("P", (40, 20), 1)
    label.putpalette([*RED, *BLUE])
    label.save(tmp_path / "label.png")
    blocks, _, _ = cut((tmp_path / "image.png", tmp_path / "label.png"), tmp_path / "blocks")
    with Image.open(blocks[1].label.path) as block:
        assert block.getpalette()[:6] == [*RED, *BLUE] and (np.asarray(block) == 1).all()


@pytest.mark.parametrize("most", [2**28, 1000], ids=["whole", "windows"])
def test_errors_name_the_original_files(most, files, tmp_path, monkeypatch):
    image, label = files
    monkeypatch.setattr(image_files, "MAX_PIXELS", most)
    rules = RULES | {"label_rule": LabelRule(ignore_index=9, label_map=((3, 3, 1),))}
    _, _, (finding,) = cut(files, tmp_path / "a", **rules)
    assert f"{label} has the label 7" in finding.message and "which no rule covers" in finding.message
    smaller = write_raster(tmp_path / "smaller.tif", np.full((1, 40, 49), 3, dtype=np.uint8))
    _, _, (finding,) = cut((image, smaller), tmp_path / "b", **RULES)
    assert finding.kind == "sizes that differ"
    assert finding.message.startswith(f"{smaller} is 49x40 px, but {image} is 50x40 px.")


def test_a_large_image_with_a_palette_and_a_large_map_of_floats_are_refused(files, tmp_path, monkeypatch):
    image, label = files
    palette = Image.new("P", (50, 40), 1)
    palette.putpalette([*RED, *BLUE])
    palette.save(tmp_path / "palette.tif")
    floats = write_raster(tmp_path / "floats.tif", np.ones((1, 40, 50), dtype=np.float32))
    monkeypatch.setattr(image_files, "MAX_PIXELS", 1000)
    _, _, (finding,) = cut((tmp_path / "palette.tif", label), tmp_path / "a", label_rule=RULES["label_rule"])
    assert f"{tmp_path / 'palette.tif'} has a palette, and is too large to be read at once" in finding.message
    _, _, (finding,) = cut((image, floats), tmp_path / "b", image_rule=RULES["image_rule"])
    assert f"{floats} holds 1 band of float32; expected one band of class indices" in finding.message
