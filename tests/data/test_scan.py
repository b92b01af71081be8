import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import open_folder
from PIL import Image

from co2s_hf.data.reading import LabelRule
from co2s_hf.data.samples import Samples
from co2s_hf.data.validation import scan


DEFAULT_RULE = LabelRule()


@pytest.fixture
def folder(scenes_folder, tmp_path):
    """A copy of the drawn folder that a test may change."""
    return Path(shutil.copytree(scenes_folder, tmp_path / "data"))


def test_files_are_decoded_again_only_when_they_or_the_rule_change(folder, monkeypatch):
    decoded = []
    read_facts = scan._read_label_facts
    monkeypatch.setattr(
        scan, "_read_label_facts", lambda file, rule: decoded.append(Path(file.path).name) or read_facts(file, rule)
    )
    open_folder(folder)
    assert len(decoded) == 5
    open_folder(folder)
    assert len(decoded) == 5  # from the cache
    Image.fromarray(np.full((48, 48), 2, dtype=np.uint8)).save(folder / "labels" / "validation_0001.png")
    data = open_folder(folder)
    assert decoded[5:] == ["validation_0001.png"] and data.scans["validation"].labels[1].counts == {2: 48 * 48}
    open_folder(folder, ignore_index=2)
    assert len(decoded) == 11


def test_a_cache_that_cannot_be_written_is_not_an_error(folder, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("a file instead of a folder", encoding="utf-8")
    monkeypatch.setattr(scan, "CACHE", tmp_path / "file" / "scans.sqlite")
    assert len(open_folder(folder).labeled) == 3


def test_classes_are_counted_and_unknown_values_located(tmp_path):
    values = np.array([[0, 1, 1], [7, 9, 7]])
    for name, dtype in (("bytes", np.uint8), ("deep", np.uint16)):
        Image.fromarray(values.astype(dtype)).save(tmp_path / f"{name}.png")
    paths = [str(tmp_path / f"{name}.png") for name in ("bytes", "deep")]
    samples = Samples.of_files(paths, paths, label_rule=LabelRule(label_map=((0, 0, 2), (1, 1, 2), (9, 9, 0))))
    for facts in scan.scan_labels(samples):
        assert facts.size == (3, 2) and facts.error is None
        assert facts.counts == {2: 3, 0: 1} and facts.unknown == [("7", 2, 0, 1)]
        assert facts.classes == {0, 2} and facts.num_unknown == 1


def label_facts(path, rule=DEFAULT_RULE):
    (facts,) = scan.scan_labels(Samples.of_files([str(path)], [str(path)], label_rule=rule))
    return facts


def test_thousands_of_unknown_values_are_counted_and_a_few_described(tmp_path):
    values = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(values).save(tmp_path / "deep.png")
    facts = label_facts(tmp_path / "deep.png", LabelRule(label_map=((10, 40000, 0), (40001, 60000, 3))))
    assert facts.counts == {0: 39991, 3: 20000} and facts.num_unknown == 10 + 5535
    assert facts.unknown == [(str(n), 1, n, 0) for n in range(4)] + [("65535", 1, 255, 255)]


def test_gradual_borders_are_found_in_rows_and_in_columns(tmp_path):
    steps = np.repeat(np.arange(12, dtype=np.uint8) * 20, 4)  # 12 values with hard borders
    ramp = np.arange(48, dtype=np.uint8) * 5
    for name, line, expected in (("hard", steps, False), ("soft", ramp, True)):
        for axis in (0, 1):
            path = tmp_path / f"{name}{axis}.png"
            Image.fromarray(np.ascontiguousarray(np.broadcast_to(np.expand_dims(line, axis), (48, 48)))).save(path)
            assert label_facts(path).is_soft == expected and not label_facts(path).is_lossy
