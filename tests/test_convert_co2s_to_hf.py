import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import make_config, make_model

from co2s_hf import Co2SForSemanticSegmentation, Co2SImageProcessor
from co2s_hf.convert_co2s_to_hf import CHECKPOINT_NAMES, convert, convert_to_original, load_original, main, verify


def flags(sizes):
    return [text for name, value in sizes.items() for text in (f"--{name}", str(value))]


def test_command_line_converts_and_verifies(original_checkpoints, parity_sizes, tmp_path, capsys):
    paths = ["--clip_checkpoint", str(original_checkpoints["clip"])]
    paths += ["--dinov3_checkpoint", str(original_checkpoints["dinov3"])]
    output = tmp_path / "model"
    main([*paths, "--dataset", "whdld", "--output_dir", str(output), "--verify", *flags(parity_sizes)])
    assert "Verified: 465 tensors reload bit-equal" in capsys.readouterr().out
    config = Co2SForSemanticSegmentation.from_pretrained(output).config
    assert list(config.id2label.values()) == ["building", "road", "pavement", "vegetation", "bare soil", "water"]
    assert config.class_concepts["water"][0] == "water" and len(config.class_concepts["water"]) == 7
    assert config.palette[1] == [255, 255, 0]
    assert config.clip_config.hidden_act == "gelu" and config.clip_image_mean == config.image_mean
    assert Co2SImageProcessor.from_pretrained(output).do_resize is False


class HubHandler(BaseHTTPRequestHandler):
    """Serves `files`, by repository path, as the Hub serves a repository's main branch."""

    files: dict[str, bytes]

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        content = self.files.get(self.path.removeprefix("/someone/models/resolve/main/"))
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{abs(hash(content)):x}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


def test_checkpoints_come_from_a_hub_folder(original_checkpoints, parity_sizes, tmp_path):
    files = {f"WHDLD/1_24/{path.name}": path.read_bytes() for path in original_checkpoints.values()}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (HubHandler,), {"files": files}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "0",
    }
    command = [sys.executable, "-m", "co2s_hf.convert_co2s_to_hf", "--hub_repo", "someone/models"]
    command += ["--hub_folder", "WHDLD/1_24", "--dataset", "whdld", "--output_dir", str(tmp_path / "model")]
    try:
        run = subprocess.run(
            [*command, "--verify", *flags(parity_sizes)], env=environment, capture_output=True, text=True, timeout=120
        )
    finally:
        server.shutdown()
    assert run.returncode == 0, run.stderr
    assert "Verified: 465 tensors" in run.stdout


def test_sizes_are_read_off_the_weights(converted_folder):
    config = Co2SForSemanticSegmentation.from_pretrained(converted_folder).config
    clip, dinov3 = config.clip_config, config.dinov3_config
    assert (clip.hidden_size, clip.intermediate_size, clip.num_hidden_layers, clip.patch_size) == (16, 64, 12, 16)
    assert (clip.image_size, clip.projection_dim, dinov3.num_register_tokens) == (64, 512, 4)
    assert (config.decoder_channels, config.decoder_guidance_channels, config.decoder_mlp_ratio) == (32, 32, 4)
    assert (config.decoder_skip_channels, config.decoder_up_channels) == ([16, 8], [32, 16])


def test_way_back_is_bit_equal(converted_folder, original_checkpoints, tmp_path):
    main(["--to_original", str(converted_folder), "--output_dir", str(tmp_path / "back")])
    for student, source in original_checkpoints.items():
        file = tmp_path / "back" / CHECKPOINT_NAMES[student]
        assert all(key.startswith("module.") for key in torch.load(file, weights_only=True)["model"])
        expected, found = load_original(source, student), load_original(file, student)
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            if key.endswith("attn.qkv.bias"):  # the authors' code masks the keys' third out; it comes back as zeros
                tensor = tensor * expected[key + "_mask"]
            assert torch.equal(tensor, found[key]), key


