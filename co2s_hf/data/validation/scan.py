"""Decode every file of a data set once, and return whether it is readable, its size, its thumbnail and its labels.

The results are cached in `$HF_HOME/co2s_hf/scans.sqlite`, not beside the data. A file is decoded again when its size
or its modification time changes.
"""

import hashlib
import itertools
import json
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from huggingface_hub.constants import HF_HOME
from tqdm.auto import tqdm

from ..reading import IGNORE, UNKNOWN, ImageRule, LabelRule, StoredFile
from ..samples import Samples
from .near_duplicates import thumbnail


CACHE = Path(HF_HOME) / "co2s_hf" / "scans.sqlite"
VERSION = 3  # version of the cached entries
JPEG_START = b"\xff\xd8\xff"  # first bytes of a JPEG file
FEW_VALUES = 8  # a label map with more values seems soft if the share of its gradual transitions is high
MIN_GRADUAL = 0.1  # usual label maps had at most 0.02, decoded JPEG masks 0.15 to 0.6, blurred masks 0.5 to 1
MOST_UNKNOWN = 5  # values of a label file that are described; a soft mask has hundreds that no rule covers
FILES_PER_BATCH = 128  # files per query of the cache; the bytes of so many rows of a data set are in memory


@dataclass(frozen=True)
class ImageFacts:
    """Facts about an image file.

    Args:
        name: Name of the file for messages.
        size: Width and height in pixels.
        digest: Hash of the file's bytes.
        thumbnail: See [`near_duplicates.thumbnail`]; "" if the file cannot be used.
        error: Why the file cannot be used, or None.
    """

    name: str
    size: tuple[int, int] = (0, 0)
    digest: str = ""
    thumbnail: str = ""
    error: str | None = None


@dataclass(frozen=True)
class LabelFacts:
    """Facts about a label file.

    Args:
        name: Name of the file for messages.
        size: Width and height in pixels.
        counts: Class index, or 255 for "no class" -> number of pixels.
        unknown: Values that no rule covers: value, number of pixels, column and row of the first such pixel. At most
            `MOST_UNKNOWN`: the lowest ones and the highest one.
        num_unknown: Number of values that no rule covers.
        is_soft: Whether the values change gradually at borders, as in a blurred mask or a decoded JPEG mask.
        is_lossy: Whether the file is a JPEG file with several values, which are probably not the original ones, and
            the rule does not map ranges of values.
        error: Why the file cannot be used, or None.
    """

    name: str
    size: tuple[int, int] = (0, 0)
    counts: dict[int, int] = field(default_factory=dict)
    unknown: list[tuple[str, int, int, int]] = field(default_factory=list)
    num_unknown: int = 0
    is_soft: bool = False
    is_lossy: bool = False
    error: str | None = None

    @property
    def classes(self) -> frozenset[int]:
        """Indices of the classes that the label map contains."""
        return frozenset(self.counts) - {IGNORE}


def scan_images(samples: Samples, progress: bool = False) -> list[ImageFacts]:
    """Decode every image.

    Args:
        samples: The images.
        progress: Show a progress bar.
    """
    rule = samples.image_rule
    found = _scan("image", repr(rule), samples, lambda file: asdict(_read_image_facts(file, rule)), progress)
    return [
        ImageFacts(f"row {place}", error=f"Row {place} of the set has no image. Remove it.")
        if entry is None
        else ImageFacts(**entry | {"size": tuple(entry["size"])})
        for place, entry in enumerate(found)
    ]


def scan_labels(samples: Samples, progress: bool = False) -> list[LabelFacts | None]:
    """Decode every label map and count the pixels of its classes.

    Args:
        samples: The samples with their label files.
        progress: Show a progress bar.

    Returns:
        One entry per sample, None for a sample without a label map.
    """
    rule = samples.label_rule
    found = _scan("label", repr(rule), samples, lambda file: asdict(_read_label_facts(file, rule)), progress)
    return [None if entry is None else _label_facts(entry) for entry in found]


def _label_facts(entry: dict) -> LabelFacts:
    """Restore facts from JSON, which has text keys and lists instead of integer keys and tuples."""
    restored = {
        "size": tuple(entry["size"]),
        "counts": {int(index): count for index, count in entry["counts"].items()},
        "unknown": [tuple(values) for values in entry["unknown"]],
    }
    return LabelFacts(**entry | restored)


def _read_image_facts(file: StoredFile, rule: ImageRule) -> ImageFacts:
    try:
        image = rule.read(file)
        digest = hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
        return ImageFacts(str(file), image.size, digest, thumbnail(image))
    except ValueError as error:
        return ImageFacts(str(file), error=str(error))


