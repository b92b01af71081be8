import shutil
from pathlib import Path

import numpy as np
from helpers import open_folder
from PIL import Image

from co2s_hf.data.options import DataArguments
from co2s_hf.data.sources import open_source
from co2s_hf.data.validation.report import announce, class_shares, data_table, write_report


def test_the_table_counts(scenes_folder):
    data = open_folder(scenes_folder)
    lines = {line[:12].strip(): line[12:].split() for line in data_table(data).splitlines()[1:]}
    assert lines["images"] == ["3", "5", "2"] and lines["width, px"] == ["48", "48", "48"]
    labels = np.stack([np.asarray(sample.load_label()) for sample in data.labeled])
    share = 100 * (labels == 3).mean()
    assert lines["vegetation"][:3] == [f"{share:.1f}", "%", "-"]
    shares = class_shares(data)
    assert set(shares) == {"labeled", "validation"} and sum(shares["validation"].values()) == 1


def test_only_what_was_looked_into_is_shown(scenes_folder, tmp_path):
    """Evaluation opens the validation set alone: broken labelled images do not concern it."""
    folder = Path(shutil.copytree(scenes_folder, tmp_path / "data"))
    for path in (folder / "images").glob("labeled_*"):
        path.write_bytes(b"no image")
    data = open_source(DataArguments(data_dir=str(folder)), needed=("validation",))
    announce(data, str(tmp_path / "report.png"))
    assert (tmp_path / "report.png").exists() and set(class_shares(data)) == {"validation"}


def test_reports_show_samples_and_findings(scenes_folder, tmp_path):
    data = open_folder(scenes_folder, class_names=["a", "b", "c", "d", "e", "f", "never & nowhere"])
    write_report(data, tmp_path / "report.png")
    picture = np.asarray(Image.open(tmp_path / "report.png").convert("RGB"))
    assert picture.shape[0] > 500 and picture.std() > 20
    write_report(data, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "never &amp; nowhere: it cannot be learnt" in page and "data:image/png;base64," in page
    assert data.hash in page
