"""Tags and captions from a CSV file."""

import pytest

from co2s_hf.training.pretraining.labels import read_image_labels
from co2s_hf.utils.errors import UserValueError


@pytest.fixture
def csv_file(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / "images" / f"{name}.png").touch()
    return tmp_path / "labels.csv"


def test_tags_are_words_and_a_hyphen_is_a_space(csv_file):
    text = "\ufeffimage,scene,tags\nimages/a.png,harbour,Ship  mobile-home ship\nimages/b.png,x,sea\n"
    csv_file.write_text(text, encoding="utf-8")  # with a byte order mark, as from Excel
    labels = read_image_labels(csv_file)
    folder = csv_file.parent.resolve() / "images"
    assert labels.are_tags
    assert labels.texts == {folder / "a.png": ("ship", "mobile home"), folder / "b.png": ("sea",)}
    assert labels.vocabulary == ["mobile home", "sea", "ship"]


def test_a_caption_is_one_text(csv_file):
    text = 'caption,image\n"Two ships,  in a Semi-open harbour.",images/c.png\nA field,images/a.png\n'
    csv_file.write_text(text, encoding="utf-8")
    labels = read_image_labels(csv_file)
    assert not labels.are_tags
    assert list(labels.texts.values()) == [("two ships, in a semi-open harbour.",), ("a field",)]


def test_tags_come_before_captions(csv_file):
    csv_file.write_text("image,caption,tags\nimages/a.png,A field,field trees\n", encoding="utf-8")
    labels = read_image_labels(csv_file)
    assert labels.are_tags and labels.vocabulary == ["field", "trees"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,words\nimages/a.png,sea\n", "has the columns image, words; expected 'image' and 'tags' or 'caption'"),
        ("file,tags\nimages/a.png,sea\n", "has the columns file, tags; expected 'image'"),
        ("", r"has the columns \(none\); expected"),
        ("image,tags\n", "has no lines. Add one line per image"),
        ("image,tags\nimages/a.png,sea\nimages/z.png,sea\n", "line 3: 'images/z.png' is not a file"),
        ("image,tags\n,sea\n", "line 2: '' is not a file"),
        ("image,tags\nimages/a.png, \nimages/b.png\n", "line 2: 'images/a.png' has no tags; line 3: 'images/b.png'"),
        ("image,caption\nimages/a.png,\n", "line 2: 'images/a.png' has no caption"),
        ("image,tags\nimages/a.png,sea\nimages/../images/a.png,ship\n", "line 3: '.*a.png' is named twice"),
        ("image,tags\n" + "z.png,sea\n" * 13, r"line 11: .* \.\.\. and 3 more\. Correct these lines"),
    ],
)
def test_wrong_lines_are_errors(text, message, csv_file):
    csv_file.write_text(text, encoding="utf-8")
    with pytest.raises(UserValueError, match=message) as error:
        read_image_labels(csv_file)
    assert str(error.value).startswith(str(csv_file))


def test_a_file_that_is_not_text_is_an_error(csv_file):
    csv_file.write_bytes("image,tags\nimages/a.png,Bäume\n".encode("latin-1"))
    with pytest.raises(UserValueError, match="is not a CSV file in UTF-8"):
        read_image_labels(csv_file)


def test_a_backslash_separates_folders(csv_file):
    """As in files that were written on Windows."""
    csv_file.write_text("image,tags\nimages\\a.png,sea\n", encoding="utf-8")
    assert read_image_labels(csv_file).texts == {csv_file.parent.resolve() / "images" / "a.png": ("sea",)}
