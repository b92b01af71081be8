"""`co2s prepare`: a data set on the disk or on the Hub, tiles, reports, errors."""

import json
import shlex
import shutil

import numpy as np
import pytest
import rasterio
from helpers import PLACE, SMALL_RUN, open_folder, read_metrics, run_command, write_raster
from pictures import read_picture
from PIL import Image

from co2s_hf.data.drawn_scenes import write_scenes
from co2s_hf.data.options import DataOptions
from co2s_hf.data.sources import open_source
from co2s_hf.data.splits import SPLITS


def pixels(samples) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Return image and label map of all samples."""
    return [
        (np.asarray(sample.load_image()), None if sample.label is None else np.asarray(sample.load_label()))
        for sample in samples
    ]


def assert_same(ours, theirs):
    """Compare images and label maps, in order."""
    for (image, label), (other_image, other_label) in zip(pixels(ours), pixels(theirs), strict=True):
        assert np.array_equal(image, other_image)
        assert label is other_label is None or np.array_equal(label, other_label)


def test_a_prepared_data_set_has_the_same_images_labels_and_classes(scenes_folder, tmp_path):
    output = tmp_path / "prepared"
    done = run_command("prepare", "--data_dir", scenes_folder, "--output_dir", output)
    assert done.returncode == 0, done.stderr
    assert f"Wrote 3 labeled, 5 unlabeled, 2 validation images: co2s train --dataset_name {output}\n" in done.stdout
    assert "trained on them, give the same" not in done.stdout  # no rule was applied
    source, again = open_folder(scenes_folder), open_source(DataOptions(dataset_name=str(output)))
    assert (again.id2label, again.palette) == (source.id2label, source.palette)
    assert again.class_concepts == source.class_concepts
    for split in SPLITS:
        assert_same(getattr(source, split), getattr(again, split))
    assert not [path for path in tmp_path.iterdir() if path != output]  # temporary files are gone


def test_sets_are_drawn_and_large_images_cut(scenes_folder, tmp_path):
    draw = ("--data_dir", scenes_folder, "--labeled_fraction", "1/2", "--validation_fraction", "0.2", "--seed", 3)
    tiles = ("--tile_size", 32, "--tile_overlap", 8)
    done = run_command("prepare", *draw, *tiles, "--output_dir", tmp_path / "tiles")
    assert done.returncode == 0, done.stderr
    drawn = DataOptions(data_dir=str(scenes_folder), labeled_fraction=0.5, validation_fraction=0.2)
    source = open_source(drawn, 3, with_hidden_labels=True)
    again = open_source(DataOptions(dataset_name=str(tmp_path / "tiles")))
    for split in SPLITS:
        cut = []
        for image, label in pixels(getattr(source, split)):
            boxes = [np.s_[upper : upper + 32, left : left + 32] for upper in (0, 16) for left in (0, 16)]
            cut += [(image[box], label[box]) for box in boxes]
        found = pixels(getattr(again, split))
        assert len(found) == len(cut) > 0
        for (image, label), (tile, tile_label) in zip(cut, found):
            assert np.array_equal(image, tile)
            assert np.array_equal(label, tile_label)  # kept for unlabelled images, too, if there is one


def test_bands_scale_and_label_values_are_applied(tmp_path):
    """16-bit images of four bands become RGB of 8 bits; values of the label files become classes."""
    rng = np.random.default_rng(0)
    for name in ("images", "labels"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for n in range(4):
        values = rng.integers(0, 3000, (4, 16, 16), dtype=np.uint16)
        write_raster(tmp_path / "data" / "images" / f"{n}.tif", values, **PLACE)
        labels = rng.choice(np.array([7, 9, 255], dtype=np.uint8), (16, 16))
        Image.fromarray(labels).save(tmp_path / "data" / "labels" / f"{n}.png")
    words = ("--data_dir", tmp_path / "data", "--labeled_fraction", "1/2", "--validation_fraction", "1/4")
    words += ("--bands", "4,3,2", "--scale", 0, 3000, "--label_map", "7=1,9=0", "--class_names", "field", "bare soil")
    done = run_command("prepare", *words, "--output_dir", tmp_path / "prepared")
    assert done.returncode == 0, done.stderr
    written = "from bands (4, 3, 2) with scale ((0.0, 3000.0),). A model that is trained on them reads raw files in"
    assert written in done.stdout
    again = open_source(DataOptions(dataset_name=str(tmp_path / "prepared")))
    assert again.id2label == {0: "field", 1: "bare soil"}
    rules = {"labeled_fraction": 0.5, "validation_fraction": 0.25, "label_map": {7: 1, 9: 0}}
    rules |= {"bands": (4, 3, 2), "scale": ((0, 3000),), "class_names": ["field", "bare soil"]}
    source = open_folder(tmp_path / "data", **rules)
    for split in SPLITS:
        assert_same(getattr(source, split), getattr(again, split))
    (image, label), *_ = pixels(again.validation)
    assert image.shape == (16, 16, 3) and image.dtype == np.uint8 and set(np.unique(label)) == {0, 1, 255}


@pytest.mark.parametrize("name", ["report.png", "report.html"])
def test_a_report_alone_writes_nothing_else(name, scenes_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run_command("prepare", "--data_dir", scenes_folder, "--report", name)
    assert done.returncode == 0, done.stderr
    assert name in done.stdout and "images" in done.stdout and "Wrote 3" not in done.stdout
    assert [path.name for path in tmp_path.rglob("*")] == [name]
    if name.endswith(".png"):
        # The legend has the colours of the classes.
        picture, source = read_picture(tmp_path / name), open_folder(scenes_folder)
        for color in source.palette:
            assert (picture == color).all(axis=-1).sum() > 50, color
    else:
        assert "data:image/png;base64," in (tmp_path / name).read_text(encoding="utf-8")


def test_a_data_set_is_pushed_with_its_classes(hub, scenes_folder):
    done = run_command("prepare", "--data_dir", scenes_folder, "--push_to_hub", "user/fields", "--private")
    assert done.returncode == 0, done.stderr
    assert "Pushed 3 labeled, 5 unlabeled, 2 validation images: co2s train --dataset_name user/fields" in done.stdout
    repository = hub.repositories["dataset", "user/fields"]
    files = repository.trees[repository.refs["main"]]
    assert repository.private and {f"data/{split}-00000-of-00001.parquet" for split in SPLITS} <= set(files)
    classes = json.loads(files["classes.json"].data)
    assert [entry["name"] for entry in classes["classes"]] == list(open_folder(scenes_folder).id2label.values())


def labelled_scenes(scenes_folder, folder):
    """Copy the drawn scenes without their lists: all of them have labels."""
    for name in ("images", "labels"):
        shutil.copytree(scenes_folder / name, folder / name)
    shutil.copy(scenes_folder / "classes.json", folder)
    return folder


def test_a_folder_whose_images_all_have_labels_needs_no_unlabelled_set(scenes_folder, base_folder, tmp_path):
    """The result can be adapted to, and trained on if a fraction was given."""
    data, output = labelled_scenes(scenes_folder, tmp_path / "data"), tmp_path / "prepared"
    done = run_command("prepare", "--data_dir", data, "--output_dir", output, "--tile_size", 24)
    assert done.returncode == 0, done.stderr
    wrote = f"Wrote 32 labeled, 8 validation images: co2s finetune --checkpoint MODEL --dataset_name {output}\n"
    assert wrote in done.stdout and sorted(path.name for path in output.glob("*/")) == ["labeled", "validation"]
    words = ("--dataset_name", output, "--use_cpu", "--max_train_steps", 2, "--per_device_train_batch_size", 2)
    done = run_command("finetune", "--checkpoint", base_folder, *words, "--output_dir", tmp_path / "tuned")
    assert done.returncode == 0, done.stderr
    assert read_metrics(tmp_path / "tuned")["num_images"] == 8
    done = run_command("train", *words, "--output_dir", tmp_path / "trained")
    assert done.returncode == 1 and "There is no unlabeled image." in done.stderr
    words = ("--data_dir", data, "--output_dir", tmp_path / "half", "--tile_size", 24, "--labeled_fraction", "1/2")
    done = run_command("prepare", *words)
    assert done.returncode == 0, done.stderr
    assert "Wrote 16 labeled, 16 unlabeled, 8 validation images: co2s train --dataset_name" in done.stdout
    words = ("--dataset_name", tmp_path / "half", "--output_dir", tmp_path / "trained", *SMALL_RUN)
    assert run_command("train", *words).returncode == 0


def test_a_fraction_below_one_still_needs_an_unlabelled_image(scenes_folder, tmp_path):
    data = labelled_scenes(scenes_folder, tmp_path / "data")
    words = ("--data_dir", data, "--labeled_fraction", "0.99", "--output_dir", tmp_path / "new")
    done = run_command("prepare", *words)
    assert done.returncode == 1 and "There is no unlabeled image." in done.stderr


SIDE = (200, 160)  # width and height of the orthophoto


@pytest.fixture
def orthophoto(tmp_path):
    """One image and its label raster. Red and green are the column and the row of a pixel, blue is its label.

    The pixels on the right have no label, and those at the right border no data.
    """
    columns, rows = np.meshgrid(np.arange(SIDE[0], dtype=np.uint8), np.arange(SIDE[1], dtype=np.uint8))
    labels = ((columns // 7 + rows // 5) % 3).astype(np.uint8)
    labels[:, 160:] = 255
    image = np.stack([columns, rows, labels])
    image[:, :, 180:] = 0
    for name, values in (("images", image), ("labels", labels[None])):
        (tmp_path / "ortho" / name).mkdir(parents=True)
        write_raster(tmp_path / "ortho" / name / "city.tif", values, **PLACE)
    return tmp_path / "ortho"


def places(samples) -> list[set[tuple[int, int]]]:
    """Return the pixels of the orthophoto that each tile shows, after a comparison with its labels."""
    found = []
    for image, label in pixels(samples):
        assert label is None or np.array_equal(label, image[..., 2])
        found.append({(column, row) for column, row, value in image.reshape(-1, 3).tolist()})
    return found


def prepare_blocks(folder, output, *words):
    """Prepare tiles of 20 px in blocks of 40 px. Return the pixels of the tiles of each set, and what was printed."""
    words = ("--data_dir", folder, "--output_dir", output, "--tile_size", 20, "--block_px", 40, *words)
    done = run_command("prepare", *words)
    assert done.returncode == 0, done.stderr
    source = open_source(DataOptions(dataset_name=str(output)), needed=("labeled", "validation"))
    return {split: places(getattr(source, split)) for split in SPLITS}, done.stdout


@pytest.mark.parametrize("overlap", [0, 6])
def test_one_orthophoto_is_drawn_in_blocks(overlap, orthophoto, tmp_path):
    """No pixel of a validation block is in a training tile, and all labelled pixels are used."""
    words = ("--labeled_fraction", "1/4", "--tile_overlap", overlap, "--report", tmp_path / "report.html")
    tiles, printed = prepare_blocks(orthophoto, tmp_path / "tiles", *words)
    seen = {split: set().union(*tiles[split]) for split in SPLITS}
    assert not seen["validation"] & (seen["labeled"] | seen["unlabeled"]) and not seen["labeled"] & seen["unlabeled"]
    shown = {(column, row) for column in range(180) for row in range(160)}
    assert seen["labeled"] | seen["unlabeled"] | seen["validation"] == shown
    assert min(len(pixels) for split in SPLITS for pixels in tiles[split]) > 1  # no tile without data
    blocks = {split: {(column // 40, row // 40) for column, row in seen[split]} for split in SPLITS}
    assert len(blocks["validation"]) == 3 and len(blocks["labeled"]) == 3  # of 16 blocks with labels
    for split in ("labeled", "validation"):
        assert len(seen[split]) == len(blocks[split]) * 40 * 40  # whole blocks
        assert max(column for column, _ in seen[split]) < 160
    assert all(len(pixels) == 400 for pixels in tiles["labeled"])
    table = {
        line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.startswith(("blocks", "tiles"))
    }
    assert table == {"blocks": ["3", "14", "3"], "tiles": [str(len(tiles[split])) for split in SPLITS]}
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(line in report for line in printed.splitlines() if line.startswith(("blocks", "tiles")))


def test_the_seed_decides_the_blocks(orthophoto, tmp_path):
    draws = [prepare_blocks(orthophoto, tmp_path / str(n), "--seed", seed)[0] for n, seed in enumerate((1, 1, 2))]
    assert draws[0] == draws[1] and draws[0]["validation"] != draws[2]["validation"]


def test_unlabelled_parts_of_labelled_blocks_become_unlabelled(orthophoto, tmp_path):
    with rasterio.open(orthophoto / "labels" / "city.tif", "r+") as labels:
        values = labels.read(1)
        values[:20] = 255  # the upper half of the first row of blocks
        labels.write(values, 1)
    with rasterio.open(orthophoto / "images" / "city.tif", "r+") as image:
        image.write(values, 3)
    tiles, _ = prepare_blocks(orthophoto, tmp_path / "tiles")
    rows = {split: {row for tile in tiles[split] for _, row in tile} for split in SPLITS}
    assert min(rows["labeled"] | rows["validation"]) >= 20 and min(rows["unlabeled"]) == 0
    validation = {(column // 40, row // 40) for tile in tiles["validation"] for column, row in tile}
    assert not validation & {(column // 40, row // 40) for tile in tiles["unlabeled"] for column, row in tile}


def test_the_default_blocks_are_enough_for_the_sets(orthophoto, tmp_path):
    """A validation share of a fifth needs 5 blocks: of 80 px there are 6, of 160 px one."""
    words = ("--data_dir", orthophoto, "--output_dir", tmp_path / "new", "--tile_size", 20)
    done = run_command("prepare", *words)
    assert done.returncode == 0, done.stderr
    assert "The sets are drawn in blocks of 80 px." in done.stdout
    words = ("--data_dir", orthophoto, "--output_dir", tmp_path / "other", "--tile_size", 40)
    assert "The sets are drawn in blocks of 80 px." in run_command("prepare", *words).stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tile_size", 20, "--block_px", 10), "--block_px is 10, but --tile_size is 20. Choose blocks of several "
         "tiles, such as --block_px 80."),
        (("--tile_size", 20, "--block_px", 40, "--group_regex", "c"), "--block_px is 40 and --group_regex is 'c'. "
         "Give one of them"),
        (("--tile_size", 20, "--block_px", 200), "The images have 1 block with labels, but 2 sets are drawn "
         "(validation, labeled). Choose smaller blocks with --block_px."),
        (("--block_px", 40), "--block_px is 40; it goes with --tile_size."),
    ],
)  # fmt: skip
def test_blocks_that_do_not_fit(words, message, orthophoto, tmp_path):
    done = run_command("prepare", "--data_dir", orthophoto, "--output_dir", tmp_path / "new", *words)
    assert done.returncode > 0 and message in done.stderr and done.stderr.count("error: ") == 1
    assert not (tmp_path / "new").exists()


def test_blocks_of_data_with_lists_need_a_fraction(scenes_folder, tmp_path):
    words = ("--data_dir", scenes_folder, "--tile_size", 16, "--block_px", 32, "--output_dir", tmp_path / "new")
    done = run_command("prepare", *words)
    assert done.returncode == 1
    assert "the data already has its sets, so none are drawn. Leave --block_px out, or draw new" in done.stderr
    done = run_command("prepare", *words, "--labeled_fraction", "1/2")  # the validation list is kept
    assert done.returncode == 0, done.stderr
    again = open_source(DataOptions(dataset_name=str(tmp_path / "new")))
    assert {sample.image.name[:15] for sample in again.validation} == {"validation_0000", "validation_0001"}


def test_wrong_data_is_noticed_before_a_repository_is_created(hub, tmp_path):
    done = run_command("prepare", "--data_dir", tmp_path / "gone", "--push_to_hub", "user/fields")
    assert done.returncode == 1 and "which does not exist or is not a folder" in done.stderr
    assert not hub.repositories


@pytest.fixture
def broken_data(tmp_path):
    """A data folder with an unreadable image, so that reading the data is another error."""
    write_scenes(tmp_path / "data", 2, 2, 1, size=16, seed=0)
    (tmp_path / "data" / "images" / "labeled_0001.png").write_bytes(b"no image")
    return tmp_path / "data"


def test_a_public_data_set_is_refused_before_the_images_are_read(hub, broken_data, tmp_path):
    repository = hub.create("dataset", "user/open")
    words = ("--data_dir", broken_data, "--push_to_hub", "user/open", "--report", tmp_path / "report.png")
    done = run_command("prepare", *words, "--private", "--output_dir", tmp_path / "new")
    assert done.returncode == 1 and done.stdout == ""
    assert "error: The repository user/open exists and is public, but a private one was requested." in done.stderr
    assert len(repository.trees) == 1 and [path.name for path in tmp_path.iterdir()] == ["data"]


def test_an_existing_private_data_set_stays_private(hub, scenes_folder):
    repository = hub.create("dataset", "user/fields", private=True)
    for words in ((), ("--private",)):
        done = run_command("prepare", "--data_dir", scenes_folder, "--push_to_hub", "fields", *words)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("co2s train --dataset_name user/fields\n")  # the full name
        assert repository.private and "classes.json" in repository.trees[repository.refs["main"]]


def test_a_missing_login_is_an_error_before_the_images_are_read(hub, broken_data, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    done = run_command("prepare", "--data_dir", broken_data, "--push_to_hub", "user/fields")
    assert done.returncode == 1 and done.stdout == ""
    assert "The repository user/fields cannot be written to: " in done.stderr and "hf auth login" in done.stderr
    assert "Traceback" not in done.stderr and not hub.repositories


def test_a_missing_connection_is_an_error_before_the_images_are_read(hub, broken_data):
    hub.failures["/api/repos/create"] = 0
    done = run_command("prepare", "--data_dir", broken_data, "--push_to_hub", "user/fields")
    assert done.returncode == 1 and done.stdout == ""
    assert "The repository user/fields cannot be written to: " in done.stderr
    assert "Check the network connection." in done.stderr and "Traceback" not in done.stderr


def test_a_refused_upload_can_be_repeated_from_the_written_data_set(hub, scenes_folder, tmp_path):
    output = tmp_path / "new"
    hub.failures["/commit/"] = 403
    words = ("--data_dir", scenes_folder, "--push_to_hub", "user/fields", "--private")
    done = run_command("prepare", *words)
    assert done.returncode == 1 and "error: user/fields was not published completely: " in done.stderr
    assert done.stderr.endswith("Run the same command again.\n") and "Traceback" not in done.stderr
    done = run_command("prepare", *words, "--output_dir", output)
    assert done.returncode == 1 and f"The data set in {output} is complete; retry with: co2s " in done.stderr
    hub.failures.clear()
    again = run_command(*shlex.split(done.stderr.split("retry with: co2s ")[1]))
    assert again.returncode == 0, again.stderr
    repository = hub.repositories["dataset", "user/fields"]
    assert repository.private
    found, source = open_source(DataOptions(dataset_name="user/fields")), open_folder(scenes_folder)
    assert (found.id2label, found.palette) == (source.id2label, source.palette)
    assert_same(source.validation, found.validation)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--output_dir", "new", "--private"), 2, "--private goes with --push_to_hub."),
        ((), 2, "Name the result: --output_dir, --push_to_hub or --report."),
        (("--report", "report.pdf"), 2, "--report is 'report.pdf'; name a file that ends in .html or .png"),
        (
            ("--output_dir", "new", "--scale", "3", "1"),
            2,
            "--scale: '3 1' is not a scale; give the values that become 0 and 255",
        ),
        (("--output_dir", "new", "--label_map", "a=b"), 2, "--label_map: 'a=b' is not VALUE=CLASS"),
        (
            ("--output_dir", "new", "--split_column", "split"),
            2,
            "--split_column is split; it goes with --dataset_name",
        ),
        (
            ("--output_dir", "new", "--tile_size", 32, "--tile_overlap", 32),
            1,
            "--tile_overlap is 32; expected 0 or more, and less than --tile_size, which is 32.",
        ),
        (("--output_dir", "full"), 1, "'full' already exists and is not an empty folder"),
    ],
)
def test_wrong_words_write_nothing(words, code, message, scenes_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine", encoding="utf-8")
    done = run_command("prepare", "--data_dir", scenes_folder, *words)
    assert done.returncode == code and message in done.stderr and done.stderr.count("error: ") == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["full", "mine.txt"]


def test_the_data_must_be_named():
    done = run_command("prepare", "--report", "report.png")
    assert done.returncode == 1
    assert done.stderr == (
        "error: Name the data to prepare: --data_dir, --dataset_name or --dataset; or rasters, with polygons as "
        "labels: `co2s prepare ortho.tif`, --vector_labels and --class_column.\n"
    )


def test_broken_data_writes_nothing(tmp_path):
    write_scenes(tmp_path / "data", 2, 2, 1, size=16, seed=0)
    (tmp_path / "data" / "images" / "labeled_0001.png").write_bytes(b"no image")
    words = ("--output_dir", tmp_path / "new", "--report", tmp_path / "report.png")
    done = run_command("prepare", "--data_dir", tmp_path / "data", *words)
    assert done.returncode == 1 and "labeled_0001.png" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
