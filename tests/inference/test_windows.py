import pytest
import torch
from helpers import Pixelwise, load_parity, make_model
from pretended_devices import PretendedDevices, place

from co2s_hf import Co2SConfig, Co2SForSemanticSegmentation
from co2s_hf.inference.images import fused_logits
from co2s_hf.inference.windows import (
    Window,
    WindowGrid,
    joined_pieces,
    precision,
    sliding_window_logits,
    window_starts,
)
from co2s_hf.utils.errors import UserValueError


@pytest.mark.parametrize("student", ["clip", "dinov3"])
def test_logits_are_those_of_the_authors_code(student, converted_folder):
    fixture = load_parity(f"sliding_window_{student}")
    model = Co2SForSemanticSegmentation.from_pretrained(converted_folder)
    logits = sliding_window_logits(model, fixture["image"], crop_size=64, students=(student,))[student]
    torch.testing.assert_close(logits, fixture["logits"], atol=1e-4, rtol=0)
    highest, second = fixture["logits"].topk(2, dim=1).values.unbind(dim=1)
    clear = highest - second > 2e-4  # twice the tolerance; rounding differs between processors
    assert (~clear).sum() < 20 and torch.equal(logits.argmax(1)[clear], fixture["prediction"][clear])


def test_windows_cover_each_side_and_end_at_its_end():
    assert window_starts(150, 64) == [0, 53, 86]
    assert window_starts(64, 64) == [0] and window_starts(10, 64) == [0]
    assert window_starts(65, 64) == [0, 1]
    assert window_starts(5, 1) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("size", "crop"), [((31, 45), 16), ((9, 40), 16), ((8, 8), 16), ((17, 16), 16)])
def test_joined_windows_equal_the_prediction_of_the_whole_image(size, crop):
    image = torch.randn(1, 3, *size)
    for windows_per_batch, overlap_px, blend in ((1, None, "average"), (5, 0, "average"), (3, 11, "smooth")):
        logits = sliding_window_logits(
            Pixelwise(), image, crop, windows_per_batch=windows_per_batch, overlap_px=overlap_px, blend=blend
        )
        torch.testing.assert_close(logits["clip"], image)
        torch.testing.assert_close(logits["dinov3"], 2 * image)


def test_windows_of_students_on_two_devices_are_joined():
    image = torch.randn(1, 3, 24, 40)
    expected = sliding_window_logits(make_model(), image, 16, flip=True)
    with PretendedDevices():
        model = place(make_model(), {"clip": "cuda:0", "dinov3": "cuda:1"})
        found = sliding_window_logits(model, image, 16, flip=True)
        for name, value in expected.items():
            assert found[name].device == torch.device("cuda:0") and torch.equal(found[name], value)


@pytest.mark.parametrize(
    ("dtype", "autocast", "expected"),
    [
        (torch.float32, None, "torch.float32"),
        (torch.bfloat16, None, "torch.bfloat16"),
        (torch.float32, torch.bfloat16, "torch.float32 with autocast to torch.bfloat16"),
    ],
)
def test_the_precision_is_that_of_the_weights_and_of_autocast(dtype, autocast, expected):
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        assert precision(make_model().to(dtype)) == expected


def test_values_out_of_range_are_refused():
    with pytest.raises(UserValueError, match=r"`overlap_px` is 16; expected 0 to 15, less than the side .* 16 pixels"):
        WindowGrid(40, 40, 16, overlap_px=16)
    with pytest.raises(UserValueError, match="`overlap_px` is -1; expected 0 to 15"):
        WindowGrid(40, 40, 16, overlap_px=-1)
    with pytest.raises(UserValueError, match="`crop_size` is 0; expected at least 1 pixel"):
        WindowGrid(40, 40, 0)
    with pytest.raises(UserValueError, match="`blend` is 'soft'; expected smooth or average"):
        WindowGrid(40, 40, 16, blend="soft")
    with pytest.raises(ValueError, match="`pixel_values` has 2 images; expected 1"):
        sliding_window_logits(Pixelwise(), torch.zeros(2, 3, 20, 28), crop_size=16)


def smooth_noise(*size) -> torch.Tensor:
    """Return an image (1, 3, height, width) of random blobs of a few pixels."""
    coarse = torch.randn(1, 3, size[0] // 4, size[1] // 4, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")


@torch.no_grad()
def test_smooth_blending_leaves_no_visible_seams(model):
    """At the border of a window, the joined probabilities change as much as those of the window that continues.

    The measure is the change from pixel to pixel. Its ratio is 1 if there is no seam.
    """
    image, crop, overlap = smooth_noise(240, 240), 32, 6

    def change_at_borders(blend):
        grid = WindowGrid(240, 240, crop, overlap, blend)
        logits = sliding_window_logits(model, image, crop, overlap_px=overlap, blend=blend)
        change = fused_logits(logits, Co2SConfig(), (240, 240)).softmax(dim=0).diff(dim=2).abs().mean(dim=0)
        joined, own = [], []
        for rows, columns in grid.windows():
            alone = model(image[..., rows, columns]).logits[0].softmax(dim=0).diff(dim=2).abs().mean(dim=0)
            inner = slice(rows.start + overlap, rows.stop - overlap)
            for column in (overlap - 1, crop - overlap - 1):  # borders of its neighbours
                if grid.lefts[0] < columns.start < grid.lefts[-2]:
                    joined.append(change[inner, columns.start + column])
                    own.append(alone[overlap:-overlap, column])
        return float(torch.cat(joined).mean() / torch.cat(own).mean())

    assert change_at_borders("smooth") == pytest.approx(1, abs=0.05)
    assert change_at_borders("average") != pytest.approx(1, abs=0.1)  # the measure does detect seams


@pytest.mark.parametrize(("width", "windows_per_batch", "overlap_px"), [(90, 2, None), (20, 7, 9)])
def test_restarted_rows_are_the_same_bit_by_bit(model, width, windows_per_batch, overlap_px):
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


def test_pixels_without_data_have_no_weight_and_windows_without_data_are_not_predicted():
    grid = WindowGrid(20, 40, 16, overlap_px=4, blend="smooth")
    image, valid, model = torch.randn(3, 20, 40), torch.ones(20, 40, dtype=torch.bool), Pixelwise()
    valid[:, 25:] = False
    windows = (
        Window(image[:, rows, columns], valid[rows, columns]) if valid[rows, columns].any() else None
        for rows, columns in grid.windows()
    )
    for piece in joined_pieces(model, grid, windows, students=("clip",)):
        assert torch.equal(piece.weights > 0, valid[piece.rows, piece.columns])
        found = (piece.sums / piece.weights).nan_to_num(0)
        torch.testing.assert_close(found, image[:, piece.rows, piece.columns] * valid[piece.rows, piece.columns])
    assert model.num_windows == 6  # two rows of four windows, the last of each without data
