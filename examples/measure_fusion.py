"""Compare rules that fuse the two students of a trained model, on its validation images.

    python examples/measure_fusion.py --checkpoint outputs/train_semi/model
    python examples/measure_fusion.py --checkpoint outputs/mine/model --data_dir data --splits_dir outputs/mine/splits

Give the `--seed` of the training, and its `--labeled_fraction` or its lists (`splits/` in the output folder), because
rules may learn from the labels of the training only. Temperatures, reliabilities and gates are fitted on new random
views of the labelled images; the validation images are only measured. The training has seen the labelled images in
other views, so the students look better there than they are. `--fit_on unlabeled` fits on the hidden label files of
the unlabelled images instead. No training used them: this shows what a rule could reach with unseen labels.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from co2s_hf.data.options import DataOptions
from co2s_hf.data.sources import open_source
from co2s_hf.inference.images import load_for_prediction
from co2s_hf.inference.windows import sliding_window_logits
from co2s_hf.model.modeling_co2s import STUDENTS
from co2s_hf.training.calibration import (
    agreement_temperature,
    expected_calibration_error,
    fit_temperature,
    sample_logits,
)
from co2s_hf.training.confusion import ConfusionMatrix
from co2s_hf.training.options import TrainingOptions
from co2s_hf.utils.devices import make_accelerator


GATE_STEPS, GATE_RATE, GATE_DECAY, GATE_PIXELS = 300, 0.02, 1e-2, 20_000  # steps of AdamW on these pixels
ECE_STRIDE = 4  # of the validation pixels whose calibration is measured
Pixels = dict[str, torch.Tensor]  # student -> logits (pixels, classes)
Rule = Callable[[Pixels], torch.Tensor]  # -> scores (pixels, classes); the highest one is the predicted class


def log_probabilities(logits: Pixels, temperatures: dict[str, float]) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple((logits[name] / temperatures[name]).log_softmax(1) for name in STUDENTS)


def confidence(logits: Pixels, temperatures: dict[str, float]) -> torch.Tensor:
    """The paper's rule: the student with the higher probability decides."""
    clip, dinov3 = log_probabilities(logits, temperatures)
    return torch.where((clip.amax(1) >= dinov3.amax(1))[:, None], clip, dinov3)


def average(logits: Pixels, temperatures: dict[str, float]) -> torch.Tensor:
    return torch.logaddexp(*log_probabilities(logits, temperatures))


def product(logits: Pixels, temperatures: dict[str, float]) -> torch.Tensor:
    return sum(log_probabilities(logits, temperatures))


def precisions(logits: Pixels, labels: torch.Tensor) -> Pixels:
    """Return the share of right predictions of each class per student, (classes,).

    Two pixels are added to each class, one right and one wrong, for classes that are hardly predicted.
    """
    found = {}
    for name in STUDENTS:
        predicted, num_classes = logits[name].argmax(1), logits[name].shape[1]
        right = torch.bincount(predicted[predicted == labels], minlength=num_classes)
        found[name] = (right + 1) / (torch.bincount(predicted, minlength=num_classes) + 2)
    return found


def most_reliable(logits: Pixels, reliabilities: Pixels) -> torch.Tensor:
    """The student decides whose predicted class was right more often."""
    clip, dinov3 = (reliabilities[name][logits[name].argmax(1)] for name in STUDENTS)
    return torch.where((clip >= dinov3)[:, None], logits["clip"].softmax(1), logits["dinov3"].softmax(1))


def weighted_by_reliability(logits: Pixels, reliabilities: Pixels, temperatures: dict[str, float]) -> torch.Tensor:
    """The probabilities of a student weigh as much as its predicted class was right."""
    parts = zip(STUDENTS, log_probabilities(logits, temperatures))
    return sum(reliabilities[name][logits[name].argmax(1)][:, None] * part.exp() for name, part in parts)


