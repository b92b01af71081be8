import pytest

from co2s_hf import Co2SConfig
from co2s_hf.catalog import BENCHMARKS


def test_class_counts_are_the_benchmarks():
    counts = {name: len(benchmark.classes) for name, benchmark in BENCHMARKS.items()}
    assert counts == {"whdld": 6, "loveda": 7, "potsdam": 6, "gid": 15, "mer": 9, "msl": 9}


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_classes_make_a_configuration(name):
    config = Co2SConfig(**BENCHMARKS[name].config_kwargs)
    assert all(5 <= len(concepts) <= 7 for concepts in config.class_concepts.values())
    assert all(concepts[0] == label for label, concepts in config.class_concepts.items())
    assert len({tuple(color) for color in config.palette}) == config.num_labels
