"""Request handler for Hugging Face Inference Endpoints: segment an image with a Co2S model.

`co2s_hf.hub.publishing.add_handler` copies this file beside the weights. The file needs only transformers, PyTorch and
Pillow (and peft, if the model is an adapter). A request is the bytes of an image file, or JSON:
`{"inputs": "<the file in base64>", "parameters": {"threshold": 0.5}}`. The parameters are those that the Hub documents
for image segmentation: `subtask`, `threshold`, `mask_threshold` and `overlap_mask_area_threshold`.
"""

import base64
import binascii
import io
from typing import Any

import torch
from PIL import Image
from transformers import pipeline


FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF")
# Exceptions that Pillow raises for damaged files.
DAMAGED_FILE_ERRORS = (OSError, SyntaxError, ValueError, RuntimeError, EOFError)
MAX_BYTES = 20_000_000  # of an image file
THRESHOLDS = ("threshold", "mask_threshold", "overlap_mask_area_threshold")
MAX_PIXELS = 2048 * 2048  # small machines do not have the memory for attention over more pixels


class EndpointHandler:
    """Load the model once, then answer requests.

    Args:
        path: Folder of the model.
    """

    def __init__(self, path: str = ""):
        device = 0 if torch.cuda.is_available() else -1
        self.segment = pipeline(
            "image-segmentation",
            model=path,
            image_processor=path,  # for an adapter, `pipeline` would load the processor of the base
            device=device,
            trust_remote_code=True,
        )

    def __call__(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        """Segment one image.

        Args:
            data: `inputs` is a PIL image, the bytes of an image file, or the bytes in base64 (also as a data URL).
                `parameters` is optional. It may contain `threshold`, 0 to 1: classes with a lower score are left out;
                and `subtask`, which must be "semantic". `mask_threshold` and `overlap_mask_area_threshold`, 0 to 1,
                are accepted but have no effect, because each pixel has exactly one class. null means the default.

        Returns:
            A dictionary for each class in the image, in the format of the Hub's widget: `label`; `score`, the mean
            probability in the mask, 0 to 1; and `mask`, a PNG in base64 of the image's size, with 255 in the pixels of
            the class and 0 elsewhere.

        Raises:
            ValueError: The input is not an image or is too large, or a parameter is unknown or out of range.
        """
        if "inputs" not in data:
            raise ValueError(
                '`inputs` is missing. Send the bytes of an image file, or JSON: {"inputs": "<the file in base64>"}.'
            )
        parameters = check_parameters(data.get("parameters"))
        segments = self.segment(read_image(data["inputs"]), **parameters)
        return [segment | {"mask": _encode_png(segment["mask"])} for segment in segments]


def check_parameters(parameters: dict[str, Any] | None) -> dict[str, Any]:
    """Check the parameters of a request, and return those that are not null.

    Raises:
        ValueError: A parameter is unknown or out of range.
    """
    parameters = {} if parameters is None else parameters
    names = ("subtask", *THRESHOLDS)
    if not isinstance(parameters, dict) or set(parameters) - set(names):
        raise ValueError(
            f'`parameters` is {parameters}; expected an object with any of {", ".join(names)}: {{"threshold": 0.5}}.'
        )
    given = {name: value for name, value in parameters.items() if value is not None}
    if given.get("subtask", "semantic") != "semantic":
        raise ValueError(f"`subtask` is {given['subtask']!r}; this model segments classes, not objects: 'semantic'.")
    for name in THRESHOLDS:
        value = given.get(name, 0.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ValueError(f"`{name}` is {value!r}; expected a number from 0 to 1.")
    return given


def read_image(inputs: Image.Image | bytes | str) -> Image.Image:
    """Read the image of a request.

    Args:
        inputs: A PIL image, the bytes of an image file, or the bytes in base64 (also as a data URL).

    Returns:
        The image in RGB.

    Raises:
        ValueError: The input is not an image, is damaged or is too large.
    """
    if isinstance(inputs, str):
        inputs = _decode_base64(inputs)
    if isinstance(inputs, bytes | bytearray):
        if len(inputs) > MAX_BYTES:
            raise ValueError(
                f"The file has {len(inputs)} bytes; at most {MAX_BYTES} are accepted. Send a smaller file."
            )
        try:
            inputs = Image.open(io.BytesIO(inputs), formats=FORMATS)
        except (*DAMAGED_FILE_ERRORS, Image.DecompressionBombError) as error:
            raise ValueError(
                f"`inputs` cannot be read as an image ({error}). Send one of {', '.join(FORMATS)}."
            ) from error
    if not isinstance(inputs, Image.Image):
        raise ValueError(
            f"`inputs` is {type(inputs).__name__}; expected an image, the bytes of an image file, or base64 text."
        )
    if inputs.width * inputs.height > MAX_PIXELS:  # known from the header, before decoding
        raise ValueError(
            f"The image has {inputs.width}x{inputs.height} pixels; at most {MAX_PIXELS} in all are accepted. Cut it "
            "into tiles."
        )
    if inputs.mode[0] in "IF":
        raise ValueError(
            f"The image has the mode {inputs.mode}, with more than 8 bits per band. Scale it to 0..255 first."
        )
    try:
        return inputs.convert("RGB")
    except DAMAGED_FILE_ERRORS as error:
        raise ValueError(f"The image is damaged ({error}). Send a complete file.") from error


def _decode_base64(text: str) -> bytes:
    """Decode base64 text or a data URL, with or without line breaks."""
    text = text.partition(",")[2] if text.startswith("data:") else text
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error as error:
        raise ValueError(f"`inputs` is text that is not base64 ({error}). Encode the image file in base64.") from error


def _encode_png(mask: Image.Image) -> str:
    stream = io.BytesIO()
    mask.save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode()
