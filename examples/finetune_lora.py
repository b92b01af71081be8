"""Adapt a trained model to a new area, or to new classes, with a handful of labels: LoRA, minutes, a few megabytes.

    # Labels alone.
    accelerate launch examples/finetune_lora.py --checkpoint user/name --data_dir path/to/folder

    # Unlabelled images, too.
    accelerate launch examples/finetune_lora.py --checkpoint user/name --data_dir path/to/folder --method co2s

    # The smallest adapter; other ways to adapt.
    accelerate launch examples/finetune_lora.py --checkpoint user/name --data_dir path/to/folder --freeze_decoders
    accelerate launch examples/finetune_lora.py --checkpoint user/name --data_dir path/to/folder --lora_rank 32 \\
        --lora_targets attention+mlp --use_rslora

    # One plain model of base and adapter, in merged/; the adapter on the Hub.
    accelerate launch examples/finetune_lora.py --checkpoint user/name --data_dir path/to/folder --merge
    accelerate launch examples/finetune_lora.py --checkpoint user/name --data_dir path/to/folder \\
        --push_to_hub --hub_model_id user/name-valley

Writes what train_semi.py does, but adapter/ instead of model/, which evaluate.py, predict.py, app.py, from_pretrained
and pipeline take like a model while the base is where it was; and metrics_before.json. Classes may be others than the
base's: their queries start fresh, their text is encoded anew (by the base's own text encoder), the decoders go on.
"""

import json
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Literal

import torch
from accelerate import PartialState
from safetensors.torch import load_file
from torch import nn
from train_semi import Arguments as TrainingArguments
from train_semi import train, train_only
from transformers import BitsAndBytesConfig
from transformers.utils import find_adapter_config_file

from co2s_hf import Co2SConfig, Co2SForSemanticSegmentation, Co2SImageProcessor
from co2s_hf.arguments import parse_arguments, setting
from co2s_hf.lora import merged
from co2s_hf.model_card import TRAINING_FILE, write_card
from co2s_hf.modeling_co2s import STUDENTS
from co2s_hf.sources import Source
from co2s_hf.training import save_model


FROM_THE_BASE = ("clip_model", "dinov3_model", "train_backbones", "recipe", "lora")


@dataclass
class Arguments(TrainingArguments):
    saved_as: ClassVar[str] = "adapter"

    checkpoint: str | None = setting(None, "Folder or Hub name of the trained model to adapt.")
    output_dir: str = setting("outputs/finetune_lora", "New folder for adapter/, metrics.json, log.jsonl and figures.")
    method: Literal["co2s", "supervised"] = setting("supervised", "co2s uses the unlabelled images, too.")
    crop_size: int | None = setting(None, "Side of training crops and of evaluation windows. Left out: the base's.")
    per_device_train_batch_size: int | None = setting(None, "Labelled images per step and device. Left out: 4.")
    max_train_steps: int | None = setting(None, "Length of the training in steps. Left out: 200.")
    learning_rate: float | None = setting(None, "Of the queries. Left out: 1e-3.")
    backbone_lr_scale: float | None = setting(None, "The updates' learning rate, relative to that. Left out: 1.")
    decoder_lr_scale: float | None = setting(None, "The decoders' learning rate, relative to that. Left out: 0.1.")
    confidence_threshold: float | None = setting(None, "tau, with --method co2s. Left out: 0.95.")
    supervised_warmup_steps: int | None = setting(None, "Steps on labels alone, with --method co2s. Left out: 0.")
    text_encoder: str | None = setting(None, "CLIP that encodes the text of new classes. Left out: the base's own.")
    text_embeddings: str | None = setting(
        None, "Safetensors file with `embeddings` (classes, width) for the classes' text, instead."
    )
    quantize: Literal["8bit", "4bit"] | None = setting(None, "Load the base's towers in fewer bits (bitsandbytes).")
    merge: bool = setting(False, "Also write base and adapter as one plain model, merged/.")

    def __post_init__(self):
        if self.checkpoint is None:
            raise ValueError("Name the model to adapt: --checkpoint FOLDER or user/name.")
        if not self.names_data:
            raise ValueError("Name the data to adapt to: --data_dir, --dataset_name or --dataset.")
        for name in FROM_THE_BASE:
            if getattr(self, name) not in (None, False, "paper", "none"):  # or what follows, from a card's settings
                raise ValueError(f"--{name} {getattr(self, name)}: that is the base's; leave it out.")
        if self.push_to_hub and Path(self.checkpoint).is_dir():
            raise ValueError(
                f"An adapter on the Hub needs its base there, but {self.checkpoint} is a folder here. Publish that "
                "first (examples/push_to_hub.py) and pass --checkpoint user/name."
            )
        if self.text_encoder is not None and self.text_embeddings is not None:
            raise ValueError("Give either --text_encoder or --text_embeddings.")
        if self.quantize is not None and find_spec("bitsandbytes") is None:
            raise ValueError(f"--quantize {self.quantize} needs bitsandbytes: pip install bitsandbytes")
        self.check()
        defaults = {"per_device_train_batch_size": 4, "learning_rate": 1e-3, "backbone_lr_scale": 1.0}
        # Decoders that have learnt enough elsewhere: a tenth of the rate keeps what they know.
        defaults |= {"decoder_lr_scale": 0.1, "confidence_threshold": 0.95, "train_backbones": "none"}
        if self.max_train_steps is None and self.num_train_epochs is None:
            defaults["max_train_steps"] = 200
        if self.method == "co2s":
            defaults["supervised_warmup_steps"] = 0
        if Path(self.checkpoint).is_dir():
            self.checkpoint = str(Path(self.checkpoint).resolve())  # which the adapter names as its base
        try:
            if find_adapter_config_file(self.checkpoint) is not None:
                raise ValueError(f"{self.checkpoint} is an adapter. Merge it (--merge), and adapt the result.")
            config = Co2SConfig.from_pretrained(self.checkpoint)
            resize = Co2SImageProcessor.from_pretrained(self.checkpoint)
        except OSError as error:
            raise ValueError(str(error)) from None
        defaults["crop_size"] = config.crop_size or 256
        if resize.do_resize:
            defaults["eval_short_side"] = resize.size["shortest_edge"]
        if config.fusion in STUDENTS:  # the other one was perhaps never trained
            self.students = config.fusion
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        super().__post_init__()


