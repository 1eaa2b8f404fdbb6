"""Real pictures: odd files, helpful errors, the data sets, resumable sampling, the decoded cache."""

import hashlib
import io
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image

import data_loader
from data_loader import (
    DATASETS,
    DecodedCache,
    Pictures,
    build_dataset,
    describe,
    fingerprint,
    open_dataset,
    part,
    real_batches,
    split,
)
from decode import decode, find_pictures
from failures import DataError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def make_config(path=".", **changes):
    values = dict(dataset="folder", image_path=str(path), imsize=16, batch_size=4)
    values |= dict(num_workers=0, seed=7, hflip=False, holdout=0.0)
    return SimpleNamespace(**{**values, **changes})


def encode(image, kind, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def gradient(size=(40, 30), seed=0) -> Image.Image:
    """A smooth picture that differs from its mirror image and from those of other seeds."""
    corners = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize(size, Image.Resampling.BILINEAR)


def fill(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        gradient(seed=index).save(folder / f"{index:03}.png")
    return folder


def fill_lmdb(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=2**22) as opened, opened.begin(write=True) as transaction:
        for index in range(count):
            transaction.put(f"{index:08}".encode(), encode(gradient(seed=index), "WEBP", lossless=True))
    return folder


def take(batches, count: int) -> torch.Tensor:
    try:
        return torch.cat([next(batches) for _ in range(count)])
    finally:
        batches.close()


def identities(pictures: torch.Tensor) -> list[bytes]:
    return [picture.numpy().tobytes() for picture in pictures]


def assert_colour(picture: torch.Tensor, colour, tolerance=2):
    assert picture.dtype == torch.uint8
    difference = (picture.int() - torch.tensor(colour).view(3, 1, 1)).abs().max()
    assert difference <= tolerance, picture[:, 0, 0]


# ---- one picture ----



def plain(mode, colour, kind="PNG", size=(20, 30), **options) -> bytes:
    return encode(Image.new(mode, size, colour), kind, **options)


DEEP = Image.fromarray(np.full((20, 20), 0x80FF, np.uint16))
PALETTE = Image.new("RGB", (20, 20), RED).convert("P", palette=Image.Palette.ADAPTIVE)
KINDS = {
    "grey": (plain("L", 90), (90, 90, 90)),
    "grey-jpeg": (plain("L", 90, "JPEG"), (90, 90, 90)),
    "one-bit": (plain("1", 1), WHITE),
    "16-bit": (encode(DEEP, "PNG"), (128, 128, 128)),
    "16-bit-transparent": (encode(DEEP, "PNG", transparency=0x80FF), WHITE),
    "palette": (encode(PALETTE, "PNG"), RED),
    "palette-transparent": (encode(PALETTE, "PNG", transparency=PALETTE.getpixel((0, 0))), WHITE),
    "grey-alpha": (plain("LA", (0, 0)), WHITE),
    "colour-key": (plain("RGB", RED, transparency=RED), WHITE),
    "clear": (plain("RGBA", (*RED, 0)), WHITE),
    "half-clear": (plain("RGBA", (*RED, 128)), (255, 127, 127)),
    "clear-webp": (plain("RGBA", (*RED, 0), "WEBP", lossless=True), WHITE),
    "cmyk": (plain("CMYK", (0, 255, 255, 0), "JPEG"), RED),
    "bmp": (plain("RGB", BLUE, "BMP"), BLUE),
    "large-progressive": (plain("RGB", BLUE, "JPEG", (700, 900), progressive=True), BLUE),
    "one-pixel-wide": (plain("RGB", BLUE, size=(1, 300)), BLUE),
}


@pytest.mark.parametrize(("data", "colour"), KINDS.values(), ids=KINDS)
def test_any_kind_of_picture_is_read(data, colour):
    picture = decode(data, "x", 16)
    assert picture.shape == (3, 16, 16)
    assert_colour(picture, colour)


@pytest.mark.parametrize("size", [(90, 30), (30, 90)])
def test_the_centre_of_a_long_picture_is_used(size):
    image = Image.new("RGB", size, RED)
    image.paste(GREEN, ((size[0] - 30) // 2, (size[1] - 30) // 2, (size[0] + 30) // 2, (size[1] + 30) // 2))
    assert_colour(decode(encode(image, "PNG"), "x", 16), GREEN)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_rotation_is_honoured(kind):
    image = Image.new("RGB", (64, 64), RED)
    image.paste(BLUE, (32, 0, 64, 64))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: the left side becomes the top
    picture = decode(encode(image, kind, exif=exif, quality=95), "x", 16)
    assert_colour(picture[:, :6], RED, 12)
    assert_colour(picture[:, 10:], BLUE, 12)


def test_a_damaged_exif_tag_does_not_cost_the_picture():
    data = encode(Image.new("RGB", (20, 20), BLUE), "PNG", exif=b"Exif\0\0no such byte order")
    assert_colour(decode(data, "x", 16), BLUE)


def test_a_large_jpeg_keeps_its_quality():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 150, 3), dtype=np.uint8))
    image = noise.resize((1500, 1000), Image.Resampling.BICUBIC)
    whole = image.crop((250, 0, 1250, 1000)).resize((64, 64), Image.Resampling.LANCZOS)
    expected = torch.from_numpy(np.array(whole)).permute(2, 0, 1)
    picture = decode(encode(image, "JPEG", quality=95), "x", 64)
    assert (picture.float() - expected).abs().mean() < 1.5


# ---- finding pictures ----


def test_folders_are_searched_in_depth_and_in_order(tmp_path):
    for name in ["b/2.JPG", "b/1.webp", "a/deep/er/x.Png", "c.jpeg", "d.bmp"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        gradient().save(path)
    for name in ["._c.jpg", ".DS_Store", "notes.txt", ".cache/x.png"]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("not a picture")
    (tmp_path / "a/deep/up").symlink_to(tmp_path, target_is_directory=True)  # a loop
    found = [os.path.relpath(path, tmp_path) for path in find_pictures(tmp_path)]
    assert found == ["a/deep/er/x.Png", "b/1.webp", "b/2.JPG", "c.jpeg", "d.bmp"]


def test_pictures_behind_a_link_are_found(tmp_path):
    fill(tmp_path / "elsewhere", 4)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert len(build_dataset(make_config(tmp_path / "data"))) == 4


def test_folder_is_described(tmp_path):
    config = make_config(fill(tmp_path, 5))
    assert describe(build_dataset(config), config) == f"folder: 5 pictures in {tmp_path}"


# ---- errors ----


def refused(config) -> list[str]:
    """The lines of the DataError that the data set ends in."""
    with pytest.raises(DataError) as caught:
        build_dataset(config)
    return str(caught.value).splitlines()


def write_files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("<html>")
    return folder


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda path: path / "nowhere", "there is no folder"),
        (lambda path: path, "is empty"),
        (lambda path: write_files(path, "a.txt", "b/c.gif"), "holds 2 files, but no picture"),
        (lambda path: write_files(path, "file.jpg") / "file.jpg", "is a file"),
    ],
)
def test_a_folder_without_pictures_is_refused(tmp_path, prepare, words):
    folder = prepare(tmp_path)
    (line,) = refused(make_config(folder))
    assert words in line and str(folder) in line and "--image_path" in line


