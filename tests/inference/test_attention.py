import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import EXAMPLES, make_model, save_checkpoint
from pictures import color_runs, middle_row, read_picture
from PIL import Image

from co2s_hf.inference.attention import class_token_attention, draw_attention
from co2s_hf.utils.errors import UserValueError


@pytest.fixture
def eager():
    model = make_model()
    model.set_attn_implementation("eager")
    return model


def test_maps_are_the_attention_weights_of_the_class_token(eager, images):
    pixel_values = images[:1]  # 16x24 pixels
    backbone = eager.clip.encoder.vision_model
    embeddings = backbone.embeddings(eager.clip._prepare(pixel_values), interpolate_pos_encoding=True)
    layer = backbone.encoder.layers[0]
    attention, normed = layer.self_attn, layer.layer_norm1(backbone.pre_layrnorm(embeddings))
    query, key = (
        part(normed)[0].unflatten(-1, (4, 4)).transpose(0, 1) for part in (attention.q_proj, attention.k_proj)
    )
    weights = (query @ key.transpose(1, 2) / 2).softmax(dim=-1)  # heads of width 4
    found = class_token_attention(eager, pixel_values, "clip", [0])[0]
    assert found.shape == (4, 4, 6)  # patches of 4 px
    torch.testing.assert_close(found, weights[:, 0, 1:].reshape(4, 4, 6))


def test_maps_leave_out_the_class_token_and_the_registers(eager, images):
    found = class_token_attention(eager, images[:1], "dinov3", [0, 2, -1])
    assert [maps.shape for maps in found] == [(4, 2, 3)] * 3  # patches of 8 px
    assert torch.equal(found[1], found[2]) and not torch.equal(found[0], found[1])
    whole = eager(images[:1], output_attentions=True).dinov3_attentions[2]
    assert torch.equal(found[1].flatten(1), whole[0, :, 0, 3:])  # after the class token and two registers


def test_maps_cover_the_padded_image(eager):
    found = class_token_attention(eager, torch.randn(1, 3, 13, 21), "dinov3", [0])[0]
    assert found.shape == (4, 2, 3)


@pytest.mark.parametrize(
    ("student", "layers", "message"),
    [
        ("sam", [0], r"`student` is 'sam'; expected one of clip, dinov3"),
        ("clip", [3], r"there is no layer 3 in the clip backbone; expected 0 to 2"),
        ("clip", [0, -4], r"there is no layer -4 .*, or -3 to -1"),
    ],
)
def test_missing_students_and_layers_are_named(eager, images, student, layers, message):
    with pytest.raises(UserValueError, match=message):
        class_token_attention(eager, images[:1], student, layers)


def test_a_sheet_has_the_image_each_head_their_mean_and_their_maximum(tmp_path):
    """The weights are high in the first quarter of the image for one head, in the last for the other."""
    heads = np.zeros((2, 2, 2), dtype=np.float32)
    heads[0, 0, 0], heads[1, 1, 1] = 0.9, 0.3
    draw_attention(Image.new("RGB", (64, 64), (0, 255, 0)), {"clip": heads}, tmp_path / "sheet.png")
    sheet = read_picture(tmp_path / "sheet.png").astype(int)
    assert color_runs(sheet[middle_row(sheet, (0, 255, 0))], min_length=100)[0] == (0, 255, 0)
    rows = np.flatnonzero((sheet == (0, 255, 0)).all(axis=-1).any(axis=1))
    width = sheet.shape[1] / 5  # five panels
    levels = []  # brightness in the middle of the first and the last quarter of each map
    for panel in range(1, 5):
        centre = round((panel + 0.5) * width)
        quarter = (rows[-1] - rows[0]) // 4
        middle = (rows[0] + rows[-1]) // 2
        levels.append([sheet[middle + sign * quarter, centre + sign * quarter].sum() for sign in (-1, 1)])
    (first, second), mean, maximum = levels[:2], levels[2], levels[3]
    assert first[0] - first[1] > 200 and second[1] - second[0] > 200
    assert mean[0] - mean[1] > 100 and maximum[0] - maximum[1] > 100  # 0.9 is higher than 0.3 ...
    assert mean[1] - first[1] > 50 and maximum[1] - first[1] > 50  # ... which is higher than 0


def test_a_sheet_can_be_a_pdf(tmp_path):
    draw_attention(Image.new("RGB", (8, 8)), {"clip": np.eye(2)[None]}, tmp_path / "sheet", kind="pdf")
    assert (tmp_path / "sheet").read_bytes().startswith(b"%PDF")


def test_the_script_draws_a_sheet_and_reports_missing_layers(tmp_path):
    save_checkpoint(tmp_path / "model")
    Image.new("RGB", (70, 50), (10, 200, 30)).save(tmp_path / "a.png")
    script = EXAMPLES / "visualize_attention.py"

    def run(*words):
        command = [sys.executable, script, "--checkpoint", tmp_path / "model", *words]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=os.environ, cwd=tmp_path)

    done = run("--image", tmp_path / "a.png", "--layers", 0, -1, "--output", tmp_path / "sheet.png")
    assert done.returncode == 0, done.stderr[-2000:]
    is_image = (read_picture(tmp_path / "sheet.png") == (10, 200, 30)).all(axis=-1)
    shown = is_image.any(axis=1).astype(int)
    assert (np.diff(shown, prepend=0) == 1).sum() == 4  # four rows of panels, each starts with the image:
    assert not is_image[:, is_image.shape[1] // 7 :].any()  # the first of seven panels
    wrong = run("--image", tmp_path / "a.png", "--layers", 9)
    assert wrong.returncode == 1 and "there is no layer 9" in wrong.stderr and "Traceback" not in wrong.stderr
    assert not (tmp_path / "outputs" / "attention.png").exists()
