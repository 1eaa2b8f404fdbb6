"""Batches of real pictures: resumable sampling, worker processes."""

import errno
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from multiprocessing.util import Finalize
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import WHITE, _warm, data_config, fill, fill_lmdb, identities, take
from PIL import Image
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

import data_loader
from data_loader import Samples, build_dataset, load_to_device, real_batches
from dataset import workers
from dataset.images import ImageDataset
from errors import DataError

# ---- sampling ----


@pytest.fixture(scope="module")
def ten(tmp_path_factory) -> Path:
    """Ten pictures: not a multiple of the batch of four, so that batches run across epoch ends."""
    return fill(tmp_path_factory.mktemp("ten"), 10)


def open_batches(path, first_sample=0, rank=0, world_size=1, **changes):
    config = data_config(path, **changes)
    return real_batches(config, build_dataset(config), first_sample, "cpu", rank, world_size)


def test_batches_are_the_pictures_in_minus_one_to_one(tmp_path):
    for index, colour in enumerate([(0, 0, 0), WHITE, (51, 51, 51), (204, 204, 204)]):
        Image.new("RGB", (20, 20), colour).save(tmp_path / f"{index}.png")
    images, labels = next(open_batches(tmp_path))
    assert images.shape == (4, 3, 16, 16) and images.dtype == torch.float32 and labels is None
    assert sorted(images[:, 0, 0, 0].tolist()) == pytest.approx([-1, -0.6, 0.6, 1])


def test_every_epoch_shows_every_picture_once_in_an_order_of_its_own(ten):
    shown = identities(take(open_batches(ten), 10))  # 40 samples: 4 epochs
    epochs = [shown[start : start + 10] for start in range(0, 40, 10)]
    assert all(len(set(epoch)) == 10 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert identities(take(open_batches(ten, seed=8), 10))[:10] != epochs[0]


@pytest.mark.parametrize(("cache", "num_workers"), [("off", 2), ("on", 0)])
def test_order_and_flips_depend_on_neither_workers_cache_nor_resume(ten, tmp_path, cache, num_workers):
    expected = take(open_batches(ten, hflip=True), 9)
    changes = dict(hflip=True, num_workers=num_workers, cache=cache, cache_dir=tmp_path)
    assert torch.equal(take(open_batches(ten, **changes), 9), expected)
    assert torch.equal(take(open_batches(ten, first_sample=5 * 4, **changes), 4), expected[5 * 4 :])


def test_half_of_the_pictures_are_mirrored_and_only_with_hflip(ten):
    plain, mirrored = (take(open_batches(ten, hflip=hflip), 50) for hflip in (False, True))
    turned = [torch.equal(b, a.flip(-1)) for a, b in zip(plain, mirrored, strict=True)]
    assert all(t or torch.equal(a, b) for t, a, b in zip(turned, plain, mirrored, strict=True))
    assert 75 < sum(turned) < 125
    by_picture = Counter(zip(identities(plain), turned, strict=True))
    assert len(by_picture) == 20  # each picture comes both ways: the coin is the sample's, not the picture's
    plain, mirrored = (take(open_batches(ten, hflip=hflip, seed=8), 10) for hflip in (False, True))
    assert turned[:40] != [torch.equal(b, a.flip(-1)) for a, b in zip(plain, mirrored, strict=True)], "and the seed's"


def test_ranks_share_the_global_batch(ten):
    changes = dict(hflip=True, num_workers=2)
    whole = take(open_batches(ten, **changes), 6).view(6, 4, 3, 16, 16)
    parts = [take(open_batches(ten, rank=r, world_size=2, **changes), 6).view(6, 2, 3, 16, 16) for r in (0, 1)]
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_ranks_share_each_accumulated_part_of_the_global_batch(ten):
    changes = dict(hflip=True, batch_size=8, accumulate=2)
    whole = take(open_batches(ten, **changes), 5).view(5, 2, 4, 3, 16, 16)              # (batches, parts, B, ...)
    parts = [take(open_batches(ten, rank=r, world_size=2, **changes), 5).view(5, 2, 2, 3, 16, 16) for r in (0, 1)]
    assert torch.equal(torch.cat(parts, dim=2), whole)
    assert torch.equal(whole.flatten(0, 2), take(open_batches(ten, **{**changes, "accumulate": 1}), 5))


def test_samples_seen_counts_what_the_caller_got_and_no_more_that_workers_have_read(ten):
    batches = open_batches(ten, first_sample=8, num_workers=2)
    assert batches.samples_seen == 8
    take(batches, 3)
    assert batches.samples_seen == 20


def test_global_random_states_stay_as_they_are(ten):
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())

    before = states()
    take(open_batches(ten, hflip=True, num_workers=2), 4)
    assert states() == before


