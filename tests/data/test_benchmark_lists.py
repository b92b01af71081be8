"""The authors' lists of the benchmarks: downloads, the cache, and lists of the user. A local server has the lists."""

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import pytest
from local_hub import Blob, LocalHub

from co2s_hf.data import benchmark_lists
from co2s_hf.data.benchmark_lists import (
    ListDigests,
    digest_lines,
    list_name,
    list_warnings,
    load_lists,
    read_digests,
)
from co2s_hf.data.benchmarks import BENCHMARKS
from co2s_hf.data.splits import SPLIT_FILES, SPLITS, write_lists
from co2s_hf.utils.errors import UserError


LISTS = {
    "1_4/labeled.txt": "images/a.png labels/a.png\n",
    "1_4/unlabeled.txt": "images/d.png labels/d.png\nimages/c.png labels/c.png\nimages/e.png labels/e.png\n",
    "all/labeled.txt": "".join(f"images/{name}.png labels/{name}.png\n" for name in "abcd"),
    "val.txt": "images/f.png labels/f.png\n",
}
AT_A_SHARE = {"gid/1_4/labeled.txt", "gid/1_4/unlabeled.txt", "gid/val.txt"}


@pytest.fixture
def digests(monkeypatch) -> dict[str, ListDigests]:
    """The digests of a tiny GID. They stand for those of the authors' lists."""
    found = {}
    for name, text in LISTS.items():
        rows = [line.split()[0] if "unlabeled" in name else line for line in sorted(text.splitlines())]
        contents = text, "".join(f"{row}\n" for row in rows)
        found[f"gid/{name}"] = ListDigests(*(hashlib.sha256(content.encode()).hexdigest() for content in contents))
    monkeypatch.setattr(benchmark_lists, "read_digests", lambda: found)
    monkeypatch.setitem(BENCHMARKS, "gid", replace(BENCHMARKS["gid"], num_training=4, num_validation=1))
    return found


@pytest.fixture
def server(digests, tmp_path, monkeypatch):
    """A function that sets the lists that the server has; `server.requests` are its requests."""
    hub = LocalHub().start()
    repository = hub.create("dataset", "lists/splits")
    monkeypatch.setattr(benchmark_lists, "SPLITS_URL", f"{hub.url}/datasets/lists/splits/resolve/main")
    monkeypatch.setattr(benchmark_lists, "CACHE", tmp_path / "cache")

    def serve(lists: dict[str, str]):
        repository.commit("main", {f"gid/{name}": Blob(text.encode()) for name, text in lists.items()}, "lists")

    serve.requests = hub.requests
    serve(LISTS)
    yield serve
    hub.shutdown()
    hub.server_close()


def cached(tmp_path) -> dict[str, str]:
    """The files in the cache."""
    root = tmp_path / "cache"
    return {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()}


def test_every_list_of_the_paper_has_its_digests():
    wanted = {
        list_name(name, denominator, split)
        for name, facts in BENCHMARKS.items()
        for denominator in facts.partitions
        for split in SPLITS
    }
    wanted |= {list_name(name, 1, "labeled") for name in BENCHMARKS}
    found = read_digests()
    assert found.keys() == wanted and len(wanted) == 54
    assert all(re.fullmatch("[0-9a-f]{64}", value) for both in found.values() for value in (both.file, both.lines))
    # sha256sum whdld/val.txt msl/1_4/unlabeled.txt, in the authors' folder
    assert found["whdld/val.txt"].file == "724c557a5c4589a2ac5dd286d3118d7ce93f2f878396d37e6cd943721aea199a"
    assert found["msl/1_4/unlabeled.txt"].file == "2b796f452c958da35f0c42c45c6819c781489164119912835586a8fd00c5f47e"
    # sha256sum loveda/train.txt mer/all/labeled.txt
    assert found["loveda/train.txt"].file == "ddbf7197646f2f1327720206ebed3c7fde38b3b04dc57b2c0b063cf568743675"
    assert found["mer/all/labeled.txt"].file == "a4572159ab0d2ed9a7d0f393a49a9b9e69d9bc28d450302be6cff13651d4b2bc"


def test_the_lists_come_from_one_commit():
    """A branch may change. With a commit, everybody gets the same lists."""
    address = r"https://raw\.githubusercontent\.com/XavierJiezou/Co2S/[0-9a-f]{40}/splits"
    assert re.fullmatch(address, benchmark_lists.SPLITS_URL)


def test_intact_lists_are_downloaded_once_and_cached(server, tmp_path):
    lists = load_lists("gid", 4)
    assert lists["labeled"] == [("images/a.png", "labels/a.png")]
    assert lists["unlabeled"] == [(f"images/{name}.png", f"labels/{name}.png") for name in "dce"]
    assert cached(tmp_path) == {name: LISTS[name.removeprefix("gid/")] for name in AT_A_SHARE}
    assert list_warnings("gid", 4, lists) == []
    server.requests.clear()
    assert load_lists("gid", 4) == lists and not server.requests


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_with_all_labels_there_is_one_list_of_training_images(name):
    facts = BENCHMARKS[name]
    assert facts.denominator("all") == 1 and facts.num_labeled(1) == facts.num_training
    expected = "all/labeled.txt" if name in ("gid", "mer", "msl") else "train.txt"
    assert [list_name(name, 1, split) for split in ("labeled", "validation")] == [
        f"{name}/{expected}",
        f"{name}/val.txt",
    ]


