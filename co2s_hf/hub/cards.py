"""Write the model card (README.md) of a model, and add evaluation results to a card.

All facts in a card come from the files in the model's folder and from an [`Evaluation`]. The text of the card is in
model_cards/template.md. Names of classes, data and models may have any characters: they are escaped, so that a card
shows them as they are.
"""

import hashlib
import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..model.adapters_co2s import PEFT_CONFIG_FILE
from ..model.configuration_co2s import Co2SConfig
from ..model.modeling_co2s import Co2SForSemanticSegmentation
from ..model.text_guidance_co2s import SHIPPED_BACKBONES
from ..training.evaluation import METRICS, Evaluation
from ..utils.errors import UserValueError, loading
from ..utils.files import write_text
from ..utils.markdown import Markdown, code, code_block, inline, single_line
from ..utils.redaction import redact, redacted


# File with the facts of a training run, in the folder of the model. "command" is the list of words after the program's
# name, such as ["train", "--data_dir", "x"]. "arguments" maps the options of the command to their values in JSON.
# "data" holds name, id (on the Hub, or None), partition, is_drawn, is_real (the images of this package), num_labeled,
# num_unlabeled and num_validation. The other keys are data_hash, label_hash, num_processes, device, mixed_precision,
# versions and git_revision.
TRAINING_FILE = "training.json"
PREDICTIONS, CURVES, SAMPLES = "figures/predictions.png", "figures/curves.png", "samples"
MODEL_PATH = "path/to/this/model"  # stands for the name of the model in a card until the model is published
DINOV3_LICENSE = "https://ai.meta.com/resources/models-and-libraries/dinov3-license/"

NO_RESULTS = "Nothing has been measured yet."
RESULTS_END = "<!-- end of the results -->"
SELECTED = "This training step was selected by its result on these images, so the result is optimistic."
# Options that are left out when a run is repeated: where to publish, and how the run was started or resumed.
NOT_REPEATED = {"push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision"}
NOT_REPEATED |= {"resume_from_checkpoint", "overwrite_output_dir"}
PREDICTOR_TITLES = {"clip": "CLIP student", "dinov3": "DINOv3 student", "fused": "fused"}


def template_path() -> Path:
    """Return the path of the card's template: inside an installed package, or beside the package in a checkout."""
    installed = Path(__file__).parents[1] / "model_cards" / "template.md"
    return installed if installed.exists() else Path(__file__).parents[2] / "model_cards" / "template.md"


def write_card(folder: str | Path, evaluation: Evaluation | None = None, config: Co2SConfig | None = None) -> Path:
    """Write README.md into a model's folder.

    Args:
        folder: Folder of a model or of an adapter. The card also uses training.json, figures/ and samples/ if the
            folder has them.
        evaluation: Results to show; None for a card without results.
        config: Configuration of the model; for an adapter, the configuration while the adapter is active. None: load
            it from the folder.

    Returns:
        The path of README.md.
    """
    folder = Path(folder)
    adapter, training = (
        without_secrets(read_json(path)) if path.exists() else None
        for path in (folder / PEFT_CONFIG_FILE, folder / TRAINING_FILE)
    )
    if config is None:
        with loading(f"The model in {folder}"):
            model_class = Co2SConfig if adapter is None else Co2SForSemanticSegmentation
            loaded = model_class.from_pretrained(folder)
            config = loaded if adapter is None else loaded.config
    pictures = {name: p for name, p in (("predictions", PREDICTIONS), ("curves", CURVES)) if (folder / p).exists()}
    samples = sorted(path.relative_to(folder).as_posix() for path in (folder / SAMPLES).glob("*"))
    base = _base_model(training, adapter)
    labels = [config.id2label[index] for index in range(config.num_labels)]
    card = _fill_template(
        card_data=Markdown(_metadata(training, samples, adapter).to_yaml()),
        adapter=adapter,
        base=base,
        title=_title(training, base),
        config=config,
        labels=labels,
        first_label=Markdown(_python_text(labels[0])),
        model_id=MODEL_PATH,
        training=training,
        dataset_id=_dataset_id(training),
        command=code_block(reproduce_command(training), "bash") if training else None,
        is_clean=bool(training and training["git_revision"] and not training["git_revision"].endswith("-dirty")),
        arguments=code_block(_options_yaml(training["arguments"]), "yaml") if training else None,
        pictures=pictures,
        shipped=SHIPPED_BACKBONES,
        results=Markdown(f"{NO_RESULTS}\n\n{RESULTS_END}\n"),
    )
    if evaluation is not None:
        card = with_evaluation(card, evaluation)
    write_text(folder / "README.md", str(card))
    return folder / "README.md"


