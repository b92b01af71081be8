"""The features of a teacher: the right layer, and the cache."""

import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers import forget_accelerator, no_file_larger_than
from PIL import Image
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ResNetConfig,
    SwinConfig,
    SwinModel,
    ViTImageProcessor,
)
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from co2s_hf.training.pretraining import teacher as teacher_module
from co2s_hf.training.pretraining.teacher import Teacher, TeacherFeatures, read_teacher_config
from co2s_hf.training.pretraining.tiles import Tile, list_tiles
from co2s_hf.utils.errors import UserOSError, UserValueError
from co2s_hf.utils.files import try_lock


GRID = 4  # patches along a side of a tile
CLIP_SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}


def save_other_teacher(kind: str, folder):
    """Save a DINOv3 with registers, or a CLIP, both with 3 layers of width 16 and patches of 7 px."""
    torch.manual_seed(1)
    if kind == "dinov3":
        DINOv3ViTModel(DINOv3ViTConfig(**CLIP_SIZES, patch_size=7, num_register_tokens=2)).save_pretrained(folder)
    else:
        vision, text = {"patch_size": 7, "image_size": 28}, {"vocab_size": 20, "max_position_embeddings": 8}
        CLIPModel(
            CLIPConfig(vision_config=CLIP_SIZES | vision, text_config=CLIP_SIZES | text, projection_dim=8)
        ).save_pretrained(folder)


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True, mixed_precision="no")


@pytest.fixture
def tiles(scenes_folder) -> list[Tile]:
    return list_tiles([str(scenes_folder / "images")], None, 32)[:13]


@pytest.fixture
def features(teacher_folder, tiles, accelerator) -> TeacherFeatures:
    return TeacherFeatures(Teacher(str(teacher_folder), 2, accelerator), tiles, tile_size=32, patch_size=32 // GRID)


def by_hand(folder, layer: int, norm: str, num_prefix: int, image: Image.Image, mean, std) -> np.ndarray:
    """Compute the normalised tokens of one image with the whole model: the class token, then the patches."""
    model = AutoModel.from_pretrained(folder).eval()
    model = getattr(model, "vision_model", model)
    resized = image.resize((7 * GRID, 7 * GRID), Image.Resampling.BICUBIC)
    pixels = (np.asarray(resized, dtype=np.float32) / 255 - np.float32(mean)) / np.float32(std)
    with torch.no_grad():
        states = model(torch.from_numpy(pixels).permute(2, 0, 1)[None], output_hidden_states=True).hidden_states
        tokens = getattr(model, norm)(states[layer])[0].numpy()
    return np.concatenate([tokens[:1], tokens[num_prefix:]])


@pytest.mark.parametrize(
    ("kind", "norm", "num_prefix"),
    [("dinov2", "layernorm", 1), ("dinov3", "norm", 3), ("clip", "post_layernorm", 1)],
)
def test_features_are_the_normalised_output_of_a_layer(
    kind, norm, num_prefix, teacher_folder, tiles, accelerator, tmp_path
):
    folder = teacher_folder if kind == "dinov2" else tmp_path / "teacher"
    if kind != "dinov2":
        save_other_teacher(kind, folder)
    image = tiles[0].read(32)
    for layer in (2, None):
        teacher = Teacher(str(folder), layer, accelerator)
        found = teacher.features([image, tiles[5].read(32)], GRID)
        assert found.shape == (2, 1 + GRID * GRID, 16) and found.dtype == np.float16
        expected = by_hand(folder, layer or 3, norm, num_prefix, image, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        np.testing.assert_allclose(found[0], expected, atol=4e-3)
        # The layers above are removed.
        lists = [module for module in teacher.model.modules() if isinstance(module, torch.nn.ModuleList)]
        assert [len(layers) for layers in lists if len(layers)] == [layer or 3]
        assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
        # Another layer has other features.
        other = by_hand(folder, 1, norm, num_prefix, image, teacher.mean, teacher.std)
        assert np.abs(found[0] - other).max() > 0.02


def test_images_are_normalised_as_the_teacher_was_trained(teacher_folder, tiles, accelerator, tmp_path):
    AutoModel.from_pretrained(teacher_folder).save_pretrained(tmp_path)
    ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]).save_pretrained(tmp_path)
    teacher = Teacher(str(tmp_path), 2, accelerator)
    assert (teacher.mean, teacher.std) == ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    image = tiles[0].read(32)
    expected = by_hand(tmp_path, 2, "layernorm", 1, image, teacher.mean, teacher.std)
    np.testing.assert_allclose(teacher.features([image], GRID)[0], expected, atol=4e-3)


