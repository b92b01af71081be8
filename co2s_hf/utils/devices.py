"""Start Accelerate in the same way in every command: precision, CPU threads, timeout between processes."""

import logging
import multiprocessing
import os
from datetime import timedelta

import torch
from accelerate import Accelerator, InitProcessGroupKwargs, PartialState
from accelerate.utils import DistributedType, parse_flag_from_env

from .errors import UserValueError


logger = logging.getLogger(__name__)

# The first process may download and check a whole data set while the others wait.
PATIENCE = InitProcessGroupKwargs(timeout=timedelta(hours=12))

# Environment variables with which `accelerate launch` chooses plugins that shard the weights or replace the optimizer.
UNSUPPORTED_PLUGINS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}

# x86: AVX512-BF16 and AMX; ARM: BF16 of NEON and SVE. The names are those of `torch.cpu.get_capabilities`.
BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")

MAX_WORKERS = 8


def make_accelerator(use_cpu: bool = False, mixed_precision: str | None = None, **accelerator_kwargs) -> Accelerator:
    """Create the Accelerator of a run.

    On a CPU without bfloat16 instructions, bf16 is replaced by float32, with a warning. On a GPU, float32 matrix
    products use TF32 or the like, in the whole process.

    Args:
        use_cpu: Stay on the CPU even if there is a GPU.
        mixed_precision: "no" or "bf16". None: the choice of `accelerate launch`. "bf16" means one thing everywhere:
            `Accelerator.autocast` around the forward passes of trainings, evaluations, images and scenes. The weights
            stay in float32. Autocast computes normalisations and losses in float32.
        accelerator_kwargs: Further arguments of `Accelerator`.

    Raises:
        UserValueError: The mixed precision is fp16, or the weights would be sharded, or the device is an XLA device.
            `accelerate launch` may have chosen them.
    """
    _check_plugins()
    # Accelerate fixes the device here, and the precision in `Accelerator`.
    state = PartialState(use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU"), **PATIENCE.to_kwargs())
    _check_distributed_type(state.distributed_type)
    requested = mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")
    if requested == "bf16" and state.device.type == "cpu" and not has_bfloat16_instructions():
        mixed_precision = "no"
        if state.is_main_process:
            logger.warning(
                "This processor has no bfloat16 instructions, so bfloat16 would be many times slower than float32. "
                "`mixed_precision='no'` (float32) is used instead of `mixed_precision='bf16'`."
            )
    handlers = [PATIENCE, *accelerator_kwargs.pop("kwargs_handlers", [])]
    accelerator = Accelerator(
        cpu=use_cpu, mixed_precision=mixed_precision, kwargs_handlers=handlers, **accelerator_kwargs
    )
    if accelerator.mixed_precision == "fp16":
        raise UserValueError("fp16 overflows inside DINOv3. Use `mixed_precision='bf16'` or `mixed_precision='no'`.")
    _use_all_cores(accelerator)
    _use_fast_products(accelerator.device)
    return accelerator


def has_bfloat16_instructions() -> bool:
    """Return whether the processor has instructions for matrix products in bfloat16."""
    if not hasattr(torch.cpu, "get_capabilities"):  # older versions of PyTorch
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in BFLOAT16_INSTRUCTIONS)


def explain_precision(before: str | None, now: str | None) -> str:
    """Explain why the precision of a resumed run may differ from that of the run, although the options are the same.

    Args:
        before: Precision of the run that is to be continued.
        now: Precision of the present run.

    Returns:
        Sentences for the end of an error message, with a space in front. Empty if the precisions are equal.
    """
    if before == now:
        return ""
    remedy = (
        "Resume with `mixed_precision='bf16'` on a GPU, or on a CPU with these instructions."
        if before == "bf16"
        else "Resume with `mixed_precision='no'`."
    )
    return f" A CPU without bfloat16 instructions uses `mixed_precision='no'` also if bf16 is requested. {remedy}"


def default_num_workers(device: torch.device) -> int:
    """Return the number of worker processes of a DataLoader that suits a device.

    A GPU waits for images that are read and cropped by one process. On a CPU, the training itself needs the cores. On
    Windows and macOS, workers import the user's script again, which must be written for that; so they have none.
    """
    start_method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    if device.type == "cpu" or start_method == "spawn":
        return 0
    return min(MAX_WORKERS, _cores_per_process())


def _check_plugins():
    """Refuse plugins of Accelerate that shard the weights. The model is evaluated and saved as a whole.

    With sharded weights, every forward pass needs all processes. But the processes of an evaluation predict different
    numbers of windows, so they would wait for each other forever. The gain would be small: a student cannot be sharded
    by layers, because it calls submodules of backbone layers directly, and a ViT-B model has 0.7 GB of weights.

    This must come before `Accelerator`, which imports the library of the plugin and starts it.
    """
    for variable, name in UNSUPPORTED_PLUGINS.items():
        if parse_flag_from_env(variable):
            raise UserValueError(
                f"`accelerate launch` chose {name} (environment variable {variable}), which is not supported: parts "
                "of the weights would be missing in evaluations and saved models. Every device needs the whole model: "
                "choose several GPUs without a plugin, in `accelerate config` or among the options of `accelerate "
                "launch`."
            )


def _check_distributed_type(distributed_type: DistributedType):
    """Refuse XLA devices. Accelerate chooses them wherever torch_xla is installed, also on a machine with a GPU."""
    if distributed_type == DistributedType.XLA:
        raise UserValueError(
            "Accelerate chose an XLA device because torch_xla is installed. XLA devices such as TPUs are not "
            "supported. To use the GPU or the CPU, set the environment variable USE_TORCH_XLA=false."
        )


def _use_all_cores(accelerator: Accelerator):
    """Divide the CPU cores among the processes of a CPU run that `accelerate launch` started.

    The launcher sets one thread per process unless `--num_cpu_threads_per_process` is given. Without the launcher,
    this function does nothing, so PyTorch's default (or OMP_NUM_THREADS) applies.
    """
    if accelerator.device.type == "cpu" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        torch.set_num_threads(max(torch.get_num_threads(), _cores_per_process()))


def _use_fast_products(device: torch.device):
    """Let a GPU compute float32 matrix products in TF32 or the like. On a CPU, results stay the same bit by bit."""
    if device.type != "cpu":
        torch.set_float32_matmul_precision("high")


def _cores_per_process() -> int:
    """Return the number of CPU cores of this process: its share of the cores of the machine, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
