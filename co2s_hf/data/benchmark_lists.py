"""The authors' image lists of the six benchmarks: download them, and check that they are the ones of the paper."""

import hashlib
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from http.client import HTTPException
from pathlib import Path

from huggingface_hub.constants import HF_HOME

from ..utils.errors import UserFileNotFoundError, UserOSError, UserValueError
from ..utils.files import write_text
from .benchmarks import ALL_LABELS, BENCHMARKS
from .splits import SPLIT_FILES, SPLITS, Line, read_list


SPLITS_COMMIT = "26bc0877dc920596bd9c694bd6def6f25b0c8eff"
SPLITS_URL = f"https://raw.githubusercontent.com/XavierJiezou/Co2S/{SPLITS_COMMIT}/splits"
DIGESTS = Path(__file__).parents[1] / "assets" / "benchmark_lists.txt"
CACHE = Path(HF_HOME) / "co2s_hf" / "splits" / SPLITS_COMMIT
TIMEOUT_S = 30
LARGEST_LIST = 2**22  # bytes that are read of an answer; the authors' largest list has 334 kB


@dataclass(frozen=True)
class ListDigests:
    """SHA-256 of one of the authors' lists, in hexadecimal digits.

    Args:
        file: Of the file.
        lines: Of its lines in sorted order, see [`digest_lines`].
    """

    file: str
    lines: str


@cache
def read_digests() -> dict[str, ListDigests]:
    """Read the digests of the authors' lists: path below their folder `splits/` -> digests."""
    lines = [line.split() for line in DIGESTS.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return {name: ListDigests(file, sorted_lines) for name, file, sorted_lines in lines}


def list_name(dataset: str, denominator: int, split: str) -> str:
    """Return the path of a list below the authors' folder `splits/`.

    Args:
        dataset: Key of `BENCHMARKS`.
        denominator: Denominator of the labelled share. 1: every training image is labelled. All shares have the same
            validation list.
        split: "labeled", "unlabeled" or "validation". There is no list of unlabelled images if all are labelled.
    """
    if split == "labeled" and denominator == 1:
        return f"{dataset}/{BENCHMARKS[dataset].full_list}"
    folder = dataset if split == "validation" else f"{dataset}/1_{denominator}"
    return f"{folder}/{SPLIT_FILES[split]}"


def load_lists(dataset: str, denominator: int, splits_dir: Path | None = None) -> dict[str, list[Line]]:
    """Load the labelled, unlabelled and validation lists of a benchmark.

    Args:
        dataset: Key of `BENCHMARKS`.
        denominator: Denominator of the labelled share. 1: every training image is labelled, and there are no
            unlabelled images.
        splits_dir: Folder of the lists: the authors' folder of all lists, its subfolder of one benchmark, or a folder
            with labeled.txt, unlabeled.txt and val.txt, such as the `splits/` of a run. These lists may differ from
            the authors' lists, see [`list_warnings`]. None: the authors' lists are downloaded once, in the version of
            `SPLITS_COMMIT`.

    Raises:
        UserOSError: A list is not in the cache and cannot be downloaded.
        UserFileNotFoundError: A list is not in the folder.
        UserValueError: A list is empty or malformed, or a downloaded list is not the authors' list.
    """
    lists = {}
    for split in SPLITS:
        if split == "unlabeled" and denominator == 1:
            lists[split] = []
            continue
        name = list_name(dataset, denominator, split)
        path = _downloaded(name) if splits_dir is None else _find_list(splits_dir, name, SPLIT_FILES[split])
        lists[split] = read_list(path, label_needed=split != "unlabeled")
    return lists


def _find_list(splits_dir: Path, name: str, name_in_run: str) -> Path:
    """Find a list in the authors' folder of all lists, in its subfolder of one benchmark, or in a folder of a run."""
    names = dict.fromkeys((name, name.split("/", 1)[1], name_in_run))
    for candidate in names:
        if (splits_dir / candidate).exists():
            return splits_dir / candidate
    raise UserFileNotFoundError(f"`splits_dir` is '{splits_dir}', which has none of {', '.join(names)}.")


def _downloaded(name: str) -> Path:
    """Return the path of the cached copy of one of the authors' lists. Download it if there is no intact copy.

    Raises:
        UserOSError: The list cannot be downloaded.
        UserValueError: The answer is not the authors' list. It is not cached.
    """
    path, url, expected = CACHE / name, f"{SPLITS_URL}/{name}", read_digests()[name].file
    if path.exists() and _digest_file(path.read_bytes()) == expected:
        return path
    remedy = "Try again, or name a copy of the authors' folder of lists with `splits_dir`."
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            content = answer.read(LARGEST_LIST)
    except (OSError, HTTPException) as error:
        raise UserOSError(f"{url} cannot be downloaded: {error}. {remedy}") from error
    if (found := _digest_file(content)) != expected:
        raise UserValueError(
            f"{url} is not the authors' list: its SHA-256 is {found}, expected {expected}. The answer is damaged or "
            f"was changed, and is not used. {remedy}"
        )
    write_text(path, content.decode("utf-8"))
    return path


def _digest_file(content: bytes) -> str:
    """Return the SHA-256 of a text file. Its line ends do not matter: git and Python change them on Windows."""
    return hashlib.sha256(content.replace(b"\r\n", b"\n")).hexdigest()


def digest_lines(lines: Iterable[Line], with_labels: bool) -> str:
    """Return the SHA-256 of the lines of a list, independent of their order and of the separators.

    Args:
        lines: The lines.
        with_labels: Include the label files. Otherwise, only the images count.
    """
    rows = sorted(" ".join(filter(None, line if with_labels else line[:1])) for line in lines)
    return hashlib.sha256("".join(f"{row}\n" for row in rows).encode()).hexdigest()


def list_warnings(dataset: str, denominator: int, lists: dict[str, list[Line]]) -> list[str]:
    """Return a message for each list that differs from the authors' list.

    Images and label files are compared by their names, not by their content. The order of the lines does not matter.
    Neither do the label files of unlabelled images, because they are not used for training.

    Args:
        dataset: Key of `BENCHMARKS`.
        denominator: Denominator of the labelled share. 1: every training image is labelled.
        lists: "labeled", "unlabeled" and "validation" -> lines.

    Returns:
        One message per list that differs.
    """
    facts = BENCHMARKS[dataset]
    labeled = facts.num_labeled(denominator)
    sizes = {"labeled": labeled, "unlabeled": facts.num_training - labeled, "validation": facts.num_validation}
    messages = []
    share = f"1/{denominator}" if denominator > 1 else f"partition {ALL_LABELS}"
    for split, size in sizes.items():
        if split == "unlabeled" and denominator == 1:  # there is no such list
            continue
        lines, expected = lists[split], read_digests()[list_name(dataset, denominator, split)].lines
        if digest_lines(lines, with_labels=split != "unlabeled") == expected:
            continue
        difference = f"the paper's list has {size}"
        if len(lines) == size:
            difference = "the paper's list has as many, but other names of images or label files"
        found = f"The {split} list of {dataset} at {share} has {len(lines)} images"
        messages.append(f"{found}; {difference}. Results will not be comparable with the paper.")
    return messages


__all__ = [
    "ListDigests",
    "digest_lines",
    "list_name",
    "list_warnings",
    "load_lists",
    "read_digests",
]
