"""The data sets: error messages, pictures, fingerprints and held-out subsets."""

import base64
import hashlib
import os
import pickle
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BLUE, GREEN, RED, assert_colour, data_config, encode, fill, fill_lmdb, gradient, identities, take
from PIL import Image

from data_loader import build_dataset, describe, open_dataset, real_batches, to_images
from dataset.decode import decode
from dataset.decoded_cache import DecodedCache
from dataset.images import Files, ImageDataset, Subset, split
from dataset.table import DATASETS, describe_changes, fingerprint, is_other_set, summarize
from errors import DataError

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
        (lambda path: write_files(path, "a.txt", "b/c.psd"),
         "holds 2 files, but no picture (2 files ignored: 1 .psd, 1 .txt)"),
        (lambda path: write_files(path, "file.jpg") / "file.jpg", "is a file"),
    ],
)
def test_a_folder_without_pictures_is_refused(tmp_path, prepare, words):
    folder = prepare(tmp_path)
    (line,) = refused(data_config(folder))
    assert words in line and str(folder) in line and "--image_path" in line


def test_an_unreadable_folder_is_refused(tmp_path, monkeypatch):
    def closed(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", closed)
    (line,) = refused(data_config(tmp_path))
    assert "Permission denied" in line and "--image_path" in line


def test_a_batch_larger_than_the_data_set_is_refused(tmp_path):
    (line,) = refused(data_config(fill(tmp_path, 3), batch_size=64))
    assert line == f"--batch_size 64 is more than the 3 pictures in {tmp_path}; use --batch_size 3 or less"
    (line,) = refused(data_config(dataset="toy", batch_size=5000))
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
    problem, ways_on = refused(data_config(tmp_path, dataset=dataset))
    assert f"--dataset {dataset}" in problem and str(tmp_path / place) in problem
    assert f"`bash download.sh {name}`" in ways_on and "`--dataset toy`" in ways_on
    assert "`--dataset folder`" in ways_on, "where a folder was named"


@pytest.mark.parametrize(
    ("data", "reason", "num_workers"),
    [
        (encode(gradient((90, 90)), "JPEG")[:-200], "truncated", 2),
        (encode(gradient((90, 90)), "PNG")[:-200], "", 0),
        (b"<html>quota exceeded</html>", "not a JPEG, PNG, WebP or any other picture", 0),
    ],
    ids=["half-jpeg", "half-png", "html"],
)
def test_an_unreadable_picture_is_named(tmp_path, data, reason, num_workers):
    bad = fill(tmp_path, 7) / "bad.jpg"
    bad.write_bytes(data)
    config = data_config(tmp_path, num_workers=num_workers)
    with pytest.raises(DataError, match="delete or replace it") as caught:
        take(real_batches(config, build_dataset(config), 0, "cpu"), 2)
    line, hint = str(caught.value).splitlines()
    assert str(bad) in line and reason in line and "--check_data full" in hint


def test_a_picture_that_vanished_is_named(tmp_path):
    dataset = build_dataset(data_config(fill(tmp_path, 4)))
    (tmp_path / "002.png").unlink()
    with pytest.raises(DataError) as caught:
        dataset[2]
    words = f"cannot read {tmp_path / '002.png'}: No such file or directory"
    assert str(caught.value) == words, "and is not to be deleted"
    with pytest.raises(DataError) as caught:
        take(real_batches(data_config(tmp_path), dataset, 0, "cpu"), 1)
    assert str(caught.value) == words, "nor looked for before training"


# ---- the data sets ----


@pytest.mark.parametrize(("kind", "tolerance"), [("png", 2), ("jpg", 30)])
def test_celeba_shows_the_central_160_pixels(tmp_path, kind, tolerance):
    image = Image.new("RGB", (178, 218), RED)
    image.paste(GREEN, (9, 29, 169, 189))
    small = Image.new("RGB", (100, 120), BLUE)
    for name, picture in ((f"img/a.{kind}", image), (f"img/b.{kind}", small)):
        path = tmp_path / "CelebA" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, quality=95, subsampling=0)
    dataset = build_dataset(data_config(tmp_path, dataset="celeb", batch_size=2))
    assert_colour(dataset[0], GREEN, tolerance)
    assert_colour(dataset[1], BLUE)