# ---- workers ----


def test_workers_outlive_signals_and_end_with_close(ten):
    expected = take(open_batches(ten), 9)
    batches = open_batches(ten, num_workers=2)
    first = [next(batches).images, next(batches).images]  # one from each worker: both have started
    started = multiprocessing.active_children()
    assert len(started) == 2
    for worker in started:
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    assert torch.equal(torch.cat([*first, take(batches, 7)]), expected)  # take closes
    assert not multiprocessing.active_children()


@pytest.mark.soak
def test_workers_end_with_the_program(ten):
    program = f"""
from conftest import data_config
from data_loader import build_dataset, real_batches

config = data_config({str(ten)!r}, num_workers=2)
batches = real_batches(config, build_dataset(config), 0, "cpu")
next(batches)
raise SystemExit(3)
"""
    command, root = [sys.executable, "-c", program], Path(data_loader.__file__).parent
    # Returns when the last worker has gone too: they hold the other end of the pipe.
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=30,
                           env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"})
    assert ended.returncode == 3 and not ended.stderr


def read_or_die(index: int, parent: int) -> torch.Tensor:
    if index == 5 and os.getpid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.zeros(3, 16, 16, dtype=torch.uint8)


def test_a_killed_worker_is_reported_and_the_other_ends(monkeypatch):
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))   # torch waits 5 s
    dataset = ImageDataset(partial(read_or_die, parent=os.getpid()), 10, "10 pictures", [])
    with pytest.raises(DataError, match="--num_workers 0") as caught:
        take(real_batches(data_config(num_workers=2), dataset, 0, "cpu"), 5)
    assert caught.tb and not multiprocessing.active_children()  # which the traceback holds


def end_at_once():
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_while_it_sends_a_batch_is_reported():
    """Then reading from its connection fails, before PyTorch looks for dead workers."""
    error = ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
    worker = multiprocessing.get_context("fork").Process(target=end_at_once)
    worker.start()
    assert "--num_workers" in str(workers.death(error, SimpleNamespace(_workers=[worker])))
    with subprocess.Popen(["sleep", "60"]) as alive:
        working = SimpleNamespace(sentinel=os.pidfd_open(alive.pid), exitcode=None)
        assert workers.death(error, SimpleNamespace(_workers=[working])) is None
        alive.kill()


def read_and_end_badly(index: int) -> torch.Tensor:
    """The second worker dies when it is told to end, while the first, which is waited for, takes its time."""
    if torch.utils.data.get_worker_info().id:
        Finalize(None, os.kill, (os.getpid(), signal.SIGKILL), exitpriority=1)
    else:
        Finalize(None, time.sleep, (0.3,), exitpriority=1)
    return torch.zeros(3, 16, 16, dtype=torch.uint8)


@pytest.mark.soak
def test_a_worker_that_dies_during_the_close_does_not_fail_it():
    """torch then raises in the main thread, in the middle of closing."""
    dataset = ImageDataset(read_and_end_badly, 10, "10 pictures", [])
    batches = real_batches(data_config(num_workers=2), dataset, 0, "cpu")
    next(batches), next(batches)  # one from each worker
    started = multiprocessing.active_children()
    batches.close()
    assert not multiprocessing.active_children()
    assert sorted(worker.exitcode for worker in started) == [-signal.SIGKILL, 0]


