"""Publish a trained model on the Hub, and a demo of it.

    # `hf auth login` first. The model's folder has its card already, from training.
    python examples/push_to_hub.py --checkpoint outputs/train_semi/model --hub_model_id user/name --hub_private_repo

    # With what Inference Endpoints run; on a branch.
    python examples/push_to_hub.py --checkpoint outputs/train_semi/model --hub_model_id user/name --handler \\
        --hub_revision v1

    # A Space: the demo of examples/app.py for a published model.
    python examples/push_to_hub.py --checkpoint user/name --space user/demo

    # The same on your machine only, to look at it: a folder with app.py, its requirements and a README.
    python examples/push_to_hub.py --checkpoint user/name --space_dir outputs/space

All files arrive in one commit or not at all; the folder here is only read (where it has no card or no handler yet,
these are written into it first).
"""

import shutil
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import yaml

import co2s_hf
from co2s_hf.arguments import parse_arguments, setting, told_plainly
from co2s_hf.files import check_new_folder, write_text, written_beside
from co2s_hf.hub import HubTarget, add_handler, check_publishable, claim_repository, publish
from co2s_hf.model_card import write_card


# What the demo imports, in the versions that are installed here.
SPACE_REQUIREMENTS = ("torch", "transformers", "huggingface_hub", "safetensors", "numpy", "pillow", "matplotlib")
SPACE_REQUIREMENTS += ("peft", "pyyaml")


@dataclass
class Arguments(HubTarget):
    checkpoint: str = setting("outputs/train_semi/model", "Folder of a trained model; for a Space also its Hub name.")
    handler: bool = setting(False, "Also publish handler.py, which Inference Endpoints run.")
    space: str | None = setting(None, "Publish a demo of the model as this Space (user/name), not the model.")
    space_dir: str | None = setting(None, "Write that demo into this new folder.")

    def __post_init__(self):
        if self.space is not None and self.space_dir is not None:
            raise ValueError("Give either --space or --space_dir.")
        is_space = self.space is not None or self.space_dir is not None
        if is_space and (self.handler or self.hub_model_id or self.hub_revision):
            raise ValueError(
                "--handler, --hub_model_id and --hub_revision are for models; a Space runs its main branch."
            )
        if not is_space and self.hub_model_id is None:
            raise ValueError("Name the repository: --hub_model_id user/name.")
        if not is_space:
            check_publishable(self.checkpoint)
        if is_space and self.space_dir is None and Path(self.checkpoint).exists():
            raise ValueError(f"A Space needs the name of a published model; '{self.checkpoint}' is a folder here.")


def main():
    args = parse_arguments(Arguments, __doc__)
    with told_plainly():
        if args.space_dir is not None:
            with written_beside(check_new_folder(args.space_dir)) as folder:
                write_space(folder, args.checkpoint)
            print(f"Wrote {args.space_dir}; try it with: python {args.space_dir}/app.py")
        elif args.space is not None:
            name = claim_repository(args.space, args.hub_private_repo, kind="space", sdk="gradio")
            with tempfile.TemporaryDirectory() as temporary:
                write_space(Path(temporary), args.checkpoint)
                retry = "Run the same command again."
                print(f"Published the demo: {publish(temporary, name, kind='space', retry=retry)}")
        else:
            folder = Path(args.checkpoint)
            name = claim_repository(args.hub_model_id, args.hub_private_repo, args.hub_revision)
            if not (folder / "README.md").exists():
                write_card(folder)
            if args.handler:
                add_handler(folder)
            print(f"Published {folder}: {publish(folder, name, args.hub_revision)}")


def write_space(folder: Path, checkpoint: str):
    """Write a Space's files: the demo, this package, what they need, and a README with the Space's metadata."""
    shutil.copyfile(Path(__file__).with_name("app.py"), folder / "app.py")
    package = Path(co2s_hf.__file__).parent
    shutil.copytree(package, folder / "co2s_hf", ignore=shutil.ignore_patterns("__pycache__"))
    is_folder = Path(checkpoint).exists()
    write_text(
        folder / "app.yaml",
        yaml.safe_dump({"checkpoint": str(Path(checkpoint).resolve()) if is_folder else checkpoint}),
    )
    lines = [f"{name}=={version(name).partition('+')[0]}\n" for name in SPACE_REQUIREMENTS]
    write_text(folder / "requirements.txt", "".join(lines))
    metadata = {"title": "Co2S", "emoji": "🛰️", "colorFrom": "blue", "colorTo": "green", "sdk": "gradio"}
    metadata["python_version"] = f"{sys.version_info.major}.{sys.version_info.minor}"  # what the pins below are for
    metadata |= {"sdk_version": version("gradio"), "app_file": "app.py", "license": "apache-2.0"}
    metadata |= {"short_description": "Land cover from aerial and satellite images"}
    metadata |= {} if is_folder else {"models": [checkpoint]}
    write_text(
        folder / "README.md",
        f"---\n{yaml.safe_dump(metadata, allow_unicode=True, sort_keys=False)}---\n\n"
        f"A demo of {checkpoint}: drop an aerial or satellite image, see its land cover, what each of the two\n"
        "students makes of it, and how sure they are. Made by `examples/push_to_hub.py --space` of co2s_hf.\n",
    )


if __name__ == "__main__":
    main()
