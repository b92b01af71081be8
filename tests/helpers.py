"""Tiny models, files and ways to run commands that the tests share.

Import this module before the libraries: it sets the environment variables that they read.
"""

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from local_hub import TOKEN, LocalHub


# The tests use a Hub and a cache of their own, and one thread per process: several processes run at the same time.
HUB = LocalHub().start()
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="co2s_hf-tests-")
os.environ |= {"HF_ENDPOINT": HUB.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
# Otherwise MKL's rounding depends on the memory address of a tensor, and loaded weights have other addresses.
os.environ["MKL_CBWR"] = "COMPATIBLE"
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

import numpy as np
import pytest
import rasterio
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from affine import Affine
from filelock import FileLock
from safetensors.torch import load_file

from co2s_hf import Co2SConfig, Co2SForSemanticSegmentation, Co2SImageProcessor, cli
from co2s_hf.data.options import DataOptions
from co2s_hf.data.sources import Source, open_source
from co2s_hf.data.views import Views


EXAMPLES = Path(__file__).parents[1] / "examples"
PARITY = Path(__file__).parent / "parity"
PLACE = {
    "crs": "EPSG:32640",
    "transform": Affine(0.5, 0, 500_000, 0, -0.5, 2_780_000),
}  # for scenes: UTM zone 40N, 0.5 m per pixel


def make_config(**kwargs) -> Co2SConfig:
    """Configure 3-layer backbones (16 wide, patches of 4 and 8 px), a decoder of 16 channels, and three classes."""
    backbone = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    defaults = {
        "clip_config": {**backbone, "patch_size": 4, "image_size": 16, "projection_dim": 12},
        "dinov3_config": {**backbone, "patch_size": 8, "num_register_tokens": 2},
        "clip_feature_layers": (0, 1, 2),
        "dinov3_feature_layers": (0, 1, 2),
        "decoder_channels": 16,
        "decoder_guidance_channels": 16,
        "decoder_skip_channels": (8, 4),
        "decoder_up_channels": (8, 8),
        "decoder_group_norm_channels": 4,
        "decoder_dilations": (1, 2),
        "id2label": {0: "land", 1: "road", 2: "water"},
        "palette": [[128, 128, 128], [255, 255, 0], [0, 0, 255]],
    }
    return Co2SConfig(**{**defaults, **kwargs})


def make_model(seed: int = 0, **kwargs) -> Co2SForSemanticSegmentation:
    """Make a model of [`make_config`] in evaluation mode; the seed determines its weights."""
    torch.manual_seed(seed)
    return Co2SForSemanticSegmentation(make_config(**kwargs)).eval()


def make_views(batch_size: int = 3, seed: int = 0, **changes) -> Views:
    """Make the views of a batch for the model of [`make_model`]; `changes` replace some of them."""
    generator = torch.Generator().manual_seed(seed)

    def images():
        return torch.randn(batch_size, 3, 16, 16, generator=generator)

    boxes = torch.zeros(batch_size, 16, 16, dtype=torch.bool)
    boxes[:, 4:12, 4:12] = True
    defaults = {
        "labeled": images(),
        "labels": torch.randint(3, (batch_size, 16, 16), generator=generator),
        "weak": images(),
        "strong_1": images(),
        "strong_2": images(),
        "padding": torch.zeros(batch_size, 16, 16, dtype=torch.bool),
        "cutmix_boxes_1": boxes,
        "cutmix_boxes_2": boxes.flip(0),
    }
    return Views(**{**defaults, **changes})


def save_checkpoint(folder: Path, **kwargs) -> Co2SForSemanticSegmentation:
    """Save a model of [`make_model`] with its image processor, and return the model."""
    model = make_model(**kwargs)
    model.save_pretrained(folder)
    Co2SImageProcessor.from_model_config(model.config).save_pretrained(folder)
    return model


@dataclass(frozen=True)
class Result:
    """Exit code and output of a command."""

    returncode: int
    stdout: str
    stderr: str


def run_command(*words) -> Result:
    """Run `co2s WORDS` in this process, to its end."""
    stdout, stderr, code = StringIO(), StringIO(), 0
    with redirect_stdout(stdout), redirect_stderr(stderr):
        try:
            cli.main([str(word) for word in words])
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
            if isinstance(error.code, str):
                print(error.code, file=stderr)
        finally:
            forget_accelerator()
    return Result(code, stdout.getvalue(), stderr.getvalue())


def forget_accelerator():
    """Let the next Accelerator in this process choose its own device and precision."""
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    PartialState._reset_state()


def run_subprocess(*words, launcher: Sequence[str] = ("-m", "co2s_hf")) -> subprocess.CompletedProcess:
    """Run a command in a new Python process, to its end.

    Args:
        words: Command and flags.
        launcher: Words between the interpreter and the command.
    """
    command = [sys.executable, *launcher, *map(str, words)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment(), timeout=300)


TWO_PROCESSES = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
TWO_PROCESSES += ("--main_process_port", "0", "-m", "co2s_hf")


def environment() -> dict[str, str]:
    """Return the environment variables of a subprocess that uses this checkout."""
    return {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "PYTHONIOENCODING": "utf-8"}


def made_once(tmp_path_factory, name: str, make: Callable[[Path], object]) -> Path:
    """Make a folder once per test run, whichever process of pytest-xdist asks first.

    Args:
        tmp_path_factory: pytest's.
        name: Of the folder.
        make: Fills the path that it gets; nothing exists there yet.
    """
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder, done = root / f"once-{name}", root / f"once-{name}.done"
    with FileLock(root / f"once-{name}.lock"):
        if not done.exists():
            make(folder)
            done.touch()
    return folder


# Flags of training runs that take a second or two.
SMALL_RUN = ("--supervised_warmup_steps", 2, "--max_train_steps", 4, "--crop_size", 32)
SMALL_RUN += ("--per_device_train_batch_size", 2, "--logging_steps", 2, "--from_scratch", "--recipe", "paper")
RESUMABLE_RUN = ("--supervised_warmup_steps", 2, "--max_train_steps", 8, "--crop_size", 32)
RESUMABLE_RUN += ("--per_device_train_batch_size", 2, "--logging_steps", 2, "--gradient_accumulation_steps", 2)
RESUMABLE_RUN += ("--checkpointing_steps", 3, "--seed", 5, "--card_samples", 1, "--from_scratch", "--recipe", "paper")


def train_once(tmp_path_factory, name: str, *words) -> Path:
    """Run `co2s train` once per test run.

    Returns:
        Its output folder. stdout.txt beside it has what the command printed.
    """

    def make(folder: Path):
        done = run_command("train", *words, "--output_dir", folder / "run")
        assert done.returncode == 0, done.stderr
        (folder / "stdout.txt").write_text(done.stdout, encoding="utf-8")

    return made_once(tmp_path_factory, name, make) / "run"


def read_metrics(folder: Path) -> dict:
    """Read the metrics.json in a folder."""
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def open_folder(folder: Path, **settings) -> Source:
    return open_source(DataOptions(data_dir=str(folder), **settings))


class Pixelwise(torch.nn.Module):
    """A model substitute: the logits of a pixel are its three values, so they do not depend on the windows."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self):
        super().__init__()
        self.config = make_config(crop_size=16)
        self.num_windows = 0

    def student_logits(self, pixel_values, students):
        self.num_windows += len(pixel_values)
        return {name: (n + 1) * pixel_values for n, name in enumerate(students)}


def write_raster(path: Path, values: np.ndarray, **profile) -> Path:
    """Write an array (bands, height, width) as a GeoTIFF."""
    count, height, width = values.shape
    profile = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": values.dtype} | profile
    with rasterio.open(path, "w", **profile) as raster:
        raster.write(values)
    return path


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """Simulate a full disk: writing more than `size` bytes to any file fails. Windows cannot do so."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def load_parity(name: str) -> dict[str, torch.Tensor]:
    return load_file(PARITY / f"{name}.safetensors")
