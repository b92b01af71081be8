"""Draw artificial aerial scenes with their label maps: a data set for trials without a download.

The classes are those of WHDLD. Each class has the same colours and the same texture in all scenes: crops have rows,
pavement has slabs, water is smooth. Light, haze and colour balance differ from scene to scene. A few labelled scenes
show only a few of these conditions. Many unlabelled scenes help a model to become independent of them.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ..utils.files import check_new_folder, written_beside
from .benchmarks import BENCHMARKS
from .splits import SPLIT_FILES


CLASSES = BENCHMARKS["whdld"].classes
BUILDING, ROAD, PAVEMENT, VEGETATION, BARE_SOIL, WATER = range(len(CLASSES))

# RGB colours of materials. They are the same in all scenes, up to small random differences.
CROPS, SOILS = ((95, 135, 60), (130, 150, 75)), ((170, 120, 80), (190, 150, 110))
WOODS, WATERS = ((35, 65, 30),), ((40, 75, 90), (60, 95, 95))
ROOFS = ((175, 75, 55), (160, 60, 50), (90, 115, 150), (200, 185, 160))
# Ranges of the conditions that differ from scene to scene.
EXPOSURE, WHITE_BALANCE, SATURATION = (0.6, 1.25), (0.87, 1.13), (0.45, 1.3)
HAZE, HAZE_COLOR = (0, 0.33), np.array((190, 200, 210), dtype=np.float32)


class _Scene:
    """A scene that is being drawn. Each method draws over the earlier content.

    Args:
        rng: Random generator of all choices.
        size: Side of the scene in pixels.
    """

    def __init__(self, rng: np.random.Generator, size: int):
        self.rng, self.size = rng, size
        self.image = np.zeros((size, size, 3), dtype=np.float32)
        self.labels = np.full((size, size), VEGETATION, dtype=np.uint8)
        self.grid = np.stack(np.meshgrid(np.arange(size), np.arange(size)), axis=-1)  # (size, size, xy)

    def one_of(self, colors: tuple[tuple[int, int, int], ...]) -> np.ndarray:
        """Choose one of the colours and add a small random difference."""
        return np.array(colors[self.rng.integers(len(colors))]) + self.rng.normal(0, 7, size=3)

    def noise(self, cells: int) -> np.ndarray:
        """Draw a smooth random field (size, size) with `cells` bumps per side and a standard deviation of about 1."""
        coarse = Image.fromarray(self.rng.normal(size=(cells + 1, cells + 1)).astype(np.float32))
        return np.asarray(coarse.resize((self.size, self.size), Image.Resampling.BICUBIC))

    def paint(
        self,
        where: np.ndarray,
        label: int,
        color: tuple[float, float, float],
        roughness: float,
        cells: int,
        grain: float,
    ):
        """Give pixels a class, a colour and a texture.

        Args:
            where: Boolean (size, size), true for the pixels to paint.
            label: Class index.
            color: Mean RGB colour, 0 to 255.
            roughness: Strength of the smooth part of the texture.
            cells: Bumps per side of the smooth part.
            grain: Standard deviation of the noise per pixel.
        """
        texture = roughness * self.noise(min(cells, self.size))[where, None]
        self.image[where] = np.array(color) + texture + self.rng.normal(0, grain, size=(int(where.sum()), 1))
        self.labels[where] = label

    def stripes(self, period_px: float) -> np.ndarray:
        """Draw parallel waves (size, size), -1 to 1, in a random direction."""
        direction = self.rng.uniform(0, np.pi)
        across = self.grid @ np.array([np.cos(direction), np.sin(direction)])
        return np.sin(2 * np.pi * across / period_px)

    def polygon(self, points: np.ndarray) -> np.ndarray:
        """Return a boolean array (size, size), true inside the polygon with these corners (n, xy)."""
        canvas = Image.new("1", (self.size, self.size))
        ImageDraw.Draw(canvas).polygon([tuple(point) for point in points], fill=1)
        return np.asarray(canvas)

    def line(self, points: np.ndarray, width: int) -> np.ndarray:
        """Return a boolean array (size, size), true on the polyline through these points (n, xy)."""
        canvas = Image.new("1", (self.size, self.size))
        ImageDraw.Draw(canvas).line([tuple(point) for point in points], fill=1, width=width, joint="curve")
        return np.asarray(canvas)

    def fields(self):
        """Cover the whole scene with fields: crops in rows, meadows, bare soil."""
        centers = self.rng.uniform(0, self.size, size=(self.rng.integers(3, 8), 2))
        distances = np.linalg.norm(self.grid[:, :, None] - centers, axis=-1)
        owner = distances.argmin(axis=-1)
        for index in range(len(centers)):
            where = owner == index
            kind = self.rng.random()
            if kind < 0.35:
                self.paint(where, BARE_SOIL, self.one_of(SOILS), 10, 10, grain=2)
            elif kind < 0.75:
                self.paint(where, VEGETATION, self.one_of(CROPS), 5, 24, grain=4)
                self.image[where] += 14 * self.stripes(self.rng.uniform(6, 9))[where, None]  # crops in rows
            else:
                self.paint(where, VEGETATION, self.one_of(CROPS), 12, 40, grain=6)

    def woods(self):
        """Add dark, rough patches of trees."""
        where = self.noise(5) > self.rng.uniform(0.6, 1.6)
        self.paint(where, VEGETATION, self.one_of(WOODS), 18, 48, grain=6)

    def water(self):
        """Add lakes, a river, or nothing."""
        kind = self.rng.random()
        color = self.one_of(WATERS)
        if kind < 0.4:
            where = self.noise(3) > self.rng.uniform(0.7, 1.3)
            self.paint(where, WATER, color, 3, 4, grain=0.7)
        elif kind < 0.65:
            self.paint(self.line(self.crossing(bends=4), self.rng.integers(14, 28)), WATER, color, 3, 4, grain=0.7)

    def crossing(self, bends: int) -> np.ndarray:
        """Draw a random polyline (bends + 2, xy) from one side of the scene to the opposite side."""
        along = np.linspace(-0.1, 1.1, bends + 2) * self.size
        across = self.rng.uniform(0.15, 0.85) * self.size + np.cumsum(self.rng.normal(0, 0.08 * self.size, bends + 2))
        points = np.stack([along, across], axis=-1)
        return points if self.rng.random() < 0.5 else points[:, ::-1]

    def roads(self) -> list[np.ndarray]:
        """Add one or two roads, some of them with pavements on both sides, and return their polylines."""
        lines = [self.crossing(bends=2) for _ in range(self.rng.integers(1, 3))]
        widths = [int(self.rng.integers(8, 14)) for _ in lines]
        for points, width in zip(lines, widths):
            if self.rng.random() < 0.6:
                self.pave(self.line(points, width + 10))
        for points, width in zip(lines, widths):
            gray = self.rng.uniform(70, 95)
            self.paint(self.line(points, width), ROAD, (gray, gray, gray + 4), 2, 16, grain=2)
            self.image[self.line(points, 1)] += 80  # centre line
        return lines

    def pave(self, where: np.ndarray):
        """Paint pavement of slabs where the array is true."""
        gray, pitch = self.rng.uniform(155, 185), self.rng.integers(5, 8)
        self.paint(where, PAVEMENT, (gray, gray, gray - 6), 3, 24, grain=3)
        self.image[where & (self.grid % pitch == 0).any(axis=-1)] -= 35

    def buildings(self, roads: list[np.ndarray]):
        """Add buildings along the roads, with shadows and sometimes a paved yard."""
        shadow_offset = self.rng.uniform(2, 5) * np.array([np.cos(a := self.rng.uniform(0, 2 * np.pi)), np.sin(a)])
        taken = (self.labels == ROAD) | (self.labels == WATER)
        for _ in range(self.rng.integers(5, 15)):
            points = roads[self.rng.integers(len(roads))]
            start = self.rng.integers(len(points) - 1)
            direction = points[start + 1] - points[start]
            direction = direction / np.linalg.norm(direction)
            normal = np.array([-direction[1], direction[0]])
            center = points[start] + self.rng.random() * (points[start + 1] - points[start])
            center = center + normal * self.rng.choice([-1, 1]) * self.rng.uniform(20, 50)
            half = self.rng.uniform(8, 20, size=2)
            corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * half
            outline = center + corners[:, :1] * direction + corners[:, 1:] * normal
            roof = self.polygon(outline)
            if not roof.any() or (roof & taken).any():
                continue
            if self.rng.random() < 0.4:
                self.pave(self.polygon(center + (outline - center) * 1.6) & ~taken)
            self.image[self.polygon(outline + shadow_offset) & ~roof] *= 0.5
            self.paint(roof, BUILDING, self.one_of(ROOFS), 2, 8, grain=2)
            lit = self.polygon(center + (corners * (1, 0.5) + (0, 0.5) * half) @ np.stack([direction, normal]))
            self.image[roof & lit] += 22  # side of the roof that faces the sun
            self.image[roof & ~lit] -= 22
            taken |= self.polygon(center + (outline - center) * 1.2)

    def photograph(self) -> np.ndarray:
        """Return the image (size, size, 3), float, under random light, haze and colour balance."""
        light = self.image * self.rng.uniform(*EXPOSURE) * self.rng.uniform(*WHITE_BALANCE, size=3)
        gray = light.mean(axis=-1, keepdims=True)
        light = gray + self.rng.uniform(*SATURATION) * (light - gray)
        haze = self.rng.uniform(*HAZE)
        return (1 - haze) * light + haze * HAZE_COLOR + 4 * self.noise(2)[:, :, None]


def draw_scene(rng: np.random.Generator, size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Draw one scene.

    Args:
        rng: Random generator of all choices.
        size: Side of the scene in pixels.

    Returns:
        Image (size, size, 3) and label map (size, size), both uint8. Every pixel has a class.
    """
    scene = _Scene(rng, size)
    scene.fields()
    scene.woods()
    scene.water()
    scene.buildings(scene.roads())
    image = Image.fromarray(scene.photograph().clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.6))
    return np.asarray(image), scene.labels