@pytest.mark.parametrize(
    "place", [".", "church_outdoor_train_lmdb", "LSUN/church_outdoor_train_lmdb", "cats_lmdb", "LSUN/cat_lmdb"]
)
def test_lsun_is_found_and_read(tmp_path, place):
    folder = fill_lmdb(tmp_path / "data" / place, 6)
    config = data_config(tmp_path / "data", dataset="lsun")
    dataset = build_dataset(config)
    assert describe(dataset, config) == f"lsun: 6 pictures in {folder}"
    assert torch.equal(dataset[3], decode(encode(gradient(seed=3), "PNG"), "x", 16))


def test_the_part_of_lsun_that_is_for_validation_is_used_only_where_it_is_named_or_alone(tmp_path):
    def opened(path):
        return build_dataset(data_config(path, dataset="lsun"))

    validation = fill_lmdb(tmp_path / "church_outdoor_val_lmdb", 4)
    assert len(opened(tmp_path)) == 4
    fill_lmdb(tmp_path / "church_outdoor_train_lmdb", 6)
    assert len(opened(tmp_path)) == 6 and len(opened(validation)) == 4


def test_an_lmdb_may_be_opened_by_several_names(tmp_path):
    (tmp_path / "link").symlink_to(fill_lmdb(tmp_path / "cats_lmdb", 4), target_is_directory=True)
    first, second = (build_dataset(data_config(tmp_path / name, dataset="lsun")) for name in ("cats_lmdb", "link"))
    assert torch.equal(first[3], second[3])


def test_lsun_survives_a_second_opening_fork_and_pickle(tmp_path):
    fill_lmdb(tmp_path / "cats_lmdb", 6)
    configs = [data_config(tmp_path, dataset="lsun", num_workers=workers) for workers in (0, 2)]
    datasets = [build_dataset(config) for config in configs]
    direct, forked = (take(real_batches(c, d, 0, "cpu"), 3) for c, d in zip(configs, datasets, strict=True))
    assert torch.equal(direct, forked)
    assert torch.equal(pickle.loads(pickle.dumps(datasets[0]))[5], datasets[1][5])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda file: os.truncate(file, file.stat().st_size // 2), "is truncated"),
        (lambda file: os.truncate(file, file.stat().st_size - 1), "is truncated"),
        (lambda file: file.write_bytes(b"<html>" * 2000), "cannot read"),
        (lambda file: file.write_bytes(b""), "cannot read"),
    ],
)
def test_a_damaged_lsun_is_refused(tmp_path, damage, words):
    damage(fill_lmdb(tmp_path / "cats_lmdb", 20) / "data.mdb")
    problem, ways_on = refused(data_config(tmp_path, dataset="lsun"))
    assert words in problem and "data.mdb" in problem and "download.sh LSUN" in ways_on


def test_an_empty_or_ambiguous_lsun_is_refused(tmp_path):
    fill_lmdb(tmp_path / "cats_lmdb", 0)
    assert "holds no pictures" in refused(data_config(tmp_path, dataset="lsun"))[0]
    fill_lmdb(tmp_path / "dogs_lmdb", 4)
    (line,) = refused(data_config(tmp_path, dataset="lsun"))
    assert "cats_lmdb, dogs_lmdb" in line and "--image_path" in line
    assert len(build_dataset(data_config(tmp_path / "dogs_lmdb", dataset="lsun"))) == 4


def many(path, **changes):
    """All LMDBs of a folder as one data set."""
    return build_dataset(data_config(path, dataset="lsun", conditional=True, **changes))


@pytest.mark.parametrize("place", [".", "LSUN"])
def test_several_lmdbs_are_a_class_each_where_classes_are_asked_for(tmp_path, place):
    for name, count in (("dog_train_lmdb", 3), ("dog_val_lmdb", 4), ("cat_lmdb", 5), ("church_outdoor_val_lmdb", 2)):
        fill_lmdb(tmp_path / place / name, count)
    (line,) = refused(data_config(tmp_path, dataset="lsun", conditional=False))
    assert "cat_lmdb, dog_train_lmdb" in line and "--conditional true" in line and "--image_path" in line
    for conditional in (True, "auto"):
        config = data_config(tmp_path, dataset="lsun", conditional=conditional)
        dataset = build_dataset(config)
        assert describe(dataset, config) == f"lsun: 10 pictures of 3 categories in {tmp_path}"
        assert dataset.labels.names == ("cat", "church_outdoor", "dog") and dataset.labels.counts.tolist() == [5, 2, 3]
        assert dataset.labels.numbers.tolist() == [0] * 5 + [1] * 2 + [2] * 3
    for index, seed in ((0, 0), (4, 4), (5, 0), (6, 1), (7, 0), (9, 2)):        # the ends of each part
        assert torch.equal(dataset[index], decode(encode(gradient(seed=seed), "PNG"), "x", 16)), index


