"""`co2s evaluate` and `co2s predict` with a model that is not trained."""

import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import open_folder, read_metrics, run_command, save_checkpoint
from PIL import Image

from co2s_hf import Co2SForSemanticSegmentation, Co2SImageProcessor
from co2s_hf.data.listings import read_classes
from co2s_hf.data.options import DataOptions
from co2s_hf.data.sources import open_source
from co2s_hf.inference.images import predict_logits
from co2s_hf.utils.figures import Example, draw_confusion, draw_predictions, overlay


@pytest.fixture(scope="module")
def data(scenes_folder):
    return open_folder(scenes_folder)


@pytest.fixture(scope="module")
def model_folder(data, tmp_path_factory):
    """A model with random weights, for windows of 32 px and the classes of the drawn scenes."""
    folder = tmp_path_factory.mktemp("random") / "model"
    save_checkpoint(folder, id2label=data.id2label, palette=data.palette, crop_size=32)
    return folder


@pytest.fixture(scope="module")
def predict(model_folder):
    """A function that predicts a sample: predictor -> confidence and labels, both (48, 48)."""
    model = Co2SForSemanticSegmentation.from_pretrained(model_folder)

    def predict(sample, flip=False, crop_size=32, **resize):
        processor = Co2SImageProcessor.from_pretrained(model_folder, **resize)
        pixel_values = processor(sample.load_image(), return_tensors="pt")["pixel_values"]
        logits = predict_logits(model, pixel_values, crop_size, (48, 48), flip)
        return {name: tuple(value.numpy() for value in found.softmax(0).max(0)) for name, found in logits.items()}

    return predict


def count(predict, data, **options) -> dict[str, np.ndarray]:
    """Count the true and the predicted classes of the validation images with NumPy."""
    counts = {name: np.zeros((6, 6), dtype=int) for name in ("clip", "dinov3", "fused")}
    for sample in data.validation:
        truth, found = np.asarray(sample.load_label()), predict(sample, **options)
        for name, matrix in counts.items():
            np.add.at(matrix, (truth[truth != 255], found[name][1][truth != 255]), 1)
    return counts


def iou(matrix: np.ndarray) -> np.ndarray:
    """Return the IoU of each class; NaN for a class that occurs nowhere."""
    with np.errstate(invalid="ignore"):
        return np.diag(matrix) / (matrix.sum(0) + matrix.sum(1) - np.diag(matrix))


def check_scores(found: dict, matrix: np.ndarray, id2label: dict[int, str]):
    expected = iou(matrix)
    assert found["accuracy"] == pytest.approx(np.trace(matrix) / matrix.sum())
    assert found["mean_iou"] == pytest.approx(np.nanmean(expected))
    assert found["mean_f1"] == pytest.approx(np.nanmean(2 * expected / (1 + expected)))
    for index, value in enumerate(expected):
        assert found["iou"][id2label[index]] == (None if np.isnan(value) else pytest.approx(value))


def run_evaluate(model_folder, scenes_folder, output, *words):
    words = ("--checkpoint", model_folder, "--data_dir", scenes_folder, "--output_dir", output, "--use_cpu", *words)
    return run_command("evaluate", *words)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ((), {}),
        (("--flip",), {"flip": True}),
        (("--crop_size", 48), {"crop_size": 48}),
        (("--eval_short_side", 32), {"do_resize": True, "size": {"shortest_edge": 32}}),
    ],
)
def test_evaluation_counts_the_classes_of_each_prediction(
    words, options, model_folder, predict, data, scenes_folder, tmp_path
):
    run = run_evaluate(model_folder, scenes_folder, tmp_path / "evaluation", "--num_shown", 1, *words)
    assert run.returncode == 0, run.stderr
    metrics = read_metrics(tmp_path / "evaluation")
    counts = count(predict, data, **options)
    for name, matrix in counts.items():
        check_scores(metrics[name], matrix, data.id2label)
    facts = {"num_images": 2, "crop_size": options.get("crop_size", 32), "flip": "flip" in options}
    facts |= {"data_hash": data.hash, "data": scenes_folder.name, "checkpoint": str(model_folder)}
    assert facts.items() <= metrics.items()
    row = next(line for line in run.stdout.splitlines() if line.startswith("mean IoU"))
    assert row.split()[2:] == [f"{100 * metrics[name]['mean_iou']:.1f}" for name in counts]


