"""Attention maps of the towers, and the sheet."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model, save_checkpoint
from PIL import Image

from co2s_hf.attention import class_token_attention


@pytest.fixture
def eager():
    model = make_model()
    model.set_attn_implementation("eager")
    return model


def test_maps_are_the_class_tokens_row(eager, images):
    pixel_values = images[:1]  # 16x24 pixels
    tower = eager.clip.encoder.vision_model
    states = tower.pre_layrnorm(tower.embeddings(eager.clip._prepare(pixel_values), interpolate_pos_encoding=True))
    attention = tower.encoder.layers[0].self_attn
    normed = tower.encoder.layers[0].layer_norm1(states)
    query, key = (
        part(normed)[0].unflatten(-1, (4, 4)).transpose(0, 1) for part in (attention.q_proj, attention.k_proj)
    )
    weights = (query @ key.transpose(1, 2) / 2).softmax(dim=-1)  # heads of width 4
    found = class_token_attention(eager, pixel_values, "clip", [0])[0]
    assert found.shape == (4, 4, 6)  # patches of 4 px
    torch.testing.assert_close(found, weights[:, 0, 1:].reshape(4, 4, 6))


def test_registers_and_class_token_are_left_out(eager, images):
    found = class_token_attention(eager, images[:1], "dinov3", [0, 2, -1])
    assert [maps.shape for maps in found] == [(4, 2, 3)] * 3  # patches of 8 px
    assert torch.equal(found[1], found[2]) and not torch.equal(found[0], found[1])
    whole = eager(images[:1], output_attentions=True).dinov3_attentions[2]
    assert torch.equal(found[1].flatten(1), whole[0, :, 0, 3:])  # after the class token and two registers


def test_padded_images_have_a_patch_for_every_pixel(eager):
    found = class_token_attention(eager, torch.randn(1, 3, 13, 21), "dinov3", [0])[0]
    assert found.shape == (4, 2, 3)


@pytest.mark.parametrize(
    ("student", "layers", "message"),
    [("sam", [0], r"`student` is 'sam'"), ("clip", [3], r"layers 0 to 2; there is no layer 3"), ("clip", [-4], "-4")],
)
def test_what_is_not_there_is_named(eager, images, student, layers, message):
    with pytest.raises(ValueError, match=message):
        class_token_attention(eager, images[:1], student, layers)


def test_the_script_draws_a_sheet(tmp_path):
    save_checkpoint(tmp_path / "model")
    Image.fromarray((255 * np.random.default_rng(0).random((50, 70, 3))).astype(np.uint8)).save(tmp_path / "a.png")
    script = Path(__file__).parents[1] / "examples" / "visualize_attention.py"

    def run(*words):
        command = [sys.executable, script, "--checkpoint", tmp_path / "model", *words]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=os.environ, cwd=tmp_path)

    done = run("--image", tmp_path / "a.png", "--layers", 0, -1, "--output", tmp_path / "sheet.png")
    assert done.returncode == 0, done.stderr[-2000:]
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    # Seven panels a row (image, four heads, mean, maximum), four rows: all but margins and titles is drawn on.
    assert (sheet.min(axis=2) < 250).mean() > 0.5 and len(np.unique(sheet.reshape(-1, 3), axis=0)) > 1000
    wrong = run("--image", tmp_path / "a.png", "--layers", 9)
    assert wrong.returncode == 1 and "there is no layer 9" in wrong.stderr and "Traceback" not in wrong.stderr
    assert not (tmp_path / "outputs" / "attention.png").exists()
