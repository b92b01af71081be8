from co2s_hf.utils.seeding import (
    LABELED_STREAM,
    SPLIT_STREAM,
    UNLABELED_STREAM,
    VIEWS_STREAM,
    random_generator,
)


def test_numbers_depend_only_on_seed_stream_and_index():
    def numbers(*key):
        return random_generator(*key).random(3).tolist()

    assert numbers(1, 2, 3) == numbers(1, 2, 3)
    assert len({tuple(numbers(*key)) for key in ((1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (3, 2, 1))}) == 5


def test_streams_and_numbers_are_those_of_earlier_runs():
    assert (VIEWS_STREAM, LABELED_STREAM, UNLABELED_STREAM, SPLIT_STREAM) == (0, 1, 2, 3)
    assert random_generator(7, SPLIT_STREAM, 0).permutation(8).tolist() == [3, 5, 0, 4, 2, 7, 1, 6]
