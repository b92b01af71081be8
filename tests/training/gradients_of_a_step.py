"""Save the gradients of the first semi-supervised batch of a run: gradients_of_a_step.py DATA BATCH_SIZE OUTPUT."""

import sys

import torch
from safetensors.torch import save_file

from co2s_hf.data.options import DataOptions
from co2s_hf.data.views import make_views
from co2s_hf.training.loop import setup
from co2s_hf.training.options import TrainingOptions


data_dir, batch_size, output = sys.argv[1:]
options = TrainingOptions(
    from_scratch=True,
    recipe="paper",
    crop_size=32,
    per_device_train_batch_size=int(batch_size),
    max_train_steps=2,
    supervised_warmup_steps=0,
    confidence_threshold=0.2,
    output_dir=f"{output}-run",
    use_cpu=True,
)
run = setup(options, DataOptions(data_dir=data_dir))
batch = next(iter(run.loader))
torch.manual_seed(0)
losses = run.objective(make_views(batch, run.model.config.image_mean, run.model.config.image_std), 0.5)
run.accelerator.backward(losses["loss"])
if run.accelerator.is_main_process:
    gradients = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
    save_file({name: gradient.contiguous() for name, gradient in gradients.items()}, output)
run.objective, run.optimizer, run.loader = run.accelerator.free_memory(run.objective, run.optimizer, run.loader)
run.accelerator.end_training()
