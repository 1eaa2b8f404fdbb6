"""Seeding and random states, the averaged generator, new folders, atomic writes, evenly spread indices."""

import contextlib
import os
import random
from pathlib import Path

import numpy as np
import torch


def seed_everything(seed):
    """Seed the random states of Python, NumPy and torch, on every device."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_states(device):
    """Return the random states that training draws from, in types that load with `weights_only=True`."""
    states = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(states, device):
    """Restore what `random_states` returned. CUDA's state is left alone if `states` has none or `device` is a CPU."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


@contextlib.contextmanager
def forked_random_state(device):
    """Restore the random states at the end: records must not change the weights of a run."""
    states = random_states(device)
    try:
        yield
    finally:
        restore_random_states(states, device)


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


def write_atomically(path, write):
    """Call write(temporary path), fsync, then rename to `path`: a reader sees the whole old or the whole new file.

    If `write` raises, the old file stays and the temporary file is deleted.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, str(temporary)):
            error.filename = str(path)                  # a full disk names no file by itself
        raise


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
