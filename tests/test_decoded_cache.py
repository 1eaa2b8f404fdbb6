"""The decoded cache: a file shared by all runs, or memory; it never returns a wrong picture."""

import errno
import io
import multiprocessing
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import data_config, fill, fill_lmdb, forks, gradient, identities, take

from data_loader import build_dataset, open_dataset, real_batches
from dataset import decoded_cache, images
from dataset.decoded_cache import DecodedCache
from dataset.images import Subset
from errors import CheckpointError
from flags.pictures import PictureShape


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def folder(home):
    return fill(home / "pictures", 10)


@pytest.fixture
def reads(monkeypatch):
    """A list of the files that were decoded in this process."""
    paths, read = [], images.read_picture

    def counted(path, *more):
        paths.append(os.path.basename(path))
        return read(path, *more)

    monkeypatch.setattr(images, "read_picture", counted)
    return paths


def opened(folder, **changes):
    return open_dataset(data_config(folder, **{"cache": "auto", **changes}))


def everything(dataset) -> torch.Tensor:
    return dataset.load_batch(range(len(dataset)))


def plain(folder, **changes) -> torch.Tensor:
    return everything(opened(folder, cache="off", **changes))


def files(place) -> list[Path]:
    return sorted(path for path in Path(place).rglob("*") if path.is_file())


# ---- the file ----


def test_every_picture_is_decoded_once_for_all_runs(folder, reads, capsys):
    expected = plain(folder)
    del reads[:]
    first = opened(folder)
    assert not first.is_decoded() and not reads, "training starts at once"
    assert torch.equal(first.load_batch([3, 3, 7]), expected[[3, 3, 7]])
    assert sorted(reads) == ["003.png", "007.png"] and not first.is_decoded()
    assert first.is_decoded([7, 3]) and not first.is_decoded([3, 4])
    assert torch.equal(everything(first), expected) and first.is_decoded()
    assert len(reads) == 10 and len(set(reads)) == 10
    again = opened(folder)
    assert again.is_decoded() and torch.equal(everything(again), expected)
    assert torch.equal(again[4], expected[4])
    assert len(reads) == 10
    out = capsys.readouterr().out.splitlines()
    assert "filled as pictures are first used" in out[0] and "10 of 10 pictures in" in out[1]


def test_it_lies_beside_the_data_unless_told_otherwise(folder, home):
    opened(folder)
    (file,) = files(folder / ".decoded")
    assert file.name.startswith("16px_") and file.suffix == ".u8"
    assert opened(folder).summary == f"10 pictures in {folder}", "and is no picture itself"
    opened(folder, cache_dir="elsewhere", imsize=32)
    (file,) = files("elsewhere")
    assert file.parent.name.startswith("pictures-") and file.name.startswith("32px_")
    assert len(files(folder / ".decoded")) == 1 and not Path("cache").exists()


@pytest.mark.parametrize("dataset", ["celeb", "lsun"])
def test_other_sets_are_cached_beside_their_data_too(home, dataset):
    place = fill(home / "CelebA", 5) if dataset == "celeb" else fill_lmdb(home / "LSUN/cat_lmdb", 5)
    expected = plain(home, dataset=dataset)
    everything(opened(home, dataset=dataset))
    assert len(files(place / ".decoded")) == 1
    assert opened(home, dataset=dataset).is_decoded()
    assert torch.equal(everything(opened(home, dataset=dataset)), expected)


def test_where_the_data_cannot_be_written_it_lies_below_cache_path(folder, capsys):
    (folder / ".decoded").write_text("in the way, as on a disk that is mounted to be read only")
    expected = plain(folder)
    assert torch.equal(everything(opened(folder)), expected)
    (file,) = files("cache/decoded")
    assert opened(folder).is_decoded() and str(file) in capsys.readouterr().out