def _fill_template(**values) -> ModelCard:
    """Fill the template. Text is escaped unless it is [`Markdown`]; it is never executed as a part of the template."""
    from jinja2 import Environment

    def escaped(value: Any) -> Any:
        return inline(value) if isinstance(value, str) and not isinstance(value, Markdown) else value

    template = Environment(finalize=escaped).from_string(template_path().read_text(encoding="utf-8"))
    return ModelCard(template.render(code=code, **values))


def add_evaluation(folder: str | Path, evaluation: Evaluation, picture: str | Path | None = None):
    """Add evaluation results to the card in a model's folder. Write the card first if there is none.

    Args:
        folder: Folder of a model or of an adapter.
        evaluation: Results to add.
        picture: Figure of the confusion matrix. It is copied into the folder and shown in the card.
    """
    folder, place = Path(folder), None
    path = folder / "README.md"
    if not path.exists():
        write_card(folder)
    if picture is not None:
        place = figure_path(evaluation)
        (folder / place).parent.mkdir(exist_ok=True)
        shutil.copyfile(picture, folder / place)
    write_text(path, str(with_evaluation(load_card(path), evaluation, place)))


def figure_path(evaluation: Evaluation) -> str:
    """Return the path of the figure of an evaluation, relative to the folder of the model."""
    return f"figures/confusion-{_evaluation_key(evaluation)}.png"


def with_evaluation(card: ModelCard, evaluation: Evaluation, picture: str | None = None) -> ModelCard:
    """Return a card with evaluation results added.

    The results replace earlier results for the same images and settings. All other text stays as it is.

    Args:
        card: Any model card, also one that was not written by this package.
        evaluation: Results to add.
        picture: Path of a figure to show with the results, relative to the card.
    """
    text, key = card.text, _evaluation_key(evaluation)
    # If the model was selected on these images, this also holds for every later evaluation on them.
    if re.search(rf"image sets: {re.escape(evaluation.data_hash)}\b.*{re.escape(SELECTED)}", text):
        evaluation = replace(evaluation, is_best=True)
    evaluation = replace(evaluation, data=single_line(without_secrets(evaluation.data)))
    section = _results_section(evaluation, picture)
    block = f"<!-- results {key} -->\n{section}\n<!-- end of results {key} -->\n"
    earlier = re.compile(rf"<!-- results {key} -->.*?<!-- end of results {key} -->\n", re.DOTALL)
    if earlier.search(text):
        text = earlier.sub(lambda match: block, text, count=1)
    elif RESULTS_END in text:
        # Only the first one: an option of the run may have the same text.
        text = text.replace(f"{NO_RESULTS}\n\n", "", 1).replace(RESULTS_END, f"{block}\n{RESULTS_END}", 1)
    else:
        text = f"{text.rstrip()}\n\n## Results\n\n{block}\n{RESULTS_END}\n"
    data, results = card.data, _eval_results(evaluation)
    replaced = results[0].unique_identifier
    data.eval_results = [r for r in data.eval_results or () if r.unique_identifier != replaced] + results
    data.model_name = data.model_name or "Co2S"
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def reproduce_command(training: dict) -> str:
    """Return the command line that repeats a run, without the options in `NOT_REPEATED`.

    Args:
        training: Content of training.json.
    """
    launch = ["accelerate", "launch"]
    if training["num_processes"] > 1:
        launch += ["--multi_gpu", "--num_processes", str(training["num_processes"])]
    words, names, is_kept = [], set(), True
    for word in training["command"]:
        if word.startswith("--"):
            name = word.removeprefix("--").partition("=")[0]
            names.add(name)
            is_kept = name not in NOT_REPEATED
        words += [word] if is_kept else []
    if training["mixed_precision"] != "no" and "mixed_precision" not in names:
        words += ["--mixed_precision", training["mixed_precision"]]  # it was an option of `accelerate launch`
    return shlex.join([*launch, "-m", "co2s_hf", *words])


