"""A Python environment with only torch, transformers, Pillow, NumPy and their requirements.

Tests use it to check that saved models work for users who have not installed this package.
"""

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement


def make_environment(folder: Path) -> Path:
    """Link the distributions and all their requirements into a new folder, to be put on Python's path."""
    folder.mkdir(parents=True)
    to_link, done = ["torch", "transformers", "pillow", "numpy"], set()
    while to_link:
        name = re.sub(r"[-_.]+", "-", to_link.pop()).lower()
        if name in done:
            continue
        done.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:  # a requirement on other platforms
            continue
        requirements = [Requirement(text) for text in found.requires or ()]
        to_link += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
        for top in {path.parts[0] for path in found.files if path.parts[0] not in ("..", "__pycache__")}:
            link, target = folder / top, Path(found.locate_file(top))
            if not link.exists():
                link.symlink_to(target)
    return folder


def run_isolated(environment: Path, code: str, *words: str, **variables: str) -> subprocess.CompletedProcess:
    """Run code in that environment, with a Hugging Face cache of its own."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    clean |= {"PYTHONPATH": str(environment), "HF_HOME": str(environment.parent / "hf")}
    # -S leaves out site-packages, and with it this package and everything else that is installed.
    command = [sys.executable, "-S", "-c", code, *map(str, words)]
    return subprocess.run(command, env=clean | variables, cwd=environment.parent, capture_output=True, text=True)