def test_a_changed_folder_gets_a_new_file_and_the_old_one_goes(folder):
    everything(opened(folder))
    everything(opened(folder, imsize=32))
    before = set(files(folder / ".decoded"))
    gradient(seed=99).save(folder / "003.png")
    os.utime(folder / "003.png", ns=(10**18, 10**18))
    changed = opened(folder)
    assert not changed.is_decoded() and torch.equal(everything(changed), plain(folder))
    after = set(files(folder / ".decoded"))
    assert len(after) == 2 and len(after & before) == 1
    (kept,) = after & before
    assert kept.name.startswith("32px_"), "other sizes wait for their turn"
    (folder / "003.png").unlink()
    assert torch.equal(everything(opened(folder)), plain(folder))


def rename(folder):
    (folder / "a").rename(folder / "c")


def repaint(folder):
    (folder / "a/1.bmp").write_bytes((folder / "b/1.bmp").read_bytes())
    os.utime(folder / "a/1.bmp", ns=(10**18, 10**18 + 1))


def append(folder):
    gradient(seed=9).save(folder / "a/1.bmp", "PNG")
    os.utime(folder / "a/1.bmp", ns=(10**18, 10**18))


@pytest.mark.parametrize("change", [rename, repaint, append])
def test_one_changed_name_time_or_size_is_enough(home, change):
    """The files are of one size and time, as those of a copied or unpacked folder may be."""
    folder = home / "pictures"
    for number, name in enumerate(("a/1", "a/2", "b/1", "b/2")):
        path = folder / f"{name}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        gradient(seed=number).save(path)
        os.utime(path, ns=(10**18, 10**18))
    everything(opened(folder))
    change(folder)
    assert torch.equal(everything(opened(folder)), plain(folder))


@pytest.mark.parametrize("changed", ["time", "size"])
def test_an_lmdb_that_was_written_again_is_decoded_again(home, changed):
    import lmdb

    folder = fill_lmdb(home / "cats_lmdb", 10)
    file = folder / "data.mdb"
    os.truncate(file, 2**20)
    os.utime(file, ns=(10**18, 10**18))
    # lmdb opens a file once per process: what wrote the cache was another
    (before,) = forks(lambda _: everything(opened(home, dataset="lsun")).numpy(), 1)
    with lmdb.open(str(folder), map_size=2**22) as database, database.begin(write=True) as transaction:
        transaction.put(b"00000003", transaction.get(b"00000004"))
    assert file.stat().st_size == 2**20
    if changed == "size":
        os.truncate(file, 2**21)
    os.utime(file, ns=(10**18, 10**18 + (changed == "time")))
    after = everything(opened(home, dataset="lsun"))
    assert np.array_equal(after[3], before[4]) and not np.array_equal(after[3], before[3])


def test_another_size_crop_or_pillow_has_a_file_of_its_own(folder, monkeypatch):
    seen = set()

    def cache(imsize=16, crop=None, channels="rgb"):
        config = data_config(imsize=imsize, cache="on", channels=channels)
        decoded_cache.cached(images.Files(folder, PictureShape.of_config(config), crop), config)
        seen.update(now := files(folder / ".decoded"))
        kept.append(len(now))
        return len(seen)

    kept = []
    assert [cache(channels="grey"), cache(), cache(), cache(crop=20), cache(imsize=32)] == [1, 2, 2, 3, 4] == kept
    monkeypatch.setattr(decoded_cache.PIL, "__version__", "0.1")
    assert cache() == 5
    monkeypatch.setattr(decoded_cache.decode, "CACHE_VERSION", 99)
    assert cache() == 6


def test_a_folder_that_moves_takes_its_cache_along(folder, home, reads):
    expected = everything(opened(folder))
    del reads[:]
    shutil.copytree(folder, home / "copied")                # with the times of change
    folder.rename(home / "moved")
    for place in ("moved", "copied"):
        assert torch.equal(everything(opened(place)), expected)
    assert not reads


