"""Which options of `co2s predict` go together."""

import pytest

from co2s_hf.cli import predict
from co2s_hf.data.options import DataOptions
from co2s_hf.geo.options import SceneOptions


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.tif", "--data", "real"], "Give one source to predict: scenes"),
        (["a.tif", "--images", "b.png"], "Give one source to predict"),
        (["--images", "b.png", "--cog"], "--cog is for scenes"),
        (["--images", "b.png", "--resume"], "--resume is for scenes"),
        (["a.tif", "--opacity", "0.2"], "--opacity is not for scenes. Leave it out"),
        (["a.tif", "--split", "validation"], "--split is not for scenes"),
        (["a.tif", "--output_dir", "out"], "--output_dir is not for scenes"),
        (["--images", "b.png", "--split", "validation"], "--split is a set of a data source; --images has none"),
        (["--data", "real", "--output", "maps"], "--output is for scenes"),
        (["--images", "b.png", "--scale", "percentiles"], "--images needs a scale in numbers: --scale 0 3000"),
        (["a.tif", "--windows_per_batch", "0"], "--windows_per_batch is 0"),
        (["a.tif", "--resample_to", "0.3m"], "--resample_to: '0.3m' is not a number of metres, such as 0.3, or none"),
        (["a.tif", "--resample_to", "nan"], "--resample_to is nan; it must be a finite number above 0"),
        (["--images", "b.png", "--resample_to", "none"], "--resample_to is for scenes"),
    ],
)
def test_the_command_refuses_options_that_do_not_fit_the_input(words, message, capsys):
    with pytest.raises(SystemExit) as error:
        predict.main(words)
    assert message in f"{error.value.code}{capsys.readouterr().err}"


def test_two_scenes_whose_maps_share_a_file_are_refused_before_the_first_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a.tif", "a_confidence.tif"):
        (tmp_path / name).touch()
    with pytest.raises(SystemExit) as error:
        predict.main(["a.tif", "a_confidence.tif", "--output", "maps", "--save_confidence", "--use_cpu"])
    assert "would both write 'maps/a_confidence.tif'" in f"{error.value.code}{capsys.readouterr().err}"
    assert not (tmp_path / "maps").exists()


@pytest.mark.parametrize(("text", "expected"), [("0.3", 0.3), ("none", "none")])
def test_a_distance_or_none_is_read(text, expected):
    assert predict.COMMAND.parse(["a.tif", "--resample_to", text])[SceneOptions].resample_to == expected


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--split", "unlabeled", "--opacity", "0.2", "--output_dir", "out"],
        ["a.tif", "--scale", "percentiles", "--cog", "--resume"],
        ["--images", "b.png", "--save_confidence"],
    ],
)
def test_the_command_accepts_options_that_fit_the_input(words):
    arguments = predict.COMMAND.parse(words)
    predict.check(*(arguments[kind] for kind in (predict.PredictArguments, SceneOptions, DataOptions)))