def test_an_unreadable_folder_is_refused(tmp_path, monkeypatch):
    def closed(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", closed)
    (line,) = refused(make_config(tmp_path))
    assert "Permission denied" in line and "--image_path" in line


def test_a_batch_larger_than_the_data_set_is_refused(tmp_path):
    (line,) = refused(make_config(fill(tmp_path, 3), batch_size=64))
    assert line == f"--batch_size 64 is more than the 3 pictures in {tmp_path}; use --batch_size 3 or less"
    (line,) = refused(make_config(dataset="toy", batch_size=5000))
    assert line.endswith("use --batch_size 4096 or less")


@pytest.mark.parametrize(
    ("dataset", "place", "name"),
    [
        ("celeb", "CelebA", "CelebA"),
        ("lsun", "LSUN/church_outdoor_train_lmdb", "LSUN"),
        ("cifar10", "CIFAR10/cifar-10-batches-py", "CIFAR10"),
    ],
)
def test_a_missing_data_set_names_the_two_ways_on(tmp_path, dataset, place, name):
    problem, ways_on = refused(make_config(tmp_path, dataset=dataset))
    assert f"--dataset {dataset}" in problem and str(tmp_path / place) in problem
    assert f"`bash download.sh {name}`" in ways_on and "`--dataset toy`" in ways_on


HUGE = b"BM" + b"\0" * 8 + (54).to_bytes(4, "little") + (40).to_bytes(4, "little")
HUGE += (60000).to_bytes(4, "little") * 2 + b"\1\0\x18\0" + b"\0" * 24


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encode(gradient((90, 90)), "JPEG")[:-200], "truncated"),
        (encode(gradient((90, 90)), "PNG")[:-200], ""),
        (b"<html>quota exceeded</html>", "no JPEG, PNG, WebP or BMP"),
        (b"", "no JPEG, PNG, WebP or BMP"),
        (encode(gradient(), "GIF"), "no JPEG, PNG, WebP or BMP"),
        (HUGE, "pixels"),
    ],
    ids=["half-jpeg", "half-png", "html", "empty", "other-kind", "bomb"],
)
def test_an_unreadable_picture_is_named(tmp_path, data, reason, num_workers):
    bad = fill(tmp_path, 7) / "bad.jpg"
    bad.write_bytes(data)
    config = make_config(tmp_path, num_workers=num_workers)
    with pytest.raises(DataError, match="delete or replace it") as caught:
        take(real_batches(config, build_dataset(config), 0, "cpu"), 2)
    (line,) = str(caught.value).splitlines()
    assert str(bad) in line and reason in line