def damage(folder, picture):
    """Flip one byte of a picture in the cache's file, as a torn write would."""
    (path,) = files(folder / ".decoded")
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size - (10 - picture) * 3 * 16 * 16 + 5)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 255]))


def test_a_torn_picture_is_decoded_again_and_mended(folder, reads):
    expected = everything(opened(folder))
    damage(folder, 4)
    del reads[:]
    dataset = opened(folder)
    assert torch.equal(everything(dataset), expected) and torch.equal(dataset[4], expected[4])
    assert reads == ["004.png"]
    assert torch.equal(everything(opened(folder)), expected) and reads == ["004.png"]


@pytest.mark.parametrize("how", ["cut", "other head", "empty"])
def test_a_damaged_file_is_made_anew(folder, how):
    expected = everything(opened(folder))
    (path,) = files(folder / ".decoded")
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-100], "other head": b"x" + content[1:], "empty": b""}[how])
    dataset = opened(folder)
    assert not dataset.is_decoded() and torch.equal(everything(dataset), expected)
    assert path.stat().st_size == len(content)


def test_a_file_that_may_only_be_read_is_used_and_left_as_it_is(folder, monkeypatch, reads):
    expected = plain(folder)
    opened(folder).load_batch([1, 2])
    (path,) = files(folder / ".decoded")
    content, memmap = path.read_bytes(), np.memmap

    def mapped(path, dtype, mode):
        if mode == "r+":
            raise PermissionError(errno.EACCES, "Permission denied")
        return memmap(path, dtype, mode)

    monkeypatch.setattr(decoded_cache.os, "access", lambda *_: False)     # chmod does not keep root out
    monkeypatch.setattr(decoded_cache.np, "memmap", mapped)
    del reads[:]
    dataset = opened(folder)
    for _ in range(2):
        assert torch.equal(everything(dataset), expected)
    assert len(reads) == 16, "eight, twice"
    assert path.read_bytes() == content


def test_what_the_caller_changes_is_not_in_the_cache(folder):
    dataset = opened(folder)
    before = dataset[3].clone()
    dataset[3].zero_()
    everything(dataset).zero_()
    assert torch.equal(dataset[3], before) and torch.equal(opened(folder)[3], before)


@pytest.mark.parametrize(("steps", "d_iters", "batch", "made"), [
    (9, 1, 1, False), (10, 1, 1, False), (11, 1, 1, True), (5, 2, 1, False), (6, 2, 1, True), (5, 1, 2, False),
    (6, 1, 2, True), (2, 2, 3, True),
])
def test_a_run_that_shows_no_picture_twice_makes_none(folder, steps, d_iters, batch, made):
    dataset = opened(folder, total_step=steps, d_iters=d_iters, batch_size=batch)
    assert isinstance(dataset, DecodedCache) == made == (folder / ".decoded").exists()
    everything(opened(folder))
    assert opened(folder, total_step=1, batch_size=1).is_decoded(), "one that is there serves all the same"


def test_folders_of_one_name_have_files_of_their_own_in_cache_dir(home, folder):
    other = fill(home / "elsewhere/pictures", 3)
    for place in (folder, other):
        everything(opened(place, cache_dir="kept"))
    assert opened("pictures", cache_dir="kept").is_decoded() and opened(other, cache_dir="kept").is_decoded()
    assert len(files("kept")) == 2


def test_a_part_is_decoded_when_its_own_pictures_are(folder):
    """Of a set with bad pictures, with some held out: a part of a part."""
    usable = Subset(opened(folder), [9, 7, 5, 3, 1], "usable")
    trained, held_out = Subset(usable, [0, 1, 3], "trained on"), Subset(usable, [2, 4], "held out")
    assert torch.equal(trained.load_batch([2, 0, 1]), plain(folder)[[3, 9, 7]])
    assert trained.is_decoded() and trained.is_decoded([2, 0])
    assert not held_out.is_decoded() and not usable.is_decoded() and usable.is_decoded([3, 0])


