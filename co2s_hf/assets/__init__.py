"""Files that the package ships: the paper's recipes, real images, and small pretrained backbones."""