def test_a_picture_that_vanished_is_named(tmp_path):
    dataset = build_dataset(make_config(fill(tmp_path, 4)))
    (tmp_path / "002.png").unlink()
    with pytest.raises(DataError, match="002.png: No such file"):
        dataset[2]


# ---- the data sets ----


def test_celeba_shows_the_central_160_pixels(tmp_path):
    image = Image.new("RGB", (178, 218), RED)
    image.paste(GREEN, (9, 29, 169, 189))
    small = Image.new("RGB", (100, 120), BLUE)
    for name, picture in (("img/a.png", image), ("img/b.png", small)):
        path = tmp_path / "CelebA" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    dataset = build_dataset(make_config(tmp_path, dataset="celeb", batch_size=2))
    assert_colour(dataset[0], GREEN)
    assert_colour(dataset[1], BLUE)


@pytest.mark.parametrize(
    "place", [".", "church_outdoor_train_lmdb", "LSUN/church_outdoor_train_lmdb", "cats_lmdb"]
)
def test_lsun_is_found_and_read(tmp_path, place):
    folder = fill_lmdb(tmp_path / "data" / place, 6)
    config = make_config(tmp_path / "data", dataset="lsun")
    dataset = build_dataset(config)
    assert describe(dataset, config) == f"lsun: 6 pictures in {folder}"
    assert torch.equal(dataset[3], decode(encode(gradient(seed=3), "PNG"), "x", 16))


def test_lsun_survives_a_second_opening_fork_and_pickle(tmp_path, monkeypatch):
    monkeypatch.setattr(data_loader, "CACHE_BYTES", 0)
    fill_lmdb(tmp_path / "cats_lmdb", 6)
    configs = [make_config(tmp_path, dataset="lsun", num_workers=workers) for workers in (0, 2)]
    datasets = [build_dataset(config) for config in configs]
    direct, forked = (take(real_batches(c, d, 0, "cpu"), 3) for c, d in zip(configs, datasets, strict=True))
    assert torch.equal(direct, forked)
    assert torch.equal(pickle.loads(pickle.dumps(datasets[0]))[5], datasets[1][5])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda file: os.truncate(file, file.stat().st_size // 2), "is cut short"),
        (lambda file: file.write_bytes(b"<html>" * 2000), "cannot read"),
        (lambda file: file.write_bytes(b""), "cannot read"),
    ],
)
def test_a_damaged_lsun_is_refused(tmp_path, damage, words):
    damage(fill_lmdb(tmp_path / "cats_lmdb", 20) / "data.mdb")
    problem, ways_on = refused(make_config(tmp_path, dataset="lsun"))
    assert words in problem and "data.mdb" in problem and "download.sh LSUN" in ways_on


