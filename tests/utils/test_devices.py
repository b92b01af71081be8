import logging
import multiprocessing

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from helpers import forget_accelerator, run_command

from co2s_hf.cli.train import COMMAND
from co2s_hf.training.options import TrainingOptions
from co2s_hf.training.run import start_accelerate
from co2s_hf.utils import devices
from co2s_hf.utils.devices import default_num_workers, has_bfloat16_instructions, make_accelerator
from co2s_hf.utils.errors import UserValueError


OTHER_DEVICE = "meta"  # a device of PyTorch that every machine has, in the place of a GPU


@pytest.fixture(autouse=True)
def new_accelerator(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    forget_accelerator()
    yield
    forget_accelerator()
    torch.set_float32_matmul_precision("highest")
    torch.set_num_threads(1)  # more would change the last bits of other tests, and crash their forked processes


@pytest.mark.parametrize("is_launched", [False, True])
@pytest.mark.parametrize("has_instructions", [False, True])
def test_a_cpu_without_bfloat16_instructions_uses_float32(has_instructions, is_launched, monkeypatch, caplog):
    monkeypatch.setattr(devices, "has_bfloat16_instructions", lambda: has_instructions)
    if is_launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with caplog.at_level(logging.WARNING, "co2s_hf"):
        accelerator = make_accelerator(True, None if is_launched else "bf16")
    expected, dtype = ("bf16", torch.bfloat16) if has_instructions else ("no", torch.float32)
    with accelerator.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert accelerator.mixed_precision == expected
    warning = (
        "This processor has no bfloat16 instructions, so bfloat16 would be many times slower than float32. "
        "`mixed_precision='no'` (float32) is used instead of `mixed_precision='bf16'`."
    )
    assert [record.getMessage() for record in caplog.records] == ([] if has_instructions else [warning])


def test_another_device_uses_bfloat16_whatever_the_processor_has(monkeypatch, caplog):
    monkeypatch.setattr(devices, "has_bfloat16_instructions", lambda: False)
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", OTHER_DEVICE)
    assert make_accelerator(False, "bf16").mixed_precision == "bf16" and not caplog.records


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"architecture": "x86_64", "avx2": True, "avx512_f": False, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True, "amx_bf16": False}, True),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, True),
        ({"architecture": "aarch64", "neon": True, "bf16": False}, False),
        ({"architecture": "aarch64", "neon": True, "bf16": True}, True),
        ({"architecture": "ppc64le"}, False),
    ],
    ids=["avx2", "avx512", "avx512_bf16", "amx", "arm", "arm_bf16", "other"],
)
def test_the_instructions_of_each_processor(capabilities, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert has_bfloat16_instructions() is expected


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism configuration"),
    ],
)
def test_plugins_that_shard_the_weights_are_refused(variable, name, monkeypatch):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UserValueError, match=rf"chose {name} \(environment variable {variable}\), which is not supp"):
        make_accelerator(True)
    monkeypatch.setenv(variable, "false")
    assert make_accelerator(True).distributed_type == DistributedType.NO


def test_a_training_with_fsdp_stops_before_it_reads_the_data(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    run = run_command("train", "--data_dir", tmp_path / "no_such_folder", "--output_dir", tmp_path / "run")
    assert run.returncode == 1 and "no_such_folder" not in run.stderr
    assert "choose several GPUs without a plugin" in run.stderr and run.stderr.startswith("error: `accelerate launch`")


def test_xla_devices_are_refused(monkeypatch):
    monkeypatch.setitem(PartialState(cpu=True)._shared_state, "distributed_type", DistributedType.XLA)
    with pytest.raises(UserValueError, match=r"XLA devices such as TPUs are not supported. .* USE_TORCH_XLA=false"):
        make_accelerator(True)


@pytest.mark.parametrize(("device", "expected"), [("cpu", "highest"), (OTHER_DEVICE, "high")])
def test_only_a_cpu_computes_float32_products_exactly(device, expected, monkeypatch):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", device)
    make_accelerator()
    assert torch.get_float32_matmul_precision() == expected


@pytest.mark.parametrize(
    ("device", "cores", "processes", "start_method", "expected"),
    [
        ("cuda", 32, 1, "fork", 8),
        ("cuda", 32, 8, "fork", 4),
        ("cuda", 2, 4, "forkserver", 1),
        ("cuda", 32, 1, "spawn", 0),
        ("cpu", 32, 1, "fork", 0),
    ],
)
def test_number_of_worker_processes(device, cores, processes, start_method, expected, monkeypatch):
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda _: range(cores), raising=False)
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: start_method)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert default_num_workers(torch.device(device)) == expected


def test_a_recipe_of_the_paper_reads_images_in_worker_processes_on_a_gpu(monkeypatch):
    """The number depends on the machine, so a recipe has none."""
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda _: range(3), raising=False)
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", OTHER_DEVICE)
    options = COMMAND.parse(["--config", "whdld"])[TrainingOptions]
    start_accelerate(options)
    assert options.dataloader_num_workers == 3


@pytest.mark.parametrize(
    ("device", "given", "expected"), [("cpu", None, 0), (OTHER_DEVICE, None, 3), (OTHER_DEVICE, 0, 0), ("cpu", 2, 2)]
)
def test_a_training_fills_in_the_number_of_worker_processes(device, given, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda _: range(3), raising=False)
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", device)
    options = TrainingOptions(output_dir=str(tmp_path), dataloader_num_workers=given)
    start_accelerate(options)
    assert options.dataloader_num_workers == expected