def what_happened(indices) -> list[tuple]:
    """(index, size of its chunk, process id, whether signals are ignored) of each; the first chunk is slow."""
    time.sleep(0.2 * (0 in indices))
    ignored = all(signal.getsignal(number) == signal.SIG_IGN for number in (signal.SIGTERM, signal.SIGINT))
    return [(index, len(indices), os.getpid(), ignored) for index in indices]


def test_a_task_is_spread_over_all_cores_and_comes_back_in_order(monkeypatch, capsys):
    monkeypatch.setattr(workers, "cores", lambda: 2)
    wanted = [0, *range(18, 9, -1)]
    found, sizes, processes, ignored = zip(*workers.spread(what_happened, wanted, 4, "looking"), strict=True)
    assert list(found) == wanted and list(sizes) == [4] * 8 + [2] * 2
    assert len(set(processes)) == 2 and os.getpid() not in processes and all(ignored)
    assert not multiprocessing.active_children()
    err = capsys.readouterr().err
    assert "looking" in err and "10/10" in err
    ((*_, process, _),) = workers.spread(what_happened, [7], 4, "looking")
    assert process == os.getpid() and not list(workers.spread(what_happened, [], 4, "looking"))


def fail(indices):
    if 20 in indices:
        raise RuntimeError("not this one")
    return list(indices)


def die(indices, parent, how):
    if 20 in indices and os.getpid() != parent:
        time.sleep(0.1)                         # until what came before is sent
        os.kill(os.getpid(), how)
    return list(indices)


def test_what_is_left_when_a_worker_is_killed_is_done_by_this_process(monkeypatch, capsys):
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))   # torch waits 5 s
    monkeypatch.setattr(workers, "cores", lambda: 2)
    killed = partial(die, parent=os.getpid(), how=signal.SIGKILL)
    assert list(workers.spread(killed, range(40), 4, "decoding")) == list(range(40))
    assert "note: a process was killed while decoding pictures" in capsys.readouterr().out
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(("work", "error", "words"), [
    (fail, RuntimeError, "not this one"),
    (partial(die, parent=0, how=signal.SIGUSR1), DataError, "--check_data: a process crashed .*exit code -10"),
])
def test_what_goes_wrong_in_a_spread_task_is_raised_and_ends_it(monkeypatch, work, error, words):
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))   # torch waits 5 s
    monkeypatch.setattr(workers, "cores", lambda: 2)
    with pytest.raises(error, match=words) as caught:
        list(workers.spread(work, range(40), 4, "looking"))
    assert caught.tb and not multiprocessing.active_children()  # which the traceback holds


def test_the_cores_that_count_are_those_of_this_process_and_of_its_container(monkeypatch, tmp_path):
    monkeypatch.setattr(workers, "CONTAINER", tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5}, raising=False)
    assert workers.cores() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    assert workers.cores() == 64
    for text, count in (("max 100000", 64), ("150000 100000", 2), ("20000 100000", 1), ("9900000 100000", 64)):
        (tmp_path / "cpu.max").write_text(f"{text}\n")
        assert workers.cores() == count


@pytest.mark.parametrize(("cores", "shared", "world", "imsize", "expected", "of_five"), [
    (2, 2**30, 1, 64, 2, 5), (16, 2**30, 1, 64, 8, 5), (16, 2**30, 4, 64, 4, 5), (1, 2**30, 2, 64, 1, 5),
    (16, 64 * 2**20, 1, 64, 8, 5), (16, 64 * 2**20, 1, 128, 3, 5), (16, 64 * 2**20, 1, 256, 1, 1),  # Docker's 64 MB
    (16, 64 * 2**20, 1, 512, 0, 0), (16, None, 1, 256, 8, 5)])                                   # None: no such place