def test_an_empty_or_ambiguous_lsun_is_refused(tmp_path):
    fill_lmdb(tmp_path / "cats_lmdb", 0)
    assert "holds no pictures" in refused(make_config(tmp_path, dataset="lsun"))[0]
    fill_lmdb(tmp_path / "dogs_lmdb", 4)
    (line,) = refused(make_config(tmp_path, dataset="lsun"))
    assert "cats_lmdb, dogs_lmdb" in line and "--image_path" in line
    fill_lmdb(tmp_path / "church_outdoor_train_lmdb", 5)
    assert len(build_dataset(make_config(tmp_path, dataset="lsun"))) == 5


def test_lsun_without_the_lmdb_package(tmp_path, monkeypatch):
    fill_lmdb(tmp_path / "cats_lmdb", 4)
    monkeypatch.setitem(sys.modules, "lmdb", None)
    (line,) = refused(make_config(tmp_path, dataset="lsun"))
    assert "--dataset lsun" in line and "pip install lmdb" in line


@pytest.fixture
def cifar10(monkeypatch):
    """Writes CIFAR-10's files in small: batches of two colours, with checksums that torchvision accepts."""
    from torchvision.datasets import CIFAR10

    def write(root: Path):
        folder = root / "cifar-10-batches-py"
        folder.mkdir(parents=True)
        rows = np.repeat(np.array([RED, BLUE], np.uint8), 1024, axis=1)  # (2, 3072): plane after plane
        batch = {"data": rows, "labels": [0, 1]}
        files = {f"data_batch_{n}": batch for n in range(1, 6)} | {"test_batch": batch}
        files["batches.meta"] = {"label_names": ["red", "blue"]}
        sums = {}
        for name, content in files.items():
            data = pickle.dumps(content)
            (folder / name).write_bytes(data)
            sums[name] = hashlib.md5(data).hexdigest()
        monkeypatch.setattr(CIFAR10, "train_list", [[n, sums[n]] for n in files if n.startswith("data")])
        monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
        monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
        return folder

    return write


@pytest.mark.parametrize("place", [".", "CIFAR10"])
def test_cifar10_is_read(tmp_path, cifar10, place):
    cifar10(tmp_path / place)
    dataset = build_dataset(make_config(tmp_path, dataset="cifar10", imsize=64))
    assert len(dataset) == 10
    assert dataset[0].shape == (3, 64, 64)
    assert_colour(dataset[0], RED)
    assert_colour(dataset[9], BLUE)


def test_a_damaged_cifar10_is_refused(tmp_path, cifar10):
    (cifar10(tmp_path) / "data_batch_3").write_bytes(b"half")
    problem, ways_on = refused(make_config(tmp_path, dataset="cifar10"))
    assert "damaged" in problem and "download.sh CIFAR10" in ways_on


def test_toy_needs_nothing(tmp_path):
    config = make_config(tmp_path / "nowhere", dataset="toy", imsize=32)
    dataset = build_dataset(config)
    assert describe(dataset, config) == "toy: 4096 drawn faces at 32 px"
    assert dataset[4095].shape == (3, 32, 32) and dataset[4095].dtype == torch.uint8
    assert not torch.equal(dataset[0], dataset[1])


def test_opening_writes_nothing(tmp_path, cifar10, monkeypatch):
    fill(tmp_path / "CelebA", 4)
    fill_lmdb(tmp_path / "cats_lmdb", 4)
    cifar10(tmp_path / "CIFAR10")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def state():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    before = state()
    for name in DATASETS:
        build_dataset(make_config(tmp_path, dataset=name))[0]
    assert state() == before


# ---- their fingerprint ----