def test_on_makes_one_at_any_rate_and_off_looks_at_none(folder, reads):
    everything(opened(folder, cache="on", total_step=1, batch_size=1))
    assert len(files(folder / ".decoded")) == 1
    del reads[:]
    off = opened(folder, cache="off")
    everything(off), everything(off)
    assert len(reads) == 20 and not off.is_decoded()


def test_evaluation_uses_one_but_makes_none(folder):
    assert isinstance(opened(folder, mode="evaluate"), DecodedCache) and not (folder / ".decoded").exists()
    everything(opened(folder))
    assert opened(folder, mode="evaluate").is_decoded()


def test_a_dry_run_says_what_would_be_made_and_makes_nothing(folder, capsys):
    opened(folder, dry_run=True)
    assert not (folder / ".decoded").exists() and not Path("cache").exists()
    assert f"would be written to {folder / '.decoded'}" in capsys.readouterr().out
    opened(folder, imsize=128, dry_run=True)
    assert "decoded cache: 0.5 MB would be written to" in capsys.readouterr().out


# ---- disks that refuse ----


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_memory(folder, monkeypatch, capsys):
    monkeypatch.setattr(decoded_cache.os, "posix_fallocate", no_space)
    dataset = opened(folder)
    assert torch.equal(everything(dataset), plain(folder)) and dataset.is_decoded()
    assert not files(folder / ".decoded") and not files("cache")
    out = capsys.readouterr().out
    assert "no file, pictures are kept in memory" in out and "No space left" in out and "--cache_dir" in out


def test_a_full_disk_ends_a_run_that_insists(folder, monkeypatch):
    monkeypatch.setattr(decoded_cache.os, "posix_fallocate", no_space)
    with pytest.raises(CheckpointError, match="--cache on: .*No space left.*\n.*--cache_dir") as caught:
        opened(folder, cache="on")
    assert caught.value.code == 5


def test_auto_takes_no_more_than_a_quarter_of_the_free_disk(folder, monkeypatch, capsys):
    opened(folder, cache_dir="elsewhere")
    size = files("elsewhere")[0].stat().st_size
    for free, made in ((4 * size - 4, False), (4 * size, True)):
        monkeypatch.setattr(decoded_cache.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        dataset = opened(folder)
        assert (folder / ".decoded").exists() == made and dataset.load_batch([0]).shape == (1, 3, 16, 16)
    assert "--cache auto uses at most a quarter" in capsys.readouterr().out
    monkeypatch.setattr(decoded_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=size))
    assert isinstance(opened(folder, cache="on", imsize=8), DecodedCache) and len(files(folder / ".decoded")) == 2


def test_systems_without_fallocate_take_the_space_too(folder, monkeypatch):
    monkeypatch.delattr(decoded_cache.os, "posix_fallocate")
    expected = plain(folder)
    assert torch.equal(everything(opened(folder)), expected)
    (path,) = files(folder / ".decoded")
    assert path.stat().st_blocks * 512 >= path.stat().st_size
    assert opened(folder).is_decoded()


# ---- several processes ----


def test_processes_that_fill_it_at_the_same_time_agree(folder):
    together = multiprocessing.get_context("fork").Barrier(3, timeout=30)

    def fill_it(seed):
        together.wait()
        dataset = opened(folder)
        for _ in range(50):
            for index in np.random.default_rng(seed).permutation(10):
                dataset[int(index)]
        return dataset.is_decoded(), everything(dataset).numpy()

    for decoded, pictures in forks(fill_it, 3):
        assert decoded and np.array_equal(pictures, plain(folder))
    assert len(files(folder / ".decoded")) == 1
    assert opened(folder).is_decoded() and torch.equal(everything(opened(folder)), plain(folder))


