"""How is a model trained? Options, losses, optimizer, the loop, evaluation and checkpoints.

- `options`: the options of a run and their defaults.
- `loop`: `setup`, `train`, `training_step` and `finish`. Start reading here.
- `run`: the state of a run, and the functions that make its data, losses and batches.
- `models`: builds the model of a run, or loads a trained model and adds a LoRA adapter.
- `objective`, `pseudo_labels`: from a batch of views to named losses.
- `optimization`: optimizer, learning rates, class weights.
- `evaluation`, `confusion`: scores of a model on labelled images.
- `metrics`: the same scores as a metric of the `evaluate` library.
- `checkpoints`: the files that a run writes, and how to resume from them.
- `logbook`: log.jsonl, console lines, trackers, and steps whose loss is not finite.
- `lora`: the peft configuration, and merging.

May import: geo, inference, data, model, utils.
"""