def test_the_sources_are_the_files_that_the_pictures_come_from(tmp_path, cifar10):
    fill(tmp_path / "CelebA/img", 4)
    fill_lmdb(tmp_path / "cats_lmdb", 4)
    cifar10(tmp_path / "CIFAR10")
    pictures = [f"CelebA/img/{index:03}.png" for index in range(4)]
    batches = [f"CIFAR10/cifar-10-batches-py/data_batch_{n}" for n in range(1, 6)]
    expected = dict(celeb=pictures, lsun=["cats_lmdb/data.mdb"], cifar10=batches)
    for name, files in expected.items():
        dataset = build_dataset(make_config(tmp_path, dataset=name))
        assert isinstance(dataset, DecodedCache)
        assert [os.path.relpath(path, tmp_path) for path in dataset.sources] == files
    (source,) = build_dataset(make_config(dataset="toy")).sources
    assert Path(source).name == "toy_faces.py"


def test_the_fingerprint_is_that_of_the_pictures(tmp_path, monkeypatch):
    folder, elsewhere = fill(tmp_path / "a", 6), fill(tmp_path / "b", 6)
    for path in [*folder.iterdir(), *elsewhere.iterdir()]:
        os.utime(path, ns=(10**18, 10**18))

    def now(path=folder, **changes):
        config = make_config(path, **changes)
        return fingerprint(build_dataset(config), config)

    seen = [now()]
    assert len(seen[0]) == 64 and int(seen[0], 16)
    assert now(batch_size=2, num_workers=2, hflip=True, seed=8) == seen[0]
    assert fingerprint(data_loader.pictures_in(folder, 16), make_config(folder)) == seen[0]  # without a cache, too
    monkeypatch.chdir(tmp_path)
    assert now("a") == now("b/../a") == seen[0]

    seen += [now(elsewhere), now(imsize=32)]
    os.utime(folder / "003.png", ns=(10**18, 10**18 + 1))
    seen.append(now())
    with open(folder / "003.png", "ab") as file:
        file.write(b"x")
    os.utime(folder / "003.png", ns=(10**18, 10**18 + 1))
    seen.append(now())
    (folder / "004.png").rename(folder / "040.png")
    seen.append(now())
    (folder / "040.png").unlink()
    seen.append(now())
    assert len(set(seen)) == len(seen)


def test_a_picture_that_vanished_has_no_fingerprint(tmp_path):
    config = make_config(fill(tmp_path, 4))
    dataset = build_dataset(config)
    (tmp_path / "002.png").unlink()
    with pytest.raises(DataError, match="002.png: No such file"):
        fingerprint(dataset, config)


# ---- what is held out ----


def numbered(count: int, files: bool = True) -> Pictures:
    """Pictures that show their number, from a file each or from one alone."""
    sources = [f"{index}.png" for index in range(count)] if files else ["all.bin"]
    return Pictures(lambda index: torch.tensor(index), count, f"{count} numbers", sources)


def numbers(dataset) -> list[int]:
    return [int(dataset[index]) for index in range(len(dataset))]


@pytest.mark.parametrize("files", [True, False])
def test_a_part_keeps_the_asked_order_and_the_files(files):
    dataset = part(numbered(9, files), [7, 0, 4], "chosen")
    assert len(dataset) == 3 and numbers(dataset) == [7, 0, 4]
    assert dataset.sources == (["7.png", "0.png", "4.png"] if files else ["all.bin"])
    assert dataset.summary == "3 chosen of 9 numbers"
    again = part(dataset, [2, 0], "left")
    assert numbers(again) == [4, 7] and again.sources == (["4.png", "7.png"] if files else ["all.bin"])


def test_a_part_travels_to_spawned_workers(tmp_path):
    dataset, _ = split(open_dataset(make_config(fill(tmp_path, 5))), 0.2)
    arrived = pickle.loads(pickle.dumps(dataset))
    assert len(arrived) == 4 and all(torch.equal(arrived[index], dataset[index]) for index in range(4))


@pytest.mark.parametrize(("count", "share", "held"), [
    (10, 0.1, 1), (12, 0.1, 1), (1000, 0.1, 100), (3, 0.1, 1), (2, 0.5, 1), (19, 0.1, 2), (10, 0.5, 5), (7, 0.9, 6),
])
def test_the_two_parts_are_disjoint_and_together_the_whole(count, share, held):
    trained, held_out = split(numbered(count), share)
    assert len(held_out) == held and len(trained) == count - held
    for dataset in (trained, held_out):
        assert numbers(dataset) == sorted(numbers(dataset))
        assert dataset.sources == [f"{number}.png" for number in numbers(dataset)]
    assert sorted(numbers(trained) + numbers(held_out)) == list(range(count))
    assert f"{held} held out of {count} numbers" == held_out.summary


