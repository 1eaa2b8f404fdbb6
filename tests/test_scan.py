"""What is below a folder: pictures of any kind, ignored files, odd files, names of any bytes, folders of runs."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
from conftest import data_config, encode, fill, forks, gradient
from PIL import features

from data_loader import open_dataset
from dataset import check, decode, scan
from dataset.scan import find_pictures, printable
from dataset.table import DATASETS
from errors import DataError
from gallery import page
from storage.folders import RunFolders


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def opened(folder="pictures", **changes):
    """The data set as a training opens it, which then writes the lists."""
    config = data_config(folder, check_data="header", **changes)
    found = DATASETS[config.dataset](config)
    dataset = open_dataset(config, found)
    check.write_lists(found, config)
    return dataset


def names(dataset) -> list[str]:
    return [os.path.relpath(path, "pictures") for path in dataset.sources]


def listed(name="bad_images") -> list[dict]:
    return [json.loads(line) for line in Path("logs/test", f"{name}.jsonl").read_text().splitlines()]


def test_what_is_not_read_is_counted_by_its_ending_at_every_start(home, capsys):
    folder = fill(home / "pictures", 5)
    for number in range(4):
        (folder / f"{number}.PSD").touch()
    (folder / "deep").mkdir()
    for name in ("a.mp4", "b.mp4", "LICENSE", ".DS_Store"):
        (folder / "deep" / name).touch()
    for check_data in ("header", "header", "off"):
        open_dataset(data_config(folder, check_data=check_data))
        assert "7 files ignored: 4 .psd, 2 .mp4, 1 without an ending\n" in capsys.readouterr().out
    for number in range(12):
        (folder / f"x.{number:02}").touch()
    opened()
    assert "19 files ignored: 4 .psd, 2 .mp4, 1 without an ending, 1 .00, 1 .01, 1 .02, 1 .03, 1 .04, 1 .05, 1 .06, " \
           "5 of other endings\n" in capsys.readouterr().out


def test_pictures_of_phones_name_the_package_that_reads_them(home, capsys, monkeypatch):
    monkeypatch.setattr(scan, "FORMATS", {"JPEG": (".jpg",)})
    monkeypatch.setattr(scan, "SUFFIXES", {".png"})
    (fill(home / "pictures", 5) / "1.HEIC").touch()
    opened()
    assert "1 file ignored: 1 .heic; `pip install pillow-heif` lets them be read\n" in capsys.readouterr().out


def test_odd_files_are_left_out_said_and_listed(home, capsys):
    folder = fill(home / "pictures", 5)
    (folder / "dangling.jpg").symlink_to("nowhere.jpg")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "around").symlink_to("around")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "good.png").symlink_to("001.png")
    assert names(opened()) == [*(f"{number:03}.png" for number in range(5)), "good.png"]
    expected = {"around": "a link that leads back to itself", "dangling.jpg": "a link to nothing",
                "loop.png": "a link that leads back to itself", "pipe.jpg": "not a file (a pipe, a socket or a device)"}
    assert {os.path.relpath(row["path"], folder): row["reason"] for row in listed()} == expected
    out = capsys.readouterr().out
    assert "4 left out" in out and all(f"pictures/{name}: {why}\n" in out for name, why in expected.items())


def test_a_folder_that_may_not_be_read_is_left_out(home):
    """lost+found of a disk's root belongs to the administrator."""
    folder = fill(home / "pictures", 5)
    fill(folder / "lost+found", 2)
    (folder / "lost+found").chmod(0)
    for place in (home, *home.parents):
        place.chmod(place.stat().st_mode | 0o055)

    def as_somebody(_):
        if os.getuid() == 0:
            os.seteuid(12345)
        found = find_pictures(folder)
        return len(found.paths), found.left_out

    assert forks(as_somebody, 1) == [(5, {str(folder / "lost+found"): "Permission denied"})]
    (folder / "lost+found").chmod(0o700)