def test_evaluation_draws_the_confusion_matrix_and_the_first_images(
    model_folder, predict, data, scenes_folder, tmp_path
):
    run = run_evaluate(model_folder, scenes_folder, tmp_path / "evaluation", "--num_shown", 1)
    assert run.returncode == 0, run.stderr
    draw_confusion(count(predict, data)["fused"], data.id2label, tmp_path / "confusion.png")
    sample = data.validation[0]
    found = predict(sample)
    maps = {"truth": np.asarray(sample.load_label())} | {name: labels for name, (_, labels) in found.items()}
    example = Example(sample.load_image(), maps, found["fused"][0])
    draw_predictions([example], data.id2label, np.array(data.palette, dtype=np.uint8), tmp_path / "predictions.png")
    for name in ("confusion.png", "predictions.png"):  # drawn from the counts and predictions of this test
        with Image.open(tmp_path / name) as expected, Image.open(tmp_path / "evaluation" / name) as drawn:
            assert np.array_equal(np.asarray(expected), np.asarray(drawn)), name
    assert sorted(path.name for path in (tmp_path / "evaluation").iterdir()) == [
        "confusion.png", "metrics.json", "predictions.png",
    ]  # fmt: skip


def test_the_fusion_can_be_one_student(model_folder, predict, data, scenes_folder, tmp_path):
    run = run_evaluate(model_folder, scenes_folder, tmp_path / "evaluation", "--fusion", "dinov3")
    assert run.returncode == 0, run.stderr
    metrics = read_metrics(tmp_path / "evaluation")
    assert metrics["fused"] == metrics["dinov3"] and "clip" not in metrics and metrics["fusion"] == "dinov3"
    check_scores(metrics["fused"], count(predict, data)["dinov3"], data.id2label)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--num_shown", 0), 2, "--num_shown is 0; it must be at least 1"),
        (("--checkpoint", "/no/model"), 1, "/no/model"),
        (("--data_dir", "/no/data"), 1, "--data_dir is '/no/data', which does not exist"),
        (("--class_names", *"abcdef"), 1, "but the data is labelled with a, b, c, d, e, f. Evaluate a model of these"),
        (
            ("--hub_model_id", "user/x"),
            1,
            "--hub_model_id, --hub_private_repo and --hub_revision go with --push_to_hub",
        ),
        (("--push_to_hub",), 1, "--push_to_hub needs a repository: --hub_model_id user/name"),
    ],
)
def test_wrong_words_of_an_evaluation_write_nothing(words, code, message, model_folder, scenes_folder, tmp_path, hub):
    run = run_evaluate(model_folder, scenes_folder, tmp_path / "evaluation", *words)
    assert run.returncode == code and message in run.stderr and run.stderr.count("error: ") == 1
    assert not any(tmp_path.iterdir()) and not hub.repositories


def test_an_evaluation_overwrites_nothing(model_folder, scenes_folder):
    before = sorted(model_folder.iterdir())
    run = run_evaluate(model_folder, scenes_folder, model_folder)
    assert run.returncode == 1 and f"'{model_folder}' already exists and is not an empty folder" in run.stderr
    assert sorted(model_folder.iterdir()) == before


@pytest.fixture
def real_model(tmp_path, few_real_images) -> Path:
    """A model with random weights, for the classes of the real images."""
    description = read_classes(few_real_images / "classes.json")
    id2label = dict(enumerate(description.names))
    save_checkpoint(tmp_path / "model", id2label=id2label, palette=description.palette, crop_size=32)
    return tmp_path / "model"


REAL_IS_USED = "No data is named: using the validation images of Dubai aerial imagery in this package.\n"


def test_the_real_images_are_evaluated_if_no_data_is_named(real_model, few_real_images, tmp_path):
    for output, data in (("default", ()), ("named", ("--data", "real"))):
        words = ("--checkpoint", real_model, "--output_dir", tmp_path / output, "--use_cpu")
        run = run_command("evaluate", *words, *data)
        assert run.returncode == 0, run.stderr
        assert run.stdout.startswith(REAL_IS_USED) == (output == "default")
    run = run_evaluate(real_model, few_real_images, tmp_path / "folder", "--labeled_fraction", "1/12")
    assert run.returncode == 0, run.stderr
    default, named, folder = (read_metrics(tmp_path / name) for name in ("default", "named", "folder"))
    assert default == named and (default["data"], default["num_images"]) == ("Dubai aerial imagery", 2)
    assert folder | {"data": "Dubai aerial imagery"} == default


