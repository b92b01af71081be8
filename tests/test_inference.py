import numpy as np
import pytest
import torch
from conftest import Pixelwise, load_parity
from PIL import Image

from co2s_hf import Co2SForSemanticSegmentation, Co2SImageProcessor
from co2s_hf.inference import (
    Window,
    WindowGrid,
    fused_logits,
    joined_pieces,
    predict_logits,
    segment_image,
    sliding_window_logits,
    window_starts,
)
from co2s_hf.modeling_co2s import fuse_logits


@pytest.mark.parametrize("student", ["clip", "dinov3"])
def test_sliding_windows_are_the_authors(student, converted_folder):
    fixture = load_parity(f"sliding_window_{student}")
    model = Co2SForSemanticSegmentation.from_pretrained(converted_folder)
    logits = sliding_window_logits(model, fixture["image"], crop_size=64, students=(student,))[student]
    torch.testing.assert_close(logits, fixture["logits"], atol=1e-4, rtol=0)
    assert torch.equal(logits.argmax(1), fixture["prediction"])


def test_windows_cover_each_side_and_end_inside():
    assert window_starts(150, 64) == [0, 53, 86]
    assert window_starts(64, 64) == [0] and window_starts(10, 64) == [0]
    assert window_starts(65, 64) == [0, 1]
    assert window_starts(5, 1) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("size", "crop"), [((31, 45), 16), ((9, 40), 16), ((8, 8), 16), ((17, 16), 16)])
def test_windows_leave_no_seams(size, crop):
    image = torch.randn(1, 3, *size)
    for windows_per_batch, overlap_px, blend in ((1, None, "average"), (5, 0, "average"), (3, 11, "smooth")):
        logits = sliding_window_logits(
            Pixelwise(), image, crop, windows_per_batch=windows_per_batch, overlap_px=overlap_px, blend=blend
        )
        torch.testing.assert_close(logits["clip"], image)
        torch.testing.assert_close(logits["dinov3"], 2 * image)


def test_unknown_blends_and_overlaps_without_a_step_are_refused():
    with pytest.raises(ValueError, match="Windows of 16 px that overlap by 16 px leave no step"):
        WindowGrid(40, 40, 16, overlap_px=16)
    with pytest.raises(ValueError, match="`blend` is 'soft'; choose one of smooth, average"):
        WindowGrid(40, 40, 16, blend="soft")


