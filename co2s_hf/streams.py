"""Random numbers that depend on a seed, a purpose and an index alone."""

import numpy as np


# What random numbers are for, so that no two purposes share them.
VIEWS_STREAM, LABELED_STREAM, UNLABELED_STREAM, SPLIT_STREAM = range(4)


def sample_generator(seed: int, stream: int, index: int) -> np.random.Generator:
    """Random numbers of the index-th thing of a stream: the same on any machine, in any order."""
    return np.random.default_rng([seed, stream, index])
