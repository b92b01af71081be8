"""Measure a model on labelled images: confusion matrices, scores and example predictions."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..data.options import DataOptions
from ..data.samples import Sample
from ..data.sources import Source
from ..inference.images import predict_logits
from ..model.configuration_co2s import Co2SConfig
from ..model.image_processing_co2s import Co2SImageProcessor
from ..model.modeling_co2s import STUDENTS, Co2SForSemanticSegmentation
from ..utils.errors import UserValueError
from ..utils.figures import Example, draw_confusion, draw_predictions, one_line, palette_or_default
from ..utils.files import write_json
from .confusion import METRICS, ConfusionMatrix


@dataclass(frozen=True)
class Scores:
    """The scores of one predictor (a student, or the fusion), each 0 to 1.

    Args:
        mean_iou: Mean IoU over the classes that occur in the labels or in the predictions.
        mean_iou_paper: Mean IoU over all classes; a class that occurs nowhere counts as 0 (the paper's convention).
        mean_f1: Mean F1 over the classes that occur.
        accuracy: Share of the labelled pixels with the right prediction.
        iou, f1: Class name -> score; None for a class that occurs nowhere.
    """

    mean_iou: float
    mean_iou_paper: float
    mean_f1: float
    accuracy: float
    iou: dict[str, float | None]
    f1: dict[str, float | None]

    @classmethod
    def from_confusion(cls, matrix: ConfusionMatrix, id2label: dict[int, str]) -> "Scores":
        """Compute all scores from a confusion matrix."""

        def per_class(values: torch.Tensor) -> dict[str, float | None]:
            pairs = ((label, values[index].item()) for index, label in id2label.items())
            return {label: value if math.isfinite(value) else None for label, value in pairs}

        means = {name: getattr(matrix, name)() for name in METRICS}
        return cls(**means, iou=per_class(matrix.iou()), f1=per_class(matrix.f1()))


@dataclass(frozen=True)
class Evaluation:
    """The results of one evaluation, with the data and the settings.

    Args:
        data: Name of the data in tables and cards.
        dataset_id: The data set's name on the Hub; None for local data.
        data_hash: Hexadecimal digits that identify the sets of images.
        num_images: Number of validation images.
        crop_size: Side of the windows in pixels.
        fusion: How the students were fused, one of [`FUSIONS`].
        flip: The predictions were averaged with those of the mirrored images.
        scores: "clip", "dinov3" (the students that the fusion uses) and "fused" -> scores.
        largest_class_mean_iou: Mean IoU of predicting the most frequent class everywhere.
        step: Number of training steps done; None outside a training.
        checkpoint: Folder or Hub name of the evaluated model; None during a training.
        is_best: The model was selected by its result on these images.
        confusion: Confusion matrix of the fused prediction. It is not written to JSON.
    """

    data: str
    dataset_id: str | None
    data_hash: str
    num_images: int
    crop_size: int
    fusion: str
    flip: bool
    scores: dict[str, Scores]
    largest_class_mean_iou: float
    step: int | None = None
    checkpoint: str | None = None
    is_best: bool = False
    confusion: ConfusionMatrix | None = field(default=None, compare=False)

    def to_dict(self) -> dict:
        """Return the content of metrics.json: the facts, and one dictionary of scores per predictor."""
        facts = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("scores", "confusion")}
        facts = {name: value for name, value in facts.items() if value is not None or name == "dataset_id"}
        return facts | {name: asdict(scores) for name, scores in self.scores.items()}

    @classmethod
    def from_dict(cls, content: dict) -> "Evaluation":
        """Make an evaluation from the content of metrics.json."""
        names = {f.name for f in fields(cls)}
        facts = {name: value for name, value in content.items() if name in names}
        return cls(**facts, scores={name: Scores(**content[name]) for name in content if name not in names})

    @classmethod
    def read(cls, path: str | Path) -> "Evaluation":
        """Read a file metrics.json."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))

    def table(self) -> str:
        """Format the IoU of every class, then the means, in per cent, with one column per predictor.

        A class that occurs nowhere gets '-'.
        """
        labels = {label: one_line(label) for label in self.scores["fused"].iou}
        short = {name: text.partition(" (")[0] for name, text in METRICS.items()}
        short["mean_iou_paper"] = "mean (paper's convention)"
        width = max(map(len, [*labels.values(), *short.values()]))
        lines = [" " * width + "".join(f"{name:>9}" for name in self.scores)]
        for label, shown in labels.items():
            values = (scores.iou[label] for scores in self.scores.values())
            cells = (f"{'-':>9}" if value is None else f"{100 * value:9.1f}" for value in values)
            lines.append(shown.ljust(width) + "".join(cells))
        for name, text in short.items():
            cells = (f"{100 * getattr(scores, name):9.1f}" for scores in self.scores.values())
            lines.append(text.ljust(width) + "".join(cells))
        return "\n".join(lines)


def evaluate(
    model: Co2SForSemanticSegmentation,
    image_processor: Co2SImageProcessor,
    data: Source,
    options: DataOptions,
    crop_size: int,
    accelerator: Accelerator,
    flip: bool = False,
    **facts,
) -> Evaluation:
    """Evaluate a model on the validation images. Every process must call this.

    Args:
        model: The model, without Accelerate's wrapper. It is in evaluation mode during the call.
        image_processor: Image processor of the model.
        data: The opened data. Only the validation images are used.
        options: Options that the data was opened with.
        crop_size: Side of a window in pixels.
        accelerator: Accelerate's state. The images are divided among its processes, and predicted in its precision.
        flip: Average with the predictions for the mirrored images.
        facts: `step` or `checkpoint` of the [`Evaluation`].

    Raises:
        UserValueError: The data has other classes than the model, or the same ones in another order.
    """
    check_classes(facts.get("checkpoint") or "The model", model.config.id2label, data.id2label)
    matrices = confusion_matrices(model, image_processor, data.validation, crop_size, accelerator, flip)
    id2label = model.config.id2label
    return Evaluation(
        data=options.data_name,
        dataset_id=options.dataset_id,
        data_hash=data.hash,
        num_images=len(data.validation),
        crop_size=crop_size,
        fusion=model.config.fusion,
        flip=flip,
        scores={name: Scores.from_confusion(matrix, id2label) for name, matrix in matrices.items()},
        largest_class_mean_iou=largest_class_mean_iou(matrices["fused"]),
        confusion=matrices["fused"],
        **facts,
    )


def check_classes(model_name: str, predicted: dict[int, str], labelled: dict[int, str]):
    """Refuse a model and data with different classes."""
    if predicted != labelled:
        raise UserValueError(
            f"{model_name} predicts {', '.join(predicted.values())}, but the data is labelled with "
            f"{', '.join(labelled.values())}. Evaluate a model of these classes, or name the data of this model: "
            "`data='drawn'`, `data_dir`, `dataset_name` or `dataset`."
        )


def confusion_matrices(
    model: Co2SForSemanticSegmentation,
    image_processor: Co2SImageProcessor,
    samples: Sequence[Sample],
    crop_size: int,
    accelerator: Accelerator,
    flip: bool = False,
) -> dict[str, ConfusionMatrix]:
    """Predict every sample once, by sliding windows. The samples are divided among the processes.

    Args:
        model: The model, without Accelerate's wrapper.
        image_processor: Image processor of the model.
        samples: Images with label maps. Each process reads only its own samples.
        crop_size: Side of a window in pixels.
        accelerator: Accelerate's state.
        flip: Average with the predictions for the mirrored images.

    Returns:
        Name of each of the [`predictors`] -> confusion matrix over the samples of all processes.
    """
    was_training = model.training
    model.eval()
    matrices = {name: ConfusionMatrix(model.config.num_labels) for name in predictors(model.config)}
    numbers = range(accelerator.process_index, len(samples), accelerator.num_processes)
    for number in tqdm(numbers, desc="evaluating", leave=False, disable=not accelerator.is_main_process):
        sample = samples[number]
        inputs = image_processor(sample.load_image(), return_tensors="pt")  # may resize the image, not the label map
        labels = torch.from_numpy(np.array(sample.load_label())).long()
        with accelerator.autocast():
            logits = predict_logits(model, inputs["pixel_values"], crop_size, tuple(labels.shape), flip)
        for name, matrix in matrices.items():
            matrix.update(logits[name].argmax(dim=0).cpu(), labels)
    model.train(was_training)
    return {name: matrix.over_processes() for name, matrix in matrices.items()}


def predict_examples(
    model: Co2SForSemanticSegmentation,
    image_processor: Co2SImageProcessor,
    samples: Iterable[Sample],
    crop_size: int,
    accelerator: Accelerator,
    flip: bool = False,
) -> list[Example]:
    """Predict labelled samples for a figure: true labels, each student, the fused prediction and its confidence.

    The device is that of the model, and the precision is that of `accelerator`, as in [`evaluate`].
    """
    was_training = model.training
    model.eval()
    examples = []
    for sample in samples:
        image, label = sample.load_image(), sample.load_label()
        inputs = image_processor(image, return_tensors="pt")
        with accelerator.autocast():
            logits = predict_logits(model, inputs["pixel_values"], crop_size, (label.height, label.width), flip)
        maps = {name: value.argmax(dim=0).cpu().numpy() for name, value in logits.items()}
        confidence = logits["fused"].softmax(dim=0).amax(dim=0).cpu().numpy()
        examples.append(Example(image, {"truth": np.asarray(label)} | maps, confidence))
    model.train(was_training)
    return examples


def write_evaluation(folder: str | Path, evaluation: Evaluation, examples: list[Example], config: Co2SConfig):
    """Write metrics.json, confusion.png (predicted against true classes) and predictions.png.

    Args:
        folder: Folder to write into; it is created if necessary.
        evaluation: Results to write, with the confusion matrix.
        examples: Images and predictions to draw, see [`predict_examples`].
        config: Configuration of the model.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "metrics.json", evaluation.to_dict())
    draw_confusion(evaluation.confusion.counts.numpy(), config.id2label, folder / "confusion.png")
    palette = palette_or_default(config.palette, config.num_labels)
    draw_predictions(examples, config.id2label, palette, folder / "predictions.png")


def predictors(config: Co2SConfig) -> tuple[str, ...]:
    """Return the names of a model's predictions: the students that its fusion uses, and "fused"."""
    return (*((config.fusion,) if config.fusion in STUDENTS else STUDENTS), "fused")


def largest_class_mean_iou(matrix: ConfusionMatrix) -> float:
    """Compute the mean IoU of predicting the most frequent class everywhere, as a baseline for models."""
    pixels = matrix.counts.sum(dim=1)
    return (pixels.max() / pixels.sum() / (pixels > 0).sum()).item()


__all__ = [
    "METRICS",
    "Evaluation",
    "Scores",
    "check_classes",
    "confusion_matrices",
    "evaluate",
    "largest_class_mean_iou",
    "predict_examples",
    "predictors",
    "write_evaluation",
]