def test_other_processes_map_the_file_that_the_first_made(folder, monkeypatch):
    asked = []

    def second(first, others):
        asked.append(first())
        return others()

    monkeypatch.setattr(decoded_cache, "after_first", second)
    dataset = opened(folder)
    assert dataset.file and torch.equal(everything(dataset), plain(folder)) and opened(folder).is_decoded()
    monkeypatch.setattr(decoded_cache.os, "posix_fallocate", no_space)
    assert torch.equal(everything(opened(folder, imsize=32)), plain(folder, imsize=32)), "or do without, as it does"
    assert len(asked) == 3


def test_it_travels_to_spawned_workers_as_a_name(folder):
    dataset = opened(folder, imsize=64)
    data = pickle.dumps(dataset)
    assert len(data) < 10_000, "the pictures are 122,880"
    arrived = pickle.loads(data)
    assert torch.equal(everything(arrived), plain(folder, imsize=64))
    assert dataset.is_decoded(), "both look at one file"


def test_one_that_went_while_it_travelled_is_done_without(folder):
    data = pickle.dumps(opened(folder))
    shutil.rmtree(folder / ".decoded")
    assert torch.equal(everything(pickle.loads(data)), plain(folder))


def test_files_are_read_once_only(folder):
    config = data_config(folder, num_workers=2, cache="auto")
    batches = real_batches(config, build_dataset(config), 0, "cpu")
    first = [next(batches).images for _ in range(3)]               # 12 samples: an epoch has ended, if not with a batch
    assert not multiprocessing.active_children(), "with nothing left to decode, workers are dismissed"
    for path in folder.glob("*.png"):
        path.unlink()
    later = torch.cat([next(batches).images for _ in range(5)])
    assert set(identities(later)) == set(identities(torch.cat(first)))


def test_where_all_is_decoded_no_worker_is_started(folder, monkeypatch):
    everything(opened(folder))
    config = data_config(folder, num_workers=2, cache="auto")
    batches = real_batches(config, build_dataset(config), 0, "cpu")
    assert not multiprocessing.active_children()
    expected = take(real_batches(data_config(folder), open_dataset(data_config(folder)), 0, "cpu"), 6)
    assert torch.equal(take(batches, 6), expected)
    monkeypatch.setattr("data_loader.available_memory", lambda: 0)
    real_batches(config, build_dataset(config), 0, "cpu")
    assert not multiprocessing.active_children(), "where it is unknown how much there is"
    monkeypatch.setattr("data_loader.available_memory", lambda: 10_000)
    batches = real_batches(config, build_dataset(config), 0, "cpu")
    assert len(multiprocessing.active_children()) == 2, "a file larger than memory is read ahead of time"
    assert torch.equal(take(batches, 6), expected)


# ---- memory ----


@pytest.mark.parametrize(
    ("num_workers", "memory", "shm", "kept"),
    [
        (0, 10**9, 0, True),  # one process needs no shared memory
        (2, 10**9, 10**9, True),
        (2, 10**9, 10_000, False),  # a container's small /dev/shm
        (0, 10_000, 10**9, False),
        (0, 0, 10**9, True),  # unknown, as on Windows
    ],
)
def test_what_is_no_file_is_kept_in_memory_where_that_is_not_short(monkeypatch, num_workers, memory, shm, kept):
    monkeypatch.setattr(decoded_cache, "available_memory", lambda: memory)
    monkeypatch.setattr(decoded_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=shm))
    dataset = opened(".", dataset="toy", num_workers=num_workers)
    assert isinstance(dataset, DecodedCache) == kept
    assert not kept or dataset.pictures.is_shared() == (num_workers > 0)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("num_workers", "limit", "share"), [(0, "available_memory", 4), (2, "available_memory", 4), (2, "/dev/shm", 2)]
)
def test_each_process_takes_a_quarter_of_the_memory_or_half_of_dev_shm(
        monkeypatch, num_workers, limit, share, processes):
    size = 4096 * 3 * 16 * 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    for room, kept in ((size, True), (size - 1, False)):
        free = {"available_memory": 2**40, "/dev/shm": 2**40, limit: share * processes * room}
        monkeypatch.setattr(decoded_cache, "available_memory", lambda free=free: free["available_memory"])
        monkeypatch.setattr(decoded_cache.shutil, "disk_usage",
                            lambda path, free=free: SimpleNamespace(free=free[path]))
        assert isinstance(opened(".", dataset="toy", num_workers=num_workers), DecodedCache) == kept
    monkeypatch.setattr(decoded_cache, "MEMORY", size - 1)
    free.update({"available_memory": 2**40, "/dev/shm": 2**40})
    assert not isinstance(opened(".", dataset="toy", num_workers=num_workers), DecodedCache), "however much there is"


