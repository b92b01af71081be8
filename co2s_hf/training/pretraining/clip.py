"""Pretraining of a small CLIP model from image-level tags or captions.

The dense features are those that Co2S compares with the class text: the value path of the last layer (METHOD.md,
section 2). Each of them is an embedding of one place of the image in the space of the text.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, PreTrainedTokenizerBase
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ...data.views import normalize
from ...model.modeling_co2s import Co2SClipBackbone
from ...model.text_guidance_co2s import PROMPT, find_backbone, load_pretrained
from ...utils.errors import UserOSError, loading
from .distillation import FeatureHead, changed_colors
from .labels import ImageLabels
from .options import ClipOptions
from .tiles import Tile
from .words import make_tokenizer, singular


BEST_SHARE = 1 / 16  # a tag's score is the mean over this share of the places
PRESENCE_WEIGHT, PLACES_WEIGHT, CONTRAST_WEIGHT = 1.0, 0.25, 0.25
FIRST_SCALE, FIRST_BIAS = 10.0, -4.0  # from cosines to log-odds of a tag's presence
MAX_TOKENS = 32
MAX_TEXTS = 256  # texts that an image is compared with in one step


def build_clip(options: ClipOptions, labels: ImageLabels) -> tuple[CLIPModel, PreTrainedTokenizerBase]:
    """Make a small CLIP model and its tokenizer, or load both from `init`.

    Raises:
        UserOSError: `init` cannot be loaded, or has no tokenizer.
    """
    if options.init is not None:
        return _load_clip(options.init)
    tokenizer = make_tokenizer(labels.vocabulary, MAX_TOKENS)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": options.text_hidden_size,
        "intermediate_size": 4 * options.text_hidden_size,
        "num_hidden_layers": options.text_num_hidden_layers,
        "num_attention_heads": options.text_num_attention_heads,
        "max_position_embeddings": MAX_TOKENS,
        "projection_dim": options.projection_dim,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {
        "hidden_size": options.hidden_size,
        "intermediate_size": 4 * options.hidden_size,
        "num_hidden_layers": options.num_hidden_layers,
        "num_attention_heads": options.num_attention_heads,
        "patch_size": options.patch_size,
        "image_size": options.crop_size,
        "projection_dim": options.projection_dim,
    }
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=options.projection_dim)
    return CLIPModel(config), tokenizer


def _load_clip(init: str) -> tuple[CLIPModel, PreTrainedTokenizerBase]:
    """Load a CLIP model to train, and its tokenizer."""
    with loading(f"`init` {init}", name=init):
        model = load_pretrained(CLIPModel, init, "CLIP").train()
        tokenizer = AutoTokenizer.from_pretrained(find_backbone(init))
    if len(tokenizer) != model.config.text_config.vocab_size:
        # If the tokenizer files are missing, transformers returns an empty tokenizer, which encodes all words alike.
        raise UserOSError(
            f"`init` {init} has a tokenizer of {len(tokenizer)} tokens and a text encoder for "
            f"{model.config.text_config.vocab_size}. Save the tokenizer's files beside the weights."
        )
    return model, tokenizer


def dense_features(model: CLIPModel, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the image's features and the features of its places (not projected).

    Args:
        model: The CLIP model.
        pixels: (batch, 3, height, width), normalised with CLIP's statistics.

    Returns:
        (batch, hidden) from the class token, and (batch, places, hidden) from the value path of the last layer, both
        after the last layer norm.
    """
    vision = model.vision_model
    states = vision.pre_layrnorm(vision.embeddings(pixels, interpolate_pos_encoding=True))
    for layer in vision.encoder.layers[:-1]:
        states = layer(states, attention_mask=None)
    last = vision.encoder.layers[-1]
    whole = last(states, attention_mask=None)[:, 0]
    return vision.post_layernorm(whole), vision.post_layernorm(Co2SClipBackbone.value_path(last, states))


