"""Time the model on this machine, beside what cannot be avoided: transformers' two towers and the decoders.

python examples/benchmark.py                        # ViT-B/16 students, batch 2, 256 px, float32
python examples/benchmark.py --dtype bfloat16 --batch_size 8 --size 512
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from co2s_hf import Co2SConfig, Co2SForSemanticSegmentation


def median_seconds(function: Callable, repeats: int, device: torch.device) -> float:
    """Median time of a call, after two to warm up."""
    seconds = []
    for n in range(repeats + 2):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if n >= 2:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=2, help="images per call (default: 2)")
    parser.add_argument("--size", type=int, default=256, help="side of the images in pixels (default: 256)")
    parser.add_argument("--num_labels", type=int, default=6, help="classes (default: 6)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of weights and images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda ...")
    parser.add_argument("--repeats", type=int, default=7, help="calls whose median is taken (default: 7)")
    args = parser.parse_args()

    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    model = Co2SForSemanticSegmentation(Co2SConfig(num_labels=args.num_labels)).eval().to(device, dtype)
    images = torch.randn(args.batch_size, 3, args.size, args.size, device=device, dtype=dtype)
    clip, dinov3 = model.clip, model.dinov3
    grid = (args.size // clip.encoder.patch_size,) * 2
    states = {name: student.encoder.tapped_states(images) for name, student in (("clip", clip), ("dinov3", dinov3))}
    features = {"clip": clip.encoder.features(states["clip"], grid)}
    features["dinov3"] = dinov3.encoder.features(states["dinov3"], grid)
    parts = {
        "transformers' CLIPVisionModel": lambda: clip.encoder.record(images),
        "transformers' DINOv3ViTModel": lambda: dinov3.encoder.record(images),
        "CLIP student's decoder": lambda: clip.decoder(features["clip"], clip.guidance()),
        "DINOv3 student's decoder": lambda: dinov3.decoder(features["dinov3"], dinov3.guidance()),
        "CLIP tower up to its last tapped layer": lambda: clip.encoder.tapped_states(images),
        "CLIP's value-path features": lambda: clip.encoder.features(states["clip"], grid),
        "DINOv3 tower": lambda: dinov3.encoder.tapped_states(images),
        "whole model": lambda: model(images),
    }
    print(
        f"batch {args.batch_size}, {args.size} px, {args.num_labels} classes, {args.dtype}, {device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; median of {args.repeats}"
    )
    seconds = {}
    for name, function in parts.items():
        seconds[name] = median_seconds(function, args.repeats, device)
        print(f"{name:40}{1000 * seconds[name]:10.1f} ms")
    unavoidable = sum(list(seconds.values())[:4])
    print(f"{'both towers + both decoders':40}{1000 * unavoidable:10.1f} ms")


if __name__ == "__main__":
    main()
