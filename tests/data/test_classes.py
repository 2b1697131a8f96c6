"""Class lists: equal lists, other orders and other names, from data sets and from files."""

import pytest
from PIL import Image

from sagan_fast.data import open_dataset
from sagan_fast.data.classes import differences, in_order, read_classes, take_order
from sagan_fast.errors import InputError


@pytest.fixture
def pets(tmp_path):
    """Four classes of one image each, whose gray value tells the class."""
    for value, name in enumerate(("ant", "bee", "cow", "dog")):
        (tmp_path / "pets" / name).mkdir(parents=True)
        Image.new("L", (4, 4), 50 * value).save(tmp_path / "pets" / name / "1.png")
    return tmp_path / "pets"


def gray_by_name(data):
    return {data.class_names[label]: int(image[0, 0, 0]) for image, label in data}


def test_the_same_names_in_another_order_are_mapped(pets):
    data = open_dataset(f"folder:{pets}", resolution=4, num_classes=4)
    before = gray_by_name(data)
    said = take_order(data, ["dog", "bee", "ant", "cow"], "the checkpoint")
    assert f"folder:{pets} has the classes of the checkpoint in another order: 3 of 4 labels are mapped by name" in said
    assert data.labels.tolist() == [2, 1, 3, 0] and data.class_names == ["dog", "bee", "ant", "cow"]
    assert gray_by_name(data) == before == {"ant": 0, "bee": 50, "cow": 100, "dog": 150}
    assert take_order(data, ["dog", "bee", "ant", "cow"], "the checkpoint") == ""


def test_other_names_are_refused_with_the_first_differences(pets):
    data = open_dataset(f"folder:{pets}", resolution=4)
    with pytest.raises(InputError, match=r"other classes than X: it lacks elk and it has ant \(4 against 4 classes\)$"):
        take_order(data, ["bee", "cow", "dog", "elk"], "X")
    with pytest.raises(InputError, match=r"it lacks 0, 1, 2, \.\.\. and it has ant.*; --classes FILE says which name"):
        take_order(data, ["0", "1", "2", "3"], "X")
    assert data.labels.tolist() == [0, 1, 2, 3]
    assert take_order(data, [], "an old checkpoint") == ""


def test_a_file_gives_the_order_or_the_names(pets, tmp_path):
    def with_file(spec, text, **options):
        (tmp_path / "names.txt").write_text(text)
        return open_dataset(spec, resolution=16, classes=str(tmp_path / "names.txt"), **options)

    data = with_file(f"folder:{pets}", "cow\nant\n\ndog\nbee\n")
    assert data.labels.tolist() == [1, 3, 0, 2] and data.order_given
    assert take_order(data, ["0", "1", "2", "3"], "a checkpoint with numbers") == ""
    with pytest.raises(InputError, match="it lacks elk and it has bee"):
        with_file(f"folder:{pets}", "cow\nant\ndog\nelk\n")
    with pytest.raises(InputError, match="is read without classes"):
        with_file(f"folder:{pets}", "cow\n", num_classes=0)
    for label in range(11):
        (tmp_path / "numbers" / str(label)).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "numbers" / str(label) / "1.png")
    names = [f"class {chr(97 + label)}" for label in range(11)]
    data = with_file(f"folder:{tmp_path / 'numbers'}", "\n".join(names))
    assert data.class_names == names and data.labels.tolist() == list(range(11))


@pytest.mark.parametrize(
    ("text", "message"),
    [("a\nb\na\n", "names a twice"), ("\n\n", "holds no class names"), (None, "cannot be read: No such file")],
)
def test_files_that_are_no_lists(tmp_path, text, message):
    if text is not None:
        (tmp_path / "c.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        read_classes(str(tmp_path / "c.txt"))


def test_order_and_differences():
    assert in_order(["10", "9", "1"]) == ["1", "9", "10"] and in_order(["b10", "b9"]) == ["b10", "b9"]
    assert in_order(["10", "9", "x"]) == ["10", "9", "x"]
    assert differences(["a", "a"], ["a", "a"]) == "a name is there twice (2 against 2 classes)"
