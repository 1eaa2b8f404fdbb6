"""The classes of a data set: subfolders, dataset.json, what happens to them in parts, caches and loader processes."""

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import data_config, fill, gradient

from data_loader import open_dataset
from dataset.decoded_cache import DecodedCache
from dataset.images import split
from dataset.table import DATASETS
from errors import DataError


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(params=["folder", "zip"])
def opened(request, home):
    """opened() -> the data set of the folder `pictures`, from the folder itself or from an archive of it."""

    def open_one(**changes):
        path = "pictures"
        if request.param == "zip":
            path = "pictures.zip"
            with zipfile.ZipFile(path, "w") as archive:
                for file in sorted(Path("pictures").rglob("*")):
                    if file.is_file():
                        archive.write(file, file.relative_to("pictures"))
        return open_dataset(data_config(path, **changes))

    return open_one


def write_json(content, place="pictures"):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    Path(place, "dataset.json").write_bytes(text)


def refused(dataset) -> str:
    with pytest.raises(DataError) as caught:
        dataset.labels  # noqa: B018
    text = str(caught.value)
    assert caught.value.code == 3 and len(text.splitlines()) <= 2 and "--conditional false" in text
    return text


# ---- subfolders ----


def test_each_subfolder_is_a_class_with_what_is_nested_in_it(opened):
    for name, count in (("dog", 2), ("cat/young", 3), ("cat", 1), ("ape/a/b", 1)):
        fill(Path("pictures", name), count)
    Path("pictures/empty").mkdir(), Path("pictures/notes").mkdir()
    Path("pictures/notes/a.txt").touch(), Path("pictures/README").touch()
    labels = opened().labels
    assert labels.names == ("ape", "cat", "dog") and labels.counts.tolist() == [1, 4, 2]
    assert labels.numbers.dtype == np.int64 and labels.numbers.tolist() == [0, 1, 1, 1, 1, 2, 2]


@pytest.mark.parametrize(("names", "ordered"), [
    (("10", "9", "1"), ("1", "9", "10")), (("10", "9", "x"), ("10", "9", "x")), (("02", "10", "1"), ("1", "02", "10")),
])
def test_classes_that_are_numbers_are_in_their_order(opened, names, ordered):
    for count, name in enumerate(names, 1):
        fill(Path("pictures", name), count)
    labels = opened().labels
    assert labels.names == ordered
    assert dict(zip(labels.names, labels.counts.tolist(), strict=True)) == {name: n for n, name in enumerate(names, 1)}


def test_folders_around_all_classes_do_not_count(opened):
    for name in ("wrapped/again/cat", "wrapped/again/dog/old"):
        fill(Path("pictures", name), 1)
    assert opened().labels.names == ("cat", "dog")


@pytest.mark.parametrize("folders", [["."], ["cat"], ["cat", "dog", "."]])
def test_pictures_that_are_not_all_in_subfolders_have_no_classes(opened, folders):
    for name in folders:
        fill(Path("pictures", name), 2)
    Path("pictures/README").touch()
    assert opened().labels is None


def test_celeba_has_no_classes():
    for name in ("a", "b"):
        fill(Path("CelebA", name), 2)
    write_json({"labels": []}, "CelebA")
    assert open_dataset(data_config(dataset="celeb")).labels is None


# ---- dataset.json ----


@pytest.fixture
def pictures(home):
    """pictures/a/000.png, a/001.png, b/000.png, c.png"""
    fill(home / "pictures/a", 2), fill(home / "pictures/b", 1)
    gradient(seed=9).save(home / "pictures/c.png")


GOOD = [["c.png", 3], ["b/000.png", 0], ["a/001.png", 1], ["a/000.png", 0]]


def test_dataset_json_gives_the_classes_by_path(pictures, opened):
    write_json({"labels": GOOD})
    labels = opened().labels
    assert labels.names == ("0", "1", "2", "3") and labels.numbers.tolist() == [0, 1, 0, 3]
    assert labels.counts.tolist() == [2, 1, 0, 1], "a number without pictures stays a class"


def test_dataset_json_beside_pictures_that_are_all_in_a_subfolder(home, opened):
    """In the folder as in an archive of it, which may have that subfolder at its top."""
    fill(home / "pictures/a/b", 3)
    write_json({"labels": [["000.png", 0], ["001.png", 1], ["002.png", 1]]}, "pictures/a/b")
    for top in ("pictures", "pictures/a"):
        with zipfile.ZipFile("x.zip", "w") as archive:
            for path in sorted(Path(top).rglob("*.*")):
                archive.write(path, path.relative_to(top))
        for dataset in (opened(), DATASETS["folder"](data_config("x.zip"))):
            assert dataset.labels.numbers.tolist() == [0, 1, 1]
    write_json({"labels": [["b/000.png", 0], ["b/001.png", 0], ["b/002.png", 1]]}, "pictures/a")
    assert opened().labels.numbers.tolist() == [0, 0, 1], "the outermost counts"


