"""Pictures straight from a zip archive are those of the unpacked folder, whatever reads them."""

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import data_config, encode, fill, gradient, take
from PIL import Image

from data_loader import build_dataset, describe, open_dataset, real_batches
from dataset import check
from dataset.images import Files, ThreadedReader, open_pictures
from dataset.table import DATASETS, describe_changes, fingerprint, summarize
from errors import DataError

STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pack(folder="pictures", path="x.zip", below=None, method=STORED) -> str:
    """An archive of a folder, its files in an order of their own; `below`: in a folder of this name."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(Path(folder).rglob("*"), reverse=True):
            archive.write(file, Path(below or ".", file.relative_to(folder)))
    return path


def write(path="x.zip", **files) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def png(seed=0) -> bytes:
    return encode(gradient(seed=seed), "PNG")


def everything(dataset) -> torch.Tensor:
    return dataset.load_batch(range(len(dataset)))


def opened(path="x.zip", **changes):
    """The data set as a training opens it, which then writes the lists."""
    config = data_config(path, **changes)
    found = DATASETS["folder"](config)
    dataset = open_dataset(config, found)
    check.write_lists(found, config)
    return dataset


def listed(name) -> list[dict]:
    return [json.loads(line) for line in Path("logs/test", f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture
def pictures():
    """A folder of 12 pictures, some of them nested, hidden files and files that are no pictures."""
    fill(Path("pictures/b"), 5), fill(Path("pictures/a/deep"), 4), fill(Path("pictures"), 3)
    for name in ("b/film.mp4", "b/.hidden.png", ".DS_Store", "list.txt", ".thumbs/1.png"):
        Path("pictures", name).parent.mkdir(exist_ok=True)
        Path("pictures", name).write_bytes(png())
    return Path("pictures")


# ---- what is in it ----


@pytest.mark.parametrize("method", [STORED, DEFLATED])
@pytest.mark.parametrize("below", [None, "pictures"])
def test_an_archive_shows_what_the_unpacked_folder_does(pictures, capsys, method, below):
    folder = opened("pictures", check_data="header", cache_path="one")
    said = capsys.readouterr().out
    archive = opened(pack(below=below, method=method), check_data="header", cache_path="other")
    assert capsys.readouterr().out == said and "2 files ignored: 1 .mp4, 1 .txt" in said
    assert torch.equal(everything(archive), everything(folder)) and len(archive) == 12
    assert archive.identities.tolist() == folder.identities.tolist()
    assert describe(archive, data_config("x.zip")) == "folder: 12 pictures in x.zip"


def test_what_macos_and_git_add_is_not_read(pictures):
    pack(below="pictures")
    with zipfile.ZipFile("x.zip", "a") as archive:
        for name in ("__MACOSX/pictures/b/._000.png", "__MACOSX/pictures/b/000.png", ".git/1.png", ".DS_Store"):
            archive.writestr(name, png())
    assert DATASETS["folder"](data_config("x.zip")).identities.tolist() == Files(pictures, 16).identities.tolist()


@pytest.mark.parametrize(("names", "classes"), [
    (("faces/a/1.png", "faces/b/1.png"), ("a", "b")),
    (("faces/a/1.png", "faces/b/1.png", "README"), ("a", "b")),
    (("a/1.png", "b/1.png"), ("a", "b")),
    (("one/two/a/1.png", "one/two/b/1.png"), ("a", "b")),
    (("one/two/a/1.png", "one/two/a/2.png"), None),
])
def test_a_single_folder_at_the_top_is_the_top(names, classes):
    labels = DATASETS["folder"](data_config(write(**dict.fromkeys(names, png())))).labels
    assert (labels and labels.names) == classes


def test_the_dataset_json_of_a_single_folder_is_its_own():
    write(**{"f/1.png": png(), "f/2.png": png(), "f/dataset.json": '{"labels": [["1.png", 1], ["2.png", 0]]}'})
    assert DATASETS["folder"](data_config("x.zip")).labels.numbers.tolist() == [1, 0]


def test_odd_names_and_links(capsys):
    with zipfile.ZipFile("x.zip", "w") as archive:
        for name in ("/abs/1.png", "../up/2.png", "./b//3.png", "日本/4.png", "caf?/5.png", "new\nline.PNG"):
            archive.writestr(name, png())
        windows, link = zipfile.ZipInfo("win?dows/6.png"), zipfile.ZipInfo("link.png")
        windows.create_system, link.create_system, link.external_attr = 0, 3, 0o120777 << 16
        archive.writestr(windows, png()), archive.writestr(link, "b/3.png")
        archive.writestr("twice.png", b""), archive.writestr("twice.png ", png())
    data = Path("x.zip").read_bytes().replace(b"caf?", b"caf\xe9").replace(b"win?dows", b"win\\dows")
    Path("x.zip").write_bytes(data.replace(b"twice.png ", b"twice.png\0"))      # a second file of the same name
    dataset = opened(check_data="header")
    assert [os.fsencode(name) for name in dataset.names] == [os.fsencode(name) for name in sorted((
        "abs/1.png", "b/3.png", os.fsdecode(b"caf\xe9/5.png"), "new\nline.PNG", "twice.png", "up/2.png",
        "win/dows/6.png", "日本/4.png"))]
    assert torch.equal(everything(dataset), torch.stack([dataset[0]] * 8))
    assert [os.path.relpath(row["path"]) for row in listed("bad_images")] == ["x.zip/link.png"]
    out = capsys.readouterr().out
    assert "x.zip/link.png: a link, which is not followed in an archive" in out


def test_opening_and_comparing_reads_no_picture(pictures, monkeypatch):
    pack()
    config = data_config("x.zip")

    def nothing(*_):
        raise AssertionError("a picture was read")

    monkeypatch.setattr(os, "pread", nothing)
    dataset = DATASETS["folder"](config)
    assert len(set(dataset.stamps.tolist())) == 12 and summarize(dataset, config)["pictures"] == 12
    assert len(fingerprint(dataset, config)) == 64
    with pytest.raises(AssertionError, match="was read"):
        dataset[0]


# ---- a run on the folder and one on its archive ----


@pytest.mark.parametrize("method", [STORED, DEFLATED])
def test_a_run_that_was_started_on_the_folder_knows_its_archive(pictures, home, method):
    pack(method=method, below="pictures")
    records = []
    for path in ("pictures", "x.zip"):
        config = data_config(path)
        records.append(summarize(build_dataset(config), config))
    assert describe_changes(*records) == f"the folder is {home}/x.zip, was {home}/pictures"
    gradient((90, 90)).save(pictures / "001.png")
    pack()
    assert describe_changes(records[1], summarize(build_dataset(config), config)) == \
        "12 pictures, were 12: 1 changed"


def test_the_same_batches_from_the_folder_the_archive_and_loader_processes(pictures):
    pack(method=DEFLATED)
    shown = []
    for path, workers in (("pictures", 0), ("x.zip", 0), ("x.zip", 2), ("x.zip", 2)):
        config = data_config(path, num_workers=workers, hflip=True, holdout=0.1)
        shown.append(take(real_batches(config, build_dataset(config), 0, "cpu"), 6))
    assert all(torch.equal(one, shown[0]) for one in shown[1:])


def test_an_archive_travels_to_spawned_workers_and_is_read_by_threads(pictures):
    dataset = open_dataset(data_config(pack(), cache="on"))
    expected = everything(opened("pictures"))
    assert torch.equal(everything(pickle.loads(pickle.dumps(dataset))), expected)
    assert torch.equal(ThreadedReader(dataset.whole)[:], expected)


def test_an_archive_is_read_by_threads_where_the_system_has_no_pread(pictures, monkeypatch):
    dataset, expected = opened(pack()), everything(opened("pictures"))
    monkeypatch.delattr(os, "pread")                    # as on Windows
    assert torch.equal(ThreadedReader(dataset)[:], expected)


def test_an_archive_that_was_replaced_is_not_mixed_up(pictures):
    first = opened(pack())
    before = everything(first)
    gradient(seed=77).save(pictures / "001.png")
    os.replace(pack(path="new.zip"), "x.zip")
    assert torch.equal(everything(first), before), "the open one stays what it was"
    second = opened()
    assert [index for index in range(12) if not torch.equal(first[index], second[index])] == [1]
    shutil.copy("x.zip", "y.zip")
    third = DATASETS["folder"](data_config("y.zip"))
    shutil.copy("pictures/000.png", "y.zip")
    with pytest.raises(DataError, match="y.zip has changed since it was opened"):
        third[0]


def test_a_run_trains_on_an_archive_and_goes_on(pictures, run):
    pack()
    flags = ("--dataset", "folder", "--image_path", "x.zip", "--version", "a", "--g_attn", "none")
    code, out, err = run(*flags, "--total_step", 1)
    assert code == 0 and "folder: 12 pictures in x.zip" in out, err
    code, out, err = run(*flags, "--total_step", 2)
    assert code == 0 and Path("models/a/0000002.pth").exists(), err


# ---- the decoded cache ----


def files(place=".") -> set[str]:
    return {str(path) for path in Path(place).rglob("*.u8")}


def test_each_archive_has_a_cache_beside_it_that_others_leave_alone(home):
    fill(home / "data", 4)
    fill(home / "pictures", 5)
    pack(path="data/x.zip"), pack("data", path="data/y.zip")
    seen = set()
    for path in ("data/x.zip", "data", "data/y.zip"):
        dataset = opened(path, cache="on")
        everything(dataset)
        assert seen < files()
        seen = files()
    assert {os.path.dirname(name) for name in seen} == {"data/.decoded", "data/.decoded/x.zip", "data/.decoded/y.zip"}
    assert all(opened(path, cache="on").is_decoded() for path in ("data/x.zip", "data", "data/y.zip"))
    everything(opened("data/x.zip", cache="on", cache_dir="kept")), opened("data/y.zip", cache="on", cache_dir="kept")
    assert len(files("kept")) == 2 and opened("data/x.zip", cache="on", cache_dir="kept").is_decoded()


def test_a_changed_archive_is_decoded_anew_and_a_moved_one_is_not(home):
    fill(home / "pictures", 3)
    for number in range(2):                             # of equal size: the checksum alone tells
        Image.new("RGB", (9, 9), (50 * number, 0, 0)).save(home / f"pictures/a{number}.bmp")
    everything(opened(pack(), cache="on"))
    shutil.copy("x.zip", "copy.zip")
    shutil.copytree(".decoded/x.zip", ".decoded/copy.zip")
    assert opened("copy.zip", cache="on").is_decoded()
    size = os.path.getsize("x.zip")
    shutil.copy("pictures/a0.bmp", "pictures/a1.bmp")
    pack()
    assert os.path.getsize("x.zip") == size
    changed = opened(cache="on")
    assert not changed.is_decoded() and torch.equal(everything(changed), everything(opened("pictures")))


# ---- pictures that cannot be used ----


def damage(name="x.zip", picture="007.png"):
    """Change a byte of a picture in the archive."""
    with zipfile.ZipFile(name) as archive:
        entry = archive.getinfo(picture)
    with open(name, "r+b") as file:
        file.seek(entry.header_offset + 30 + len(picture) + entry.compress_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 255]))


@pytest.mark.parametrize("method", [STORED, DEFLATED])
@pytest.mark.parametrize("level", ["header", "full"])
def test_a_damaged_file_in_an_archive_is_left_out_until_the_archive_is_mended(home, capsys, method, level):
    fill(home / "pictures", 12)
    intact = Path(pack(method=method)).read_bytes()
    damage()
    dataset = opened(check_data=level, cache="on")
    assert len(dataset) == 11
    (row,) = listed("bad_images")
    assert row["archive"] == str(home / "x.zip") and row["name"] == "007.png" and "checksum is wrong" in row["reason"]
    assert "1 of 12 cannot be used" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"x\.zip/007\.png: its checksum is wrong"):
        opened()[7]
    Path("x.zip").write_bytes(intact)
    assert len(opened(check_data=level, cache="on")) == 12 and not Path("logs/test/bad_images.jsonl").exists()


def test_damaged_pictures_and_copies_are_found_and_the_advice_fits(home):
    fill(home / "pictures", 5)
    for name in ("page.jpg", "quote.jpg"):
        Path("pictures", name).write_bytes(b"<html>")
    shutil.copy("pictures/001.png", "pictures/copy.png")
    pack()
    with pytest.raises(DataError) as caught:
        opened(check_data="header")
    text = str(caught.value)
    assert "2 of the 8 pictures in x.zip cannot be used" in text and "x.zip/page.jpg: it is not a JPEG" in text
    assert "Unpack the archive" in text
    for name in ("page.jpg", "quote.jpg"):
        Path("pictures", name).unlink()
    opened(pack(), check_data="header")
    (row,) = listed("duplicates")
    assert row["name"] == "copy.png" and row["copy_of"] == {"archive": str(home / "x.zip"), "name": "001.png"}


def test_values_of_more_than_8_bits_are_mapped_as_in_a_folder(home):
    (home / "pictures").mkdir()
    for number in range(4):
        Image.fromarray(np.full((20, 20), 1000 * number, np.uint16)).save(home / f"pictures/{number}.png")
    pack()
    for level in ("off", "full"):
        assert torch.equal(everything(opened(check_data=level)), everything(opened("pictures", check_data=level)))
        assert opened(check_data=level)[3].float().mean() > 180


def test_the_check_looks_at_new_and_changed_pictures_only(home, monkeypatch):
    fill(home / "pictures", 6)
    opened(pack(), check_data="full")
    read, reads = os.pread, []
    monkeypatch.setattr(os, "pread", lambda *more: [reads.append(more), read(*more)][1])
    monkeypatch.setattr(check, "SHAPES", 0)
    opened(check_data="full")
    assert not reads
    gradient(seed=50).save("pictures/new.png")
    opened(pack(), check_data="header")
    assert len(reads) == 2, "its header and its data"


def test_clean_data_deletes_nothing_from_an_archive(home, run):
    fill(home / "pictures", 5)
    for name in ("page.jpg", "quote.jpg"):
        Path("pictures", name).write_bytes(b"<html>")
    before = Path(pack()).read_bytes()
    flags = ("--dataset", "folder", "--image_path", "x.zip", "--version", "a")
    code, _, err = run(*flags, "--total_step", 1)
    assert code == 3 and "Unpack the archive" in err
    for more in ((), ("--yes", "true"), ("--clean_copies", "true", "--yes", "true")):
        code, _, err = run(*flags, "--mode", "clean_data", *more)
        assert code == 2 and "unpack" in err and "x.zip" in err and "--image_path" in err
    assert Path("x.zip").read_bytes() == before and Path("pictures/page.jpg").exists()


# ---- refusals ----


def truncate(path):
    os.truncate(path, os.path.getsize(path) - 100)


def cut_out(path):
    """As a download that lost a part in the middle."""
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[:1000] + data[3000:])


def patch(local, central, value):
    """Set two bytes of every local and central header."""
    def change(path):
        data = bytearray(Path(path).read_bytes())
        for signature, offset in ((b"PK\3\4", local), (b"PK\1\2", central)):
            start = data.find(signature)
            while start >= 0:
                data[start + offset:start + offset + 2] = value.to_bytes(2, "little")
                start = data.find(signature, start + 4)
        Path(path).write_bytes(data)

    return change


def with_packed_labels(path):
    with zipfile.ZipFile(path, "a", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("dataset.json", '{"labels": []}')


REFUSED = {
    "a page": (lambda path: Path(path).write_bytes(b"<html>quota exceeded" * 9), "is a file, but no zip archive"),
    "empty": (lambda path: Path(path).write_bytes(b""), "is a file, but no zip archive"),
    "another kind": (lambda path: shutil.move(shutil.make_archive("t", "gztar", "pictures"), path), "no zip archive"),
    "truncated": (truncate, "is truncated or damaged"),
    "half": (lambda path: os.truncate(path, os.path.getsize(path) // 2), "is truncated or damaged"),
    "a part is missing": (cut_out, "truncated or damaged"),
    "nothing in it": (lambda path: write(path), "x.zip is empty"),
    "no picture": (lambda path: write(path, **{"a.txt": "", "b.mp4": ""}),
                   "holds 2 files, but no picture (2 files ignored: 1 .mp4, 1 .txt)"),
    "hidden only": (lambda path: write(path, **{".a.png": png(), "__MACOSX/b.png": png()}), "x.zip is empty"),
    "encrypted": (patch(6, 8, 1), "7 of the 7 files in it are encrypted; pack it without a password"),
    "deflate64": (patch(8, 10, 9), "7 of the 7 files in it are compressed in an unusual way"),
    "labels in bzip2": (with_packed_labels, "1 of the 8 files in it is compressed in an unusual way"),
    "gone": (lambda path: os.unlink(path), "there is no folder x.zip"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_archive_that_cannot_be_used_is_refused(home, run, name):
    fill(home / "pictures", 7)
    spoil, words = REFUSED[name]
    spoil(pack())
    code, _, err = run("--dataset", "folder", "--image_path", "x.zip", "--total_step", 1)
    assert code == 3 and words in err and "--image_path" in err and len(err.splitlines()) <= 2, err


def test_a_folder_or_an_archive_by_one_name(pictures):
    for path in ("pictures", pack()):
        dataset = open_pictures(Path(path), 32)
        assert len(dataset) == 12 and dataset[0].shape == (3, 32, 32)
