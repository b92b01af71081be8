"""transformers' common test suites, run on our classes: which tests fail or are skipped, and why.

The suites are in the source distribution of transformers. They are downloaded for the installed version, because no
wheel has them. transformers_cases.py says how the suites build our classes.
"""

import json
import os
import re
import subprocess
import sys
import tarfile
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import transformers
from helpers import environment


pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
DOWNLOAD = ("--no-binary", ":all:", "--no-deps", "--no-build-isolation")

# The suites import these modules, which the source distribution does not have. Our cases do not use them.
ABSENT_MODULES = {
    "tests/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "tests/utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "utils/fetch_hub_objects_for_ci.py": "def url_to_local_path(url):\n    return url\n",
}

# Pattern of tests -> a pattern that each of their messages matches, and why they fail. The first match counts.
NO_WEIGHTS = "'sdpa'` does not keep attention weights|not supported when using the `attn_implementation` set to sdpa"
NO_SDPA = (
    NO_WEIGHTS,
    "The test asks for attention weights with sdpa. Other models return an empty tuple; this one refuses. "
    "EagerModelTest or the students' cases run the same test with eager.",
)
COMPARES_SDPA = (
    NO_WEIGHTS,
    "The test compares the attention weights of eager with those of sdpa, which keeps none: this model refuses.",
)
TWO_NAMES = (
    "no attribute '(hidden_states|attentions)'|^KeyError: 'hidden_states'$",
    "There are two backbones, so the fields have their names, as in `CLIPOutput`. The students' cases run this test.",
)
NO_GRADIENT = (
    r"(clip.*\.layers\.1\.self_attn\.[qk]_proj\.(weight|bias)|dinov3.*\.mask_token) in .* has no gradient",
    "CLIP's last feature layer uses only the value path. The mask token is used in pre-training only.",
)
KNOWN_FAILURES = {
    "ImageProcessorTest.test_new_models_require_torchvision_backend": (
        "must support the torchvision backend",
        "The image processor needs only Pillow and NumPy.",
    ),
    "ModelTest.test_attention_outputs": TWO_NAMES,
    "ModelTest.test_hidden_states_output": TWO_NAMES,
    "*Test.test_eager_matches_sdpa_inference_*_output_attentions": COMPARES_SDPA,
    "ModelTest.test_eager_matches_sdpa_inference_*": TWO_NAMES,
    "ModelTest.test_capture_outputs_decorator": NO_SDPA,
    "ModelTest.test_model_outputs_equivalence": NO_SDPA,
    "ModelTest.test_retain_grad_hidden_states_attentions": NO_SDPA,
    "ModelTest.test_training_gradient_checkpointing*": NO_GRADIENT,
    "ModelTest.test_can_load_ignoring_mismatched_shapes": (
        "'image_std' expected a list, got float",
        "The test sets every field whose name contains '_std' to 1e-10. It checks only classification models; "
        "test_modeling_co2s.py loads other numbers of classes.",
    ),
    "ModelTest.test_init_weights_can_init_buffers": (
        "`embeddings` in module `Co2STextGuidance`",
        "Until the class text is set, the buffer has random orthogonal vectors; the test expects a constant.",
    ),
    "ModelTest.test_model_get_set_embeddings": (
        "`get_input_embeddings` not auto.handled",
        "There is no token embedding, but two patch embeddings. `enable_input_require_grads` finds both.",
    ),
}

