"""Predict scenes and images.

  # A georeferenced raster of any size becomes a map that QGIS opens (map.tif), and a picture of it (map.png).
  co2s predict scene.tif --checkpoint outputs/train_semi/model --output map.tif

  # Many scenes: folders, patterns, mosaics (VRT), web addresses. --resume continues an interrupted run.
  co2s predict scenes/ 'more/*.jp2' https://example.org/scene.tif --output maps/ --resume

  # Other bands or more than 8 bits; the ground sampling distance of the training; polygons, too.
  co2s predict scene.tif --output map.tif --bands 4,3,2 --scale percentiles
  co2s predict scene.tif --output map.tif --resample_to 0.3 --vector map.gpkg --min_area_m2 20

  # Images without georeference: for each an index PNG in the classes' colours, and an overlay.
  co2s predict --images photo.jpg more_photos/ --save_confidence

  # The unlabelled images of a data source.
  co2s predict --data_dir path/to/folder

Scenes come first, before any flag. For images the command writes labels/NAME.png, overlay/NAME.png and
confidence/NAME.png in the image's size. Images that are done already are skipped, so an interrupted run continues;
predictions.json records the options of the folder. `accelerate launch -m co2s_hf predict` shares scenes and images
among processes and machines.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from ..data.options import DataOptions
from ..geo.options import SceneOptions
from ..model.configuration_co2s import FUSIONS
from ..utils.errors import UserError, UserValueError
from .arguments import DATA, DEFAULT_MODEL
from .command_line import Command, Flag, Group, own_group, setting


@dataclass
class PredictArguments:
    """What to predict, with which model, and where the results go."""

    scenes: list[str] | None = setting(None, "Georeferenced rasters: files, folders, patterns, addresses.", "SCENE")
    images: list[str] | None = setting(None, "Image files, and folders that are searched for images.", "IMAGE")
    checkpoint: str = setting(DEFAULT_MODEL, "Folder or Hub name of a trained model.")
    output: str = setting("outputs/maps", "For scenes: the map's name (.tif), or a folder for NAME.tif of each scene.")
    output_dir: str = setting("outputs/predictions", "For images: folder for labels/, overlay/ and confidence/.")
    resume: bool = setting(False, "Continue scenes that an interrupted run has begun, and skip finished ones.")
    split: Literal["labeled", "unlabeled", "validation"] = setting("unlabeled", "Set of a data source to predict.")
    crop_size: int | None = setting(None, "Side of the windows in pixels. Default: that of the model's training.")
    fusion: Literal[FUSIONS] | None = setting(None, "How the students are fused. Default: the model's configuration.")
    flip: bool = setting(False, "Average with the prediction for the mirrored image.")
    opacity: float = setting(0.5, "Opacity of the colours in the overlay of an image, 0 to 1.")
    seed: int = setting(0, "Seed of the drawn sets: that of the training.")
    use_cpu: bool = setting(False, "Use the CPU even if there is a GPU.")
    mixed_precision: Literal["no", "bf16"] | None = setting(None, "Default: the choice of `accelerate launch`.")


SCENE = Group(
    "scenes",
    SceneOptions,
    {
        "overlap_px": Flag("Pixels that neighbouring windows share. Default: a sixth of their side."),
        "blend": Flag("Weights where windows overlap: lower towards their edges, or equal (the paper's average)."),
        "windows_per_batch": Flag("Windows that pass through the model together.", name="WINDOWS"),
        "resample_to": Flag(
            "Ground sampling distance to read the scene at, in metres: that of the training images.", name="METRES"
        ),
        "save_confidence": Flag("Also write the confidence of the fused prediction (for images, too)."),
        "save_probabilities": Flag("Also write the probability of every class."),
        "score_dtype": Flag("Confidence and probabilities in steps of 1/254, or as floating point."),
        "cog": Flag("Write Cloud Optimized GeoTIFFs."),
        "vector": Flag(
            "Also write polygons: a .gpkg, .geojson or .parquet file, or the suffix alone (beside the map)."
        ),
        "min_area_m2": Flag("Leave out smaller polygons, in square metres.", name="AREA"),
        "simplify_m": Flag("Largest shift of a polygon's outline when it is simplified, in metres.", name="DISTANCE"),
    },
)
COMMAND = Command(
    name="predict",
    description=__doc__,
    groups=[own_group("prediction", PredictArguments), SCENE, DATA],
    first=("checkpoint", "output", "images", "output_dir", "resume", "bands", "scale", "resample_to", "vector"),
    positional="scenes",
)


def main(words: Sequence[str] | None = None):
    """Run `co2s predict` with these words, or those of this process. Exits with 1 if something was left out."""
    arguments = COMMAND.parse(words)
    args, scene_options, data_options = (arguments[kind] for kind in (PredictArguments, SceneOptions, DataOptions))
    with COMMAND.user_errors():
        check(args, scene_options, data_options)
        from ..utils.devices import make_accelerator

        accelerator = make_accelerator(args.use_cpu, args.mixed_precision)
        if args.scenes:
            problems = predict_scenes(args, scene_options, data_options, accelerator)
        else:
            problems = predict_images(args, scene_options.save_confidence, data_options, accelerator)
    if accelerator.is_main_process:
        for problem in problems:
            print(f"Left out: {COMMAND.in_flags(problem)}", file=sys.stderr)
    accelerator.end_training()
    if problems:
        sys.exit(1)


def check(args: PredictArguments, scene_options: SceneOptions, data_options: DataOptions):
    """Refuse a call without exactly one source, and options that have no effect on it."""
    if bool(args.scenes) + bool(args.images) + data_options.has_source != 1:
        raise UserValueError(
            "Name what to predict: scenes (`co2s predict scene.tif`), `images` with files or folders, or a data "
            "source such as `data_dir`; one of them."
        )
    if args.images and data_options.scale == "percentiles":
        raise UserValueError(
            "`images` needs two values: `scale=(0, 3000)`. A model that was trained with percentiles stores its own."
        )
    if not args.scenes:
        options = {f.name: f.default for f in fields(SceneOptions)} | {"resume": False}
        given = {f.name: getattr(scene_options, f.name) for f in fields(SceneOptions)} | {"resume": args.resume}
        for name in options:
            if given[name] != options[name] and name != "save_confidence":
                raise UserValueError(f"`{name}` is for scenes: `co2s predict scene.tif`.")
    if not 0 <= args.opacity <= 1:
        raise UserValueError(f"`opacity` is {args.opacity}; it lies between 0 and 1.")


def predict_scenes(args, scene_options: SceneOptions, data_options: DataOptions, accelerator) -> list[str]:
    """Map every scene once, on any of the processes; return a message for each scene that failed."""
    import traceback

    import torch
    from accelerate.utils import gather_object

    from ..geo.scene_files import plan_maps, shared_out
    from ..geo.scenes import segment_scene
    from ..inference.images import load_for_prediction

    maps = plan_maps(args.scenes, args.output)
    if len(maps) > 1 and scene_options.vector is not None and Path(scene_options.vector).suffix:
        suffix = Path(scene_options.vector).suffix
        raise UserValueError(
            f"`vector` is one file, {scene_options.vector}, for {len(maps)} scenes. `vector='{suffix}'` writes one "
            "file beside each map."
        )
    model, image_processor, crop_size = load_for_prediction(args.checkpoint, args.fusion, args.crop_size)
    precision = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    model.to(accelerator.device, precision)
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
                bands=data_options.bands,
                scale=data_options.scale,
                resume=args.resume,
                show_progress=accelerator.is_local_main_process,
                **{f.name: getattr(scene_options, f.name) for f in fields(SceneOptions)},
            )
        except Exception as error:  # one scene's error must not stop the others
            if not isinstance(error, UserError | OSError):
                traceback.print_exc()
            problems.append(str(error) if scene in str(error) else f"{scene}: {error}")
    problems = gather_object(problems)
    accelerator.print(f"{len(maps) - len(problems)} of {len(maps)} maps are in {args.output}.")
    return problems


def predict_images(args, save_confidence: bool, data_options: DataOptions, accelerator) -> list[str]:
    """Predict every image that is not done yet; return a message for each image that could not be read."""
    from ..data.sources import image_rule, open_source
    from ..data.validation.report import announce
    from ..inference import folders
    from ..inference.images import load_for_prediction

    output_dir, is_main = Path(args.output_dir), accelerator.is_main_process
    model, image_processor, crop_size = load_for_prediction(args.checkpoint, args.fusion, args.crop_size)
    with accelerator.main_process_first():  # the others find its results in the cache
        if args.images:
            rule = image_rule(data_options, model.config)
            samples, pictures = folders.samples_of_files(args.images, output_dir, rule)
        else:
            source = open_source(data_options, args.seed, is_main, config=model.config, needed=(args.split,))
            samples = getattr(source, args.split)
            pictures = folders.picture_names(samples, data_options.data_dir)
            if is_main:
                announce(source)
    options = folders.PictureOptions(args.checkpoint, args.fusion, args.crop_size, args.flip, args.opacity)
    if is_main:
        names = [str(Path(name).resolve()) if args.images else name for name in samples.names]
        folders.start_folder(output_dir, options, dict(zip(pictures, names)))
    accelerator.wait_for_everyone()
    model.to(accelerator.device)
    problems = folders.predict_into_folder(
        model, image_processor, crop_size, samples, pictures, output_dir, options, accelerator, save_confidence
    )
    accelerator.print(f"{len(pictures) - len(problems)} of {len(pictures)} images are in {output_dir}.")
    return problems
