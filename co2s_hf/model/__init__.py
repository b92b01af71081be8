"""How does an image become class probabilities?

All modules except `handler` and `auto_classes` are copied into every saved model, so that the model loads without
this package (`trust_remote_code=True`). They import only each other, torch, NumPy, Pillow, transformers,
huggingface_hub, safetensors and, inside functions that need adapters, peft.

- `configuration_co2s`: sizes, classes, palette, image statistics and fusion rule.
- `modeling_co2s`: the model with its backbones, class guidance, decoders and fusion.
- `image_processing_co2s`: images to tensors, logits to label maps, and the pipeline.
- `loading_co2s`: strict loading of weights.
- `text_guidance_co2s`: class concepts to text embeddings, and loading pretrained backbones.
- `adapters_co2s`: peft adapters with classes of their own.
- `auto_classes`: registers the classes with transformers. `import co2s_hf` does this.
- `handler`: copied beside the weights for Inference Endpoints. It imports none of the others.

This package imports no other package of `co2s_hf`, not even `utils`. It raises the builtin exceptions of Python.
"""