def test_one_lmdb_has_no_classes(tmp_path):
    fill_lmdb(tmp_path / "cat_train_lmdb", 5), fill_lmdb(tmp_path / "cat_val_lmdb", 4)
    assert len(many(tmp_path)) == 5 and many(tmp_path).labels is None
    assert len(many(tmp_path / "cat_val_lmdb")) == 4


def test_two_lmdbs_of_one_category_are_refused(tmp_path):
    fill_lmdb(tmp_path / "cat_lmdb", 4), fill_lmdb(tmp_path / "LSUN/cat_train_lmdb", 4)
    (line,) = refused(data_config(tmp_path, dataset="lsun", conditional=True))
    assert "two data sets of the category cat" in line and "LSUN/cat_train_lmdb" in line


def test_several_lmdbs_are_checked_cached_and_loaded_as_one_set(tmp_path):
    fill_lmdb(tmp_path / "cat_lmdb", 11), fill_lmdb(tmp_path / "dog_lmdb", 9)
    import lmdb

    with lmdb.open(str(tmp_path / "dog_lmdb"), map_size=2**22) as opened, opened.begin(write=True) as transaction:
        transaction.put(b"00000003", b"<html>")
        transaction.put(b"00000004", encode(Image.fromarray(np.full((9, 9), 4000, np.uint16)), "PNG"))
    changes = dict(check_data="full", cache="on", log_path=str(tmp_path / "logs"), cache_path=str(tmp_path / "cache"))
    dataset, again = many(tmp_path, **changes), many(tmp_path, num_workers=2)
    assert len(dataset) == 19 and dataset.labels.counts.tolist() == [11, 8]
    assert_colour(dataset[14], (250, 250, 250), 6)                  # 4000 of 12 bits
    assert len(set(dataset.identities.tolist())) == 19 and len(set(dataset.whole.whole.stamps.tolist())) == 20
    assert dataset.is_decoded() and [path.parent.name for path in tmp_path.rglob("*.u8")] == ["lmdb"]
    assert dataset.sources == [str(tmp_path / f"{name}_lmdb/data.mdb") for name in ("cat", "dog")]
    config = data_config(tmp_path, dataset="lsun", conditional=True, num_workers=2)
    with pytest.raises(DataError, match="00000003 in .*dog_lmdb"):
        take(real_batches(config, again, 0, "cpu"), 5)
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[15], again[16])


def test_lsun_without_the_lmdb_package(tmp_path, monkeypatch):
    fill_lmdb(tmp_path / "cats_lmdb", 4)
    monkeypatch.setitem(sys.modules, "lmdb", None)
    (line,) = refused(data_config(tmp_path, dataset="lsun"))
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
    dataset = build_dataset(data_config(tmp_path, dataset="cifar10", imsize=64))
    assert len(dataset) == 10
    assert dataset.labels.names == ("red", "blue") and dataset.labels.numbers.tolist() == [0, 1] * 5
    assert dataset[0].shape == (3, 64, 64)
    assert_colour(dataset[0], RED)
    assert_colour(dataset[9], BLUE)


def test_a_damaged_cifar10_is_refused(tmp_path, cifar10):
    (cifar10(tmp_path) / "data_batch_3").write_bytes(b"half")
    problem, ways_on = refused(data_config(tmp_path, dataset="cifar10"))
    assert "damaged" in problem and "download.sh CIFAR10" in ways_on


def test_toy_needs_nothing(tmp_path):
    config = data_config(tmp_path / "nowhere", dataset="toy", imsize=32)
    dataset = build_dataset(config)
    assert describe(dataset, config) == "toy: 4096 drawn faces at 32 px"
    assert dataset[4095].shape == (3, 32, 32) and dataset[4095].dtype == torch.uint8
    assert not torch.equal(dataset[0], dataset[1])
    assert len(dataset.labels.numbers) == 4096 and len(pickle.dumps(dataset)) < 10_000


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
        build_dataset(data_config(tmp_path, dataset=name))[0]
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
        dataset = build_dataset(data_config(tmp_path, dataset=name, cache="auto"))
        assert isinstance(dataset, DecodedCache)
        assert [os.path.relpath(path, tmp_path) for path in dataset.sources] == files
    (source,) = build_dataset(data_config(dataset="toy")).sources
    assert Path(source).name == "toy.py"


