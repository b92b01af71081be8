import base64
import re
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from helpers import open_folder
from pictures import color_runs, middle_row, read_picture
from PIL import Image

from co2s_hf.data.options import DataOptions
from co2s_hf.data.sources import open_source
from co2s_hf.data.validation.report import announce, class_shares, data_table, write_report
from co2s_hf.utils.errors import UserError


def test_the_table_has_counts_and_shares(scenes_folder):
    data = open_folder(scenes_folder)
    lines = {line[:12].strip(): line[12:].split() for line in data_table(data).splitlines()[1:]}
    assert lines["images"] == ["3", "5", "2"] and lines["width, px"] == ["48", "48", "48"]
    labels = np.stack([np.asarray(sample.load_label()) for sample in data.labeled])
    share = 100 * (labels == 3).mean()
    assert lines["vegetation"][:3] == [f"{share:.1f}", "%", "-"]
    shares = class_shares(data)
    assert set(shares) == {"labeled", "validation"} and sum(shares["validation"].values()) == 1


def test_only_checked_sets_are_drawn(scenes_folder, tmp_path, capsys):
    """Evaluation only opens the validation set. Broken labelled images must not be errors then."""
    folder = Path(shutil.copytree(scenes_folder, tmp_path / "data"))
    for path in (folder / "images").glob("labeled_*"):
        path.write_bytes(b"no image")
    data = open_source(DataOptions(data_dir=str(folder)), needed=("validation",))
    announce(data, str(tmp_path / "report.png"))
    assert (tmp_path / "report.png").exists() and set(class_shares(data)) == {"validation"}
    assert str(tmp_path / "report.png") in capsys.readouterr().out


@pytest.fixture
def flat_folder(tmp_path):
    """Images of one colour and label maps of one class; two labelled, two unlabelled, one validation image."""
    root = tmp_path / "flat"
    for name in ("images", "labels", "splits"):
        (root / name).mkdir(parents=True)
    classes = '[{"name": "land", "color": [200, 0, 0]}, {"name": "never & nowhere", "color": [0, 0, 200]}]'
    (root / "classes.json").write_text(classes, encoding="utf-8")
    colors = {"labeled": [(0, 100, 0), (0, 180, 0)], "unlabeled": [(10, 20, 30), (90, 80, 70)], "val": [(0, 40, 100)]}
    for split, its_colors in colors.items():
        lines = []
        for n, color in enumerate(its_colors):
            Image.new("RGB", (40, 40), color).save(root / "images" / f"{split}{n}.png")
            Image.new("L", (40, 40), 0).save(root / "labels" / f"{split}{n}.png")
            lines.append(f"images/{split}{n}.png labels/{split}{n}.png\n")
        (root / "splits" / f"{split}.txt").write_text("".join(lines), encoding="utf-8")
    return root


def test_a_picture_shows_the_samples_of_each_set_with_their_labels(flat_folder, tmp_path):
    write_report(open_folder(flat_folder), tmp_path / "report.png")
    picture = read_picture(tmp_path / "report.png")
    # Each row from left to right. Labels are drawn over the images at half opacity: (image + (200, 0, 0)) / 2.
    rows = [[(100, 50, 0), (100, 90, 0)], [(10, 20, 30), (90, 80, 70)], [(100, 20, 50)]]
    places = [middle_row(picture, row[0]) for row in rows]
    assert places == sorted(places)  # labelled, unlabelled, validation
    assert [color_runs(picture[place], min_length=100) for place in places] == rows


def test_a_page_has_the_table_the_warnings_and_the_picture(flat_folder, tmp_path):
    data = open_folder(flat_folder)
    write_report(data, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "never &amp; nowhere, so a model cannot learn it" in page
    assert data.hash in page and "width, px" in page
    (tmp_path / "inside.png").write_bytes(base64.b64decode(re.search(r"data:image/png;base64,([^']*)'", page)[1]))
    write_report(data, tmp_path / "report.png")
    assert np.array_equal(read_picture(tmp_path / "inside.png"), read_picture(tmp_path / "report.png"))


def test_a_page_may_have_no_warnings(scenes_folder, tmp_path):
    folder = Path(shutil.copytree(scenes_folder, tmp_path / "data"))
    values = (np.arange(48 * 48, dtype=np.uint8) % 6).reshape(48, 48)
    Image.fromarray(values).save(folder / "labels" / "labeled_0002.png")
    write_report(open_folder(folder), tmp_path / "report.HTML")
    assert "There are no warnings." in (tmp_path / "report.HTML").read_text(encoding="utf-8")


def test_other_file_types_are_refused(flat_folder, tmp_path):
    with pytest.raises(UserError, match=r"The report '.*report.pdf' must be a file that ends in .html or .png"):
        write_report(open_folder(flat_folder), tmp_path / "report.pdf")


def test_every_name_of_a_class_and_of_a_file_is_shown(flat_folder, tmp_path):
    """Names are neither mathematics nor several lines, and equal short names are different rows."""
    names = ["$\\frac$ 1\n2", "images", "x" * 100 + "a" * 20, "x" * 100 + "b" + "a" * 19]
    for kind in ("images", "labels"):
        (flat_folder / kind / "labeled0.png").rename(flat_folder / kind / "labeled$0^.png")
    path = flat_folder / "splits" / "labeled.txt"
    lines = "images/labeled$0^.png labels/labeled$0^.png\nimages/labeled1.png labels/labeled1.png\n"
    path.write_text(lines, encoding="utf-8")
    data = open_folder(flat_folder, class_names=names)
    rows = [line[:40].strip() for line in data_table(data).splitlines()[1:]]
    shown = "x" * 26 + "…" + "a" * 13
    assert rows == ["images", "width, px", "height, px", "$\\frac$ 1 2", "images", shown, shown]
    write_report(data, tmp_path / "report.png")
    with matplotlib.rc_context({"text.parse_math": False}):
        write_report(data, tmp_path / "literal.png")
    pictures = [read_picture(tmp_path / f"{name}.png") for name in ("report", "literal")]
    assert np.array_equal(*pictures)


def test_files_of_one_cause_are_one_warning_in_the_report(flat_folder, tmp_path, capsys):
    Image.new("L", (40, 40), 1).save(flat_folder / "labels" / "labeled0.png")
    with (flat_folder / "splits" / "labeled.txt").open("a", encoding="utf-8") as lines:
        for n in range(2, 7):
            Image.new("RGB", (40, 40), (n, 9, 9)).save(flat_folder / "images" / f"labeled{n}.png")
            Image.new("L", (40, 40), 255).save(flat_folder / "labels" / f"labeled{n}.png")
            lines.write(f"images/labeled{n}.png labels/labeled{n}.png\n")
    data = open_folder(flat_folder)
    announce(data, tmp_path / "report.html")
    (finding,) = [finding for finding in data.findings if finding.kind == "label maps without a class"]
    assert finding.num_files == 5
    for text in (capsys.readouterr().out, (tmp_path / "report.html").read_text(encoding="utf-8")):
        assert "label maps without a class (5):\n" in text and "\n  ... and 2 more." in text
        assert re.findall(r"\n  All pixels of \S+(labeled\d).png have", text) == ["labeled2", "labeled3", "labeled4"]
