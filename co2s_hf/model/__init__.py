"""How does an image become class probabilities?

The modules (except `handler`) are copied into every saved model, so that the model loads without this package
(`trust_remote_code=True`). They lie side by side and import only each other, torch, NumPy, Pillow, transformers,
huggingface_hub, safetensors and, inside functions that need adapters, peft.

- `configuration_co2s`: sizes, classes, palette, image statistics, fusion rule.
- `modeling_co2s`: backbones, class guidance, decoder, fusion; the model.
- `image_processing_co2s`: images to tensors, logits to label maps; the pipeline.
- `text_guidance_co2s`: class concepts to text embeddings.
- `adapters_co2s`: peft adapters with their own classes.
- `handler`: copied beside the weights for Inference Endpoints. It imports none of the others.

Imports no other package of `co2s_hf`, not even `utils`: these modules raise plain builtin exceptions.
"""
