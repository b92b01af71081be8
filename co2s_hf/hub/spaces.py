"""Write the files of a Space, which serves the demo page for one model with a copy of this package."""

import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import yaml

from ..utils.files import write_text
from ..utils.markdown import inline


# Libraries that the demo imports. The Space gets the versions that are installed here.
SPACE_REQUIREMENTS = ("torch", "transformers", "huggingface_hub", "safetensors", "numpy", "pillow", "matplotlib")
SPACE_REQUIREMENTS += ("peft", "pyyaml")
APP = '''"""The demo page of co2s_hf, for the model that app.yaml names."""

import sys
from pathlib import Path

from co2s_hf.cli.demo import main


main(sys.argv[1:] or ["--config", str(Path(__file__).with_name("app.yaml"))])
'''


def write_space(folder: Path, checkpoint: str):
    """Write app.py, the package, requirements.txt and a README.md with the metadata of the Space.

    Args:
        folder: Existing folder to write into.
        checkpoint: Hub name of the model, or a local folder to try the Space on this machine.
    """
    write_text(folder / "app.py", APP)
    package = Path(__file__).parents[1]
    # The demo needs no images, backbones or recipes.
    shutil.copytree(package, folder / "co2s_hf", ignore=shutil.ignore_patterns("__pycache__", "assets"))
    is_folder = Path(checkpoint).exists()
    write_text(
        folder / "app.yaml",
        yaml.safe_dump({"checkpoint": str(Path(checkpoint).resolve()) if is_folder else checkpoint}),
    )
    lines = [f"{name}=={version(name).partition('+')[0]}\n" for name in SPACE_REQUIREMENTS]
    write_text(folder / "requirements.txt", "".join(lines))
    metadata = {"title": "Co2S", "emoji": "🛰️", "colorFrom": "blue", "colorTo": "green", "sdk": "gradio"}
    metadata["python_version"] = f"{sys.version_info.major}.{sys.version_info.minor}"  # fits the pinned versions
    metadata |= {"sdk_version": version("gradio"), "app_file": "app.py", "license": "apache-2.0"}
    metadata |= {"short_description": "Land cover from aerial and satellite images"}
    metadata |= {} if is_folder else {"models": [checkpoint]}
    write_text(
        folder / "README.md",
        f"---\n{yaml.safe_dump(metadata, allow_unicode=True, sort_keys=False)}---\n\n"
        f"A demo of {inline(checkpoint)}: drop an aerial or satellite image to see its land cover, the predictions\n"
        "of both students, and their confidence. Made by `co2s push --space` of co2s_hf.\n",
    )


__all__ = ["write_space"]
