"""A Python that has torch, transformers and Pillow, what these require, and nothing else: a stranger's environment."""

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement


def make_environment(folder: Path) -> Path:
    """Link the distributions and everything that they require into a folder to put on a bare Python's path."""
    folder.mkdir(parents=True)
    wanted, seen = ["torch", "transformers", "pillow", "numpy"], set()
    while wanted:
        name = re.sub(r"[-_.]+", "-", wanted.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:  # for other platforms
            continue
        needed = [Requirement(text) for text in found.requires or ()]
        wanted += [r.name for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
        for top in {path.parts[0] for path in found.files if path.parts[0] not in ("..", "__pycache__")}:
            link, target = folder / top, Path(found.locate_file(top))
            if not link.exists():
                link.symlink_to(target)
    return folder


def run_isolated(environment: Path, code: str, *words: str, **variables: str) -> subprocess.CompletedProcess:
    """Run code in that environment, with a Hugging Face cache of its own."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    clean |= {"PYTHONPATH": str(environment), "HF_HOME": str(environment.parent / "hf")}
    # -S: no site-packages, and so neither this package nor anything else that is installed.
    command = [sys.executable, "-S", "-c", code, *map(str, words)]
    return subprocess.run(command, env=clean | variables, cwd=environment.parent, capture_output=True, text=True)