class Gate(nn.Module):
    """Weights of the two students per pixel, from the log-probabilities of both.

    Args:
        num_classes: Number of classes.
        hidden: Width of the hidden layer. 0: a linear gate.
        temperatures: Temperatures of the students.
    """

    def __init__(self, num_classes: int, hidden: int, temperatures: dict[str, float]):
        super().__init__()
        self.temperatures = temperatures
        last = nn.Linear(hidden or 2 * num_classes, 2)
        nn.init.zeros_(last.weight)  # starts as the mean of the probabilities
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(nn.Linear(2 * num_classes, hidden), nn.ReLU(), last) if hidden else last

    def forward(self, logits: Pixels) -> torch.Tensor:
        parts = log_probabilities(logits, self.temperatures)
        weights = self.layers(torch.cat([part.clamp(min=-10) for part in parts], dim=1)).log_softmax(1)
        return torch.logaddexp(*(part + weight[:, None] for part, weight in zip(parts, weights.unbind(1))))


class Stack(nn.Module):
    """A linear layer from the log-probabilities of both students to the classes."""

    def __init__(self, num_classes: int, temperatures: dict[str, float]):
        super().__init__()
        self.temperatures = temperatures
        self.layer = nn.Linear(2 * num_classes, num_classes)
        with torch.no_grad():  # starts as the geometric mean
            self.layer.weight.copy_(torch.eye(num_classes).repeat(1, 2) / 2)
            self.layer.bias.zero_()

    def forward(self, logits: Pixels) -> torch.Tensor:
        parts = [part.clamp(min=-10) for part in log_probabilities(logits, self.temperatures)]
        return self.layer(torch.cat(parts, dim=1)).log_softmax(1)


def fit(module: nn.Module, logits: Pixels, labels: torch.Tensor) -> Rule:
    """Train a gate on the labelled pixels with the negative log-likelihood."""
    order = torch.randperm(len(labels))[:GATE_PIXELS]
    logits, labels = {name: values[order] for name, values in logits.items()}, labels[order]
    optimizer = torch.optim.AdamW(module.parameters(), lr=GATE_RATE, weight_decay=GATE_DECAY)
    with torch.enable_grad():
        for _ in range(GATE_STEPS):
            optimizer.zero_grad()
            F.nll_loss(module(logits), labels).backward()
            optimizer.step()
    return module


def make_rules(logits: Pixels, labels: torch.Tensor, temperatures: dict[str, dict[str, float]]) -> dict[str, Rule]:
    """Fit all rules on labelled pixels.

    Args:
        logits, labels: The labelled pixels.
        temperatures: Name of a calibration -> student -> temperature. "labels" is used by the fitted rules.
    """
    rules = {name: lambda z, name=name: z[name] for name in STUDENTS}
    for calibration, t in temperatures.items():
        for rule in (confidence, average, product):
            rules[f"{rule.__name__}, temperatures: {calibration}"] = lambda z, rule=rule, t=t: rule(z, t)
    t, num_classes, reliabilities = temperatures["labels"], logits["clip"].shape[1], precisions(logits, labels)
    rules["most reliable class"] = lambda z: most_reliable(z, reliabilities)
    rules["average, weighted by reliability"] = lambda z: weighted_by_reliability(z, reliabilities, t)
    rules["gate, linear"] = fit(Gate(num_classes, 0, t), logits, labels)
    rules["gate, 16 hidden"] = fit(Gate(num_classes, 16, t), logits, labels)
    rules["linear layer to classes"] = fit(Stack(num_classes, t), logits, labels)
    return rules


