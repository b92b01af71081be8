"""A checkpoint's model card: what the checkpoint's own folder tells, and what was measured; nothing else."""

import json
import re
import shlex
import shutil
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .configuration_co2s import Co2SConfig
from .data_arguments import DataArguments
from .files import write_text
from .sources import Source


TRAINING_FILE = "training.json"  # beside the weights: what it takes to repeat the training
PREDICTIONS, CURVES, SAMPLES = "figures/predictions.png", "figures/curves.png", "samples"
MODEL_PATH = "path/to/this/model"  # in a card, until the model has a name on the Hub
DINOV3_LICENSE = "https://ai.meta.com/resources/models-and-libraries/dinov3-license/"

NOTHING_MEASURED = "Nothing has been measured yet."
RESULTS_END = "<!-- end of the results -->"
COLUMNS = {"clip": "CLIP student", "dinov3": "DINOv3 student", "fused": "fused"}
MEANS = {
    "mean_iou": "mean IoU",
    "mean_iou_paper": "mean IoU (paper's convention: absent classes count as 0)",
    "mean_f1": "mean F1",
    "accuracy": "pixel accuracy",
}


def template_path() -> Path:
    """The card's template: beside the package in a checkout, inside it where it was installed."""
    inside = Path(__file__).parent / "model_cards" / "template.md"
    return inside if inside.exists() else Path(__file__).parents[1] / "model_cards" / "template.md"


def write_card(folder: str | Path, evaluation: dict | None = None) -> Path:
    """Write README.md into a checkpoint's folder.

    Args:
        folder: With config.json; training.json, figures/ and samples/ are used where they exist.
        evaluation: What was measured, as in metrics.json, if anything.

    Returns:
        The card's path.
    """
    folder = Path(folder)
    config = Co2SConfig.from_pretrained(folder)
    path = folder / TRAINING_FILE
    training = json.loads(path.read_text()) if path.exists() else None
    pictures = {name: p for name, p in (("predictions", PREDICTIONS), ("curves", CURVES)) if (folder / p).exists()}
    samples = sorted(path.relative_to(folder).as_posix() for path in (folder / SAMPLES).glob("*"))
    card = ModelCard.from_template(
        _metadata(training, samples),
        template_path(),
        title=_title(training),
        config=config,
        labels=[config.id2label[index] for index in range(config.num_labels)],
        model_id=MODEL_PATH,
        training=training,
        command=reproduce_command(training) if training else None,
        arguments=_settings(training["arguments"]) if training else None,
        pictures=pictures,
        results=f"{NOTHING_MEASURED}\n\n{RESULTS_END}\n",
    )
    if evaluation is not None:
        card = with_evaluation(card, evaluation)
    write_text(folder / "README.md", without_secrets(str(card)))
    return folder / "README.md"


def add_evaluation(folder: str | Path, evaluation: dict, picture: str | Path | None = None):
    """Put what was measured on the card in a checkpoint's folder, which is written first if there is none.

    Args:
        folder: Of the checkpoint.
        evaluation: As in metrics.json.
        picture: Figure to copy along and show.
    """
    folder, place = Path(folder), None
    path = folder / "README.md"
    if not path.exists():
        write_card(folder)
    if picture is not None:
        place = figure_place(evaluation)
        (folder / place).parent.mkdir(exist_ok=True)
        shutil.copyfile(picture, folder / place)
    card = with_evaluation(ModelCard.load(path), evaluation, place)
    write_text(path, without_secrets(str(card)))


def figure_place(evaluation: dict) -> str:
    """Where a card's figure of a measurement goes, one for each data set."""
    return f"figures/confusion-{re.sub(r'[^A-Za-z0-9.-]+', '-', evaluation['data'])}.png"


def with_evaluation(card: ModelCard, evaluation: dict, picture: str | None = None) -> ModelCard:
    """The card with what was measured on one data set, in place of what it said of that data set before.

    Everything else, written by whomever, stays.

    Args:
        card: Any model card.
        evaluation: As in metrics.json: `data`, `num_images` and per predictor `mean_iou`, `iou` ...
        picture: Path of a figure in the repository to show with it.
    """
    name, text = evaluation["data"], card.text
    block = f"<!-- results on {name} -->\n{_results_section(evaluation, picture)}\n<!-- end of results on {name} -->\n"
    old = re.compile(
        rf"<!-- results on {re.escape(name)} -->.*?<!-- end of results on {re.escape(name)} -->\n", re.DOTALL
    )
    if old.search(text):
        text = old.sub(lambda match: block, text)
    elif RESULTS_END in text:
        text = text.replace(f"{NOTHING_MEASURED}\n\n", "").replace(RESULTS_END, f"{block}\n{RESULTS_END}")
    else:
        text = f"{text.rstrip()}\n\n## Results\n\n{block}\n{RESULTS_END}\n"
    data = card.data
    data.eval_results = [r for r in data.eval_results or () if r.dataset_name != name] + _eval_results(evaluation)
    data.model_name = data.model_name or "Co2S"
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def evaluation_facts(args: DataArguments, data: Source, crop_size: int, fusion: str, flip: bool = False) -> dict:
    """What a card says of a measurement besides its results."""
    facts = {"data": args.data_name, "dataset_id": args.dataset_id, "data_hash": data.hash}
    return facts | {"num_images": len(data.validation), "crop_size": crop_size, "fusion": fusion, "flip": flip}