def without_secrets(value: Any) -> Any:
    """Return a copy of a value of JSON types without secrets, see [`redact`], and without the path of the home folder.

    The path becomes "~".
    """
    home = str(Path.home())

    def replaced(text: str) -> str:
        text = redact(text)
        return re.sub(rf"(?<![\w.-]){re.escape(home)}(?![\w.-])", "~", text) if home != "/" else text

    return redacted(value, replaced)


def is_hub_name(name: str) -> bool:
    """Return whether a name has the form user/name and is not a local path."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def read_json(path: Path) -> dict:
    """Read a JSON file of a model's folder.

    Raises:
        UserValueError: The file is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserValueError(f"'{path}' is damaged: {error}. Restore it, or train the model again.") from error


def load_card(path: str | Path) -> ModelCard:
    """Read a model card.

    Raises:
        UserValueError: Its header is damaged.
    """
    try:
        return ModelCard.load(path)
    except (ValueError, TypeError, AttributeError, KeyError, yaml.YAMLError) as error:
        raise UserValueError(
            f"The card '{path}' cannot be read: {error}. Correct its header, or remove it."
        ) from error


def _python_text(text: str) -> str:
    """Return text as a literal of Python without "<", so that it has no mark of the results."""
    return json.dumps(single_line(text), ensure_ascii=False).replace("<", "\\u003c")


def _evaluation_key(evaluation: Evaluation) -> str:
    """Return eight hexadecimal digits that identify the images and settings of an evaluation."""
    facts = [evaluation.data, evaluation.data_hash, evaluation.crop_size, evaluation.fusion, evaluation.flip]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]


def _options_yaml(arguments: dict) -> str:
    """Return the options of a run as YAML for `--config`, without options that are None or derived from others."""
    kept = {name: value for name, value in arguments.items() if value is not None and name not in NOT_REPEATED}
    for derived, given in (("max_train_steps", "num_train_epochs"), ("eval_steps", "eval_epochs")):
        if given in kept:
            kept.pop(derived, None)
    return yaml.safe_dump(kept, sort_keys=False).rstrip()


def _title(training: dict | None, base: str | None) -> str:
    if not training:
        return "Co2S"
    return f"Co2S {'adapted to' if base else 'trained on'} {single_line(training['data']['name'])}"


def _dataset_id(training: dict | None) -> str | None:
    """Return the name of the data set on the Hub, if it has the form of one."""
    name = training["data"]["id"] if training else None
    return name if name and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) else None


def _base_model(training: dict | None, adapter: dict | None) -> str | None:
    """Return the name or folder of the model that this model was fine-tuned from; None if there is none."""
    if adapter is not None:
        return adapter["base_model_name_or_path"]
    return training["arguments"].get("checkpoint") if training else None


