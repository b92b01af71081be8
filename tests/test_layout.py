"""The direction of dependencies, and what the Hub's copies of the model files may import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[1] / "co2s_hf"

# Files that travel with a checkpoint as remote code: nothing but these libraries and each other.
HUB_FILES = {"adapters_co2s", "configuration_co2s", "modeling_co2s", "image_processing_co2s", "text_guidance"}
HUB_LIBRARIES = {"torch", "numpy", "PIL", "transformers", "huggingface_hub", "safetensors"}
HUB_LIBRARIES |= {"peft"}  # within `try`, where transformers does not ask for it

# Who may import whom, lowest first; a module imports from its own row or those before.
LAYERS = [
    {
        "adapters_co2s",
        "arguments",
        "catalog",
        "configuration_co2s",
        "confusion",
        "figures",
        "files",
        "handler",
        "streams",
        "text_guidance",
    },
    {"metrics", "modeling_co2s", "image_processing_co2s", "views"},
    {"attention", "lora", "objective", "inference", "convert_co2s_to_hf", "reading", "splits"},
    {"ground", "scene_files", "scene_settings", "unfinished"},
    {"maps", "polygons", "rasters"},
    {"scenes"},
    {"class_files", "data", "data_arguments", "benchmark_lists", "logbook", "synthetic"},
    {"scan"},
    {"checks"},
    {"listings"},
    {"sources"},
    {"model_card", "preparation", "report", "training"},
    {"hub"},
    {"__init__"},
]


def imports(module):
    """(names of our modules, names of other top-level packages) that a module imports, wherever it does."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module, f"{module}.py: write `from .module import name`"
            ours.add(node.module)
        elif isinstance(node, ast.ImportFrom):
            others.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
    assert "co2s_hf" not in others, f"{module}.py imports the package by name"
    return ours, others - set(sys.stdlib_module_names)


def test_every_module_has_a_place():
    assert {path.stem for path in PACKAGE.glob("*.py")} == set().union(*LAYERS)


@pytest.mark.parametrize("module", sorted(set().union(*LAYERS)))
def test_arrows_point_one_way(module):
    rank = next(n for n, layer in enumerate(LAYERS) if module in layer)
    assert imports(module)[0] <= set().union(*LAYERS[: rank + 1]) - {module}


@pytest.mark.parametrize("module", sorted(HUB_FILES))
def test_hub_files_stand_alone(module):
    ours, others = imports(module)
    assert ours <= HUB_FILES and others <= HUB_LIBRARIES


def test_importing_the_package_needs_the_core_dependencies_only():
    extras = [
        "kornia",
        "accelerate",
        "datasets",
        "evaluate",
        "peft",
        "matplotlib",
        "rasterio",
        "gradio",
        "torchvision",
    ]
    code = f"import sys; sys.modules.update(dict.fromkeys({extras!r})); import co2s_hf, co2s_hf.hub.convert_co2s_to_hf"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def needed_by(modules):
    """Libraries that some of our modules and all that they import need."""
    wanted, seen, others = {"__init__", *modules}, set(), set()
    while wanted - seen:
        module = (wanted - seen).pop()
        seen.add(module)
        ours, theirs = imports(module)
        wanted, others = wanted | ours, others | theirs
    return others - HUB_LIBRARIES


@pytest.mark.parametrize("script", ["app", "visualize_attention"])
def test_the_demo_needs_its_extra_alone(script):
    text = (PACKAGE.parent / "examples" / f"{script}.py").read_text()
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    modules = {node.module.removeprefix("co2s_hf.") for node in nodes if node.module.startswith("co2s_hf.")}
    # rasterio is imported where a file asks for it; peft where an adapter does.
    assert needed_by(modules) <= {"matplotlib", "yaml", "rasterio"}


def test_scenes_need_their_extra_alone():
    extra = {"affine", "matplotlib", "pyarrow", "pyogrio", "rasterio", "shapely", "yaml"}
    assert needed_by({"scenes"}) == extra | {"tqdm"}  # which comes with transformers
