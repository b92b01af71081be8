"""The lists of the paper's benchmarks: fetched once from the authors' repository, or read from a copy of it."""

import hashlib
import urllib.error
import urllib.request
from pathlib import Path

from huggingface_hub.constants import HF_HOME

from .catalog import BENCHMARKS
from .files import write_text
from .splits import SPLIT_FILES, SPLITS, Line, read_list


CACHE = Path(HF_HOME) / "co2s_hf" / "splits"
TIMEOUT_S = 30


def fetch_lists(dataset: str, partition: int, url: str, splits_dir: Path | None = None) -> dict[str, list[Line]]:
    """The labelled, unlabelled and validation images of a benchmark.

    Args:
        dataset: Key of `BENCHMARKS`.
        partition: Denominator of the labelled share.
        url: What `<dataset>/val.txt` and `<dataset>/1_<partition>/labeled.txt` lie below.
        splits_dir: Instead of the network: the authors' folder of lists, that of one benchmark, or one with
            labeled.txt, unlabeled.txt and val.txt, such as a run writes.

    Raises:
        ConnectionError: A list is neither in the cache nor to be had.
        FileNotFoundError: The folder lacks a list.
    """
    lists = {}
    for split in SPLITS:
        name = SPLIT_FILES[split] if split == "validation" else f"1_{partition}/{SPLIT_FILES[split]}"
        if splits_dir is None:
            path = _fetched(f"{url.rstrip('/')}/{dataset}/{name}")
        else:
            candidates = [splits_dir / dataset / name, splits_dir / name, splits_dir / SPLIT_FILES[split]]
            path = next((path for path in candidates if path.exists()), None)
            if path is None:
                raise FileNotFoundError(
                    f"'{splits_dir}' has neither {dataset}/{name} nor {name} nor {candidates[2].name}."
                )
        lists[split] = read_list(path, label_needed=split != "unlabeled")
    return lists


def unexpected_sizes(dataset: str, partition: int, sizes: dict[str, int]) -> list[str]:
    """Where the lists have other lengths than in the paper."""
    facts = BENCHMARKS[dataset]
    labeled = facts.num_labeled(partition)
    expected = {"labeled": labeled, "unlabeled": facts.num_training - labeled, "validation": facts.num_validation}
    return [
        f"The {split} list of {dataset} at 1/{partition} has {sizes[split]} images; the paper's has {count}. Results "
        "will not be comparable."
        for split, count in expected.items()
        if sizes[split] != count
    ]


def _fetched(url: str) -> Path:
    """The file at a URL, from the cache if it was fetched before."""
    path = CACHE / hashlib.sha256(url.encode()).hexdigest()[:16] / url.rsplit("/", 1)[1]
    if not path.exists():
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
                text = answer.read().decode()
        except (urllib.error.URLError, TimeoutError, UnicodeDecodeError) as error:
            raise ConnectionError(
                f"{url} cannot be fetched: {error}. Try again, or copy the authors' folder of lists here and pass it "
                "as --splits_dir."
            ) from error
        write_text(path, text)
    return path
