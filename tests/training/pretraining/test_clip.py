"""Model, losses and measurement of the image-text pretraining."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import make_config
from transformers import CLIPModel

from co2s_hf.model.modeling_co2s import Co2SClipBackbone
from co2s_hf.training.pretraining.clip import (
    ClipObjective,
    average_precision,
    build_clip,
    dense_features,
    encode_texts,
    measure_tags,
    presence,
    split_tags,
)
from co2s_hf.training.pretraining.labels import ImageLabels, read_image_labels
from co2s_hf.training.pretraining.tiles import Tile, list_tiles
from co2s_hf.utils.errors import UserOSError


TILES = [Tile(f"/images/{name}.png", (0, 0, 32, 32)) for name in "abcd"]
LABELS = ImageLabels(
    {Path("/images/a.png"): ("sea",), Path("/images/b.png"): ("cars", "sea"), Path("/images/c.png"): ("sea",)}, True
)
UNCHANGED = [1.0, 1.0, 1.0, 0.0, 0.0, 0.01]


@pytest.fixture
def clip(make_options, tmp_path):
    """A new CLIP model with the words of LABELS, and its tokenizer."""
    torch.manual_seed(0)
    return build_clip(make_options("clip", tmp_path), LABELS)


def test_a_new_model_has_the_sizes_of_the_options(clip):
    model, tokenizer = clip
    vision, text = model.config.vision_config, model.config.text_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (16, 2, 2)
    assert (vision.patch_size, vision.image_size, vision.projection_dim) == (8, 16, 8)
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads) == (32, 1, 1)
    assert text.vocab_size == len(tokenizer) == 4 + len({"a", "photo", "of", "car", "cars", "sea"})
    assert (text.pad_token_id, text.bos_token_id, text.eos_token_id) == (0, 2, 3)


def test_a_model_is_continued_with_its_tokenizer(clip, make_options, tmp_path):
    model, tokenizer = clip
    for folder in ("whole", "no_tokenizer"):
        model.save_pretrained(tmp_path / folder)
    tokenizer.save_pretrained(tmp_path / "whole")
    sizes = {"hidden_size": 160, "num_hidden_layers": 6, "num_attention_heads": 5}
    sizes |= {"projection_dim": 128, "text_hidden_size": 128, "text_num_hidden_layers": 3}  # the defaults
    options = make_options("clip", tmp_path, init=str(tmp_path / "whole"), **sizes)
    loaded, words = build_clip(options, ImageLabels({}, True))
    assert loaded.training and words.get_vocab() == tokenizer.get_vocab()
    assert torch.equal(loaded.visual_projection.weight, model.visual_projection.weight)
    options.init = str(tmp_path / "no_tokenizer")
    with pytest.raises(UserOSError, match="no_tokenizer"):
        build_clip(options, LABELS)


def test_dense_features_are_those_that_guide_co2s(make_options, tmp_path):
    model, _ = build_clip(make_options("clip", tmp_path, num_hidden_layers=3), LABELS)
    vision = model.config.vision_config
    backbone = Co2SClipBackbone(make_config(clip_config=vision.to_dict(), clip_feature_layers=(0, 1, 2)))
    backbone.vision_model.load_state_dict(model.vision_model.state_dict())
    backbone.visual_projection.load_state_dict(model.visual_projection.state_dict())
    pixels = torch.randn(2, 3, 16, 32)
    whole, places = dense_features(model.eval(), pixels)
    embeddings = F.normalize(model.visual_projection(places), dim=-1)
    expected = backbone.eval().features(backbone.tapped_states(pixels), (2, 4))[-1]  # (batch, width, rows, columns)
    torch.testing.assert_close(embeddings, expected.flatten(2).transpose(1, 2))
    pooled = model.vision_model(pixels, interpolate_pos_encoding=True).pooler_output
    torch.testing.assert_close(whole, pooled)


def test_texts_are_encoded_in_the_prompt(clip):
    model, tokenizer = clip
    found = encode_texts(model.eval(), tokenizer, ["sea", "cars"])
    tokens = tokenizer(["a photo of a sea", "a photo of a cars"], return_tensors="pt", padding=True)
    expected = model.get_text_features(**tokens)
    expected = getattr(expected, "pooler_output", expected)
    torch.testing.assert_close(found, F.normalize(expected, dim=-1))


def test_presence_is_the_mean_of_the_best_sixteenth():
    similarity = torch.zeros(1, 32, 2)
    similarity[0, [3, 17, 30], 0] = torch.tensor([0.5, 0.9, 0.4])
    similarity[0, 5, 1] = -1
    assert presence(similarity)[0].tolist() == pytest.approx([(0.9 + 0.5) / 2, 0])
    assert presence(similarity[:, 15:19])[0].tolist() == pytest.approx([0.9, 0])  # at least one place


def test_places_compete_among_the_tags_of_their_image(clip):
    objective = ClipObjective(*clip, LABELS, TILES)
    scale = 10.0
    similarity = torch.tensor([[[0.3, 0.1, 0.9], [-0.2, 0.4, 0.9], [0.0, 0.0, 0.9]], [[0.5, 0.6, 0.7]] * 3])
    present = torch.tensor([[True, True, False], [False, True, False]])
    # The second image has one tag, which has no rival. The third tag of the first image is absent.
    first, second = (1 / (1 + math.exp(-scale * margin)) for margin in (0.3 - 0.1, 0.4 + 0.2))
    expected = -(math.log(first) + math.log(second)) / 2
    assert objective._places(similarity, present).item() == pytest.approx(expected, rel=1e-5)
    assert objective._places(similarity[1:], present[1:]).item() == 0


def test_images_with_the_same_texts_are_a_match(clip):
    objective = ClipObjective(*clip, LABELS, TILES)
    with torch.no_grad():
        objective.model.logit_scale.fill_(math.log(2.0))
    images = torch.eye(3)
    captions = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 0]])  # the first and third image have the same texts
    present = torch.tensor([[True, False], [True, True], [True, False]])
    logits = 2 * images @ captions.T
    target = torch.tensor([[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]])
    rows = -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()
    columns = -(target * logits.T.log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(objective._contrast(images, captions, present), (rows + columns) / 2)


def batch_of(tiles: list[int], width: int = 16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "image": torch.randint(0, 256, (len(tiles), 3, 16, 16), generator=generator, dtype=torch.uint8),
        "appearance": torch.tensor([UNCHANGED] * len(tiles)),
        "tile": torch.tensor(tiles),
        "features": torch.randn(len(tiles), width, 2, 2, generator=generator),
    }


def test_the_loss_is_the_weighted_sum_of_its_parts(clip):
    objective = ClipObjective(*clip, LABELS, TILES, torch.zeros(16), torch.ones(16))
    losses = objective(batch_of([0, 1, 2, 3]))  # the last image has no texts
    assert list(losses) == ["loss", "loss_teacher", "loss_presence", "loss_places", "loss_contrast"]
    total = losses["loss_teacher"] + losses["loss_presence"] + 0.25 * losses["loss_places"]
    torch.testing.assert_close(losses["loss"], total + 0.25 * losses["loss_contrast"])
    losses["loss"].backward()
    for part in (objective.model.visual_projection, objective.model.text_projection, objective.head.projection):
        assert part.weight.grad.abs().max() > 0
    assert objective.scale.grad.abs() > 0 and objective.bias.grad.abs() > 0
    # Without texts, only the teacher is left.
    alone = objective(batch_of([3, 3]))
    assert list(alone) == ["loss", "loss_teacher"] and alone["loss"].item() == alone["loss_teacher"].item()


def test_presence_compares_each_image_with_all_tags(clip):
    objective = ClipObjective(*clip, LABELS, TILES)
    batch = batch_of([1, 0])
    torch.manual_seed(2)
    losses = objective(batch)
    torch.manual_seed(2)
    forms = ["car" if torch.rand(()) < 0.5 else "cars", "sea"]
    _, places = dense_features(objective.model, _normalized(batch["image"]))
    encoded = encode_texts(objective.model, objective.tokenizer, forms)
    similarity = F.normalize(objective.model.visual_projection(places), dim=-1) @ encoded.T
    log_odds = 10 * similarity.max(dim=1).values - 4  # one of four places is the best sixteenth
    expected = F.binary_cross_entropy_with_logits(log_odds, torch.tensor([[1.0, 1], [0, 1]]))
    torch.testing.assert_close(losses["loss_presence"], expected.detach())


def _normalized(images: torch.Tensor) -> torch.Tensor:
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # of CLIP
    return (images.float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def test_many_captions_are_compared_within_the_batch(clip):
    texts = {Path(f"/images/{name}.png"): (f"caption {name}",) for name in "abcd"}
    texts |= {Path(f"/other/{number}.png"): (f"text {number}",) for number in range(300)}
    objective = ClipObjective(*clip, ImageLabels(texts, False), TILES)
    assert objective._candidates([("caption b",), ("caption a",), ("caption b",)]) == ["caption a", "caption b"]
    assert objective._candidates([]) == []
    few = ClipObjective(*clip, LABELS, TILES)
    assert few._candidates([("sea",)]) == ["cars", "sea"]
    losses = objective(batch_of([0, 1, 1]))
    assert losses["loss_places"].item() == 0 and torch.isfinite(losses["loss"])


def test_held_out_images_depend_on_their_names_alone():
    tiles = [Tile(f"/somewhere/{number:03}.png", (0, 0, 9, 9)) for number in range(400) for _ in range(2)]
    texts = {Path(tile.path): ("sea",) for tile in tiles[:600]}
    kept, held_out = split_tags(tiles, ImageLabels(texts, True), 0.1)
    names = sorted({Path(tile.path).name for tile in held_out})
    assert names[:4] == ["001.png", "013.png", "016.png", "018.png"] and len(held_out) == 2 * len(names)
    assert 20 < len(names) < 40 and len(kept) + len(held_out) == 800
    assert max(names) < "300.png"  # images without tags are never held out
    moved = [Tile(f"/elsewhere/{Path(tile.path).name}", tile.box) for tile in reversed(tiles)]
    again = split_tags(moved, ImageLabels({Path(tile.path): ("sea",) for tile in moved[200:]}, True), 0.1)[1]
    assert sorted({Path(tile.path).name for tile in again}) == names
    more = {Path(tile.path).name for tile in split_tags(tiles, ImageLabels(texts, True), 0.3)[1]}
    assert more > set(names)
    assert split_tags(tiles, ImageLabels(texts, True), 0.0)[1] == []
    assert split_tags(tiles, ImageLabels(texts, False), 0.5)[1] == []  # captions are not measured


@pytest.mark.parametrize(
    ("scores", "present", "expected"),
    [
        ([0.9, 0.8, 0.1], [1, 1, 0], 1.0),
        ([0.9, 0.8, 0.1], [0, 1, 1], (1 / 2 + 2 / 3) / 2),
        ([0.1, 0.2, 0.3, 0.4], [1, 0, 0, 0], 1 / 4),
        ([0.5, 0.5, 0.5], [0, 1, 0], 1 / 2),  # equal scores keep their order
        ([0.5, 0.4], [0, 0], 0.0),
    ],
)
def test_average_precision(scores, present, expected):
    assert average_precision(torch.tensor(scores), torch.tensor(present).bool()) == pytest.approx(expected)


def test_tags_are_measured_on_whole_tiles(clip, scenes_folder, labels_file):
    model, tokenizer = clip
    labels = read_image_labels(labels_file)
    tiles = [tile for tile in list_tiles([str(scenes_folder / "images")], None, 48) if Path(tile.path) in labels.texts]
    found = measure_tags(model, tokenizer, tiles[:5], labels, 48)
    tags = ["cars", "field", "mobile homes", "sea", "trees"]
    assert list(found) == ["mean_average_precision", "chance", "num_images", *tags]
    # Tags of the five images: field trees, sea, mobile homes cars trees, field trees, sea.
    assert found["num_images"] == 5
    assert found["chance"] == pytest.approx((1 + 2 + 1 + 2 + 3) / 25)
    assert found["mean_average_precision"] == pytest.approx(sum(found[tag] for tag in tags) / 5)
    encoded = encode_texts(model, tokenizer, ["sea"])[0]
    scores = []
    for tile in tiles[:5]:
        pixels = _normalized(torch.tensor(list(tile.read(48).getdata())).view(48, 48, 3).permute(2, 0, 1)[None])
        embeddings = F.normalize(model.eval().visual_projection(dense_features(model, pixels)[1][0]), dim=-1)
        scores.append((embeddings @ encoded).topk(2).values.mean())  # of 36 places
    expected = average_precision(torch.stack(scores), torch.tensor([0, 1, 0, 0, 1]).bool())
    assert found["sea"] == pytest.approx(expected)
    assert isinstance(model, CLIPModel)
