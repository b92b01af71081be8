"""Make backbones: from images without label maps to a small pretrained DINOv3 or CLIP.

- `options`: the options of both kinds.
- `tiles`: tiles of images, and augmented crops that are aligned to the patches.
- `teacher`: patch features of a teacher, computed once and cached.
- `labels`: tags or captions of images.
- `words`: a word-level tokenizer.
- `distillation`: model and objectives for DINOv3: distillation, and masked images.
- `clip`: model and objective for CLIP.
- `outputs`: the output folder: what may be overwritten or resumed, and the log of the losses.
- `card`: the card of a pretrained backbone.
- `loop`: the two trainings. Start reading here.
"""
