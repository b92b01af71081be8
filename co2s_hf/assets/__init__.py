"""Files that the package ships: the paper's recipes."""
