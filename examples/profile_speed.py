"""Time the model on this machine.

    python examples/profile_speed.py          # prediction: ViT-B/16 students, batch 2, 256 px, float32
    python examples/profile_speed.py --dtype bfloat16 --batch_size 8 --size 512
    python examples/profile_speed.py --what train           # a training step: 2 labelled + 2 unlabelled crops
    python examples/profile_speed.py --what train --dtype bfloat16
    python examples/profile_speed.py --what train --lora_rank 8       # LoRA updates instead of attention weights
    python examples/profile_speed.py --what train --lora_rank 8 --method supervised       # as in `co2s finetune`
    python examples/profile_speed.py --what scene --dtype bfloat16    # a scene of 2048 px, from file to map

For prediction, the script also times the necessary parts: the two backbones of transformers and the decoders. A
training step consists of views, all losses of the paper, gradients and the optimizer. A scene is predicted in windows
of `--crop_size` that overlap by a sixth; this needs the extra `scenes`. `--dtype bfloat16` is autocast, as with
`--mixed_precision bf16`.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch

from co2s_hf import Co2SConfig, Co2SForSemanticSegmentation, Co2SImageProcessor
from co2s_hf.data.views import draw_appearance, draw_cutmix_box, make_views
from co2s_hf.training.lora import co2s_lora_config
from co2s_hf.training.objective import Co2SObjective
from co2s_hf.training.optimization import make_optimizer, training_size
from co2s_hf.utils.measuring import peak_memory_gb


def median_seconds(function: Callable, repeats: int, device: torch.device) -> float:
    """Return the median time of a call in seconds, after two warm-up calls."""
    seconds = []
    for n in range(repeats + 2):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if n >= 2:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return the context of forward passes in a precision, as `--mixed_precision` sets it."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@torch.no_grad()
def time_prediction(args: argparse.Namespace, device: torch.device, dtype: torch.dtype):
    """Time the whole model, and each of its parts."""
    model = Co2SForSemanticSegmentation(Co2SConfig(num_labels=args.num_labels)).eval().to(device)
    images = torch.randn(args.batch_size, 3, args.size, args.size, device=device)
    clip, dinov3 = model.clip, model.dinov3
    grid = (args.size // clip.encoder.patch_size,) * 2
    with autocast(device, dtype):
        states = {name: getattr(model, name).encoder.tapped_states(images) for name in ("clip", "dinov3")}
        features = {name: getattr(model, name).encoder.features(states[name], grid) for name in states}
    parts = {
        "transformers' CLIPVisionModel": lambda: clip.encoder.record(images),
        "transformers' DINOv3ViTModel": lambda: dinov3.encoder.record(images),
        "CLIP student's decoder": lambda: clip.decoder(features["clip"], clip.guidance()),
        "DINOv3 student's decoder": lambda: dinov3.decoder(features["dinov3"], dinov3.guidance()),
        "CLIP backbone up to its last used layer": lambda: clip.encoder.tapped_states(images),
        "CLIP's value-path features": lambda: clip.encoder.features(states["clip"], grid),
        "DINOv3 backbone": lambda: dinov3.encoder.tapped_states(images),
        "whole model": lambda: model(images),
    }
    seconds = {}
    for name, function in parts.items():
        with autocast(device, dtype):
            seconds[name] = median_seconds(function, args.repeats, device)
        print(f"{name:40}{1000 * seconds[name]:10.1f} ms")
    unavoidable = sum(list(seconds.values())[:4])
    print(f"{'both backbones + both decoders':40}{1000 * unavoidable:10.1f} ms")


def random_batch(batch_size: int, size: int, num_labels: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Make a random batch in the format of the data loader."""
    rng = np.random.default_rng(0)

    def stacked(draw: Callable[[], np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.stack([draw() for _ in range(batch_size)])).to(device)

    def image() -> np.ndarray:
        return rng.integers(0, 256, (3, size, size), dtype=np.uint8)

    batch = {"labeled": stacked(image), "weak": stacked(image)}
    batch["labels"] = stacked(lambda: rng.integers(0, num_labels, (size, size), dtype=np.uint8))
    batch["padding"] = stacked(lambda: np.zeros((size, size), dtype=bool))
    for n in (1, 2):
        batch[f"appearance_{n}"] = stacked(lambda: draw_appearance(rng))
        batch[f"cutmix_boxes_{n}"] = stacked(lambda: draw_cutmix_box(rng, size))
    return batch


def time_training(args: argparse.Namespace, device: torch.device, dtype: torch.dtype):
    """Time a step with all losses, and print its peak memory."""
    config = Co2SConfig(num_labels=args.num_labels)
    model = Co2SForSemanticSegmentation(config).freeze_backbones("none" if args.lora_rank else "attention")
    if args.lora_rank:
        model.add_adapter(co2s_lora_config(model, args.lora_rank, train_decoders=not args.freeze_decoders))
    model.train().to(device)
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()
    # An untrained model reaches this threshold in some pixels, so no loss is zero.
    objective, optimizer = Co2SObjective(model, threshold=1.1 / args.num_labels), make_optimizer(model)
    batch = random_batch(args.batch_size, args.size, args.num_labels, device)
    if args.method == "supervised":
        batch = {name: batch[name] for name in ("labeled", "labels")}

    def step():
        views = make_views(batch, config.image_mean, config.image_std)
        with autocast(device, dtype):
            losses = objective(views, stability_weight=0.5)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    print(f"{'training step':40}{median_seconds(step, args.repeats, device):10.2f} s")
    print(f"{'peak memory':40}{peak_memory_gb(device):10.2f} GB")
    print(training_size(model, optimizer))


def time_scene(args: argparse.Namespace, device: torch.device, dtype: torch.dtype):
    """Time a whole scene once, from the file to the finished map."""
    import rasterio  # the other timings do not need it

    from co2s_hf.geo.scenes import segment_scene

    config = Co2SConfig(num_labels=args.num_labels, crop_size=args.crop_size)
    model = Co2SForSemanticSegmentation(config).eval().to(device)
    image_processor = Co2SImageProcessor.from_model_config(config)
    with tempfile.TemporaryDirectory() as folder:
        place = {"crs": "EPSG:32640", "transform": rasterio.Affine(0.5, 0, 500_000, 0, -0.5, 2_780_000)}
        image = np.random.default_rng(0).integers(1, 256, (3, args.size, args.size), dtype=np.uint8)
        with rasterio.open(
            f"{folder}/scene.tif", "w", count=3, dtype="uint8", height=args.size, width=args.size, tiled=True, **place
        ) as raster:
            raster.write(image)
        start = time.perf_counter()
        with autocast(device, dtype):
            segment_scene(
                model, image_processor, f"{folder}/scene.tif", f"{folder}/map.tif", windows_per_batch=args.batch_size
            )
        seconds = time.perf_counter() - start
    print(f"{'from file to map':40}{seconds:10.1f} s, {args.size**2 / seconds / 1e3:.0f} thousand pixels per second")
    print(f"{'peak memory':40}{peak_memory_gb(device):10.2f} GB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--what", default="predict", choices=["predict", "train", "scene"], help="timed part (default: predict)"
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        default=2,
        help="images or windows per call; for train, images of each kind (default: 2)",
    )
    parser.add_argument("--size", type=int, help="side of the images in pixels (default: 256; scene: 2048)")
    parser.add_argument(
        "--crop_size", type=int, default=512, help="side of the windows of a scene in pixels (default: 512)"
    )
    parser.add_argument("--num_labels", type=int, default=6, help="number of classes (default: 6)")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16"], help="precision (default: float32)"
    )
    parser.add_argument("--gradient_checkpointing", action="store_true", help="with --what train: save memory")
    parser.add_argument("--lora_rank", type=int, default=0, help="with --what train: rank of LoRA updates; 0: none")
    parser.add_argument("--freeze_decoders", action="store_true", help="with --lora_rank: freeze the decoders")
    parser.add_argument(
        "--method", default="co2s", choices=["co2s", "supervised"], help="method of the training step (default: co2s)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    parser.add_argument(
        "--repeats", type=int, default=7, help="number of timed calls; the median is printed (default: 7)"
    )
    args = parser.parse_args()
    args.size = args.size or (2048 if args.what == "scene" else 256)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    print(
        f"{args.what}: batch {args.batch_size}, {args.size} px, {args.num_labels} classes, {args.dtype}, {device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
        + (f"; median of {args.repeats}" if args.what != "scene" else "")
    )
    {"predict": time_prediction, "train": time_training, "scene": time_scene}[args.what](args, device, dtype)


if __name__ == "__main__":
    main()