def write_scenes(
    folder: str | Path, num_labeled: int, num_unlabeled: int, num_validation: int, size: int = 128, seed: int = 0
) -> Path:
    """Draw a data folder that [`open_source`] can open.

    Args:
        folder: New folder. It does not exist before all files are written.
        num_labeled, num_unlabeled, num_validation: Number of scenes per set. Unlabelled scenes have label files, too,
            so that pseudo-labels can be measured.
        size: Side of a scene in pixels.
        seed: Seed of all scenes.

    Returns:
        The folder.

    Raises:
        UserFileExistsError: The folder exists and is not empty.
    """
    counts = {"labeled": num_labeled, "unlabeled": num_unlabeled, "validation": num_validation}
    palette = [value for facts in CLASSES for value in facts.color]
    with written_beside(check_new_folder(folder)) as target:
        for name in ("images", "labels", "splits"):
            (target / name).mkdir()
        for stream, (split, count) in enumerate(counts.items()):
            lines = []
            for index in range(count):
                image, labels = draw_scene(np.random.default_rng([seed, stream, index]), size)
                name = f"{split}_{index:04d}.png"
                Image.fromarray(image).save(target / "images" / name)
                mask = Image.fromarray(labels)
                mask.putpalette(palette)
                mask.save(target / "labels" / name)
                lines.append(f"images/{name} labels/{name}\n")
            (target / "splits" / SPLIT_FILES[split]).write_text("".join(lines), encoding="utf-8")
        classes = [facts.to_dict() for facts in CLASSES]
        (target / "classes.json").write_text(json.dumps(classes, indent=1) + "\n", encoding="utf-8")
    return Path(folder)
