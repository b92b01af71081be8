"""`co2s demo`: predictions in Python, and its page as a Space serves it, in a real browser if one is installed."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
from gradio.data_classes import ImageData
from helpers import EXAMPLES, environment, run_command, save_checkpoint, write_raster
from hostile import SECRET, WebServer, mosaic
from PIL import Image
from playwright.sync_api import sync_playwright

from co2s_hf import Co2SForSemanticSegmentation, Co2SImageProcessor
from co2s_hf.cli import demo_page
from co2s_hf.data.drawn_scenes import draw_scene
from co2s_hf.inference.images import predict_logits
from co2s_hf.utils.figures import confidence_picture, overlay


ROOT = EXAMPLES.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# A browser that makes no requests of its own, also as root.
QUIET = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync"
CLASSES = {"land": (128, 128, 128), "road": (255, 255, 0), "water": (0, 0, 255)}
PALETTE = np.array(list(CLASSES.values()), dtype=np.uint8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model with random weights and three classes, for windows of 32 px."""
    folder = tmp_path_factory.mktemp("demo") / "model"
    save_checkpoint(folder, crop_size=32)
    return folder


@pytest.fixture(scope="module")
def predict(checkpoint):
    """A function that predicts an image: predictor -> confidence and labels, both (height, width)."""
    model = Co2SForSemanticSegmentation.from_pretrained(checkpoint)
    processor = Co2SImageProcessor.from_pretrained(checkpoint)

    def predict(image: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        pixel_values = processor(Image.fromarray(image), return_tensors="pt")["pixel_values"]
        logits = predict_logits(model, pixel_values, 32, image.shape[:2])
        return {name: tuple(value.numpy() for value in found.softmax(0).max(0)) for name, found in logits.items()}

    return predict


def expected_pictures(image: np.ndarray, predict, opacity: float = 0.5) -> dict[str, np.ndarray]:
    """Draw what the page shows for an image."""
    found = predict(image)
    pictures = {name: overlay(Image.fromarray(image), found[name][1], PALETTE, opacity) for name in found}
    pictures["confidence"] = confidence_picture(np.floor(255 * found["fused"][0]) / 255)
    return {name: np.asarray(picture) for name, picture in pictures.items()}


def expected_shares(labels: np.ndarray) -> list[tuple[str, float]]:
    """Return the classes and their shares in per cent, the largest first."""
    shares = [(name, round(100 * float((labels == index).mean()), 1)) for index, name in enumerate(CLASSES)]
    return sorted(shares, key=lambda entry: -entry[1])


@pytest.fixture(scope="module")
def scene() -> np.ndarray:
    return draw_scene(np.random.default_rng(5), 96)[0]


# --- without a server


@pytest.fixture(scope="module")
def demo(checkpoint):
    return demo_page.Demo(str(checkpoint))


def test_an_image_file_is_predicted_with_every_fusion(demo, predict, scene, tmp_path):
    Image.fromarray(scene).save(tmp_path / "scene.png")
    result, found = demo.predict(str(tmp_path / "scene.png")), predict(scene)
    assert demo.fusions == ("confidence", "average", "clip", "dinov3") and np.array_equal(result["image"], scene)
    for fusion, name in (("confidence", "fused"), ("clip", "clip"), ("dinov3", "dinov3")):
        labels, confidence = result[fusion]
        assert np.array_equal(labels, found[name][1])
        assert np.array_equal(confidence, np.floor(255 * found[name][0]))
    assert not np.array_equal(result["average"][1], result["confidence"][1])
    assert demo.predict(None) is None


@pytest.mark.parametrize(("opacity", "fusion"), [(0.5, "confidence"), (0.0, "clip"), (1.0, "dinov3")])
def test_pictures_follow_the_fusion_and_the_opacity(opacity, fusion, demo, predict, scene, tmp_path):
    Image.fromarray(scene).save(tmp_path / "scene.png")
    fused, confidence, clip, dinov3, legend = demo.show(demo.predict(str(tmp_path / "scene.png")), fusion, opacity)
    expected, found = expected_pictures(scene, predict, opacity), predict(scene)
    name = "fused" if fusion == "confidence" else fusion
    assert np.array_equal(fused, expected[name])
    assert np.array_equal(clip, expected["clip"]) and np.array_equal(dinov3, expected["dinov3"])
    assert np.array_equal(confidence, confidence_picture(np.floor(255 * found[name][0]) / 255))
    rows = re.findall(r"background:rgb\((\d+),(\d+),(\d+)\).*?<td>(\w+)</td><td>([\d.]+) %</td>", legend)
    assert [(row[3], float(row[4])) for row in rows] == expected_shares(found[name][1])
    assert all(CLASSES[row[3]] == tuple(map(int, row[:3])) for row in rows)
    assert demo.show(None, fusion, opacity) == [None, None, None, None, ""]


def test_the_legend_has_the_mean_confidence_of_each_class(demo):
    labels, confidence = np.array([[0, 0, 0, 2]]), np.array([[255, 51, 204, 102]])
    rows = re.findall(r"<td>(\w+)</td><td>(.*?)</td><td>(.*?)</td>", demo.legend(labels, confidence))
    assert rows == [("land", "75.0 %", "67 %"), ("water", "25.0 %", "40 %"), ("road", "0.0 %", "-")]


def test_large_images_are_scaled_down(demo, predict, scene, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_page, "MAX_SIDE_PX", 48)
    Image.fromarray(scene[:64]).save(tmp_path / "scene.png")
    result = demo.predict(str(tmp_path / "scene.png"))
    small = Image.fromarray(scene[:64])
    small.thumbnail((48, 48))
    assert small.size == (48, 32) and np.array_equal(result["image"], small)
    assert np.array_equal(result["clip"][0], predict(np.asarray(small))["clip"][1])


def test_images_that_do_not_fit_are_errors_that_name_the_file(demo, tmp_path):
    Image.fromarray(np.full((40, 40), 3000, dtype=np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    for name in ("deep.png", "broken.png"):
        with pytest.raises(demo_page.gr.Error) as error:
            demo.predict(str(tmp_path / name))
        assert name in error.value.message and str(tmp_path) not in error.value.message


def test_a_picture_with_transparency_is_predicted_as_by_predict(demo, checkpoint, scene, tmp_path):
    rgba = np.dstack([scene, np.full(scene.shape[:2], 255, dtype=np.uint8)])
    rgba[:20, :, 3], rgba[20:30, :, 3] = 0, 9
    Image.fromarray(rgba, "RGBA").save(tmp_path / "scene.png")
    result = demo.predict(str(tmp_path / "scene.png"))
    assert np.array_equal(np.asarray(result["image"])[20:], scene[20:]) and not np.asarray(result["image"])[:20].any()
    done = run_command(
        "predict", "--images", tmp_path / "scene.png", "--checkpoint", checkpoint, "--output_dir", tmp_path / "out"
    )
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "out" / "labels" / "scene.png") as labels:
        assert np.array_equal(result["confidence"][0], np.asarray(labels))


def test_the_page_advises_only_what_a_visitor_can_do(demo, tmp_path):
    Image.fromarray(np.full((40, 40), 3000, dtype=np.uint16)).save(tmp_path / "deep.png")
    write_raster(tmp_path / "two.tif", np.full((2, 8, 8), 7, dtype=np.uint8))
    (tmp_path / "broken.png").write_bytes(b"no image")
    advice = (
        "expected 8-bit RGB. Save it with the bands and values that this model reads, or predict the file with `co2s "
        "predict`, where you can choose them."
    )
    expected = {
        "deep.png": f"deep.png has 1 band of uint16, values 3000 to 3000; {advice}",
        "two.tif": f"two.tif has 2 bands of uint8, values 7 to 7; {advice}",
        "broken.png": "broken.png cannot be read as an image; expected PNG, JPEG, TIFF, BMP, WebP or JPEG 2000. Drop "
        "another image.",
    }
    for name, message in expected.items():
        with pytest.raises(demo_page.gr.Error) as error:
            demo.predict(str(tmp_path / name))
        assert error.value.message == message


@pytest.mark.parametrize("name", ["drawing.svg", "photo.png", "scene.tif"])
def test_an_upload_cannot_name_other_files(name, demo, tmp_path):
    write_raster(tmp_path / "private.tif", np.full((3, 8, 8), SECRET, dtype=np.uint16))
    server = WebServer(tmp_path)
    try:
        for source in (str(tmp_path / "private.tif"), f"/vsicurl/{server.url}/x.tif"):
            (tmp_path / name).write_text(mosaic(source), encoding="utf-8")
            with pytest.raises(demo_page.gr.Error, match=rf"{name} cannot be read as an image; expected PNG") as error:
                demo.predict(str(tmp_path / name))
            assert str(SECRET) not in error.value.message
        assert server.requests() == []
    finally:
        server.stop()


def test_the_page_opens_no_upload_by_itself(demo, tmp_path):
    """gradio would open an upload, and an image inside a request, with any format of Pillow, such as EPS."""
    (image,) = (block for block in demo.page().blocks.values() if block.elem_id == "image")
    upload = tmp_path / "drawing.png"
    upload.write_bytes(b"no image")
    assert image.preprocess(ImageData(path=str(upload), orig_name="drawing.png")) == str(upload)
    assert image.preprocess(None) is None
    picture = "data:image/png;base64," + base64.b64encode(png_of(Image.new("RGB", (8, 8)))).decode()
    with pytest.raises(demo_page.gr.Error, match="The request has no uploaded file"):
        image.preprocess(ImageData(url=picture))


def png_of(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def test_a_model_of_one_student_shows_that_student_alone(scene, tmp_path):
    save_checkpoint(tmp_path / "model", crop_size=32, fusion="dinov3")
    demo = demo_page.Demo(str(tmp_path / "model"), crop_size=48)
    assert (demo.fusions, demo.students, demo.crop_size) == (("dinov3",), ("dinov3",), 48)
    Image.fromarray(scene).save(tmp_path / "scene.png")
    result = demo.predict(str(tmp_path / "scene.png"))
    fused, _, dinov3, _ = demo.show(result, "dinov3", 0.5)
    assert set(result) == {"image", "dinov3"} and np.array_equal(fused, dinov3)


def test_the_command_serves_the_model_with_its_options(checkpoint, monkeypatch):
    launched = []
    monkeypatch.setattr(demo_page, "launch", lambda demo, share, port: launched.append((demo, share, port)))
    words = ("--checkpoint", checkpoint, "--crop_size", 48, "--port", 8000, "--share")
    assert run_command("demo", *words).returncode == 0 and run_command("demo", *words[:2]).returncode == 0
    (first, *options), (second, *defaults) = launched
    assert (first.name, first.crop_size, *options) == (str(checkpoint), 48, True, 8000)
    assert (second.name, second.crop_size, *defaults) == (str(checkpoint), 32, False, None)


def test_missing_models_and_libraries_are_errors_without_a_traceback(checkpoint, tmp_path, monkeypatch):
    done = run_command("demo", "--checkpoint", tmp_path / "nowhere")
    assert done.returncode == 1 and done.stderr.startswith(f"error: --checkpoint is '{tmp_path / 'nowhere'}', which")
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "co2s_hf.cli.demo_page")
    done = run_command("demo", "--checkpoint", checkpoint)
    assert done.returncode == 1 and "The demo needs more libraries (" in done.stderr
    assert done.stderr.startswith("error: ") and "pip install 'co2s_hf[demo]'" in done.stderr


# --- the page, served by the app.py of a Space


@pytest.fixture(scope="module")
def space(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("space") / "space"
    done = run_command("push", "--checkpoint", checkpoint, "--space_dir", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def address(space, tmp_path_factory):
    """Address of the page. The Space's own copy of the package serves it."""
    variables = environment() | {"PYTHONUNBUFFERED": "1", "GRADIO_TEMP_DIR": str(tmp_path_factory.mktemp("uploads"))}
    del variables["PYTHONPATH"]
    page = subprocess.Popen(
        [sys.executable, "app.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=variables,
        cwd=space,
    )
    lines = []
    for line in page.stdout:
        lines.append(line)
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            break
    else:
        pytest.fail("".join(lines))
    yield found[0]
    page.terminate()
    page.wait()
    page.stdout.close()


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET.split())
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    page = browser.new_page()
    page.goto(address)
    yield page
    page.close()


def picture(page, name: str) -> np.ndarray:
    """Load one of the pictures from the address that the page shows."""
    with urllib.request.urlopen(page.locator(f"#{name} img").first.get_attribute("src")) as answer:
        return np.asarray(Image.open(answer).convert("RGB"))


def legend(page) -> list[tuple[str, float]]:
    """Read the classes and their shares of the area from the table."""
    rows = re.findall(r"(land|road|water)\s+([\d.]+) %", page.inner_text("#legend"))
    return [(name, float(share)) for name, share in rows]


def test_an_image_gets_its_pictures_and_its_legend(page, predict, scene, tmp_path):
    Image.fromarray(scene).save(tmp_path / "scene.png")
    page.set_input_files("#image input[type=file]", tmp_path / "scene.png")
    page.wait_for_selector("#dinov3 img")
    expected, found = expected_pictures(scene, predict), predict(scene)
    for name, values in expected.items():
        np.testing.assert_array_equal(picture(page, name), values, err_msg=name)
    assert legend(page) == expected_shares(found["fused"][1])

    before = page.locator("#fused img").first.get_attribute("src")
    page.get_by_label("DINOv3 alone").check()  # drawn again from the stored prediction
    page.wait_for_function("src => document.querySelector('#fused img').src != src", arg=before)
    np.testing.assert_array_equal(picture(page, "fused"), expected["dinov3"])
    assert legend(page) == expected_shares(found["dinov3"][1])


def test_images_of_more_than_8_bits_are_an_error_on_the_page(page, tmp_path):
    Image.fromarray(np.full((40, 40), 3000, dtype=np.uint16)).save(tmp_path / "deep.png")
    page.set_input_files("#image input[type=file]", tmp_path / "deep.png")
    page.wait_for_selector("text=deep.png")
    assert page.locator("#fused img").count() == 0


def test_a_drawn_sample_needs_one_click(page, predict):
    page.locator("#samples img").first.click()
    page.wait_for_selector("#dinov3 img")
    sample = draw_scene(np.random.default_rng([0, 0]), demo_page.SAMPLE_PX)[0]
    for name, values in expected_pictures(sample, predict).items():
        np.testing.assert_array_equal(picture(page, name), values, err_msg=name)


def predicted(address: str, path: str) -> str:
    """Let the page's server predict a file, as the page does, and return its answer."""
    with urllib.request.urlopen(f"{address}/config") as answer:
        config = json.loads(answer.read())
    (function,) = (entry for entry in config["dependencies"] if entry["api_name"] == "predict")
    body = json.dumps({"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}]}).encode()
    request = urllib.request.Request(
        f"{address}/gradio_api/call/{function['api_name']}", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        event = json.loads(answer.read())["event_id"]
    with urllib.request.urlopen(f"{request.full_url}/{event}") as answer:
        return answer.read().decode()


def test_the_server_predicts_uploads_and_no_other_file(address, scene, tmp_path):
    Image.fromarray(scene).save(tmp_path / "scene.png")
    assert "event: error" in predicted(address, str(tmp_path / "scene.png"))
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="scene.png"\r\n\r\n'
    body += png_of(Image.fromarray(scene)) + b"\r\n--x--\r\n"
    request = urllib.request.Request(
        f"{address}/gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=x"}
    )
    with urllib.request.urlopen(request) as answer:
        (upload,) = json.loads(answer.read())
    assert "event: complete" in predicted(address, upload)


def read(address: str, path) -> bytes:
    """Ask the page's server for a file."""
    with urllib.request.urlopen(f"{address}/gradio_api/file={path}") as answer:
        return answer.read()


def test_the_page_shows_no_other_file_of_the_disk(address, space, checkpoint):
    with urllib.request.urlopen(f"{address}/config") as answer:
        config = answer.read().decode()
    assert json.loads(config)["title"] == "Co2S"
    sample = re.search(r'"path": ?"([^"]+scene_0\.png)"', config)[1]
    assert read(address, sample).startswith(b"\x89PNG")  # its own samples are shown
    others = ["/etc/passwd", ROOT / "README.md", "README.md", "app.yaml", space / "app.yaml"]
    for path in [*others, checkpoint / "model.safetensors"]:
        with pytest.raises(urllib.error.HTTPError, match=r"403|404"):
            read(address, path)
