"""The page of `co2s demo` (gradio): one model, one image, its predictions."""

import atexit
import html
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..data.bands import BandsError
from ..data.drawn_scenes import draw_scene
from ..data.image_files import REPLACE_FILE
from ..data.reading import ImageRule, StoredFile
from ..inference.images import fused_logits, load_for_prediction
from ..inference.windows import sliding_window_logits
from ..model.configuration_co2s import FUSIONS
from ..model.modeling_co2s import STUDENTS
from ..utils.errors import UserError
from ..utils.figures import confidence_picture, overlay, palette_or_default


# gradio reads these variables when it is imported. Uploads get a folder of their own; no usage statistics are sent.
if "GRADIO_TEMP_DIR" not in os.environ:
    os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="co2s_hf-demo-")
    atexit.register(shutil.rmtree, os.environ["GRADIO_TEMP_DIR"], ignore_errors=True)
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
from gradio.data_classes import ImageData


MAX_SIDE_PX = 2048  # larger images are scaled down
MAX_FILE_SIZE = "30mb"
NUM_SAMPLES, SAMPLE_PX = 4, 256
FUSION_NAMES = {
    "confidence": "the more confident one",
    "average": "average",
    "clip": "CLIP alone",
    "dinov3": "DINOv3 alone",
}
STUDENT_NAMES = {"clip": "CLIP student", "dinov3": "DINOv3 student"}
FORGET_AFTER_S = 3600  # uploads and results are deleted after this time


class Demo:
    """The page with its loaded model.

    Args:
        checkpoint: Folder or Hub name of a trained model.
        crop_size: Side of the windows in pixels. None: the side of the crops in training.
    """

    def __init__(self, checkpoint: str, crop_size: int | None = None):
        self.name = checkpoint
        self.model, self.image_processor, self.crop_size = load_for_prediction(checkpoint, crop_size=crop_size)
        self.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.id2label = self.model.config.id2label
        self.palette = palette_or_default(self.model.config.palette, len(self.id2label))
        # If the fusion is one student, the other one may never have been trained.
        fusion = self.model.config.fusion
        self.fusions = (fusion,) if fusion in STUDENTS else (fusion, *(name for name in FUSIONS if name != fusion))
        self.students = tuple(name for name in STUDENTS if name in self.fusions)

    def predict(self, path: str | None) -> dict | None:
        """Predict an image file with every fusion of the page.

        Returns:
            "image" -> the image that was predicted; each fusion -> its label map and its confidence (0 to 255), both
            (height, width). None without a file.
        """
        if path is None:
            return None
        try:  # with the bands and scale of the model's training
            image = ImageRule.of_config(self.model.config).read(StoredFile(path))
        except UserError as error:
            raise gr.Error(page_message(error, path)) from error
        if max(image.size) > MAX_SIDE_PX:
            gr.Info(f"The image is scaled down to {MAX_SIDE_PX} px. Use `co2s predict` for its full size.")
            image.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX))
        inputs = self.image_processor(image, return_tensors="pt")
        logits = sliding_window_logits(self.model, inputs["pixel_values"], self.crop_size, self.students)
        result = {"image": image}
        for fusion in self.fusions:
            fused = fused_logits(logits, self.model.config, (image.height, image.width), fusion)
            confidence, labels = fused.softmax(dim=0).max(dim=0)
            result[fusion] = labels.byte().cpu().numpy(), (255 * confidence).byte().cpu().numpy()
        return result

    def show(self, result: dict | None, fusion: str, opacity: float) -> list:
        """Return the pictures of the fused prediction, its confidence and each student, and the legend."""
        if result is None:
            return [None, None, *(None for _ in self.students), ""]
        image, (labels, confidence) = result["image"], result[fusion]
        pictures = [overlay(image, labels, self.palette, opacity), confidence_picture(confidence / 255)]
        pictures += [overlay(image, result[name][0], self.palette, opacity) for name in self.students]
        return [*pictures, self.legend(labels, confidence)]

    def legend(self, labels: np.ndarray, confidence: np.ndarray) -> str:
        """Return a table of colour, name, share of the area and mean confidence per class, the largest class first."""
        counts = np.bincount(labels.ravel(), minlength=len(self.id2label))
        sums = np.bincount(labels.ravel(), weights=confidence.ravel(), minlength=len(self.id2label))
        rows = []
        for index in np.argsort(-counts, kind="stable"):
            color, name = "rgb({},{},{})".format(*self.palette[index]), html.escape(self.id2label[int(index)])
            sure = f"{sums[index] / counts[index] / 2.55:.0f} %" if counts[index] else "-"
            swatch = f"<span style='background:{color};border:1px solid #888;padding:0 .8em'></span>"
            share = 100 * counts[index] / labels.size
            rows.append(f"<tr><td>{swatch}</td><td>{name}</td><td>{share:.1f} %</td><td>{sure}</td></tr>")
        head = "<tr><th></th><th>class</th><th>area</th><th>confidence</th></tr>"
        return f"<table style='width:100%'>{head}{''.join(rows)}</table>"

    def page(self) -> gr.Blocks:
        """Build the page: inputs on the left, pictures on the right."""
        with gr.Blocks(title="Co2S", delete_cache=(FORGET_AFTER_S, FORGET_AFTER_S)) as page:
            gr.Markdown(f"# Co2S\nLand cover from aerial and satellite images, by `{self.name}`.")
            result = gr.State(time_to_live=FORGET_AFTER_S)
            with gr.Row():
                with gr.Column(scale=1):
                    image = gr.Image(
                        type="filepath",
                        image_mode=None,  # do not convert: the model's configuration defines the bands
                        sources=["upload", "clipboard"],
                        label="Image",
                        elem_id="image",
                    )
                    image.preprocess = uploaded_path
                    run = gr.Button("Segment", variant="primary")
                    fusion = gr.Radio(
                        [(FUSION_NAMES[name], name) for name in self.fusions],
                        value=self.fusions[0],
                        label="Fusion of the students",
                    )
                    opacity = gr.Slider(0, 1, 0.5, step=0.05, label="Opacity of the colours")
                    gr.Examples(draw_samples(), image, label="Drawn samples", elem_id="samples")
                with gr.Column(scale=2):
                    with gr.Row():
                        fused = picture("Land cover", "fused")
                        confidence = picture("Confidence (dark: unsure)", "confidence")
                    with gr.Row():
                        shown = [picture(STUDENT_NAMES[name], name) for name in self.students]
                    legend = gr.HTML(elem_id="legend")
            outputs = [fused, confidence, *shown, legend]
            # Predict the image that was dropped last. Show it with the settings at the end of the prediction.
            gr.on(
                [run.click, image.change],
                self.predict,
                image,
                result,
                trigger_mode="always_last",
                show_progress_on=[fused, confidence],
            ).success(self.show, [result, fusion, opacity], outputs)
            gr.on([fusion.change, opacity.release], self.show, [result, fusion, opacity], outputs)
        return page


