"""Make the two backbones that the package ships: co2s-tiny-dinov3 and co2s-tiny-clip.

    python examples/make_backbones.py --ucmerced path/to/ucmerced --teacher path/to/dinov2-small

`--ucmerced` is a folder with images/ and tags.csv: the 2100 images of UC Merced Land Use, with their tags. `--teacher`
is a DINOv2-small whose layer 8 is learned. The training tiles of the package's Dubai images join them; its validation
images never do. `--only dinov3` or `--only clip` makes one of them. A second call resumes an interrupted training.

The script writes float16 weights into co2s_hf/assets and prints their SHA-256, which the cards name.
"""

import argparse
import hashlib
import shutil
from pathlib import Path

import torch
from transformers import AutoTokenizer, CLIPModel, DINOv3ViTModel

from co2s_hf.training.pretraining.loop import pretrain_clip, pretrain_dinov3
from co2s_hf.training.pretraining.options import ClipOptions, Dinov3Options
from co2s_hf.utils.files import written_beside


ASSETS = Path(__file__).parents[1] / "co2s_hf" / "assets"
STEPS = {"dinov3": 3200, "clip": 2400}
TEACHER_LAYER = 8  # the last layers of this teacher were tuned for saliency
SEED = 0


def make(kind: str, args: argparse.Namespace) -> Path:
    """Pretrain one backbone and write it into the package's assets."""
    output_dir = args.output_dir / kind
    settings = {
        "images": [str(args.ucmerced / "images"), str(ASSETS / "dubai" / "images")],
        "exclude": str(ASSETS / "dubai" / "splits" / "val.txt"),
        "teacher": str(args.teacher),
        "teacher_layer": TEACHER_LAYER,
        "cache_dir": str(args.output_dir / "teacher_features"),
        "max_train_steps": STEPS[kind],
        "mixed_precision": args.mixed_precision,
        "seed": SEED,
        "output_dir": str(output_dir),
        "resume": any((output_dir / "checkpoints").glob("step-*")),
        "overwrite_output_dir": output_dir.exists() and not any((output_dir / "checkpoints").glob("step-*")),
    }
    if kind == "dinov3":
        folder = pretrain_dinov3(Dinov3Options(**settings))
    else:
        folder = pretrain_clip(ClipOptions(**settings, image_labels=str(args.ucmerced / "tags.csv")))
    target = ASSETS / f"co2s-tiny-{kind}"
    with written_beside(target) as beside:
        model = (DINOv3ViTModel if kind == "dinov3" else CLIPModel).from_pretrained(folder, dtype=torch.float32)
        model.half().save_pretrained(beside)
        if kind == "clip":
            AutoTokenizer.from_pretrained(folder).save_pretrained(beside)
        (beside / "model.safetensors").chmod(0o644)  # safetensors gives access to the owner only
        shutil.copyfile(folder / "pretraining.json", args.output_dir / f"{kind}.json")
        if (target / "README.md").exists():
            shutil.copyfile(target / "README.md", beside / "README.md")
    return target


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ucmerced", type=Path, required=True, help="folder with images/ and tags.csv")
    parser.add_argument("--teacher", type=Path, required=True, help="folder of the teacher")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/backbones"))
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="bf16")
    parser.add_argument("--only", choices=tuple(STEPS), help="make one backbone; default: both")
    args = parser.parse_args()
    for kind in [args.only] if args.only else STEPS:
        target = make(kind, args)
        digest = hashlib.sha256((target / "model.safetensors").read_bytes()).hexdigest()
        print(f"{target / 'model.safetensors'}: SHA-256 {digest}")


if __name__ == "__main__":
    main()
