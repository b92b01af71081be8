"""Segment images: an index PNG with the classes' colours for every image, and a picture to look at.

    python examples/predict.py --checkpoint outputs/train_semi/model --images photo.jpg more_photos/

    # The unlabelled images of what was trained on; files of more than 8 bits or three bands, by rule.
    python examples/predict.py --data_dir path/to/folder
    python examples/predict.py --images scenes/ --bands 4,3,2 --scale 0 3000

    # Also how sure the model is of every pixel (0 to 255 for probabilities 0 to 1).
    python examples/predict.py --images more_photos/ --save_confidence

Writes labels/NAME.png, overlay/NAME.png and confidence/NAME.png at each image's size. Images that are done already are
left out, so an interrupted run goes on where it was; predictions.json says what the folder was made with. `accelerate
launch` shares the images among processes.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from tqdm.auto import tqdm

from co2s_hf.arguments import parse_arguments, setting, told_plainly
from co2s_hf.configuration_co2s import FUSIONS, Co2SConfig
from co2s_hf.data import Samples
from co2s_hf.data_arguments import DataArguments
from co2s_hf.figures import overlay, palette_or_default
from co2s_hf.files import check_new_folder, write_json, written_file
from co2s_hf.inference import load_for_prediction, predict_logits
from co2s_hf.listings import find_images
from co2s_hf.report import announce
from co2s_hf.sources import open_source
from co2s_hf.splits import SPLITS
from co2s_hf.training import PATIENCE, check_precision, use_all_cores


@dataclass
class Arguments(DataArguments):
    checkpoint: str = setting("outputs/train_semi/model", "Folder or Hub name of a trained model.")
    images: list[str] | None = setting(None, "Image files, and folders that are searched for images.")
    split: Literal[SPLITS] = setting("unlabeled", "Set to predict where data is named as in training, not --images.")
    seed: int = setting(0, "As in training: seed of the drawn sets.")
    output_dir: str = setting("outputs/predictions", "Folder for labels/, overlay/ and confidence/.")
    save_confidence: bool = setting(False, "Also write the fused prediction's confidence.")
    crop_size: int | None = setting(None, "Side of the windows in pixels. Left out: the model's training crops.")
    fusion: Literal[FUSIONS] | None = setting(None, "How the students are fused. Left out: as the model says.")
    flip: bool = setting(False, "Average with the prediction for the mirrored image.")
    opacity: float = setting(0.5, "Of the colours in the overlay, 0 to 1.")
    use_cpu: bool = setting(False, "Stay on the CPU even where there is a GPU.")
    mixed_precision: Literal["no", "bf16"] | None = setting(None, "Left out: what `accelerate launch` says.")

    def __post_init__(self):
        if bool(self.images) == self.names_data:
            raise ValueError("Say what to predict: --images with files or folders, or data as in training.")
        self.check_data()
        if self.images and (self.scale == ["percentiles"] or self.report):
            raise ValueError(
                "With --images pass --scale LOW HIGH (a model trained on percentiles knows them), no --report."
            )
        if not 0 <= self.opacity <= 1:
            raise ValueError(f"--opacity is {self.opacity}; it lies between 0 and 1.")


def main():
    args = parse_arguments(Arguments, __doc__)
    accelerator = Accelerator(cpu=args.use_cpu, mixed_precision=args.mixed_precision, kwargs_handlers=[PATIENCE])
    check_precision(accelerator)
    use_all_cores(accelerator)
    output_dir = Path(args.output_dir)
    model, image_processor, crop_size = load_for_prediction(args.checkpoint, args.fusion, args.crop_size)
    with told_plainly(), accelerator.main_process_first():
        samples, names = plan(args, model.config, output_dir, is_main=accelerator.is_main_process)
    jobs = dict(zip(names, range(len(samples))))
    if accelerator.is_main_process:
        claim(output_dir, args, dict(zip(names, samples.names)))
    accelerator.wait_for_everyone()
    model.to(accelerator.device)
    palette = palette_or_default(model.config.palette, model.config.num_labels)

    kinds = ("overlay", "confidence", "labels") if args.save_confidence else ("overlay", "labels")  # labels come last
    own = list(jobs.items())[accelerator.process_index :: accelerator.num_processes]
    problems = []
    for name, place in tqdm(own, desc="predicting", disable=not accelerator.is_main_process):
        targets = {kind: output_dir / kind / name for kind in kinds}
        if all(target.exists() for target in targets.values()):
            continue
        try:
            image = samples[place].load_image()
        except ValueError as error:
            problems.append(str(error))
            continue
        with accelerator.autocast():
            inputs = image_processor(image, return_tensors="pt")
            logits = predict_logits(model, inputs["pixel_values"], crop_size, (image.height, image.width), args.flip)
        for kind, picture in draw(image, logits["fused"], palette, args.opacity).items():
            if kind in targets:
                with written_file(targets[kind]) as target:
                    picture.save(target, format="PNG")
    problems = gather_object(problems)
    if accelerator.is_main_process:
        print(f"{len(jobs) - len(problems)} of {len(jobs)} images are in {output_dir}.")
        for problem in problems:
            print(f"Left out: {problem}", file=sys.stderr)
    accelerator.end_training()
    sys.exit(1 if problems else 0)


def plan(args: Arguments, config: Co2SConfig, output_dir: Path, is_main: bool) -> tuple[Samples, list[str]]:
    """The images, and what to write for each, relative to the output's folders."""
    if args.images is None:
        source = open_source(args, args.seed, is_main, config=config, needed=(args.split,))
        if is_main:
            announce(source, args.report)
        samples = getattr(source, args.split)
        names = [output_name(path, place, args.data_dir) for place, path in enumerate(samples.paths)]
    else:
        paths, names = [], []
        for given in map(Path, args.images):
            if given.is_dir() and output_dir.resolve().is_relative_to(given.resolve()):
                raise ValueError(
                    f"--output_dir '{output_dir}' lies inside '{given}': the next run would read it back."
                )
            if not given.exists():
                raise FileNotFoundError(f"'{given}' does not exist; --images takes files and folders.")
            found = find_images(given) if given.is_dir() else [given]
            if not found:
                raise ValueError(f"'{given}' holds no images.")
            paths += map(str, found)
            names += [
                str((p.relative_to(given) if given.is_dir() else Path(p.name)).with_suffix(".png")) for p in found
            ]
        samples = Samples.of_files(paths, [None] * len(paths), image_rule=args.image_rule(config))
    sources: dict[str, str] = {}
    for name, image in zip(names, samples.names):
        if sources.setdefault(name, image) != image:
            raise ValueError(f"'{image}' and '{sources[name]}' would both become {name}. Predict them apart.")
    return samples, names


