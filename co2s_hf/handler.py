"""What Hugging Face Inference Endpoints run for a published Co2S model: an image in, masks with label and score out.

This file is copied beside the weights (`examples/push_to_hub.py --handler`) and needs nothing but transformers,
PyTorch and Pillow. The request is an image's bytes, or JSON:
`{"inputs": "<the file in base64>", "parameters": {"threshold": 0.5}}`.
"""

import base64
import binascii
import io
from typing import Any

import torch
from PIL import Image
from transformers import pipeline
from transformers.dynamic_module_utils import get_class_from_dynamic_module


FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF")
DAMAGED = (OSError, SyntaxError, ValueError, RuntimeError, EOFError)  # what Pillow raises for broken files
MAX_BYTES = 20_000_000  # of the file
MAX_PIXELS = 2048 * 2048  # attention over more takes more memory than small machines have


class EndpointHandler:
    """Loads the model once and answers requests.

    Args:
        path: Folder of the checkpoint.
    """

    def __init__(self, path: str = ""):
        device = 0 if torch.cuda.is_available() else -1
        # The code beside this file is its own; its pipeline has scores, also where the package co2s_hf is installed.
        own = get_class_from_dynamic_module("image_processing_co2s.Co2SImageSegmentationPipeline", path)
        self.segment = pipeline(
            "image-segmentation",
            model=path,
            image_processor=path,  # of an adapter, too, where the pipeline would take its base's
            pipeline_class=own,
            device=device,
            trust_remote_code=True,
        )

    def __call__(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        """Segment one image.

        Args:
            data: `inputs`: a PIL image, a file's bytes, or these in base64 (a data URL, too); `parameters`, optional:
                `threshold`, the score below which classes are left out.

        Returns:
            For every class in the image `label`, `score` (mean probability within its mask, 0..1) and `mask` (PNG in
            base64, of the image's size: 255 where the class is), the Hub widget's format.

        Raises:
            ValueError: The input is no image, too large, or a parameter is unknown.
        """
        if "inputs" not in data:
            raise ValueError(
                '`inputs` is missing. Send an image\'s bytes, or JSON: {"inputs": "<the file in base64>"}.'
            )
        parameters = data.get("parameters") or {}
        threshold = parameters.get("threshold", 0.0) if isinstance(parameters, dict) else None
        if not isinstance(threshold, int | float) or not 0 <= threshold <= 1 or set(parameters) - {"threshold"}:
            raise ValueError(f"`parameters` is {parameters}; there is only `threshold`, a number from 0 to 1.")
        segments = self.segment(read_image(data["inputs"]), threshold=threshold)
        return [segment | {"mask": _png(segment["mask"])} for segment in segments]


def read_image(inputs: Image.Image | bytes | str) -> Image.Image:
    """The image of a request, RGB, or an error that says what is wrong with it."""
    if isinstance(inputs, str):
        text = "".join((inputs.partition(",")[2] if inputs.startswith("data:") else inputs).split())  # no line breaks
        try:
            inputs = base64.b64decode(text, validate=True)
        except binascii.Error as error:
            raise ValueError(f"`inputs` is a text that is no base64: {error}.") from error
    if isinstance(inputs, bytes | bytearray):
        if len(inputs) > MAX_BYTES:
            raise ValueError(
                f"The file has {len(inputs)} bytes; at most {MAX_BYTES} are accepted. Send a smaller one."
            )
        try:
            inputs = Image.open(io.BytesIO(inputs), formats=FORMATS)
        except (*DAMAGED, Image.DecompressionBombError) as error:
            raise ValueError(f"`inputs` cannot be read as an image: {error}") from error
    if not isinstance(inputs, Image.Image):
        raise ValueError(f"`inputs` is {type(inputs).__name__}; expected an image, its bytes, or these in base64.")
    if inputs.width * inputs.height > MAX_PIXELS:  # the header tells, before anything is decoded
        raise ValueError(
            f"The image has {inputs.width}x{inputs.height} pixels; at most {MAX_PIXELS} in all are accepted. Cut it "
            "into tiles."
        )
    if inputs.mode[0] in "IF":
        raise ValueError(f"The image has the mode {inputs.mode}, more than 8 bits a pixel; scale it to 0..255 first.")
    try:
        return inputs.convert("RGB")
    except DAMAGED as error:
        raise ValueError(f"The image is damaged: {error}") from error


def _png(mask: Image.Image) -> str:
    stream = io.BytesIO()
    mask.save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode()
