"""The teacher of a distillation: patch features of a pretrained vision backbone, computed once and cached.

The teacher sees a tile at the size that gives it as many patches as the student has. The features of a crop are then
the same part of both grids.
"""

import hashlib
import inspect
import os
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModel, PreTrainedConfig
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ...data.views import normalize
from ...model.loading_co2s import check_finite
from ...model.text_guidance_co2s import find_backbone, read_backbone_config
from ...utils.errors import UserError, UserOSError, UserValueError, loading
from ...utils.files import try_lock
from .tiles import Tile


TILES_PER_BATCH = 8
STATISTICS_TILES = 256  # tiles from which the mean and the standard deviation of the features are computed
NORMS = ("layernorm", "norm", "post_layernorm")  # names of the last normalisation in transformers' vision backbones


def read_teacher_config(name: str, layer: int | None) -> PreTrainedConfig:
    """Read the configuration of a teacher's vision part, and check that its features can be learned.

    The weights are not read. So a wrong teacher is refused before the images are decoded.

    Args:
        name: Hub name, shipped name or folder of the teacher.
        layer: Layer whose output is learned, counted from 1. None: the last one.

    Raises:
        UserOSError: The configuration cannot be loaded.
        UserValueError: The model has no patch tokens, or no such layer.
    """
    with loading(f"`teacher` {name}", name=name):
        config = read_backbone_config(name)
    config = getattr(config, "vision_config", config)
    layers, patch_size = getattr(config, "num_hidden_layers", None), getattr(config, "patch_size", None)
    if not isinstance(layers, int) or not isinstance(patch_size, int):
        raise UserValueError(
            f"`teacher` is {name}, a {config.model_type} model, which has no patch tokens. Name a vision "
            "transformer such as DINOv2 or DINOv3."
        )
    if patch_size < 1 or layers < 1:
        raise UserValueError(
            f"`teacher` is {name}, which has {layers} layers and patches of {patch_size} px; expected 1 or more."
        )
    if layer is not None and not 1 <= layer <= layers:
        raise UserValueError(f"`teacher_layer` is {layer}; {name} has the layers 1 to {layers}.")
    return config


class Teacher:
    """A pretrained vision backbone, of which one layer's normalised patch features are learned.

    Args:
        name: Hub name, shipped name or folder of a vision transformer, such as DINOv2 or DINOv3.
        layer: Layer whose output is learned, counted from 1. None: the last one.
        accelerator: Accelerate's state, with the device and the precision to compute in.

    Raises:
        UserOSError: The model cannot be loaded.
        UserValueError: The model has no patch tokens, or no such layer.
    """

    def __init__(self, name: str, layer: int | None, accelerator: Accelerator):
        config = read_teacher_config(name, layer)
        source = find_backbone(name)
        with loading(f"`teacher` {name}", name=name):
            model = AutoModel.from_pretrained(source, dtype=torch.float32)
            check_finite(model.state_dict().items(), f"'{name}'")
        model = getattr(model, "vision_model", model)
        self.layer = config.num_hidden_layers if layer is None else layer
        self.norm = next((child for key, child in model.named_children() if key in NORMS), torch.nn.Identity())
        _keep_layers(model, config.num_hidden_layers, self.layer)
        self.digest = _digest(model)
        self.model, self.accelerator = model.eval().requires_grad_(False).to(accelerator.device), accelerator
        self.name, self.patch_size, self.channels = name, config.patch_size, config.hidden_size
        self.num_prefix_tokens = 1 + getattr(config, "num_register_tokens", 0)
        self.mean, self.std = _statistics(source)
        accepts = inspect.signature(model.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in accepts else {}

    @torch.no_grad()
    def features(self, tiles: Sequence[Image.Image], grid: int) -> np.ndarray:
        """Compute the normalised features of some tiles.

        Args:
            tiles: RGB images.
            grid: Number of patches along a side.

        Returns:
            Float16 array (tiles, 1 + grid * grid, channels): the class token and the patches, row by row.

        Raises:
            UserValueError: The model has another number of patch tokens.
        """
        size = grid * self.patch_size
        resized = [np.asarray(tile.resize((size, size), Image.Resampling.BICUBIC)) for tile in tiles]
        pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).to(self.accelerator.device).float() / 255
        with self.accelerator.autocast():
            output = self.model(normalize(pixels, self.mean, self.std), output_hidden_states=True, **self.options)
            tokens = self.norm(output.hidden_states[self.layer])
        patches = tokens[:, self.num_prefix_tokens :]
        if patches.shape[1] != grid * grid:
            raise UserValueError(
                f"`teacher` {self.name} has {patches.shape[1]} patch tokens for {size} x {size} px; expected {grid} x "
                f"{grid}. Name a plain vision transformer such as DINOv2 or DINOv3."
            )
        return torch.cat([tokens[:, :1], patches], dim=1).half().cpu().numpy()


