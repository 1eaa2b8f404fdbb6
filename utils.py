"""Seeding and random states, freed memory, the averaged generator, new folders, atomic writes, evenly spread indices,
RGB.
"""

import contextlib
import ctypes
import glob
import inspect
import os
import random
import re
import socket
import time
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch

ON_WINDOWS = os.name == "nt"
LEFTOVER = 86_400               # seconds after which a temporary file of a live or unknown process is removed, too


def seed_everything(seed):
    """Seed the random states of Python, NumPy and torch, on every device."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def keep_freed_memory():
    """Let the C library keep freed memory for the next allocations, on Linux with glibc.

    By itself it returns large blocks to the system, and the tensors of each training step on a CPU get new pages, which
    the system fills with zeros first: a tenth of a step of SAGAN at 64 px, a quarter of one of FastGAN at 256 px.
    Settings of a user's own (MALLOC_..., GLIBC_TUNABLES) are left alone.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ) or ON_WINDOWS:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)       # other C libraries have none
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3                 # their numbers in malloc.h
        mallopt(mmap_threshold, 2**30)
        mallopt(trim_threshold, 2**31 - 1)


def random_states(device):
    """Return the random states that training draws from, in types that load with `weights_only=True`."""
    states = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def restore_random_states(states, device):
    """Restore what `random_states` returned. A GPU's state is left alone if `states` has none or `device` is another.
    """
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    if device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])


@contextlib.contextmanager
def forked_random_state(device):
    """Restore the random states at the end: records must not change the weights of a run."""
    states = random_states(device)
    try:
        yield
    finally:
        restore_random_states(states, device)


def as_rgb(images):
    """Images (B, C, H, W), floats in [-1, 1] or uint8, of 1 (grey), 3 (RGB) or 4 channels (RGB and transparency) ->
    the same kind, (B, 3, H, W), transparent parts on white. Gradients flow.
    """
    channels = images.size(1)
    if channels == 1:
        return images.expand(-1, 3, -1, -1)
    if channels == 3:
        return images
    if images.dtype == torch.uint8:
        return ((as_rgb(images.float() / 127.5 - 1) + 1) * 127.5).round().to(torch.uint8)
    colours, alpha = images[:, :3], (images[:, 3:] + 1) / 2             # (B, 3, H, W), (B, 1, H, W) in [0, 1]
    return colours * alpha + (1 - alpha)


def spread_indices(count, length):
    """Return `count` indices spread evenly over range(length), ascending; all of them if length <= count."""
    count = min(count, length)
    return [i * length // count for i in range(count)]


@contextlib.contextmanager
def new_folders(*folders):
    """Create these folders, with their parents; if this or the block fails, remove those of them that are empty."""
    created = []
    try:
        for folder in map(Path, folders):
            for path in (*reversed(folder.parents), folder):
                if not path.is_dir():
                    path.mkdir(exist_ok=True)
                    created.append(path)
        yield
    except BaseException:
        for path in reversed(created):
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def write_atomically(path, write, lasting=True, sweep=True):
    """Call write(temporary path), fsync, then rename to `path`: a reader sees the whole old or the whole new file.

    If `write` raises, the old file stays and the temporary file is deleted; one that a killed process left of an
    earlier attempt is deleted, too, unless `sweep` is False: it takes a listing of the folder, and a long run has many
    thousand pictures. `lasting` False, for many files that are easily made again: without fsync, and without `sweep`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{_machine()}-{os.getpid()}.tmp")
    try:
        write(temporary)
        if lasting:
            with open(temporary, "rb+") as file:        # Windows needs a file that is open for writing
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, str(temporary)):
            error.filename = str(path)                  # a full disk names no file by itself
        raise
    if lasting and sweep:
        remove_leftovers(path.parent, path.name)


def remove_leftovers(folder, name=None):
    """Delete temporary files that killed processes left in `folder`: of the file `name`, or of all."""
    for path in list(Path(folder).glob(f".{glob.escape(name) if name else '*'}.*.tmp")):
        written_by = re.fullmatch(r"\..+\.(?:([0-9a-f]{8})-)?(\d+)\.tmp", path.name)      # older ones name no machine
        with contextlib.suppress(OSError):
            ended = written_by and written_by[1] in (None, _machine()) and not _is_alive(int(written_by[2]))
            if ended or (written_by and time.time() - path.stat().st_mtime > LEFTOVER):
                path.unlink()


@cache
def _machine():
    """Return 8 hexadecimal digits for where process numbers are those of this process: a machine, or a container."""
    try:
        processes = os.readlink("/proc/self/ns/pid")
    except OSError:
        processes = ""                                  # not Linux
    return f"{zlib.crc32(f'{socket.gethostname()} {processes}'.encode()):08x}"


def _is_alive(pid):
    """Return whether a process of this number may exist on this machine."""
    if ON_WINDOWS:                                      # signal 0 is a Ctrl-C there
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


@torch.no_grad()
def ema_update(G_ema, G, decay):
    """Move G_ema's parameters towards G's by 1 - decay; copy its buffers.

    CRUCIAL: batch norm's statistics and spectral norm's u, v are copied. Averaged u, v belong to no weight: the
    effective spectral norm becomes 1.39 instead of 1.
    """
    torch._foreach_lerp_(list(G_ema.parameters()), list(G.parameters()), 1 - decay)
    buffers = list(zip(G_ema.buffers(), G.buffers(), strict=True))
    for dtype in {buffer.dtype for _, buffer in buffers}:       # one fused copy per dtype
        torch._foreach_copy_(*zip(*(pair for pair in buffers if pair[1].dtype == dtype), strict=True))


class Adam(torch.optim.Adam):
    """PyTorch's Adam, without what keeps `torch.compile` out of its methods, as nothing here compiles them.

    The first call of that imports the compiler: one to three seconds at the start of every run.
    """

    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))
    add_param_group = inspect.unwrap(torch.optim.Adam.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Adam.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Adam.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Adam.load_state_dict)
