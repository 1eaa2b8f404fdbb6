"""Seeding and random states, run folders and their lock, the averaged generator. Nothing else belongs here."""

import contextlib
import os
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

try:
    import fcntl
except ImportError:             # Windows: runs go without the lock
    fcntl = None


def seed_everything(seed):
    """Seed the random states of Python, NumPy and torch, on every device."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def choose_algorithms(deterministic):
    """On CUDA: the fastest algorithms, or (`--deterministic true`) those that give the same bits every time."""
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def random_states(device):
    """The random states that training draws from, as tensors and plain containers: `weights_only` can load them."""
    states = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(states, device):
    """Set what `random_states` returned. A CUDA state is skipped on a CPU and the other way round."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


@contextlib.contextmanager
def forked_random_state(device):
    """Whatever is drawn inside leaves no trace: records must not change a run's weights."""
    states = random_states(device)
    try:
        yield
    finally:
        restore_random_states(states, device)


@dataclass(frozen=True)
class RunFolders:
    """Where one run writes: pictures, attention maps, logs, checkpoints."""

    samples: Path
    attention: Path
    logs: Path
    models: Path

    @classmethod
    def of(cls, config):
        samples = Path(config.sample_path) / config.version
        return cls(
            samples=samples,
            attention=Path(config.attn_path) / config.version if config.attn_path else samples,
            logs=Path(config.log_path) / config.version,
            models=Path(config.model_save_path) / config.version,
        )

    def create(self):
        """Make them all. Raises OSError where the disk refuses."""
        for folder in (self.samples, self.attention, self.logs, self.models):
            folder.mkdir(parents=True, exist_ok=True)

    def set_aside_records_after(self, step):
        """Move the pictures of later records into `superseded/` beside them: the run goes on from `step` anew."""
        for folder in {self.samples, self.attention}:
            for path in folder.iterdir():
                number, _, rest = path.name.partition("_")
                if rest and number.isdecimal() and int(number) > step and path.is_file():
                    (folder / "superseded").mkdir(exist_ok=True)
                    os.replace(path, folder / "superseded" / path.name)


def lock_folder(folder):
    """An open file that keeps other processes from training into `folder`, or None if one already does.

    A POSIX record lock, not flock: loader workers forked later do not inherit it, so it ends with this process.
    """
    file = open(Path(folder) / ".lock", "w")  # noqa: SIM115 - held for the life of the run
    if fcntl is None:
        return file
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def write_atomically(path, write):
    """Call write(temporary path), then rename: a reader sees the old file or the new one, whole.

    The data reaches the disk before the name does. If `write` raises, the old file stands and nothing is left over.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@torch.no_grad()
def ema_update(G_ema, G, decay):
    """Move G_ema's parameters towards G's by 1 - decay; copy its buffers.

    CRUCIAL: batch norm's statistics and spectral norm's u, v are copied. Averaged u, v belong to no weight: the
    effective spectral norm becomes 1.39 instead of 1.
    """
    torch._foreach_lerp_(list(G_ema.parameters()), list(G.parameters()), 1 - decay)
    buffers = list(zip(G_ema.buffers(), G.buffers(), strict=True))
    for dtype in {buffer.dtype for _, buffer in buffers}:       # of one type they are copied at once
        torch._foreach_copy_(*zip(*(pair for pair in buffers if pair[1].dtype == dtype), strict=True))
