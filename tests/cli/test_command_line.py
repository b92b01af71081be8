"""How a command reads its flags and files, shows its help, and reports errors."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from co2s_hf.cli.arguments import parse_bands, parse_label_map, parse_scale
from co2s_hf.cli.command_line import (
    RECIPES,
    Command,
    Flag,
    Group,
    find_config,
    own_group,
    parse_fraction,
    recipe_names,
    setting,
)
from co2s_hf.utils.errors import UserFileNotFoundError, UserValueError


@dataclass
class Options:
    """Plain options, whose help texts and parsers stand in a [`Group`]."""

    crop_size: int = 96
    learning_rate: float = 0.5
    method: Literal["co2s", "supervised"] = "co2s"
    class_names: list[str] | None = None
    bands: tuple[int, int, int] | None = None
    scale: tuple[tuple[float, float], ...] | None = None
    label_map: dict[int, int] | None = None
    labeled_fraction: float | None = None
    hidden: int = 1

    def __post_init__(self):
        if self.crop_size < 8:
            raise UserValueError(f"`crop_size` is {self.crop_size}; it must be at least 8.")
        if self.labeled_fraction == 0:
            raise ValueError("a bug")


@dataclass
class Words:
    """Options of the command alone, with their help."""

    files: list[str] | None = setting(None, "Files.")
    flip: bool = setting(False, "Mirror 100% of the images.")
    seed: int = setting(0, "Seed.")
    stability: Literal["paper", "off"] = setting("paper", "Loss.")
    mixed_precision: Literal["no", "bf16"] | None = setting(None, "Precision.")
    report_to: list[str] | None = setting(
        None,
        "Trackers.",
    )
    folders: list[str] = setting(["here"], "Folders.")


SIZES = {
    "crop_size": Flag("Side of crops."),
    "learning_rate": Flag("Rate."),
    "method": Flag("Method."),
}
DATA = {
    "class_names": Flag("Names.", name="NAME"),
    "bands": Flag("Bands.", parse_bands),
    "scale": Flag("Scale.", parse_scale, many=True, name="LOW HIGH"),
    "label_map": Flag("Map.", parse_label_map),
    "labeled_fraction": Flag("Share.", parse_fraction),
}
COMMAND = Command(
    name="try",
    description="Try it:\n    co2s try --flip",
    groups=[
        Group("sizes", Options, SIZES),
        Group("data", Options, DATA),
        own_group("words", Words),
    ],
    first=("flip", "crop_size"),
    positional="files",
    has_recipes=True,
)


def parse(*words) -> tuple[Options, Words]:
    found = COMMAND.parse([str(word) for word in words])
    return found[Options], found[Words]


def error_of(capsys, *words) -> str:
    """Parse wrong words; return what was printed, which includes the usage."""
    with pytest.raises(SystemExit) as error:
        parse(*words)
    assert error.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("usage: co2s try [files ...] [--flag value ...]\nco2s try: error: ")
    return stderr.split("error: ", 1)[1].rstrip("\n")


def test_without_words_the_defaults_of_the_options_hold():
    assert parse() == (Options(), Words(folders=["here"]))


def test_flags_set_the_options_with_their_types():
    options, words = parse(
        *(
            "--crop_size",
            32,
            "--learning_rate",
            "1e-3",
            "--method",
            "supervised",
            "--class_names",
            "bare soil",
            "water",
        ),
        *("--bands", "4,3,2", "--scale", 0, 3000, "--label_map", "7=0,9=1", "--labeled_fraction", "1/8"),
        *("--folders", "a", "b", "--stability", "off", "--seed", -3),
    )
    expected = Options(
        32, 1e-3, "supervised", ["bare soil", "water"], (4, 3, 2), ((0.0, 3000.0),), {7: 0, 9: 1}, 0.125
    )
    assert options == expected
    assert words == Words(folders=["a", "b"], stability="off", seed=-3)
    assert isinstance(options.crop_size, int) and isinstance(options.labeled_fraction, float)


YAML = """
crop_size: 64
learning_rate: 1e-3
class_names: [bare soil, water]
flip: true
method: supervised
bands: [4, 3, 2]
scale: [[0, 3000]]
label_map: {7: 0, 9: 1}
labeled_fraction: 1/8
"""
JSON = """{"crop_size": 64, "learning_rate": 0.001, "class_names": ["bare soil", "water"], "flip": true,
"method": "supervised", "bands": [4, 3, 2], "scale": [[0, 3000]], "label_map": {"7": 0, "9": 1},
"labeled_fraction": 0.125}"""
FLAT_YAML = YAML.replace("[4, 3, 2]", "4,3,2").replace("[[0, 3000]]", "[0, 3000]").replace("{7: 0, 9: 1}", "7=0,9=1")


@pytest.mark.parametrize(("name", "text"), [("run.yaml", YAML), ("run.json", JSON), ("flat.yaml", FLAT_YAML)])
def test_options_come_from_a_file_and_the_command_line_wins(name, text, tmp_path):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    names, bands, scale, label_map = ["bare soil", "water"], (4, 3, 2), ((0.0, 3000.0),), {7: 0, 9: 1}
    expected = Options(64, 1e-3, "supervised", names, bands, scale, label_map, 0.125)
    assert parse("--config", path) == (expected, Words(flip=True))
    expected = Options(32, 1e-3, "supervised", ["a"], (1, 2, 3), scale, {5: 0}, 0.125)
    wins = ("--crop_size", 32, "--class_names", "a", "--bands", "1,2,3", "--label_map", "5=0", "--flip", "false")
    assert parse(*wins, f"--config={path}") == (expected, Words(flip=False))


@pytest.mark.parametrize("value", ["", "null", "[]"])
def test_empty_values_in_a_file_leave_the_default(value, tmp_path):
    (tmp_path / "run.yaml").write_text(f"crop_size: {value}\nflip: {value}\nreport_to: {value}\n", encoding="utf-8")
    assert parse("--config", tmp_path / "run.yaml") == parse()
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"crop_size": None, "flip": False, "report_to": [], "scale": None}), encoding="utf-8")
    assert parse("--config", path) == parse()


def test_words_that_yaml_reads_as_truth_values_stay_words(tmp_path):
    (tmp_path / "run.yaml").write_text("stability: off\nmixed_precision: no\nfolders: [yes, on]\n", encoding="utf-8")
    expected = Words(stability="off", mixed_precision="no", folders=["yes", "on"])
    assert parse("--config", tmp_path / "run.yaml")[1] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("crop_sise: 64", "run.yaml: there is no option 'crop_sise'; did you mean 'crop_size'?"),
        ("hidden: 64", "run.yaml: there is no option 'hidden'."),  # a field without a flag
        ("crop_size: big", "argument --crop_size: invalid int value: 'big'"),
        ("method: fixmatch", "argument --method: invalid choice: 'fixmatch'"),
        ("crop_size: 4", "--crop_size is 4; it must be at least 8."),
        ("bands: [4, 3]", "argument --bands: '4,3' is not three band numbers from 1"),
        ("label_map: {a: b}", "argument --label_map: 'a=b' is not VALUE=CLASS"),
        ("flip: yes", "argument --flip: 'yes' is neither true nor false"),
        ("just words", "run.yaml has no options; expected lines such as 'crop_size: 256'."),
        ("a: [1", "run.yaml cannot be read: "),
    ],
)
def test_wrong_options_in_a_file_are_named(text, message, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    assert message in error_of(capsys, "--config", tmp_path / "run.yaml")


def test_files_that_cannot_be_read_are_named(tmp_path, capsys):
    (tmp_path / "latin1.yaml").write_bytes(b"class_names: [for\xeat]")
    assert "latin1.yaml cannot be read: 'utf-8' codec" in error_of(capsys, "--config", tmp_path / "latin1.yaml")
    (tmp_path / "run.json").write_text("crop_size: 64", encoding="utf-8")
    assert "run.json cannot be read: Expecting value" in error_of(capsys, "--config", tmp_path / "run.json")
    message = error_of(capsys, "--config", "wdhld")
    assert message == (
        "--config is 'wdhld': neither a file nor a recipe of this package (gid, loveda, mer, msl, potsdam, whdld)."
    )


def test_a_config_is_a_file_or_the_name_of_a_recipe(tmp_path, monkeypatch):
    assert find_config("whdld") == RECIPES / "whdld.yaml" and "whdld" in recipe_names()
    monkeypatch.chdir(tmp_path)
    Path("whdld").write_text("crop_size: 64", encoding="utf-8")
    assert find_config("whdld") == Path("whdld") and parse("--config", "whdld")[0].crop_size == 64


@pytest.mark.parametrize(
    ("words", "flip"), [((), False), (("--flip",), True), (("--flip", "true"), True), (("--flip", "False"), False)]
)
def test_switches_need_no_value(words, flip):
    assert parse(*words)[1].flip is flip
    assert parse(*words, "--seed", 1)[1] == Words(flip=flip, seed=1)


def test_words_before_the_first_flag_set_the_positional_option(tmp_path):
    assert parse("a.tif", "b.tif", "--seed", 1)[1] == Words(files=["a.tif", "b.tif"], seed=1)
    assert parse("--files", "a.tif")[1].files == ["a.tif"]
    # The last option of the file takes several words, but not the first words of the command line.
    (tmp_path / "run.yaml").write_text("files: [c.tif]\nflip: true\nscale: [0, 3000]\n", encoding="utf-8")
    options, words = parse("a.tif", "--config", tmp_path / "run.yaml")
    assert (options.scale, words.files, words.flip) == (((0.0, 3000.0),), ["a.tif"], True)
    assert parse("--config", tmp_path / "run.yaml")[1].files == ["c.tif"]
    # A switch takes no file for its value.
    assert parse("--flip", "a.tif")[1] == Words(files=["a.tif"], flip=True)
    assert parse("--flip", "false", "a.tif")[1] == Words(files=["a.tif"], flip=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--crop", 32), "unrecognized arguments: --crop"),  # no abbreviations
        (("--hidden", 2), "unrecognized arguments: --hidden"),
        (("--crop_sise", 64), "unrecognized arguments: --crop_sise; did you mean --crop_size?"),
        (("--crop_size", "big"), "argument --crop_size: invalid int value: 'big'"),
        (("--crop_size", 4), "--crop_size is 4; it must be at least 8."),
        (("--method", "fixmatch"), "argument --method: invalid choice: 'fixmatch' (choose from "),
        (("--bands", "4,3"), "argument --bands: '4,3' is not three band numbers from 1 for red, green and blue"),
        (("--scale", "3", "1"), "argument --scale: '3 1' is not a scale; give the values that become 0 and 255"),
        (
            ("--labeled_fraction", "few"),
            "argument --labeled_fraction: 'few' is not a fraction; write it as 1/8 or 0.125",
        ),
        (("--flip=maybe",), "argument --flip: 'maybe' is neither true nor false"),
    ],
)
def test_wrong_words_are_errors_that_name_the_flag(words, message, capsys):
    assert message in error_of(capsys, *words)


def test_a_missing_library_is_an_error_with_its_extra():
    message = r"co2s try needs rasterio: pip install 'co2s_hf\[scenes\]'"
    with pytest.raises(SystemExit, match=message), COMMAND.user_errors():
        raise ModuleNotFoundError("No module named 'rasterio'", name="rasterio")
    with pytest.raises(ModuleNotFoundError), COMMAND.user_errors():
        raise ModuleNotFoundError("No module named 'co2s_hf.typo'", name="co2s_hf.typo")


def test_a_value_in_a_file_may_begin_with_a_hyphen(tmp_path):
    (tmp_path / "run.yaml").write_text("class_names: [-a]\nseed: -3\n")
    options, words = parse("--config", tmp_path / "run.yaml")
    assert words.seed == -3 and options.class_names == ["-a"]


def test_a_bug_in_the_options_keeps_its_traceback():
    with pytest.raises(ValueError, match="a bug"):
        parse("--labeled_fraction", 0)


def test_help_shows_the_groups_the_defaults_and_the_first_flags_first(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--help")
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: co2s try [files ...] [--flag value ...]\n\nTry it:\n    co2s try --flip\n")
    text = " ".join(shown.split())
    places = [
        text.index(part)
        for part in (
            "the flags that matter most: --flip [true|false] Mirror 100% of the images. --crop_size SIZE",
            "SIZE Side of crops. [96]",
            "sizes: --learning_rate RATE Rate. [0.5] --method {co2s|supervised} Method. [co2s]",
            "data: --class_names NAME [NAME ...] Names. --bands BANDS Bands. --scale LOW HIGH [LOW HIGH ...] Scale.",
            "words: --files FILES [FILES ...] Files. --seed SEED Seed. [0] --stability {paper|off} Loss. [paper]",
        )
    ]
    assert places == sorted(places)
    assert "--folders FOLDERS [FOLDERS ...] Folders. [here]" in text and "hidden" not in text
    assert (
        "or a recipe of the paper: gid, loveda, mer, msl, potsdam, whdld. Flags on the command line override it."
        in text
    )
    for flag in ("--flip", "--crop_size"):  # once in the list of flags, not again in its own group
        assert shown.count(f"\n  {flag} ") == 1


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Give `bands=(4, 3, 2)`.", "Give --bands 4,3,2."),
        ("`bands` is (4, 3).", "--bands is (4, 3)."),
        ("`scale=((0, 3000),)` or `scale=(0, 3000)`", "--scale 0 3000 or --scale 0 3000"),
        ("`label_map={7: 0, 9: 1}`", "--label_map 7=0,9=1"),
        ("`labeled_fraction=0.125`", "--labeled_fraction 0.125"),
        ("`method='supervised'`", "--method supervised"),
        ("`class_names=['bare soil', 'water']`", "--class_names 'bare soil' water"),
        ("`flip=True`, `flip=False`, `flip`", "--flip, --flip false, --flip"),
        ("`hidden=3`, `threshold` and `label.tif`", "`hidden=3`, `threshold` and `label.tif`"),  # no flags
        ("`crop_size=side`, `crop_size=None`", "`crop_size=side`, `crop_size=None`"),  # not a value that a flag has
        ("`co2s try --seed 1` of `COMMAND`", "`co2s try --seed 1` of `COMMAND`"),
    ],
)
def test_parameters_in_messages_become_flags(message, expected):
    assert COMMAND.in_flags(message) == expected


def test_flags_of_messages_can_be_pasted(capsys):
    words = COMMAND.in_flags("`scale=((0, 10), (0, 20), (5.5, 30))`").split()
    assert parse(*words)[0].scale == ((0.0, 10.0), (0.0, 20.0), (5.5, 30.0))


@pytest.mark.parametrize("kind", [UserValueError, UserFileNotFoundError])
def test_user_errors_end_with_the_message_alone(kind):
    with pytest.raises(SystemExit) as end, COMMAND.user_errors():
        raise kind("`crop_size` is odd: `crop_size=64`.")
    assert end.value.code == "error: --crop_size is odd: --crop_size 64."


def test_other_errors_keep_their_type_and_traceback():
    with pytest.raises(ValueError, match="`crop_size` is odd"), COMMAND.user_errors():
        raise ValueError("`crop_size` is odd")


def test_fractions_are_written_with_a_slash_or_a_point():
    assert (parse_fraction("1/8"), parse_fraction("0.25"), parse_fraction("1")) == (0.125, 0.25, 1.0)
    for text in ("1/0", "an eighth", ""):
        with pytest.raises(ValueError, match=f"'{text}' is not a fraction; write it as 1/8 or 0.125"):
            parse_fraction(text)
