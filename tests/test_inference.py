import pytest
import torch
from conftest import load_parity, make_model

from co2s_hf import Co2SForSemanticSegmentation
from co2s_hf.inference import predict_logits, sliding_window_logits, window_starts
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


class Pixelwise(torch.nn.Module):
    """A stand-in whose logits depend on each pixel alone, so that windows must not show."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, config):
        super().__init__()
        self.config = config

    def student_logits(self, pixel_values, students):
        return {name: (n + 1) * pixel_values for n, name in enumerate(students)}


@pytest.mark.parametrize(("size", "crop"), [((31, 45), 16), ((9, 40), 16), ((8, 8), 16), ((17, 16), 16)])
def test_windows_leave_no_seams(size, crop):
    image = torch.randn(1, 3, *size)
    for windows_per_batch in (1, 5):
        logits = sliding_window_logits(
            Pixelwise(make_model().config), image, crop, windows_per_batch=windows_per_batch
        )
        torch.testing.assert_close(logits["clip"], image)
        torch.testing.assert_close(logits["dinov3"], 2 * image)


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