def _metadata(training: dict | None, samples: list[str], adapter: dict | None) -> ModelCardData:
    """Return the YAML header of a card."""
    arguments = training["arguments"] if training else {}
    facts = {"library_name": "transformers" if adapter is None else "peft"}
    base = _base_model(training, adapter)
    if base:  # the backbones are in the card of the base model
        facts["base_model_relation"] = "finetune" if adapter is None else "adapter"
        facts |= {"base_model": base} if is_hub_name(base) else {}
    elif backbones := [arguments[key] for key in ("clip_model", "dinov3_model") if arguments.get(key)]:
        if arguments.get("dinov3_model") not in SHIPPED_BACKBONES:
            facts |= {"license": "other", "license_name": "dinov3-license", "license_link": DINOV3_LICENSE}
        hub_names = [name for name in backbones if is_hub_name(name)]
        facts |= {"base_model": hub_names} if hub_names else {}
    if dataset_id := _dataset_id(training):
        facts["datasets"] = [dataset_id]
    if samples:
        facts["widget"] = [{"src": sample, "example_title": Path(sample).stem} for sample in samples]
    tags = ["co2s", "remote-sensing", "semantic-segmentation", "semi-supervised", "custom_code"]
    return ModelCardData(
        model_name=_title(training, base),
        pipeline_tag="image-segmentation",
        tags=tags + (["lora"] if adapter else []),
        metrics=["mean_iou"],
        **facts,
    )


def _eval_results(evaluation: Evaluation) -> list[EvalResult]:
    """Return the entries of the model-index: mean IoU of the fusion and of the students, and pixel accuracy."""
    settings = f"windows of {evaluation.crop_size} px, fusion {evaluation.fusion}"
    settings += ", averaged with the mirrored images" if evaluation.flip else ""
    dataset = {
        "task_type": "image-segmentation",
        "dataset_name": evaluation.data,
        "dataset_type": evaluation.dataset_id or evaluation.data,
        "dataset_split": "validation",
        "dataset_revision": evaluation.data_hash,
        "dataset_config": settings,
    }
    measured = [
        ("mean_iou", f"Mean IoU, {title}", evaluation.scores[name].mean_iou)
        for name, title in reversed(PREDICTOR_TITLES.items())
        if name in evaluation.scores
    ]
    measured.append(("accuracy", "Pixel accuracy, fused", evaluation.scores["fused"].accuracy))
    return [
        EvalResult(metric_type=kind, metric_name=name, metric_value=round(value, 4), **dataset)
        for kind, name, value in measured
    ]


def _results_section(evaluation: Evaluation, picture: str | None) -> str:
    """Return the table of scores, and the settings that are needed to repeat the evaluation."""
    columns = {title: evaluation.scores[name] for name, title in PREDICTOR_TITLES.items() if name in evaluation.scores}
    lines = [
        f"IoU of every class, and the means, in per cent on the {evaluation.num_images} validation images of "
        f"{inline(evaluation.data)}:",
        "",
        f"| class | {' | '.join(columns)} |",
        "|---|" + "---|" * len(columns),
    ]
    rows = {inline(c): [scores.iou[c] for scores in columns.values()] for c in evaluation.scores["fused"].iou}
    rows |= {f"**{title}**": [getattr(s, name) for s in columns.values()] for name, title in METRICS.items()}
    lines += [f"| {title} | {' | '.join(map(_percent, values))} |" for title, values in rows.items()]
    settings = [
        f"Windows of {evaluation.crop_size} px; fusion: {evaluation.fusion}; "
        f"{'averaged with the mirrored images' if evaluation.flip else 'no test-time augmentation'}; "
        f"hash of the image sets: {evaluation.data_hash}.",
        "Predicting the most frequent class everywhere gives a mean IoU of "
        f"{_percent(evaluation.largest_class_mean_iou)}.",
    ]
    if evaluation.step:
        settings.append(f"Measured after training step {evaluation.step}.")
    if evaluation.is_best:
        settings.append(SELECTED)
    lines += ["", " ".join(settings)]
    if picture is not None:
        lines += ["", f"![Confusion matrix in per cent of each true class]({picture})"]
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
    "figure_path",
    "is_hub_name",
    "reproduce_command",
    "template_path",
    "with_evaluation",
    "without_secrets",
    "write_card",
]
