"""Look into every file of a data set once: sizes, label values, whether it can be read at all.

What was found is remembered by file size and time in `$HF_HOME/co2s_hf/scans.sqlite`, never beside the data.
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

from .data import Samples
from .reading import IGNORE, UNKNOWN, ImageRule, LabelRule, StoredFile


CACHE = Path(HF_HOME) / "co2s_hf" / "scans.sqlite"
VERSION = 1  # of what is remembered
AT_ONCE = 128  # files at a time: one question to the cache, one save; those inside a data set are in memory


@dataclass(frozen=True)
class ImageFacts:
    """What an image file holds, or why it cannot be used."""

    name: str
    size: tuple[int, int] = (0, 0)  # width, height
    digest: str = ""  # of the file's bytes
    error: str | None = None


@dataclass(frozen=True)
class LabelFacts:
    """What a label file holds, or why it cannot be used."""

    name: str
    size: tuple[int, int] = (0, 0)
    counts: dict[int, int] = field(default_factory=dict)  # class index -> pixels; 255 stands for no class
    # Values without a rule: value, pixels, column and row of the first.
    unknown: list[tuple[str, int, int, int]] = field(default_factory=list)
    error: str | None = None

    @property
    def classes(self) -> frozenset[int]:
        return frozenset(self.counts) - {IGNORE}


def scan_images(samples: Samples, progress: bool = False) -> list[ImageFacts]:
    """Decode every image."""
    rule = samples.image_rule
    found = _remembered("image", repr(rule), samples, lambda file: asdict(_look_at_image(file, rule)), progress)
    return [
        ImageFacts(f"row {place}", error=f"Row {place} of the set has no image. Remove it.")
        if entry is None
        else ImageFacts(**entry | {"size": tuple(entry["size"])})
        for place, entry in enumerate(found)
    ]


def scan_labels(samples: Samples, progress: bool = False) -> list[LabelFacts | None]:
    """Count every label map's values; None for a sample without one."""
    rule = samples.label_rule
    found = _remembered("label", repr(rule), samples, lambda file: asdict(_look_at_label(file, rule)), progress)
    return [None if entry is None else _label_facts(entry) for entry in found]


def _label_facts(entry: dict) -> LabelFacts:
    """From JSON, whose keys are texts and whose tuples are lists."""
    counts = {int(index): count for index, count in entry["counts"].items()}
    unknown = [tuple(values) for values in entry["unknown"]]
    return LabelFacts(entry["name"], tuple(entry["size"]), counts, unknown, entry["error"])


def _look_at_image(file: StoredFile, rule: ImageRule) -> ImageFacts:
    try:
        image = rule.read(file)
        return ImageFacts(str(file), image.size, hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest())
    except ValueError as error:
        return ImageFacts(str(file), error=str(error))


def _look_at_label(file: StoredFile, rule: LabelRule) -> LabelFacts:
    try:
        values = rule.read_values(file)
    except ValueError as error:
        return LabelFacts(str(file), error=str(error))
    if values.dtype == np.uint8:  # sorting every pixel would take ten times as long
        pixels = np.bincount(values.ravel(), minlength=256)
        present = np.flatnonzero(pixels)
        pixels = pixels[present]
    else:
        present, pixels = np.unique(values, return_counts=True)
    counts, unknown = Counter(), []
    for value, index, count in zip(present.tolist(), rule.indices(present).tolist(), pixels.tolist()):
        if index == UNKNOWN:
            row, column = divmod(int(np.argmax(values == value)), values.shape[1])
            unknown.append((rule.show(value), count, column, row))
        else:
            counts[index] += count
    return LabelFacts(str(file), values.shape[::-1], dict(counts), unknown)


def _remembered(
    kind: str, rule: str, samples: Samples, look: Callable[[StoredFile], dict], progress: bool
) -> list[dict | None]:
    """What `look` says of every file, asked in parallel, and only of files that changed since they were looked at."""
    found: list[dict | None] = []
    bar = tqdm(total=len(samples), desc=f"checking {kind}s", disable=not progress, leave=False, unit="file")
    files = samples.files(kind)
    with bar, ThreadPoolExecutor(_cores()) as pool:
        while part := list(itertools.islice(files, AT_ONCE)):  # what is inside a data set shall not all be in memory
            known = [file for file in part if file is not None]
            keys = dict(zip(map(str, known), pool.map(lambda file: _identity(kind, rule, file), known)))
            entries = _recall(keys.values())
            missing = {keys[str(file)]: file for file in known if keys[str(file)] not in entries}
            new = dict(zip(missing, pool.map(look, missing.values())))
            _keep({key: entry for key, entry in new.items() if entry["error"] is None})
            entries |= new
            found += [None if file is None else entries[keys[str(file)]] | {"name": str(file)} for file in part]
            bar.update(len(part))
    return found


def _identity(kind: str, rule: str, file: StoredFile) -> str:
    """What tells whether a file is still what was looked at."""
    if file.data is not None:
        stamp = hashlib.blake2b(file.data, digest_size=16).hexdigest()
    else:
        try:
            status = os.stat(file.path)
            stamp = f"{os.path.realpath(file.path)} {status.st_size} {status.st_mtime_ns}"
        except OSError:
            stamp = file.path  # missing: never remembered
    return f"{VERSION} {kind} {rule} {stamp}"


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _connect() -> closing[sqlite3.Connection]:
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(CACHE, timeout=60)
    connection.execute("CREATE TABLE IF NOT EXISTS scans (key TEXT PRIMARY KEY, found TEXT)")
    return closing(connection)


# A cache that cannot be read or written only costs time.


def _recall(keys: Iterable[str]) -> dict[str, dict]:
    keys = list(keys)
    question = f"SELECT key, found FROM scans WHERE key IN ({','.join('?' * len(keys))})"
    try:
        with _connect() as connection:
            return {key: json.loads(found) for key, found in connection.execute(question, keys)}
    except (OSError, sqlite3.Error):
        return {}


def _keep(found: dict[str, dict]):
    rows = [(key, json.dumps(entry)) for key, entry in found.items()]
    with suppress(OSError, sqlite3.Error), _connect() as connection, connection:
        connection.executemany("INSERT OR REPLACE INTO scans VALUES (?, ?)", rows)