class TeacherFeatures:
    """The features of all tiles, computed when they are needed, or read from a file.

    Args:
        teacher: The teacher.
        tiles: All tiles.
        tile_size: Side of a tile in pixels.
        patch_size: Side of the student's patches in pixels.
    """

    def __init__(self, teacher: Teacher, tiles: Sequence[Tile], tile_size: int, patch_size: int):
        self.teacher, self.tiles, self.tile_size = teacher, tiles, tile_size
        self.grid, self.channels = tile_size // patch_size, teacher.channels
        self.shape = (1 + self.grid * self.grid, self.channels)
        self.rows = {tile: row for row, tile in enumerate(tiles)}
        self.cached: np.ndarray | None = None

    def __call__(self, tile: Tile, image: Image.Image | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the patch features (grid, grid, channels) and the class token (channels,) of one tile.

        Args:
            tile: One of the tiles.
            image: The same tile as an RGB image. None: it is read if it is needed.
        """
        if self.cached is None:
            tokens = self.teacher.features([image or tile.read(self.tile_size)], self.grid)[0]
        else:
            tokens = self.cached[self.rows[tile]]
        return tokens[1:].reshape(self.grid, self.grid, self.channels), tokens[0]

    @cached_property
    def statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation (channels,) of the patch features, from at most 256 tiles."""
        places = np.linspace(0, len(self.tiles) - 1, min(len(self.tiles), STATISTICS_TILES)).astype(int).tolist()
        patches = [self(self.tiles[place])[0] for place in places]
        values = torch.from_numpy(np.stack(patches).astype(np.float32)).flatten(0, 2)
        return values.mean(dim=0), values.std(dim=0).clamp(min=1e-6)

    @property
    def num_bytes(self) -> int:
        """Size of the cache of all tiles in bytes."""
        return len(self.tiles) * self.shape[0] * self.shape[1] * 2

    def cache(self, folder: Path, accelerator: Accelerator) -> Path:
        """Compute all features once, and read them from a file from now on. An interrupted computation continues.

        The name of the file depends on the teacher, its layer, the precision and the tiles. Other files in the folder
        are kept.

        Args:
            folder: Folder of the file.
            accelerator: Accelerate's state. Its main process computes; all processes must call this.

        Returns:
            Path of the file.

        Raises:
            UserOSError: The disk is full, the folder cannot be written to, another process computes the same features,
                or the file is damaged.
        """
        path = folder / f"features-{self._key()}.f16"
        if accelerator.is_main_process and not path.exists():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._compute(path.with_suffix(".part"))
                path.with_suffix(".part").rename(path)
            except UserError:  # about an image or the teacher, not about this file
                raise
            except OSError as error:
                raise UserOSError(
                    f"'{path}' cannot be written: {error}. It needs {self.num_bytes / 1e9:.2f} GB. Free some space, "
                    "name another `cache_dir`, or compute the features in every step: `cache_features=False`."
                ) from error
        accelerator.wait_for_everyone()
        if path.stat().st_size != self.num_bytes:
            raise UserOSError(
                f"'{path}' is damaged: it has {path.stat().st_size} bytes; expected {self.num_bytes}. Remove it. The "
                "features are then computed again."
            )
        self.cached = np.memmap(path, dtype=np.float16, mode="r", shape=(len(self.tiles), *self.shape))
        return path

    def _key(self) -> str:
        teacher = self.teacher
        facts = [teacher.name, teacher.digest, teacher.mean, teacher.std, teacher.accelerator.mixed_precision]
        facts += [teacher.layer, self.grid, *((tile.digest, tile.box) for tile in self.tiles)]
        return hashlib.blake2b(repr(facts).encode(), digest_size=8).hexdigest()

    def _compute(self, path: Path):
        """Append the features of the remaining tiles to a file."""
        bytes_per_tile = self.shape[0] * self.shape[1] * 2
        done = path.stat().st_size // bytes_per_tile if path.exists() else 0
        # Only whole batches are kept. The batches are then those of an uninterrupted computation, bit for bit. The
        # last one is computed again: after a power cut, zeros may stand for data that were not yet on the disk.
        done = max(done - done % TILES_PER_BATCH - TILES_PER_BATCH, 0)
        missing, free = self.num_bytes - done * bytes_per_tile, shutil.disk_usage(path.parent).free
        if missing > free:
            raise OSError(f"only {free / 1e9:.2f} GB are free")
        print(f"Caching the teacher's features: {self.num_bytes / 1e9:.2f} GB in {path.parent}.", flush=True)
        # Plain writes, not a writable memory map: on a full disk, a memory map ends the program with a bus error.
        with path.open("ab") as file:
            if not try_lock(file):
                raise UserOSError(
                    f"Another process computes the features in '{path}'. Wait until it has finished, or name another "
                    "`cache_dir`."
                )
            file.truncate(done * bytes_per_tile)
            starts = range(done, len(self.tiles), TILES_PER_BATCH)
            for start in tqdm(starts, desc="features of the teacher", unit="batch"):
                batch = [tile.read(self.tile_size) for tile in self.tiles[start : start + TILES_PER_BATCH]]
                file.write(self.teacher.features(batch, self.grid).tobytes())
                file.flush()
                os.fsync(file.fileno())


def _digest(model: torch.nn.Module) -> str:
    """Return a hash of the weights of a model."""
    digest = hashlib.blake2b(digest_size=8)
    for value in model.state_dict().values():
        digest.update(value.contiguous().numpy().data)
    return digest.hexdigest()


def _keep_layers(model: torch.nn.Module, layers: int, kept: int):
    """Remove the layers above the learned one, which would be computed in vain."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.ModuleList) and len(child) == layers:
                setattr(module, name, child[:kept])


def _statistics(name: str) -> tuple[list[float], list[float]]:
    """Return the mean and standard deviation with which the model's images are normalised; ImageNet's by default."""
    try:
        processor = AutoImageProcessor.from_pretrained(name)
        return list(processor.image_mean), list(processor.image_std)
    except (OSError, ValueError, AttributeError, ImportError):
        return list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)


__all__ = ["Teacher", "TeacherFeatures", "read_teacher_config"]
