"""The objectives of a DINOv3 backbone."""

import pytest
import torch
import torch.nn.functional as F
from transformers import DINOv3ViTConfig, DINOv3ViTModel
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from co2s_hf.training.pretraining.distillation import (
    DistillationObjective,
    FeatureHead,
    MaskedImageObjective,
    build_dinov3,
    changed_colors,
)
from co2s_hf.utils.errors import UserOSError


UNCHANGED = [1.0, 1.0, 1.0, 0.0, 0.0, 0.01]  # appearance that keeps all colours, without blur


@pytest.fixture
def model() -> DINOv3ViTModel:
    torch.manual_seed(0)
    config = DINOv3ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=8,
        num_register_tokens=3,
        pos_embed_rescale=None,
    )
    return DINOv3ViTModel(config)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "image": torch.randint(0, 256, (2, 3, 16, 16), generator=generator, dtype=torch.uint8),
        "appearance": torch.tensor([UNCHANGED, UNCHANGED]),
        "features": torch.randn(2, 5, 2, 2, generator=generator),
        "class_token": torch.randn(2, 5, generator=generator),
    }


def normalized(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (images.float() / 255 - mean) / std


def test_a_new_backbone_has_the_sizes_of_the_options(make_options, tmp_path):
    model = build_dinov3(make_options("masked", tmp_path, num_hidden_layers=3))
    config = model.config
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (16, 64, 3)
    assert (config.num_attention_heads, config.patch_size, config.num_register_tokens) == (2, 8, 4)
    assert config.pos_embed_rescale is None and model.training
    model.save_pretrained(tmp_path / "saved")
    sizes = {"hidden_size": 160, "num_hidden_layers": 6, "num_attention_heads": 5}  # the defaults
    loaded = build_dinov3(make_options("masked", tmp_path, init=str(tmp_path / "saved"), **sizes))
    assert loaded.training
    for name, weights in loaded.state_dict().items():
        assert torch.equal(weights, model.state_dict()[name])
    with pytest.raises(UserOSError, match=r"`init` .*missing cannot be loaded"):
        build_dinov3(make_options("masked", tmp_path, init=str(tmp_path / "missing"), **sizes))


def test_the_distance_to_the_teacher_is_cosine_and_smooth_l1():
    head = FeatureHead(2, mean=torch.tensor([1.0, -1.0]), std=torch.tensor([2.0, 0.5]))
    with torch.no_grad():
        head.projection.weight.copy_(torch.eye(2))
        head.projection.bias.zero_()
    target = torch.tensor([[1.0 + 2 * 3, -1.0 + 0.5 * 4]])  # standardised: (3, 4)
    assert head(torch.tensor([[3.0, 4.0]]), target).item() == pytest.approx(0, abs=1e-6)
    assert head(torch.tensor([[6.0, 8.0]]), target).item() == pytest.approx(((3 - 0.5) + (4 - 0.5)) / 2)
    assert head(torch.tensor([[4.0, -3.0]]), target).item() == pytest.approx(1 + ((1 - 0.5) + (7 - 0.5)) / 2)
    assert head(torch.tensor([[3.5, 4.0]]), target).item() == pytest.approx(
        1 - (3 * 3.5 + 16) / (5 * (3.5**2 + 16) ** 0.5) + 0.5 * 0.5**2 / 2
    )


def test_distillation_compares_patches_and_class_token(model, batch):
    mean, std = torch.linspace(-1, 1, 5), torch.linspace(0.5, 2, 5)
    objective = DistillationObjective(model, mean, std)
    losses = objective(batch)
    tokens = model(normalized(batch["image"])).last_hidden_state
    patches = tokens[:, 4:].view(2, 2, 2, 16)  # after the class token and three registers, row by row
    loss_patches = objective.patch_head(patches, batch["features"].permute(0, 2, 3, 1))
    loss_class = objective.class_head(tokens[:, 0], batch["class_token"])
    torch.testing.assert_close(losses["loss_patches"], loss_patches.detach())
    torch.testing.assert_close(losses["loss_class_token"], loss_class.detach())
    torch.testing.assert_close(losses["loss"], loss_patches + 0.2 * loss_class)
    losses["loss"].backward()
    assert model.model.layer[0].mlp.up_proj.weight.grad.abs().max() > 0


def test_masked_pixels_are_predicted(model, batch, monkeypatch):
    objective = MaskedImageObjective(model)
    mask = torch.tensor([[True, False, False, True], [False, True, False, False]])
    monkeypatch.setattr(objective, "_draw_mask", lambda batch_size, grid: mask)
    (loss,) = objective(batch).values()
    pixels = normalized(batch["image"])
    predicted = objective.head(model(pixels, bool_masked_pos=mask).last_hidden_state[:, 4:])
    errors = []
    for image, patch in mask.nonzero().tolist():
        row, column = divmod(patch, 2)
        true = pixels[image, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        errors.append((predicted[image, patch] - true.flatten()).abs().mean())
    torch.testing.assert_close(loss, torch.stack(errors).mean())
    # The masked pixels are hidden: they change the target, not the prediction.
    changed = batch | {"image": batch["image"].clone()}
    changed["image"][0, :, :8, :8] = 255 - changed["image"][0, :, :8, :8]
    again = objective.head(model(normalized(changed["image"]), bool_masked_pos=mask).last_hidden_state[:, 4:])
    torch.testing.assert_close(again, predicted)


def test_the_mask_covers_three_fifths_in_cells_of_32_px(model):
    objective = MaskedImageObjective(model)
    torch.manual_seed(0)
    masks = objective._draw_mask(3, grid=20).view(3, 20, 20)  # 160 px: 5 x 5 cells of 4 x 4 patches
    assert masks.float().mean(dim=(1, 2)).tolist() == pytest.approx([0.6, 0.6, 0.6])
    cells = F.avg_pool2d(masks[:, None].float(), 4)
    assert set(cells.flatten().tolist()) == {0.0, 1.0}
    assert not torch.equal(masks[0], masks[1])
    assert objective._draw_mask(2, grid=6).shape == (2, 36)  # the outer cells are cut


def test_colours_change_and_the_geometry_does_not(batch):
    torch.testing.assert_close(changed_colors(batch), batch["image"].float() / 255, atol=1e-5, rtol=0)
    brighter = batch | {"appearance": torch.tensor([[1.5, 1.0, 1.0, 0.0, 0.0, 0.01], UNCHANGED])}
    changed = changed_colors(brighter)
    torch.testing.assert_close(changed[0], (1.5 * batch["image"][0].float() / 255).clamp(max=1), atol=1e-5, rtol=0)
    assert changed.max() <= 1
