"""Files that an attacker could put into a data set or a folder of scenes, and a web server that must stay idle."""

import struct
import subprocess
import sys
import urllib.request
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
from helpers import PLACE, write_raster


SECRET = 4242  # the value of the private raster
GEOREFERENCE = "<SRS>EPSG:32640</SRS><GeoTransform>500000, 0.5, 0, 2780000, 0, -0.5</GeoTransform>"


class WebServer:
    """A web server with one raster, and the requests that it got. It is another process: GDAL blocks this one."""

    def __init__(self, folder: Path):
        (folder / "web").mkdir()
        write_raster(folder / "web" / "x.tif", np.full((3, 8, 8), SECRET, dtype=np.uint16), **PLACE)
        self.log = folder / "requests.txt"
        command = [sys.executable, str(Path(__file__).with_name("range_server.py")), str(folder / "web")]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}"

    def requests(self) -> list[str]:
        """Return the requests up to now, and check that the server still answers and logs them."""
        urllib.request.urlopen(f"{self.url}/x.tif?last").close()
        *others, last = self.log.read_text().splitlines()
        assert "/x.tif?last" in last
        return others

    def stop(self):
        self.process.kill()
        self.process.communicate()


def mosaic(source: str, attributes: str = "", extra: str = "", dtype: str = "UInt16") -> str:
    """Return a VRT of 8 x 8 pixels and three bands that shows one raster."""
    bands = "".join(
        f'<VRTRasterBand dataType="{dtype}" band="{number}"><SimpleSource>'
        f"<SourceFilename{attributes}>{escape(source)}</SourceFilename><SourceBand>{number}</SourceBand>"
        '<SrcRect xOff="0" yOff="0" xSize="8" ySize="8"/><DstRect xOff="0" yOff="0" xSize="8" ySize="8"/>'
        "</SimpleSource></VRTRasterBand>"
        for number in (1, 2, 3)
    )
    return f'<VRTDataset rasterXSize="8" rasterYSize="8">{GEOREFERENCE}{extra}{bands}</VRTDataset>'


def tiff(width: int, height: int, bits: int = 16, bands: int = 1, tile: int | None = None) -> bytes:
    """Return a TIFF of a few bytes that claims to be large: only the first bytes of its pixels are there."""
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 277: bands, 284: 1}
    entries |= {322: tile, 323: tile, 324: 0, 325: 64} if tile else {273: 0, 278: height, 279: 64}
    entries[324 if tile else 273] = 8 + 2 + 12 * len(entries) + 4  # where the pixels start
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + fields + struct.pack("<I", 0) + bytes(64)