def main():
    args = parse_arguments(Arguments, __doc__)
    train(args, build_model, Co2SConfig.from_pretrained(args.checkpoint), evaluate_first=True)
    if args.merge and PartialState().is_main_process:
        write_merged(Path(args.output_dir), is_measured=args.quantize is None)


def build_model(args: Arguments, data: Source) -> Co2SForSemanticSegmentation:
    """The base for the data's classes, with a fresh adapter, in training mode."""
    # float32, whatever the base was saved in: in half precision small steps are lost.
    model = Co2SForSemanticSegmentation.from_pretrained(
        args.checkpoint, dtype=torch.float32, **quantization(args.quantize)
    )
    change_classes(model, args, data)
    rule = data.labeled.image_rule
    model.config.crop_size, model.config.image_bands, model.config.image_scale = args.crop_size, rule.bands, rule.scale
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()
    train_only(model, args.students)  # first for the fusion, which the adapter takes along ...
    model.add_adapter(args.lora_config(model))
    train_only(model, args.students)  # ... then for what it has unfrozen
    return model.train()


def quantization(bits: str | None) -> dict:
    """Keywords of `from_pretrained` for a base in fewer bits: the towers' linear layers, which stay as they are."""
    if bits is None:
        return {}
    kept = ["clip.decoder", "dinov3.decoder", "clip.encoder.visual_projection"]
    settings = {"load_in_8bit": True} if bits == "8bit" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return {"quantization_config": BitsAndBytesConfig(llm_int8_skip_modules=kept, **settings)}


def change_classes(model: Co2SForSemanticSegmentation, args: Arguments, data: Source):
    """Give the model the data's classes, if they are others than its own."""
    own, labels = list(model.config.id2label.values()), list(data.id2label.values())
    concepts = data.class_concepts or model.config.class_concepts
    text_is_new = args.text_embeddings or args.text_encoder or concepts != model.config.class_concepts
    if labels == own and not text_is_new:
        return
    if args.freeze_queries and labels != own:
        raise ValueError(f"The data has classes of its own ({', '.join(labels)}): their queries must be trained.")
    fusion = model.config.fusion
    if labels != list(concepts or ()):
        concepts = {label: [label] for label in labels}
    text = None
    if args.text_embeddings is not None:
        text = load_file(args.text_embeddings)["embeddings"]
    elif args.text_encoder is None and model.config.text_encoder is None:
        # The base was never told text either: new classes get directions of their own, as its own ones did.
        directions = torch.empty(len(labels), model.config.clip_config.projection_dim)
        text = nn.init.orthogonal_(directions)
        for index, label in enumerate(labels):
            if label in own:
                text[index] = model.clip.guidance.embeddings[own.index(label)]
    model.set_class_concepts(concepts, text, args.text_encoder, data.palette)
    model.config.fusion = fusion  # they are about to be trained


def write_merged(output_dir: Path, is_measured: bool):
    """Write base and adapter (the best one, where --eval_steps kept it) as one plain model.

    What was measured beside a base of fewer bits does not hold for the whole one.
    """
    folder = next(path for name in ("best_adapter", "adapter") if (path := output_dir / name).exists())
    model = merged(Co2SForSemanticSegmentation.from_pretrained(folder))
    target, results = output_dir / "merged", json.loads((folder / "metrics.json").read_text())
    save_model(model, Co2SImageProcessor.from_pretrained(folder), target, results if is_measured else None)
    shutil.copyfile(folder / TRAINING_FILE, target / TRAINING_FILE)
    write_card(target, results | {"is_best": folder.name == "best_adapter"} if is_measured else None)
    print(f"Saved {target}: {folder.name} merged into its base.")


if __name__ == "__main__":
    main()
