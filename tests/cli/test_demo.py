"""The demo page, in a real browser where there is one."""

import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from helpers import save_checkpoint
from PIL import Image
from playwright.sync_api import sync_playwright

from co2s_hf.data.drawn_scenes import draw_scene


ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# A browser that asks nobody else for anything, also as root.
QUIET = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "model"
    save_checkpoint(folder, crop_size=32)
    return folder


def served(script, *words):
    """Start a page; its process and address."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(script), *map(str, words)]
    page = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    lines = []
    for line in page.stdout:
        lines.append(line)
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            return page, found[0]
    raise AssertionError("".join(lines))


@pytest.fixture(scope="module")
def address(checkpoint):
    page, address = served(ROOT / "examples" / "app.py", "--checkpoint", checkpoint)
    yield address
    page.terminate()
    page.wait()


@pytest.fixture
def browser_page(address):
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET.split())
        page = browser.new_page()
        page.goto(address)
        yield page
        browser.close()


def picture(page, name):
    """The pixels of one of the pictures, as the page's server has them."""
    with urllib.request.urlopen(page.locator(f"#{name} img").first.get_attribute("src")) as answer:
        return np.asarray(Image.open(answer).convert("RGB"))


def test_an_image_goes_in_and_an_overlay_comes_out(browser_page, tmp_path):
    scene = draw_scene(np.random.default_rng(5), 96)[0]
    Image.fromarray(scene).save(tmp_path / "scene.png")
    browser_page.set_input_files("#image input[type=file]", tmp_path / "scene.png")
    browser_page.wait_for_selector("#dinov3 img")
    fused, confidence = picture(browser_page, "fused"), picture(browser_page, "confidence")
    assert fused.shape == confidence.shape == scene.shape
    assert len(np.unique(fused.reshape(-1, 3), axis=0)) > 100  # the scene shows through
    assert not np.array_equal(fused, scene)
    legend = browser_page.inner_text("#legend")
    assert {"land", "road", "water"} <= set(legend.split())
    shares = [float(share) for share in re.findall(r"(\d+\.\d) %", legend)]
    assert sum(shares) == pytest.approx(100, abs=0.2) and shares == sorted(shares, reverse=True)

    before = browser_page.locator("#fused img").first.get_attribute("src")
    browser_page.get_by_label("DINOv3 alone").check()
    browser_page.wait_for_function(
        "src => document.querySelector('#fused img').src != src", arg=before
    )  # from what is kept: no new prediction
    np.testing.assert_array_equal(picture(browser_page, "fused"), picture(browser_page, "dinov3"))


def test_more_than_eight_bits_are_not_guessed_at(browser_page, tmp_path):
    Image.fromarray(np.full((40, 40), 3000, dtype=np.uint16)).save(tmp_path / "deep.png")
    browser_page.set_input_files("#image input[type=file]", tmp_path / "deep.png")
    browser_page.wait_for_selector("text=deep.png")
    assert browser_page.locator("#fused img").count() == 0


def test_a_sample_needs_one_click(browser_page):
    browser_page.locator("#samples img").first.click()
    browser_page.wait_for_selector("#fused img")
    assert len(np.unique(picture(browser_page, "fused").reshape(-1, 3), axis=0)) > 100


@pytest.mark.parametrize("path", ["/etc/passwd", str(ROOT / "README.md"), "README.md"])
def test_the_page_shows_nothing_else_of_the_disk(address, path):
    with pytest.raises(urllib.error.HTTPError, match=r"403|404"):
        urllib.request.urlopen(f"{address}/gradio_api/file={path}")


def test_a_space_runs_as_it_is_written(checkpoint, tmp_path):
    script = ROOT / "examples" / "push_to_hub.py"
    command = [sys.executable, script, "--checkpoint", checkpoint, "--space_dir", tmp_path / "space"]
    subprocess.run(command, check=True, capture_output=True)
    page, address = served(tmp_path / "space" / "app.py")
    try:
        with urllib.request.urlopen(address) as answer:
            assert "Co2S" in answer.read().decode()
    finally:
        page.terminate()
        page.wait()


def test_a_missing_model_is_an_error_without_a_traceback(tmp_path):
    command = [sys.executable, ROOT / "examples" / "app.py", "--checkpoint", tmp_path / "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "nowhere" in done.stderr and "Traceback" not in done.stderr
