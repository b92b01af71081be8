"""Values that flags give as text, and the options that several commands share."""

import pytest

from co2s_hf.cli.arguments import (
    CardArguments,
    HubArguments,
    parse_bands,
    parse_class_names,
    parse_label_map,
    parse_scale,
    training_groups,
)
from co2s_hf.cli.command_line import Flag
from co2s_hf.cli.prepare import COMMAND
from co2s_hf.data.options import DataOptions
from co2s_hf.training.options import AdaptationOptions, TrainingOptions


def test_bands_are_three_numbers_from_1():
    assert parse_bands("4,3,2") == (4, 3, 2) and parse_bands(" 1, 1,12 ") == (1, 1, 12)
    assert parse_bands("sentinel-2") == "sentinel-2"
    for text in ("4,3", "4,3,2,1", "0,1,2", "r,g,b", "1,2,", "-1,2,3", "1.5,2,3", ""):
        with pytest.raises(
            ValueError, match=r"'.*' is not three band numbers from 1 for red, green and blue, such as"
        ):
            parse_bands(text)


def test_a_scale_is_one_pair_a_pair_per_band_or_percentiles():
    assert parse_scale(["0", "3000"]) == ((0.0, 3000.0),)
    assert parse_scale(["0", "1", "-2.5", "3", "1e2", "1e3"]) == ((0.0, 1.0), (-2.5, 3.0), (100.0, 1000.0))
    assert parse_scale(["percentiles"]) == "percentiles"
    wrong = (
        ["3", "1"],
        ["1", "1"],
        ["1"],
        ["0", "1", "0", "1"],
        ["low", "high"],
        ["percentiles", "1"],
        ["0", "nan"],
        [],
    )
    for words in wrong:
        with pytest.raises(ValueError, match=f"'{' '.join(words)}' is not a scale; give the values that become"):
            parse_scale(words)


def test_label_maps_are_pairs_of_value_and_class():
    assert parse_label_map("7=0,9=1") == {7: 0, 9: 1} and parse_label_map(" 7 = 0 , 9=0") == {7: 0, 9: 0}
    for text in ("a=b", "7", "7=0,", "7=0;9=1", "-1=0", ""):
        with pytest.raises(ValueError, match=f"'{text}' is not VALUE=CLASS,VALUE=CLASS, such as 7=0,9=1"):
            parse_label_map(text)
    with pytest.raises(ValueError, match="'1=0,1=2' maps one value to two classes"):
        parse_label_map("1=0,1=2")


def test_label_maps_may_have_ranges(tmp_path):
    assert parse_label_map("0-127=0, 128 - 255 = 1,300=2") == {"0-127": 0, "128-255": 1, 300: 2}
    for text in ("0-=0", "-5=0", "0-1-2=0", "0--1=0"):
        with pytest.raises(ValueError, match=f"'{text}' is not VALUE=CLASS,VALUE=CLASS, such as .* 0-127=0,128-255=1"):
            parse_label_map(text)
    with pytest.raises(ValueError, match="'0-9=0,0-9=2' maps one value to two classes"):
        parse_label_map("0-9=0,0-9=2")
    words = ["--data_dir", "data", "--output_dir", "out"]
    path = tmp_path / "run.json"
    path.write_text('{"label_map": {"0-127": 0, "200": 1}}', encoding="utf-8")  # as in the record of a run
    assert COMMAND.parse([*words, "--config", str(path)])[DataOptions].label_map == {"0-127": 0, 200: 1}


def test_overlapping_ranges_are_named_with_the_flag(capsys):
    with pytest.raises(SystemExit):
        COMMAND.parse(["--data_dir", "data", "--output_dir", "out", "--label_map", "0-127=0,100-200=1"])
    message = (
        "--label_map maps the value 100 twice, by 0-127 and by 100-200. Give ranges that do not overlap: --label_map"
    )
    assert message in capsys.readouterr().err


def test_class_names_are_words_or_the_lines_of_a_file(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("bare soil\n\n  forêt \nc\n", encoding="utf-8")
    assert parse_class_names([str(path)]) == ["bare soil", "forêt", "c"]
    assert parse_class_names([str(path), "b"]) == [str(path), "b"]
    assert parse_class_names(["bare soil"]) == ["bare soil"]


def test_a_training_command_leaves_out_and_renames_flags():
    model = {"checkpoint": Flag("Base.")}
    groups = training_groups(AdaptationOptions, model, recipe=None, crop_size="Side. Default: the base's.")
    flags = {name: flag for group in groups for name, flag in group.flags.items()}
    assert "recipe" not in flags and flags["crop_size"].help == "Side. Default: the base's."
    assert groups[0].flags == model and {group.options for group in groups} == {AdaptationOptions}
    usual = {name: flag for group in training_groups() for name, flag in group.flags.items()}
    assert usual["resume_from_checkpoint"] is flags["resume_from_checkpoint"] and "recipe" in usual
    assert {group.options for group in training_groups()} == {TrainingOptions}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"push_to_hub": True}, "`push_to_hub` needs a repository: `hub_model_id='user/name'`"),
        ({"hub_private_repo": True}, "`hub_revision` go with `push_to_hub`"),
        ({"hub_model_id": "user/x"}, "`hub_revision` go with `push_to_hub`"),
        ({"hub_revision": "v1"}, "`hub_revision` go with `push_to_hub`"),
    ],
)
@pytest.mark.parametrize("arguments", [HubArguments, CardArguments])
def test_options_of_the_hub_need_each_other(arguments, settings, message):
    with pytest.raises(ValueError, match=message):
        arguments(**settings)
    arguments(push_to_hub=True, hub_model_id="user/x", hub_private_repo=True, hub_revision="v1")


def test_a_card_cannot_have_fewer_than_no_images():
    assert CardArguments(card_samples=0).card_samples == 0
    with pytest.raises(ValueError, match="`card_samples` is -1; it must be at least 0"):
        CardArguments(card_samples=-1)
