"""How does a model reach other people? Model cards, publishing on the Hub, and conversion of the authors' checkpoints.

- `cards`: write the model card of a folder from its files, and add evaluation results to a card.
- `publishing`: create a repository, and upload a folder in one commit.
- `spaces`: write the files of a Space with the demo page for a model.
- `convert_co2s_to_hf`: convert best_clip.pth and best_dinov3.pth of the authors' code to a model, and back. It needs
  only the core dependencies.

This package may import training, geo, inference, data, model and utils.
"""