# Message of a skipped test -> why the test is not for our classes, or not for this machine.
KNOWN_SKIPS = {
    r"test requires (Flash Attention|accelerator|MPS|multiple accelerators)": "This needs another device.",
    r"test requires (the kernels library|deepspeed)": "This needs a library that we do not use.",
    r"test is slow": "Compilation on an accelerator; and loading without this package, as test_remote_code.py does.",
    r"No (decoder-only|sequence-to-sequence) language modeling head": "There is no language model.",
    r"This model doesn't use `inputs_embeds`": "There is no language model.",
    r"test_resize_embeddings is set to `False`": "There is no vocabulary.",
    r"no `base_model_class` defined|not in MODEL_MAPPING": "There is no `AutoModel` class, only the whole model.",
    r"no sparse experts|no `output_router_logits`|does not support grouped_mm": "There are no experts.",
    r"does not support sliding window mask": "Every token attends to all others.",
    r"does not have a TP plan": "Tensor parallelism is not supported.",
    r"no _keep_in_fp32_modules": "The whole model works in half precision.",
    r"does not have position embeddings": "The size of the position embeddings stays; they are interpolated.",
    r"does not propagate hidden states correctly or uses another name": "The students' cases run this test.",
    r"both a non-text modality tower and a language sub-model|does not support SDPA": (
        "Only for a vision and a language model; see test_attention_implementations_agree in test_modeling_co2s.py."
    ),
    r"No model with a differentiable loss was available": (
        "Needs one input embedding; see the tests of checkpointing in test_modeling_co2s.py."
    ),
    r"less than 2 backends|torchvision backend is not available": "There is one backend, Pillow.",
    r"No validation found for `preprocess`": "For old classes; unknown keywords are refused by the base class.",
    r"does not have dict size or list image_mean": "By default there is no size, and the mean is a tuple.",
}

# At least so many tests pass. A suite that finds no tests must not look like a success.
PASSED = {"ConfigTest": 1, "ImageProcessorTest": 20, "ModelTest": 62, "EagerModelTest": 2}
PASSED |= {"ClipStudentTest": 28, "Dinov3StudentTest": 28}


def run_or_skip(command: list, purpose: str):
    done = subprocess.run([sys.executable, "-m", "pip", *command], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot {purpose}: {done.stderr.strip()[-300:]}")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, dict]:
    """Run all cases in one process of their own, because the suites replace parts of transformers.

    Returns:
        "Case.test" -> "outcome" ("passed", "failed" or "skipped") and "messages".
    """
    folder = tmp_path_factory.mktemp("transformers")
    requirement = f"transformers=={transformers.__version__}"
    run_or_skip(["download", *DOWNLOAD, "--dest", folder, requirement], f"download the sources of {requirement}")
    run_or_skip(["install", "--no-deps", "--target", folder / "packages", "parameterized"], "install parameterized")
    with tarfile.open(next(folder.glob("transformers-*.tar.gz"))) as archive:
        suites = [member for member in archive if re.fullmatch(r"[^/]+/tests/[a-z_]+\.py", member.name)]
        archive.extractall(folder, suites, filter="data")
    root = next(folder.glob("transformers-*/"))
    for name, text in ABSENT_MODULES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    variables = environment()
    paths = [root, variables["PYTHONPATH"], HERE.parent, folder / "packages"]
    results = folder / "results.json"
    done = subprocess.run(
        [sys.executable, HERE / "transformers_cases.py", results],
        env={**variables, "PYTHONPATH": os.pathsep.join(map(str, paths)), "TRANSFORMERS_TEST_DEVICE": "cpu"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(results.read_text(encoding="utf-8"))


def messages_of(outcomes: dict[str, dict], case: str, outcome: str) -> dict[str, list[str]]:
    return {
        test: found["messages"]
        for test, found in outcomes.items()
        if test.startswith(f"{case}.") and found["outcome"] == outcome
    }


def known_failure(test: str) -> tuple[str, str] | None:
    return next((known for pattern, known in KNOWN_FAILURES.items() if fnmatchcase(test, pattern)), None)


@pytest.mark.parametrize("case", PASSED)
def test_no_test_fails_except_those_with_a_reason(outcomes, case):
    new = {}
    for test, messages in messages_of(outcomes, case, "failed").items():
        known = known_failure(test)
        if known is None or not all(re.search(known[0], message) for message in messages):
            new[test] = messages
    assert not new, json.dumps(new, indent=1)
    assert len(messages_of(outcomes, case, "passed")) >= PASSED[case]


@pytest.mark.parametrize("case", PASSED)
def test_no_test_is_skipped_except_those_with_a_reason(outcomes, case):
    skipped = messages_of(outcomes, case, "skipped")
    new = {
        test: messages
        for test, messages in skipped.items()
        if not all(any(re.search(pattern, message) for pattern in KNOWN_SKIPS) for message in messages)
    }
    assert not new, json.dumps(new, indent=1)


def test_every_reason_is_still_needed(outcomes):
    failed = [test for test, found in outcomes.items() if found["outcome"] == "failed"]
    unused = [pattern for pattern in KNOWN_FAILURES if not any(fnmatchcase(test, pattern) for test in failed)]
    assert not unused