def encode_texts(model: CLIPModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> torch.Tensor:
    """Encode texts in CLIP's prompt as vectors of length 1, (texts, projection width)."""
    prompts = [PROMPT.format(text) for text in texts]
    tokens = tokenizer(prompts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    tokens = {name: tokens[name].to(model.device) for name in ("input_ids", "attention_mask")}
    pooled = model.text_model(**tokens).pooler_output
    return F.normalize(model.text_projection(pooled), dim=-1)


def presence(similarity: torch.Tensor) -> torch.Tensor:
    """Compute a score per text: the mean over the best sixteenth of the places.

    Args:
        similarity: (batch, places, texts).

    Returns:
        Tensor (batch, texts).
    """
    best = max(1, round(BEST_SHARE * similarity.shape[1]))
    return similarity.topk(best, dim=1).values.mean(dim=1)


class ClipObjective(nn.Module):
    """The losses of the image-text pretraining.

    - `loss_presence`: each tag is present in the image or not (binary cross-entropy of its [`presence`]).
    - `loss_places`: within an image, the places compete among its tags, so that each tag wins some places.
    - `loss_contrast`: image and text embeddings agree, as in CLIP. Images with the same texts count as a match.
    - `loss_teacher`: the features of the places predict the teacher's, if there is a teacher.

    Args:
        model: The CLIP model to train.
        tokenizer: Its tokenizer.
        labels: Texts of the images.
        tiles: The tiles; the batch names them by number.
        mean, std: Statistics of the teacher's features, (channels,). None: no teacher.
    """

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: PreTrainedTokenizerBase,
        labels: ImageLabels,
        tiles: Sequence[Tile],
        mean: torch.Tensor | None = None,
        std: torch.Tensor | None = None,
    ):
        super().__init__()
        self.model, self.tokenizer, self.are_tags = model, tokenizer, labels.are_tags
        self.texts = [labels.texts.get(Path(tile.path).resolve(), ()) for tile in tiles]
        self.vocabulary = labels.vocabulary
        self.scale = nn.Parameter(torch.tensor(FIRST_SCALE).log())
        self.bias = nn.Parameter(torch.tensor(FIRST_BIAS))
        self.head = None if mean is None else FeatureHead(model.config.vision_config.hidden_size, mean, std)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Compute the losses of a batch of [`TileCrops`].

        Returns:
            `loss`, with gradients, and its parts without, all scalars. If no image of the batch has a text, the losses
            of texts are missing.
        """
        pixels = normalize(changed_colors(batch), OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        whole, places = dense_features(self.model, pixels)
        losses = {}
        if self.head is not None:
            losses["loss_teacher"] = self.head(places, batch["features"].flatten(2).transpose(1, 2))
        texts = [self.texts[number] for number in batch["tile"].tolist()]
        named = [index for index, own in enumerate(texts) if own]
        total = losses.get("loss_teacher", 0)
        if named:
            texts = [texts[index] for index in named]
            losses |= self._text_losses(whole[named], places[named], texts)
            total = total + PRESENCE_WEIGHT * losses["loss_presence"] + CONTRAST_WEIGHT * losses["loss_contrast"]
            total = total + PLACES_WEIGHT * losses["loss_places"]
        return {"loss": total, **{name: value.detach() for name, value in losses.items()}}

    def _text_losses(
        self, whole: torch.Tensor, places: torch.Tensor, texts: list[tuple[str, ...]]
    ) -> dict[str, torch.Tensor]:
        """Compute the losses that compare images with texts."""
        known = self._candidates(texts)
        # Singular and plural mean the same class. One of them is drawn, so that the encoder learns both.
        forms = [singular(text) if torch.rand(()) < 0.5 else text for text in known]
        encoded = encode_texts(self.model, self.tokenizer, forms)
        embeddings = F.normalize(self.model.visual_projection(places), dim=-1)
        similarity = (embeddings @ encoded.T).float()
        present = torch.tensor([[text in own for text in known] for own in texts], device=similarity.device)
        log_odds = self.scale.exp() * presence(similarity) + self.bias
        images = F.normalize(self.model.visual_projection(whole), dim=-1)
        captions = encode_texts(self.model, self.tokenizer, [" ".join(own) for own in texts])
        return {
            "loss_presence": F.binary_cross_entropy_with_logits(log_odds, present.float()),
            "loss_places": self._places(similarity, present),
            "loss_contrast": self._contrast(images.float(), captions.float(), present),
        }

    def _candidates(self, texts: list[tuple[str, ...]]) -> list[str]:
        """Return the texts to compare with: all tags, or if there are too many (captions), those of the batch."""
        if len(self.vocabulary) <= MAX_TEXTS:
            return self.vocabulary
        return sorted({text for own in texts for text in own})

    def _places(self, similarity: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """Let the places of an image compete among its texts; each text must win its best places."""
        several = present.sum(dim=1) > 1
        if not several.any():
            return similarity.sum() * 0
        logits = (self.scale.exp() * similarity[several]).masked_fill(~present[several, None], -torch.inf)
        won = presence(logits.softmax(dim=-1))
        return -won.clamp(min=1e-6).log()[present[several]].mean()

    def _contrast(self, images: torch.Tensor, captions: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """Compute the symmetric contrastive loss. Images with the same texts share the target."""
        logits = self.model.logit_scale.exp().clamp(max=100) * images @ captions.T
        same = (present[:, None] == present[None]).all(dim=-1).float()
        target = same / same.sum(dim=1, keepdim=True)
        return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def split_tags(tiles: Sequence[Tile], labels: ImageLabels, fraction: float) -> tuple[list[Tile], list[Tile]]:
    """Hold out a share of the images with texts, to measure them.

    The choice depends on the image's file name alone. It is the same for every seed and on every machine.

    Returns:
        The tiles to train on, and the tiles that are held out.
    """
    held_out = {path for path in labels.texts if is_held_out(path.name, fraction)} if labels.are_tags else set()
    parts = ([], [])
    for tile in tiles:
        parts[Path(tile.path).resolve() in held_out].append(tile)
    return parts


def is_held_out(name: str, fraction: float) -> bool:
    """Return whether the image of this file name is held out."""
    digest = hashlib.blake2b(name.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") < fraction * 2**32


@torch.no_grad()
def measure_tags(
    model: CLIPModel,
    tokenizer: PreTrainedTokenizerBase,
    tiles: Sequence[Tile],
    labels: ImageLabels,
    tile_size: int,
) -> dict[str, float]:
    """Measure how well the presence scores find the tags of images that were not trained on.

    Returns:
        "mean_average_precision" over the tags, 0 to 1; the same of a random order ("chance": the mean share of images
        with the tag); "num_images"; and the average precision of each tag.
    """
    model = model.eval()
    tags = labels.vocabulary
    encoded = encode_texts(model, tokenizer, tags)
    scores, present = [], []
    for tile in tiles:
        pixels = torch.from_numpy(np.array(tile.read(tile_size))).permute(2, 0, 1)[None].to(model.device)
        _, places = dense_features(model, normalize(pixels.float() / 255, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
        embeddings = F.normalize(model.visual_projection(places), dim=-1)
        scores.append(presence(embeddings @ encoded.T)[0].cpu())
        own = labels.texts[Path(tile.path).resolve()]
        present.append(torch.tensor([tag in own for tag in tags]))
    scores, present = torch.stack(scores), torch.stack(present)
    found = {tag: average_precision(scores[:, i], present[:, i]) for i, tag in enumerate(tags) if present[:, i].any()}
    model.train()
    return {
        "mean_average_precision": float(np.mean(list(found.values()))),
        "chance": present[:, present.any(dim=0)].float().mean().item(),
        "num_images": len(tiles),
        **found,
    }


def average_precision(scores: torch.Tensor, present: torch.Tensor) -> float:
    """Compute the average precision: the mean precision at the rank of every true image.

    Args:
        scores: (images,).
        present: Boolean (images,), true for the images with the tag.
    """
    hits = present[scores.argsort(descending=True, stable=True)].float()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    return (precision * hits).sum().item() / max(1.0, hits.sum().item())


__all__ = ["ClipObjective", "average_precision", "build_clip", "dense_features", "measure_tags", "split_tags"]