def test_with_all_labels_no_list_of_unlabelled_images_is_read(server, tmp_path):
    lists = load_lists("gid", 1)
    assert lists["labeled"] == [(f"images/{name}.png", f"labels/{name}.png") for name in "abcd"]
    assert lists["unlabeled"] == [] and lists["validation"] == [("images/f.png", "labels/f.png")]
    assert cached(tmp_path).keys() == {"gid/all/labeled.txt", "gid/val.txt"}
    assert list_warnings("gid", 1, lists) == []
    (warning,) = list_warnings("gid", 1, lists | {"labeled": lists["labeled"][1:]})
    assert warning.startswith("The labeled list of gid at partition all has 3 images; the paper's list has 4.")


@pytest.mark.parametrize("name", ["gid", "whdld"])
def test_with_all_labels_the_lists_of_a_run_are_read(digests, tmp_path, name):
    """A run writes labeled.txt for every benchmark, and an empty unlabeled.txt."""
    lists = {"labeled": [("images/a.png", "labels/a.png")], "unlabeled": [], "validation": [("images/f.png", "b.png")]}
    write_lists(tmp_path / "splits", lists, {})
    assert load_lists(name, 1, tmp_path / "splits") == lists


def test_changed_lists_are_refused_and_not_cached(server, digests, tmp_path):
    changed = "images/f.png labels/other.png\n"
    server(LISTS | {"val.txt": changed})
    found, expected = hashlib.sha256(changed.encode()).hexdigest(), digests["gid/val.txt"].file
    message = rf"/gid/val.txt is not the authors' list: its SHA-256 is {found}, expected {expected}.*`splits_dir`"
    with pytest.raises(UserError, match=message):
        load_lists("gid", 4)
    assert cached(tmp_path).keys() == {"gid/1_4/labeled.txt", "gid/1_4/unlabeled.txt"}
    server(LISTS)
    assert load_lists("gid", 4)["validation"] == [("images/f.png", "labels/f.png")]


def test_a_damaged_copy_in_the_cache_is_downloaded_again(server, tmp_path):
    lists = load_lists("gid", 4)
    path = tmp_path / "cache" / "gid" / "1_4" / "labeled.txt"
    path.write_text("images/b.png labels/b.png\n", encoding="utf-8")
    assert load_lists("gid", 4) == lists and path.read_text() == LISTS["1_4/labeled.txt"]
    path.write_text("images/b.png labels/b.png\n", encoding="utf-8")
    server({})
    with pytest.raises(UserError, match=r"gid/1_4/labeled.txt cannot be downloaded: .*404"):
        load_lists("gid", 4)


def test_line_ends_of_the_cache_do_not_matter(server, tmp_path):
    """On Windows, Python writes text files with other line ends."""
    lists = load_lists("gid", 4)
    for path in (tmp_path / "cache").rglob("*.txt"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    server.requests.clear()
    assert load_lists("gid", 4) == lists and not server.requests


@pytest.mark.parametrize("subfolder", ["", "gid"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_copy_of_the_authors_folder_gives_no_warning(digests, tmp_path, subfolder, line_end):
    for name, text in LISTS.items():
        (tmp_path / "gid" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "gid" / name).write_bytes(text.replace("\n", line_end).encode())
    lists = load_lists("gid", 4, tmp_path / subfolder)
    assert lists["validation"] == [("images/f.png", "labels/f.png")]
    assert list_warnings("gid", 4, lists) == []


def test_lists_of_a_run_give_no_warning(digests, tmp_path):
    """A run writes its own form: another order is possible, and no label file for an unlabelled image without one."""
    lists = {
        "labeled": [("images/a.png", "labels/a.png")],
        "unlabeled": [("images/c.png", None), ("images/d.png", "labels/d.png"), ("images/e.png", None)],
        "validation": [("images/f.png", "labels/f.png")],
    }
    write_lists(tmp_path / "splits", lists, {})
    again = load_lists("gid", 4, tmp_path / "splits")
    assert again == lists and list_warnings("gid", 4, again) == []


@pytest.mark.parametrize(
    ("split", "text", "message"),
    [
        ("validation", "images/g.png labels/g.png", "has 1 images; the paper's list has as many, but other names of"),
        ("labeled", "images/a.png labels/z.png", "has 1 images; the paper's list has as many, but other names of"),
        ("unlabeled", "images/c.png\nimages/d.png", r"has 2 images; the paper's list has 3\."),
    ],
)
def test_lists_of_the_user_that_differ_give_a_warning(digests, tmp_path, split, text, message):
    for name, authors in LISTS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text if Path(name).name == SPLIT_FILES[split] else authors, encoding="utf-8")
    lists = load_lists("gid", 4, tmp_path)
    assert lists[split][0][0] == text.split()[0]
    (warning,) = list_warnings("gid", 4, lists)
    assert re.match(f"The {split} list of gid at 1/4 {message}", warning)
    assert warning.endswith("Results will not be comparable with the paper.")


def test_digests_of_lines_are_those_of_the_command_line():
    """`LC_ALL=C sort LIST | sha256sum`, and without label files `cut -d ' ' -f 1 LIST | LC_ALL=C sort | sha256sum`."""
    lines = [("images/b.png", "labels/b.png"), ("images/a.png", "labels/a.png")]
    expected = "c3dbef6ada89ae161a009d05b2edee29793c431820f545a1c6b3cf711869331e"
    assert digest_lines(lines, with_labels=True) == expected
    expected = "e2a26a8ec401e2d090f280b3b62560309fbb34440df83cf52817da29207fe179"
    assert (
        digest_lines(lines, with_labels=False) == digest_lines([("images/a.png", None), lines[0]], False) == expected
    )