def measure(rules: dict[str, Rule], model, image_processor, samples, crop_size: int):
    """Predict the validation images with every rule.

    Returns:
        Rule -> confusion matrix, where "better student per pixel" knows the labels; and, for some pixels, the logits
        of the students (pixels, classes) and the labels (pixels,).
    """
    matrices = {name: ConfusionMatrix(model.config.num_labels) for name in (*rules, "better student per pixel")}
    kept = []
    for sample in samples:
        inputs = image_processor(sample.load_image(), return_tensors="pt")
        labels = torch.from_numpy(np.array(sample.load_label())).long()
        maps = sliding_window_logits(model, inputs["pixel_values"], crop_size)
        if maps["clip"].shape[-2:] != labels.shape:
            maps = {
                name: F.interpolate(x, labels.shape, mode="bilinear", align_corners=True) for name, x in maps.items()
            }
        logits, labels = {name: x[0].flatten(1).T.cpu() for name, x in maps.items()}, labels.flatten()
        for name, rule in rules.items():
            matrices[name].update(rule(logits).argmax(1), labels)
        clip, dinov3 = (logits[name].argmax(1) for name in STUDENTS)
        matrices["better student per pixel"].update(torch.where(dinov3 == labels, dinov3, clip), labels)
        kept.append((*(logits[name][::ECE_STRIDE] for name in STUDENTS), labels[::ECE_STRIDE]))
    *parts, labels = (torch.cat(part) for part in zip(*kept))
    return matrices, dict(zip(STUDENTS, parts)), labels


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder or Hub name of a trained model")
    parser.add_argument("--data_dir", help="folder of images and labels (default: the real images of this package)")
    parser.add_argument("--splits_dir", help="lists of the training, such as outputs/mine/splits")
    parser.add_argument("--labeled_fraction", type=float, help="labelled share of the training")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training (default: 0)")
    parser.add_argument("--fit_on", default="labeled", choices=["labeled", "unlabeled"], help="images to fit rules on")
    parser.add_argument("--num_views", type=int, default=128, help="views to fit rules on (default: 128)")
    parser.add_argument("--use_cpu", action="store_true", help="use the CPU even if there is a GPU")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    accelerator = make_accelerator(args.use_cpu, None)
    model, image_processor, crop_size = load_for_prediction(args.checkpoint)
    model.to(accelerator.device)
    on_hidden = args.fit_on == "unlabeled"
    options = DataOptions(data_dir=args.data_dir, splits_dir=args.splits_dir, labeled_fraction=args.labeled_fraction)
    data = open_source(options, args.seed, with_hidden_labels=on_hidden, config=model.config)
    fitted = replace(data, labeled=data.unlabeled) if on_hidden else data
    views = TrainingOptions(crop_size=crop_size, per_device_train_batch_size=8, seed=args.seed)
    logits, labels = sample_logits(model, fitted, views, accelerator, num_views=args.num_views)
    unlabeled, _ = sample_logits(model, data, views, accelerator, from_labeled=False, num_views=args.num_views)
    logits, unlabeled, labels = *({n: x.cpu() for n, x in z.items()} for z in (logits, unlabeled)), labels.cpu()
    clip, dinov3 = (unlabeled[name] for name in STUDENTS)
    temperatures = {
        "none": dict.fromkeys(STUDENTS, 1.0),
        "model": {name: getattr(model.config, f"{name}_temperature") for name in STUDENTS},
        "labels": {name: fit_temperature(logits[name], labels) for name in STUDENTS},
        "agreement": dict(zip(STUDENTS, (agreement_temperature(clip, dinov3), agreement_temperature(dinov3, clip)))),
    }
    rules = make_rules(logits, labels, temperatures)
    with torch.no_grad():
        matrices, measured, truth = measure(rules, model, image_processor, data.validation, crop_size)
    print_tables(matrices, temperatures, {args.fit_on: (logits, labels), "validation": (measured, truth)})


def print_tables(matrices: dict[str, ConfusionMatrix], temperatures: dict, pixels: dict):
    """Print the mean IoU of each rule, then the calibration error of each student with each pair of temperatures."""
    print("| rule | mean IoU | accuracy | lowest IoU |\n|---|---|---|---|")
    for name, matrix in matrices.items():
        values = (matrix.mean_iou(), matrix.accuracy(), np.nanmin(matrix.iou().numpy()))
        print(f"| {name} | " + " | ".join(f"{100 * value:.2f}" for value in values) + " |")
    print("\n| student | temperatures | T |" + "".join(f" ECE, {name} |" for name in pixels))
    print("|---" * (3 + len(pixels)) + "|")
    for student in STUDENTS:
        for calibration, t in temperatures.items():
            errors = [
                f" {100 * expected_calibration_error(logits[student], labels, t[student]):.1f} |"
                for logits, labels in pixels.values()
            ]
            print(f"| {student} | {calibration} | {t[student]:.2f} |" + "".join(errors))


if __name__ == "__main__":
    main()
