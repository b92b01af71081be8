"""A checkpoint's model card: what the checkpoint's own folder tells, and what was measured; nothing else."""

import hashlib
import json
import re
import shlex
import shutil
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .adapters_co2s import PEFT_CONFIG_FILE
from .configuration_co2s import Co2SConfig
from .data_arguments import DataArguments
from .files import write_text
from .modeling_co2s import Co2SForSemanticSegmentation
from .sources import Source


TRAINING_FILE = "training.json"  # beside the weights: what it takes to repeat the training
PREDICTIONS, CURVES, SAMPLES = "figures/predictions.png", "figures/curves.png", "samples"
MODEL_PATH = "path/to/this/model"  # in a card, until the model has a name on the Hub
DINOV3_LICENSE = "https://ai.meta.com/resources/models-and-libraries/dinov3-license/"

NOTHING_MEASURED = "Nothing has been measured yet."
RESULTS_END = "<!-- end of the results -->"
CHOSEN = "This step was chosen for its result on these very images, which flatters it."
# Of a command line: who published where, and whether it was resumed, is nothing to repeat.
NOT_REPEATED = {"push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision"}
NOT_REPEATED |= {"resume_from_checkpoint", "overwrite_output_dir"}
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


def write_card(folder: str | Path, evaluation: dict | None = None, config: Co2SConfig | None = None) -> Path:
    """Write README.md into a checkpoint's folder.

    Args:
        folder: Of a model or an adapter; training.json, figures/ and samples/ are used where they exist.
        evaluation: What was measured, as in metrics.json, if anything.
        config: Of the model, or of the base with the adapter. Left out: what is loaded from the folder says.

    Returns:
        The card's path.
    """
    folder = Path(folder)
    adapter = json.loads(path.read_text()) if (path := folder / PEFT_CONFIG_FILE).exists() else None
    if config is None and adapter is None:
        config = Co2SConfig.from_pretrained(folder)
    elif config is None:
        config = Co2SForSemanticSegmentation.from_pretrained(folder).config
    path = folder / TRAINING_FILE
    training = json.loads(path.read_text()) if path.exists() else None
    if training:  # in a table's cell
        training["data"]["name"] = _cell(training["data"]["name"])
    pictures = {name: p for name, p in (("predictions", PREDICTIONS), ("curves", CURVES)) if (folder / p).exists()}
    samples = sorted(path.relative_to(folder).as_posix() for path in (folder / SAMPLES).glob("*"))
    card = ModelCard.from_template(
        _metadata(training, samples, adapter),
        template_path(),
        adapter=adapter,
        base=_base(training, adapter),
        title=_title(training, _base(training, adapter)),
        config=config,
        labels=[config.id2label[index] for index in range(config.num_labels)],
        model_id=MODEL_PATH,
        training=training,
        command=reproduce_command(training) if training else None,
        is_clean=bool(training and training["git_revision"] and not training["git_revision"].endswith("-dirty")),
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
    write_text(path, str(with_evaluation(ModelCard.load(path), evaluation, place)))


def figure_place(evaluation: dict) -> str:
    """Where a card's figure of a measurement goes, one for each."""
    return f"figures/confusion-{_key(evaluation)}.png"


def with_evaluation(card: ModelCard, evaluation: dict, picture: str | None = None) -> ModelCard:
    """The card with what was measured, in place of what it said of the same images and settings before.

    Everything else, written by whomever, stays.

    Args:
        card: Any model card.
        evaluation: As in metrics.json: `data`, `num_images` and per predictor `mean_iou`, `iou` ...
        picture: Path of a figure in the repository to show with it.
    """
    text, key = card.text, _key(evaluation)
    # A model that was chosen by these images stays so, whoever measures it again.
    if re.search(rf"sets {evaluation['data_hash']}\b.*{re.escape(CHOSEN)}", text):
        evaluation = evaluation | {"is_best": True}
    section = without_secrets(_results_section(evaluation, picture))
    block = f"<!-- results {key} -->\n{section}\n<!-- end of results {key} -->\n"
    old = re.compile(rf"<!-- results {key} -->.*?<!-- end of results {key} -->\n", re.DOTALL)
    if old.search(text):
        text = old.sub(lambda match: block, text)
    elif RESULTS_END in text:
        text = text.replace(f"{NOTHING_MEASURED}\n\n", "").replace(RESULTS_END, f"{block}\n{RESULTS_END}")
    else:
        text = f"{text.rstrip()}\n\n## Results\n\n{block}\n{RESULTS_END}\n"
    data, results = card.data, _eval_results(evaluation)
    same = results[0].unique_identifier
    data.eval_results = [r for r in data.eval_results or () if r.unique_identifier != same] + results
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
    """The command line of a run, from the folder of a checkout, without where it published and what it resumed."""
    launch = ["accelerate", "launch"]
    if training["num_processes"] > 1:
        launch += ["--multi_gpu", "--num_processes", str(training["num_processes"])]
    script, *words = training["command"]
    settings, is_kept = [], True
    for word in words:
        if word.startswith("--"):
            is_kept = word.removeprefix("--") not in NOT_REPEATED
        settings += [word] if is_kept else []
    if training["mixed_precision"] != "no" and "--mixed_precision" not in settings:
        settings += ["--mixed_precision", training["mixed_precision"]]  # the launcher's, perhaps
    return shlex.join([*launch, f"examples/{Path(script).name}", *settings])


def without_secrets(text: str) -> str:
    """The text without access tokens, what addresses carry of them, and the name of the home folder."""
    text = re.sub(r"\bhf_[A-Za-z0-9]{8,}", "hf_...", text)
    text = re.sub(r"(\w+://)[^/\s@]+@", r"\1...@", text)  # user:password@
    text = re.sub(r"(\w+://[^\s?\"'`)]+)\?[^\s\"'`)]+", r"\1?...", text)  # ?token=...
    home = str(Path.home())
    return re.sub(rf"(?<![\w.-]){re.escape(home)}(?![\w.-])", "~", text) if home != "/" else text


def _key(evaluation: dict) -> str:
    """Eight digits for the images and settings of a measurement."""
    facts = [evaluation[name] for name in ("data", "data_hash", "crop_size", "fusion", "flip")]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]


