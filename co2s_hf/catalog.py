"""The six benchmarks' classes as the paper uses them: names, palette and concepts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ClassFacts:
    """One class: its name, its RGB colour, and words for it besides its name, separated by commas."""

    name: str
    color: tuple[int, int, int]
    synonyms: str

    @property
    def concepts(self) -> list[str]:
        """What its text embedding is the mean of: the name first."""
        return [self.name, *self.synonyms.split(", ")]


@dataclass(frozen=True)
class Benchmark:
    """One benchmark's classes, in label order."""

    classes: tuple[ClassFacts, ...]

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


BENCHMARKS = {
    "whdld": Benchmark(_WHDLD_CLASSES),
    "loveda": Benchmark(_LOVEDA_CLASSES),
    "potsdam": Benchmark(_POTSDAM_CLASSES),
    "gid": Benchmark(_GID15_CLASSES),
    "mer": Benchmark(_MARS_CLASSES),
    "msl": Benchmark(_MARS_CLASSES),
}