def test_a_random_share_is_held_out_the_same_one_every_time():
    state = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    chosen = [numbers(split(numbered(1000), 0.1)[1]) for _ in range(2)]
    assert chosen[0] == chosen[1]
    tenths = np.histogram(chosen[0], 10, (0, 1000))[0]
    assert tenths.min() > 2 and tenths.max() < 25, "neither the first nor the last"
    assert len({b - a for a, b in zip(chosen[0], chosen[0][1:], strict=False)}) > 5, "nor every tenth"
    assert set(chosen[0]) <= set(numbers(split(numbered(1000), 0.2)[1])), "a larger share holds out more of them"
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == state


def test_holdout_leaves_pictures_out_of_training_and_says_so(tmp_path):
    config = make_config(fill(tmp_path, 12), holdout=0.1)
    dataset, whole = build_dataset(config), open_dataset(config)
    trained, held_out = split(whole, 0.1)
    assert len(whole) == 12 and len(dataset) == 11
    assert dataset.sources == trained.sources and set(held_out.sources) == set(whole.sources) - set(trained.sources)
    assert all(torch.equal(dataset[index], trained[index]) for index in range(11))
    assert describe(dataset, config) == f"folder: 11 trained on of 12 pictures in {tmp_path}"
    assert build_dataset(make_config(tmp_path, holdout=0.1, seed=99)).sources == dataset.sources
    assert len(build_dataset(make_config(tmp_path))) == 12
    with pytest.raises(DataError, match="--batch_size 12 is more than the 11 trained on of 12 pictures"):
        build_dataset(make_config(tmp_path, holdout=0.1, batch_size=12))


def test_the_fingerprint_follows_the_trained_pictures_alone(tmp_path):
    config, all_of_them = make_config(fill(tmp_path, 12), holdout=0.25), make_config(tmp_path)

    def now(config):
        return fingerprint(build_dataset(config), config)

    first = now(config)
    assert first == now(config) != now(all_of_them)
    assert now(make_config(tmp_path, holdout=0.5)) not in (first, now(all_of_them))
    trained, held_out = split(open_dataset(config), 0.25)
    os.utime(held_out.sources[1], ns=(10**18, 10**18))
    assert now(config) == first
    os.utime(trained.sources[1], ns=(10**18, 10**18))
    assert now(config) != first
    toy = [make_config(dataset="toy", holdout=share) for share in (0.0, 0.1, 0.2)]
    assert len({now(config) for config in toy}) == 3, "of drawn faces, too"


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("cache", [0, 2**30])
def test_no_batch_shows_a_held_out_picture(tmp_path, monkeypatch, cache, num_workers):
    monkeypatch.setattr(data_loader, "CACHE_BYTES", cache)
    config = make_config(fill(tmp_path, 12), holdout=0.25, num_workers=num_workers)
    dataset, whole = build_dataset(config), open_dataset(config)
    assert isinstance(dataset, DecodedCache) == bool(cache)
    _, held_out = split(whole, 0.25)
    every, kept = (set(identities(data_loader.normalize(torch.stack([pictures[i] for i in range(len(pictures))]))))
                   for pictures in (whole, held_out))
    assert len(every) == 12 and len(kept) == 3
    shown = identities(take(real_batches(config, dataset, 0, "cpu"), 18))       # 72 samples: 8 epochs
    assert set(shown) == every - kept
    assert set(Counter(shown).values()) == {8}


# ---- sampling ----


@pytest.fixture(scope="module")
def ten(tmp_path_factory) -> Path:
    """Ten pictures: not a multiple of the batch of four, so that batches run across epoch ends."""
    return fill(tmp_path_factory.mktemp("ten"), 10)


