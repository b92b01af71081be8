"""Mosaics (VRT) that strangers put into a folder of scenes."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
from helpers import PLACE, write_raster
from hostile import SECRET, mosaic
from rasterio.shutil import copy

from co2s_hf.geo.rasters import SceneRaster, UnreadableScene
from co2s_hf.geo.scene_files import find_scenes
from co2s_hf.utils.errors import UserValueError


RELATIVE = ' relativeToVRT="1"'


@pytest.fixture
def scenes(tmp_path):
    """A folder with the scene deep/a.tif of three bands, beside the raster private.tif of the user."""
    values = np.random.default_rng(0).integers(1, 4000, (3, 8, 8)).astype(np.uint16)
    (tmp_path / "scenes" / "deep").mkdir(parents=True)
    write_raster(tmp_path / "scenes" / "deep" / "a.tif", values, **PLACE)
    write_raster(tmp_path / "private.tif", np.full((3, 8, 8), SECRET, dtype=np.uint16), **PLACE)
    return tmp_path / "scenes"


def refused(folder) -> str:
    with pytest.raises(UserValueError) as error:
        find_scenes([str(folder)])
    message = str(error.value)
    assert message.startswith("The mosaic '") and message.endswith("trust it, name the mosaic itself as a scene.")
    assert str(SECRET) not in message
    return message


def test_mosaics_of_rasters_in_the_folder_are_scenes(scenes):
    (scenes / "plain.vrt").write_text(f'<?xml version="1.0"?>\n{mosaic("deep/a.tif", RELATIVE)}')
    (scenes / "absolute.vrt").write_text(mosaic(str(scenes / "deep" / "a.tif")))
    (scenes / "deep" / "nested.vrt").write_text(mosaic("../plain.vrt", RELATIVE))
    (scenes / "linked.vrt").symlink_to("deep/nested.vrt")  # GDAL looks for the parts beside the file of the link
    (scenes / "link.tif").symlink_to("deep/a.tif")
    (scenes / "of_link.vrt").write_text(mosaic("link.tif", RELATIVE))
    with rasterio.open(scenes / "link.tif") as raster:
        values = raster.read()
        copy(raster, scenes / "by_gdal.vrt", driver="VRT")  # with all that GDAL writes
    found = find_scenes([str(scenes)])
    assert len(found) == 8
    for scene in found:
        with SceneRaster(scene) as raster:
            assert np.array_equal(raster.read(slice(0, 8), slice(0, 8))[0], values)


@pytest.mark.parametrize(
    ("source", "attributes"),
    [
        ("../private.tif", RELATIVE),
        ("deep/../../private.tif", RELATIVE),
        ("{folder}/private.tif", ""),
        ("{folder}/private.tif", RELATIVE),
        ("link.tif", RELATIVE),
        ("links/x.tif", RELATIVE),
        ("home/../private.tif", RELATIVE),
        ("nested.vrt", RELATIVE),
        ("/vsicurl/{url}/x.tif", ""),
        ("{url}/x.tif", ""),
        ("/vsizip/deep/a.zip/a.tif", RELATIVE),
        ("GTIFF_DIR:1:{folder}/private.tif", ""),
        ("vrt://{folder}/private.tif", ""),
        ("deep/false.tif", RELATIVE),
        ("deep/text.txt", RELATIVE),
        ("deep/gone.tif", RELATIVE),
    ],
)
def test_mosaics_of_other_rasters_are_refused(source, attributes, server, scenes, tmp_path):
    (tmp_path / "home" / "below").mkdir(parents=True)
    (scenes / "link.tif").symlink_to(tmp_path / "private.tif")
    (scenes / "links").symlink_to(tmp_path / "web")
    (scenes / "home").symlink_to(tmp_path / "home")  # so that scenes/home/.. is not scenes
    (scenes / "nested.vrt").write_text(mosaic(str(tmp_path / "private.tif")))
    (scenes / "deep" / "false.tif").write_text(mosaic(str(tmp_path / "private.tif")))
    (scenes / "deep" / "text.txt").write_text("no raster")
    source = source.format(url=server.url, folder=tmp_path)
    (scenes / "mosaic.vrt").write_text(mosaic(source, attributes))
    for link in ("link.tif", "links", "home"):  # only the mosaic is to blame
        assert (scenes / link).is_symlink()
    message = refused(scenes)
    assert "mosaic.vrt" in message and (" names '" in message)
    assert server.requests() == []
    with pytest.raises(UserValueError, match="names"):
        find_scenes([str(scenes / "*")])  # a pattern that does not ask for mosaics


@pytest.mark.parametrize(
    "extra",
    [
        '<Metadata domain="OVERVIEWS"><MDI key="OVERVIEW_FILE">PRIVATE</MDI></Metadata>',
        '<Metadata domain="GEOLOCATION"><MDI key="X_DATASET">PRIVATE</MDI></Metadata>',
        '<VRTRasterBand dataType="Byte" band="1" subClass="VRTRawRasterBand">'
        "<SourceFilename>PRIVATE</SourceFilename></VRTRasterBand>",
        "<GDALWarpOptions><SourceDataset>PRIVATE</SourceDataset></GDALWarpOptions>",
        "<PixelFunctionCode><![CDATA[import os]]></PixelFunctionCode>",
        "<SimpleSource><sourcefilename>PRIVATE</sourcefilename></SimpleSource>",  # GDAL ignores the case
        '<SimpleSource SourceFilename="PRIVATE"></SimpleSource>',  # to GDAL, an attribute is like an element
        '<SourceFilename relativeToVRT="2">deep/a.tif</SourceFilename>',
        "<SourceFilename>deep/a.tif<!-- a comment -->.ovr</SourceFilename>",
        "<?x ><SourceFilename>PRIVATE</SourceFilename><?>",
        "<Description>&#x3C;SourceFilename></Description>",
        "<Description>not closed",
    ],
)
def test_mosaics_that_cannot_be_checked_are_refused(extra, scenes, tmp_path):
    extra = extra.replace("PRIVATE", str(tmp_path / "private.tif"))
    (scenes / "mosaic.vrt").write_text(mosaic("deep/a.tif", RELATIVE, extra))
    assert f"The mosaic '{scenes}/mosaic.vrt' cannot be checked: " in refused(scenes)


@pytest.mark.parametrize("name", ["deep/a.tif.ovr", "deep/A.tif.MSK", "mosaic.vrt.ovr", "deep/a.tif.msk.ovr"])
def test_files_beside_the_parts_of_a_mosaic_are_checked(name, scenes, tmp_path):
    (scenes / "mosaic.vrt").write_text(mosaic("deep/a.tif", RELATIVE))
    write_raster(scenes / "deep" / "a.tif.msk", np.ones((1, 8, 8), dtype=np.uint8), driver="GTiff")
    assert len(find_scenes([str(scenes)])) == 2
    (scenes / name).write_text(mosaic(str(tmp_path / "private.tif")))
    with pytest.raises(UserValueError, match=f"{Path(name).name} is no GeoTIFF, as files with overviews or masks are"):
        find_scenes([str(scenes)])


def test_a_mosaic_that_the_user_names_is_opened(scenes, tmp_path):
    (scenes / "mosaic.vrt").write_text(mosaic("../private.tif", RELATIVE))
    for word in ("mosaic.vrt", "*.vrt"):
        (scene,) = find_scenes([str(scenes / word)])
        with SceneRaster(scene) as raster:
            assert (raster.read(slice(0, 8), slice(0, 8))[0] == SECRET).all()


def test_programs_in_mosaics_never_run(scenes, tmp_path, monkeypatch):
    monkeypatch.setenv("GDAL_VRT_ENABLE_PYTHON", "YES")
    code = f"""import numpy as np
def values(in_ar, out_ar, *args, **kwargs):
    open("{tmp_path}/started", "w")
    out_ar[:] = 1
"""
    band = (
        f"""<VRTRasterBand dataType="UInt16" band="1" subClass="VRTDerivedRasterBand">
        <PixelFunctionType>values</PixelFunctionType><PixelFunctionLanguage>Python</PixelFunctionLanguage>
        <PixelFunctionCode><![CDATA[{code}]]></PixelFunctionCode><SimpleSource>"""
        '<SourceFilename relativeToVRT="1">deep/a.tif</SourceFilename></SimpleSource></VRTRasterBand>'
    )
    (scenes / "program.vrt").write_text(
        mosaic("deep/a.tif", RELATIVE).partition("<VRTRasterBand")[0] + band + "</VRTDataset>"
    )
    with (
        pytest.raises(UnreadableScene, match=r"program.vrt cannot be read"),
        SceneRaster(str(scenes / "program.vrt")) as scene,
    ):
        scene.read(slice(0, 8), slice(0, 8))
    assert not (tmp_path / "started").exists()
