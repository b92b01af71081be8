"""The six benchmarks as the paper uses them: classes, palette, concepts and protocol."""

from dataclasses import dataclass
from functools import partial

from ..utils.errors import UserValueError


DATASETS_REPOSITORY = "XavierJiezou/co2s-datasets"  # on the Hub: <folder>/images, <folder>/labels
ALL_LABELS = "all"  # the partition in which every training image keeps its labels


@dataclass(frozen=True)
class ClassFacts:
    """One class of a benchmark.

    Args:
        name: Name of the class.
        color: RGB colour of the class.
        synonyms: Other words for the class, separated by commas.
    """

    name: str
    color: tuple[int, int, int]
    synonyms: str

    @property
    def concepts(self) -> list[str]:
        """Texts of the class: its name, then the synonyms. The mean of their embeddings guides the CLIP student."""
        return [self.name, *self.synonyms.split(", ")]

    def to_dict(self) -> dict:
        """Return the class as an entry of a classes.json."""
        return {"name": self.name, "color": list(self.color), "concepts": self.concepts}


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: its classes, in label order, and the paper's protocol for it.

    Args:
        classes: The classes.
        folder: Folder of the images and labels in the data repository on the Hub.
        partitions: Denominators of the labelled shares for which lists exist, the smallest share first.
        num_training: Number of training images, labelled and unlabelled.
        num_validation: Number of validation images.
        reduce_labels: In the label files 0 means "no class" and the classes start at 1. Otherwise 255 means "no class"
            and the classes start at 0.
        crop_size: Side of training crops and of evaluation windows, in pixels.
        images_per_device: Labelled images per step on each of the paper's four GPUs.
        full_list: The authors' list of all training images, below the folder of the benchmark's lists.
        num_epochs: Passes through the unlabelled list.
        base_size: (long, short) side in pixels. Training images are scaled to fit into it before the random scale.
            None: no scaling.
        eval_short_side: Short side in pixels to which validation images are scaled.
    """

    classes: tuple[ClassFacts, ...]
    folder: str
    partitions: tuple[int, ...]
    num_training: int
    num_validation: int
    reduce_labels: bool
    crop_size: int
    images_per_device: int
    full_list: str = "train.txt"
    num_epochs: int = 80
    base_size: tuple[int, int] | None = (2048, 512)
    eval_short_side: int = 512

    def num_labeled(self, partition: int) -> int:
        """Return the number of training images that keep their labels at 1/partition. 1: all of them."""
        return self.num_training // partition

    def denominator(self, partition: str | None) -> int:
        """Return the denominator of a partition such as "1_24" or "1/24"; 1 for "all".

        None: the denominator of the smallest share.

        Raises:
            UserValueError: The benchmark has no lists for it.
        """
        if partition is None:
            return self.partitions[0]
        if partition == ALL_LABELS:
            return 1
        denominators = {f"1{sign}{denominator}": denominator for denominator in self.partitions for sign in "_/"}
        if partition not in denominators:
            known = ", ".join(f"1_{denominator}" for denominator in self.partitions)
            raise UserValueError(f"`partition` is '{partition}'; {self.folder} has {known}, {ALL_LABELS}.")
        return denominators[partition]

    @property
    def config_kwargs(self) -> dict:
        """The fields of [`Co2SConfig`] that describe the classes."""
        return {
            "id2label": {index: facts.name for index, facts in enumerate(self.classes)},
            "palette": [list(facts.color) for facts in self.classes],
            "class_concepts": {facts.name: facts.concepts for facts in self.classes},
        }


_WHDLD_CLASSES = (
    ClassFacts(
        "building", (255, 0, 0), "residential building, commercial building, industrial building, high-rise, low-rise"
    ),
    ClassFacts("road", (255, 255, 0), "highway, arterial road, residential road, asphalt road, concrete road"),
    ClassFacts(
        "pavement", (192, 192, 0), "sidewalk, pedestrian path, concrete pavement, brick pavement, stone pavement"
    ),
    ClassFacts("vegetation", (0, 255, 0), "tree, shrub, grassland, farmland, vegetation patch"),
    ClassFacts(
        "bare soil", (128, 128, 128), "unvegetated land, soil exposure, construction site, quarry, desert area"
    ),
    ClassFacts("water", (0, 0, 255), "lake, river, pond, water body, water surface, reservoir"),
)

_LOVEDA_CLASSES = (
    ClassFacts("background", (255, 255, 255), "undeveloped land, open space, background area, unclassified region"),
    ClassFacts(
        "building",
        (255, 0, 0),
        "residential building, commercial building, industrial building, public building, high-rise",
    ),
    ClassFacts("road", (255, 255, 0), "highway, urban road, rural road, asphalt road, concrete road"),
    ClassFacts("water", (0, 0, 255), "lake, river, pond, reservoir, water body"),
    ClassFacts("barren", (159, 129, 183), "bare soil, desert, construction site, mining area, exposed rock"),
    ClassFacts("forest", (0, 255, 0), "deciduous forest, evergreen forest, mixed forest, woodland, tree canopy"),
    ClassFacts("agriculture", (255, 195, 128), "farmland, cropland, orchard, vineyard, greenhouse"),
)

_POTSDAM_CLASSES = (
    ClassFacts("impervious_surface", (255, 255, 255), "asphalt, concrete, pavement, roof, sidewalk"),
    ClassFacts(
        "building", (0, 0, 255), "residential building, commercial building, church, factory, historical building"
    ),
    ClassFacts("low_vegetation", (0, 255, 255), "grass, lawn, meadow, pasture, flower bed"),
    ClassFacts("tree", (0, 255, 0), "deciduous tree, evergreen tree, tree row, park tree, forest edge"),
    ClassFacts("car", (255, 255, 0), "passenger car, truck, van, bus, parked vehicle"),
    ClassFacts("clutter", (255, 0, 0), "fence, wall, railway, construction site, unclassified object"),
)

_GID15_CLASSES = (
    ClassFacts(
        "industrial_land",
        (200, 0, 0),
        "factory area, industrial park, workshop zone, warehouse area, industrial facility",
    ),
    ClassFacts(
        "urban_residential",
        (250, 0, 150),
        "apartment area, high-density housing, urban housing, residential block, city community",
    ),
    ClassFacts(
        "rural_residential",
        (200, 150, 150),
        "village housing, countryside settlement, rural homestead, low-rise rural house, scattered village",
    ),
    ClassFacts(
        "traffic_land", (250, 150, 150), "road network, highway, urban road, transport corridor, parking and driveway"
    ),
    ClassFacts(
        "paddy_field", (0, 200, 0), "rice field, paddy rice farmland, flooded field, irrigated paddy, cultivated paddy"
    ),
    ClassFacts(
        "irrigated_land",
        (150, 250, 0),
        "irrigated farmland, canal-irrigated field, well-irrigated cropland, watered field, intensive irrigated land",
    ),
    ClassFacts(
        "dry_cropland",
        (150, 200, 150),
        "rainfed cropland, dry farming field, non-irrigated farmland, upland crop field, seasonal cropland",
    ),
    ClassFacts(
        "garden_plot", (200, 0, 200), "orchard, vegetable garden, economic crop field, plantation, horticultural land"
    ),
    ClassFacts(
        "arbor_woodland",
        (150, 0, 250),
        "forest land, tree plantation, tall woodland, closed canopy forest, tree-covered area",
    ),
    ClassFacts(
        "shrub_land", (150, 150, 250), "bushland, scrub vegetation, low shrub area, shrub-covered slope, sparse shrub"
    ),
    ClassFacts(
        "natural_grassland", (250, 200, 0), "native grassland, pasture, meadow, natural herbaceous area, grazing land"
    ),
    ClassFacts(
        "artificial_grassland",
        (200, 200, 0),
        "man-made grassland, artificial lawn, urban green grass, reclaimed grassland, managed grass field",
    ),
    ClassFacts("river", (0, 0, 200), "river channel, stream, watercourse, flowing water, river system"),
    ClassFacts("lake", (0, 150, 200), "water lake, inland lake, large water body, open water surface, natural lake"),
    ClassFacts("pond", (0, 200, 250), "fish pond, small water pond, artificial pond, storage pond, still water body"),
)

_MARS_CLASSES = (
    ClassFacts(
        "Martian Soil", (128, 0, 0), "mars soil, red soil, martian regolith, planetary soil, extraterrestrial soil"
    ),
    ClassFacts("Sands", (0, 128, 0), "martian sand, fine grains, loose sand, desert sand, silica sand"),
    ClassFacts("Gravel", (128, 128, 0), "martian gravel, coarse gravel, pebbles, stone fragments, rocky gravel"),
    ClassFacts("Bedrock", (0, 0, 128), "martian bedrock, solid rock, bedrock layer, parent rock, foundation rock"),
    ClassFacts("Rocks", (128, 0, 128), "martian rocks, boulders, stone blocks, rock formations, large rocks"),
    ClassFacts("Tracks", (0, 128, 128), "rover tracks, vehicle tracks, wheel tracks, trail marks, path imprints"),
    ClassFacts("Shadows", (128, 128, 128), "martian shadows, rock shadows, shadow regions, dark areas, sun shadows"),
    ClassFacts(
        "Unknown",
        (64, 0, 0),
        "unidentified object, unknown material, ambiguous feature, unclassified, mysterious object",
    ),
    ClassFacts(
        "Background",
        (192, 0, 0),
        "martian background, scene background, context area, surroundings, environment background",
    ),
)


# The classes of GID-15, MER and MSL start at 0 in the label files; those of the other benchmarks start at 1.
_from_0 = partial(
    Benchmark,
    reduce_labels=False,
    crop_size=512,
    images_per_device=1,
    partitions=(8, 4),
    full_list="all/labeled.txt",
)
_from_1 = partial(Benchmark, reduce_labels=True)

BENCHMARKS = {
    "whdld": _from_1(
        _WHDLD_CLASSES,
        folder="WHDLD",
        partitions=(32, 24, 16, 8, 4),
        num_training=4446,
        num_validation=494,
        crop_size=256,
        images_per_device=2,
    ),
    "loveda": _from_1(
        _LOVEDA_CLASSES,
        folder="LOVEDA",
        partitions=(40, 24, 16, 8, 4),
        num_training=3771,
        num_validation=420,
        crop_size=512,
        images_per_device=1,
        base_size=None,
        eval_short_side=1024,
    ),
    "potsdam": _from_1(
        _POTSDAM_CLASSES,
        folder="POTSDAM",
        partitions=(32, 24, 16, 8, 4),
        num_training=4924,
        num_validation=548,
        crop_size=512,
        images_per_device=1,
    ),
    "gid": _from_0(_GID15_CLASSES, folder="GID", num_training=2736, num_validation=684),
    "mer": _from_0(_MARS_CLASSES, folder="MER", num_training=851, num_validation=213, num_epochs=150),
    "msl": _from_0(_MARS_CLASSES, folder="MSL", num_training=3141, num_validation=786),
}