def test_round_trip_from_here_is_bit_equal(converted_folder, parity_sizes, tmp_path):
    convert_to_original(converted_folder, tmp_path / "back")
    paths = [tmp_path / "back" / name for name in CHECKPOINT_NAMES.values()]
    again = convert(*paths, tmp_path / "again", "whdld", **parity_sizes)
    for name, tensor in Co2SForSemanticSegmentation.from_pretrained(converted_folder).state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def write_changed(source, target, change):
    checkpoint = torch.load(source, weights_only=True)
    change(checkpoint["model"])
    torch.save(checkpoint, target)
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("module.decode_head.head.bias"), "Missing (1): ['decode_head.head.bias']"),
        (lambda weights: weights.update({"module.extra": torch.zeros(1)}), "Unexpected (1): ['extra']"),
        (lambda weights: weights.pop("module.backbone.pos_embed"), "has no 'backbone.pos_embed'"),
        (
            lambda weights: weights.update({"module._cached_text": torch.zeros(5, 512)}),
            "'_cached_text' has the shape (5, 512), which does not give (6, 512)",
        ),
    ],
)
def test_wrong_keys_and_shapes_are_listed(change, message, original_checkpoints, parity_sizes, tmp_path):
    broken = write_changed(original_checkpoints["clip"], tmp_path / "best_clip.pth", change)
    with pytest.raises(ValueError, match=re.escape(message)):
        convert(broken, original_checkpoints["dinov3"], tmp_path / "model", "whdld", **parity_sizes)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w["module.backbone.rope_embed.periods"].mul_(3),
            "'backbone.rope_embed.periods' is not the constant",
        ),
        (
            lambda w: w["module.backbone.blocks.3.attn.qkv.bias_mask"].fill_(1),
            "'backbone.blocks.3.attn.qkv.bias_mask'",
        ),
        (
            lambda w: w.update({"module.decode_head.text_proj.0.weight": torch.zeros(16, 32)}),
            "'decode_head.text_proj.0.weight' has the shape (16, 32)",
        ),
    ],
)
def test_dropped_constants_and_shapes_are_checked(change, message, original_checkpoints, parity_sizes, tmp_path):
    broken = write_changed(original_checkpoints["dinov3"], tmp_path / "best_dinov3.pth", change)
    with pytest.raises(ValueError, match=re.escape(message)):
        convert(original_checkpoints["clip"], broken, tmp_path / "model", "whdld", **parity_sizes)


def test_models_that_the_authors_code_would_change_are_not_turned_back(converted_folder, tmp_path):
    model = Co2SForSemanticSegmentation.from_pretrained(converted_folder)
    model.config.clip_config.hidden_act = "quick_gelu"
    model.config.dinov3_logits_size = None
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(
        ValueError, match=r"dinov3_logits_size is None, there 256; clip_config.hidden_act is quick_gelu"
    ):
        convert_to_original(tmp_path / "model", tmp_path / "back")
    make_model(dinov3_config={**make_config().dinov3_config.to_dict(), "key_bias": True}).save_pretrained(
        tmp_path / "own"
    )
    with pytest.raises(ValueError, match=r"no place for .* weights, such as .*k_proj.bias"):
        convert_to_original(tmp_path / "own", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_exchanged_files_are_noticed(original_checkpoints, parity_sizes, tmp_path):
    with pytest.raises(ValueError, match=r"The clip checkpoint has no .* Is it the authors' best_clip.pth\?"):
        convert(original_checkpoints["dinov3"], original_checkpoints["clip"], tmp_path / "m", "whdld", **parity_sizes)


class Payload:
    """What a hostile checkpoint could hold: unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_files_that_would_run_code_are_refused(tmp_path):
    torch.save({"model": {"module.x": Payload(str(tmp_path / "harm"))}}, tmp_path / "best_clip.pth")
    with pytest.raises(ValueError, match=r"best_clip.pth \(.* is not a PyTorch checkpoint of plain tensors"):
        load_original(tmp_path / "best_clip.pth", "clip")
    assert not (tmp_path / "harm").exists()
    (tmp_path / "pointer.pth").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"starting with b'version https://git-lfs.*a Git LFS pointer"):
        load_original(tmp_path / "pointer.pth", "clip")
    torch.save({"weights": {}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth holds \['weights'\]; expected the authors' best_clip.pth"):
        load_original(tmp_path / "other.pth", "clip")


def test_verify_notices_a_changed_weight(converted_folder, original_checkpoints, tmp_path):
    def change(weights):
        weights["module.decode_head.head.bias"] += 1e-6

    changed = write_changed(original_checkpoints["dinov3"], tmp_path / "best_dinov3.pth", change)
    with pytest.raises(ValueError, match=r"'decode_head.head.bias' of .*best_dinov3.pth differs"):
        verify(converted_folder, original_checkpoints["clip"], changed)


def test_existing_output_is_not_overwritten(converted_folder, original_checkpoints, parity_sizes):
    before = (converted_folder / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="already exists"):
        convert(
            original_checkpoints["clip"], original_checkpoints["dinov3"], converted_folder, "whdld", **parity_sizes
        )
    assert (converted_folder / "model.safetensors").read_bytes() == before
