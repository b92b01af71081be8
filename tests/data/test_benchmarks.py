import hashlib
import io

import numpy as np
import pytest
from helpers import make_config
from local_hub import Blob, LocalHub
from PIL import Image

from co2s_hf import Co2SConfig
from co2s_hf.data import benchmark_lists as authors
from co2s_hf.data.benchmarks import BENCHMARKS
from co2s_hf.data.options import DataOptions
from co2s_hf.data.sources import open_source
from co2s_hf.utils.errors import UserError


def test_class_counts_are_those_of_the_benchmarks():
    counts = {name: len(benchmark.classes) for name, benchmark in BENCHMARKS.items()}
    assert counts == {"whdld": 6, "loveda": 7, "potsdam": 6, "gid": 15, "mer": 9, "msl": 9}


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_classes_make_a_configuration(name):
    config = Co2SConfig(**BENCHMARKS[name].config_kwargs)
    assert all(5 <= len(concepts) <= 7 for concepts in config.class_concepts.values())
    assert all(concepts[0] == label for label, concepts in config.class_concepts.items())
    assert len({tuple(color) for color in config.palette}) == config.num_labels


@pytest.mark.parametrize(
    ("name", "partition", "labeled", "unlabeled", "validation"),
    [
        ("whdld", 32, 138, 4308, 494),
        ("loveda", 40, 94, 3677, 420),
        ("potsdam", 32, 153, 4771, 548),
        ("gid", 8, 342, 2394, 684),
        ("mer", 8, 106, 745, 213),
        ("msl", 8, 392, 2749, 786),
    ],
)
def test_set_sizes_are_those_of_the_paper(name, partition, labeled, unlabeled, validation):
    facts = BENCHMARKS[name]
    assert facts.partitions[0] == partition and facts.num_labeled(partition) == labeled
    assert facts.num_training - labeled == unlabeled and facts.num_validation == validation


def test_partitions_are_read():
    assert [BENCHMARKS["whdld"].denominator(text) for text in (None, "1_24", "1/8", "all")] == [32, 24, 8, 1]
    with pytest.raises(UserError, match=r"`partition` is '1_2'; GID has 1_8, 1_4, all\."):
        BENCHMARKS["gid"].denominator("1_2")


@pytest.fixture
def small_benchmark(monkeypatch):
    """A function that sets the sizes of a benchmark to those of a tiny copy: 8 training and 2 validation images."""

    def shrink(name):
        facts = BENCHMARKS[name]
        small = facts.__class__(**{**vars(facts), "num_training": 8, "num_validation": 2})
        monkeypatch.setitem(BENCHMARKS, name, small)
        return small

    return shrink


def benchmark_files(name: str) -> dict[str, bytes]:
    """A tiny copy in the folders of the real benchmark. Each mask has all classes and the ignore value."""
    facts, files = BENCHMARKS[name], {}
    ignore, first = (0, 1) if facts.reduce_labels else (255, 0)
    for n in range(10):
        values = np.array([[ignore, *range(first, first + len(facts.classes))]], dtype=np.uint8).repeat(16, axis=0)
        for kind, picture in (("images", Image.new("RGB", values.shape[::-1], (n, 9, 9))), ("labels", values)):
            picture = Image.fromarray(picture) if kind == "labels" else picture
            stream = io.BytesIO()
            picture.save(stream, format="PNG")
            files[f"{facts.folder}/{kind}/{n}.png"] = stream.getvalue()
    return files


def benchmark_lists(denominator: int) -> dict[str, str]:
    lines = [f"images/{n}.png labels/{n}.png\n" for n in range(10)]
    labeled = 8 // denominator or 1
    parts = {f"1_{denominator}/labeled.txt": lines[:labeled], f"1_{denominator}/unlabeled.txt": lines[labeled:8]}
    parts |= {"train.txt": lines[:8], "all/labeled.txt": lines[:8], "val.txt": lines[8:]}
    return {name: "".join(part) for name, part in parts.items()}


