"""Memory of the process, and durations as text."""

import psutil
import pytest
import torch

from co2s_hf.utils import measuring
from co2s_hf.utils.measuring import format_duration, peak_memory_gb


def test_memory_is_measured_without_the_module_resource(monkeypatch):
    """Windows has no such module."""
    peak = peak_memory_gb(torch.device("cpu"))
    monkeypatch.setattr(measuring, "resource", None)
    monkeypatch.setattr(measuring, "psutil", psutil, raising=False)
    now = peak_memory_gb(torch.device("cpu"))
    assert now == pytest.approx(psutil.Process().memory_info().rss / 1e9, rel=0.1) and now < 1.1 * peak


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (8.16, "8.2 s"),
        (59.7, "60 s"),
        (144, "2.4 min"),
        (720, "12 min"),
        (3599, "1 h 0 min"),
        (7810, "2 h 10 min"),
    ],
)
def test_durations_have_about_two_digits(seconds, text):
    assert format_duration(seconds) == text
