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
        (["--images", "b.png", "--scale", "percentiles"], "--images needs a scale in numbers: --scale 0 3000"),
        (["a.tif", "--windows_per_batch", "0"], "--windows_per_batch is 0"),
    ],
)
def test_the_command_refuses_options_that_do_not_fit_the_input(words, message, capsys):
    with pytest.raises(SystemExit) as error:
        predict.main(words)
    assert message in f"{error.value.code}{capsys.readouterr().err}"


@pytest.mark.parametrize(
    "words",
    [[], ["a.tif", "--scale", "percentiles", "--cog", "--resume"], ["--images", "b.png", "--save_confidence"]],
)
def test_the_command_accepts_options_that_fit_the_input(words):
    arguments = predict.COMMAND.parse(words)
    predict.check(*(arguments[kind] for kind in (predict.PredictArguments, SceneOptions, DataOptions)))
