"""Commands with addresses that contain secrets: nothing that is shown or written contains them."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import rasterio
from accelerate import tracking
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType
from datasets import Dataset, DatasetDict, Features
from datasets import Image as ImageColumn
from helpers import PLACE, SMALL_RUN, run_command, save_checkpoint, write_raster


SECRETS = ("s3cr3t", "sIgNaTuRe")  # password; signature
TESTS = Path(__file__).parents[1]


def assert_hidden(done, *folders: Path):
    """Check the output of a command, and the names and the content of all files below some folders."""
    shown = done.stdout + done.stderr
    for secret in SECRETS:
        assert secret not in shown
        for path in (path for folder in folders for path in [folder, *folder.rglob("*")]):
            assert secret not in path.name, path
            assert path.is_dir() or secret.encode() not in path.read_bytes(), path


@pytest.fixture
def server(tmp_path) -> Iterator[str]:
    """A web server with scene.tif, as "user:password@host:port"."""
    (tmp_path / "web").mkdir()
    image = np.random.default_rng(0).integers(1, 256, (3, 40, 24)).astype("uint8")
    write_raster(tmp_path / "web" / "scene.tif", image, **PLACE)
    command = [sys.executable, str(TESTS / "range_server.py"), str(tmp_path / "web")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield f"me:{SECRETS[0]}@127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


def test_a_signed_scene_is_mapped_and_continued_with_a_renewed_signature(server, tmp_path):
    save_checkpoint(tmp_path / "model", crop_size=16)
    words = ("--checkpoint", tmp_path / "model", "--use_cpu", "--vector", ".geojson", "--save_confidence")
    first = f"http://{server}/scene.tif?sig={SECRETS[1]}"
    done = run_command("predict", first, *words, "--output", tmp_path / "maps")
    assert done.returncode == 0, done.stderr
    assert_hidden(done, tmp_path / "maps")
    with rasterio.open(tmp_path / "maps" / "scene.tif") as raster:
        assert json.loads(raster.tags()["CO2S_SCENE"])["name"] == "scene.tif"
        assert set(np.unique(raster.read())) <= {0, 1, 2}
    before = (tmp_path / "maps" / "scene.tif").stat()
    renewed = f"http://{server}/scene.tif?sig=again-{SECRETS[1]}"
    done = run_command("predict", renewed, *words, "--output", tmp_path / "maps", "--resume")
    assert done.returncode == 0, done.stderr
    assert "1 of 1 maps are in" in done.stdout and (tmp_path / "maps" / "scene.tif").stat() == before  # the same scene
    assert_hidden(done, tmp_path / "maps")


@pytest.mark.parametrize(
    "scene",
    [
        "http://{server}/missing.tif?token={signature}",
        "/vsicurl/http://{server}/missing.tif?token={signature}#x",
        "/vsicurl?header.Authorization={signature}&url=http%3A%2F%2F127.0.0.1%3A1%2Fmissing.tif%3Fsig%3D{signature}",
    ],
)
def test_a_signed_scene_that_is_missing_is_named_without_its_signature(scene, server, tmp_path):
    save_checkpoint(tmp_path / "model", crop_size=16)
    words = ("--checkpoint", tmp_path / "model", "--use_cpu", "--output", tmp_path / "maps")
    done = run_command("predict", scene.format(server=server, signature=SECRETS[1]), *words)
    assert done.returncode == 1 and "Left out: " in done.stderr and "missing.tif" in done.stderr
    assert done.stderr.count("cannot be read") == 1 and "0 of 1 maps" in done.stdout
    assert "HIDDEN" in done.stderr
    assert_hidden(done)


def test_addresses_of_models_and_data_are_hidden_in_errors(scenes_folder, tmp_path):
    address = f"https://me:{SECRETS[0]}@127.0.0.1:1/model?token={SECRETS[1]}"
    commands = (
        ("predict", "--checkpoint", address, "--images", scenes_folder, "--output_dir", tmp_path / "out"),
        ("evaluate", "--checkpoint", address, "--output_dir", tmp_path / "out"),
        ("train", "--dataset_name", address, "--output_dir", tmp_path / "out"),
        ("train", "--data_dir", address, "--output_dir", tmp_path / "out"),
        ("prepare", "--dataset_name", address, "--report", tmp_path / "report.png"),
        ("push", "--checkpoint", address, "--hub_model_id", "user/x"),
        ("train", "--crop_size", address),
        (address,),
    )
    for words in commands:
        done = run_command(*words)
        shown = done.stderr.replace("https:/H", "https://H")  # the path of a folder has one slash
        assert done.returncode != 0 and "https://HIDDEN@127.0.0.1:1/model?HIDDEN" in shown, (words, done.stderr)
        assert_hidden(done)
        assert "Traceback" not in done.stderr


class Recorder(GeneralTracker):
    """A tracker that writes the options of the run to a file."""

    name, requires_logging_directory = "tensorboard", True

    def __init__(self, run_name: str, logging_dir: str, **kwargs):
        super().__init__()
        self.path = Path(logging_dir) / "recorded.json"

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values: dict):
        self.path.write_text(json.dumps(values), encoding="utf-8")

    def log(self, values: dict, step: int | None, **kwargs):
        pass


@pytest.fixture
def recorder(monkeypatch):
    """Let `report_to=["tensorboard"]` name the stand-in."""
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Recorder)


@pytest.mark.usefixtures("recorder")
def test_addresses_of_rows_are_hidden_in_everything_that_a_run_and_a_prediction_write(scenes_folder, tmp_path):
    """Rows of a data set keep the address that their image was downloaded from."""
    features = Features({"image": ImageColumn(), "label": ImageColumn()})
    tables = {}
    for split in ("labeled", "unlabeled", "validation"):
        rows = []
        for path in sorted((scenes_folder / "images").glob(f"{split}*.png")):
            address = f"https://me:{SECRETS[0]}@host/{path.name}?sig={SECRETS[1]}"
            label = (scenes_folder / "labels" / path.name).read_bytes() if split != "unlabeled" else None
            row = {"image": {"bytes": path.read_bytes(), "path": address}}
            rows.append(row | {"label": label and {"bytes": label, "path": address}})
        assert rows
        tables[split] = Dataset.from_list(rows, features=features)
    DatasetDict(tables).save_to_disk(tmp_path / "data")
    data = ("--dataset_name", tmp_path / "data")
    output = tmp_path / f"run?sig={SECRETS[1]}"  # so an option and the command have a secret, too
    run = run_command("train", *data, *SMALL_RUN, "--report_to", "tensorboard", "--output_dir", output)
    assert run.returncode == 0, run.stderr
    assert_hidden(run, *output.iterdir())
    listed = (output / "splits" / "val.txt").read_text(encoding="utf-8")
    assert "https://HIDDEN@host/validation_0000.png?HIDDEN" in listed
    hidden = str(tmp_path / "run?sig=HIDDEN")
    for name in ("arguments.json", "model/training.json"):
        record = json.loads((output / name).read_text(encoding="utf-8"))
        assert record["command"][-1] == hidden and record["arguments"]["output_dir"] == hidden
    (recorded,) = output.rglob("recorded.json")
    assert json.loads(recorded.read_text(encoding="utf-8"))["output_dir"] == hidden
    assert hidden in (output / "model" / "README.md").read_text(encoding="utf-8")
    (output / "model").rename(tmp_path / "model")
    words = ("predict", "--checkpoint", tmp_path / "model", *data, "--use_cpu")
    done = run_command(*words, "--output_dir", tmp_path / "predictions")
    assert done.returncode == 0, done.stderr
    assert_hidden(done, tmp_path / "predictions")
    assert (tmp_path / "predictions" / "labels" / "000000_unlabeled_0000.png").exists()
    done = run_command("prepare", *data, "--output_dir", tmp_path / "prepared", "--report", tmp_path / "report.html")
    assert done.returncode == 0, done.stderr
    assert_hidden(done, tmp_path / "prepared")
