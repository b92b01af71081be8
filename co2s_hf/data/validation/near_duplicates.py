"""Find images that show the same picture, although their files differ: reduced and re-encoded copies.

[`thumbnail`] is computed when a file is decoded, and [`find_copies`] compares the thumbnails of two sets. Each
thumbnail becomes a vector: the differences between its pixels and the means of their 3x3 neighbours. Differences are
limited to `LIMIT` grey levels, so that one strong edge, such as the border of pixels without data, does not outweigh
the rest. The similarity of two images is the cosine between their vectors.

Images with too little structure are not compared, because all images of calm water or of sand look alike.
"""

import base64
from collections.abc import Sequence

import numpy as np
from PIL import Image


SIDE = 16  # of a thumbnail; a vector has one difference for each pixel that is not at the border
MARGIN = 0.25  # share of the image on each side that is left out, because a thumbnail of the middle is faster
LIMIT = 3.0  # grey levels
MIN_STRUCTURE = 2.0  # smallest root mean square of the differences, in grey levels
MIN_SIMILARITY = 0.92  # different aerial images had at most 0.91; copies of half the size usually have more than 0.95
IMAGES_PER_STEP = 256  # with 100,000 other images, their similarities take 100 MB


def thumbnail(image: Image.Image) -> str:
    """Return the middle of an image, reduced to 16x16 grey pixels, as text (base64)."""
    left, top = MARGIN * image.width, MARGIN * image.height
    box = (left, top, image.width - left, image.height - top)
    small = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box, reducing_gap=2)
    return base64.b64encode(small.convert("L").tobytes()).decode()


def find_copies(thumbnails: Sequence[str], among: Sequence[str]) -> list[int | None]:
    """Find, for each image, the most similar one among others.

    Args:
        thumbnails: Thumbnails of the images to look for; "" for an image that cannot be read.
        among: Thumbnails of the images to compare them with.

    Returns:
        For each image, a position in `among`; None if no image of `among` shows the same picture.
    """
    found: list[int | None] = [None] * len(thumbnails)
    known, others = _vectors(among)
    if not len(known):
        return found
    for start in range(0, len(thumbnails), IMAGES_PER_STEP):
        places, vectors = _vectors(thumbnails[start : start + IMAGES_PER_STEP])
        similarities = vectors @ others.T
        best = similarities.argmax(axis=1)
        for row, (place, column) in enumerate(zip(places.tolist(), best.tolist())):
            if similarities[row, column] >= MIN_SIMILARITY:
                found[start + place] = int(known[column])
    return found


def _vectors(thumbnails: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of the images with enough structure, (images,), and their vectors of length 1."""
    readable = [place for place, text in enumerate(thumbnails) if text]
    content = b"".join(base64.b64decode(thumbnails[place]) for place in readable)
    pixels = np.frombuffer(content, dtype=np.uint8).reshape(-1, SIDE, SIDE).astype(np.float32)
    inner = SIDE - 2
    means = sum(pixels[:, row : row + inner, column : column + inner] for row in range(3) for column in range(3)) / 9
    differences = (pixels[:, 1:-1, 1:-1] - means).clip(-LIMIT, LIMIT).reshape(-1, inner * inner)
    lengths = np.linalg.norm(differences, axis=1)
    kept = lengths >= MIN_STRUCTURE * inner
    return np.array(readable, dtype=int)[kept], differences[kept] / lengths[kept, None]
