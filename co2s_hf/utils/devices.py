"""Start Accelerate in the same way in every command: precision, CPU threads, timeout between processes."""

import os
from datetime import timedelta

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from .errors import UserValueError


# The first process may download and check a whole data set while the others wait.
PATIENCE = InitProcessGroupKwargs(timeout=timedelta(hours=12))


def make_accelerator(use_cpu: bool = False, mixed_precision: str | None = None, **accelerator_kwargs) -> Accelerator:
    """Create the Accelerator of a run.

    Args:
        use_cpu: Stay on the CPU even if there is a GPU.
        mixed_precision: "no" or "bf16". None: the choice of `accelerate launch`.
        accelerator_kwargs: Further arguments of `Accelerator`.

    Raises:
        UserValueError: The mixed precision is fp16. `accelerate launch` may have chosen it.
    """
    handlers = [PATIENCE, *accelerator_kwargs.pop("kwargs_handlers", [])]
    accelerator = Accelerator(
        cpu=use_cpu, mixed_precision=mixed_precision, kwargs_handlers=handlers, **accelerator_kwargs
    )
    if accelerator.mixed_precision == "fp16":
        raise UserValueError("fp16 overflows inside DINOv3. Use `mixed_precision='bf16'` or `mixed_precision='no'`.")
    _use_all_cores(accelerator)
    return accelerator


def _use_all_cores(accelerator: Accelerator):
    """Divide the CPU cores among the processes of a CPU run that `accelerate launch` started.

    The launcher sets one thread per process unless `--num_cpu_threads_per_process` is given. Without the launcher,
    this function does nothing, so PyTorch's default (or OMP_NUM_THREADS) applies.
    """
    if accelerator.device.type == "cpu" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(torch.get_num_threads(), cores // processes))
