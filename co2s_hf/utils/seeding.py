"""Random generators that depend only on a seed, a stream and an index.

A stream is one purpose of random numbers. Different streams and different indices give independent numbers. They do
not depend on the machine, on the order of the calls or on the number of processes.
"""

import numpy as np


# Streams. Results of earlier runs depend on these numbers: do not change them.
VIEWS_STREAM = 0  # crops, flips and appearance of one training item
LABELED_STREAM = 1  # order of the labelled images in one pass through their list
UNLABELED_STREAM = 2  # order of the unlabelled images in one pass through their list
SPLIT_STREAM = 3  # which images become validation or labelled images
RARE_CLASS_STREAM = 4  # class, image and crop of one labelled item, with rare-class sampling
WARM_UP_STREAM = 5  # views that show whether the warm-up may end
# A pretraining is a run of its own, so its streams may have the numbers of others.
PRETRAINING_STREAM = 4  # order of the tiles in one pass of a pretraining
PRETRAINING_VIEWS_STREAM = 5  # crop and appearance of one item of a pretraining


def random_generator(seed: int, stream: int, index: int) -> np.random.Generator:
    """Create the random generator for one index of a stream.

    Args:
        seed: Seed of the run, 0 or more.
        stream: One of the `*_STREAM` constants.
        index: Number of the item, pass or draw within the stream, 0 or more.
    """
    return np.random.default_rng([seed, stream, index])
