"""From data to a trained folder: losses, optimizer, the loop, evaluation, checkpoints.

- `options`: the options of a run and their defaults.
- `loop`: `setup`, `train`, `training_step`, `finish`: start reading here.
- `run`: the state of a run, and how its data, losses and batches are made.
- `models`: builds the model that a run trains, and prepares a trained one for LoRA.
- `objective`, `pseudo_labels`: from a batch of views to named losses.
- `optimization`: optimizer, learning rates, class weights.
- `evaluation`, `confusion`, `metrics`: scores of a model on labelled images; the `evaluate` library's metric.
- `checkpoints`: what a run writes, and how it is resumed.
- `logbook`: log.jsonl, console lines, trackers.
- `lora`: peft configuration, merging.

May import: geo, inference, data, model, utils.
"""