def test_a_model_of_other_classes_needs_its_own_data(model_folder, few_real_images, tmp_path):
    run = run_command("evaluate", "--checkpoint", model_folder, "--output_dir", tmp_path / "evaluation", "--use_cpu")
    assert run.returncode == 1 and not (tmp_path / "evaluation").exists()
    assert "but the data is labelled with building, land, road, vegetation, water. Evaluate a model of" in run.stderr
    assert "or name the data of this model: --data drawn, --data_dir, --dataset_name or --dataset." in run.stderr


def test_data_without_class_names_is_doubted(model_folder, scenes_folder, tmp_path):
    """The command names the classes that it takes, and the flag that confirms them."""
    folder = Path(shutil.copytree(scenes_folder, tmp_path / "unnamed"))
    (folder / "classes.json").unlink()
    run = run_evaluate(model_folder, folder, tmp_path / "doubted")
    assert run.returncode == 0, run.stderr
    assert "Its labels are taken as the classes of the model: 0 = " in run.stdout and "5 = water" in run.stdout
    names = run.stdout.split("If this is right, say so: --class_names ")[1].split(". Otherwise")[0]
    run = run_evaluate(model_folder, folder, tmp_path / "named", "--class_names", *shlex.split(names))
    assert run.returncode == 0 and "Its labels are taken as" not in run.stdout
    assert read_metrics(tmp_path / "named") == read_metrics(tmp_path / "doubted")
    for path in (folder / "labels").iterdir():
        Image.fromarray(np.minimum(np.asarray(Image.open(path)), 2)).save(path)
    run = run_evaluate(model_folder, folder, tmp_path / "refused")
    assert run.returncode == 1 and not (tmp_path / "refused").exists()
    assert "The model has 6 classes" in run.stderr and "the highest label of the data is 2" in run.stderr
    assert f"say so: --class_names {names}. Otherwise" in run.stderr


def test_drawn_scenes_of_a_seed_are_evaluated(model_folder, scenes_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "scenes-seed3").symlink_to(scenes_folder)
    run = run_command("evaluate", "--checkpoint", model_folder, "--data", "drawn", "--seed", 3, "--use_cpu")
    assert run.returncode == 0, run.stderr
    assert read_metrics(tmp_path / "outputs" / "evaluation")["num_images"] == 2
    run = run_command("predict", "--checkpoint", model_folder, "--data", "drawn", "--use_cpu")
    assert run.returncode == 1 and "--data_dir is 'outputs/scenes-seed0', which does not exist" in run.stderr


@pytest.mark.parametrize("words", [(), ("--data", "real"), ("--split", "labeled")])
def test_the_real_images_are_predicted_if_no_images_are_named(words, real_model, few_real_images, tmp_path):
    run = run_command("predict", "--checkpoint", real_model, "--output_dir", tmp_path / "out", *words, "--use_cpu")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(REAL_IS_USED) == ("--data" not in words)
    expected = open_source(DataOptions(data="real")).labeled.paths if "labeled" in words else []
    names = [Path(path).stem for path in expected] or ["tile1_part3", "tile1_part7"]
    assert sorted(path.stem for path in (tmp_path / "out" / "labels").iterdir()) == sorted(names)


@pytest.fixture
def photos(data, tmp_path):
    """A folder with an image in a folder, and a file that is no image."""
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    shutil.copy(data.validation[0].image.path, tmp_path / "photos" / "deep" / "one.png")
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"no image")
    return tmp_path / "photos"


def check_pictures(output: Path, name: str, sample, found, palette, opacity=0.5):
    """Compare the three pictures of an image with its prediction."""
    confidence, labels = found["fused"]
    with Image.open(output / "labels" / name) as picture:
        assert picture.mode == "P" and np.array_equal(np.asarray(picture), labels)
        assert np.array_equal(np.asarray(picture.convert("RGB")), palette[labels])
    picture = np.asarray(Image.open(output / "confidence" / name))
    assert np.abs(picture / 255 - confidence).max() <= 0.5 / 255 + 1e-4
    expected = overlay(sample.load_image(), labels, palette, opacity)
    assert np.array_equal(np.asarray(Image.open(output / "overlay" / name)), np.asarray(expected))


