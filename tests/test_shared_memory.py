"""Little shared memory, such as the 64 MB of a container: found before the first worker starts, or ends the run."""

import contextlib
import ctypes
import io
import time

import pytest
import torch
from conftest import data_config, fill, forks, take

from data_loader import build_dataset, real_batches
from dataset import workers
from errors import DataError


def mount(size: str):
    """Mount a /dev/shm of this size, seen by this process and its children. Raise OSError where that is denied."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespace, recursive_and_private = 0x20000, 0x4000 | 0x40000
    for failed in (lambda: libc.unshare(new_namespace),
                   lambda: libc.mount(b"none", b"/", None, recursive_and_private, None),
                   lambda: libc.mount(b"none", b"/dev/shm", b"tmpfs", 0, f"size={size}".encode())):
        if failed():
            raise OSError(ctypes.get_errno(), "not allowed")


def may_mount(_) -> bool:
    try:
        mount("4m")
    except (OSError, AttributeError):           # no such functions on other systems
        return False
    return True


needs_mount = pytest.mark.skipif(not forks(may_mount, 1)[0], reason="may not mount a small /dev/shm")


def in_little_memory(size: str, **changes):
    """(exit code, output, seconds) of 12 batches of 1.5 MB each by two workers, at so much shared memory."""
    def work(_):
        mount(size)
        config = data_config("pictures", imsize=256, batch_size=8, num_workers=2, check_data="full", **changes)
        began, out, code = time.monotonic(), io.StringIO(), 0
        with contextlib.redirect_stdout(out):
            try:
                assert take(real_batches(config, build_dataset(config), 0, "cpu"), 12).shape == (96, 3, 256, 256)
            except DataError as error:
                print(error)
                code = error.code
        return code, out.getvalue(), time.monotonic() - began

    return forks(work, 1)[0]


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return fill(tmp_path / "pictures", 10)


@needs_mount
@pytest.mark.parametrize("size", ["6m", "4k"])
def test_little_shared_memory_is_found_before_the_first_worker_starts(pictures, size):
    code, out, _ = in_little_memory(size)
    assert code == 0, out
    where = "by 1 loader process" if size == "6m" else "in the training process"
    assert out.count(f"note: pictures are loaded {where}: the ") == 1 and out.count("/dev/shm") == 1


@needs_mount
def test_memory_that_goes_short_later_ends_the_run_within_seconds(pictures, monkeypatch):
    """Another program takes it after the start: a worker that gets none must not leave the run waiting forever."""
    monkeypatch.setattr(workers, "shared_memory", lambda: 2**40)
    code, out, seconds = in_little_memory("4m", cache="off")
    assert code == 3 and seconds < 20, out
    assert "--num_workers: a loader process got no shared memory" in out and "--num_workers 0" in out
    assert "--shm-size" in out


def test_a_worker_that_gets_no_memory_says_so(pictures, monkeypatch):
    def fail(self):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)
    config = data_config("pictures", num_workers=2)
    with pytest.raises(DataError, match="a loader process got no shared memory .*No space left") as caught:
        take(real_batches(config, build_dataset(config), 0, "cpu"), 3)
    assert caught.value.code == 3


def test_where_no_process_can_be_started_the_training_process_loads(pictures, monkeypatch, capsys):
    config = data_config("pictures", num_workers=2)
    expected = take(real_batches(data_config("pictures"), build_dataset(config), 0, "cpu"), 3)

    def refuse(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", refuse)
    monkeypatch.setattr(workers, "cores", lambda: 2)
    assert torch.equal(take(real_batches(config, build_dataset(config), 0, "cpu"), 3), expected)
    assert capsys.readouterr().out.count("note: loader processes cannot be started (No space left on device)") == 1
    assert list(workers.spread(list, range(9), 2, "looking")) == list(range(9))


def test_a_rank_of_several_machines_has_its_share_of_the_whole_batch(monkeypatch, capsys):
    """Two of four processes are on this machine: each batch of 64 is 16 pictures a process."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(workers, "shared_memory", lambda: 2 * workers.BATCHES * 16 * 3 * 64 * 64)
    config = data_config(imsize=64, batch_size=64, num_workers=1, channels="rgb", fit="crop")
    assert workers.readers(config) == 1 and not capsys.readouterr().out