MEMINFO = "MemTotal:       16000 kB\nMemFree:          900 kB\nMemAvailable:    8000 kB\n"


@pytest.mark.parametrize(("table", "pages", "found"), [
    (MEMINFO, 5000, 8000 * 1024), ("MemTotal: 16000 kB\n", 5000, 5000 * 4096 // 2), (None, 5000, 5000 * 4096 // 2),
    (None, None, 0),
], ids=["linux", "old-linux", "macos", "windows"])
def test_the_memory_that_a_machine_or_a_container_can_spare(monkeypatch, tmp_path, table, pages, found):
    def opened(path):
        if table is None:
            raise FileNotFoundError(path)
        return io.StringIO(table)

    monkeypatch.setattr(decoded_cache, "open", opened, raising=False)
    monkeypatch.setattr(decoded_cache.os, "sysconf", {"SC_PHYS_PAGES": pages, "SC_PAGE_SIZE": 4096}.__getitem__)
    if pages is None:
        monkeypatch.delattr(decoded_cache.os, "sysconf")
    monkeypatch.setattr(decoded_cache.workers, "CONTAINER", tmp_path)
    assert decoded_cache.available_memory() == found
    values = {"memory.max": "6000", "memory.current": "5500",
              "memory.stat": "anon 9\nactive_file 70\ninactive_file 20\nslab_reclaimable 10"}
    for name, text in values.items():
        (tmp_path / name).write_text(f"{text}\n")
    assert decoded_cache.available_memory() == 600, "what its limit leaves, and the page cache"
    (tmp_path / "memory.max").write_text("max\n")
    assert decoded_cache.available_memory() == found


def test_what_is_kept_in_memory_is_decoded_once(folder, monkeypatch):
    monkeypatch.setattr(decoded_cache.os, "posix_fallocate", no_space)
    config = data_config(folder, num_workers=2, cache="auto")
    batches = real_batches(config, build_dataset(config), 0, "cpu")
    first = [next(batches).images for _ in range(3)]
    assert not multiprocessing.active_children(), "what workers decoded is seen here"
    for path in folder.glob("*.png"):
        path.unlink()
    later = torch.cat([next(batches).images for _ in range(5)])
    assert set(identities(later)) == set(identities(torch.cat(first)))


def test_memory_is_left_out_where_sharing_fails(folder, monkeypatch):
    def fail(self):
        raise RuntimeError("unable to open shared memory object")

    config = data_config(folder, num_workers=2, cache="auto")
    with monkeypatch.context() as broken:
        broken.setattr(decoded_cache.os, "posix_fallocate", no_space)
        broken.setattr(torch.Tensor, "share_memory_", fail)
        assert not isinstance(build_dataset(config), DecodedCache)
    assert len(take(real_batches(config, build_dataset(config), 0, "cpu"), 3)) == 12


def test_a_checksum_of_zero_is_no_missing_picture(folder, monkeypatch, reads):
    """0 marks a place without a picture, and is the CRC of some pictures."""
    monkeypatch.setattr(decoded_cache, "zlib", SimpleNamespace(crc32=lambda _: 0))
    for _ in range(2):
        dataset = opened(folder)
        assert torch.equal(everything(dataset), plain(folder)) and dataset.is_decoded()
    del reads[:]
    everything(opened(folder))
    assert not reads
