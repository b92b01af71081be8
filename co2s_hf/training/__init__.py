"""How is a model trained? Options, losses, optimizer, the loop, evaluation and checkpoints.

- `options`: the options of a run and their defaults.
- `loop`: `setup`, `train`, `training_step` and `finish`. Start reading here.
- `dry_run`: a few steps without saving anything, to estimate time and memory.
- `run`: the state of a run, and the functions that make its data, losses and batches.
- `models`: builds the model of a run, or loads a trained model and adds a LoRA adapter.
- `objective`, `pseudo_labels`: from a batch of views to named losses.
- `mean_teacher`: the objective of the recipe "balanced", whose pseudo-labels come from averaged weights.
- `class_balance`: thresholds per class and logit adjustment, which keep pseudo-labels of every class.
- `warmup`: the steps on labelled images alone at the start, and when they end.
- `optimization`: optimizer, learning rates, class weights.
- `evaluation`, `confusion`: scores of a model on labelled images.
- `calibration`: temperatures of the students, at the end of a training and during it.
- `comparison`: several methods over several seeds: tables and the gains with their intervals.
- `metrics`: the same scores as a metric of the `evaluate` library.
- `checkpoints`: the files that a run writes, and how to resume from them.
- `logbook`: log.jsonl, console lines, trackers, and steps whose loss is not finite.
- `lora`: the peft configuration, and merging.
- `pretraining`: sub-package: makes small pretrained backbones from images without label maps.

May import: geo, inference, data, model, utils.
"""