def test_the_fingerprint_is_that_of_the_pictures(tmp_path, monkeypatch):
    folder, elsewhere = fill(tmp_path / "a", 6), fill(tmp_path / "b", 6)
    for path in [*folder.iterdir(), *elsewhere.iterdir()]:
        os.utime(path, ns=(10**18, 10**18))

    def now(path=folder, **changes):
        config = data_config(path, **changes)
        return fingerprint(build_dataset(config), config)

    seen = [now()]
    assert len(seen[0]) == 64 and int(seen[0], 16)
    assert now(batch_size=2, num_workers=2, hflip=True, seed=8) == seen[0]
    assert fingerprint(Files(folder, 16), data_config(folder)) == seen[0]  # without a cache, too
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
    config = data_config(fill(tmp_path, 4))
    dataset = build_dataset(config)
    (tmp_path / "002.png").unlink()
    with pytest.raises(DataError, match="002.png: No such file"):
        fingerprint(dataset, config)


# ---- what is held out ----


def numbered(count: int, files: bool = True) -> ImageDataset:
    """Pictures that show their number, from a file each or from one alone."""
    sources = [f"{index}.png" for index in range(count)] if files else ["all.bin"]
    return ImageDataset(lambda index: torch.tensor(index), count, f"{count} numbers", sources)


def numbers(dataset) -> list[int]:
    return [int(dataset[index]) for index in range(len(dataset))]


@pytest.mark.parametrize("files", [True, False])
def test_a_part_keeps_the_asked_order_and_the_files(files):
    dataset = Subset(numbered(9, files), [7, 0, 4], "chosen")
    assert len(dataset) == 3 and numbers(dataset) == [7, 0, 4]
    assert dataset.sources == (["7.png", "0.png", "4.png"] if files else ["all.bin"])
    assert dataset.summary == "3 chosen of 9 numbers"
    again = Subset(dataset, [2, 0], "left")
    assert numbers(again) == [4, 7] and again.sources == (["4.png", "7.png"] if files else ["all.bin"])


def test_a_part_travels_to_spawned_workers(tmp_path):
    dataset, _ = split(open_dataset(data_config(fill(tmp_path, 5))), 0.2)
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
    config = data_config(fill(tmp_path, 12), holdout=0.1)
    dataset, whole = build_dataset(config), open_dataset(config)
    trained, held_out = split(whole, 0.1)
    assert len(whole) == 12 and len(dataset) == 11
    assert dataset.sources == trained.sources and set(held_out.sources) == set(whole.sources) - set(trained.sources)
    assert all(torch.equal(dataset[index], trained[index]) for index in range(11))
    assert describe(dataset, config) == f"folder: 11 trained on of 12 pictures in {tmp_path}"
    assert build_dataset(data_config(tmp_path, holdout=0.1, seed=99)).sources == dataset.sources
    assert len(build_dataset(data_config(tmp_path))) == 12
    with pytest.raises(DataError, match="--batch_size 12 is more than the 11 trained on of 12 pictures"):
        build_dataset(data_config(tmp_path, holdout=0.1, batch_size=12))


def test_the_fingerprint_follows_the_trained_pictures_alone(tmp_path):
    config, all_of_them = data_config(fill(tmp_path, 12), holdout=0.25), data_config(tmp_path)

    def now(config):
        return fingerprint(build_dataset(config), config)

    first = now(config)
    assert first == now(config) != now(all_of_them)
    assert now(data_config(tmp_path, holdout=0.5)) not in (first, now(all_of_them))
    trained, held_out = split(open_dataset(config), 0.25)
    os.utime(held_out.sources[1], ns=(10**18, 10**18))
    assert now(config) == first
    os.utime(trained.sources[1], ns=(10**18, 10**18))
    assert now(config) != first
    toy = [data_config(dataset="toy", holdout=share) for share in (0.0, 0.1, 0.2)]
    assert len({now(config) for config in toy}) == 3, "of drawn faces, too"


@pytest.mark.parametrize(("cache", "num_workers"), [("off", 2), ("auto", 0)])
def test_no_batch_shows_a_held_out_picture(tmp_path, cache, num_workers):
    config = data_config(fill(tmp_path, 12), holdout=0.25, num_workers=num_workers, cache=cache)
    dataset, whole = build_dataset(config), open_dataset(config)
    assert isinstance(dataset.whole, DecodedCache) == (cache == "auto")
    _, held_out = split(whole, 0.25)
    every, kept = (set(identities(to_images(torch.stack([pictures[i] for i in range(len(pictures))]))))
                   for pictures in (whole, held_out))
    assert len(every) == 12 and len(kept) == 3
    shown = identities(take(real_batches(config, dataset, 0, "cpu"), 18))       # 72 samples: 8 epochs
    assert set(shown) == every - kept
    assert set(Counter(shown).values()) == {8}