def open_batches(path, first_sample=0, rank=0, world=1, **changes):
    config = make_config(path, **changes)
    return real_batches(config, build_dataset(config), first_sample, "cpu", rank, world)


def test_batches_are_the_pictures_in_minus_one_to_one(tmp_path):
    for index, colour in enumerate([(0, 0, 0), WHITE, (51, 51, 51), (204, 204, 204)]):
        Image.new("RGB", (20, 20), colour).save(tmp_path / f"{index}.png")
    batch = next(open_batches(tmp_path))
    assert batch.shape == (4, 3, 16, 16) and batch.dtype == torch.float32
    assert sorted(batch[:, 0, 0, 0].tolist()) == pytest.approx([-1, -0.6, 0.6, 1])


def test_every_epoch_shows_every_picture_once_in_an_order_of_its_own(ten):
    shown = identities(take(open_batches(ten), 10))  # 40 samples: 4 epochs
    epochs = [shown[start : start + 10] for start in range(0, 40, 10)]
    assert all(len(set(epoch)) == 10 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert identities(take(open_batches(ten, seed=8), 10))[:10] != epochs[0]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("cache", [0, 2**30])
def test_order_and_flips_depend_on_neither_workers_cache_nor_resume(ten, monkeypatch, num_workers, cache):
    expected = take(open_batches(ten, hflip=True), 9)
    monkeypatch.setattr(data_loader, "CACHE_BYTES", cache)
    changes = dict(hflip=True, num_workers=num_workers)
    assert torch.equal(take(open_batches(ten, **changes), 9), expected)
    assert torch.equal(take(open_batches(ten, first_sample=5 * 4, **changes), 4), expected[5 * 4 :])


def test_half_of_the_pictures_are_mirrored_and_only_with_hflip(ten):
    plain, mirrored = (take(open_batches(ten, hflip=hflip), 100) for hflip in (False, True))
    turned = [torch.equal(b, a.flip(-1)) for a, b in zip(plain, mirrored, strict=True)]
    assert all(t or torch.equal(a, b) for t, a, b in zip(turned, plain, mirrored, strict=True))
    assert 160 < sum(turned) < 240
    by_picture = Counter(zip(identities(plain), turned, strict=True))
    assert len(by_picture) == 20  # each picture comes both ways: the coin is the sample's, not the picture's


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_share_the_global_batch(ten, num_workers):
    changes = dict(hflip=True, num_workers=num_workers)
    whole = take(open_batches(ten, **changes), 6).view(6, 4, 3, 16, 16)
    parts = [take(open_batches(ten, rank=r, world=2, **changes), 6).view(6, 2, 3, 16, 16) for r in (0, 1)]
    assert torch.equal(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_samples_seen_counts_what_the_caller_got(ten, num_workers):
    batches = open_batches(ten, first_sample=8, num_workers=num_workers)
    assert batches.samples_seen == 8
    take(batches, 3)
    assert batches.samples_seen == 20


@pytest.mark.parametrize("num_workers", [0, 2])
def test_global_random_states_stay_as_they_are(ten, num_workers):
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())

    before = states()
    take(open_batches(ten, hflip=True, num_workers=num_workers), 4)
    assert states() == before


# ---- workers ----


def test_workers_outlive_signals_and_end_with_close(ten, monkeypatch):
    monkeypatch.setattr(data_loader, "CACHE_BYTES", 0)
    expected = take(open_batches(ten), 9)
    batches = open_batches(ten, num_workers=2)
    first = [next(batches), next(batches)]  # one from each worker: both have started
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    assert torch.equal(torch.cat([*first, take(batches, 7)]), expected)  # take closes
    assert not multiprocessing.active_children()


def test_workers_end_with_the_program(ten):
    program = f"""
from types import SimpleNamespace
from data_loader import build_dataset, real_batches

config = SimpleNamespace(dataset="folder", image_path={str(ten)!r}, imsize=16, batch_size=4)
vars(config).update(num_workers=2, seed=0, hflip=False, holdout=0.0)
batches = real_batches(config, build_dataset(config), 0, "cpu")
next(batches)
raise SystemExit(3)
"""
    command, root = [sys.executable, "-c", program], Path(data_loader.__file__).parent
    # Returns when the last worker has gone too: they hold the other end of the pipe.
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=30)
    assert ended.returncode == 3 and not ended.stderr