def data_facts(args: DataArguments, data: Source, is_drawn: bool) -> dict:
    """What a card says of the data that a model was trained on.

    Args:
        args: What was read.
        data: What was found.
        is_drawn: Whether this package drew the scenes.
    """
    facts = {"name": args.data_name, "id": args.dataset_id, "partition": args.partition, "is_drawn": is_drawn}
    return facts | {f"num_{name}": len(lines) for name, lines in data.lists.items()}


def reproduce_command(training: dict) -> str:
    """The command line of a run, from the folder of a checkout."""
    launch = ["accelerate", "launch"]
    if training["num_processes"] > 1:
        launch += ["--multi_gpu", "--num_processes", str(training["num_processes"])]
    script, *settings = training["command"]
    return shlex.join([*launch, f"examples/{Path(script).name}", *settings])


def without_secrets(text: str) -> str:
    """The text without access tokens, passwords in addresses and the name of the home folder."""
    text = re.sub(r"\bhf_[A-Za-z0-9]{8,}", "hf_...", text)
    text = re.sub(r"(\w+://)[^/\s:@]+:[^/\s@]+@", r"\1...@", text)
    return text.replace(str(Path.home()), "~") if Path.home() != Path("/") else text


def _settings(arguments: dict) -> str:
    """The arguments that have a value, as YAML that `--config` reads."""
    return yaml.safe_dump({k: v for k, v in arguments.items() if v is not None}, sort_keys=False).rstrip()


def _title(training: dict | None) -> str:
    return f"Co2S trained on {training['data']['name']}" if training else "Co2S"


def _metadata(training: dict | None, samples: list[str]) -> ModelCardData:
    arguments = training["arguments"] if training else {}
    towers = [tower for tower in (arguments.get("clip_model"), arguments.get("dinov3_model")) if tower]
    facts = {}
    if any("dinov3" in tower.lower() for tower in towers):
        facts |= {"license": "other", "license_name": "dinov3-license", "license_link": DINOV3_LICENSE}
    if hub_names := [
        tower for tower in towers if re.fullmatch(r"[\w.-]+/[\w.-]+", tower) and not Path(tower).exists()
    ]:
        facts["base_model"] = hub_names
    if training and training["data"]["id"]:
        facts["datasets"] = [training["data"]["id"]]
    if samples:
        facts["widget"] = [{"src": sample, "example_title": Path(sample).stem} for sample in samples]
    return ModelCardData(
        model_name=_title(training),
        library_name="transformers",
        pipeline_tag="image-segmentation",
        tags=["co2s", "remote-sensing", "semantic-segmentation", "semi-supervised", "custom_code"],
        metrics=["mean_iou"],
        **facts,
    )


def _eval_results(evaluation: dict) -> list[EvalResult]:
    """For the model-index: mean IoU, the fused one first, and the fused pixel accuracy."""
    dataset = {"dataset_name": evaluation["data"], "dataset_type": evaluation["dataset_id"] or evaluation["data"]}
    dataset |= {"dataset_split": "validation", "task_type": "image-segmentation"}
    measured = [name for name in reversed(COLUMNS) if name in evaluation]
    results = [("mean_iou", f"Mean IoU, {COLUMNS[name]}", evaluation[name]["mean_iou"]) for name in measured]
    results.append(("accuracy", "Pixel accuracy, fused", evaluation["fused"]["accuracy"]))
    return [
        EvalResult(metric_type=kind, metric_name=name, metric_value=round(value, 4), **dataset)
        for kind, name, value in results
    ]


def _results_section(evaluation: dict, picture: str | None) -> str:
    """The table of one data set, and what it takes to measure the same."""
    measured = [name for name in COLUMNS if name in evaluation]
    lines = [
        f"IoU in per cent on the {evaluation['num_images']} validation images of {evaluation['data']}:",
        "",
        "| class | " + " | ".join(COLUMNS[name] for name in measured) + " |",
        "|---|" + "---|" * len(measured),
    ]
    for label in evaluation["fused"]["iou"]:
        lines.append(
            f"| {label.replace('|', chr(92) + '|')} | "
            + " | ".join(_percent(evaluation[n]["iou"][label]) for n in measured)
            + " |"
        )
    for key, title in MEANS.items():
        lines.append(f"| **{title}** | " + " | ".join(_percent(evaluation[name][key]) for name in measured) + " |")
    lines += [
        "",
        f"Windows of {evaluation['crop_size']} px, fusion by {evaluation['fusion']}, "
        f"{'averaged with the mirrored image' if evaluation['flip'] else 'no test-time augmentation'}; sets "
        f"{evaluation['data_hash']}. Predicting the largest class everywhere: mean IoU "
        f"{_percent(evaluation['largest_class_mean_iou'])}.",
    ]
    if evaluation.get("step"):
        lines[-1] += f" Measured after step {evaluation['step']} of the training."
    if evaluation.get("is_best"):
        lines[-1] += " This step was chosen for its result on these very images, which flatters it."
    if picture is not None:
        lines += ["", f"![What each class was taken for]({picture})"]
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


__all__ = [
    "CURVES",
    "MODEL_PATH",
    "PREDICTIONS",
    "SAMPLES",
    "TRAINING_FILE",
    "add_evaluation",
    "data_facts",
    "evaluation_facts",
    "figure_place",
    "reproduce_command",
    "template_path",
    "with_evaluation",
    "without_secrets",
    "write_card",
]
