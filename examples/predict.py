"""Segment scenes and images.

    # A georeferenced raster of any size becomes a land-cover map that opens in QGIS: map.tif, and map.png to look at.
    python examples/predict.py scene.tif --checkpoint outputs/train_semi/model --output map.tif

    # Many: folders, patterns, mosaics (VRT), addresses on the web. An interrupted run goes on with --resume.
    python examples/predict.py scenes/ 'more/*.jp2' https://example.org/scene.tif --output maps/ --resume

    # Other bands or more than 8 bits; another ground sampling distance than that of training; polygons, too.
    python examples/predict.py scene.tif --output map.tif --bands 4,3,2 --scale percentiles
    python examples/predict.py scene.tif --output map.tif --resample_to 0.3 --vector map.gpkg --min_area_m2 20

    # Pictures without a place on Earth: an index PNG with the classes' colours for each, and one to look at.
    python examples/predict.py --images photo.jpg more_photos/ --save_confidence

    # The unlabelled images of what was trained on.
    python examples/predict.py --data_dir path/to/folder

Scenes come first, before any --setting. For pictures it writes labels/NAME.png, overlay/NAME.png and
confidence/NAME.png at each image's size; images that are done already are left out, so an interrupted run goes on
where it was, and predictions.json says what the folder was made with. `accelerate launch` shares scenes and images
among processes and machines.
"""

import json
import sys
import traceback
from dataclasses import dataclass, fields
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
from co2s_hf.data_arguments import DataArguments, parse_bands, parse_scale
from co2s_hf.figures import overlay, palette_or_default
from co2s_hf.files import check_new_folder, write_json, written_file
from co2s_hf.inference import load_for_prediction, predict_logits
from co2s_hf.reading import find_images
from co2s_hf.report import announce
from co2s_hf.scene_files import plan_maps, shared_out
from co2s_hf.scene_settings import SceneSettings
from co2s_hf.sources import open_source
from co2s_hf.splits import SPLITS
from co2s_hf.training import PATIENCE, check_precision, use_all_cores


@dataclass
class Arguments(SceneSettings, DataArguments):
    scenes: list[str] | None = setting(None, "Georeferenced rasters: files, folders, patterns, addresses.")
    checkpoint: str = setting("outputs/train_semi/model", "Folder or Hub name of a trained model.")
    output: str = setting("outputs/maps", "Of scenes: the map's name (.tif), or a folder for NAME.tif of each.")
    resume: bool = setting(False, "Go on with scenes that an interrupted run has begun; leave those it has finished.")
    images: list[str] | None = setting(None, "Image files, and folders that are searched for images.")
    split: Literal[SPLITS] = setting("unlabeled", "Set to predict where data is named as in training, not --images.")
    seed: int = setting(0, "As in training: seed of the drawn sets.")
    output_dir: str = setting("outputs/predictions", "Folder for labels/, overlay/ and confidence/ of images.")
    crop_size: int | None = setting(None, "Side of the windows in pixels. Left out: the model's training crops.")
    fusion: Literal[FUSIONS] | None = setting(None, "How the students are fused. Left out: as the model says.")
    flip: bool = setting(False, "Average with the prediction for the mirrored image.")
    opacity: float = setting(0.5, "Of the colours in the overlay of an image, 0 to 1.")
    use_cpu: bool = setting(False, "Stay on the CPU even where there is a GPU.")
    mixed_precision: Literal["no", "bf16"] | None = setting(None, "Left out: what `accelerate launch` says.")

    def __post_init__(self):
        if bool(self.scenes) + bool(self.images) + self.names_data != 1:
            raise ValueError(
                "Say what to predict: scenes (`predict.py scene.tif`), --images with files or folders, or data as in "
                "training; one of them."
            )
        self.check_data()
        self.check_scene()
        if not self.names_data and self.report:
            raise ValueError("--report is about data as in training.")
        if self.images and self.scale == ["percentiles"]:
            raise ValueError("With --images pass --scale LOW HIGH (a model trained on percentiles knows them).")
        for_scenes = {f.name: f.default for f in fields(SceneSettings)} | {"resume": False}
        for name in for_scenes.keys() - {"save_confidence"}:
            if not self.scenes and getattr(self, name) != for_scenes[name]:
                raise ValueError(f"--{name} is about scenes: `predict.py scene.tif --{name} ...`.")
        if not 0 <= self.opacity <= 1:
            raise ValueError(f"--opacity is {self.opacity}; it lies between 0 and 1.")


def main():
    args = parse_arguments(Arguments, __doc__, positional="scenes")
    accelerator = Accelerator(cpu=args.use_cpu, mixed_precision=args.mixed_precision, kwargs_handlers=[PATIENCE])
    check_precision(accelerator)
    use_all_cores(accelerator)
    problems = predict_scenes(args, accelerator) if args.scenes else predict_images(args, accelerator)
    if accelerator.is_main_process:
        for problem in problems:
            print(f"Left out: {problem}", file=sys.stderr)
    accelerator.end_training()
    sys.exit(1 if problems else 0)


def predict_scenes(args: Arguments, accelerator: Accelerator) -> list[str]:
    """Map every scene once, whichever process does it; what went wrong with the others."""
    with told_plainly():
        from co2s_hf.scenes import segment_scene  # pictures do without its libraries

        maps = plan_maps(args.scenes, args.output)
        if len(maps) > 1 and args.vector is not None and Path(args.vector).suffix:
            raise ValueError(
                f"--vector {args.vector} is one file for {len(maps)} scenes; --vector {Path(args.vector).suffix} "
                "writes one beside each map."
            )
        model, image_processor, crop_size = load_for_prediction(args.checkpoint, args.fusion, args.crop_size)
    precision = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    model.to(accelerator.device, precision)
    settings = {f.name: getattr(args, f.name) for f in fields(SceneSettings)}
    scale = "percentiles" if args.scale == ["percentiles"] else parse_scale(args.scale)
    problems = []
    for scene, destination in shared_out(maps, accelerator.num_processes)[accelerator.process_index].items():
        try:
            segment_scene(
                model,
                image_processor,
                scene,
                destination,
                crop_size=crop_size,
                flip=args.flip,
                bands=parse_bands(args.bands),
                scale=scale,
                resume=args.resume,
                show_progress=accelerator.is_local_main_process,
                **settings,
            )
        except Exception as error:  # one scene's trouble is not the others'
            if not isinstance(error, ValueError | OSError):
                traceback.print_exc()
            problems.append(str(error) if scene in str(error) else f"{scene}: {error}")
    problems = gather_object(problems)
    accelerator.print(f"{len(maps) - len(problems)} of {len(maps)} maps are in {args.output}.")
    return problems


def predict_images(args: Arguments, accelerator: Accelerator) -> list[str]:
    """Predict every picture that is not done yet; what could not be read."""
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
    accelerator.print(f"{len(jobs) - len(problems)} of {len(jobs)} images are in {output_dir}.")
    return problems


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
