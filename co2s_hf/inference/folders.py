"""Predict many image files into a folder of pictures, with several processes and after interruptions."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath

from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..data.reading import ImageRule, StoredFile, find_images
from ..data.samples import Samples
from ..model.image_processing_co2s import Co2SImageProcessor
from ..model.modeling_co2s import Co2SForSemanticSegmentation
from ..utils.errors import UserFileNotFoundError, UserValueError
from ..utils.figures import palette_or_default
from ..utils.files import check_new_folder, write_json, written_file
from .images import predict_logits, prediction_pictures


FACTS_FILE = "predictions.json"


@dataclass(frozen=True)
class PictureOptions:
    """Options of the prediction and of its pictures. All pictures of a folder have the same options.

    Args:
        checkpoint: Folder of the model, or its name on the Hub.
        fusion: Fusion of the students. None: that of the model's configuration.
        crop_size: Side of the windows in pixels. None: the side of the crops in training.
        flip: Average with the prediction for the mirrored image.
        opacity: Weight of the colours in the overlay, 0 to 1.
    """

    checkpoint: str
    fusion: str | None = None
    crop_size: int | None = None
    flip: bool = False
    opacity: float = 0.5


def samples_of_files(names: Sequence[str], output_dir: Path, image_rule: ImageRule) -> tuple[Samples, list[str]]:
    """Find image files, and choose the path of the pictures of each image.

    Args:
        names: Image files, and folders that are searched for images.
        output_dir: Folder for the predictions. It must not lie inside a searched folder.
        image_rule: Rule to read the files.

    Returns:
        The images, and the path of a PNG for each image, relative to labels/, overlay/ and confidence/.

    Raises:
        UserFileNotFoundError: A file or folder does not exist.
        UserValueError: A folder contains no images, a folder contains the output folder, or two images would have the
            same picture.
    """
    paths, pictures = [], []
    for given in map(Path, names):
        if given.is_dir() and output_dir.resolve().is_relative_to(given.resolve()):
            raise UserValueError(
                f"`output_dir` is '{output_dir}', inside '{given}': the next run would read its own output. Choose "
                "another folder."
            )
        if not given.exists():
            raise UserFileNotFoundError(f"'{given}' does not exist; `images` takes files and folders.")
        found = find_images(given, leave_out_labels=True) if given.is_dir() else [given]
        if not found:
            raise UserValueError(f"'{given}' contains no images.")
        paths += map(str, found)
        relative = [path.relative_to(given) if given.is_dir() else Path(path.name) for path in found]
        pictures += [str(path.with_suffix(".png")) for path in relative]
    samples = Samples.of_files(paths, [None] * len(paths), image_rule=image_rule)
    check_names(pictures, samples)
    return samples, pictures


def picture_names(samples: Samples, data_dir: str | None) -> list[str]:
    """Choose the path of the pictures of each image of a data source.

    It is the path below `images/`, or else the position in the set and the file name.

    Raises:
        UserValueError: Two images would have the same picture, or a picture would lie outside the output folder.
    """
    pictures = []
    root = None if data_dir is None else Path(data_dir) / "images"
    for place, path in enumerate(samples.paths):
        if root is not None and Path(path).is_relative_to(root):
            pictures.append(str(Path(path).relative_to(root).with_suffix(".png")))
        else:
            pictures.append(f"{place:06d}_{Path(StoredFile(path).name).stem}.png")
    check_names(pictures, samples)
    return pictures


def check_names(pictures: Sequence[str], samples: Samples):
    """Check that no two images have the same picture, and that all pictures lie in the output folder.

    Raises:
        UserValueError: Two images have the same picture, and the message names both. Or a picture lies elsewhere.
    """
    sources: dict[str, str] = {}
    for picture, image in zip(pictures, samples.names):
        picture_path(Path(), picture)
        if sources.setdefault(picture, image) != image:
            raise UserValueError(
                f"'{image}' and '{sources[picture]}' would both become {picture}. Predict them into different folders."
            )


def picture_path(folder: Path, picture: str) -> Path:
    """Return the path of a picture in a folder.

    The names of pictures come from the data. So this is the last check that no file outside the folder is overwritten.
    Symbolic links in the output folder are followed, because names cannot make any.

    Args:
        folder: Folder of the pictures.
        picture: Path of the picture relative to the folder.

    Raises:
        UserValueError: The picture would lie outside the folder.
    """
    name = PurePath(picture)
    if name.anchor or ".." in name.parts or not name.parts:
        raise UserValueError(
            f"The picture '{picture}' would lie outside the output folder; expected a path below it, such as 'a.png'. "
            "Rename the image."
        )
    return folder / name


def picture_paths(output_dir: Path, picture: str, save_confidence: bool) -> dict[str, Path]:
    """Return the paths of the pictures of an image, in the order in which they are written.

    Raises:
        UserValueError: A picture would lie outside the folder.
    """
    kinds = ("overlay", "confidence", "labels") if save_confidence else ("overlay", "labels")  # labels come last
    return {kind: picture_path(output_dir / kind, picture) for kind in kinds}


def start_folder(output_dir: Path, options: PictureOptions, sources: dict[str, str]):
    """Record the options and the source of every picture in predictions.json, so that a later run can continue.

    Args, Raises: As in [`check_folder`].
    """
    sources = check_folder(output_dir, options, sources)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / FACTS_FILE, asdict(options) | {"sources": sources})


def check_folder(output_dir: Path, options: PictureOptions, sources: dict[str, str]) -> dict[str, str]:
    """Check that the predictions can be written into a folder.

    Args:
        output_dir: Folder for the predictions.
        options: Options of the predictions.
        sources: Picture -> name of its image.

    Returns:
        The sources of the pictures that are in the folder already, and these sources.

    Raises:
        UserValueError: The folder has predictions with other options, or of other images, or its predictions.json is
            damaged.
        UserFileExistsError: The folder is not empty and contains no predictions.
    """
    path, facts = output_dir / FACTS_FILE, asdict(options)
    if path.exists():
        before = _read_facts(path, [*facts, "sources"])
        differing = [f"`{name}` was {before[name]}" for name in facts if before[name] != facts[name]]
        differing += [
            f"{picture} was {before['sources'][picture]}"
            for picture, source in sources.items()
            if before["sources"].get(picture, source) != source
        ]
        if differing:
            raise UserValueError(
                f"{output_dir} holds other predictions: {'; '.join(differing[:5])}. Choose another `output_dir`."
            )
        return before["sources"] | sources
    check_new_folder(output_dir, "Choose another `output_dir`: its content is not overwritten.")
    return sources


def _read_facts(path: Path, needed: Sequence[str]) -> dict:
    """Read predictions.json.

    Args:
        path: The file.
        needed: Keys that it must have.

    Raises:
        UserValueError: The file is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        problem = f"cannot be read as JSON: {error}"
    else:
        missing = [name for name in needed if name not in content] if isinstance(content, dict) else needed
        if not missing and isinstance(content["sources"], dict):
            return content
        problem = f"has no valid {', '.join(f'`{name}`' for name in missing or ['sources'])}"
    raise UserValueError(
        f"{path} {problem}. So it is not known how the pictures in this folder were made. Choose another "
        "`output_dir`, or remove this folder."
    )