@pytest.fixture
def local_copy(tmp_path):
    """A function that writes a tiny benchmark, and its lists at 1/8 into splits/."""

    def write(name):
        files = benchmark_files(name)
        files |= {f"splits/{path}": text.encode() for path, text in benchmark_lists(8).items()}
        for path, data in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(data)
        return tmp_path

    return write


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_benchmarks_are_read_with_their_rules(name, small_benchmark, local_copy):
    facts, root = small_benchmark(name), local_copy(name)
    data = open_source(
        DataOptions(dataset=name, partition="1_8", data_dir=str(root / facts.folder), splits_dir=str(root / "splits"))
    )
    assert [len(part) for part in (data.labeled, data.unlabeled, data.validation)] == [1, 7, 2]
    assert list(data.id2label.values()) == [c.name for c in facts.classes]
    assert data.class_concepts[facts.classes[0].name] == facts.classes[0].concepts
    row = np.asarray(data.labeled[0].load_label())[0].tolist()
    assert row == [255, *range(len(facts.classes))]  # the file counts from 0 or from 1
    assert [finding.kind for finding in data.findings] == ["lists unlike the paper's"] * 3  # as long, other names


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_with_all_labels_every_training_image_is_labelled(name, small_benchmark, local_copy):
    facts, root = small_benchmark(name), local_copy(name)
    other = root / "splits" / ("train.txt" if name in ("gid", "mer", "msl") else "all/labeled.txt")
    other.unlink()
    options = DataOptions(
        dataset=name, partition="all", data_dir=str(root / facts.folder), splits_dir=str(root / "splits")
    )
    data = open_source(options, needed=("labeled", "validation"))
    assert data.lists == {
        "labeled": [(f"images/{n}.png", f"labels/{n}.png") for n in range(8)],
        "unlabeled": [],
        "validation": [(f"images/{n}.png", f"labels/{n}.png") for n in (8, 9)],
    }
    found = [np.asarray(sample.load_image())[0, 0, 0] for sample in data.labeled]
    assert found == list(range(8))


def test_incomplete_copies_are_refused(small_benchmark, local_copy):
    small_benchmark("whdld")
    root = local_copy("whdld")
    options = {"dataset": "whdld", "partition": "1_8"}
    with pytest.raises(UserError, match=r"`data_dir` is '.*', which has no folder images/. Expected .* WHDLD of"):
        open_source(DataOptions(**options, data_dir=str(root), splits_dir=str(root / "splits")))
    with pytest.raises(UserError, match=r"`splits_dir` is '.*', which has none of whdld/1_8/labeled.txt, 1_8/labele"):
        open_source(DataOptions(**options, data_dir=str(root), splits_dir=str(root / "labels")))


def test_images_come_from_the_hub_and_lists_are_downloaded_once(hub, tmp_path, monkeypatch):
    repository = hub.create("dataset", "XavierJiezou/co2s-datasets")
    tree = {path: Blob(data) for path, data in benchmark_files("whdld").items()}
    repository.commit("main", tree | {"LOVEDA/images/big.png": Blob(b"another benchmark")}, "data")
    lists_hub = LocalHub().start()
    lists = lists_hub.create("dataset", "lists/splits")
    lists.commit("main", {f"whdld/{k}": Blob(v.encode()) for k, v in benchmark_lists(8).items()}, "lists")
    monkeypatch.setattr(authors, "SPLITS_URL", f"{lists_hub.url}/datasets/lists/splits/resolve/main")
    monkeypatch.setattr(authors, "CACHE", tmp_path / "cache")
    files = {f"whdld/{name}": hashlib.sha256(text.encode()).hexdigest() for name, text in benchmark_lists(8).items()}
    digests = {name: authors.ListDigests(file, lines="") for name, file in files.items()}
    monkeypatch.setattr(authors, "read_digests", lambda: digests)
    options = DataOptions(dataset="whdld", partition="1/8")
    data = open_source(options)
    assert [len(part) for part in (data.labeled, data.unlabeled, data.validation)] == [1, 7, 2]
    colors = [
        np.asarray(sample.load_image()) for part in (data.labeled, data.unlabeled, data.validation) for sample in part
    ]
    assert [color.shape for color in colors] == [(16, 7, 3)] * 10
    assert [color[5, 5].tolist() for color in colors] == [[n, 9, 9] for n in range(10)]
    assert data.id2label[4] == "bare soil"
    assert {finding.kind for finding in data.findings} == {"lists unlike the paper's"}
    assert not any("LOVEDA/images/big.png" in request for request in hub.requests)
    assert len([request for request in lists_hub.requests if request.endswith(".txt")]) == 3
    lists_hub.requests.clear()
    assert open_source(options).hash == data.hash
    assert not lists_hub.requests
    lists_hub.shutdown()
    lists_hub.server_close()
    monkeypatch.setattr(authors, "CACHE", tmp_path / "other")
    with pytest.raises(UserError, match=r"1_8/labeled.txt cannot be downloaded: .* name a copy .* with `splits_dir`"):
        authors.load_lists("whdld", 8)


def test_data_that_cannot_be_downloaded_is_named(hub, local_copy):
    root = local_copy("whdld")
    options = DataOptions(dataset="whdld", partition="1_8", splits_dir=str(root / "splits"), dataset_revision="gone")
    with pytest.raises(
        UserError, match=r"(?s)The data set 'XavierJiezou/co2s-datasets' cannot be loaded: .*`data_dir`"
    ):
        open_source(options)


def test_a_model_of_the_benchmark_does_not_change_its_classes(small_benchmark, local_copy):
    facts, root = small_benchmark("whdld"), local_copy("whdld")
    options = DataOptions(
        dataset="whdld", partition="1_8", data_dir=str(root / facts.folder), splits_dir=str(root / "splits")
    )
    assert open_source(options, config=make_config()).id2label == {n: c.name for n, c in enumerate(facts.classes)}