def read_or_die(index: int, parent: int) -> torch.Tensor:
    if index == 5 and os.getpid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.zeros(3, 16, 16, dtype=torch.uint8)


def test_a_killed_worker_is_reported_and_the_other_ends():
    dataset = Pictures(partial(read_or_die, parent=os.getpid()), 10, "10 pictures", [])
    with pytest.raises(DataError, match="--num_workers 0") as caught:
        take(real_batches(make_config(num_workers=2), dataset, 0, "cpu"), 5)
    assert caught.tb and not multiprocessing.active_children()  # which the traceback holds


def test_a_worker_that_dies_during_the_close_does_not_fail_it(ten):
    batches = open_batches(ten, num_workers=2)
    next(batches)
    workers = batches._from_workers
    shut_down = workers._shutdown_workers

    def interrupted():
        del workers._shutdown_workers  # once: the destructor calls it too
        shut_down()
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    workers._shutdown_workers = interrupted
    batches.close()
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_spawned_workers_do_the_same(tmp_path, monkeypatch):
    """As on macOS and Windows, and (by forkserver) on Linux from Python 3.14 on."""
    fill_lmdb(tmp_path / "cats_lmdb", 10)
    config = make_config(tmp_path, dataset="lsun", hflip=True)
    expected = take(real_batches(config, build_dataset(config), 0, "cpu"), 5)
    spawn = multiprocessing.get_context("spawn")
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", spawn)
    config.num_workers = 1
    assert torch.equal(take(real_batches(config, build_dataset(config), 0, "cpu"), 5), expected)


# ---- the decoded cache ----


@pytest.mark.parametrize("num_workers", [0, 2])
def test_files_are_read_once_only(tmp_path, num_workers):
    fill(tmp_path, 8)
    batches = open_batches(tmp_path, num_workers=num_workers)
    first = torch.cat([next(batches), next(batches)])
    while not batches.samples.dataset.full():  # workers may be at the last pictures
        next(batches)
    for path in tmp_path.iterdir():
        path.unlink()
    later = torch.cat([next(batches) for _ in range(4)])
    assert not multiprocessing.active_children()  # with nothing left to decode, workers are dismissed
    assert set(identities(later)) == set(identities(first))


def test_what_the_caller_changes_is_not_in_the_cache(ten):
    dataset = build_dataset(make_config(ten))
    before = dataset[3].clone()
    dataset[3].zero_()
    assert torch.equal(dataset[3], before)


@pytest.mark.parametrize(
    ("num_workers", "memory", "shm", "kept"),
    [
        (0, 10**9, 0, True),  # one process needs no shared memory
        (2, 10**9, 10**9, True),
        (2, 10**9, 10_000, False),  # a container's small /dev/shm
        (0, 10_000, 10**9, False),
    ],
)
def test_the_cache_is_left_out_where_memory_is_short(ten, monkeypatch, num_workers, memory, shm, kept):
    monkeypatch.setattr(data_loader, "available_memory", lambda: memory)
    monkeypatch.setattr(data_loader.shutil, "disk_usage", lambda path: SimpleNamespace(free=shm))
    dataset = build_dataset(make_config(ten, num_workers=num_workers))
    assert isinstance(dataset, DecodedCache) == kept
    assert not kept or dataset.pictures.is_shared() == (num_workers > 0)


def test_the_cache_is_left_out_where_sharing_fails(ten, monkeypatch):
    def fail(self):
        raise RuntimeError("unable to open shared memory object")

    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)
    config = make_config(ten, num_workers=2)
    assert len(take(real_batches(config, build_dataset(config), 0, "cpu"), 3)) == 12


@pytest.mark.gpu
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_arrive_on_the_gpu(ten, num_workers):
    config = make_config(ten, hflip=True, num_workers=num_workers)
    batches = take(real_batches(config, build_dataset(config), 0, "cuda"), 9)
    assert batches.is_cuda
    assert torch.equal(batches.cpu(), take(open_batches(ten, hflip=True), 9))