def test_images_become_label_maps_overlays_and_confidences(model_folder, predict, data, photos, tmp_path):
    second, palette = data.validation[1], np.array(data.palette, dtype=np.uint8)
    words = ("--checkpoint", model_folder, "--output_dir", tmp_path / "out", "--images", photos, second.image.path)
    run = run_command("predict", *words, "--save_confidence", "--opacity", 0.25, "--use_cpu")
    assert run.returncode == 1 and f"2 of 3 images are in {tmp_path / 'out'}." in run.stdout
    assert run.stderr.count("Left out: ") == 1 and "broken.jpg cannot be read" in run.stderr
    check_pictures(tmp_path / "out", "deep/one.png", data.validation[0], predict(data.validation[0]), palette, 0.25)
    check_pictures(tmp_path / "out", Path(second.image.path).name, second, predict(second), palette, 0.25)
    assert len(list((tmp_path / "out").rglob("*.png"))) == 6


def test_an_interrupted_prediction_is_continued(model_folder, data, tmp_path):
    """Images whose pictures all exist are skipped."""
    images = [sample.image.path for sample in data.unlabeled]
    words = ("--checkpoint", model_folder, "--output_dir", tmp_path / "out", "--images", *images, "--use_cpu")
    assert run_command("predict", *words).returncode == 0
    first, second, *_ = sorted((tmp_path / "out" / "labels").iterdir())
    before = second.read_bytes()
    first.write_bytes(b"as it was")
    second.unlink()
    run = run_command("predict", *words)
    assert run.returncode == 0 and "5 of 5 images are in" in run.stdout
    assert first.read_bytes() == b"as it was" and second.read_bytes() == before


@pytest.mark.parametrize("split", ["unlabeled", "validation"])
def test_a_set_of_a_data_source_is_predicted(split, model_folder, predict, data, scenes_folder, tmp_path):
    words = ("--checkpoint", model_folder, "--data_dir", scenes_folder, "--output_dir", tmp_path / "out", "--use_cpu")
    run = run_command("predict", *words, *(() if split == "unlabeled" else ("--split", split)), "--flip")
    assert run.returncode == 0, run.stderr
    samples = getattr(data, split)
    written = {path.name: path for path in (tmp_path / "out" / "labels").iterdir()}
    assert set(written) == {Path(sample.image.path).name for sample in samples}
    for sample in samples:
        labels = np.asarray(Image.open(written[Path(sample.image.path).name]))
        assert np.array_equal(labels, predict(sample, flip=True)["fused"][1])


def test_predictions_are_not_mixed_with_others(model_folder, data, photos, tmp_path):
    image, other = (sample.image.path for sample in data.validation)
    words = ("predict", "--checkpoint", model_folder, "--use_cpu", "--images")
    assert run_command(*words, image, "--output_dir", tmp_path / "out").returncode == 0
    before = sorted(tmp_path.rglob("*")), sorted(model_folder.rglob("*"))
    (photos / Path(image).name).write_bytes(Path(other).read_bytes())
    before[0].append(photos / Path(image).name)
    cases = [
        (
            (image, "--flip"),
            tmp_path / "out",
            "holds other predictions: --flip was False. Choose another --output_dir",
        ),
        ((image, "--opacity", 0.1), tmp_path / "out", "holds other predictions: --opacity was 0.5"),
        ((photos / Path(image).name,), tmp_path / "out", f"{Path(image).stem}.png was {image}"),
        ((image,), model_folder, "Choose another --output_dir: its content is not overwritten."),
        ((photos,), photos / "out", f"--output_dir is '{photos / 'out'}', inside '{photos}'"),
        (
            (tmp_path / "nothing",),
            tmp_path / "new",
            f"'{tmp_path / 'nothing'}' does not exist; --images takes files and",
        ),
        ((image, photos / Path(image).name), tmp_path / "new", f"would both become {Path(image).stem}.png"),
    ]
    for images, output, message in cases:
        run = run_command(*words, *images, "--output_dir", output)
        assert run.returncode == 1 and message in run.stderr, message
        assert run.stderr.count("error: ") == 1 and "Traceback" not in run.stderr
    assert (sorted(tmp_path.rglob("*")), sorted(model_folder.rglob("*"))) == (sorted(before[0]), before[1])