def predict_into_folder(
    model: Co2SForSemanticSegmentation,
    image_processor: Co2SImageProcessor,
    crop_size: int,
    samples: Samples,
    pictures: Sequence[str],
    output_dir: Path,
    options: PictureOptions,
    accelerator: Accelerator,
    save_confidence: bool = False,
) -> list[str]:
    """Write the pictures of every image that does not have all of them yet, into labels/, overlay/ and confidence/.

    Args:
        model: Model in evaluation mode, on its device.
        image_processor: Image processor of the model.
        crop_size: Side of the windows in pixels.
        samples: The images.
        pictures: Path of the pictures of each image, relative to these folders.
        output_dir: Folder for the predictions, after [`start_folder`].
        options: Options of the predictions.
        accelerator: Accelerator. The images are divided among its processes, and predicted in its precision.
        save_confidence: Also write confidence/.

    Returns:
        One message for each image that could not be read. Every process returns the messages of all processes.
    """
    palette = palette_or_default(model.config.palette, model.config.num_labels)
    jobs = [(place, picture) for picture, place in dict(zip(pictures, range(len(pictures)))).items()]  # each file once
    jobs = jobs[accelerator.process_index :: accelerator.num_processes]
    problems = []
    for place, picture in tqdm(jobs, desc="predicting", disable=not accelerator.is_main_process):
        targets = picture_paths(output_dir, picture, save_confidence)
        if all(target.exists() for target in targets.values()):
            continue
        try:
            image = samples[place].load_image()
        except UserValueError as error:  # one image's error must not stop the others
            problems.append(str(error))
            continue
        inputs, size = image_processor(image, return_tensors="pt"), (image.height, image.width)
        with accelerator.autocast():
            logits = predict_logits(model, inputs["pixel_values"], crop_size, size, options.flip)
        drawn = prediction_pictures(image, logits["fused"], palette, options.opacity)
        for kind, target in targets.items():
            with written_file(target) as temporary:
                drawn[kind].save(temporary, format="PNG")
    return gather_object(problems)


__all__ = [
    "PictureOptions",
    "check_folder",
    "check_names",
    "picture_names",
    "picture_path",
    "picture_paths",
    "predict_into_folder",
    "samples_of_files",
    "start_folder",
]