def test_names_of_any_bytes_are_trained_on_and_shown_on_one_line(home, capsys):
    folder = os.fsencode(fill(home / "pictures", 1))
    odd = [b"caf\xe9.png", b"new\nline.png", b"tab\t.png", "日本.png".encode(), b"esc\x1b[31m.png"]
    for name in odd:
        (Path(os.fsdecode(folder)) / os.fsdecode(name)).write_bytes(encode(gradient(seed=1), "PNG"))
    dataset = opened(cache="on")
    assert {os.fsencode(path)[len(b"pictures/"):] for path in dataset.sources} == {b"000.png", *odd}
    assert dataset.load_batch(range(6)).shape == (6, 3, 16, 16)
    copies = {os.fsencode(row["path"]) for row in listed("duplicates")}
    assert len(copies) == 4 and copies < {folder + b"/" + name for name in odd}
    shown = [dataset.whole.name(index) for index in range(6)]
    assert {r"pictures/caf\xe9.png", r"pictures/new\nline.png", r"pictures/tab\t.png", "pictures/日本.png"} < set(shown)
    assert "\x1b" not in capsys.readouterr().out
    assert printable(b"a\xff\n".decode(errors="surrogateescape")) == r"a\xff\n"


def test_a_folder_whose_name_is_not_utf_8(home, capsys):
    folder = fill(Path(os.fsdecode(os.fsencode(home) + b"/pic\xe9")), 4)
    dataset = opened(str(folder), cache="on", cache_dir="kept")
    assert dataset.load_batch([0, 3]).shape == (2, 3, 16, 16)
    capsys.readouterr().out.encode("utf-8")


# ---- folders of runs ----


def write_run(samples: Path):
    """The folders of a run, as the program writes them."""
    config = data_config(version="old", sample_path=str(samples), log_path=str(samples.parent / "logs"),
                         model_save_path=str(samples.parent / "models"), model="sagan")
    folders = RunFolders.of(config)
    folders.create()
    gradient().save(folders.samples / "0000100_fake.png")
    fill(folders.samples / "0000100_generated_seed0", 3)
    page.write_pages(folders, config)


def test_what_runs_write_below_the_pictures_is_not_read_and_that_is_said(home, capsys):
    fill(home / "pictures", 5)
    expected = names(opened())
    write_run(home / "pictures/results/samples")            # another run's, wherever it lies
    fill(home / "pictures/attention/old", 1)
    gradient().save("pictures/attention/old/0000100_attn_g32.png")
    for name in ("shown", "kept", "written", "stored", "looked", "decoded"):
        fill(home / "pictures" / name / "test", 2)          # this run's
    places = dict(sample_path="pictures/shown", model_save_path="./pictures/kept", log_path="pictures/written",
                  cache_path=str(home / "pictures/stored"), attn_path="pictures/looked", cache_dir="pictures/decoded")
    capsys.readouterr()
    assert names(opened(**places)) == expected
    out = capsys.readouterr().out
    assert "folders that runs write to are not read: decoded, kept, looked, shown, stored, written" in out
    assert "attention/old" in out and "results/samples" in out
    assert len(names(opened())) == 5 + 12, "which are others' then"


def test_a_sample_folder_that_is_the_pictures_own_folder(home):
    fill(home / "pictures", 5)
    fill(home / "pictures/test", 2), fill(home / "pictures/other", 3)
    assert len(opened(sample_path="pictures")) == 8


def test_the_folder_that_is_named_is_read_whatever_it_is(home):
    write_run(home / "samples")
    assert len(opened("samples/old/0000100_generated_seed0")) == 3
    assert len(opened("samples/old")) == 4
    assert len(find_pictures(home / "samples").paths) == 4, "scores of samples are not for training"


def test_a_folder_of_runs_only_says_so(home):
    fill(home / "pictures/samples", 3)
    with pytest.raises(DataError) as caught:
        opened(sample_path="pictures/samples")
    assert "holds no picture" in str(caught.value) and "not read: samples" in str(caught.value)


def test_a_format_that_pillow_was_built_without_is_not_looked_for(monkeypatch):
    assert set(decode.FORMATS) >= {"JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "JPEG2000", "PPM", "TGA"}
    assert {".jfif", ".tif", ".tiff", ".gif", ".avif", ".jpe", ".pgm"} < decode.SUFFIXES
    has = features.check
    monkeypatch.setattr(features, "check", lambda library: library != "webp" and has(library))
    without = importlib.util.module_from_spec(decode.__spec__)
    decode.__spec__.loader.exec_module(without)
    assert ".webp" in decode.SUFFIXES and decode.SUFFIXES.difference(without.SUFFIXES) == {".webp"}
    assert "WEBP" not in without.FORMATS
