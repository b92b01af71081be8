from pathlib import Path

import pytest

from co2s_hf.geo.options import SceneOptions
from co2s_hf.geo.scene_outputs import check_no_shared_files
from co2s_hf.utils.errors import UserValueError


MAPS = {"scenes/a.tif": Path("maps/a.tif"), "scenes/a_confidence.tif": Path("maps/a_confidence.tif")}


def test_two_maps_never_share_a_file():
    check_no_shared_files(MAPS, SceneOptions(vector=".gpkg"))
    message = r"'scenes/a_confidence.tif' and 'scenes/a.tif' would both write 'maps/a_confidence.tif'. Map them in sep"
    with pytest.raises(UserValueError, match=message):
        check_no_shared_files(MAPS, SceneOptions(save_confidence=True))
    probabilities = {"x": Path("a.tif"), "y": Path("deep/../a_probabilities.tif")}
    with pytest.raises(UserValueError, match="'y' and 'x' would both write"):
        check_no_shared_files(probabilities, SceneOptions(save_probabilities=True))
    with pytest.raises(UserValueError, match=r"would both write 'all.gpkg'"):
        check_no_shared_files(MAPS, SceneOptions(vector="all.gpkg"))
