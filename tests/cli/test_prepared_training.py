"""From raw rasters to maps: a model knows how the images of its prepared data set were made."""

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
from helpers import PLACE, SMALL_RUN, read_metrics, run_command, write_raster
from PIL import Image

from co2s_hf import Co2SConfig


@pytest.fixture(scope="module")
def raw_run(tmp_path_factory) -> Path:
    """Four labelled rasters (uint16, four bands), the data set that was prepared from them, and a run on it."""
    folder, rng = tmp_path_factory.mktemp("raw"), np.random.default_rng(0)
    for name in ("images", "labels"):
        (folder / "data" / name).mkdir(parents=True)
    for n in range(4):
        labels = np.kron(rng.integers(0, 2, (4, 4)), np.ones((8, 8), dtype=int))
        values = (1000 * (labels + 1) + rng.integers(0, 900, (4, 32, 32))).astype(np.uint16)
        write_raster(folder / "data" / "images" / f"{n}.tif", values, **PLACE)
        Image.fromarray(labels.astype(np.uint8)).save(folder / "data" / "labels" / f"{n}.png")
    facts = {"classes": [{"name": "land"}, {"name": "water"}], "ground_sampling_distance_m": 0.5}
    (folder / "data" / "classes.json").write_text(json.dumps(facts), encoding="utf-8")
    words = ("--data_dir", folder / "data", "--labeled_fraction", "1/2", "--bands", "4,3,2", "--scale", 0, 3000)
    done = run_command("prepare", *words, "--output_dir", folder / "prepared")
    assert done.returncode == 0, done.stderr
    words = ("--dataset_name", folder / "prepared", "--method", "supervised", *SMALL_RUN[2:])
    done = run_command("train", *words, "--output_dir", folder / "run")
    assert done.returncode == 0, done.stderr
    return folder


def read_map(path: Path) -> list:
    with rasterio.open(path) as raster:
        return raster.read(1).tolist()


def test_the_model_maps_a_raw_scene_without_flags(raw_run, tmp_path):
    config = Co2SConfig.from_pretrained(raw_run / "run" / "model")
    assert (list(config.image_bands), [list(pair) for pair in config.image_scale]) == ([4, 3, 2], [[0, 3000]])
    assert config.ground_sampling_distance_m == 0.5
    scene = write_raster(
        tmp_path / "scene.tif", np.random.default_rng(1).integers(0, 3000, (4, 48, 64)).astype(np.uint16), **PLACE
    )
    words = ("predict", scene, "--checkpoint", raw_run / "run" / "model", "--save_confidence")
    flags = {"own": (), "given": ("--bands", "4,3,2", "--scale", 0, 3000), "other": ("--bands", "1,2,3")}
    for name, more in flags.items():
        done = run_command(*words, "--output", tmp_path / f"{name}.tif", *more)
        assert done.returncode == 0, done.stderr
    files = ("", "_confidence")
    found = {name: [read_map(tmp_path / f"{name}{file}.tif") for file in files] for name in flags}
    assert found["own"] == found["given"] != found["other"]


def test_the_prepared_images_are_not_converted_again(raw_run, tmp_path):
    """Evaluation and prediction read them as the training did, not by the bands of the model."""
    data = ("--dataset_name", raw_run / "prepared", "--checkpoint", raw_run / "run" / "model")
    done = run_command("evaluate", *data, "--output_dir", tmp_path / "evaluation", "--num_shown", 1)
    assert done.returncode == 0, done.stderr
    assert read_metrics(tmp_path / "evaluation")["fused"] == read_metrics(raw_run / "run")["fused"]
    raw = ("--images", raw_run / "data" / "images", "--checkpoint", raw_run / "run" / "model")
    for name, words in {"prepared": (*data, "--split", "validation"), "raw": raw}.items():
        done = run_command("predict", *words, "--output_dir", tmp_path / name, "--save_confidence")
        assert done.returncode == 0, done.stderr
    compared = list((tmp_path / "prepared" / "confidence").iterdir())
    for path in compared:
        (same,) = [p for p in (tmp_path / "raw" / "confidence").iterdir() if p.stem == path.stem.rpartition("_")[2]]
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(same)))
    assert len(compared) >= 1


def test_bands_of_converted_images_are_refused(raw_run, tmp_path):
    data = ("--dataset_name", raw_run / "prepared", "--checkpoint", raw_run / "run" / "model")
    done = run_command("evaluate", *data, "--output_dir", tmp_path / "evaluation", "--bands", "4,3,2")
    assert done.returncode == 1 and "Leave --bands out. A model that is trained on these images reads" in done.stderr


def test_an_adapted_model_takes_the_facts_of_its_data(raw_run, base_folder, tmp_path):
    words = ("--dataset_name", raw_run / "prepared", "--checkpoint", base_folder, "--max_train_steps", 1)
    done = run_command("finetune", *words, "--output_dir", tmp_path / "run", "--card_samples", 0)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "run" / "adapter" / "co2s_adapter.json").read_text(encoding="utf-8"))["config"]
    names = ("image_bands", "image_scale", "ground_sampling_distance_m")
    assert [found[name] for name in names] == [[4, 3, 2], [[0, 3000]], 0.5]