def test_statistics_are_those_of_the_patch_features(features, tiles, monkeypatch):
    values = np.concatenate([features(tile)[0].reshape(-1, 16) for tile in tiles]).astype(np.float64)
    mean, std = features.statistics
    np.testing.assert_allclose(mean, values.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(std, values.std(axis=0, ddof=1), atol=1e-4)
    monkeypatch.setattr(teacher_module, "STATISTICS_TILES", 3)
    few = TeacherFeatures(features.teacher, tiles, 32, 8)
    values = np.concatenate([features(tiles[place])[0].reshape(-1, 16) for place in (0, 6, 12)]).astype(np.float64)
    np.testing.assert_allclose(few.statistics[0], values.mean(axis=0), atol=1e-4)


def test_the_cache_holds_the_features_of_all_tiles(features, tiles, accelerator, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "deep" / "cache"
    folder.mkdir(parents=True)
    (folder / "features-of-another.f16").write_bytes(b"kept")
    computed = [features(tile) for tile in tiles]
    path = features.cache(folder, accelerator)
    assert f"Caching the teacher's features: 0.00 GB in {folder}." in capsys.readouterr().out
    assert sorted(file.name for file in folder.iterdir()) == sorted([path.name, "features-of-another.f16"])
    assert (folder / "features-of-another.f16").read_bytes() == b"kept"
    assert path.stat().st_size == features.num_bytes == 13 * 17 * 16 * 2
    images = [tile.read(32) for tile in tiles]
    expected = np.concatenate(
        [features.teacher.features(images[:8], GRID), features.teacher.features(images[8:], GRID)]
    )
    assert path.read_bytes() == expected.tobytes()
    for tile, (patches, class_token) in zip(tiles, computed):
        cached_patches, cached_class = features(tile)
        np.testing.assert_allclose(cached_patches, patches, atol=4e-3)  # of batches of 8 tiles instead of one
        np.testing.assert_allclose(cached_class, class_token, atol=4e-3)
        assert patches.shape == (GRID, GRID, 16) and class_token.shape == (16,)
    assert features(tiles[3], images[5])[1].tolist() == expected[3, 0].tolist()

    again = TeacherFeatures(features.teacher, tiles, 32, 8)
    monkeypatch.setattr(features.teacher, "features", None)  # it is not computed again
    assert again.cache(folder, accelerator) == path and capsys.readouterr().out == ""
    np.testing.assert_array_equal(again(tiles[-1])[0].reshape(-1, 16), expected[-1, 1:])


def test_the_name_of_the_cache_depends_on_its_content(features, tiles, teacher_folder, accelerator, tmp_path):
    folder = shutil.copytree(teacher_folder, tmp_path / "teacher")

    def key_of_the_copy(**precision) -> str:
        forget_accelerator()  # all Accelerators of a process have one precision
        return TeacherFeatures(Teacher(str(folder), 2, Accelerator(cpu=True, **precision)), tiles, 32, 8)._key()

    keys = {key_of_the_copy(), key_of_the_copy(mixed_precision="bf16")}
    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        model.encoder.layer[1].mlp.fc1.bias[0] += 1e-3
    model.save_pretrained(folder)  # other weights under the same name
    keys.add(key_of_the_copy())
    others = [
        TeacherFeatures(Teacher(str(teacher_folder), 1, accelerator), tiles, 32, 8),
        TeacherFeatures(features.teacher, tiles, 32, 16),
        TeacherFeatures(features.teacher, tiles[:-1], 32, 8),
        TeacherFeatures(features.teacher, [*tiles[:-1], Tile(tiles[-1].path, tiles[-1].box, "changed")], 32, 8),
    ]
    keys |= {other._key() for other in (features, *others)}
    assert len(keys) == 8
    moved = [Tile(f"elsewhere/{number}", tile.box, tile.digest) for number, tile in enumerate(tiles)]
    assert TeacherFeatures(features.teacher, moved, 32, 8)._key() == features._key()


def test_a_cache_of_another_size_is_not_read(features, accelerator, tmp_path):
    path = features.cache(tmp_path, accelerator)
    for content in (path.read_bytes()[:-2], path.read_bytes() + b"xx"):
        path.write_bytes(content)
        with pytest.raises(UserOSError) as error:
            features.cache(tmp_path, accelerator)
        assert str(error.value) == (
            f"'{path}' is damaged: it has {len(content)} bytes; expected {features.num_bytes}. Remove it. The "
            "features are then computed again."
        )


def test_two_processes_do_not_write_the_same_cache(features, accelerator, tmp_path):
    path = features.cache(tmp_path, accelerator)
    content = path.read_bytes()
    part = path.rename(path.with_suffix(".part"))
    with part.open("ab") as file:
        assert try_lock(file)  # as the other process does
        with pytest.raises(UserOSError, match=r"Another process computes the features in '.*\.part'\. Wait until"):
            features.cache(tmp_path, accelerator)
    assert part.read_bytes() == content
    assert features.cache(tmp_path, accelerator) == path and path.read_bytes() == content


@pytest.mark.parametrize("failure", ["interrupted", "full disk"])
def test_an_unfinished_cache_is_continued_bit_for_bit(failure, features, tiles, accelerator, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_module, "TILES_PER_BATCH", 3)
    whole = features.cache(tmp_path / "whole", accelerator)
    compute, calls = features.teacher.features, []

    def counted(images, grid):
        calls.append(len(images))
        if failure == "interrupted" and len(calls) == 3:
            raise KeyboardInterrupt
        return compute(images, grid)

    monkeypatch.setattr(features.teacher, "features", counted)
    if failure == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            features.cache(tmp_path / "part", accelerator)
    else:
        with no_file_larger_than(8 * 17 * 16 * 2 - 10), pytest.raises(UserOSError) as error:
            features.cache(tmp_path / "part", accelerator)
        assert str(error.value).startswith(f"'{tmp_path / 'part' / whole.name}' cannot be written: ")
        assert "Free some space, name another `cache_dir`, or compute the features in every step" in str(error.value)
    (part,) = (tmp_path / "part").iterdir()
    assert part == tmp_path / "part" / whole.with_suffix(".part").name
    with part.open("ab") as file:  # as if it was killed while it wrote the fourth tile of a batch
        file.write(b"x" * (17 * 16 * 2 + 5))
    calls[:] = [0, 0, 0]
    path = features.cache(tmp_path / "part", accelerator)
    assert calls[3:] == [3, 3, 3, 1]  # six of the thirteen tiles were there; the last three may not be complete
    assert path.read_bytes() == whole.read_bytes() and list((tmp_path / "part").iterdir()) == [path]


def test_a_disk_that_is_too_full_is_an_error_before_the_computation(features, accelerator, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 7000}))
    monkeypatch.setattr(features.teacher, "features", None)
    with pytest.raises(UserOSError, match=r"cannot be written: only 0\.00 GB are free\. It needs 0\.00 GB"):
        features.cache(tmp_path / "cache", accelerator)
    assert not any((tmp_path / "cache").iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserOSError, match="cannot be written: "):
        features.cache(tmp_path / "file", accelerator)


