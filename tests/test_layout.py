"""The direction of imports between packages, and the libraries that parts of the package need."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "co2s_hf"
# A package imports only packages that stand to its right, and itself.
ORDER = ("cli", "hub", "training", "geo", "inference", "data", "model", "utils")
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)

# Files that travel with a saved model import only each other and these libraries (peft inside functions).
HUB_FILES = sorted((PACKAGE / "model").glob("*_co2s.py"))
HUB_LIBRARIES = {"torch", "numpy", "PIL", "transformers", "huggingface_hub", "safetensors", "peft"}


def imports(path: Path) -> tuple[set[Path], set[str]]:
    """Return our modules and the names of other libraries that a file imports, also inside functions."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.level or node.module.split(".")[0] == "co2s_hf"):
            start = path.parents[node.level - 1] if node.level else ROOT
            place = start.joinpath(*(node.module or "").split("."))
            found = {place.with_suffix(".py")} if place.with_suffix(".py").exists() else set()
            if place.is_dir():
                found = {place / f"{alias.name}.py" for alias in node.names}
                found = {module if module.exists() else place / "__init__.py" for module in found}
            assert found, f"{path}: {ast.unparse(node)} is no module"
            ours |= found
        elif isinstance(node, ast.ImportFrom):
            others.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
    return ours, others - set(sys.stdlib_module_names)


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_packages_import_only_from_their_right(path):
    packages = {package_of(module) for module in imports(path)[0]} - {"__init__.py"}
    allowed = ORDER[ORDER.index(package_of(path)) :] if package_of(path) in ORDER else ()
    assert packages <= set(allowed)


def test_every_package_is_installed_and_says_what_is_in_it():
    packages = sorted(path.parent.relative_to(ROOT) for path in PACKAGE.rglob("__init__.py"))
    listed = (ROOT / "setup.cfg").read_text(encoding="utf-8").split("packages =")[1].split("package_dir")[0].split()
    assert sorted(listed) == sorted([*(".".join(path.parts) for path in packages), "co2s_hf.model_cards"])
    for package in ORDER:
        text = ast.get_docstring(ast.parse((PACKAGE / package / "__init__.py").read_text(encoding="utf-8")))
        for module in (PACKAGE / package).glob("[a-z]*.py"):
            assert module.stem in text, f"co2s_hf/{package}/__init__.py does not mention {module.name}"


@pytest.mark.parametrize("path", HUB_FILES, ids=lambda path: path.stem)
def test_files_that_travel_with_a_model_stand_alone(path):
    ours, others = imports(path)
    assert ours <= set(HUB_FILES) and others <= HUB_LIBRARIES


@pytest.mark.parametrize("path", [p for p in MODULES if package_of(p) != "cli"], ids=lambda path: path.stem)
def test_library_errors_name_parameters_and_not_flags(path):
    raised = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Raise))
    texts = [part.value for node in raised for part in ast.walk(node) if isinstance(part, ast.Constant)]
    flags = [text for text in texts if isinstance(text, str) and re.search(r"--[a-z]+_?[a-z]*", text)]
    assert not [text for text in flags if not re.search(r"`?(co2s|rio|gdal_translate|hf) ", text)]  # whole commands


@pytest.mark.parametrize("path", [*MODULES, *sorted((ROOT / "examples").glob("*.py"))], ids=lambda path: path.name)
def test_functions_fit_on_a_screen(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            has_docstring = ast.get_docstring(node) is not None
            docstring = node.body[0].end_lineno - node.body[0].lineno + 1 if has_docstring else 0
            assert node.end_lineno - node.lineno + 1 - docstring <= 60, node.name


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
    code += "; from co2s_hf.cli import main; main(['--help'])"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


def needed_by(*paths: Path) -> set[str]:
    """Return the libraries that modules and all that they import need."""
    wanted, seen, others = set(paths), set(), set()
    while wanted - seen:
        path = (wanted - seen).pop()
        seen.add(path)
        ours, theirs = imports(path)
        wanted, others = wanted | ours, others | theirs
    return others - HUB_LIBRARIES


def test_the_demo_needs_its_extra_alone():
    # rasterio and accelerate are imported inside functions that the demo does not call.
    needed = needed_by(PACKAGE / "cli" / "demo_page.py", PACKAGE / "inference" / "attention.py")
    assert needed <= {"gradio", "matplotlib", "yaml", "rasterio", "accelerate", "tqdm"}


def test_scenes_need_their_extra_alone():
    extra = {"affine", "matplotlib", "pyarrow", "pyogrio", "rasterio", "shapely"}
    assert needed_by(PACKAGE / "geo" / "scenes.py") - {"tqdm", "accelerate"} <= extra | {"yaml"}