def test_workers_are_as_many_as_cores_and_shared_memory_allow(monkeypatch, capsys, cores, shared, world, imsize,
                                                              expected, of_five):
    monkeypatch.setattr(workers, "cores", lambda: cores)
    monkeypatch.setattr(workers.os.path, "isdir", lambda path: shared is not None)
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda path: SimpleNamespace(free=shared))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(world))
    config = data_config(num_workers="auto", imsize=imsize, batch_size=64)
    assert workers.readers(config) == expected
    config.num_workers = 5
    assert workers.readers(config) == of_five
    out = capsys.readouterr().out
    assert out.count("/dev/shm") == (of_five < 5) + (expected == 0)
    assert ("in the training process" in out) == (expected == 0)


def test_by_default_workers_load(ten, monkeypatch):
    monkeypatch.setattr(workers, "cores", lambda: 2)
    batches = open_batches(ten, num_workers="auto")
    first = next(batches).images
    assert len(multiprocessing.active_children()) == 2
    assert torch.equal(first, next(open_batches(ten)).images)
    batches.close()


@pytest.fixture
def spawning():
    """Processes start as on Linux from Python 3.14 on: like those of macOS and Windows they get what is pickled alone.

    But these have imported everything.
    """
    _warm()
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


def test_spawned_workers_do_the_same(tmp_path, spawning):
    fill_lmdb(tmp_path / "cats_lmdb", 10)
    config = data_config(tmp_path, dataset="lsun", hflip=True)
    expected = take(real_batches(config, build_dataset(config), 0, "cpu"), 5)
    config.num_workers = 1
    assert torch.equal(take(real_batches(config, build_dataset(config), 0, "cpu"), 5), expected)


# ---- a set that lives on the device ----


def test_a_set_on_the_device_holds_every_picture_in_order(ten):
    dataset = build_dataset(data_config(ten))
    held = load_to_device(dataset, torch.device("cpu"))
    assert held.dtype == torch.uint8 and torch.equal(held, dataset.load_batch(range(10)))


def test_batches_from_a_set_on_the_device_are_the_same(ten):
    """On the CPU, as far as that goes: a sample number finds there the picture that would be read."""
    samples = Samples(build_dataset(data_config(ten)), seed=7)
    held = load_to_device(samples.dataset, torch.device("cpu"))
    for numbers in (range(0, 4), range(8, 12), range(34, 36)):
        assert torch.equal(held[samples.indices(numbers)], samples.__getitems__(numbers))


@pytest.mark.gpu
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_arrive_on_the_gpu(ten, num_workers):
    config = data_config(ten, hflip=True, num_workers=num_workers)
    batches = take(real_batches(config, build_dataset(config), 0, "cuda"), 9)
    assert batches.is_cuda
    torch.testing.assert_close(batches.cpu(), take(open_batches(ten, hflip=True), 9))       # a GPU rounds once less


def unreadable(length):
    """A data set of which the length may be asked and no picture."""
    def read(index):
        raise AssertionError("it was read")

    return ImageDataset(read, length, "pictures", [])


@pytest.mark.gpu
@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("place", [dict(), dict(rank=0, world_size=2), dict(rank=1, world_size=2)],
                         ids=["alone", "rank-0", "rank-1"])
def test_a_decoded_set_goes_to_the_gpu_whole_if_it_fits(ten, tmp_path, monkeypatch, share, place):
    monkeypatch.setattr(data_loader, "ON_DEVICE", share)
    expected = take(open_batches(ten, hflip=True, **place), 24)
    config = data_config(ten, hflip=True, num_workers=2, cache="on", cache_dir=tmp_path)
    dataset = build_dataset(config)
    batches = real_batches(config, dataset, 0, "cuda", **place)
    if place:                                                       # the other rank reads the rest
        dataset.load_batch(range(10))
    found = [next(batches).images for _ in range(12)]               # across epochs, in which it fills
    assert not multiprocessing.active_children()
    batches.samples.dataset = unreadable(10)
    if share:
        found = torch.cat([*found, take(batches, 12)])
        torch.testing.assert_close(found.cpu(), expected)
    else:
        with pytest.raises(AssertionError, match="it was read"):
            next(batches)
        torch.testing.assert_close(torch.cat(found).cpu(), expected[:len(expected) // 2])