def test_a_missing_image_is_not_blamed_on_the_disk(features, accelerator, tmp_path):
    features.tiles = [Tile(str(tmp_path / "gone.png"), (0, 0, 32, 32))]
    with pytest.raises((OSError, ValueError), match="gone") as error:
        features.cache(tmp_path / "cache", accelerator)
    assert "cannot be written" not in str(error.value)


def test_teachers_that_cannot_be_used(teacher_folder, tiles, accelerator, tmp_path):
    ResNetConfig().save_pretrained(tmp_path / "resnet")  # the configuration is enough to refuse it
    with pytest.raises(UserValueError, match=r"is .*resnet, a resnet model, which has no patch tokens. Name a vision"):
        read_teacher_config(str(tmp_path / "resnet"), None)
    for layer in (0, 4):
        with pytest.raises(UserValueError, match=rf"`teacher_layer` is {layer}; .*dinov2 has the layers 1 to 3\."):
            Teacher(str(teacher_folder), layer, accelerator)
    with pytest.raises(UserOSError, match=r"`teacher` .*missing cannot be loaded"):
        read_teacher_config(str(tmp_path / "missing"), None)
    swin = SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=(1, 1), num_heads=(1, 1), window_size=2)
    SwinModel(swin).save_pretrained(tmp_path / "swin")
    features = TeacherFeatures(Teacher(str(tmp_path / "swin"), None, accelerator), tiles, 32, 8)
    with pytest.raises(UserValueError, match=r"swin has .* patch tokens for 16 x 16 px; expected 4 x 4. Name a plain"):
        features.cache(tmp_path / "cache", accelerator)
