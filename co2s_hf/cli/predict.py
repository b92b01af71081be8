"""Predict scenes and images.

  # Turn a georeferenced raster of any size into a map for QGIS (map.tif) and a picture of the map (map.png).
  co2s predict scene.tif --checkpoint outputs/train_semi/model --output map.tif

  # Many scenes: folders, patterns, mosaics (VRT), web addresses. --resume continues an interrupted run. It may have
  # another device and other --windows_per_batch, for example after a GPU ran out of memory.
  co2s predict scenes/ 'more/*.jp2' https://example.org/scene.tif --output maps/ --resume

  # Scenes with other bands or more than 8 bits.
  co2s predict scene.tif --output map.tif --bands 4,3,2 --scale percentiles

  # Also write polygons. Read the scene at 0.3 m, for a model that does not know the resolution of its training images.
  co2s predict scene.tif --output map.tif --vector map.gpkg --min_area_m2 20 --resample_to 0.3

  # Images without georeference: write a label map in the classes' colours and an overlay for each of them.
  co2s predict --images photo.jpg more_photos/ --save_confidence

  # The unlabelled images of a data source.
  co2s predict --data_dir path/to/folder

  # The validation images of this package.
  co2s predict

  # First check everything, and estimate time, memory and disk space. Nothing is written.
  co2s predict scenes/ --output maps/ --dry_run

Scenes come first, before any flag. For images the command writes labels/NAME.png and overlay/NAME.png, and with
--save_confidence also confidence/NAME.png, all in the size of the image. To continue after an interruption, run the
same command again: images that have all their files are skipped. predictions.json contains the options of all
predictions in the folder.

`accelerate launch -m co2s_hf predict` shares scenes and images among processes and machines.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from ..data.options import DataOptions
from ..geo.options import NOT_RESAMPLED, SceneOptions
from ..utils.errors import UserError, UserValueError
from ..utils.redaction import redact
from .arguments import DATA, InferenceArguments, choose_data
from .command_line import Command, Flag, Group, own_group, setting


def parse_distance(text: str) -> float | str:
    """Parse a number of metres. "none" is returned unchanged."""
    if text == NOT_RESAMPLED:
        return text
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"'{text}' is not a number of metres, such as 0.3, or none") from error


@dataclass
class PredictArguments(InferenceArguments):
    """What to predict, with which model, and where the results go."""

    scenes: list[str] | None = setting(
        None, "Georeferenced rasters: files, folders, file patterns, web addresses.", "SCENE"
    )
    images: list[str] | None = setting(None, "Image files, and folders that are searched for images.", "IMAGE")
    output: str = setting("outputs/maps", "For scenes: file of the map (.tif), or folder for the map of each scene.")
    output_dir: str = setting("outputs/predictions", "For images: folder for labels/, overlay/ and confidence/.")
    resume: bool = setting(
        False,
        "Continue the scenes of an interrupted run, and skip finished ones. The device, --windows_per_batch and flags "
        "of files such as --vector may differ (--vector only until a map is finished); other settings may not.",
    )
    split: Literal["labeled", "unlabeled", "validation"] | None = setting(
        None, "Set of the data source to predict. Default: unlabeled; of --data real: validation."
    )
    dry_run: bool = setting(
        False,
        "Make all checks, and print sizes, bands, scale, and the expected time, memory and disk space. Write nothing.",
    )
    opacity: float = setting(0.5, "Opacity of the colours in the overlay of an image, 0 to 1.")


SCENE = Group(
    "scenes",
    SceneOptions,
    {
        "overlap_px": Flag("Pixels that neighbouring windows share. Default: a sixth of the side of a window."),
        "blend": Flag(
            "Weights of overlapping windows. smooth: lower towards their edges; average: equal, as in the paper."
        ),
        "windows_per_batch": Flag("Windows per forward pass.", name="WINDOWS"),
        "resample_to": Flag(
            "Ground sampling distance in metres at which the scene is read; none: that of the scene. Default: that of "
            "the training images if the model knows it and the scene differs by more than 10 %, else none.",
            parse_distance,
            name="METRES",
        ),
        "save_confidence": Flag("Also write the confidence of the fused prediction (for images, too)."),
        "save_probabilities": Flag("Also write the probability of every class."),
        "score_dtype": Flag("Type of confidence and probabilities in the files. uint8: 0 to 254 for 0 to 1."),
        "cog": Flag("Write Cloud Optimized GeoTIFFs."),
        "vector": Flag(
            "Also write polygons into this .gpkg, .geojson or .parquet file. A suffix alone: beside the map."
        ),
        "min_area_m2": Flag("Smallest area of a polygon, in square metres.", name="AREA"),
        "simplify_m": Flag("Simplify the outlines of polygons by at most this distance, in metres.", name="DISTANCE"),
    },
)
OF_SCENES = SCENE.flags.keys() - {"save_confidence"}  # options that images do not have
COMMAND = Command(
    name="predict",
    description=__doc__,
    groups=[own_group("prediction", PredictArguments), SCENE, DATA],
    first=("checkpoint", "output", "images", "output_dir", "resume", "bands", "scale", "resample_to", "vector"),
    positional="scenes",
)


def main(words: Sequence[str] | None = None):
    """Run `co2s predict` with these words, or those of this process.

    The exit status is 1 if a scene or an image was left out.
    """
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
    """Refuse two sources, and options that the source does not use."""
    if bool(args.scenes) + bool(args.images) + data_options.has_source > 1:
        raise UserValueError(
            "Give one source to predict: scenes (`co2s predict scene.tif`), `images` with files or folders, or a data "
            "set such as `data_dir`."
        )
    if args.images and data_options.scale == "percentiles":
        raise UserValueError(
            "`images` needs a scale in numbers: `scale=((0, 3000),)`. If the model was trained with percentiles, "
            "leave `scale` out: its configuration has the numbers."
        )
    given = _given(args) | _given(scene_options)
    if args.scenes:
        if unused := given & {"output_dir", "opacity", "split"}:
            raise UserValueError(f"`{min(unused)}` is not for scenes. Leave it out.")
    elif unused := given & (OF_SCENES | {"output", "resume"}):
        raise UserValueError(f"`{min(unused)}` is for scenes: `co2s predict scene.tif`.")
    elif args.images and args.split is not None:
        raise UserValueError("`split` is a set of a data source; `images` has none. Leave it out.")
    if not 0 <= args.opacity <= 1:
        raise UserValueError(f"`opacity` is {args.opacity}; expected 0 to 1.")


def _given(options: PredictArguments | SceneOptions) -> set[str]:
    """Return the names of the options that differ from their defaults."""
    return {one.name for one in fields(options) if getattr(options, one.name) != one.default}


def predict_scenes(args, scene_options: SceneOptions, data_options: DataOptions, accelerator) -> list[str]:
    """Map the scenes, shared among the processes; return a message for each scene that failed."""
    import traceback

    from accelerate.utils import gather_object

    from ..geo.dry_run import check_scene, describe
    from ..geo.scene_files import plan_maps, shared_out
    from ..geo.scene_outputs import check_no_shared_files
    from ..geo.scenes import segment_scene
    from ..inference.images import load_for_prediction

    maps = plan_maps(args.scenes, args.output)
    if len(maps) > 1 and scene_options.vector is not None and Path(scene_options.vector).suffix:
        suffix = Path(scene_options.vector).suffix
        raise UserValueError(
            f"`vector` is one file, {scene_options.vector}, for {len(maps)} scenes. `vector='{suffix}'` writes one "
            "file beside each map."
        )
    check_no_shared_files(maps, scene_options)
    model, image_processor, crop_size = load_for_prediction(args.checkpoint, args.fusion, args.crop_size)
    model.to(accelerator.device)
    settings = {"crop_size": crop_size, "flip": args.flip, "bands": data_options.bands, "scale": data_options.scale}
    settings |= {f.name: getattr(scene_options, f.name) for f in fields(SceneOptions)} | {"resume": args.resume}
    problems, estimates = [], []
    for scene, destination in shared_out(maps, accelerator.num_processes)[accelerator.process_index].items():
        try:
            with accelerator.autocast():
                if args.dry_run:
                    speed = next((done.speed for done in estimates if done.speed), None)
                    estimates.append(check_scene(model, image_processor, scene, destination, speed=speed, **settings))
                else:
                    show = accelerator.is_local_main_process
                    segment_scene(model, image_processor, scene, destination, show_progress=show, **settings)
        except Exception as error:  # one scene's error must not stop the others
            if not isinstance(error, UserError | OSError):
                traceback.print_exc()
            problem, name = redact(str(error)), redact(scene)
            problems.append(problem if name in problem else f"{name}: {problem}")
    problems = gather_object(problems)
    if args.dry_run:
        accelerator.print(describe(gather_object([estimates])))
    else:
        accelerator.print(f"{len(maps) - len(problems)} of {len(maps)} maps are in {args.output}.")
    return problems


def predict_images(args, save_confidence: bool, data_options: DataOptions, accelerator) -> list[str]:
    """Predict the images that are not done yet; return a message for each image that could not be read."""
    from ..data.sources import image_rule, open_source
    from ..data.validation.report import announce
    from ..inference import folders
    from ..inference.dry_run import check_pictures
    from ..inference.images import load_for_prediction

    output_dir, is_main = Path(args.output_dir), accelerator.is_main_process
    if not args.images:
        choose_data(data_options, args.seed, accelerator.print)
        args.split = args.split or ("validation" if data_options.is_real else "unlabeled")
    model, image_processor, crop_size = load_for_prediction(args.checkpoint, args.fusion, args.crop_size)
    with accelerator.main_process_first():  # the other processes find its results in the cache
        if args.images:
            rule = image_rule(data_options, model.config)
            samples, pictures = folders.samples_of_files(args.images, output_dir, rule)
        else:
            source = open_source(
                data_options, args.seed, is_main, config=model.config, needed=(args.split,), with_labels=False
            )
            samples = getattr(source, args.split)
            pictures = folders.picture_names(samples, data_options.folder)
            if is_main:
                announce(source)
    options = folders.PictureOptions(args.checkpoint, args.fusion, args.crop_size, args.flip, args.opacity)
    names = [str(Path(name).resolve()) if args.images else name for name in samples.names]
    if args.dry_run:
        folders.check_folder(output_dir, options, dict(zip(pictures, names)))
        places = samples, pictures, output_dir, accelerator
        model.to(accelerator.device)
        text, problems = check_pictures(model, image_processor, crop_size, *places, args.flip, save_confidence)
        accelerator.print(text)
        return problems
    if is_main:
        folders.start_folder(output_dir, options, dict(zip(pictures, names)))
    accelerator.wait_for_everyone()
    model.to(accelerator.device)
    problems = folders.predict_into_folder(
        model, image_processor, crop_size, samples, pictures, output_dir, options, accelerator, save_confidence
    )
    accelerator.print(f"{len(pictures) - len(problems)} of {len(pictures)} images are in {output_dir}.")
    return problems
