"""Fixtures that the tests share."""

# helpers comes first: it sets environment variables that the other imports read.
from helpers import (
    HUB,
    PARITY,
    RESUMABLE_RUN,
    SMALL_RUN,
    load_parity,
    made_once,
    make_model,
    save_checkpoint,
    train_once,
)


# isort: split
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from local_hub import LocalHub
from safetensors import safe_open
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, DINOv3ViTConfig, DINOv3ViTModel

from co2s_hf import Co2SForSemanticSegmentation
from co2s_hf.data.drawn_scenes import write_scenes
from co2s_hf.hub.convert_co2s_to_hf import convert


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    """The local Hub of this process, empty and without failures."""
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


@pytest.fixture(scope="session")
def original_checkpoints(tmp_path_factory) -> dict[str, Path]:
    """Files `best_clip.pth` and `best_dinov3.pth` in the form of the authors' training script."""
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
    """Sizes that cannot be read from the authors' weights; the fixtures' metadata has them."""
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
    """Folders with a tiny CLIP (vision and text, with a character tokenizer) and a tiny DINOv3."""
    root = tmp_path_factory.mktemp("backbones")
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[]).save_pretrained(root / "clip")
    torch.manual_seed(0)
    backbone = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4}
    special = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "pad_token_id": len(tokens) - 1}
    config = CLIPConfig(
        text_config={**backbone, **special, "vocab_size": len(tokens), "projection_dim": 12},
        vision_config={**backbone, "patch_size": 4, "image_size": 16, "projection_dim": 12},
        projection_dim=12,
    )
    CLIPModel(config).save_pretrained(root / "clip")
    DINOv3ViTModel(DINOv3ViTConfig(**backbone, patch_size=8, num_register_tokens=2)).save_pretrained(root / "dinov3")
    return root / "clip", root / "dinov3"


@pytest.fixture(scope="session")
def scenes_folder(tmp_path_factory) -> Path:
    """A drawn data folder: 3 labelled, 5 unlabelled, 2 validation scenes of 48 px."""
    return made_once(tmp_path_factory, "scenes", lambda folder: write_scenes(folder, 3, 5, 2, size=48, seed=7))


@pytest.fixture(scope="session")
def small_run(scenes_folder, tmp_path_factory) -> Path:
    """The output of a training of four steps on drawn scenes, the first two on labels alone."""
    return train_once(tmp_path_factory, "small-run", "--data_dir", scenes_folder, *SMALL_RUN)


@pytest.fixture(scope="session")
def uninterrupted(scenes_folder, tmp_path_factory) -> Path:
    """The output of a training with checkpoints after steps 3 and 6 of 8."""
    return train_once(tmp_path_factory, "uninterrupted", "--data_dir", scenes_folder, *RESUMABLE_RUN)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory) -> Path:
    """A saved tiny model with crops of 16 px, as the base of adapters."""
    return made_once(tmp_path_factory, "base", lambda folder: save_checkpoint(folder, crop_size=16))
