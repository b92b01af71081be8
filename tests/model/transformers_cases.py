"""Test cases for transformers' common test suites; test_transformers_suites.py runs this file with their sources.

`python transformers_cases.py results.json` writes, for each test of each case, its outcome and the messages.
"""

import json
import sys
import unittest
from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial, wraps
from unittest import mock

from helpers import make_config
from tests.test_configuration_common import ConfigTester
from tests.test_image_processing_common import (
    ImageProcessingTester,
    ImageProcessingTestMixin,
    PostProcessSemanticSegmentationTestMixin,
)
from tests.test_modeling_common import ModelTesterMixin, floats_tensor
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.utils.generic import can_return_tuple

from co2s_hf import Co2SConfig, Co2SForSemanticSegmentation, Co2SImageProcessor


class ModelTester:
    """A model of two layers, which is as large as the suites allow."""

    batch_size, num_channels, image_size = 2, 3, 16
    is_training = True
    attn_implementation = "sdpa"

    def get_config(self) -> Co2SConfig:
        backbone = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        return make_config(
            clip_config={**backbone, "patch_size": 4, "image_size": 16, "projection_dim": 12},
            dinov3_config={**backbone, "patch_size": 8, "num_register_tokens": 2},
            clip_feature_layers=(0, 1),
            dinov3_feature_layers=(0, 1),
            decoder_skip_channels=(8,),
            decoder_up_channels=(8,),
            attn_implementation=self.attn_implementation,
        )

    def prepare_config_and_inputs_for_common(self):
        size = (self.batch_size, self.num_channels, self.image_size, self.image_size)
        return self.get_config(), {"pixel_values": floats_tensor(size)}


def with_missing_weights(test: Callable) -> Callable:
    """Let a test load a model from incomplete weights, which the model refuses by default."""

    @wraps(test)
    def run(self):
        load = partial(Co2SForSemanticSegmentation.from_pretrained, ignore_mismatched_sizes=True)
        with mock.patch.object(Co2SForSemanticSegmentation, "from_pretrained", load):
            test(self)

    return run


class ModelTest(ModelTesterMixin, unittest.TestCase):
    """The whole suite on the whole model."""

    all_model_classes = (Co2SForSemanticSegmentation,)
    test_can_init_all_missing_weights_before_2023 = True  # the suite takes a file without a copyright line for old
    test_resize_embeddings = False  # there is no vocabulary
    _is_composite = True

    def setUp(self):
        self.model_tester = ModelTester()

    def test_reverse_loading_mapping(self):
        # A saved model has the names of its `state_dict()`.
        super().test_reverse_loading_mapping(check_keys_were_modified=False)

    test_can_init_all_missing_weights = with_missing_weights(ModelTesterMixin.test_can_init_all_missing_weights)
    test_model_weights_reload_no_missing_tied_weights = with_missing_weights(
        ModelTesterMixin.test_model_weights_reload_no_missing_tied_weights
    )


class EagerTester(ModelTester):
    attn_implementation = "eager"


class EagerModelTest(ModelTest):
    """The tests that need attention weights, on a model that keeps them."""

    only = ("test_model_outputs_equivalence", "test_capture_outputs_decorator")

    def setUp(self):
        self.model_tester = EagerTester()


class OneStudent(Co2SForSemanticSegmentation):
    """One student, whose output has the names that the suites expect: `hidden_states` and `attentions`."""

    student = ""

    @can_return_tuple
    def forward(self, pixel_values, output_hidden_states=None, output_attentions=None):
        found = super().forward(
            pixel_values,
            fusion=self.student,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        names = ("hidden_states", "attentions")
        return SemanticSegmenterOutput(
            logits=found.logits, **{name: getattr(found, f"{self.student}_{name}") for name in names}
        )


class ClipStudent(OneStudent):
    student = "clip"


class Dinov3Student(OneStudent):
    student = "dinov3"


class StudentTester(EagerTester):
    num_hidden_layers, num_attention_heads, hidden_size = 2, 4, 16

    def __init__(self, seq_length: int):
        self.seq_length = seq_length


class ClipStudentTest(ModelTest):
    """The tests of hidden states and attention weights, on the CLIP student."""

    all_model_classes = (ClipStudent,)
    only = (
        "test_attention_outputs",
        "test_hidden_states_output",
        "test_retain_grad_hidden_states_attentions",
        "test_can_capture_specific_layers_hidden_states",
        "test_eager_matches_sdpa_inference_*",
    )

    def setUp(self):
        self.model_tester = StudentTester(seq_length=1 + 16)  # class token, and patches of 4 px


class Dinov3StudentTest(ClipStudentTest):
    """The same tests on the DINOv3 student."""

    all_model_classes = (Dinov3Student,)

    def setUp(self):
        self.model_tester = StudentTester(seq_length=1 + 2 + 4)  # class token, registers, and patches of 8 px


class ConfigTest(unittest.TestCase):
    def setUp(self):
        self.model_tester = ModelTester()

    def test_config(self):
        fields = {"decoder_num_layers": 1, "fusion": "average", "clip_temperature": 1.5}
        ConfigTester(self, config_class=Co2SConfig, has_text_modality=False, **fields).run_common_tests()


class ImageProcessorTester(ImageProcessingTester):
    def __init__(self, parent):
        super().__init__(parent, do_resize=True, size={"height": 20, "width": 30}, num_labels=5)

    def _get_image_processing_classes(self):
        return {"pil": Co2SImageProcessor}


class ImageProcessorTest(ImageProcessingTestMixin, PostProcessSemanticSegmentationTestMixin, unittest.TestCase):
    image_processor_tester_class = ImageProcessorTester


CASES = (ConfigTest, ImageProcessorTest, ModelTest, EagerModelTest, ClipStudentTest, Dinov3StudentTest)


class Outcomes(unittest.TestResult):
    """Outcome and messages of every test; a test with subtests has the messages of all of them."""

    def __init__(self):
        super().__init__()
        self.tests = {}

    def startTest(self, test):
        super().startTest(test)
        self.tests[test.id().removeprefix("__main__.")] = {"outcome": "passed", "messages": []}

    def _note(self, test, outcome: str, message: str):
        test = getattr(test, "test_case", test)  # of a subtest
        found = self.tests[test.id().removeprefix("__main__.")]
        if found["outcome"] != "failed":
            found["outcome"] = outcome
        found["messages"].append(message)

    def addError(self, test, err):
        self._note(test, "failed", f"{err[0].__name__}: {err[1]}")

    addFailure = addError

    def addSubTest(self, test, subtest, err):
        if err is not None:
            self.addError(test, err)

    def addSkip(self, test, reason):
        self._note(test, "skipped", reason)


def select(case: type[unittest.TestCase]) -> list[unittest.TestCase]:
    """Make the tests of a case. `only` contains patterns of their names."""
    names = unittest.defaultTestLoader.getTestCaseNames(case)
    patterns = getattr(case, "only", ("*",))
    return [case(name) for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


def main(path: str):
    outcomes = Outcomes()
    unittest.TestSuite(test for case in CASES for test in select(case)).run(outcomes)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(outcomes.tests, file, indent=1)


if __name__ == "__main__":
    main(sys.argv[1])
