"""Measure the memory of this process, and format durations."""

import sys

import torch


try:
    import resource
except ImportError:  # Windows
    resource = None
    import psutil  # Accelerate needs it, too


def peak_memory_gb(device: torch.device) -> float:
    """Return the peak memory of this process in GB: GPU memory on a GPU, else main memory.

    Without the module `resource`, Windows gives the peak; other systems give the present memory instead.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if resource is None:
        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def format_duration(seconds: float) -> str:
    """Format a duration with about two digits: "8 s", "2.4 min", "12 min", "2 h 10 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    if seconds < 600:
        return f"{seconds / 60:.1f} min"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