def output_name(image: str, place: int, data_dir: str | None) -> str:
    """Where the prediction for an image of a data source goes: as below images/, or by its place in the set."""
    path = Path(image)
    if data_dir is not None and path.is_relative_to(Path(data_dir) / "images"):
        return str(path.relative_to(Path(data_dir) / "images").with_suffix(".png"))
    return f"{place:06d}_{path.stem}.png"


def claim(output_dir: Path, args: Arguments, images: dict[str, str]):
    """Write down what the output folder is made of, or refuse one that is made of something else."""
    path = output_dir / "predictions.json"
    settings = {name: getattr(args, name) for name in ("checkpoint", "fusion", "crop_size", "flip", "opacity")}
    sources = {name: image if args.images is None else str(Path(image).resolve()) for name, image in images.items()}
    if path.exists():
        before = json.loads(path.read_text())
        differing = [f"--{name} was {before[name]}" for name in settings if before[name] != settings[name]]
        differing += [
            f"{name} was {before['sources'][name]}"
            for name, source in sources.items()
            if before["sources"].get(name, source) != source
        ]
        if differing:
            raise ValueError(
                f"{output_dir} holds other predictions: {'; '.join(differing[:5])}. Choose another --output_dir."
            )
        sources = before["sources"] | sources
    else:
        check_new_folder(output_dir, "Choose another --output_dir: nothing there shall be overwritten.")
        output_dir.mkdir(parents=True, exist_ok=True)
    write_json(path, settings | {"sources": sources})


def draw(image: Image.Image, logits: torch.Tensor, palette: np.ndarray, opacity: float) -> dict[str, Image.Image]:
    """The pictures of one prediction, (classes, height, width)."""
    confidence, labels = (value.cpu().numpy() for value in logits.softmax(dim=0).max(dim=0))
    indices = Image.fromarray(labels.astype(np.uint8))
    indices.putpalette(palette.flatten().tolist())
    return {
        "labels": indices,
        "overlay": overlay(image, labels, palette, opacity),
        "confidence": Image.fromarray((255 * confidence).round().astype(np.uint8)),
    }


if __name__ == "__main__":
    main()
