"""Names of classes as words: from the data, from WordNet, from a file."""

from types import SimpleNamespace

import pytest

from src.datamodules.extras.class_names import class_names, class_texts, read_class_names
from src.errors import SettingError


def source(*classes: str, names=None) -> SimpleNamespace:
    return SimpleNamespace(classes=classes, class_names=names, prompts=None)


def test_underscores_are_spaces():
    assert class_names(source("apple_pie", "French_Toast", "red")) == ["apple pie", "French Toast", "red"]
    assert class_texts(source("apple_pie"), "a photo of {}.") == ["a photo of apple pie."]


def test_synsets_have_their_names_in_any_subset_and_order():
    """ImageNet's ten classes of Imagenette by WordNet, two cranes that are told apart, and one outside of the 1,000."""
    folders = ["n01440764", "n02102040", "n02979186", "n03000684", "n03028079", "n03394916", "n03417042", "n03425413"]
    words = ["tench", "English springer", "cassette player", "chain saw", "church", "French horn", "garbage truck"]
    assert class_names(source(*folders, "n03445777", "n03888257")) == [*words, "gas pump", "golf ball", "parachute"]
    assert class_names(source("n03126707", "n02012849")) == ["crane", "crane bird"]
    assert class_names(source("n00007846", "n01440764")) == ["person", "tench"]
    with pytest.raises(SettingError, match=r"'n99999999' is no synset of ImageNet; data.class_names=<file> gives"):
        class_names(source("n01440764", "n99999999"))


def test_classes_without_names_are_refused():
    with pytest.raises(SettingError, match=r"are numbers \(0, 1, 2 …\), not names; data.class_names=<file> gives them"):
        class_names(source("0", "1", "2", "3"))
    with pytest.raises(SettingError, match=r"has no class names; data.class_names=<file> gives them"):
        class_names(source())


def test_a_file_names_classes_by_label_or_by_class(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("a cat\n\n  a dog \n")
    assert read_class_names(file, ["n1", "n2"]) == read_class_names(file, []) == ["a cat", "a dog"]
    assert class_names(source("n1", "n2", names=["a cat", "a dog"])) == ["a cat", "a dog"]
    file.write_text("n2\ta dog\nn3\ta cow\nn1\ta cat\n")
    assert read_class_names(file, ["n1", "n2"]) == ["a cat", "a dog"]
    with pytest.raises(SettingError, match=r"data.class_names=.*names.txt lacks 1 classes of the data, such as 'n4'"):
        read_class_names(file, ["n1", "n4"])
    with pytest.raises(SettingError, match="write one name on each line, by label"):
        read_class_names(file, [])
    file.write_text("a cat\na dog\n")
    with pytest.raises(SettingError, match="has 2 names; the data has 3 classes"):
        read_class_names(file, ["n1", "n2", "n3"])
    with pytest.raises(SettingError, match=r"data.class_names=.*nowhere cannot be read"):
        read_class_names(tmp_path / "nowhere", [])