def _settings(arguments: dict) -> str:
    """The arguments of a run as YAML that `--config` reads: those that have a value and follow from no other."""
    kept = {name: value for name, value in arguments.items() if value is not None and name not in NOT_REPEATED}
    for derived, given in (("max_train_steps", "num_train_epochs"), ("eval_steps", "eval_epochs")):
        if given in kept:
            kept.pop(derived, None)
    return yaml.safe_dump(kept, sort_keys=False).rstrip()


def _title(training: dict | None, base: str | None) -> str:
    return f"Co2S {'adapted to' if base else 'trained on'} {training['data']['name']}" if training else "Co2S"


def _base(training: dict | None, adapter: dict | None) -> str | None:
    """The trained model that this one was made from, if any."""
    if adapter is not None:
        return adapter["base_model_name_or_path"]
    return training["arguments"].get("checkpoint") if training else None


def _metadata(training: dict | None, samples: list[str], adapter: dict | None) -> ModelCardData:
    arguments = training["arguments"] if training else {}
    towers = [tower for tower in (arguments.get("clip_model"), arguments.get("dinov3_model")) if tower]
    facts = {"library_name": "transformers"}
    if base := _base(training, adapter):  # whose card tells of the towers
        towers = []
        facts["base_model_relation"] = "finetune" if adapter is None else "adapter"
        facts |= {"base_model": base} if is_hub_name(base) else {}
    if adapter is not None:
        facts["library_name"] = "peft"
    if towers:
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
        model_name=_title(training, _base(training, adapter)),
        pipeline_tag="image-segmentation",
        tags=["co2s", "remote-sensing", "semantic-segmentation", "semi-supervised", "custom_code"]
        + (["lora"] if adapter else []),
        metrics=["mean_iou"],
        **facts,
    )


def is_hub_name(name: str) -> bool:
    """Whether this is user/name, and not a folder here."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def _eval_results(evaluation: dict) -> list[EvalResult]:
    """For the model-index: mean IoU, the fused one first, and the fused pixel accuracy."""
    dataset = {"dataset_name": evaluation["data"], "dataset_type": evaluation["dataset_id"] or evaluation["data"]}
    dataset |= {"dataset_split": "validation", "task_type": "image-segmentation"}
    settings = f"windows of {evaluation['crop_size']} px, fusion {evaluation['fusion']}"
    settings += ", with the mirrored image" if evaluation["flip"] else ""
    dataset |= {"dataset_revision": evaluation["data_hash"], "dataset_config": settings}
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
            f"| {_cell(label)} | " + " | ".join(_percent(evaluation[n]["iou"][label]) for n in measured) + " |"
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
        lines[-1] += f" {CHOSEN}"
    if picture is not None:
        lines += ["", f"![What each class was taken for]({picture})"]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Text within a table of Markdown."""
    return text.replace("|", r"\|")


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
    "is_hub_name",
    "reproduce_command",
    "template_path",
    "with_evaluation",
    "without_secrets",
    "write_card",
]
