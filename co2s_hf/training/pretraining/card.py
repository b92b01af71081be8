"""The card of a pretrained backbone: README.md in its folder."""

import textwrap
from dataclasses import asdict
from pathlib import Path

import yaml

from ...utils.markdown import code, code_block
from .options import ClipOptions, PretrainingOptions


# Paths of this machine, and options that say how a run is started. They are not in the card.
NOT_SHOWN = {"images", "exclude", "teacher", "init", "image_labels", "output_dir", "cache_dir", "cache_features"}
NOT_SHOWN |= {"overwrite_output_dir", "resume", "logging_steps", "checkpointing_steps", "dataloader_num_workers"}
NOT_SHOWN |= {"use_cpu"}
CARD = """\
---
library_name: transformers
pipeline_tag: {task}
tags:
- {kind}
- remote-sensing
- co2s
---

# A small {title}, pretrained on remote-sensing images

{method}

```python
from transformers import {model_class}

model = {model_class}.from_pretrained("path/to/this/folder")
```

Images are RGB, normalised with {statistics} mean and standard deviation.
[Co2S](https://arxiv.org/abs/2512.23035) trains with this backbone:

```bash
co2s train --clip_model {clip} --dinov3_model {dinov3} --data_dir my_data
```

## Data

{data}

Before you publish this backbone, check the licences of these images{teacher}.
Then add a `license` to the header of this file.

## Training

{options}

## Results

{results}
"""


def make_card(options: PretrainingOptions, facts: dict[str, int], results: dict[str, float]) -> str:
    """Write the card of a pretrained backbone.

    Args:
        options: Options of the pretraining.
        facts: What the data consists of, such as "images" -> 2100.
        results: Name -> value: the last mean losses, and measurements of the backbone.
    """
    is_clip = isinstance(options, ClipOptions)
    hidden = NOT_SHOWN | set(options.SIZES if options.init else ())  # `init` has sizes of its own
    shown = {name: value for name, value in asdict(options).items() if name not in hidden and value is not None}
    return CARD.format(
        task="zero-shot-image-classification" if is_clip else "image-feature-extraction",
        kind="clip" if is_clip else "dinov3",
        title="CLIP" if is_clip else "DINOv3",
        method=textwrap.fill(_method(options), 119),
        model_class="CLIPModel" if is_clip else "DINOv3ViTModel",
        statistics="CLIP's" if is_clip else "ImageNet's",
        clip="path/to/this/folder" if is_clip else "co2s-tiny-clip",
        dinov3="co2s-tiny-dinov3" if is_clip else "path/to/this/folder",
        data=_table("number", facts),
        teacher=" and of the teacher" if options.teacher else "",
        options=code_block(yaml.safe_dump(shown, sort_keys=False).rstrip(), "yaml"),
        results=_table("value", {name: f"{value:.4g}" for name, value in results.items()}),
    )


def _method(options: PretrainingOptions) -> str:
    layer = "the last layer" if options.teacher_layer is None else f"layer {options.teacher_layer}"
    teacher = None if options.teacher is None else f"the patch features of {layer} of {code(_short(options.teacher))}"
    if isinstance(options, ClipOptions):
        text = "image-text training from tags or captions of whole images"
        text += f", with {teacher} as another target" if teacher else ""
    else:
        text = f"distillation of {teacher}" if teacher else "masked image modelling (SimMIM), without a teacher"
    start = f" It started from {code(_short(options.init))}." if options.init else ""
    kind = "clip" if isinstance(options, ClipOptions) else "dinov3"
    return f"It was made with `co2s pretrain {kind}` of the package co2s_hf: {text}.{start}"


def _short(name: str) -> str:
    """Return a Hub name as it is, and the last part of a local folder's path."""
    return Path(name).name if Path(name).exists() else name


def _table(title: str, rows: dict[str, int | str]) -> str:
    lines = [f"| {name.replace('_', ' ')} | {value} |" for name, value in rows.items()]
    return "\n".join([f"| | {title} |", "|---|---|", *lines])


__all__ = ["make_card"]