def smooth_noise(*size) -> torch.Tensor:
    """An image of blobs of a few pixels, (1, 3, height, width)."""
    coarse = torch.randn(1, 3, size[0] // 4, size[1] // 4, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")


@torch.no_grad()
def test_blended_seams_do_not_show(model):
    """Where a window ends within another, probabilities change from pixel to pixel as that other window says."""
    image, crop, overlap = smooth_noise(240, 240), 32, 6

    def change_at_borders(blend):
        grid = WindowGrid(240, 240, crop, overlap, blend)
        logits = sliding_window_logits(model, image, crop, overlap_px=overlap, blend=blend)
        change = fused_logits(logits, "confidence", (240, 240)).softmax(dim=0).diff(dim=2).abs().mean(dim=0)
        joined, own = [], []
        for rows, columns in grid.windows():
            alone = model(image[..., rows, columns]).logits[0].softmax(dim=0).diff(dim=2).abs().mean(dim=0)
            inner = slice(rows.start + overlap, rows.stop - overlap)
            for column in (overlap - 1, crop - overlap - 1):  # where its neighbours end
                if grid.lefts[0] < columns.start < grid.lefts[-2]:
                    joined.append(change[inner, columns.start + column])
                    own.append(alone[overlap:-overlap, column])
        return float(torch.cat(joined).mean() / torch.cat(own).mean())

    assert change_at_borders("smooth") == pytest.approx(1, abs=0.05)
    assert change_at_borders("average") != pytest.approx(1, abs=0.1)  # so the measure tells


@pytest.mark.parametrize(("width", "windows_per_batch", "overlap_px"), [(90, 2, None), (20, 7, 9)])
def test_rows_repeat_bit_by_bit_from_where_they_are_restarted(model, width, windows_per_batch, overlap_px):
    image = smooth_noise(100, width)
    grid = WindowGrid(100, width, 16, overlap_px, "smooth")

    def pieces(first_row):
        windows = (Window(image[0, :, rows, columns]) for rows, columns in grid.windows(first_row))
        return list(joined_pieces(model, grid, windows, windows_per_batch=windows_per_batch, first_row=first_row))

    whole = pieces(0)
    for row in (1, 4, len(grid.tops) - 1):
        first = grid.restart_row(row, windows_per_batch)
        assert first % grid.rows_per_batch(windows_per_batch) == 0 and (row - first) * (16 - 9) < 16 + 7 * 7
        again = [piece for piece in pieces(first) if piece.row >= row]
        expected = [piece for piece in whole if piece.row >= row]
        assert [(piece.rows, piece.columns) for piece in again] == [(p.rows, p.columns) for p in expected]
        assert all(torch.equal(a.sums, b.sums) and torch.equal(a.weights, b.weights) for a, b in zip(again, expected))


def test_pixels_that_do_not_count_and_windows_of_nothing():
    grid = WindowGrid(20, 40, 16, overlap_px=4, blend="smooth")
    image, seen, counting = torch.randn(3, 20, 40), torch.ones(20, 40, dtype=torch.bool), Pixelwise()
    seen[:, 25:] = False
    windows = (
        Window(image[:, rows, columns], seen[rows, columns]) if seen[rows, columns].any() else None
        for rows, columns in grid.windows()
    )
    for piece in joined_pieces(counting, grid, windows, students=("clip",)):
        assert torch.equal(piece.weights > 0, seen[piece.rows, piece.columns])
        found = (piece.sums / piece.weights).nan_to_num(0)
        torch.testing.assert_close(found, image[:, piece.rows, piece.columns] * seen[piece.rows, piece.columns])
    assert counting.num_windows == 6  # two rows of four windows, the last of which show nothing


def test_segment_image_is_the_fused_prediction(model):
    image_processor = Co2SImageProcessor.from_model_config(model.config)
    image = np.random.default_rng(0).integers(0, 256, (30, 41, 3), dtype=np.uint8)
    found = segment_image(model, image_processor, Image.fromarray(image), crop_size=16)
    pixel_values = image_processor(image, return_tensors="pt")["pixel_values"]
    logits = sliding_window_logits(model, pixel_values, 16, blend="smooth")
    expected = fuse_logits(logits["clip"], logits["dinov3"])[0].softmax(dim=0).numpy()
    assert np.array_equal(found.probabilities, expected) and np.array_equal(found.labels, expected.argmax(axis=0))
    assert np.array_equal(found.confidence, expected.max(axis=0)) and found.labels.dtype == np.uint8
    halved = Co2SImageProcessor.from_model_config(model.config, do_resize=True, size={"height": 15, "width": 20})
    assert segment_image(model, halved, image, crop_size=16).labels.shape == (30, 41)
    thin = image[:3]  # three rows are no three bands
    assert np.array_equal(
        segment_image(model, image_processor, thin, crop_size=16).probabilities,
        segment_image(model, image_processor, Image.fromarray(thin), crop_size=16).probabilities,
    )
    with pytest.raises(ValueError, match="on which crops it was trained"):
        segment_image(model, image_processor, image)
    with pytest.raises(ValueError, match=r"shape \(3, 30, 41\); expected \(height, width, 3\)"):
        segment_image(model, image_processor, np.moveaxis(image, -1, 0), crop_size=16)


def test_logits_of_students_and_fusion(model):
    image = torch.randn(1, 3, 20, 28)
    found = predict_logits(model, image, crop_size=16, size=(20, 28))
    windows = sliding_window_logits(model, image, crop_size=16)
    assert torch.equal(found["clip"], windows["clip"][0])
    assert torch.equal(found["fused"], fuse_logits(windows["clip"], windows["dinov3"])[0])
    # The corners of a resized map are the corners of the map.
    small = predict_logits(model, image, crop_size=16, size=(10, 14))["clip"]
    torch.testing.assert_close(small[:, [0, 0, -1], [0, -1, -1]], windows["clip"][0][:, [0, 0, -1], [0, -1, -1]])
    with pytest.raises(ValueError, match="holds 2 images"):
        sliding_window_logits(model, image.repeat(2, 1, 1, 1), crop_size=16)


def test_flipping_averages_over_both_directions(model):
    image = torch.randn(1, 3, 16, 16)
    plain, mirrored = (model.student_logits(x)["clip"].detach() for x in (image, image.flip(-1)))
    found = predict_logits(model, image, crop_size=16, size=(16, 16), flip=True)
    torch.testing.assert_close(found["clip"], ((plain + mirrored.flip(-1)) / 2)[0])


def test_one_students_fusion_computes_that_student_alone(model):
    image = torch.randn(1, 3, 16, 16)
    both = predict_logits(model, image, crop_size=16, size=(16, 16))
    model.config.fusion = "dinov3"
    alone = predict_logits(model, image, crop_size=16, size=(16, 16))
    assert list(alone) == ["dinov3", "fused"] and torch.equal(alone["fused"], both["dinov3"])