def uploaded_path(upload: ImageData | None) -> str | None:
    """Return the path of an uploaded file. It replaces a method of `gr.Image`, which opens any format of Pillow.

    Some of these formats start programs: Pillow gives EPS files to Ghostscript. [`ImageRule.read`] opens images alone.

    Raises:
        gradio.Error: The request has no uploaded file. gradio has checked that a path is one of an upload.
    """
    if upload is None:
        return None
    if not upload.path:
        raise gr.Error("The request has no uploaded file. Drop an image on the page.")
    return upload.path


def page_message(error: UserError, path: str) -> str:
    """Return the message about an uploaded file for a visitor, who has neither its path nor options to choose."""
    message = str(error)
    if isinstance(error, BandsError):
        message = (
            f"{error.problem} Save it with the bands and values that this model reads, or predict the file with `co2s "
            "predict`, where you can choose them."
        )
    return message.replace(path, Path(path).name).replace(REPLACE_FILE, "Drop another image.")


def picture(label: str, name: str) -> gr.Image:
    """Make the component that shows one of the pictures."""
    return gr.Image(label=label, elem_id=name, format="png", buttons=["download", "fullscreen"], interactive=False)


def draw_samples() -> list[str]:
    """Draw scenes to try the page with; return the paths of their files."""
    folder = Path(tempfile.mkdtemp(dir=os.environ["GRADIO_TEMP_DIR"]))
    paths = [folder / f"scene_{number}.png" for number in range(NUM_SAMPLES)]
    for number, path in enumerate(paths):
        Image.fromarray(draw_scene(np.random.default_rng([0, number]), SAMPLE_PX)[0]).save(path)
    return [str(path) for path in paths]


def launch(demo: Demo, share: bool = False, port: int | None = None):
    """Serve the page until the program is stopped.

    Args:
        demo: The page with its model.
        share: Also make a public link, through Gradio's servers.
        port: Port of the page. None: the first free one from 7860.
    """
    demo.page().launch(
        share=share,
        server_port=port,
        max_file_size=MAX_FILE_SIZE,
        footer_links=["gradio"],
        theme=gr.themes.Default(
            font=["system-ui", "sans-serif"], font_mono=["monospace"]
        ),  # no fonts from other servers
    )
