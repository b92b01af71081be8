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
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hostile import WebServer
from local_hub import LocalHub
from PIL import Image
from safetensors import safe_open
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedTokenizerFast,
)

from co2s_hf import Co2SForSemanticSegmentation
from co2s_hf.data.drawn_scenes import write_scenes
from co2s_hf.data.options import REAL_FOLDER
from co2s_hf.hub.convert_co2s_to_hf import convert
from co2s_hf.model import text_guidance_co2s


@pytest.fixture
def server(tmp_path) -> Iterator[WebServer]:
    """A web server that the code under test must not ask for anything."""
    server = WebServer(tmp_path)
    yield server
    server.stop()


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


def write_stand_ins(folder: Path):
    """Write backbones with random weights in the form of those that ship with the package, float16 and word tokens."""
    specials = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<start>", "eos_token": "<end>"}
    words = ["a", "photo", "of", "bare", "soil", "sand", "water", "lake", "river", "road", "trees", "land", "building"]
    vocabulary = {token: index for index, token in enumerate([*specials.values(), *words, "vehicles"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 2), ("<end>", 3)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials).save_pretrained(folder / "co2s-tiny-clip")
    torch.manual_seed(0)
    backbone = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 3}
    text = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"vocab_size": len(vocabulary), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    config = CLIPConfig(
        text_config={**text, "projection_dim": 128},
        vision_config={**backbone, "patch_size": 8, "image_size": 128, "projection_dim": 128},
        projection_dim=128,
    )
    CLIPModel(config).half().save_pretrained(folder / "co2s-tiny-clip")
    dinov3 = DINOv3ViTConfig(**backbone, patch_size=8, image_size=128, num_register_tokens=4, layer_norm_eps=1e-6)
    DINOv3ViTModel(dinov3).half().save_pretrained(folder / "co2s-tiny-dinov3")


@pytest.fixture
def stand_ins(tmp_path_factory, monkeypatch) -> Path:
    """The folder in which the package looks for its shipped backbones; these have random weights."""
    folder = made_once(tmp_path_factory, "stand-ins", write_stand_ins)
    monkeypatch.setattr(text_guidance_co2s, "assets_folder", lambda: folder)
    return folder


@pytest.fixture
def no_network(monkeypatch):
    """Refuse every connection and every look-up of a name. The test fails at its end if there was an attempt."""
    attempts = []

    def refuse(*args, **kwargs):
        attempts.append(args)
        raise OSError("This test must not use the network.")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert not attempts


@pytest.fixture(scope="session")
def scenes_folder(tmp_path_factory) -> Path:
    """A drawn data folder: 3 labelled, 5 unlabelled, 2 validation scenes of 48 px."""
    return made_once(tmp_path_factory, "scenes", lambda folder: write_scenes(folder, 3, 5, 2, size=48, seed=7))


@pytest.fixture
def few_real_images(tmp_path, monkeypatch) -> Path:
    """A stand-in for the real images of the package: 24 of the tiles and 2 validation images of 64 px."""
    folder = tmp_path / "few_real_images"
    for name in ("images", "labels", "splits"):
        (folder / name).mkdir(parents=True)
    lines = (REAL_FOLDER / "splits" / "val.txt").read_text(encoding="utf-8").splitlines()[:2]
    (folder / "splits" / "val.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    paths = [path for line in lines for path in line.split()]
    tiles = sorted((REAL_FOLDER / "images").glob("tile*_y*.jpg"))[::9]
    paths += [path for tile in tiles for path in (f"images/{tile.name}", f"labels/{tile.stem}.png")]
    for path in paths:
        with Image.open(REAL_FOLDER / path) as image:
            image.resize((64, 64), Image.Resampling.NEAREST).save(folder / path)
    shutil.copy(REAL_FOLDER / "classes.json", folder)
    monkeypatch.setattr("co2s_hf.data.options.REAL_FOLDER", folder)
    return folder


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
