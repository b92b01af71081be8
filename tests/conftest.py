"""Tiny configurations, models and data folders that the tests share."""

import atexit
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from local_hub import TOKEN, LocalHub


# Before anything asks where the Hub and its cache are: a test run leaves nothing in the user's, and its Hub is here.
HUB = LocalHub().start()
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="co2s_hf-tests-")
os.environ |= {"HF_ENDPOINT": HUB.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, DINOv3ViTConfig, DINOv3ViTModel

from co2s_hf import Co2SConfig, Co2SForSemanticSegmentation, Co2SImageProcessor
from co2s_hf.convert_co2s_to_hf import convert
from co2s_hf.data_arguments import DataArguments
from co2s_hf.sources import Source, open_source
from co2s_hf.synthetic import write_scenes


EXAMPLES = Path(__file__).parents[1] / "examples"
PARITY = Path(__file__).parent / "parity"
PLACE = {
    "crs": "EPSG:32640",
    "transform": Affine(0.5, 0, 500_000, 0, -0.5, 2_780_000),
}  # of scenes, half a metre a pixel


def make_config(**kwargs) -> Co2SConfig:
    """Two 16-wide, 3-layer towers with different patches (4 and 8 px) and a decoder of 16 channels, three classes."""
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    defaults = {
        "clip_config": {**tower, "patch_size": 4, "image_size": 16, "projection_dim": 12},
        "dinov3_config": {**tower, "patch_size": 8, "num_register_tokens": 2},
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
    """A model of [`make_config`] with the weights of a seed, in evaluation mode."""
    torch.manual_seed(seed)
    return Co2SForSemanticSegmentation(make_config(**kwargs)).eval()


def save_checkpoint(folder: Path, **kwargs) -> Co2SForSemanticSegmentation:
    """Save a model of [`make_model`] with its image processor; the model."""
    model = make_model(**kwargs)
    model.save_pretrained(folder)
    Co2SImageProcessor.from_model_config(model.config).save_pretrained(folder)
    return model


def run_example(name: str, *words, launcher: Sequence[str] = (sys.executable,)) -> subprocess.CompletedProcess:
    """Run one of the example scripts to its end."""
    command = [*launcher, str(EXAMPLES / name), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=example_environment(), timeout=300)


def example_environment() -> dict[str, str]:
    """One thread each: whole runs share the machine."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}


def open_folder(folder: Path, **settings) -> Source:
    return open_source(DataArguments(data_dir=str(folder), **settings))


class Pixelwise(torch.nn.Module):
    """A stand-in whose logits are each pixel's own three values, so that windows must not show."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self):
        super().__init__()
        self.config = make_config(crop_size=16)
        self.num_windows = 0

    def student_logits(self, pixel_values, students):
        self.num_windows += len(pixel_values)
        return {name: (n + 1) * pixel_values for n, name in enumerate(students)}


def write_raster(path: Path, values: np.ndarray, **profile) -> Path:
    """A GeoTIFF of (bands, height, width)."""
    count, height, width = values.shape
    profile = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": values.dtype} | profile
    with rasterio.open(path, "w", **profile) as raster:
        raster.write(values)
    return path


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """A disk that is full: what is written beyond so many bytes of any file fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    """The Hub that the client in this process talks to, empty and in order."""
    HUB.repositories.clear()
    HUB.requests.clear()
    HUB.large.clear()
    yield HUB
    HUB.failures.clear()


@pytest.fixture
def model() -> Co2SForSemanticSegmentation:
    return make_model()


@pytest.fixture
def images() -> torch.Tensor:
    """Two images of 16x24 pixels, normalised."""
    return torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(1))


def load_parity(name: str) -> dict[str, torch.Tensor]:
    return load_file(PARITY / f"{name}.safetensors")


@pytest.fixture(scope="session")
def original_checkpoints(tmp_path_factory) -> dict[str, Path]:
    """`best_clip.pth` and `best_dinov3.pth` as the authors' training script writes them."""
    folder = tmp_path_factory.mktemp("original")
    paths = {}
    for student in ("clip", "dinov3"):
        tensors = load_parity(f"{student}_student")
        weights = {f"module.{k[len('weights.') :]}": v for k, v in tensors.items() if k.startswith("weights.")}
        paths[student] = folder / f"best_{student}.pth"
        torch.save({"model": weights, "optimizer": {"state": {}, "param_groups": []}, "epoch": 3}, paths[student])
    return paths


@pytest.fixture(scope="session")
def parity_sizes() -> dict[str, int]:
    """The sizes that the authors' weights do not show, from the files' metadata."""
    metadata = {}
    for student in ("clip", "dinov3"):
        with safe_open(PARITY / f"{student}_student.safetensors", "pt") as file:
            metadata[student] = file.metadata()
    return {
        "num_attention_heads": int(metadata["clip"]["num_attention_heads"]),
        "decoder_num_attention_heads": int(metadata["clip"]["decoder_heads"]),
        "decoder_pool_size": int(metadata["clip"]["pool_size"]),
        "clip_logits_size": int(metadata["clip"]["decoder_output_size"]),
        "dinov3_logits_size": int(metadata["dinov3"]["decoder_output_size"]),
    }


@pytest.fixture(scope="session")
def converted_folder(tmp_path_factory, original_checkpoints, parity_sizes) -> Path:
    """The authors' checkpoints, converted."""
    folder = tmp_path_factory.mktemp("converted") / "model"
    convert(original_checkpoints["clip"], original_checkpoints["dinov3"], folder, "whdld", **parity_sizes)
    return folder


@pytest.fixture(scope="session")
def backbones(tmp_path_factory) -> tuple[Path, Path]:
    """Folders with a tiny CLIP (both towers and a character tokenizer) and a tiny DINOv3."""
    root = tmp_path_factory.mktemp("backbones")
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[]).save_pretrained(root / "clip")
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4}
    special = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "pad_token_id": len(tokens) - 1}
    config = CLIPConfig(
        text_config={**tower, **special, "vocab_size": len(tokens), "projection_dim": 12},
        vision_config={**tower, "patch_size": 4, "image_size": 16, "projection_dim": 12},
        projection_dim=12,
    )
    CLIPModel(config).save_pretrained(root / "clip")
    DINOv3ViTModel(DINOv3ViTConfig(**tower, patch_size=8, num_register_tokens=2)).save_pretrained(root / "dinov3")
    return root / "clip", root / "dinov3"


@pytest.fixture(scope="session")
def scenes_folder(tmp_path_factory) -> Path:
    """A drawn data folder: 3 labelled, 5 unlabelled, 2 validation scenes of 48 px."""
    return write_scenes(tmp_path_factory.mktemp("scenes") / "data", 3, 5, 2, size=48, seed=7)
