"""Add facts, figures, samples and a card to the folder of a trained model, and publish it."""

import shutil
from pathlib import Path

from accelerate import Accelerator

from ..hub import publishing
from ..hub.cards import CURVES, PREDICTIONS, SAMPLES, TRAINING_FILE, add_evaluation, without_secrets, write_card
from ..model.image_processing_co2s import Co2SImageProcessor
from ..model.modeling_co2s import Co2SForSemanticSegmentation
from ..training.evaluation import Evaluation, predict_examples
from ..training.run import Trained
from ..utils.figures import draw_predictions, palette_or_default
from ..utils.files import write_json
from .arguments import HubArguments
from .command_line import Command


SAMPLE_PX = 1024  # longest side of the widget's samples


def claim(hub: HubArguments, accelerator: Accelerator) -> str | None:
    """Check that the repository can be written to, before the expensive work starts.

    Returns:
        The full name of the repository. None if nothing is published, and on other processes than the main one.
    """
    if not hub.push_to_hub or not accelerator.is_main_process:
        return None
    return publishing.claim_repository(hub.hub_model_id, hub.hub_private_repo, hub.hub_revision)


def describe(trained: Trained, num_samples: int, command: Command, accelerator: Accelerator):
    """Add facts, figures, samples and a card to the folders that a training wrote.

    Args:
        trained: Result of the training.
        num_samples: Number of validation images to include, with their predictions.
        command: The training command. The facts contain only options that have a flag in this command, so that its
            `--config` can read them.
        accelerator: Accelerate's state of the training. Its device predicts the images, in its precision.
    """
    options = trained.record["arguments"]
    record = trained.record | {"arguments": {name: options[name] for name in options if command.has_flag(name)}}
    record = without_secrets(record)
    for folder in filter(None, (trained.folder, trained.best_folder)):
        write_json(folder / TRAINING_FILE, record)
        for pictures in (folder / CURVES).parent, folder / SAMPLES:  # left by an earlier run of this function
            shutil.rmtree(pictures, ignore_errors=True)
            pictures.mkdir()
        shutil.copyfile(folder.parent / "curves.png", folder / CURVES)
        if num_samples:
            _add_samples(folder, trained, num_samples, accelerator)
        write_card(folder, Evaluation.read(folder / "metrics.json"), trained.config)


def publish_result(trained: Trained, repository: str | None, revision: str | None):
    """Publish the best model, or the only one, if a repository was claimed."""
    if repository is not None:
        folder = trained.best_folder or trained.folder
        print(f"Published {folder}: {publishing.publish(folder, repository, revision)}")


def publish_evaluation(
    checkpoint: str, repository: str, evaluation: Evaluation, confusion: Path, revision: str | None
) -> str:
    """Add an evaluation to the card of a model, and publish the card.

    Args:
        checkpoint: Folder of a model, which is published as a whole; or the name of a model on the Hub.
        repository: Full name of the claimed repository.
        evaluation: Results to add.
        confusion: Path of the figure of the confusion matrix.
        revision: Branch to publish on. None: main.

    Returns:
        The repository's address.
    """
    if not Path(checkpoint).is_dir():
        return publishing.publish_evaluation(repository, evaluation, confusion, revision)
    add_evaluation(checkpoint, evaluation, confusion)
    return publishing.publish(checkpoint, repository, revision)


def _add_samples(folder: Path, trained: Trained, num_samples: int, accelerator: Accelerator):
    data, crop_size = trained.data, trained.evaluation.crop_size
    model = Co2SForSemanticSegmentation.from_pretrained(folder).to(accelerator.device)
    image_processor = Co2SImageProcessor.from_pretrained(folder)
    shown = predict_examples(model, image_processor, data.validation[:num_samples], crop_size, accelerator)
    palette = palette_or_default(data.palette, len(data.id2label))
    draw_predictions(shown, data.id2label, palette, folder / PREDICTIONS)
    for number, example in enumerate(shown):
        example.image.thumbnail((SAMPLE_PX, SAMPLE_PX))
        example.image.save(folder / SAMPLES / f"validation_{number}.png")
