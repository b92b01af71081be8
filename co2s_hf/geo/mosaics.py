"""Check mosaics (VRT) that were found in a folder: all their parts must lie in that folder.

A mosaic is a text that names other rasters. Its author can name any file of this machine and any web address, and the
map would show their values. A mosaic that the user has named is opened as it is. In a folder, which may come from
strangers, only plain mosaics are opened, such as `gdalbuildvrt` makes.
"""

import os
import re
from pathlib import Path
from xml.etree import ElementTree

import rasterio
from rasterio.errors import RasterioError

from ..data.image_files import StoredFile, raster_driver
from ..utils.errors import UserValueError
from .rasters import check_beside


MAX_BYTES = 64 * 2**20  # of the text of a mosaic
PARTS = {"GTiff": (".tif", ".tiff"), "JP2OpenJPEG": (".jp2",)}  # driver of a part of a mosaic -> suffixes of the file
# Elements that name no file, and their attributes. GDAL treats an attribute like an element of the same name.
PLAIN_ELEMENTS = {
    "VRTDataset": {"rasterXSize", "rasterYSize"},
    "VRTRasterBand": {"dataType", "band", "blockXSize", "blockYSize"},
    "SRS": {"dataAxisToSRSAxisMapping", "coordinateEpoch"},
    "GCPList": {"Projection", "dataAxisToSRSAxisMapping"},
    "GCP": {"Id", "Info", "Pixel", "Line", "X", "Y", "Z", "GCPZ"},
    "Metadata": {"domain"},
    "MDI": {"key"},
    "ColorTable": set(),
    "Entry": {"c1", "c2", "c3", "c4"},
    "SimpleSource": {"resampling"},
    "ComplexSource": {"resampling"},
    "SourceFilename": {"relativeToVRT", "shared"},
    "SourceProperties": {"RasterXSize", "RasterYSize", "DataType", "BlockXSize", "BlockYSize"},
    "SrcRect": {"xOff", "yOff", "xSize", "ySize"},
    "DstRect": {"xOff", "yOff", "xSize", "ySize"},
    "OverviewList": {"resampling"},
}
# Elements without attributes.
PLAIN_ELEMENTS |= {name: set() for name in (
    "GeoTransform", "ColorInterp", "NoDataValue", "HideNoDataValue", "Description", "UnitType", "Offset", "Scale",
    "CategoryNames", "Category", "SourceBand", "NODATA", "UseMaskBand", "MaskBand", "ScaleOffset", "ScaleRatio",
    "BlockXSize", "BlockYSize",
)}  # fmt: skip
VALUES = {"domain": ("", "IMAGE_STRUCTURE"), "relativeToVRT": ("0", "1"), "shared": ("0", "1")}  # of these attributes


def check_mosaic(path: Path, folder: Path):
    """Check that a mosaic is plain, and that all its parts are rasters in a folder. Mosaics in it are checked, too.

    Args:
        path: The mosaic.
        folder: Folder in which the parts must lie, after symbolic links and `..` are resolved.

    Raises:
        UserValueError: A part lies elsewhere, is missing or is no raster, or the mosaic has something else that could
            name a file.
    """
    checked, waiting = set(), [path]
    while waiting:
        mosaic = waiting.pop()
        for part in _parts(mosaic, path) - checked:
            checked.add(part)
            # Both meanings of `..` after a link: the folder above the link, and the folder above its target.
            places = Path(part).resolve(), Path(os.path.normpath(part)).resolve()
            if not all(place.is_relative_to(folder.resolve()) for place in places):
                raise _refused(path, f"names '{part}', which is outside '{folder}'")
            if _check_part(part, path) == "VRT":
                waiting.append(Path(part))


def _check_part(part: str, path: Path) -> str:
    """Check that GDAL opens a part as a raster of a known format. Return its driver."""
    suffix = os.path.splitext(part)[1].lower()
    if suffix == ".vrt":
        return "VRT"
    if not os.path.isfile(part):
        raise _refused(path, f"names '{part}', which does not exist")
    driver = raster_driver(StoredFile(part))
    if suffix not in PARTS.get(driver, ()):
        raise _refused(path, f"names '{part}', which is no GeoTIFF, JPEG 2000 or mosaic")
    check_beside(part)
    try:
        with rasterio.open(Path(part), driver=driver):
            return driver
    except RasterioError as error:
        raise _refused(path, f"names '{part}', which cannot be read") from error


def _parts(mosaic: Path, path: Path) -> set[str]:
    """Return the paths that a mosaic names.

    Args:
        mosaic: The mosaic, or a mosaic in it.
        path: The mosaic that was found, for messages.
    """
    check_beside(str(mosaic))
    parts = set()
    for element in _elements(mosaic, path):
        if element.tag != "SourceFilename":
            continue
        name = element.text or ""
        if name != name.strip() or name.startswith("/vsi") or re.search("[:<>]", os.path.splitdrive(name)[1]):
            raise _refused(path, f"names '{name}', which is no path of a file")
        is_relative = element.get("relativeToVRT") == "1"
        parts.add(os.path.join(mosaic.resolve().parent if is_relative else Path.cwd(), name))  # as GDAL does
    return parts


def _elements(mosaic: Path, path: Path) -> list[ElementTree.Element]:
    """Return all elements of a mosaic, after a check that none of them is unknown."""
    with StoredFile(str(mosaic)).open() as stream:
        content = stream.read(MAX_BYTES + 1)
    try:
        text = re.sub(r"\A\s*<\?xml [^<>]*\?>", "", content.decode("utf-8"))
        # GDAL reads comments, instructions and numbers of characters in its own way: it could see another text.
        if len(content) > MAX_BYTES or re.search("<!|<[?]|&#", text):
            raise _refused(path, f"cannot be checked: '{mosaic}' is too large, or has comments")
        elements = list(ElementTree.fromstring(text).iter())
    except (ElementTree.ParseError, UnicodeDecodeError) as error:
        raise _refused(path, f"cannot be checked: '{mosaic}' is damaged ({error})") from error
    for element in elements:
        attributes, known = element.attrib, PLAIN_ELEMENTS.get(element.tag)
        if (
            known is None
            or not attributes.keys() <= known
            or any(value not in VALUES[name] for name, value in attributes.items() if name in VALUES)
            or any(mark in value for value in attributes.values() for mark in "<>")
        ):
            shown = "".join(f' {name}="{value}"' for name, value in attributes.items())
            raise _refused(path, f"cannot be checked: '{mosaic}' has the element <{element.tag}{shown}>")
    return elements


def _refused(path: Path, reason: str) -> UserValueError:
    return UserValueError(
        f"The mosaic '{path}' {reason}. A mosaic that is found in a folder may only name rasters in that folder. If "
        "you trust it, name the mosaic itself as a scene."
    )
