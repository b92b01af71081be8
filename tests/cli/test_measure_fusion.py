"""`examples/measure_fusion.py`: rules that fuse the students."""

import importlib.util
import sys

import pytest
import torch
from helpers import EXAMPLES, open_folder, save_checkpoint

from co2s_hf.inference.images import load_for_prediction
from co2s_hf.training.evaluation import confusion_matrices
from co2s_hf.utils.devices import make_accelerator


EQUAL = {"clip": 1.0, "dinov3": 1.0}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("measure_fusion", EXAMPLES / "measure_fusion.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rules_on_two_pixels(script):
    clip = torch.tensor([[0.9, 0.1], [0.4, 0.6]])
    dinov3 = torch.tensor([[0.2, 0.8], [0.7, 0.3]])
    logits = {"clip": clip.log(), "dinov3": dinov3.log()}
    torch.testing.assert_close(script.confidence(logits, EQUAL).softmax(1), torch.stack([clip[0], dinov3[1]]))
    torch.testing.assert_close(script.average(logits, EQUAL).softmax(1), (clip + dinov3) / 2)
    expected = (clip * dinov3) / (clip * dinov3).sum(1, keepdim=True)
    torch.testing.assert_close(script.product(logits, EQUAL).softmax(1), expected)
    # A very high temperature: CLIP no longer wins the first pixel.
    assert script.confidence(logits, {"clip": 9.0, "dinov3": 1.0}).argmax(1).tolist() == [1, 0]
    # CLIP's class 0 is right twice, its class 1 never; DINOv3's class 0 once of twice.
    labels = torch.tensor([0, 0])
    found = script.precisions(logits, labels)
    torch.testing.assert_close(found["clip"], torch.tensor([2 / 3, 1 / 3]))
    torch.testing.assert_close(found["dinov3"], torch.tensor([2 / 3, 1 / 3]))
    assert script.most_reliable(logits, found).argmax(1).tolist() == [0, 0]
    expected = (2 * clip[0] + dinov3[0]) / 3, (clip[1] + 2 * dinov3[1]) / 3
    torch.testing.assert_close(script.weighted_by_reliability(logits, found, EQUAL), torch.stack(expected))


def test_gates_learn_which_student_is_right(script):
    torch.manual_seed(0)
    labels = torch.randint(3, (300,))
    right, wrong = (torch.nn.functional.one_hot((labels + n) % 3, 3) * 2.0 for n in (0, 1))
    logits = {"clip": 2 * wrong, "dinov3": right}  # CLIP is more confident and always wrong
    for module in (script.Gate(3, 0, EQUAL), script.Gate(3, 16, EQUAL), script.Stack(3, EQUAL)):
        assert (module(logits).argmax(1) == labels).float().mean() < 0.5
        assert (script.fit(module, logits, labels)(logits).argmax(1) == labels).float().mean() > 0.99


def test_the_table_has_the_scores_of_an_evaluation(script, scenes_folder, tmp_path, monkeypatch, capsys):
    data = open_folder(scenes_folder)
    save_checkpoint(tmp_path / "model", crop_size=32, id2label=data.id2label, palette=None)
    words = ["--checkpoint", tmp_path / "model", "--data_dir", scenes_folder, "--num_views", 8, "--use_cpu"]
    monkeypatch.setattr(sys, "argv", ["measure_fusion.py", *map(str, words)])
    monkeypatch.setattr(script, "GATE_STEPS", 2)
    script.main()
    lines = capsys.readouterr().out.split("\n\n")[0].splitlines()  # the first table
    rows = {cells[1]: cells[2:-1] for cells in ([cell.strip() for cell in line.split("|")] for line in lines)}
    model, image_processor, _ = load_for_prediction(str(tmp_path / "model"))
    matrices = confusion_matrices(model, image_processor, data.validation, 32, make_accelerator(True))
    names = {"clip": "clip", "dinov3": "dinov3", "fused": "confidence, temperatures: none"}
    for name, row in names.items():
        matrix = matrices[name]
        assert rows[row][:2] == [f"{100 * matrix.mean_iou():.2f}", f"{100 * matrix.accuracy():.2f}"]
    assert float(rows["better student per pixel"][1]) > max(float(rows[name][1]) for name in ("clip", "dinov3"))