def test_dataset_json_may_name_the_classes(pictures, opened):
    write_json({"labels": GOOD, "classes": ["red", "green", "blue", "café", "unused"]})
    labels = opened().labels
    assert labels.names == ("red", "green", "blue", "café", "unused") and labels.counts.tolist() == [2, 1, 0, 1, 0]


def test_labels_that_are_null_are_none_whatever_the_folders(opened):
    for name in ("00000", "00001"):
        fill(Path("pictures", name), 2)
    assert opened().labels.names == ("00000", "00001")
    write_json({"labels": None})
    assert opened().labels is None


def test_a_byte_order_mark_an_entry_given_twice_paths_with_dots_and_files_that_are_no_pictures(pictures, opened):
    Path("pictures/film.mp4").touch()
    entries = [*GOOD[1:], ["./c.png", 3], GOOD[1], ["./film.mp4", 2]]
    write_json(b"\xef\xbb\xbf" + json.dumps({"labels": entries}).encode())
    assert opened().labels.counts.tolist() == [2, 1, 0, 1]


WRONG = {
    "not json": (b'{"labels": [["c.png", 3],', "is not JSON"),
    "other bytes": (b"\x89PNG\xff\xfe", "is not JSON"),
    "deep": (b"[" * 100_000, "is not JSON"),
    "a list": ([], 'has no "labels"'),
    "no labels": ({"images": []}, 'has no "labels"'),
    "a number": (5, 'has no "labels"'),
    "an entry that is a number": ({"labels": [*GOOD, 7]}, "the first: 7 is not"),
    "a table": ({"labels": {"c.png": 3}}, '"labels" that are not a list'),
    "no entries": ({"labels": []}, "leaves out 4 of 4 pictures that are there: a/000.png, ..."),
    "no pair": ({"labels": [*GOOD, "c.png"]}, '1 of 5 entries that cannot be used, the first: "c.png" is not'),
    "three": ({"labels": [*GOOD, ["c.png", 1, 2]]}, "is not"),
    "no path": ({"labels": [*GOOD, [1, 1]]}, 'the first: [1, 1] is not ["path", class]'),
    "float": ({"labels": [*GOOD[:2], ["a/001.png", 1.0], ["a/000.png", 2.5]]},
              '2 of 4 entries that cannot be used, the first: ["a/001.png", 1.0] has a label that is no whole number'),
    "negative": ({"labels": [["c.png", -1]]}, "no whole number from 0 on"),
    "true": ({"labels": [["c.png", True]]}, "no whole number from 0 on"),
    "a name": ({"labels": [["c.png", "cat"]]}, "no whole number from 0 on"),
    "several": ({"labels": [["c.png", [1, 3]]]}, 'the first: ["c.png", [1, 3]] has several labels'),
    "one-hot": ({"labels": [["c.png", [0.0, 1.0]]]}, "has several labels"),
    "outside": ({"labels": [*GOOD, ["../out.png", 0]]}, 'the first: ["../out.png", 0] lies outside the folder'),
    "huge": ({"labels": [["c.png", 10**12]]}, "has a label of 100,000 or more"),
    "none there": ({"labels": [["d.png", 0], ["e.png", 1]]}, "leaves out 4 of 4 pictures that are there: a/000.png"),
    "left out": ({"labels": GOOD[:-1]}, "leaves out 1 of 4 pictures that is there: a/000.png"),
    "twice": ({"labels": [*GOOD, ["c.png", 0]]},
              "gives 1 of 4 files more than one class, such as c.png: 3 and 0"),
    "few names": ({"labels": GOOD, "classes": ["a", "b", "c"]}, 'has 3 "classes", but labels up to 3, which need 4'),
    "one name twice": ({"labels": GOOD, "classes": ["a", "b", "c", "b"]}, 'the name b twice in "classes"'),
    "no names": ({"labels": GOOD, "classes": [1, 2, 3, 4]}, '"classes" that are not a list of names'),
    "a dict of names": ({"labels": GOOD, "classes": {"0": "a"}}, '"classes" that are not a list of names'),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_dataset_json_is_refused_only_if_it_is_asked_for(pictures, opened, name):
    content, words = WRONG[name]
    write_json(content)
    dataset = opened()
    assert dataset.load_batch([0, 3]).shape == (2, 3, 16, 16)
    text = refused(dataset)
    assert words in text and "/dataset.json " in text, text


def test_a_dataset_json_may_name_pictures_that_have_been_deleted(pictures, opened, capsys):
    write_json({"labels": [*GOOD, ["d.png", 4], ["e.png", 1]]})
    labels = opened().labels
    assert labels.numbers.tolist() == [0, 1, 0, 3] and labels.names == ("0", "1", "2", "3", "4"), "of a run before that"
    assert "/dataset.json names 2 of 6 pictures that are not there: d.png, ...\n" in capsys.readouterr().out


def test_a_dataset_json_that_cannot_be_read(pictures, home):
    (home / "pictures/dataset.json").mkdir()
    with pytest.raises(DataError, match=r"pictures/dataset.json cannot be read: Is a directory\n.*--conditional false"):
        open_dataset(data_config("pictures")).labels  # noqa: B018


def test_a_damaged_dataset_json_in_an_archive(home):
    with zipfile.ZipFile("x.zip", "w") as archive:
        archive.writestr("dataset.json", json.dumps({"labels": GOOD}))
        for path, _ in GOOD:
            archive.writestr(path, b"")
    data = Path("x.zip").read_bytes()
    Path("x.zip").write_bytes(data.replace(b"a/001.png\", 1", b"a/001.png\", 2"))
    text = refused(DATASETS["folder"](data_config("x.zip")))
    assert "x.zip/dataset.json cannot be read (its checksum is wrong" in text


def test_dataset_json_is_not_among_the_ignored_files(pictures, opened, capsys):
    write_json({"labels": GOOD})
    opened(check_data="header")
    assert "ignored" not in capsys.readouterr().out
    write_json({"labels": GOOD}, "pictures/a")
    opened(check_data="header")
    assert "1 file ignored: 1 .json" in capsys.readouterr().out, "but one further down is"


# ---- parts, caches, processes ----


def test_a_part_keeps_its_pictures_classes_and_all_names(opened):
    for name, count in (("a", 6), ("b", 5), ("c", 1)):
        fill(Path("pictures", name), count)
    dataset = opened()
    trained, held_out = split(dataset, 0.25)
    assert len(held_out) == 3
    for part in (trained, held_out):
        assert part.labels.names == ("a", "b", "c")
        assert part.labels.numbers.tolist() == dataset.labels.numbers[part.indices].tolist()
    assert (trained.labels.counts + held_out.labels.counts).tolist() == [6, 5, 1]
    again, _ = split(trained, 0.5)
    assert again.labels.numbers.tolist() == trained.labels.numbers[again.indices].tolist()


def test_pictures_that_are_left_out_take_their_labels_with_them(opened):
    fill(Path("pictures/a"), 8), fill(Path("pictures/b"), 4)
    Path("pictures/a/005x.png").write_bytes(b"<html>")
    dataset = opened(check_data="full", cache="on")
    assert len(dataset) == 12 and isinstance(dataset.whole, DecodedCache)
    assert dataset.labels.counts.tolist() == [8, 4] and dataset.whole.labels.counts.tolist() == [9, 4]


def test_a_picture_that_cannot_be_used_is_no_fault_of_dataset_json(pictures, opened):
    fill(Path("pictures/more"), 12)
    more = [[f"more/{number:03}.png", 2] for number in range(12)]
    write_json({"labels": [*GOOD, *more]})
    Path("pictures/c.png").write_bytes(b"")
    assert opened(check_data="full").labels.counts.tolist() == [2, 1, 12, 0]


def test_loader_processes_get_no_labels_but_can_find_them(opened):
    fill(Path("pictures/a"), 30), fill(Path("pictures/b"), 30)
    for dataset in (opened(), opened(cache="on"), split(opened(), 0.1)[0]):
        before = len(pickle.dumps(dataset))
        labels = dataset.labels
        assert len(pickle.dumps(dataset)) == before
        assert pickle.loads(pickle.dumps(dataset)).labels.numbers.tolist() == labels.numbers.tolist()


def test_classes_are_not_looked_for_until_they_are_asked_for(pictures, monkeypatch):
    write_json({"labels": GOOD})
    read = Path.read_bytes

    def none_of_json(path):
        assert path.suffix != ".json"
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", none_of_json)
        dataset = open_dataset(data_config("pictures", check_data="full", cache="on"))
        assert dataset.load_batch(range(4)).shape == (4, 3, 16, 16)
    assert dataset.labels.counts.tolist() == [2, 1, 0, 1]