def _read_label_facts(file: StoredFile, rule: LabelRule) -> LabelFacts:
    try:
        values = rule.read_values(file)
        with file.open() as stream:
            is_jpeg = stream.read(len(JPEG_START)) == JPEG_START
    except ValueError as error:
        return LabelFacts(str(file), error=str(error))
    if values.dtype in (np.uint8, np.uint16):  # ten times as fast as np.unique, which sorts all pixels
        pixels = np.bincount(values.ravel())
        present = np.flatnonzero(pixels)
        pixels = pixels[present]
    else:
        present, pixels = np.unique(values, return_counts=True)
    indices = rule.indices(present)
    counts: Counter[int] = Counter()
    for index, count in zip(indices.tolist(), pixels.tolist()):
        if index != UNKNOWN:
            counts[index] += count
    unknown, places = [], np.flatnonzero(indices == UNKNOWN).tolist()
    for place in places if len(places) <= MOST_UNKNOWN else [*places[: MOST_UNKNOWN - 1], places[-1]]:
        row, column = divmod(int(np.argmax(values == present[place])), values.shape[1])
        unknown.append((rule.format_value(int(present[place])), int(pixels[place]), column, row))
    return LabelFacts(
        str(file),
        values.shape[::-1],
        dict(counts),
        unknown,
        len(places),
        is_soft=len(present) > FEW_VALUES and _gradual_share(values) >= MIN_GRADUAL,
        is_lossy=is_jpeg and len(present) > 1 and not rule.has_ranges,
    )


def _gradual_share(values: np.ndarray) -> float:
    """Compute the share of gradual transitions in the rows and columns of a label map.

    A transition is a pixel whose two neighbours in a row or in a column differ by at least 2. It is gradual if the
    value of the pixel lies between those of the neighbours. At the border of two classes, the pixel has the value of
    one neighbour.

    Args:
        values: (height, width), integers.
    """
    transitions = gradual = 0
    for rows in (values, values.T):
        before, middle, after = rows[:, :-2], rows[:, 1:-1], rows[:, 2:]
        low, high = np.minimum(before, after), np.maximum(before, after)
        transitions += np.count_nonzero(high - low >= 2)
        gradual += np.count_nonzero((low < middle) & (middle < high))  # only possible at transitions
    return int(gradual) / max(int(transitions), 1)


def _scan(
    kind: str, rule: str, samples: Samples, read_facts: Callable[[StoredFile], dict], progress: bool
) -> list[dict | None]:
    """Return the facts about every file. Files that are not in the cache are decoded in parallel.

    Args:
        kind: "image" or "label".
        rule: Rule by which the files are read. It is part of the keys of the cache.
        samples: The samples with the files.
        read_facts: Function that decodes a file.
        progress: Show a progress bar.
    """
    found: list[dict | None] = []
    bar = tqdm(total=len(samples), desc=f"checking {kind}s", disable=not progress, leave=False, unit="file")
    files = samples.files(kind)
    with bar, ThreadPoolExecutor(_available_cores()) as pool:
        while batch := list(itertools.islice(files, FILES_PER_BATCH)):
            existing = [file for file in batch if file is not None]
            keys = dict(zip(map(str, existing), pool.map(lambda file: _cache_key(kind, rule, file), existing)))
            entries = _load_entries(keys.values())
            missing = {keys[str(file)]: file for file in existing if keys[str(file)] not in entries}
            new = dict(zip(missing, pool.map(read_facts, missing.values())))
            _save_entries({key: entry for key, entry in new.items() if entry["error"] is None})
            entries |= new
            found += [None if file is None else entries[keys[str(file)]] | {"name": str(file)} for file in batch]
            bar.update(len(batch))
    return found


def _cache_key(kind: str, rule: str, file: StoredFile) -> str:
    """Return the key of a file in the cache. It changes when the file or its rule changes."""
    if file.data is not None:
        stamp = hashlib.blake2b(file.data, digest_size=16).hexdigest()
    else:
        try:
            status = os.stat(file.path)
            stamp = f"{os.path.realpath(file.path)} {status.st_size} {status.st_mtime_ns}"
        except OSError:
            stamp = file.path  # a missing file is an error, and errors are not saved
    return f"{VERSION} {kind} {rule} {stamp}"


def _available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _connect() -> closing[sqlite3.Connection]:
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(CACHE, timeout=60)
    connection.execute("CREATE TABLE IF NOT EXISTS scans (key TEXT PRIMARY KEY, found TEXT)")
    return closing(connection)


# Errors of the cache are ignored. Without the cache, files are decoded again, which only takes time.


def _load_entries(keys: Iterable[str]) -> dict[str, dict]:
    keys = list(keys)
    query = f"SELECT key, found FROM scans WHERE key IN ({','.join('?' * len(keys))})"
    try:
        with _connect() as connection:
            return {key: json.loads(found) for key, found in connection.execute(query, keys)}
    except (OSError, sqlite3.Error):
        return {}


def _save_entries(entries: dict[str, dict]):
    rows = [(key, json.dumps(entry)) for key, entry in entries.items()]
    with suppress(OSError, sqlite3.Error), _connect() as connection, connection:
        connection.executemany("INSERT OR REPLACE INTO scans VALUES (?, ?)", rows)
