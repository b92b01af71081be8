import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from co2s_hf.cli.command_line import parse_arguments, parse_fraction, setting
from co2s_hf.data.benchmarks import BENCHMARKS


EXAMPLES = Path(__file__).parents[1] / "examples"


@dataclass
class Arguments:
    crop_size: int = setting(96, "Side of crops.")
    learning_rate: float | None = setting(None, "Rate.")
    method: Literal["co2s", "supervised"] = setting("co2s", "Method.")
    class_names: list[str] | None = setting(None, "Names.")
    flip: bool = setting(False, "Mirror.")

    def __post_init__(self):
        if self.crop_size < 8:
            raise ValueError(f"--crop_size is {self.crop_size}; it must be at least 8.")


YAML = "crop_size: 64\nlearning_rate: 1e-3\nclass_names: [bare soil, water]\nflip: true\nmethod: supervised\n"
JSON = """{"crop_size": 64, "learning_rate": 0.001, "class_names": ["bare soil", "water"], "flip": true,
"method": "supervised"}"""


@pytest.mark.parametrize(("name", "text"), [("run.yaml", YAML), ("run.json", JSON)])
def test_settings_come_from_a_file_and_the_command_line_wins(name, text, tmp_path):
    path = tmp_path / name
    path.write_text(text)
    found = parse_arguments(Arguments, "", ["--crop_size", "32", "--config", str(path)])
    assert found == Arguments(32, 1e-3, "supervised", ["bare soil", "water"], True)
    assert parse_arguments(Arguments, "", []) == Arguments()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("crop_sise: 64", "there is no setting 'crop_sise'; 'crop_size'?"),
        ("crop_size: big", "invalid int value: 'big'"),
        ("method: fixmatch", "invalid choice: 'fixmatch'"),
        ("crop_size: 4", "--crop_size is 4; it must be at least 8"),
        ("just words", "holds no settings; expected lines such as 'crop_size: 256'"),
        ("a: [1", "cannot be read"),
    ],
)
def test_wrong_settings_in_a_file_are_named(text, message, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit):
        parse_arguments(Arguments, "", ["--config", str(path)])
    assert message in capsys.readouterr().err


def test_words_that_yaml_takes_for_truth_values_stay_words(tmp_path):
    @dataclass
    class Switches:
        stability: Literal["paper", "off"] = setting("paper", "Loss.")
        mixed_precision: Literal["no", "bf16"] | None = setting(None, "Precision.")
        report_to: list[str] | None = setting(None, "Trackers.")

    path = tmp_path / "run.yaml"
    path.write_text("stability: off\nmixed_precision: no\nreport_to: []\n")
    assert parse_arguments(Switches, "", ["--config", str(path)]) == Switches("off", "no", None)


def test_help_names_defaults_and_the_file(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(Arguments, "An example:\n    indented", ["--help"])
    shown = capsys.readouterr().out
    assert "An example:\n    indented" in shown and "Side of crops. [96]" in shown and "--config CONFIG" in shown


def test_fractions():
    assert (parse_fraction("1/8"), parse_fraction("0.25"), parse_fraction("1")) == (0.125, 0.25, 1.0)
    for text in ("1/0", "an eighth"):
        with pytest.raises(ValueError, match=f"'{text}' is no fraction; write it as 1/8 or 0.125"):
            parse_fraction(text)


def example(name):
    """The module of an example, under a name that no library has (`evaluate` is one)."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where annotations are resolved
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_the_papers_runs_are_a_file_each(name):
    """The file is read by the training script's own arguments; the catalogue brings the protocol."""
    train_semi = example("train_semi")
    args = parse_arguments(train_semi.Arguments, "", ["--config", str(EXAMPLES / "configs" / f"{name}.yaml")])
    facts = BENCHMARKS[name]
    assert int(args.partition.removeprefix("1_")) in facts.partitions and args.num_train_epochs == facts.num_epochs
    assert (args.crop_size, args.per_device_train_batch_size) == (facts.crop_size, facts.images_per_device)
    assert args.eval_short_side == facts.eval_short_side and args.base_size == facts.base_size
    assert (args.confidence_threshold, args.learning_rate, args.train_backbones) == (0.95, 1e-4, "attention")
    shorter = parse_arguments(train_semi.Arguments, "", ["--dataset", name, "--max_train_steps", "5"])
    assert shorter.num_train_epochs is None and shorter.crop_size == facts.crop_size
    evaluate = example("evaluate")
    measured = parse_arguments(evaluate.Arguments, "", ["--dataset", name])
    assert (measured.crop_size, measured.eval_short_side) == (facts.crop_size, facts.eval_short_side)
    assert parse_arguments(evaluate.Arguments, "", ["--dataset", name, "--crop_size", "64"]).crop_size == 64