# ---- a set and a later one ----


def record(path, **changes):
    config = data_config(path, **changes)
    return summarize(build_dataset(config), config)


def test_what_was_added_changed_or_taken_away_is_counted(tmp_path):
    folder = fill(tmp_path / "pictures", 10)
    before = record(folder)
    assert describe_changes(before, record(folder, imsize=32, cache="on", seed=9)) is None
    for number in range(5):
        gradient(seed=50 + number).save(folder / f"new {number}.png")
    (folder / "003.png").unlink()
    now = record(folder)
    assert describe_changes(before, now) == "14 pictures, were 10: 5 added, 1 gone"
    assert describe_changes(now, before) == "10 pictures, were 14: 1 added, 5 gone"
    gradient((90, 90), seed=4).save(folder / "004.png")
    now = record(folder)
    assert describe_changes(before, now) == "14 pictures, were 10: 5 added, 1 gone, 1 changed"
    assert not is_other_set(before, now) and not is_other_set(before, before)


def test_pictures_that_moved_are_the_same_and_others_are_not(tmp_path):
    folder = fill(tmp_path / "pictures", 6)
    before = record(folder)
    folder.rename(tmp_path / "moved")
    for path in (tmp_path / "moved").iterdir():
        os.utime(path, ns=(10**18, 10**18))                 # as after a download, without its times
    now = record(tmp_path / "moved")
    assert not is_other_set(before, now)
    assert describe_changes(before, now) == f"the folder is {tmp_path / 'moved'}, was {folder}"
    (tmp_path / "others").mkdir()
    for number in range(6):
        gradient((90, 90), seed=number).save(tmp_path / f"others/{number:03}.png")
    others, toy = record(tmp_path / "others"), record(tmp_path, dataset="toy")
    assert is_other_set(before, others) and is_other_set(before, toy)
    assert "--dataset is toy, was folder; 4096 pictures, were 6: 4096 added, 6 gone" in describe_changes(before, toy)


def test_the_record_of_a_set_is_small_and_fits_into_a_checkpoint(tmp_path):
    before = record(fill(tmp_path / "pictures", 12), holdout=0.25)
    torch.save(before, tmp_path / "file")
    again = torch.load(tmp_path / "file", weights_only=True)
    assert describe_changes(before, again) is None and len(again["identities"]) == 128 and again["pictures"] == 12
    gradient(seed=40).save(tmp_path / "pictures/new.png")
    now = record(tmp_path / "pictures", holdout=0.25)
    assert describe_changes(again, now) == "13 pictures, were 12: 1 added", "whichever are held out now"


def test_the_record_of_an_lmdb_and_of_pictures_that_became_unusable(tmp_path):
    import lmdb

    fill_lmdb(tmp_path / "a_lmdb", 6)
    with lmdb.open(str(fill_lmdb(tmp_path / "b/c_lmdb", 8))) as opened, opened.begin(write=True) as transaction:
        transaction.delete(b"00000002")
    first, second = (record(tmp_path / place, dataset="lsun") for place in ("a_lmdb", "b"))
    assert describe_changes(first, second).endswith("7 pictures, were 6: 2 added, 1 gone")
    folder = fill(tmp_path / "pictures", 120)
    whole = record(folder, check_data="header", log_path=str(tmp_path / "logs"), cache_path=str(tmp_path / "cache"))
    (folder / "005.png").write_bytes(b"")
    now = record(folder, check_data="header", log_path=str(tmp_path / "logs"), cache_path=str(tmp_path / "cache"))
    assert describe_changes(whole, now) == "119 pictures, were 120: 1 gone"


def test_a_million_pictures_are_compared_in_seconds():
    numbers = np.random.default_rng(0).integers(-2**63, 2**63 - 1, 1_000_000)
    before, now = ({"dataset": "folder", "folder": "a", "pictures": len(part), "identities": base64.b64encode(
        np.sort(part).tobytes()).decode()} for part in (numbers, numbers[5:]))
    began = time.process_time()
    assert describe_changes(before, now) == "999995 pictures, were 1000000: 5 gone"
    assert time.process_time() - began < 3, "a fifth of one, usually"
